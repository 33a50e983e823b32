"""A stage for every storage, as in `tests.exits`, whose client is closed at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.exits.conftest import clock, storage
from tests.exits.kit import BILL, Stage, new_stage

from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import FakeProvider, FrozenClock

__all__ = ["clock", "stage", "storage"]


@pytest.fixture
async def stage(storage: Storage, clock: FrozenClock) -> AsyncIterator[Stage]:
    provider = FakeProvider(prices=BILL)
    async with provider.serve() as base_url:
        stage = new_stage(storage, provider, base_url, clock)
        yield stage
        await stage.guard.aclose()
        for client in stage.clients.values():
            await client.aclose()
