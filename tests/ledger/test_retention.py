"""What is removed, what reports say afterwards, and when they say that they cannot."""

from __future__ import annotations

import io

import pytest
from tests.ledger.kit import DAY_MS, HOUR_MS, START_MS, record, roll_all

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import (
    Ledger,
    NotKeptError,
    RecordQuery,
    RefusalCount,
    RefusalQuery,
    Retained,
    Retention,
    UsageQuery,
)
from asgi_llm_guard.ledger.export import export
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


async def filled(ledger: Ledger) -> None:
    """A record in each of 240 hours, from START_MS on."""
    await ledger.append([
        record(f"{n:03}", START_MS + n * HOUR_MS, user=f"u{n % 3}", agent="a", session="s", cost_nanousd=1)
        for n in range(240)
    ])  # fmt: skip


@pytest.mark.parametrize("kept", [{"raw": "2d"}, {"raw": "2d", "hours": "5d"}])
async def test_records_go_and_their_sums_stay(ledger: Ledger, clock: FrozenClock, kept: dict[str, str]) -> None:
    """After retention reports per UTC day, by agent and by user say what they said; what only removed rows could
    tell is refused, with what is missing, and never answered by a part."""
    ledger.retention = Retention(**kept)
    await filled(ledger)
    await roll_all(ledger)
    clock.set(START_MS + 10 * DAY_MS)
    removed = await ledger.retain()
    assert removed.raw == 8 * 24
    assert removed.hours == (5 * 24 if "hours" in kept else 0)
    for by in (("day",), ("user",), ("agent", "day")):
        report = await ledger.usage(UsageQuery(since_ms=START_MS, until_ms=START_MS + 10 * DAY_MS, by=by))
        assert report.total.cost_nanousd == 240
    with pytest.raises(NotKeptError, match=r"no longer kept \(there are .*raw since 2026-04-05"):
        await ledger.usage(UsageQuery(since_ms=START_MS, until_ms=START_MS + DAY_MS, by=("session",)))
    first_half = UsageQuery(since_ms=START_MS, until_ms=START_MS + 5 * HOUR_MS)
    if "hours" in kept:
        with pytest.raises(NotKeptError, match="hours since 2026-04-02"):
            await ledger.usage(first_half)
    else:
        assert (await ledger.usage(first_half)).total.cost_nanousd == 5
    recent = UsageQuery(since_ms=START_MS + 9 * DAY_MS, until_ms=START_MS + 10 * DAY_MS, by=("session",))
    assert (await ledger.usage(recent)).total.cost_nanousd == 24
    found = await ledger.reconcile(0, 2**52)
    assert found.equal, found.differences
    assert found.total.records == 48


async def test_a_period_is_streamed_whole_or_not(ledger: Ledger, clock: FrozenClock) -> None:
    """S7: what an export or a repricing reads is all of its period: where records are gone, or go while it reads, it is told
    so, since when what is there."""
    ledger.retention = Retention(raw="2d")
    await filled(ledger)
    await roll_all(ledger)
    clock.set(START_MS + 10 * DAY_MS)
    begun = ledger.stream(RecordQuery(limit=10))
    assert len(await anext(begun)) == 10
    await ledger.retain()
    with pytest.raises(NotKeptError, match="records are kept since 2026-04-05"):
        await anext(begun)
    with pytest.raises(NotKeptError, match="records are kept since 2026-04-05"):
        await anext(ledger.stream(RecordQuery()))
    with pytest.raises(NotKeptError):
        await export(ledger, RecordQuery(until_ms=START_MS + DAY_MS), io.BytesIO())

    kept = [one async for batch in ledger.stream(RecordQuery(since_ms=START_MS + 8 * DAY_MS)) for one in batch]
    assert len(kept) == 48
    assert [batch async for batch in ledger.stream(RecordQuery(until_ms=START_MS))] == []


async def test_nothing_goes_before_it_was_rolled_up(ledger: Ledger, clock: FrozenClock) -> None:
    """Records that are in no sum yet stay, however old, and so do those whose correction is still to be made."""
    ledger.retention = Retention(raw="1d")
    await filled(ledger)
    clock.set(START_MS + 20 * DAY_MS)
    assert (await ledger.retain()).raw == 0
    await ledger.roll_up(at_most=100)
    assert (await ledger.retain()).raw == 99
    await roll_all(ledger)
    late = record("150", START_MS + 150 * HOUR_MS, user="u0", agent="a", session="s", cost_nanousd=7, late=True)
    await ledger.append([late])
    assert (await ledger.retain()).raw == 239 - 99 - 1
    await roll_all(ledger)
    assert (await ledger.retain()).raw == 1
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("agent",)))
    assert report.total.cost_nanousd == 239 + 7
    assert len((await ledger.records(RecordQuery())).items) == 1


async def test_what_is_kept_for_ever(ledger: Ledger, clock: FrozenClock) -> None:
    """`None` keeps; and without anything to remove nothing is."""
    ledger.retention = Retention(raw=None, hours=None, people=None, refusals=None)
    await filled(ledger)
    await roll_all(ledger)
    clock.set(START_MS + 9_000 * DAY_MS)
    assert await ledger.retain() == Retained()


async def test_people_and_refusals_go_after_their_own_time(ledger: Ledger, clock: FrozenClock) -> None:
    """Sums that name callers and users, and counts of refusals, are removed by settings of their own."""
    ledger.retention = Retention(raw="1d", people="3d", refusals="3d")
    await filled(ledger)
    await roll_all(ledger)
    await ledger.add_refusals([
        RefusalCount(hour_ms=START_MS + n * DAY_MS, policy="p", scope="s", code="c") for n in range(10)
    ])  # fmt: skip
    clock.set(START_MS + 10 * DAY_MS)
    removed = await ledger.retain()
    assert removed.people == 7 * 3 * 2
    assert removed.refusals == 7
    assert len(await ledger.refusals(RefusalQuery(since_ms=0, until_ms=2**52))) == 3
    with pytest.raises(NotKeptError, match="people since 2026-04-04"):
        await ledger.usage(UsageQuery(since_ms=START_MS, until_ms=START_MS + DAY_MS, by=("user",)))
    report = await ledger.usage(UsageQuery(since_ms=START_MS, until_ms=START_MS + DAY_MS, by=("agent",)))
    assert report.total.cost_nanousd == 24


async def test_a_sum_that_is_wrong_is_found(ledger: Ledger) -> None:
    """`reconcile` names the day, the table and the amount of a sum that does not say what the records say."""
    await filled(ledger)
    await roll_all(ledger)

    def spoil(connection: Connection) -> None:
        connection.execute(
            "UPDATE ledger_days SET cost_nanousd = cost_nanousd + 1 WHERE at_ms = ?", (START_MS + 2 * DAY_MS,)
        )

    assert (await ledger.reconcile(START_MS, START_MS + 10 * DAY_MS)).equal
    await ledger.database.write(spoil)
    (difference,) = (await ledger.reconcile(START_MS, START_MS + 10 * DAY_MS)).differences
    assert (difference.day_ms, difference.table, difference.amount) == (
        START_MS + 2 * DAY_MS,
        "ledger_days",
        "cost_nanousd",
    )
    assert (difference.records, difference.rolled_up) == (24, 25)
    assert (await ledger.reconcile(START_MS, START_MS + 2 * DAY_MS)).equal


@pytest.mark.parametrize("text", ["", "1y", "0d", "-1d"])
def test_durations(text: str) -> None:
    """What is no duration is refused by the name of its setting."""
    with pytest.raises(ConfigurationError, match=r"retention\.raw: expected"):
        Retention(raw=text)
