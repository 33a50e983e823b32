"""What a deployment may be asked for, on every storage; and that its name is kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path

import pytest
from tests.storage.conftest import FACTORIES
from tests.storage.values import START

from asgi_llm_guard.charge import draft
from asgi_llm_guard.claims import Bundle, Granted, Refused, Rule, Settlement, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.denials import deny
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.limits import DeploymentLimit, DeploymentLimits
from asgi_llm_guard.money import NANO
from asgi_llm_guard.policies.base import Policy, Sampled
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Rolling, Sliding, Slots

pytestmark = pytest.mark.anyio

KINDS = ["memory", "sqlite", "redis"]
NOBODY = Context()
_ids = count()

Make = Callable[[str], Storage]


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture(params=KINDS)
async def storage(request: pytest.FixtureRequest, tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Storage]:
    made = FACTORIES[request.param](tmp_path)(clock)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(made.aclose)
        yield made


def call(deployment: str | None, *, tokens: int = 10, usd: float | None = 0.01) -> Call:
    cost = None if usd is None else round(usd * NANO)
    return Call(model="gpt-5", provider="openai", deployment=deployment, input_tokens=tokens, cost_nanousd=cost)


def bundles(policy: Policy, *calls: Call) -> list[list[Bundle]]:
    """One plan for each call; all have one call id, as `reserve` wants it."""
    call_id = f"call-{next(_ids)}"
    return [[Bundle(call_id, policy.plan(NOBODY, each, 0).claims)] for each in calls]


async def take(storage: Storage, policy: Policy, *calls: Call) -> tuple[str, int] | Refused:
    """The call id and the place of the first of these calls that was granted; what it takes stays taken."""
    plans = bundles(policy, *calls)
    answer = await storage.reserve("test", plans)
    if isinstance(answer, Refused):
        return answer
    assert isinstance(answer, Granted)
    return plans[0][0].call_id, answer.plan


async def granted(storage: Storage, policy: Policy, *calls: Call) -> int | None:
    """The place of the first of these calls that was granted; `None`: none was."""
    answer = await take(storage, policy, *calls)
    return None if isinstance(answer, Refused) else answer[1]


# -------------------------------------------------------------------------------------- values


def test_each_limit_is_a_meter_of_its_deployment() -> None:
    """D9: rates are counted in any 60 seconds, calls at a time as long as they last, the budget in its own window."""
    policy = DeploymentLimits({"a": DeploymentLimit.of(rpm="60", tpm=1000, budget="$10/1d", max_parallel=4)})
    assert isinstance(policy, Policy)
    assert isinstance(policy, Sampled)

    claims = policy.plan(NOBODY, call("a", tokens=70, usd=2), 0).claims

    assert [(c.meter.unit, c.meter.rule, c.meter.limit, c.meter.window, c.amount) for c in claims] == [
        (Unit.CALLS, Rule.RATE, 60, Sliding(60_000), 1),
        (Unit.SLOTS, Rule.SLOTS, 4, Slots(), 1),
        (Unit.TOKENS, Rule.RATE, 1000, Sliding(60_000), 70),
        (Unit.NANOUSD, Rule.BUDGET, 10 * NANO, Rolling(86_400_000), 2 * NANO),
    ]
    assert {(c.meter.scope, c.meter.subject, c.meter.policy) for c in claims} == {
        ("deployment", "a", "deployment_limits")
    }
    assert len({c.meter.key for c in claims}) == 4
    assert len({meter.kind for meter in policy.samples()}) == 3


def test_only_calls_that_name_a_deployment_are_counted() -> None:
    """A call that goes to no deployment, or to one without limits, claims nothing; nor does a request without a call."""
    policy = DeploymentLimits({"a": DeploymentLimit(rpm=1), "free": DeploymentLimit()})
    assert policy.plan(NOBODY, None, 0).claims == ()
    assert [policy.plan(NOBODY, call(name), 0).claims for name in (None, "b", "free")] == [(), (), ()]
    assert policy.counts == "calls"


def test_deployments_do_not_share_meters() -> None:
    """Two deployments of one model count apart, whatever their names contain."""
    names = ["a", "a:b", "b", "a%3Ab", "ü"]
    policy = DeploymentLimits({name: DeploymentLimit(rpm=1) for name in names})
    keys = {meter.key for meters in policy.meters(names).values() for meter in meters}
    assert len(keys) == len(names)


def test_budgets_as_configurations_have_them() -> None:
    """Conformance 14: text, mappings and lists; tokens in a window of a day are a quota, and beside money."""
    limit = DeploymentLimit.of(budget=["$1/1d", {"budget_limit": 5, "time_period": "7d"}, "500 tokens/daily"])
    meters = DeploymentLimits({"a": limit}).meters(["a", "unknown"])

    assert list(meters) == ["a"]
    assert [(m.unit, m.rule, m.limit) for m in meters["a"]] == [
        (Unit.TOKENS, Rule.QUOTA, 500),
        (Unit.NANOUSD, Rule.BUDGET, NANO),
        (Unit.NANOUSD, Rule.BUDGET, 5 * NANO),
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DeploymentLimit.of(rpm="many"), "rpm"),
        (lambda: DeploymentLimit(tpm=-1), "tpm"),
        (lambda: DeploymentLimit(max_parallel=1.5), "max_parallel"),  # type: ignore[arg-type]
        (lambda: DeploymentLimit.of(budget="$1/fortnight"), "budget"),
        (lambda: DeploymentLimits({"": DeploymentLimit()}), "named by"),
        (lambda: DeploymentLimits({"a" * 201: DeploymentLimit()}), "1 to 200"),
        (lambda: DeploymentLimits({"a": {"rpm": 1}}), "DeploymentLimit"),  # type: ignore[dict-item]
        (lambda: DeploymentLimits(name=" "), "name"),
        (lambda: DeploymentLimits(on_outage="maybe"), "on_outage"),  # type: ignore[arg-type]
    ],
)
def test_malformed_limits_are_refused_when_they_are_made(make: Callable[[], object], words: str) -> None:
    """What is no limit is an error that names it."""
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_what_an_outage_means() -> None:
    """Rates and slots count locally while the store is away, money refuses; or all do what is said."""
    limit = DeploymentLimit.of(rpm=1, max_parallel=1, tpm=1, budget="$1/1d")

    def says(policy: DeploymentLimits) -> list[str]:
        return [meter.on_outage for meter in policy.meters(["a"])["a"]]

    assert says(DeploymentLimits({"a": limit})) == ["local", "local", "local", "deny"]
    assert says(DeploymentLimits({"a": limit}, on_outage="allow")) == ["allow"] * 4


def test_a_call_without_a_price_is_no_match_for_a_budget() -> None:
    """Conformance 67: where money is limited, a call of unknown cost is refused; where it is not, it passes."""
    policy = DeploymentLimits({"a": DeploymentLimit.of(budget="$1/1d"), "b": DeploymentLimit(rpm=5)})
    refusal = policy.plan(NOBODY, call("a", usd=None), 0).refusal
    assert refusal is not None
    assert (refusal.code, refusal.scope, refusal.subject) == ("model_unpriced", "deployment", "a")
    assert "'a'" in refusal.message
    assert policy.plan(NOBODY, call("b", usd=None), 0).refusal is None


# ----------------------------------------------------------------------------------- one by one


async def test_a_deployment_over_its_cap_is_passed_over(storage: Storage) -> None:
    """Conformance 15: A is over its own budget and B is not: the next three calls go to B, in one trip each."""
    policy = DeploymentLimits({"a": DeploymentLimit.of(budget="$1/1d"), "b": DeploymentLimit.of(budget="$100/1d")})
    assert await granted(storage, policy, call("a", usd=1), call("b", usd=1)) == 0
    assert [await granted(storage, policy, call("a", usd=1), call("b", usd=1)) for _ in range(3)] == [1, 1, 1]


async def test_the_refusal_names_the_only_deployment(storage: Storage) -> None:
    """Conformance 16: the sole deployment is over: the refusal names it, and shows no figures of it."""
    policy = DeploymentLimits({"azure-eu": DeploymentLimit.of(budget="$7/1d")})
    taken = await take(storage, policy, call("azure-eu", usd=7))
    assert not isinstance(taken, Refused)
    await storage.settle([Settlement(taken[0], (None,))])

    refused = await take(storage, policy, call("azure-eu", usd=1))

    assert isinstance(refused, Refused)
    denied = deny(refused, call("azure-eu", usd=1))
    assert (denied.status, denied.code, denied.limit) == (402, "budget_exhausted", None)
    assert (denied.scope, denied.subject) == ("deployment", "azure-eu")
    assert "'azure-eu'" in denied.message
    assert "$7" not in denied.message


async def test_deployments_come_and_go(storage: Storage) -> None:
    """Conformance 27: one that is added at run time gets its limits, one that is removed has none, one that comes back
    is counted on."""
    policy = DeploymentLimits()
    assert [await granted(storage, policy, call("a")) for _ in range(3)] == [0, 0, 0]

    policy.put("a", DeploymentLimit(rpm=2))
    assert [await granted(storage, policy, call("a")) for _ in range(3)] == [0, 0, None]
    assert policy.limit("a") == DeploymentLimit(rpm=2)
    assert repr(policy) == "<DeploymentLimits 'deployment_limits': a>"

    policy.remove("a")
    policy.remove("never there")
    assert policy.limit("a") is None
    assert await granted(storage, policy, call("a")) == 0

    policy.put("a", DeploymentLimit(rpm=3))
    assert [await granted(storage, policy, call("a")) for _ in range(2)] == [0, None]


async def test_over_its_tokens_by_this_message(storage: Storage) -> None:
    """Conformance 82: a deployment that this message would put over its tpm is skipped, a shorter one still fits."""
    policy = DeploymentLimits({"a": DeploymentLimit(tpm=100), "b": DeploymentLimit(tpm=1000)})
    assert await granted(storage, policy, call("a", tokens=60), call("b", tokens=60)) == 0
    assert await granted(storage, policy, call("a", tokens=41), call("b", tokens=41)) == 1
    assert await granted(storage, policy, call("a", tokens=40), call("b", tokens=40)) == 0


@pytest.mark.parametrize("limit", [DeploymentLimit(rpm=0), DeploymentLimit(tpm=0), DeploymentLimit(max_parallel=0)])
async def test_zero_is_unusable(storage: Storage, limit: DeploymentLimit) -> None:
    """Conformance 82, 30: a limit of 0 blocks every call, also one that takes no tokens."""
    policy = DeploymentLimits({"a": limit})
    assert await granted(storage, policy, call("a", tokens=0)) is None


async def test_rates_come_back_after_a_minute(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 82: what was taken counts for 60 seconds and is then gone."""
    policy = DeploymentLimits({"a": DeploymentLimit(rpm=1, tpm=10)})
    taken = await take(storage, policy, call("a"))
    assert not isinstance(taken, Refused)
    await storage.settle([Settlement(taken[0], (None, None))])

    clock.advance(seconds=59)
    assert await granted(storage, policy, call("a")) is None
    clock.advance(seconds=2)
    assert await granted(storage, policy, call("a")) == 0


async def test_a_slot_is_free_again(storage: Storage) -> None:
    """Of calls at a time so many are admitted, and the next one when one has ended."""
    policy = DeploymentLimits({"a": DeploymentLimit(max_parallel=2)})
    first = await take(storage, policy, call("a"))
    assert not isinstance(first, Refused)
    assert [await granted(storage, policy, call("a")) for _ in range(2)] == [0, None]
    await storage.settle([Settlement(first[0], (0,))])
    assert await granted(storage, policy, call("a")) == 0


# ---------------------------------------------------------------------------------- all at once


@pytest.mark.parametrize(
    ("limits", "admitted"),
    [
        ({name: DeploymentLimit(rpm=30) for name in "abc"}, 30),
        ({name: DeploymentLimit(tpm=305) for name in "abc"}, 30),
        ({name: DeploymentLimit.of(budget="$0.305/1d") for name in "abc"}, 30),
        ({name: DeploymentLimit(max_parallel=30) for name in "abc"}, 30),
    ],
    ids=["rpm", "tpm", "budget", "max_parallel"],
)
async def test_exact_with_200_at_once(storage: Storage, limits: dict[str, DeploymentLimit], admitted: int) -> None:
    """D9: of 200 parallel calls over three deployments each gets as many as its limit has room for, and none more."""
    policy = DeploymentLimits(limits)
    orders = ["abc", "bca", "cab"]

    answers = await asyncio.gather(
        *(take(storage, policy, *(call(name) for name in orders[n % 3])) for n in range(200))
    )

    got = [orders[n % 3][answer[1]] for n, answer in enumerate(answers) if not isinstance(answer, Refused)]
    assert {name: got.count(name) for name in "abc"} == dict.fromkeys("abc", admitted)
    readings = await storage.read([meter for meters in policy.meters("abc").values() for meter in meters])
    assert all(reading.used + reading.held in (30, 300, 30 * NANO // 100) for reading in readings)


async def test_two_instances_share_what_a_deployment_takes(storage: Storage) -> None:
    """D9, conformance 82: what one instance has sent to a deployment counts for another one as well."""
    one, other = (DeploymentLimits({"a": DeploymentLimit(rpm=10)}) for _ in range(2))
    answers = await asyncio.gather(*(granted(storage, policy, call("a")) for policy in (one, other) * 10))
    assert sum(answer is not None for answer in answers) == 10


# ---------------------------------------------------------------------------------- the ledger


async def test_the_ledger_names_the_deployment(storage: Storage, tmp_path: Path, clock: FrozenClock) -> None:
    """D9: a record, a draft whose owner dies, and an export tell which deployment a call went to; others tell none."""
    policy = DeploymentLimits({"a": DeploymentLimit(rpm=10)})
    ended, lost = call("a"), call("a")
    claims = policy.plan(NOBODY, ended, 0).claims
    records = [draft(f"{n}", NOBODY, each, clock.now_ms()) for n, each in enumerate((ended, lost, call(None)))]
    for record in records:
        await storage.reserve("test", [[Bundle(record.call_id, claims, record)]])
    await storage.settle([Settlement(record.call_id, (None,), record) for record in (records[0], records[2])])
    await storage.retire("test")

    kept = {record.call_id: record.deployment for record in await storage.records()}

    assert kept == {"0": "a", "1": "a", "2": None}
    copy = FACTORIES["memory"](tmp_path)(clock)
    await copy.load([line async for line in storage.export()])
    assert {record.call_id: record.deployment for record in await copy.records()} == kept
    await copy.aclose()
