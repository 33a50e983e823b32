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

from collections.abc import Sequence
from typing import Final

import msgspec

from asgi_llm_guard.claims import Claim, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.plan import is_rate
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord

__all__ = ["Charge", "actuals", "draft"]

# Looking a member up in its enumeration costs as much as all the rest of one claim.
_NANOUSD: Final = Unit.NANOUSD
_TOKENS: Final = Unit.TOKENS
_SLOTS: Final = Unit.SLOTS


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


def actuals(claims: Sequence[Claim], charge: Charge) -> tuple[int | None, ...]:
    """The amount that each claim is settled with; `None` = what is held."""
    if charge.outcome == "not_dispatched":
        return (0,) * len(claims)
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


def draft(call_id: str, context: Context, call: Call | None, at_ms: int) -> UsageRecord:
    """The usage record as far as it is known at admission: what is kept should the process die."""
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
    )
