"""Amounts up to 2^53 - 1 are counted to the last unit, as memory counts them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from tests.servers import RedisServer
from tests.storage.values import DAY_MS, HOUR_MS, ME, START, ask, claim, meter, record, state_of

from asgi_llm_guard.claims import Bundle, Granted, Meter, Refused, Settlement
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import SLIDING, Bucket, Calendar, Lifetime, Rolling, Sliding, Slots

pytestmark = pytest.mark.anyio

RATE = 2**52 // DAY_MS
METERS = (
    meter(Lifetime(HOUR_MS), MAX_AMOUNT),
    meter(Rolling(DAY_MS), MAX_AMOUNT),
    meter(Calendar("month"), MAX_AMOUNT),
    meter(Sliding(HOUR_MS, 60), MAX_AMOUNT),
    meter(Slots(), MAX_AMOUNT),
    meter(Bucket(DAY_MS, RATE), RATE),
    meter(Bucket(1, 2**52), 2**52, subject="fast"),
)


NO_SLOTS = b'"policy:nanousd:slots:s",5,0,0,0,0,null'
"""What nobody holds need not be written down."""


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str, clock: FrozenClock) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, clock=clock, timeout_s=10)
    yield storage
    await storage.aclose()


def amount(chance: random.Random, limit: int) -> int:
    """Mostly at an edge."""
    edge = chance.choice((0, limit, limit // 2, limit // 3))
    return min(max(edge + chance.randint(-2, 2), 0), MAX_AMOUNT)


@pytest.mark.parametrize("seed", range(6))
async def test_amounts_at_the_edge_are_counted_as_in_memory(redis: RedisStorage, clock: FrozenClock, seed: int) -> None:
    """Limits, holds, charges, refunds and overdrafts near 2^53 give memory's answers, reading for reading."""
    chance = random.Random(seed)
    memory = MemoryStorage(clock=clock)
    opened: list[str] = []
    for n in range(60):
        clock.advance(ms=chance.choice((0, 0, 1, 999, 60_000)))
        for storage in (memory, redis):
            await storage.heartbeat(ME)
        chosen = chance.sample(METERS, chance.randint(1, 3))
        claims = [claim(on, amount(chance, on.limit or 0)) for on in chosen]
        answers = [await ask(storage, f"call-{n}", *claims) for storage in (memory, redis)]
        assert answers[0] == answers[1], n
        opened.append(f"call-{n}")
        if chance.random() < 0.7:
            # Only what a sliding window is overdrawn by may pass 2^53; all other sums stay there.
            actuals = tuple(
                chance.choice((None, amount(chance, MAX_AMOUNT if on.window.kind != SLIDING else 1_000)))
                for on in chosen
            )
            ended = chance.choice(opened)
            settlement = Settlement(ended, actuals, record(ended, amount(chance, MAX_AMOUNT)))
            replies = [await storage.settle([settlement]) for storage in (memory, redis)]
            assert replies[0] == replies[1], (n, settlement)
        if chance.random() < 0.2:
            bundle = Bundle(chance.choice(opened), tuple(claims))
            answers = [await storage.amend(ME, bundle) for storage in (memory, redis)]
            assert answers[0] == answers[1], n
        if chance.random() < 0.05:
            for storage in (memory, redis):
                await storage.reset([METERS[3]])
        assert await redis.read(METERS) == await memory.read(METERS), n
    states = [[line for line in await state_of(storage) if NO_SLOTS not in line] for storage in (redis, memory)]
    assert states[0] == states[1]


@pytest.mark.parametrize("on", METERS, ids=lambda on: on.window.code)
async def test_the_last_unit_fits_and_not_one_more(redis: RedisStorage, on: Meter) -> None:
    """At the largest limits, what is left is granted whole, and one unit more is refused."""
    most = on.limit or 0
    assert isinstance(await ask(redis, "first", claim(on, most - 3)), Granted)
    assert isinstance(await ask(redis, "above", claim(on, 4)), Refused)
    assert isinstance(await ask(redis, "last", claim(on, 3)), Granted)
    assert isinstance(await ask(redis, "more", claim(on, 1)), Refused)
    (reading,) = await redis.read([on])
    assert reading.used + reading.held == most


@pytest.mark.parametrize("on", METERS[:5], ids=lambda on: on.window.code)
async def test_two_halves_of_all_there_is_are_held_exactly(redis: RedisStorage, on: Meter) -> None:
    """No sum on the way passes 2^53, where it would lose a unit."""
    half = MAX_AMOUNT // 2
    assert isinstance(await ask(redis, "one", claim(on, half)), Granted)
    assert isinstance(await ask(redis, "two", claim(on, MAX_AMOUNT - half)), Granted)
    assert (await redis.read([on]))[0].held == MAX_AMOUNT


def test_what_could_not_be_counted_exactly_is_refused_at_configuration() -> None:
    """Limits of 2^53, and buckets whose units x ms pass 2^52, are configuration errors."""
    with pytest.raises(ConfigurationError):
        meter(Rolling(DAY_MS), MAX_AMOUNT + 1)
    with pytest.raises(ConfigurationError):
        Bucket(DAY_MS, RATE + 1)
    with pytest.raises(ConfigurationError):
        meter(Bucket(DAY_MS, 1), RATE + 1)
