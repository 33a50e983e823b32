"""Calls whose claims lie in several shards: decided as in one, at the price of a second trip."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

import pytest
from tests.servers import RedisCluster, unique_namespace
from tests.storage.leases_kit import turn
from tests.storage.sharded_kit import SHARDS, Counted, Shards, lies_in, place
from tests.storage.values import (
    DAY_MS,
    HOUR_MS,
    ME,
    OTHER,
    START,
    ask,
    claim,
    draft,
    level,
    record,
    refuse,
    settle,
    state_of,
    take,
)

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, RateLimit, Usage
from asgi_llm_guard.claims import Bundle, Ended, Granted, Meter, Refused, Rule, Settled, Settlement, Unit, meter_key
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.base import LAPSE_MS, Storage
from asgi_llm_guard.storage.breaker import FAILURES
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.shard_parts import place_by_subject
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Calendar, Rolling, Slots, Window

pytestmark = pytest.mark.anyio

A, B, C = (lies_in(shard) for shard in range(SHARDS))


@pytest.fixture
def shards() -> Shards:
    return Shards()


# ---------------------------------------------------------------------------------- placement


def test_what_belongs_to_a_caller_lies_together() -> None:
    """T1: the place of a meter is a function of its subject: nobody moves a limit by naming a session, model or window."""
    windows: tuple[Window, ...] = (Rolling(DAY_MS), Calendar("month", "Europe/Berlin"), Slots(), Bucket(HOUR_MS, 5))
    keys = [
        meter_key(policy, unit, window, *subject)
        for policy in ("budget", "a:b")
        for unit in (Unit.CALLS, Unit.NANOUSD)
        for window in windows
        for subject in (("caller", "x:y"), ("caller", "x:y", "session", "s-1"), ("caller", "x:y", "7/60000"))
    ]
    assert len({place_by_subject(key) for key in keys}) == 1
    anonymous = [
        meter_key("p", Unit.CALLS, window, "anonymous", *rest) for window in windows for rest in ((), ("session", "s"))
    ]
    assert len({place_by_subject(key) for key in anonymous}) == 1
    other = [place_by_subject(meter_key("p", Unit.CALLS, Slots(), kind, "x:y")) for kind in ("user", "department")]
    assert len({*other, place_by_subject(keys[0])}) == 3


def test_callers_are_spread_over_all_shards() -> None:
    """The load of many callers is shared evenly, by a third at most more or less than its part."""
    counts = [0] * 16
    for n in range(16_000):
        counts[place_by_subject(meter_key("p", Unit.CALLS, Slots(), "caller", f"team-{n}")) % 16] += 1
    assert 667 < min(counts) <= max(counts) < 1_333


def test_no_shards_are_refused() -> None:
    """A storage over nothing is a mistake of the configuration."""
    with pytest.raises(ConfigurationError, match="at least one"):
        ShardedStorage([])


# ---------------------------------------------------------------------------- reserve and settle


async def test_a_plan_of_one_shard_is_one_trip() -> None:
    """Claims that lie together are asked for once, and settled once, and no other shard hears of them."""
    stores = [Counted(clock=FrozenClock(START)) for _ in range(SHARDS)]
    storage = ShardedStorage(stores, place=place)
    await take(storage, "a", claim(B), claim(lies_in(1, name="n"), 2), draft=draft("a", cost=1))
    assert (await settle(storage, "a", 1, 2, record=record("a", 1))).status == "settled"
    assert [store.asked for store in stores] == [[], ["reserve", "settle"], []]


async def test_a_plan_over_shards_holds_in_each_and_has_its_record_at_home(shards: Shards) -> None:
    """A1, B1: every claim is held where its meter lies; what was used is charged there, overage in claim order, the record once."""
    storage = shards.process()
    receipts = await take(storage, "a", claim(B, 1), claim(A, 2), claim(C, 3), draft=draft("a", cost=1))
    assert [(r.claim.meter, r.taken, r.used, r.held) for r in receipts] == [(m, True, 0, 0) for m in (B, A, C)]
    assert await shards.levels(A, B, C) == [(0, 2), (0, 1), (0, 3)]
    assert await storage.open_holds() == 1
    again = await storage.reserve(ME, ((Bundle("a", (claim(B, 1), claim(A, 2), claim(C, 3))),),))
    assert again == Granted(receipts, shards.clock.now_ms(), 0, True)
    settled = await settle(storage, "a", None, 5, 4, record=record("a", 7))
    assert settled == Settled("a", "settled", (0, 3, 1))
    assert await shards.levels(A, B, C) == [(5, 0), (1, 0), (4, 0)]
    assert [len(await store.records()) for store in shards.stores] == [0, 1, 0]
    before = await state_of(storage)
    assert (await settle(storage, "a", 9, 9, 9, record=record("a", 9))).status == "duplicate"
    assert isinstance(await ask(storage, "a", claim(A)), Ended)
    assert await shards.levels(A, B, C) == [(5, 0), (1, 0), (4, 0)]
    assert [one for one in await state_of(storage) if b"tombstone" not in one] == [
        one for one in before if b"tombstone" not in one
    ]


@pytest.mark.parametrize("full", range(SHARDS))
async def test_whichever_shard_refuses_nothing_stays_held(shards: Shards, full: int) -> None:
    """A1, 50: call limit+1 is refused whole by any shard; all states are shown, and the same call id fits later."""
    meters = (A, B, C)
    storage = shards.process()
    await take(storage, "full", claim(meters[full], 10))
    states = await refuse(storage, "a", *map(claim, meters))
    assert [(s.claim.meter, s.taken, s.fits, s.held) for s in states] == [
        (m, False, n != full, 10 * (n == full)) for n, m in enumerate(meters)
    ]
    assert await shards.held() == 1
    await settle(storage, "full", 0)
    await take(storage, "a", *map(claim, meters))
    await settle(storage, "a", 1, 1, 1)
    assert await shards.levels(*meters) == [(1, 0)] * 3


async def test_a_refused_attempt_may_leave_a_window_begun_and_a_bucket_drained_late(shards: Shards) -> None:
    """What is taken and given back in another shard leaves no amount, but a rolling window that has begun."""
    storage = shards.process()
    await take(storage, "full", claim(A, 10))
    bucket = lies_in(1, 4, window=Bucket(DAY_MS, 4))
    await refuse(storage, "a", claim(A), claim(C), claim(bucket, 2))
    reading, drained = await storage.read((C, bucket))
    assert (reading.used, reading.held, reading.resets_at_ms) == (0, 0, shards.clock.now_ms() + DAY_MS)
    assert (drained.used, drained.held) == (0, 0)


async def test_the_first_plan_that_fits_is_taken_whatever_its_shards(shards: Shards) -> None:
    """Plans are tried in order; a replay finds the one that was granted."""
    storage = shards.process()
    await take(storage, "full", claim(A, 10))
    plans = [(Bundle("a", (claim(C), claim(A))),), (Bundle("a", (claim(B), claim(C, 2))),), (Bundle("a", (claim(B),)),)]
    answer = await storage.reserve(ME, plans)
    assert isinstance(answer, Granted)
    assert (answer.plan, answer.replayed) == (1, False)
    assert await shards.levels(B, C) == [(0, 1), (0, 2)]
    again = await storage.reserve(ME, plans)
    assert isinstance(again, Granted)
    assert (again.plan, again.replayed, again.receipts) == (1, True, answer.receipts)
    await settle(storage, "a", 1, 2)
    none = await storage.reserve(ME, [(Bundle("b", (claim(A), claim(C, 20))),), (Bundle("b", (claim(A), claim(B))),)])
    assert isinstance(none, Refused)
    assert [[state.fits for state in states] for states in none.states] == [[False, False], [False, True]]


async def test_bundles_of_one_plan_settle_apart(shards: Shards) -> None:
    """A call and its request share the plan's home; each gives back its own claims, wherever they lie."""
    storage = shards.process()
    answer = await storage.reserve(
        ME, ((Bundle("call", (claim(A, 2), claim(B, 3))), Bundle("request", (claim(C, 4),))),)
    )
    assert isinstance(answer, Granted)
    assert [receipt.claim.meter for receipt in answer.receipts] == [A, B, C]
    first, second = await storage.settle((Settlement("request", (1,)), Settlement("call", (1, 1))))
    assert (first, second) == (Settled("request", "settled", (0,)), Settled("call", "settled", (0, 0)))
    assert await shards.levels(A, B, C) == [(1, 0), (1, 0), (1, 0)]


async def test_mistakes_of_the_caller_leave_nothing(shards: Shards) -> None:
    """Two claims on one meter, or two bundles with one call id, are errors, and nothing stays held."""
    storage = shards.process()
    with pytest.raises(ValueError, match="two claims"):
        await ask(storage, "a", claim(A), claim(B), claim(B))
    with pytest.raises(ValueError, match="same call id"):
        await storage.reserve(ME, ((Bundle("a", (claim(A),)), Bundle("a", (claim(B),))),))
    await take(storage, "b", claim(A), claim(B))
    with pytest.raises(ValueError, match="two claims"):
        await storage.amend(ME, Bundle("b", (claim(A), claim(C), claim(C))))
    assert await shards.levels(A, B, C) == [(0, 1), (0, 1), (0, 0)]


async def test_a_settlement_is_had_in_a_thread_and_by_a_callback(shards: Shards) -> None:
    """One answer for all shards, however it is waited for."""
    storage = shards.process()
    receipts = await take(storage, "a", claim(A), claim(B))
    heard: list[object] = []
    pending = storage.settle((Settlement("a", (2, 1), None, receipts),))
    pending.add_done_callback(heard.append)
    assert heard == [pending]
    assert pending.done()
    results: list[tuple[Settled, ...]] = []
    thread = threading.Thread(target=lambda: results.append(pending.result(1)))
    thread.start()
    thread.join()
    assert results == [(Settled("a", "settled", (1, 0)),)]


async def test_what_only_its_receipts_are_known_of_is_charged_once(shards: Shards) -> None:
    """A call that no store knows is charged by its receipts in every shard, once, also if it is told again."""
    receipts = await take(Shards().process(), "a", claim(A, 2), claim(B, 3))
    storage = shards.process()
    settlement = Settlement("a", (2, 4), record("a", 1), receipts)
    pending = storage.settle((settlement,))
    assert pending.done()
    assert pending.result() == (Settled("a", "lost", (0, 1)),)
    assert (await storage.settle((settlement,)))[0].status == "duplicate"
    assert (await shards.process().settle((settlement,)))[0].status == "duplicate"
    assert await shards.levels(A, B) == [(2, 0), (4, 0)]
    assert [len(await store.records()) for store in shards.stores] == [1, 0, 0]


@pytest.mark.parametrize("unanswered", [0, 1])
async def test_what_only_its_receipts_are_known_of_is_told_again_to_every_shard(
    shards: Shards, unanswered: int
) -> None:
    """4: home did not answer, whether it took its part or not: told again, all shards are charged, each once."""
    receipts = await take(Shards().process(), "a", claim(A, 2), claim(B, 3))
    storage = shards.process()
    settlement = Settlement("a", (2, 4), record("a", 1), receipts)
    shards.shards[0].down(unanswered=unanswered)
    with pytest.raises(StorageError):
        await storage.settle((settlement,))
    shards.shards[0].up()
    for _ in range(2):
        await storage.settle((settlement,))
    assert await shards.levels(A, B) == [(2, 0), (4, 0)]
    assert len(await storage.records()) == 1


async def test_receipts_and_debits_in_one_shard_are_charged_both(shards: Shards) -> None:
    """What a call is debited besides its receipts is no repetition of them, though both lie in the same shard."""
    receipts = await take(Shards().process(), "a", claim(A, 2), claim(B, 3))
    storage, other = shards.process(), lies_in(1, name="n")
    for _ in range(2):
        await storage.settle((Settlement("a", (2, 4), record("a", 1), receipts, (claim(other, 5),)),))
    assert await shards.levels(A, B, other) == [(2, 0), (4, 0), (5, 0)]


async def test_debits_are_charged_where_their_meters_lie(shards: Shards) -> None:
    """What turned out afterwards is debited in its own shards, once, whatever shards the call has held in."""
    storage = shards.process()
    await take(storage, "one", claim(A))
    await take(storage, "two", claim(A), claim(B))
    debits = (claim(A, 2), claim(B, 3), claim(C, 4))
    for _ in range(2):
        for call_id in ("one", "two", "none"):
            await storage.settle((Settlement(call_id, (1,), None, (), debits),))
    assert await shards.levels(A, B, C) == [(8, 0), (10, 0), (12, 0)]


async def test_a_cancellation_that_comes_first_refuses_the_call_everywhere(shards: Shards) -> None:
    """A cancel that overtook its reserve leaves a tombstone wherever the call may come to be asked for."""
    await settle(shards.process(), "a")
    for claims in ((claim(A),), (claim(C), claim(B))):
        assert isinstance(await ask(shards.process(), "a", *claims), Ended)
    assert await shards.held() == 0


# ------------------------------------------------------------------------- overtaken and cut off


async def test_a_settlement_that_overtakes_the_groups_leaves_nothing_held() -> None:
    """Rule 6: a call that is settled while its groups are being reserved is refused, and holds nothing."""
    stores = [Counted(clock=FrozenClock(START)) for _ in range(SHARDS)]
    storage = ShardedStorage(stores, place=place)
    stores[1].open.clear()
    asking = asyncio.ensure_future(ask(storage, "a", claim(A), claim(B)))
    await asyncio.sleep(0)
    await settle(storage, "a")
    stores[1].open.set()
    assert isinstance(await asking, Ended)
    assert [await level(storage, m) for m in (A, B)] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("waiting", [0, 1])
async def test_a_reserve_that_is_cancelled_leaves_nothing_held(waiting: int) -> None:
    """A caller that goes away while home or a group is asked holds nothing once its call is cancelled."""
    stores = [Counted(clock=FrozenClock(START)) for _ in range(SHARDS)]
    storage = ShardedStorage(stores, place=place)
    stores[waiting].open.clear()
    asking = asyncio.ensure_future(ask(storage, "a", claim(A), claim(B), claim(C)))
    for _ in range(5):
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await settle(storage, "a")
    assert [await level(storage, m) for m in (A, B, C)] == [(0, 0)] * 3
    stores[waiting].open.set()
    assert isinstance(await ask(storage, "a", claim(A), claim(B)), Ended)


async def test_two_who_ask_for_the_same_call_share_one_hold() -> None:
    """A call id that is asked for twice at a time is held once in every shard."""
    stores = [Counted(clock=FrozenClock(START)) for _ in range(SHARDS)]
    storage = ShardedStorage(stores, place=place)
    answers = await asyncio.gather(*[ask(storage, "a", claim(A), claim(B, 2)) for _ in range(3)])
    assert all(isinstance(answer, Granted) for answer in answers)
    assert sorted(answer.replayed for answer in answers if isinstance(answer, Granted)) == [False, True, True]
    assert [await level(storage, m) for m in (A, B)] == [(0, 1), (0, 2)]


async def test_another_process_finds_the_call_open_and_changes_nothing(shards: Shards) -> None:
    """A reserve that another process repeats tells that it is open; its groups stay those of the first one."""
    first, second = shards.process(), shards.process()
    await take(first, "a", claim(A, 1), claim(B, 2))
    answer = await ask(second, "a", claim(A, 1), claim(B, 2))
    assert isinstance(answer, Granted)
    assert (answer.replayed, [receipt.taken for receipt in answer.receipts]) == (True, [True, False])
    assert await shards.levels(A, B) == [(0, 1), (0, 2)]
    assert (await settle(second, "a", 3, 3)).status == "settled"
    assert await shards.levels(A, B) == [(3, 0), (0, 2)]
    shards.clock.advance(ms=LAPSE_MS)
    beat = await second.heartbeat(OTHER)
    assert beat.expired == ("a",)
    assert await shards.levels(A, B) == [(3, 0), (2, 0)]


# ------------------------------------------------------------------------------------- outages


async def test_a_shard_that_is_away_leaves_nothing_held_in_the_others(shards: Shards) -> None:
    """79: a group that cannot be asked for fails the call; what others had granted is given back."""
    storage = shards.process()
    shards.shards[2].down()
    with pytest.raises(StorageError):
        await ask(storage, "a", claim(A), claim(B), claim(C))
    assert await shards.held() == 0
    shards.shards[2].up()
    await take(storage, "a", claim(A), claim(B), claim(C))
    assert await shards.held() == 3


async def test_what_could_not_be_given_back_is_given_back_with_a_heartbeat(shards: Shards) -> None:
    """A group whose shard went away after it had granted is held until the shard is back, and no longer."""
    storage = shards.process()
    shards.shards[1].down(unanswered=1)
    with pytest.raises(StorageError):
        await ask(storage, "a", claim(A), claim(B))
    assert await shards.levels(A, B) == [(0, 0), (0, 1)]
    shards.shards[1].up()
    await storage.heartbeat(ME)
    assert await shards.levels(A, B) == [(0, 0), (0, 0)]
    await settle(storage, "a")


async def test_home_that_did_not_answer_is_asked_again_or_cancelled(shards: Shards) -> None:
    """An unknown outcome is cleared up by the call id: asked again it is granted whole, cancelled it holds nothing."""
    storage = shards.process()
    for call_id in ("a", "b"):
        shards.shards[0].down(unanswered=1)
        with pytest.raises(StorageError) as failed:
            await ask(storage, call_id, claim(A), claim(B))
        assert failed.value.sent
        shards.shards[0].up()
        if call_id == "a":
            assert isinstance(await ask(storage, "a", claim(A), claim(B)), Granted)
            assert await shards.levels(A, B) == [(0, 1), (0, 1)]
            await settle(storage, "a", 1, 1)
        else:
            await settle(storage, "b")
    assert await shards.levels(A, B) == [(1, 0), (1, 0)]


@pytest.mark.parametrize("reached", [0, 1])
@pytest.mark.parametrize("later", [False, True])
async def test_what_was_admitted_though_home_did_not_answer_is_charged_in_every_shard(
    shards: Shards, *, reached: int, later: bool
) -> None:
    """A7: a call whose home did not say whether it grants it is charged by its receipts where each meter lies, once."""
    receipts = await take(Shards().process(), "a", claim(B, 2), claim(A, 3))
    storage = shards.process()
    shards.shards[1].down(unanswered=reached)
    with pytest.raises(StorageError):
        await ask(storage, "a", claim(B, 2), claim(A, 3))
    settlement = Settlement("a", (1, 4), record("a", 1), receipts)
    if later:  # the first try fails
        with pytest.raises(StorageError):
            await storage.settle((settlement,))
    shards.shards[1].up()
    for _ in range(2):
        await storage.settle((settlement,))
    assert await shards.levels(A, B) == [(4, 0), (1, 0)]
    assert await shards.held() == 0
    assert [len(await store.records()) for store in shards.stores] == [0, 1, 0]


async def test_a_settlement_that_failed_in_one_shard_is_applied_by_telling_it_again(shards: Shards) -> None:
    """4, 84: shards that had taken their part take nothing twice; the one that was away takes its own."""
    storage = shards.process()
    await take(storage, "a", claim(A), claim(B), claim(C))
    shards.shards[1].down()
    settlement = Settlement("a", (2, 3, 4), record("a", 1))
    with pytest.raises(StorageError):
        await storage.settle((settlement,))
    shards.shards[1].up()
    assert (await storage.settle((settlement,)))[0].status == "duplicate"
    assert await shards.levels(A, B, C) == [(2, 0), (3, 0), (4, 0)]
    assert len(await storage.records()) == 1


async def test_it_is_available_while_any_shard_is() -> None:
    """One shard that is away does not stop the others; all of them do."""
    shards = Shards()
    storage = shards.process()
    for shard in shards.shards:
        shard._breaker = True
    shards.shards[0].down()
    assert storage.available()
    shards.shards[1].down()
    shards.shards[2].down()
    assert not storage.available()
    assert ShardedStorage(shards.stores).available()


async def test_the_loss_of_one_shard_is_noticed_and_told_to_that_one_only(shards: Shards) -> None:
    """101: data that one shard has lost is rebuilt there, and is not charged twice where it was kept."""
    storage = shards.process()
    receipts = await take(storage, "a", claim(A, 2), claim(B, 3))
    await settle(storage, "a", 2, 3)
    before = storage.epoch
    fresh = shards.stores[1] = MemoryStorage(clock=shards.clock)
    shards.shards[1].lose_data(fresh)
    with pytest.raises(DataLost):
        await ask(storage, "b", claim(A), claim(B))
    assert storage.epoch == before
    for number, receipt in enumerate(receipts):
        told = Settlement(f"rebuild-{ME}-{before}-{number:x}", (receipt.claim.amount,), None, (receipt,))
        await storage.settle((told,))
    await storage.accept_loss()
    assert storage.epoch not in ("", before)
    assert await shards.levels(A, B) == [(2, 0), (3, 0)]
    await take(storage, "b", claim(A), claim(B))


# --------------------------------------------------------------------------------------- amend


@pytest.mark.parametrize("home", [A, C])
async def test_amend_takes_gives_back_and_moves_between_shards(shards: Shards, home: Meter) -> None:
    """A growing, shrinking and moving call holds what it claims, in every shard, and settles into all of them."""
    storage = shards.process()
    fixed = lies_in(place(home.key), name="fixed")
    await take(storage, "a", claim(fixed), claim(B, 4), draft=draft("a"))
    for claims in (
        (claim(fixed), claim(B, 6), claim(lies_in(1, name="n"), 2)),
        (claim(B, 1), claim(home, 3), claim(fixed, 2)),
        (claim(fixed),),
        (claim(fixed, 3), claim(A if home is C else C, 5)),
        (claim(A if home is C else C, 5), claim(B, 7)),
    ):
        answer = await storage.amend(ME, Bundle("a", claims, draft("a")))
        assert isinstance(answer, Granted)
        assert [receipt.claim for receipt in answer.receipts] == list(claims)
        wanted = {one.meter.key: one.amount for one in claims}
        meters = (A, B, C, fixed, lies_in(1, name="n"))
        assert await shards.levels(*meters) == [(0, wanted.get(m.key, 0)) for m in meters]
    assert await storage.open_holds() == 1
    assert await settle(storage, "a", 6, None, record=record("a", 1)) == Settled("a", "settled", (1, 0))
    assert await shards.levels(A if home is C else C, B) == [(6, 0), (7, 0)]
    assert (await storage.amend(ME, Bundle("a", (claim(A), claim(B))))) == Ended("a", "settled", shards.clock.now_ms())
    assert await shards.held() == 0


@pytest.mark.parametrize("full", range(SHARDS))
async def test_a_refused_amend_leaves_every_shard_as_it_was(shards: Shards, full: int) -> None:
    """Whichever shard refuses, all others hold what they held, and the states show every claim."""
    storage = shards.process()
    meters = (A, B, C)
    await take(storage, "a", claim(A, 2), claim(B, 2))
    await take(storage, "full", claim(meters[full], 8))
    held = [(0, 2 + 8 * (full == 0)), (0, 2 + 8 * (full == 1)), (0, 8 * (full == 2))]
    answer = await storage.amend(ME, Bundle("a", (claim(A, 3), claim(B, 3), claim(C, 3))))
    assert isinstance(answer, Refused)
    assert [(s.taken, s.fits, s.held) for s in answer.states[0]] == [
        (False, n != full, 8 * (n == full)) for n in range(SHARDS)
    ]
    assert await shards.levels(*meters) == held
    assert await settle(storage, "a", 2, 3) == Settled("a", "settled", (0, 1))


async def test_an_amend_of_home_alone_is_one_trip() -> None:
    """What does not change in other shards is not asked for."""
    stores = [Counted(clock=FrozenClock(START)) for _ in range(SHARDS)]
    storage = ShardedStorage(stores, place=place)
    receipts = await take(storage, "a", claim(A, 2), claim(B, 2))
    for store in stores:
        store.asked.clear()
    answer = await storage.amend(ME, Bundle("a", (claim(A, 5), claim(B, 2))))
    assert isinstance(answer, Granted)
    assert answer.receipts[1] == receipts[1]
    assert [store.asked for store in stores] == [["amend"], [], []]


async def test_an_amend_cut_off_holds_no_less_than_either(shards: Shards) -> None:
    """An amend whose outcome is unknown holds the more of both; asked again or settled, it is as if it had not failed."""
    for away in range(SHARDS):
        storage = shards.process()
        await take(storage, f"a{away}", claim(A, 1), claim(B, 3))
        shards.shards[away].down(unanswered=1)
        wanted = Bundle(f"a{away}", (claim(A, 2), claim(B, 1), claim(C, 2)))
        with pytest.raises(StorageError):
            await storage.amend(ME, wanted)
        shards.shards[away].up()
        await storage.heartbeat(ME)
        (_, a), (_, b), _ = await shards.levels(A, B, C)
        assert a >= 1
        assert b >= 1
        answer = await storage.amend(ME, wanted)
        assert isinstance(answer, Granted)
        assert [held for _, held in await shards.levels(A, B, C)] == [2, 1, 2]
        assert (await settle(storage, f"a{away}", 0, 0, 0)).status == "settled"
        assert [held for _, held in await shards.levels(A, B, C)] == [0, 0, 0]


async def test_what_an_amend_would_give_back_is_nobodys_before_it_is_granted() -> None:
    """Rule 7: while home has not decided, a group holds the more of both, so that a refusal finds it as it was."""
    stores = [Counted(clock=FrozenClock(START)) for _ in range(SHARDS)]
    storage, other = (ShardedStorage(stores, place=place) for _ in range(2))
    await take(storage, "a", claim(A, 2), claim(B, 8))
    stores[0].decides_first = False
    stores[0].open.clear()
    changing = asyncio.ensure_future(storage.amend(ME, Bundle("a", (claim(A, 11), claim(B, 1)))))
    for _ in range(5):
        await asyncio.sleep(0)
    await refuse(other, "b", claim(B, 3))
    stores[0].open.set()
    assert isinstance(await changing, Refused)
    assert [await level(storage, m) for m in (A, B)] == [(0, 2), (0, 8)]


async def test_receipts_of_a_call_that_home_knows_charge_no_other_shard(shards: Shards) -> None:
    """What another process holds is charged when its owner lapses, and not by the receipts, too."""
    receipts = await take(shards.process(), "a", claim(A, 2), claim(B, 3))
    (settled,) = await shards.process().settle((Settlement("a", (1, 1), None, receipts),))
    assert settled.status == "settled"
    assert await shards.levels(A, B) == [(1, 0), (0, 3)]


async def test_an_amend_by_another_process_takes_what_it_claims(shards: Shards) -> None:
    """A hold that another process changes is that one's from then on; the first one's groups end with their owner."""
    first, second = shards.process(), shards.process()
    await take(first, "a", claim(A, 1), claim(B, 2))
    assert isinstance(await second.amend(OTHER, Bundle("a", (claim(A, 2), claim(B, 3)))), Granted)
    assert await shards.levels(A, B) == [(0, 2), (0, 5)]
    assert isinstance(await second.amend(OTHER, Bundle("none", (claim(A), claim(B)))), Ended)
    await settle(second, "a", 2, 3)
    assert await shards.levels(A, B) == [(2, 0), (3, 2)]


# -------------------------------------------------------------------------------------- owners


async def test_a_dead_process_leaves_what_it_held_charged_once(shards: Shards) -> None:
    """A dead owner's call is one expired call with one record, whatever the number of its groups."""
    storage = shards.process()
    await take(storage, "a", claim(A, 1), claim(B, 2), claim(C, 3), draft=draft("a", cost=6))
    await storage.heartbeat(OTHER)
    shards.clock.advance(ms=LAPSE_MS)
    beat = await storage.heartbeat(OTHER)
    assert (beat.expired, beat.lapsed, beat.owners) == (("a",), True, 1)
    assert await shards.levels(A, B, C) == [(1, 0), (2, 0), (3, 0)]
    (expired,) = await storage.records()
    assert (expired.outcome, expired.cost_nanousd) == ("expired", 6)
    assert await settle(storage, "a", 1, 5, 3, record=record("a", 9)) == Settled("a", "late", (0, 3, 0))
    assert await shards.levels(A, B, C) == [(1, 0), (5, 0), (3, 0)]
    assert [(one.late, one.cost_nanousd) for one in await storage.records()] == [(True, 9)]


async def test_what_one_shard_has_told_is_not_lost_with_the_beat_that_failed(shards: Shards) -> None:
    """A heartbeat that fails in one shard keeps the news of the others for the next one."""
    storage = shards.process()
    await take(storage, "a", claim(A), owner=OTHER)
    await storage.heartbeat(ME)
    shards.clock.advance(ms=LAPSE_MS)
    shards.shards[2].down()
    with pytest.raises(StorageError):
        await storage.heartbeat(ME)
    shards.shards[2].up()
    beat = await storage.heartbeat(ME)
    assert (beat.lapsed, beat.expired) == (True, ("a",))
    assert (await storage.heartbeat(ME)).expired == ()


async def test_a_process_that_ends_in_order_holds_nothing(shards: Shards) -> None:
    """`retire` expires what is held in all shards, and `aclose` closes them all."""
    storage = shards.process()
    await take(storage, "a", claim(A), claim(B))
    await storage.retire(ME)
    assert await shards.levels(A, B) == [(1, 0), (1, 0)]
    await storage.reset((A, B, C))
    assert await shards.levels(A, B) == [(0, 0), (0, 0)]
    await storage.aclose()
    with pytest.raises(StorageError):
        await ask(storage, "b", claim(C))


# ---------------------------------------------------------------------------------------- copies


async def populate(storage: Storage) -> None:
    await take(storage, "settled", claim(A, 1), claim(B, 2), claim(C, 3))
    await settle(storage, "settled", 1, 2, 3, record=record("settled", 6))
    await take(storage, "open", claim(C, 1), claim(A, 2), claim(B, 3), draft=draft("open", cost=3))
    await settle(storage, "cancelled")


async def test_an_export_of_one_storage_loads_into_shards_and_back(shards: Shards, clock: FrozenClock) -> None:
    """What is spread over shards is the same state: exported again, it is the same, open calls included."""
    whole, back = MemoryStorage(clock=clock), MemoryStorage(clock=clock)
    await populate(whole)
    storage = ShardedStorage(shards.stores, place=place)
    await storage.load([line async for line in whole.export()])
    assert await state_of(storage) == await state_of(whole)
    assert await shards.levels(A, B, C) == [(1, 2), (2, 3), (3, 1)]
    await back.load([line async for line in storage.export()])
    assert await state_of(back) == await state_of(whole)
    assert await settle(storage, "open", 1, 2, 4) == Settled("open", "settled", (0, 0, 1))
    assert await shards.levels(A, B, C) == [(3, 0), (6, 0), (4, 0)]
    assert isinstance(await ask(storage, "cancelled", claim(A)), Ended)


async def test_shards_that_are_not_empty_take_nothing_over(shards: Shards, clock: FrozenClock) -> None:
    """An export is loaded into empty shards, or into none; a damaged one into none."""
    whole = MemoryStorage(clock=clock)
    await populate(whole)
    lines = [line async for line in whole.export()]
    storage = shards.process()
    with pytest.raises(StorageError, match="cut short"):
        await storage.load(lines[:-1])
    await take(storage, "a", claim(C))
    before = await state_of(storage)
    with pytest.raises(StorageError, match="shard 2 is not empty"):
        await storage.load(lines)
    assert await state_of(storage) == before
    other = Shards()
    other.shards[1].down(after=1)
    with pytest.raises(StorageError, match="shard 1 of 3 did not take its part"):
        await other.process().load(lines)


async def test_records_of_all_shards_come_in_order(shards: Shards) -> None:
    """The ledger of all shards reads as one, by instant and call id, with its limit."""
    storage = shards.process()
    for n, on in enumerate((C, A, B, A)):
        await take(storage, f"c{n}", claim(on))
        await settle(storage, f"c{n}", 1, record=record(f"c{n}", 1, at_ms=shards.clock.now_ms() - n))
    assert [one.call_id for one in await storage.records()] == ["c3", "c2", "c1", "c0"]
    assert [one.call_id for one in await storage.records(limit=2)] == ["c3", "c2"]


# ---------------------------------------------------------------------------------------- leases


async def test_leases_make_plans_with_hot_global_meters_single_shard_ones() -> None:
    """With a lease on the global and the department's meter, a caller's call is one trip to the caller's shard."""
    clock = FrozenClock(START)
    stores = [Counted(clock=clock) for _ in range(SHARDS)]
    storage = LeasingStorage(ShardedStorage(stores, place=place), clock=clock, workers=1, skew_ms=0)
    hot = [
        Meter(
            key=meter_key("hot", Unit.CALLS, Rolling(DAY_MS), f"{shard}-hot"),
            policy="hot",
            scope="global",
            subject="",
            unit=Unit.CALLS,
            rule=Rule.QUOTA,
            limit=1_000,
            window=Rolling(DAY_MS),
            lease=100,
        )
        for shard in (0, 2)
    ]
    caller = lies_in(1, 1_000)
    await take(storage, "first", claim(caller), *map(claim, hot))
    await turn()
    for store in stores:
        store.asked.clear()
    for n in range(50):
        await take(storage, f"call-{n}", claim(hot[0]), claim(caller), claim(hot[1]))
        await settle(storage, f"call-{n}", 1, 1, 1, record=record(f"call-{n}", 1))
    assert [store.asked for store in stores] == [[], ["reserve", "settle"] * 50, []]
    await storage.aclose()


# ------------------------------------------------------------------------------------------ Redis


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("shard_by=user", "expected caller"),
        ("shards=4", "beside shard_by"),
        ("shard_by=caller&shards=0", "from 1 to 256"),
        ("shard_by=caller&shards=257", "from 1 to 256"),
        ("shard_by=caller&shards=x", "from 1 to 256"),
        ("shard_by=caller&shards=4&namespace=a/b", "namespace"),
    ],
)
def test_options_that_make_no_shards_are_refused(options: str, message: str) -> None:
    """Mistakes in the URL are errors of the configuration, when the storage is opened."""
    with pytest.raises(ConfigurationError, match=message):
        open_storage(f"redis://localhost?{options}", clock=SystemClock())


def test_only_redis_has_shards() -> None:
    """Other storages have no shards, and a Redis storage by itself has one namespace."""
    for url in ("sqlite:///guard.db?shard_by=caller", "memory://?shard_by=caller"):
        with pytest.raises(ConfigurationError):
            open_storage(url, clock=SystemClock())
    with pytest.raises(ConfigurationError, match="open_storage"):
        RedisStorage("redis://localhost?shard_by=caller")


def on_cluster(cluster: RedisCluster, namespace: str, shards: int = 16) -> ShardedStorage:
    storage = open_storage(
        f"{cluster.url}?timeout=5&namespace={namespace}&shard_by=caller&shards={shards}", clock=SystemClock()
    )
    assert isinstance(storage, ShardedStorage)
    return storage


def subject(kind: str, name: str, limit: int) -> Meter:
    window = Calendar("year")
    parts = (kind, name) if name else (kind,)
    return Meter(
        key=meter_key("p", Unit.CALLS, window, *parts),
        policy="p",
        scope=kind,
        subject=name,
        unit=Unit.CALLS,
        rule=Rule.QUOTA,
        limit=limit,
        window=window,
    )


LIMIT = 60
HOT: Sequence[Meter] = (subject("global", "", LIMIT), subject("department", "research", LIMIT + 20))


async def hammer(storage: Storage, owner: str, calls: int) -> int:
    """So many calls at once, each of some caller, the department and all together; gives how many were granted."""
    meters = [subject("caller", f"team-{n}", 1_000) for n in range(7)]
    answers = await asyncio.gather(
        *[
            ask(
                storage,
                f"{owner}-{n}",
                claim(meters[n % 7]),
                *map(claim, HOT),
                owner=owner,
                draft=draft(f"{owner}-{n}"),
            )
            for n in range(calls)
        ]
    )
    granted = [n for n, answer in enumerate(answers) if isinstance(answer, Granted)]
    readings = await storage.read(HOT)
    assert all(reading.used + reading.held <= (meter.limit or 0) for reading, meter in zip(readings, HOT, strict=True))
    await asyncio.gather(
        *[storage.settle((Settlement(f"{owner}-{n}", (1, 1, 1), record(f"{owner}-{n}", 1)),)) for n in granted]
    )
    return len(granted)


async def test_two_event_loops_on_a_cluster_never_pass_a_limit(redis_cluster: RedisCluster, namespace: str) -> None:
    """A1: 200 calls at once over several slots, from two loops with a storage each, are granted up to the limit, and no further."""
    granted: list[int] = []

    def work(owner: str) -> None:
        async def main() -> None:
            storage = on_cluster(redis_cluster, namespace)
            granted.append(await hammer(storage, owner, 100))
            assert len({id(lane.link) for shard in storage.shards for lane in shard._lanes.connected.values()}) == 1  # type: ignore[attr-defined]
            await storage.aclose()

        asyncio.run(main())

    threads = [threading.Thread(target=work, args=(owner,)) for owner in (ME, OTHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    storage = on_cluster(redis_cluster, namespace)
    assert len(granted) == 2
    assert 0 < sum(granted) <= LIMIT
    assert [await level(storage, m) for m in HOT] == [(sum(granted), 0)] * 2
    late = await hammer(storage, "late", LIMIT)  # those refused by what others held for a moment
    assert sum(granted) + late <= LIMIT
    for n in range(LIMIT - sum(granted) - late):  # one by one, all that is left is to be had
        await take(storage, f"last-{n}", claim(subject("caller", "x", 99)), *map(claim, HOT))
        await settle(storage, f"last-{n}", 1, 1, 1)
    assert [await level(storage, m) for m in HOT] == [(LIMIT, 0)] * 2
    await refuse(storage, "more", claim(subject("caller", "x", 99)), *map(claim, HOT))
    assert len(await storage.records()) == sum(granted) + late
    assert await storage.open_holds() == 0
    await storage.aclose()


async def test_a_node_that_dies_leaves_nothing_held_on_the_others(namespace: str) -> None:
    """A master that dies in the middle fails the calls that need it; once they are cancelled, nothing is held elsewhere."""
    with RedisCluster() as cluster:
        storage = open_storage(
            f"{cluster.url}?timeout=2&namespace={namespace}&shard_by=caller&shards=8", clock=SystemClock()
        )
        assert isinstance(storage, ShardedStorage)
        meters = [subject("caller", f"team-{n}", 1_000) for n in range(40)]
        slots = {m.key: cluster.slot_of(f"{{{namespace}.{place_by_subject(m.key) % 8}}}") for m in meters}
        dying = cluster.masters[2]
        here = [m for m in meters if cluster.node_of(slots[m.key]) is not dying]
        there = [m for m in meters if cluster.node_of(slots[m.key]) is dying]
        first, second = (
            here[0],
            next(m for m in here if place_by_subject(m.key) % 8 != place_by_subject(here[0].key) % 8),
        )
        await take(storage, "warm", claim(first), claim(second), claim(there[0]))
        await settle(storage, "warm", 0, 0, 0)
        asking = [
            asyncio.ensure_future(ask(storage, f"c{n}", claim(first), claim(second), claim(there[0])))
            for n in range(20)
        ]
        await asyncio.sleep(0)
        dying.kill()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert any(isinstance(answer, StorageError) for answer in answers)
        for _ in range(FAILURES):  # so that it is left alone, however many of those had been answered
            with pytest.raises(StorageError):
                await storage.read((there[0],))
        for n in range(20):
            storage.settle((Settlement(f"c{n}", ()),))
        await storage.shards[place_by_subject(first.key) % 8].settle((Settlement("flush-1", ()),))
        await storage.shards[place_by_subject(second.key) % 8].settle((Settlement("flush-2", ()),))
        assert [await level(storage, m) for m in (first, second)] == [(0, 0), (0, 0)]
        with pytest.raises(StorageError, match="left alone"):
            await storage.read((there[0],))
        assert storage.available()
        assert not storage.shards[place_by_subject(there[0].key) % 8].available()  # type: ignore[attr-defined]
        await take(storage, "alive", claim(first), claim(second))
        await storage.aclose()


def test_shards_have_hash_tags_of_their_own() -> None:
    """Sixteen namespaces make sixteen streams in sixteen slots, under the names that an operator can list."""
    name = unique_namespace()
    storage = open_storage(f"redis+cluster://localhost?namespace={name}&shard_by=caller", clock=SystemClock())
    assert isinstance(storage, ShardedStorage)
    assert [f"{name}.{n}" in repr(shard) for n, shard in enumerate(storage.shards)] == [True] * 16


async def test_a_guard_on_shards_decides_and_settles_as_on_one_storage(
    redis_cluster: RedisCluster, namespace: str
) -> None:
    """54: a guard whose callers, departments and global limit lie in several slots admits what fits, and records it once."""
    url = f"{redis_cluster.url}?timeout=5&namespace={namespace}&shard_by=caller"
    policies: list[Policy] = [
        Iterations(100),
        Budget("$5/yearly", per="department"),
        RateLimit("20/hour", per="global", counts="calls"),
    ]
    made = 0

    async def call_once(guard: Guard, n: int) -> None:
        nonlocal made
        context = Context(caller=f"team-{n % 5}", session=f"s-{n}", departments=("research",))
        async with guard.open(context):
            with contextlib.suppress(LimitExceeded):
                async with guard.call(model="openai/gpt-4o-mini", max_output_tokens=10) as call:
                    call.record(Usage(input_tokens=5, output_tokens=5))
                    made += 1

    async with Guard(policies, storage=url) as guard:
        await asyncio.gather(*[call_once(guard, n) for n in range(40)])
        await asyncio.gather(*[call_once(guard, n) for n in range(40, 60)])
        storage = guard.storage
        await storage.heartbeat("observer")
        assert 1 <= made <= 20
        for n in range(60, 60 + 20 - made):
            await call_once(guard, n)
        assert made == 20
        await call_once(guard, 99)
        assert made == 20
        found = await storage.records()
        assert [one.outcome for one in found] == ["measured"] * 20
        assert await storage.open_holds() == 0
