from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.policies.values import ALICE, DAY_MS, Bench, call, claims, keys

from asgi_llm_guard.claims import Claim, Granted, Reading, Refused, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import NANO
from asgi_llm_guard.policies import Budget, Eligibility, Limit, ProviderBudget
from asgi_llm_guard.policies.base import DeploymentFilter
from asgi_llm_guard.windows import Rolling

pytestmark = pytest.mark.anyio

BOTH = {"openai": "$1/1d", "anthropic": "$1/1d"}
FREE = Reading(0, 0, None)
SPENT = Reading(NANO, 0, 1_000_000)


async def read(bench: Bench, policy: ProviderBudget, deployments: object) -> Eligibility:
    """The filter, as the guard drives it: one batch for all providers."""
    candidates = policy.resolve(deployments)
    meters = policy.meters(candidates.providers)
    readings = await bench.storage.read(list(meters.values()))
    return policy.eligible(candidates, dict(zip(meters, readings, strict=True)))


def test_configuration_shapes_agree() -> None:
    """B1, conformance 14: mappings, text and typed values make the same meter."""
    shapes: list[object] = [
        {"budget_limit": 100, "time_period": "1d"},
        {"budget_limit": "100", "time_period": "24h"},
        "$100/1d",
        Limit(amount=100 * NANO, unit=Unit.NANOUSD, window=Rolling(DAY_MS)),
    ]
    meters = [ProviderBudget({"openai": shape}).meters(["openai"])["openai"] for shape in shapes]
    assert meters == [meters[0]] * 4
    assert (meters[0].limit, meters[0].scope, meters[0].subject, meters[0].owned) == (
        100 * NANO,
        "provider",
        "openai",
        False,
    )


@pytest.mark.parametrize(
    "budgets, message",
    [
        ({"openai": None}, r"provider_budget\['openai'\]: has no limit"),
        ({"openai": {}}, r"provider_budget\['openai'\]: expected"),
        ({"openai": {"budget_limit": float("nan"), "time_period": "1d"}}, "finite"),
        ({"openai": {"budget_limit": -1, "time_period": "1d"}}, "must not be negative"),
        ({"openai": {"budget_limit": 1e-10, "time_period": "1d"}}, "below one nano-dollar"),
        ({"openai": {"budget_limit": 1, "time_period": "1 fortnight"}}, "time_period"),
        ({"openai": ["$1/1d", "$2/7d"]}, "one provider and one limit"),
        ({"*": "$1/1d"}, "one provider and one limit"),
        ({"openai": "$1/1d", "OpenAI": "$2/1d"}, "in another spelling"),
        ({"": "$1/1d"}, "expected the name of a provider"),
        ({}, "empty mapping"),
        ("$1/1d", "expected a mapping"),
    ],
)
def test_malformed_budgets(budgets: object, message: str) -> None:
    """B1: a provider without a value, and every malformed one, is an error at construction."""
    with pytest.raises(ConfigurationError, match=message):
        ProviderBudget(budgets)  # type: ignore[arg-type]


def test_provider_of_the_call_is_charged() -> None:
    """B4, B8: the call's provider is charged, by its name or by its model's; others have no budget."""
    policy = ProviderBudget({"openai": "$1/1d", "AZURE_OPENAI": "$2/1d", "acme": "$3/1d"})
    assert [claim.meter.subject for claim in claims(policy, ALICE, call())] == ["openai"]
    assert claims(policy, ALICE, call(provider=None))[0].meter.subject == "openai"
    assert claims(policy, ALICE, call(provider="azure"))[0].meter.limit == 2 * NANO
    assert claims(policy, ALICE, call("acme/llama", provider=None))[0].meter.subject == "acme"
    assert claims(policy, ALICE, call(provider="mistral")) == ()
    assert claims(policy, ALICE, call("meta-llama/Llama-3", provider=None)) == ()
    assert claims(policy) == ()


async def test_filter_keeps_who_is_under_budget() -> None:
    """B2, conformance 12 and 26: after one call that cost more than its bound, only the other provider is left."""
    policy = ProviderBudget(BOTH)
    bench = Bench(policy)
    await bench.spend(2 * NANO, ALICE, call(usd=0.5))
    deployments = ["openai/gpt-5", "anthropic/claude-x"]
    assert (await read(bench, policy, deployments)).deployments == ("anthropic/claude-x",)


async def test_filter_counts_holds() -> None:
    """B5: what open calls hold is not left for others."""
    policy = ProviderBudget(BOTH)
    bench = Bench(policy)
    assert await bench.admits(ALICE, call(usd=1))
    assert (await read(bench, policy, ["gpt-5"])).deployments == ()


async def test_first_plan_that_fits() -> None:
    """Conformance 12: a budget smaller than one call's bound sends the first call to the other provider already."""
    policy = ProviderBudget({"openai": "$0.10/1d", "anthropic": "$1/1d"})
    bench = Bench(policy)
    assert not await bench.admits(ALICE, call(usd=0.5))
    assert await bench.admits(ALICE, call(provider="anthropic", usd=0.5))


async def test_two_guards_share_a_store() -> None:
    """Conformance 21 and 29: what one guard's policy takes, the other's sees."""
    first = Bench(ProviderBudget(BOTH))
    second = Bench(ProviderBudget(BOTH), storage=first.storage, clock=first.clock)
    assert await first.admits(ALICE, call(usd=0.7))
    assert not await second.admits(ALICE, call(usd=0.7))


async def test_sole_provider_over_budget() -> None:
    """B3, conformance 13: with none left, one refusal lists each provider's spend, limit and reset."""
    policy = ProviderBudget({"openai": "$1/1d", "anthropic": "$2/7d"})
    bench = Bench(policy)
    started_ms = bench.clock.now_ms()
    await bench.spend(NANO, ALICE, call(usd=1))
    bench.clock.advance(seconds=60)
    await bench.spend(3 * NANO, ALICE, call(provider="anthropic", usd=1))
    outcome = await read(bench, policy, ["openai/gpt-5", "openai/gpt-4", "anthropic/claude-x"])
    now_ms = bench.clock.now_ms()
    denied = outcome.denied(now_ms)
    assert denied is not None
    assert (denied.policy, denied.code, denied.status, denied.retry) == (
        "provider_budget",
        "budget_exhausted",
        402,
        False,
    )
    assert denied.resets_at_ms == started_ms + DAY_MS
    assert denied.retry_after_s == (started_ms + DAY_MS - now_ms) // 1000
    assert "openai, anthropic" in denied.message
    details = "\n".join(denied.details)
    for shown in "$1.00 of $1.00", "$3.00 of $2.00", "soonest reset: openai":
        assert shown in details
        assert shown not in denied.message


def test_refusal_of_token_budgets_and_own_statuses() -> None:
    """B3: budgets of tokens are quotas (429); a status of one's own wins."""
    tokens = ProviderBudget({"openai": "5 tokens/1d"}).eligible("gpt-5", {"openai": Reading(5, 0, None)}).denied(0)
    assert tokens is not None
    assert (tokens.code, tokens.status, tokens.retry_after_s) == ("quota_exceeded", 429, None)
    own = ProviderBudget(BOTH, status=429).eligible("gpt-5", {"openai": SPENT}).denied(0)
    assert own is not None
    assert own.status == 429


def test_nothing_in_nothing_out() -> None:
    """B2: an empty list stays empty, and is no refusal."""
    outcome = ProviderBudget(BOTH).eligible([], {})
    assert (outcome.deployments, outcome.denied(0)) == ((), None)


def test_single_deployment() -> None:
    """B2: a single deployment is filtered like a list of one."""
    policy = ProviderBudget(BOTH)
    assert policy.eligible("gpt-5", {"openai": FREE}).deployments == ("gpt-5",)
    assert policy.eligible({"model": "gpt-5"}, {"openai": SPENT}).deployments == ()
    assert policy.eligible(SimpleNamespace(model="gpt-5"), {"openai": SPENT}).deployments == ()


def test_unbudgeted_and_unparsable_stay() -> None:
    """B2, conformance 24: no budget and no telling provider both stay eligible; the latter is reported."""
    odd: list[object] = ["mistral/m", "who/knows", {"model": 7}, None, 3.5, {}]
    outcome = ProviderBudget(BOTH).eligible(["gpt-5", *odd], {"openai": SPENT})
    assert outcome.deployments == tuple(odd)
    assert outcome.unparsable == tuple(odd[1:])
    assert outcome.denied(0) is None


def test_counted_provider_is_never_over() -> None:
    """Conformance 25: a period without a cap keeps the deployment, whatever was spent."""
    policy = ProviderBudget({"openai": {"time_period": "1d"}})
    assert policy.eligible(["gpt-5"], {"openai": Reading(10**12, 0, 1)}).deployments == ("gpt-5",)
    assert claims(policy, ALICE, call())[0].meter.limit is None


async def test_zero_blocks_everything() -> None:
    """Conformance 30: a budget of 0 is over before anything was spent, for free calls too."""
    policy = ProviderBudget({"openai": "$0/1d"})
    bench = Bench(policy)
    assert (await read(bench, policy, ["gpt-5"])).deployments == ()
    assert not await bench.admits(ALICE, call(usd=0))


async def test_spend_unknown_zero_or_known() -> None:
    """Conformance 22: no meter where there is no budget, 0 where nothing was spent, else the spend and its reset."""
    policy = ProviderBudget(BOTH)
    bench = Bench(policy)
    assert policy.meters(["mistral", ""]) == {}
    meters = policy.meters(["OpenAI", "anthropic"])
    assert list(meters) == ["openai", "anthropic"]
    await bench.spend(NANO // 2, ALICE, call(usd=1))
    openai, anthropic = await bench.storage.read(list(meters.values()))
    assert openai == Reading(NANO // 2, 0, bench.clock.now_ms() + DAY_MS)
    assert (anthropic.used, anthropic.held) == (0, 0)


def test_filter_reads_the_meters_that_are_charged() -> None:
    """B6: what the filter reads in one batch is what calls are charged to."""
    policy = ProviderBudget(BOTH)
    assert (policy.meters(["openai"])["openai"].key,) == keys(policy, ALICE, call())


class Counting:
    """A deployment that counts how often its model is looked at."""

    def __init__(self, model: object) -> None:
        self._model = model
        self.looks = 0

    @property
    def model(self) -> object:
        self.looks += 1
        return self._model


async def test_provider_is_told_once_per_deployment() -> None:
    """B8, conformance 23: one request looks at each deployment once, also where nothing can be told."""
    policy = ProviderBudget(BOTH)
    deployments = [Counting("gpt-5"), Counting(None)]
    await read(Bench(policy), policy, deployments)
    assert [each.looks for each in deployments] == [1, 1]


@pytest.mark.parametrize(
    "deployment, provider",
    [
        ({"model_name": "auto", "litellm_params": {"model": "anthropic/claude-x"}}, "anthropic"),
        ({"model_name": "auto", "litellm_params": {"model": "m", "custom_llm_provider": "openai"}}, "openai"),
        ({"model_name": "m", "provider": "AZURE_OPENAI"}, "azure"),
        ({"model_name": "m", "custom_provider": "AWS_BEDROCK"}, "bedrock"),
        ({"model_name": "claude-x", "api_base": "https://acme.openai.azure.com/"}, "azure"),
        ({"litellm_params": {"api_base": "https://api.openai.com/v1"}}, "openai"),
        (SimpleNamespace(model="acme/llama"), "acme"),
        (SimpleNamespace(litellm_params=SimpleNamespace(model="gpt-5")), "openai"),
        ("gpt-5", "openai"),
        ({"provider": None, "model": None, "model_name": "gpt-5"}, "openai"),
    ],
)
def test_shapes_of_deployments(deployment: object, provider: str) -> None:
    """B8: texts, mappings and objects all tell their provider."""
    (pair,) = ProviderBudget({"acme": "$1/1d"}).resolve(deployment).pairs
    assert pair == (deployment, provider)


def test_shadow_filter_keeps_all() -> None:
    """A shadow's filter drops nothing, and still says who is over."""
    outcome = ProviderBudget(BOTH).shadow().eligible(["gpt-5"], {"openai": SPENT})
    assert (outcome.deployments, outcome.denied(0)) == (("gpt-5",), None)
    assert [meter.subject for meter, _ in outcome.spent] == ["openai"]


async def test_settled_spend_is_in_its_window() -> None:
    """Conformance 19: a new window holds this call's cost alone, and starts now."""
    bench = Bench(ProviderBudget(BOTH))
    await bench.spend(NANO, ALICE, call(usd=1))
    bench.clock.advance(ms=DAY_MS)
    outcome = await bench.reserve(ALICE, call(usd=0.5))
    assert isinstance(outcome, Granted)
    (receipt,) = outcome.receipts
    assert (receipt.used, receipt.pin, receipt.resets_at_ms) == (0, bench.clock.now_ms(), bench.clock.now_ms() + DAY_MS)
    assert isinstance(await bench.reserve(ALICE, call(usd=0.6)), Refused)


def test_the_guard_can_drive_it() -> None:
    """B2: the policy is what the guard takes for a filter of deployments; other budgets are not."""
    driven: DeploymentFilter = ProviderBudget(BOTH)
    assert isinstance(driven, DeploymentFilter)
    assert not isinstance(Budget("$1/1d"), DeploymentFilter)


def test_many_models_one_meter() -> None:
    """All models of one provider share its budget."""
    policy = ProviderBudget(BOTH)
    first, second = (policy.plan(ALICE, Call(model=model, cost_nanousd=1), 0).claims for model in ("gpt-5", "o3"))
    assert first == second == (Claim(first[0].meter, 1),)
