from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.values import ALICE, DAY_MS, NOBODY, Bench, call, claims, keys

from asgi_llm_guard.claims import Claim, Granted, Refused, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import NANO
from asgi_llm_guard.policies import Budget, Limit, RateLimit
from asgi_llm_guard.policies._scoped import MEMO_SIZE, Per
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling

pytestmark = pytest.mark.anyio

IDS = st.one_of(st.none(), st.sampled_from(["anonymous", "caller", "user", "a", "a:b", "user:a"]), st.text(min_size=1))


def test_claims_the_upper_bound() -> None:
    """A budget of money takes the call's cost bound; one of tokens takes input and output together."""
    money, tokens = claims(Budget(["$5/1d", "1000 tokens/1d"]), ALICE, call(usd=0.25, tokens=70))
    assert (money.amount, money.meter.unit, money.meter.rule) == (NANO // 4, Unit.NANOUSD, Rule.BUDGET)
    assert (tokens.amount, tokens.meter.unit, tokens.meter.rule) == (70, Unit.TOKENS, Rule.QUOTA)
    assert (money.meter.policy, money.meter.scope, money.meter.subject, money.meter.owned) == (
        "user_budget",
        "user",
        "alice",
        True,
    )


def test_request_without_a_call_claims_nothing() -> None:
    """What depends on the call is not claimed before there is one."""
    assert claims(Budget("$5/1d")) == ()


async def test_over_budget_is_refused() -> None:
    """B4, conformance 5, 6 and 26: over its limit a session is refused, under it and elsewhere it passes."""
    bench = Bench(Budget("$1", per="session"))
    other = Context(caller="key-1", session="s-2")
    await bench.spend(3 * NANO // 2, ALICE, call(usd=0.5))
    assert not await bench.admits(ALICE, call(usd=0.01))
    assert await bench.admits(other, call(usd=1))


async def test_window_starts_at_first_spend() -> None:
    """B4, conformance 18 and 22: the window starts at the first admitted use, lasts its period, then starts anew."""
    bench = Bench(Budget("$1/1d"))
    started_ms = bench.clock.now_ms()
    outcome = await bench.reserve(ALICE, call(usd=1))
    assert isinstance(outcome, Granted)
    bench.clock.advance(ms=DAY_MS - 1)
    refused = await bench.reserve(ALICE, call(usd=1))
    assert isinstance(refused, Refused)
    assert refused.states[0][0].resets_at_ms == started_ms + DAY_MS
    bench.clock.advance(ms=1)
    assert await bench.admits(ALICE, call(usd=1))


async def test_all_windows_must_fit() -> None:
    """Conformance 66: several windows are claimed at once, and each can refuse by itself."""
    bench = Bench(Budget(["$2/1d", "$3/monthly"]))
    assert [await bench.admits(ALICE, call(usd=1)) for _ in range(3)] == [True, True, False]
    bench.clock.advance(ms=DAY_MS)
    assert [await bench.admits(ALICE, call(usd=1)) for _ in range(2)] == [True, False]
    windows = [claim.meter.window for claim in claims(Budget(["$2/1d", "$3/monthly"], tz="Asia/Tokyo"), ALICE, call())]
    assert windows == [Rolling(DAY_MS), Calendar("month", "Asia/Tokyo")]


@pytest.mark.parametrize("usd", [0, 0.000000001, 5])
async def test_zero_blocks_everything(usd: float) -> None:
    """Conformance 30: a budget of 0 admits no call, not even one that costs nothing."""
    assert not await Bench(Budget("$0/1d")).admits(ALICE, call(usd=usd))


async def test_free_calls_fit_a_spent_budget() -> None:
    """A call that costs nothing passes a budget that is spent, and takes nothing."""
    bench = Bench(Budget("$1/1d"))
    await bench.spend(NANO, ALICE, call(usd=1))
    assert await bench.admits(ALICE, call(usd=0))
    assert claims(Budget("$1/1d"), ALICE, call(usd=0))[0].amount == 0


async def test_n_calls_near_the_cap() -> None:
    """Conformance 8: of many calls near a session's cap exactly those are admitted that fit together."""
    bench = Bench(Budget("$1", per="session"))
    assert sum([await bench.admits(ALICE, call(usd=0.3)) for _ in range(20)]) == 3


def test_unpriced_model_is_refused() -> None:
    """A call whose price is not known is refused by a budget of money, and by no other."""
    refusal = Budget("$5/1d").plan(ALICE, call("odd", usd=None), 0).refusal
    assert refusal is not None
    assert (refusal.policy, refusal.code, refusal.scope, refusal.subject) == (
        "user_budget",
        "model_unpriced",
        "user",
        "alice",
    )
    assert "'openai/odd'" in refusal.message
    assert len(claims(Budget("5 tokens/1d"), ALICE, call(usd=None))) == 1
    assert claims(Budget("$5/1d", per="agent"), NOBODY, call(usd=None)) == ()


def test_unpriced_model_in_shadow_is_an_event() -> None:
    """A budget in shadow refuses no unpriced model, and says that it would have."""
    verdict = Budget("$5/1d").shadow().plan(ALICE, call(usd=None), 0)
    assert (verdict.refusal, verdict.claims) == (None, ())
    assert verdict.shadow_refusal is not None


def test_messages_do_not_carry_long_names() -> None:
    """A model's name of any length makes a message of readable length."""
    refusal = Budget("$5/1d").plan(ALICE, call("x" * 10_000, usd=None), 0).refusal
    assert refusal is not None
    assert len(refusal.message) < 400


@pytest.mark.parametrize(
    "per, subjects",
    [
        ("user", ["alice"]),
        ("caller", ["key-1"]),
        ("session", ["s-1"]),
        ("agent", ["researcher"]),
        ("department", ["research"]),
        ("tag", ["chat"]),
        ("model", ["openai/gpt-5"]),
        ("provider", ["openai"]),
        ("global", [""]),
    ],
)
def test_scopes(per: Per, subjects: list[str]) -> None:
    """Every scope finds its subject in the context or the call, and has keys of its own."""
    found = claims(Budget("$5/1d", per=per, name="b"), ALICE, call())
    assert [claim.meter.subject for claim in found] == subjects
    assert [claim.meter.scope for claim in found] == [per]
    assert found[0].meter.key.startswith("b:nanousd:roll86400000:")


def test_absent_scopes_claim_nothing() -> None:
    """Without session, agent, department, tag or known provider there is nothing to charge; callers are never absent."""
    unknown = call("odd", provider=None)
    may_be_absent: list[Per] = ["session", "agent", "department", "tag", "provider"]
    for per in may_be_absent:
        assert claims(Budget("$5/1d", per=per), NOBODY, unknown) == ()
    never_absent: list[Per] = ["user", "caller"]
    for per in never_absent:
        assert claims(Budget("$5/1d", per=per), NOBODY, unknown)[0].meter.subject == "anonymous"


def test_every_department_and_tag_is_charged_once() -> None:
    """All departments and tags are charged in full, and one that is named twice is charged once."""
    context = Context(caller="k", departments=("a", "b", "a"), tags=("x", "y", "x"))
    assert [claim.meter.subject for claim in claims(Budget("$5/1d", per="department"), context, call())] == ["a", "b"]
    assert [claim.meter.subject for claim in claims(Budget("$5/1d", per="tag"), context, call())] == ["x", "y"]


@given(IDS, IDS, IDS, IDS)
def test_user_or_caller(user: str | None, caller: str | None, user2: str | None, caller2: str | None) -> None:
    """T1: a user is one over all callers, and is never mistaken for a caller or the anonymous one."""
    policy = Budget("$5/1d")
    one = keys(policy, Context(user=user, caller=caller), call())
    two = keys(policy, Context(user=user2, caller=caller2), call())
    same = user == user2 if user is not None and user2 is not None else user is user2 and caller == caller2
    assert (one == two) == same


async def test_fresh_sessions_do_not_reset_the_caller() -> None:
    """T3: a new session id has a session budget of its own and the caller's old one."""
    bench = Bench(Budget("$1", per="session"), Budget("$3/1d", per="caller"))
    admitted = [await bench.admits(Context(caller="k", session=f"s{number}"), call(usd=1)) for number in range(200)]
    assert sum(admitted) == 3


async def test_tag_over_budget() -> None:
    """Conformance 17: requests with a spent tag fail, those with another tag pass, those with both fail."""
    bench = Bench(Budget({"chat": "$1/1d", "batch": "$1/1d"}, per="tag"))
    chat, batch = Context(tags=("chat",)), Context(tags=("batch",))
    assert [await bench.admits(chat, call(usd=1)) for _ in range(2)] == [True, False]
    assert not await bench.admits(Context(tags=("batch", "chat")), call(usd=1))
    assert await bench.admits(batch, call(usd=1))
    assert claims(bench.policies[0], Context(tags=("other",)), call()) == ()


async def test_model_over_budget() -> None:
    """Conformance 15 and 16: one deployment's model over its cap is refused by name; another's passes."""
    policy = Budget({"azure/gpt-5": "$1/1d"}, per="model")
    bench = Bench(policy)
    assert [await bench.admits(ALICE, call(provider="azure", usd=1)) for _ in range(2)] == [True, False]
    assert await bench.admits(ALICE, call(provider="openai", usd=1))
    assert claims(policy, ALICE, call(provider="AZURE_OPENAI"))[0].meter.subject == "azure/gpt-5"


def test_each_subject_its_own_limit() -> None:
    """A mapping gives each subject its limits; `*` is everyone else's, and nobody's if there is none."""
    policy = Budget({"research": ["$50/1d", "100 tokens/1d"], "*": "$5/1d"}, per="department")
    context = Context(departments=("research", "sales"))
    found = [(claim.meter.subject, claim.meter.limit) for claim in claims(policy, context, call())]
    assert found == [("research", 50 * NANO), ("sales", 5 * NANO), ("research", 100)]
    assert claims(Budget({"research": "$50/1d"}, per="department"), Context(departments=("sales",)), call()) == ()


def test_lifetime_limits() -> None:
    """A limit without a period lasts until its subject was idle: a day for sessions, a century for others."""
    assert claims(Budget("$3", per="session"), ALICE, call())[0].meter.window == Lifetime(DAY_MS, renew=True)
    assert claims(Budget("$3"), ALICE, call())[0].meter.window == Lifetime(36_500 * DAY_MS, renew=True)
    window = claims(Budget("$3", per="session", ttl=60, renew=False), ALICE, call())[0].meter.window
    assert window == Lifetime(60_000)


def test_counted_without_a_limit() -> None:
    """Conformance 25: a period without a cap counts, and refuses nothing."""
    (claim,) = claims(Budget([Limit(amount=None, unit=Unit.NANOUSD, window=Rolling(DAY_MS))]), ALICE, call(usd=0))
    assert claim == Claim(claim.meter, 0)
    assert claim.meter.limit is None


@pytest.mark.parametrize(
    "limits, options, message",
    [
        ("5/1d", {}, r"^user_budget: expected '\$5/1d'"),
        (True, {}, "expected"),
        ({}, {}, "empty mapping"),
        ({"a": None}, {}, r"user_budget\['a'\]: has no limit"),
        ({"a": "5"}, {}, r"user_budget\['a'\]: expected"),
        ({"": "$5"}, {}, "expected the name of a user"),
        ({3: "$5"}, {}, "expected the name of a user"),
        ({"a": "$5"}, {"per": "global"}, "one subject"),
        ({"GPT-5": "$5", "openai/gpt-5": "$6"}, {"per": "model"}, "in another spelling"),
        ("$5/daily", {"tz": "Mars/Olympus"}, "time zone"),
        ("$5", {"ttl": 0}, "user_budget.ttl"),
        ("$5", {"per": "nobody"}, "per must be one of"),
    ],
)
def test_malformed_budgets(limits: object, options: dict[str, object], message: str) -> None:
    """Every setting is checked when the policy is built, and the error names it."""
    with pytest.raises(ConfigurationError, match=message):
        Budget(limits, **options)  # type: ignore[arg-type]


def test_memory_is_bounded() -> None:
    """T9: a flood of models makes no policy grow, and a very long one is not remembered at all."""
    policy = Budget("5 tokens/1d", per="model")
    for number in range(2 * MEMO_SIZE):
        policy.plan(NOBODY, Call(model=f"m{number}"), 0)
    size = len(policy._memo)
    assert size <= MEMO_SIZE
    policy.plan(NOBODY, Call(model="m" * 10_000), 0)
    assert len(policy._memo) == size


def test_expiry_charge_and_status_reach_the_meters() -> None:
    """What the policy is told about refusals and dead workers is on its meters."""
    meter = claims(Budget("$5/1d", status=429, expiry_charge="nothing"), ALICE, call())[0].meter
    assert (meter.status, meter.expiry_charge) == (429, "nothing")


def test_shared_anonymous_caller_owns_nothing() -> None:
    """What all unverified requests share is no caller's own: its limits are not to be shown to one of them."""
    for per in ("user", "caller"):
        policy = Budget("$1/1d", per=per)
        (claim,) = policy.plan(Context(), call(), 0).claims
        assert claim.meter.owned is False
        (claim,) = policy.plan(Context(caller="acme"), call(), 0).claims
        assert claim.meter.owned is True


async def test_members_of_a_team_have_limits_of_their_own() -> None:
    """Conformance 44: `department:user` counts each member of each team apart, `caller:model` each model of a key."""
    bench = Bench(Budget("$1/1d", per="department:user"))
    bob = Context(caller="key-1", user="bob", departments=("research",))
    both = Context(caller="key-1", user="alice", departments=("research", "sales"))
    assert await bench.admits(ALICE, call(usd=1))
    assert not await bench.admits(ALICE, call(usd=0.1))
    assert await bench.admits(bob, call(usd=1))
    assert not await bench.admits(both, call(usd=0.1)), "all of her teams must have room"
    models = Bench(Budget("$1/1d", per="caller:model"))
    assert await models.admits(ALICE, call("gpt-5", usd=1))
    assert not await models.admits(ALICE, call("gpt-5", usd=0.1))
    assert await models.admits(ALICE, call("gpt-5-mini", usd=1))
    assert await models.admits(Context(caller="key-2"), call("gpt-5", usd=1))


def test_subjects_of_two_scopes() -> None:
    """The key names both, nobody else's ids can make the same one, and only those who are verified own it."""
    (claim,) = claims(Budget("$5/1d", per="department:user"), ALICE, call())
    assert (claim.meter.scope, claim.meter.subject, claim.meter.owned) == ("department:user", "research:alice", True)
    assert claim.meter.key.endswith(":department:research:user:alice")
    (other,) = claims(Budget("$5/1d", per="department:user"), Context(user="b", departments=("a:user",)), call())
    assert other.meter.key.endswith(":department:a%3Auser:user:b")
    (shared,) = claims(Budget("$5/1d", per="caller:model"), NOBODY, call())
    assert (shared.meter.subject, shared.meter.owned) == ("anonymous:openai/gpt-5", False)
    assert claims(Budget("$5/1d", per="department:user"), Context(user="b"), call()) == ()
    assert claims(Budget("$5/1d", per="user:model"), ALICE, None) == ()
    with pytest.raises(ConfigurationError, match="user:model"):
        RateLimit("5/minute", per="user:model", counts="requests")
