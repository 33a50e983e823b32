"""Chunks between a process and its store: fetched beside the calls that need them, shrunk, and returned.

Rules 3, 4 and 7 of `leases.py`. What becomes of a chunk while it is here: `lease_book.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Receipt, Refused, Settled, Settlement
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.storage.base import LossAware, Pending, Storage
from asgi_llm_guard.storage.lease_book import Book, Lease, Slot
from asgi_llm_guard.storage.lease_calls import Calls, Fetch
from asgi_llm_guard.storage.lease_clock import StoreClock

__all__ = ["PREFIX", "Chunks"]

_log = logging.getLogger("asgi_llm_guard.storage")

PREFIX: Final = "lease:"
"""What the call ids of leases begin with."""

Answer = Granted | Refused | Ended


class Chunks:
    """The chunks of one process. `lock` guards `book` and `calls`, and is held by nobody who waits."""

    def __init__(self, inner: Storage, clock: StoreClock, book: Book, calls: Calls) -> None:
        self.inner = inner
        self.clock = clock
        self.book = book
        self.lock = threading.Lock()
        self._calls = calls
        self._aware = inner if isinstance(inner, LossAware) else None
        self._epoch = ""
        self._name = os.urandom(9).hex()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreturned: deque[Settlement] = deque()

    # ------------------------------------------------------------------------ what the store says

    def heard(self, asked_ms: int, answer: Answer) -> None:
        """Note an answer of the store to what was asked at `asked_ms` of this process."""
        if not isinstance(answer, Refused):  # that may be remembered: said earlier than it was asked for
            self.clock.heard(asked_ms, answer.now_ms)
        self.see_epoch()

    def see_epoch(self) -> None:
        """Where another process has accepted a loss, nobody is told: the store goes by data that has no chunk of this one."""
        if self._aware is not None:
            epoch = self._aware.epoch
            if self._epoch and epoch != self._epoch and self.book.leases:
                self.abandon()
            self._epoch = epoch

    def abandon(self) -> None:
        """The store has lost its data, leases included: begin anew. Calls that are open are settled by their receipts."""
        with self.lock:
            self._epoch = ""
            self.book.abandon()
            self._calls.abandon()

    def look_at(
        self, fetches: list[Fetch], owner: str, receipts: Sequence[Receipt], parts: Sequence[Lease | None]
    ) -> None:
        """Note what the store said of leased meters, and which of them need a chunk."""
        slots = self.book.slots(owner)
        for receipt, lease in zip(receipts, parts, strict=True):
            claim = receipt.claim
            slot = slots.get(claim.meter.key)
            if slot is None or not claim.meter.lease:
                continue
            if lease is None:
                self.book.saw(slot, receipt, claim.amount)
            if slot.current is None or slot.current.left < slot.current.low:
                self.want(fetches, slot, owner, claim)

    # ------------------------------------------------------------------------------- fetching

    def want(self, fetches: list[Fetch], slot: Slot, owner: str, claim: Claim) -> None:
        """Add a chunk for `claim` to what is to be fetched, if one is worth while."""
        size = self.book.wanted(slot, claim.meter, claim.amount)
        if size:
            slot.fetching = f"{PREFIX}{self._name}-{next(self._numbers):x}"
            fetches.append(Fetch(owner, slot, slot.fetching, claim.meter, size))

    def fetch_soon(self, fetches: list[Fetch]) -> None:
        """Ask for these chunks beside whatever the running event loop does."""
        for fetch in fetches:
            task = asyncio.get_running_loop().create_task(self._fetch(fetch))
            self._tasks.add(task)
            task.add_done_callback(partial(self._fetched, fetch))

    def _fetched(self, fetch: Fetch, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if fetch.slot.fetching == fetch.call_id:  # cancelled before it began
            fetch.slot.fetching = None

    async def _fetch(self, fetch: Fetch) -> None:
        """Reserve a chunk. Without an answer, it is cancelled: nobody would return it."""
        slot, call_id, meter = fetch.slot, fetch.call_id, fetch.meter
        if meter.expiry_charge != "hold":
            # A part of the chunk may be what calls have used and settled: it must not be given back with the rest.
            meter = msgspec.structs.replace(meter, expiry_charge="hold")
        asked_ms = self.clock.local_ms()
        try:
            answer = await self.inner.reserve(fetch.owner, ((Bundle(call_id, (Claim(meter, fetch.size),)),),))
        except BaseException as error:
            if not isinstance(error, StorageError) or error.sent:
                self.hand_over([Settlement(call_id, ())])
            if not isinstance(error, StorageError):
                raise
            if isinstance(error, DataLost):
                self.abandon()
            _log.debug("no chunk of %s was leased: %s", meter.key, error)
            return
        self.heard(asked_ms, answer)
        with self.lock:
            wanted = slot.fetching == call_id
            slot.fetching = None
            unwanted = False
            if isinstance(answer, Granted):
                (receipt,) = answer.receipts
                if wanted and receipt.taken:
                    self.book.add(slot, fetch.owner, call_id, receipt)
                else:
                    unwanted = True
            elif isinstance(answer, Refused):
                self.book.saw(slot, answer.states[0][0], 0)
        if unwanted:
            self.hand_over([Settlement(call_id, ())])
        self.return_due()

    async def stop(self) -> None:
        """Nothing more is fetched from the running event loop."""
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------ returning

    def leave(self, owner: str | None = None) -> list[Settlement]:
        """Return all leases of an owner, or of all; gives the cancellations of those that are on their way. Under the lock."""
        owners = tuple(self.book.owners) if owner is None else (owner,)
        return [Settlement(call_id, ()) for name in owners for call_id in self.book.leave(name)]

    def return_due(self) -> None:
        """Return the chunks that no call holds of any more."""
        if self.book.due:
            with self.lock:
                settlements = self.book.collect()
            self.hand_over(settlements)

    def hand_over(self, settlements: list[Settlement]) -> None:
        """Settle leases. What the store does not take is tried again with the next heartbeat, or by `retire`."""
        if not settlements:
            return
        try:
            pending = self.inner.settle(settlements)
        except StorageError:
            self._unreturned.extend(settlements)
            return
        pending.add_done_callback(partial(self._handed_over, settlements))

    def _handed_over(self, settlements: list[Settlement], pending: Pending[tuple[Settled, ...]]) -> None:
        try:
            pending.result()
        except StorageError:
            self._unreturned.extend(settlements)

    def try_again(self) -> None:
        """Hand over once more what the store did not take."""
        self.hand_over([self._unreturned.popleft() for _ in range(len(self._unreturned))])

    async def let_go(self, slots: Iterable[Slot]) -> None:
        """Give back what is left of these meters' chunks."""
        with self.lock:
            shrunk = self.book.let_go(slots, self.clock.now_ms())
        self.return_due()
        for lease in shrunk:
            await self.shrink(lease)

    async def shrink(self, lease: Lease) -> None:
        """Tell the store that a lease holds less."""
        asked_ms = self.clock.local_ms()
        claim = Claim(lease.receipt.claim.meter, lease.amount)
        try:
            answer = await self.inner.amend(lease.owner, Bundle(lease.call_id, (claim,)))
        except StorageError:
            return  # it is returned when its calls have ended
        self.heard(asked_ms, answer)
        if isinstance(answer, Granted) and answer.receipts[0].pin != lease.pin:
            # The window has ended in between, and the hold was moved to the next one, of which nothing was spent.
            self.hand_over([Settlement(lease.call_id, ())])

    # ------------------------------------------------------------------ before a refusal is told

    async def insist(self, owner: str, ask: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """The store's answer; where what is left of leases of this process would turn a refusal, after giving it back."""
        asked_ms = self.clock.local_ms()
        answer = await ask()
        if isinstance(answer, Refused):
            with self.lock:
                slots = self._unspent(owner, answer)
            if slots:
                await self.let_go(slots)
                asked_ms = self.clock.local_ms()
                answer = await ask()
        self.heard(asked_ms, answer)
        return self._without_own(owner, answer) if isinstance(answer, Refused) else answer

    def _unspent(self, owner: str, answer: Refused) -> list[Slot]:
        """Leased meters that refuse, and would not if this process had no lease on them."""
        slots = self.book.slots(owner)
        found: list[Slot] = []
        for states in answer.states:
            for receipt in states:
                meter = receipt.claim.meter
                slot = slots.get(meter.key)
                if slot is None or receipt.fits or meter.limit is None:
                    continue
                self.book.saw(slot, receipt, 0)
                unspent = slot.unspent()
                if unspent and receipt.used + receipt.held - unspent + receipt.claim.amount <= meter.limit:
                    found.append(slot)
        return found

    def _without_own(self, owner: str, answer: Refused) -> Refused:
        """The refusal without what this process has left: that is held by no call, and a smaller claim would have it."""
        with self.lock:
            slots = self.book.slots(owner)
            unspent = {key: left for key, slot in slots.items() if (left := slot.unspent())}
        if not unspent:
            return answer
        states = tuple(
            [
                tuple(
                    [msgspec.structs.replace(r, held=max(0, r.held - unspent.get(r.claim.meter.key, 0))) for r in state]
                )
                for state in answer.states
            ]
        )
        return Refused(states, answer.now_ms)
