"""What pages and API show, gathered from the ledger, the counters and the open calls."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, Literal

import msgspec

from asgi_llm_guard.admin import shown
from asgi_llm_guard.admin.budgets import Budget
from asgi_llm_guard.admin.charts import Bar, top_of
from asgi_llm_guard.admin.desk import Desk
from asgi_llm_guard.admin.periods import Period, slots
from asgi_llm_guard.ledger import Amounts, RefusalQuery, UsageQuery, UsageReport
from asgi_llm_guard.storage.shared import OpenCall
from asgi_llm_guard.windows import Calendar

__all__ = [
    "Chart",
    "Group",
    "Held",
    "budgets",
    "by_month",
    "charts",
    "departments_known",
    "groups",
    "held",
    "held_nanousd",
    "over_time",
    "people",
    "refused_by_policy",
]

_SINCE_MS: Final = 30 * 86_400_000
_MOST_CALLED: Final = 500
_MOST_COUNTS: Final = 1_000_000
"""Of refusals, each of one hour: what a month has at most, and a year as a rule."""


class Group(msgspec.Struct, frozen=True):
    """One row of a table of usage."""

    name: str | None
    amounts: Amounts
    share: int
    """Of the largest, in percent: how long its bar is."""
    of: str = ""
    """What the name is, where it is not what the table is of."""


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Bars over time, and the same as a table."""

    identity: str
    title: str
    description: str
    series: tuple[Bar, ...]
    top: str
    """The largest value in words."""
    scale: tuple[str, ...]
    """What stands beside the chart: at its top, its middle and its bottom."""
    first: str
    last: str


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What open calls hold at the moment."""

    calls: int
    nanousd: int
    known: bool
    """Whether this storage can tell."""
    more: bool = False
    """There are more than were counted."""


async def over_time(desk: Desk, period: Period, where: Mapping[str, str | None] | None = None) -> UsageReport | None:
    """Usage by hour or day; `None`: there is no ledger."""
    if desk.ledger is None:
        return None
    return await desk.ledger.usage(
        UsageQuery(
            since_ms=period.since_ms,
            until_ms=period.until_ms,
            by=(period.unit,),
            where=where or {},
            tz=period.tz,
            order="key",
            limit=10_000,
        )
    )


def charts(report: UsageReport, period: Period, *, prefix: str = "") -> tuple[Chart, Chart]:
    """Spend and calls, one bar for each hour or day, those without any included."""
    spans = slots(period)
    found = _by_instant(report, period, spans)
    spend, calls = [], []
    for start, end in spans:
        amounts = found.get(start, Amounts())
        label = shown.instant(start, period.tz)
        if period.unit == "day":
            label = label[:10]
        unfinished = start < period.until_ms < end
        spend.append(Bar(label, amounts.cost_nanousd, _cost_told(amounts), unfinished))
        calls.append(Bar(label, amounts.calls, shown.calls(amounts.calls), unfinished))
    names = ("spend", "Spend", shown.money, shown.money), ("calls", "Calls", shown.count, shown.compact)
    per = "hour" if period.unit == "hour" else "day"
    made = []
    for (name, title, told_as, marked_as), series in zip(names, (spend, calls), strict=True):
        most = max((bar.value for bar in series), default=0)
        total = sum(bar.value for bar in series)
        made.append(
            Chart(
                identity=f"{prefix}{name}",
                title=f"{title} per {per}",
                description=f"{told_as(total)} in {len(series)} {per}s; the most in one {per} is {told_as(most)}.",
                series=tuple(series),
                top=told_as(most),
                scale=_scale(most, marked_as),
                first=series[0].label if series else "",
                last=series[-1].label if series else "",
            )
        )
    return made[0], made[1]


def _scale(most: int, marked_as: Callable[[int], str]) -> tuple[str, ...]:
    """Nothing in the middle where that is no whole number."""
    top = top_of(most)
    return marked_as(top).removesuffix(".00"), "" if top % 2 else marked_as(top // 2).removesuffix(".00"), "0"


def _cost_told(amounts: Amounts) -> str:
    told = shown.money(amounts.cost_nanousd)
    return f"{told} and {shown.calls(amounts.unpriced)} of unknown cost" if amounts.unpriced else told


def _by_instant(report: UsageReport, period: Period, spans: Sequence[tuple[int, int]]) -> Mapping[int, Amounts]:
    """What was used, by when its hour or day began."""
    days = {shown.instant((start + end) // 2, period.tz)[:10]: start for start, end in spans}
    found: dict[int, Amounts] = {}
    for row in report.rows:
        key = row.key[0]
        assert key is not None, "every record has a time"  # noqa: S101
        at_ms = days.get(key) if period.unit == "day" else int(datetime.fromisoformat(key).timestamp()) * 1000
        if at_ms is not None:
            found[at_ms] = found.get(at_ms, Amounts()) + row.amounts
    return found


async def groups(
    desk: Desk,
    period: Period,
    by: Literal["department", "agent", "user", "caller", "model", "provider"],
    *,
    where: Mapping[str, str | None] | None = None,
    limit: int = 8,
) -> Sequence[Group]:
    """Who or what has cost most."""
    if desk.ledger is None:
        return ()
    report = await desk.ledger.usage(
        UsageQuery(
            since_ms=period.since_ms,
            until_ms=period.until_ms,
            by=(by,),
            where=where or {},
            tz=period.tz,
            order="cost",
            limit=limit,
        )
    )
    most = max((row.amounts.cost_nanousd for row in report.rows), default=0)
    return [
        Group(row.key[0], row.amounts, row.amounts.cost_nanousd * 100 // most if most else 0) for row in report.rows
    ]


async def people(desk: Desk, period: Period, *, where: Mapping[str, str | None], limit: int = 8) -> Sequence[Group]:
    """Which users have cost most. What was called for no user is shown by its caller."""
    users = await groups(desk, period, "user", where=where, limit=limit + 1)
    if any(row.name is None for row in users):
        callers = await groups(desk, period, "caller", where={**where, "user": None}, limit=limit)
        users = [row for row in users if row.name is not None]
        users += [Group(row.name, row.amounts, 0, "" if row.name is None else "caller") for row in callers]
        users.sort(key=lambda row: -row.amounts.cost_nanousd)
    most = max((row.amounts.cost_nanousd for row in users), default=0)
    return [
        Group(row.name, row.amounts, row.amounts.cost_nanousd * 100 // most if most else 0, row.of)
        for row in users[:limit]
    ]


async def held(desk: Desk) -> Held:
    """What open calls of all processes hold.

    Raises:
        StorageError: the storage does not answer.
    """
    calls = await desk.open_calls()
    if calls is None:
        return Held(calls=0, nanousd=0, known=False)
    drafts = [call for call in calls if call.draft is not None]
    return Held(calls=len(drafts), nanousd=sum(map(held_nanousd, drafts)), known=True, more=len(calls) >= 1_000)


def held_nanousd(call: OpenCall) -> int:
    """The dearest of its money holds: each of them is the same money."""
    return max((hold.amount for hold in call.held if hold.unit == "nanousd"), default=0)


async def refused_by_policy(desk: Desk, period: Period) -> Sequence[tuple[str, str, int]]:
    """How often was refused, by policy and code, the most first."""
    if desk.ledger is None:
        return ()
    counts: Counter[tuple[str, str]] = Counter()
    query = RefusalQuery(since_ms=period.since_ms, until_ms=period.until_ms, limit=_MOST_COUNTS)
    for each in await desk.ledger.refusals(query):
        counts[each.policy, each.code] += each.count
    return [(policy, code, count) for (policy, code), count in counts.most_common()]


async def departments_known(desk: Desk) -> list[str]:
    """Departments that have a quota, or have called within 30 days: those that have cost most first, then the others by
    name."""
    quotas = set(desk.quotas())
    if desk.control is not None:
        quotas |= set((await desk.control.state()).departments)
    called = await _called(desk, "department")
    return [*called, *sorted(quotas - set(called), key=str.casefold)]


async def budgets(desk: Desk) -> tuple[list[Budget], int]:
    """The limits in money and tokens of everything together, of providers, and of departments, as `Desk.budgets` gives
    them."""
    providers, departments = await asyncio.gather(_called(desk, "provider"), departments_known(desk))
    subjects: Iterable[tuple[str, str]] = (
        ("global", ""),
        *(("provider", name) for name in providers),
        *(("department", name) for name in departments),
    )
    return await desk.budgets(subjects)


async def _called(desk: Desk, by: Literal["department", "provider"]) -> list[str]:
    """By cost, the most first."""
    if desk.ledger is None:
        return []
    now_ms = desk.now_ms
    report = await desk.ledger.usage(
        UsageQuery(since_ms=max(0, now_ms - _SINCE_MS), until_ms=now_ms + 1, by=(by,), order="cost", limit=_MOST_CALLED)
    )
    return [name for row in report.rows if (name := row.key[0]) is not None]


async def by_month(desk: Desk, period: Period, where: Mapping[str, str | None]) -> Chart | None:
    """Spend by calendar month; `None`: there is no ledger."""
    if desk.ledger is None:
        return None
    report = await desk.ledger.usage(
        UsageQuery(
            since_ms=period.since_ms,
            until_ms=period.until_ms,
            by=("month",),
            where=where,
            tz=period.tz,
            order="key",
            limit=100,
        )
    )
    found = {row.key[0]: row.amounts for row in report.rows}
    calendar = Calendar("month", period.tz)
    series = []
    start, end = calendar.bounds(period.since_ms)
    while start < period.until_ms:
        label = shown.instant((start + end) // 2, period.tz)[:7]
        amounts = found.get(label, Amounts())
        series.append(Bar(label, amounts.cost_nanousd, _cost_told(amounts), period.until_ms < end))
        start, end = calendar.bounds(end)
    most = max((bar.value for bar in series), default=0)
    return Chart(
        identity="months",
        title="Spend per month",
        description=f"The most in one month is {shown.money(most)}.",
        series=tuple(series),
        top=shown.money(most),
        scale=_scale(most, shown.money),
        first=series[0].label if series else "",
        last=series[-1].label if series else "",
    )
