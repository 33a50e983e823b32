"""Which cheaper models a refused call could go to instead: those that the caller may know, and that would fit now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Final

from asgi_llm_guard.claims import Claim, Receipt, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.denials.receipts import Disclose, capacity, refusing, shown_to_caller
from asgi_llm_guard.describe import Describer
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import Listing, Policy

__all__ = ["cheaper_models"]

_MOST: Final = 20
"""How many models of a list are looked at: a refusal must not become expensive."""


def cheaper_models(
    denied: Denied,
    policies: Sequence[Policy],
    context: Context,
    call: Call | None,
    *,
    describer: Describer,
    disclose: Disclose,
    taken: AbstractSet[str],
) -> tuple[str, ...]:
    """The models, as they are listed, that the same call could have gone to.

    Only where nothing but money refused, of which the caller may see what is left; and only of lists that are the
    caller's own. A deployment of a gateway has others in its place already.
    """
    if call is None or call.cost_nanousd is None or call.deployment is not None:
        return ()
    stuck = refusing(denied.receipts)
    if not all(_is_money(receipt) and shown_to_caller(receipt.claim.meter, disclose) for receipt in stuck):
        return ()
    known = {receipt.claim.meter.key: receipt for receipt in denied.receipts}
    found = []
    for name in islice(_listed(policies, context, call, disclose), _MOST):
        other = describer.instead(call, name)
        if other.cost_nanousd is None or other.cost_nanousd >= call.cost_nanousd:
            continue
        asked = ask(policies, context, other, denied.now_ms, requests=False, taken=taken)
        if asked.refusal is None and all(_fits(claim, known.get(claim.meter.key)) for claim in asked.calls):
            found.append(name)
    return tuple(found)


def _listed(policies: Sequence[Policy], context: Context, call: Call, disclose: Disclose) -> Iterable[str]:
    names = (
        name
        for policy in policies
        if isinstance(policy, Listing)
        for name in policy.listed(context, call, others=disclose == "all")
    )
    return dict.fromkeys(names)


def _is_money(receipt: Receipt) -> bool:
    return receipt.claim.meter.unit is Unit.NANOUSD


def _fits(claim: Claim, receipt: Receipt | None) -> bool:
    """Whether the claim had fitted, as far as the refusal tells."""
    if not claim.meter.enforce:
        return True
    if receipt is None:
        return False  # a meter of that model alone
    if receipt.fits:
        return claim.amount <= receipt.claim.amount
    return claim.amount <= capacity(claim.meter) - receipt.used - receipt.held
