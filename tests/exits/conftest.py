"""A stage for every storage: a guard, and a provider that it pays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.exits.kit import BILL, Stage, new_stage
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FakeProvider, FrozenClock


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage
    if request.param == "memory":
        made = MemoryStorage(clock=clock)
    elif request.param == "sqlite":
        made = SqliteStorage(tmp_path / "guard.db", clock=clock)
    else:
        made = RedisStorage(shared_redis().url, namespace=unique_namespace(), clock=clock, timeout_s=10)
    yield made
    await made.aclose()


@pytest.fixture
async def stage(storage: Storage, clock: FrozenClock) -> AsyncIterator[Stage]:
    provider = FakeProvider(prices=BILL)
    async with provider.serve() as base_url:
        stage = new_stage(storage, provider, base_url, clock)
        yield stage
        await stage.guard.aclose()
