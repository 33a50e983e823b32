"""The heartbeat: keeps the holds of this process alive, and makes good what an outage or a lapse has left."""

from __future__ import annotations

import contextlib
import logging

from asgi_llm_guard.claims import Bundle, Granted, Unit
from asgi_llm_guard.engine.data_loss import DataLoss
from asgi_llm_guard.engine.holds import Hold
from asgi_llm_guard.engine.kept import Kept
from asgi_llm_guard.engine.outage import lifted_bundle
from asgi_llm_guard.engine.settling import Settling
from asgi_llm_guard.engine.store import Store
from asgi_llm_guard.engine.telling import Telling
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.events import Expired, SlotOverrun

__all__ = ["Heart"]

_log = logging.getLogger("asgi_llm_guard")


class Heart:
    """Beats for the owner of one store, every few seconds on the background loop, until it retires."""

    def __init__(self, store: Store, loss: DataLoss, kept: Kept, settling: Settling, telling: Telling) -> None:
        self.beat_ms: int | None = None
        """When the storage answered a heartbeat last; `None`: never."""
        self.skew_ms = 0
        """How far its clock was ahead of this process's then."""
        self._store = store
        self._loss = loss
        self._kept = kept
        self._settling = settling
        self._telling = telling

    async def heartbeat(self) -> None:
        """Keep this process's holds alive, expire those of dead ones, and retry what could not be settled."""
        store, kept = self._store, self._kept
        # Settled before the beat, for holds that it may find lapsed; but not all of it, if nobody takes it.
        with contextlib.suppress(StorageError):
            self._settling.hand_over()
        try:
            beat = await store.verbs.heartbeat(store.owner)
            await self._loss.follow()
            if store.state == "lost":
                await self._loss.see()
        except DataLost as error:
            await self._loss.lose(error)
            return
        except StorageError as error:
            if not store.closed:  # else it was closed while this beat was on its way
                store.failed(error)
            return
        store.here.processes = max(1, beat.owners)
        self.beat_ms = store.clock.now_ms()
        self.skew_ms = beat.now_ms - self.beat_ms
        store.answered()
        self._settling.settle_again()
        if store.here.open:
            await self._reopen()
        if beat.expired:
            self._telling.tell(Expired(beat.expired))
        if beat.lapsed:
            _log.warning("this process sent no heartbeat in time and its holds were expired; taking slots again")
            kept.lapse()
        if kept.lapsed:
            await self._take_slots_again()

    async def retire(self) -> None:
        """Expire, and charge, what this process still holds, as if it had died. Later settlements correct it.

        When it returns, everything that was handed over before is written.
        """
        self._settling.settle_again()
        self._kept.forget()  # slots are given back, and not to be taken again
        try:
            await self._store.storage.retire(self._store.owner)
        except StorageError as error:
            self._store.failed(error)

    async def _reopen(self) -> None:
        """Make holds of what was admitted here and is still open: it holds its slots, and is charged if we die."""
        store, here = self._store, self._store.here
        for bundle in here.bundles:
            try:
                answer = await store.verbs.reserve(store.owner, ((lifted_bundle(bundle),),))
            except StorageError as error:
                store.failed(error)
                return
            # If it ended meanwhile, its settlement has come before, and this was refused; or it will, and is no loss.
            if here.forget(bundle.call_id) and isinstance(answer, Granted):
                self._kept.keep(Hold(bundle.call_id, bundle.claims, answer.receipts, bundle.draft))

    async def _take_slots_again(self) -> None:
        store, kept = self._store, self._kept
        while kept.lapsed:
            hold = kept.lapsed.popleft()
            if hold.call_id not in kept.slots:
                continue  # it has ended
            claims = tuple(claim for claim in hold.claims if claim.meter.unit is Unit.SLOTS)
            again = Bundle(store.new_id(), claims)
            try:
                answer = await store.verbs.reserve(store.owner, ((again,),))
            except StorageError as error:
                store.failed(error)
                if error.sent:
                    self._settling.cancel((again,))
                kept.lapsed.appendleft(hold)  # for the next heartbeat
                return
            if not isinstance(answer, Granted):
                self._telling.tell(SlotOverrun(hold.call_id, tuple(claim.meter.policy for claim in claims)))
                continue
            taken = Hold(again.call_id, claims, answer.receipts)
            if hold.call_id in kept.slots:
                kept.took_again(hold, taken)
            else:  # it ended while we asked
                self._settling.give_back(taken)
