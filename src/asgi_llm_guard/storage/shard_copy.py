"""A state that was exported, by shards and back again: as if all shards were one storage.

A call that is open, or has expired, is cut up as `reserve` would have held it; see `_holds_of_call`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from asgi_llm_guard.claims import Receipt
from asgi_llm_guard.storage.export import Snapshot
from asgi_llm_guard.storage.shard_asking import Shards
from asgi_llm_guard.storage.shard_calls import Group, Held
from asgi_llm_guard.storage.shard_parts import Place
from asgi_llm_guard.storage.state import Hold, Owner, Tombstone
from asgi_llm_guard.usage import UsageRecord

__all__ = ["cut_up", "merge"]

_PIECE: Final = re.compile(r"~\d+@([0-9.]*)$")


def cut_up(whole: Snapshot, shards: Shards) -> tuple[list[Snapshot], dict[str, int | Held]]:
    """A state by shards, and where calls are."""
    count = len(shards.storages)
    cells: list[list[Any]] = [[] for _ in range(count)]
    members: list[list[Any]] = [[] for _ in range(count)]
    holds: list[list[Any]] = [[] for _ in range(count)]
    tombstones: list[list[tuple[str, Tombstone]]] = [[] for _ in range(count)]
    records: list[list[UsageRecord]] = [[] for _ in range(count)]
    found: dict[str, int | Held] = {}
    owners = list(whole.owners)
    for cell in whole.cells:
        cells[shards.place(cell[0])].append(cell)
    for member in whole.members:
        members[shards.place(member[0])].append(member)
    for hold in whole.holds:
        home = shards.home_of([receipt.claim for receipt in hold.receipts], hold.draft, hold.call_id)
        parts = _holds_of_call(hold, home, shards.place)
        for shard, part in parts.items():
            holds[shard].append(part)
        found[hold.call_id] = _held(hold, home, parts)
    for call_id, tombstone in whole.tombstones:
        hold_of = tombstone.hold
        if hold_of is None:  # where it was is not known: it is refused, or settled already, everywhere
            for some in tombstones:
                some.append((call_id, tombstone))
            continue
        home = shards.home_of([receipt.claim for receipt in hold_of.receipts], hold_of.draft, call_id)
        parts = _holds_of_call(hold_of, home, shards.place)
        found[call_id] = _held(hold_of, home, parts)
        for shard, part in parts.items():
            tombstones[shard].append((part.call_id, msgspec.structs.replace(tombstone, hold=part)))
    for record in whole.records:
        records[shards.home_of((), record, record.call_id)].append(record)
    parts_of = [
        Snapshot(cells=c, members=m, owners=owners, holds=h, tombstones=t, records=r)
        for c, m, h, t, r in zip(cells, members, holds, tombstones, records, strict=True)
    ]
    return parts_of, found


def _holds_of_call(hold: Hold, home: int, place: Place) -> dict[int, Hold]:
    """A hold by shards, each with its receipts. The ids of the others say which places their receipts have."""
    at: dict[int, list[int]] = {home: []}
    for number, receipt in enumerate(hold.receipts):
        at.setdefault(place(receipt.claim.meter.key), []).append(number)
    return {
        shard: msgspec.structs.replace(
            hold,
            call_id=hold.call_id if shard == home else f"{hold.call_id}~{shard}@{'.'.join(map(str, numbers))}",
            receipts=tuple([hold.receipts[number] for number in numbers]),
            draft=hold.draft if shard == home else None,
        )
        for shard, numbers in at.items()
    }


def _held(hold: Hold, home: int, parts: Mapping[int, Hold]) -> int | Held:
    if len(parts) == 1:
        return home
    groups = {
        shard: Group(part.call_id, tuple([receipt.claim for receipt in part.receipts]))
        for shard, part in parts.items()
        if shard != home
    }
    call = Held(hold.owner, home, tuple([receipt.claim for receipt in hold.receipts]), groups, hold.plan)
    call.receipts, call.asked = hold.receipts, True
    return call


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The state of all shards as that of one storage."""
    owners: dict[str, Owner] = {}
    tombstones: dict[str, Tombstone] = {}
    records: dict[str, UsageRecord] = {}
    for snapshot in snapshots:
        for name, owner in snapshot.owners:
            mine = owners.setdefault(name, Owner(0))
            mine.lapse_at_ms = max(mine.lapse_at_ms, owner.lapse_at_ms)
            mine.lapsed_ms = max(mine.lapsed_ms, owner.lapsed_ms)
        for call_id, tombstone in snapshot.tombstones:
            known = tombstones.get(call_id)
            if known is None or known.reason == "cancelled":
                tombstones[call_id] = tombstone
        for record in snapshot.records:
            records[record.call_id] = record
    holds = _joined({hold.call_id: hold for snapshot in snapshots for hold in snapshot.holds})
    expired = _joined({call_id: t.hold for call_id, t in tombstones.items() if t.hold is not None})
    ended = [
        (call_id, msgspec.structs.replace(tombstone, hold=expired.get(call_id)))
        for call_id, tombstone in tombstones.items()
        if tombstone.hold is None or call_id in expired
    ]
    return Snapshot(
        cells=[cell for snapshot in snapshots for cell in snapshot.cells],
        members=[member for snapshot in snapshots for member in snapshot.members],
        owners=sorted(owners.items()),
        holds=sorted(holds.values(), key=lambda hold: (hold.at_ms, hold.call_id)),
        tombstones=sorted(ended, key=lambda entry: (entry[1].until_ms, entry[0])),
        records=sorted(records.values(), key=lambda record: (record.at_ms, record.call_id)),
    )


def _joined(holds: dict[str, Hold]) -> dict[str, Hold]:
    """Holds with those put together again that `_holds_of_call` has cut up, as far as all of a call are there."""
    pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for call_id in holds:
        piece = _PIECE.search(call_id)
        if piece is not None and call_id[: piece.start()] in holds:
            places = tuple([int(number) for number in piece[1].split(".") if number])
            pieces.setdefault(call_id[: piece.start()], []).append((call_id, places))
    for call_id, parts in sorted(pieces.items(), key=lambda piece: -len(piece[0])):  # pieces of pieces first
        home = holds[call_id]
        receipts = dict[int, Receipt]()
        for piece_id, places in parts:
            receipts.update(zip(places, holds.pop(piece_id).receipts, strict=True))
        theirs = iter(home.receipts)
        total = len(receipts) + len(home.receipts)
        whole = tuple([receipts[n] if n in receipts else next(theirs) for n in range(total)])
        holds[call_id] = msgspec.structs.replace(home, receipts=whole)
    return holds
