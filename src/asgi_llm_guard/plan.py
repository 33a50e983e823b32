"""From policies to claims: ask every policy, merge what meets on one meter, keep their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from asgi_llm_guard.claims import Claim, Durable, Meter, OnOutage, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.policies.base import CacheDirective, Policy

__all__ = ["Asked", "ask", "is_rate", "only_rates"]

_NONE: AbstractSet[str] = frozenset()


class Asked(msgspec.Struct, frozen=True):
    """What all policies together ask for."""

    requests: tuple[Claim, ...]
    """Claims that last as long as the request: rates and slots."""
    calls: tuple[Claim, ...]
    """Claims of one LLM call."""
    refusal: Refusal | None = None
    """The first policy that refuses by itself."""
    shadow_refusals: tuple[Refusal, ...] = ()
    """What policies in shadow would have refused by themselves."""
    cache: CacheDirective | None = None


def ask(
    policies: Iterable[Policy],
    context: Context,
    call: Call | None,
    now_ms: int,
    *,
    requests: bool = True,
    calls: bool = True,
    taken: AbstractSet[str] = _NONE,
) -> Asked:
    """Ask the policies that count `requests` and those that count `calls`, in order.

    Two claims on one meter become one, with the larger amount under the lower limit. Claims on
    meters in `taken` are left out: an enclosing scope holds them already.
    """
    request_claims: list[Claim] = []
    call_claims: list[Claim] = []
    parts: list[tuple[list[Claim], tuple[Claim, ...]]] = []
    shadow: list[Refusal] = []
    cache: CacheDirective | None = None
    for policy in policies:
        if policy.counts == "calls":
            if not calls:
                continue
            claims = call_claims
        elif requests:
            claims = request_claims
        else:
            continue
        verdict = policy.plan(context, call, now_ms)
        if verdict.refusal is not None:
            return Asked((), (), verdict.refusal, tuple(shadow), cache)
        if verdict.shadow_refusal is not None:
            shadow.append(verdict.shadow_refusal)
        if verdict.cache is not None:
            cache = verdict.cache if cache is None else _both(cache, verdict.cache)
        parts.append((claims, verdict.claims))
        claims += verdict.claims
    keys = {claim.meter.key for claim in call_claims}
    keys.update([claim.meter.key for claim in request_claims])
    if taken or len(keys) < len(call_claims) + len(request_claims):
        request_claims.clear()
        call_claims.clear()
        _add_each(parts, taken)
    return Asked(tuple(request_claims), tuple(call_claims), None, tuple(shadow), cache)


def is_rate(claim: Claim) -> bool:
    """Whether it counts requests or calls as they come, whatever they cost."""
    return claim.meter.rule is Rule.RATE and claim.meter.unit is Unit.CALLS


def only_rates(asked: Asked) -> Asked:
    """What an answer that is kept takes: rates of requests and calls, and nothing of what a provider would be paid for."""
    requests, calls = (tuple(filter(is_rate, claims)) for claims in (asked.requests, asked.calls))
    return msgspec.structs.replace(asked, requests=requests, calls=calls)


def _both(one: CacheDirective, other: CacheDirective) -> CacheDirective:
    """What two scopes allow together: a partition inside both, for the shorter time."""
    if not (one.allowed and other.allowed):
        return other if one.allowed else one
    times = [directive.ttl_s for directive in (one, other) if directive.ttl_s is not None]
    return CacheDirective(
        allowed=True,
        # The length says where the first one ends, whatever the two contain.
        partition=f"{len(one.partition)}:{one.partition}{other.partition}",
        ttl_s=min(times, default=None),
        names=(*one.names, *other.names),
    )


def _add_each(parts: Iterable[tuple[list[Claim], tuple[Claim, ...]]], taken: AbstractSet[str]) -> None:
    """Add the claims of each part to its list, one by one: without those in `taken`, and merged where they meet."""
    seen: dict[str, tuple[list[Claim], int]] = {}
    for claims, more in parts:
        for claim in more:
            key = claim.meter.key
            if key in taken:
                continue
            earlier = seen.get(key)
            if earlier is None:
                seen[key] = (claims, len(claims))
                claims.append(claim)
            else:
                where, index = earlier
                where[index] = _merge(where[index], claim)


def _merge(one: Claim, other: Claim) -> Claim:
    amount = max(one.amount, other.amount)
    return Claim(_stricter(one.meter, other.meter), amount, one.member)


_HARSHER: Final[Mapping[OnOutage, int]] = {"allow": 0, "local": 1, "deny": 2}
_FIRMER: Final[Mapping[Durable | None, int]] = {None: 0, "replica": 1, "disk": 2}


def _stricter(one: Meter, other: Meter) -> Meter:
    """The meter with the lower limit, and with the stricter of everything else that two policies may say."""
    both = (one, other)
    lower = one if other.limit is None or (one.limit is not None and one.limit <= other.limit) else other
    on_outage = max((meter.on_outage for meter in both), key=_HARSHER.__getitem__)
    durable = max((meter.durable for meter in both), key=_FIRMER.__getitem__)
    lease = min(meter.lease for meter in both)
    if (on_outage, durable, lease) == (lower.on_outage, lower.durable, lower.lease):
        return lower
    return msgspec.structs.replace(lower, on_outage=on_outage, durable=durable, lease=lease)
