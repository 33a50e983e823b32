"""Check-then-record, as gateways do it: what the torture has to catch, or it proves nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence

from asgi_llm_guard.claims import (
    Bundle,
    Claim,
    Ended,
    Granted,
    Heartbeat,
    Meter,
    Plan,
    Reading,
    Receipt,
    Refused,
    Settled,
    Settlement,
    Unit,
)
from asgi_llm_guard.storage.base import Pending, Storage
from asgi_llm_guard.usage import UsageRecord

__all__ = ["CheckThenRecord"]


class CheckThenRecord:
    """Looks whether a plan fits, and charges what it used when it has ended; in between it holds nothing.

    Slots, which are nothing but holds, are not kept at all.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._admitted: dict[str, tuple[Claim, ...]] = {}

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        plan = plans[0]
        claims = [claim for bundle in plan for claim in bundle.claims]
        readings = await self._storage.read([claim.meter for claim in claims])
        receipts = tuple(_receipt(claim, reading) for claim, reading in zip(claims, readings, strict=True))
        if not all(receipt.fits for receipt in receipts):
            return Refused((receipts,), 0)
        for bundle in plan:
            self._admitted[bundle.call_id] = bundle.claims
        return Granted(receipts, 0)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        return await self.reserve(owner, ((bundle,),))

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        return self._storage.settle([self._recording(settlement) for settlement in settlements])

    def _recording(self, settlement: Settlement) -> Settlement:
        claims = self._admitted.pop(settlement.call_id, ())
        if not settlement.actuals:
            return Settlement(settlement.call_id, (), settlement.record)
        debits = tuple(
            Claim(claim.meter, claim.amount if actual is None else actual, claim.member)
            for claim, actual in zip(claims, settlement.actuals, strict=True)
            if claim.meter.unit not in {Unit.SLOTS, Unit.IDS}
        )
        return Settlement(settlement.call_id, (), settlement.record, (), debits)

    async def heartbeat(self, owner: str) -> Heartbeat:
        return await self._storage.heartbeat(owner)

    async def retire(self, owner: str) -> None:
        await self._storage.retire(owner)

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        return await self._storage.read(meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        await self._storage.reset(meters)

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        return await self._storage.records(since_ms=since_ms, limit=limit)

    def export(self) -> AsyncIterator[bytes]:
        return self._storage.export()

    async def load(self, lines: Iterable[bytes]) -> None:
        await self._storage.load(lines)

    async def open_holds(self) -> int:
        return await self._storage.open_holds()

    async def aclose(self) -> None:
        await self._storage.aclose()


def _receipt(claim: Claim, reading: Reading) -> Receipt:
    limit = claim.meter.limit
    fits = limit is None or reading.used + reading.held + claim.amount <= limit
    return Receipt(claim, True, fits, reading.used, reading.held, 0, reading.resets_at_ms)
