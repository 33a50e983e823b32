"""A plan of one shard is one trip there: with all meters in one of several shards, the contract is that of the shard."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.storage.conftest import FACTORIES
from tests.storage.test_contract import *  # noqa: F403 - the same tests, with another `make`
from tests.storage.values import Make

from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes storages of three shards in memory, all of whose meters lie in the second one."""
    build = FACTORIES["memory"](tmp_path)
    async with contextlib.AsyncExitStack() as made:

        def keep(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
            shards = [build(clock, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms) for _ in range(3)]
            storage = ShardedStorage(shards, place=lambda _: 1)
            made.push_async_callback(storage.aclose)
            return storage

        yield keep
