"""A guard from a TOML file, the environment and secret files. `docs/settings.md` shows every key.

For each key the environment wins over secret files, and secret files over the file. What is said
here is handed to the constructors that code would call, so that both know the same options, check
them alike and complain in the same words; this module adds where the wrong value stands.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from asgi_llm_guard.cache import Cache
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.denials import check_statuses
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import (
    ApiKeys,
    Extractor,
    JwtIdentity,
    PeerAddress,
    Resolver,
    ScopeUser,
    TrustedHeaders,
    baggage,
    body,
    first_of,
    header,
    vendor_header,
)
from asgi_llm_guard.identity.base import check_params
from asgi_llm_guard.identity.keys import read_toml
from asgi_llm_guard.policies import (
    Budget,
    CacheScope,
    Concurrency,
    DepartmentQuota,
    Iterations,
    ModelAllow,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
)
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.routes import Route, RouteTable
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.wire import dialect_named

__all__ = [
    "ENV_PREFIX",
    "GuardSettings",
    "build_guard_arguments",
    "build_middleware_arguments",
    "load_settings",
]

ENV_PREFIX: Final = "LLM_GUARD_"
_NESTED: Final = "__"

_POLICIES: Final[Mapping[str, Callable[..., Any]]] = {
    "budget": Budget,
    "cache_scope": CacheScope,
    "concurrency": Concurrency,
    "iterations": Iterations,
    "model_allow": ModelAllow,
    "provider_budget": ProviderBudget,
    "quota": Quota,
    "rate_limit": RateLimit,
}
# Arguments that only code can give, or that another part of the settings gives.
_NOT_IN_FILES: Final = frozenset({"agents", "book", "knowledge_base"})

_SOURCES: Final[Mapping[str, Callable[[str], Extractor]]] = {
    "header": header,
    "body": body,
    "baggage": baggage,
    "vendor_header": vendor_header,
}

# What a cluster sets for a service that happens to be called llm-guard.
_FOREIGN_VARIABLE: Final = re.compile(r"SERVICE_(HOST|PORT(_.+)?)|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.+)?)?", re.ASCII)
_SHOWN: Final = 80


# -------------------------------------------------------------------------------- small parts


def _problem(message: str, key: str) -> PydanticCustomError:
    return PydanticCustomError("setting", "{message}", {"message": message, "key": key})


def _construct(
    target: Callable[..., Any], arguments: Mapping[str, Any], *, also: Sequence[str] = (), **ours: object
) -> Any:
    """`target(**arguments, **ours)`, after a look at the names in `arguments`, which come from a table.

    `also`: keys of that table that are no arguments.
    """
    parameters = inspect.signature(target).parameters
    known = [*also, *(name for name in parameters if name not in _NOT_IN_FILES and name not in ours)]
    for name in sorted(set(arguments).difference(known)):
        raise _problem(f"unknown key; expected one of {', '.join(known)}", name)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments and name not in ours:
            raise _problem("is missing", name)
    return target(**arguments, **ours)


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic takes ValueError for a wrong input
    return value


def _check_agent(entry: dict[str, Any]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in entry.items():
        try:
            checked |= check_params({name: value}, prefix="")
        except ConfigurationError as error:
            raise _problem(str(error).removeprefix(f"{name}: "), name) from None
    return checked


def _extractor(sources: Sequence[str]) -> Extractor:
    extractors = []
    for text in sources:
        kind, colon, name = text.partition(":")
        if not colon or kind not in _SOURCES:
            raise ConfigurationError(
                f"expected one of {', '.join(f'{known}:NAME' for known in _SOURCES)} (header:x-session-id), got {text!r}"
            )
        extractors.append(_SOURCES[kind](name))
    return first_of(*extractors)


def _check_sources(sources: list[str]) -> list[str]:
    _extractor(sources)
    return sources


_Number = Annotated[int, BeforeValidator(_no_boolean)]
_Seconds = Annotated[float, BeforeValidator(_no_boolean)]
_Sources = Annotated[list[str], AfterValidator(_check_sources)]
_Agent = Annotated[dict[str, Any], AfterValidator(_check_agent)]


def _check_table_of_statuses(statuses: dict[str, int]) -> dict[str, int]:
    check_statuses(statuses)
    return statuses


_Statuses = Annotated[dict[str, _Number], AfterValidator(_check_table_of_statuses)]


class _Table(BaseModel):
    """A table whose keys are all listed here."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _Arguments(BaseModel):
    """A table whose further keys are arguments of a constructor, which checks them."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    def arguments(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


# ------------------------------------------------------------------------- policies and routes


class PolicySettings(_Arguments):
    """One `[[policies]]` table: a kind, and the arguments of that policy."""

    kind: Literal[
        "budget", "cache_scope", "concurrency", "iterations", "model_allow", "provider_budget", "quota", "rate_limit"
    ]
    shadow: bool = False
    """Only watch: report what would have been refused, and refuse nothing."""

    @model_validator(mode="after")
    def _check(self) -> PolicySettings:
        self.build(QuotaBook())
        return self

    def build(self, book: QuotaBook) -> Policy:
        """The policy. `book` holds the quotas of departments, for the kind `quota`."""
        ours = {"book": book} if self.kind == "quota" else {}
        policy = _construct(_POLICIES[self.kind], self.arguments(), also=("kind", "shadow"), **ours)
        return cast("Policy", policy.shadow() if self.shadow else policy)


class StreamSettings(_Arguments):
    """`[streams]`, or `streams` of a route: the arguments of `StreamRules`."""

    @model_validator(mode="after")
    def _check(self) -> StreamSettings:
        self.build()
        return self

    def build(self) -> StreamRules:
        """The rules."""
        return cast("StreamRules", _construct(StreamRules, self.arguments()))


class RouteSettings(_Arguments):
    """One `[[routes]]` table: the arguments of `Route`."""

    dialect: str = "auto"
    """As `Route`; `none` for routes whose bodies are not read."""
    extra: list[PolicySettings] = []
    session: _Sources | None = None
    streams: StreamSettings | None = None

    @model_validator(mode="after")
    def _check(self) -> RouteSettings:
        self.build(QuotaBook())
        if self.dialect not in {"auto", "none"}:
            dialect_named(self.dialect)
        return self

    def build(self, book: QuotaBook) -> Route:
        """The route."""
        return cast(
            "Route",
            _construct(
                Route,
                self.arguments(),
                also=("dialect", "extra", "session", "streams"),
                dialect=None if self.dialect == "none" else self.dialect,
                extra=[policy.build(book) for policy in self.extra],
                session=None if self.session is None else _extractor(self.session),
                streams=None if self.streams is None else self.streams.build(),
            ),
        )


class DepartmentSettings(_Arguments):
    """One `[departments.…]` table: the arguments of `DepartmentQuota`."""

    models: list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> DepartmentSettings:
        self.build()
        return self

    def build(self) -> DepartmentQuota:
        """The quota."""
        return cast(
            "DepartmentQuota", _construct(DepartmentQuota, self.arguments(), also=("models",), models=self.models)
        )


# ----------------------------------------------------------------------------------- identity


class ApiKeysSettings(_Table):
    """`[identity]` with `kind = "api_keys"`: the arguments of `ApiKeys.from_file`."""

    kind: Literal["api_keys"]
    file: Path
    """The keys file, relative to the settings file."""
    secret: SecretStr | None = None
    """The secret of the digests; unless it is set, the keys file names a `secret_file`."""
    headers: list[str] | None = None
    unknown: Literal["refuse", "anonymous"] | None = None

    def build(self, directory: Path) -> Resolver:
        """The resolver, with the keys file read."""
        secret = None if self.secret is None else self.secret.get_secret_value()
        return ApiKeys.from_file(directory / self.file, secret=secret, **_given(self, "file", "secret"))


class JwtSettings(_Table):
    """`[identity]` with `kind = "jwt"`: the arguments of `JwtIdentity`."""

    kind: Literal["jwt"]
    key: SecretStr | None = None
    """A PEM text, a JWK or JWK set as JSON, or a shared secret."""
    key_file: Path | None = None
    """A file with the key instead, relative to the settings file."""
    algorithms: list[str]
    issuer: str | Literal[False]
    """`false`: any will do."""
    audience: str | Literal[False]
    """`false`: any will do."""
    caller: str | None = None
    user: str | None = None
    departments: str | None = None
    agent: str | None = None
    tags: str | None = None
    header: str | None = None
    leeway_s: _Number | None = None

    @model_validator(mode="after")
    def _check(self) -> JwtSettings:
        if (self.key is None) == (self.key_file is None):
            raise ValueError("expected either key or key_file")
        return self

    def build(self, directory: Path) -> Resolver:
        """The resolver, with the key file read."""
        text = self.key.get_secret_value() if self.key is not None else _read_key(directory, self.key_file)
        given = _given(self, "key", "key_file")
        return JwtIdentity(_jwt_key(text), **given | {"issuer": self.issuer or None, "audience": self.audience or None})


class ScopeUserSettings(_Table):
    """`[identity]` with `kind = "scope_user"`; the values name attributes of `scope["user"]`."""

    kind: Literal["scope_user"]
    caller: str | None = None
    user: str | None = None
    departments: str | None = None
    agent: str | None = None
    tags: str | None = None

    def build(self, directory: Path) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver."""
        return ScopeUser(**{option: _attribute(name) for option, name in _given(self).items()})


class TrustedHeadersSettings(_Table):
    """`[identity]` with `kind = "trusted_headers"`: the arguments of `TrustedHeaders`."""

    kind: Literal["trusted_headers"]
    proxies: list[str] = []
    trust_headers: bool = False
    caller: str | None = None
    user: str | None = None
    departments: str | None = None
    agent: str | None = None
    tags: str | None = None
    max_length: _Number | None = None

    @model_validator(mode="after")
    def _check(self) -> TrustedHeadersSettings:
        self.build(Path())
        return self

    def build(self, directory: Path) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver."""
        return TrustedHeaders(**_given(self))


class PeerAddressSettings(_Table):
    """`[identity]` with `kind = "peer_address"`: the arguments of `PeerAddress`."""

    kind: Literal["peer_address"]
    proxies: list[str] = []
    ipv6_prefix: _Number | None = None

    @model_validator(mode="after")
    def _check(self) -> PeerAddressSettings:
        self.build(Path())
        return self

    def build(self, directory: Path) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver."""
        return PeerAddress(**_given(self))


_IdentitySettings = ApiKeysSettings | JwtSettings | ScopeUserSettings | TrustedHeadersSettings | PeerAddressSettings
_IDENTITIES: Final[Mapping[str, type[BaseModel]]] = {
    "api_keys": ApiKeysSettings,
    "jwt": JwtSettings,
    "scope_user": ScopeUserSettings,
    "trusted_headers": TrustedHeadersSettings,
    "peer_address": PeerAddressSettings,
}


def _given(table: _Table, *but: str) -> dict[str, Any]:
    """The keys that were set, as arguments; the others keep the constructor's defaults."""
    return table.model_dump(exclude={"kind", *but}, exclude_none=True)


def _attribute(name: str) -> Callable[[Mapping[str, Any]], object]:
    def value(scope: Mapping[str, Any]) -> object:
        return getattr(scope["user"], name, None)

    return value


def _read_key(directory: Path, file: Path | None) -> str:
    path = directory / (file or "")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigurationError(f"key_file: {path} cannot be read: {reason}") from None


def _jwt_key(text: str) -> str | Mapping[str, Any]:
    if not text.startswith("{"):
        return text
    try:
        return cast("dict[str, Any]", json.loads(text))
    except (ValueError, RecursionError) as error:
        position = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigurationError(f"key: begins like a JWK, but is not valid JSON{position}") from None


# ------------------------------------------------------------------------------------- prices


class PriceSettings(_Table):
    """`[prices]`: the arguments of `PriceBook.snapshot`."""

    file: Path | None = None
    """A TOML file with prices, relative to the settings file."""
    overrides: dict[str, dict[str, Any]] | None = None
    """Prices by model."""
    unknown: Any = "deny"
    on_conflict: Literal["genai", "max"] = "genai"
    trust_reported: Literal["missing", "always", "never"] = "missing"

    @model_validator(mode="after")
    def _check(self) -> PriceSettings:
        if self.file is not None and self.overrides is not None:
            raise ValueError("expected either file or overrides")
        return self

    def build(self, directory: Path) -> PriceBook:
        """The price book, with the file read."""
        return PriceBook.snapshot(
            overrides=self.overrides if self.file is None else directory / self.file,
            unknown=self.unknown,
            on_conflict=self.on_conflict,
            trust_reported=self.trust_reported,
        )


class CacheSettings(_Table):
    """`[cache]`: the arguments of `Cache`. `None`: as its own default."""

    ttl: str | None = None
    streams: bool | None = None
    wait: str | None = None
    storage: SecretStr | None = None
    """A URL, for a storage that is the cache's alone; shown nowhere, because it may hold a password."""
    ignore: list[str] | None = None
    version: str | None = None
    max_value_bytes: _Number | None = None
    max_bytes: _Number | None = None
    max_entries: _Number | None = None

    @model_validator(mode="after")
    def _check(self) -> CacheSettings:
        Cache(**self._arguments())
        return self

    def build(self) -> Cache:
        """The cache's settings, with its storage opened."""
        if self.storage is None:
            return Cache(**self._arguments())
        return Cache(storage=open_storage(self.storage.get_secret_value(), clock=SystemClock()), **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "storage"}
        return {name: value for name, value in given.items() if value is not None}


# ----------------------------------------------------------------------------------- the whole


class GuardSettings(BaseSettings):
    """Everything that a guard and its middleware can be told in a file. `None`: as the guard's own default.

    Built in code, what is passed wins over the environment; `load_settings` lets the environment win
    over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=_NESTED,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        secrets_dir_missing="error",
        validate_default=False,
    )

    storage: SecretStr = SecretStr("memory://")
    """A URL; shown nowhere, because it may hold a password."""
    policies: list[PolicySettings] = []
    agents: dict[str, _Agent] = {}
    departments: dict[str, DepartmentSettings] = {}
    identity: Annotated[_IdentitySettings, Field(discriminator="kind")] | None = None
    session: _Sources | None = None
    prices: PriceSettings | None = None
    streams: StreamSettings | None = None
    cache: CacheSettings | None = None
    gateway: dict[str, Any] | None = Field(default=None, repr=False)
    """Deployments and how they are chosen; see `build_gateway_arguments`. Shown nowhere, because it may hold keys."""
    routes: list[RouteSettings] | None = None
    exempt: list[str] = []
    unlisted: Literal["deny", "pass"] = "pass"
    rate_limit_headers: bool = True
    statuses: _Statuses | None = None
    disclose: Literal["owned", "all"] | None = None
    hold_wait_s: _Seconds | None = Field(default=None, ge=0, le=60)
    max_waiting: _Number | None = Field(default=None, ge=0)
    max_overage: _Number | None = Field(default=None, ge=1)
    session_limit: _Number | None = Field(default=None, ge=0)
    anonymous_session_limit: _Number | None = Field(default=None, ge=0)
    session_overflow: Literal["deny", "share"] | None = None
    on_data_loss: Literal["deny", "accept", "rebuild"] | None = None
    session_ttl: str | None = None
    assumed_input_tokens: _Number | None = Field(default=None, ge=0)
    assumed_output_tokens: _Number | None = Field(default=None, ge=0)
    learn_output: str | None = None
    max_body_bytes: _Number | None = Field(default=None, ge=0)
    secrets_dir: Path | None = None
    """A folder of secret files: `llm_guard_identity__secret`, `llm_guard_storage`, …; relative to the file."""

    _file: Path | None = PrivateAttr(default=None)
    _book: QuotaBook | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self) -> GuardSettings:
        everywhere = [*self.policies, *(policy for route in self.routes or () for policy in route.extra)]
        if self.departments and not any(policy.kind == "quota" for policy in everywhere):
            raise _problem('no policy reads them; add [[policies]] with kind = "quota"', "departments")
        RouteTable(None, exempt=self.exempt, unlisted=self.unlisted)
        return self

    @property
    def directory(self) -> Path:
        """What file names are relative to: where the settings file is, or the working directory."""
        return Path() if self._file is None else self._file.parent

    @property
    def book(self) -> QuotaBook:
        """The quotas of the departments: one book for the guard and all its routes, so that a change reaches all."""
        if self._book is None:
            self._book = QuotaBook({name: department.build() for name, department in self.departments.items()})
        return self._book

    @property
    def origin(self) -> str:
        """Where the settings come from, for messages."""
        return "settings" if self._file is None else str(self._file)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings passes every source by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is passed, then the environment, then secret files."""
        _check_environment(os.environ)
        return init_settings, env_settings, NestedSecretsSettingsSource(file_secret_settings)


class _FileSettings(GuardSettings):
    """What is passed is a file's content: the environment and secret files win over it."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file, environment, secrets = super().settings_customise_sources(
            settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
        )
        return environment, secrets, file


def load_settings(path: str | os.PathLike[str]) -> GuardSettings:
    """The settings in the TOML file `path`, with secret files and the environment over them.

    Raises:
        ConfigurationError: a line for each problem: the file or the environment variable, the key, the
            value (never a secret) and what is allowed; line and column where the file is not TOML.
    """
    file = Path(path)
    content = read_toml(file)
    folder = os.environ.get(f"{ENV_PREFIX}SECRETS_DIR") or content.get("secrets_dir")
    secrets_dir = file.parent / folder if isinstance(folder, str) else None
    if secrets_dir is not None and not secrets_dir.is_dir():
        raise ConfigurationError(f"{file}: secrets_dir: expected a folder, got {str(secrets_dir)!r}")
    try:
        settings = _FileSettings(_secrets_dir=secrets_dir, **content)  # type: ignore[call-arg]  # BaseSettings takes it
    except ValidationError as error:
        problems = dict.fromkeys(_line(file, detail) for detail in error.errors(include_url=False))
        raise ConfigurationError("\n".join(problems)) from None
    except SettingsError as error:
        named = re.search(r'field "(\w+)"', str(error))
        variable = f"{ENV_PREFIX}{named[1].upper()}" if named else ENV_PREFIX
        raise ConfigurationError(f"environment variable or secret file {variable}: is not valid JSON") from None
    settings._file = file  # noqa: SLF001 - our own class
    return settings


def build_guard_arguments(settings: GuardSettings) -> dict[str, Any]:
    """The keyword arguments of `Guard`. Reads the files that the settings name (keys, prices).

    Raises:
        ConfigurationError: one of these files is wrong; names the settings file, the key and that file.
    """
    arguments: dict[str, Any] = {
        "policies": [policy.build(settings.book) for policy in settings.policies],
        "storage": settings.storage.get_secret_value(),
        "agents": settings.agents,
    }
    if settings.identity is not None:
        with _named(settings, "identity"):
            arguments["identity"] = settings.identity.build(settings.directory)
    if settings.session is not None:
        arguments["session"] = _extractor(settings.session)
    if settings.streams is not None:
        arguments["streams"] = settings.streams.build()
    if settings.prices is not None:
        with _named(settings, "prices"):
            arguments["prices"] = settings.prices.build(settings.directory)
    if settings.cache is not None:
        with _named(settings, "cache"):
            arguments["cache"] = settings.cache.build()
    for name in _SAME_NAME:
        value = getattr(settings, name)
        if value is not None:
            arguments[name] = value
    return arguments


_SAME_NAME: Final = (
    "statuses",
    "disclose",
    "hold_wait_s",
    "max_waiting",
    "max_overage",
    "session_limit",
    "anonymous_session_limit",
    "session_overflow",
    "session_ttl",
    "on_data_loss",
    "assumed_input_tokens",
    "assumed_output_tokens",
    "learn_output",
    "max_body_bytes",
)


def build_middleware_arguments(settings: GuardSettings) -> dict[str, Any]:
    """The keyword arguments of `GuardMiddleware`, but for the guard itself."""
    return {
        "routes": None if settings.routes is None else [route.build(settings.book) for route in settings.routes],
        "exempt": settings.exempt,
        "unlisted": settings.unlisted,
        "rate_limit_headers": settings.rate_limit_headers,
    }


def build_gateway_arguments(settings: GuardSettings) -> dict[str, Any]:
    """The keyword arguments of `gateway.Gateway`, but for the guard itself.

    Raises:
        ConfigurationError: there is no `[gateway]`, or something in it is wrong; names the settings file and the key.
    """
    if settings.gateway is None:
        raise ConfigurationError(f"{settings.origin}: gateway: is missing")
    from asgi_llm_guard.gateway.configured import gateway_arguments

    with _named(settings, "gateway"):
        return gateway_arguments(settings.gateway)


# ------------------------------------------------------------------------------------- errors


@contextmanager
def _named(settings: GuardSettings, key: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{settings.origin}: {key}: {error}") from None


def _check_environment(environ: Mapping[str, str]) -> None:
    """Refuse variables that would be ignored in silence: of unknown keys, and of entries of lists."""
    fields = GuardSettings.model_fields
    for variable in sorted(environ):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or _FOREIGN_VARIABLE.fullmatch(name, len(ENV_PREFIX)):
            continue
        key, nested, _ = name.removeprefix(ENV_PREFIX).lower().partition(_NESTED)
        if key not in fields:
            raise ConfigurationError(f"environment variable {variable}: unknown; known are {_variables(fields)}")
        if nested and _is_list(fields[key].annotation):
            raise ConfigurationError(
                f"environment variable {variable}: an entry of a list cannot be set from the environment; "
                f"change it in the file, or set the whole list, as JSON, in {ENV_PREFIX}{key.upper()}"
            )


def _variables(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{ENV_PREFIX}{field.upper()}" for field in fields)


def _is_list(annotation: Any) -> bool:
    parts = (annotation, *getattr(annotation, "__args__", ()))
    return any(get_origin(part) is list or get_origin(getattr(part, "__origin__", None)) is list for part in parts)


_TABLES: Final[Mapping[str, type[BaseModel]]] = {"prices": PriceSettings, "cache": CacheSettings}


def _line(file: Path, detail: ErrorDetails) -> str:
    """One problem in our words: where it stands, what is wrong, what was seen."""
    loc = [*detail["loc"]]
    if loc[:1] == ["identity"] and len(loc) > 1 and loc[1] in _IDENTITIES:
        tag = loc.pop(1)  # pydantic names the member of the union, which is no key
        table: type[BaseModel] | None = _IDENTITIES[str(tag)]
    else:
        table = _TABLES.get(str(loc[0])) if len(loc) > 1 else GuardSettings
    context, kind = detail.get("ctx", {}), detail["type"]
    seen = _seen(loc, detail["input"])
    match kind:
        case "setting":
            loc.append(context["key"])
            message = context["message"]
        case "value_error":
            message = str(context["error"])
            if not isinstance(context["error"], ConfigurationError):
                message += seen
        case "missing":
            message = "is missing"
        case "extra_forbidden":
            known = ", ".join(table.model_fields) if table is not None else ""
            message = f"unknown key; expected one of {known}"
        case "union_tag_not_found":
            loc.append("kind")
            message = f"is missing; expected one of {', '.join(_IDENTITIES)}"
        case "union_tag_invalid":
            loc.append("kind")
            message = f"expected one of {', '.join(_IDENTITIES)}, got {context['tag']!r}"
        case _:
            message = detail["msg"].replace("Input should be", "expected") + seen
    if not loc:
        return f"{file}: {message}"
    path = _path(loc)
    return f"{_origin(file, loc)}: {path}: {message.removeprefix(f'{path}: ')}"


def _seen(loc: Sequence[str | int], value: object) -> str:
    if loc[-1:] in (["secret"], ["key"], ["storage"]):
        return ""  # secrets
    if isinstance(value, (dict, list)):
        return ", got a table" if isinstance(value, dict) else ", got a list"
    text = repr(value)
    return f", got {text if len(text) <= _SHOWN else text[:_SHOWN] + '…'}"


def _path(loc: Sequence[str | int]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _origin(file: Path, loc: Sequence[str | int]) -> str:
    """Where the value comes from: an environment variable, the file, or both for a table."""
    names = {name.upper(): name for name in os.environ}
    parts = [str(part).upper() for part in loc]
    for end in range(len(parts), 0, -1):
        variable = ENV_PREFIX + _NESTED.join(parts[:end])
        if variable in names:
            return f"environment variable {names[variable]}"
    inside = [name for upper, name in names.items() if upper.startswith(ENV_PREFIX + _NESTED.join(parts) + _NESTED)]
    return f"{file} with environment variable {', '.join(sorted(inside))}" if inside else str(file)
