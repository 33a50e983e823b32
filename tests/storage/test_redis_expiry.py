"""Every key in Redis ends by itself, and none ends while something hangs on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.servers import RedisServer, unique_namespace
from tests.storage.values import (
    DAY_MS,
    ME,
    OTHER,
    START,
    WINDOWS,
    claim,
    draft,
    level,
    meter,
    record,
    settle,
    sized,
    take,
)

from asgi_llm_guard.claims import Bundle
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Slots

pytestmark = pytest.mark.anyio

MONTH_MS = 30 * DAY_MS


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10, clock=FrozenClock(START))
    yield storage
    await storage.aclose()


def lives(server: RedisServer, namespace: str) -> dict[str, int]:
    """How long each key of the namespace will live, in ms; -1: for ever."""
    keys = server.call("KEYS", f"llmguard1:{{{namespace}}}:*")
    return {key.decode().partition("}:")[2]: server.call("PTTL", key) for key in keys}


async def test_what_was_only_reserved_ends_by_itself(
    redis: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """A process that reserves and dies before its first heartbeat leaves no key without an end."""
    await take(redis, "call", *(claim(meter(window)) for window in WINDOWS.values()), draft=draft("call"))
    left = lives(redis_server, namespace)
    assert {"o", "s", "e", "h:call", f"oh:{ME}"} <= left.keys()
    assert {name: life for name, life in left.items() if life < 0} == {}


async def test_a_long_history_leaves_no_key_without_an_end(redis_server: RedisServer, namespace: str) -> None:
    """After every verb, a sweep, an export and a load, each key has an end, in the copy too."""
    clock = FrozenClock(START)
    redis = RedisStorage(redis_server.url, namespace=namespace, clock=clock, timeout_s=10, max_records=2)
    claims = [claim(meter(sized(window, 100))) for window in WINDOWS.values()]
    for n in range(4):
        await take(redis, f"ended-{n}", *claims, draft=draft(f"ended-{n}"))
        await settle(redis, f"ended-{n}", record=record(f"ended-{n}", 1))
    await take(redis, "open", *claims, draft=draft("open"))
    await redis.amend(OTHER, Bundle("open", tuple(claims[:2]), draft("open")))
    await settle(redis, "never-reserved")
    await redis.reset([one.meter for one in claims])
    await take(redis, "lapses", *claims, draft=draft("lapses"), owner="mayfly")
    clock.advance(ms=20_000)
    assert set((await redis.heartbeat(ME)).expired) == {"lapses", "open"}
    await settle(redis, "lapses", *[2] * len(claims), record=record("lapses", 2))
    await take(redis, "kept", *claims, draft=draft("kept"))
    await redis.retire("nobody")

    elsewhere = unique_namespace()
    copy = RedisStorage(redis_server.url, namespace=elsewhere, clock=clock, timeout_s=10)
    await copy.load([line async for line in redis.export()])
    for name in (namespace, elsewhere):
        left = lives(redis_server, name)
        assert len(left) > len(WINDOWS)
        assert {key: life for key, life in left.items() if not 0 < life <= 400 * DAY_MS + 600_000} == {}
    await redis.aclose()
    await copy.aclose()


async def test_slots_that_are_never_all_free_do_not_end(
    redis: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """A meter of slots that has been busy for a month is not forgotten with the slots that are held."""
    slots = meter(Slots(), 2)
    await take(redis, "first", claim(slots))
    name = f"llmguard1:{{{namespace}}}:c:{slots.key}"
    redis_server.call("PEXPIRE", name, 50_000)  # as it would be after a month
    await take(redis, "second", claim(slots))
    assert redis_server.call("PTTL", name) > MONTH_MS - 60_000
    redis_server.call("PEXPIRE", name, 50_000)
    await settle(redis, "first")
    assert redis_server.call("PTTL", name) > MONTH_MS - 60_000
    await settle(redis, "second")
    assert redis_server.call("EXISTS", name) == 0


async def test_a_bucket_lives_as_long_as_something_is_held(
    redis: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """A call may be open for much longer than its bucket takes to drain; what it holds is known until it ends."""
    bucket = meter(Bucket(1_000, 10), 10)
    await take(redis, "long", claim(bucket, 3))
    name = f"llmguard1:{{{namespace}}}:c:{bucket.key}"
    assert redis_server.call("PTTL", name) > MONTH_MS - 60_000
    await settle(redis, "long", 3)
    assert redis_server.call("PTTL", name) < 700_000, "then only until the bucket is empty, and a while"
    assert await level(redis, bucket) == (3, 0)
