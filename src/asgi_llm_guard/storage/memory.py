"""Storage in the memory of one process: for tests, and for services of a single process.

Exact over threads and event loops of this process; nothing is shared with others and nothing
survives it. What is over is forgotten a few entries at a time, in every operation that adds some.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage import cells as verbs
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Completed, Pending
from asgi_llm_guard.storage.counting import Cell, copy, disposable
from asgi_llm_guard.storage.entries import Bounds, check_space
from asgi_llm_guard.storage.export import Snapshot, parse_lines, write_lines
from asgi_llm_guard.storage.memory_entries import MemoryEntries
from asgi_llm_guard.storage.memory_shared import MemoryShared
from asgi_llm_guard.storage.memory_stream import Log, MemoryStream
from asgi_llm_guard.storage.open_calls import newest, open_call
from asgi_llm_guard.storage.shared import OpenCall
from asgi_llm_guard.storage.state import Hold, Owner, State, Tombstone
from asgi_llm_guard.usage import UsageRecord

__all__ = ["MAX_RECORDS", "MemoryLedger", "MemoryMembers", "MemoryStorage"]

MAX_RECORDS: Final = 100_000
"""The ledger keeps this many records, and drops the oldest beyond."""

_PURGE: Final = 2  # entries looked at for each one that is added: the rest is at most about as much as what is alive


class _Cells(dict[str, Cell]):
    """Cells by meter key. Each new one has the next two in line looked at, and forgotten if they are over."""

    __slots__ = ("line", "now_ms")

    def __init__(self) -> None:
        super().__init__()
        self.line: deque[str] = deque()
        self.now_ms = 0

    def __setitem__(self, key: str, cell: Cell) -> None:
        if key not in self:
            for _ in range(min(_PURGE, len(self.line))):
                due = self.line.popleft()
                if due != key and disposable(self[due], self.now_ms):
                    del self[due]
                else:
                    self.line.append(due)
            self.line.append(key)
        super().__setitem__(key, cell)


class MemoryMembers:
    """The live ids of `Distinct` meters."""

    __slots__ = ("_ids", "_line", "_now_ms")

    def __init__(self) -> None:
        self._ids: dict[str, OrderedDict[str, int]] = {}
        self._line: deque[str] = deque()
        self._now_ms = 0

    def look(self, key: str, member: str, now_ms: int) -> tuple[int, bool]:
        self._now_ms = now_ms
        ids = self._ids.get(key)
        if ids is None:
            return 0, False
        _drop_expired(ids, now_ms)
        return len(ids), member in ids

    def touch(self, key: str, member: str, until_ms: int) -> None:
        ids = self._ids.get(key)
        if ids is None:
            self._purge()
            self._line.append(key)
            ids = self._ids[key] = OrderedDict()
        else:
            ids.pop(member, None)  # so that it joins the others' order anew
        ids[member] = until_ms

    def ends(self, key: str) -> tuple[int, int] | None:
        ids = self._ids.get(key)
        return (ids[next(iter(ids))], ids[next(reversed(ids))]) if ids else None

    def clear(self, key: str) -> None:
        ids = self._ids.get(key)
        if ids is not None:
            ids.clear()

    def __len__(self) -> int:
        return sum(map(len, self._ids.values()))

    def items(self) -> list[tuple[str, str, int]]:
        """Meter key, id and until when, in the order in which they expire."""
        return [(key, member, until) for key, ids in self._ids.items() for member, until in ids.items()]

    def _purge(self) -> None:
        """Forget meters (callers who went away) none of whose ids is live."""
        for _ in range(min(_PURGE, len(self._line))):
            due = self._line.popleft()
            ids = self._ids[due]
            if ids and ids[next(reversed(ids))] > self._now_ms:
                self._line.append(due)
            else:
                del self._ids[due]


def _drop_expired(ids: OrderedDict[str, int], now_ms: int) -> None:
    while ids:
        first = next(iter(ids))
        if ids[first] > now_ms:
            return
        del ids[first]


class MemoryLedger(OrderedDict[str, UsageRecord]):
    """Usage records by call id, at most `most` of them."""

    def __init__(self, most: int = MAX_RECORDS) -> None:
        super().__init__()
        self._most = most
        self.log = Log(most)

    def append(self, record: UsageRecord) -> None:
        self.replace(record.call_id, record)

    def replace(self, call_id: str, record: UsageRecord) -> None:
        self[call_id] = record
        self.log.append(record)
        if len(self) > self._most:
            self.popitem(last=False)

    def since(self, since_ms: int, limit: int | None) -> list[UsageRecord]:
        """Records admitted at or after `since_ms`, by instant and call id, at most `limit`."""
        found = [record for record in self.values() if record.at_ms >= since_ms]
        found.sort(key=lambda record: (record.at_ms, record.call_id))
        return found if limit is None else found[:limit]


class MemoryStorage:
    """A `Storage` in memory. May be used from several event loops and threads at once.

    `max_records` bounds the ledger; a call id is known for `tombstone_ms` even if its record was dropped.

    Raises:
        ConfigurationError: a bound is not positive.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        lapse_ms: int = LAPSE_MS,
        tombstone_ms: int = TOMBSTONE_MS,
        max_records: int = MAX_RECORDS,
    ) -> None:
        for name, value in (("lapse_ms", lapse_ms), ("tombstone_ms", tombstone_ms), ("max_records", max_records)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name}: expected a whole number from 1, got {value!r}")
        self._now = (clock or SystemClock()).now_ms
        self._lock = threading.Lock()
        self._closed = False
        self._cells = _Cells()
        self._holds: dict[str, Hold] = {}
        self._ended: OrderedDict[str, Tombstone] = OrderedDict()
        self._owners: dict[str, Owner] = {}
        self._members = MemoryMembers()
        self._ledger = MemoryLedger(max_records)
        self._spaces: dict[str, MemoryEntries] = {}
        self._shared = MemoryShared(self._instant)
        self._stream = MemoryStream(self._ledger.log, lambda: self._lock)
        self._state = State(
            cells=self._cells,
            holds=self._holds,
            ended=self._ended,
            owners=self._owners,
            members=self._members,
            ledger=self._ledger,
            lapse_ms=lapse_ms,
            tombstone_ms=tombstone_ms,
        )

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        with self._lock:
            return verbs.reserve(self._state, owner, plans, self._begin())

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        with self._lock:
            return verbs.amend(self._state, owner, bundle, self._begin())

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        with self._lock:
            now_ms = self._begin()
            settled = verbs.settle(self._state, settlements, now_ms)
            self._forget_ended(now_ms, _PURGE * len(settlements))
        return Completed(settled)

    async def heartbeat(self, owner: str) -> Heartbeat:
        with self._lock:
            now_ms = self._begin()
            self._forget_ended(now_ms, 100)
            return verbs.heartbeat(self._state, owner, now_ms)

    async def retire(self, owner: str) -> None:
        with self._lock:
            verbs.retire(self._state, owner, self._begin())

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        with self._lock:
            return verbs.read(self._state, meters, self._begin())

    async def reset(self, meters: Sequence[Meter]) -> None:
        with self._lock:
            verbs.reset(self._state, meters, self._begin())

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        with self._lock:
            self._begin()
            return self._ledger.since(since_ms, limit)

    async def export(self) -> AsyncIterator[bytes]:
        with self._lock:
            now_ms = self._begin()
            snapshot = Snapshot(
                cells=[(key, copy(cell)) for key, cell in self._cells.items()],
                members=self._members.items(),
                owners=[(name, msgspec.structs.replace(owner)) for name, owner in self._owners.items()],
                holds=[msgspec.structs.replace(hold) for hold in self._holds.values()],
                tombstones=list(self._ended.items()),
                records=self._ledger.since(0, None),
            )
        for line in write_lines(snapshot, now_ms):
            yield line

    async def load(self, lines: Iterable[bytes]) -> None:
        snapshot = parse_lines(lines)
        with self._lock:
            self._begin()
            if self._cells or self._holds or self._ended or len(self._members) or len(self._ledger):
                raise StorageError("import: this storage is not empty; load into a new one")
            for key, cell in snapshot.cells:
                self._cells[key] = cell
            for key, member, until_ms in snapshot.members:
                self._members.touch(key, member, until_ms)
            self._owners.update(snapshot.owners)
            self._holds.update((hold.call_id, hold) for hold in snapshot.holds)
            self._ended.update(snapshot.tombstones)
            for record in snapshot.records:
                self._ledger.append(record)

    async def open_holds(self) -> int:
        with self._lock:
            self._begin()
            return len(self._holds)

    def entries(self, space: str, bounds: Bounds | None = None) -> MemoryEntries:
        with self._lock:
            kept = self._spaces.get(check_space(space))
            if kept is None:
                kept = self._spaces[space] = MemoryEntries(self._instant, bounds or Bounds())
            elif bounds is not None:
                kept.bounds = bounds
            return kept

    @property
    def ledger_url(self) -> str:
        return "sqlite://:memory:"

    def streams(self) -> tuple[MemoryStream]:
        return (self._stream,)

    def shared(self) -> MemoryShared:
        return self._shared

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        with self._lock:
            self._begin()
            return newest(map(open_call, self._holds.values()), limit)

    async def aclose(self) -> None:
        with self._lock:
            self._closed = True

    def size(self) -> dict[str, int]:
        """How many entries of each sort are kept."""
        with self._lock:
            return {
                "cells": len(self._cells),
                "members": len(self._members),
                "owners": len(self._owners),
                "holds": len(self._holds),
                "tombstones": len(self._ended),
                "records": len(self._ledger),
            }

    def _begin(self) -> int:
        """The instant of the operation that holds the lock."""
        now_ms = self._cells.now_ms = self._instant()
        return now_ms

    def _instant(self) -> int:
        if self._closed:
            raise StorageError("memory: this storage was closed; make a new one")
        return self._now()

    def _forget_ended(self, now_ms: int, most: int) -> None:
        ended = self._ended
        for _ in range(min(most, len(ended))):
            first = next(iter(ended))
            if ended[first].until_ms > now_ms:
                return
            del ended[first]
