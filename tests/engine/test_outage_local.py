"""What a process decides by itself while the storage is away, and how the storage has it when it is back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import PRICES

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, LimitExceeded, RateLimit, Usage
from asgi_llm_guard.admission import Admission, enter, leave
from asgi_llm_guard.claims import Bundle, Ended, Granted, Plan, Refused
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.events import Event, SettledCall, SlotOverrun
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CALL: dict[str, Any] = {"model": MODEL, "input_tokens": 100, "max_output_tokens": 0}
COST = 100_000  # of what `CALL` holds, in nano-USD
CONTEXT = Context(caller="acme", session="s")
USED = Usage(input_tokens=40, output_tokens=0)


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[OutageStorage]:
    made = (
        MemoryStorage(clock=clock) if request.param == "memory" else SqliteStorage(tmp_path / "guard.db", clock=clock)
    )
    yield OutageStorage(made)
    await made.aclose()


@pytest.fixture
def new_guard(storage: OutageStorage, clock: FrozenClock) -> Callable[..., Guard]:
    def make(*policies: Any, **options: Any) -> Guard:
        return Guard(policies, storage=storage, clock=clock, prices=PRICES, **options)

    return make


NewGuard = Callable[..., Guard]
GoesAway = Callable[[OutageStorage], None]


async def opened(guard: Guard, context: Context = CONTEXT) -> Denied | None:
    """Open a request that stands for a call, and leave it open."""
    return await guard.new_admission(context).open(guard.describe(**CALL))


async def how_many(ask: Callable[[], Awaitable[object]], most: int = 100) -> int:
    """How often this is granted before it is refused."""
    for granted in range(most):
        if await ask() is not None:
            return granted
    return most


async def one_call(guard: Guard, usage: Usage = USED) -> None:
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        call.record(usage)


async def counters(guard: Guard) -> list[tuple[int, int]]:
    """Used and held of every policy's meter."""
    call = guard.describe(**CALL)
    meters = [claim.meter for policy in guard.policies for claim in policy.plan(CONTEXT, call, 0).claims]
    return [(reading.used, reading.held) for reading in await guard.storage.read(meters)]


# ------------------------------------------------------------------------------------ shares


async def test_local_share_is_what_was_left(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A7: one process grants by itself what was left when it last saw the meter, and not one more."""
    guard = new_guard(Iterations(10))
    for _ in range(4):
        await one_call(guard)
    storage.down()
    assert await how_many(lambda: opened(guard)) == 6
    denied = await opened(guard)
    assert denied is not None
    assert (denied.code, denied.status, denied.used, denied.held, denied.limit) == (
        "session_iterations_exhausted",
        429,
        4,
        6,
        10,
    )
    assert await opened(guard, Context(caller="acme", session="never seen")) is None


async def test_local_share_of_several_processes(storage: OutageStorage, new_guard: NewGuard) -> None:
    """What was left is divided by the processes that were alive; together they grant no more than the limit."""
    guards = [new_guard(Iterations(10)) for _ in range(3)]
    await one_call(guards[0])
    for guard in (*guards, *guards):
        await guard.heartbeat()
    assert [guard.health()["processes"] for guard in guards] == [3, 3, 3]
    storage.down()
    assert await how_many(lambda: opened(guards[0])) == 3  # (10 - 1) // 3
    assert await how_many(lambda: opened(guards[1])) == 3  # 10 // 3: it has never seen this session


async def test_at_least_one(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A process always has one to grant of a limit that is not 0, so that nobody is locked out by a stale number."""
    guard = new_guard(Iterations(2), Iterations(0, name="never", per="agent"))
    await one_call(guard)
    await one_call(guard)
    storage.down()
    assert await how_many(lambda: opened(guard)) == 1
    assert await opened(guard, Context(caller="acme", agent="any")) is not None


async def test_rates_slots_and_ids(storage: OutageStorage, new_guard: NewGuard) -> None:
    """Rates, slots and live session ids have shares of their own, and all of one plan are taken, or none."""
    guard = new_guard(
        RateLimit("5/minute", per="caller", name="rate"),
        Concurrency(3, per="caller", name="slots"),
        Iterations(100, per="session"),
        session_limit=2,
    )
    storage.down()
    admission = guard.new_admission(CONTEXT)
    assert await admission.open(None) is None
    assert await opened(guard) is None
    assert await opened(guard) is None
    refused = await opened(guard)
    assert refused is not None
    assert refused.violated == ("slots",)
    admission.end()
    assert await opened(guard) is None  # its slot was free again
    refused = await opened(guard)
    assert refused is not None
    assert refused.violated == ("slots",)  # four of five: what was refused took nothing of the rate
    ids = new_guard(Iterations(100), session_limit=2)
    numbers = itertools.count()
    assert await how_many(lambda: opened(ids, Context(caller="a", session=f"{next(numbers)}"))) == 2


async def test_share_of_a_bucket(storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock) -> None:
    """Of a leaky bucket a process has the room that is left, and its part of what drains."""
    guard = new_guard(RateLimit("60/minute", burst=10, algorithm="bucket", per="caller"))
    for _ in range(10):
        assert await opened(guard) is None
    storage.down()
    clock.advance(seconds=4)
    assert await how_many(lambda: opened(guard)) == 4
    clock.advance(seconds=3)
    assert await how_many(lambda: opened(guard)) == 3


async def test_new_window_has_a_new_share(storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock) -> None:
    """When the window that was seen ends during the outage, the whole limit is there again."""
    guard = new_guard(RateLimit("5/minute", per="caller"))
    for _ in range(5):
        assert await opened(guard) is None
    storage.down()
    assert await how_many(lambda: opened(guard)) == 1
    clock.advance(seconds=62)
    assert await how_many(lambda: opened(guard)) == 5


async def test_second_outage_grants_nothing_twice(storage: OutageStorage, new_guard: NewGuard) -> None:
    """What was granted in one outage is not there again in the next, though the storage was not asked in between."""
    guard = new_guard(Iterations(10))
    storage.down()
    assert await how_many(lambda: opened(guard), 6) == 6
    storage.up()
    await guard.heartbeat()
    storage.down()
    assert await how_many(lambda: opened(guard)) == 4


async def test_second_outage_begins_with_what_the_storage_said(storage: OutageStorage, new_guard: NewGuard) -> None:
    """What was granted in one outage, and is settled, does not count twice in the next."""
    guard = new_guard(Iterations(10))
    storage.down()
    for _ in range(3):
        await one_call(guard)
    storage.up()
    await one_call(guard)
    storage.down()
    assert await how_many(lambda: opened(guard)) == 6


async def test_more_than_a_share(storage: OutageStorage, new_guard: NewGuard) -> None:
    """What is larger than the share, and not than the limit, may be asked again soon: the storage may be back."""
    guard = new_guard(RateLimit("150 tokens/hour", per="caller"))
    for other in (guard, new_guard()):
        await other.heartbeat()
    await guard.heartbeat()
    storage.down()
    denied = await opened(guard)
    assert denied is not None
    assert (denied.code, denied.retry, denied.retry_after_s) == ("rate_limit_exceeded", True, 1)


async def test_change_takes_nothing_twice(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A hold of the outage that is changed has its part of the share before and after, and gives it back when it ends."""
    guard = new_guard(Iterations(5), Concurrency(2, counts="calls"), Budget("$1/1d", on_outage="allow"))
    storage.down()
    admission = guard.new_admission(CONTEXT)
    await admission.open(None)
    with scope_of(admission):
        async with guard.call(**CALL):
            assert await how_many(lambda: opened(guard)) == 1  # the other slot
        assert await how_many(lambda: opened(guard)) == 1  # the one that is free again
    assert await how_many(lambda: opened(guard, Context(caller="acme", user="u", session="s"))) == 2


async def test_what_was_not_described_counts_in_the_share(storage: OutageStorage, new_guard: NewGuard) -> None:
    """What an undescribed call has used during the outage is not there for the next one."""
    guard = new_guard(Budget("$0.0001/1d", per="caller", on_outage="local"))
    storage.down()
    async with guard.open(CONTEXT), guard.call() as call:
        call.record(Usage(input_tokens=90, output_tokens=0, model=MODEL))
    assert await opened(guard) is not None
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(90_000, 0)]


async def test_allow_lets_everything_pass(storage: OutageStorage, new_guard: NewGuard) -> None:
    """With `allow` calls pass whatever the limit, and are charged past it afterwards."""
    guard = new_guard(Budget("$0.0003/1d", per="caller", on_outage="allow"))
    storage.down()
    for _ in range(10):
        await one_call(guard, Usage(input_tokens=100, output_tokens=0))
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(10 * COST, 0)]
    refused = await opened(guard)
    assert refused is not None
    assert refused.code == "budget_exhausted"


async def test_shadow_passes(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A policy in shadow refuses nothing during an outage either, whatever it would do by itself, and is charged."""
    guard = new_guard(Budget("$0.0001/1d").shadow(), Iterations(100))
    storage.down()
    for _ in range(3):
        await one_call(guard)
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(120_000, 0), (3, 0)]


async def test_admissions_say_so(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A request knows that it, or a call inside it, was admitted without the storage."""
    guard = new_guard(Iterations(10))
    async with guard.open(CONTEXT) as admission:
        async with guard.call(**CALL):
            assert not admission.degraded
        storage.down()
        async with guard.call(**CALL):
            assert admission.degraded


async def test_headers_show_what_this_process_has(storage: OutageStorage, new_guard: NewGuard) -> None:
    """What remains by the receipts of a degraded admission is what is left of the share."""
    guard = new_guard(Iterations(10), RateLimit("100/minute", per="caller"))
    for other in (guard, new_guard()):
        await other.heartbeat()
    await guard.heartbeat()
    storage.down()
    admission = guard.new_admission(CONTEXT)
    await admission.open(None)
    assert admission.degraded
    left = {
        receipt.claim.meter.policy: (receipt.claim.meter.limit or 0) - receipt.used - receipt.held - 1
        for receipt in admission.receipts
    }
    assert (left["iterations"], left["caller_rate"]) == (4, 49)


# ----------------------------------------------------------------------------- reconciliation


def away(storage: OutageStorage) -> None:
    storage.down()


def silent(storage: OutageStorage) -> None:
    storage.lose_replies()


def silent_then_away(storage: OutageStorage) -> None:
    """The first reserve is granted without an answer; nothing after it arrives."""
    storage.down(unanswered=1)


WAYS = pytest.mark.parametrize("goes", [away, silent, silent_then_away])
LIMITS = (Iterations(100), Budget("$1/1d", on_outage="allow"), Concurrency(50), RateLimit("100/hour", per="caller"))


@WAYS
async def test_settled_exactly_once(storage: OutageStorage, new_guard: NewGuard, goes: GoesAway) -> None:
    """A7: whatever the storage knows of it, each call of the outage is charged once, with its record in the ledger."""
    events: list[Event] = []
    guard = new_guard(*LIMITS, observers=[events.append])
    await one_call(guard)
    goes(storage)
    for _ in range(5):
        await one_call(guard)
    storage.up()
    for _ in range(3):
        await guard.heartbeat()
    records = await storage.records()
    assert [record.outcome for record in records] == ["measured"] * 6
    assert await counters(guard) == [(6, 0), (6 * 40_000, 0), (0, 0), (6, 0)]
    assert await storage.open_holds() == 0
    assert len([event for event in events if isinstance(event, SettledCall)]) == 6
    assert guard.engine.degraded == guard.engine.unsettled == 0


@WAYS
@pytest.mark.parametrize("dies", [away, silent])
async def test_storage_that_dies_again(
    storage: OutageStorage, new_guard: NewGuard, goes: GoesAway, dies: GoesAway
) -> None:
    """If the storage dies again in the middle of reconciling, at any step of it, each call is still charged once."""
    guard = new_guard(*LIMITS)
    calls = 0
    for after in range(8):
        goes(storage)
        open_call = guard.open(CONTEXT)
        await open_call.__aenter__()
        inner = guard.call(**CALL)
        call = await inner.__aenter__()
        for _ in range(3):
            await one_call(guard)
        storage.up()
        storage.down(after=after) if dies is away else storage.lose_replies(after=after)
        await guard.heartbeat()
        await one_call(guard)
        call.record(USED)
        await inner.__aexit__(None, None, None)
        await open_call.__aexit__(None, None, None)
        storage.up()
        await guard.heartbeat()
        await guard.heartbeat()
        calls += 5
        assert len(await storage.records()) == calls, after
        assert await counters(guard) == [(calls, 0), (calls * 40_000, 0), (0, 0), (calls, 0)], after
        assert await storage.open_holds() == 0, after


@WAYS
async def test_open_calls_become_holds(storage: OutageStorage, new_guard: NewGuard, goes: GoesAway) -> None:
    """A call that is still open when the storage is back becomes a hold of it, with its slot, and settles as any."""
    guard, other = new_guard(*LIMITS), new_guard(*LIMITS)
    goes(storage)
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        storage.up()
        await guard.heartbeat()
        assert guard.engine.degraded == 0
        assert await counters(other) == [(0, 1), (0, COST), (0, 1), (0, 1)]
        call.record(USED)
    assert await counters(other) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]
    assert [record.outcome for record in await storage.records()] == ["measured"]


async def test_process_that_dies_after_the_outage(
    storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock
) -> None:
    """A call of the outage whose process dies when the storage is back is charged what it held, as any other."""
    guard, other = new_guard(*LIMITS), new_guard(*LIMITS)
    storage.down()
    await guard.open(CONTEXT).__aenter__()
    await guard.call(**CALL).__aenter__()
    storage.up()
    await guard.heartbeat()
    clock.advance(seconds=16)
    await other.heartbeat()
    assert await counters(other) == [(1, 0), (COST, 0), (0, 0), (1, 0)]
    assert [record.outcome for record in await storage.records()] == ["expired"]


async def test_slots_of_an_outage_are_taken_again_after_a_lapse(
    storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock
) -> None:
    """A slot that was granted during an outage is held like any other afterwards: lost by a lapse, it is taken again."""
    events: list[Event] = []
    guard, other = new_guard(Concurrency(1), observers=[events.append]), new_guard(Concurrency(1))
    storage.down()
    async with guard.open(CONTEXT):
        storage.up()
        await guard.heartbeat()
        clock.advance(seconds=16)
        await other.heartbeat()
        assert await counters(other) == [(0, 0)]
        await guard.heartbeat()
        assert await counters(other) == [(0, 1)]
    assert await counters(other) == [(0, 0)]
    assert not [event for event in events if isinstance(event, SlotOverrun)]


@pytest.mark.parametrize("dies", [away, silent])
async def test_slots_that_could_not_be_taken_again(
    storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock, dies: GoesAway
) -> None:
    """If the storage goes away while slots are taken again after a lapse, the next heartbeats go on with it; none is taken twice."""
    guard, other = new_guard(Concurrency(3)), Guard([Concurrency(3)], storage=storage.inner, clock=clock)
    async with guard.open(CONTEXT), guard.open(CONTEXT), guard.open(CONTEXT):
        clock.advance(seconds=16)
        await other.heartbeat()
        for after in (1, 2, 2):
            storage.down(after=after) if dies is away else storage.lose_replies(after=after)
            await guard.heartbeat()
            storage.up()
        for _ in range(3):
            await guard.heartbeat()
        assert await counters(other) == [(0, 3)]
    assert await counters(other) == [(0, 0)]


async def test_nothing_is_decided_before_it_is_reconciled(storage: OutageStorage, new_guard: NewGuard) -> None:
    """The first call that the storage decides again finds what the outage has used, without a heartbeat in between."""
    guard = new_guard(Budget("$0.0005/1d", per="caller", on_outage="allow"))
    storage.down()
    for _ in range(600):  # more than is handed over in one step
        await one_call(guard)
    storage.up()
    refused = await opened(guard)
    assert refused is not None
    assert (refused.code, refused.receipts[0].used) == ("budget_exhausted", 600 * 40_000)


async def test_charged_to_the_window_that_was_seen(
    storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock
) -> None:
    """What the outage used is charged to the window that ran then; when that is over, the new one is untouched."""
    guard = new_guard(Budget("$1/1d", per="caller", on_outage="allow"))
    await one_call(guard)
    began_ms = clock.now_ms()
    clock.advance(seconds=20 * 3600)
    storage.down()
    admission = guard.new_admission(CONTEXT)
    await admission.open(guard.describe(**CALL))
    assert [(receipt.pin, receipt.resets_at_ms) for receipt in admission.receipts] == [
        (began_ms, began_ms + 86_400_000)
    ]
    assert admission.root is not None
    admission.root.discard()
    await one_call(guard)
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(80_000, 0)]
    storage.down()
    await one_call(guard)
    clock.advance(seconds=5 * 3600)
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(0, 0)]
    assert len(await storage.records()) == 3


# ------------------------------------------------------------------------------------- changes


@WAYS
async def test_hold_of_before_is_changed_during(storage: OutageStorage, new_guard: NewGuard, goes: GoesAway) -> None:
    """A hold from before the outage that a call inside changes during it is charged once, as what the call used."""
    guard = new_guard(*LIMITS)
    admission = guard.new_admission(CONTEXT)
    await admission.open(None)
    with scope_of(admission):
        goes(storage)
        async with guard.call(**CALL) as call:
            call.record(USED)
    admission.end()
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]
    assert [record.outcome for record in await storage.records()] == ["measured"]
    assert await storage.open_holds() == 0


@WAYS
@pytest.mark.parametrize("back", ["before the change", "after the change", "after the end"])
@pytest.mark.parametrize("beat", [False, True], ids=["no heartbeat", "heartbeat"])
async def test_hold_of_the_outage_is_changed(
    storage: OutageStorage, new_guard: NewGuard, goes: GoesAway, back: str, *, beat: bool
) -> None:
    """A hold of the outage that a call inside changes is charged once, whenever the storage is back."""

    async def is_back(when: str) -> None:
        if when == back:
            storage.up()
            if beat:
                await guard.heartbeat()

    guard = new_guard(*LIMITS)
    goes(storage)
    admission = guard.new_admission(CONTEXT)
    await admission.open(None)
    with scope_of(admission):
        await is_back("before the change")
        async with guard.call(**CALL) as call:
            await is_back("after the change")
            call.record(USED)
    admission.end()
    await is_back("after the end")
    await guard.heartbeat()
    await guard.heartbeat()
    assert await counters(guard) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]
    assert [record.outcome for record in await storage.records()] == ["measured"]
    assert await storage.open_holds() == 0


async def test_hold_of_another_outage_is_changed(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A hold of one outage that a call inside changes in the next is charged once, and counts in the new share."""
    guard = new_guard(*LIMITS)
    storage.down()
    admission = guard.new_admission(CONTEXT)
    await admission.open(None)
    storage.up()
    await one_call(guard)  # the storage decides again; open calls become its holds only with the next heartbeat
    storage.down()
    with scope_of(admission):
        async with guard.call(**CALL) as call:
            call.record(USED)
    admission.end()
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(2, 0), (80_000, 0), (0, 0), (2, 0)]
    assert [record.outcome for record in await storage.records()] == ["measured"] * 2
    assert await storage.open_holds() == 0


async def test_changed_hold_that_the_storage_had(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A hold of which only the answer was lost is the storage's as soon as it says so, and nothing of the outage is left."""
    guard = new_guard(*LIMITS)
    storage.lose_replies()
    admission = guard.new_admission(CONTEXT)
    await admission.open(guard.describe(MODEL, input_tokens=10, max_output_tokens=0))
    assert guard.engine.degraded == 2
    storage.up()
    with scope_of(admission):
        async with guard.call(**CALL) as call:
            assert guard.engine.degraded == 1  # what the request itself holds waits for the heartbeat
            assert guard.ready
            call.record(USED)
    admission.end()
    assert guard.engine.degraded == 0


@WAYS
async def test_change_that_is_refused(storage: OutageStorage, new_guard: NewGuard, goes: GoesAway) -> None:
    """A call whose claims may not be granted during the outage is refused; what the request holds stays what it was."""
    guard = new_guard(Budget("$1/1d"), Iterations(5), Iterations(5, name="other"))
    admission = guard.new_admission(CONTEXT, opaque=False)
    await admission.open(None)
    with scope_of(admission):
        goes(storage)
        with pytest.raises(LimitExceeded) as refused:
            await guard.call(**CALL).__aenter__()
        assert refused.value.denied.code == "guard_unavailable"
        storage.up()
        async with guard.call(**CALL) as call:
            call.record(USED)
    admission.end()
    await guard.heartbeat()
    assert await counters(guard) == [(40_000, 0), (1, 0), (1, 0)]
    assert await storage.open_holds() == 0
    assert len(await storage.records()) == 1


@WAYS
async def test_refused_change_of_a_call_that_was_made(
    storage: OutageStorage, new_guard: NewGuard, goes: GoesAway
) -> None:
    """If a change is refused and nobody knows whether it was made, the hold is charged by what its own call used."""
    guard = new_guard(Budget("$1/1d"), Iterations(5), Iterations(5, name="other"))
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=50, max_output_tokens=0) as outer:
        goes(storage)
        with pytest.raises(LimitExceeded):
            await guard.call(**CALL, extra=[Iterations(9, name="third")]).__aenter__()
        outer.record(USED)
    storage.up()
    await guard.heartbeat()
    await guard.heartbeat()
    assert await counters(guard) == [(40_000, 0), (1, 0), (1, 0)]
    assert await storage.open_holds() == 0
    assert [record.outcome for record in await storage.records()] == ["measured"]


@WAYS
async def test_refused_change_of_a_request_that_went_on(
    storage: OutageStorage, new_guard: NewGuard, goes: GoesAway
) -> None:
    """A request that goes on after the change of its hold was refused is charged what it held, not what was refused."""
    guard = new_guard(Budget("$1/1d"), Iterations(5), Iterations(5, name="other"))
    admission = guard.new_admission(CONTEXT, opaque=True)
    await admission.open(None)
    with scope_of(admission):
        goes(storage)
        with pytest.raises(LimitExceeded):
            await guard.call(**CALL).__aenter__()
    storage.up()
    admission.end(status=200)
    await guard.heartbeat()
    assert await counters(guard) == [(0, 0), (1, 0), (1, 0)]
    assert await storage.open_holds() == 0
    assert [record.outcome for record in await storage.records()] == ["unseen"]


async def test_hold_that_surely_was_not_changed(
    storage: OutageStorage, new_guard: NewGuard, clock: FrozenClock
) -> None:
    """A hold whose refused change never reached the storage is settled in the window that it was granted in."""
    guard = new_guard(Budget("$1/1d"), Iterations(5, ttl="2d"))
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=50, max_output_tokens=0) as outer:
        storage.down()
        with pytest.raises(LimitExceeded):
            await guard.call(**CALL).__aenter__()
        storage.up()
        await guard.heartbeat()
        clock.advance(seconds=86_400)
        outer.record(USED)
    assert await counters(guard) == [(0, 0), (1, 0)]


async def test_local_change_that_does_not_fit(storage: OutageStorage, new_guard: NewGuard) -> None:
    """A change during the outage that the share has no room for is refused, and the hold goes on."""
    guard = new_guard(Iterations(5), Budget("$0.00015/1d", per="caller", on_outage="local"))
    storage.down()
    assert await opened(guard) is None  # 100,000 of 150,000 are held
    admission = guard.new_admission(CONTEXT)
    assert await admission.open(guard.describe(MODEL, input_tokens=10, max_output_tokens=0)) is None
    with scope_of(admission):
        with pytest.raises(LimitExceeded) as refused:
            await guard.call(**CALL).__aenter__()
        assert refused.value.denied.violated == ("caller_budget",)
        async with guard.call(model=MODEL, input_tokens=20, max_output_tokens=0) as call:
            call.record(USED)
    admission.end()
    storage.up()
    await guard.heartbeat()
    assert [record.outcome for record in await storage.records()] == ["measured"]


class scope_of:  # noqa: N801 - reads as a function
    """What runs inside is inside this admission's request."""

    def __init__(self, admission: Admission) -> None:
        self._scope = admission.scope

    def __enter__(self) -> None:
        self._token = enter(self._scope)

    def __exit__(self, *exc_info: object) -> None:
        leave(self._token)


# -------------------------------------------------------------------------------- interruptions


class Turning(OutageStorage):
    """Waits before and after each decision."""

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        await asyncio.sleep(0)
        try:
            return await super().reserve(owner, plans)
        finally:
            await asyncio.sleep(0)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        await asyncio.sleep(0)
        try:
            return await super().amend(owner, bundle)
        finally:
            await asyncio.sleep(0)


@WAYS
@pytest.mark.parametrize("stop_at", range(14))
async def test_cancelled_at_every_point(clock: FrozenClock, goes: GoesAway, stop_at: int) -> None:
    """A job that is cancelled wherever it waits during an outage has each of its calls charged at most once."""
    storage = Turning(MemoryStorage(clock=clock))
    guard = Guard(LIMITS, storage=storage, clock=clock, prices=PRICES)

    async def job() -> None:
        async with guard.open(CONTEXT):
            async with guard.call(model=MODEL, input_tokens=10, max_output_tokens=0), guard.call(**CALL) as inner:
                await asyncio.sleep(0)
                inner.record(USED)
            async with guard.call(**CALL) as another:
                another.record(USED)

    goes(storage)
    task = asyncio.create_task(job())
    for _ in range(stop_at):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    storage.up()
    await guard.heartbeat()
    await guard.heartbeat()
    records = await storage.records()
    iterations, nanousd, slots, rate = await counters(guard)
    assert len(records) == iterations[0]
    assert sum(record.cost_nanousd or 0 for record in records) == nanousd[0]
    assert (iterations[1], nanousd[1], slots, rate[1]) == (0, 0, (0, 0), 0)
    assert await storage.open_holds() == 0
    assert guard.engine.degraded == 0


async def test_synchronous_code(storage: OutageStorage, new_guard: NewGuard) -> None:
    """The same holds for synchronous code."""
    guard = new_guard(*LIMITS)
    storage.down()

    def job() -> None:
        with guard.open_sync(CONTEXT), guard.call_sync(**CALL) as call:
            call.record(USED)

    await asyncio.to_thread(job)
    storage.up()
    await guard.heartbeat()
    assert await counters(guard) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]
