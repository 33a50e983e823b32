"""Leases stand between a caller and a storage: what has nothing to do with them, they leave as it is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.storage.conftest import FACTORIES
from tests.storage.test_contract import *  # noqa: F403 - the same tests, with another `make`
from tests.storage.values import Make

from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes storages in memory, each with leases around it: what passes through does so whatever is behind."""
    build = FACTORIES["memory"](tmp_path)
    async with contextlib.AsyncExitStack() as made:

        def keep(clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> Storage:
            storage = LeasingStorage(
                build(clock, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms), clock=clock, tombstone_ms=tombstone_ms
            )
            made.push_async_callback(storage.aclose)
            return storage

        yield keep
