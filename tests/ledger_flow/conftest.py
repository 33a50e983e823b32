from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from tests.servers import shared_cluster, shared_redis, shared_sentinel, shared_valkey, unique_namespace

from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage


class HasUrl(Protocol):
    @property
    def url(self) -> str: ...


SERVERS: dict[str, Callable[[], HasUrl]] = {
    "redis": shared_redis,
    "valkey": shared_valkey,
    "sentinel": shared_sentinel,
    "cluster": shared_cluster,
}

MakeStorage = Callable[..., Storage]


@pytest.fixture(params=["memory", *SERVERS])
async def make_storage(request: pytest.FixtureRequest) -> AsyncIterator[MakeStorage]:
    """Makes storages of one kind that keep streams, and closes them after the test."""
    async with contextlib.AsyncExitStack() as made:

        def make(**options: Any) -> Storage:
            storage: Storage
            if request.param == "memory":
                storage = MemoryStorage(**options)
            else:
                storage = RedisStorage(
                    SERVERS[request.param]().url, namespace=unique_namespace(), timeout_s=10, **options
                )
            made.push_async_callback(storage.aclose)
            return storage

        yield make


@pytest.fixture(params=["redis", "valkey"])
async def make_redis(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., RedisStorage]]:
    """The same, of a single server."""
    async with contextlib.AsyncExitStack() as made:

        def make(url: str | None = None, **options: Any) -> RedisStorage:
            options.setdefault("namespace", unique_namespace())
            storage = RedisStorage(url or SERVERS[request.param]().url, timeout_s=10, **options)
            made.push_async_callback(storage.aclose)
            return storage

        yield make


MakeLedger = Callable[[], Ledger]


@pytest.fixture(params=["sqlite", "postgresql"])
async def make_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MakeLedger]:
    """Opens one database again and again, as several processes do; all are closed after the test."""
    url = f"sqlite:///{tmp_path}/ledger.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    async with contextlib.AsyncExitStack() as opened:

        def make() -> Ledger:
            ledger = Ledger.open(url)
            opened.push_async_callback(ledger.aclose)
            return ledger

        yield make


@pytest.fixture
async def ledger(make_ledger: MakeLedger) -> Ledger:
    return make_ledger()
