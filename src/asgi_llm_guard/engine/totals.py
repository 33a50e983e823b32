"""What one process has settled and still holds, so that it can be told again to a store that has lost it.

Rule 1: a settlement is counted when the store has confirmed it, and found its hold. One whose hold the
store did not know, now or when it was asked before (`lost`, `duplicate`), may have been charged to new data
already, which must not be told of it again: it is counted when the next decision has shown that it is in the
data that the store goes by.

Rule 2: totals are told under ids that name the process, the new data and the meter. Told again, for the
first answer was lost, they change nothing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from asgi_llm_guard.claims import Bundle, Claim, Receipt, Settled, Settlement
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.engine.outage import over
from asgi_llm_guard.windows import BUCKET, CALENDAR, DISTINCT, LIFETIME, SLIDING, SLOTS

__all__ = ["Totals"]

_PURGE: Final = 2  # totals looked at for each new one, so that what is over does not add up


class Totals:
    """For each meter what this process has settled in its current window, and the bundles that are open."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._totals: dict[tuple[str, int], Receipt] = {}
        self._line: deque[tuple[str, int]] = deque()
        self._unsure: list[Settlement] = []
        self._open: dict[str, Bundle] = {}

    def __len__(self) -> int:
        return len(self._totals)

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """What is open, in the order of admission."""
        return tuple(self._open.values())

    def opened(self, bundle: Bundle) -> None:
        """A bundle was granted, or changed."""
        self._open[bundle.call_id] = bundle

    def closed(self, settlements: Sequence[Settlement]) -> None:
        """These were handed over: what they were held for is not held any more."""
        for settlement in settlements:
            self._open.pop(settlement.call_id, None)

    def settled(self, settlement: Settlement, reply: Settled, *, is_old: bool = True) -> None:
        """The store has confirmed what this process has asked for: `duplicate` means, when it was asked before.

        `is_old`: the store goes by the data that was last told.
        """
        if is_old and reply.status in ("settled", "late"):
            self._count(settlement)
        else:
            self._unsure.append(settlement)

    def decided(self) -> None:
        """The store has decided by the data that was last told: what was charged without a hold is in it, too."""
        if self._unsure:
            unsure, self._unsure = self._unsure, []
            for settlement in unsure:
                self._count(settlement)

    def settlements(self, owner: str, epoch: str) -> list[Settlement]:
        """What to tell the new data `epoch`: one settlement for each meter and window."""
        now_ms = self._clock.now_ms()
        told = []
        for (key, pin), total in tuple(self._totals.items()):
            if not over(total, now_ms):
                name = hashlib.blake2b(f"{pin}:{key}".encode(), digest_size=12).hexdigest()
                told.append(Settlement(f"rebuild-{owner}-{epoch}-{name}", (total.claim.amount,), None, (total,)))
        return told

    def _count(self, settlement: Settlement) -> None:
        now_ms = self._clock.now_ms()
        if settlement.actuals:
            for receipt, actual in zip(settlement.receipts, settlement.actuals, strict=False):
                if receipt.taken:
                    self._add(receipt, receipt.claim.amount if actual is None else actual, now_ms)
        for claim in settlement.debits:
            self._add(self._current(claim, now_ms), claim.amount, now_ms)

    def _add(self, receipt: Receipt, amount: int, now_ms: int) -> None:
        meter = receipt.claim.meter
        if amount <= 0 or meter.kind in (SLOTS, DISTINCT):
            return
        # Sub-buckets add up one by one; of everything else there is one instance at a time.
        key = (meter.key, receipt.pin if meter.kind == SLIDING else 0)
        before = self._totals.get(key)
        pin, resets_at_ms = receipt.pin, receipt.resets_at_ms
        if before is not None and not over(before, now_ms):
            if meter.kind == BUCKET:
                amount += _backlog(before, pin)
            elif pin == before.pin or (meter.kind < CALENDAR and not over(receipt, now_ms)):
                # Another start in a window that runs was made up by this process, during an outage.
                amount += before.claim.amount
                pin = before.pin
                resets_at_ms = max(resets_at_ms or 0, before.resets_at_ms or 0)
            elif pin < before.pin:
                return  # of an instance that is over
        if before is None:
            self._purge(now_ms)
            self._line.append(key)
        self._totals[key] = Receipt(Claim(meter, amount), True, True, 0, 0, pin, resets_at_ms)

    def _current(self, claim: Claim, now_ms: int) -> Receipt:
        """A receipt for what was charged to the current instance without having been held."""
        meter = claim.meter
        window: Any = meter.window
        pin, resets_at_ms = now_ms, now_ms
        before = self._totals.get((meter.key, 0))
        if meter.kind == CALENDAR:
            pin, resets_at_ms = window.bounds(now_ms)
        elif meter.kind == SLIDING:
            pin = now_ms // window.bucket_ms
        elif before is not None and meter.kind < CALENDAR and not over(before, now_ms):
            pin, resets_at_ms = before.pin, before.resets_at_ms or now_ms
        elif meter.kind < CALENDAR:
            resets_at_ms = now_ms + (window.ttl_ms if meter.kind == LIFETIME else window.period_ms)
        return Receipt(claim, True, True, 0, 0, pin, resets_at_ms)

    def _purge(self, now_ms: int) -> None:
        for _ in range(min(_PURGE, len(self._line))):
            key = self._line.popleft()
            if over(self._totals[key], now_ms):
                del self._totals[key]
            else:
                self._line.append(key)


def _backlog(total: Receipt, at_ms: int) -> int:
    """What is left in a bucket at an instant, in whole units, rounded up."""
    window: Any = total.claim.meter.window
    drained = max(0, at_ms - total.pin) * (total.claim.meter.limit or 0) // window.period_ms
    return max(0, total.claim.amount - int(drained))
