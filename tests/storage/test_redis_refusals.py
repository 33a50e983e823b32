"""A refusal is remembered for a moment, so that a drained budget is not asked for in a loop, and no longer than it is true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import OwnRedis, RedisServer, wait_until
from tests.storage.values import HOUR_MS, START, ask, claim, meter, settle, take

from asgi_llm_guard.claims import Granted, Refused
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Lifetime, Slots

pytestmark = pytest.mark.anyio

BUDGET = meter(Lifetime(HOUR_MS), 10)
SLOTS = meter(Slots(), 1)


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    """Remembers for so long that no test is over before."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10, remember_refusals_ms=60_000)
    yield storage
    await storage.aclose()


@pytest.fixture
async def other(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    """Another process."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    yield storage
    await storage.aclose()


def script_calls(server: RedisServer) -> int:
    lines = server.call("INFO", "commandstats").decode().splitlines()
    (line,) = [line for line in lines if line.startswith("cmdstat_evalsha:")]
    return int(line.partition("calls=")[2].partition(",")[0])


async def spend_all(storage: RedisStorage) -> None:
    await take(storage, "spent", claim(BUDGET, 10))
    await settle(storage, "spent", 10)


async def test_a_drained_budget_is_asked_for_once(own_redis: OwnRedis) -> None:
    """A thousand calls on a budget that is spent are refused by one call of the store."""
    server = own_redis()
    storage = RedisStorage(server.url, remember_refusals_ms=60_000, timeout_s=10)
    await spend_all(storage)
    before = script_calls(server)
    answers = [await ask(storage, f"call-{n}", claim(BUDGET, 1)) for n in range(1_000)]
    assert all(isinstance(answer, Refused) for answer in answers)
    assert script_calls(server) - before == 1
    await storage.aclose()


async def test_what_holds_stand_in_the_way_of_is_asked_for_each_time(redis: RedisStorage, other: RedisStorage) -> None:
    """A slot, and money that is only held, may come back at any time, by any process: the next call gets it."""
    for on, most in ((SLOTS, 1), (BUDGET, 10)):
        await take(other, f"{on.kind}-first", claim(on, most))
        assert isinstance(await ask(redis, f"{on.kind}-refused", claim(on, 1)), Refused)
        await settle(other, f"{on.kind}-first", 0)
        assert isinstance(await ask(redis, f"{on.kind}-next", claim(on, 1)), Granted)


async def test_a_reset_lets_the_next_call_in(redis: RedisStorage) -> None:
    """What a process has reset it grants at once."""
    await spend_all(redis)
    assert isinstance(await ask(redis, "refused", claim(BUDGET, 1)), Refused)
    await redis.reset([BUDGET])
    assert isinstance(await ask(redis, "next", claim(BUDGET, 1)), Granted)


async def test_a_refusal_from_before_a_reset_is_not_remembered_after_it(
    redis_server: RedisServer, namespace: str
) -> None:
    """A reserve that was on its way when the reset was made refuses itself at most, and nobody after it."""
    async with FaultProxy(redis_server.url) as proxy:
        storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=10, remember_refusals_ms=60_000)
        await spend_all(storage)
        proxy.to_client.hold()
        early = asyncio.create_task(ask(storage, "early", claim(BUDGET, 1)))
        await asyncio.sleep(0)
        reset = asyncio.create_task(storage.reset([BUDGET]))
        await asyncio.sleep(0)
        proxy.to_client.release()
        assert isinstance(await early, Refused)
        await reset
        assert isinstance(await ask(storage, "next", claim(BUDGET, 1)), Granted)
        await storage.aclose()


async def take_past(storage: RedisStorage) -> None:
    """Overdraw the budget, so that it is spent whatever is held."""
    await take(storage, "past", claim(BUDGET, 0))
    await settle(storage, "past", 5)


async def test_a_call_of_unknown_outcome_is_not_refused_from_memory(redis_server: RedisServer, namespace: str) -> None:
    """Who asks again after a `StorageError` learns what became of the call, though others were refused meanwhile."""
    async with FaultProxy(redis_server.url) as proxy:
        storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=10, remember_refusals_ms=60_000)
        await take(storage, "half", claim(BUDGET, 9))
        await settle(storage, "half", 9)
        proxy.refuse()
        proxy.cut_at_reply(of="EVALSHA")
        with pytest.raises(StorageError):
            await ask(storage, "mine", claim(BUDGET, 1))
        proxy.heal()
        await asyncio.to_thread(wait_until, storage.available, "the store is available")
        await take_past(storage)
        assert isinstance(await ask(storage, "refused", claim(BUDGET, 1)), Refused)
        assert isinstance(await ask(storage, "mine", claim(BUDGET, 1)), Granted)
        await storage.aclose()


async def test_with_a_clock_of_its_own_nothing_is_remembered(redis_server: RedisServer, namespace: str) -> None:
    """A test that moves the clock gets the answer of that instant."""
    clock = FrozenClock(START)
    storage = RedisStorage(redis_server.url, namespace=namespace, clock=clock, timeout_s=10)
    await spend_all(storage)
    assert isinstance(await ask(storage, "refused", claim(BUDGET, 1)), Refused)
    clock.advance(ms=HOUR_MS)
    assert isinstance(await ask(storage, "next", claim(BUDGET, 1)), Granted)
    await storage.aclose()


async def test_a_refusal_is_forgotten_when_the_window_ends(redis: RedisStorage) -> None:
    """However long refusals are remembered, a window that begins anew lets calls in."""
    short = meter(Lifetime(150), 1)
    await take(redis, "first", claim(short))
    await settle(redis, "first", 1)
    answer = await ask(redis, "refused", claim(short))
    assert isinstance(answer, Refused)
    (state,) = answer.states[0]
    assert state.resets_at_ms is not None
    await asyncio.sleep((state.resets_at_ms - answer.now_ms) / 1000 + 0.01)
    assert isinstance(await ask(redis, "next", claim(short)), Granted)
