"""Leases for hot meters: a storage around a storage, which admits from chunks that this process holds.

Claims on meters with `lease` above 0 are taken from a chunk that was reserved beforehand (`lease_book.py`),
without asking the store; what else a plan claims is asked for in one trip, and if nothing is left to ask
for, there is none. The rules of `base.py` hold, with these additions:

Rule 1: a lease is an ordinary hold of the inner store on a chunk, under the owner that spends it, with a
call id of its own. The store counts the chunk whole, so `used + held <= limit` holds there as ever, and
what all processes together have admitted is never above it.

Rule 2: a plan is all or nothing. What fits into chunks is taken first, at once; if the store refuses the
rest, it is put back, and the refusal tells the store's numbers.

Rule 3: a claim that no chunk can serve is the store's to decide, with its own amount. Before a refusal that
what this process has left of its chunks would turn, that is given back, and the store asked once more. What
it has left besides does not count as held in a refusal.

Rule 4: the first claim on a meter goes to the store, and so do those that come before its chunk does; the
chunk is fetched beside it, and later ones before the last is spent. No admission ever waits for one.

Rule 5: a chunk belongs to one instance of its window (a sliding window: to one sub-bucket) and is spent before
that ends, by an upper bound of the store's clock. What comes back of it goes back into it.

Rule 6: a settled call is charged to the chunks that it was taken from. What is above its hold comes out of the
chunk too; what the chunk cannot cover is debited at once, in the window of the chunk. The usage record
is handed to the store with the settlement.

Rule 7: chunks that nobody has used between two heartbeats are returned, or shrunk to what open calls hold.
So are all of them by `retire` and `aclose`. Those of a process that dies stay charged, whatever
`expiry_charge` says: part of a chunk is what was settled already. A process that is told by its heartbeat
that it had lapsed stops spending what it held.

Rule 8: the store learns of an open call that has nothing but leased claims when it is older than a heartbeat.
If the process dies before, there is no record of the call; what it held is part of the chunk.

Rule 9: in receipts of leased claims, `used` and `held` are what the store said when it gave the chunk,
and what has come of the chunk since. `read` says what the store says: chunks count as held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.storage.base import TOMBSTONE_MS, Pending, Storage
from asgi_llm_guard.storage.entries import Bounds, Entries, KeepsEntries
from asgi_llm_guard.storage.forks import begin_anew_after_fork
from asgi_llm_guard.storage.lease_amend import Amending
from asgi_llm_guard.storage.lease_book import Book, Lease
from asgi_llm_guard.storage.lease_calls import Call, Calls, Gone, cancels, unheard
from asgi_llm_guard.storage.lease_chunks import PREFIX, Chunks
from asgi_llm_guard.storage.lease_clock import StoreClock
from asgi_llm_guard.storage.lease_reserve import Reserving
from asgi_llm_guard.storage.lease_settle import Settling
from asgi_llm_guard.storage.open_calls import newest, open_holds_of
from asgi_llm_guard.storage.shared import KeepsShared, ListsCalls, OpenCall, Shared
from asgi_llm_guard.storage.streams import KeepsStreams, RecordStream
from asgi_llm_guard.usage import UsageRecord

__all__ = ["LeasingStorage"]

_log = logging.getLogger("asgi_llm_guard.storage")

Answer = Granted | Refused | Ended


class LeasingStorage:
    """A `Storage` around `inner` that serves leased claims from chunks. May be used from several loops and threads.

    Plans without leased claims pass through. What leases cost: `docs/leases.md`.

    `workers`: about how many processes share the meters, until a heartbeat says how many are alive; chunks shrink
    to a fourth of each one's share of what is left. Too low a number strands more near a limit, and admits no more. `skew_ms`: how long before its
    window's end a chunk is not spent any more. `tombstone_ms`: how long an ended call id is known. `clock`: what
    passes between two answers of the store; a monotonic one unless a test gives its own.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        clock: Clock | None = None,
        workers: int = 8,
        skew_ms: int = 20,
        tombstone_ms: int = TOMBSTONE_MS,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("skew_ms", skew_ms, 0), ("tombstone_ms", tombstone_ms, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name}: expected a whole number from {least}, got {value!r}")
        self.inner = inner
        self._local_clock = clock
        self._workers = workers
        self._skew_ms = skew_ms
        self._tombstone_ms = tombstone_ms
        self.begin_anew()
        begin_anew_after_fork(self)

    def begin_anew(self) -> None:
        """Begin with no lease and no call, as in a process that was forked: they are its parent's."""
        self._clock = StoreClock(self._local_clock)
        self._book = Book(workers=self._workers, skew_ms=self._skew_ms)
        self._calls = Calls(self._book, self._tombstone_ms)
        self._chunks = Chunks(self.inner, self._clock, self._book, self._calls)
        self._lock = self._chunks.lock
        self._reserving = Reserving(self._chunks, self._calls)
        self._amending = Amending(self._chunks, self._calls)
        self._settling = Settling(self._chunks, self._calls)

    # ----------------------------------------------------- what calls do: what is not leased passes through

    def reserve(self, owner: str, plans: Sequence[Plan]) -> Coroutine[Any, Any, Answer]:
        # Not `async`: what passes through shall not pay for a coroutine of ours.
        known = self._calls.known
        for plan in plans:
            for bundle in plan:
                if bundle.call_id in known:
                    return self._reserving.reserve(owner, plans)
                for claim in bundle.claims:
                    if claim.meter.lease:
                        return self._reserving.reserve(owner, plans)
        return self.inner.reserve(owner, plans)

    def admit(self, owner: str, plan: Plan) -> Granted | None:
        """Grant a plan from leases, if they have all of it; else change nothing. Never asks the store."""
        return self._reserving.admit(owner, plan)

    def amend(self, owner: str, bundle: Bundle) -> Coroutine[Any, Any, Answer]:
        known = self._calls.known.get(bundle.call_id)
        if known is None:
            for claim in bundle.claims:
                if claim.meter.lease:
                    return self._amending.amend(owner, bundle)
            return self.inner.amend(owner, bundle)
        if isinstance(known, Gone) and known.foreign:
            return self.inner.amend(owner, bundle)
        return self._amending.amend(owner, bundle)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        known = self._calls.known
        for settlement in settlements:
            if settlement.call_id in known or cancels(settlement):
                return self._settling.settle(settlements)
        return self.inner.settle(settlements)

    def abandon(self) -> None:
        """The store has lost its data, leases included: begin anew. Calls that are open are settled by their receipts."""
        self._chunks.abandon()

    # ---------------------------------------------------------------------------------- owners

    async def heartbeat(self, owner: str) -> Heartbeat:
        asked_ms = self._clock.local_ms()
        try:
            beat = await self.inner.heartbeat(owner)
        except DataLost:
            self._chunks.abandon()
            raise
        self._clock.heard(asked_ms, beat.now_ms)
        self._chunks.see_epoch()
        with self._lock:
            self._book.workers = max(1, beat.owners)
            lost = self._book.lapse(owner) if beat.lapsed else 0
            shrunk = self._book.tidy(owner, self._clock.now_ms())
            calls = self._calls.of(owner)
            old = [call for call in calls if call.beats and unheard(call)]
            for call in calls:
                call.beats += 1
        if lost:
            _log.warning("this process sent no heartbeat in time: %d leases were charged in full", lost)
        self._chunks.try_again()
        self._chunks.return_due()
        await asyncio.gather(*map(self._chunks.shrink, shrunk), *map(self._introduce, old))
        # A lease is no call: its end is nobody's news.
        expired = tuple([call_id for call_id in beat.expired if not call_id.startswith(PREFIX)])
        return msgspec.structs.replace(beat, expired=expired)

    async def _introduce(self, call: Call) -> None:
        """Tell the store of a call that has only leased claims, so that a record of it is left whatever comes."""
        call.inner = True
        # If there is no answer, the settlement still names the call; only its record, should this process die, is lost.
        with contextlib.suppress(StorageError):
            await self.inner.reserve(call.owner, ((Bundle(call.bundle.call_id, (), call.bundle.draft),),))

    async def retire(self, owner: str) -> None:
        with self._lock:
            calls = self._calls.of(owner)
            unknown = [call for call in calls if unheard(call)]
            for call in calls:
                self._calls.expire(call, self._clock.now_ms())
            cancelled = self._chunks.leave(owner)
        self._chunks.return_due()
        self._chunks.hand_over(cancelled)
        self._chunks.try_again()  # what is not returned before it, the inner `retire` charges
        await asyncio.gather(*map(self._introduce, unknown))
        await self.inner.retire(owner)

    # ------------------------------------------------------------------------------ read, reset

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        return await self.inner.read(meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        with self._lock:
            open_: list[tuple[Lease, int]] = []
            for slots in self._book.owners.values():
                for meter in meters:
                    slot = slots.get(meter.key)
                    for lease in tuple(slot.leases) if slot is not None else ():
                        self._book.close(lease)
                        if not lease.returned:
                            open_.append((lease, lease.used))
        self._chunks.return_due()
        await self.inner.reset(meters)
        shrunk = []
        with self._lock:
            now_ms = self._clock.now_ms()
            for lease, used in open_:
                if not lease.returned and lease.forget(used) and now_ms < lease.until_ms:
                    shrunk.append(lease)
        for lease in shrunk:
            await self._chunks.shrink(lease)

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        return await self.inner.records(since_ms=since_ms, limit=limit)

    def export(self) -> AsyncIterator[bytes]:
        return self.inner.export()

    async def load(self, lines: Iterable[bytes]) -> None:
        await self.inner.load(lines)

    async def open_holds(self) -> int:
        return await self.inner.open_holds()

    def entries(self, space: str, bounds: Bounds | None = None) -> Entries:
        """As `KeepsEntries`, if the storage behind it is one."""
        if not isinstance(self.inner, KeepsEntries):
            raise ConfigurationError(f"entries: a {type(self.inner).__name__} cannot keep {space!r}")
        return self.inner.entries(space, bounds)

    def shared(self) -> Shared:
        """As `KeepsShared`, if the storage behind it is one."""
        if not isinstance(self.inner, KeepsShared):
            raise ConfigurationError(f"shared: a {type(self.inner).__name__} cannot keep what processes share")
        return self.inner.shared()

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        """As `ListsCalls`, if the storage behind it is one, else nothing of other processes. Calls that were granted
        from leases alone are there at once in their own process, and in others after a heartbeat or two."""
        found: list[OpenCall] = []
        sought = limit
        while isinstance(self.inner, ListsCalls):
            of_store = await self.inner.open_calls(sought)
            found = [call for call in of_store if not call.call_id.startswith(PREFIX)]
            if len(found) >= limit or len(of_store) < sought:
                break
            sought *= 2  # leases are held like calls, and have filled the page
        known = {call.call_id for call in found}
        with self._lock:
            mine = [call for call in self._calls.of() if unheard(call)]
        found += [
            OpenCall(
                call_id=call.bundle.call_id,
                owner=call.owner,
                at_ms=call.bundle.draft.at_ms,
                draft=call.bundle.draft,
                held=open_holds_of(call.rest()),
            )
            for call in mine
            if call.bundle.draft is not None and call.bundle.call_id not in known
        ]
        return newest(found, limit)

    def streams(self) -> Sequence[RecordStream]:
        """As `KeepsStreams`, if the storage behind it is one."""
        if not isinstance(self.inner, KeepsStreams):
            raise ConfigurationError(f"streams: a {type(self.inner).__name__} keeps no stream of its records")
        return self.inner.streams()

    async def aclose(self) -> None:
        with self._lock:
            for call in self._calls.of():
                self._calls.expire(call, self._clock.now_ms())
            cancelled = self._chunks.leave()
        await self._chunks.stop()
        self._chunks.return_due()
        self._chunks.hand_over(cancelled)
        await self.inner.aclose()
