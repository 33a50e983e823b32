"""What every policy that counts can be told: what an outage means for it, how much to lease, and how durable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.policies.values import ALICE, call, claims

from asgi_llm_guard.claims import Claim, Meter, Rule, Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies import Budget, Concurrency, Iterations, Policy, ProviderBudget, Quota, QuotaBook, RateLimit
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.windows import Distinct, Rolling, Slots, Window

MakePolicy = Callable[..., Policy]

BOOK = QuotaBook({"research": {"daily_cost": 10, "daily_tokens": 100, "monthly_cost": 1}})

POLICIES: dict[str, tuple[MakePolicy, str]] = {
    "iterations": (lambda **options: Iterations(25, **options), "local"),
    "budget": (lambda **options: Budget(["$5/1d", "200 tokens/1d"], **options), "deny"),
    "provider budget": (lambda **options: ProviderBudget({"openai": "$5/1d"}, **options), "deny"),
    "quota": (lambda **options: Quota(BOOK, **options), "deny"),
    "rate": (lambda **options: RateLimit("60/minute", **options), "local"),
    "rate of tokens": (lambda **options: RateLimit("60 tokens/minute", **options), "local"),
    "concurrency": (lambda **options: Concurrency(4, **options), "local"),
}
ALL = pytest.mark.parametrize("make, default", POLICIES.values(), ids=POLICIES)


def meters(policy: Policy) -> list[Meter]:
    return [claim.meter for claim in claims(policy, ALICE, call())]


@ALL
def test_defaults(make: MakePolicy, default: str) -> None:
    """A7: money and quotas refuse while the store is away, everything else has a local share; nothing is leased."""
    found = meters(make())
    assert found
    assert {(meter.on_outage, meter.lease, meter.durable) for meter in found} == {(default, 0, None)}


@ALL
@pytest.mark.parametrize("posture", ["deny", "allow", "local"])
@pytest.mark.parametrize("durable", ["replica", "disk"])
def test_options(make: MakePolicy, default: str, posture: str, durable: str) -> None:
    """Every policy that counts can be told otherwise, and its meters say so."""
    found = meters(make(on_outage=posture, durable=durable))
    assert {(meter.on_outage, meter.durable) for meter in found} == {(posture, durable)}


@ALL
@pytest.mark.parametrize(
    "option, value, message",
    [
        ("on_outage", "fail", "on_outage must be 'deny', 'allow' or 'local', got 'fail'"),
        ("on_outage", None, "on_outage must be 'deny', 'allow' or 'local', got None"),
        ("durable", "paper", "durable must be 'replica', 'disk' or None, got 'paper'"),
    ],
)
def test_unknown_options(make: MakePolicy, default: str, option: str, value: object, message: str) -> None:
    """What there is not is refused, with the policy's name and what there is."""
    with pytest.raises(ConfigurationError, match=f": {message}"):
        make(**{option: value})


@ALL
def test_shadows_always_pass(make: MakePolicy, default: str) -> None:
    """A policy in shadow lets calls pass while the store is away, whatever it would do by itself, and leases nothing."""
    policy: Any = make(on_outage="deny")
    assert {(meter.on_outage, meter.lease) for meter in meters(policy.shadow())} == {("allow", 0)}
    assert {(meter.on_outage, meter.lease) for meter in meters(Budget("$5/1d", lease="$1").shadow())} == {("allow", 0)}


@pytest.mark.parametrize(
    "policy, expected",
    [
        (Iterations(25, per="caller", lease=5), [5]),
        (Iterations(25, per="caller", lease="5"), [5]),
        (Budget(["$5/1d", "200 tokens/1d"], lease="$0.50"), [500_000_000, 0]),
        (Budget(["$5/1d", "200 tokens/1d"], lease=20), [0, 20]),
        (Budget(["$5/1d", "$50/monthly"], lease="$5"), [5_000_000_000] * 2),
        (Budget({"alice": "200 tokens/1d", "*": "$0/1d"}, lease="20 tokens"), [20]),
        (ProviderBudget({"openai": "$5/1d", "anthropic": "$0/1d"}, lease="$1"), [1_000_000_000]),
        (RateLimit("60/minute;1000/hour", lease=10), [10, 10]),
        (RateLimit("60 tokens/minute", lease="10"), [10]),
        (Quota(BOOK, lease="$2"), [0, 2_000_000_000, 0]),
        (Quota(BOOK, lease=50), [50, 0, 0]),
    ],
)
def test_leases(policy: Policy, expected: list[int]) -> None:
    """A lease is written as the limit is, and holds for the meters of its unit whose limit is not lower."""
    assert [meter.lease for meter in meters(policy)] == expected


def test_limit_that_is_lower_than_the_lease() -> None:
    """Where an agent's own limit is lower than the lease, or there is none, its calls are not leased."""
    (meter,) = meters(Iterations(25, per="agent", lease=5, agents={"researcher": {"max_iterations": 3}}))
    assert (meter.limit, meter.lease) == (3, 0)
    (meter,) = meters(Budget({"alice": {"budget_limit": None, "time_period": "1d"}}, lease="$1"))
    assert (meter.limit, meter.lease) == (None, 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Iterations(25, lease=5), "iterations: a session's limit is not worth a lease"),
        (lambda: Budget("$5/1d", per="session", lease="$1"), "session_budget: a session's limit is not worth a lease"),
        (
            lambda: Iterations(25, per="caller", lease=26),
            r"iterations.lease: must not be larger than the limit of 25, got 26",
        ),
        (
            lambda: Iterations(25, per="caller", lease=0),
            r"iterations.lease: at least 1; leave it out for no lease, got 0",
        ),
        (lambda: Iterations(25, per="caller", lease="$1"), r"iterations.lease: expected a whole number"),
        (lambda: Iterations(25, per="caller", lease=True), r"iterations.lease: expected a whole number .* got True"),
        (
            lambda: Budget("$5/1d", lease="$6"),
            r"user_budget.lease: must not be larger than the limit of \$5.00, got \$6.00",
        ),
        (lambda: Budget({"a": "$5/1d", "b": "$1/1d"}, lease="$2"), r"must not be larger than the limit of \$1.00"),
        (lambda: Budget("$5/1d", lease=100), "user_budget.lease: no limit is in tokens, got 100"),
        (lambda: Budget("200 tokens/1d", lease="$1"), r"user_budget.lease: no limit is in dollars, got '\$1'"),
        (lambda: Budget("$5/1d", lease="$0"), r"user_budget.lease: at least 1; leave it out for no lease, got '\$0'"),
        (
            lambda: Budget("$5/1d", lease="1 dollar"),
            r"user_budget.lease: expected '\$1', 1000 or '1000 tokens', got '1 dollar'",
        ),
        (lambda: Quota(BOOK, lease="many"), "quota.lease: expected a whole number"),
        (
            lambda: RateLimit("60/minute;10/second", lease=11),
            "user_rate.lease: must not be larger than the limit of 10",
        ),
        (
            lambda: RateLimit("60/minute;100 tokens/minute", counts="calls", lease=5),
            "user_rate: lease=5 is of tokens or of requests",
        ),
    ],
)
def test_leases_that_make_no_sense(make: Callable[[], Policy], message: str) -> None:
    """A lease per session, of nothing, of another unit or of more than the limit is refused when the policy is made."""
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "window, unit, rule", [(Slots(), Unit.SLOTS, Rule.SLOTS), (Distinct(1000), Unit.IDS, Rule.IDS)]
)
def test_slots_and_ids_are_not_leased(window: Window, unit: Unit, rule: Rule) -> None:
    """No meter of slots or ids can have a lease, whoever makes it."""
    with pytest.raises(ConfigurationError, match=r"own: .*leave lease out"):
        Meter(key="k", policy="own", scope="user", subject="s", unit=unit, rule=rule, limit=9, window=window, lease=1)


def test_two_policies_on_one_meter() -> None:
    """Where two policies claim on one meter, the stricter of each of their options holds."""

    class Says:
        name = "says"
        counts = "calls"

        def __init__(self, **options: Any) -> None:
            meter = Meter(
                key="k",
                policy="says",
                scope="user",
                subject="s",
                unit=Unit.CALLS,
                rule=Rule.RATE,
                window=Rolling(1000),
                **options,
            )
            self.verdict = Verdict((Claim(meter, 1),))

        def plan(self, *_: object) -> Verdict:
            return self.verdict

    lower, other = (
        Says(limit=5, on_outage="allow", lease=2),
        Says(limit=9, on_outage="local", lease=1, durable="replica"),
    )
    strict = Says(limit=7, on_outage="deny", lease=3, durable="disk")
    for policies, expected in [
        ((lower, other), (5, "local", 1, "replica")),
        ((other, lower), (5, "local", 1, "replica")),
        ((lower, strict, other), (5, "deny", 1, "disk")),
        ((lower, lower), (5, "allow", 2, None)),
    ]:
        (claim,) = ask(policies, ALICE, None, 0).calls  # type: ignore[arg-type]  # counts is a text
        meter = claim.meter
        assert (meter.limit, meter.on_outage, meter.lease, meter.durable) == expected
