"""The owner of a process's holds: heartbeats, lapse, and what a live process does when it was taken for dead."""

from __future__ import annotations

import asyncio
import os

import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, Usage
from asgi_llm_guard.events import Event, Expired, SlotOverrun
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CONTEXT = Context(caller="acme", session="s")


async def used(guard: Guard) -> list[tuple[int, int]]:
    call = guard.describe(MODEL, input_tokens=1, max_output_tokens=1)
    meters = [c.meter for p in guard.policies for c in p.plan(CONTEXT, call, guard.clock.now_ms()).claims]
    return [(reading.used, reading.held) for reading in await guard.storage.read(meters)]


async def test_dead_owner_is_charged_and_its_slots_are_free(new_guard: NewGuard, clock: FrozenClock) -> None:
    """Holds of a process that sends no heartbeat are charged, with one record each, and their slots are free again."""
    dead, alive = (
        new_guard(Iterations(9), Budget("$1/1d"), Concurrency(2)),
        new_guard(Iterations(9), Budget("$1/1d"), Concurrency(2)),
    )
    await dead.open(CONTEXT).__aenter__()
    await dead.call(model=MODEL, input_tokens=100, max_output_tokens=0).__aenter__()
    assert await used(alive) == [(0, 1), (0, 100_000), (0, 1)]

    clock.advance(seconds=15)
    await alive.heartbeat()

    assert await used(alive) == [(1, 0), (100_000, 0), (0, 0)]
    (record,) = await alive.storage.records()
    assert (record.outcome, record.cost_nanousd, record.usage) == ("expired", 100_000, None)
    assert await alive.storage.open_holds() == 0


async def test_heartbeats_keep_every_hold(new_guard: NewGuard, clock: FrozenClock) -> None:
    """An owner whose heartbeats come in time keeps its holds for as long as they last."""
    guard, other = new_guard(Iterations(9)), new_guard(Iterations(9))
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
        for _ in range(10):
            clock.advance(seconds=14)
            await guard.heartbeat()
            await other.heartbeat()
        assert await used(other) == [(0, 1)]
        call.record(Usage(input_tokens=1, output_tokens=1))
    assert [record.outcome for record in await guard.storage.records()] == ["measured"]


async def test_settlement_after_the_lapse_replaces_the_estimate(new_guard: NewGuard, clock: FrozenClock) -> None:
    """A process that was taken for dead and is not settles late: its record takes the place of the estimate."""
    guard, other = new_guard(Iterations(9), Budget("$1/1d")), new_guard(Iterations(9), Budget("$1/1d"))
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=100, max_output_tokens=0) as call:
        clock.advance(seconds=15)
        await other.heartbeat()
        call.record(Usage(input_tokens=150, output_tokens=0))
    (record,) = await guard.storage.records()
    assert (record.outcome, record.late, record.cost_nanousd) == ("measured", True, 150_000)
    assert await used(guard) == [(1, 0), (150_000, 0)]


async def test_live_process_takes_its_slots_again(new_guard: NewGuard, clock: FrozenClock) -> None:
    """A process that missed its heartbeats takes its slots again at the next one, and gives them back at the end."""
    events: list[Event] = []
    guard, other = new_guard(Concurrency(1), observers=[events.append]), new_guard(Concurrency(1))
    async with guard.open(CONTEXT):
        clock.advance(seconds=15)
        await other.heartbeat()
        assert await used(other) == [(0, 0)]
        await guard.heartbeat()
        assert await used(other) == [(0, 1)]
    assert await used(other) == [(0, 0)]
    assert not [event for event in events if isinstance(event, SlotOverrun)]


async def test_slot_that_somebody_else_took_is_reported(new_guard: NewGuard, clock: FrozenClock) -> None:
    """If the slot is taken meanwhile, the overrun is an event, and ending frees only what is one's own."""
    events: list[Event] = []
    guard, other = new_guard(Concurrency(1), observers=[events.append]), new_guard(Concurrency(1))
    async with guard.open(CONTEXT):
        clock.advance(seconds=15)
        await other.heartbeat()
        async with other.open(CONTEXT):
            await guard.heartbeat()
            assert [type(event) for event in events if isinstance(event, SlotOverrun)] == [SlotOverrun]
            assert await used(other) == [(0, 1)]
    assert await used(other) == [(0, 0)]


async def test_expiry_is_told_once(new_guard: NewGuard, clock: FrozenClock) -> None:
    """Whoever expires the holds of the dead tells it, once."""
    events: list[Event] = []
    dead, alive = new_guard(Iterations(9)), new_guard(Iterations(9), observers=[events.append])
    await dead.open(CONTEXT).__aenter__()
    await dead.call(model=MODEL, input_tokens=1, max_output_tokens=1).__aenter__()
    clock.advance(seconds=15)
    await alive.heartbeat()
    await alive.heartbeat()
    assert [len(event.call_ids) for event in events if isinstance(event, Expired)] == [1]


async def test_closing_gives_back_what_is_held(new_guard: NewGuard) -> None:
    """A guard that is closed in good order leaves no hold open; what was dispatched stays charged."""
    guard, other = new_guard(Iterations(9)), new_guard(Iterations(9))
    await guard.open(CONTEXT).__aenter__()
    await guard.call(model=MODEL, input_tokens=1, max_output_tokens=1).__aenter__()
    await guard.storage.retire(guard.engine.owner)
    assert await other.storage.open_holds() == 0
    assert await used(other) == [(1, 0)]


async def test_forked_child_is_another_owner(new_guard: NewGuard) -> None:
    """A forked process has an owner and call ids of its own."""
    guard = new_guard(Iterations(9))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, f"{guard.engine.owner} {guard.engine.new_id()}".encode())
        os._exit(0)
    await asyncio.to_thread(os.waitpid, child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        owner, call_id = pipe.read().split()
    assert owner != guard.engine.owner
    assert call_id.startswith(owner)
    assert call_id != guard.engine.new_id()
