"""What is wrong with settings, in our words: where it stands, what was seen, what is allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.settings.identity import IDENTITIES
from asgi_llm_guard.settings.lines import line_in
from asgi_llm_guard.settings.tables import CacheSettings, PriceSettings

__all__ = ["ENV_PREFIX", "NESTED", "check_environment", "problem_of"]

ENV_PREFIX: Final = "LLM_GUARD_"
NESTED: Final = "__"

# The command line's own, and what a cluster sets for a service that happens to be called llm-guard.
_FOREIGN_VARIABLE: Final = re.compile(r"CONFIG|SERVICE_(HOST|PORT(_.+)?)|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.+)?)?", re.ASCII)
_SHOWN: Final = 80
_SECRETS: Final = frozenset({"secret", "old_secret", "key", "storage", "url", "digest"})
_NAMED: Final = re.compile(r"(?:[\w-]+\.)*(\w+): ")


def check_environment(environ: Mapping[str, str], settings: type[BaseModel]) -> None:
    """Refuse variables that would be ignored in silence: of unknown keys, and of entries of lists."""
    fields = settings.model_fields
    for variable in sorted(environ):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or _FOREIGN_VARIABLE.fullmatch(name, len(ENV_PREFIX)):
            continue
        key, nested, _ = name.removeprefix(ENV_PREFIX).lower().partition(NESTED)
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


def problem_of(file: Path, text: str, detail: ErrorDetails, settings: type[BaseModel]) -> str:
    """One problem in our words: where it stands, what is wrong, what was seen."""
    loc = [*detail["loc"]]
    if loc[:1] == ["identity"] and len(loc) > 1 and loc[1] in IDENTITIES:
        tag = loc.pop(1)  # pydantic names the member of the union, which is no key
        table: type[BaseModel] | None = IDENTITIES[str(tag)]
    else:
        table = _TABLES.get(str(loc[0])) if len(loc) > 1 else settings
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
            message = f"is missing; expected one of {', '.join(IDENTITIES)}"
        case "union_tag_invalid":
            loc.append("kind")
            message = f"expected one of {', '.join(IDENTITIES)}, got {context['tag']!r}"
        case _:
            message = detail["msg"].replace("Input should be", "expected") + seen
    if not loc:
        return f"{file}: {message}"
    path = _path(loc)
    named = _NAMED.match(message)  # "iterations.limit: …": what a constructor complains of
    line = line_in(text, [*loc, named[1]] if named else loc)
    return f"{_origin(file, line, loc)}: {path}: {message.removeprefix(f'{path}: ')}"


def _seen(loc: Sequence[str | int], value: object) -> str:
    if loc and loc[-1] in _SECRETS:
        return ""
    if isinstance(value, (dict, list)):
        return ", got a table" if isinstance(value, dict) else ", got a list"
    text = repr(value)
    return f", got {text if len(text) <= _SHOWN else text[:_SHOWN] + '…'}"


def _path(loc: Sequence[str | int]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _origin(file: Path, line: int | None, loc: Sequence[str | int]) -> str:
    """Where the value comes from: an environment variable, the file, or both for a table."""
    names = {name.upper(): name for name in os.environ}
    parts = [str(part).upper() for part in loc]
    for end in range(len(parts), 0, -1):
        variable = ENV_PREFIX + NESTED.join(parts[:end])
        if variable in names:
            return f"environment variable {names[variable]}"
    inside = [name for upper, name in names.items() if upper.startswith(ENV_PREFIX + NESTED.join(parts) + NESTED)]
    where = str(file) if line is None else f"{file}, line {line}"
    return f"{where} with environment variable {', '.join(sorted(inside))}" if inside else where
