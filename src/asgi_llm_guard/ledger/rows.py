"""Single rows: records that are added and looked at, cursors of sources, counts of refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from asgi_llm_guard.ledger.bulk import as_json, chunks, from_json, marks
from asgi_llm_guard.ledger.filters import record_conditions
from asgi_llm_guard.ledger.keeping import check_records
from asgi_llm_guard.ledger.pieces import list_of
from asgi_llm_guard.ledger.tables import lock
from asgi_llm_guard.ledger.values import OTHER, Page, RecordQuery, RefusalCount, RefusalQuery, SessionUsage
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.usage_rows import LEDGER_KINDS, LEDGER_LIST, record_of_row, row_of_record, storable, upsert_ledger

__all__ = ["ANY", "add_refusals", "append", "batch", "cursor", "last_row", "page", "refusals", "sessions"]

_UPSERT: Final = upsert_ledger()
_UPSERT_TOGETHER: Final = upsert_ledger(from_json(LEDGER_KINDS))
_TOGETHER: Final = 1_000
"""So many rows, of some kilobyte each, a statement of PostgreSQL adds at most."""

ANY: Final = "any"
"""A cursor that moves wherever it is."""

MAX_REFUSALS: Final = 1_000
"""Different counts of one hour."""


# ------------------------------------------------------------------------------------ records


def append(
    connection: Connection,
    records: Sequence[UsageRecord],
    source: str | None,
    position: str | None,
    after: str | None = ANY,
) -> int | None:
    """Add records, or replace those of the same call id, and move the source's cursor, if it is at `after`."""
    lock(connection)
    if not _is_at(connection, source, after):
        return None
    records = list(map(storable, records))
    ids = {record.call_id for record in records}
    known = 0
    for some in chunks(ids):
        query = f"SELECT count(*) FROM ledger WHERE call_id IN ({marks(some)})"  # noqa: S608
        known += connection.execute(query, some)[0][0]
    rows = [row_of_record(record) for record in records]
    if connection.dialect == "postgresql":
        for together in _each_once(rows):
            connection.execute(_UPSERT_TOGETHER, (as_json(together),))
    else:
        connection.execute_many(_UPSERT, rows)
    _move(connection, source, position)
    return len(ids) - known


def _each_once(rows: Sequence[tuple[object, ...]]) -> Iterator[Sequence[tuple[object, ...]]]:
    """The rows in their order, in parts that have no call id twice: a statement may not change a row twice."""
    start, ids = 0, set[object]()
    for place, row in enumerate(rows):
        if row[0] in ids or place - start == _TOGETHER:
            yield rows[start:place]
            start, ids = place, set()
        ids.add(row[0])
    if rows:
        yield rows[start:]


def cursor(connection: Connection, source: str) -> str | None:
    rows = connection.execute("SELECT cursor FROM ledger_cursors WHERE source = ?", (source,))
    return rows[0][0] if rows else None


def last_row(connection: Connection) -> int:
    """The number of the newest record; 0: there are none."""
    number: int = connection.execute("SELECT COALESCE(MAX(row), 0) FROM ledger")[0][0]
    return number


def page(connection: Connection, query: RecordQuery) -> Page[UsageRecord]:
    """The newest records of the query, from where the page before ended."""
    rows = _records(connection, query, query.position(), newest_first=True, most=query.limit + 1)
    items = tuple(record_of_row(row[2:]) for row in rows[: query.limit])
    more = len(rows) > query.limit
    return Page(items, f"{rows[query.limit - 1][0]}-{rows[query.limit - 1][1]}" if more else None)


def batch(
    connection: Connection, query: RecordQuery, after: tuple[int, int] | None, last: int
) -> tuple[tuple[UsageRecord, ...], tuple[int, int] | None]:
    """The oldest records of the query behind `after`, without those that came after row `last`; and where they end."""
    check_records(connection, query.since_ms if after is None else after[0], query.until_ms)
    rows = _records(connection, query, after, newest_first=False, most=query.limit, last=last)
    end = (rows[-1][0], rows[-1][1]) if len(rows) == query.limit else None
    return tuple(record_of_row(row[2:]) for row in rows), end


# One row for a session, whatever users, agents and departments its calls have had: those of the last call stand for it.
_SESSIONS: Final = """
WITH parts AS (
    SELECT caller, session, "user", agent, departments, MIN(at_ms) AS first_ms, MAX(at_ms) AS last_ms,
        SUM(CASE WHEN attempt_of IS NULL THEN 1 ELSE 0 END) AS calls, SUM(COALESCE(cost_nanousd, 0)) AS cost,
        SUM(CASE WHEN cost_nanousd IS NULL THEN 1 ELSE 0 END) AS unpriced, SUM(COALESCE(tokens, 0)) AS tokens
    FROM ledger WHERE at_ms >= ? AND session IS NOT NULL GROUP BY caller, session, "user", agent, departments
), whole AS (
    SELECT caller, session, "user", agent, departments, MIN(first_ms) OVER everything AS first_ms,
        MAX(last_ms) OVER everything AS last_ms, CAST(SUM(calls) OVER everything AS BIGINT) AS calls,
        CAST(SUM(cost) OVER everything AS BIGINT) AS cost, CAST(SUM(unpriced) OVER everything AS BIGINT) AS unpriced,
        CAST(SUM(tokens) OVER everything AS BIGINT) AS tokens,
        ROW_NUMBER() OVER (PARTITION BY caller, session ORDER BY last_ms DESC, "user", agent, departments) AS place
    FROM parts WINDOW everything AS (PARTITION BY caller, session)
)
SELECT caller, session, "user", agent, departments, first_ms, last_ms, calls, cost, unpriced, tokens
FROM whole WHERE place = 1 ORDER BY last_ms DESC, session LIMIT ?
"""


def sessions(connection: Connection, since_ms: int, limit: int) -> tuple[SessionUsage, ...]:
    rows = connection.execute(_SESSIONS, (since_ms, limit))
    return tuple(
        SessionUsage(
            caller=caller,
            session=session,
            user=user,
            agent=agent,
            departments=list_of(departments),
            first_ms=first_ms,
            last_ms=last_ms,
            calls=calls,
            cost_nanousd=cost,
            unpriced=unpriced,
            tokens=tokens,
        )
        for caller, session, user, agent, departments, first_ms, last_ms, calls, cost, unpriced, tokens in rows
    )


def _records(
    connection: Connection,
    query: RecordQuery,
    after: tuple[int, int] | None,
    *,
    newest_first: bool,
    most: int,
    last: int | None = None,
) -> list[tuple[Any, ...]]:
    since_ms, until_ms = query.since_ms, query.until_ms
    conditions, named = record_conditions(query.where, connection.dialect)
    parameters: list[object] = []
    if after is not None:
        at_ms, row = after
        # The index begins at the instant of the last one; of those within it, what was not there yet.
        if newest_first:
            until_ms = min(until_ms, at_ms + 1)
            conditions += " AND (at_ms < ? OR row < ?)"
        else:
            since_ms = max(since_ms, at_ms)
            conditions += " AND (at_ms > ? OR row > ?)"
        parameters += [at_ms, row]
    if last is not None:
        conditions += " AND row <= ?"
        parameters.append(last)
    down = " DESC" if newest_first else ""
    return connection.execute(
        f"SELECT at_ms, row, {LEDGER_LIST} FROM ledger WHERE at_ms >= ? AND at_ms < ?{conditions}"  # noqa: S608
        f" ORDER BY at_ms{down}, row{down} LIMIT ?",
        (since_ms, until_ms, *named, *parameters, most),
    )


# ----------------------------------------------------------------------------------- refusals


def add_refusals(
    connection: Connection,
    counts: Sequence[RefusalCount],
    source: str | None,
    position: str | None,
    after: str | None = ANY,
) -> bool:
    """Add to the counts, and move the source's cursor, if it is at `after`; whether it was."""
    lock(connection)
    if not _is_at(connection, source, after):
        return False
    there: dict[int, set[tuple[str, ...]]] = {}
    for count in counts:
        hour_ms, key = count.hour_ms, (count.policy, count.scope, count.code, count.route or "")
        if hour_ms not in there:
            rows = connection.execute(
                "SELECT policy, scope, code, route FROM ledger_refusals WHERE hour_ms = ?", (hour_ms,)
            )
            there[hour_ms] = set(rows)
        if key not in there[hour_ms]:
            if len(there[hour_ms]) >= MAX_REFUSALS - 1:
                key = (OTHER, "", "", "")
            there[hour_ms].add(key)
        connection.execute(
            "INSERT INTO ledger_refusals (hour_ms, policy, scope, code, route, count) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (hour_ms, policy, scope, code, route)"
            " DO UPDATE SET count = ledger_refusals.count + excluded.count",
            (hour_ms, *key, count.count),
        )
    _move(connection, source, position)
    return True


def refusals(connection: Connection, query: RefusalQuery) -> tuple[RefusalCount, ...]:
    named = {"policy": query.policy, "scope": query.scope, "route": query.route}
    chosen = {name: value for name, value in named.items() if value is not None}
    conditions = "".join(f" AND {name} = ?" for name in chosen)
    rows = connection.execute(
        "SELECT hour_ms, policy, scope, code, route, count FROM ledger_refusals"  # noqa: S608 - our names
        f" WHERE hour_ms >= ? AND hour_ms < ?{conditions}"
        " ORDER BY hour_ms DESC, count DESC, policy, scope, code, route LIMIT ?",
        (query.since_ms, query.until_ms, *chosen.values(), query.limit),
    )
    return tuple(
        RefusalCount(hour_ms=hour_ms, policy=policy, scope=scope, code=code, route=route or None, count=count)
        for hour_ms, policy, scope, code, route, count in rows
    )


def _is_at(connection: Connection, source: str | None, after: str | None) -> bool:
    """Whether the source's cursor is where somebody has found it; `lock` keeps it there."""
    return source is None or after == ANY or cursor(connection, source) == after


def _move(connection: Connection, source: str | None, position: str | None) -> None:
    if source is not None and position is not None:
        connection.execute(
            "INSERT INTO ledger_cursors (source, cursor) VALUES (?, ?)"
            " ON CONFLICT (source) DO UPDATE SET cursor = excluded.cursor",
            (source, position),
        )
