"""What an export says of each record: the columns, and how their values are written.

Values are neutral (whole nano-dollars, milliseconds, tuples of text), and each format writes them in its own way, none
of them as a float.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import msgspec

from asgi_llm_guard.money import NANO
from asgi_llm_guard.usage import Usage, UsageRecord

__all__ = [
    "ATTRIBUTED",
    "PLAIN",
    "Column",
    "Kind",
    "Row",
    "dollars",
    "guarded",
    "instant",
    "second",
    "to_json",
    "to_text",
]

Kind = Literal["text", "count", "flag", "instant", "money", "texts"]
"""`money`: whole nano-dollars; `instant`: milliseconds since the epoch; `texts`: a tuple."""


class Row(NamedTuple):
    """A record, as one line says it."""

    record: UsageRecord
    department: str | None = None
    """The department that this line is for, where each has its own."""
    counted: bool = True
    """Whether this is the line of its record that counts in a grand total. One of them is."""


class Column(NamedTuple):
    """One column of an export."""

    name: str
    kind: Kind
    value: Callable[[Row], Any]
    """`None`: unknown, or there is none."""


# ------------------------------------------------------------------------------------- writing

_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - everything here is UTC, and says so by its Z
_FORMULAS: Final = frozenset("=+-@\t\r\n'")


def dollars(nanousd: int) -> str:
    """Exact: nine decimals, never an exponent."""
    sign = "-" if nanousd < 0 else ""
    whole, rest = divmod(abs(nanousd), NANO)
    return f"{sign}{whole}.{rest:09d}"


def instant(at_ms: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return (_EPOCH + timedelta(milliseconds=at_ms)).isoformat(timespec="milliseconds") + "Z"


def second(at_ms: int) -> str:
    """ISO 8601 in UTC, to the second."""
    return (_EPOCH + timedelta(milliseconds=at_ms)).isoformat(timespec="seconds") + "Z"


def guarded(text: str) -> str:
    """The text with an apostrophe before it, where a spreadsheet would take it for a formula; or where it begins with one,
    so that taking one away gives the text back.

    Source: OWASP, "CSV Injection": cells that begin with `=`, `+`, `-`, `@`, a tab or a line break.
    """
    return f"'{text}" if text[:1] in _FORMULAS and text else text


def to_text(kind: Kind, value: Any) -> str:
    """A value as a cell of CSV; empty where it is unknown."""
    if value is None:
        return ""
    if kind == "text":
        return guarded(value)
    if kind == "money":
        return dollars(value)
    if kind == "instant":
        return instant(value)
    if kind == "flag":
        return "true" if value else "false"
    if kind == "texts":
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return str(value)


def to_json(kind: Kind, value: Any) -> Any:
    """A value as JSON says it. Money is text, so that nobody reads it as a float."""
    if value is None:
        return None
    if kind == "money":
        return dollars(value)
    return instant(value) if kind == "instant" else value


# ------------------------------------------------------------------------------------- columns


def _of(name: str, field: str | None = None) -> Callable[[Row], Any]:
    wanted = field or name
    return lambda row: getattr(row.record, wanted)


def _of_usage(field: str) -> Callable[[Row], Any]:
    return lambda row: None if row.record.usage is None else getattr(row.record.usage, field)


def _beside(row: Row) -> str | None:
    """What other models did for the answer."""
    usage = row.record.usage
    if usage is None or not usage.extra:
        return None
    return json.dumps(list(map(_known, usage.extra)), separators=(",", ":"))


def _known(usage: Usage) -> dict[str, Any]:
    fields = msgspec.structs.asdict(usage)
    fields.pop("extra")
    return {name: value for name, value in fields.items() if value is not None}


_COUNTS: Final = (
    "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens",
    "reasoning_tokens", "input_audio_tokens", "output_audio_tokens", "input_image_tokens", "output_image_tokens",
    "images", "audio_ms", "characters", "web_searches", "search_units",
)  # fmt: skip

_HEAD: Final[Sequence[Column]] = (
    Column("call_id", "text", _of("call_id")),
    Column("attempt", "count", _of("attempt")),
    Column("attempt_of", "text", _of("attempt_of")),
    Column("at", "instant", _of("at_ms")),
    Column("ended", "instant", _of("ended_ms")),
    Column("request_id", "text", _of("request_id")),
    Column("caller", "text", _of("caller")),
    Column("user", "text", _of("user")),
)
_TAIL: Final[Sequence[Column]] = (
    Column("agent", "text", _of("agent")),
    Column("session", "text", _of("session")),
    Column("tags", "texts", _of("tags")),
    Column("route", "text", _of("route")),
    Column("provider", "text", _of("provider")),
    Column("model", "text", _of("model")),
    Column("billed_model", "text", _of("billed_model")),
    Column("answered_model", "text", _of_usage("model")),
    Column("service_tier", "text", _of_usage("service_tier")),
    Column("deployment", "text", _of("deployment")),
    Column("outcome", "text", _of("outcome")),
    Column("late", "flag", _of("late")),
    Column("cost_usd", "money", _of("cost_nanousd")),
    Column("held_usd", "money", _of("estimate_nanousd")),
    Column("price_source", "text", _of("price_source")),
    Column("tokens", "count", _of("tokens")),
    *(Column(name, "count", _of_usage(name)) for name in _COUNTS),
    Column("beside", "text", _beside),
    Column("first_token_ms", "count", _of("first_token_ms")),
    Column("latency_ms", "count", _of("latency_ms")),
)

PLAIN: Final = (*_HEAD, Column("departments", "texts", _of("departments")), *_TAIL)
"""One line for each record."""

ATTRIBUTED: Final = (
    *_HEAD,
    Column("department", "text", lambda row: row.department),
    Column("of_departments", "count", lambda row: len(set(row.record.departments))),
    Column("counted", "flag", lambda row: row.counted),
    *_TAIL,
)
"""One line for each department of a record, with all of its cost. Only those that are `counted` make a grand total."""
