"""Values as data: what is kept, published, exported, and sent by the administration API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.control.numbers import check_sizes, told
from asgi_llm_guard.control.values import (
    UNLIMITED,
    Agent,
    Department,
    Key,
    Kind,
    KnowledgeBase,
    Price,
    Value,
    check_instant,
    check_name,
    plain,
)
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.stops import Stop

__all__ = ["TYPES", "field_of", "kind_of", "read", "shown", "written"]

TYPES: Final[Mapping[Kind, type[Value]]] = {
    "department": Department,
    "agent": Agent,
    "key": Key,
    "price": Price,
    "knowledge_base": KnowledgeBase,
    "raise": Raise,
    "stop": Stop,
}

_REQUIRED: Final[Mapping[Kind, tuple[str, ...]]] = {
    kind: tuple([field.name for field in msgspec.structs.fields(made) if field.required])
    for kind, made in TYPES.items()
}
_NAMED: Final[Mapping[Kind, str]] = {"department": "name", "agent": "name", "price": "model"}
"""The field that is the entry's name; `id` for all others."""
_LIMITS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "department": ("models", "daily_tokens", "monthly_tokens", "daily_cost", "monthly_cost"),
}
"""Fields in which `None` is "no limit": as data, `unlimited`."""
_ABSENT: Final[Mapping[Kind, tuple[str, ...]]] = {
    "agent": ("max_iterations",),
    "key": ("user", "agent", "expires_at_ms", "revoked_ms", "replaces"),
    "price": ("from_ms", "until_ms"),
    "knowledge_base": ("acl", "version"),
    "raise": ("scope", "subject", "caller"),
    "stop": ("caller", "until_ms"),
}
"""Fields in which `None` is "not said": as data, left out."""
_TAKEN_AWAY: Final[Mapping[tuple[Kind, str], str]] = {
    ("agent", "max_iterations"): "default",
    ("key", "user"): "",
    ("key", "agent"): "",
    ("key", "expires_at_ms"): "never",
    ("knowledge_base", "acl"): "",
    ("knowledge_base", "version"): "",
    ("stop", "until_ms"): "never",
}
"""What takes such a field away from a value that has it."""
_WHOLE: Final = frozenset({"price", "raise", "stop"})
"""Kinds that are replaced as a whole: what their data leave out is not there."""
_OURS: Final = ("prefix", "digest", "created_ms", "revoked_ms", "replaces")
"""Fields of a key that only this package sets."""


def field_of(kind: Kind) -> str:
    return _NAMED.get(kind, "id")


def written(value: Value) -> dict[str, Any]:
    """The value as JSON data, without its name. `read` makes the same value of it."""
    kind = kind_of(value)
    limits, absent = _LIMITS.get(kind, ()), _ABSENT.get(kind, ())
    data: dict[str, Any] = {}
    for name in value.__struct_fields__:
        if name == field_of(kind):
            continue
        item = getattr(value, name)
        if item is None:
            if name in limits:
                data[name] = UNLIMITED
            elif name not in absent:
                raise AssertionError(f"{kind}.{name} cannot be None")
        else:
            data[name] = plain(item)
    return data


def shown(value: Value) -> dict[str, Any]:
    """As `written`, for people and for the audit: without the digest of a key."""
    data = written(value)
    data.pop("digest", None)
    return data


def kind_of(value: Value) -> Kind:
    for kind, made in TYPES.items():
        if isinstance(value, made):
            return kind
    raise ConfigurationError(
        f"expected one of {', '.join(made.__name__ for made in TYPES.values())}, got {told(value)}"
    )


def read(kind: Kind, name: str, data: object, *, old: Value | None = None, ours: bool = True) -> Value:
    """The value that data describe. What they leave out is as in `old`; without one, as the value's own default.

    `unlimited` is no limit; `null` is refused, whatever it is for. A price, a raise and a stop are replaced as a whole.
    `ours`: the data were `written` by this package, and have fields that nobody else may set.

    Raises:
        ConfigurationError: a field is unknown, missing or malformed; names the entry and the field.
    """
    check_name(kind, name)
    where = f"{kind} {name!r}"
    check_sizes(data, where)
    if not isinstance(data, Mapping):
        raise ConfigurationError(f"{where}: expected its fields, got a {type(data).__name__}")
    made = TYPES[kind]
    own = field_of(kind)
    known = tuple(field for field in made.__struct_fields__ if ours or kind != "key" or field not in _OURS)
    fields: dict[str, Any] = {}
    if old is not None and kind not in _WHOLE:
        fields = {field: getattr(old, field) for field in made.__struct_fields__}
    for field, item in data.items():
        if field not in known:
            # Not the value: it may be a key that somebody put into the wrong place.
            allowed = ", ".join(each for each in known if each != own)
            raise ConfigurationError(f"{where}: unknown field {str(field)[:64]!r}; expected {allowed}")
        if field == own:
            if item != name:
                raise ConfigurationError(f"{where}: {field} says {item!r}")
            continue
        fields[field] = _field(kind, field, item, where)
        if field == "reason" and not ours and not isinstance(item, str):
            raise ConfigurationError(f"{where}: reason: expected a text, got {told(item)}")
    fields[own] = name
    missing = [field for field in _REQUIRED[kind] if field not in fields]
    if missing:
        raise ConfigurationError(f"{where}: {', '.join(missing)} missing")
    if not ours:
        _check_subjects(kind, fields, where)
    try:
        value = made(**fields)
        if isinstance(value, (Raise, Stop)) and value.until_ms is not None:
            check_instant("until_ms", value.until_ms)
    except ConfigurationError as error:
        text = str(error)
        raise ConfigurationError(text if text.startswith(where) else f"{where}: {text}") from None
    return value


def _check_subjects(kind: Kind, fields: Mapping[str, Any], where: str) -> None:
    """Refuse what would be about nobody: ids have no spaces around them, and no characters that cannot be shown.

    Raises:
        ConfigurationError: names the entry and the field.
    """
    if kind not in ("raise", "stop"):
        return
    for field in "policy", "scope", "subject", "caller":
        text = fields.get(field)
        if isinstance(text, str) and (text != text.strip() or not text.isprintable()):
            raise ConfigurationError(
                f"{where}: {field}: expected a name without spaces around it or characters that cannot be shown, got {text!r}"
            )


def _field(kind: Kind, field: str, item: Any, where: str) -> Any:
    away = _TAKEN_AWAY.get((kind, field))
    if item is None:
        instead = f"say {away!r} to take it away" if away is not None else "leave it out"
        if field in _LIMITS.get(kind, ()) or (kind == "agent" and field == "max_iterations"):
            instead = f"say {UNLIMITED!r} for no limit"
        raise ConfigurationError(f"{where}: {field}: null says nothing; {instead}")
    if (away is not None and item == away) or (item == UNLIMITED and field in _LIMITS.get(kind, ())):
        return None
    return tuple(item) if isinstance(item, list) else item
