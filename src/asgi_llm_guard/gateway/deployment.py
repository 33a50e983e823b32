"""Deployments: where a model is served, with which key and under which limits. Pure, but that key files are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.fields import is_connection_field
from asgi_llm_guard.gateway.platforms import OPENAI_PATHS, Platform, custom_platform, platform_named
from asgi_llm_guard.gateway.secret import Secret, read_secret
from asgi_llm_guard.policies.grammar import Limit, parse_limits, whole
from asgi_llm_guard.policies.providers import canonical_provider, qualified
from asgi_llm_guard.windows import Lifetime

__all__ = ["ANY_MODEL", "DEFAULT_GROUP", "Deployment", "MissingKey", "Timeouts", "is_name"]

DEFAULT_GROUP: Final = "auto"
"""The name that stands for all deployments together."""
ANY_MODEL: Final = "*"
"""Of a deployment that serves every model of its provider."""

_EVER: Final = Lifetime(366 * 86_400_000)
_NAME: Final = re.compile(r"[^\x00-\x20\x7f]{1,256}")
_LONGEST_NAME: Final = 200
"""Of a deployment: limits are kept by it."""
_PROVIDER: Final = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,63}")
_SECRETIVE: Final = re.compile(r"key|secret|token|password|credential|authorization|cookie", re.IGNORECASE)
_FIELDS: Final = re.compile(r"\{(\w+)\}")


class MissingKey(ConfigurationError):  # noqa: N818 - what happened
    """A deployment needs a key and has none."""


def _is_number(value: object, *, above: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long one request may take, in seconds; `None`: without end."""

    connect_s: float | None = 10.0
    """To a connection, TLS included."""
    read_s: float | None = 300.0
    """From one byte of the answer to the next, and to the first."""
    total_s: float | None = 600.0
    """From the start to the end of the answer."""

    def __post_init__(self) -> None:
        for name in ("connect_s", "read_s", "total_s"):
            value = getattr(self, name)
            if value is not None and not _is_number(value, above=0.0):
                raise ConfigurationError(f"Timeouts.{name}: expected seconds above 0 or None, got {value!r}")


_TIMEOUTS: Final = Timeouts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One place where a model is served.

    Everything that says where a request goes, and with whose key, is here; nothing of it comes from a request.

    Raises:
        ConfigurationError: a field is wrong or missing; names it, and the deployment. It never shows a key.
    """

    provider: str
    """One of `platforms.PLATFORMS`, in any spelling, or a name of your own with an `api_base`."""
    model: str
    """As the provider names it; a prefix of that provider (`openai/…`) is taken off. `*`: every model of it."""
    name: str = ""
    """Names it in events, limits and records, and is nobody else's. Empty: `provider/model`."""
    groups: tuple[str, ...] = (DEFAULT_GROUP,)
    """The names under which it is asked for beside its own."""
    api_key: Secret | str | None = None
    """Plain, `env:NAME` or `file:/run/secrets/x`; read once. `None`: it is looked for where its provider's keys
    usually are."""
    api_base: str | None = None
    """The base URL, where it is not the provider's own."""
    params: Mapping[str, object] = field(default_factory=dict)
    """What requests say if they do not say it themselves: `temperature`, …"""
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the connection: `api_version`, `region`, `organization`, what LiteLLM needs to sign. What looks like a key is
    kept as a `Secret`."""
    headers: Mapping[str, str | Secret] = field(default_factory=dict)
    """Sent along with each request."""
    base_model: str | None = None
    """The model whose prices and window are its own, where `model` does not tell: a deployment of Azure."""
    rpm: int | None = None
    """Requests in 60 s; `None`: no limit; 0: never asked."""
    tpm: int | None = None
    """Tokens in 60 s."""
    max_parallel: int | None = None
    budget: object = ()
    """Its own: `"$10/1d"`, or as `ProviderBudget` writes it; several in a list. See `limits`."""
    weight: float = 1.0
    """Its share, beside that of others, where they are chosen by weight."""
    context_window: int | None = None
    """Tokens; `None`: as the model's data say."""
    timeouts: Timeouts = _TIMEOUTS
    via: str = ""
    """Who carries the request: `http`, `litellm`, or the name of a provider of your own. Empty: what fits."""
    environ: InitVar[Mapping[str, str] | None] = None
    """Where variables are looked up; `None`: this process's."""
    platform: Platform = field(init=False, repr=False, compare=False)

    def __post_init__(self, environ: Mapping[str, str] | None) -> None:
        where = self.name if isinstance(self.name, str) and self.name else f"{self.provider}/{self.model}"
        try:
            self._check(os.environ if environ is None else environ)
        except ConfigurationError as error:
            raise type(error)(f"deployment {where!r}: {error}") from None

    def _check(self, environ: Mapping[str, str]) -> None:
        platform = self._platform()
        self._set(via=self.via or platform.via)
        if self.via == "http" and not platform.paths:  # somebody's server in front of it, which speaks as OpenAI does
            platform = msgspec.structs.replace(platform, paths=OPENAI_PATHS)
        self._set(platform=platform, provider=platform.name)
        self._set(model=_model_of(self.model, platform.name))
        if self.base_model is not None:
            self._set(base_model=_model_of(self.base_model, platform.name))
        self._set(name=self.name or f"{platform.name}/{self.model}")
        if not is_name(self.name) or len(self.name) > _LONGEST_NAME:
            raise ConfigurationError(
                f"name: expected 1 to {_LONGEST_NAME} characters without spaces, got {self.name!r}; "
                "where the model's is longer, give the deployment one of its own"
            )
        groups = (self.groups,) if isinstance(self.groups, str) else tuple(self.groups)
        for group in groups:
            if not is_name(group):
                raise ConfigurationError(f"groups: expected names without spaces, got {group!r}")
        self._set(groups=groups)
        for name in ("rpm", "tpm", "max_parallel", "context_window"):
            if getattr(self, name) is not None:
                self._set(**{name: whole(getattr(self, name), name=name)})
        if not _is_number(self.weight, above=-1.0) or self.weight < 0:
            raise ConfigurationError(f"weight: expected a number from 0, got {self.weight!r}")
        if self.budget:
            self._set(budget=parse_limits(self.budget, lifetime=_EVER, name="budget"))
        self._set(params=_mapping(self.params, "params"), options=_kept(self.options, "options"))
        for name in self.params:
            if is_connection_field(name) or name in ("model", "messages", "stream"):
                raise ConfigurationError(
                    f"params: {name!r} is no parameter of a request; see options, headers, api_base"
                )
        self._set(headers=_headers(self.headers))
        if not isinstance(self.timeouts, Timeouts):
            raise ConfigurationError(f"timeouts: expected Timeouts(...), got {self.timeouts!r}")
        self._check_key(environ)
        if self.via == "http":
            self._set(api_base=self._address(environ))
        elif self.api_base is not None:
            _check_url(self.api_base)

    def __hash__(self) -> int:
        return hash(self.name)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _platform(self) -> Platform:
        if not isinstance(self.provider, str) or not self.provider.strip():
            raise ConfigurationError(f"provider: expected a name, got {self.provider!r}")
        try:
            return platform_named(self.provider)
        except ConfigurationError:
            name = canonical_provider(self.provider) or ""
            if (not self.api_base and self.via in ("", "http")) or not _PROVIDER.fullmatch(name):
                raise
            return custom_platform(name, via_litellm=self.via == "litellm")

    def _check_key(self, environ: Mapping[str, str]) -> None:
        key = read_secret(self.api_key, environ)
        if key is None and self.api_key:
            raise MissingKey(f"api_key: {_source(self.api_key)} is empty or missing")
        if key is None:
            names = self.platform.key_env
            key = next((Secret(environ[name]) for name in names if environ.get(name, "").strip()), None)
            signed = (self.via == "litellm" and self.options) or "azure_ad_token" in self.options
            if key is None and not (self.platform.keyless or signed or self.via not in ("http", "litellm")):
                wanted = " or ".join(names)
                raise MissingKey(f"api_key: is missing: give it, env:NAME or file:/path, or set {wanted}")
        self._set(api_key=None if key is None else key.check_header("api_key"))

    def _address(self, environ: Mapping[str, str]) -> str:
        if self.api_base is None:
            base = self.platform.base_url
            if base is None:
                raise ConfigurationError(f"api_base: {self.provider} has no address of its own; give the base URL")
            return _FIELDS.sub(lambda found: self._option(found[1], environ), base)
        split = _check_url(self.api_base)
        path = split.path.rstrip("/")
        for known in self.platform.paths.values():
            path = path.removesuffix(known)
        return f"{split.scheme}://{split.netloc}{path or self.platform.base_path.rstrip('/')}"

    def _option(self, name: str, environ: Mapping[str, str]) -> str:
        spelled = (name, f"aws_{name}_name", f"{name}_name")
        value = next((self.options[each] for each in spelled if each in self.options), None)
        variables = self.platform.options_env.get(name, ())
        value = value or next((environ[each] for each in variables if environ.get(each)), None)
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9\-]{1,64}", value):
            raise ConfigurationError(
                f"options.{name}: expected letters, digits and '-', or {' or '.join(variables)} set"
            )
        return value

    @property
    def key(self) -> Secret | None:
        """Its key, read from where `api_key` says."""
        return self.api_key if isinstance(self.api_key, Secret) else None

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Its own budgets."""
        return self.budget if isinstance(self.budget, tuple) else ()

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """Every key that it has."""
        kept = (*self.options.values(), *self.headers.values(), self.api_key)
        return tuple(value for value in kept if isinstance(value, Secret))

    @property
    def full_model(self) -> str:
        """`provider/model` in canonical spelling: what allow-lists and budgets compare."""
        return qualified(self.provider, self.model)

    @property
    def priced_model(self) -> str:
        """The model whose prices are its own, as the provider names it."""
        return self.base_model or self.model

    def redacted(self, text: str) -> str:
        """`text` without any of its keys in it."""
        for secret in self.secrets:
            text = secret.redacted(text)
        return text


# ------------------------------------------------------------------------------- parts


def is_name(value: object) -> bool:
    """Whether this may name a model or a group: 1 to 256 characters, without spaces."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _model_of(model: object, provider: str) -> str:
    if not isinstance(model, str) or not is_name(model.strip()):
        raise ConfigurationError(f"model: expected 1 to 256 characters without spaces, got {model!r}")
    name = model.strip()
    prefix, slash, rest = name.partition("/")
    # Openrouter's own models are called `openrouter/…` there.
    if slash and rest and canonical_provider(prefix) == provider and (provider != "openrouter" or "/" in rest):
        return rest
    return name


def _mapping(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(f"{name}: expected a mapping with names, got a {type(value).__name__}")
    return MappingProxyType(dict(value))


def _kept(value: object, name: str) -> Mapping[str, object]:
    """The mapping, with a `Secret` in place of each text that looks like a key."""
    return MappingProxyType(
        {
            key: Secret(item, name=f"{name}.{key}")
            if isinstance(item, str) and item.strip() and _SECRETIVE.search(key)
            else item
            for key, item in _mapping(value, name).items()
        }
    )


def _headers(value: object) -> Mapping[str, str | Secret]:
    headers = _kept(value, "headers")
    kept: dict[str, str | Secret] = {}
    for name, item in headers.items():
        text = item.reveal() if isinstance(item, Secret) else item
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~\-]+", name):
            raise ConfigurationError(f"headers: {name!r} is not a header's name")
        if not isinstance(text, str) or not text.isascii() or not text.isprintable():
            raise ConfigurationError(f"headers.{name}: expected printable ASCII")
        kept[name.lower()] = item if isinstance(item, Secret) else text
    return MappingProxyType(kept)


def _check_url(url: object) -> Any:
    split = urlsplit(url.strip()) if isinstance(url, str) else None
    try:
        fine = split is not None and split.scheme in ("http", "https") and split.hostname and (split.port or 1)
    except ValueError:  # no port
        fine = False
    if split is None or not fine:
        raise ConfigurationError("api_base: expected a URL such as https://host/v1")
    if "@" in split.netloc or split.query or split.fragment:
        raise ConfigurationError(f"api_base: no user, query or fragment belongs into it, got one for {split.hostname}")
    return split


def _source(key: Secret | str | None) -> str:
    """Where a key was to be read from; never the key."""
    return key if isinstance(key, str) and key.startswith(("env:", "os.environ/", "file:")) else "the key"
