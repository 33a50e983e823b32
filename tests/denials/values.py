"""Builders for the tests of refusals: meters, receipts and refused plans, with everything else at its plainest."""

from __future__ import annotations

from typing import get_args

from asgi_llm_guard.claims import Claim, Meter, Receipt, Refused, Rule, Unit, meter_key
from asgi_llm_guard.decision import Code
from asgi_llm_guard.windows import Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

NOW_MS = 1_795_255_200_000
"""2026-11-21T10:00:00Z."""

CODES: tuple[Code, ...] = get_args(Code)

_PLAIN: dict[Rule, tuple[Unit, Window, str]] = {
    Rule.RATE: (Unit.CALLS, Sliding(60_000), "user"),
    Rule.SLOTS: (Unit.SLOTS, Slots(), "user"),
    Rule.ITERATIONS: (Unit.CALLS, Lifetime(3_600_000), "session"),
    Rule.QUOTA: (Unit.TOKENS, Calendar("day"), "department"),
    Rule.BUDGET: (Unit.NANOUSD, Rolling(86_400_000), "user"),
    Rule.IDS: (Unit.IDS, Distinct(3_600_000), "caller"),
}


def meter(
    rule: Rule,
    limit: int | None = 10,
    *,
    unit: Unit | None = None,
    window: Window | None = None,
    policy: str | None = None,
    scope: str | None = None,
    subject: str = "s1",
    owned: bool = True,
    enforce: bool = True,
    status: int | None = None,
) -> Meter:
    """A meter as a policy of that rule would build it."""
    plain_unit, plain_window, plain_scope = _PLAIN[rule]
    unit, window, policy = unit or plain_unit, window or plain_window, policy or rule.value
    return Meter(
        key=meter_key(policy, unit, window, subject),
        policy=policy,
        scope=scope or plain_scope,
        subject=subject,
        unit=unit,
        rule=rule,
        limit=limit,
        window=window,
        owned=owned,
        enforce=enforce,
        status=status,
    )


def stuck(on: Meter, *, amount: int = 1, used: int = 10, held: int = 0, wait_ms: int | None = None) -> Receipt:
    """The receipt of a claim that does not fit; `wait_ms`: until its reset."""
    return Receipt(
        claim=Claim(on, amount),
        taken=False,
        fits=False,
        used=used,
        held=held,
        pin=0,
        resets_at_ms=None if wait_ms is None else NOW_MS + wait_ms,
    )


def fitting(on: Meter, *, amount: int = 1, used: int = 0, held: int = 0, taken: bool = True) -> Receipt:
    """The receipt of a claim that fits."""
    return Receipt(claim=Claim(on, amount), taken=taken, fits=True, used=used, held=held, pin=0, resets_at_ms=None)


def refused(*receipts: Receipt) -> Refused:
    """One plan, refused."""
    return Refused((receipts,), NOW_MS)
