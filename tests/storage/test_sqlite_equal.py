"""The SQLite storage answers as the memory storage does, bit for bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.storage.sqlite_kit import draft, meter

from asgi_llm_guard.claims import Bundle, Claim, Meter, Settlement, Unit
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

pytestmark = pytest.mark.anyio

LAPSE_MS = 15_000
WINDOWS: list[tuple[Unit, int | None, Window]] = [
    (Unit.CALLS, 6, Lifetime(60_000, renew=True)),
    (Unit.NANOUSD, 30, Rolling(40_000)),
    (Unit.NANOUSD, 40, Calendar("hour")),
    (Unit.TOKENS, None, Calendar("day", "Europe/Berlin")),
    (Unit.TOKENS, 25, Sliding(20_000, 10)),
    (Unit.CALLS, 8, Bucket(10_000, 8)),
    (Unit.SLOTS, 4, Slots()),
    (Unit.IDS, 3, Distinct(30_000)),
]
METERS = [meter(unit, limit, subject=f"s{n}", window=window) for unit, limit, window in WINDOWS for n in range(2)]

Step = Callable[[Storage], Awaitable[object]]


class Script:
    """Random operations, the same for every storage that they are played to."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._calls: list[str] = []

    def step(self) -> Step:
        verb = self._rng.choices(
            (self.reserve, self.settle, self.amend, self.heartbeat, self.retire, self.read, self.reset, self.look),
            (40, 25, 12, 8, 1, 8, 1, 5),
        )[0]
        return verb()

    def reserve(self) -> Step:
        again = self._calls and self._rng.random() < 0.1
        call_id = self._rng.choice(self._calls) if again else f"call-{len(self._calls)}"
        if not again:
            self._calls.append(call_id)
        plans = [[self.bundle(call_id)] for _ in range(self._rng.choice((1, 1, 2)))]
        if self._rng.random() < 0.2:
            self._calls.append(f"{call_id}-rates")
            plans = [[bundle, Bundle(f"{call_id}-rates", ())] for (bundle,) in plans]
        owner = self.owner()
        return lambda storage: storage.reserve(owner, plans)

    def amend(self) -> Step:
        owner, bundle = self.owner(), self.bundle(self.known())
        return lambda storage: storage.amend(owner, bundle)

    def settle(self) -> Step:
        settlements = []
        for call_id in {self.known() for _ in range(self._rng.choice((1, 1, 1, 3)))}:
            actuals = tuple(self._rng.choice((None, 0, 1, 5, 20)) for _ in range(self._rng.randrange(5)))
            usage = Usage(input_tokens=self._rng.randrange(9), model="m")
            record = draft(call_id, usage=usage, departments=("a", "b")) if self._rng.random() < 0.7 else None
            debits = tuple(self.claims(1)) if self._rng.random() < 0.1 else ()
            settlements.append(Settlement(call_id, actuals, record, debits=debits))
        return lambda storage: storage.settle(settlements)

    def heartbeat(self) -> Step:
        owner = self.owner()
        return lambda storage: storage.heartbeat(owner)

    def retire(self) -> Step:
        owner = self.owner()
        return lambda storage: storage.retire(owner)

    def read(self) -> Step:
        return lambda storage: storage.read(METERS)

    def reset(self) -> Step:
        meters = self._rng.sample(METERS, 2)
        return lambda storage: storage.reset(meters)

    def look(self) -> Step:
        if self._rng.random() < 0.5:
            return lambda storage: storage.open_holds()
        limit = self._rng.choice((None, 3))
        return lambda storage: storage.records(limit=limit)

    def bundle(self, call_id: str) -> Bundle:
        return Bundle(call_id, tuple(self.claims(self._rng.randrange(5))), draft(call_id, estimate_nanousd=9))

    def claims(self, count: int) -> list[Claim]:
        return [self.claim(meter) for meter in self._rng.sample(METERS, count)]

    def claim(self, meter: Meter) -> Claim:
        if meter.unit is Unit.IDS:
            return Claim(meter, 1, f"id-{self._rng.randrange(6)}")
        return Claim(meter, self._rng.choice((0, 1, 1, 3, 9)))

    def known(self) -> str:
        return self._rng.choice(self._calls) if self._calls and self._rng.random() < 0.95 else "never-seen"

    def owner(self) -> str:
        return f"owner-{self._rng.randrange(3)}"

    def pause_ms(self) -> int:
        return self._rng.choice((0, 0, 1, 700, 3_000, 3_000, 20_000, -1_500))


async def answer(step: Step, storage: Storage) -> Any:
    try:
        return await step(storage)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(6))
async def test_random_operations_are_answered_alike(tmp_path: Path, seed: int) -> None:
    """400 random operations, with pauses and steps back of the clock, get the same answers from both storages."""
    clock, script = FrozenClock(1_800_000_000_000), Script(seed)
    memory = MemoryStorage(clock=clock)
    sqlite = SqliteStorage(tmp_path / "guard.db", clock=clock)
    for number in range(400):
        clock.advance(ms=script.pause_ms())
        step = script.step()
        expected = await answer(step, memory)
        assert await answer(step, sqlite) == expected, f"step {number}"
    await sqlite.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_batches_are_answered_as_single_operations(tmp_path: Path, seed: int) -> None:
    """Operations that share a transaction get the answers that they would get one after the other."""
    clock, script = FrozenClock(1_800_000_000_000), Script(100 + seed)
    memory = MemoryStorage(clock=clock)
    sqlite = SqliteStorage(tmp_path / "guard.db", clock=clock)
    for _ in range(20):
        clock.advance(ms=script.pause_ms())
        # Records are read beside the queue, after all that was handed over: not in line with the others.
        steps = [
            script.reserve() if "look" in step.__qualname__ else step for step in (script.step() for _ in range(25))
        ]
        expected = [await answer(step, memory) for step in steps]
        assert await asyncio.gather(*[answer(step, sqlite) for step in steps]) == expected
    await sqlite.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_two_connections_taking_turns_are_as_one(tmp_path: Path, seed: int) -> None:
    """What one connection has cached it looks up again once another has written."""
    clock, script = FrozenClock(1_800_000_000_000), Script(200 + seed)
    memory = MemoryStorage(clock=clock)
    pair = [SqliteStorage(tmp_path / "guard.db", clock=clock) for _ in range(2)]
    turns = random.Random(seed)
    for number in range(300):
        clock.advance(ms=script.pause_ms())
        step = script.step()
        expected = await answer(step, memory)
        assert await answer(step, turns.choice(pair)) == expected, f"step {number}"
    for storage in pair:
        await storage.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_live_ids_are_counted_alike(tmp_path: Path, seed: int) -> None:
    """T9: ids come, are seen again and expire in the same order in both storages, also when the clock steps back."""
    clock, rng = FrozenClock(1_800_000_000_000), random.Random(seed)
    memory = MemoryStorage(clock=clock)
    sqlite = SqliteStorage(tmp_path / "guard.db", clock=clock)
    ids = meter(Unit.IDS, 4, window=Distinct(10_000))
    for number in range(400):
        clock.advance(ms=rng.choice((0, 500, 1_000, 2_500, -1_200)))
        plans = [[Bundle(f"{number}", (Claim(ids, 1, f"id-{rng.randrange(6)}"),))]]
        expected = await memory.reserve("me", plans)
        assert await sqlite.reserve("me", plans) == expected, f"step {number}"
        if rng.random() < 0.2:
            assert await sqlite.read([ids]) == await memory.read([ids]), f"step {number}"
    await sqlite.aclose()


async def test_answers_are_the_same_after_reopening(tmp_path: Path) -> None:
    """A file that is closed and opened between any two operations answers as memory does."""
    clock, script = FrozenClock(1_800_000_000_000), Script(7)
    memory = MemoryStorage(clock=clock)
    for number in range(120):
        clock.advance(ms=script.pause_ms())
        step = script.step()
        expected = await answer(step, memory)
        storage = SqliteStorage(tmp_path / "guard.db", clock=clock)
        assert await answer(step, storage) == expected, f"step {number}"
        await storage.aclose()


async def test_an_export_loads_into_the_other_storage(tmp_path: Path) -> None:
    """State goes from memory to SQLite to memory by export and load, and nothing of it changes."""
    clock, script = FrozenClock(1_800_000_000_000), Script(11)
    first, middle, last = (
        MemoryStorage(clock=clock),
        SqliteStorage(tmp_path / "a.db", clock=clock),
        MemoryStorage(clock=clock),
    )
    for _ in range(300):
        clock.advance(ms=script.pause_ms())
        await answer(script.step(), first)
    lines = [line async for line in first.export()]
    await middle.load(lines)
    again = [line async for line in middle.export()]
    await last.load(again)
    assert sorted(again[:-1]) == sorted(lines[:-1])
    for _ in range(100):
        clock.advance(ms=script.pause_ms())
        step = script.step()
        expected = await answer(step, first)
        assert await answer(step, middle) == expected
        assert await answer(step, last) == expected
    await middle.aclose()
