"""How claims of several policies are merged, and slots given back: what mutants showed to be untested elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from tests.storage.values import DAY_MS, claim, meter

from asgi_llm_guard.charge import Charge, actuals
from asgi_llm_guard.claims import Claim, Meter, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.plan import Asked, ask, is_rate, only_rates
from asgi_llm_guard.policies.base import CacheDirective, Verdict
from asgi_llm_guard.windows import Rolling, Slots


@dataclass(frozen=True, slots=True)
class Says:
    """A policy that always gives the same verdict."""

    verdict: Verdict
    counts: Literal["calls", "requests"] = "calls"
    name: str = "says"

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:
        return self.verdict


def claims(*asked: Claim, counts: Literal["calls", "requests"] = "calls") -> Says:
    return Says(Verdict(asked), counts)


def on(subject: str = "s", limit: int | None = 100, *, policy: str = "policy") -> Meter:
    """A meter whose key is its subject alone, whichever policy claims on it."""
    one = meter(Rolling(DAY_MS), limit, subject=subject)
    return Meter(
        key=subject,
        policy=policy,
        scope="user",
        subject=subject,
        unit=one.unit,
        rule=one.rule,
        limit=limit,
        window=one.window,
    )


def asked(*policies: Says, taken: frozenset[str] = frozenset()) -> Asked:
    return ask(policies, Context(), None, 0, taken=taken)


def test_requests_and_calls_are_asked_apart_and_in_order() -> None:
    """Claims of requests and of calls keep to their own list, in the order of the policies."""
    a, b, c = claim(on("a"), 1), claim(on("b"), 2), claim(on("c"), 3)
    policies = (claims(a), claims(b, counts="requests"), claims(c))
    both = ask(policies, Context(), None, 0)
    assert (both.requests, both.calls) == ((b,), (a, c))
    assert ask(policies, Context(), None, 0, requests=False) == Asked((), (a, c))
    assert ask(policies, Context(), None, 0, calls=False) == Asked((b,), ())


@pytest.mark.parametrize(
    ("first", "second", "merged"), [(5, 3, 3), (3, 5, 3), (None, 5, 5), (5, None, 5), (None, None, None), (0, None, 0)]
)
def test_two_claims_on_one_meter_become_the_larger_amount_under_the_lower_limit(
    first: int | None, second: int | None, merged: int | None
) -> None:
    """Whichever policy comes first, the merged claim is at least as strict as either."""
    for amounts in ((1, 2), (2, 1)):
        result = asked(claims(claim(on("m", first), amounts[0])), claims(claim(on("m", second), amounts[1])))
        (one,) = result.calls
        assert (one.amount, one.meter.limit) == (2, merged)


def test_of_equal_limits_the_first_policy_is_the_one_that_refuses() -> None:
    """A merged claim under equal limits belongs to the policy that came first."""
    result = asked(claims(claim(on("m", 5, policy="first"))), claims(claim(on("m", 5, policy="second"))))
    assert [one.meter.policy for one in result.calls] == ["first"]


def test_a_request_and_a_call_on_one_meter_claim_once() -> None:
    """A meter that a request and its call both claim is claimed where it came first, and the others stay."""
    shared, own = on("shared"), on("own")
    result = asked(claims(claim(shared, 1), claim(own, 1), counts="requests"), claims(claim(shared, 2)))
    assert result == Asked((claim(shared, 2), claim(own, 1)), ())


def test_meters_that_are_taken_already_are_left_out() -> None:
    """What an enclosing scope holds is claimed by neither the request nor the call."""
    result = asked(
        claims(claim(on("a")), claim(on("b")), counts="requests"),
        claims(claim(on("a")), claim(on("c"))),
        taken=frozenset({"a"}),
    )
    assert result == Asked((claim(on("b")),), (claim(on("c")),))


def test_verdicts_besides_claims_are_passed_on() -> None:
    """The last cache directive, every refusal in shadow, and the first real one reach the caller."""
    refusal = Refusal(policy="p", code="model_not_allowed", message="no")
    cached = CacheDirective(allowed=True, partition="x")
    shadow = Says(Verdict(shadow_refusal=refusal))
    assert asked(Says(Verdict(cache=cached)), shadow, claims()) == Asked((), (), None, (refusal,), cached)
    assert asked(Says(Verdict(cache=cached)), shadow, Says(Verdict(refusal=refusal)), claims(claim(on()))) == Asked(
        (), (), refusal, (refusal,), cached
    )


@pytest.mark.parametrize("rule", [Rule.RATE, Rule.QUOTA])
@pytest.mark.parametrize("unit", [Unit.CALLS, Unit.TOKENS])
def test_rates_are_what_counts_calls_by_rate(rule: Rule, unit: Unit) -> None:
    """A quota of calls is no rate, and neither is a rate of tokens, which a kept answer uses none of."""
    one = Meter(key="k", policy="p", scope="user", subject="s", unit=unit, rule=rule, limit=9, window=Rolling(1))
    rated = rule is Rule.RATE and unit is Unit.CALLS
    assert is_rate(Claim(one, 1)) is rated
    both = Asked((Claim(one, 1),), (Claim(one, 2),), None, (), CacheDirective(allowed=True))
    kept = only_rates(both)
    assert (kept.requests, kept.calls) == ((both.requests, both.calls) if rated else ((), ()))
    assert kept.cache == both.cache


def cached_by(one: CacheDirective, other: CacheDirective) -> CacheDirective | None:
    return asked(Says(Verdict(cache=one)), Says(Verdict(cache=other))).cache


def test_a_cache_has_to_be_allowed_by_every_policy() -> None:
    """Whichever policy forbids it, and in whichever order, its reason stays."""
    yes, no = CacheDirective(allowed=True, partition="x"), CacheDirective(allowed=False, reason="secret")
    other = CacheDirective(allowed=False, reason="other")
    assert cached_by(yes, no) == no
    assert cached_by(no, yes) == no
    assert cached_by(no, other) == no


@pytest.mark.parametrize(
    ("first", "second", "ttl_s"), [(5, 9, 5), (9, 5, 5), (None, 9, 9), (9, None, 9), (None, None, None)]
)
def test_two_policies_that_allow_a_cache_share_the_narrower(
    first: int | None, second: int | None, ttl_s: int | None
) -> None:
    """The partition is inside both, the time the shorter one, and either's names revoke it."""
    one = CacheDirective(allowed=True, partition="a", ttl_s=first, names=("user:a",))
    other = CacheDirective(allowed=True, partition="bc", ttl_s=second, names=("kb:b",))
    assert cached_by(one, other) == CacheDirective(
        allowed=True, partition="1:abc", ttl_s=ttl_s, names=("user:a", "kb:b")
    )


def test_two_partitions_are_told_apart_where_they_meet() -> None:
    """Two pairs of partitions never make the same one, wherever the first ends."""
    a, bc, ab, c = (CacheDirective(allowed=True, partition=part) for part in ("a", "bc", "ab", "c"))
    assert cached_by(a, bc) != cached_by(ab, c)


def test_slots_are_settled_with_nothing() -> None:
    """A slot is given back whatever became of the call; what counts calls keeps what is held."""
    slots = Meter(
        key="k", policy="p", scope="user", subject="s", unit=Unit.SLOTS, rule=Rule.SLOTS, limit=1, window=Slots()
    )
    units = [
        Meter(key=unit, policy="p", scope="user", subject="s", unit=unit, rule=Rule.QUOTA, limit=9, window=Rolling(1))
        for unit in (Unit.NANOUSD, Unit.TOKENS, Unit.CALLS)
    ]
    all_claims = [Claim(m, 1) for m in (slots, *units)]
    assert actuals(all_claims, Charge(outcome="measured", tokens=7, cost_nanousd=8)) == (0, 8, 7, None)
    assert actuals(all_claims, Charge(outcome="provider_error", tokens=7, cost_nanousd=8)) == (0, 0, 0, None)
    assert actuals(all_claims, Charge(outcome="not_dispatched")) == (0, 0, 0, 0)
    assert actuals(all_claims, Charge(outcome="unknown")) == (0, None, None, None)
