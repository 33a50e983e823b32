"""Entries in Redis or Valkey; see `entries.py`. The script is `lua/entries.lua`."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from asgi_llm_guard.storage.entries import EPOCH_MS, Bounds, InFlight, Kept, Leading, check_entry

__all__ = ["Ask", "RedisEntries"]


class Ask(Protocol):
    """Has the script run, a second time if the connection broke."""

    def __call__(self, arguments: Sequence[bytes], /) -> Awaitable[Any]: ...


class RedisEntries:
    """One space of one namespace. Its values end by time; `bounds` say how long a single one may be."""

    def __init__(self, ask: Ask, space: str, bounds: Bounds) -> None:
        self.bounds = bounds
        self._ask = ask
        self._space = space.encode()

    async def find(self, key: str) -> Kept | None:
        reply = await self._ask([b"find", self._space, key.encode()])
        return _kept(reply) if reply[1] == b"kept" else None

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        check_entry(ttl_ms=claim_ms)
        reply = await self._ask(
            [
                *(b"begin", self._space, key.encode(), token.encode(), b"%d" % claim_ms, b"1" if fresh else b""),
                *(note.encode(), secrets.token_hex(8).encode(), b"%d" % EPOCH_MS, *map(str.encode, names)),
            ]
        )
        if reply[1] == b"kept":
            return _kept(reply)
        return Leading() if reply[1] == b"lead" else InFlight(reply[2].decode(), reply[3])

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        check_entry(ttl_ms=claim_ms)
        reply = await self._ask([b"prolong", self._space, key.encode(), token.encode(), b"%d" % claim_ms])
        return bool(reply[1])

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        check_entry(ttl_ms=ttl_ms)
        if len(value) > self.bounds.max_value_bytes:
            await self.abandon(key, token)
            return False
        reply = await self._ask([b"store", self._space, key.encode(), token.encode(), value, b"%d" % ttl_ms])
        return bool(reply[1])

    async def abandon(self, key: str, token: str) -> None:
        await self._ask([b"abandon", self._space, key.encode(), token.encode()])

    async def forget(self, key: str) -> None:
        await self._ask([b"forget", self._space, key.encode()])

    async def bump(self, name: str) -> None:
        await self._ask([b"bump", self._space, name.encode(), secrets.token_hex(8).encode(), b"%d" % EPOCH_MS])


def _kept(reply: Any) -> Kept:
    return Kept(reply[2], reply[3].decode(), reply[4])
