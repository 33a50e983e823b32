"""Calls whose replies are lost, late or cut short: each is done once, and what was done is known by its call id."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import OwnRedis, RedisServer, wait_until
from tests.storage.values import DAY_MS, ME, ask, claim, draft, level, meter, record, settle, take

from asgi_llm_guard.claims import Bundle, Ended, Granted, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Rolling, Slots

pytestmark = pytest.mark.anyio

BUDGET, SLOTS = meter(Rolling(DAY_MS), 1_000), meter(Slots(), 1_000)


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis_server.url) as proxy:
        yield proxy


@pytest.fixture
async def redis(proxy: FaultProxy, namespace: str) -> AsyncIterator[RedisStorage]:
    """Has made all calls once, so that the server knows the scripts."""
    storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=1)
    await take(storage, "warm", claim(BUDGET, 2))
    await storage.amend(ME, Bundle("warm", (claim(BUDGET, 1),)))
    await settle(storage, "warm", 0)
    yield storage
    proxy.heal()
    await storage.aclose()


@pytest.mark.parametrize("executed", [True, False])
async def test_a_call_that_breaks_once_is_done_once(proxy: FaultProxy, redis: RedisStorage, *, executed: bool) -> None:
    """A connection that breaks before or after a call is executed: reserve, amend and settle give their first answers."""
    cut = proxy.cut_at_reply if executed else proxy.cut_at_request
    cut(of="EVALSHA")
    receipts = await take(redis, "call", claim(BUDGET, 10), claim(SLOTS), draft=draft("call"))
    assert [(one.taken, one.used, one.held) for one in receipts] == [(True, 0, 0), (True, 0, 0)]
    assert await take(redis, "call", claim(BUDGET, 10), claim(SLOTS), draft=draft("call")) == receipts
    cut(of="EVALSHA")
    answer = await redis.amend(ME, Bundle("call", (claim(BUDGET, 20), claim(SLOTS))))
    assert isinstance(answer, Granted)
    assert [(one.claim.amount, one.used, one.held) for one in answer.receipts] == [(20, 0, 0), (1, 0, 0)]
    assert [await level(redis, on) for on in (BUDGET, SLOTS)] == [(0, 20), (0, 1)]
    cut(of="EVALSHA")
    settled = await settle(redis, "call", 25, None, record=record("call", 25), receipts=answer.receipts)
    assert (settled.status, settled.overages) == ("settled", (5, 0))
    assert [await level(redis, on) for on in (BUDGET, SLOTS)] == [(25, 0), (0, 0)]
    assert [one.call_id for one in await redis.records()] == ["call"]
    assert proxy.counts.cuts == 3


async def test_a_reserve_that_is_cancelled_after_it_was_sent_holds_nothing_in_the_end(
    proxy: FaultProxy, namespace: str
) -> None:
    """What a cancelled caller may have got is given back by a settlement without actuals, in the order they were made."""
    redis = RedisStorage(proxy.url, namespace=namespace, timeout_s=10)
    await redis.heartbeat(ME)
    proxy.to_server.hold()
    waiting = [asyncio.create_task(ask(redis, f"call-{n}", claim(SLOTS))) for n in range(40)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    cancelled = redis.settle([Settlement(f"call-{n}", ()) for n in range(40)])
    proxy.to_server.release()
    assert {one.status for one in await cancelled} <= {"settled", "cancelled"}
    assert await level(redis, SLOTS) == (0, 0)
    assert await redis.open_holds() == 0
    for n in range(40):
        assert isinstance(await ask(redis, f"call-{n}", claim(SLOTS)), Ended)
    await redis.aclose()


async def test_a_reserve_that_arrives_after_its_cancellation_is_refused(
    proxy: FaultProxy, redis: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """C5: a reserve that is stuck on the way while its caller gives up finds the tombstone, and takes nothing."""
    healthy = RedisStorage(redis_server.url, namespace=namespace, timeout_s=5)
    proxy.to_server.hold()
    with pytest.raises(StorageError) as raised:
        await ask(redis, "call", claim(BUDGET, 10))
    assert raised.value.sent
    assert (await settle(healthy, "call")).status == "cancelled"
    before = proxy.counts.replies
    proxy.to_server.release()
    await proxy.until(lambda counts: counts.replies > before)
    assert await level(healthy, BUDGET) == (0, 0)
    assert await healthy.open_holds() == 0
    await healthy.aclose()


@pytest.mark.parametrize("fault", ["slow", "drip", "half-close", "drop"])
async def test_cycles_through_bad_connections_end_with_exact_counters(
    proxy: FaultProxy, redis: RedisStorage, fault: str
) -> None:
    """Whatever is slow, cut or swallowed: after each failed call was repeated or cancelled, all is charged once."""
    expected = 0

    async def cycle(n: int) -> int:
        call_id = f"call-{n}"
        try:
            answer = await ask(redis, call_id, claim(BUDGET, 5), claim(SLOTS))
        except StorageError:
            await insist(redis, Settlement(call_id, ()))
            return 0
        assert isinstance(answer, Granted)
        await insist(redis, Settlement(call_id, (3, None), record(call_id, 3), answer.receipts))
        return 3

    cycles = [asyncio.create_task(cycle(n)) for n in range(100)]
    await asyncio.sleep(0)
    if fault == "slow":
        proxy.to_client.delay_ms = 30
    elif fault == "drip":
        proxy.to_client.sizes, proxy.to_client.pause_ms = (7, 1, 200), 0.2
    elif fault == "half-close":
        proxy.to_client.end()
    else:
        proxy.to_client.drop = True
        await asyncio.sleep(0.05)
        proxy.heal()
    expected = sum(await asyncio.gather(*cycles))
    proxy.heal()
    await asyncio.to_thread(wait_until, redis.available, "the store is available")
    assert await level(redis, BUDGET) == (expected, 0)
    assert await level(redis, SLOTS) == (0, 0)
    assert sum(one.cost_nanousd or 0 for one in await redis.records()) == expected


async def insist(storage: RedisStorage, settlement: Settlement) -> None:
    """Hand over until it is answered, as the engine does with its heartbeats."""
    while True:
        with contextlib.suppress(StorageError):
            await storage.settle([settlement])
            return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["kill", "stop", "pause"])
async def test_a_server_that_dies_in_the_midst_of_calls_forgets_nothing(own_redis: OwnRedis, how: str) -> None:
    """Two hundred cycles while a server with a file for each call is killed, ended or stopped: all are charged once."""
    server = own_redis(appendonly=True)
    storage = RedisStorage(server.url, timeout_s=1)
    await take(storage, "warm", claim(BUDGET, 1))
    await settle(storage, "warm", 0)
    started = asyncio.Event()

    async def cycle(n: int) -> int:
        call_id = f"call-{n}"
        try:
            answer = await ask(storage, call_id, claim(BUDGET, 3), claim(SLOTS))
        except StorageError:
            await insist(storage, Settlement(call_id, ()))
            return 0
        started.set()
        assert isinstance(answer, Granted)
        await asyncio.sleep(0.001 * (n % 50))
        await insist(storage, Settlement(call_id, (2, None), record(call_id, 2), answer.receipts))
        return 2

    cycles = [asyncio.create_task(cycle(n)) for n in range(200)]
    await started.wait()
    if how == "pause":
        server.pause()
        await asyncio.sleep(1.2)  # longer than a call may take
        server.resume()
    else:
        await asyncio.to_thread(getattr(server, how))
        await asyncio.to_thread(server.start)
    expected = sum(await asyncio.gather(*cycles))
    await asyncio.to_thread(wait_until, storage.available, "the store is available")
    assert expected > 0
    assert await level(storage, BUDGET) == (expected, 0)
    assert await level(storage, SLOTS) == (0, 0)
    assert sum(one.cost_nanousd or 0 for one in await storage.records()) == expected
    await storage.aclose()
