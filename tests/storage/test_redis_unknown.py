"""Calls to Redis that are tried more than once, and what the last error has to say of the earlier tries."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import RedisServer
from tests.storage.values import ME, WINDOWS, ask, claim, meter, record, settle, take

from asgi_llm_guard.claims import Bundle, Refused, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.redis import RedisStorage

pytestmark = pytest.mark.anyio

BUDGET = meter(WINDOWS["lifetime"])


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis_server.url) as proxy:
        yield proxy


@pytest.fixture
async def redis(proxy: FaultProxy, namespace: str) -> AsyncIterator[RedisStorage]:
    """Has made all three calls once, so that the scripts are known to the server."""
    storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=10)
    await take(storage, "warm", claim(BUDGET, 2))
    await storage.amend(ME, Bundle("warm", (claim(BUDGET, 1),)))
    await settle(storage, "warm", 0)
    yield storage
    await storage.aclose()


@pytest.fixture
async def witness(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    """The same data, past the proxy."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    yield storage
    await storage.aclose()


def cut_off(proxy: FaultProxy) -> None:
    """The next call is executed, its answer is lost, and no further call can be sent."""
    proxy.refuse()
    proxy.cut_at_reply(of="EVALSHA")


async def test_a_reserve_of_unknown_outcome_stays_unknown_if_its_second_try_is_not_sent(
    proxy: FaultProxy, redis: RedisStorage, witness: RedisStorage
) -> None:
    """C5: a reserve that was executed unheard never fails with `sent` False, or nobody would cancel its hold."""
    cut_off(proxy)
    with pytest.raises(StorageError) as raised:
        await ask(redis, "call", claim(BUDGET, 10))
    assert raised.value.sent

    assert await witness.open_holds() == 1
    assert (await settle(witness, "call")).status == "settled"


async def test_an_amend_of_unknown_outcome_stays_unknown_if_its_second_try_is_not_sent(
    proxy: FaultProxy, redis: RedisStorage, witness: RedisStorage
) -> None:
    """The same for a change of a hold, which may have been made."""
    await take(redis, "call", claim(BUDGET, 10))
    cut_off(proxy)
    with pytest.raises(StorageError) as raised:
        await redis.amend(ME, Bundle("call", (claim(BUDGET, 20),)))
    assert raised.value.sent

    assert (await witness.read([BUDGET]))[0].held == 20


async def test_a_settlement_of_unknown_outcome_stays_unknown_if_its_later_tries_are_not_sent(
    proxy: FaultProxy, redis: RedisStorage, witness: RedisStorage
) -> None:
    """C5: a settlement that was executed unheard says so, so that its duplicate is not taken for another's."""
    await take(redis, "call", claim(BUDGET, 10))
    cut_off(proxy)
    with pytest.raises(StorageError) as raised:
        await redis.settle([Settlement("call", (7,), record("call", 7))])
    assert raised.value.sent

    assert (await settle(witness, "call", 9)).status == "duplicate"
    assert (await witness.read([BUDGET]))[0].used == 7


async def test_settling_nothing_is_answered_with_nothing(storage: Storage) -> None:
    """Rule 10: an empty list of settlements is no error on any storage."""
    assert tuple(await storage.settle(())) == ()


async def test_a_refusal_after_a_lost_try_is_no_refusal(proxy: FaultProxy, redis: RedisStorage) -> None:
    """Where the reply to a first try was lost and the second does not fit, the outcome is unknown: it is to be cancelled."""
    assert isinstance(await ask(redis, "too much", claim(BUDGET, 101)), Refused)
    proxy.cut_at_reply(of="EVALSHA")
    with pytest.raises(StorageError, match="a second try does not fit") as raised:
        await ask(redis, "a", claim(BUDGET, 102))
    assert raised.value.sent
