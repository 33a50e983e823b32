"""What random histories and mutations found, kept as short histories that every storage is run through."""

from __future__ import annotations

import itertools

import pytest
from tests.storage.values import (
    DAY_MS,
    HOUR_MS,
    ME,
    OTHER,
    START_MS,
    Make,
    ask,
    claim,
    level,
    meter,
    refuse,
    settle,
    take,
)

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Reading, Settlement
from asgi_llm_guard.storage import cells
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.counting import GRACE_MS
from asgi_llm_guard.storage.memory import MemoryLedger, MemoryMembers
from asgi_llm_guard.storage.state import Needs, State
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Distinct, Rolling, Sliding, Slots

pytestmark = pytest.mark.anyio


async def test_a_limit_lowered_to_zero_blocks_known_ids_too(storage: Storage) -> None:
    """0 blocks everything: an id that was let in before is not let in again, and no time brings it back."""
    await take(storage, "a", claim(meter(Distinct(HOUR_MS), 2), 1, "x"))
    (state,) = await refuse(storage, "b", claim(meter(Distinct(HOUR_MS), 0), 1, "x"))
    assert (state.used, state.fits, state.resets_at_ms) == (0, False, None)


async def test_a_hold_that_a_lapsed_owner_took_over_expires_with_it(mortal: Storage, clock: FrozenClock) -> None:
    """An owner that had lapsed when it amended a hold of another is registered anew; should it die, the hold expires."""
    on = meter(Slots(), 1)
    await mortal.heartbeat(OTHER)
    clock.advance(ms=LAPSE_MS)
    await take(mortal, "a", claim(on))
    await mortal.heartbeat(ME)
    assert isinstance(await mortal.amend(OTHER, Bundle("a", (claim(on),))), Granted)
    clock.advance(ms=LAPSE_MS)
    assert isinstance(await ask(mortal, "b", claim(on)), Granted)
    assert isinstance(await ask(mortal, "a", claim(on)), Ended)


async def test_a_hold_that_a_new_owner_took_over_expires_with_it(mortal: Storage, clock: FrozenClock) -> None:
    """An owner whose first sign of life is an amend lapses like any other, and its holds with it."""
    on = meter(Slots(), 1)
    await take(mortal, "a", claim(on))
    await mortal.amend(OTHER, Bundle("a", (claim(on),)))
    clock.advance(ms=LAPSE_MS)
    assert (await mortal.heartbeat(ME)).expired == ("a",)


async def test_an_owner_is_told_of_its_lapse_for_a_day(make: Make, clock: FrozenClock) -> None:
    """A process that wakes up within a day of its lapse is told so; after that it is a new one."""
    for asleep_ms, told in ((LAPSE_MS + DAY_MS - 1, True), (LAPSE_MS + DAY_MS, False)):
        storage = make(clock)
        await storage.heartbeat(ME)
        clock.advance(ms=asleep_ms)
        await storage.heartbeat(OTHER)
        assert (await storage.heartbeat(ME)).lapsed is told


async def test_what_a_reset_left_held_leaves_a_sliding_window_in_time(storage: Storage, clock: FrozenClock) -> None:
    """After a reset, held amounts leave with their sub-bucket, to the millisecond."""
    on = meter(Sliding(10_000, 10), 10)
    await take(storage, "a", claim(on, 6))
    clock.advance(ms=1_000)
    await storage.reset((on,))
    clock.set(START_MS + 10_999)
    (state,) = await refuse(storage, "b", claim(on, 5))
    assert state.held == 6
    clock.advance(ms=1)
    (receipt,) = await take(storage, "b", claim(on, 5))
    assert receipt.held == 0


async def test_amend_by_a_lapsed_owner_does_not_revive_its_holds(mortal: Storage, clock: FrozenClock) -> None:
    """A process that lapsed learns by its next amend, as by its next reserve, that its older holds are gone."""
    on = meter(Slots(), 5)
    await take(mortal, "a", claim(on))
    clock.advance(ms=LAPSE_MS)
    assert await mortal.amend(ME, Bundle("a", (claim(on, 2),))) == Ended("a", "expired", clock.now_ms())
    assert await level(mortal, on) == (0, 0)


async def test_a_reading_names_when_the_last_use_leaves(storage: Storage, clock: FrozenClock) -> None:
    """A sub-bucket in which nothing is left puts off no reset."""
    on = meter(Sliding(10_000, 10), 10)
    await take(storage, "a", claim(on, 3))
    clock.advance(ms=5_000)
    await take(storage, "b", claim(on, 2))
    await settle(storage, "b", 0)
    assert await storage.read((on,)) == (Reading(0, 3, START_MS + 11_000),)


async def test_an_open_call_is_replayed_though_its_id_was_spent_before(storage: Storage, clock: FrozenClock) -> None:
    """An id that was cancelled, forgotten and reserved is open; a clock that steps back does not end it."""
    on = meter(Slots(), 1)
    await settle(storage, "a")
    clock.advance(ms=TOMBSTONE_MS)
    receipts = await take(storage, "a", claim(on))
    clock.advance(ms=-1)
    assert await ask(storage, "a", claim(on)) == Granted(receipts, clock.now_ms(), 0, replayed=True)


async def test_a_plan_that_raises_takes_nothing_of_its_other_claims(storage: Storage) -> None:
    """Whichever claim is wrong, the ones before it are given back, and the message names the meter."""
    known, fresh, later = (meter(Rolling(DAY_MS), subject=name) for name in ("known", "fresh", "later"))
    await take(storage, "before", claim(known, 1))
    for wrong in itertools.permutations((claim(fresh), claim(fresh), claim(later))):
        with pytest.raises(ValueError, match=f"two claims.*'{fresh.key}'"):
            await ask(storage, "a", claim(known, 2), *wrong)
        with pytest.raises(ValueError, match=f"two claims.*'{fresh.key}'"):
            await storage.amend(ME, Bundle("before", wrong))
    nameless = meter(Distinct(HOUR_MS))
    with pytest.raises(ValueError, match="names its id"):
        await ask(storage, "a", claim(known, 2), Claim(nameless, 1))
    assert [await level(storage, on) for on in (known, fresh, later)] == [(0, 1), (0, 0), (0, 0)]


async def test_a_sliding_refusal_counts_used_and_held_until_they_leave(storage: Storage, clock: FrozenClock) -> None:
    """The instant at which a claim fits is found over what is used and what is held alike."""
    on = meter(Sliding(10_000, 10), 10)
    for name, actual in (("used", 4), ("held", None)):
        await take(storage, name, claim(on, 4))
        if actual is not None:
            await settle(storage, name, actual)
        clock.advance(ms=2_000)
    (state,) = await refuse(storage, "a", claim(on, 7))
    assert (state.used, state.held, state.resets_at_ms) == (4, 4, START_MS + 13_000)
    (state,) = await refuse(storage, "a", claim(on, 6))
    assert state.resets_at_ms == START_MS + 11_000
    clock.set(START_MS + 10_999)  # the oldest sub-bucket is counted to its end
    (state,) = await refuse(storage, "a", claim(on, 6))
    assert (state.used, state.held, state.resets_at_ms) == (4, 4, START_MS + 11_000)


def test_what_a_settlement_debits_is_fetched_before_it_runs() -> None:
    """A store that loads only what a batch needs is told of the meters that a settlement debits."""
    needs = Needs()
    on = meter(Rolling(DAY_MS))
    needs.of_settlements((Settlement("a", (), None, (), (claim(on, 5),)),))
    assert (needs.calls, needs.keys) == ({"a"}, {on.key})


async def test_a_bucket_refuses_to_the_last_unit_ms(storage: Storage, clock: FrozenClock) -> None:
    """A claim does not fit while the smallest part of a unit is too much, and fits a millisecond later."""
    on = meter(Bucket(1_000, 5), 1)
    await take(storage, "a", claim(on, 5))
    clock.advance(ms=999)
    (state,) = await refuse(storage, "b", claim(on, 1))
    assert state.resets_at_ms == START_MS + 1_000
    clock.advance(ms=1)
    await take(storage, "b", claim(on, 1))


async def test_a_bucket_gives_back_to_the_last_unit_ms(storage: Storage, clock: FrozenClock) -> None:
    """The smallest part of a unit that has not drained is given back, too."""
    on = meter(Bucket(1_000, 2), 1)
    await take(storage, "a", claim(on, 1))
    await take(storage, "b", claim(on, 1))
    clock.advance(ms=999)
    await settle(storage, "a", 0)
    await take(storage, "c", claim(on, 1))


def test_a_bucket_that_was_lost_is_charged_what_is_above_the_hold() -> None:
    """With its cell gone, only an overage is left to be charged; nothing is made of what was not."""
    on = meter(Bucket(1_000, 20), 10)
    for actual, backlog in ((9, 5_000), (4, None), (1, None)):
        state = State(members=MemoryMembers(), ledger=MemoryLedger())
        cells.reserve(state, ME, ((Bundle("a", (claim(on, 4),)),),), START_MS)
        state.cells.clear()
        cells.settle(state, (Settlement("a", (actual,)),), START_MS)
        assert {key: cell.used for key, cell in state.cells.items()} == ({on.key: backlog} if backlog else {})


async def test_a_bucket_without_a_rate_never_drains(storage: Storage, clock: FrozenClock) -> None:
    """A limit of 0 blocks the shortest of buckets too; what is debited to it stays, for no time drains it."""
    on = meter(Bucket(1, 5), 0)
    await refuse(storage, "a", claim(on, 1))
    await storage.settle((Settlement("b", (), None, (), (claim(on, 3),)),))
    clock.advance(ms=60_000)
    assert await storage.read((on,)) == (Reading(3, 0, None),)


async def test_a_refused_id_is_told_when_the_first_one_expires(storage: Storage, clock: FrozenClock) -> None:
    """The reset of a refused id is the end of the oldest one; under a limit of 1 who is known is let in."""
    two, one = meter(Distinct(HOUR_MS), 2), meter(Distinct(HOUR_MS), 1)
    await take(storage, "a", claim(two, 1, "x"))
    (state,) = await refuse(storage, "b", claim(one, 1, "y"))
    assert state.resets_at_ms == START_MS + HOUR_MS
    clock.advance(ms=1_000)
    await take(storage, "b", claim(two, 1, "y"))
    (state,) = await refuse(storage, "c", claim(two, 1, "z"))
    assert state.resets_at_ms == START_MS + HOUR_MS
    await take(storage, "d", claim(one, 1, "x"))


async def test_debits_come_with_late_and_with_lost_settlements(storage: Storage) -> None:
    """What a call turned out to use besides its hold is charged, however its settlement comes, and once."""
    on, other = meter(Rolling(DAY_MS), subject="held"), meter(Rolling(DAY_MS), subject="debited")
    debits = (claim(other, 5),)
    receipts = await take(storage, "late", claim(on, 1))
    await storage.retire(ME)
    for call_id, status in (("late", "late"), ("late", "duplicate"), ("lost", "lost"), ("lost", "duplicate")):
        (settled,) = await storage.settle((Settlement(call_id, (1,), None, receipts, debits),))
        assert settled.status == status
    assert [await level(storage, m) for m in (on, other)] == [(2, 0), (10, 0)]


async def test_a_settlement_finds_no_tombstone_once_its_time_is_over(storage: Storage, clock: FrozenClock) -> None:
    """To the millisecond: a second cancellation is a duplicate before the tombstone ends, and the first one after."""
    await settle(storage, "a")
    clock.advance(ms=TOMBSTONE_MS - 1)
    assert (await settle(storage, "a")).status == "duplicate"
    clock.advance(ms=1)
    assert (await settle(storage, "a")).status == "cancelled"


async def fill_with_others(storage: Storage, number: int = 20) -> None:
    """Use other meters, so that a storage which forgets what is over gets to it."""
    for n in range(number):
        await take(storage, f"other-{n}", claim(meter(Rolling(DAY_MS), subject=f"other-{n}")), owner=ME)


async def test_a_lost_claim_counts_to_the_end_of_its_sub_bucket(make: Make, clock: FrozenClock) -> None:
    """On a sliding window a lost hold is charged while its sub-bucket is counted, and not forgotten before it leaves."""
    on = meter(Sliding(10_000, 10), 10)
    receipts = await take(make(clock), "a", claim(on, 3))
    storage = make(clock)
    clock.set(START_MS + 10_999)
    assert (await settle(storage, "a", 3, receipts=receipts)).status == "lost"
    await fill_with_others(storage)
    assert await level(storage, on) == (3, 0)
    clock.advance(ms=1)
    assert await level(storage, on) == (0, 0)


async def test_an_older_lost_claim_makes_no_sub_bucket_new(make: Make, clock: FrozenClock) -> None:
    """After a lost hold was charged to an old sub-bucket, a clock that steps back still finds the newest one."""
    on = meter(Sliding(10_000, 10), 10)
    receipts = await take(make(clock), "a", claim(on, 3))
    storage = make(clock)
    clock.advance(ms=5_000)
    (newest,) = await take(storage, "b", claim(on, 1))
    await settle(storage, "a", 3, receipts=receipts)
    clock.advance(ms=-2_000)
    (receipt,) = await take(storage, "c", claim(on, 1))
    assert (receipt.pin, receipt.used, receipt.held) == (newest.pin, 3, 1)


async def test_a_lost_claim_begins_its_window_where_another_has_just_ended(make: Make, clock: FrozenClock) -> None:
    """A lost hold whose own window still runs is charged at the very end of the one that the store has instead."""
    on = meter(Rolling(1_000), 10)
    storage = make(clock)
    await take(storage, "b", claim(on, 2))
    clock.advance(ms=500)
    receipts = await take(make(clock), "a", claim(on, 3))
    clock.advance(ms=500)
    await settle(storage, "a", 4, receipts=receipts)
    assert await storage.read((on,)) == (Reading(4, 0, START_MS + 1_500),)


async def test_a_hold_of_nothing_is_charged_however_long_it_was_open(storage: Storage, clock: FrozenClock) -> None:
    """A bucket that is empty and holds nothing is still charged what a call really used that was let in with 0."""
    on = meter(Bucket(1_000, 10), 10)
    await take(storage, "a", claim(on, 0))
    clock.advance(ms=2 * GRACE_MS)
    await fill_with_others(storage)
    assert (await settle(storage, "a", 7)).overages == (7,)
    assert await level(storage, on) == (7, 0)


async def test_a_late_overage_is_charged_to_a_bucket_that_was_empty_for_long(make: Make, clock: FrozenClock) -> None:
    """What a late settlement debits reaches a bucket that has been empty since long before its hold expired."""
    storage = make(clock)
    on = meter(Bucket(1_000, 10), 10)
    await take(storage, "a", claim(on, 4), owner=OTHER)
    for _ in range(2 * GRACE_MS // LAPSE_MS + 1):
        clock.advance(ms=LAPSE_MS - 1)
        await storage.heartbeat(OTHER)
        await storage.heartbeat(ME)
    clock.advance(ms=LAPSE_MS)
    assert (await storage.heartbeat(ME)).expired == ("a",)
    await fill_with_others(storage)
    assert (await settle(storage, "a", 9)).overages == (5,)
    assert await level(storage, on) == (5, 0)
