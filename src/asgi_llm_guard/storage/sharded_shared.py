"""Documents, tallies and marks over several storages: each name lies in one of them; see `shared.py`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from asgi_llm_guard.storage.shared import Document, Shared, Tally

__all__ = ["ShardedShared"]


class ShardedShared:
    """What processes share, in all shards."""

    def __init__(self, shards: Sequence[Shared]) -> None:
        self._shards = tuple(shards)

    def _of(self, name: str) -> Shared:
        return self._shards[zlib.crc32(name.encode()) % len(self._shards)]

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        return await self._of(name).publish(name, version, data)

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        return await self._of(name).document(name, known=known)

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        await self._of(name).tally(name, hour_ms, counts, most=most)

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        return await self._of(name).tallies(name, since_ms)

    async def mark(self, name: str, *, until_ms: int) -> bool:
        return await self._of(name).mark(name, until_ms=until_ms)

    async def unmark(self, name: str) -> None:
        await self._of(name).unmark(name)
