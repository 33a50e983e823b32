"""Plans: what the candidates for one call claim, in the form in which a storage is asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.charge import Attempt, draft
from asgi_llm_guard.claims import Bundle, Claim, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.engine.holds import Hold
from asgi_llm_guard.engine.session_ids import SessionIds
from asgi_llm_guard.plan import Asked
from asgi_llm_guard.policies.base import Policy

__all__ = ["Candidate", "Offer", "Planner", "Plans", "changed", "drafted", "renamed"]

Candidate = tuple[Sequence[Policy], Call | None]
"""A call that could be made, and the policies that it is asked of."""

Offer = tuple[int, Asked]
"""The number of a candidate that no policy refuses by itself, and what its policies claim."""

Plans = tuple[tuple[Bundle, ...], ...]

_CHARGED: Final = frozenset({Unit.NANOUSD, Unit.TOKENS})


class Planner:
    """Makes plans: with ids from `new_id`, and the claims of `session_ids` in them."""

    __slots__ = ("_new_id", "_session_ids")

    def __init__(self, new_id: Callable[[], str], session_ids: SessionIds) -> None:
        self._new_id = new_id
        self._session_ids = session_ids

    def plans(
        self,
        offers: Sequence[Offer],
        candidates: Sequence[Candidate],
        context: Context,
        now_ms: int,
        attempt: Attempt,
        *,
        calls: bool,
        shared: bool,
    ) -> Plans:
        """A plan for each offer, all with the same ids: one for the call, and one for the request where any needs it."""
        call_id = self._new_id() if calls else ""
        if len(offers) == 1:  # nearly always, so it is spared the steps of the others
            index, asked = offers[0]
            call_claims, request_claims = self._claims(asked, context, calls=calls, shared=shared)
            if not calls:
                return ((Bundle(self._new_id(), request_claims),) if request_claims else (),)
            bundle = Bundle(call_id, call_claims, draft(call_id, context, candidates[index][1], now_ms, attempt))
            return ((bundle, Bundle(self._new_id(), request_claims)) if request_claims else (bundle,),)
        claims = [self._claims(asked, context, calls=calls, shared=shared) for _, asked in offers]
        request_id = self._new_id() if any(request_claims for _, request_claims in claims) else ""
        plans = []
        for (index, _), (call_claims, request_claims) in zip(offers, claims, strict=True):
            request = (Bundle(request_id, request_claims),) if request_id else ()
            if calls:
                record = draft(call_id, context, candidates[index][1], now_ms, attempt)
                plans.append((Bundle(call_id, call_claims, record), *request))
            else:
                plans.append(request)
        return tuple(plans)

    def _claims(
        self, asked: Asked, context: Context, *, calls: bool, shared: bool
    ) -> tuple[tuple[Claim, ...], tuple[Claim, ...]]:
        """What the call and the request claim, the id of the session included."""
        if context.session is None or shared:
            return asked.calls, asked.requests
        ids = self._session_ids.claim(context, asked.calls, asked.requests)
        if ids is None:
            return asked.calls, asked.requests
        return ((ids, *asked.calls), asked.requests) if calls else (asked.calls, (ids, *asked.requests))


def renamed(bundle: Bundle, call_id: str, now_ms: int | None = None) -> Bundle:
    """The same bundle under another id. `now_ms`: its record is of this instant; `None`: of the same as before."""
    record = bundle.draft
    if record is not None:
        at_ms = record.at_ms if now_ms is None else now_ms
        record = msgspec.structs.replace(record, call_id=call_id, at_ms=at_ms)
    return Bundle(call_id, bundle.claims, record)


def changed(
    hold: Hold, claims: tuple[Claim, ...], context: Context, call: Call | None, now_ms: int, attempt: Attempt
) -> Bundle:
    """What is to take the place of a hold, under its id."""
    at_ms = hold.draft.at_ms if hold.draft is not None and _same_amounts(hold.claims, claims) else now_ms
    return Bundle(hold.call_id, claims, draft(hold.call_id, context, call, at_ms, attempt))


def drafted(hold: Hold, context: Context, call: Call | None, attempt: Attempt) -> Hold:
    """The hold, whose record tells of `call`: another model may cost the same."""
    before = hold.draft
    if before is None:
        return hold
    record = draft(hold.call_id, context, call, before.at_ms, attempt)
    return hold if record == before else msgspec.structs.replace(hold, draft=record)


def _same_amounts(before: Sequence[Claim], claims: Sequence[Claim]) -> bool:
    """Whether tokens and money stay as they were taken, in the windows of then (`Storage.amend`): the record is of then, too."""
    held = {claim.meter.key: claim for claim in before if claim.meter.unit in _CHARGED}
    for claim in claims:
        if claim.meter.unit not in _CHARGED:
            continue
        old = held.get(claim.meter.key)
        if old is None or old.amount != claim.amount:
            return False
        limit = claim.meter.limit
        if limit is not None and (old.meter.limit is None or limit < old.meter.limit):
            return False
    return True
