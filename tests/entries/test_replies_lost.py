"""Entries in Redis while connections break: every operation is done once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.entries.kit import TTL_MS, begin, keep, value_of
from tests.fault_proxy import FaultProxy
from tests.servers import RedisServer

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.entries import Entries, InFlight, Kept, Leading
from asgi_llm_guard.storage.redis import RedisStorage

pytestmark = pytest.mark.anyio


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis_server.url) as proxy:
        yield proxy


@pytest.fixture
async def entries(proxy: FaultProxy, namespace: str) -> AsyncIterator[Entries]:
    """Has been used once, so that the server knows the script."""
    storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=2)
    entries = storage.entries("cache")
    await entries.find("warm")
    yield entries
    proxy.heal()
    await storage.aclose()


@pytest.mark.parametrize("executed", [True, False])
async def test_what_breaks_once_is_done_once(proxy: FaultProxy, entries: Entries, *, executed: bool) -> None:
    """T8: a connection that breaks before or after an operation is executed changes no answer: who leads, leads, and
    what was stored is stored."""
    cut = proxy.cut_at_reply if executed else proxy.cut_at_request
    cut(of="EVALSHA")
    assert await begin(entries, "k", "a", "n") == Leading()
    assert isinstance(await begin(entries, "k", "b", "n"), InFlight)
    cut(of="EVALSHA")
    assert await entries.prolong("k", "a", claim_ms=TTL_MS)
    cut(of="EVALSHA")
    assert await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    cut(of="EVALSHA")
    assert await value_of(entries, "k") == b"v"
    cut(of="EVALSHA")
    await entries.bump("n")
    assert await value_of(entries, "k") is None
    await begin(entries, "k", "c", "n")
    cut(of="EVALSHA")
    await entries.abandon("k", "c")
    assert await keep(entries, "k", b"w", "n")
    cut(of="EVALSHA")
    await entries.forget("k")
    assert await begin(entries, "k", "d", "n") == Leading()
    assert proxy.counts.cuts == 7


async def test_a_server_that_is_away_is_told(proxy: FaultProxy, entries: Entries) -> None:
    """An operation that does not reach the server raises, and leaves what there is."""
    await keep(entries, "k", b"v")
    proxy.refuse()
    proxy.cut()
    with pytest.raises(StorageError):
        await entries.find("k")
    with pytest.raises(StorageError):
        await begin(entries, "k", "a")
    with pytest.raises(StorageError):
        await entries.store("k", "a", b"w", ttl_ms=TTL_MS)
    with pytest.raises(StorageError):
        await entries.forget("k")
    proxy.heal()
    found = await _once_back(entries)
    assert isinstance(found, Kept)
    assert found.value == b"v"


async def _once_back(entries: Entries) -> object:
    """Ask until the link has found the server again: it does so by itself, within seconds."""
    while True:
        try:
            return await begin(entries, "k", "b")
        except StorageError:
            await asyncio.sleep(0.01)
