"""The holds that a namespace has, as values: of calls that are open, of some that have expired. See `lua/hold.lua`."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from typing import Any, Final, cast

from asgi_llm_guard.claims import Receipt
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.open_calls import newest, open_call
from asgi_llm_guard.storage.redis_codec import read_record
from asgi_llm_guard.storage.redis_loops import Connected, Lanes
from asgi_llm_guard.storage.redis_namespace import Namespace
from asgi_llm_guard.storage.redis_scripts import HOLD
from asgi_llm_guard.storage.shared import OpenCall
from asgi_llm_guard.storage.state import Hold, Tombstone

__all__ = ["Holds"]

_HOLDS: Final = 200  # read in one call, for all others wait meanwhile

_STATE: Final = {b"S": "settled", b"C": "cancelled", b"E": "expired"}


class Holds:
    """Reads them. What a hold consists of is told by its shape, which may have to be asked for."""

    def __init__(self, namespace: Namespace, lanes: Lanes) -> None:
        self._namespace = namespace
        self._lanes = lanes

    async def count(self) -> int:
        """As `Storage.open_holds`."""
        lane = self._lanes.lane()
        await self._lanes.all_settled()
        owners = await lane.link.command("ZRANGE", f"{self._namespace.prefix}o", 0, -1, key=self._namespace.key)
        counts = [
            await lane.link.command("SCARD", f"{self._namespace.prefix}oh:".encode() + owner, key=self._namespace.key)
            for owner in owners
        ]
        return sum(counts)

    async def newest(self, limit: int) -> list[OpenCall]:
        """As `ListsCalls.open_calls`."""
        lane = self._lanes.lane()
        await self._lanes.all_settled()
        owners = await lane.link.command("ZRANGE", f"{self._namespace.prefix}o", 0, -1, key=self._namespace.key)
        found: list[OpenCall] = []
        for owner in owners:
            call_ids = await lane.link.command(
                "SMEMBERS", f"{self._namespace.prefix}oh:".encode() + owner, key=self._namespace.key
            )
            for at in range(0, len(call_ids), _HOLDS):
                found += map(open_call, await self._open(lane, call_ids[at : at + _HOLDS]))
            found = newest(found, limit)
        return found

    async def _open(self, lane: Connected, call_ids: Sequence[bytes]) -> list[Hold]:
        """Those of the calls that are open."""
        arguments = [*self._namespace.head(), b"", *call_ids]
        replies = await self._lanes.twice(lane, HOLD, arguments)
        if replies == b"shape":
            self._namespace.will_send_all()
            replies = await self._lanes.twice(
                lane, HOLD, [*self._namespace.head(), self._namespace.new_shapes(), *call_ids]
            )
        if replies == b"shape":
            raise StorageError(
                "redis: the store has lost what an open hold claims; it is known again once it is settled"
            )
        return [
            await self.hold(lane, call_id.decode(), reply[2])
            for call_id, reply in zip(call_ids, replies, strict=True)
            if reply is not None and reply[0] == b"O"
        ]

    async def copy(
        self, lane: Connected, pages: AsyncIterable[list[bytes]], now_ms: int
    ) -> tuple[list[Hold], list[tuple[str, Tombstone]]]:
        """All holds and tombstones of these call ids, in the order of exports."""
        holds: list[Hold] = []
        tombstones: list[tuple[str, Tombstone]] = []
        async for call_ids in pages:
            self._namespace.will_send_all()
            replies = await lane.submit(HOLD, [*self._namespace.head(), self._namespace.new_shapes(), *call_ids])
            if replies == b"shape":
                raise StorageError("redis: the store has lost what an open hold claims; settle it, then export again")
            for call_id, reply in zip(map(bytes.decode, call_ids), replies, strict=True):
                if reply is not None:
                    state, until_ms, *hold = reply
                    opened = await self.hold(lane, call_id, hold[0]) if hold else None
                    if state == b"O":
                        holds.append(cast("Hold", opened))
                    elif now_ms < until_ms:
                        tombstones.append((call_id, Tombstone(cast("Any", _STATE[state]), until_ms, opened)))
        holds.sort(key=lambda hold: (hold.at_ms, hold.call_id))
        tombstones.sort(key=lambda entry: (entry[1].until_ms, entry[0]))
        return holds, tombstones

    async def hold(self, lane: Connected, call_id: str, fields: Any) -> Hold:
        """The hold that a reply of `lua/hold.lua` describes."""
        digest, at_ms, owner, plan, draft, *rows = fields
        receipts = await self.receipts(lane, digest.decode(), rows)
        return Hold(call_id, owner.decode(), receipts, read_record(call_id, draft) if draft else None, at_ms, plan)

    async def receipts(self, lane: Connected, digest: str, rows: Sequence[Any]) -> tuple[Receipt, ...]:
        """The receipts of a hold whose shape has this digest, which the store is asked for if it is not known here."""
        if not self._namespace.codec.knows(digest):
            script, common = await lane.link.command(
                "HMGET", f"{self._namespace.prefix}s", digest, f"m{digest}", key=self._namespace.key
            )
            if script is None or common is None:
                raise StorageError(
                    "redis: what a hold consists of is not known any more: the store was flushed meanwhile"
                )
            self._namespace.codec.learn(digest, script, common)
        return self._namespace.codec.receipts(digest, rows)
