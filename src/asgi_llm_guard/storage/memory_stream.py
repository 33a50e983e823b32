"""The usage records of a storage in memory, as a stream that others move elsewhere. See `streams.py` for the rules."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from asgi_llm_guard.storage.streams import Read
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Log", "MemoryStream"]


class Log:
    """Records in the order in which they were written, the latest `most` of them. To be used under its owner's lock."""

    __slots__ = ("added", "entries")

    def __init__(self, most: int) -> None:
        self.entries: deque[UsageRecord] = deque(maxlen=most)
        self.added = 0

    def append(self, record: UsageRecord) -> None:
        self.entries.append(record)
        self.added += 1


class MemoryStream:
    """A `RecordStream`. Nothing is removed from it but by its bound."""

    def __init__(self, log: Log, lock: Callable[[], AbstractContextManager[object]]) -> None:
        self.name = f"memory-{os.urandom(6).hex()}"
        self._log = log
        self._lock = lock

    async def read(self, position: str | None, limit: int) -> Read:
        with self._lock():
            log = self._log
            removed = log.added - len(log.entries)
            known = removed if position is None else _number(position, log.added)
            start = max(known, removed)
            records = tuple(itertools.islice(log.entries, start - removed, start - removed + limit))
            number = start + len(records)
            return Read(
                records=records,
                position=str(number),
                lost=0 if known < 0 else start - known,
                anew=known < 0,
                behind=log.added - number,
            )

    async def trim(self, position: str, *, keep_ms: int, limit: int) -> int:  # noqa: ARG002
        return 0


def _number(position: str, added: int) -> int:
    """How many had been added; -1 if that cannot be of this stream."""
    number = int(position) if position.isascii() and position.isdigit() else -1
    return number if number <= added else -1
