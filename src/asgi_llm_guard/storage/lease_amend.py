"""Amending with leases: what more is needed is taken from chunks, the store changes the rest, and then what is less goes back."""

from __future__ import annotations

from collections.abc import Iterable

from asgi_llm_guard.claims import Bundle, Ended, Granted, Receipt, Refused
from asgi_llm_guard.errors import DataLost
from asgi_llm_guard.storage.lease_book import Lease, lower
from asgi_llm_guard.storage.lease_calls import Call, Calls, Change, Fetch, Gone, refused_states
from asgi_llm_guard.storage.lease_chunks import Chunks
from asgi_llm_guard.storage.mistakes import claimed_twice

__all__ = ["Amending"]

Answer = Granted | Refused | Ended


class Amending:
    """`LeasingStorage.amend` of calls that have leased claims, or are known here."""

    def __init__(self, chunks: Chunks, calls: Calls) -> None:
        self._inner = chunks.inner
        self._clock = chunks.clock
        self._lock = chunks.lock
        self._book = chunks.book
        self._chunks = chunks
        self._calls = calls

    async def amend(self, owner: str, bundle: Bundle) -> Answer:
        keys = [claim.meter.key for claim in bundle.claims]
        if len(set(keys)) < len(keys):
            raise claimed_twice(next(key for key in keys if keys.count(key) > 1))
        fetches: list[Fetch] = []
        with self._lock:
            now_ms = self._clock.now_ms()
            call = self._calls.known.get(bundle.call_id)
            if call is not None and not isinstance(call, Call):
                return Ended(bundle.call_id, call.reason if isinstance(call, Gone) else "unknown", now_ms)
            if call is not None and call.expired:
                return Ended(bundle.call_id, "expired", now_ms)
            change = self._change(owner, call, bundle, now_ms)
            local = None
            if call is not None and not call.inner and None not in change.parts:
                local = self._changed(owner, call, bundle, change, (), now_ms)
                self._chunks.look_at(fetches, owner, local.receipts, change.parts)
        if local is None:
            return await self._amend_rest(owner, call, bundle, change)
        self._chunks.fetch_soon(fetches)
        self._chunks.return_due()
        return local

    async def _amend_rest(self, owner: str, call: Call | None, bundle: Bundle, change: Change) -> Answer:
        """Change what the store holds of the call, and then what leases do."""
        claims = tuple([claim for claim, lease in zip(bundle.claims, change.parts, strict=True) if lease is None])
        rest = Bundle(bundle.call_id, claims, bundle.draft)

        async def ask() -> Answer:
            if call is None or call.inner:
                answer = await self._inner.amend(owner, rest)
                unheard = isinstance(answer, Ended) and answer.reason == "unknown"
                if call is None or call.rest() or not unheard:
                    return answer
            call.inner = True  # before there is an answer: from here on the store has to be told of its end
            answer = await self._inner.reserve(owner, ((rest,),))
            call.inner = not isinstance(answer, Refused)
            return answer

        try:
            answer = await self._chunks.insist(owner, ask)
        except BaseException as error:
            with self._lock:
                self._undo(change)
            if isinstance(error, DataLost):
                self._chunks.abandon()
            raise
        fetches: list[Fetch] = []
        with self._lock:
            settled = self._calls.known.get(bundle.call_id) is not call
            if isinstance(answer, Granted) and not settled:
                answer = self._changed(owner, call, bundle, change, answer.receipts, answer.now_ms)
                self._chunks.look_at(fetches, owner, answer.receipts, change.parts)
            else:
                if isinstance(answer, Refused):
                    states = refused_states(bundle.claims, change.parts, answer.states[0], answer.now_ms)
                    answer = Refused((states,), answer.now_ms)
                elif settled:
                    answer = Ended(bundle.call_id, "settled", answer.now_ms)
                elif call is not None:
                    self._calls.expire(call, self._clock.now_ms())
                self._undo(change)
        self._chunks.fetch_soon(fetches)
        self._chunks.return_due()
        return answer

    def _change(self, owner: str, call: Call | None, bundle: Bundle, now_ms: int) -> Change:
        """Take from leases what the new claims need, and note what is given back once they are granted."""
        book = self._book
        slots = book.slots(owner)
        turn = book.next_turn()
        change = Change()
        held: dict[str, tuple[Receipt, Lease | None]] = {}
        if call is not None:
            pairs = zip(call.receipts, call.parts, strict=True)
            held = {receipt.claim.meter.key: (receipt, lease) for receipt, lease in pairs}
        for claim in bundle.claims:
            meter = claim.meter
            old, lease = held.get(meter.key, (None, None))
            if old is not None and lease is not None:
                more = claim.amount - old.claim.amount
                if not more and not lower(meter.limit, old.claim.meter.limit):
                    change.keep(lease, old)
                    del held[meter.key]
                    continue
                room = more <= 0 or (more <= lease.left and not lease.closed)
                if room and now_ms < lease.until_ms and not lower(meter.limit, lease.meter.limit):
                    change.adjust(lease, more)
                    del held[meter.key]
                    continue
            taken = None
            # What the store holds of a meter stays there, where it keeps its window.
            if meter.lease and (old is None or lease is not None):
                slot = book.slot(slots, meter, turn)
                taken = None if slot.current is None else book.take(slot, claim, now_ms)
            change.take(taken, claim.amount)
        change.backs.extend((lease, old.claim.amount) for old, lease in held.values() if lease is not None)
        return change

    def _changed(
        self,
        owner: str,
        call: Call | None,
        bundle: Bundle,
        change: Change,
        theirs: Iterable[Receipt],
        now_ms: int,
    ) -> Granted:
        """The change is granted: give back what is no longer claimed, and remember what is."""
        for lease, amount in change.backs:
            lease.give_back(amount)
            self._book.freed(lease)
        granted = iter(theirs)
        receipts = tuple(
            [
                next(granted) if lease is None else kept or lease.granted(claim, now_ms)
                for claim, lease, kept in zip(bundle.claims, change.parts, change.kept, strict=True)
            ]
        )
        changed = Call(owner, bundle, change.parts, receipts, 0 if call is None else call.plan)
        changed.inner = call is None or call.inner or None in change.parts
        changed.beats = 0 if call is None else call.beats
        self._calls.known[bundle.call_id] = changed
        return Granted(receipts, now_ms)

    def _undo(self, change: Change) -> None:
        for lease, amount in change.takes:
            lease.give_back(amount)
            self._book.freed(lease)
