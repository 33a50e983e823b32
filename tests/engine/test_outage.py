"""A storage that does not answer: what is refused, what waits to be settled, how much of it, and who is told."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from tests.engine.conftest import PRICES

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    Guard,
    Iterations,
    LimitExceeded,
    ProviderBudget,
    RateLimit,
    Usage,
)
from asgi_llm_guard.claims import Ended, Granted, Plan, Refused, Settled, Settlement
from asgi_llm_guard.engine.settling import MOST_UNSETTLED
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Admission, BacklogFull, Event, SettledCall, StorageFailed, StorageRecovered
from asgi_llm_guard.storage.base import Pending, Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CALL: dict[str, Any] = {"model": MODEL, "input_tokens": 100, "max_output_tokens": 0}
CONTEXT = Context(caller="acme", session="s")
USED = Usage(input_tokens=40, output_tokens=0)


def guard_over(storage: Storage, clock: FrozenClock, *policies: Any, **options: Any) -> Guard:
    return Guard(policies, storage=storage, clock=clock, prices=PRICES, **options)


async def one_call(guard: Guard) -> None:
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        call.record(USED)


class Slow(MemoryStorage):
    """A storage that takes its time, and then is gone."""

    def __init__(self, clock: FrozenClock) -> None:
        super().__init__(clock=clock)
        self.gone = asyncio.Event()

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        await self.gone.wait()
        raise StorageError("the connection was lost")


async def test_cancellations_are_kept_in_bounds(clock: FrozenClock) -> None:
    """Calls that were refused since nobody knows what became of them leave a bounded number of cancellations; one event says so."""
    events: list[Event] = []
    storage = Slow(clock)
    guard = guard_over(storage, clock, Budget("$1/1d"), observers=[events.append])
    call = guard.describe(**CALL)
    asked = [asyncio.create_task(guard.new_admission(CONTEXT).open(call)) for _ in range(MOST_UNSETTLED + 100)]
    await asyncio.sleep(0)
    await storage.aclose()
    storage.gone.set()
    answers = await asyncio.gather(*asked)
    assert {(denied.code, denied.status) for denied in answers if denied is not None} == {("guard_unavailable", 503)}
    assert guard.engine.unsettled == MOST_UNSETTLED
    assert [event for event in events if isinstance(event, BacklogFull)] == [BacklogFull(MOST_UNSETTLED)]


async def test_what_calls_have_used_is_kept_beyond_the_bound(clock: FrozenClock) -> None:
    """What calls have used is kept to be settled, however many of them there are."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = guard_over(storage, clock, Budget("$1000/1d", on_outage="allow"))
    storage.down()
    for _ in range(MOST_UNSETTLED + 1):
        await one_call(guard)
    assert guard.engine.unsettled == MOST_UNSETTLED + 1
    storage.up()
    await guard.heartbeat()
    assert guard.engine.unsettled == 0
    async with asyncio.timeout(60):  # the heart, which beats in a thread of its own, may have some of them in its hands
        while len(await storage.records()) < MOST_UNSETTLED + 1:  # noqa: ASYNC110 - the storage offers no event
            await asyncio.sleep(0)
    assert len(await storage.records()) == MOST_UNSETTLED + 1


class Slowly(MemoryStorage):
    """A storage that takes its time for settlements of one thread."""

    def __init__(self, clock: FrozenClock) -> None:
        super().__init__(clock=clock)
        self.slow: threading.Thread | None = None
        self.begun, self.go_on = threading.Event(), threading.Event()

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        if threading.current_thread() is self.slow:
            self.begun.set()
            assert self.go_on.wait(60)
        return super().settle(settlements)


def test_what_another_thread_hands_over_counts_in_what_is_decided_next(clock: FrozenClock) -> None:
    """Whoever decides while the heart hands over what calls have used waits until it is counted."""
    slowly = Slowly(clock)
    storage = OutageStorage(slowly)
    guard = guard_over(storage, clock, Budget("$0.00012/1d", on_outage="allow"))
    storage.down()
    asyncio.run(one_call(guard))  # takes so much of it that no second one fits
    assert guard.engine.unsettled == 1
    storage.up()
    slowly.slow = heart = threading.Thread(target=guard.engine.settling.settle_again)
    answers: list[str] = []

    def ask() -> None:
        try:
            with guard.open_sync(CONTEXT), guard.call_sync(**CALL):
                answers.append("granted")
        except LimitExceeded as refused:
            answers.append(refused.denied.code)

    asking = threading.Thread(target=ask)
    heart.start()
    assert slowly.begun.wait(60)
    asking.start()
    asking.join(0.2)  # if it does not wait, it is through
    slowly.go_on.set()
    heart.join()
    asking.join()
    assert answers == ["budget_exhausted"]


async def test_settlements_that_were_taken_are_not_remembered(clock: FrozenClock) -> None:
    """What was settled without an answer is forgotten when the answer comes, also if no observer asks for it."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = guard_over(storage, clock, Budget("$1/1d", on_outage="allow"))
    storage.lose_replies()
    await one_call(guard)
    assert len(guard.engine.settling.tried) == 1
    storage.up()
    await guard.heartbeat()
    assert not guard.engine.settling.tried


async def test_nothing_is_left_to_cancel_where_nothing_was_sent(clock: FrozenClock) -> None:
    """A refusal of a storage that was not reached at all leaves no cancellation behind."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = guard_over(storage, clock, Budget("$1/1d"))
    storage.down()
    with pytest.raises(LimitExceeded):
        await one_call(guard)
    assert guard.engine.unsettled == 0


async def test_one_policy_that_denies_refuses_all(clock: FrozenClock) -> None:
    """A7: with one claim that says `deny`, the call gets 503 and a short Retry-After, and nothing is counted, here neither."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    limits = Iterations(2), Budget("$1/1d"), RateLimit("2/hour", per="caller", counts="calls")
    guard = guard_over(storage, clock, *limits)
    storage.down()
    async with guard.open(CONTEXT):
        for _ in range(5):
            with pytest.raises(LimitExceeded) as refused:
                await guard.call(**CALL).__aenter__()
            denied = refused.value.denied
            assert (denied.code, denied.status, denied.retry_after_s) == ("guard_unavailable", 503, 1)
        for _ in range(2):  # all of both shares is still there for what no budget asks about
            admission = guard.new_admission(CONTEXT, extra=())
            assert await admission.open(None) is None
        assert await guard.new_admission(CONTEXT).open(None) is not None


async def test_unknown_outcome_of_a_refused_call_is_cancelled(clock: FrozenClock) -> None:
    """What the storage granted without an answer, and the guard refused, is given back when the storage answers."""
    inner = MemoryStorage(clock=clock)
    storage = OutageStorage(inner)
    guard = guard_over(storage, clock, Budget("$1/1d"))
    storage.lose_replies()
    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await guard.call(**CALL).__aenter__()
        storage.up()
        await guard.heartbeat()
    assert await inner.open_holds() == 0
    assert await inner.records() == []


@pytest.mark.parametrize("breaker", [False, True], ids=["tried each time", "known"])
async def test_told_once(clock: FrozenClock, caplog: pytest.LogCaptureFixture, *, breaker: bool) -> None:
    """An outage is one event and one line in the log, and so is its end, however many calls are made meanwhile."""
    events: list[Event] = []
    storage = OutageStorage(MemoryStorage(clock=clock), breaker=breaker)
    guard = guard_over(storage, clock, Iterations(1000), observers=[events.append])
    for outage in (1, 2):
        storage.down()
        for _ in range(20):
            await one_call(guard)
        await guard.heartbeat()
        storage.up()
        for _ in range(20):
            await one_call(guard)
        await guard.heartbeat()
        changes = [event for event in events if isinstance(event, (StorageFailed, StorageRecovered))]
        assert [type(change) for change in changes] == [StorageFailed, StorageRecovered] * outage
        assert len(caplog.records) == 2 * outage
    assert {record.levelno for record in caplog.records} == {logging.ERROR, logging.WARNING}
    admitted = [event.degraded for event in events if isinstance(event, Admission) and event.call is not None]
    assert admitted == [True] * 20 + [False] * 20 + [True] * 20 + [False] * 20
    assert len([event for event in events if isinstance(event, SettledCall)]) == 80


async def test_no_request_waits_for_a_storage_that_is_known_to_be_away(clock: FrozenClock) -> None:
    """While the storage says that it is away, calls are decided, settled and refused without one attempt."""
    storage = OutageStorage(MemoryStorage(clock=clock), breaker=True)
    guard = guard_over(storage, clock, Iterations(100), Concurrency(5))
    strict = guard_over(storage, clock, Budget("$1/1d"))
    async with guard.open(CONTEXT), guard.call(**CALL) as before:
        storage.down()
        for _ in range(10):
            await one_call(guard)
            with pytest.raises(LimitExceeded):
                await one_call(strict)
        before.record(USED)
    assert storage.attempts <= 1  # a heartbeat in the background may fall into it
    storage.up()
    await guard.heartbeat()
    assert len(await storage.records()) == 11
    assert await storage.open_holds() == 0


async def test_readiness(clock: FrozenClock) -> None:
    """Readiness is red from the first failure, or as soon as the storage knows, until the storage answers; no ids are shown."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = guard_over(storage, clock, Iterations(100))
    assert guard.ready
    healthy = guard.health()
    assert (healthy["storage"], healthy["since_ms"], healthy["last_error"]) == ("ok", clock.now_ms(), None)
    storage.down()
    clock.advance(seconds=7)
    await guard.open(CONTEXT).__aenter__()
    await guard.call(**CALL).__aenter__()
    assert not guard.ready
    assert guard.health() == {
        "ready": False,
        "draining": False,
        "storage": "failed",
        "since_ms": clock.now_ms(),
        "last_error": "StorageError",
        "unsettled": 0,
        "degraded": 1,
        "waiting": 0,
        "processes": 1,
        "control": None,
        "behind": 0,
    }
    storage.up()
    clock.advance(seconds=1)
    await guard.heartbeat()
    assert guard.ready
    assert (guard.health()["storage"], guard.health()["since_ms"]) == ("ok", clock.now_ms())
    await guard.drain(0)
    assert not guard.ready

    known = OutageStorage(MemoryStorage(clock=clock), breaker=True)
    idle = guard_over(known, clock, Iterations(100))
    known.down()
    assert not idle.ready
    assert idle.health()["storage"] == "failed"
    known.up()
    assert idle.ready


async def test_budgets_that_cannot_be_read(clock: FrozenClock) -> None:
    """`guard.filter` fails where a provider's budget says `deny`, and keeps all deployments where none does."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    storage.down()
    deployments = ["openai/a", "anthropic/b"]
    with pytest.raises(StorageError):
        await guard_over(storage, clock, ProviderBudget({"openai": "$1/1d"})).filter(deployments)
    lenient = guard_over(storage, clock, ProviderBudget({"openai": "$1/1d"}, on_outage="local"))
    assert await lenient.filter(deployments) == deployments


async def test_what_is_not_written_when_the_guard_closes(clock: FrozenClock, caplog: pytest.LogCaptureFixture) -> None:
    """A guard that is closed while the storage is away says how many calls are not in it."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = guard_over(storage, clock, Iterations(100))
    storage.down()
    for _ in range(3):
        await one_call(guard)
    await guard.aclose()
    assert "what 3 calls have used is not in it" in caplog.records[-1].getMessage()
