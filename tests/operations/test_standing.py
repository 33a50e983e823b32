"""Standing, the meters of a subject, resets; and what a refusal says beyond its figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.operations.test_raises import MIA, MILLION, START_MS, clock, guard_of, spend, storage

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    DepartmentQuota,
    Guard,
    Iterations,
    LimitExceeded,
    ModelAllow,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
    Route,
)
from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.limits import DeploymentLimit, DeploymentLimits
from asgi_llm_guard.middleware import GuardMiddleware
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.standing import known_scopes
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.wire.refusals import render

__all__ = ["clock", "storage"]

pytestmark = pytest.mark.anyio

BOOK = QuotaBook({"sales": DepartmentQuota(daily_cost=10, monthly_tokens=5_000_000)})


def policies() -> list[Policy]:
    return [
        Iterations(5),
        ProviderBudget({"openai": "$20/1d"}),
        Budget(["$3/1d", "9000000 tokens/monthly"], per="user"),
        Quota(BOOK),
        RateLimit("100/minute", per="caller"),
        Concurrency(4, per="user"),
        Budget("$7/1d", per="department:user"),
        Budget("$1/1d", per="caller").shadow(),
        ModelAllow(["openai/*"]),
    ]


async def test_standing_shows_every_limit(storage: Storage, clock: FrozenClock) -> None:
    """M13: everybody can be told how they stand: each limit with used, held, left and its reset, in the order of the
    policies, shadows marked; asking takes nothing."""
    guard = guard_of(storage, clock, *policies())
    await spend(guard)
    call = guard.describe(**MILLION)
    async with guard.open(MIA), guard.call(**MILLION):
        standing = await guard.standing(MIA, call)
    rows = [
        (row.policy, row.scope, row.subject, row.unit.value, row.window, row.limit, row.used, row.held, row.enforce)
        for row in standing.rows
    ]
    cost, tokens = 1_000_002_000, 1_000_001
    assert rows == [
        ("iterations", "session", "s", "calls", "1h", 5, 1, 1, True),
        ("provider_budget", "provider", "openai", "nanousd", "1d", 20_000_000_000, cost, cost, True),
        ("user_budget", "user", "mia", "nanousd", "1d", 3_000_000_000, cost, cost, True),
        ("user_budget", "user", "mia", "tokens", "monthly", 9_000_000, tokens, tokens, True),
        ("quota", "department", "sales", "tokens", "monthly", 5_000_000, tokens, tokens, True),
        ("quota", "department", "sales", "nanousd", "daily", 10_000_000_000, cost, cost, True),
        ("caller_rate", "caller", "key-1", "calls", "1m", 100, 1, 1, True),
        ("user_concurrency", "user", "mia", "slots", None, 4, 0, 1, True),
        ("department:user_budget", "department:user", "sales:mia", "nanousd", "1d", 7_000_000_000, cost, cost, True),
        ("caller_budget.shadow", "caller", "key-1", "nanousd", "1d", 1_000_000_000, 0, 0, False),
    ]
    assert [row.remaining for row in standing.rows[:3]] == [3, 17_999_996_000, 999_996_000]
    assert {row.policy for row in standing.rows if row.owned} == {
        *("iterations", "user_budget", "caller_rate", "user_concurrency", "department:user_budget"),
        "caller_budget.shadow",
    }
    assert standing.refused_by is None
    again = await guard.standing(MIA, call)
    assert [row.used for row in again.rows if row.policy == "iterations"] == [2]


async def test_standing_says_who_refuses_by_itself(clock: FrozenClock) -> None:
    """M13: where a policy refuses whatever is left, or somebody is stopped, the standing says so beside the limits."""
    guard = guard_of(MemoryStorage(clock=clock), clock, ModelAllow(["anthropic/*"]), Budget("$1/1d", per="user"))
    standing = await guard.standing(MIA, guard.describe(**MILLION))
    assert (standing.refused_by, len(standing.rows)) == ("models", 1)
    guard.set_stops([Stop(scope="user", subject="mia")])
    standing = await guard.standing(MIA)
    assert (standing.refused_by, "stopped" in standing.message) == ("stop", True)


async def test_standing_knows_the_limits_of_a_route(clock: FrozenClock) -> None:
    """The policies of the route that a context names are among its limits; those of others are not."""
    guard = guard_of(MemoryStorage(clock=clock), clock, Iterations(5))
    routes = [Route("/a/{name}", extra=[Budget("$1/1d", name="a")]), Route("/b", extra=[Budget("$1/1d", name="b")])]
    GuardMiddleware(_nothing, guard, routes=routes)
    call = guard.describe(**MILLION)
    at_a = Context(user="mia", session="s", route="/a/{name}")
    assert [row.policy for row in (await guard.standing(at_a, call)).rows] == ["iterations", "a"]
    assert [meter.policy for meter, _ in await guard.meters_of("user", "mia")] == ["a", "a", "b", "b"]


SUBJECTS: list[tuple[str, str, str | None, set[str]]] = [
    ("session", "s", "key-1", {"iterations"}),
    ("provider", "OpenAI", None, {"provider_budget"}),
    ("user", "mia", None, {"user_budget", "user_concurrency"}),
    ("department", "sales", None, {"quota"}),
    ("caller", "key-1", None, {"caller_rate", "caller_budget.shadow"}),
    ("department:user", "sales:mia", None, {"department:user_budget"}),
]


@pytest.mark.parametrize("scope, subject, caller, names", SUBJECTS, ids=[each[0] for each in SUBJECTS])
async def test_meters_of_a_subject_are_those_that_its_calls_claim(
    storage: Storage, clock: FrozenClock, scope: str, subject: str, caller: str | None, names: set[str]
) -> None:
    """For each scope the meters that are found without a call are the very ones that calls have charged; a reset sets
    them, and no others, to zero."""
    guard = guard_of(storage, clock, *policies())
    await spend(guard)
    found = await guard.meters_of(scope, subject, caller=caller)
    assert {meter.policy for meter, _ in found} == names
    call = guard.describe(**MILLION)
    claimed = {row.policy: row.used for row in (await guard.standing(MIA, call)).rows if row.unit is not Unit.SLOTS}
    for name in names - {"user_concurrency", "caller_budget.shadow"}:
        assert max(reading.used for meter, reading in found if meter.policy == name), name
        assert claimed[name]
    done = await guard.reset(scope, subject, caller=caller)
    assert {meter.policy for meter in done} == names
    assert sum(meter.used for meter in done) > 0
    rows = (await guard.standing(MIA, call)).rows
    assert all(row.used == 0 for row in rows if row.policy in names)
    others = [row for row in rows if row.policy not in names | {"user_concurrency", "caller_budget.shadow"}]
    assert all(row.used for row in others)


async def test_a_reset_keeps_what_is_held(storage: Storage, clock: FrozenClock) -> None:
    """A reset leaves the holds of open calls alone, and names what was there; one policy alone can be meant."""
    guard = guard_of(storage, clock, Iterations(5), Budget("$3/1d", per="session"))
    await spend(guard)
    async with guard.open(MIA), guard.call(**MILLION):
        (done,) = await guard.reset("session", "s", caller="key-1", policies=["iterations"])
        assert (done.policy, done.used, done.held, done.window) == ("iterations", 1, 1, "1h")
        rows = (await guard.standing(MIA, guard.describe(**MILLION))).rows
        assert [(row.used, row.held) for row in rows] == [(0, 1), (1_000_002_000, 1_000_002_000)]
    rows = (await guard.standing(MIA, guard.describe(**MILLION))).rows
    assert [row.used for row in rows] == [1, 2_000_004_000]


async def test_unverified_callers_have_one_name(clock: FrozenClock) -> None:
    """`anonymous` means whoever is not verified, in sessions and as a caller."""
    guard = guard_of(MemoryStorage(clock=clock), clock, Iterations(5), Iterations(9, per="caller", name="all"))
    await spend(guard, Context(session="s"))
    found = await guard.meters_of("session", "s", caller="anonymous")
    assert sum(reading.used for _, reading in found) == 1
    assert sum(reading.used for _, reading in await guard.meters_of("caller", "anonymous")) == 1


@pytest.mark.parametrize(
    "scope, subject, options, said",
    [
        ("tag", "x", {}, "no policy counts per 'tag'"),
        ("user", "", {}, "name of a user"),
        ("session", "s", {}, "say whose it is"),
        ("user", "mia", {"caller": "key-1"}, "session"),
        ("user", "mia", {"policies": ["iterations"]}, "none of iterations"),
    ],
)
async def test_unclear_subjects(clock: FrozenClock, scope: str, subject: str, options: Any, said: str) -> None:
    """A scope in which nothing is counted, a missing name and a missing caller are said; nothing is reset."""
    guard = guard_of(MemoryStorage(clock=clock), clock, *policies())
    with pytest.raises(ConfigurationError, match=said):
        await guard.reset(scope, subject, **options)


async def test_deployments_are_found() -> None:
    """The limits of a gateway's deployments are found by their names."""
    limits = DeploymentLimits({"blue": DeploymentLimit(rpm=5, max_parallel=2)})
    guard = Guard()
    guard.engine.bind((limits,))
    assert [meter.unit.value for meter, _ in await guard.meters_of("deployment", "blue")] == ["calls", "slots"]
    assert known_scopes([limits, ModelAllow(["*"])]) == ("deployment",)


# ---------------------------------------------------------------------------------- refusals


async def refusal(guard: Guard, context: Context, **described: Any) -> dict[str, Any]:
    """The body of a refusal, as a problem document."""
    with pytest.raises(LimitExceeded) as refused:
        async with guard.open(context), guard.call(**described):
            pass
    found: dict[str, Any] = json.loads(render(refused.value.denied, dialect=None).body)
    return found


async def test_m13_a_refusal_explains_itself(clock: FrozenClock) -> None:
    """M13: a refusal names policy, scope, spent, held, limit and reset to the owner, and where more may be asked for."""
    guard = guard_of(
        MemoryStorage(clock=clock),
        clock,
        Budget("$1.50/1d", per="user"),
        approval_url="https://ask.example/{policy}?of={scope}:{subject}&why={code}",
    )
    await spend(guard, Context(user="mia & co"))
    body = await refusal(guard, Context(user="mia & co"), **MILLION)
    assert body["approval_url"] == "https://ask.example/user_budget?of=user:mia%20%26%20co&why=budget_exhausted"
    assert (body["policy"], body["scope"], body["limit"], body["used"]) == ("user_budget", "user", "1.50", "1.000002")
    assert body["resets_at"] is not None
    waits = guard_of(MemoryStorage(clock=clock), clock, RateLimit("1/minute"), approval_url="https://ask.example/")
    await spend(waits)
    assert "approval_url" not in await refusal(waits, MIA, **MILLION)


async def test_m13_a_forbidden_model_names_those_that_are_allowed(clock: FrozenClock) -> None:
    """M13: who owns a list of models is told what is on it; the lists of departments and of the service are not told,
    unless everything may be."""
    lists = {"mia": ["anthropic/claude-*", "openai/gpt-small"], "*": []}
    storage = MemoryStorage(clock=clock)
    guard = guard_of(storage, clock, ModelAllow(lists, per="user"))
    body = await refusal(guard, MIA, **MILLION)
    assert body["details"] == ["allowed: anthropic/claude-*, openai/gpt-small"]
    for hidden in (ModelAllow(["anthropic/*"]), Quota(QuotaBook({"sales": {"models": ["anthropic/*"]}}))):
        assert "details" not in await refusal(guard_of(storage, clock, hidden), MIA, **MILLION)
        body = await refusal(guard_of(storage, clock, hidden, disclose="all"), MIA, **MILLION)
        assert body["details"] == ["allowed: anthropic/*"]


CHEAPER = PriceBook.snapshot(
    overrides={
        "openai/gpt-test": {"input": 1, "output": 2},
        "openai/gpt-small": {"input": 0.25, "output": 1},
        "openai/gpt-mini": {"input": 0.45, "output": 1},
        "openai/gpt-near": {"input": 0.9, "output": 1},
        "openai/gpt-large": {"input": 5, "output": 9},
    }
)
LIST = ["openai/gpt-test", "gpt-small", "openai/gpt-large", "openai/gpt-near", "openai/gpt-mini", "openai/none", "x/*"]
BUDGET = Budget("$1.50/1d", per="user")
OWN = ModelAllow({"mia": LIST}, per="user")


@pytest.mark.parametrize(
    "policies, options, details",
    [
        ([BUDGET, OWN], {}, ["would fit: gpt-small, openai/gpt-mini"]),  # one is dearer, one too dear, one unknown
        ([BUDGET, OWN, ModelAllow(["openai/gpt-test", "openai/gpt-mini"])], {}, ["would fit: openai/gpt-mini"]),
        ([BUDGET, ModelAllow(LIST)], {}, None),  # not the caller's list
        ([BUDGET, ModelAllow(LIST)], {"disclose": "all"}, ["would fit: gpt-small, openai/gpt-mini"]),
        ([BUDGET, OWN.shadow()], {}, None),
        ([Budget("$1.50/1d", per="department"), OWN], {}, None),  # what is left of a shared budget is not told
        ([Budget("1500000 tokens/1d", per="user"), OWN], {}, None),  # not a matter of prices
        (
            [BUDGET, OWN, ProviderBudget({"openai": "$1.60/1d"})],  # nor of one that refuses as well
            {},
            ["provider_budget: this provider (requested $1.000002), resets at 2027-01-16T08:00:00Z"],
        ),
        ([BUDGET, OWN, ProviderBudget({"openai": "$2.40/1d"})], {}, ["would fit: gpt-small, openai/gpt-mini"]),
    ],
)  # fmt: skip
async def test_m13_a_refusal_names_cheaper_models_that_fit(
    clock: FrozenClock, policies: list[Policy], options: dict[str, Any], details: list[str] | None
) -> None:
    """M13: where only money is too little, the models of the caller's own list are named that would have fitted."""
    guard = Guard(policies, storage=MemoryStorage(clock=clock), clock=clock, prices=CHEAPER, **options)
    await spend(guard)
    body = await refusal(guard, MIA, **MILLION)
    assert body.get("details") == details
    told = [line.removeprefix("would fit: ") for line in details or () if line.startswith("would fit: ")]
    for names in told:
        async with guard.open(MIA), guard.call(**{**MILLION, "model": names.partition(",")[0]}):  # it is true
            pass


@pytest.mark.parametrize("url", ["ask.example", "https://a/{other}", "https://a/{", 5, "javascript:{policy}"])
def test_m13_malformed_links(url: Any) -> None:
    """A link that cannot be made is refused when the guard is built."""
    with pytest.raises(ConfigurationError, match="approval_url"):
        Guard(approval_url=url)


async def test_m16_free_models_pass_spent_budgets(storage: Storage, clock: FrozenClock) -> None:
    """M16: a model that costs nothing is not blocked by a budget that is spent, nor by one that is overdrawn."""
    free_of_charge = {"openai/gpt-free": {"input": 0, "output": 0}}
    prices = PriceBook.snapshot(overrides={**free_of_charge, "openai/gpt-test": {"input": 1, "output": 2}})
    guard = Guard([Budget("$1/1d", per="user")], storage=storage, clock=clock, prices=prices, hold_wait_s=0)
    free = {**MILLION, "model": "openai/gpt-free"}
    with pytest.raises(LimitExceeded):
        await spend(guard)
    async with guard.open(MIA), guard.call(model="openai/gpt-test", input_tokens=999_998, max_output_tokens=1):
        pass
    for _ in range(3):
        async with guard.open(MIA), guard.call(**free):
            pass
    standing = await guard.standing(MIA, guard.describe(**free))
    assert (standing.rows[0].used, standing.now_ms) == (1_000_000_000, START_MS)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    pass
