"""Random histories of several processes whose store comes and goes: in the end everything is charged once."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.engine.conftest import PRICES

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, LimitExceeded, RateLimit, Usage
from asgi_llm_guard.admission import ActiveCall, Admission
from asgi_llm_guard.claims import OnOutage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CONTEXT = Context(caller="acme", session="s")
PROCESSES = 3
STEPS = 120


class World:
    """Some processes on one store, and what they should have been charged."""

    def __init__(
        self,
        seed: int,
        posture: OnOutage,
        *,
        longest_ms: int = 50,
        processes: int = PROCESSES,
        leased: bool = False,
        **options: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.longest_ms = longest_ms
        self.clock = FrozenClock(1_800_000_000_000)
        self.store = MemoryStorage(clock=self.clock)
        self.links = [OutageStorage(self.store, breaker=self.random.random() < 0.3) for _ in range(processes)]
        self.policies = (
            Iterations(10**6, per="caller", lease=5 if leased else None),
            Budget("$1000/1d", per="caller", on_outage=posture, lease="$0.001" if leased else None),
            Concurrency(10**6, per="caller"),
            RateLimit("1000000/hour", per="caller", lease=10 if leased else None),
        )
        self.guards = [
            Guard(self.policies, storage=link, clock=self.clock, prices=PRICES, max_overage=None, **options)
            for link in self.links
        ]
        self.open: list[tuple[Admission, ActiveCall]] = []
        self.requests = 0
        self.tokens: list[int] = []
        """What each call has used that was made."""

    async def begin(self) -> None:
        """A request that describes its call, or not, and one call inside it or two."""
        guard = self.random.choice(self.guards)
        admission = guard.new_admission(CONTEXT, opaque=False)
        described = guard.describe(MODEL, input_tokens=self.random.choice([10, 90]), max_output_tokens=0)
        if await admission.open(self.random.choice([described, None])) is not None:
            return
        self.requests += 1
        for _ in range(self.random.choice([0, 1, 1, 2])):
            described = guard.describe(MODEL, input_tokens=self.random.choice([10, 50, 90]), max_output_tokens=0)
            call = ActiveCall(admission, admission.root, admission.policies, described)
            try:
                await call.claim()
            except LimitExceeded:
                continue
            self.open.append((admission, call))
        if not any(admission is each for each, _ in self.open):
            admission.end()

    async def finish(self) -> None:
        """A call ends: it was made, or not."""
        if not self.open:
            return
        admission, call = self.open.pop(self.random.randrange(len(self.open)))
        if self.random.random() < 0.2:
            call.release()
        else:
            used = self.random.randrange(1, 120)
            self.tokens.append(used)
            call.record(Usage(input_tokens=used, output_tokens=0))
        call.end()
        if not any(admission is each for each, _ in self.open):
            admission.end()

    async def change(self) -> None:
        """One process loses the store, or its answers, or finds it again."""
        link = self.random.choice(self.links)
        ways: list[Callable[[], None]] = [
            link.up,
            link.down,
            link.lose_replies,
            lambda: link.down(after=self.random.randrange(3), unanswered=self.random.randrange(3)),
            lambda: link.lose_replies(after=self.random.randrange(3)),
        ]
        self.random.choice(ways)()

    async def beat(self) -> None:
        await self.random.choice(self.guards).heartbeat()

    async def wait(self) -> None:
        self.clock.advance(ms=self.random.randrange(self.longest_ms))

    async def lose(self) -> None:
        """The store is flushed, some time after its last decision."""
        if self.random.random() < 0.3 and not self.guards[0].engine.loss.totals._unsure:  # type: ignore[union-attr]
            self.store = MemoryStorage(clock=self.clock)
            for link in self.links:
                link.lose_data(self.store)

    async def run(self, *more: Callable[[], Awaitable[None]]) -> None:
        steps = [self.begin, self.begin, self.begin, self.finish, self.finish, self.change, self.beat, self.wait, *more]
        for _ in range(STEPS):
            await self.random.choice(steps)()
        while self.open:
            await self.finish()
        for link in self.links:
            link.up()
        for guard in self.guards * 2:
            await guard.heartbeat()

    async def counters(self) -> list[tuple[int, int]]:
        call = self.guards[0].describe(MODEL, input_tokens=1, max_output_tokens=0)
        meters = [claim.meter for policy in self.policies for claim in policy.plan(CONTEXT, call, 0).claims]
        return [(reading.used, reading.held) for reading in await self.store.read(meters)]


@pytest.mark.parametrize("posture", ["allow", "local", "deny"])
@pytest.mark.parametrize("leased", [False, True], ids=["", "leased"])
@pytest.mark.parametrize("seed", range(20))
async def test_everything_is_charged_once(seed: int, posture: OnOutage, *, leased: bool) -> None:
    """A7: whoever lost the store when, and whichever answers were lost, counters and ledger are what was used."""
    world = World(seed, posture, leased=leased)
    await world.run()
    calls, tokens = len(world.tokens), sum(world.tokens)
    assert await world.counters() == [(calls, 0), (tokens * 1_000, 0), (0, 0), (world.requests, 0)]
    records = await world.store.records()
    assert sorted(record.tokens or 0 for record in records) == sorted(world.tokens)
    assert {record.outcome for record in records} <= {"measured"}
    assert await world.store.open_holds() == 0
    assert [guard.engine.unsettled + guard.engine.degraded for guard in world.guards] == [0] * PROCESSES


@pytest.mark.parametrize("seed", range(25))
async def test_processes_that_are_taken_for_dead(seed: int) -> None:
    """If outages outlast heartbeats, each call that was made still has one record, slots are free, and no less is charged."""
    world = World(seed, "allow", longest_ms=12_000)
    await world.run()
    iterations, money, slots, rate = await world.counters()
    records = await world.store.records()
    measured = [record for record in records if record.outcome == "measured"]
    assert sorted(record.tokens or 0 for record in measured) == sorted(world.tokens)
    assert {record.outcome for record in records} <= {"measured", "expired"}
    assert len({record.call_id for record in records}) == len(records)
    assert money[0] >= sum(record.cost_nanousd or 0 for record in records) >= sum(world.tokens) * 1_000
    assert iterations[0] >= len(world.tokens)
    assert (iterations[1], money[1], slots, rate) == (0, 0, (0, 0), (world.requests, 0))
    assert await world.store.open_holds() == 0


@pytest.mark.parametrize("posture", ["allow", "deny"])
@pytest.mark.parametrize("leased", [False, True], ids=["", "leased"])
@pytest.mark.parametrize("seed", range(20))
async def test_store_that_loses_its_data(seed: int, posture: OnOutage, *, leased: bool) -> None:
    """However often the store is flushed between outages, a process that tells it again makes its counters what was used."""
    world = World(seed, posture, processes=1, leased=leased, on_data_loss="rebuild")
    await world.run(world.lose)
    await world.begin()  # who has not noticed the last loss does now
    while world.open:
        await world.finish()
    await world.guards[0].heartbeat()
    calls, tokens = len(world.tokens), sum(world.tokens)
    assert await world.counters() == [(calls, 0), (tokens * 1_000, 0), (0, 0), (world.requests, 0)]
    assert await world.store.open_holds() == 0
