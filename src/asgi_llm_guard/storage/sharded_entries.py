"""Entries over several storages: each key lies in one of them; see `entries.py`."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from asgi_llm_guard.storage.entries import Bounds, Entries, InFlight, Kept, Leading

__all__ = ["ShardedEntries"]


class ShardedEntries:
    """One space in all shards. An epoch ends in each of them; what is kept is bounded in each of them."""

    def __init__(self, shards: Sequence[Entries]) -> None:
        self._shards = tuple(shards)

    @property
    def bounds(self) -> Bounds:
        return self._shards[0].bounds

    def _of(self, key: str) -> Entries:
        return self._shards[zlib.crc32(key.encode()) % len(self._shards)]

    async def find(self, key: str) -> Kept | None:
        return await self._of(key).find(key)

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        return await self._of(key).begin(key, token, claim_ms=claim_ms, names=names, note=note, fresh=fresh)

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        return await self._of(key).prolong(key, token, claim_ms=claim_ms)

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        return await self._of(key).store(key, token, value, ttl_ms=ttl_ms)

    async def abandon(self, key: str, token: str) -> None:
        await self._of(key).abandon(key, token)

    async def forget(self, key: str) -> None:
        await self._of(key).forget(key)

    async def bump(self, name: str) -> None:
        """End the epoch in every shard. It may be repeated where some of them did not answer.

        Raises:
            StorageError: at least one of them did not; in the others it has ended.
        """
        answers = await asyncio.gather(*[shard.bump(name) for shard in self._shards], return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
