"""The gauge of what is left of providers' budgets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread
import pytest
from tests.gateway.kit import CONTEXT, PRICES
from tests.telemetry.kit import Telemetry

from asgi_llm_guard import Budget, Guard, Iterations, ProviderBudget, Usage
from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

BUDGETS = {"openai": "$1/1d", "azure_openai": "$20/1d", "anthropic": {"budget_limit": None, "time_period": "1d"}}


class Counted(MemoryStorage):
    """Counts how often it is read."""

    reads = 0

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        self.reads += 1
        return await super().read(meters)


class Gated(MemoryStorage):
    """Does not answer while its gate is closed."""

    def __init__(self, *, clock: FrozenClock) -> None:
        super().__init__(clock=clock)
        self.gate = threading.Event()
        self.gate.set()

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        await asyncio.to_thread(self.gate.wait, 10)  # so that a test that fails ends
        return await super().read(meters)


async def spend(guard: Guard, *, tokens: int) -> None:
    """As many millionths of a dollar at OpenAI."""
    async with (
        guard.open(CONTEXT),
        guard.call(model="openai/model-a", input_tokens=tokens, max_output_tokens=0) as call,
    ):
        call.record(Usage(input_tokens=tokens, output_tokens=0))


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_gauge_is_what_the_storage_says(clock: FrozenClock, told: Telemetry, tmp_path: Path, kind: str) -> None:
    """B7: the gauge is limit less used less held, for each configured provider with a budget and for no other."""
    storage = "memory://" if kind == "memory" else f"sqlite:///{tmp_path}/guard.db"
    policy = ProviderBudget(BUDGETS)
    async with Guard([policy], storage=storage, clock=clock, prices=PRICES) as guard:
        told.instrument(guard)
        await spend(guard, tokens=100_000)
        held = guard.call(model="openai/model-a", input_tokens=50_000, max_output_tokens=0)
        async with guard.open(CONTEXT), held:
            found = await anyio.to_thread.run_sync(told.remaining)
            meters = policy.meters(["openai"])
            (reading,) = await guard.storage.read(list(meters.values()))

        assert (reading.used, reading.held) == (100_000_000, 50_000_000)
        assert found == {"openai": pytest.approx(0.85), "azure": 20.0}


async def test_read_only_while_somebody_collects(clock: FrozenClock, told: Telemetry) -> None:
    """B7: the storage is read when somebody collects, and at most every five seconds."""
    storage = Counted(clock=clock)
    async with Guard([ProviderBudget(BUDGETS)], storage=storage, clock=clock, prices=PRICES) as guard:
        told.instrument(guard)
        clock.advance(seconds=60)
        assert storage.reads == 0
        for seconds, reads in ((0, 1), (0, 1), (4.9, 1), (0.1, 2), (-60, 3)):
            clock.advance(seconds=seconds)
            await anyio.to_thread.run_sync(told.remaining)
            assert storage.reads == reads


async def test_store_away_leaves_no_point(clock: FrozenClock, told: Telemetry) -> None:
    """B7: while the store is away what is left is unknown, which is no point, and not 0."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    async with Guard([ProviderBudget(BUDGETS)], storage=storage, clock=clock, prices=PRICES) as guard:
        told.instrument(guard)
        assert set(await anyio.to_thread.run_sync(told.remaining)) == {"openai", "azure"}
        storage.down()
        clock.advance(seconds=5)
        assert await anyio.to_thread.run_sync(told.remaining) == {}
        storage.up()
        clock.advance(seconds=5)
        assert await anyio.to_thread.run_sync(told.remaining) == {"openai": 1.0, "azure": 20.0}


async def test_who_waits_for_the_storage(clock: FrozenClock, told: Telemetry) -> None:
    """B7: an event loop is not held up, and has what was read last; a thread waits for a second, and then has no points."""
    storage = Gated(clock=clock)
    async with Guard([ProviderBudget(BUDGETS)], storage=storage, clock=clock, prices=PRICES) as guard:
        told.instrument(guard)
        before = await anyio.to_thread.run_sync(told.remaining)
        await spend(guard, tokens=100_000)
        clock.advance(seconds=5)
        storage.gate.clear()
        assert told.remaining() == before == {"openai": 1.0, "azure": 20.0}
        assert await anyio.to_thread.run_sync(told.remaining) == {}
        storage.gate.set()
        assert await anyio.to_thread.run_sync(told.remaining) == {"openai": 0.9, "azure": 20.0}
        assert told.remaining() == {"openai": 0.9, "azure": 20.0}


async def test_gone_with_the_instrumentation(clock: FrozenClock, told: Telemetry) -> None:
    """B7: after `uninstrument` the gauge has no points, and the storage is not read."""
    storage = Counted(clock=clock)
    async with Guard([ProviderBudget(BUDGETS)], storage=storage, clock=clock) as guard:
        told.instrument(guard).uninstrument()
        assert await anyio.to_thread.run_sync(told.remaining) == {}
        assert storage.reads == 0


async def test_no_budgets_no_gauge(clock: FrozenClock, told: Telemetry) -> None:
    """B7: a guard without budgets of providers has no gauge; one whose budgets are in tokens has no points in USD."""
    async with Guard([ProviderBudget({"openai": "1_000_000 tokens/1d"})], clock=clock) as guard:
        told.instrument(guard)
        assert [name for name in told.collect() if "budget" in name] == []


async def test_policies_that_were_replaced(clock: FrozenClock, told: Telemetry) -> None:
    """B7: after `guard.replace` the gauges are those of the policies in force, also where there were none before."""
    async with Guard([Iterations(5)], clock=clock, prices=PRICES) as guard:
        told.instrument(guard)
        assert await anyio.to_thread.run_sync(told.remaining) == {}
        guard.replace(policies=[ProviderBudget(BUDGETS), Budget("$3/1d", per="global")])
        clock.advance(seconds=5)
        assert await anyio.to_thread.run_sync(told.remaining) == {"openai": 1.0, "azure": 20.0}
        (point,) = (await anyio.to_thread.run_sync(told.collect))["llm_guard.budget.limit"]
        assert (point.value, point.attributes["llm_guard.scope"]) == (3.0, "global")
        guard.replace(policies=[ProviderBudget({"openai": "$7/1d"})])
        clock.advance(seconds=5)
        assert await anyio.to_thread.run_sync(told.remaining) == {"openai": 7.0}
        assert "llm_guard.budget.limit" not in await anyio.to_thread.run_sync(told.collect)
