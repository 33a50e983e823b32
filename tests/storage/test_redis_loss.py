"""A store that was flushed or put back is not taken for a fresh one: nobody is granted anything until the loss is accepted."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
from tests.servers import OwnRedis, RedisServer
from tests.storage.values import DAY_MS, ME, OTHER, START, ask, claim, level, meter, record, settle, take

from asgi_llm_guard.claims import Bundle, Ended, Granted
from asgi_llm_guard.errors import DataLost
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Rolling

pytestmark = pytest.mark.anyio

BUDGET = meter(Rolling(DAY_MS), 100)


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture
def server(own_redis: OwnRedis) -> RedisServer:
    return own_redis(appendonly=True)


@pytest.fixture
async def one(server: RedisServer, clock: FrozenClock) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(server.url, clock=clock, timeout_s=5)
    yield storage
    await storage.aclose()


@pytest.fixture
async def other(server: RedisServer, clock: FrozenClock) -> AsyncIterator[RedisStorage]:
    """Another process."""
    storage = RedisStorage(server.url, clock=clock, timeout_s=5)
    yield storage
    await storage.aclose()


def lose(server: RedisServer, how: str) -> None:
    if how == "SCAN":  # somebody's clean-up of keys
        server.call("DEL", *server.call("KEYS", "llmguard1:*"))
    else:
        server.call(how)


@pytest.mark.parametrize("how", ["FLUSHALL", "FLUSHDB", "SCAN"])
async def test_a_flushed_store_grants_nothing_and_charges_what_was_used(
    one: RedisStorage, server: RedisServer, how: str
) -> None:
    """After a flush `reserve` and `amend` raise, until it is accepted; open calls are charged by their receipts, once."""
    receipts = await take(one, "open", claim(BUDGET, 60))
    lose(server, how)
    for _ in range(2):
        with pytest.raises(DataLost, match="flushed"):
            await ask(one, "next", claim(BUDGET, 1))
        with pytest.raises(DataLost):
            await one.amend(ME, Bundle("open", (claim(BUDGET, 70),)))
    assert (await settle(one, "open", 65, record=record("open", 65), receipts=receipts)).status == "lost"
    assert (await settle(one, "open", 65, record=record("open", 65), receipts=receipts)).status == "duplicate"
    epoch = one.epoch
    await one.accept_loss()
    assert one.epoch != epoch
    assert await level(one, BUDGET) == (65, 0)
    assert len(await one.records()) == 1
    assert isinstance(await ask(one, "open", claim(BUDGET, 1)), Ended)
    assert isinstance(await ask(one, "next", claim(BUDGET, 35)), Granted)


async def test_what_one_accepts_the_others_follow(
    one: RedisStorage, other: RedisStorage, server: RedisServer, clock: FrozenClock
) -> None:
    """A process that has not seen the loss goes on at once, one that has refused calls with its next heartbeat."""
    unaware = RedisStorage(server.url, clock=clock, timeout_s=5)
    for storage in (one, other, unaware):
        await storage.heartbeat(ME)
        assert isinstance(await ask(storage, f"warm-{storage is one}-{storage is other}", claim(BUDGET, 1)), Granted)
    server.flush()
    for storage in (one, other):
        with pytest.raises(DataLost):
            await ask(storage, "next", claim(BUDGET, 1))
    await one.accept_loss()
    assert isinstance(await ask(unaware, "unaware", claim(BUDGET, 1)), Granted)
    clock.advance(ms=5_000)
    await other.heartbeat(OTHER)
    assert other.epoch == one.epoch == unaware.epoch
    assert isinstance(await ask(other, "other", claim(BUDGET, 1)), Granted)
    await unaware.aclose()


async def test_a_second_loss_is_noticed_after_the_first_was_accepted(one: RedisStorage, server: RedisServer) -> None:
    """Accepting one loss accepts no other."""
    for n in range(3):
        await take(one, f"call-{n}", claim(BUDGET, 1))
        server.flush()
        with pytest.raises(DataLost):
            await ask(one, f"next-{n}", claim(BUDGET, 1))
        await one.accept_loss()


async def test_a_new_process_after_a_flush_does_not_hide_it_from_others(
    one: RedisStorage, other: RedisStorage, server: RedisServer
) -> None:
    """A process that starts on the flushed store sees a fresh one; those that ran before still notice."""
    await take(one, "open", claim(BUDGET, 60))
    server.flush()
    assert isinstance(await ask(other, "fresh", claim(BUDGET, 1), owner=OTHER), Granted)
    with pytest.raises(DataLost):
        await ask(one, "next", claim(BUDGET, 1))
    await one.accept_loss()
    assert isinstance(await ask(one, "next", claim(BUDGET, 1)), Granted)
    assert isinstance(await ask(other, "goes-on", claim(BUDGET, 1), owner=OTHER), Granted)


async def test_an_older_copy_is_no_truth(server: RedisServer, one: RedisStorage, clock: FrozenClock) -> None:
    """A store that was stopped and started with its files of a minute ago is noticed by whoever saw it since."""
    await take(one, "early", claim(BUDGET, 10))
    await settle(one, "early", 10)
    await one.heartbeat(ME)
    shutil.copytree(server.folder / "appendonlydir", server.folder / "backup")
    clock.advance(ms=60_000)
    await one.heartbeat(ME)
    await take(one, "late", claim(BUDGET, 80))
    await settle(one, "late", 80)
    server.stop()
    shutil.rmtree(server.folder / "appendonlydir")
    shutil.copytree(server.folder / "backup", server.folder / "appendonlydir")
    server.start()
    with pytest.raises(DataLost, match="older copy"):
        await ask(one, "next", claim(BUDGET, 50))
    await one.accept_loss()
    assert await level(one, BUDGET) == (10, 0)
    assert isinstance(await ask(one, "next", claim(BUDGET, 50)), Granted)
    await one.heartbeat(ME)
    assert isinstance(await ask(one, "after", claim(BUDGET, 1)), Granted)


async def test_a_restart_that_loses_nothing_is_none(server: RedisServer, one: RedisStorage) -> None:
    """With a file that is written for each call, a killed server comes back with everything, and nobody complains."""
    await take(one, "open", claim(BUDGET, 60))
    server.restart()
    assert isinstance(await ask(one, "next", claim(BUDGET, 40)), Granted)
    assert (await settle(one, "open", 50)).status == "settled"
    assert await level(one, BUDGET) == (50, 40)


async def test_scripts_that_the_server_forgot_are_loaded_again(one: RedisStorage, server: RedisServer) -> None:
    """SCRIPT FLUSH in the midst of calls is noticed by nobody."""
    for n in range(5):
        server.call("SCRIPT", "FLUSH")
        await take(one, f"call-{n}", claim(BUDGET, 1))
        server.call("SCRIPT", "FLUSH")
        assert (await settle(one, f"call-{n}", 1)).status == "settled"
    assert await level(one, BUDGET) == (5, 0)


async def test_accepting_where_nothing_was_lost_changes_nothing(one: RedisStorage) -> None:
    """`accept_loss` on healthy data is harmless."""
    await take(one, "open", claim(BUDGET, 60))
    epoch = one.epoch
    await one.accept_loss()
    assert one.epoch == epoch
    assert await level(one, BUDGET) == (0, 60)
