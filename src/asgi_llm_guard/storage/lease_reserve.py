"""Reserving with leases: what chunks have of a plan is taken at once, and the store is asked for the rest.

Rules 2 to 4 of `leases.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from asgi_llm_guard.claims import Bundle, Ended, Granted, Plan, Refused, Settlement
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.storage.lease_calls import (
    Asked,
    Call,
    Calls,
    Fetch,
    Gone,
    Parts,
    claims_of,
    refused_states,
    replayed,
)
from asgi_llm_guard.storage.lease_chunks import Chunks
from asgi_llm_guard.storage.mistakes import called_twice, not_open

__all__ = ["Reserving"]

Answer = Granted | Refused | Ended


class Reserving:
    """`LeasingStorage.admit`, and `reserve` of plans that have leased claims, or of calls that are known here."""

    def __init__(self, chunks: Chunks, calls: Calls) -> None:
        self._inner = chunks.inner
        self._clock = chunks.clock
        self._lock = chunks.lock
        self._book = chunks.book
        self._chunks = chunks
        self._calls = calls

    def admit(self, owner: str, plan: Plan) -> Granted | None:
        """Grant a plan from leases, if they have all of it; else change nothing. Never asks the store."""
        empty = True
        for bundle in plan:
            for claim in bundle.claims:
                empty = False
                if not claim.meter.lease:
                    return None
        if empty:
            return None
        fetches: list[Fetch] = []
        granted = None
        with self._lock:
            now_ms = self._clock.now_ms()
            if self._calls.are_new(plan, now_ms):
                offers = self._offer(owner, (plan,), now_ms)
                if None in offers[0]:
                    self._calls.put_back((plan,), offers)
                else:
                    granted = self._grant(owner, plan, offers[0], now_ms, fetches)
        if fetches:
            self._chunks.fetch_soon(fetches)
        if self._book.due:
            self._chunks.return_due()
        return granted

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Answer:
        fetches: list[Fetch] = []
        with self._lock:
            seen = self._begin(owner, plans, fetches)
        if fetches:
            self._chunks.fetch_soon(fetches)
        if self._book.due:
            self._chunks.return_due()
        if isinstance(seen, Granted):
            return seen
        if isinstance(seen, Asked):
            return await self._ask(seen)
        if isinstance(seen, list):
            return await self._ask_again(seen)
        if seen is None:
            return await self._inner.reserve(owner, plans)
        return seen

    def _begin(
        self, owner: str, plans: Sequence[Plan], fetches: list[Fetch]
    ) -> Granted | Ended | Asked | list[Call] | None:
        """Take from leases what they have: all of it, or what the store is to be asked for.

        Calls: they are open here, and the store is to be asked whether there as well. `None`: the store knows better.
        """
        first = plans[0]
        known = self._calls.known
        now_ms = self._clock.now_ms()
        for bundle in first:
            if bundle.call_id in known:
                if not self._calls.are_new(first, now_ms):
                    return self._seen(plans, now_ms)
                break
        offers = self._offer(owner, plans, now_ms)
        if None in offers[0]:
            return self._asked(owner, plans, offers)
        return self._grant(owner, first, offers[0], now_ms, fetches)

    def _grant(self, owner: str, plan: Plan, parts: Parts, now_ms: int, fetches: list[Fetch]) -> Granted:
        """Grant a plan all of which was taken from leases."""
        receipts = []
        for claim, lease in zip(claims_of(plan), parts, strict=True):
            assert lease is not None  # noqa: S101 - none of them is
            receipts.append(lease.granted(claim, now_ms))
            if lease.left < lease.low and lease.slot.fetching is None:
                self._chunks.want(fetches, lease.slot, owner, claim)
        granted = Granted(tuple(receipts), now_ms)
        self._calls.open(owner, plan, parts, granted.receipts, 0)
        return granted

    def _seen(self, plans: Sequence[Plan], now_ms: int) -> Granted | Ended | Asked | list[Call] | None:
        """What to say of call ids at least one of which is known."""
        plan = plans[0]
        calls: list[Call] = []
        for bundle in plan:
            known = self._calls.known.get(bundle.call_id)
            if isinstance(known, Asked):
                known.ask_for(plans)
                return known
            if isinstance(known, Gone):
                return None if known.foreign else Ended(bundle.call_id, known.reason, now_ms)
            if known is not None:
                if known.expired:
                    return Ended(bundle.call_id, "expired", now_ms)
                calls.append(known)
        if len(calls) < len(plan):
            missing = next(bundle.call_id for bundle in plan if bundle.call_id not in self._calls.known)
            raise not_open(missing)
        return calls if any(call.inner for call in calls) else replayed(calls, now_ms)

    def _offer(self, owner: str, plans: Sequence[Plan], now_ms: int) -> list[Parts]:
        """Take from leases what they have, for each plan up to the first that needs nothing else."""
        first = plans[0]
        if len(first) > 1 and len({bundle.call_id for bundle in first}) < len(first):
            raise called_twice()
        book = self._book
        slots = book.slots(owner)
        offers: list[Parts] = []
        try:
            for plan in plans:
                turn = book.next_turn()
                parts: Parts = []
                offers.append(parts)
                for bundle in plan:
                    for claim in bundle.claims:
                        lease = None
                        if claim.meter.lease:
                            slot = book.slot(slots, claim.meter, turn)
                            if slot.current is not None:
                                lease = book.take(slot, claim, now_ms)
                        parts.append(lease)
                if None not in parts:
                    break
        except ValueError:
            self._calls.put_back(plans, offers)
            raise
        return offers

    def _asked(self, owner: str, plans: Sequence[Plan], offers: list[Parts]) -> Asked:
        asked = Asked(owner, plans, offers)
        for bundle in plans[0]:
            self._calls.known[bundle.call_id] = asked
        return asked

    async def _ask(self, asked: Asked) -> Answer:
        """The store's answer to the rest, together with what was taken from leases.

        If that is not known (`StorageError`, cancellation), what was taken stays taken: the caller asks again, or
        settles.
        """
        try:
            answer = await self._chunks.insist(asked.owner, lambda: self._inner.reserve(asked.owner, asked.rest))
        except BaseException as error:
            if isinstance(error, StorageError) and not error.sent and not asked.unknown:
                with self._lock:
                    self._never_asked(asked)
            else:
                asked.unknown = True
            if isinstance(error, DataLost):
                self._chunks.abandon()
            raise
        fetches: list[Fetch] = []
        with self._lock:
            orphans: list[Settlement] = []
            if asked.settled:
                answer, orphans = self._overtaken(asked, answer)
            else:
                self._answered(asked)
                answer = self._together(asked, answer, fetches)
        self._chunks.fetch_soon(fetches)
        self._chunks.hand_over(orphans)
        self._chunks.return_due()
        return answer

    def _together(self, asked: Asked, answer: Answer, fetches: list[Fetch]) -> Answer:
        """The answer to the whole plan, from the one to its rest."""
        if isinstance(answer, Granted):
            answer = self._granted(asked, answer)
            self._chunks.look_at(fetches, asked.owner, answer.receipts, asked.offers[answer.plan])
            return answer
        if isinstance(answer, Refused):
            states = [
                refused_states(claims_of(plan), parts, refused, answer.now_ms)
                for plan, parts, refused in zip(asked.plans, asked.offers, answer.states, strict=True)
            ]
            answer = Refused(tuple(states), answer.now_ms)
        self._calls.put_back(asked.plans, asked.offers)
        return answer

    def _never_asked(self, asked: Asked) -> None:
        """The question did not reach the store: nobody has to take anything back."""
        if not asked.settled:
            self._answered(asked)
            self._calls.put_back(asked.plans, asked.offers)

    def _answered(self, asked: Asked) -> None:
        asked.settled = True
        for bundle in asked.plans[0]:
            self._calls.known.pop(bundle.call_id, None)

    def _overtaken(self, asked: Asked, answer: Answer) -> tuple[Answer, list[Settlement]]:
        """The answer for calls that were settled meanwhile, or granted to somebody who asked for the same; and what
        is to be given back of it."""
        calls: list[Call] = []
        for bundle in asked.plans[0]:
            known = self._calls.known.get(bundle.call_id)
            if isinstance(known, Gone):
                return Ended(bundle.call_id, known.reason, answer.now_ms), []
            if not isinstance(known, Call):  # the store has lost its data, and what leases had of this call with it
                rest = asked.rest[0] if isinstance(answer, Granted) else ()
                ended = Ended(bundle.call_id, "unknown", answer.now_ms)
                return ended, [Settlement(orphan.call_id, ()) for orphan in rest]
            calls.append(known)
        return replayed(calls, answer.now_ms), []

    def _granted(self, asked: Asked, answer: Granted) -> Granted:
        number = answer.plan
        plan, parts = asked.plans[number], asked.offers[number]
        self._calls.put_back(asked.plans, asked.offers, but=number)
        theirs = iter(answer.receipts)
        receipts = tuple(
            [
                next(theirs) if lease is None else lease.granted(claim, answer.now_ms)
                for claim, lease in zip(claims_of(plan), parts, strict=True)
            ]
        )
        self._calls.open(asked.owner, plan, parts, receipts, number)
        for bundle in asked.rest[number]:
            cast("Call", self._calls.known[bundle.call_id]).inner = True
        return Granted(receipts, answer.now_ms, number, answer.replayed)

    async def _ask_again(self, calls: list[Call]) -> Answer:
        """Calls that are open here: are they in the store, too?"""
        rest = tuple([Bundle(call.bundle.call_id, call.rest(), call.bundle.draft) for call in calls if call.inner])
        asked_ms = self._clock.local_ms()
        answer = await self._inner.reserve(calls[0].owner, (rest,))
        self._chunks.heard(asked_ms, answer)
        if isinstance(answer, Granted):
            return replayed(calls, answer.now_ms)
        with self._lock:
            for call in calls:
                self._calls.expire(call, self._clock.now_ms())
        self._chunks.return_due()
        return answer
