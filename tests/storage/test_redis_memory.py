"""What calls cost in the server's memory, and what happens where there is none left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import OwnRedis, RedisServer
from tests.storage.values import DAY_MS, HOUR_MS, ME, START_MS, WINDOWS, ask, claim, level, meter, record, settle, take

from asgi_llm_guard.claims import Granted, Refused
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Distinct, Rolling, Sliding, Slots

pytestmark = pytest.mark.anyio

SIX = (
    meter(Rolling(DAY_MS), 10**12, subject="user-4711", policy="user-budget"),
    meter(Sliding(HOUR_MS, 60), 10**6, subject="user-4711", policy="user-tokens"),
    meter(Bucket(60_000, 600), 600, subject="team-search", policy="team-rate"),
    meter(Slots(), 1_000, subject="team-search", policy="team-slots"),
    meter(WINDOWS["calendar"], 10**12, subject="team-search", policy="team-budget"),
    meter(WINDOWS["lifetime"], 10**12, subject="session-0123456789abcdef", policy="session-budget"),
)


def full(call_id: str) -> UsageRecord:
    """A draft as the guard writes it."""
    return UsageRecord(
        call_id=call_id,
        at_ms=START_MS,
        caller="team-search",
        model="gpt-4o-mini",
        provider="openai",
        user="user-4711",
        session="session-0123456789abcdef",
        estimate_nanousd=12_345_678,
    )


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    yield storage
    await storage.aclose()


def size(server: RedisServer, key: str) -> int:
    found: int = server.call("MEMORY", "USAGE", key, "SAMPLES", 0)
    return found


async def test_a_hold_and_a_tombstone_are_small(redis: RedisStorage, redis_server: RedisServer, namespace: str) -> None:
    """An open hold of six claims with a full draft takes at most 500 bytes, what is left of it at most 200."""
    owner, call_id = "0123456789ab", "0123456789ab-000001"
    await take(redis, call_id, *(claim(on, 1) for on in SIX), owner=owner, draft=full(call_id))
    key = f"llmguard1:{{{namespace}}}:h:{call_id}"
    assert size(redis_server, key) - len(namespace) <= 500
    await settle(redis, call_id, record=full(call_id))
    assert size(redis_server, key) <= 200


async def test_a_user_with_a_session_is_small(redis: RedisStorage, redis_server: RedisServer, namespace: str) -> None:
    """The counters of one more user and session, a budget each and a rate, take at most 750 bytes."""
    for on in (SIX[0], SIX[5], meter(Bucket(60_000, 600), 600, subject="user-4711", policy="user-rate")):
        await take(redis, f"{ME}-{on.policy}", claim(on))
        await settle(redis, f"{ME}-{on.policy}", 1)
    keys = redis_server.call("KEYS", f"llmguard1:{{{namespace}}}:c:*")
    assert len(keys) == 3
    assert sum(size(redis_server, key.decode()) for key in keys) <= 750


async def flood(storage: RedisStorage, ids: Distinct, limit: int, count: int) -> int:
    """So many calls, each with a session of its own; gives how many were granted."""
    sessions = meter(ids, limit)

    async def call(n: int) -> bool:
        answer = await ask(storage, f"{ME}-{n}", claim(sessions, 1, f"session-{n}"), claim(BUDGET, 0))
        if isinstance(answer, Granted):
            await settle(storage, f"{ME}-{n}", None, 0)
        return isinstance(answer, Granted)

    granted = 0
    for first in range(0, count, 500):
        granted += sum(await asyncio.gather(*[call(n) for n in range(first, min(count, first + 500))]))
    return granted


BUDGET = meter(Rolling(DAY_MS), 100)


async def _flooded(server: RedisServer, count: int) -> None:
    storage = RedisStorage(server.url, timeout_s=10)
    await take(storage, "old", claim(meter(Distinct(DAY_MS), 1_000), 1, "the-first"))
    assert await flood(storage, Distinct(DAY_MS), 1_000, count) == 999
    assert server.call("ZCARD", f"llmguard1:{{llm-guard}}:m:{meter(Distinct(DAY_MS)).key}") == 1_000
    assert isinstance(
        await ask(storage, "again", claim(meter(Distinct(DAY_MS), 1_000), 1, "the-first"), claim(BUDGET)), Granted
    )
    assert server.call("DBSIZE") < 1_100
    assert (
        int(
            dict(line.split(":") for line in server.call("INFO", "memory").decode().split() if ":" in line)[
                "used_memory"
            ]
        )
        < 20_000_000
    )
    await storage.aclose()


async def test_a_flood_of_sessions_is_bounded_and_drives_nobody_out(own_redis: OwnRedis) -> None:
    """Made-up session ids stop at the limit, cost no memory beyond it, and the sessions that were there go on."""
    await _flooded(own_redis(), 5_000)


@pytest.mark.slow
async def test_a_million_sessions_are_bounded(own_redis: OwnRedis) -> None:
    """The same with a million of them."""
    await _flooded(own_redis(), 1_000_000)


@pytest.fixture(params=["redis", "valkey"])
async def full_up(
    request: pytest.FixtureRequest, own_redis: OwnRedis
) -> AsyncIterator[tuple[RedisServer, RedisStorage]]:
    """A server without any memory left, and a storage that has an open hold in it."""
    server = own_redis(program=request.param, config=["maxmemory-policy noeviction"])
    storage = RedisStorage(server.url, timeout_s=10)
    await storage.heartbeat(ME)
    await take(storage, "open", claim(BUDGET, 60), claim(SIX[1], 7), draft=full("open"))
    server.call("CONFIG", "SET", "maxmemory", "1")
    yield server, storage
    await storage.aclose()


async def test_without_memory_nothing_is_granted_and_nothing_half_written(
    full_up: tuple[RedisServer, RedisStorage],
) -> None:
    """A reserve or amend that the server has no room for is a `StorageError`, not a refusal, and leaves nothing behind."""
    server, storage = full_up
    before = server.call("DBSIZE"), await level(storage, BUDGET)
    for claims in ((claim(BUDGET, 1),), (claim(meter(Distinct(DAY_MS)), 1, "new"), claim(meter(Slots())))):
        with pytest.raises(StorageError, match="maxmemory"):
            await ask(storage, "next", *claims, draft=full("next"))
    assert (server.call("DBSIZE"), await level(storage, BUDGET)) == before
    server.call("CONFIG", "SET", "maxmemory", "0")
    assert isinstance(await ask(storage, "next", claim(BUDGET, 40)), Granted)
    assert isinstance(await ask(storage, "last", claim(BUDGET, 1)), Refused)


async def test_without_memory_open_calls_are_settled(full_up: tuple[RedisServer, RedisStorage]) -> None:
    """Rule 4: a settlement needs less room than its hold, so a full server takes it, record and all."""
    _, storage = full_up
    assert (await settle(storage, "open", 65, 9, record=record("open", 65))).status == "settled"
    assert await level(storage, BUDGET) == (65, 0)
    assert await level(storage, SIX[1]) == (9, 0)
    assert [one.cost_nanousd for one in await storage.records()] == [65]


async def test_without_memory_heartbeats_go_on_and_the_dead_are_swept(
    full_up: tuple[RedisServer, RedisStorage],
) -> None:
    """A full server keeps the living alive, and charges what retired owners held."""
    _, storage = full_up
    assert (await storage.heartbeat(ME)).owners == 1
    await storage.retire(ME)
    assert await level(storage, BUDGET) == (60, 0)
    assert [one.outcome for one in await storage.records()] == ["expired"]


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        (("maxmemory 100mb", "maxmemory-policy allkeys-lru", "appendonly yes"), "allkeys-lru"),
        (("maxmemory 100mb", "maxmemory-policy volatile-ttl", "appendonly yes"), "volatile-ttl"),
        (("appendonly no", 'save ""'), "neither AOF nor snapshots"),
        (("appendonly no", "save 60 1"), "AOF is off"),
        (("appendonly yes",), None),
    ],
)
async def test_a_server_that_may_forget_is_warned_of_once(
    own_redis: OwnRedis, caplog: pytest.LogCaptureFixture, config: tuple[str, ...], warning: str | None
) -> None:
    """A policy that evicts, or no file, is told once per process, naming what to set; a safe server is not mentioned."""
    server = own_redis(config=config)
    for _ in range(2):
        storage = RedisStorage(server.url, timeout_s=10)
        await take(storage, f"call-{id(storage)}", claim(BUDGET))
        await storage.aclose()
    told = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert len(told) == (warning is not None)
    assert all(warning is not None and warning in message and "set " in message for message in told)


async def test_a_server_that_is_too_old_is_refused_each_time(redis_server: RedisServer, namespace: str) -> None:
    """Redis 6 is named as what it is, by every call, and is never asked to decide."""
    async with FaultProxy(redis_server.url) as proxy:
        proxy.answer(b"$21\r\nredis_version:6.2.14\r\r\n", of="INFO")
        storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=1)
        for n in range(2):
            with pytest.raises(StorageError, match=r"Redis 6\.2\.14; needed is Redis 7|left alone"):
                await ask(storage, f"call-{n}", claim(BUDGET))
        await storage.aclose()
    assert redis_server.call("KEYS", f"*{namespace}*") == []
