"""Scenarios from the field, from the request to the counters, on every storage."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.decorator.values import ANSWER, BOUND, MODEL, USED
from tests.middleware.asgi import Exchange
from tests.middleware.values import ASK, CHAT, Provider, ask, guarded, new_guard

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    DepartmentQuota,
    Guard,
    Iterations,
    LimitExceeded,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
    Route,
    Usage,
)
from asgi_llm_guard.claims import Meter
from asgi_llm_guard.identity import TrustedHeaders
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

IDENTITY = TrustedHeaders(trust_headers=True, caller="x-user", departments="x-departments", agent="x-agent")
ALICE = Context(caller="alice", departments=("research",))


def meters(guard: Guard, context: Context = ALICE) -> list[Meter]:
    """Everything that the guard's policies would claim for a call of `context`."""
    call = guard.describe(MODEL, input_tokens=1, max_output_tokens=1)
    return [
        claim.meter for policy in guard.policies for claim in policy.plan(context, call, guard.clock.now_ms()).claims
    ]


async def counted(guard: Guard, context: Context = ALICE) -> list[tuple[int, int]]:
    """Used and held of each of them."""
    return [(reading.used, reading.held) for reading in await guard.storage.read(meters(guard, context))]


def tokens(amount: int) -> Usage:
    return Usage(input_tokens=amount, output_tokens=0)


def call_of(amount: int) -> dict[str, Any]:
    return {"model": MODEL, "input_tokens": amount, "max_output_tokens": 0}


class Failed(Exception):  # noqa: N818 - as SDKs name them
    status_code = 500
    body: object = None


async def call(app: Any, *, session: str = "s", **who: str) -> Exchange:
    """One chat completion of somebody's session."""
    headers = [(f"x-{name}".encode(), value.encode()) for name, value in who.items()]
    return await ask(app, headers=[*headers, (b"x-session-id", session.encode())], session=False)


# -------------------------------------------------------------------------------- sessions


async def test_session_budget(storage: Storage) -> None:
    """Conformance 4, 5 and 6: a fresh session passes, one that spent too much is refused, another is untouched."""
    usage = {"prompt_tokens": 10, "completion_tokens": 1_000_000}
    app = guarded(
        Provider([json.dumps({**ANSWER, "usage": usage}).encode()]),
        new_guard(Budget("$1/1d", per="session"), storage=storage, max_overage=None),
    )
    assert [(await call(app, session=name)).status for name in ("a", "a", "b")] == [200, 402, 200]


async def test_sessions_count_calls(storage: Storage) -> None:
    """A1, A2, conformance 1, 2, 3, 7 and 9: calls are counted per session and caller, refused ones are not."""
    guard = new_guard(Iterations(2), storage=storage, identity=IDENTITY)
    app = guarded(Provider(), guard)
    for user, session in (("alice", "a"), ("alice", "b"), ("bob", "a")):
        assert [(await call(app, session=session, user=user)).status for _ in range(4)] == [200, 200, 429, 429]
    assert await counted(guard, Context(caller="alice", session="a")) == [(2, 0)]
    assert [(await ask(app, session=False)).status for _ in range(4)] == [200] * 4


async def test_limits_of_agents(storage: Storage) -> None:
    """A3: the agent's own limit, also as text, comes before the policy's default."""
    guard = new_guard(Iterations(1), storage=storage, identity=IDENTITY, agents={"researcher": {"max_iterations": "3"}})
    app = guarded(Provider(), guard)
    for agent, expected in (("researcher", [200, 200, 200, 429]), ("other", [200, 429, 429, 429])):
        who = {"user": agent, "agent": agent}
        assert [(await call(app, **who)).status for _ in range(4)] == expected


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("allow", [200, 200, 200]), ("principal", [200, 200, 429]), ("reject", [400, 400, 400])],
)
async def test_missing_session(storage: Storage, missing: Any, expected: list[int]) -> None:
    """A4, conformance 10: without a session id a request passes, shares its caller's count, or is told where to put one."""
    app = guarded(Provider(), new_guard(Iterations(2, missing=missing), storage=storage, identity=IDENTITY))
    headers = [(b"x-user", b"alice")]
    exchanges = [await ask(app, headers=headers, session=False) for _ in range(3)]
    assert [exchange.status for exchange in exchanges] == expected
    if missing == "reject":
        message = exchanges[0].json["error"]["message"]
        assert "x-litellm-session-id" in message
        assert "metadata.session_id" in message


@pytest.mark.parametrize(("renew", "expected"), [(False, 200), (True, 429)])
async def test_time_to_live(storage: Storage, clock: FrozenClock, *, renew: bool, expected: int) -> None:
    """A5, conformance 11: the count starts anew an hour after its first call, or, renewed, after its last."""
    guard = new_guard(Iterations(2, ttl=3600, renew=renew), storage=storage, clock=clock)
    app = guarded(Provider(), guard)
    for _ in range(2):
        assert (await call(app)).status == 200
        clock.advance(seconds=1_800)
    assert (await call(app)).status == expected
    clock.advance(seconds=3_600)
    assert (await call(app)).status == 200


# ------------------------------------------------------------------------------ settlement


async def test_settled_tokens(storage: Storage) -> None:
    """Conformance 34: a call that was held for 100 tokens and used 50 leaves 50."""
    guard = new_guard(Budget("1000 tokens/1d", per="caller"), storage=storage)
    async with guard.open(ALICE), guard.call(**call_of(100)) as made:
        assert await counted(guard) == [(0, 100)]
        made.record(tokens(50))
    assert await counted(guard) == [(50, 0)]


async def test_failed_call_is_refunded(storage: Storage) -> None:
    """Conformance 35: a call that failed is given back in full, on what it was charged to and on nothing else."""
    book = QuotaBook({"research": DepartmentQuota(daily_tokens=1000), "sales": DepartmentQuota(daily_tokens=1000)})
    guard = new_guard(Quota(book), Budget("1000 tokens/1d", per="caller"), storage=storage)
    other = Context(caller="bob", departments=("sales",))
    async with guard.open(other), guard.call(**call_of(70)) as made:
        made.record(tokens(70))
    with pytest.raises(Failed):
        async with guard.open(ALICE), guard.call(**call_of(100)):
            assert await counted(guard) == [(0, 100)] * 2
            raise Failed
    assert await counted(guard) == [(0, 0)] * 2
    assert await counted(guard, other) == [(70, 0)] * 2


async def test_window_that_ended_before_the_settlement(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 51: a settlement after its window ended leaves the new window alone; it never goes below zero."""
    guard = new_guard(Budget("100 tokens/1h", per="caller"), storage=storage, clock=clock)
    async with guard.open(ALICE):
        late = guard.call(**call_of(90))
        made = await late.__aenter__()
        clock.advance(seconds=3_601)
        async with guard.call(**call_of(100)) as fresh:
            made.record(tokens(10))
            await late.__aexit__(None, None, None)
            assert await counted(guard) == [(0, 100)]
            fresh.record(tokens(100))
    assert await counted(guard) == [(100, 0)]


async def test_settled_twice(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 60: ending a request twice frees its own slot only, and a dead process's slot is freed by its lapse."""
    guard = new_guard(Concurrency(2, per="caller"), storage=storage, clock=clock)
    first, second = (guard.new_admission(ALICE) for _ in range(2))
    for admission in (first, second):
        assert await admission.open(None) is None
    await first.end()
    await first.end()
    assert await counted(guard) == [(0, 1)]

    clock.advance(seconds=16)
    other = new_guard(Concurrency(2, per="caller"), storage=storage, clock=clock)
    await other.heartbeat()
    assert await counted(other) == [(0, 0)]
    await second.end()
    assert await counted(other) == [(0, 0)]


# --------------------------------------------------------------------------------- tokens


async def test_rates_and_tokens_apart(storage: Storage) -> None:
    """Conformance 38 and 41: a request that needs no tokens counts as a request only; the fourth of three is a 429."""
    guard = new_guard(
        RateLimit("3/hour", per="caller"), Budget("1000 tokens/1d", per="caller"), storage=storage, identity=IDENTITY
    )
    app = guarded(Provider([b"{}"]), guard)
    statuses = [(await ask(app, path="/agents", headers=[(b"x-user", b"alice")])).status for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert await counted(guard) == [(3, 0), (0, 0)]


async def test_parallel_calls_that_fit(storage: Storage) -> None:
    """Conformance 39: three parallel calls that fit together all pass."""
    guard = new_guard(Budget("100 tokens/1d", per="caller"), storage=storage)
    together = asyncio.Barrier(3)

    async def one() -> None:
        async with guard.call(**call_of(33)) as made:
            await together.wait()
            made.record(tokens(33))

    async with guard.open(ALICE):
        await asyncio.gather(*(one() for _ in range(3)))
    assert await counted(guard) == [(99, 0)]


async def test_routes_that_call_nobody(storage: Storage) -> None:
    """Conformance 61: counting tokens reserves no money, however often; a call does."""
    guard = new_guard(Budget("$0.0004/1d", per="caller"), storage=storage)
    app = guarded(Provider([b'{"input_tokens": 10}']), guard)
    for _ in range(20):
        assert (await ask(app, path="/v1/messages/count_tokens")).status == 200
    assert await counted(guard, Context()) == [(0, 0)]
    app = guarded(Provider(), guard)
    assert (await ask(app)).status == 200
    assert (await counted(guard, Context()))[0][0] >= USED


# ------------------------------------------------------------------------------- refusals


async def test_rate_refusal(storage: Storage) -> None:
    """Conformance 43: a refused rate says when to come back, and which limit it was."""
    guard = new_guard(RateLimit("1/minute", per="caller", name="rpm"), storage=storage, identity=IDENTITY)
    app = guarded(Provider(), guard)
    assert (await call(app, user="alice")).status == 200
    exchange = await call(app, user="alice")
    assert exchange.status == 429
    assert 1 <= int(exchange.headers["retry-after"]) <= 70
    told = exchange.json["error"]
    assert (told["code"], told["guard"]["policy"], told["guard"]["unit"]) == ("rate_limit_exceeded", "rpm", "calls")


@pytest.mark.parametrize("policy", [Budget("10 tokens/1h", per="caller"), Budget("10 tokens/daily", per="caller")])
async def test_reset_is_the_end_of_the_window(storage: Storage, clock: FrozenClock, policy: Policy) -> None:
    """Conformance 53: at the reported reset the next call is admitted, and a moment before it is not."""
    guard = new_guard(policy, storage=storage, clock=clock)
    async with guard.open(ALICE):
        async with guard.call(**call_of(10)) as made:
            made.record(tokens(10))
        with pytest.raises(LimitExceeded) as caught:
            await guard.call(**call_of(1)).__aenter__()
        resets_at_ms = caught.value.denied.resets_at_ms
        assert resets_at_ms is not None
        clock.set(resets_at_ms - 1)
        with pytest.raises(LimitExceeded):
            await guard.call(**call_of(1)).__aenter__()
        clock.set(resets_at_ms)
        async with guard.call(**call_of(1)) as made:
            made.record(tokens(1))


async def test_reset_by_hand(storage: Storage) -> None:
    """Conformance 74: after a reset the very next call is admitted."""
    guard = new_guard(Budget("10 tokens/1d", per="caller"), storage=storage)
    async with guard.open(ALICE):
        async with guard.call(**call_of(10)) as made:
            made.record(tokens(10))
        with pytest.raises(LimitExceeded):
            await guard.call(**call_of(1)).__aenter__()
        await storage.reset(meters(guard))
        async with guard.call(**call_of(10)) as made:
            made.record(tokens(10))


async def test_refused_slot_takes_no_rate(storage: Storage) -> None:
    """Conformance 50: a request that finds no slot burns no unit of the rate."""
    guard = new_guard(RateLimit("2/hour", per="caller"), Concurrency(1, per="caller"), storage=storage)
    async with guard.open(ALICE):
        for _ in range(5):
            with pytest.raises(LimitExceeded, match="concurrency"):
                await guard.open(ALICE).__aenter__()
    assert await counted(guard) == [(1, 0), (0, 0)]
    async with guard.open(ALICE):
        pass


async def test_slots_of_caller_and_department(storage: Storage) -> None:
    """Conformance 54 and 58: a refusal by the department's slots takes none of the caller's; others have their own."""
    guard = new_guard(Concurrency(5, per="caller"), Concurrency(1, per="department"), storage=storage)
    async with guard.open(Context(caller="bob", departments=("research",))):
        with pytest.raises(LimitExceeded, match="department"):
            await guard.open(ALICE).__aenter__()
        assert await counted(guard) == [(0, 0), (0, 1)]
        async with guard.open(Context(caller="carol", departments=("sales",))):
            pass
    async with guard.open(ALICE):
        assert await counted(guard) == [(0, 1), (0, 1)]


async def test_spent_caller_may_use_what_is_free(storage: Storage) -> None:
    """Conformance 69: with the budget spent a paid fallback is refused and a free one admitted."""
    prices = PriceBook.snapshot(
        overrides={MODEL: {"input": 1, "output": 2}, "openai/free-model": {"input": 0, "output": 0}}
    )
    guard = new_guard(Budget("$0.00002/1d", per="caller"), storage=storage, prices=prices)
    async with guard.open(ALICE):
        async with guard.call(model=MODEL, input_tokens=10, max_output_tokens=5) as made:
            made.record(Usage(input_tokens=10, output_tokens=5))
        with pytest.raises(LimitExceeded):
            await guard.call(**BOUND).__aenter__()
        async with guard.call(**{**BOUND, "model": "openai/free-model"}) as made:
            made.record(tokens(100))
    assert await counted(guard) == [(USED, 0)]


@pytest.mark.parametrize(("fallback", "status"), [("paid-model", 402), ("free-too", 200)])
async def test_free_model_with_a_fallback(storage: Storage, fallback: str, status: int) -> None:
    """Conformance 68: with the budget spent a free model is refused if a paid one may answer in its place, and
    admitted if all that may answer are free."""
    free = {"input": 0, "output": 0}
    prices = PriceBook.snapshot(
        overrides={
            "openai/free-model": free,
            "openai/free-too": free,
            "openai/paid-model": {"input": 1, "output": 2},
            MODEL: {"input": 1, "output": 2},
        }
    )
    guard = new_guard(Budget("$0.00002/1d", per="global"), storage=storage, prices=prices)
    async with guard.open(ALICE), guard.call(model=MODEL, input_tokens=10, max_output_tokens=5) as made:
        made.record(Usage(input_tokens=10, output_tokens=5))
    provider = Provider([json.dumps({**ANSWER, "model": "free-model"}).encode()])
    app = guarded(provider, guard)
    assert (await ask(app, {**ASK, "model": "openai/free-model"})).status == 200
    listed = ["openai/free-model", f"openai/{fallback}"]
    assert (await ask(app, {**ASK, "model": "openai/free-model", "models": listed})).status == status
    assert len(provider.bodies) == (2 if status == 200 else 1)
    assert await counted(guard) == [(USED, 0)]


async def test_answer_of_another_model(storage: Storage) -> None:
    """Conformance 36: what a call did not use is given back to the model that it was reserved for, whatever name its
    answer has."""
    guard = new_guard(Budget("1000000 tokens/1d", per="model"), storage=storage)
    app = guarded(Provider([json.dumps({**ANSWER, "model": "renamed"}).encode()]), guard)
    assert (await ask(app)).status == 200
    assert await counted(guard, Context()) == [(15, 0)]
    renamed = guard.describe("openai/renamed", input_tokens=1, max_output_tokens=1)
    others = [claim.meter for policy in guard.policies for claim in policy.plan(Context(), renamed, 0).claims]
    assert [(reading.used, reading.held) for reading in await guard.storage.read(others)] == [(0, 0)]


# ------------------------------------------------------------------- departments, providers


async def test_strictest_department_wins(storage: Storage) -> None:
    """C5, C6: every department of the caller is checked and charged in full; the strictest refuses and is named."""
    book = QuotaBook(
        {
            "research": DepartmentQuota(daily_tokens=10_000),
            "sales": DepartmentQuota(daily_tokens=400, models=[MODEL]),
        }
    )
    guard = new_guard(Quota(book), storage=storage, identity=IDENTITY, disclose="all")
    app = guarded(Provider(), guard)
    who = {"user": "alice", "departments": "research,sales"}
    exchanges = [await call(app, **who) for _ in range(40)]
    statuses = [exchange.status for exchange in exchanges]
    admitted = statuses.count(200)
    assert statuses == [200] * admitted + [429] * (40 - admitted)
    told = exchanges[-1].json["error"]["guard"]
    assert {name: told[name] for name in ("scope", "subject", "unit", "limit", "used")} == {
        "scope": "department",
        "subject": "sales",
        "unit": "tokens",
        "limit": 400,
        "used": admitted * 15,
    }
    assert await counted(guard, Context(departments=("research", "sales"))) == [(admitted * 15, 0)] * 2
    assert len(await storage.records()) == admitted
    forbidden = guarded(Provider(), guard, routes=[Route(CHAT)])
    headers = [(b"x-user", b"bob"), (b"x-departments", b"sales")]
    refused = await ask(forbidden, {"model": "openai/gpt-4o", "messages": []}, headers=headers)
    assert refused.status == 403


async def test_cost_of_a_call(storage: Storage) -> None:
    """C10: input and output have their own price, per thousand tokens as existing configurations have it."""
    prices = PriceBook.snapshot(overrides={MODEL: {"cost_per_1k_input": 0.5, "cost_per_1k_output": 2}})
    guard = new_guard(Budget("$10000/1d", per="caller"), storage=storage, prices=prices)
    assert (await ask(guarded(Provider(), guard))).status == 200
    (record,) = await storage.records()
    assert record.cost_nanousd == 10 * 500_000 + 5 * 2_000_000


async def test_provider_budgets(storage: Storage, clock: FrozenClock) -> None:
    """B1, B2, B3, B4: budgets as existing files have them filter deployments, list what is spent, and start anew."""
    policy = ProviderBudget({"openai": {"budget_limit": 0.01, "time_period": "1d"}, "anthropic": "$0/1d"}, status=429)
    guard = new_guard(policy, storage=storage, clock=clock, disclose="all", max_overage=None)
    deployments = [{"model": "openai/gpt-4o"}, {"model": "anthropic/claude-sonnet-4-5"}, {"model": "who/knows"}]
    assert await guard.filter(deployments) == [deployments[0], deployments[2]]
    assert await guard.filter([]) == []

    async with guard.open(ALICE), guard.call(**BOUND) as made:
        made.record(Usage(input_tokens=10_000_000, output_tokens=0))
    assert await guard.filter(deployments) == [deployments[2]]
    with pytest.raises(LimitExceeded) as caught:
        await guard.filter(deployments[:2])
    lines = " ".join((caught.value.denied.message, *caught.value.denied.details))
    assert "openai" in lines
    assert "anthropic" in lines
    clock.advance(seconds=24 * 3600)
    assert await guard.filter(deployments[0]) == [deployments[0]]
