"""Rows of the audit as people read them: what was done to whom, and which fields it changed. Pure.

Texts are those of the rows: whoever writes them on a page makes them visible and short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from asgi_llm_guard.admin.shown import instant, quantity
from asgi_llm_guard.control import AuditEntry
from asgi_llm_guard.control.values import MAX_INSTANT_MS
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import to_nano

__all__ = ["UNSAID", "Deed", "Difference", "deed"]

_WORDS: Final = {
    "put": "change",
    "new_key": "make",
    "rotate_key": "rotate",
    "revoke_key": "revoke",
    "login": "log-in",
    "logout": "log-out",
}
_OF_KINDS: Final = {
    ("put", "stop"): "stop",
    ("remove", "stop"): "release",
    ("put", "raise"): "raise",
    ("remove", "raise"): "end of a raise",
}
UNSAID: Final = "\N{EN DASH}"
"""Stands for what there is not."""


class Difference(NamedTuple):
    """One field, and what it was and is."""

    field: str
    before: str
    after: str


class Deed(NamedTuple):
    """What a row says."""

    verb: str
    what: str
    differences: tuple[Difference, ...]


def deed(entry: AuditEntry, tz: str) -> Deed:
    """What a row says, in words, with instants of this zone; what these do not know is given as it stands there."""
    kind, _, name = entry.target.partition(":")
    old, new = _read(entry.old), _read(entry.new)
    verb = "add" if entry.verb == "put" and old is None and new is not None else _WORDS.get(entry.verb, entry.verb)
    fields = new if isinstance(new, dict) else old if isinstance(old, dict) else {}
    what = f"{kind.replace('_', ' ')} {name}" if name else kind
    if kind == "stop" and fields.get("scope"):
        what = _whose(fields) or "everything"
    elif kind == "raise" and fields.get("policy"):
        whose = _whose(fields)
        what = " ".join(part for part in (str(fields["policy"]), _more(fields), whose and f"for {whose}") if part)
    elif kind == "key" and fields.get("caller"):
        what = f"key {name} of {fields['caller']}"
    return Deed(_OF_KINDS.get((entry.verb, kind), verb), what, _differences(old, new, tz))


def _whose(fields: Mapping[str, Any]) -> str:
    scope, subject, caller = (str(fields.get(key) or "") for key in ("scope", "subject", "caller"))
    whose = "" if scope == "all" else f"{scope} {subject}".strip()
    return f"{whose} of {caller}" if caller else whose


def _more(fields: Mapping[str, Any]) -> str:
    amount, unit = str(fields.get("amount", "")), str(fields.get("unit", ""))
    if unit != "usd":
        return f"by {amount} {unit}"
    try:
        return f"by {quantity(to_nano(amount), 'nanousd')}"
    except ConfigurationError:
        return f"by ${amount}"


def _differences(old: object, new: object, tz: str) -> tuple[Difference, ...]:
    if not isinstance(old, dict | None) or not isinstance(new, dict | None):
        return (Difference("all", _text(old), _text(new)),) if old != new else ()
    before, after = old or {}, new or {}
    return tuple(
        Difference(
            field.removesuffix("_ms").replace("_", " "),
            *(_value(field, each.get(field), tz) for each in (before, after)),
        )
        for field in dict.fromkeys([*after, *before])
        if before.get(field) != after.get(field)
    )


def _value(field: str, value: object, tz: str) -> str:
    if field.endswith("_ms") and isinstance(value, int) and 0 <= value <= MAX_INSTANT_MS:
        return instant(value, tz)
    return _text(value)


def _text(value: object) -> str:
    if value is None or value in ("", [], {}):
        return UNSAID
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:  # what others have written there
        return text
