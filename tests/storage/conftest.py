from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import pytest
from tests.servers import shared_cluster, shared_redis, shared_sentinel, shared_valkey, unique_namespace
from tests.storage.values import DAY_MS, START, Make

from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock


class HasUrl(Protocol):
    @property
    def url(self) -> str: ...


def _memory(_folder: Path) -> Make:
    def make(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
        return MemoryStorage(clock=clock, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms)

    return make


def _sqlite(folder: Path) -> Make:
    numbers = itertools.count()

    def make(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
        path = folder / f"guard-{next(numbers)}.db"
        return SqliteStorage(path, clock=clock, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms)

    return make


def _redis(servers: Callable[[], HasUrl]) -> Callable[[Path], Make]:
    """On servers that the first test starts, and all tests share; each storage has a namespace of its own."""

    def factory(_folder: Path) -> Make:
        def make(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
            return RedisStorage(
                servers().url,
                namespace=unique_namespace(),
                clock=clock,
                lapse_ms=lapse_ms,
                tombstone_ms=tombstone_ms,
                timeout_s=10,  # these tests are about answers, and machines that run tests are busy
            )

        return make

    return factory


# Every storage that keeps the contract joins here.
FACTORIES: dict[str, Callable[[Path], Make]] = {
    "memory": _memory,
    "sqlite": _sqlite,
    "redis": _redis(shared_redis),
    "valkey": _redis(shared_valkey),
    "sentinel": _redis(shared_sentinel),
    "cluster": _redis(shared_cluster),
}


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture(params=sorted(FACTORIES))
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes storages of one kind, and closes them after the test."""
    build = FACTORIES[request.param](tmp_path)
    async with contextlib.AsyncExitStack() as made:

        def keep(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
            storage = build(clock, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms)
            made.push_async_callback(storage.aclose)
            return storage

        yield keep


@pytest.fixture
async def storage(make: Make, clock: FrozenClock) -> Storage:
    """A storage no owner of which lapses while a test moves the clock."""
    return make(clock, lapse_ms=400 * DAY_MS)


@pytest.fixture
async def mortal(make: Make, clock: FrozenClock) -> Storage:
    """A storage whose owners lapse as they do in service."""
    return make(clock)
