"""How much is left of a meter by what was last seen of it, and which part of that is one process's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from tests.storage.values import DAY_MS, meter

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Reading, Receipt, Settled, Settlement
from asgi_llm_guard.engine.outage import Fallback, LastSeen, left, lifted, over, share
from asgi_llm_guard.engine.totals import Totals
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

NOW_MS = 1_800_000_000_000
WINDOWS: list[Window] = [
    Lifetime(DAY_MS),
    Lifetime(DAY_MS, renew=True),
    Rolling(DAY_MS),
    Calendar("day"),
    Sliding(60_000, 60),
    Bucket(100_000, 100),
]


async def receipts(one: Meter, clock: FrozenClock, amounts: Sequence[int]) -> list[Receipt]:
    """What a storage says of these claims, one after the other."""
    storage = MemoryStorage(clock=clock)
    found: list[Receipt] = []
    for number, amount in enumerate(amounts):
        answer = await storage.reserve("me", [[Bundle(f"call-{number}", (Claim(one, amount),))]])
        found += answer.receipts if isinstance(answer, Granted) else []
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("window", [*WINDOWS, Slots()], ids=repr)
async def test_left(window: Window) -> None:
    """What is left is the limit less what was taken then, the last claim included; all of it where nothing was seen."""
    clock = FrozenClock(NOW_MS)
    one = meter(window, 100)
    seen = await receipts(one, clock, [30, 10])
    assert left(one, seen[-1], NOW_MS) == 60
    assert left(one, None, NOW_MS) == 100
    assert left(meter(window, 20), seen[0], NOW_MS) == (0 if not isinstance(window, Bucket) else 70)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "window, length_ms",
    [
        (Lifetime(DAY_MS), DAY_MS),
        (Rolling(DAY_MS), DAY_MS),
        (Calendar("day"), DAY_MS - NOW_MS % DAY_MS),
        (Sliding(60_000, 60), 61_000),
        (Bucket(100_000, 100), 40_000),
    ],
    ids=repr,
)
async def test_left_when_the_window_is_over(window: Window, length_ms: int) -> None:
    """When the window that was seen is over, everything is left again; not a millisecond before."""
    one = meter(window, 100)
    last = (await receipts(one, FrozenClock(NOW_MS), [40]))[0]
    assert not over(last, NOW_MS + length_ms - 1)
    assert left(one, last, NOW_MS + length_ms - 1) < 100
    assert over(last, NOW_MS + length_ms)
    assert left(one, last, NOW_MS + length_ms) == 100


@pytest.mark.anyio
async def test_slots_are_never_over() -> None:
    """Slots that were taken when they were last seen are taken until somebody sees otherwise."""
    one = meter(Slots(), 4)
    last = (await receipts(one, FrozenClock(NOW_MS), [1, 1, 1]))[-1]
    assert left(one, last, NOW_MS + 100 * DAY_MS) == 1


@pytest.mark.parametrize(
    "limit, used, processes, expected",
    [(100, 40, 1, 60), (100, 40, 7, 8), (100, 100, 1, 1), (100, 150, 3, 1), (100, 98, 3, 1), (0, 0, 1, 0)],
)
def test_share(limit: int, used: int, processes: int, expected: int) -> None:
    """A process's share is what is left divided by their number, rounded down; at least 1, unless the limit is 0."""
    one = meter(Rolling(DAY_MS), limit)
    last = Receipt(Claim(one, 1), False, True, used, 0, NOW_MS, NOW_MS + DAY_MS)
    assert share(one, last, NOW_MS, processes) == expected


def test_share_of_ids() -> None:
    """Known ids count anew in the process, so its share of ids is a part of the limit, not of what is left."""
    one = meter(Distinct(DAY_MS), 100)
    last = Receipt(Claim(one, 1, "id"), True, True, 99, 0, 0, NOW_MS + DAY_MS)
    assert share(one, last, NOW_MS, 4) == 25


@pytest.mark.anyio
@pytest.mark.parametrize("window", [*WINDOWS, Slots()], ids=repr)
async def test_lifted(window: Window) -> None:
    """Without its limit a meter takes whatever is asked, in the same counter, and a bucket drains as before."""
    clock = FrozenClock(NOW_MS)
    storage = MemoryStorage(clock=clock)
    one = meter(window, 100)
    for number in range(5):
        answer = await storage.reserve("me", [[Bundle(f"call-{number}", (Claim(lifted(one), 90),))]])
        assert isinstance(answer, Granted)
    (reading,) = await storage.read([one])
    assert reading.used + reading.held == 450
    clock.advance(seconds=10)
    (reading,) = await storage.read([one])
    assert reading.used + reading.held == (440 if isinstance(window, Bucket) else 450)


def test_last_seen_is_bounded() -> None:
    """However many meters are seen, the last 8,192 are known and at most twice as many kept; strict ones are not."""
    seen = LastSeen()
    for number in range(50_000):
        seen.keep([seen_of(number)])
        assert len(seen) <= 2 * 8192
    assert all(seen.get(seen_of(number).claim.meter.key) is not None for number in range(50_000 - 8192, 50_000))
    assert seen.get(seen_of(7).claim.meter.key) is None
    strict = Receipt(Claim(meter(Rolling(DAY_MS), 100, subject="strict"), 1), True, True, 0, 0, 0, None)
    seen.keep([strict])
    assert seen.get(strict.claim.meter.key) is None


def seen_of(number: int) -> Receipt:
    """What was seen of one of many meters with a local share."""
    one = replace(meter(Rolling(DAY_MS), 100, subject=str(number)), on_outage="local")
    return Receipt(Claim(one, 1), True, True, 0, 0, 0, None)


def test_who_decides() -> None:
    """A claim that says `deny` is not decided on without the storage, unless it refuses nothing anyway."""
    fallback = Fallback(MemoryStorage, FrozenClock(NOW_MS))
    strict, shadow = meter(Rolling(DAY_MS)), meter(Rolling(DAY_MS), subject="shadow", enforce=False)
    assert strict.on_outage == shadow.on_outage == "deny"
    assert fallback.may_decide([Claim(shadow, 1), Claim(replace(strict, on_outage="allow"), 1)])
    assert not fallback.may_decide([Claim(shadow, 1), Claim(strict, 0)])
    assert fallback.may_decide([])


# ------------------------------------------------------------------------------------- totals


async def settle_some(storage: MemoryStorage, totals: Totals, one: Meter, clock: FrozenClock) -> None:
    """Calls over half a minute, settled above and below what they held, and some charged without a hold."""
    for number in range(6):
        clock.advance(seconds=5)
        call_id = f"{one.key}-{number}"
        granted = await storage.reserve("me", [[Bundle(call_id, (Claim(one, 5),))]])
        assert isinstance(granted, Granted)
        totals.decided()
        debits = (Claim(one, 1),) if number % 2 else ()
        record = UsageRecord(call_id=call_id, at_ms=clock.now_ms())
        settled = [Settlement(call_id, (None if number == 3 else number,), record, granted.receipts, debits)]
        totals.settled(settled[0], (await storage.settle(settled))[0])


@pytest.mark.anyio
@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize("later_s", [0, 20, 40, 100, 2 * 86_400])
async def test_rebuilt_counters_are_what_they_were(window: Window, later_s: int) -> None:
    """Told to an empty store, totals make each kind of window what it was, also some time later; a bucket at most one more."""
    clock = FrozenClock(NOW_MS)
    storage, totals = MemoryStorage(clock=clock), Totals(clock)
    one = meter(window, 100)
    await settle_some(storage, totals, one, clock)
    clock.advance(seconds=later_s)
    (before,) = await storage.read([one])
    fresh = MemoryStorage(clock=clock)
    for _ in range(2):  # told twice counts once
        await fresh.settle(totals.settlements("me", "0"))
    (after,) = await fresh.read([one])
    if isinstance(window, Bucket):
        assert before.used <= after.used <= before.used + 1
    else:
        assert after == before
    clock.advance(seconds=20)
    (before,), (after,) = await storage.read([one]), await fresh.read([one])
    if not isinstance(window, Bucket):
        assert after == before


@pytest.mark.anyio
async def test_totals_of_what_is_over_are_forgotten() -> None:
    """Totals of windows that are over do not add up."""
    clock = FrozenClock(NOW_MS)
    totals, storage = Totals(clock), MemoryStorage(clock=clock)
    for number in range(2000):
        one = meter(Sliding(60_000, 60), 100, subject=str(number))
        granted = await storage.reserve("me", [[Bundle(str(number), (Claim(one, 1),))]])
        assert isinstance(granted, Granted)
        settled = [Settlement(str(number), (1,), None, granted.receipts)]
        totals.settled(settled[0], (await storage.settle(settled))[0])
        clock.advance(seconds=1)
    assert len(totals) <= 200


@pytest.mark.anyio
async def test_window_that_began_anew() -> None:
    """Only the current instance of a window is told; what is settled late into an older one is not."""
    clock = FrozenClock(NOW_MS)
    totals, storage = Totals(clock), MemoryStorage(clock=clock)
    one = meter(Rolling(60_000), 100)
    old = await storage.reserve("me", [[Bundle("old", (Claim(one, 7),))]])
    clock.advance(seconds=61)
    new = await storage.reserve("me", [[Bundle("new", (Claim(one, 2),))]])
    assert isinstance(old, Granted)
    assert isinstance(new, Granted)
    for call_id, granted in [("new", new), ("old", old)]:
        settled = [Settlement(call_id, (None,), None, granted.receipts)]
        totals.settled(settled[0], (await storage.settle(settled))[0])
    fresh = MemoryStorage(clock=clock)
    await fresh.settle(totals.settlements("me", "0"))
    assert await fresh.read([one]) == await storage.read([one]) == (Reading(2, 0, NOW_MS + 121_000),)


@pytest.mark.parametrize("window", [Rolling(DAY_MS), Lifetime(DAY_MS)], ids=repr)
def test_window_whose_start_was_made_up(window: Window) -> None:
    """What an outage charged to a window that it believed to begin then is told with the one that ran."""
    totals = Totals(FrozenClock(NOW_MS))
    one = meter(window, 100)
    for number, later_ms in enumerate([0, 60_000]):
        receipt = Receipt(Claim(one, 5), True, True, 0, 0, NOW_MS + later_ms, NOW_MS + DAY_MS + later_ms)
        settled = Settlement(str(number), (3,), None, (receipt,))
        totals.settled(settled, Settled(str(number), "settled"))
    (told,) = totals.settlements("me", "0")
    assert told.actuals == (6,)
    assert [(receipt.pin, receipt.resets_at_ms) for receipt in told.receipts] == [(NOW_MS, NOW_MS + DAY_MS + 60_000)]


@pytest.mark.anyio
@pytest.mark.parametrize("window", [*WINDOWS, Slots()], ids=repr)
async def test_what_was_never_held_is_told_too(window: Window) -> None:
    """Of a meter that was only charged without having been held, the total is what was charged; slots have none."""
    clock = FrozenClock(NOW_MS)
    storage, totals = MemoryStorage(clock=clock), Totals(clock)
    one = meter(window, 100)
    settled = [Settlement("call", (), UsageRecord(call_id="call", at_ms=NOW_MS), (), (Claim(one, 7),))]
    totals.settled(settled[0], (await storage.settle(settled))[0])
    assert totals.settlements("me", "0") == []  # perhaps it is in new data already
    totals.decided()
    fresh = MemoryStorage(clock=clock)
    await fresh.settle(totals.settlements("me", "0"))
    assert await fresh.read([one]) == await storage.read([one])


def test_what_was_not_taken_is_not_told() -> None:
    """What a shadow did not take, and what a cancellation gave back, is in no total."""
    totals = Totals(FrozenClock(NOW_MS))
    one = meter(Rolling(DAY_MS), 100)
    missed = Receipt(Claim(one, 5), False, False, 100, 0, NOW_MS, NOW_MS + DAY_MS)
    taken = Receipt(Claim(one, 5), True, True, 0, 0, NOW_MS, NOW_MS + DAY_MS)
    for settlement in (Settlement("a", (3,), None, (missed,)), Settlement("b", (), None, (taken,))):
        totals.settled(settlement, Settled(settlement.call_id, "settled"))
    assert totals.settlements("me", "0") == []
