"""A store of every kind, and workers that share it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from tests.middleware.asgi import App
from tests.middleware.values import CHAT, new_guard
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard import GuardMiddleware, Route
from asgi_llm_guard.identity import TrustedHeaders
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

IDENTITY = TrustedHeaders(trust_headers=True, caller="x-caller", user="x-user")
ROUTES = (Route(CHAT, idempotency=True),)


class Serve(Protocol):
    """Guards an application, as one more worker on the same store."""

    def __call__(
        self, app: App, *policies: Policy, routes: Sequence[Route] = ROUTES, storage: Storage | None = None
    ) -> GuardMiddleware: ...


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def serve(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Serve]:
    """In memory there is one store of one worker, which all share."""
    memory, namespace = MemoryStorage(clock=clock), unique_namespace()
    async with contextlib.AsyncExitStack() as stack:

        def connected() -> Storage:
            if request.param == "memory":
                return memory
            if request.param == "sqlite":
                return SqliteStorage(tmp_path / "guard.db", clock=clock)
            return RedisStorage(shared_redis().url, namespace=namespace, clock=clock, timeout_s=10)

        def served(
            app: App, *policies: Policy, routes: Sequence[Route] = ROUTES, storage: Storage | None = None
        ) -> GuardMiddleware:
            guard = new_guard(*policies, storage=storage or connected(), clock=clock, identity=IDENTITY)
            stack.push_async_callback(guard.aclose)
            return GuardMiddleware(app, guard, routes=routes)

        yield served
