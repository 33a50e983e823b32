"""What a storage offers to those who move its usage records elsewhere: streams, read after a position and cut at their old end.

Rule 1: a record is appended once for each time it is written. One that takes the place of another (a late settlement,
of an estimate) is appended as well; what it replaces stays until it is the oldest. So a reader that goes by call ids and
lets later records win misses nothing, and entries leave a stream at its old end only.

Rule 2: a position is the text that `read` gave, and belongs to its stream. Whatever was read with a position is at or before
it for good. Positions may be kept for any time, and by anybody.

Rule 3: a stream knows how many entries were ever appended, and so how many went before they were read: `Read.lost`.

Rule 4: where the entry of a position is not in the stream though it should be (the data was flushed or restored, or a
replica that had not received it took over), the stream is read from its start: `Read.anew`. What was read before comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec

from asgi_llm_guard.usage import UsageRecord

__all__ = ["KeepsStreams", "Read", "RecordStream"]


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """What came after a position."""

    records: tuple[UsageRecord, ...]
    """In the order in which they were written. The same call id may be there several times."""
    position: str
    """Where to go on."""
    lost: int = 0
    """How many entries after the position were dropped before they were read."""
    anew: bool = False
    """The position belongs to data that is gone: this is from the start of what there is."""
    behind: int = 0
    """How many entries are left to read."""


class RecordStream(Protocol):
    """The usage records of one storage, or of one of its shards. From any thread that runs an event loop."""

    name: str
    """The same for the same data, in every process; no two streams of one storage have the same."""

    async def read(self, position: str | None, limit: int) -> Read:
        """At most `limit` records after `position`; `None`: from the start, and what was dropped before is not lost.

        A position that this stream cannot read counts as one of data that is gone.

        Raises:
            StorageError: the store does not answer.
        """
        ...

    async def trim(self, position: str, *, keep_ms: int, limit: int) -> int:
        """Remove entries up to `position` that are older than `keep_ms`, the oldest first; how many.

        At most `limit`. The last one before the position stays, so that the position can be found again.
        Where a stream is bounded by itself and costs nothing to keep, nothing is removed.

        Raises:
            StorageError: the store does not answer.
        """
        ...


@runtime_checkable
class KeepsStreams(Protocol):
    """A storage whose records can be read as streams."""

    def streams(self) -> Sequence[RecordStream]:
        """All of them; together they have every record once. Cheap; asks nothing.

        Raises:
            ConfigurationError: this storage has none after all.
        """
        ...
