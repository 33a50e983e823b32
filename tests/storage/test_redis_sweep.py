"""A process that dies with thousands of open holds must not stop the server for all others."""

from __future__ import annotations

import asyncio

import pytest
from tests.servers import OwnRedis
from tests.storage.values import ME, OTHER, START, ask, claim, level, meter

from asgi_llm_guard.claims import Granted
from asgi_llm_guard.storage.base import LAPSE_MS
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Rolling

pytestmark = pytest.mark.anyio


async def test_thousands_of_holds_expire_a_thousand_at_a_time(own_redis: OwnRedis) -> None:
    """One heartbeat expires 2,500 holds of a dead process, in steps of at most a thousand, and tells of each once."""
    clock, server, on = FrozenClock(START), own_redis(), meter(Rolling(10**9), 10**6)
    storage = RedisStorage(server.url, clock=clock, timeout_s=20)
    answers = await asyncio.gather(*(ask(storage, f"call-{n}", claim(on, 2), owner=OTHER) for n in range(2_500)))
    assert all(isinstance(answer, Granted) for answer in answers)
    clock.advance(ms=LAPSE_MS)
    server.call("CONFIG", "RESETSTAT")
    beat = await storage.heartbeat(ME)
    assert sorted(beat.expired) == sorted(f"call-{n}" for n in range(2_500))
    assert b"cmdstat_evalsha:calls=3," in server.call("INFO", "commandstats")
    assert await level(storage, on) == (5_000, 0)
    assert (await storage.heartbeat(ME)).expired == ()
    assert await storage.open_holds() == 0
    await storage.aclose()
