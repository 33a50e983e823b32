"""What is wrong with settings, in our words: where it stands, what was seen, what is allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.settings.identity import IDENTITIES
from asgi_llm_guard.settings.lines import line_in

__all__ = ["ENV_PREFIX", "NESTED", "check_names", "problem_of"]

ENV_PREFIX: Final = "LLM_GUARD_"
NESTED: Final = "__"

# The command line's own, and what a cluster sets for a service that happens to be called llm-guard.
_FOREIGN_VARIABLE: Final = re.compile(r"CONFIG|SERVICE_(HOST|PORT(_.+)?)|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.+)?)?", re.ASCII)
_SHOWN: Final = 80
_SECRETS: Final = frozenset({"secret", "old_secret", "key", "storage", "url", "digest", "api_key"})
_NAMED: Final = re.compile(r"(?:[\w-]+\.)*(\w+): ")


def check_names(names: Iterable[str], settings: type[BaseModel], *, what: str = "environment variable") -> None:
    """Refuse variables, or secret files, that would be ignored in silence: of unknown keys, of keys inside of what is no
    table, and of entries of lists."""
    fields = settings.model_fields
    for variable in sorted(names):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or _FOREIGN_VARIABLE.fullmatch(name, len(ENV_PREFIX)):
            continue
        key, nested, _ = name.removeprefix(ENV_PREFIX).lower().partition(NESTED)
        if key not in fields:
            raise ConfigurationError(f"{what} {variable}: unknown; known are {_variables(fields)}")
        if nested and not _is_list(fields[key].annotation) and not _is_table(fields[key].annotation):
            raise ConfigurationError(f"{what} {variable}: {key} is no table; set {ENV_PREFIX}{key.upper()}")
        if nested and _is_list(fields[key].annotation):
            raise ConfigurationError(
                f"{what} {variable}: an entry of a list cannot be set from the environment; "
                f"change it in the file, or set the whole list, as JSON, in {ENV_PREFIX}{key.upper()}"
            )


def _variables(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{ENV_PREFIX}{field.upper()}" for field in fields)


def _is_list(annotation: Any) -> bool:
    parts = (annotation, *getattr(annotation, "__args__", ()))
    return any(get_origin(part) is list or get_origin(getattr(part, "__origin__", None)) is list for part in parts)


def _is_table(annotation: Any) -> bool:
    return any(get_origin(part) is dict for part in _parts(annotation)) or bool(_models(annotation))


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _table_at(settings: type[BaseModel], path: Iterable[str | int]) -> type[BaseModel] | None:
    """The table that a path leads to; `None`: one whose keys are not known here."""
    table = settings
    for part in path:
        if isinstance(part, str):
            field = table.model_fields.get(part)
            models = [] if field is None else _models(field.annotation)
            if len(models) != 1:
                return None
            (table,) = models
    return table


def problem_of(file: Path, text: str, detail: ErrorDetails, settings: type[BaseModel]) -> str:
    """One problem in our words: where it stands, what is wrong, what was seen."""
    loc = [*detail["loc"]]
    if loc[:1] == ["identity"] and len(loc) > 1 and loc[1] in IDENTITIES:
        tag = loc.pop(1)  # pydantic names the member of the union, which is no key
        table: type[BaseModel] | None = IDENTITIES[str(tag)]
    else:
        table = _table_at(settings, loc[:-1])
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
            message = "unknown key" + ("" if table is None else f"; expected one of {', '.join(table.model_fields)}")
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
    if not _SECRETS.isdisjoint(loc):
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
