"""Short ways to say what the tests of entries are about."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import Bounds, Entries, InFlight, KeepsEntries, Kept, Leading

CLAIM_MS = 10_000
TTL_MS = 60_000


class Keeping(Storage, KeepsEntries, Protocol):
    """A storage that keeps entries."""


class Store(NamedTuple):
    kind: str
    storage: Keeping


class MakeEntries(Protocol):
    def __call__(self, space: str = "cache", bounds: Bounds | None = None) -> Entries: ...


async def begin(
    entries: Entries, key: str, token: str, *names: str, note: str = "", fresh: bool = False
) -> Kept | Leading | InFlight:
    return await entries.begin(key, token, claim_ms=CLAIM_MS, names=names, note=note, fresh=fresh)


async def keep(entries: Entries, key: str, value: bytes, *names: str, note: str = "", ttl_ms: int = TTL_MS) -> bool:
    """Lead the key and store its value; whether it is kept."""
    token = f"{key}:{value!r}"
    assert isinstance(await begin(entries, key, token, *names, note=note, fresh=True), Leading)
    return await entries.store(key, token, value, ttl_ms=ttl_ms)


async def value_of(entries: Entries, key: str) -> bytes | None:
    kept = await entries.find(key)
    return None if kept is None else kept.value
