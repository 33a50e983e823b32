"""What receipts say of a refusal: which claims refuse, how long they will, and what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from asgi_llm_guard.claims import Meter, Receipt, Rule, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.windows import Bucket

__all__ = [
    "NAMED",
    "Disclose",
    "capacity",
    "fits_max_tokens",
    "held_by_others",
    "is_held",
    "may_retry",
    "never_fits",
    "refusing",
    "shown_to_caller",
    "wait_ms",
]

Disclose = Literal["owned", "all"]

NAMED: Final = frozenset({"deployment"})
"""Scopes whose names everybody may be told, though no figures: whoever runs them has to know which one it is."""

_SHORT_MS: Final = 1000
"""The wait for a slot, or for calls in flight to settle: when they end is not known, so ask again soon."""


def refusing(receipts: Sequence[Receipt]) -> list[Receipt]:
    """The receipts of the enforced claims that do not fit, in order."""
    return [receipt for receipt in receipts if not receipt.fits and receipt.claim.meter.enforce]


def capacity(meter: Meter) -> int:
    """What `used + held + amount` is compared with: the burst of a bucket, else the limit; 0 if that blocks everything.

    Raises:
        ValueError: the meter has no limit.
    """
    if meter.limit is None:
        raise ValueError(f"{meter.policy}: a meter without a limit has no capacity")
    return meter.window.burst if meter.limit and isinstance(meter.window, Bucket) else meter.limit


def held_by_others(receipts: Sequence[Receipt]) -> bool:
    """Whether nothing but calls in flight stands in the way: slots, and held tokens and money.

    Worth a short wait: a settlement gives back what was held too much. A rate, a call of a session and a
    counted id are never given back by a call that went well, so waiting for them is not meant here.
    """
    stuck = refusing(receipts)
    return bool(stuck) and all(is_held(receipt) or is_slot(receipt) for receipt in stuck)


def never_fits(receipt: Receipt) -> bool:
    return receipt.claim.amount > capacity(receipt.claim.meter)


def is_slot(receipt: Receipt) -> bool:
    return receipt.claim.meter.rule is Rule.SLOTS and not never_fits(receipt)


def is_held(receipt: Receipt) -> bool:
    meter = receipt.claim.meter
    return (
        meter.rule in (Rule.QUOTA, Rule.BUDGET)
        and meter.unit in (Unit.TOKENS, Unit.NANOUSD)
        and receipt.used + receipt.claim.amount <= capacity(meter)
    )


def wait_ms(receipt: Receipt, now_ms: int) -> int | None:
    if never_fits(receipt):
        return None
    if is_slot(receipt) or is_held(receipt):
        return _SHORT_MS
    return None if receipt.resets_at_ms is None else max(receipt.resets_at_ms - now_ms, 1)


def may_retry(receipt: Receipt) -> bool:
    return not never_fits(receipt) and (receipt.claim.meter.rule in (Rule.RATE, Rule.SLOTS) or is_held(receipt))


def fits_max_tokens(receipts: Sequence[Receipt], call: Call | None) -> int | None:
    """The largest output limit for one choice with which every refusing claim would have fitted.

    `None`: no such limit of at least 1, the call is not known, or a claim refuses that a smaller answer does
    not help (a call, a slot, input tokens).
    """
    if call is None:
        return None
    most: int | None = None
    for receipt in refusing(receipts):
        fit = _fits(receipt, call)
        if fit is None or fit < 1:
            return None
        most = fit if most is None else min(most, fit)
    return most


def _fits(receipt: Receipt, call: Call) -> int | None:
    claim = receipt.claim
    room = capacity(claim.meter) - receipt.used - receipt.held
    if claim.meter.unit is Unit.NANOUSD and claim.amount == call.cost_nanousd and call.output_picousd > 0:
        # pico-USD, floored: the cost is rounded up to whole nano-USD, and still fits
        return (room - call.input_nanousd) * 1000 // call.output_picousd
    if claim.meter.unit is Unit.TOKENS and call.output_tokens > 0:
        if claim.amount == call.total_tokens:
            return (room - call.input_tokens) // call.choices
        if claim.amount == call.output_tokens:
            return room // call.choices
    return None


def shown_to_caller(meter: Meter, disclose: Disclose) -> bool:
    return meter.owned or disclose == "all"
