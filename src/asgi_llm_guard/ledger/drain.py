"""From the streams of a storage into a ledger: every record exactly once.

    drain = Drain(storage, ledger)
    drained = await drain.step()          # from time to time, in as many processes as there are

Rule 1: records and the position up to which a stream was read are written in one transaction of the ledger. Killed at
any instant, the next step goes on from there; what was read and not written is read again.

Rule 2: several that drain at once read the same records. The first to write moves the position, and what the others
have read is let go: they compare the position with the one that they began from, in the same transaction.

Rule 3: a ledger has each call id once, and a late settlement takes the place of the estimate. So where a stream is
read again from its start (its store was flushed or restored, or a replica took over that lacked the newest entries),
nothing is counted twice.

Rule 4: what a stream's bound has dropped before it was read is lost to the ledger. How many these were is known, and
told once, with the write that moves the position past them.

Rule 5: what was drained stays in its stream for `keep`, because the storage knows by it which calls were settled; then it
is removed, a bounded number of entries in each step. Nothing of this costs an admission or a settlement a trip.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import monotonic
from typing import Final

import msgspec

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.events import Observer, RecordsLost, emit
from asgi_llm_guard.ledger.book import Ledger
from asgi_llm_guard.ledger.refusals import RefusalDrain
from asgi_llm_guard.storage.base import TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.shared import KeepsShared
from asgi_llm_guard.storage.streams import KeepsStreams, RecordStream
from asgi_llm_guard.windows import duration_ms

__all__ = ["KEEP", "Drain", "Drained"]

_log = logging.getLogger("asgi_llm_guard.ledger")

KEEP: Final = "1h"
"""How long entries stay in their stream after they were written there."""

_REFUSALS_S: Final = 10.0
"""Refusals are counted by the hour; so often they are looked at."""


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """What one step has done, over all streams."""

    records: int = 0
    """Records whose call ids the ledger did not know."""
    replaced: int = 0
    """Records that it knew: late settlements in the place of estimates, and what was read again."""
    lost: int = 0
    """Records that were dropped from their stream before they were drained."""
    behind: int = 0
    """Entries that are left in the streams."""
    removed: int = 0
    """Entries that were removed from the streams, because they were drained long ago."""
    anew: int = 0
    """Streams that were read from their start, because what the ledger had read last is not in them."""
    refusals: int = 0
    """Refusals that were added to the ledger's counts."""

    def __add__(self, other: Drained) -> Drained:
        return Drained(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class Drain:
    """Takes what is new from a storage into a ledger. In as many processes as there are.

    Args:
        keep: how long drained entries stay in their stream: at least ten minutes, for that is how long a settlement may
            be repeated.
        batch: how many records are read and written at a time.
        observers: are told `RecordsLost`.

    Raises:
        ConfigurationError: the storage has no streams, or `keep` or `batch` is not what it may be.
    """

    def __init__(
        self,
        storage: Storage,
        ledger: Ledger,
        *,
        keep: str = KEEP,
        batch: int = 2_000,
        observers: Sequence[Observer] = (),
    ) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= 100_000:
            raise ConfigurationError(f"batch: expected a whole number from 1 to 100000, got {batch!r}")
        self._keep_ms = duration_ms(keep, name="keep")
        if self._keep_ms < TOMBSTONE_MS:
            raise ConfigurationError(
                f"keep: a settlement may be repeated for 10 minutes; expected at least '10m', got {keep!r}"
            )
        if not isinstance(storage, KeepsStreams):
            raise ConfigurationError(
                f"ledger: a {type(storage).__name__} keeps no stream of its records that could be drained; "
                "one of SQLite writes them into its own file, which is the ledger"
            )
        self._streams: Sequence[RecordStream] = tuple(storage.streams())
        self._refusals = (
            RefusalDrain(storage.shared(), ledger, source=f"refusals:{self._streams[0].name}")
            if isinstance(storage, KeepsShared)
            else None
        )
        self._ledger = ledger
        self._batch = batch
        self._observers = observers
        self._refusals_at: float | None = None

    async def step(self) -> Drained:
        """Take at most `batch` records of each stream, and now and then the counts of refusals.

        Raises:
            StorageError: the storage, a shard of it or the ledger does not answer. What the others had is in the ledger.
        """
        done = Drained()
        failure: StorageError | None = None
        for stream in self._streams:
            try:
                done += await self._take(stream)
            except StorageError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        if self._refusals_at is None or monotonic() - self._refusals_at >= _REFUSALS_S:
            done += Drained(refusals=await self.refusals())
        return done

    async def run(self) -> Drained:
        """Steps until nothing is left."""
        done = Drained()
        while True:
            step = await self.step()
            done += step
            if not step.behind:
                return msgspec.structs.replace(done, behind=0)

    # -------------------------------------------------------------------------------- records

    async def _take(self, stream: RecordStream) -> Drained:
        source = f"stream:{stream.name}"
        position = await self._ledger.cursor(source)
        read = await stream.read(position, self._batch)
        if read.position == position:
            return Drained(removed=await self._remove(stream, position))
        new = await self._ledger.append(read.records, source=source, cursor=read.position, after=position)
        if new is None:  # somebody else was faster
            return Drained(behind=read.behind + len(read.records))
        if read.lost:
            _log.error(
                "%s: %d usage records were dropped by the stream's bound before they were drained, and are not in the "
                "ledger; drain more often, or raise max_records",
                stream.name,
                read.lost,
            )
            emit(self._observers, RecordsLost(stream.name, read.lost))
        if read.anew:
            _log.warning(
                "%s: what was drained last is not in this stream: its store was flushed, restored or replaced by a replica; "
                "it is read from its start, and what the ledger has already is not counted again",
                stream.name,
            )
        return Drained(
            records=new,
            replaced=len(read.records) - new,
            lost=read.lost,
            behind=read.behind,
            anew=int(read.anew),
            removed=await self._remove(stream, read.position),
        )

    async def _remove(self, stream: RecordStream, position: str) -> int:
        return await stream.trim(position, keep_ms=self._keep_ms, limit=2 * self._batch)

    async def refusals(self) -> int:
        """Take over the counts of refusals now; how many refusals."""
        self._refusals_at = monotonic()
        return 0 if self._refusals is None else await self._refusals.step()
