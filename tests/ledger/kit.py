"""Records for ledgers, and what their sums are: said once more, by the plainest Python there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import product
from typing import Any, Final
from zoneinfo import ZoneInfo

from asgi_llm_guard.ledger import Amounts, Ledger, UsageQuery, UsageReport
from asgi_llm_guard.ledger.tables import GRAINS
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage import Usage, UsageRecord

__all__ = [
    "DAY_MS",
    "HOUR_MS",
    "START_MS",
    "at",
    "check_numbers",
    "expected",
    "record",
    "roll_all",
    "shown",
    "unused_names",
]

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
START_MS: Final = int(datetime(2026, 3, 28, tzinfo=UTC).timestamp()) * 1000
"""The day before Berlin's clocks go forward."""

Keyed = dict[tuple[str | None, ...], Amounts]


def at(text: str) -> int:
    """The instant of `2026-03-29T01:30+02:00`."""
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def record(call_id: str, at_ms: int = START_MS, **fields: Any) -> UsageRecord:
    return UsageRecord(call_id=call_id, at_ms=at_ms, **fields)


async def roll_all(ledger: Ledger) -> int:
    done = 0
    while count := await ledger.roll_up():
        done += count
    return done


def shown(report: UsageReport) -> Keyed:
    return {row.key: row.amounts for row in report.rows}


def expected(records: Iterable[UsageRecord], query: UsageQuery) -> tuple[Keyed, Amounts]:
    """The rows and the total that the report has to have."""
    rows: Keyed = {}
    total = Amounts()
    for each in records:
        if not query.since_ms <= each.at_ms < query.until_ms or not _matches(each, query.where):
            continue
        amounts = _amounts(each)
        total += amounts
        if query.by:
            for key in product(*(_values(each, name, query) for name in query.by)):
                rows[key] = rows.get(key, Amounts()) + amounts
    return rows, total


def _matches(each: UsageRecord, where: Mapping[str, str | None]) -> bool:
    for name, value in where.items():
        if name in {"department", "tag"}:
            members = each.departments if name == "department" else each.tags
            if (value not in members) if value is not None else members:
                return False
        elif getattr(each, name) != value:
            return False
    return True


def _values(each: UsageRecord, name: str, query: UsageQuery) -> list[str | None]:
    if name in {"hour", "day", "month"}:
        local = datetime.fromtimestamp(each.at_ms // 1000, UTC).astimezone(ZoneInfo(query.tz))
        if name == "hour":
            return [local.replace(minute=0, second=0).isoformat(timespec="minutes")]
        return [local.strftime("%Y-%m-%d" if name == "day" else "%Y-%m")]
    if name in {"department", "tag"}:
        if query.where.get(name) is not None:
            return [query.where[name]]
        return [*set(each.departments if name == "department" else each.tags)] or [None]
    value: str | None = getattr(each, name)
    return [value]


def _amounts(each: UsageRecord) -> Amounts:
    usage = each.usage if each.usage is not None and each.outcome != "cached" else Usage()
    return Amounts(
        records=1,
        calls=int(each.attempt_of is None),
        cost_nanousd=each.cost_nanousd or 0,
        unpriced=int(each.cost_nanousd is None),
        tokens=each.tokens or 0,
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=usage.cache_read_tokens or 0,
        cache_write_tokens=usage.cache_write_tokens or 0,
        reasoning_tokens=usage.reasoning_tokens or 0,
        estimated=int(each.outcome in {"estimated", "unmetered", "unknown", "unseen", "expired"}),
        cached=int(each.outcome == "cached"),
        errors=int(each.outcome in {"provider_error", "unknown"}),
        latency_ms_sum=each.latency_ms or 0,
        latency_count=int(each.latency_ms is not None),
        first_token_ms_sum=each.first_token_ms or 0,
        first_token_count=int(each.first_token_ms is not None),
    )


def check_numbers(connection: Connection) -> None:
    """Every sum has its series, and every series its lists."""
    for grain in GRAINS:
        query = f"SELECT count(*) FROM {grain.table} WHERE series NOT IN (SELECT id FROM ledger_series WHERE grain = ?)"
        assert connection.execute(query, (grain.number,)) == [(0,)], grain.table
    for column in ("departments", "tags"):
        query = (
            f"SELECT count(*) FROM ledger_series WHERE {column} IS NOT NULL AND {column} NOT IN"
            " (SELECT id FROM ledger_sets)"
        )
        assert connection.execute(query) == [(0,)], column


def unused_names(connection: Connection) -> int:
    """How many series have no sum, and how many lists no series."""
    count = 0
    for grain in GRAINS:
        query = f"SELECT count(*) FROM ledger_series WHERE grain = ? AND id NOT IN (SELECT series FROM {grain.table})"
        count += connection.execute(query, (grain.number,))[0][0]
    used = "SELECT departments FROM ledger_series UNION SELECT tags FROM ledger_series WHERE tags IS NOT NULL"
    for query in (
        f"SELECT count(*) FROM ledger_sets WHERE id NOT IN ({used})",
        "SELECT count(*) FROM ledger_members WHERE id NOT IN (SELECT id FROM ledger_sets)",
    ):
        count += connection.execute(query)[0][0]
    return count
