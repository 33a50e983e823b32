from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.entries.kit import MakeEntries, Store
from tests.storage.conftest import FACTORIES
from tests.storage.values import START

from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import Bounds, Entries, KeepsEntries
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.testing import FrozenClock

KEEPERS = ["memory", "sqlite", "redis", "valkey", "sentinel", "cluster", "sharded"]


def _sharded(clock: FrozenClock) -> ShardedStorage:
    return ShardedStorage([MemoryStorage(clock=clock) for _ in range(3)])


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture(params=KEEPERS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Store]:
    """A storage of one kind, which can keep entries."""
    made: Storage = _sharded(clock) if request.param == "sharded" else FACTORIES[request.param](tmp_path)(clock)
    assert isinstance(made, KeepsEntries)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(made.aclose)
        yield Store(request.param, made)


@pytest.fixture
def entries(store: Store) -> Entries:
    return store.storage.entries("cache")


@pytest.fixture
def make_entries(store: Store) -> MakeEntries:
    """Spaces of one storage, each with bounds of its own."""

    def make(space: str = "cache", bounds: Bounds | None = None) -> Entries:
        return store.storage.entries(space, bounds)

    return make
