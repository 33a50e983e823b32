"""The server's clock decides; calendars that a client works out from its own are worked out again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import RedisServer
from tests.storage.values import HOUR_MS, START_MS, claim, level, meter, record, take

from asgi_llm_guard.claims import Bundle, Granted, Settlement
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Calendar, Rolling

pytestmark = pytest.mark.anyio

MIDNIGHT_MS = START_MS + 16 * HOUR_MS
TODAY = meter(Calendar("day"), 10)


class Wandering:
    """The clock of a store that a client reads before its call goes out, and that has moved on when it arrives."""

    def __init__(self) -> None:
        self.seen = MIDNIGHT_MS - 1
        self.moves: list[int] = []

    def now_ms(self) -> int:
        if self.moves:
            self.seen = self.moves.pop(0)
        return self.seen


@pytest.fixture
def clock() -> Wandering:
    return Wandering()


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str, clock: Wandering) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, clock=clock, timeout_s=10)
    await storage.heartbeat("warm")
    yield storage
    await storage.aclose()


async def test_a_reserve_that_crosses_midnight_counts_today(redis: RedisStorage, clock: Wandering) -> None:
    """Worked out before midnight and judged after it: the claim is taken from the new day, and pinned to it."""
    clock.moves = [MIDNIGHT_MS - 1, MIDNIGHT_MS]
    (receipt,) = await take(redis, "call", claim(TODAY, 3))
    assert (receipt.pin, receipt.resets_at_ms) == (MIDNIGHT_MS, MIDNIGHT_MS + 24 * HOUR_MS)


async def test_an_amend_that_crosses_midnight_counts_today(redis: RedisStorage, clock: Wandering) -> None:
    """The same for a change of another amount: what yesterday holds is given back."""
    await take(redis, "call", claim(TODAY, 3))
    clock.moves = [MIDNIGHT_MS - 1, MIDNIGHT_MS]
    answer = await redis.amend("me", Bundle("call", (claim(TODAY, 4),)))
    assert isinstance(answer, Granted)
    assert answer.receipts[0].pin == MIDNIGHT_MS
    assert await level(redis, TODAY) == (0, 4)


async def test_debits_that_cross_midnight_count_today(redis: RedisStorage, clock: Wandering) -> None:
    """What turned out afterwards is charged to the day it arrives in, once, beside settlements that need no second try."""
    await take(redis, "call", claim(meter(Rolling(HOUR_MS)), 1))
    clock.moves = [MIDNIGHT_MS - 1, MIDNIGHT_MS]
    late = Settlement("late", (), record("late", 5), (), (claim(TODAY, 5),))
    settled = await redis.settle([Settlement("call", (1,)), late])
    assert [one.status for one in settled] == ["settled", "lost"]
    assert (await redis.settle([late]))[0].status == "duplicate"
    assert await level(redis, TODAY) == (5, 0)


async def test_a_reserve_by_a_client_that_is_ahead_counts_yesterday(redis: RedisStorage, clock: Wandering) -> None:
    """A client whose clock says tomorrow already is told that it is still today."""
    clock.moves = [MIDNIGHT_MS, MIDNIGHT_MS - 1]
    (receipt,) = await take(redis, "call", claim(TODAY, 3))
    assert receipt.resets_at_ms == MIDNIGHT_MS


async def test_a_server_whose_clock_is_years_away_decides(redis_server: RedisServer, namespace: str) -> None:
    """A client that is three years off, because the server's clock was set back, gets its calendars right at once."""
    right = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    (expected,) = await take(right, "right", claim(TODAY, 1))
    epoch = redis_server.call("GET", f"llmguard1:{{{namespace}}}:e")
    async with FaultProxy(redis_server.url) as proxy:
        years_ahead = expected.pin + 3 * 365 * 24 * HOUR_MS
        # What the client hears first of the time.
        proxy.answer(b"*2\r\n:%d\r\n$%d\r\n%s\r\n" % (years_ahead, len(epoch), epoch), of="EVALSHA", times=1)
        wrong = RedisStorage(proxy.url, namespace=namespace, timeout_s=10)
        (receipt,) = await take(wrong, "wrong", claim(TODAY, 2))
        assert (receipt.pin, receipt.resets_at_ms, receipt.held) == (expected.pin, expected.resets_at_ms, 1)
        assert await level(right, TODAY) == (0, 3)
        await wrong.aclose()
    await right.aclose()
