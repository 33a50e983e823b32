"""A store that somebody, or something, takes away: no way around the limits."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from tests.decorator.values import USED
from tests.middleware.values import Provider, ask, guarded, new_guard

from asgi_llm_guard import Budget, Iterations, RateLimit
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import OutageStorage

pytestmark = pytest.mark.anyio

CALLERS = 8


async def load(app: Any, storage: OutageStorage, how: str) -> Counter[int]:
    """The statuses of 200 requests, during which the store goes away and comes back twice."""
    statuses: Counter[int] = Counter()

    async def caller() -> None:
        for _ in range(200 // CALLERS):
            if 40 <= statuses.total() < 80 or 120 <= statuses.total() < 160:
                storage.down() if how == "away" else storage.lose_replies()
            else:
                storage.up()
            statuses[(await ask(app)).status] += 1
            await asyncio.sleep(0)

    await asyncio.gather(*[caller() for _ in range(CALLERS)])
    storage.up()
    return statuses


@pytest.mark.parametrize("how", ["away", "silent"])
@pytest.mark.parametrize("breaker", [False, True], ids=["", "breaker"])
async def test_no_paid_call_passes(storage: Storage, how: str, *, breaker: bool) -> None:
    """T21, C7: with the store taken away in the middle of the load, every call that reached the provider is in the ledger."""
    unreliable = OutageStorage(storage, breaker=breaker)
    guard = new_guard(Budget("$100/1d", per="caller"), Iterations(1000), storage=unreliable)
    provider = Provider()
    statuses = await load(guarded(provider, guard), unreliable, how)
    await guard.heartbeat()
    assert statuses.keys() == {200, 503}
    records = await storage.records()
    assert len(records) == len(provider.bodies) == statuses[200]
    assert sum(record.cost_nanousd or 0 for record in records) == len(provider.bodies) * USED
    assert await storage.open_holds() == 0


@pytest.mark.parametrize("how", ["away", "silent"])
async def test_no_more_than_the_allowance(storage: Storage, how: str) -> None:
    """T21, A7: a process that goes on by itself grants at most what was left, through any number of outages, and all is charged."""
    unreliable = OutageStorage(storage)
    guard = new_guard(Iterations(40), RateLimit("150/hour", per="caller"), storage=unreliable)
    provider = Provider()
    statuses = await load(guarded(provider, guard), unreliable, how)
    await guard.heartbeat()
    await guard.heartbeat()
    assert statuses.keys() == {200, 429}
    # A stale number may let one through in each outage, and each change of state is seen by requests under way.
    assert 40 <= len(provider.bodies) <= 40 + 2 + CALLERS
    assert len(await storage.records()) == len(provider.bodies)
    assert await storage.open_holds() == 0


async def test_outage_resets_nothing(storage: Storage) -> None:
    """T21: who has spent a limit has spent it, during the outage and after it, but for the one call of a stale number."""
    unreliable = OutageStorage(storage)
    guard = new_guard(Iterations(5), storage=unreliable)
    provider = Provider()
    app = guarded(provider, guard)
    assert [(await ask(app)).status for _ in range(7)] == [200] * 5 + [429] * 2
    for _ in range(3):
        unreliable.down()
        assert Counter([(await ask(app)).status for _ in range(7)])[200] <= 1
        unreliable.up()
        assert (await ask(app)).status == 429
    assert len(provider.bodies) <= 5 + 3


async def test_no_error_reaches_the_client(storage: Storage) -> None:
    """A store that raises in every operation is a 503, never a 500 or an exception."""
    unreliable = OutageStorage(storage)
    guard = new_guard(Budget("$1/1d", per="caller"), storage=unreliable)
    unreliable.lose_replies()
    exchange = await ask(guarded(Provider(), guard))
    assert (exchange.status, exchange.headers["retry-after"]) == (503, "1")
    with pytest.raises(StorageError):
        await unreliable.open_holds()
