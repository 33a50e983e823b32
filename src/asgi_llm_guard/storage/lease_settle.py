"""Settling with leases: chunks are charged at once, and what the store has of a call is translated for it.

Rule 6 of `leases.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from asgi_llm_guard.claims import Settled, Settlement
from asgi_llm_guard.storage.base import Completed, Pending
from asgi_llm_guard.storage.lease_calls import Answering, Asked, Call, Calls, Gone, Reply, cancels, confirm, forgotten
from asgi_llm_guard.storage.lease_chunks import Chunks

__all__ = ["Settling"]


class Settling:
    """`LeasingStorage.settle` of calls that are known here, and of cancellations."""

    def __init__(self, chunks: Chunks, calls: Calls) -> None:
        self._inner = chunks.inner
        self._clock = chunks.clock
        self._lock = chunks.lock
        self._book = chunks.book
        self._chunks = chunks
        self._calls = calls

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        outgoing: list[Settlement] = []
        replies: list[Settled | Reply] = []
        unconfirmed: list[Gone] = []
        with self._lock:
            now_ms = self._clock.now_ms()
            for settlement in settlements:
                call_id = settlement.call_id
                known = self._calls.known.get(call_id)
                if isinstance(known, Asked):
                    known = self._presume(known, call_id)
                if isinstance(known, Call):
                    known = self._settle_call(known, settlement, now_ms)
                    self._calls.end(call_id, known)
                    if known.reply is None:
                        replies.append(Settled(call_id, "settled", known.overages))
                        continue
                elif known is None or known.foreign or forgotten(known, now_ms):
                    replies.append(Reply(call_id, len(outgoing)))
                    outgoing.append(settlement)
                    if cancels(settlement):
                        self._calls.end(call_id, Gone("cancelled", now_ms + self._calls.tombstone_ms, foreign=True))
                    continue
                elif not known.unsent:
                    replies.append(Settled(call_id, "duplicate"))
                    continue
                replies.append(cast("Reply", known.reply).behind(len(outgoing)))
                outgoing.extend(known.unsent)
                unconfirmed.append(known)
        try:
            if not outgoing:
                return Completed(cast("tuple[Settled, ...]", tuple(replies)))
            pending = self._inner.settle(outgoing)
        finally:
            if self._book.due:
                self._chunks.return_due()
        pending.add_done_callback(partial(confirm, unconfirmed))
        return Answering(pending, replies)

    def _settle_call(self, call: Call, settlement: Settlement, now_ms: int) -> Gone:
        """Settle what the call has of leases, and translate the rest for the store."""
        parts = call.parts
        claims = call.bundle.claims
        actuals = settlement.actuals
        if len(actuals) != len(claims):
            actuals = (*actuals, *(None,) * len(claims))[: len(claims)] if actuals else (0,) * len(claims)
        overages: list[int] = []
        outgoing: list[Settlement] = []
        for claim, lease, given in zip(claims, parts, actuals):  # noqa: B905 - made equal above, and `strict` costs time
            over = 0
            if lease is not None:
                held = claim.amount
                actual = held if given is None else given
                if actual > held:
                    over = actual - held
                if call.expired:
                    short = lease.settle(0, over)
                else:
                    short = lease.settle(held, actual)
                    if lease is not lease.slot.current:
                        self._book.freed(lease)
                if short:
                    outgoing.append(lease.overrun(short))
            overages.append(over)
        gone = Gone("settled", now_ms + self._calls.tombstone_ms, overages=tuple(overages))
        if call.inner or settlement.record is not None or settlement.debits:
            call_id = settlement.call_id
            gone.reply = Reply(call_id, len(outgoing), tuple([lease is not None for lease in parts]), gone.overages)
            rest = tuple([given for given, lease in zip(actuals, parts, strict=True) if lease is None])
            theirs = tuple([r for r, lease in zip(settlement.receipts, parts, strict=False) if lease is None])
            outgoing.append(
                Settlement(call_id, rest if settlement.actuals else (), settlement.record, theirs, settlement.debits)
            )
        elif outgoing:
            gone.reply = Reply(settlement.call_id, None, (), gone.overages)
        gone.unsent = tuple(outgoing)
        return gone

    def _presume(self, asked: Asked, call_id: str) -> Call:
        """Calls that are settled before the store has said whether it grants them: as if it had granted the first plan."""
        asked.settled = True
        self._calls.put_back(asked.plans, asked.offers, but=0)
        self._calls.open(asked.owner, asked.plans[0], asked.offers[0], (), 0)
        for bundle in asked.rest[0]:
            cast("Call", self._calls.known[bundle.call_id]).inner = True
        return cast("Call", self._calls.known[call_id])
