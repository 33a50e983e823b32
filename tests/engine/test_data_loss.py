"""A storage that was flushed or rolled back: refused, accepted, or told again what this process knows."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from tests.engine.conftest import PRICES

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, LimitExceeded, RateLimit, Usage
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.events import DataLost as DataLostEvent
from asgi_llm_guard.events import Event, StorageFailed, StorageRecovered
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CALL: dict[str, Any] = {"model": MODEL, "input_tokens": 100, "max_output_tokens": 0}
CONTEXT = Context(caller="acme", session="s")
USED = Usage(input_tokens=40, output_tokens=0)


@pytest.fixture
def storage(clock: FrozenClock) -> OutageStorage:
    return OutageStorage(MemoryStorage(clock=clock))


def guard_over(storage: Storage, clock: FrozenClock, *policies: Any, **options: Any) -> Guard:
    return Guard(policies, storage=storage, clock=clock, prices=PRICES, **options)


async def one_call(guard: Guard) -> None:
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        call.record(USED)


async def counters(guard: Guard) -> list[tuple[int, int]]:
    call = guard.describe(**CALL)
    meters = [claim.meter for policy in guard.policies for claim in policy.plan(CONTEXT, call, 0).claims]
    return [(reading.used, reading.held) for reading in await guard.storage.read(meters)]


def changes(events: list[Event]) -> list[type]:
    return [type(e) for e in events if isinstance(e, (DataLostEvent, StorageFailed, StorageRecovered))]


LIMITS = (Iterations(100), Budget("$1/1d"), Concurrency(50), RateLimit("100/hour", per="caller"))


async def test_unknown_decision() -> None:
    """A decision that there is not is refused when the guard is made."""
    with pytest.raises(
        ConfigurationError, match="on_data_loss: expected 'deny' or 'accept' or 'rebuild', got 'ignore'"
    ):
        Guard(on_data_loss="ignore")  # type: ignore[arg-type]


async def test_denied_until_accepted(
    storage: OutageStorage, clock: FrozenClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A lost store is no fresh one: every call gets 503, whatever the policies, until somebody accepts; told once."""
    events: list[Event] = []
    guard = guard_over(storage, clock, Iterations(100), observers=[events.append])
    await one_call(guard)
    storage.lose_data(MemoryStorage(clock=clock))
    for _ in range(3):
        with pytest.raises(LimitExceeded) as refused:
            await one_call(guard)
        assert (refused.value.denied.code, refused.value.denied.status) == ("guard_unavailable", 503)
        await guard.heartbeat()
    assert changes(events) == [DataLostEvent]
    (line,) = caplog.records
    assert line.levelno == logging.ERROR
    assert "await guard.accept_data_loss()" in line.getMessage()
    assert not guard.ready
    assert (guard.health()["storage"], guard.health()["last_error"]) == ("lost", "DataLost")
    assert await storage.open_holds() == 0

    await guard.accept_data_loss()
    assert guard.ready
    await one_call(guard)
    assert changes(events) == [DataLostEvent, StorageRecovered]
    assert await counters(guard) == [(1, 0)]


async def test_call_that_is_open_when_the_data_is_lost(storage: OutageStorage, clock: FrozenClock) -> None:
    """What an open call uses is charged to the new data, once, and its change inside is refused."""
    guard = guard_over(storage, clock, *LIMITS)
    admission = guard.new_admission(CONTEXT, opaque=False)
    await admission.open(guard.describe(MODEL, input_tokens=10, max_output_tokens=0))
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        storage.lose_data(MemoryStorage(clock=clock))
        with pytest.raises(LimitExceeded):
            await guard.call(model=MODEL, input_tokens=20, max_output_tokens=0).__aenter__()
        call.record(USED)
    admission.end()
    assert await counters(guard) == [(1, 0), (40_000, 0), (0, 0), (2, 0)]
    assert len(await storage.records()) == 1
    assert await storage.open_holds() == 0


@pytest.mark.parametrize("decision", ["accept", "rebuild"])
async def test_goes_on(storage: OutageStorage, clock: FrozenClock, decision: str) -> None:
    """With `accept` and `rebuild` no call is refused, however many notice at once, and the loss is one event."""
    events: list[Event] = []
    guard = guard_over(storage, clock, *LIMITS, on_data_loss=decision, observers=[events.append])
    for _ in range(3):
        await one_call(guard)
    storage.lose_data(MemoryStorage(clock=clock))
    await asyncio.gather(*[one_call(guard) for _ in range(10)])
    assert changes(events) == [DataLostEvent, StorageRecovered]
    assert [event.decision for event in events if isinstance(event, DataLostEvent)] == [decision]
    calls = 10 if decision == "accept" else 13
    assert await counters(guard) == [(calls, 0), (calls * 40_000, 0), (0, 0), (calls, 0)]
    assert await storage.open_holds() == 0


async def test_one_of_all_who_notice_accepts(clock: FrozenClock) -> None:
    """However many calls notice a loss at once, it is accepted by one of them, and the others wait for it."""

    class Slow(OutageStorage):
        accepted = 0

        async def accept_loss(self) -> None:
            self.accepted += 1
            for _ in range(5):
                await asyncio.sleep(0)
            await super().accept_loss()

    storage = Slow(MemoryStorage(clock=clock))
    guard = guard_over(storage, clock, *LIMITS, on_data_loss="accept")
    storage.lose_data(MemoryStorage(clock=clock))
    first = asyncio.create_task(one_call(guard))
    others = [asyncio.create_task(one_call(guard)) for _ in range(9)]
    for _ in range(3):
        await asyncio.sleep(0)
    others[0].cancel()  # one that waits
    answers = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(answer) for answer in answers if answer is not None] == [asyncio.CancelledError]
    assert storage.accepted == 1

    storage.lose_data(MemoryStorage(clock=clock))
    others = [asyncio.create_task(one_call(guard)) for _ in range(9)]
    for _ in range(3):
        await asyncio.sleep(0)
    others[0].cancel()  # the one that accepts: the others are refused, and the next one accepts
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert {type(answer) for answer in answers} == {asyncio.CancelledError, LimitExceeded}
    await one_call(guard)
    assert storage.accepted == 3


async def test_rebuilt_limits_hold(storage: OutageStorage, clock: FrozenClock) -> None:
    """What was used before the loss counts after it: a spent limit is not fresh, in its old window."""
    guard = guard_over(storage, clock, Iterations(3, ttl="1h"), on_data_loss="rebuild")
    for _ in range(3):
        await one_call(guard)
    clock.advance(seconds=1800)
    storage.lose_data(MemoryStorage(clock=clock))
    with pytest.raises(LimitExceeded) as refused:
        await one_call(guard)
    assert refused.value.denied.code == "session_iterations_exhausted"
    assert refused.value.denied.resets_at_ms == clock.now_ms() + 1_800_000
    clock.advance(seconds=1801)
    await one_call(guard)
    assert await counters(guard) == [(1, 0)]


async def test_open_calls_are_held_again(storage: OutageStorage, clock: FrozenClock) -> None:
    """Rebuilding holds again what open calls hold, whatever is left, and they settle once."""
    guard, other = guard_over(storage, clock, *LIMITS, on_data_loss="rebuild"), guard_over(storage, clock, *LIMITS)
    admission = guard.new_admission(CONTEXT, opaque=False)
    await admission.open(None)
    await one_call(guard)
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        storage.lose_data(MemoryStorage(clock=clock))
        assert await guard.new_admission(Context(caller="another")).open(None) is None
        assert await counters(other) == [(1, 2), (40_000, 100_000), (0, 2), (1, 2)]
        call.record(USED)
    admission.end()
    assert await counters(other) == [(2, 0), (80_000, 0), (0, 0), (3, 0)]


async def test_change_of_an_open_call_after_the_loss(storage: OutageStorage, clock: FrozenClock) -> None:
    """A call that would change a hold when the loss is noticed claims its own, and the old hold is given back."""
    guard = guard_over(storage, clock, *LIMITS, on_data_loss="rebuild")
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=10, max_output_tokens=0):
        storage.lose_data(MemoryStorage(clock=clock))
        async with guard.call(**CALL) as inner:
            inner.record(USED)
    assert await counters(guard) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]
    assert await storage.open_holds() == 0
    assert len(await storage.records()) == 1


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("how", ["away", "silent"])
async def test_storage_that_goes_away_while_it_is_rebuilt(
    storage: OutageStorage, clock: FrozenClock, after: int, how: str
) -> None:
    """If the store goes away in the middle of rebuilding, what was told is told again, and counts once."""
    guard = guard_over(storage, clock, Iterations(100), Budget("$1/1d"), on_data_loss="rebuild")
    for _ in range(3):
        await one_call(guard)
    storage.lose_data(MemoryStorage(clock=clock))
    storage.down(after=after) if how == "away" else storage.lose_replies(after=after)
    async with guard.open(CONTEXT):
        await asyncio.gather(guard.call(**CALL).__aenter__(), return_exceptions=True)
    storage.up()
    await one_call(guard)
    await guard.heartbeat()
    assert (await counters(guard))[1][0] == 4 * 40_000
    assert (await counters(guard))[0][0] == 4


async def test_what_was_charged_to_the_new_data_is_not_told_again(storage: OutageStorage, clock: FrozenClock) -> None:
    """A call that settled between the loss and its discovery is in the new data already, and counts once."""
    guard = guard_over(storage, clock, *LIMITS, on_data_loss="rebuild")
    await one_call(guard)
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        storage.lose_data(MemoryStorage(clock=clock))
        call.record(USED)
    await one_call(guard)
    assert await counters(guard) == [(3, 0), (120_000, 0), (0, 0), (3, 0)]
    storage.lose_data(MemoryStorage(clock=clock))  # and is told after the next loss
    await one_call(guard)
    assert await counters(guard) == [(4, 0), (160_000, 0), (0, 0), (4, 0)]


async def test_what_an_outage_left_is_told_after_a_loss(storage: OutageStorage, clock: FrozenClock) -> None:
    """What was admitted in an outage, and settled after it, is among what a later loss is told."""
    guard = guard_over(storage, clock, Iterations(100, ttl="1h"), on_data_loss="rebuild")
    await one_call(guard)
    clock.advance(seconds=60)
    storage.down()
    await one_call(guard)
    storage.up()
    await one_call(guard)
    await one_call(guard)
    storage.lose_data(MemoryStorage(clock=clock))
    await one_call(guard)
    assert await counters(guard) == [(5, 0)]
    clock.advance(seconds=3540)  # the hour of the first call is over
    assert await counters(guard) == [(0, 0)]


async def test_each_process_tells_its_own(storage: OutageStorage, clock: FrozenClock) -> None:
    """Two processes tell what each has settled; together it is what was lost."""
    storages = [OutageStorage(storage.inner) for _ in range(2)]
    guards = [guard_over(each, clock, *LIMITS, on_data_loss="rebuild") for each in storages]
    await one_call(guards[0])
    for _ in range(2):
        await one_call(guards[1])
    fresh = MemoryStorage(clock=clock)
    for each in storages:
        each.lose_data(fresh)
    await one_call(guards[0])
    await one_call(guards[1])
    assert await counters(guards[0]) == [(5, 0), (200_000, 0), (0, 0), (5, 0)]


async def test_accepting_where_nothing_was_lost(storage: OutageStorage, clock: FrozenClock) -> None:
    """Accepting without need, and twice, counts nothing twice."""
    guard = guard_over(storage, clock, *LIMITS, on_data_loss="rebuild")
    await one_call(guard)
    await guard.accept_data_loss()
    await guard.accept_data_loss()
    assert await counters(guard) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]


async def test_loss_that_another_process_has_accepted(clock: FrozenClock) -> None:
    """A process that learns of a loss by its storage going by other data tells what it knows, too, once."""

    class Following(OutageStorage):
        """Accepts when another has accepted, as Redis does."""

        leader: OutageStorage | None = None

        async def reserve(self, owner: str, plans: Any) -> Any:
            await self.follow()
            return await super().reserve(owner, plans)

        async def heartbeat(self, owner: str) -> Any:
            await self.follow()
            return await super().heartbeat(owner)

        async def follow(self) -> None:
            if self.leader is not None and not self.leader.lost:
                await self.accept_loss()

    shared = MemoryStorage(clock=clock)
    storages = OutageStorage(shared), Following(shared), Following(shared)
    guards = [guard_over(each, clock, *LIMITS, on_data_loss="rebuild") for each in storages]
    for guard in guards:
        await one_call(guard)
    fresh = MemoryStorage(clock=clock)
    async with guards[1].open(CONTEXT), guards[1].call(**CALL) as call:
        async with guards[2].open(CONTEXT), guards[2].call(**CALL) as other:
            for each in storages:
                each.lose_data(fresh)
            other.record(USED)  # is charged to the new data, which its process does not know to be new
        storages[1].leader = storages[2].leader = storages[0]
        await one_call(guards[0])
        for _ in range(3):
            await guards[1].heartbeat()
        assert await counters(guards[0]) == [(4, 1), (160_000, 100_000), (0, 1), (4, 1)]
        call.record(USED)
    for _ in range(2):  # it finds out by a call, and tells before the next
        await one_call(guards[2])
    assert await counters(guards[0]) == [(8, 0), (320_000, 0), (0, 0), (8, 0)]
    assert await fresh.open_holds() == 0


async def test_two_losses(storage: OutageStorage, clock: FrozenClock) -> None:
    """A second loss is told again as the first was."""
    guard = guard_over(storage, clock, *LIMITS, on_data_loss="rebuild")
    for calls in range(1, 4):
        await one_call(guard)
        assert await counters(guard) == [(calls, 0), (calls * 40_000, 0), (0, 0), (calls, 0)]
        storage.lose_data(MemoryStorage(clock=clock))


async def test_storage_that_cannot_accept(clock: FrozenClock) -> None:
    """A storage that says that it has lost its data, and has no way to accept that, is refused whatever was decided."""

    class Forgetful(MemoryStorage):
        async def reserve(self, owner: str, plans: Any) -> Any:
            raise DataLost("gone")

    events: list[Event] = []
    guard = guard_over(Forgetful(clock=clock), clock, Iterations(5), on_data_loss="accept", observers=[events.append])
    for _ in range(3):
        with pytest.raises(LimitExceeded):
            await one_call(guard)
        await guard.accept_data_loss()
    assert changes(events) == [DataLostEvent]


async def test_accepting_while_the_storage_is_away(storage: OutageStorage, clock: FrozenClock) -> None:
    """Accepting a loss of a storage that does not answer fails, and changes nothing."""
    guard = guard_over(storage, clock, Iterations(5))
    storage.lose_data(MemoryStorage(clock=clock))
    storage.down()
    with pytest.raises(StorageError):
        await guard.accept_data_loss()
    storage.up()
    with pytest.raises(LimitExceeded):
        await one_call(guard)


async def test_loss_that_a_heartbeat_notices(storage: OutageStorage, clock: FrozenClock) -> None:
    """A storage that says so in its answer to a heartbeat is told again what is known, without any call."""

    class Honest(OutageStorage):
        async def heartbeat(self, owner: str) -> Any:
            if self.lost:
                raise DataLost("gone")
            return await super().heartbeat(owner)

    honest = Honest(MemoryStorage(clock=clock))
    guard = guard_over(honest, clock, Iterations(5), on_data_loss="rebuild")
    await one_call(guard)
    honest.lose_data(MemoryStorage(clock=clock))
    await guard.heartbeat()
    assert guard.ready
    assert await counters(guard) == [(1, 0)]
