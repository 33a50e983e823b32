"""Deployments from a configuration: mappings, TOML and YAML files, under the names that existing files use."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from asgi_llm_guard.errors import ConfigurationError, NotInstalledError
from asgi_llm_guard.gateway.deployment import DEFAULT_GROUP, Deployment, MissingKey, Timeouts
from asgi_llm_guard.gateway.fields import is_connection_field
from asgi_llm_guard.policies.providers import canonical_provider, provider_of

__all__ = ["parse_deployments", "read_deployments"]

_log = logging.getLogger("asgi_llm_guard")

# Of an entry, by the names that existing files have for it.
_SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "name": ("name", "deployment_name", "id"),
    "api_key": ("api_key",),
    "api_base": ("api_base", "base_url"),
    "base_model": ("base_model",),
    "rpm": ("rpm",),
    "tpm": ("tpm",),
    "max_parallel": ("max_parallel", "max_parallel_requests"),
    "weight": ("weight",),
    "context_window": ("context_window", "max_input_tokens"),
    "via": ("via",),
}
_ENTRY: Final = frozenset(
    {
        "provider", "custom_provider", "model_name", "model", "litellm_params", "params", "options", "headers", "groups",
        "group", "budget", "budget_limit", "time_period", "max_budget", "budget_duration", "timeouts", "model_info",
        "timeout",
        *(spelling for spellings in _SPELLINGS.values() for spelling in spellings),
    }
)  # fmt: skip
_IGNORED: Final = frozenset({"max_retries", "num_retries", "custom_llm_provider", "drop_params", "mock_response"})
"""Of LiteLLM's parameters: what the gateway does itself, and what is for tests."""
_OPTIONS: Final = frozenset(
    {
        "model", "organization", "project", "region", "account_id", "timeout", "stream_timeout", "max_budget",
        "budget_duration", "max_parallel_requests", "max_input_tokens", "rpm", "tpm", "weight", *_IGNORED,
    }
)  # fmt: skip
"""Of LiteLLM's parameters: what says nothing of a request, beside the fields of the connection."""


def parse_deployments(
    entries: Iterable[Mapping[str, Any] | Deployment],
    *,
    environ: Mapping[str, str] | None = None,
    own: Iterable[str] = (),
    warn: Callable[[str], None] | None = None,
) -> tuple[Deployment, ...]:
    """The deployments that entries of a configuration describe.

    An entry has `provider` or `custom_provider`, `model_name`, `api_key`, `api_base`, `litellm_params`, `rpm`, `tpm`
    and what else a `Deployment` has. An entry without a model, or without a key where one is needed, is skipped with a
    warning. Two of one name are told apart by `#2`, `#3`, …

    Args:
        entries: mappings, or deployments that are made already.
        environ: where `env:NAME` and the usual variables of providers are looked up; `None`: this process's.
        own: the names of providers of your own.
        warn: is told what was skipped; `None`: the log.

    Raises:
        ConfigurationError: an entry is wrong, or its provider is not known; says which entry. It never shows a key.
    """
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise ConfigurationError(f"deployments: expected a list of entries, got a {type(entries).__name__}")
    warn = _log.warning if warn is None else warn
    found: list[Deployment] = []
    names: set[str] = set()
    for index, entry in enumerate(entries):
        where = f"deployments[{index}]"
        if isinstance(entry, Deployment):
            made = entry
        else:
            try:
                parsed = _parse(entry, environ, frozenset(own), partial(_tell, warn, where))
            except ConfigurationError as error:
                raise ConfigurationError(f"{where}: {error}") from None
            if parsed is None:
                continue
            made = parsed
        name, number = made.name, 2
        while name in names:
            name, number = f"{made.name}#{number}", number + 1
        names.add(name)
        found.append(made if name == made.name else replace(made, name=name))
    return tuple(found)


def read_deployments(
    path: str | Path, *, environ: Mapping[str, str] | None = None, own: Iterable[str] = ()
) -> tuple[Deployment, ...]:
    """The deployments of a file: a list called `deployments`, `models` or `model_list`, or `[gateway]` around it.

    TOML, or YAML where the name ends in `.yaml` or `.yml`.

    Raises:
        ConfigurationError: the file cannot be read or is wrong; names it.
        NotInstalledError: YAML needs `pyyaml`.
    """
    file = Path(path)
    table = _yaml(file) if file.suffix.lower() in (".yaml", ".yml") else _toml(file)
    if isinstance(table, Mapping) and isinstance(table.get("gateway"), Mapping):
        table = table["gateway"]
    if isinstance(table, Mapping):
        table = next((table[name] for name in ("deployments", "models", "model_list") if name in table), None)
    if not isinstance(table, list):
        raise ConfigurationError(f"{file}: expected a list called deployments")
    try:
        return parse_deployments(table, environ=environ, own=own)
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None


def _toml(file: Path) -> Any:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: {_problem(error)}") from None


def _yaml(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise NotInstalledError("a YAML file", "yaml") from error
    try:
        return yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{file}: {_problem(error)}") from None


def _problem(error: Exception) -> str:
    """What is wrong, without the lines of the file, where keys may stand."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"no YAML: see line {mark.line + 1}"
    return f"cannot be read: {error}" if isinstance(error, tomllib.TOMLDecodeError) else type(error).__name__


def _tell(warn: Callable[[str], None], where: str, text: str) -> None:
    warn(f"{where}: {text}")


def _parse(
    entry: object, environ: Mapping[str, str] | None, own: frozenset[str], warn: Callable[[str], None]
) -> Deployment | None:
    if not isinstance(entry, Mapping):
        raise ConfigurationError(f"expected a mapping, got a {type(entry).__name__}")
    given = {key: value for key, value in entry.items() if value is not None}
    for key in sorted(map(str, given.keys() - _ENTRY)):
        warn(f"{key}: is not known, and has no effect")
    params, options = _split_params(given)
    inner = options.pop("model", None)
    model = inner or given.get("model_name") or given.get("model")
    if not isinstance(model, str) or not model.strip():
        warn("is skipped: it has no model_name")
        return None
    custom = given.get("custom_provider")
    provider = custom or given.get("provider") or options.pop("custom_llm_provider", None) or provider_of(model)[0]
    if not provider:
        raise ConfigurationError(f"provider: is missing, and {model!r} does not tell it")
    values: dict[str, Any] = {
        field: value
        for field, spellings in _SPELLINGS.items()
        if (value := _first(spellings, given, options)) is not None
    }
    if inner and given.get("model_name"):  # as in LiteLLM's files, where the outer name is that of a group
        values["groups"] = (str(given["model_name"]), DEFAULT_GROUP)
    if (groups := given.get("groups") or given.get("group")) is not None:
        values["groups"] = groups
    if custom and canonical_provider(custom) in own and not values.get("via"):
        values["via"] = canonical_provider(custom)
    values["budget"] = _budget(given, options)
    values["headers"] = {**options.pop("extra_headers", {}), **given.get("headers", {})}
    values["timeouts"] = _timeouts(given, options)
    for key in _IGNORED & options.keys():
        del options[key]
    try:
        return Deployment(
            provider=provider, model=model, params=params, options=options, environ=environ, **_without_none(values)
        )
    except MissingKey as error:
        warn(f"is skipped: {error}")
        return None


def _split_params(given: Mapping[str, Any]) -> tuple[dict[str, object], dict[str, Any]]:
    """What `litellm_params` say of requests, and what of the connection or the deployment."""
    params: dict[str, object] = dict(_table(given.get("params", {}), "params"))
    options: dict[str, Any] = dict(_table(given.get("options", {}), "options"))
    inner = {**_table(given.get("litellm_params", {}), "litellm_params")}
    inner.update(_table(inner.pop("extra_body", None) or {}, "litellm_params.extra_body"))
    for key, value in inner.items():
        if value is not None:
            (options if key in _OPTIONS or is_connection_field(key) else params)[key] = value
    info = given.get("model_info")
    if isinstance(info, Mapping):
        options.setdefault("base_model", info.get("base_model"))
    return params, options


def _first(names: Iterable[str], given: Mapping[str, Any], options: dict[str, Any]) -> object:
    """The first that is said, and taken off the options."""
    value: object = None
    for name in names:
        inner = options.pop(name, None)
        if value is None:
            value = given.get(name, inner)
    return value


def _budget(given: Mapping[str, Any], options: dict[str, Any]) -> object:
    amount, period = options.pop("max_budget", None), options.pop("budget_duration", None)
    amount = given.get("budget_limit", given.get("max_budget", amount))
    period = given.get("time_period", given.get("budget_duration", period))
    if "budget" in given:
        return given["budget"]
    return None if amount is None else {"budget_limit": amount, **({} if period is None else {"time_period": period})}


def _timeouts(given: Mapping[str, Any], options: dict[str, Any]) -> Timeouts | None:
    total, first = options.pop("timeout", None), options.pop("stream_timeout", None)
    total = given.get("timeout", total)
    said: dict[str, Any] = dict(_table(given.get("timeouts", {}), "timeouts"))
    if total is not None:
        said = {"total_s": total, "read_s": total if first is None else first, **said}
    elif first is not None:
        said = {"read_s": first, **said}
    unknown = said.keys() - set(Timeouts.__struct_fields__)
    if unknown:
        raise ConfigurationError(f"timeouts: expected connect_s, read_s, total_s, got {', '.join(sorted(unknown))}")
    return Timeouts(**said) if said else None


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _table(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(f"{name}: expected a mapping with names, got a {type(value).__name__}")
    return value
