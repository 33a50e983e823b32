"""A Redis that is killed, comes back, or comes back empty, in the middle of the load."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from tests.decorator.values import CONTEXT, PRICES, USED
from tests.middleware.values import Provider, ask, guarded, new_guard
from tests.servers import OwnRedis, RedisServer

from asgi_llm_guard import Budget, Concurrency, Guard, Iterations, LimitExceeded, RateLimit, Usage
from asgi_llm_guard.events import DataLost, Event, StorageFailed, StorageRecovered
from asgi_llm_guard.policies import Policy
from asgi_llm_guard.storage.redis import RedisStorage

pytestmark = pytest.mark.anyio

CALL: dict[str, Any] = {"model": "openai/test-model", "input_tokens": 100, "max_output_tokens": 0}
LIMITS = (
    Iterations(1000),
    Budget("$10/1d", per="caller", on_outage="allow"),
    Concurrency(50, per="caller"),
    RateLimit("1000/hour", per="caller"),
)


async def back(server: RedisServer, storage: RedisStorage) -> None:
    """Start the server again, and wait until the storage has found out by itself."""
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(60):
        while not storage.available():  # noqa: ASYNC110 - that is all it says, and all that a guard asks
            await asyncio.sleep(0)


async def one_call(guard: Guard) -> None:
    async with guard.open(CONTEXT), guard.call(**CALL) as call:
        call.record(Usage(input_tokens=40, output_tokens=0))


async def used_and_held(guard: Guard, policies: tuple[Policy, ...] = LIMITS) -> list[tuple[int, int]]:
    call = guard.describe(**CALL)
    meters = [claim.meter for policy in policies for claim in policy.plan(CONTEXT, call, 0).claims]
    return [(reading.used, reading.held) for reading in await guard.storage.read(meters)]


async def test_killed_in_the_middle_of_the_load(own_redis: OwnRedis) -> None:
    """T21, C7: Redis is killed under load, and every call that reached the provider is in its ledger when it is back."""
    server = own_redis(appendonly=True)
    storage = RedisStorage(server.url, timeout_s=2)
    guard = new_guard(Budget("$100/1d", per="caller"), Iterations(1000), storage=storage)
    provider = Provider()
    app = guarded(provider, guard)
    statuses: Counter[int] = Counter()

    async def caller() -> None:
        for _ in range(15):
            if statuses.total() >= 40:
                server.kill()  # once; there is nothing more to kill then
            statuses[(await ask(app)).status] += 1

    await asyncio.gather(*[caller() for _ in range(8)])
    assert not guard.ready
    assert statuses[503] > 0
    await back(server, storage)
    assert (await ask(app)).status == 200
    await guard.heartbeat()
    assert guard.ready
    records = await storage.records()
    assert len(records) == len(provider.bodies) >= statuses[200]
    assert sum(record.cost_nanousd or 0 for record in records) == len(provider.bodies) * USED
    assert await storage.open_holds() == 0
    await guard.aclose()


async def test_goes_on_without_redis(own_redis: OwnRedis) -> None:
    """A7: calls of before, during and after an outage of Redis are each charged once, and nobody waits for it meanwhile."""
    events: list[Event] = []
    server = own_redis(appendonly=True)
    storage = RedisStorage(server.url, timeout_s=2)
    guard = Guard(LIMITS, storage=storage, prices=PRICES, observers=[events.append])
    await one_call(guard)
    async with guard.open(CONTEXT), guard.call(**CALL) as before:
        server.kill()
        for _ in range(20):
            await one_call(guard)
        async with guard.open(CONTEXT), guard.call(**CALL) as during:
            await back(server, storage)
            await one_call(guard)
            await guard.heartbeat()
            assert (await used_and_held(guard))[2] == (0, 2)
            during.record(Usage(input_tokens=40, output_tokens=0))
        before.record(Usage(input_tokens=40, output_tokens=0))
    await guard.heartbeat()
    assert len(await storage.records()) == 24
    assert await used_and_held(guard) == [(24, 0), (24 * 40_000, 0), (0, 0), (24, 0)]
    assert await storage.open_holds() == 0
    told = [type(event) for event in events if isinstance(event, (StorageFailed, StorageRecovered))]
    # Twice if a heartbeat in the background, on a connection of its own, finds the server before the calls do.
    assert told in ([StorageFailed, StorageRecovered], [StorageFailed, StorageRecovered] * 2)
    await guard.aclose()


async def test_comes_back_empty(own_redis: OwnRedis) -> None:
    """A Redis that was killed without a disk is no fresh one: nothing is granted until it was told, or accepted."""
    events: list[Event] = []
    server = own_redis()
    first, second = RedisStorage(server.url, timeout_s=2), RedisStorage(server.url, timeout_s=2)
    rebuilding = Guard(LIMITS, storage=first, prices=PRICES, on_data_loss="rebuild", observers=[events.append])
    for _ in range(3):
        await one_call(rebuilding)
    server.kill()
    await one_call(rebuilding)
    await back(server, first)
    await one_call(rebuilding)
    assert await used_and_held(rebuilding) == [(5, 0), (200_000, 0), (0, 0), (5, 0)]
    assert DataLost in [type(event) for event in events]

    denying = Guard(LIMITS, storage=second, prices=PRICES)
    await one_call(denying)
    server.call("FLUSHALL")
    for _ in range(2):
        with pytest.raises(LimitExceeded) as refused:
            await one_call(denying)
        assert refused.value.denied.code == "guard_unavailable"
    assert denying.health()["storage"] == "lost"
    await denying.accept_data_loss()
    await one_call(denying)
    assert await used_and_held(denying) == [(1, 0), (40_000, 0), (0, 0), (1, 0)]
    await one_call(rebuilding)  # learns of it, and tells before the next
    await one_call(rebuilding)
    assert await used_and_held(denying) == [(8, 0), (320_000, 0), (0, 0), (8, 0)]
    for guard in (rebuilding, denying):
        await guard.aclose()
