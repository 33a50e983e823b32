"""Leases: what they save, what they keep to, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.storage.conftest import FACTORIES
from tests.storage.leases_kit import Waiting, Watchful, around, fetches, leased, turn
from tests.storage.values import (
    DAY_MS,
    HOUR_MS,
    ME,
    OTHER,
    SECOND_MS,
    START_MS,
    Make,
    ask,
    claim,
    draft,
    level,
    meter,
    record,
    refuse,
    settle,
    take,
)

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Plan, Refused, Settlement
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

pytestmark = pytest.mark.anyio

DIRECT = meter(Calendar("day"), 10, subject="direct")


@pytest.fixture(params=["memory", "redis", "sqlite"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes the stores that leases are taken from."""
    build = FACTORIES[request.param](tmp_path)
    async with contextlib.AsyncExitStack() as made:

        def keep(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
            storage = build(clock, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms)
            made.push_async_callback(storage.aclose)
            return storage

        yield keep


@pytest.fixture
def store(make: Make, clock: FrozenClock) -> OutageStorage:
    """A store that can go away, around one of each kind; its owners do not lapse."""
    return OutageStorage(make(clock, lapse_ms=400 * DAY_MS))


@pytest.fixture
def outage(clock: FrozenClock) -> OutageStorage:
    """The same in memory, for what is the same on all."""
    return OutageStorage(MemoryStorage(clock=clock, lapse_ms=400 * DAY_MS))


@pytest.fixture
def memory(clock: FrozenClock) -> MemoryStorage:
    return MemoryStorage(clock=clock)


async def warm(storage: Storage, *claims: Claim, owner: str = ME, call_id: str = "first") -> None:
    """One call that brings a chunk of each meter, and is settled."""
    await take(storage, call_id, *claims, owner=owner)
    await turn()
    await settle(storage, call_id, *[None for _ in claims])


# ------------------------------------------------------------------------------------- what is saved


async def test_calls_are_admitted_without_asking(store: OutageStorage, clock: FrozenClock) -> None:
    """After the first call on a leased meter others are admitted and settled while the store is away, up to the chunk."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    store.down()
    for number in range(50):
        (receipt,) = await take(storage, f"call-{number}", claim(hot, 2))
        assert (receipt.taken, receipt.fits, receipt.claim.amount) == (True, True, 2)
        assert (await settle(storage, f"call-{number}", 1)).overages == (0,)
    assert store.attempts == 0
    for number in range(25):
        await take(storage, f"more-{number}", claim(hot, 2))
    with pytest.raises(StorageError):
        await take(storage, "too much", claim(hot, 2))


async def test_the_first_call_goes_to_the_store(memory: MemoryStorage, clock: FrozenClock) -> None:
    """The first claim on a meter is the store's to decide; the chunk comes beside it, not in its way."""
    hot, storage = leased(), around(memory, clock)
    (receipt,) = await take(storage, "a", claim(hot, 7))
    assert (receipt.used, receipt.held) == (0, 0)
    assert await level(storage, hot) == (0, 7)
    await turn()
    assert await level(storage, hot) == (0, 107)


async def test_chunks_are_fetched_before_the_last_is_spent(memory: MemoryStorage, clock: FrozenClock) -> None:
    """With less than half of a chunk left the next one is fetched, and one at a time."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    for number in range(50):
        await take(storage, f"a-{number}", claim(hot))
    await turn()
    assert await memory.open_holds() == 1
    for number in range(10):
        await take(storage, f"b-{number}", claim(hot))
    await turn()
    assert await memory.open_holds() == 2


async def test_nothing_is_leased_that_is_not_asked_for(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A meter without `lease` is never leased."""
    storage = around(memory, clock)
    for number in range(5):
        await take(storage, f"call-{number}", claim(DIRECT))
        await turn()
    assert await memory.open_holds() == 5
    assert await level(storage, DIRECT) == (0, 5)


async def test_a_plan_of_leased_claims_is_admitted_at_once(outage: OutageStorage, clock: FrozenClock) -> None:
    """`admit` grants what leases have, whole bundles at a time, and changes nothing where they have not all of it."""
    hot, other, storage = leased(), leased(subject="other"), around(outage, clock)
    await warm(storage, claim(hot), claim(other))
    outage.down()
    plan = (Bundle("a", (claim(hot, 60),)), Bundle("b", (claim(other, 60),)))
    granted = storage.admit(ME, plan)
    assert granted is not None
    assert [receipt.claim for receipt in granted.receipts] == [claim(hot, 60), claim(other, 60)]
    assert storage.admit(ME, plan) is None, "the ids are taken"
    assert storage.admit(ME, (Bundle("c", (claim(hot, 10), claim(other, 90))),)) is None
    assert storage.admit(ME, (Bundle("d", (claim(hot, 10), claim(DIRECT))),)) is None
    assert storage.admit(ME, (Bundle("e", ()),)) is None
    assert storage.admit(ME, (Bundle("f", (claim(hot, 40), claim(other, 40))),)) is not None
    assert outage.attempts == 0


async def test_receipts_tell_what_is_known(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A leased claim's receipt shows what the store said when it gave the chunk, and what has come of the chunk since."""
    hot, storage = leased(), around(memory, clock)
    await take(memory, "theirs", claim(hot, 30), owner=OTHER)
    await settle(memory, "theirs", 20)
    await take(memory, "open", claim(hot, 5), owner=OTHER)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10))
    await settle(storage, "a", 4)
    await take(storage, "b", claim(hot, 3))
    (receipt,) = await take(storage, "c", claim(hot, 2))
    assert (receipt.used, receipt.held) == (20 + 4, 5 + 1 + 3)
    assert receipt.pin == START_MS - 8 * HOUR_MS
    assert receipt.resets_at_ms == START_MS + 16 * HOUR_MS


# ----------------------------------------------------------------------------------------- the limit


async def test_the_tail_is_spent_exactly(store: OutageStorage, clock: FrozenClock) -> None:
    """Of three workers that take one at a time, exactly the limit is admitted, and refusals tell the store's numbers."""
    hot = leased(200, 50)
    workers = [around(store, clock, workers=3) for _ in range(3)]
    admitted, refused = 0, 0
    for number in range(260):
        storage, owner = workers[number % 3], f"owner-{number % 3}"
        answer = await ask(storage, f"call-{number}", claim(hot), owner=owner)
        admitted += isinstance(answer, Granted)
        if isinstance(answer, Refused):
            refused += 1
            (state,) = answer.states[0]
            assert state.used + state.held == 200
            assert not state.fits
        await turn()
    assert (admitted, refused) == (200, 60)


async def test_what_this_process_has_left_does_not_refuse_its_own_calls(
    memory: MemoryStorage, clock: FrozenClock
) -> None:
    """A claim that the chunk has no room for and the rest of the meter neither, but both together, is admitted."""
    hot, storage = leased(100, 25), around(memory, clock)
    await warm(storage, claim(hot, 0))
    await take(storage, "held", claim(hot, 5))
    await take(memory, "theirs", claim(hot, 60), owner=OTHER)
    assert await level(storage, hot) == (0, 85)
    await take(storage, "both", claim(hot, 34))
    (state,) = await refuse(storage, "too much", claim(hot, 2))
    assert (state.used, state.held) == (0, 99)
    await settle(storage, "held", 3)
    await settle(storage, "both", 30)
    assert await level(storage, hot) == (33, 60)


async def test_a_refusal_tells_what_a_smaller_claim_would_get(memory: MemoryStorage, clock: FrozenClock) -> None:
    """What this process has left does not count as held in its refusals: a claim of the rest is granted."""
    hot, storage = leased(1_000, 100), around(memory, clock)
    await warm(storage, claim(hot, 0))
    await take(storage, "open", claim(hot, 10))
    await take(memory, "theirs", claim(hot, 890), owner=OTHER)
    (state,) = await refuse(storage, "big", claim(hot, 500))
    assert (state.used, state.held) == (0, 900)
    await take(storage, "rest", claim(hot, 100))
    await refuse(storage, "more", claim(hot))


async def test_chunks_shrink_as_the_limit_comes_near(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A chunk is at most a fourth of this worker's share of what is left; if it would hold too little, there is none."""
    hot, storage = leased(1_000, 500), around(memory, clock, workers=5)
    await take(memory, "theirs", claim(hot, 580), owner=OTHER)
    await take(storage, "a", claim(hot))
    await turn()
    assert await level(storage, hot) == (0, 581 + 419 // 20)
    await take(memory, "more", claim(hot, 330), owner=OTHER)
    other = around(memory, clock, workers=5)
    await take(other, "b", claim(hot), owner=OTHER)
    await turn()
    assert await level(storage, hot) == (0, 581 + 20 + 331)


async def test_the_number_of_workers_is_learnt(memory: MemoryStorage, clock: FrozenClock) -> None:
    """With each heartbeat the store says how many processes share what is left."""
    hot, storage = leased(1_000, 500), around(memory, clock, workers=1)
    for number in range(9):
        await memory.heartbeat(f"owner-{number}")
    await storage.heartbeat(ME)
    await take(storage, "a", claim(hot))
    await turn()
    assert await level(storage, hot) == (0, 1 + 999 // 40)


async def test_a_meter_without_a_limit_is_leased_too(outage: OutageStorage, clock: FrozenClock) -> None:
    """What only counts is counted without a trip."""
    hot, storage = leased(None), around(outage, clock)
    await warm(storage, claim(hot))
    outage.down()
    await take(storage, "a", claim(hot, 80))
    assert outage.attempts == 0


async def test_a_lower_limit_is_kept(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A chunk that was taken under a limit does not serve claims under a lower one; under a higher one it does."""
    hot, storage = leased(1_000, 100), around(memory, clock)
    await warm(storage, claim(hot))
    await take(storage, "open", claim(hot, 60))
    (state,) = await refuse(storage, "low", claim(leased(50, 10)))
    assert (state.used, state.held) == (1, 60)
    await take(storage, "high", claim(leased(2_000, 100), 40))
    assert await level(storage, hot) == (1, 100)


async def test_used_above_the_hold_comes_from_the_chunk(memory: MemoryStorage, clock: FrozenClock) -> None:
    """What a call uses above its hold is taken from its chunk; what that cannot cover is debited at once, all reported."""
    hot, storage = leased(1_000, 100), around(memory, clock)
    await warm(storage, claim(hot, 0))
    await take(storage, "a", claim(hot, 10))
    await take(storage, "b", claim(hot, 60))
    assert (await settle(storage, "a", 30)).overages == (20,)
    assert await level(storage, hot) == (0, 100)
    assert (await settle(storage, "b", 95)).overages == (35,)
    assert await level(storage, hot) == (25, 100)
    await storage.retire(ME)
    assert await level(storage, hot) == (125, 0)


# ----------------------------------------------------------------------------------- all or nothing


async def test_a_refused_rest_gives_back_what_was_taken(store: OutageStorage, clock: FrozenClock) -> None:
    """If another claim of the plan is refused, the leased ones are put back; states come in claim order."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    for number in range(20):
        first, second, third = await refuse(
            storage, f"call-{number}", claim(hot, 30), claim(DIRECT, 11), claim(leased(subject="new"), 1)
        )
        assert (first.claim.meter, first.taken, first.fits) == (hot, False, True)
        assert (second.claim.meter, second.taken, second.fits) == (DIRECT, False, False)
        assert (third.taken, third.fits) == (False, True)
    await take(storage, "all of it", claim(hot, 100))
    assert await level(storage, DIRECT) == (0, 0)


async def test_mixed_plans_take_one_trip(store: OutageStorage, clock: FrozenClock) -> None:
    """What leases do not have is asked for in one trip; receipts come in claim order, each from where it was taken."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    store.down(after=1)
    plan = (
        Bundle("call", (claim(DIRECT, 4), claim(hot, 10)), draft("call", cost=10)),
        Bundle("request", (claim(leased(subject="new"), 2),)),
    )
    answer = await storage.reserve(ME, (plan,))
    assert isinstance(answer, Granted)
    assert [(r.claim.meter.subject, r.claim.amount) for r in answer.receipts] == [
        ("direct", 4),
        ("hot", 10),
        ("new", 2),
    ]
    store.up()
    await turn()
    assert await level(storage, DIRECT) == (0, 4)
    settled = await storage.settle(
        [Settlement("call", (5, 7), record("call", 12), answer.receipts[:2]), Settlement("request", (None,))]
    )
    assert [(s.status, s.overages) for s in settled] == [("settled", (1, 0)), ("settled", (0,))]
    await storage.retire(ME)
    assert await level(storage, DIRECT) == (5, 0)
    assert await level(storage, hot) == (8, 0)


async def test_the_first_plan_that_fits_is_taken(memory: MemoryStorage, clock: FrozenClock) -> None:
    """Of several plans the first that fits is granted, from leases or from the store; the others leave nothing behind."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))

    async def reserve(call_id: str, *plans: tuple[Claim, ...]) -> Granted | Refused | Ended:
        return await storage.reserve(ME, [(Bundle(call_id, claims),) for claims in plans])

    second = await reserve("a", (claim(hot, 10), claim(DIRECT, 11)), (claim(hot, 20),))
    assert isinstance(second, Granted)
    assert (second.plan, len(second.receipts)) == (1, 1)
    first = await reserve("b", (claim(hot, 10), claim(DIRECT, 1)), (claim(hot, 20),))
    assert isinstance(first, Granted)
    assert (first.plan, len(first.receipts)) == (0, 2)
    none = await reserve("c", (claim(hot, 10), claim(DIRECT, 11)), (claim(DIRECT, 12), claim(hot, 5)))
    assert isinstance(none, Refused)
    assert [[state.fits for state in states] for states in none.states] == [[True, False], [False, True]]
    await take(storage, "the rest", claim(hot, 100 - 20 - 10))
    again = await reserve("b", (claim(hot, 10), claim(DIRECT, 1)), (claim(hot, 20),))
    assert again == Granted(first.receipts, first.now_ms, 0, True)


async def test_two_claims_on_one_meter_are_an_error(memory: MemoryStorage, clock: FrozenClock) -> None:
    """As on every storage; and nothing is taken."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    twice = Bundle("a", (claim(hot, 10), claim(hot, 10)))
    with pytest.raises(ValueError, match="merge them into one"):
        await storage.reserve(ME, ((twice,),))
    with pytest.raises(ValueError, match="the same call id"):
        await storage.reserve(ME, ((Bundle("a", (claim(hot),)), Bundle("a", ())),))
    await take(storage, "b", claim(hot, 1))
    with pytest.raises(ValueError, match="merge them into one"):
        await storage.amend(ME, Bundle("b", twice.claims))
    with pytest.raises(ValueError, match="'c' is not open"):
        await storage.reserve(ME, ((Bundle("b", (claim(hot),)), Bundle("c", ())),))
    await take(storage, "the rest", claim(hot, 99))


# -------------------------------------------------------------------------------------- idempotency


async def test_call_ids_are_reserved_and_settled_once(outage: OutageStorage, clock: FrozenClock) -> None:
    """A leased call is replayed while it is open and has ended afterwards; its second settlement changes nothing."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    outage.down()
    receipts = await take(storage, "a", claim(hot, 10))
    again = await ask(storage, "a", claim(hot, 10))
    assert again == Granted(receipts, START_MS, 0, True)
    assert (await settle(storage, "a", 4)).status == "settled"
    assert (await settle(storage, "a", 50)).status == "duplicate"
    assert await ask(storage, "a", claim(hot, 10)) == Ended("a", "settled", START_MS)
    assert await storage.amend(ME, Bundle("a", (claim(hot),))) == Ended("a", "settled", START_MS)
    await take(storage, "the rest", claim(hot, 96))
    assert outage.attempts == 0


async def test_spent_ids_are_known_for_their_time(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A call id is known for `tombstone_ms` after its end, and no longer, nor is it kept."""
    hot = leased()
    storage = LeasingStorage(memory, clock=clock, tombstone_ms=1_000)
    await warm(storage, claim(hot))
    for number in range(10):
        await take(storage, f"call-{number}", claim(hot))
        await settle(storage, f"call-{number}")
        clock.advance(ms=200)
    assert isinstance(await ask(storage, "call-9", claim(hot)), Ended)
    clock.advance(ms=1_000)
    assert isinstance(await ask(storage, "call-9", claim(hot)), Granted)


async def test_a_cancellation_that_comes_first_refuses_its_call(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A call that was cancelled before it was reserved is refused, though leases would have served it."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    assert (await settle(storage, "late")).status == "cancelled"
    assert await ask(storage, "late", claim(hot)) == Ended("late", "cancelled", START_MS)
    assert await storage.amend(ME, Bundle("late", (claim(hot),))) == Ended("late", "cancelled", START_MS)
    assert storage.admit(ME, (Bundle("late", (claim(hot),)),)) is None
    assert (await settle(storage, "late")).status == "duplicate"


async def test_records_are_written_once(store: OutageStorage, clock: FrozenClock) -> None:
    """The record of a leased call reaches the ledger with its settlement, once, whoever asks again."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "a", claim(hot, 10), draft=draft("a", cost=10))
    assert (await settle(storage, "a", 4, record=record("a", 4), receipts=receipts)).status == "settled"
    assert (await settle(storage, "a", 9, record=record("a", 9), receipts=receipts)).status == "duplicate"
    assert [found.cost_nanousd for found in await storage.records()] == [4]
    clock.advance(ms=TOMBSTONE_MS)
    assert (await settle(storage, "a", 9, record=record("a", 9), receipts=receipts)).status == "duplicate"
    assert [found.cost_nanousd for found in await storage.records(since_ms=0, limit=5)] == [4]


async def test_a_settlement_that_the_store_did_not_take_is_given_again(
    outage: OutageStorage, clock: FrozenClock
) -> None:
    """If the store is away when a leased call ends, what it used is counted here once, and its record when it is told again."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "a", claim(hot, 90))
    outage.down()
    for _ in range(2):
        with pytest.raises(StorageError):
            await settle(storage, "a", 120, record=record("a", 120), receipts=receipts)
    outage.up()
    settled = await settle(storage, "a", 120, record=record("a", 120), receipts=receipts)
    assert (settled.status, settled.overages) == ("settled", (30,))
    assert (await settle(storage, "a", 120, record=record("a", 120))).status == "duplicate"
    await storage.retire(ME)
    assert await level(storage, hot) == (121, 0)
    assert [found.call_id for found in await storage.records()] == ["a"]


async def test_debits_reach_the_store(memory: MemoryStorage, clock: FrozenClock) -> None:
    """What was not held is charged with the settlement, also where nothing else has to reach the store."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10))
    (settled,) = await storage.settle([Settlement("a", (10,), debits=(claim(DIRECT, 3),))])
    assert settled.status == "settled"
    assert await level(storage, DIRECT) == (3, 0)


async def test_a_call_that_the_store_has_ended_is_over(store: OutageStorage, clock: FrozenClock) -> None:
    """If the store has expired what it holds of a call, so are its leased claims: charged as they were held."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    for call_id in ("a", "b"):
        await take(storage, call_id, claim(hot, 10), claim(DIRECT, 1))
    await store.inner.retire(ME)
    again = await ask(storage, "a", claim(hot, 10), claim(DIRECT, 1))
    assert isinstance(again, Ended)
    assert again.reason == "expired"
    assert isinstance(await ask(storage, "a", claim(hot, 10), claim(DIRECT, 1)), Ended)
    changed = await storage.amend(ME, Bundle("b", (claim(hot, 50),)))
    assert isinstance(changed, Ended)
    assert (await settle(storage, "a", 4, 3)).overages == (0, 2)
    assert (await settle(storage, "b", 14, 0)).overages == (4, 0)
    await storage.retire(ME)
    assert (await level(storage, DIRECT))[0] == 2 + 2


async def test_what_was_charged_as_held_is_not_charged_again(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A call that was settled elsewhere is charged what its leases hold; its own settlement can only add to that."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10), claim(DIRECT, 1))
    await take(storage, "b", claim(hot, 20))
    await settle(memory, "a", 1)
    assert isinstance(await ask(storage, "a", claim(hot, 10), claim(DIRECT, 1)), Ended)
    assert (await settle(storage, "a", 4, 1)).status == "duplicate"
    await settle(storage, "b", 20)
    await storage.retire(ME)
    assert await level(memory, hot) == (1 + 10 + 20, 0)


async def test_an_id_that_the_ledger_knows_is_spent(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A plan that makes a trip is told that its call id has ended, and what it took from leases is put back."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    await settle(memory, "old", record=record("old", 1))
    assert await ask(storage, "old", claim(hot, 60), claim(DIRECT)) == Ended("old", "settled", START_MS)
    await take(storage, "all of it", claim(hot, 100))


async def test_shadows_are_leased_where_they_fit(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A claim that refuses nothing is taken from a chunk if there is one; a chunk that does not fit is not held."""
    hot, storage = leased(60, 40, enforce=False), around(memory, clock)
    await warm(storage, claim(hot))
    assert await level(storage, hot) == (1, 59 // 4)
    await take(memory, "theirs", claim(hot, 45), owner=OTHER)
    for number in range(20):
        await take(storage, f"call-{number}", claim(hot))
        await turn()
    assert sum(await level(storage, hot)) <= 60
    wide = leased(None, 40, subject="wide", enforce=False)
    await warm(storage, claim(wide), call_id="wide")
    await take(memory, "others", claim(leased(100, 40, subject="wide"), 30), owner=OTHER)
    tight = leased(75, 40, subject="wide", enforce=False)
    await take(storage, "tight", claim(tight, 4))
    await turn()
    assert (await level(storage, wide))[1] == 40 + 30 + 4


async def test_a_chunk_that_is_refused_is_not_asked_for_again_at_once(
    memory: MemoryStorage, clock: FrozenClock
) -> None:
    """If others were faster, the refusal tells what is left, and the tail goes to the store."""
    hot, storage = leased(400, 100), around(memory, clock)
    await take(storage, "a", claim(hot))
    await take(memory, "theirs", claim(hot, 390), owner=OTHER)
    await turn()
    assert await level(storage, hot) == (0, 391)
    for number in range(9):
        await take(storage, f"tail-{number}", claim(hot))
        await turn()
    assert await memory.open_holds() == 11
    await refuse(storage, "over", claim(hot))


async def test_chunks_that_are_over_are_returned_by_whoever_notices(memory: MemoryStorage, clock: FrozenClock) -> None:
    """The next claim, or the next heartbeat, returns a chunk whose window has ended."""
    hot, storage = leased(window=Sliding(10 * SECOND_MS, 10)), around(memory, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot))
    await settle(storage, "a", 1)
    clock.advance(ms=1_000)
    assert storage.admit(ME, (Bundle("b", (claim(hot),)),)) is None
    assert await level(storage, hot) == (2, 0)
    await warm(storage, claim(hot), call_id="c")
    clock.advance(ms=1_000)
    await storage.heartbeat(ME)
    assert await level(storage, hot) == (3, 0)
    await warm(storage, claim(hot), call_id="d")
    clock.advance(ms=1_000)
    await take(storage, "e", claim(hot))
    assert await level(storage, hot) == (4, 1)


async def test_what_comes_back_is_spent_from_where_most_is_left(memory: MemoryStorage, clock: FrozenClock) -> None:
    """Of several chunks the one with the most left is spent, and others are returned when no call holds of them."""
    hot, storage = leased(2_000, 100), around(memory, clock)
    await warm(storage, claim(hot, 0))
    for number in range(5):
        await take(storage, f"first-{number}", claim(hot, 12))
    await turn()
    assert await level(storage, hot) == (0, 200)
    for number in range(5):
        await take(storage, f"second-{number}", claim(hot, 18))
    await turn()
    assert await level(storage, hot) == (0, 300)
    for number in range(4):
        await settle(storage, f"first-{number}", 0)
    assert await level(storage, hot) == (0, 300)
    for number in range(5):
        await settle(storage, f"second-{number}", 17)
    assert await level(storage, hot) == (85, 200)
    await settle(storage, "first-4", 0)
    assert (await level(storage, hot))[1] == 100


async def test_a_chunk_that_is_nearly_used_up_makes_way(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A new chunk takes the place of one with less left, which is returned at once if no call holds of it; and the next
    is not asked for while one is on its way."""
    hot, storage = leased(2_000, 100), around(memory, clock)
    await warm(storage, claim(hot, 0))
    for number in range(6):
        await take(storage, f"call-{number}", claim(hot, 10))
        await settle(storage, f"call-{number}", 10)
    assert len(fetches()) == 1
    await turn()
    assert await level(storage, hot) == (60, 100)


async def test_what_comes_back_to_an_older_chunk_is_spent(memory: MemoryStorage, clock: FrozenClock) -> None:
    """If more comes back to a chunk than the current one has left, that one is spent again."""
    hot, storage = leased(2_000, 100), around(memory, clock)
    await warm(storage, claim(hot, 0))
    for number in range(5):
        await take(storage, f"first-{number}", claim(hot, 12))
    await turn()
    for number in range(5):
        await take(storage, f"second-{number}", claim(hot, 18))
    for number in range(5):
        await settle(storage, f"first-{number}", 0)
    assert storage.admit(ME, (Bundle("third", (claim(hot, 95),)),)) is not None


async def test_answers_to_settlements_can_be_waited_for_in_any_way(make: Make, clock: FrozenClock) -> None:
    """A settlement that reaches the store is answered to a callback, to synchronous code and to whoever awaits it."""
    hot, storage = leased(), around(make(clock, lapse_ms=400 * DAY_MS), clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "a", claim(hot, 10))
    told = threading.Event()
    pending = storage.settle([Settlement("a", (12,), record("a", 12), receipts)])
    pending.add_done_callback(lambda done: told.set() if done.done() else None)
    (settled,) = await pending
    assert (settled.status, settled.overages) == ("settled", (2,))
    assert pending.done()
    assert pending.result(5) == (settled,)
    assert told.wait(60)


async def test_a_closed_store_takes_nothing_back(memory: MemoryStorage, clock: FrozenClock) -> None:
    """What cannot be returned, for the store is closed, is no error of those who return it."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    await memory.aclose()
    await storage.aclose()
    with pytest.raises(StorageError):
        await ask(storage, "a", claim(hot))


# ------------------------------------------------------------------------------------ unknown outcomes


@pytest.mark.parametrize("reached", [False, True])
async def test_a_call_without_an_answer_may_be_asked_for_again(
    outage: OutageStorage, clock: FrozenClock, reached: bool
) -> None:
    """Without an answer to the rest what was taken from leases stays taken, and the same question has one answer."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    if reached:
        outage.lose_replies()
    else:
        outage.down(unanswered=1)
    with pytest.raises(StorageError):
        await ask(storage, "a", claim(hot, 60), claim(DIRECT, 4))
    outage.up()
    receipts = await take(storage, "a", claim(hot, 60), claim(DIRECT, 4))
    assert [receipt.claim.amount for receipt in receipts] == [60, 4]
    assert (await settle(storage, "a", 50, 3)).status == "settled"
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, DIRECT)] == [(51, 0), (3, 0)]


async def test_a_call_that_never_reached_the_store_leaves_nothing(outage: OutageStorage, clock: FrozenClock) -> None:
    """If the question for the rest surely did not reach the store, what was taken from leases is put back."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    outage.down()
    for number in range(3):
        with pytest.raises(StorageError):
            await ask(storage, f"call-{number}", claim(hot, 60), claim(DIRECT, 4))
    await take(storage, "all of it", claim(hot, 100))


async def test_a_call_without_an_answer_is_settled_as_it_was_asked_for(
    outage: OutageStorage, clock: FrozenClock
) -> None:
    """A call whose reserve had no answer is cancelled, or settled with receipts: each claim where it was taken."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "model", claim(hot, 0), claim(DIRECT, 0))
    outage.lose_replies()
    for call_id in ("cancelled", "used"):
        with pytest.raises(StorageError):
            await ask(storage, call_id, claim(hot, 40), claim(DIRECT, 4))
    outage.up()
    assert (await settle(storage, "cancelled")).status == "settled"
    assert (await settle(storage, "used", 30, 3, receipts=receipts, record=record("used", 3))).status == "settled"
    assert await ask(storage, "cancelled", claim(hot, 40)) == Ended("cancelled", "settled", START_MS)
    await settle(storage, "model")
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, DIRECT)] == [(31, 0), (3, 0)]


async def test_a_call_is_asked_for_again_on_other_terms(clock: FrozenClock) -> None:
    """What was admitted elsewhere meanwhile, and comes without its limits, is held as it was taken."""
    store = Waiting(clock=clock)
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    store.decides_first = False
    store.open.clear()
    asking = asyncio.ensure_future(ask(storage, "a", claim(hot, 60), claim(DIRECT, 4)))
    await asyncio.sleep(0)
    asking.cancel()
    store.open.set()
    await asyncio.wait([asking])
    await take(storage, "full", claim(DIRECT, 10))
    assert isinstance(await ask(storage, "a", claim(hot, 60), claim(DIRECT, 4)), Refused)
    store.open.clear()
    asking = asyncio.ensure_future(ask(storage, "a", claim(hot, 60), claim(DIRECT, 4)))
    await asyncio.sleep(0)
    asking.cancel()
    store.open.set()
    await asyncio.wait([asking])
    await take(storage, "a", claim(leased(None, 0), 60), claim(meter(Calendar("day"), None, subject="direct"), 4))
    await settle(storage, "a", 50, 3)
    await storage.retire(ME)
    assert [(await level(storage, on))[0] for on in (hot, DIRECT)] == [51, 3 + 10]


async def test_a_call_that_is_cancelled_while_it_is_asked_for_holds_nothing(clock: FrozenClock) -> None:
    """A settlement that overtakes the answer gives back what was taken; the answer says that the call has ended."""
    store = Waiting(clock=clock)
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    store.open.clear()
    plan = (Bundle("a", (claim(hot, 60), claim(DIRECT, 4))), Bundle("b", (claim(leased(subject="new"), 1),)))
    asking = asyncio.ensure_future(storage.reserve(ME, (plan,)))
    await asyncio.sleep(0)
    assert await storage.amend(ME, Bundle("a", ())) == Ended("a", "unknown", START_MS)
    storage.settle([Settlement("a", ()), Settlement("b", ())])
    store.open.set()
    assert await asking == Ended("a", "settled", START_MS)
    await take(storage, "all of it", claim(hot, 100), claim(DIRECT, 10))


async def test_two_who_ask_for_one_call_get_one_answer(clock: FrozenClock) -> None:
    """Two reserves of one call id at a time are granted once, with the same receipts."""
    store = Waiting(clock=clock)
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    store.open.clear()
    asked = [asyncio.ensure_future(ask(storage, "a", claim(hot, 60), claim(DIRECT, 4))) for _ in range(2)]
    await asyncio.sleep(0)
    store.open.set()
    first, second = await asyncio.gather(*asked)
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert first.receipts == second.receipts
    await take(storage, "the rest", claim(hot, 40), claim(DIRECT, 6))


async def test_what_could_not_be_returned_is_returned_by_retire(store: OutageStorage, clock: FrozenClock) -> None:
    """Chunks whose return the store did not take come back when the process ends, and are not charged whole."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    store.down()
    with pytest.raises(StorageError):
        await storage.retire(ME)

    store.up()
    await storage.retire(ME)
    assert await level(storage, hot) == (1, 0)


async def test_a_chunk_without_an_answer_is_cancelled(outage: OutageStorage, clock: FrozenClock) -> None:
    """A chunk of which nobody knows whether it was granted is given back, now or with the next heartbeat."""
    hot, storage = leased(), around(outage, clock)
    outage.lose_replies(after=1)
    await take(storage, "a", claim(hot, 10))
    await turn()
    assert (await level(outage.inner, hot))[1] in {10, 110}
    outage.up()
    await storage.heartbeat(ME)
    assert await level(storage, hot) == (0, 10)


async def test_a_chunk_that_is_on_its_way_at_the_end_is_cancelled(clock: FrozenClock) -> None:
    """Neither `retire` nor `aclose` leaves a chunk behind whose answer comes later."""
    store = Waiting(clock=clock)
    hot, storage = leased(), around(store, clock)
    await take(storage, "a", claim(hot, 10))
    store.open.clear()
    await asyncio.sleep(0)
    assert await level(store, hot) == (0, 110)
    await storage.retire(ME)
    assert await level(store, hot) == (10, 0)
    store.open.set()
    await turn()
    await take(storage, "b", claim(hot, 10), owner=OTHER)
    store.open.clear()
    await asyncio.sleep(0)
    assert await level(store, hot) == (10, 120 - 10)
    await storage.aclose()
    assert fetches() == []


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [Calendar("hour"), Rolling(HOUR_MS), Lifetime(HOUR_MS)], ids=lambda w: w.code)
async def test_a_chunk_ends_with_its_window(make: Make, clock: FrozenClock, window: Window) -> None:
    """At the end of its window a chunk is spent no more; what was taken of it is charged to the old window, not the new."""
    hot, storage = leased(200, 50, window=window), around(make(clock, lapse_ms=400 * DAY_MS), clock)
    await warm(storage, claim(hot, 1))
    (old,) = await take(storage, "old", claim(hot, 10))
    clock.advance(ms=HOUR_MS)
    (new,) = await take(storage, "new", claim(hot, 7))
    await turn()
    assert new.pin == old.pin + HOUR_MS
    assert await level(storage, hot) == (0, 7 + 193 // 4)
    await settle(storage, "old", 30)
    assert await level(storage, hot) == (0, 7 + 193 // 4)
    await storage.retire(ME)
    assert await level(storage, hot) == (7, 0)


async def test_a_chunk_of_a_rate_ends_with_its_sub_bucket(make: Make, clock: FrozenClock) -> None:
    """In no stretch of its period is more admitted than the limit: a chunk is spent in the sub-bucket that it is pinned to."""
    window = Sliding(10 * SECOND_MS, 10)
    hot, storage = leased(40, 10, window=window), around(make(clock, lapse_ms=400 * DAY_MS), clock)
    admitted: list[int] = []
    for number in range(200):
        if isinstance(await ask(storage, f"call-{number}", claim(hot)), Granted):
            admitted.append(clock.now_ms())
        await turn()
        clock.advance(ms=130)
    assert len(admitted) > 60
    for start in admitted:
        assert sum(start <= at < start + window.period_ms for at in admitted) <= 40


async def test_a_chunk_is_not_spent_close_to_the_end(outage: OutageStorage, clock: FrozenClock) -> None:
    """`skew_ms` before its window ends a chunk is left alone, as the store's clock may be that much ahead."""
    hot = leased(window=Calendar("hour"))
    storage = LeasingStorage(outage, clock=clock, skew_ms=500)
    await warm(storage, claim(hot))
    clock.advance(ms=HOUR_MS - 8_001)
    await storage.heartbeat(ME)
    assert storage.admit(ME, (Bundle("a", (claim(hot),)),)) is not None
    clock.advance(ms=7_500)
    assert storage.admit(ME, (Bundle("b", (claim(hot),)),)) is None


async def test_the_end_is_measured_from_before_the_question(clock: FrozenClock) -> None:
    """A slow answer makes the store's clock look later than it is, never earlier: a chunk ends early, not late."""
    store = Waiting(clock=clock)
    hot, storage = leased(window=Calendar("hour")), around(store, clock)
    await take(storage, "a", claim(hot))
    store.open.clear()
    await asyncio.sleep(0)
    clock.advance(ms=60_000)
    store.open.set()
    await turn()
    clock.advance(ms=HOUR_MS - 61_000 - 3_600)
    assert storage.admit(ME, (Bundle("b", (claim(hot),)),)) is not None
    clock.advance(ms=2_000)
    assert storage.admit(ME, (Bundle("c", (claim(hot),)),)) is None


class Repeating(MemoryStorage):
    """A store that remembers its first refusal, and gives it again."""

    refusal: Refused | None = None

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        answer = self.refusal or await super().reserve(owner, plans)
        if isinstance(answer, Refused):
            self.refusal = answer
        return answer


async def test_a_refusal_that_was_remembered_does_not_tell_the_time(clock: FrozenClock) -> None:
    """A chunk is over with its window, though a refusal that is given again names an instant before that."""
    hot, storage = leased(window=Calendar("hour")), around(Repeating(clock=clock), clock)
    await warm(storage, claim(hot))
    other = leased(subject="other")
    await refuse(storage, "a", claim(other), claim(DIRECT, 11))
    clock.advance(ms=HOUR_MS)
    await refuse(storage, "b", claim(other), claim(DIRECT, 11))
    assert storage.admit(ME, (Bundle("c", (claim(hot),)),)) is None


@pytest.mark.parametrize("overtaken", [False, True])
async def test_an_amend_whose_outcome_is_unknown_leaves_nothing_held_in_the_store(
    clock: FrozenClock, *, overtaken: bool
) -> None:
    """A call of leased claims that may hold in the store since it was amended is given back there too, without a record."""
    store = Waiting(clock=clock)
    link, hot = OutageStorage(store), leased()
    storage = around(link, clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "a", claim(hot, 2), draft=draft("a", cost=1))
    bundle = Bundle("a", (claim(hot, 2), claim(DIRECT, 3)), draft("a", cost=1))
    if overtaken:
        store.open.clear()
        changing = asyncio.ensure_future(storage.amend(ME, bundle))
        await asyncio.sleep(0)
        await settle(storage, "a", receipts=receipts)
        store.open.set()
        assert isinstance(await changing, Ended)
    else:
        link.down(unanswered=1)
        with pytest.raises(StorageError):
            await storage.amend(ME, bundle)
        link.up()
        await settle(storage, "a", receipts=receipts)
    assert await level(store, DIRECT) == (0, 0)
    assert await level(store, hot) == (1, 100)


@pytest.mark.parametrize(
    "window", [Bucket(1_000, 5), Lifetime(1_000, renew=True), Slots(), Distinct(1_000)], ids=lambda w: w.code
)
def test_what_cannot_be_leased_is_refused_at_configuration(window: Window) -> None:
    """Meters the chunks of which could not be spent later than they were taken have no lease."""
    with pytest.raises(ConfigurationError, match="leave lease out"):
        leased(5, 1, window=window)


# ------------------------------------------------------------------------------- letting go and dying


async def test_what_nobody_uses_is_returned(store: OutageStorage, clock: FrozenClock) -> None:
    """A chunk that was not used between two heartbeats goes back; one that calls hold of shrinks to what they hold."""
    hot, other = leased(), leased(subject="other")
    storage = around(store, clock)
    await warm(storage, claim(hot), claim(other))
    await take(storage, "a", claim(hot, 10))
    await settle(storage, "a", 8)
    await take(storage, "open", claim(other, 5))
    await storage.heartbeat(ME)
    assert [await level(storage, on) for on in (hot, other)] == [(1, 100), (1, 100)]
    await storage.heartbeat(ME)
    assert [await level(storage, on) for on in (hot, other)] == [(9, 0), (1, 5)]
    await settle(storage, "open", 3)
    assert [await level(storage, on) for on in (hot, other)] == [(9, 0), (4, 0)]


async def test_returns_that_the_store_does_not_take_are_repeated(outage: OutageStorage, clock: FrozenClock) -> None:
    """A chunk that could not be returned is returned with the next heartbeat that is answered."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    await storage.heartbeat(ME)
    outage.down(after=1)
    await storage.heartbeat(ME)
    with pytest.raises(StorageError):
        await storage.heartbeat(ME)
    outage.up()
    assert await level(storage, hot) == (1, 100)
    await storage.heartbeat(ME)
    assert await level(storage, hot) == (1, 0)


async def test_a_process_that_goes_in_order_leaves_nothing_held(store: OutageStorage, clock: FrozenClock) -> None:
    """`retire` returns chunks and charges what open calls hold of them, with a record of each; late settlements correct it."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "open", claim(hot, 10), draft=draft("open", cost=10))
    await take(storage, "quiet", claim(hot, 7))
    await storage.retire(ME)
    assert await level(storage, hot) == (18, 0)
    assert await storage.open_holds() == 0
    assert [(found.call_id, found.outcome) for found in await storage.records()] == [("open", "expired")]
    assert await ask(storage, "quiet", claim(hot, 7)) == Ended("quiet", "expired", START_MS)
    assert await storage.amend(ME, Bundle("quiet", (claim(hot, 8),))) == Ended("quiet", "expired", START_MS)
    settled = await settle(storage, "open", 25, record=record("open", 25), receipts=receipts)
    assert (settled.status, settled.overages) == ("late", (15,))
    assert await level(storage, hot) == (33, 0)
    assert [(found.call_id, found.late) for found in await storage.records()] == [("open", True)]
    assert (await settle(storage, "quiet", 5)).status == "settled"
    assert await level(storage, hot) == (33, 0)


@pytest.mark.parametrize("refund", [False, True])
async def test_what_a_dead_process_had_leased_stays_charged(make: Make, clock: FrozenClock, refund: bool) -> None:
    """After a crash the whole chunk is charged, whatever `expiry_charge` says, and nobody can spend it again."""
    hot, store = leased(200, 50, refund=refund), make(clock)
    storage = around(store, clock)
    await warm(storage, claim(hot))
    billed = 0
    for number in range(20):
        await take(storage, f"call-{number}", claim(hot))
        billed += 1
    clock.advance(ms=LAPSE_MS)
    beat = await around(store, clock).heartbeat(OTHER)
    assert beat.expired == (), "a lease is no call"
    assert await level(store, hot) == (1 + 199 // 4, 0)
    admitted = 0
    while isinstance(await ask(store, f"after-{admitted}", claim(hot), owner=OTHER), Granted):
        admitted += 1
    assert billed + 1 + admitted <= 200
    assert admitted == 150


async def test_a_process_that_had_lapsed_stops_spending(make: Make, clock: FrozenClock) -> None:
    """A process that learns from its heartbeat that it had lapsed takes nothing more of what it held then; what it took in
    between is part of what is charged."""
    hot, store = leased(400, 100), make(clock)
    storage = around(store, clock)
    await warm(storage, claim(hot, 0))
    receipts = await take(storage, "before", claim(hot, 10))
    clock.advance(ms=LAPSE_MS)
    await store.heartbeat(OTHER)
    await take(storage, "between", claim(hot, 20))
    assert (await storage.heartbeat(ME)).lapsed
    assert storage.admit(ME, (Bundle("after", (claim(hot),)),)) is None
    assert await level(store, hot) == (100, 0)
    await settle(storage, "before", 60, record=record("before", 60), receipts=receipts)
    await settle(storage, "between", 45)
    assert await level(store, hot) == (105, 0)
    await storage.retire(ME)
    assert await level(store, hot) == (105, 0)


async def test_a_lapse_that_was_forgotten_is_not_charged_again(memory: MemoryStorage, clock: FrozenClock) -> None:
    """Chunks that had lapsed are not charged a second time when their last call ends hours later."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot, 0))
    await take(storage, "slow", claim(hot, 10))
    clock.advance(ms=LAPSE_MS)
    assert (await storage.heartbeat(ME)).lapsed
    clock.advance(ms=2 * TOMBSTONE_MS)
    for number in range(300):  # so that the store forgets what has ended
        await settle(memory, f"other-{number}")
    await settle(storage, "slow", 10)
    assert await level(memory, hot) == (100, 0)


async def test_old_calls_leave_a_record_whatever_comes(store: OutageStorage, clock: FrozenClock) -> None:
    """A leased call that a second heartbeat finds open is known to the store: a crash leaves its record. Then it is
    settled, or changed, like any other."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    for call_id in ("a", "b", "c"):
        await take(storage, call_id, claim(hot, 10), draft=draft(call_id, cost=10))
    await storage.heartbeat(ME)
    assert await storage.open_holds() == 1
    await storage.heartbeat(ME)
    assert await storage.open_holds() == 4
    assert isinstance(await ask(storage, "a", claim(hot, 10)), Granted)
    assert (await settle(storage, "a", 4, record=record("a", 4))).status == "settled"
    changed = await storage.amend(ME, Bundle("b", (claim(hot, 20), claim(DIRECT, 2)), draft("b", cost=20)))
    assert isinstance(changed, Granted)
    await store.inner.retire(ME)  # as if it had died
    records = {found.call_id: found for found in await storage.records()}
    assert {call_id: found.cost_nanousd for call_id, found in records.items()} == {"a": 4, "b": 20, "c": 10}
    assert isinstance(await storage.amend(ME, Bundle("c", (claim(hot, 11),))), Ended)
    settled = await settle(storage, "c", 12, record=record("c", 12))
    assert (settled.status, settled.overages) == ("late", (2,))


async def test_an_old_call_of_which_the_store_did_not_hear_is_changed_all_the_same(
    outage: OutageStorage, clock: FrozenClock
) -> None:
    """If the store missed that a call is open, it learns of it when it is changed."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10), draft=draft("a"))
    await storage.heartbeat(ME)
    outage.down(after=1)
    await storage.heartbeat(ME)
    outage.up()
    assert isinstance(await storage.amend(ME, Bundle("a", (claim(hot, 10), claim(DIRECT, 1)))), Granted)
    assert await level(storage, DIRECT) == (0, 1)


async def test_reset_returns_chunks_first(store: OutageStorage, clock: FrozenClock) -> None:
    """After a reset nothing is used, open calls are still held, and what they use counts, but not what was used before."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot, 3))
    await take(storage, "done", claim(hot, 30))
    await take(storage, "open", claim(hot, 10))
    await settle(storage, "done", 25)
    await storage.reset([hot, leased(subject="never used")])
    assert await level(storage, hot) == (0, 10)
    await settle(storage, "open", 6)
    assert await level(storage, hot) == (6, 0)


async def test_a_reset_of_a_rate_forgets_what_was_used(memory: MemoryStorage, clock: FrozenClock) -> None:
    """Also of chunks that are pinned to a sub-bucket, when their last call ends."""
    hot, storage = leased(window=Sliding(HOUR_MS, 60)), around(memory, clock)
    await warm(storage, claim(hot, 3))
    await take(storage, "done", claim(hot, 30))
    await take(storage, "open", claim(hot, 10))
    await settle(storage, "done", 25)
    await storage.reset([hot])
    await settle(storage, "open", 6)
    assert await level(storage, hot) == (6, 0)


async def test_lost_data_takes_leases_with_it(outage: OutageStorage, clock: FrozenClock) -> None:
    """When the store says that its data is lost, chunks of it are spent no more, and what open calls use is charged in full."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    receipts = await take(storage, "open", claim(hot, 10))
    mixed = await take(storage, "mixed", claim(hot, 10), claim(DIRECT, 1))
    await settle(storage, "done")
    outage.lose_data(MemoryStorage(clock=clock))
    with pytest.raises(DataLost):
        await ask(storage, "a", claim(hot, 5), claim(DIRECT, 1))
    assert storage.admit(ME, (Bundle("b", (claim(hot),)),)) is None
    await outage.accept_loss()
    assert (await settle(storage, "open", 8, receipts=receipts)).status == "lost"
    assert (await settle(storage, "mixed", 9, 2, receipts=mixed)).status == "lost"
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, DIRECT)] == [(17, 0), (2, 0)]


async def test_lost_data_is_noticed_by_whatever_asks(clock: FrozenClock) -> None:
    """By a heartbeat, by a chunk that is fetched, and by a change, too."""
    outage = Watchful(MemoryStorage(clock=clock))
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    outage.lose_data(MemoryStorage(clock=clock))
    with pytest.raises(DataLost):
        await storage.heartbeat(ME)
    assert storage.admit(ME, (Bundle("a", (claim(hot),)),)) is None
    await outage.accept_loss()
    await warm(storage, claim(hot), call_id="second")
    await take(storage, "b", claim(hot, 5))
    outage.lose_data(MemoryStorage(clock=clock))
    with pytest.raises(DataLost):
        await storage.amend(ME, Bundle("b", (claim(hot, 5), claim(DIRECT, 1))))
    assert storage.admit(ME, (Bundle("c", (claim(hot),)),)) is None
    await outage.accept_loss()
    await warm(storage, claim(hot), call_id="third")
    for number in range(6):
        await take(storage, f"d-{number}", claim(hot, 10))
    outage.lose_data(MemoryStorage(clock=clock))
    await turn()
    assert storage.admit(ME, (Bundle("e", (claim(hot),)),)) is None


async def test_data_that_is_lost_while_a_call_is_asked_for(clock: FrozenClock) -> None:
    """A call that was granted from the old data's leases and the new data's rest is not granted, and holds nothing."""
    store = Waiting(clock=clock)
    outage = Watchful(store)
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    store.open.clear()
    asking = asyncio.ensure_future(ask(storage, "a", claim(hot, 60), claim(DIRECT, 4)))
    await asyncio.sleep(0)
    outage.lose_data(store)
    with pytest.raises(DataLost):
        await storage.heartbeat(ME)
    await outage.accept_loss()
    store.open.set()
    assert await asking == Ended("a", "unknown", START_MS)
    assert await level(store, DIRECT) == (0, 0)


# ------------------------------------------------------------------------------------------- changes


async def test_a_change_within_a_chunk_needs_no_trip(outage: OutageStorage, clock: FrozenClock) -> None:
    """A hold of leased claims grows, shrinks and loses claims without the store, and keeps the receipts that stay."""
    hot, other, storage = leased(), leased(subject="other"), around(outage, clock)
    await warm(storage, claim(hot), claim(other))
    before = await take(storage, "a", claim(hot, 10), claim(other, 10))
    outage.down()
    grown = await storage.amend(ME, Bundle("a", (claim(other, 10), claim(hot, 90))))
    assert isinstance(grown, Granted)
    assert grown.receipts[0] == before[1]
    assert grown.receipts[1].claim.amount == 90
    shrunk = await storage.amend(ME, Bundle("a", (claim(hot, 20),)))
    assert isinstance(shrunk, Granted)
    await take(storage, "b", claim(hot, 80), claim(other, 100))
    assert outage.attempts == 0
    outage.up()
    await settle(storage, "a", 15)
    await settle(storage, "b", 80, 100)
    await turn()
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, other)] == [(96, 0), (101, 0)]


async def test_a_change_that_is_refused_changes_nothing(store: OutageStorage, clock: FrozenClock) -> None:
    """If the store refuses what is new, the hold is what it was, in leases and in the store."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10), claim(DIRECT, 2))
    await take(storage, "local", claim(hot, 10))
    for call_id in ("a", "local"):
        refused = await storage.amend(ME, Bundle(call_id, (claim(DIRECT, 11), claim(hot, 50))))
        assert isinstance(refused, Refused)
        assert [state.fits for state in refused.states[0]] == [False, True]
    await take(storage, "the rest", claim(hot, 80))
    await settle(storage, "a", 9, 1)
    await settle(storage, "local", 9)
    await settle(storage, "the rest", 0)
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, DIRECT)] == [(19, 0), (1, 0)]


async def test_a_hold_moves_between_leases_and_the_store(store: OutageStorage, clock: FrozenClock) -> None:
    """A hold of the store takes leased claims on, a leased one takes claims of the store on, and both settle each where it
    was taken."""
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    await take(storage, "plain", claim(DIRECT, 2))
    await take(storage, "leased", claim(hot, 10))
    assert isinstance(await storage.amend(ME, Bundle("plain", (claim(hot, 20), claim(DIRECT, 3)))), Granted)
    assert isinstance(await storage.amend(ME, Bundle("leased", (claim(DIRECT, 1), claim(hot, 30)))), Granted)
    assert isinstance(await storage.amend(ME, Bundle("plain", (claim(hot, 20),))), Granted)
    assert await level(storage, DIRECT) == (0, 1)
    assert (await settle(storage, "plain", 15)).status == "settled"
    assert (await settle(storage, "leased", 1, 25)).status == "settled"
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, DIRECT)] == [(41, 0), (1, 0)]
    assert await storage.amend(ME, Bundle("never", (claim(hot),))) == Ended("never", "unknown", START_MS)


async def test_a_claim_that_outgrows_its_chunk_goes_to_the_store(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A changed amount for which the chunk has no room is held in the store whole, and the chunk gets back what it had."""
    hot, storage = leased(1_000, 50), around(memory, clock)
    await warm(storage, claim(hot, 0))
    await take(storage, "a", claim(hot, 20))
    assert isinstance(await storage.amend(ME, Bundle("a", (claim(hot, 200),))), Granted)
    await turn()
    await take(storage, "b", claim(hot, 50))
    assert isinstance(await storage.amend(ME, Bundle("a", (claim(hot, 250),))), Granted)
    await settle(storage, "a", 240)
    await settle(storage, "b", 50)
    await storage.retire(ME)
    assert await level(memory, hot) == (290, 0)


async def test_a_change_takes_the_current_window(memory: MemoryStorage, clock: FrozenClock) -> None:
    """A changed amount after the end of its window is taken whole from the current one; one that stays, stays."""
    hot, storage = leased(window=Calendar("hour")), around(memory, clock)
    await warm(storage, claim(hot, 0))
    (old,) = await take(storage, "changed", claim(hot, 10))
    await take(storage, "kept", claim(hot, 10))
    clock.advance(ms=HOUR_MS)
    await warm(storage, claim(hot, 0), call_id="second")
    kept = await storage.amend(ME, Bundle("kept", (claim(hot, 10),)))
    changed = await storage.amend(ME, Bundle("changed", (claim(hot, 12),)))
    assert isinstance(kept, Granted)
    assert isinstance(changed, Granted)
    assert (kept.receipts[0].pin, changed.receipts[0].pin) == (old.pin, old.pin + HOUR_MS)
    await settle(storage, "kept")
    await settle(storage, "changed", 12)
    await storage.retire(ME)
    assert await level(memory, hot) == (12, 0)


async def test_a_change_without_an_answer_leaves_leases_alone(outage: OutageStorage, clock: FrozenClock) -> None:
    """If the store does not answer, what the change would have taken is put back, and may be asked for again."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10), claim(DIRECT, 1))
    outage.lose_replies()
    new = Bundle("a", (claim(hot, 60), claim(DIRECT, 2)))
    with pytest.raises(StorageError):
        await storage.amend(ME, new)
    outage.up()
    await take(storage, "b", claim(hot, 40))
    assert isinstance(await storage.amend(ME, new), Granted)
    await settle(storage, "a", 60, 2)
    await settle(storage, "b", 40)
    await storage.retire(ME)
    assert [await level(storage, on) for on in (hot, DIRECT)] == [(101, 0), (2, 0)]


async def test_a_call_that_ends_while_it_is_changed_holds_nothing(clock: FrozenClock) -> None:
    """A settlement that overtakes the answer to a change gives back what the change took."""
    store = Waiting(clock=clock)
    hot, storage = leased(), around(store, clock)
    await warm(storage, claim(hot))
    await take(storage, "a", claim(hot, 10), claim(DIRECT, 1))
    store.open.clear()
    changing = asyncio.ensure_future(storage.amend(ME, Bundle("a", (claim(hot, 60), claim(DIRECT, 2)))))
    await asyncio.sleep(0)
    await settle(storage, "a")
    store.open.set()
    assert await changing == Ended("a", "settled", START_MS)
    await take(storage, "all of it", claim(hot, 100), claim(DIRECT, 10))


async def test_a_shrunk_chunk_that_meets_the_end_of_its_window_takes_nothing_of_the_next(clock: FrozenClock) -> None:
    """A chunk that is made smaller just when its window ends does not move into the next one."""
    hot, store = leased(window=Calendar("hour")), MemoryStorage(clock=clock, lapse_ms=DAY_MS)
    behind = FrozenClock(START_MS)
    storage = LeasingStorage(store, clock=behind, skew_ms=0)
    await warm(storage, claim(hot, 0))
    await take(storage, "open", claim(hot, 10))
    await storage.heartbeat(ME)
    clock.advance(ms=HOUR_MS)
    book = storage._book.let_go(storage._book.slots(ME).values(), START_MS + 1)
    for lease in book:
        await storage._chunks.shrink(lease)
    assert await level(store, hot) == (0, 0)
    await settle(storage, "open", 10)
    assert await level(store, hot) == (0, 0)


# ----------------------------------------------------------------------------- threads, loops, forks


def test_threads_admit_exactly_what_fits(clock: FrozenClock) -> None:
    """Eight threads with a loop each, on one storage, admit exactly the limit."""
    hot, store = leased(2_000, 100), MemoryStorage(clock=clock)
    storage = around(store, clock, workers=2)
    admitted: list[str] = []
    begin = threading.Barrier(8)

    async def work(thread: int) -> None:
        for number in range(400):
            call_id = f"call-{thread}-{number}"
            if isinstance(await ask(storage, call_id, claim(hot)), Granted):
                admitted.append(call_id)
                if number % 3 == 0:
                    await settle(storage, call_id, None)
            await asyncio.sleep(0)
        await turn()

    def run(thread: int) -> None:
        begin.wait()
        asyncio.run(work(thread))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 2_000
    asyncio.run(storage.retire(ME))
    assert asyncio.run(level(store, hot)) == (2_000, 0)


def test_a_loop_that_ends_takes_its_chunk_with_it(clock: FrozenClock) -> None:
    """A chunk that was asked for in a loop that is over is given back, and asked for again in the next one."""
    hot, store = leased(), Waiting(clock=clock)
    storage = around(store, clock)

    async def begin() -> None:
        await take(storage, "a", claim(hot))
        store.open.clear()
        await asyncio.sleep(0)
        assert await level(store, hot) == (0, 101)

    asyncio.run(begin())
    assert asyncio.run(level(store, hot)) == (0, 1)
    store.open = asyncio.Event()
    store.open.set()

    async def again() -> None:
        await take(storage, "b", claim(hot))
        await turn()

    asyncio.run(again())
    assert asyncio.run(level(store, hot)) == (0, 102)


async def test_a_loss_that_another_process_has_accepted_ends_leases(outage: OutageStorage, clock: FrozenClock) -> None:
    """What the store's data has no chunk of is not spent any more once an answer shows that it is other data."""
    hot, storage = leased(), around(outage, clock)
    await warm(storage, claim(hot))
    await storage.heartbeat(ME)
    await take(storage, "spends", claim(hot))
    outage.lose_data(MemoryStorage(clock=clock))
    await outage.accept_loss()
    await storage.heartbeat(ME)
    assert storage.admit(ME, (Bundle("a", (claim(hot),)),)) is None
    await take(storage, "b", claim(hot))
    assert await level(storage, hot) == (0, 1)


async def test_a_chunk_that_was_never_asked_for_is_asked_for_again(memory: MemoryStorage, clock: FrozenClock) -> None:
    """If its task is cancelled before it begins, the next call asks for the chunk."""
    hot, storage = leased(), around(memory, clock)
    await take(storage, "a", claim(hot))
    for task in fetches():
        task.cancel()
    await turn()
    assert await level(storage, hot) == (0, 1)
    await take(storage, "b", claim(hot))
    await turn()
    assert await level(storage, hot) == (0, 102)


def test_a_forked_process_has_no_lease(memory: MemoryStorage, clock: FrozenClock) -> None:
    """What the parent holds is the parent's: the child begins with nothing, and the parent goes on."""
    hot, storage = leased(), around(memory, clock)
    asyncio.run(warm(storage, claim(hot)))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - in another process
        granted = storage.admit(OTHER, (Bundle("a", (claim(hot),)),))
        mine = storage.admit(ME, (Bundle("b", (claim(hot),)),))
        os.write(writing, b"none" if granted is None and mine is None else b"some")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"none"
    os.close(reading)
    os.close(writing)
    assert storage.admit(ME, (Bundle("c", (claim(hot),)),)) is not None


@pytest.mark.parametrize(
    ("options", "named"), [({"workers": 0}, "workers"), ({"skew_ms": -1}, "skew_ms"), ({"tombstone_ms": True}, "tomb")]
)
def test_malformed_options_are_refused(options: dict[str, Any], named: str) -> None:
    """Numbers out of their range are refused when the storage is made."""
    with pytest.raises(ConfigurationError, match=named):
        LeasingStorage(MemoryStorage(), **options)


async def test_exports_go_round(memory: MemoryStorage, clock: FrozenClock) -> None:
    """An export shows chunks as the holds that they are, and loads into another storage."""
    hot, storage = leased(), around(memory, clock)
    await warm(storage, claim(hot))
    other = around(MemoryStorage(clock=clock), clock)
    await other.load([line async for line in storage.export()])
    assert await level(other, hot) == (1, 100)


async def test_chunks_go_by_a_clock_that_nobody_sets() -> None:
    """Without a clock of a test, what passes is measured by a monotonic one."""
    hot = leased()
    storage = LeasingStorage(MemoryStorage())
    await warm(storage, claim(hot))
    granted = storage.admit(ME, (Bundle("a", (claim(hot),)),))
    assert granted is not None
    (direct,) = await take(storage.inner, "b", claim(hot), owner=OTHER)
    assert granted.receipts[0].pin == direct.pin
    await storage.aclose()


async def test_entries_are_those_of_the_storage_behind_it() -> None:
    """A storage that leases keeps entries where the one behind it does, and says so where that keeps none."""
    leasing = LeasingStorage(MemoryStorage())
    space = leasing.entries("cooldowns")
    await space.begin("a", "token", claim_ms=1000)
    assert await space.store("a", "token", b"value", ttl_ms=1000)
    kept = await leasing.inner.entries("cooldowns").find("a")  # type: ignore[attr-defined]
    assert kept is not None
    assert kept.value == b"value"
    with pytest.raises(ConfigurationError, match="cannot keep"):
        LeasingStorage(LimitsStorage("memory://")).entries("cooldowns")
    await leasing.aclose()
