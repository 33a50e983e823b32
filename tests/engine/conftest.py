"""Guards over every storage, with a clock that the test moves and prices that are easy to add up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_llm_guard import Guard
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

NewGuard = Callable[..., Guard]

#: $1 per million tokens in, $2 per million out: 1,000 and 2,000 nano-USD a token.
PRICES = PriceBook.snapshot(overrides={"openai/test-model": {"input": 1, "output": 2}})


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = (
        MemoryStorage(clock=clock) if request.param == "memory" else SqliteStorage(tmp_path / "guard.db", clock=clock)
    )
    yield made
    await made.aclose()


@pytest.fixture
def new_guard(storage: Storage, clock: FrozenClock) -> NewGuard:
    """Makes a guard over the storage of the test."""

    def make(*policies: Any, **options: Any) -> Guard:
        return Guard(policies, storage=storage, clock=clock, **{"prices": PRICES, **options})

    return make
