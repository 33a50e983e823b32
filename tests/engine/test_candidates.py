"""Several candidates for one call: the first that fits is taken in one trip, or none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engine.conftest import NewGuard
from tests.storage.conftest import FACTORIES

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, ModelAllow, ProviderBudget, RateLimit, Usage
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.context import Call
from asgi_llm_guard.denials import together
from asgi_llm_guard.denials.wording import utc
from asgi_llm_guard.gateway.limits import DeploymentLimit, DeploymentLimits
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

CONTEXT = Context(caller="acme", user="ann", session="s")
ERROR = {"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}}
PRICES = PriceBook.snapshot(
    overrides={
        "openai/cheap": {"input": 1, "output": 2},
        "anthropic/dear": {"input": 10, "output": 20},
        "mistral/middle": {"input": 5, "output": 10},
    }
)
MODELS = ("openai/cheap", "mistral/middle", "anthropic/dear")
COSTS = {"cheap": 200_000, "middle": 1_000_000, "dear": 2_000_000}
"""Of 100 tokens in and 50 out, in nano-USD."""


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = FACTORIES[request.param](tmp_path)(clock)
    yield made
    await made.aclose()


def described(guard: Guard, model: str, deployment: str | None = None) -> Call:
    call = guard.describe(model, input_tokens=100, max_output_tokens=50)
    return msgspec.structs.replace(call, deployment=deployment)


def candidates(guard: Guard, call: ActiveCall, *models: str, more: tuple[Any, ...] = ()) -> list[Any]:
    return [((*call.policies, *more), described(guard, model, model.partition("/")[2])) for model in models or MODELS]


def guarded(new_guard: NewGuard, *policies: Any, **options: Any) -> Guard:
    return new_guard(*policies, **{"prices": PRICES, "hold_wait_s": 0, **options})


async def chosen(guard: Guard, *models: str, more: tuple[Any, ...] = ()) -> tuple[ActiveCall, str | None]:
    call = new_call(guard.engine, None, ())
    denied = await call.claim_any(candidates(guard, call, *models, more=more))
    return call, None if denied else (call.call.model if call.call else None)


async def until(condition: Callable[[], bool]) -> None:
    """Let others go on until the condition holds."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


async def test_takes_the_first_that_fits(new_guard: NewGuard) -> None:
    """B2: the provider whose budget does not hold the call is passed over, and nothing of it is taken."""
    guard = guarded(new_guard, ProviderBudget({"openai": "$0.0001/1d", "mistral": "$1/1d", "anthropic": "$1/1d"}))
    async with guard.open(CONTEXT):
        call, model = await chosen(guard)
        assert model == "middle"
        call.record(Usage(input_tokens=100, output_tokens=50))
        call.end()

    policy = guard.policies[0]
    assert isinstance(policy, ProviderBudget)
    meters = policy.meters(("openai", "mistral", "anthropic"))
    readings = await guard.storage.read(list(meters.values()))
    assert [(reading.used, reading.held) for reading in readings] == [(0, 0), (COSTS["middle"], 0), (0, 0)]


async def test_refusal_tells_the_reason_of_each(new_guard: NewGuard) -> None:
    """B3: none is left: the reason of each candidate, in order, and nothing was taken."""
    guard = guarded(
        new_guard,
        Iterations(9),
        ModelAllow(["openai/*", "mistral/*"]),
        ProviderBudget({"openai": "$0.0001/1d", "mistral": "$0.0002/1d"}),
    )
    async with guard.open(CONTEXT) as admission:
        call = new_call(guard.engine, None, ())
        denied = await call.claim_any(candidates(guard, call))

        assert [each.code for each in denied] == [
            "request_exceeds_budget",
            "request_exceeds_budget",
            "model_not_allowed",
        ]
        assert [each.limit for each in denied] == [None, None, None]  # not the caller's to see
        assert call.hold is None
        assert admission.refused
    assert await guard.storage.open_holds() == 0
    assert await guard.storage.records() == []


async def test_what_a_policy_refuses_by_itself_is_not_offered(new_guard: NewGuard) -> None:
    """T12: a model that is not allowed is never held for, whatever place it has."""
    guard = guarded(new_guard, Budget("$1/1d"), ModelAllow(["anthropic/*"]))
    async with guard.open(CONTEXT):
        call, model = await chosen(guard)
        call.discard()

    assert model == "dear"


async def test_limits_are_exact_under_many_at_once(new_guard: NewGuard) -> None:
    """D9: of 200 calls at once exactly as many go to each deployment as it takes, and the rest is refused."""
    guard = guarded(new_guard, Budget("$1000/1d"))
    limits = DeploymentLimits(
        {
            "cheap": DeploymentLimit.of(rpm=20),
            "middle": DeploymentLimit.of(tpm=150 * 30),
            "dear": DeploymentLimit.of(budget="$0.08/1d"),
        }
    )
    async with guard.open(CONTEXT):
        answers = await asyncio.gather(*(chosen(guard, more=(limits,)) for _ in range(200)))
        models = [model for _, model in answers]
        assert {model: models.count(model) for model in set(models)} == {
            "cheap": 20,
            "middle": 30,
            "dear": 40,
            None: 110,
        }
        for call, model in answers:
            if model is not None:
                call.record(Usage(input_tokens=100, output_tokens=50))
                call.end()

    spent = sum(record.cost_nanousd or 0 for record in await guard.storage.records())
    assert spent == 20 * COSTS["cheap"] + 30 * COSTS["middle"] + 40 * COSTS["dear"]
    assert await guard.storage.open_holds() == 0


async def test_limits_are_exact_beside_leases(new_guard: NewGuard) -> None:
    """B5: a budget that is leased in part and limits that are not hold together, for whichever candidate is taken."""
    guard = guarded(new_guard, Budget("$0.02/1d", per="global", lease="$0.002"))
    limits = DeploymentLimits({"cheap": DeploymentLimit.of(rpm=7), "middle": DeploymentLimit.of(rpm=5)})
    async with guard.open(CONTEXT):
        answers = []
        for _ in range(4):
            answers += await asyncio.gather(*(chosen(guard, more=(limits,)) for _ in range(20)))
        models = [model for _, model in answers]
        assert (models.count("cheap"), models.count("middle")) == (7, 5)
        held = sum(COSTS[model] for model in models if model is not None)
        assert 20_000_000 - COSTS["dear"] < held <= 20_000_000
        for call, model in answers:
            if model is not None:
                call.record(Usage(input_tokens=100, output_tokens=50))
                call.end()
    await guard.engine.heart.retire()

    assert sum(record.cost_nanousd or 0 for record in await guard.storage.records()) == held
    assert await guard.storage.open_holds() == 0


async def test_every_attempt_counts_where_it_goes(new_guard: NewGuard) -> None:
    """D9: a call that is made again counts again in the rpm of its deployment, and once in everything else."""
    guard = guarded(new_guard, Iterations(9), RateLimit("9/minute", counts="calls"), Concurrency(1, counts="calls"))
    limits = DeploymentLimits({"cheap": DeploymentLimit.of(rpm=2, max_parallel=1)})
    async with guard.open(CONTEXT):
        first, _ = await chosen(guard, "openai/cheap", more=(limits,))
        first.dispatched()
        first.record(ERROR)
        first.end()
        second = first.attempt()
        assert not await second.claim_any(candidates(guard, second, "openai/cheap"))
        second.dispatched()
        second.record(ERROR)
        second.end()
        third = second.attempt()
        denied = await third.claim_any(candidates(guard, third, "openai/cheap"))
        assert [each.policy for each in denied] == ["deployment_limits"]
        fourth = second.attempt()
        assert not await fourth.claim_any(candidates(guard, fourth, "mistral/middle"))
        fourth.record(Usage(input_tokens=100, output_tokens=50))
        fourth.end()

    records = sorted(await guard.storage.records(), key=lambda record: record.attempt)
    assert [(record.attempt, record.deployment) for record in records] == [(1, "cheap"), (2, "cheap"), (3, "middle")]
    assert {record.attempt_of for record in records} == {None, records[0].call_id}
    meters = [claim.meter for policy in guard.policies for claim in policy.plan(CONTEXT, None, 0).claims]
    assert [reading.used for reading in await guard.storage.read(meters)] == [1, 1, 0]  # a slot is free again


async def test_unsent_attempt_gives_its_rate_back(new_guard: NewGuard) -> None:
    """D9: an attempt that was not sent takes nothing of its deployment, though another one has kept the iteration."""
    guard = guarded(new_guard, Iterations(9))
    limits = DeploymentLimits({"cheap": DeploymentLimit.of(rpm=5), "middle": DeploymentLimit.of(rpm=5)})
    async with guard.open(CONTEXT):
        first, _ = await chosen(guard, "openai/cheap", more=(limits,))
        second = first.attempt()
        assert not await second.claim_any(candidates(guard, second, "mistral/middle"))
        first.discard()
        second.record(Usage(input_tokens=100, output_tokens=50))
        second.end()

    meters = limits.meters(["cheap", "middle"])
    readings = await guard.storage.read([meters["cheap"][0], meters["middle"][0]])
    assert [reading.used for reading in readings] == [0, 1]


async def test_hold_around_is_changed_to_the_chosen_one(new_guard: NewGuard) -> None:
    """C1: the hold of the scope around becomes that of the candidate that fits: one call, one record."""
    guard = guarded(new_guard, Iterations(1), ProviderBudget({"openai": "$0.0001/1d", "mistral": "$1/1d"}))
    async with guard.open(CONTEXT), guard.call(model="anthropic/dear", input_tokens=100, max_output_tokens=50):
        call, model = await chosen(guard)
        assert model == "middle"
        call.record(Usage(input_tokens=100, output_tokens=50))
        call.end()

    (record,) = await guard.storage.records()
    assert (record.model, record.deployment, record.cost_nanousd) == ("middle", "middle", COSTS["middle"])
    assert await guard.storage.open_holds() == 0


async def test_hold_around_stays_where_none_fits(new_guard: NewGuard) -> None:
    """C1: refused, the hold of the scope around is as it was, and the next call may have it."""
    guard = guarded(new_guard, Iterations(1), ModelAllow(["anthropic/*"]))
    async with guard.open(CONTEXT), guard.call(model="anthropic/dear", input_tokens=100, max_output_tokens=50):
        call = new_call(guard.engine, None, ())
        denied = await call.claim_any(candidates(guard, call, "openai/cheap", "mistral/middle"))
        assert [each.code for each in denied] == ["model_not_allowed"] * 2
        later, model = await chosen(guard, "anthropic/dear")
        assert model == "dear"
        later.record(Usage(input_tokens=100, output_tokens=50))
        later.end()

    (record,) = await guard.storage.records()
    assert record.cost_nanousd == COSTS["dear"]


async def test_waits_for_holds_of_others_where_one_is_enough(new_guard: NewGuard) -> None:
    """A candidate that only calls in flight stand in the way of is worth the wait, whatever refuses the others."""
    guard = guarded(new_guard, ModelAllow(["openai/*", "mistral/*"]), hold_wait_s=5)
    limits = DeploymentLimits(
        {"cheap": DeploymentLimit.of(budget="$0.0001/1d"), "middle": DeploymentLimit.of(max_parallel=1)}
    )
    async with guard.open(CONTEXT):
        first, model = await chosen(guard, more=(limits,))
        assert model == "middle"
        second = asyncio.create_task(chosen(guard, more=(limits,)))
        await until(lambda: bool(guard.engine.waiting))
        first.record(Usage(input_tokens=100, output_tokens=50))
        first.end()
        call, model = await second
        assert model == "middle"
        call.discard()


@pytest.mark.parametrize("lost", [True, False])
async def test_of_several_that_may_have_been_granted_one_is_charged(clock: FrozenClock, lost: bool) -> None:
    """A7: the storage grants one candidate and its answer is lost, this process admits another: one is charged."""
    outage = OutageStorage(MemoryStorage(clock=clock))
    limits = DeploymentLimits({"cheap": DeploymentLimit.of(budget="$1/1d")})  # its budget refuses in an outage
    guard = Guard([Budget("$1/1d", on_outage="local")], storage=outage, clock=clock, prices=PRICES, hold_wait_s=0)
    async with guard.open(CONTEXT):
        if lost:
            outage.lose_replies()
        else:
            outage.down()
        call, model = await chosen(guard, more=(limits,))
        assert model == "middle"  # though the storage, where it was reached, has granted `cheap`
        outage.up()
        call.record(Usage(input_tokens=100, output_tokens=50))
        call.end()
    await guard.heartbeat()

    (record,) = await guard.storage.records()
    assert record.cost_nanousd == COSTS["middle"]
    assert await guard.storage.open_holds() == 0
    meters = [claim.meter for claim in guard.policies[0].plan(CONTEXT, described(guard, "openai/cheap"), 0).claims]
    meters += limits.meters(["cheap"])["cheap"]
    assert [(reading.used, reading.held) for reading in await guard.storage.read(meters)] == [
        (COSTS["middle"], 0),
        (0, 0),
    ]


async def test_nobody_is_asked_while_every_candidate_needs_the_store(clock: FrozenClock) -> None:
    """A7: an outage refuses where each candidate has a budget that says so; what may have been granted is given back."""
    outage = OutageStorage(MemoryStorage(clock=clock))
    guard = Guard([Budget("$1/1d")], storage=outage, clock=clock, prices=PRICES, hold_wait_s=0)
    async with guard.open(CONTEXT):
        outage.lose_replies()
        call = new_call(guard.engine, None, ())
        denied = await call.claim_any(candidates(guard, call))
        assert [each.code for each in denied] == ["guard_unavailable"] * 3
        outage.up()
    await guard.heartbeat()

    assert await guard.storage.open_holds() == 0
    assert await guard.storage.records() == []


async def test_cancelled_while_it_waits_holds_nothing(new_guard: NewGuard) -> None:
    """Whoever is cancelled on the way has nothing, whichever candidate would have been granted."""
    guard = guarded(new_guard, hold_wait_s=30)
    limits = DeploymentLimits({name: DeploymentLimit.of(max_parallel=1) for name in COSTS})
    async with guard.open(CONTEXT):
        running = [(await chosen(guard, more=(limits,)))[0] for _ in COSTS]
        waiting = asyncio.create_task(chosen(guard, more=(limits,)))
        await until(lambda: bool(guard.engine.waiting))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for call in running:
            call.discard()

    assert await guard.storage.open_holds() == 0


async def test_refusals_together_name_each_budget_and_the_soonest_reset(
    new_guard: NewGuard, clock: FrozenClock
) -> None:
    """B3: the one error lists what each provider has spent of its limit, and the soonest reset."""
    guard = guarded(new_guard, ProviderBudget({"openai": "$0.0003/1h", "mistral": "$0.0011/2h"}), disclose="all")
    async with guard.open(CONTEXT):
        for model in ("openai/cheap", "mistral/middle"):
            call, _ = await chosen(guard, model)
            call.record(Usage(input_tokens=100, output_tokens=50))
            call.end()
        call = new_call(guard.engine, None, ())
        denied = await call.claim_any(candidates(guard, call, "openai/cheap", "mistral/middle"))

    told = together(denied, disclose="all")
    assert told.details == (
        f"openai: $0.0002 of $0.0003 spent, resets at {utc(clock.now_ms() + 3_600_000)}",
        f"mistral: $0.001 of $0.0011 spent, resets at {utc(clock.now_ms() + 7_200_000)}",
        f"soonest reset: openai at {utc(clock.now_ms() + 3_600_000)}",
    )
    assert told.resets_at_ms == clock.now_ms() + 3_600_000
