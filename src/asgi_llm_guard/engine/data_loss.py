"""What becomes of a storage that has lost its data: who notices, who accepts it, and what it is told again.

Rule 1: of those who notice a loss, one accepts it, and the others wait for that one.

Rule 2: data that were accepted elsewhere are noticed by their epoch, and told the same.

What is told, and how it is counted once, says `totals.py`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from typing import TYPE_CHECKING, Final, Literal

from asgi_llm_guard.claims import Bundle
from asgi_llm_guard.engine.outage import lifted_bundle
from asgi_llm_guard.engine.store import Store
from asgi_llm_guard.engine.telling import Telling
from asgi_llm_guard.engine.totals import Totals
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.events import DataLost as DataLostEvent

if TYPE_CHECKING:
    from asgi_llm_guard.cache import ResponseCache

__all__ = ["DataLoss", "OnDataLoss"]

_log = logging.getLogger("asgi_llm_guard")

OnDataLoss = Literal["deny", "accept", "rebuild"]

_TOLD: Final = 256
"""How many totals are told in one step."""


class DataLoss:
    """Goes on, or not, with a storage that was flushed or rolled back."""

    def __init__(self, on_data_loss: OnDataLoss, store: Store, telling: Telling) -> None:
        self.on_data_loss: OnDataLoss = on_data_loss
        self.cache: ResponseCache | None = None
        """What is told before a loss is accepted; `None`: no answers are kept."""
        self._store = store
        self._telling = telling
        self.forked()

    def forked(self) -> None:
        """This is a new process, which has settled nothing."""
        rebuilds = self.on_data_loss == "rebuild" and self._store.loss_aware is not None
        self.totals = Totals(self._store.clock) if rebuilds else None
        """What this process would tell a storage that has lost it; `None`: nothing."""
        self._epoch = ""
        self._lock = threading.Lock()
        self._accepting: concurrent.futures.Future[bool] | None = None

    async def lose(self, error: DataLost) -> bool:
        """The storage has lost its data: do as the guard was told. Gives whether to go on with it."""
        if self._store.change("lost", error):
            if self._store.leasing is not None:
                self._store.leasing.abandon()  # it need not have seen the loss: what leases nothing passes through it
            _log.error(
                "the usage store has lost its data (on_data_loss=%r)%s: %s",
                self.on_data_loss,
                "; calls are refused until `await guard.accept_data_loss()`" if self.on_data_loss == "deny" else "",
                error,
            )
            self._telling.tell(DataLostEvent(str(error), self.on_data_loss))
        if self.on_data_loss == "deny" or self._store.loss_aware is None:
            return False
        mine: concurrent.futures.Future[bool] = concurrent.futures.Future()
        mine.set_running_or_notify_cancel()  # those who wait cannot cancel it
        with self._lock:
            first = self._accepting is None
            accepting = self._accepting = self._accepting or mine
        if not first:
            return await asyncio.wrap_future(accepting)
        try:
            await self.accept()
            mine.set_result(True)
        except StorageError as failure:
            self._store.failed(failure)
        finally:
            self._accepting = None
            if not mine.done():
                mine.set_result(False)
        return mine.result()

    async def accept(self) -> None:
        """Go on with the data that there is; with `rebuild`, tell it what this process has settled.

        Raises:
            StorageError: the storage does not answer.
        """
        store = self._store
        if store.loss_aware is None or (self.totals is not None and store.state != "lost"):
            return  # what is told where nothing was lost would count twice
        if self.cache is not None:
            await self.cache.forget_lost(store.loss_aware)  # what was revoked lately may be there again
        await store.loss_aware.accept_loss()
        await self.follow()  # before this, nothing is decided here: every call would do it, too
        store.answered()

    def is_same_data(self) -> bool:
        """Whether the storage goes by the data that it went by when this was asked last."""
        epoch = self._store.loss_aware.epoch if self._store.loss_aware is not None else ""
        self._epoch = self._epoch or epoch
        return self._epoch == epoch

    async def follow(self) -> None:
        """If the storage goes by other data since a loss was accepted, here or elsewhere, tell it what this process knows.

        Raises:
            DataLost: it has lost its data once more.
            StorageError: it does not answer; what was told is told again, and counts once.
        """
        store, totals = self._store, self.totals
        if totals is None or self.is_same_data() or store.loss_aware is None:
            return
        accepted = store.loss_aware.epoch
        await self.see()
        told = totals.settlements(store.owner, accepted)
        for first in range(0, len(told), _TOLD):
            await store.verbs.settle(told[first : first + _TOLD])
        for bundle in totals.bundles:
            await store.verbs.reserve(store.owner, ((lifted_bundle(bundle),),))
        self._epoch = accepted

    async def see(self) -> None:
        """See whether the storage has lost its data, and nobody has accepted it.

        Settling and heartbeats never ask which data it is; changing a hold that there is not does, and changes nothing.

        Raises:
            DataLost: so it is.
            StorageError: it does not answer.
        """
        await self._store.verbs.amend(self._store.owner, Bundle(self._store.new_id(), ()))
