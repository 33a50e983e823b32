"""Handing settlements over to the storage: never refused, and tried again until it takes them.

Rule 1: settling never raises and never waits. What the storage does not take waits here, in order, and is handed over
before anything else is decided.

Rule 2: what calls have used is kept, however much there is of it. A cancellation undoes what was most likely never
granted, so only so many of them wait.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from asgi_llm_guard.claims import Bundle, Settled, Settlement
from asgi_llm_guard.engine.data_loss import DataLoss
from asgi_llm_guard.engine.holds import Hold
from asgi_llm_guard.engine.kept import Kept
from asgi_llm_guard.engine.store import Store, unsent
from asgi_llm_guard.engine.telling import Telling
from asgi_llm_guard.engine.waiters import Waiters
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import BacklogFull, SettledCall
from asgi_llm_guard.storage.base import Completed, Pending

__all__ = ["MOST_UNSETTLED", "Settling"]

_log = logging.getLogger("asgi_llm_guard")

MOST_UNSETTLED: Final = 10_000
"""How many cancellations are kept while the storage does not answer."""
_HANDED_OVER: Final = 256
"""How many settlements are handed over in one step: the first of them also show whether the storage is back."""


class Settling:
    """Hands the settlements of one process over. From any thread."""

    def __init__(self, store: Store, loss: DataLoss, kept: Kept, waiters: Waiters, telling: Telling) -> None:
        self.unsettled: deque[Settlement] = deque()
        """What waits for the storage to answer again."""
        self.handing_over = False
        """Whether some of it is neither here nor there: another thread hands it over just now."""
        self.tried: set[str] = set()
        """Calls that were settled without an answer: if they turn out to be settled, it was by us."""
        self._store = store
        self._loss = loss
        self._kept = kept
        self._waiters = waiters
        self._telling = telling
        self._handing_over = threading.RLock()
        self._told_at: int | None = None
        """In which one of the store's states it was told that too much waits; `None`: in none yet."""

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Hand settlements over. Never raises: what the storage does not take is tried again."""
        if self._kept.slots:
            settlements = self._kept.ended(settlements)
        here, totals = self._store.here, self._loss.totals
        if here.open:
            here.settle(settlements)
        if totals is not None:
            totals.closed(settlements)
        try:
            return self._deliver(settlements)
        except StorageError:
            return Completed(())  # it waits to be tried again

    def cancel(self, bundles: Iterable[Bundle]) -> None:
        """Nobody takes what is granted of these."""
        self.settle([Settlement(bundle.call_id, ()) for bundle in bundles])

    def give_back(self, hold: Hold) -> None:
        """Nothing was used of it, whatever the storage knows of it."""
        self.settle([Settlement(hold.call_id, (), None, hold.receipts)])

    async def reconcile(self) -> None:
        """Hand over what waits to be settled, so that it counts in what is decided next.

        Raises:
            StorageError: the storage does not take it; nothing was asked.
        """
        try:
            pending = self.hand_over()
            while self.unsettled:  # more than one step takes; whether it is taken shows in the first
                await pending
                pending = self.hand_over()
        except StorageError as error:
            raise unsent(str(error)) from error

    def settle_again(self) -> None:
        """Hand over everything that waits, as far as the storage takes it."""
        with contextlib.suppress(StorageError):
            for _ in range(0, len(self.unsettled), _HANDED_OVER):
                self.hand_over()

    def hand_over(self) -> Pending[tuple[Settled, ...]]:
        """Hand over the first of what waits, when no other thread does. So whoever decides next comes behind them.

        Raises:
            StorageError: as `Storage.settle`; they wait again.
        """
        first: list[Settlement] = []
        with self._handing_over:
            self.handing_over = True
            try:
                while self.unsettled and len(first) < _HANDED_OVER:  # one by one: the storage's thread may add to them
                    first.append(self.unsettled.popleft())
                return self._deliver(first) if first else Completed(())
            finally:
                self.handing_over = False

    def tell_lost(self) -> None:
        """The guard was closed: say what nobody will hand over any more."""
        lost = sum(settlement.record is not None for settlement in self.unsettled)
        if lost:
            _log.error(
                "the usage store was still away when the guard was closed: what %s calls have used is not in it; "
                "of these, it charges those that it knew as what they held",
                lost,
            )

    # ------------------------------------------------------------------------ what becomes of them

    def _deliver(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        store = self._store
        try:
            # Leases take note of a settlement in any case: they are spent while the storage is away.
            if store.interruptible is not None and store.leasing is None:
                store.check_available()
            pending = store.verbs.settle(settlements)
        except StorageError as error:
            self._try_again(settlements, error)
            raise
        if pending.done():
            self._settled(settlements, pending)
        else:
            pending.add_done_callback(lambda done: self._settled(settlements, done))
        return pending

    def _settled(self, settlements: Sequence[Settlement], pending: Pending[tuple[Settled, ...]]) -> None:
        try:
            replies = pending.result()
        except StorageError as error:
            self._try_again(settlements, error)
            return
        self._waiters.wake()
        totals = self._loss.totals
        if self._telling.observers or totals is not None or self.tried:
            for settlement, settled in zip(settlements, replies, strict=True):
                if settled.status != "duplicate" or settlement.call_id in self.tried:
                    if totals is not None:
                        totals.settled(settlement, settled, is_old=self._loss.is_same_data())
                    if settlement.record is not None:
                        self._telling.tell(SettledCall(settlement.record, settled))
                self.tried.discard(settlement.call_id)

    def _try_again(self, settlements: Sequence[Settlement], error: StorageError) -> None:
        if not self._store.closed:
            self._store.failed(error)
        for settlement in settlements:
            if len(self.unsettled) < MOST_UNSETTLED or _matters(settlement):
                self.unsettled.append(settlement)
                if error.sent and _matters(settlement):
                    self.tried.add(settlement.call_id)
            elif self._told_at != self._store.changes:
                self._told_at = self._store.changes
                _log.error("%s settlements wait for the usage store; cancellations are dropped", len(self.unsettled))
                self._telling.tell(BacklogFull(len(self.unsettled)))


def _matters(settlement: Settlement) -> bool:
    """Whether a settlement says more than that nothing was used of what was most likely never granted."""
    return settlement.record is not None or bool(settlement.receipts) or bool(settlement.debits)
