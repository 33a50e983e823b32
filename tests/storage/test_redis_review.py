"""What a review of the Redis storage found, each as the smallest history that shows it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest
from tests.servers import RedisServer, unique_namespace
from tests.storage.values import DAY_MS, HOUR_MS, ME, MINUTE_MS, START, claim, level, meter, record, settle, take

from asgi_llm_guard import Context, Guard, Iterations, LimitExceeded
from asgi_llm_guard.claims import Bundle, Granted, Settlement
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.redis_scripts import AMEND, RESERVE, script
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Lifetime, Sliding

pytestmark = pytest.mark.anyio

DAILY = meter(Sliding(DAY_MS, 24), 10)


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str, clock: FrozenClock) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10, clock=clock, lapse_ms=400 * DAY_MS)
    yield storage
    await storage.aclose()


def life_ms(server: RedisServer, namespace: str) -> int:
    return int(server.call("PTTL", f"llmguard1:{{{namespace}}}:c:{DAILY.key}"))


async def test_a_sliding_window_is_kept_until_its_newest_sub_bucket_leaves(
    redis: RedisStorage, redis_server: RedisServer, namespace: str, clock: FrozenClock
) -> None:
    """What was used today is not forgotten when what was used yesterday leaves: not after a reset, nor in a copy."""
    await take(redis, "first", claim(DAILY, 1))
    await settle(redis, "first", 1)
    clock.advance(ms=20 * HOUR_MS)
    await take(redis, "second", claim(DAILY, 9))
    assert life_ms(redis_server, namespace) > DAY_MS

    elsewhere = unique_namespace()
    copy = RedisStorage(redis_server.url, namespace=elsewhere, clock=clock, timeout_s=10)
    await copy.load([line async for line in redis.export()])
    assert life_ms(redis_server, elsewhere) > DAY_MS
    await copy.aclose()

    clock.advance(ms=HOUR_MS)
    await take(redis, "third", claim(DAILY, 0))
    await redis.reset([DAILY])
    assert life_ms(redis_server, namespace) > DAY_MS


async def test_memory_too_keeps_a_sliding_window_until_its_newest_sub_bucket_leaves(clock: FrozenClock) -> None:
    """A rate of ten a day is not granted twice because other meters came into use after the first sub-bucket left."""
    memory = MemoryStorage(clock=clock)
    await take(memory, "first", claim(DAILY, 1))
    await settle(memory, "first", 1)
    clock.advance(ms=20 * HOUR_MS)
    await take(memory, "second", claim(DAILY, 9))
    await settle(memory, "second", 9)
    clock.advance(ms=5 * HOUR_MS + 20 * MINUTE_MS)
    for n in range(3):
        await take(memory, f"other-{n}", claim(meter(Sliding(DAY_MS, 24), subject=f"other-{n}")))
    assert await level(memory, DAILY) == (9, 0)

    clock.advance(ms=20 * HOUR_MS)
    assert await level(memory, DAILY) == (0, 0)
    await memory.aclose()


async def test_a_settlement_that_is_sent_again_is_still_before_later_reserves(
    redis: RedisStorage, redis_server: RedisServer
) -> None:
    """Rule 8: a call is not refused because of a hold whose settlement found its script gone, though the call's was there."""
    slot = meter(Lifetime(HOUR_MS), 1)
    await take(redis, "first", claim(slot))
    await take(redis, "other", claim(DAILY))
    redis_server.call("SCRIPT", "FLUSH")
    for parts in (RESERVE, AMEND):  # as if another client had loaded these in between
        redis_server.call("SCRIPT", "LOAD", script(parts).text)
    settled = redis.settle([Settlement("first", (0,))])
    await take(redis, "second", claim(slot))
    assert (await settled)[0].status == "settled"

    redis_server.call("SCRIPT", "FLUSH")
    redis_server.call("SCRIPT", "LOAD", script(AMEND).text)
    settled = redis.settle([Settlement("second", (0,))])
    assert isinstance(await redis.amend(ME, Bundle("other", (claim(slot),))), Granted)
    assert (await settled)[0].status == "settled"


def test_a_busy_loop_keeps_others_waiting_once_however_much_it_has_handed_over(
    redis_server: RedisServer, namespace: str
) -> None:
    """What a busy loop has sent and not heard of is settled here after one timeout, not after one for each."""
    timeout_s, many = 0.5, 40
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=timeout_s)
    busy, released = threading.Event(), threading.Event()

    async def main() -> None:
        for n in range(many):
            await take(storage, f"call-{n}", claim(DAILY, 0))
        for n in range(many):
            storage.settle([Settlement(f"call-{n}", (0,))])
        busy.set()
        released.wait(60)  # in the loop itself

    async def timed() -> float:
        before_s = monotonic()
        await take(storage, "next", claim(DAILY, 1))
        return monotonic() - before_s

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(asyncio.run, main())
        busy.wait(60)
        try:
            assert asyncio.run(timed()) < many * timeout_s / 2
        finally:
            released.set()
        running.result(20)
    asyncio.run(storage.aclose())


async def test_a_plan_without_bundles_is_granted(storage: Storage) -> None:
    """Nothing fits always, on every storage, and fails nobody who is asked for in the same step."""
    nothing, something = await asyncio.gather(
        storage.reserve(ME, ((),)), storage.reserve(ME, ((Bundle("call", (claim(DAILY),)),),))
    )
    assert isinstance(nothing, Granted)
    assert nothing.receipts == ()
    assert isinstance(something, Granted)


async def test_a_record_settles_its_call_within_the_same_step(storage: Storage) -> None:
    """A call id that the ledger has got from a settlement just before is settled: one record, whatever comes of it."""
    settled = await storage.settle(
        (Settlement("attempt", (), record("call", 1)), Settlement("call", (), record("call", 2)))
    )
    assert [one.status for one in settled] == ["lost", "duplicate"]
    assert [one.cost_nanousd for one in await storage.records()] == [1]


async def test_of_two_settlements_of_one_lost_hold_the_first_wins(storage: Storage) -> None:
    """One that has to be sent once more, with its receipts, is not overtaken by a later one of the same call."""
    receipts = await take(storage, "twin", claim(DAILY, 3))
    await settle(storage, "twin", 0)
    settled = await storage.settle(
        (
            Settlement("call", (5,), record("call", 5), receipts),
            Settlement("call", ()),
            Settlement("call", (7,), record("call", 7), receipts),
        )
    )
    assert [(one.status, one.overages) for one in settled] == [("lost", (2,)), ("duplicate", ()), ("duplicate", ())]
    assert await level(storage, DAILY) == (5, 0)


async def test_a_process_that_is_not_asked_is_ready_once_another_has_accepted_the_loss(
    redis_server: RedisServer, namespace: str
) -> None:
    """A balancer that leaves a process alone until it is ready hears of it by the next heartbeat, and not only by a call."""
    guards = [Guard([Iterations(5)], storage=f"{redis_server.url}?namespace={namespace}&timeout=10") for _ in range(2)]
    for guard in guards:
        async with guard.open(Context(caller="ada", session="s")), guard.call(model="m"):
            pass
    redis_server.call("DEL", f"llmguard1:{{{namespace}}}:e")
    for guard in guards:
        with pytest.raises(LimitExceeded):
            async with guard.open(Context(caller="ada", session="s")), guard.call(model="m"):
                pass
    await guards[1].heartbeat()
    assert not guards[1].ready, "nobody has accepted anything"
    await guards[0].accept_data_loss()
    await guards[1].heartbeat()
    assert guards[1].ready
    for guard in guards:
        await guard.aclose()
