"""Refusals that a process remembers for a moment, so that the store is not asked in a loop for what it cannot grant yet."""

from __future__ import annotations

import time
from typing import Final

from asgi_llm_guard.claims import Claim, Refused

__all__ = ["Refusals"]

_REMEMBERED: Final = 1024


class Refusals:
    """The latest refusals of one storage, by what was claimed. `remember_s`: for so long at the most; 0: none."""

    def __init__(self, remember_s: float) -> None:
        self.remember_s = remember_s
        self.forgotten = 0
        """How often all were forgotten: what was asked for before the last time is not remembered."""
        self._by_claims: dict[tuple[Claim, ...], tuple[float, Refused]] = {}

    def of(self, claims: tuple[Claim, ...]) -> Refused | None:
        """The refusal of just these claims, if it still stands."""
        remembered = self._by_claims.get(claims) if self._by_claims else None
        return remembered[1] if remembered is not None and time.monotonic() < remembered[0] else None

    def remember(self, claims: tuple[Claim, ...], answer: Refused) -> None:
        """Keep a refusal that no settlement of others can lift for a moment."""
        wait_ms = None
        for receipt in answer.states[0]:
            meter = receipt.claim.meter
            if receipt.fits or not meter.enforce or meter.limit is None:
                continue
            if receipt.used + receipt.claim.amount <= meter.limit:
                return  # a hold stands in the way
            left = self.remember_s * 1000 if receipt.resets_at_ms is None else receipt.resets_at_ms - answer.now_ms
            wait_ms = left if wait_ms is None else min(left, wait_ms)
        if wait_ms is not None and wait_ms > 0:
            if len(self._by_claims) >= _REMEMBERED:
                self._by_claims.clear()
            self._by_claims[claims] = (time.monotonic() + min(wait_ms / 1000, self.remember_s), answer)

    def forget(self) -> None:
        """Something was given back here: what is on its way is not remembered, either."""
        self.forgotten += 1
        if self._by_claims:
            self._by_claims.clear()
