"""What the storage holds for this process, as far as it may have to be asked for again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from asgi_llm_guard.claims import Bundle, Settlement, Unit
from asgi_llm_guard.engine.data_loss import DataLoss
from asgi_llm_guard.engine.holds import Hold

__all__ = ["Kept"]

_SLOTS: Final = Unit.SLOTS  # kept: looking it up costs more than the rest of the loop that asks for it


class Kept:
    """The holds with slots in them, which are given to others when this process was thought dead; and what
    `DataLoss.totals` has to know of all holds."""

    __slots__ = ("_loss", "_retaken", "lapsed", "slots")

    def __init__(self, loss: DataLoss) -> None:
        self._loss = loss
        self.forget()

    def forget(self) -> None:
        """Nothing is held: this is a new process, or everything was given back."""
        self.slots: dict[str, Hold] = {}
        """Holds with slots in them, by call id."""
        self.lapsed: deque[Hold] = deque()
        """Those of them whose slots are to be taken again."""
        self._retaken: dict[str, Hold] = {}

    def keep(self, hold: Hold) -> None:
        """It was granted, or changed. What this process has decided by itself, the storage does not hold."""
        if hold.degraded:
            return
        for claim in hold.claims:
            if claim.meter.unit is _SLOTS:
                self.slots[hold.call_id] = hold
                break
        if self._loss.totals is not None:
            self._loss.totals.opened(Bundle(hold.call_id, hold.claims, hold.draft))

    def lapse(self) -> None:
        """The storage has expired all of them."""
        self.lapsed = deque(self.slots.values())

    def took_again(self, hold: Hold, again: Hold) -> None:
        """The slots of `hold` are in `again` now, and end with it."""
        self._retaken[hold.call_id] = again

    def ended(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        """These are settled: the same, and those of slots that were taken again for them."""
        more = []
        for settlement in settlements:
            self.slots.pop(settlement.call_id, None)
            if self._retaken and (again := self._retaken.pop(settlement.call_id, None)) is not None:
                more.append(Settlement(again.call_id, (), None, again.receipts))
        return (*settlements, *more) if more else settlements
