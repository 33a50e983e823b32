"""Documents, tallies and marks in Redis or Valkey; see `shared.py`. The script is `lua/shared.lua`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, Protocol

from asgi_llm_guard.storage.shared import (
    OTHER,
    TALLY_MS_REDIS,
    Document,
    Tally,
    check_counts,
    check_name,
    check_publish,
)

__all__ = ["AskShared", "RedisShared"]

_TOGETHER: Final = 24
"""So many hours are asked for in one call: at the most `most` keys each, for all others wait meanwhile."""


class AskShared(Protocol):
    """Has the script run, a second time if the connection broke."""

    def __call__(self, arguments: Sequence[bytes], /) -> Awaitable[Any]: ...


class RedisShared:
    """What the processes of one namespace share. Tallies are kept for `TALLY_MS_REDIS`."""

    def __init__(self, ask: AskShared) -> None:
        self._ask = ask

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        check_publish(name, version, data)
        return bool(await self._ask([b"publish", name.encode(), b"%d" % version, bytes(data)]))

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        reply = await self._ask([b"document", check_name(name).encode(), b"%d" % known])
        return None if reply is None else Document(int(reply[0]), reply[1])

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        check_counts(name, hour_ms, counts, most)
        if not counts:
            return
        flat = [part for key, count in counts.items() for part in (key.encode(), b"%d" % count)]
        head = (b"%d" % hour_ms, b"%d" % TALLY_MS_REDIS, b"%d" % most, OTHER.encode(), os.urandom(9).hex().encode())
        await self._ask([b"tally", name.encode(), *head, *flat])

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        sought = check_name(name).encode()
        hours = await self._ask([b"hours", sought, b"%d" % since_ms, b"%d" % TALLY_MS_REDIS])
        found: list[Tally] = []
        for at in range(0, len(hours), _TOGETHER):
            some = hours[at : at + _TOGETHER]
            for hour, flat in zip(some, await self._ask([b"tallies", sought, *some]), strict=True):
                found += [
                    Tally(int(hour), key.decode(), int(count))
                    for key, count in sorted(zip(flat[::2], flat[1::2], strict=True))
                ]
        return found

    async def mark(self, name: str, *, until_ms: int) -> bool:
        token = os.urandom(9).hex().encode()
        return bool(await self._ask([b"mark", check_name(name).encode(), b"%d" % until_ms, token]))

    async def unmark(self, name: str) -> None:
        await self._ask([b"unmark", check_name(name).encode()])
