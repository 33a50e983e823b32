"""Usage records as rows of SQL: one column list for the ledger in a SQLite storage's file and for every other one.

The table `ledger` has one row per finished call. A row that changes (a late settlement replaces the estimate of an
expired hold) leaves what it was in `ledger_replaced`, so that sums which were made of it can be corrected exactly.
Departments and tags are JSON lists. `usage_more` is a JSON object with what few calls use: images, searches, what
other models did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final, Literal

import msgspec

from asgi_llm_guard.usage import Usage, UsageRecord

__all__ = [
    "LEDGER_COLUMNS",
    "LEDGER_KINDS",
    "LEDGER_LIST",
    "create_ledger",
    "is_writable",
    "quoted",
    "record_of_row",
    "row_of_record",
    "storable",
    "upsert_ledger",
]

_USAGE_FIELDS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "input_audio_tokens",
    "output_audio_tokens",
    "service_tier",
    "model",
)
"""Those with a column of their own; the others share one."""
_MORE: Final = tuple(name for name in Usage.__struct_fields__ if name not in _USAGE_FIELDS)
_USAGE_COLUMNS: Final = (*("usage_model" if name == "model" else name for name in _USAGE_FIELDS), "usage_more")
_usage_values: Final = attrgetter(*_USAGE_FIELDS)
_more_values: Final = attrgetter(*_MORE)
_NO_MORE: Final = _more_values(Usage())
_RECORD_FIELDS: Final = tuple(name for name in UsageRecord.__struct_fields__ if name != "usage")

LEDGER_COLUMNS: Final = (*_RECORD_FIELDS, "has_usage", *_USAGE_COLUMNS)
"""The ledger's columns in the order of `row_of_record`."""

_NO_USAGE: Final = (0,) + (None,) * len(_USAGE_COLUMNS)
_USAGE_AT: Final = UsageRecord.__struct_fields__.index("usage")
_DEPARTMENTS_AT: Final = LEDGER_COLUMNS.index("departments")
_TAGS_AT: Final = LEDGER_COLUMNS.index("tags")
_LATE_AT: Final = LEDGER_COLUMNS.index("late")


_MAX: Final = 2**53 - 1
_LONG: Final = re.compile(rb"\d{16}")
_UNWRITABLE: Final = re.compile("[\0\ud800-\udfff]")


def storable(record: UsageRecord) -> UsageRecord:
    """The record as every database can keep it, so that none holds up those behind it.

    NUL and halves of surrogate pairs, which PostgreSQL or UTF-8 have no place for, become U+FFFD; a count beyond
    2^53 - 1 is unknown.
    """
    try:
        written = msgspec.json.encode(record)
    except (UnicodeEncodeError, OverflowError):
        pass
    else:
        if b"\\u0000" not in written and not _LONG.search(written):
            return record
    return msgspec.convert(_writable(msgspec.to_builtins(record)), UsageRecord)


def is_writable(text: str) -> bool:
    """Whether every database can keep the text."""
    return _UNWRITABLE.search(text) is None


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNWRITABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {name: _writable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(each) for each in value]
    return None if isinstance(value, int) and abs(value) > _MAX else value


def row_of_record(record: UsageRecord) -> tuple[object, ...]:
    """The record as a row of the ledger."""
    values = list(msgspec.structs.astuple(record))
    usage = values.pop(_USAGE_AT)
    departments, tags = record.departments, record.tags
    values[_DEPARTMENTS_AT] = msgspec.json.encode(departments).decode() if departments else "[]"
    values[_TAGS_AT] = msgspec.json.encode(tags).decode() if tags else "[]"
    values[_LATE_AT] = int(record.late)  # a column of numbers, on every database
    if usage is None:
        return (*values, *_NO_USAGE)
    more = None
    if _more_values(usage) != _NO_MORE:
        more = msgspec.json.encode(
            {name: value for name in _MORE if (value := getattr(usage, name)) not in (None, ())}
        ).decode()
    return (*values, 1, *_usage_values(usage), more)


def record_of_row(row: Sequence[Any]) -> UsageRecord:
    """The record that `row_of_record` gave this row for."""
    fields = dict(zip(_RECORD_FIELDS, row, strict=False))
    fields["departments"] = tuple(msgspec.json.decode(row[_DEPARTMENTS_AT]))
    fields["tags"] = tuple(msgspec.json.decode(row[_TAGS_AT]))
    fields["late"] = bool(row[_LATE_AT])
    has_usage, *usage = row[len(_RECORD_FIELDS) :]
    fields["usage"] = _usage_of_row(usage) if has_usage else None
    return UsageRecord(**fields)


def _usage_of_row(values: Sequence[Any]) -> Usage:
    fields = dict(zip(_USAGE_FIELDS, values, strict=False))
    more = values[-1]
    return Usage(**fields) if more is None else msgspec.convert(fields | msgspec.json.decode(more), Usage)


# ---------------------------------------------------------------------------------- statements

_TEXTS: Final = frozenset({
    "call_id", "request_id", "caller", "user", "departments", "agent", "session", "tags", "route", "provider", "model",
    "billed_model", "outcome", "price_source", "attempt_of", "deployment", "service_tier", "usage_model", "usage_more",
})  # fmt: skip
LEDGER_KINDS: Final[Sequence[Literal["text", "bigint"]]] = tuple(
    "text" if name in _TEXTS else "bigint" for name in LEDGER_COLUMNS
)
"""What PostgreSQL's columns are of."""
_NEVER_NULL: Final = frozenset({"call_id", "at_ms", "departments", "tags", "outcome", "late", "attempt", "has_usage"})


def quoted(column: str) -> str:
    """The column's name as a statement writes it: `user` is a word of SQL's own."""
    return '"user"' if column == "user" else column


LEDGER_LIST: Final = ", ".join(map(quoted, LEDGER_COLUMNS))
"""`LEDGER_COLUMNS` as a statement writes them."""


def create_ledger(dialect: Literal["sqlite", "postgresql"]) -> tuple[str, ...]:
    """The statements that make the tables `ledger` and `ledger_replaced` where they are not there.

    `row` counts up with every new call id, in the order in which transactions end.
    """
    number = "INTEGER PRIMARY KEY" if dialect == "sqlite" else "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    old = ", ".join(f"OLD.{quoted(name)}" for name in ("row", *LEDGER_COLUMNS))
    keep = f"INSERT INTO ledger_replaced (row, {LEDGER_LIST}) VALUES ({old});"  # noqa: S608 - our names
    columns = [_column(name, dialect) for name in LEDGER_COLUMNS]
    statements = [
        f"CREATE TABLE IF NOT EXISTS ledger (row {number}, {', '.join(columns)}, UNIQUE (call_id))",
        f"CREATE TABLE IF NOT EXISTS ledger_replaced (seq {number}, row BIGINT NOT NULL, {', '.join(columns)})",
    ]
    if dialect == "sqlite":
        return (
            *statements,
            "CREATE INDEX IF NOT EXISTS ledger_by_time ON ledger (at_ms)",  # and by row, as every index of SQLite
            f"CREATE TRIGGER IF NOT EXISTS ledger_keep_replaced AFTER UPDATE ON ledger BEGIN {keep} END",
        )
    return (
        *statements,
        "CREATE INDEX IF NOT EXISTS ledger_by_time ON ledger (at_ms, row)",
        (
            "CREATE OR REPLACE FUNCTION ledger_keep_replaced() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {keep} RETURN NULL; END $$"
        ),
        "DROP TRIGGER IF EXISTS ledger_keep_replaced ON ledger",
        (
            "CREATE TRIGGER ledger_keep_replaced AFTER UPDATE ON ledger"
            " FOR EACH ROW EXECUTE FUNCTION ledger_keep_replaced()"
        ),
    )


def upsert_ledger(rows: str | None = None) -> str:
    """Add a row of `row_of_record`, or replace the one with its call id, which keeps its number.

    `rows`: a query that gives such rows, each of another call id; `None`: the parameters are one.

    An estimate replaces nothing; anything else only an estimate, or what was not settled late. So the same rows may be
    added again, in any order.
    """
    added = rows or f"VALUES ({', '.join('?' * len(LEDGER_COLUMNS))})"
    changes = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in LEDGER_COLUMNS if name != "call_id")
    return (
        f"INSERT INTO ledger ({LEDGER_LIST}) {added}"
        f" ON CONFLICT (call_id) DO UPDATE SET {changes} WHERE excluded.outcome <> 'expired'"
        " AND (ledger.outcome = 'expired' OR excluded.late > ledger.late)"
    )


def _column(name: str, dialect: Literal["sqlite", "postgresql"]) -> str:
    kind = "TEXT" if name in _TEXTS else "INTEGER" if dialect == "sqlite" else "BIGINT"
    return f"{quoted(name)} {kind}{' NOT NULL' if name in _NEVER_NULL else ''}"
