"""`RateLimit-Policy` and `RateLimit`: what is allowed and what is left, on admitted and refused responses.

Structured-field lists with one string member for each limit that may be shown:

    RateLimit-Policy: "rpm";q=60;w=60, "quota-tokens-daily";q=100000;w=86400;llmguard-unit="tokens"
    RateLimit: "rpm";r=12;t=31, "quota-tokens-daily";r=41250;t=50400

`q` and `w`: the limit and its window in seconds. `r`: what is left once this request has taken its part.
`t`: the effective window, in seconds; no more than `r` may be used within it. Numbers count requests, or
what `llmguard-unit` (`tokens`, `usd-micros`) or `qu="concurrent-requests"` says.

Runs for every response, so what does not change from one to the next is made once for each meter.

Source: draft-ietf-httpapi-ratelimit-headers-11; RFC 9651 for strings, integers and byte sequences.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Final

from asgi_llm_guard.claims import Meter, Receipt, Rule, Unit
from asgi_llm_guard.denials.receipts import Disclose, capacity
from asgi_llm_guard.denials.wording import period
from asgi_llm_guard.windows import SLOTS, Bucket, Calendar, Lifetime, Rolling, Sliding

__all__ = ["rate_limit_headers"]

_MOST: Final = 999_999_999_999_999
"""Structured-field integers have at most 15 digits."""

_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")
_CALENDAR_S: Final = {"hour": 3600, "day": 86_400, "week": 604_800}  # months and years differ in length: no `w`

_KEPT: Final = 4096
_members: dict[str, tuple[Meter, str, str, int, int, str]] = {}
"""A pure function's memory, and bounded. By the meter's key: the meter, its member of the policy field (empty where
it is never shown), the head of its member of the other field, its capacity, how many of its units make one shown
unit, and the text for a full window."""


def rate_limit_headers(
    receipts: Sequence[Receipt], now_ms: int, *, disclose: Disclose = "owned"
) -> list[tuple[bytes, bytes]]:
    """Both fields for what was claimed; none at all where nothing may be shown.

    Shown are enforced limits of scopes that the caller owns, with `disclose="all"` of every scope. Counts of
    live ids are not: they guard the service, and a client cannot plan by them.
    """
    policies: list[str] = []
    states: list[str] = []
    for receipt in receipts:
        claim = receipt.claim
        meter = claim.meter
        kept = _members.get(meter.key)
        if kept is None or (kept[0] is not meter and kept[0] != meter):
            kept = _keep(meter)
        _, policy, head, most, divisor, full = kept
        if not policy or (disclose == "owned" and not meter.owned):
            continue
        left = most - receipt.used - receipt.held
        if receipt.taken:
            left -= claim.amount
        if left < 0:
            left = 0
        elif divisor != 1:
            left //= divisor
        elif left > _MOST:
            left = _MOST
        resets_at_ms = receipt.resets_at_ms
        policies.append(policy)
        if meter.kind == SLOTS:
            states.append(f"{head}{left}")
        elif resets_at_ms is not None and resets_at_ms > now_ms:  # else it slides, and its whole length counts
            states.append(f"{head}{left};t={-((now_ms - resets_at_ms) // 1000)}")
        else:
            states.append(f"{head}{left}{full}")
    if not policies:
        return []
    return [
        (b"ratelimit-policy", ", ".join(policies).encode("ascii")),
        (b"ratelimit", ", ".join(states).encode("ascii")),
    ]


def _keep(meter: Meter) -> tuple[Meter, str, str, int, int, str]:
    if len(_members) >= _KEPT:
        _members.clear()
    kept = _members[meter.key] = _member(meter)
    return kept


def _member(meter: Meter) -> tuple[Meter, str, str, int, int, str]:
    if meter.rule is Rule.IDS or meter.limit is None or not meter.enforce:
        return meter, "", "", 0, 1, ""
    divisor = 1000 if meter.unit is Unit.NANOUSD else 1
    length_s = _length_s(meter)
    # A scope that callers share is one of several under the same name: the departments of one caller.
    partition = "" if meter.owned or not meter.subject else f";pk=:{_digest(meter.subject)}:"
    name = _name(meter)
    window = "" if length_s is None else f";w={length_s}"
    full = "" if length_s is None else f";t={length_s}"
    policy = f"{name};q={min(meter.limit // divisor, _MOST)}{window}{_unit(meter)}{partition}"
    return meter, policy, f"{name}{partition};r=", capacity(meter), divisor, full


def _name(meter: Meter) -> str:
    """The policy, as a structured-field string; quotas and budgets may have several limits under one name."""
    name = meter.policy[:100]
    if meter.rule in (Rule.QUOTA, Rule.BUDGET):
        unit = "usd" if meter.unit is Unit.NANOUSD else meter.unit.value
        name = f"{name}-{unit}-{period(meter.window)}"
    name = _UNPRINTABLE.sub("_", name).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{name}"'


def _unit(meter: Meter) -> str:
    if meter.kind == SLOTS:
        return ';qu="concurrent-requests"'
    return {Unit.TOKENS: ';llmguard-unit="tokens"', Unit.NANOUSD: ';llmguard-unit="usd-micros"'}.get(meter.unit, "")


def _length_s(meter: Meter) -> int | None:
    window = meter.window
    if isinstance(window, Calendar):
        return _CALENDAR_S.get(window.unit)
    if isinstance(window, Lifetime):
        return -(-window.ttl_ms // 1000)
    if isinstance(window, Rolling | Sliding | Bucket):
        return -(-window.period_ms // 1000)
    return None


def _digest(subject: str) -> str:
    return base64.b64encode(hashlib.blake2s(subject.encode("utf-8", "replace"), digest_size=6).digest()).decode("ascii")
