"""Which deployments are asked, in which order, after which waits, and what is paid: against providers on real sockets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.gateway.kit import MESSAGES, Fleet, fleet

from asgi_llm_guard import Budget, Iterations, LimitExceeded, ModelAllow, ProviderBudget
from asgi_llm_guard.gateway import (
    ContextOverflow,
    CooldownRules,
    Fallbacks,
    Gateway,
    GatewayError,
    NoDeployment,
    ProviderFailed,
    RequestRejected,
    RetryRules,
    TierDown,
    UnknownModel,
)
from asgi_llm_guard.testing import Behaviour, FrozenClock
from asgi_llm_guard.wire.peek import BodyError

pytestmark = pytest.mark.anyio

NO_RETRY = RetryRules(retries=0)
EXACT = RetryRules(jitter=0)
OVERLOADED = Behaviour.refuse("overloaded")


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


@asynccontextmanager
async def in_order(clock: FrozenClock, *names: str, **options: Any) -> AsyncIterator[Fleet]:
    """Deployments that are tried in the order in which they are named: the first has nearly all of the weight."""
    given = options.pop("limits", {})
    options["limits"] = {name: {"weight": 10.0**-place, **given.get(name, {})} for place, name in enumerate(names)}
    async with fleet(clock, *names, **{"strategy": "weighted", "retry": EXACT, **options}) as made:
        yield made


# ------------------------------------------------------------------------------ after a failure


@pytest.mark.parametrize(
    ("behaviour", "cost_of_failure"),
    [
        (Behaviour.error(500), False),
        (Behaviour.error(503), False),
        (Behaviour.refuse("overloaded"), False),
        (Behaviour.refuse("rate_limit"), False),
        (Behaviour.refuse("rate_limit", retry_after=7), False),
        (Behaviour.refuse("quota"), False),
        (Behaviour.error(401), False),
        (Behaviour.error(404), False),
        (Behaviour.error(408), False),
        (Behaviour.empty(), True),
        (Behaviour.answer(""), True),
    ],
    ids=["500", "503", "overloaded", "429", "429-after", "quota", "401", "404", "408", "no-body", "no-text"],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_next_one_answers_at_once(
    clock: FrozenClock, behaviour: Behaviour, cost_of_failure: bool, streamed: bool
) -> None:
    """C2, C3, conformance 80, 81: a failure moves on to the next deployment, without a wait, and is paid for as billed."""
    async with in_order(clock, "a", "b", policies=[Iterations(9), Budget("$1/1d")]) as made:
        made["a"].script(behaviour)
        if streamed:
            chunks = await made.stream()
            assert "".join(chunk.text for chunk in chunks).startswith("Echo")
        else:
            assert (await made.chat()).deployment == "b"

        assert made.asked == ["a", "b"]
        assert made.slept == []
        assert bool(made["a"].total_nanousd) is cost_of_failure
        records = sorted(await made.records(), key=lambda record: record.attempt)
        assert [(each.deployment, each.attempt) for each in records] == [("a", 1), ("b", 2)]
        if behaviour.content:  # of an empty body nobody knows what it cost
            await made.settled()


async def test_the_only_one_is_asked_again_after_a_pause(clock: FrozenClock) -> None:
    """D3: with no other deployment the same one is asked again, three times, five seconds apart."""
    async with in_order(clock, "a", cooldowns=CooldownRules(allowed_fails=None, failure_rate=None)) as made:
        made["a"].script(*[Behaviour.error(500)] * 3)
        answer = await made.chat()

        assert answer.text.startswith("Echo")
        assert made.asked == ["a"] * 4
        assert made.slept == [5.0, 5.0, 5.0]
        await made.settled()

        made["a"].script(*[Behaviour.error(500)] * 4)
        with pytest.raises(ProviderFailed) as failed:
            await made.chat()
        assert [str(each) for each in failed.value.failures] == ["a: other, status 500"] * 4
        await made.settled()


async def test_retry_after_is_honoured(clock: FrozenClock) -> None:
    """D3: the only deployment is asked again when it has said, and not where that is too long."""
    async with in_order(clock, "a") as made:
        made["a"].script(Behaviour.refuse("rate_limit", retry_after=7))
        await made.chat()
        assert made.slept == [7.0]

        made["a"].script(Behaviour.refuse("rate_limit", retry_after=3_000))
        with pytest.raises(ProviderFailed) as failed:
            await made.chat()
        assert failed.value.retry_after_s == 3_000
        assert made.slept == [7.0]
        await made.settled()


async def test_wrong_requests_are_asked_once(clock: FrozenClock) -> None:
    """Conformance 80: what one provider finds wrong, no other is asked, and the client learns what it is."""
    async with in_order(clock, "a", "b", fallbacks={"auto": ["openai/model-c"]}) as made:
        made["a"].script(Behaviour.error(400, message="temperature must be below 2"))
        with pytest.raises(RequestRejected, match="temperature must be below 2") as failed:
            await made.chat()

        assert failed.value.status == 400
        assert made.asked == ["a"]
        await made.settled()


async def test_nobody_left_tells_of_each(clock: FrozenClock) -> None:
    """C2: when every target has failed, one error tells of each, in order."""
    async with in_order(clock, "a", "b", "c", retry=RetryRules(retries=2, jitter=0)) as made:
        made["a"].script(Behaviour.error(500))
        made["b"].script(OVERLOADED)
        made["c"].script(Behaviour.error(401))
        with pytest.raises(ProviderFailed) as failed:
            await made.chat()

        assert [(each.deployment, each.kind) for each in failed.value.failures] == [
            ("a", "other"),
            ("b", "overload"),
            ("c", "auth"),
        ]
        assert "key-of-nobody" not in str(failed.value)
        await made.settled()


async def test_connection_that_was_never_made_costs_nothing(clock: FrozenClock) -> None:
    """Nothing was sent: no money, and the iteration is the attempt's that was."""
    async with in_order(
        clock, "a", "b", policies=[Iterations(9), Budget("$1/1d")], limits={"a": {"api_base": "http://127.0.0.1:9/v1"}}
    ) as made:
        await made.chat()

        assert [event.outcome for event in made.ended] == ["not_dispatched", "measured"]
        assert len(await made.records()) == 1
        await made.settled()


async def test_broken_connection_is_charged_what_was_held(clock: FrozenClock) -> None:
    """What may have been answered is charged as it was held; the next deployment answers."""
    async with in_order(clock, "a", "b", policies=[Budget("$1/1d")]) as made:
        made["a"].script(Behaviour.cut())
        await made.chat()

        first, second = sorted(await made.records(), key=lambda record: record.attempt)
        assert (first.outcome, first.cost_nanousd) == ("unknown", first.estimate_nanousd)
        assert second.cost_nanousd == made["b"].total_nanousd


# ------------------------------------------------------------------------------------ fallbacks


async def test_fallbacks_in_their_order(clock: FrozenClock) -> None:
    """Conformance 81: from model to model in the order that is listed, each at its own price; no target twice."""
    chain = {"openai/model-a": ["mistral/model-e", "openai/model-a"], "mistral/model-e": ["anthropic/model-d"]}
    async with in_order(clock, "a", "d", "e", retry=NO_RETRY, fallbacks=chain, policies=[Budget("$1/1d")]) as made:
        made["a"].script(Behaviour.error(503))
        made["e"].script(Behaviour.error(401))
        answer = await made.chat("openai/model-a")

        assert answer.deployment == "d"
        assert made.asked == ["a", "e", "d"]
        await made.settled()


async def test_default_fallback_ends_its_loop(clock: FrozenClock) -> None:
    """Conformance 81: a specific and a default fallback that lead to each other come to an end."""
    listed = Fallbacks(
        {"openai/model-a": ["openai/model-b"], "openai/model-b": ["openai/model-a"]}, default=["openai/model-a"]
    )
    async with in_order(clock, "a", "b", retry=NO_RETRY, fallbacks=listed) as made:
        made["a"].script(Behaviour.error(500))
        made["b"].script(Behaviour.error(500))
        with pytest.raises(ProviderFailed):
            await made.chat("openai/model-a")

        assert made.asked == ["a", "b"]


async def test_fallbacks_may_be_left_out(clock: FrozenClock) -> None:
    """Conformance 81: without fallbacks the model itself is all that is tried."""
    async with in_order(clock, "a", "b", retry=NO_RETRY, fallbacks={"openai/model-a": ["openai/model-b"]}) as made:
        made["a"].script(Behaviour.error(500))
        with pytest.raises(ProviderFailed):
            await made.chat("openai/model-a", fallbacks=False)

        assert made.asked == ["a"]


async def test_fallback_that_is_not_served_is_passed_over(clock: FrozenClock) -> None:
    """C2: a model that cannot be resolved is skipped."""
    chain = {"openai/model-a": ["openai/gone", "openai/model-b"]}
    async with in_order(clock, "a", "b", retry=NO_RETRY, fallbacks=chain) as made:
        made["a"].script(Behaviour.error(500))
        assert (await made.chat("openai/model-a")).deployment == "b"
        with pytest.raises(UnknownModel, match="openai/gone"):
            await made.chat("openai/gone")


async def test_allow_list_holds_at_every_hop(clock: FrozenClock) -> None:
    """T12: neither a group, nor an alias, nor a fallback reaches a model that is not allowed."""
    options: dict[str, Any] = {
        "policies": [ModelAllow(["openai/model-a", "openai/model-c"])],
        "aliases": {"fast": "anthropic/model-d"},
        "fallbacks": {"openai/model-a": ["mistral/model-e", "anthropic/model-d", "openai/model-c"]},
        "retry": NO_RETRY,
    }
    async with in_order(clock, "d", "e", "a", "c", **options) as made:
        assert (await made.chat("auto")).deployment == "a"  # `d` and `e` would have come first
        for name in ("fast", "d", "anthropic/model-d", "ANTHROPIC/MODEL-D", "model-d", "e", "Mistral:model-e"):
            with pytest.raises(LimitExceeded) as refused:
                await made.chat(name, fallbacks=False)
            assert refused.value.denied.code == "model_not_allowed"
        made["a"].script(Behaviour.error(500))
        assert (await made.chat("openai/model-a")).deployment == "c"

        assert made["d"].calls == made["e"].calls == 0
        await made.settled()


SPELLINGS = [
    "anthropic/model-d", "Anthropic/model-d", "ANTHROPIC/MODEL-D", "anthropic:model-d", "Anthropic:Model-D",
    " anthropic/model-d", "anthropic/model-d ", "anthropic/ model-d", "anthropic /model-d", "model-d", "MODEL-D", "Model-d",
    "d", "fast", "FAST", "Fast", "faster", "anthropic//model-d", "anthropic/model-d/", "anthropic/*", "*", "anthropic/model-d*",
    "openai/anthropic/model-d", "models/model-d",
]  # fmt: skip


@pytest.mark.parametrize("hop", ["asked", "fallback", "default", "cheaper"])
async def test_no_spelling_reaches_a_model_that_is_not_allowed(clock: FrozenClock, hop: str) -> None:
    """T12: however a model is written, and at whatever hop, an allow-list without it keeps it from being asked."""
    aliases = {"fast": "anthropic/model-d", "faster": "FAST"}
    async with in_order(clock, "a", "d", policies=[ModelAllow(["openai/*"]), Budget("$1/1d")]) as made:
        for spelling in SPELLINGS:
            more: dict[str, Any] = {}
            if hop == "fallback":
                more["fallbacks"] = {"openai/model-a": [spelling]}
            elif hop == "default":
                more["fallbacks"] = Fallbacks(default=[spelling])
            elif hop == "cheaper":
                more["tier_down"] = TierDown(to={"openai/model-a": "faster"}, at=0.000001)
            if hop in ("fallback", "default"):
                made["a"].script(Behaviour.error(500))
            made.gateway = Gateway(made.guard, made.deployments.values(), aliases=aliases, retry=NO_RETRY, **more)
            with contextlib.suppress(LimitExceeded, GatewayError, BodyError):
                await made.chat(spelling if hop == "asked" else "openai/model-a")
            await made.gateway.aclose()
            assert made["d"].calls == 0, spelling


async def test_dear_fallback_of_a_spent_budget_is_passed_over(clock: FrozenClock) -> None:
    """Conformance 68, 69: a fallback is held for at its own price: one that the budget has no room for is not asked."""
    chain = {"openai/model-a": ["openai/model-c", "openai/model-b"]}
    async with in_order(
        clock, "a", "b", "c", retry=NO_RETRY, fallbacks=chain, policies=[Budget("$0.001/1d", per="global")]
    ) as made:
        made["a"].script(Behaviour.error(500))
        answer = await made.chat("openai/model-a")

        assert answer.deployment == "b"
        assert made["c"].calls == 0
        await made.settled()


async def test_nothing_is_asked_where_the_budget_is_spent(clock: FrozenClock) -> None:
    """Conformance 69: neither the model nor its fallback is asked over the budget, and no provider is blamed."""
    async with in_order(
        clock, "a", "b", policies=[Budget("$0/1d")], fallbacks={"openai/model-a": ["openai/model-b"]}
    ) as made:
        with pytest.raises(LimitExceeded) as refused:
            await made.chat("openai/model-a")

        assert refused.value.denied.status == 402
        assert made.asked == []
        assert await made.gateway.cooldowns.cooling() == {}


# -------------------------------------------------------------------------------------- budgets


async def test_spent_provider_is_passed_over(clock: FrozenClock) -> None:
    """B2, B3, conformance 12, 13: calls go to who has budget left; when nobody has, one error names each of them."""
    budgets = ProviderBudget({"openai": "$0.0003/1h", "mistral": "$0.0014/2h"})
    async with in_order(clock, "a", "e", policies=[budgets], guard={"disclose": "all"}) as made:
        made["a"].script(Behaviour.answer(output_tokens=19, input_tokens=250))
        answers = [await made.chat() for _ in range(3)]
        assert [answer.deployment for answer in answers] == ["a", "e", "e"]
        with pytest.raises(LimitExceeded) as refused:
            while True:
                await made.chat()

        denied = refused.value.denied
        assert denied.status == 402
        assert [line.partition(":")[0] for line in denied.details] == ["openai", "mistral", "soonest reset"]
        assert denied.resets_at_ms == clock.now_ms() + 3_600_000
        await made.settled()


async def test_budget_smaller_than_one_call_sends_the_first_elsewhere(clock: FrozenClock) -> None:
    """Conformance 12: a budget that cannot hold one call is passed over from the first call on."""
    async with in_order(clock, "a", "e", policies=[ProviderBudget({"openai": "$0.00001/1d"})]) as made:
        assert (await made.chat()).deployment == "e"


async def test_own_budget_of_a_deployment(clock: FrozenClock) -> None:
    """Conformance 15, 16: a deployment over its own budget is passed over; the only one is named where it refuses."""
    async with in_order(clock, "a", "b", limits={"a": {"budget": "$0.00001/1d"}}, guard={"disclose": "all"}) as made:
        assert [(await made.chat()).deployment for _ in range(3)] == ["b"] * 3
        assert [made.gateway.stats.requests(name) for name in "ab"] == [0, 3]  # what was not asked has not been busy
        with pytest.raises(LimitExceeded, match="deployment 'a'"):
            await made.chat("openai/model-a")


@pytest.mark.parametrize(
    ("limit", "expected"), [({"rpm": 2}, ["a", "a", "b"]), ({"tpm": 255}, ["a", "b", "b"])], ids=["rpm", "tpm"]
)
async def test_rates_of_a_deployment(clock: FrozenClock, limit: dict[str, int], expected: list[str]) -> None:
    """D9, conformance 82: a deployment gets no more than it takes in a minute, and then again."""
    async with in_order(clock, "a", "b", limits={"a": limit}) as made:
        assert [(await made.chat()).deployment for _ in range(3)] == expected
        clock.advance(seconds=70)
        assert (await made.chat()).deployment == "a"
        await made.settled()


async def test_deployment_added_and_removed(clock: FrozenClock) -> None:
    """Conformance 27: one that is added has its limits at once, one that is removed is not asked any more."""
    async with in_order(clock, "a", "b") as made:
        second = made.deployments["b"]
        made.gateway.remove("b")
        assert len(made.gateway) == 1
        assert made.gateway.limits.limit("b") is None
        with pytest.raises(UnknownModel):
            await made.chat("openai/model-b")
        made.gateway.add(second)
        assert (await made.chat("openai/model-b")).deployment == "b"


async def test_tier_down_near_the_end_of_a_budget(clock: FrozenClock) -> None:
    """A budget that is nearly spent asks the cheaper model, and the answer says so; nobody is refused for it."""
    lower = TierDown(to={"openai/model-c": "openai/model-a"}, at=0.5)
    async with in_order(clock, "a", "c", policies=[Budget("$0.0029/1d", per="global")], tier_down=lower) as made:
        async with made.guard.open():
            names = []
            for _ in range(5):
                body = {"model": "openai/model-c", "messages": MESSAGES, "max_tokens": 20}
                async with await made.gateway.ask("openai", body) as reply:
                    await reply.read()
                    names.append((reply.deployment, reply.lowered_from))

        assert names[0] == ("c", None)
        assert names[-1] == ("a", "openai/model-c")
        await made.settled()


# ------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("streamed", [False, True])
async def test_overflow_goes_to_a_larger_window(clock: FrozenClock, streamed: bool) -> None:
    """D4: an input that does not fit goes on to a deployment with a larger window, and to no other."""
    windows = {"a": {"context_window": 1_000}, "b": {"context_window": 1_000}, "c": {"context_window": 9_000}}
    async with in_order(clock, "a", "b", "c", limits=windows) as made:
        made["a"].script(Behaviour.refuse("context"))
        await (made.stream() if streamed else made.chat())

        assert made.asked == ["a", "c"]
        await made.settled()


async def test_overflow_is_an_error_of_its_own(clock: FrozenClock) -> None:
    """D5, conformance 80: where nothing is larger the overflow is told as what it is, and asked once."""
    async with in_order(
        clock, "a", "b", limits={"a": {"context_window": 1_000}, "b": {"context_window": 1_000}}
    ) as made:
        made["a"].script(Behaviour.refuse("context"))
        with pytest.raises(ContextOverflow) as overflow:
            await made.chat()

        assert overflow.value.status == 400
        assert overflow.value.code == "context_length_exceeded"
        assert made.asked == ["a"]


async def test_overflow_is_foreseen(clock: FrozenClock) -> None:
    """D4: what is surely larger than a window is not sent there, nor paid for."""
    windows = {"a": {"context_window": 1_000}, "b": {"context_window": 90_000}}
    long = [{"role": "user", "content": "word " * 20_000}]
    async with in_order(clock, "a", "b", limits=windows) as made:
        assert (await made.chat("auto", long)).deployment == "b"
        with pytest.raises(ContextOverflow):
            await made.chat("openai/model-a", long)
        assert made["a"].calls == 0


async def test_likely_overflow_tries_the_larger_window_first(clock: FrozenClock) -> None:
    """D4: what is most likely too long for a deployment goes to one with a larger window first."""
    windows = {"a": {"context_window": 1_000}, "b": {"context_window": 90_000}}
    async with in_order(clock, "a", "b", limits=windows) as made:
        assert (await made.chat("auto", [{"role": "user", "content": "word " * 1_000}])).deployment == "b"


async def test_overflow_falls_back_to_a_larger_model(clock: FrozenClock) -> None:
    """D4: a list for inputs that are too large is followed, and models whose window is no larger are passed over."""
    windows = {"a": {"context_window": 1_000}, "b": {"context_window": 900}, "c": {"context_window": 9_000}}
    listed = Fallbacks({"openai/model-a": ["openai/model-b"]}, context={"openai/model-a": ["openai/model-c"]})
    async with in_order(clock, "a", "b", "c", limits=windows, fallbacks=listed) as made:
        made["a"].script(Behaviour.refuse("context"))
        assert (await made.chat("openai/model-a")).deployment == "c"
        assert made.asked == ["a", "c"]


async def test_foreseen_overflow_falls_back_too(clock: FrozenClock) -> None:
    """D4: what is foreseen goes the way of what a provider refuses, without asking it."""
    windows = {"a": {"context_window": 1_000}, "b": {"context_window": 90_000}, "c": {"context_window": 90_000}}
    listed = Fallbacks({"openai/model-a": ["openai/model-b"]}, context={"openai/model-a": ["openai/model-c"]})
    async with in_order(clock, "a", "b", "c", limits=windows, fallbacks=listed) as made:
        assert (await made.chat("openai/model-a", [{"role": "user", "content": "word " * 20_000}])).deployment == "c"
        assert made.asked == ["c"]


# ------------------------------------------------------------------------------------ cooldowns


async def test_failing_deployment_rests(clock: FrozenClock) -> None:
    """D3, conformance 75: one that keeps failing is left alone for a minute, and asked again afterwards."""
    async with in_order(clock, "a", "b") as made:
        made["a"].script(Behaviour.error(401))
        await made.chat()
        await made.chat()
        assert made.asked == ["a", "b", "b"]
        clock.advance(seconds=61)
        assert (await made.chat()).deployment == "a"


async def test_all_rest(clock: FrozenClock) -> None:
    """Conformance 75: while every deployment rests, callers are told for how long, and nobody is asked."""
    async with in_order(clock, "a", "b", retry=NO_RETRY) as made:
        made["a"].script(Behaviour.error(401))
        made["b"].script(Behaviour.error(401))
        for _ in range(2):
            with pytest.raises(ProviderFailed):
                await made.chat()
        with pytest.raises(NoDeployment) as rests:
            await made.chat()

        assert rests.value.retry_after_s == 60
        assert made.asked == ["a", "b"]


async def test_refusal_of_ours_cools_nothing_down(clock: FrozenClock) -> None:
    """A limit of ours that refuses is no failure of a provider."""
    async with in_order(clock, "a", "b", limits={"a": {"rpm": 1}}) as made:
        for _ in range(9):
            await made.chat()
        assert await made.gateway.cooldowns.cooling() == {}


# -------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("strategy", "limits", "ideal"),
    [
        ("usage", {"a": {"rpm": 100}, "b": {"rpm": 200}, "c": {"rpm": 300}}, {"a": 10, "b": 20, "c": 30}),
        ("weighted", {"a": {"weight": 1}, "b": {"weight": 2}, "c": {"weight": 3}}, {"a": 10, "b": 20, "c": 30}),
        ("least_busy", {}, {"a": 20, "b": 20, "c": 20}),
        ("lowest_cost", {}, {"a": 60, "b": 0, "c": 0}),
    ],
)
async def test_group_is_spread_by_the_strategy(
    clock: FrozenClock, strategy: str, limits: dict[str, Any], ideal: dict[str, int]
) -> None:
    """D2: one group over all deployments, spread as the strategy says, within a tenth."""
    async with fleet(clock, "a", "b", "c", strategy=strategy, limits=limits) as made:
        for _ in range(60):
            await made.chat("auto")
        counts = {name: made[name].calls for name in "abc"}
        if strategy == "least_busy":  # one at a time nobody is busy: any of them will do
            assert min(counts.values()) > 0
        else:
            assert all(abs(counts[name] - share) <= 0.1 * share + 1 for name, share in ideal.items()), counts
        await made.settled()


async def test_usage_is_the_strategy_unless_told_otherwise(clock: FrozenClock) -> None:
    """D2: the share of what each takes decides; two that take the same get the same."""
    async with fleet(clock, "a", "b", limits={"a": {"rpm": 50}, "b": {"rpm": 50}}) as made:
        for _ in range(20):
            await made.chat("auto")
        assert made["a"].calls == made["b"].calls == 10
