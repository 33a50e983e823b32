"""From what refused to what is answered: storage answers and policies' own refusals become one `Denied`.

Pure: no I/O, no clock, no randomness of its own. `docs/denials.md` shows the table to users.

Rule 1: the first refusing claim, in the order of the policies, names the policy, the code and the status.

Rule 2: `Retry-After` is the longest wait over *all* refusing claims. If one of them can never fit, or has no
reset, there is none. A wait is never understated: it is rounded up, and jitter only adds to it.

Rule 3: `retry` promises that the same request may pass after `Retry-After`: every refusing claim is a rate, a
slot, or an amount that calls in flight hold, and the wait is at most `RETRYABLE_S`.

Rule 4: limits, counts and names are shown only for scopes that the caller owns, or with `disclose="all"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, assert_never, get_args
from urllib.parse import quote

import msgspec

from asgi_llm_guard.claims import Meter, Reading, Receipt, Refused, Rule, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import format_usd
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Slots, Window

__all__ = [
    "RETRYABLE_S",
    "Disclose",
    "Statuses",
    "capacity",
    "check_approval_url",
    "check_status",
    "check_statuses",
    "deny",
    "fits_max_tokens",
    "held_by_others",
    "period",
    "provider_lines",
    "refuse",
    "refusing",
    "together",
    "utc",
    "with_approval",
]

Disclose = Literal["owned", "all"]
Statuses = Mapping[Code | Rule, int]

RETRYABLE_S: Final = 60
"""Longer waits are not worth a client's automatic retry: some sleep through them, others ignore them."""

_MOST_MODELS: Final = 20
_MOST_CHARACTERS: Final = 200
_SHORT_MS: Final = 1000
"""The wait for a slot, or for calls in flight to settle: when they end is not known, so ask again soon."""

_CODES: Final[Mapping[Rule, Code]] = {
    Rule.RATE: "rate_limit_exceeded",
    Rule.SLOTS: "concurrency_limit_exceeded",
    Rule.ITERATIONS: "session_iterations_exhausted",
    Rule.QUOTA: "quota_exceeded",
    Rule.BUDGET: "budget_exhausted",
    Rule.IDS: "session_overflow",
}

_NAMED: Final = frozenset({"deployment"})
"""Scopes whose names everybody may be told, though no figures: whoever runs them has to know which one it is."""

_STATUS: Final[Mapping[Code, int]] = {
    "rate_limit_exceeded": 429,
    "concurrency_limit_exceeded": 429,
    "session_iterations_exhausted": 429,
    "quota_exceeded": 429,
    "budget_exhausted": 402,
    "held_by_others": 429,
    "request_exceeds_budget": 402,  # for money; 429 for everything else
    "session_overflow": 429,
    "session_required": 400,
    "model_not_allowed": 403,
    "model_unpriced": 403,
    "model_not_found": 404,
    "feature_not_allowed": 403,
    "invalid_request": 400,
    "credentials_invalid": 403,
    "body_too_large": 413,
    "body_encoded": 415,
    "route_not_listed": 403,
    "guard_unavailable": 503,
    "guard_draining": 503,
    "stopped": 403,
    "stream_timeout": 504,
}

#: 408 and 409 are retried by clients whatever the headers say; 401 makes them drop their credentials.
_NEVER: Final = frozenset({401, 408, 409})


# ------------------------------------------------------------------------------- configuration


def check_status(status: object, *, name: str = "status") -> int:
    """`status`, if a refusal may have it: 400 to 599, but not 401, 408 or 409.

    Raises:
        ConfigurationError: anything else.
    """
    if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status <= 599 or status in _NEVER:
        raise ConfigurationError(
            f"{name}: expected a status from 400 to 599 other than 401 (clients drop their credentials), "
            f"408 and 409 (clients retry them), got {status!r}"
        )
    return status


def check_statuses(statuses: Mapping[str, int], *, name: str = "statuses") -> Statuses:
    """Statuses by code or by rule, checked.

    Raises:
        ConfigurationError: an unknown code or rule, or a status that a refusal must not have.
    """
    checked: dict[Code | Rule, int] = {}
    rules = {rule.value: rule for rule in Rule}
    codes: dict[str, Code] = {code: code for code in get_args(Code)}
    for key, status in statuses.items():
        known = codes.get(key) or rules.get(key)
        if known is None:
            raise ConfigurationError(f"{name}: expected one of {', '.join([*rules, *codes])}, got {key!r}")
        checked[known] = check_status(status, name=f"{name}[{str(key)!r}]")
    return checked


# ------------------------------------------------------------------------------------ reading


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
    return bool(stuck) and all(_is_held(receipt) or _is_slot(receipt) for receipt in stuck)


def _never(receipt: Receipt) -> bool:
    return receipt.claim.amount > capacity(receipt.claim.meter)


def _is_slot(receipt: Receipt) -> bool:
    return receipt.claim.meter.rule is Rule.SLOTS and not _never(receipt)


def _is_held(receipt: Receipt) -> bool:
    meter = receipt.claim.meter
    return (
        meter.rule in (Rule.QUOTA, Rule.BUDGET)
        and meter.unit in (Unit.TOKENS, Unit.NANOUSD)
        and receipt.used + receipt.claim.amount <= capacity(meter)
    )


def _wait_ms(receipt: Receipt, now_ms: int) -> int | None:
    if _never(receipt):
        return None
    if _is_slot(receipt) or _is_held(receipt):
        return _SHORT_MS
    return None if receipt.resets_at_ms is None else max(receipt.resets_at_ms - now_ms, 1)


def _may_retry(receipt: Receipt) -> bool:
    return not _never(receipt) and (receipt.claim.meter.rule in (Rule.RATE, Rule.SLOTS) or _is_held(receipt))


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


# ----------------------------------------------------------------------------------- deciding


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
    shown = _shown(meter, disclose)

    waits = [_wait_ms(receipt, now_ms) for receipt in stuck]
    wait_s = None if None in waits else -(-max(wait for wait in waits if wait is not None) // 1000)
    retry = wait_s is not None and wait_s <= RETRYABLE_S and all(map(_may_retry, stuck))
    if wait_s is not None and jitter is not None:
        longer_s = wait_s + min(max(jitter(wait_s), 0), wait_s // 10)
        # Above the bound old clients ignore the header and come back at once.
        wait_s = min(longer_s, RETRYABLE_S) if retry else longer_s

    code = _code(first, final=not all(map(_may_retry, stuck)))
    fits = fits_max_tokens(receipts, call)
    told = fits if all(_shown(receipt.claim.meter, disclose) for receipt in stuck) else None
    return Denied(
        policy=meter.policy,
        code=code,
        message=_message(first, code, shown=shown, fits=told),
        status=_status(code, meter, statuses),
        retry=retry,
        retry_after_s=wait_s,
        scope=meter.scope,
        subject=meter.subject if shown or meter.scope in _NAMED else "",
        unit=meter.unit.value,
        requested=first.claim.amount,
        limit=capacity(meter) if shown else None,
        used=first.used if shown else None,
        held=first.held if shown else None,
        resets_at_ms=None if _never(first) else first.resets_at_ms,
        fits_max_tokens=fits,
        violated=tuple(dict.fromkeys(receipt.claim.meter.policy for receipt in stuck)),
        details=_details(states, first, stuck, disclose),
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
        status = (statuses or {}).get(refusal.code, _STATUS[refusal.code])
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


_GRANTABLE: Final[frozenset[Code]] = frozenset(
    {
        "session_iterations_exhausted",
        "quota_exceeded",
        "budget_exhausted",
        "request_exceeds_budget",
        "model_not_allowed",
        "model_unpriced",
        "feature_not_allowed",
    }
)
"""What somebody may be asked to grant; what time or another request mends is not."""


def check_approval_url(template: str | None) -> str | None:
    """`template`, if links can be made of it: `https://ask.example/more?policy={policy}&scope={scope}&subject={subject}`.

    Raises:
        ConfigurationError: no http(s) URL, or other names in braces.
    """
    if template is None:
        return None
    try:
        made = template.format(policy="p", code="c", scope="s", subject="t")
    except (AttributeError, IndexError, KeyError, ValueError):
        made = ""
    if not isinstance(template, str) or not made.startswith(("https://", "http://")):
        raise ConfigurationError(
            "approval_url: expected a URL that may have {policy}, {code}, {scope} and {subject} in it, "
            f"got {template!r}"
        )
    return template


def with_approval(denied: Denied, template: str) -> Denied:
    """The same refusal with the link to where more may be asked for, if it is of a kind that can be granted."""
    if denied.code not in _GRANTABLE:
        return denied
    names = {"policy": denied.policy, "code": denied.code, "scope": denied.scope, "subject": denied.subject}
    url = template.format(
        **{name: quote(value[:_MOST_CHARACTERS], safe="", errors="replace") for name, value in names.items()}
    )
    return msgspec.structs.replace(denied, approval_url=url)


def _code(first: Receipt, *, final: bool) -> Code:
    if _never(first):
        return "request_exceeds_budget"
    if _is_held(first) and not final:
        return "held_by_others"
    return _CODES[first.claim.meter.rule]


def _status(code: Code, meter: Meter, statuses: Statuses | None) -> int:
    if meter.status is not None:
        return meter.status
    if statuses is not None:
        for key in (code, meter.rule):
            if key in statuses:
                return statuses[key]
    if code == "request_exceeds_budget" and meter.unit is not Unit.NANOUSD:
        return 429
    return _STATUS[code]


# -------------------------------------------------------------------------------------- words


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


def _shown(meter: Meter, disclose: Disclose) -> bool:
    return meter.owned or disclose == "all"


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
    if meter.subject and (shown or meter.scope in _NAMED):
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


def _message(receipt: Receipt, code: Code, *, shown: bool, fits: int | None) -> str:
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


def _details(states: Refused, first: Receipt, stuck: list[Receipt], disclose: Disclose) -> tuple[str, ...]:
    """One line for each refusing claim but the first: of this plan, then of the plans beside it."""
    told = {first.claim.meter.key}
    lines = []
    for receipt in (*stuck[1:], *(receipt for receipts in states.states for receipt in refusing(receipts))):
        meter = receipt.claim.meter
        if meter.key not in told:
            told.add(meter.key)
            shown = _shown(meter, disclose)
            line = f"{meter.policy}: {_who(meter, shown=shown)} ({_facts(receipt, shown=shown)})"
            if receipt.resets_at_ms is not None and not _never(receipt):
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
        if _shown(meter, disclose):
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
