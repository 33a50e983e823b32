"""What the claims of like calls have in common is kept by the store once; losing it loses nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.servers import RedisServer
from tests.storage.values import ME, OTHER, START, WINDOWS, ask, claim, draft, level, meter, record, settle, take

from asgi_llm_guard.claims import Bundle, Granted
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Slots

pytestmark = pytest.mark.anyio

BUDGET, SLOTS = meter(WINDOWS["rolling"]), meter(Slots(), 2)


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str, clock: FrozenClock) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10, clock=clock)
    yield storage
    await storage.aclose()


@pytest.fixture
async def other(redis_server: RedisServer, namespace: str, clock: FrozenClock) -> AsyncIterator[RedisStorage]:
    """Another process, which makes calls of another kind."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10, clock=clock)
    await take(storage, "other", claim(meter(WINDOWS["bucket"])), owner=OTHER)
    await settle(storage, "other")
    yield storage
    await storage.aclose()


def lose(server: RedisServer, namespace: str) -> None:
    assert server.call("DEL", f"llmguard1:{{{namespace}}}:s") == 1


async def test_open_calls_are_settled_though_their_shape_is_lost(
    redis: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """A settlement, with receipts or without, restores the shapes that it needs, and those beside it do not suffer."""
    receipts = await take(redis, "a", claim(BUDGET, 5), claim(SLOTS))
    await take(redis, "b", claim(BUDGET, 7), claim(SLOTS))
    lose(redis_server, namespace)
    assert (await settle(redis, "a", 9, None, record=record("a", 9), receipts=receipts)).overages == (4, 0)
    lose(redis_server, namespace)
    assert (await settle(redis, "b")).status == "settled"
    assert [await level(redis, on) for on in (BUDGET, SLOTS)] == [(9, 0), (0, 0)]


async def test_open_calls_are_changed_and_replayed_though_their_shape_is_lost(
    redis: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """An amend and a repeated reserve restore the shape of the hold that they find."""
    receipts = await take(redis, "a", claim(BUDGET, 5), claim(SLOTS))
    lose(redis_server, namespace)
    assert await take(redis, "a", claim(BUDGET, 5), claim(SLOTS)) == receipts
    lose(redis_server, namespace)
    assert isinstance(await redis.amend(ME, Bundle("a", (claim(BUDGET, 6),))), Granted)
    assert [await level(redis, on) for on in (BUDGET, SLOTS)] == [(0, 6), (0, 0)]


async def test_dead_owners_are_swept_though_their_shape_is_lost(
    redis: RedisStorage, redis_server: RedisServer, namespace: str, clock: FrozenClock
) -> None:
    """A heartbeat restores the shapes of the holds that it expires, which are charged as ever."""
    await take(redis, "a", claim(BUDGET, 5), claim(SLOTS), draft=draft("a"), owner="mayfly")
    clock.advance(ms=20_000)
    lose(redis_server, namespace)
    assert (await redis.heartbeat(ME)).expired == ("a",)
    assert [await level(redis, on) for on in (BUDGET, SLOTS)] == [(5, 0), (0, 0)]


async def test_a_shape_that_nobody_knows_does_not_stop_a_sweep(
    redis: RedisStorage, other: RedisStorage, redis_server: RedisServer, namespace: str, clock: FrozenClock
) -> None:
    """Where no living process knows the shape, the record is kept, what was held stays held, and calls go on."""
    await take(redis, "a", claim(BUDGET, 5), draft=draft("a", cost=5), owner="mayfly")
    clock.advance(ms=20_000)
    lose(redis_server, namespace)
    assert (await other.heartbeat(OTHER)).expired == ("a",)
    assert [(one.call_id, one.outcome) for one in await other.records()] == [("a", "expired")]
    assert await level(other, BUDGET) == (0, 5)
    assert isinstance(await ask(other, "b", claim(meter(WINDOWS["bucket"], 10_000), 1), owner=OTHER), Granted)


async def test_an_export_restores_the_shapes(redis: RedisStorage, redis_server: RedisServer, namespace: str) -> None:
    """Holds are exported though their shape is lost, by a process that knows it."""
    await take(redis, "a", claim(BUDGET, 5), claim(SLOTS))
    before = [line async for line in redis.export()]
    lose(redis_server, namespace)
    assert [line async for line in redis.export()] == before
