"""What goes out together is decided one by one, as if each had come alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from tests.servers import OwnRedis, RedisServer
from tests.storage.values import (
    DAY_MS,
    ME,
    OTHER,
    START,
    WINDOWS,
    ask,
    claim,
    draft,
    level,
    meter,
    record,
    settle,
    sized,
    state_of,
    take,
)

from asgi_llm_guard.claims import Bundle, Claim, Granted, Refused, Settlement
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Distinct, Rolling, Slots

pytestmark = pytest.mark.anyio

BUDGET = meter(Rolling(DAY_MS), 100)


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10, clock=FrozenClock(START))
    yield storage
    await storage.aclose()


def script_calls(server: RedisServer) -> int:
    lines = server.call("INFO", "commandstats").decode().splitlines()
    (line,) = [line for line in lines if line.startswith("cmdstat_evalsha:")]
    return int(line.partition("calls=")[2].partition(",")[0])


async def test_five_hundred_at_once_get_exactly_what_there_is_in_few_calls(own_redis: OwnRedis) -> None:
    """A4: of 500 reserves at once on a limit of 100 exactly 100 are granted, by some thirty calls of the store."""
    server = own_redis()
    storage = RedisStorage(server.url, timeout_s=10)
    await storage.heartbeat(ME)
    await level(storage, BUDGET)
    before = script_calls(server)
    answers = await asyncio.gather(*[ask(storage, f"call-{n}", claim(BUDGET)) for n in range(500)])
    assert sum(isinstance(answer, Granted) for answer in answers) == 100
    assert script_calls(server) - before <= 40
    before = script_calls(server)
    granted = [n for n, answer in enumerate(answers) if isinstance(answer, Granted)]
    await asyncio.gather(*[settle(storage, f"call-{n}", 1) for n in granted])
    assert script_calls(server) - before <= 10
    assert await level(storage, BUDGET) == (100, 0)
    await storage.aclose()


@pytest.mark.parametrize("seed", range(6))
async def test_batches_give_the_answers_of_single_calls(redis: RedisStorage, seed: int) -> None:
    """Rule 10: plans and settlements that share script calls get the answers, and leave the state, of memory one by one."""
    chance = random.Random(seed)
    memory = MemoryStorage(clock=FrozenClock(START))
    meters = [
        meter(sized(window, limit), limit, subject=subject, enforce=chance.random() < 0.8)
        for window in WINDOWS.values()
        for subject, limit in (("a", 7), ("b:{%}", 40))
    ]
    opened: list[str] = []
    await redis.reset(meters[:1])  # connects
    await redis.heartbeat(ME)
    await memory.heartbeat(ME)

    def plans(n: int) -> tuple[tuple[Bundle, ...], ...]:
        def bundle(call_id: str) -> Bundle:
            return Bundle(call_id, claims(), draft(call_id) if chance.random() < 0.5 else None)

        def claims() -> tuple[Claim, ...]:
            chosen = chance.sample(meters, chance.randint(1, 4))
            return tuple(
                claim(on, chance.randint(0, 4), f"id-{chance.randint(0, 9)}")
                if isinstance(on.window, Distinct)
                else claim(on, chance.randint(0, 4))
                for on in chosen
            )

        opened.append(f"call-{n}")
        return tuple((bundle(f"call-{n}"),) for _ in range(chance.choice((1, 1, 2))))

    async def alike(work: list[tuple[str, object]]) -> None:
        here = [await _do(memory, what, given) for what, given in work]
        there = await asyncio.gather(*[_do(redis, what, given) for what, given in work])
        assert there == here

    for turn in range(12):
        first = turn * 20
        await alike([("reserve", plans(n)) for n in range(first, first + 20)])
        ended = chance.sample(opened, min(len(opened), 15))
        await alike(
            [
                (
                    "settle",
                    Settlement(
                        call_id, tuple(chance.randint(0, 6) for _ in range(chance.randint(0, 2))), record(call_id, 1)
                    ),
                )
                for call_id in ended
            ]
        )
    assert await state_of(redis) == await state_of(memory)


async def _do(storage: Storage, what: str, given: object) -> object:
    if what == "reserve":
        return await storage.reserve(ME, given)  # type: ignore[arg-type]
    return await storage.settle([given])  # type: ignore[list-item]


async def test_a_bad_request_among_good_ones_harms_nobody(redis: RedisStorage) -> None:
    """Requests that cannot be sent raise, each for itself, and those of the same turn are granted."""
    twice = (claim(BUDGET), claim(BUDGET))
    no_id = (Claim(meter(Distinct(DAY_MS)), 1),)
    no_text = (claim(meter(Slots(), subject="\ud800")),)
    work = [ask(redis, f"good-{n}", claim(BUDGET)) for n in range(20)]
    bad = [redis.reserve(ME, ((Bundle(f"bad-{n}", claims),),)) for n, claims in enumerate((twice, no_id, no_text))]
    bad.append(redis.reserve(ME, ()))
    bad.append(redis.reserve(ME, ((Bundle("same", (claim(BUDGET),)), Bundle("same", ())),)))
    answers = await asyncio.gather(*work[:10], *bad, *work[10:], return_exceptions=True)
    assert [isinstance(answer, ValueError) for answer in answers] == [False] * 10 + [True] * 5 + [False] * 10
    assert sum(isinstance(answer, Granted) for answer in answers) == 20
    await take(redis, "one", claim(BUDGET))
    mixed = redis.reserve(ME, ((Bundle("one", (claim(BUDGET),)), Bundle("two", (claim(meter(Slots())),))),))
    raised, beside = await asyncio.gather(mixed, ask(redis, "beside", claim(BUDGET)), return_exceptions=True)
    assert isinstance(raised, ValueError)
    assert isinstance(beside, Granted)
    assert await level(redis, BUDGET) == (0, 22)


async def test_a_caller_that_is_cancelled_before_it_was_sent_takes_nothing(redis: RedisStorage) -> None:
    """Of what gathers in one turn, the cancelled ones are left out, and their neighbours get theirs."""
    await redis.open_holds()
    calls = [asyncio.create_task(ask(redis, f"call-{n}", claim(BUDGET))) for n in range(200)]
    await asyncio.sleep(0)
    for n in range(0, 200, 2):
        calls[n].cancel()
    await asyncio.wait(calls)
    assert all(call.cancelled() for call in calls[::2])
    await redis.settle([Settlement(f"call-{n}", ()) for n in range(0, 200, 2)])
    granted = sum(isinstance(call.result(), Granted) for call in calls[1::2])
    assert await level(redis, BUDGET) == (0, granted)
    assert granted >= 100 - 2 * 16 * 6, "those that were sent stood in nobody's way for longer than they lived"


async def test_a_settlement_of_thousands_is_one_step(redis: RedisStorage) -> None:
    """What is handed over together is settled together, however much it is."""
    count = 9_000
    settled = await redis.settle([Settlement(f"call-{n}", (), record(f"call-{n}", 1)) for n in range(count)])
    assert {one.status for one in settled} == {"lost"}
    again = await redis.settle([Settlement(f"call-{n}", ()) for n in range(count)])
    assert {one.status for one in again} == {"duplicate"}
    assert len(await redis.records()) == count


async def test_a_call_with_many_claims_is_one_step(redis: RedisStorage) -> None:
    """Hundreds of claims fit into one plan, are swept, and can be settled."""
    many = [meter(Rolling(DAY_MS), subject=f"s{n}") for n in range(600)]
    await take(redis, "call", *(claim(on, 2) for on in many), owner=OTHER, draft=draft("call"))
    assert (await settle(redis, "call", *[1] * 600)).status == "settled"
    assert {(one.used, one.held) for one in await redis.read(many)} == {(1, 0)}


async def test_the_order_of_what_was_handed_over_is_the_order_of_what_happens(redis: RedisStorage) -> None:
    """Rule 8: a budget that passes from call to call without anybody waiting for a settlement is granted each time."""
    whole = claim(BUDGET, 100)
    for n in range(100):
        assert isinstance(await ask(redis, f"call-{n}", whole), Granted), n
        waiting = asyncio.create_task(ask(redis, f"too-early-{n}", whole))
        await asyncio.sleep(0)
        redis.settle([Settlement(f"call-{n}", (0,))])
        answer = await waiting
        if isinstance(answer, Granted):
            redis.settle([Settlement(f"too-early-{n}", ())])
        else:
            assert isinstance(answer, Refused)
