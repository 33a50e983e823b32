"""What a call is charged when it ends: from its outcome to amounts and a usage record.

| outcome | money, tokens | iteration |
|---|---|---|
| `measured` | as measured | 1 |
| `not_dispatched` | 0 | 0 |
| `cached` | 0 | 0; rates of calls stay taken |
| `provider_error` | 0 | 1 |
| `unknown`, `unmetered`, `unseen` | the hold | 1 |
| `estimated` (a cut stream) | counted, never above the hold | 1 |

Slots are always given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.claims import ATTEMPT_SCOPE, Claim, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.plan import is_rate
from asgi_llm_guard.pricing import Cost
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord
from asgi_llm_guard.wire.base import Answer

__all__ = ["FIRST", "Attempt", "Charge", "actuals", "believed", "charge_of", "charged_nanousd", "draft", "finished"]

# Looking a member up in its enumeration costs as much as all the rest of one claim.
_NANOUSD: Final = Unit.NANOUSD
_TOKENS: Final = Unit.TOKENS
_SLOTS: Final = Unit.SLOTS
_CALLS: Final = Unit.CALLS


Attempt = tuple[str | None, int]
"""The call id of the first attempt, if it is another one, and which one it is, counted from 1."""

FIRST: Final[Attempt] = (None, 1)


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one call."""

    outcome: Outcome
    usage: Usage | None = None
    """As measured or counted; `None`: unknown."""
    tokens: int | None = None
    """Input and output together; `None`: what is held."""
    cost_nanousd: int | None = None
    """`None`: what is held."""
    price_source: str | None = None
    billed_model: str | None = None
    doubted: Usage | None = None
    """What was reported, where it is not charged as reported: it cannot be."""


def charge_of(
    call: Call | None,
    answer: Answer | None,
    price: Callable[[Usage], Cost],
    *,
    complete: bool,
    released: bool,
    failure: Outcome | None,
) -> Charge:
    """What became of a call, by what was seen of its answer.

    `complete`: nothing more was to come. `released`: nothing was sent. `failure`: it ended with an error, which says this.
    """
    usage = answer.usage if answer is not None else None
    if answer is not None and usage is not None:
        tokens = usage.total_tokens
        if answer.text_bytes and usage.output_tokens == 0 and not _in_units(usage):
            pass  # text that cost no tokens: some servers fill in zeros where they do not count
        elif tokens is not None or usage.reported_nanousd is not None or _in_units(usage):
            return _measured(usage, tokens, price(usage))
        elif not _can_be(usage):
            return Charge(outcome="unmetered", doubted=usage)
    if released and answer is None:
        return Charge(outcome="not_dispatched")
    if answer is not None:
        if answer.unread and not (answer.finished and complete):
            return Charge(outcome="unknown")  # what could not be read may be nearly all of it
        if answer.kind == "error" and not answer.text_bytes:
            return Charge(outcome="provider_error")
        if answer.text_bytes and (not answer.finished or not complete or failure is not None):
            return _counted(call, answer, price)
        if answer.finished and complete:
            return Charge(outcome="unmetered")
    if failure is not None:
        return Charge(outcome=failure)
    return Charge(outcome="unmetered" if complete and answer is None else "unknown")


def _in_units(usage: Usage) -> bool:
    """Whether it counts what is billed by another unit than tokens."""
    return bool(usage.images or usage.audio_ms or usage.characters or usage.search_units)


_MOST_COUNTED: Final = 10**12
"""No call uses more of anything that is counted: tokens, characters, milliseconds."""


def _can_be(usage: Usage) -> bool:
    """Whether none of its figures is below zero, beyond all amounts, or no whole number."""
    for name, value in zip(Usage.__struct_fields__, msgspec.structs.astuple(usage), strict=True):
        if value is None or type(value) is str:
            continue
        if type(value) is int:
            # Beyond it no storage could keep the record, nor the ledger sums of many.
            if not 0 <= value <= (MAX_AMOUNT if name == "reported_nanousd" else _MOST_COUNTED):
                return False
        elif type(value) is not tuple or not all(map(_can_be, value)):
            return False
    return True


def believed(charge: Charge, most: Call) -> Charge:
    """The charge of a measured call, without what is above the `most` that it can have used."""
    tokens, cost_nanousd = charge.tokens, charge.cost_nanousd
    if tokens is not None and most.total_tokens:
        tokens = min(tokens, most.total_tokens)
    if cost_nanousd is not None and most.cost_nanousd:
        cost_nanousd = min(cost_nanousd, most.cost_nanousd)
    if (tokens, cost_nanousd) == (charge.tokens, charge.cost_nanousd):
        return charge
    return msgspec.structs.replace(
        charge,
        tokens=tokens,
        cost_nanousd=cost_nanousd,
        price_source=f"{charge.price_source}; clamped" if charge.price_source else "clamped",
        doubted=charge.usage,
    )


def _measured(usage: Usage, tokens: int | None, cost: Cost) -> Charge:
    if not _can_be(usage):  # a known cost does not say so: it may be reported, or be nothing for any model
        return Charge(outcome="unmetered", doubted=usage)
    if cost.nanousd is None:
        # Its price is not known: tokens as measured, money as held; where none was, what it cost stays unknown.
        return Charge(outcome="measured", usage=usage, tokens=tokens)
    return Charge(
        outcome="measured",
        usage=usage,
        tokens=tokens,
        cost_nanousd=cost.nanousd,
        price_source=cost.source,
        billed_model=cost.billed_model,
    )


def _counted(call: Call | None, answer: Answer, price: Callable[[Usage], Cost]) -> Charge:
    """A cut stream: the text so far plus the input, by the same bound as the hold (a token is at
    least one byte); never above it."""
    if call is None:
        return Charge(outcome="unknown")
    output = min(answer.text_bytes, call.output_tokens)
    usage = answer.usage
    if usage is None or usage.input_tokens is None:
        usage = Usage(input_tokens=call.input_tokens, model=answer.model)
    usage = msgspec.structs.replace(usage, output_tokens=output)
    tokens = min((usage.input_tokens or 0) + output, call.total_tokens)
    cost = price(usage)
    if cost.nanousd is None or (call.cost_nanousd is not None and cost.nanousd > call.cost_nanousd):
        # Not its price makes the charge, but the hold, which has one of its own.
        nanousd = None if cost.nanousd is None else call.cost_nanousd
        return Charge(outcome="estimated", usage=usage, tokens=tokens, cost_nanousd=nanousd)
    return Charge(
        outcome="estimated",
        usage=usage,
        tokens=tokens,
        cost_nanousd=cost.nanousd,
        price_source=cost.source,
        billed_model=cost.billed_model,
    )


def actuals(claims: Sequence[Claim], charge: Charge, *, keep_calls: bool = False) -> tuple[int | None, ...]:
    """The amount that each claim is settled with; `None` = what is held.

    `keep_calls`: what is counted in calls stays taken, though this attempt was not sent: another one was.
    """
    if charge.outcome == "not_dispatched":
        return tuple(
            [
                None if keep_calls and claim.meter.unit is _CALLS and claim.meter.scope != ATTEMPT_SCOPE else 0
                for claim in claims
            ]
        )
    if charge.outcome == "cached":
        return tuple([None if is_rate(claim) else 0 for claim in claims])
    cost_nanousd, tokens = charge.cost_nanousd, charge.tokens
    if charge.outcome == "provider_error":
        cost_nanousd = tokens = 0
    return tuple(
        [
            cost_nanousd
            if (unit := claim.meter.unit) is _NANOUSD
            else tokens
            if unit is _TOKENS
            else 0
            if unit is _SLOTS
            else None
            for claim in claims
        ]
    )


def draft(call_id: str, context: Context, call: Call | None, at_ms: int, attempt: Attempt = FIRST) -> UsageRecord:
    """The usage record as far as it is known at admission: what is kept should the process die."""
    attempt_of, number = attempt
    if call is None:
        return UsageRecord(
            call_id=call_id,
            at_ms=at_ms,
            request_id=context.request_id,
            caller=context.caller,
            user=context.user,
            departments=context.departments,
            agent=context.agent,
            session=context.session,
            tags=context.tags,
            route=context.route,
            outcome="expired",
            attempt_of=attempt_of,
            attempt=number,
        )
    return UsageRecord(
        call_id=call_id,
        at_ms=at_ms,
        request_id=context.request_id,
        caller=context.caller,
        user=context.user,
        departments=context.departments,
        agent=context.agent,
        session=context.session,
        tags=context.tags,
        route=context.route,
        provider=call.provider,
        model=call.model,
        billed_model=call.billed_model,
        cost_nanousd=call.cost_nanousd,
        estimate_nanousd=call.cost_nanousd,
        tokens=call.total_tokens,
        price_source=call.price_source,
        outcome="expired",
        attempt_of=attempt_of,
        attempt=number,
        deployment=call.deployment,
    )


def charged_nanousd(call: Call | None, charge: Charge) -> int | None:
    """What a call costs whoever is charged; `None`: unknown."""
    if charge.outcome in ("provider_error", "not_dispatched"):
        return 0
    if charge.cost_nanousd is None and call is not None:
        return call.cost_nanousd
    return charge.cost_nanousd


def finished(
    record: UsageRecord, call: Call | None, charge: Charge, *, began_ms: int, first_ms: int | None, now_ms: int
) -> UsageRecord:
    """The usage record of a call that has ended at `now_ms`, from its draft."""
    usage, tokens = charge.usage, charge.tokens
    if charge.outcome == "provider_error":
        tokens = 0
    elif call is not None:
        tokens = call.total_tokens if tokens is None else tokens
    return msgspec.structs.replace(
        record,
        ended_ms=now_ms,
        model=record.model or (usage.model if usage is not None else None),
        billed_model=charge.billed_model or record.billed_model,
        usage=usage,
        cost_nanousd=charged_nanousd(call, charge),
        estimate_nanousd=0 if charge.outcome == "cached" else record.estimate_nanousd,
        tokens=tokens,
        outcome=charge.outcome,
        price_source=charge.price_source or record.price_source,
        dispatched_ms=began_ms,
        first_token_ms=None if first_ms is None else max(0, first_ms - began_ms),
        latency_ms=max(0, now_ms - began_ms),
    )
