"""The words of refusals: what is used up, by whom, how far, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, assert_never

from asgi_llm_guard.claims import Meter, Reading, Receipt, Refused, Rule, Unit
from asgi_llm_guard.decision import Code
from asgi_llm_guard.denials.receipts import NAMED, Disclose, capacity, never_fits, refusing, shown_to_caller
from asgi_llm_guard.money import format_usd
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Slots, Window

__all__ = ["details_of", "message_of", "period", "provider_lines", "utc"]


def utc(instant_ms: int) -> str:
    """An instant as `2026-11-21T10:00:00Z`: RFC 3339, UTC whatever the host's zone, rounded up to a second."""
    return datetime.fromtimestamp(-(-instant_ms // 1000), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_ADVERBS: Final = {"hour": "hourly", "day": "daily", "week": "weekly", "month": "monthly", "year": "yearly"}
_LENGTHS: Final = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms"))


def period(window: Window) -> str | None:
    """How long a window lasts, as it is configured: `daily`, `7d`, `1m`; `None` for slots."""
    if isinstance(window, Slots):
        return None
    if isinstance(window, Calendar):
        return _ADVERBS[window.unit]
    length = window.ttl_ms if isinstance(window, Lifetime | Distinct) else window.period_ms
    return next(f"{length // unit_ms}{unit}" for unit_ms, unit in _LENGTHS if length % unit_ms == 0)


def _quantity(amount: int, unit: Unit) -> str:
    match unit:
        case Unit.NANOUSD:
            return format_usd(amount)
        case Unit.CALLS:
            return f"{amount} call" if amount == 1 else f"{amount} calls"
        case Unit.TOKENS:
            return f"{amount} token" if amount == 1 else f"{amount} tokens"
        case Unit.SLOTS:
            return f"{amount} at a time"
        case Unit.IDS:
            return f"{amount} live ids"
        case _:
            assert_never(unit)


def _who(meter: Meter, *, shown: bool) -> str:
    if meter.scope == "global":
        return "the service"
    if meter.subject and (shown or meter.scope in NAMED):
        # As `repr`: an id from the wire must not break a line of a log.
        return f"{meter.scope} {meter.subject[:128]!r}"
    return f"this {meter.scope}"


def _facts(receipt: Receipt, *, shown: bool) -> str:
    unit, meter = receipt.claim.meter.unit, receipt.claim.meter
    requested = format_usd(receipt.claim.amount) if unit is Unit.NANOUSD else str(receipt.claim.amount)
    if not shown:
        return f"requested {requested}"
    number = format_usd if unit is Unit.NANOUSD else str
    held = f", held by calls in flight {number(receipt.held)}" if receipt.held else ""
    return f"limit {_limit(meter)}, used {number(receipt.used)}{held}, requested {requested}"


def _limit(meter: Meter) -> str:
    if isinstance(meter.window, Bucket) and meter.limit:
        return f"{_quantity(meter.limit, meter.unit)} per {period(meter.window)} in bursts of {meter.window.burst}"
    most = _quantity(capacity(meter), meter.unit)
    return f"{most} per {period(meter.window)}" if meter.rule is Rule.RATE else most


def message_of(receipt: Receipt, code: Code, *, shown: bool, fits: int | None) -> str:
    meter = receipt.claim.meter
    lead = _lead(code, meter, _who(meter, shown=shown))
    hint = f" It would fit with max_tokens ≤ {fits}." if fits is not None else ""
    return f"{meter.policy}: {lead} ({_facts(receipt, shown=shown)}). {_next_step(receipt, code, shown=shown)}{hint}"


def _lead(code: Code, meter: Meter, who: str) -> str:
    lasting = meter.rule in (Rule.QUOTA, Rule.BUDGET)
    span = f"{period(meter.window)} " if lasting else ""
    pot = {Unit.NANOUSD: "budget", Unit.TOKENS: "token quota"}.get(meter.unit, "quota") if lasting else "limit"
    match code:
        case "rate_limit_exceeded":
            return f"{who} is over its rate limit"
        case "concurrency_limit_exceeded":
            return f"{who} has as many calls in flight as it may have"
        case "session_iterations_exhausted":
            return f"{who} has used up its calls"
        case "held_by_others":
            return f"calls in flight hold the rest of the {span}{pot} of {who}"
        case "request_exceeds_budget":
            return f"this request alone is more than the whole {span}{pot} of {who}"
        case "session_overflow":
            return f"{who} has too many live sessions to open another"
        case _:
            return f"{who} has used up its {span}{pot}"


def _next_step(receipt: Receipt, code: Code, *, shown: bool) -> str:
    if code == "request_exceeds_budget":
        if shown and capacity(receipt.claim.meter) == 0:
            return "A limit of 0 blocks every call; have the limit raised."
        return "Waiting does not help: ask for less, or have the limit raised."
    if code == "concurrency_limit_exceeded":
        return "Try again when one of them has ended."
    if code == "held_by_others":
        return "Try again when they have settled."
    if receipt.resets_at_ms is None:
        return "It does not reset by itself: ask for less, or have the limit raised."
    if code == "rate_limit_exceeded":
        return f"Try again at {utc(receipt.resets_at_ms)}."
    return f"It resets at {utc(receipt.resets_at_ms)}."


def details_of(states: Refused, first: Receipt, stuck: list[Receipt], disclose: Disclose) -> tuple[str, ...]:
    """One line for each refusing claim but the first: of this plan, then of the plans beside it."""
    told = {first.claim.meter.key}
    lines = []
    for receipt in (*stuck[1:], *(receipt for receipts in states.states for receipt in refusing(receipts))):
        meter = receipt.claim.meter
        if meter.key not in told:
            told.add(meter.key)
            shown = shown_to_caller(meter, disclose)
            line = f"{meter.policy}: {_who(meter, shown=shown)} ({_facts(receipt, shown=shown)})"
            if receipt.resets_at_ms is not None and not never_fits(receipt):
                line += f", resets at {utc(receipt.resets_at_ms)}"
            lines.append(line)
    return tuple(lines)


def provider_lines(readings: Iterable[tuple[Meter, Reading]], *, disclose: Disclose) -> tuple[str, ...]:
    """One line for each provider's budget: spend, limit and reset; then the soonest reset, if there is one.

    Amounts are left out where they may not be shown; a provider's name may always be.
    """
    lines, soonest = [], None
    for meter, reading in readings:
        line = f"{meter.subject}: "
        if shown_to_caller(meter, disclose):
            limit = "no limit" if meter.limit is None else _quantity(meter.limit, meter.unit)
            held = f", {_quantity(reading.held, meter.unit)} held" if reading.held else ""
            line += f"{_quantity(reading.used, meter.unit)} of {limit} spent{held}"
        else:
            over = meter.limit is not None and reading.used + reading.held >= meter.limit
            line += "budget spent" if over else "budget not enough for this request"
        if reading.resets_at_ms is not None:
            line += f", resets at {utc(reading.resets_at_ms)}"
            if soonest is None or reading.resets_at_ms < soonest[0]:
                soonest = (reading.resets_at_ms, meter.subject)
        lines.append(line)
    if soonest is not None:
        lines.append(f"soonest reset: {soonest[1]} at {utc(soonest[0])}")
    return tuple(lines)
