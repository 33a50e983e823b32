"""What is counted as refused is what somebody was refused: by the gateway, the ledger and the events alike."""

from __future__ import annotations

from typing import Any

import pytest
from tests.gateway.kit import CONTEXT, MESSAGES, Fleet, fleet

from asgi_llm_guard import Budget, GuardMiddleware, LimitExceeded, ModelAllow, ProviderBudget
from asgi_llm_guard.events import Refused
from asgi_llm_guard.gateway import Fallbacks, TierDown
from asgi_llm_guard.ledger import RefusalQuery
from asgi_llm_guard.testing import FrozenClock, asgi_client

pytestmark = pytest.mark.anyio


async def counted(made: Fleet) -> tuple[list[tuple[str, str]], list[tuple[str, str, int]]]:
    """What observers were told, and what the ledger has."""
    books, ledger = made.guard.books, made.guard.ledger
    assert books is not None
    assert ledger is not None
    await books.catch_up()
    rows = await ledger.refusals(RefusalQuery(since_ms=0, until_ms=2**50))
    told = [event.denied for event in made.events if isinstance(event, Refused)]
    return [(each.policy, each.code) for each in told], [(row.policy, row.code, row.count) for row in rows]


async def by_middleware(made: Fleet) -> None:
    application: Any = GuardMiddleware(made.gateway.app(), guard=made.guard)
    async with asgi_client(application) as client:
        body = {"model": "auto", "messages": MESSAGES, "max_tokens": 20}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.json()["model"] == "model-d"


async def by_a_call_around(made: Fleet, model: str = "auto") -> None:
    async with made.guard.open(CONTEXT), made.guard.call(model="anthropic/model-d", max_output_tokens=20):
        await made.gateway.chat(model, MESSAGES, max_tokens=20)


async def by_itself(made: Fleet) -> None:
    await made.chat()


@pytest.mark.parametrize("way", [by_middleware, by_a_call_around, by_itself])
async def test_what_another_deployment_answers_was_not_refused(clock: FrozenClock, way: Any) -> None:
    """A call that the first deployment with money left has answered is no refusal, whatever was asked for around it."""
    async with fleet(clock, "a", "b", "d", policies=[ProviderBudget({"openai": "$0.000001/1d"})]) as made:
        assert made.guard.ledger is not None  # it counts from now on
        await way(made)

        assert await counted(made) == ([], [])
        assert [record.provider for record in await made.records()] == ["anthropic"]


@pytest.mark.parametrize("around", [False, True])
async def test_what_another_model_answers_was_not_refused(clock: FrozenClock, around: bool) -> None:
    """A call that a fallback model has answered is no refusal, though no policy let the one that was named be asked."""
    policies = [ProviderBudget({"openai": "$0.000001/1d"})]
    fallbacks = Fallbacks({"openai/model-a": ["anthropic/model-d"]})
    async with fleet(clock, "a", "d", policies=policies, fallbacks=fallbacks) as made:
        assert made.guard.ledger is not None
        if around:
            await by_a_call_around(made, "openai/model-a")
        else:
            await made.chat("openai/model-a")

        assert await counted(made) == ([], [])
        assert [record.provider for record in await made.records()] == ["anthropic"]


async def test_a_call_that_no_model_may_answer_is_one_refusal(clock: FrozenClock) -> None:
    """Where neither the model that was named nor its fallback may be asked, that is one refusal of each policy."""
    policies = [Budget("$0.0002/daily", per="global")]
    fallbacks = Fallbacks({"openai/model-a": ["anthropic/model-d"]})
    async with fleet(clock, "a", "d", policies=policies, fallbacks=fallbacks) as made:
        assert made.guard.ledger is not None
        with pytest.raises(LimitExceeded):
            await made.chat("openai/model-a", max_tokens=20_000)

        told, kept = await counted(made)
        assert [policy for policy, _ in told] == ["global_budget"]
        assert [(policy, count) for policy, _, count in kept] == [("global_budget", 1)]


@pytest.mark.parametrize("around", [False, True])
async def test_a_refused_call_is_one_refusal(clock: FrozenClock, around: bool) -> None:
    """A call that a policy refuses for every deployment which could answer it is one refusal of that policy."""
    policies = [Budget("$0.0002/daily", per="global")]
    async with fleet(clock, "a", "b", "c", policies=policies) as made:
        assert made.guard.ledger is not None
        with pytest.raises(LimitExceeded):
            if around:
                async with made.guard.open(CONTEXT), made.guard.call(
                    model="openai/model-a", input_tokens=1, max_output_tokens=1
                ):  # fmt: skip
                    await made.gateway.chat("auto", MESSAGES, max_tokens=20_000)
            else:
                await made.chat(max_tokens=20_000)

        told, kept = await counted(made)
        assert [policy for policy, _ in told] == ["global_budget"]
        assert [(policy, count) for policy, _, count in kept] == [("global_budget", 1)]


async def test_a_cheaper_model_that_may_not_be_asked_is_no_refusal(clock: FrozenClock) -> None:
    """Where a budget is nearly spent and the cheaper model is forbidden, the call is answered as it was asked, and refused nowhere."""
    policies = [ModelAllow(["openai/model-c"]), Budget("$1/daily", per="global")]
    lower = TierDown(to={"openai/model-c": "openai/model-a"}, at=0.000001)
    async with fleet(clock, "a", "c", policies=policies, tier_down=lower) as made:
        assert made.guard.ledger is not None
        await made.chat("openai/model-c")

        assert made.asked == ["c"]
        assert await counted(made) == ([], [])


async def test_a_list_of_deployments_of_which_none_is_left_is_a_refusal(clock: FrozenClock) -> None:
    """Whom `guard.filter` leaves nothing is refused, of the request that asked, and counted as anybody else."""
    budget = ProviderBudget({"openai": "$0/1d"})
    async with fleet(clock, "a", policies=[budget]) as made:
        assert made.guard.ledger is not None
        async with made.guard.open(CONTEXT):
            with pytest.raises(LimitExceeded):
                await made.guard.filter(["openai/model-a"])

        assert await counted(made) == (
            [("provider_budget", "budget_exhausted")],
            [("provider_budget", "budget_exhausted", 1)],
        )
        (event,) = [event for event in made.events if isinstance(event, Refused)]
        assert event.context.caller == CONTEXT.caller
