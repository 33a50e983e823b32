"""The day that a budget charges and the day that the ledger shows are the same."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard import Budget, Context, Guard, Iterations, Usage
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

PRICES = PriceBook.snapshot(overrides={"openai/acme-1": {"input": 1, "output": 1}})
BEFORE_MIDNIGHT = datetime(2028, 2, 29, 22, 59, 55, tzinfo=UTC)
"""Five seconds before a leap day ends in Berlin."""
MIDNIGHT_MS = int(datetime(2028, 2, 29, 23, tzinfo=UTC).timestamp() * 1000)


def storage(kind: str, clock: FrozenClock, folder: Path) -> Storage:
    if kind == "memory":
        return MemoryStorage(clock=clock)
    if kind == "sqlite":
        return SqliteStorage(folder / "guard.db", clock=clock)
    return RedisStorage(shared_redis().url, namespace=unique_namespace(), clock=clock, timeout_s=10)


def budget(limit: int) -> Budget:
    return Budget(f"${limit}/daily", per="caller", tz="Europe/Berlin")


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
@pytest.mark.parametrize(("most", "limit"), [(1_000, 100), (500, 100), (2_000, 100), (1_000, 200), (1_000, 50)])
async def test_a_call_that_is_taken_over_after_midnight(kind: str, most: int, limit: int, tmp_path: Path) -> None:
    """C7: a hold of yesterday that a call of today takes over is charged, and recorded, on one day: the one that has it."""
    clock = FrozenClock(BEFORE_MIDNIGHT)
    guard = Guard([budget(100)], storage=storage(kind, clock, tmp_path), clock=clock, prices=PRICES)
    async with guard:
        async with (
            guard.open(Context(caller="ada", session="s")),
            guard.call(model="openai/acme-1", input_tokens=1_000, max_output_tokens=1_000),
        ):
            clock.advance(seconds=10)
            await guard.heartbeat()
            if limit > 100:
                until_ms = clock.now_ms() + 60_000
                guard.set_raises([Raise(policy="caller_budget", unit="usd", amount=limit - 100, until_ms=until_ms)])
            async with guard.call(
                model="openai/acme-1",
                input_tokens=1_000,
                max_output_tokens=most,
                extra=[Iterations(5), budget(min(limit, 100))],
            ) as call:
                call.record(Usage(input_tokens=1_000, output_tokens=100))
        ((_, today),) = await guard.meters_of("caller", "ada")
        (record,) = await guard.storage.records()
        assert record.cost_nanousd == 1_100_000
        assert (record.at_ms >= MIDNIGHT_MS) == (today.used == 1_100_000)
        assert (record.at_ms < MIDNIGHT_MS) == (today.used == 0)
