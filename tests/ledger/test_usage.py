"""What reports say, example by example. `test_properties.py` compares them with plain Python in general."""

from __future__ import annotations

from typing import Any

import pytest
from tests.ledger.kit import DAY_MS, HOUR_MS, START_MS, at, record, roll_all, shown

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import Ledger, UsageQuery, UsageRow
from asgi_llm_guard.usage import Usage, UsageRecord

pytestmark = pytest.mark.anyio

BERLIN = "Europe/Berlin"


def ask(*by: Any, days: int = 4, **fields: Any) -> UsageQuery:
    return UsageQuery(since_ms=START_MS, until_ms=START_MS + days * DAY_MS, by=by, **fields)


def costs(rows: tuple[UsageRow, ...]) -> dict[tuple[str | None, ...], int]:
    return {row.key: row.amounts.cost_nanousd for row in rows}


def week() -> list[UsageRecord]:
    """Three calls: of one department, of two, of none."""
    return [
        record("one", departments=("red",), user="ann", agent="writer", model="m1", provider="p1", cost_nanousd=5),
        record("two", START_MS + DAY_MS, departments=("red", "blue"), user="bob", agent="coder", model="m2",
               provider="p1", cost_nanousd=7, tags=("x", "y")),
        record("none", START_MS + 2 * DAY_MS, user="ann", agent="coder", model="m1", provider="p2", cost_nanousd=11),
    ]  # fmt: skip


@pytest.mark.parametrize("rolled", [False, True])
async def test_departments_are_charged_in_full(ledger: Ledger, rolled: bool) -> None:
    """C9: a call of two departments counts in full for both, and the grand total counts it once."""
    await ledger.append(week())
    if rolled:
        assert await roll_all(ledger) == 3
    report = await ledger.usage(ask("department"))
    assert costs(report.rows) == {("red",): 12, ("blue",): 7, (None,): 11}
    assert report.total.cost_nanousd == 5 + 7 + 11
    assert report.total.records == 3


@pytest.mark.parametrize("rolled", [False, True])
@pytest.mark.parametrize(
    ("where", "by", "found"),
    [
        ({"department": "red"}, ("model",), {("m2",): 7, ("m1",): 5}),
        ({"department": "blue"}, ("department",), {("blue",): 7}),
        ({"department": None}, ("user",), {("ann",): 11}),
        ({"agent": "coder"}, ("provider",), {("p2",): 11, ("p1",): 7}),
        ({"user": "ann"}, ("day",), {("2026-03-30",): 11, ("2026-03-28",): 5}),
        ({"model": "m1", "provider": "p1"}, ("agent", "user"), {("writer", "ann"): 5}),
        ({"tag": "x"}, ("tag",), {("x",): 7}),
        ({"call_id": "two"}, ("tag",), {("x",): 7, ("y",): 7}),
        ({"user": "nobody"}, ("day",), {}),
    ],
)
async def test_totals_by_every_dimension(
    ledger: Ledger, rolled: bool, where: dict[str, str | None], by: tuple[Any, ...], found: dict[Any, int]
) -> None:
    """C9: totals can be asked by department, agent, user, model, provider and time, in any combination."""
    await ledger.append(week())
    if rolled:
        await roll_all(ledger)
    assert costs((await ledger.usage(ask(*by, where=where))).rows) == found


async def test_time_ranges_begin_and_end_where_asked(ledger: Ledger) -> None:
    """C9: a period takes its first millisecond in and leaves its last one out, in the middle of an hour too."""
    begin = at("2026-03-28T10:17+00:00")
    await ledger.append([record(f"at {ms}", begin + ms, cost_nanousd=1) for ms in (-1, 0, 1, 99, 100, 5 * HOUR_MS)])
    await roll_all(ledger)
    report = await ledger.usage(UsageQuery(since_ms=begin, until_ms=begin + 100))
    assert report.total.records == 3
    report = await ledger.usage(UsageQuery(since_ms=begin, until_ms=begin + 5 * HOUR_MS))
    assert report.total.records == 4


async def test_without_departments_usage_is_counted_once(ledger: Ledger) -> None:
    """C8: a call without departments is in the total, under no department."""
    await ledger.append([record("a", cost_nanousd=3)])
    report = await ledger.usage(ask("department"))
    assert costs(report.rows) == {(None,): 3}


async def test_unknown_is_not_zero(ledger: Ledger) -> None:
    """A record without a cost is counted as unpriced, one that was charged by its hold as estimated: neither as free."""
    await ledger.append([
        record("free", cost_nanousd=0, usage=Usage(input_tokens=4)),
        record("unpriced", usage=Usage(input_tokens=5, output_tokens=6), tokens=11),
        record("held", outcome="unknown", cost_nanousd=9),
        record("kept", outcome="cached", cost_nanousd=0, usage=Usage(input_tokens=100)),
    ])  # fmt: skip
    for _ in range(2):
        total = (await ledger.usage(ask())).total
        assert (total.records, total.unpriced, total.estimated, total.cached, total.errors) == (4, 1, 1, 1, 1)
        assert (total.cost_nanousd, total.input_tokens, total.output_tokens, total.tokens) == (9, 9, 6, 11)
        await roll_all(ledger)


async def test_attempts_are_records_of_one_call(ledger: Ledger) -> None:
    """Three attempts are three records that were each paid for, and one call."""
    tries = [record("a"), record("b", attempt_of="a", attempt=2), record("c", attempt_of="a", attempt=3)]
    await ledger.append(tries)
    total = (await ledger.usage(ask())).total
    assert (total.records, total.calls) == (3, 1)


async def test_the_day_on_which_clocks_go_forward(ledger: Ledger) -> None:
    """C9: Berlin's 29 March 2026 has 23 hours, from 23:00 UTC to 22:00 UTC, and no hour that begins at 2 o'clock."""
    instants = ["2026-03-28T22:59:59.999+00:00", "2026-03-28T23:00+00:00", "2026-03-29T00:59+00:00",
                "2026-03-29T01:00+00:00", "2026-03-29T21:59+00:00", "2026-03-29T22:00+00:00"]  # fmt: skip
    await ledger.append([record(text, at(text), cost_nanousd=10**n) for n, text in enumerate(instants)])
    for _ in range(2):
        report = await ledger.usage(ask("day", tz=BERLIN))
        assert costs(report.rows) == {("2026-03-30",): 100_000, ("2026-03-29",): 11_110, ("2026-03-28",): 1}
        report = await ledger.usage(ask("hour", tz=BERLIN, where={"agent": None}))
        assert costs(report.rows) == {
            ("2026-03-28T23:00+01:00",): 1, ("2026-03-29T00:00+01:00",): 10, ("2026-03-29T01:00+01:00",): 100,
            ("2026-03-29T03:00+02:00",): 1_000, ("2026-03-29T23:00+02:00",): 10_000,
            ("2026-03-30T00:00+02:00",): 100_000,
        }  # fmt: skip
        await roll_all(ledger)


async def test_the_hour_that_comes_twice(ledger: Ledger) -> None:
    """On Berlin's 25 October 2026 the two hours from 2 o'clock are two rows, told apart by their offsets."""
    first, second = at("2026-10-25T02:30+02:00"), at("2026-10-25T02:30+01:00")
    await ledger.append([record("first", first, cost_nanousd=1), record("second", second, cost_nanousd=2)])
    await roll_all(ledger)
    query = UsageQuery(since_ms=first - DAY_MS, until_ms=second + DAY_MS, by=("day", "hour"), tz=BERLIN)
    assert costs((await ledger.usage(query)).rows) == {
        ("2026-10-25", "2026-10-25T02:00+01:00"): 2,
        ("2026-10-25", "2026-10-25T02:00+02:00"): 1,
    }


async def test_zones_with_half_hours(ledger: Ledger) -> None:
    """Days of India begin at 18:30 UTC: what lies between the hour and the half hour is told apart."""
    before, after = at("2026-03-28T18:29+00:00"), at("2026-03-28T18:31+00:00")
    await ledger.append([record("before", before, cost_nanousd=1), record("after", after, cost_nanousd=2)])
    await roll_all(ledger)
    report = await ledger.usage(ask("day", tz="Asia/Kolkata", order="key"))
    assert costs(report.rows) == {("2026-03-28",): 1, ("2026-03-29",): 2}


async def test_order_and_limit(ledger: Ledger) -> None:
    """The dearest, the busiest or the first by key come first; what is beyond the limit is counted, and in the total."""
    await ledger.append([
        record("1", user="b", cost_nanousd=9), record("2", user="a", cost_nanousd=1),
        record("3", user="a", cost_nanousd=1), record("4", cost_nanousd=5),
    ])  # fmt: skip
    for order, keys in (("cost", ["b", None, "a"]), ("calls", ["a", None, "b"]), ("key", [None, "a", "b"])):
        report = await ledger.usage(ask("user", order=order))
        assert [row.key[0] for row in report.rows] == keys
    report = await ledger.usage(ask("user", limit=2))
    assert [row.key[0] for row in report.rows] == ["b", None]
    assert report.left_out == 1
    assert report.total.cost_nanousd == 16


async def test_nothing_is_nothing(ledger: Ledger) -> None:
    """An empty ledger answers every report with nothing, for all time."""
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**53 - 1, by=("hour", "department")))
    assert report.rows == ()
    assert report.total.records == 0


async def test_all_time_is_as_quick_as_what_there_is(ledger: Ledger) -> None:
    """A report by hour from 1970 on looks only at days that have records."""
    await ledger.append(week())
    await roll_all(ledger)
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**53 - 1, by=("hour",), limit=10_000))
    assert len(report.rows) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"by": ("colour",)}, "by: expected some of department, agent"),
        ({"by": ("day", "day")}, "names a dimension twice"),
        ({"where": {"day": "x"}}, "where: expected some of"),
        ({"where": {"user": 3}}, "where.user: expected text"),
        ({"tz": "Berlin"}, "tz: expected an IANA time zone"),
        ({"order": "size"}, "order: expected cost, calls or key"),
        ({"limit": 0}, "limit: expected a whole number from 1"),
        ({"until_ms": -1}, "until_ms: expected milliseconds"),
        ({"since_ms": 10**14}, "lies before since_ms"),
    ],
)
def test_questions_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    """A query that cannot be answered is refused when it is made, with what is possible."""
    with pytest.raises(ConfigurationError, match=message):
        UsageQuery(**{"since_ms": START_MS, "until_ms": START_MS + 1, **fields})


async def test_reports_of_a_moment_are_of_one_state(ledger: Ledger) -> None:
    """Rows and total of a report agree with each other while records are rolled up and added meanwhile."""
    await ledger.append(
        [record(str(n), START_MS + n * HOUR_MS // 4, user=f"u{n % 3}", cost_nanousd=n) for n in range(60)]
    )
    await ledger.roll_up(at_most=37)
    report = await ledger.usage(ask("user", "day"))
    assert sum(row.amounts.cost_nanousd for row in report.rows) == report.total.cost_nanousd == sum(range(60))
    assert len(shown(report)) == 3
