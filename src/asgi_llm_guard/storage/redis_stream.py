"""The usage records of one namespace, as a stream that others move elsewhere. See `streams.py` for the rules.

Entries leave the stream at its old end only (`append` and `forget` in `lua/state.lua`), and the server counts what it ever
added. So those that are there are the last ones added, and the number of the first is known.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec

from asgi_llm_guard.storage.redis_replies import record_of
from asgi_llm_guard.storage.streams import Read
from asgi_llm_guard.usage import UsageRecord

__all__ = ["RedisStream"]

_PAGE: Final = 400
"""Entries in one answer: about a millisecond of the server's time."""
_CUT: Final = 200
"""Entries that are removed in one call: the same."""

Ask = Callable[[Sequence[bytes]], Awaitable[Any]]


class _Position(msgspec.Struct, frozen=True, array_like=True):
    epoch: str
    """Names the data; see `lua/epoch.lua`."""
    entry: str
    """The id of the last entry that was read; empty: none was."""
    call_id: str
    """That entry's, to tell it from one that got the same id from another server."""
    number: int
    """How many entries had been added when it was."""


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Position).decode


class _Page(msgspec.Struct, frozen=True):
    """One answer of `lua/stream.lua`."""

    now_ms: int
    epoch: str
    added: int
    length: int
    last: str
    found: str | None
    entries: Sequence[Any]

    @property
    def removed(self) -> int:
        return self.added - self.length

    def follows(self, position: _Position) -> bool:
        """Whether this is the data that the position is in."""
        if self.epoch != position.epoch or self.added < position.number:
            return False
        if self.found is None and self.removed >= position.number:  # dropped, or there was none
            return not position.entry or _order(self.last) >= _order(position.entry)
        return self.found == position.call_id

    def end(self, position: _Position) -> _Position:
        """The position behind this page, which was read from that one."""
        number = max(self.removed, position.number) + len(self.entries)
        if not self.entries:
            return msgspec.structs.replace(position, number=number)
        entry, fields = self.entries[-1]
        return _Position(self.epoch, entry.decode(), fields[1].decode(), number)


class RedisStream:
    """A `RecordStream`. `ask` runs `lua/stream.lua` with these arguments, behind what was settled before."""

    def __init__(self, ask: Ask, name: str) -> None:
        self.name = name
        self._ask = ask

    async def read(self, position: str | None, limit: int) -> Read:
        known = None if position is None else _position(position)
        records: list[UsageRecord] = []
        lost = behind = 0
        anew = position is not None and known is None
        while True:
            count = min(_PAGE, limit - len(records))
            page = await self._page("" if known is None else known.entry, count)
            if known is not None and not page.follows(known):
                if records:
                    break  # what was read is whole; the next reader sees the change
                anew, known = bool(known.entry), None
                page = await self._page("", count)
            if known is None:
                known = _Position(page.epoch, "", "", page.removed)
            lost += max(0, page.removed - known.number)
            known = page.end(known)
            records += [record_of(fields) for _, fields in page.entries]
            behind = page.added - known.number
            if len(page.entries) < count or len(records) >= limit:
                break
        return Read(records=tuple(records), position=_encode(known).decode(), lost=lost, anew=anew, behind=behind)

    async def trim(self, position: str, *, keep_ms: int, limit: int) -> int:
        known = _position(position)
        if known is None or not known.entry:
            return 0
        page = await self._page(known.entry, 1)
        if not page.follows(known):
            return 0
        before = str(page.now_ms - keep_ms).encode()
        removed = 0
        while removed < limit:
            count = min(_CUT, limit - removed)
            _, some = await self._ask([b"trim", known.entry.encode(), before, str(count).encode()])
            removed += some
            if some < count:
                break
        return removed

    async def _page(self, entry: str, count: int) -> _Page:
        now_ms, epoch, added, length, last, found, entries = await self._ask(
            [b"read", entry.encode(), str(count).encode()]
        )
        name = epoch.split(b" ")[0].decode()
        return _Page(now_ms, name, added, length, last.decode(), None if found is None else found.decode(), entries)


def _position(text: str) -> _Position | None:
    """`None`: it is not one of these."""
    try:
        return _decode(text)
    except msgspec.DecodeError:
        return None


def _order(entry: str) -> tuple[int, int]:
    at, _, number = entry.partition("-")
    return int(at), int(number)
