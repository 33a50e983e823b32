"""Documents, tallies and marks in the memory of one process; see `shared.py`."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Mapping, Sequence

from asgi_llm_guard.storage.shared import OTHER, TALLY_MS, Document, Tally, check_counts, check_name, check_publish

__all__ = ["MemoryShared"]


class MemoryShared:
    """`begin` gives the instant of an operation, and refuses it once the storage is closed."""

    def __init__(self, begin: Callable[[], int]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._documents: dict[str, Document] = {}
        self._tallies: dict[str, dict[int, dict[str, int]]] = {}
        self._marks: dict[str, int] = {}
        self._ends: list[tuple[int, str]] = []
        """When marks are over, those that were taken away included; a heap."""

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        check_publish(name, version, data)
        with self._lock:
            self._begin()
            before = self._documents.get(name)
            if before is not None and version <= before.version:
                return before == Document(version, data)
            self._documents[name] = Document(version, bytes(data))
            return True

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        check_name(name)
        with self._lock:
            self._begin()
            found = self._documents.get(name)
            return found if found is not None and found.version > known else None

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        check_counts(name, hour_ms, counts, most)
        with self._lock:
            over_ms = self._begin() - TALLY_MS
            hours = self._tallies.setdefault(name, {})
            for hour in [hour for hour in hours if hour <= over_ms]:
                del hours[hour]
            if hour_ms <= over_ms:
                return
            kept = hours.setdefault(hour_ms, {})
            for key, count in counts.items():
                room = key in kept or len(kept) - (OTHER in kept) < most
                place = key if room else OTHER
                kept[place] = kept.get(place, 0) + count

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        check_name(name)
        with self._lock:
            first_ms = max(since_ms, self._begin() - TALLY_MS + 1)
            hours = self._tallies.get(name, {})
            return [
                Tally(hour, key, count)
                for hour in sorted(hours)
                if hour >= first_ms
                for key, count in sorted(hours[hour].items())
            ]

    async def mark(self, name: str, *, until_ms: int) -> bool:
        check_name(name)
        with self._lock:
            now_ms = self._begin()
            while self._ends and self._ends[0][0] <= now_ms:
                end_ms, ended = heapq.heappop(self._ends)
                if self._marks.get(ended) == end_ms:
                    del self._marks[ended]
            if until_ms <= now_ms or name in self._marks:
                return False
            self._marks[name] = until_ms
            heapq.heappush(self._ends, (until_ms, name))
            return True

    async def unmark(self, name: str) -> None:
        check_name(name)
        with self._lock:
            self._begin()
            self._marks.pop(name, None)

    def size(self) -> dict[str, int]:
        """How much is kept of each sort."""
        with self._lock:
            counts = sum(len(keys) for hours in self._tallies.values() for keys in hours.values())
            return {"documents": len(self._documents), "counts": counts, "marks": len(self._marks)}
