"""What the storage or a policy has refused becomes one `Denied`, by the rules of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.claims import Reading, Receipt, Refused, Rule
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.denials.receipts import (
    NAMED,
    Disclose,
    capacity,
    fits_max_tokens,
    is_held,
    may_retry,
    never_fits,
    refusing,
    shown_to_caller,
    wait_ms,
)
from asgi_llm_guard.denials.statuses import STATUS, Statuses, status_of
from asgi_llm_guard.denials.wording import details_of, message_of, provider_lines

__all__ = ["RETRYABLE_S", "deny", "refuse", "together"]

RETRYABLE_S: Final = 60
"""Longer waits are not worth a client's automatic retry: some sleep through them, others ignore them."""

_MOST_MODELS: Final = 20

_CODES: Final[Mapping[Rule, Code]] = {
    Rule.RATE: "rate_limit_exceeded",
    Rule.SLOTS: "concurrency_limit_exceeded",
    Rule.ITERATIONS: "session_iterations_exhausted",
    Rule.QUOTA: "quota_exceeded",
    Rule.BUDGET: "budget_exhausted",
    Rule.IDS: "session_overflow",
}


def deny(
    states: Refused,
    call: Call | None,
    *,
    plan: int = 0,
    disclose: Disclose = "owned",
    jitter: Callable[[int], int] | None = None,
    statuses: Statuses | None = None,
) -> Denied:
    """Why the storage refused, for the plan number `plan`.

    `jitter(wait_s)` gives the whole seconds to add, of which a tenth of the wait is taken at most; `None`: none.
    A status set on the meter wins over `statuses` (code before rule), which win over the table.

    Raises:
        ValueError: no enforced claim of that plan refuses.
    """
    receipts = states.states[plan]
    stuck = refusing(receipts)
    if not stuck:
        raise ValueError(f"plan {plan}: no enforced claim refuses, so there is nothing to deny")
    first, now_ms = stuck[0], states.now_ms
    meter = first.claim.meter
    shown = shown_to_caller(meter, disclose)

    waits = [wait_ms(receipt, now_ms) for receipt in stuck]
    wait_s = None if None in waits else -(-max(wait for wait in waits if wait is not None) // 1000)
    retry = wait_s is not None and wait_s <= RETRYABLE_S and all(map(may_retry, stuck))
    if wait_s is not None and jitter is not None:
        longer_s = wait_s + min(max(jitter(wait_s), 0), wait_s // 10)
        # Above the bound old clients ignore the header and come back at once.
        wait_s = min(longer_s, RETRYABLE_S) if retry else longer_s

    code = _code(first, final=not all(map(may_retry, stuck)))
    fits = fits_max_tokens(receipts, call)
    told = fits if all(shown_to_caller(receipt.claim.meter, disclose) for receipt in stuck) else None
    return Denied(
        policy=meter.policy,
        code=code,
        message=message_of(first, code, shown=shown, fits=told),
        status=status_of(code, meter, statuses),
        retry=retry,
        retry_after_s=wait_s,
        scope=meter.scope,
        subject=meter.subject if shown or meter.scope in NAMED else "",
        unit=meter.unit.value,
        requested=first.claim.amount,
        limit=capacity(meter) if shown else None,
        used=first.used if shown else None,
        held=first.held if shown else None,
        resets_at_ms=None if never_fits(first) else first.resets_at_ms,
        fits_max_tokens=fits,
        violated=tuple(dict.fromkeys(receipt.claim.meter.policy for receipt in stuck)),
        details=details_of(states, first, stuck, disclose),
        receipts=receipts,
        now_ms=now_ms,
    )


def together(denied: Sequence[Denied], *, disclose: Disclose = "owned") -> Denied:
    """Why none of several calls may be made, one of which would have been enough: at least one refusal for each.

    The first that is worth a retry speaks for all of them, else the first that resets, else the first. It names the
    soonest reset, and `details` has a line for each refusal, or for each budget of a provider and its soonest reset.
    """
    if len(denied) == 1:
        return denied[0]
    retried = [each for each in denied if each.retry]
    resets = [each.resets_at_ms for each in denied if each.resets_at_ms is not None]
    waits = [each.retry_after_s for each in (retried or denied) if each.retry_after_s is not None]
    first = next(iter(retried), None) or next((each for each in denied if each.resets_at_ms is not None), denied[0])
    stuck = {receipt.claim.meter.key: receipt for each in denied for receipt in refusing(each.receipts)}
    budgets = [
        (receipt.claim.meter, Reading(receipt.used, receipt.held, receipt.resets_at_ms))
        for receipt in filter(_is_of_provider, stuck.values())
    ]
    others = [
        each.message for each in denied if not any(_is_of_provider(receipt) for receipt in refusing(each.receipts))
    ]
    return msgspec.structs.replace(
        first,
        retry_after_s=min(waits, default=None),
        resets_at_ms=min(resets, default=None),
        fits_max_tokens=max((each.fits_max_tokens for each in denied if each.fits_max_tokens), default=None),
        violated=tuple(dict.fromkeys(name for each in denied for name in each.violated)),
        details=(*dict.fromkeys(others), *provider_lines(budgets, disclose=disclose)),
    )


def _is_of_provider(receipt: Receipt) -> bool:
    return receipt.claim.meter.scope == "provider"


def refuse(
    refusal: Refusal, *, statuses: Statuses | None = None, now_ms: int = 0, disclose: Disclose = "owned"
) -> Denied:
    """A refusal that no counter has a part in. Only an outage, a shutdown and a request that is still being answered
    are worth a retry, after one second."""
    retry = refusal.code in ("guard_unavailable", "guard_draining", "concurrency_limit_exceeded")
    status = refusal.status
    if status is None:
        status = (statuses or {}).get(refusal.code, STATUS[refusal.code])
    return Denied(
        policy=refusal.policy,
        code=refusal.code,
        message=refusal.message,
        status=status,
        retry=retry,
        retry_after_s=1 if retry else None,
        scope=refusal.scope,
        subject=refusal.subject,
        violated=(refusal.policy,),
        details=_allowed(refusal, disclose),
        now_ms=now_ms,
    )


def _allowed(refusal: Refusal, disclose: Disclose) -> tuple[str, ...]:
    """The models that may be asked for instead, the first ones of a long list, where the caller may know them."""
    if not refusal.allowed or not (refusal.owned or disclose == "all"):
        return ()
    more = len(refusal.allowed) - _MOST_MODELS
    return (f"allowed: {', '.join(refusal.allowed[:_MOST_MODELS])}{f', and {more} more' if more > 0 else ''}",)


def _code(first: Receipt, *, final: bool) -> Code:
    if never_fits(first):
        return "request_exceeds_budget"
    if is_held(first) and not final:
        return "held_by_others"
    return _CODES[first.claim.meter.rule]
