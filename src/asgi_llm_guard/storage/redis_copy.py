"""A whole namespace out of Redis and into it, for exports. The keys are described in `lua/state.lua`."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

import msgspec

from asgi_llm_guard.storage.counting import GRACE_MS, Cell, counts_until, disposable
from asgi_llm_guard.storage.export import Snapshot
from asgi_llm_guard.storage.redis_codec import Codec, pack_text, write_record
from asgi_llm_guard.storage.redis_link import Link
from asgi_llm_guard.storage.state import Hold, Owner
from asgi_llm_guard.windows import BUCKET, SLIDING, SLOTS

__all__ = ["Copy"]

KEEP_MS: Final = 34_560_000_000
"""As `KEEP` in `lua/state.lua`."""
LONGEST_MS: Final = 2_592_000_000
"""As `LONGEST` in `lua/state.lua`."""

_BATCH: Final = 500
_encode: Final = msgspec.msgpack.Encoder().encode


class Copy:
    """Reads or writes the keys that start with `prefix`."""

    def __init__(self, link: Link, key: bytes, prefix: str) -> None:
        self._link = link
        self._key = key
        self._prefix = prefix

    async def _names(self, sort: str) -> AsyncIterator[list[bytes]]:
        """The ends of the names of all keys of one sort, a page at a time, each once."""
        start = f"{self._prefix}{sort}:".encode()
        pattern = start.replace(b"[", b"\\[") + b"*"
        cursor, seen = b"0", set[bytes]()
        while True:
            cursor, names = await self._link.command(
                "SCAN", cursor, "MATCH", pattern, "COUNT", 1000, key=self._key, timeout_s=5.0
            )
            new = [name[len(start) :] for name in names if name not in seen]
            seen.update(names)
            for at in range(0, len(new), _BATCH):
                yield new[at : at + _BATCH]
            if cursor == b"0":
                return

    async def cells(self, now_ms: int) -> AsyncIterator[tuple[str, Cell]]:
        """Every cell that is not over, by meter key."""
        async for names in self._names("c"):
            values = await self._link.command(
                "MGET", *(f"{self._prefix}c:".encode() + name for name in names), key=self._key
            )
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    key = name.decode()
                    cell = _cell(value)
                    if not disposable(cell, now_ms):
                        yield key, cell

    async def members(self, now_ms: int) -> AsyncIterator[tuple[str, str, int]]:
        """Meter key, id and until when, of every live id."""
        async for names in self._names("m"):
            for name in names:
                found = await self._link.command(
                    "ZRANGE", f"{self._prefix}m:".encode() + name, f"({now_ms}", "+inf", "BYSCORE", "WITHSCORES",
                    key=self._key,
                )  # fmt: skip
                for member, until in zip(found[::2], found[1::2], strict=True):
                    yield name.decode(), member.decode(), int(float(until))

    async def owners(self) -> list[tuple[str, Owner]]:
        """Who is alive, and who lapsed and has not been told."""
        alive = await self._link.command("ZRANGE", f"{self._prefix}o", 0, -1, "WITHSCORES", key=self._key)
        lapsed = await self._link.command("HGETALL", f"{self._prefix}ol", key=self._key)
        owners = {name.decode(): Owner(int(float(at))) for name, at in zip(alive[::2], alive[1::2], strict=True)}
        for name, at in zip(lapsed[::2], lapsed[1::2], strict=True):
            owners.setdefault(name.decode(), Owner(0)).lapsed_ms = int(float(at))
        return sorted(owners.items())

    async def call_ids(self) -> AsyncIterator[list[bytes]]:
        """The call ids that are known, a page at a time."""
        async for names in self._names("h"):
            yield names

    async def is_empty(self) -> bool:
        """Whether nothing was counted here yet."""
        for sort in ("c", "m", "h"):
            async for names in self._names(sort):
                if names:
                    return False
        return bool(await self._link.command("EXISTS", f"{self._prefix}li", key=self._key) == 0)

    async def clear(self) -> None:
        """Remove everything but the epoch."""
        for sort in ("c", "m", "h", "oh"):
            async for names in self._names(sort):
                await self._link.command(
                    "DEL", *(f"{self._prefix}{sort}:".encode() + name for name in names), key=self._key
                )
        await self._link.command("DEL", *(f"{self._prefix}{name}" for name in ("o", "ol", "l", "li")), key=self._key)

    async def write(self, snapshot: Snapshot, codec: Codec, now_ms: int) -> None:
        """Put a snapshot into an empty namespace."""
        commands = self._commands(snapshot, codec, now_ms)
        while some := list(itertools.islice(commands, _BATCH)):
            sent = [
                self._link.submit_command(command, f"{self._prefix}{name}", *rest, key=self._key, timeout_s=5.0)
                for command, name, *rest in some
            ]
            await asyncio.gather(*sent)

    def _commands(self, snapshot: Snapshot, codec: Codec, now_ms: int) -> Iterator[tuple[Any, ...]]:
        """The commands that write a snapshot, each with its key's end in the second place."""
        for key, cell in snapshot.cells:
            left = max(counts_until(cell) - now_ms, 0) + GRACE_MS
            if cell.kind in (BUCKET, SLOTS) and cell.held:
                left = max(left, LONGEST_MS)
            yield "SET", f"c:{key}", _value(cell), "PX", left
        for key, member, until_ms in snapshot.members:
            yield "ZADD", f"m:{key}", until_ms, member
            yield "PEXPIRE", f"m:{key}", max(until_ms - now_ms, 0) + GRACE_MS
        for name, owner in snapshot.owners:
            if owner.lapse_at_ms:
                yield "ZADD", "o", owner.lapse_at_ms, name
            if owner.lapsed_ms:
                yield "HSET", "ol", name, owner.lapsed_ms
        opened = set()
        for hold in snapshot.holds:
            opened.add(hold.call_id)
            yield _shape(hold, codec)
            yield "SET", f"h:{hold.call_id}", _hold(hold, codec), "PX", LONGEST_MS
            yield "SADD", f"oh:{hold.owner}", hold.call_id
            yield "PEXPIRE", f"oh:{hold.owner}", LONGEST_MS
        for call_id, tombstone in snapshot.tombstones:
            if call_id in opened or tombstone.until_ms <= now_ms:
                continue  # over; some storages still have it beside the hold of a call that was admitted again
            fields: list[Any] = [tombstone.reason[0].upper(), tombstone.until_ms]
            if tombstone.hold is not None:
                yield _shape(tombstone.hold, codec)
                fields.append(pack_text(_hold(tombstone.hold, codec)))
            left = max(tombstone.until_ms - now_ms, 0) + GRACE_MS
            yield "SET", f"h:{call_id}", _array(fields), "PX", left
        # Entries are found by when they were written, which is never before the call was admitted.
        for number, record in enumerate(sorted(snapshot.records, key=lambda record: record.at_ms), 1):
            entry = f"{max(record.at_ms, 1)}-{number}"
            mark = ("l", "1") if record.late else ()
            yield "XADD", "l", entry, "c", record.call_id, "r", write_record(record), *mark
            yield "HSET", "li", record.call_id, entry
        for name in ("o", "ol", "s", "l", "li"):
            yield "PEXPIRE", name, KEEP_MS


def _shape(hold: Hold, codec: Codec) -> tuple[Any, ...]:
    shape = codec.shape_of(hold.receipts)
    return "HSET", "s", shape.digest, shape.script, f"m{shape.digest}", shape.common


def _hold(hold: Hold, codec: Codec) -> bytes:
    draft = None if hold.draft is None else pack_text(write_record(hold.draft))
    owner, dash, _ = hold.call_id.rpartition("-")
    written = "" if dash and owner == hold.owner else hold.owner
    fields: list[Any] = ["O", written, hold.at_ms, hold.plan, draft, codec.shape_of(hold.receipts).digest]
    codec.hold_claims(fields, hold.receipts, at_ms=hold.at_ms)
    return _array(fields)


def _cell(value: bytes) -> Cell:
    kind = value[0]
    used, held, start, end = map(int, struct.unpack_from("<dddd", value, 1))
    parts = None
    if kind == SLIDING:
        numbers = iter(map(int, struct.unpack_from(f"<{len(value) // 8 - 4}d", value, 33)))
        parts = {index: [u, h] for index, u, h in zip(numbers, numbers, numbers, strict=True)}
    return Cell(kind, used, held, start, end, parts)


def _value(cell: Cell) -> bytes:
    numbers: list[int] = [cell.used, cell.held, cell.start, cell.end]
    for index, (used, held) in (cell.parts or {}).items():
        numbers += (index, used, held)
    return struct.pack(f"<B{len(numbers)}d", cell.kind, *numbers)


def _array(fields: Sequence[Any]) -> bytes:
    """A MessagePack array, with the long header that the scripts expect."""
    return b"\xdc" + len(fields).to_bytes(2, "big") + b"".join(map(_encode, fields))
