"""The ledger's tables, and what they keep sums of.

    ledger            one row per call, with `ledger_replaced`: see usage_rows.py
    ledger_meta       the version of these tables, and marks: how far records are rolled up, since when what is kept,
                      and counts by which processes notice each other (see rollups.py and unused.py)
    ledger_cursors    how far each source was read
    ledger_sets       each list of departments, or of tags, that any record has; with ledger_members: what is in it
    ledger_series     each combination of values that sums are kept for, by grain; rolled-up rows name it by number
    ledger_hours …    the sums themselves, one table per grain: an hour or a UTC day, a series, the amounts
    ledger_refusals   how often was refused, per hour

A record adds to one row of each grain. Each is as coarse as its reports allow, so that a year of thousands of users
stays small: what few reports ask for together is read from the records.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.ledger.values import AMOUNTS
from asgi_llm_guard.sql import Connection, Dialect
from asgi_llm_guard.usage_rows import create_ledger, quoted

__all__ = [
    "DAY_MS",
    "GRAINS",
    "HOUR_MS",
    "RECORD_AMOUNTS",
    "RECORD_SUMS",
    "SERIES_COLUMNS",
    "SETS",
    "SUMS",
    "Grain",
    "Kept",
    "lock",
    "make_alone",
    "make_tables",
    "mark",
    "set_mark",
]

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS

_VERSION: Final = 1

Kept = Literal["hours", "days", "people"]


class Grain(NamedTuple):
    """A table of sums: per step of time and combination of `columns`."""

    number: int
    table: str
    step_ms: int
    kept: Kept
    """The field of `Retention` that says for how long."""
    columns: tuple[str, ...]
    """Columns of the ledger."""


_WHAT: Final = ("departments", "agent", "provider", "model", "route", "deployment", "outcome")
_WHO: Final = ("departments", "caller", "user")

GRAINS: Final = (
    Grain(1, "ledger_hours", HOUR_MS, "hours", _WHAT),
    Grain(2, "ledger_days", DAY_MS, "days", _WHAT),
    Grain(3, "ledger_people", DAY_MS, "people", _WHO),
    Grain(4, "ledger_uses", DAY_MS, "people", (*_WHO, "agent", "provider", "model")),
    Grain(5, "ledger_tags", DAY_MS, "days", ("tags", "departments", "agent", "provider", "model")),
)
"""In the order in which a report that more than one of them could answer looks at them."""

SERIES_COLUMNS: Final = tuple(dict.fromkeys(name for grain in GRAINS for name in grain.columns))
SETS: Final = frozenset({"departments", "tags"})
"""Columns of lists: a series names them by their number in `ledger_sets`."""

_TOKENS: Final = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "reasoning_tokens")
_ESTIMATED: Final = ("estimated", "unmetered", "unknown", "unseen", "expired")
_ERRORS: Final = ("provider_error", "unknown")


def _sum(expression: str) -> str:
    return f"CAST(COALESCE(SUM({expression}), 0) AS BIGINT)"


def _among(outcomes: tuple[str, ...]) -> str:
    names = "', '".join(outcomes)
    return f"CASE WHEN outcome IN ('{names}') THEN 1 ELSE 0 END"


_OF_RECORD: Final = {
    "records": "1",
    "calls": "CASE WHEN attempt_of IS NULL THEN 1 ELSE 0 END",
    "cost_nanousd": "COALESCE(cost_nanousd, 0)",
    "unpriced": "CASE WHEN cost_nanousd IS NULL THEN 1 ELSE 0 END",
    "tokens": "COALESCE(tokens, 0)",
    # What a kept answer used once was counted then.
    **{name: f"CASE WHEN outcome = 'cached' THEN 0 ELSE COALESCE({name}, 0) END" for name in _TOKENS},
    "estimated": _among(_ESTIMATED),
    "cached": _among(("cached",)),
    "errors": _among(_ERRORS),
    "latency_ms_sum": "COALESCE(latency_ms, 0)",
    "latency_count": "CASE WHEN latency_ms IS NULL THEN 0 ELSE 1 END",
    "first_token_ms_sum": "COALESCE(first_token_ms, 0)",
    "first_token_count": "CASE WHEN first_token_ms IS NULL THEN 0 ELSE 1 END",
}

RECORD_AMOUNTS: Final = ", ".join(_OF_RECORD[name] for name in AMOUNTS)
"""What one row of the ledger adds to each amount: the only place where this is said."""

RECORD_SUMS: Final = ", ".join(_sum(_OF_RECORD[name]) for name in AMOUNTS)

SUMS: Final = ", ".join(f"{_sum(f'a.{name}')} AS {name}" for name in AMOUNTS)
"""The amounts of rolled-up rows, summed up."""


# ------------------------------------------------------------------------------------ making


def make_tables(connection: Connection) -> None:
    """Make what is not there. Cheap where everything is.

    Raises:
        StorageError: the tables are of another version.
    """
    make_alone(connection)
    if _exists(connection, "ledger_meta"):
        version = mark(connection, "version")
        if version != _VERSION:
            raise StorageError(
                f"ledger: its tables have version {version}, this release works with version {_VERSION}; "
                "use the release that made them, or export the ledger with it and append it to a new one"
            )
        return
    for statement in (*create_ledger(connection.dialect), *_statements(connection.dialect)):
        connection.execute(statement)
    set_mark(connection, "version", _VERSION)


def make_alone(connection: Connection) -> None:
    """Of several processes that make tables at the same time, let one do it until this transaction ends."""
    if connection.dialect == "postgresql":  # where even IF NOT EXISTS fails, if somebody else is making it
        connection.execute("SELECT pg_advisory_xact_lock(?)", (0x4C4C4D47,))


def lock(connection: Connection) -> None:
    """Let nobody else write to the ledger until this transaction ends.

    So row numbers follow the order in which transactions end, and what is rolled up is never missed. A SQLite
    transaction that writes is alone anyway.
    """
    if connection.dialect == "postgresql":
        connection.execute("SELECT value FROM ledger_meta WHERE name = 'version' FOR UPDATE")


def mark(connection: Connection, name: str, default: int = 0) -> int:
    """A number in `ledger_meta`."""
    rows = connection.execute("SELECT value FROM ledger_meta WHERE name = ?", (name,))
    return int(rows[0][0]) if rows else default


def set_mark(connection: Connection, name: str, value: int) -> None:
    connection.execute(
        "INSERT INTO ledger_meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (name, value),
    )


def _exists(connection: Connection, table: str) -> bool:
    if connection.dialect == "sqlite":
        return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)))
    return connection.execute("SELECT to_regclass(?) IS NOT NULL", (table,))[0][0] is True


def _statements(dialect: Dialect) -> tuple[str, ...]:
    number = "INTEGER PRIMARY KEY" if dialect == "sqlite" else "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    rowless = " WITHOUT ROWID" if dialect == "sqlite" else ""
    columns = ", ".join(f"{quoted(name)} {'BIGINT' if name in SETS else 'TEXT'}" for name in SERIES_COLUMNS)
    amounts = ", ".join(f"{name} BIGINT NOT NULL" for name in AMOUNTS)
    of_member = ", PRIMARY KEY (member, id)" if dialect == "sqlite" else ""
    return (
        f"CREATE TABLE ledger_meta (name TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL){rowless}",
        f"CREATE TABLE ledger_cursors (source TEXT NOT NULL PRIMARY KEY, cursor TEXT NOT NULL){rowless}",
        f"CREATE TABLE ledger_sets (id {number}, members TEXT NOT NULL)",
        f"CREATE TABLE ledger_members (member TEXT NOT NULL, id BIGINT NOT NULL{of_member}){rowless}",
        # Some columns are NULL, so it is the text of all of them that is unique.
        f"CREATE TABLE ledger_series (id {number}, grain BIGINT NOT NULL, {columns}, name TEXT NOT NULL)",
        *_by_text(dialect),
        # By time first: what is written now lies together, and so does what a report of some days reads.
        *(
            f"CREATE TABLE {grain.table} (series BIGINT NOT NULL, at_ms BIGINT NOT NULL, {amounts},"
            f" PRIMARY KEY (at_ms, series)){rowless}"
            for grain in GRAINS
        ),
        *(f"CREATE INDEX {grain.table}_by_series ON {grain.table} (series)" for grain in GRAINS if not rowless),
        (
            "CREATE TABLE ledger_refusals (hour_ms BIGINT NOT NULL, policy TEXT NOT NULL, scope TEXT NOT NULL,"
            " code TEXT NOT NULL, route TEXT NOT NULL, count BIGINT NOT NULL,"
            f" PRIMARY KEY (hour_ms, policy, scope, code, route)){rowless}"
        ),
    )


def _by_text(dialect: Dialect) -> tuple[str, ...]:
    """Indexes on texts of any length. PostgreSQL's usual ones take no text of more than some 2,700 bytes.

    Those that are no unique ones need not be: who adds rows holds the `lock`.
    """
    if dialect == "sqlite":
        return (
            "CREATE UNIQUE INDEX ledger_sets_by_members ON ledger_sets (members)",
            "CREATE UNIQUE INDEX ledger_series_by_name ON ledger_series (name)",
            'CREATE INDEX ledger_series_by_user ON ledger_series (grain, "user")',
        )
    return (
        "CREATE INDEX ledger_sets_by_members ON ledger_sets USING hash (members)",
        "CREATE INDEX ledger_members_by_member ON ledger_members USING hash (member)",
        "CREATE INDEX ledger_series_by_name ON ledger_series USING hash (name)",
        'CREATE INDEX ledger_series_by_user ON ledger_series USING hash ("user")',
    )
