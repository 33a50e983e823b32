"""A stage in memory: a guard, and a provider that it pays."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.exits.kit import BILL, Stage, new_stage
from tests.hooks.kit import WAYS, Way

from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FakeProvider, FrozenClock


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    way: Way = request.param
    return way


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    clock = FrozenClock(1_800_000_000_000)
    storage = MemoryStorage(clock=clock)
    provider = FakeProvider(prices=BILL)
    async with provider.serve() as base_url:
        stage = new_stage(storage, provider, base_url, clock)
        yield stage
        await stage.guard.aclose()
    await storage.aclose()


@pytest.fixture
async def offline() -> AsyncIterator[Stage]:
    """As `stage`, without a server: what is asked is answered by a handler of the test's own."""
    clock = FrozenClock(1_800_000_000_000)
    storage = MemoryStorage(clock=clock)
    stage = new_stage(storage, FakeProvider(prices=BILL), "http://llm/v1", clock)
    yield stage
    await stage.guard.aclose()
    await storage.aclose()
