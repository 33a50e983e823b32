from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.shared.kit import Sharing
from tests.storage.conftest import FACTORIES
from tests.storage.values import START

from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.storage.shared import KeepsShared, ListsCalls, Shared
from asgi_llm_guard.testing import FrozenClock

KEEPERS = ["memory", "sqlite", "redis", "valkey", "sentinel", "cluster", "sharded", "leasing"]


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture(params=KEEPERS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Sharing]:
    """A storage of one kind, which keeps what processes share."""
    made: Storage
    if request.param == "sharded":
        made = ShardedStorage([MemoryStorage(clock=clock) for _ in range(3)])
    elif request.param == "leasing":
        made = LeasingStorage(MemoryStorage(clock=clock), clock=clock)
    else:
        made = FACTORIES[request.param](tmp_path)(clock)
    assert isinstance(made, KeepsShared)
    assert isinstance(made, ListsCalls)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(made.aclose)
        yield made


@pytest.fixture
def shared(store: Sharing) -> Shared:
    return store.shared()
