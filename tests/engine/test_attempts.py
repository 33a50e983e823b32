"""Attempts: what the repeated requests of one call share, and what each of them holds for itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import NewGuard
from tests.storage.conftest import FACTORIES

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    Guard,
    Iterations,
    LimitExceeded,
    ModelAllow,
    ProviderBudget,
    RateLimit,
    Usage,
)
from asgi_llm_guard.admission import ActiveCall, enter, leave
from asgi_llm_guard.attempts import MOST_ATTEMPTS, Turns
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ContextError
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import FrozenClock, Gate
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

CONTEXT = Context(caller="acme", user="ann", session="s")
HELD = 100 * 1_000 + 50 * 2_000
USED = Usage(input_tokens=10, output_tokens=5)
COST = 20_000
KEY = b"digest of method, URL and body"
ERROR = {"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}}
PRICES = PriceBook.snapshot(
    overrides={
        "openai/test-model": {"input": 1, "output": 2},
        "openai/dear-model": {"input": 10, "output": 20},
        "anthropic/other-model": {"input": 2, "output": 4},
    }
)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = FACTORIES[request.param](tmp_path)(clock)
    yield made
    await made.aclose()


@pytest.fixture
def guard(new_guard: NewGuard) -> Guard:
    return guarded(new_guard)


def guarded(new_guard: NewGuard, *policies: Any, **options: Any) -> Guard:
    policies = policies or (
        Iterations(9),
        Budget("$1/1d"),
        RateLimit("100/minute", counts="calls"),
        Concurrency(1, counts="calls"),
    )
    return new_guard(*policies, **{"prices": PRICES, "hold_wait_s": 0, **options})


def described(guard: Guard, model: str = "openai/test-model") -> Call:
    return guard.describe(model, input_tokens=100, max_output_tokens=50)


async def claimed(guard: Guard, call: ActiveCall | None = None) -> ActiveCall:
    """A call, or another attempt, that was granted and is on its way."""
    call = call or new_call(guard.engine, described(guard), ())
    await call.claim()
    call.dispatched()
    return call


async def failing(guard: Guard, call: ActiveCall | None = None) -> ActiveCall:
    """One whose provider answers an error."""
    call = await claimed(guard, call)
    call.record(ERROR)
    call.end()
    return call


async def used(guard: Guard, model: str = "openai/test-model") -> dict[str, tuple[int, int]]:
    """What is used and held of each policy's meter."""
    meters = {
        policy.name: claim.meter
        for policy in guard.policies
        for claim in policy.plan(CONTEXT, described(guard, model), guard.clock.now_ms()).claims
    }
    readings = await guard.storage.read(list(meters.values()))
    return {name: (reading.used, reading.held) for name, reading in zip(meters, readings, strict=True)}


async def records(guard: Guard) -> list[UsageRecord]:
    return sorted(await guard.storage.records(), key=lambda record: record.attempt)


async def test_iteration_is_the_calls_and_money_each_attempts(guard: Guard) -> None:
    """A1: a call that took three attempts is one iteration and one of each rate; what was billed, it pays."""
    async with guard.open(CONTEXT) as admission:
        first = await failing(guard)
        second = await claimed(guard, first.attempt())
        assert (await used(guard))["iterations"] == (1, 0)
        second.record(Usage(input_tokens=100, output_tokens=1))
        second.end(RuntimeError())
        third = await claimed(guard, second.attempt())
        third.record(USED)
        third.end()
        await admission.close()
    state = await used(guard)
    assert state["iterations"] == (1, 0)
    assert state["user_rate"] == (1, 0)
    assert state["user_concurrency"] == (0, 0)
    assert state["user_budget"] == (102_000 + COST, 0)
    one, two, three = await records(guard)
    assert first.hold is not None
    assert [(r.attempt_of, r.attempt, r.outcome, r.cost_nanousd) for r in (one, two, three)] == [
        (None, 1, "provider_error", 0),
        (first.hold.call_id, 2, "measured", 102_000),
        (first.hold.call_id, 3, "measured", COST),
    ]


async def test_refused_attempt_leaves_the_iteration_to_the_next(new_guard: NewGuard, clock: FrozenClock) -> None:
    """A1: an attempt that was refused before it was sent took no iteration: the next one that is granted takes it."""
    guard = guarded(new_guard, Iterations(9), RateLimit("1/minute", counts="calls"))
    async with guard.open(CONTEXT):
        (await failing(guard)).end()
        refused = new_call(guard.engine, described(guard), ())
        with pytest.raises(LimitExceeded):
            await refused.claim()
        assert refused.failed
        again = refused.attempt()
        with pytest.raises(LimitExceeded):
            await again.claim()
        assert (await used(guard))["iterations"] == (1, 0)
        clock.advance(ms=121_000)
        third = await claimed(guard, again.attempt())
        assert (await used(guard))["iterations"] == (1, 1)
        third.record(USED)
        third.end()
    assert (await used(guard))["iterations"] == (2, 0)
    assert [(r.attempt_of, r.attempt) for r in await records(guard)] == [(None, 1), (None, 1)]


async def test_unsent_attempt_leaves_the_iteration_to_the_next(guard: Guard) -> None:
    """A1: an attempt that was never sent gave its iteration back: the next one takes it again, and it is one."""
    async with guard.open(CONTEXT):
        first = await claimed(guard)
        first.release()
        first.end()
        assert (await used(guard))["iterations"] == (0, 0)
        second = await failing(guard, first.attempt())
        third = await claimed(guard, second.attempt())
        third.record(USED)
        third.end()
    state = await used(guard)
    assert (state["iterations"], state["user_budget"]) == ((1, 0), (COST, 0))
    one, two = await records(guard)
    assert (one.attempt_of, one.attempt, two.attempt_of, two.attempt) == (None, 1, one.call_id, 2)


@pytest.mark.parametrize("later", ["sent", "not sent"])
async def test_unsent_attempt_keeps_the_iteration_for_one_that_shares_it(guard: Guard, later: str) -> None:
    """A1: while another attempt shares an iteration, it is given back only if that one was not sent either."""
    async with guard.open(CONTEXT):
        first = await claimed(guard)
        second = await claimed(guard, first.attempt())
        first.release()
        first.end()
        assert (await used(guard))["iterations"] == (0, 1)
        if later == "sent":
            second.record(USED)
        else:
            second.release()
        second.end()
    state = await used(guard)
    assert state["iterations"] == ((1, 0) if later == "sent" else (0, 0))
    assert state["user_rate"][0] == (1 if later == "sent" else 0)
    assert state["user_budget"] == (COST if later == "sent" else 0, 0)
    assert await guard.storage.open_holds() == 0


async def test_iteration_stays_if_the_one_that_shared_it_ended_before(guard: Guard) -> None:
    """A1: an attempt that ends unsent after one that was sent and shared its iteration does not give it back."""
    async with guard.open(CONTEXT):
        first = await claimed(guard)
        second = await claimed(guard, first.attempt())
        second.record(USED)
        second.end()
        first.release()
        first.end()
    state = await used(guard)
    assert (state["iterations"], state["user_budget"]) == ((1, 0), (COST, 0))


async def test_call_has_one_slot_at_a_time(guard: Guard) -> None:
    """Two attempts at the same time need one slot, which is free when both have ended, whichever ends first."""
    async with guard.open(CONTEXT):
        first = await claimed(guard)
        second = await claimed(guard, first.attempt())
        assert (await used(guard))["user_concurrency"] == (0, 1)
        first.record(USED)
        first.end()
        assert (await used(guard))["user_concurrency"] == (0, 1)
        with pytest.raises(LimitExceeded):
            await new_call(guard.engine, described(guard), ()).claim()
        second.record(USED)
        second.end()
        assert (await used(guard))["user_concurrency"] == (0, 0)
    state = await used(guard)
    assert (state["iterations"], state["user_budget"]) == ((1, 0), (2 * COST, 0))
    assert [(r.attempt, r.cost_nanousd) for r in await records(guard)] == [(1, COST), (2, COST)]


async def test_slot_that_was_given_back_is_taken_anew(guard: Guard) -> None:
    """An attempt that begins after the one before it has ended needs a slot like any call."""
    async with guard.open(CONTEXT):
        first = await failing(guard)
        other = await claimed(guard)
        with pytest.raises(LimitExceeded) as refused:
            await first.attempt().claim()
        assert refused.value.denied.policy == "user_concurrency"
        other.end()
        again = await claimed(guard, first.attempt())
        assert (await used(guard))["user_concurrency"] == (0, 1)
        again.end()
    assert (await used(guard))["iterations"] == (2, 0)


async def test_fallback_claims_by_its_own_model(new_guard: NewGuard) -> None:
    """C2: an attempt on another model is admitted by that model: its price, its provider's budget, the allow-list."""
    guard = guarded(
        new_guard,
        ModelAllow(["openai/*", "anthropic/*"]),
        Iterations(9),
        Budget("$0.0005/1d"),
        ProviderBudget({"openai": "$1/1d", "anthropic": "$0.0003/1d"}),
    )
    async with guard.open(CONTEXT):
        first = await failing(guard)
        with pytest.raises(LimitExceeded) as dear:
            await first.attempt(described(guard, "openai/dear-model")).claim()
        with pytest.raises(LimitExceeded) as other:
            await first.attempt(described(guard, "anthropic/other-model")).claim()
        with pytest.raises(LimitExceeded) as forbidden:
            await first.attempt(guard.describe("mistral/none", input_tokens=1, max_output_tokens=1)).claim()
        again = await claimed(guard, first.attempt())
        again.record(USED)
        again.end()
    assert dear.value.denied.policy == "user_budget"
    assert other.value.denied.policy == "provider_budget"
    assert forbidden.value.denied.code == "model_not_allowed"
    state = await used(guard)
    assert (state["iterations"], state["user_budget"]) == ((1, 0), (COST, 0))


async def test_amend_holds_for_the_model_that_is_called(guard: Guard) -> None:
    """C2: a call whose model changes before it is sent holds, and is priced, by the new one."""
    async with guard.open(CONTEXT):
        call = new_call(guard.engine, described(guard), ())
        await call.claim()
        await call.amend(described(guard, "openai/dear-model"))
        assert (await used(guard))["user_budget"] == (0, 10 * HELD)
        assert (await used(guard))["iterations"] == (0, 1)
        call.record(USED)
        call.end()
    assert (await used(guard))["user_budget"] == (10 * COST, 0)
    (record,) = await records(guard)
    assert (record.model, record.estimate_nanousd) == ("dear-model", 10 * HELD)


async def test_refused_amend_changes_nothing(new_guard: NewGuard) -> None:
    """C2: where the other model does not fit, the call holds what it held, and may be sent as it was."""
    guard = guarded(new_guard, Iterations(9), Budget("$0.0003/1d"))
    async with guard.open(CONTEXT):
        call = new_call(guard.engine, described(guard), ())
        await call.claim()
        with pytest.raises(LimitExceeded):
            await call.amend(described(guard, "openai/dear-model"))
        assert (await used(guard))["user_budget"] == (0, HELD)
        call.record(USED)
        call.end()
    assert (await used(guard))["user_budget"] == (COST, 0)
    (record,) = await records(guard)
    assert record.model == "test-model"


async def test_ended_calls_are_not_amended(guard: Guard) -> None:
    """What has ended cannot be changed, and says so; nor can what never was claimed be repeated."""
    async with guard.open(CONTEXT):
        call = await failing(guard)
        with pytest.raises(ContextError, match="not open"):
            await call.amend(described(guard))
        with pytest.raises(ContextError, match="claimed nothing"):
            new_call(guard.engine, described(guard), ()).attempt()


async def test_attempt_reported_twice_is_charged_once(guard: Guard) -> None:
    """Conformance 65: an attempt that two hooks report, to one call or to two, is charged once."""
    async with guard.open(CONTEXT):
        call = await claimed(guard)
        call.record(USED, attempt_id="chatcmpl-1")
        call.record(USED, attempt_id="chatcmpl-1")
        call.end()
        late = await claimed(guard)
        late.record(USED, attempt_id="chatcmpl-1")
        late.end()
        other = await claimed(guard)
        other.record(USED, attempt_id="chatcmpl-2")
        other.end()
    state = await used(guard)
    assert (state["iterations"], state["user_budget"]) == ((2, 0), (2 * COST, 0))
    assert len(await records(guard)) == 2


async def test_report_to_an_outer_call_does_not_hide_the_inner_one(guard: Guard) -> None:
    """An adopted call has nothing to settle: what is reported to it first leaves the report to the inner one valid."""
    async with (
        guard.open(CONTEXT),
        guard.call(model="openai/test-model", input_tokens=100, max_output_tokens=50) as outer,
    ):
        inner = new_call(guard.engine, described(guard), ())
        await inner.claim()
        outer.record(USED, attempt_id="chatcmpl-1")
        inner.record(USED, attempt_id="chatcmpl-1")
        inner.end()
    assert (await used(guard))["user_budget"] == (COST, 0)


async def test_only_a_failed_request_is_repeated_and_once(guard: Guard, clock: FrozenClock) -> None:
    """A request is another attempt after an equal one that failed at most ten minutes ago, for one that repeats it."""
    async with guard.open(CONTEXT) as admission:
        attempts = admission.attempts
        assert attempts.find(KEY) is None
        first = await failing(guard)
        attempts.note(KEY, first)
        assert attempts.find(b"another") is None
        assert attempts.find(KEY) is first
        assert attempts.find(KEY) is None
        good = await claimed(guard)
        good.record(USED)
        good.end()
        attempts.note(KEY, good)
        assert attempts.find(KEY) is None
        attempts.note(KEY, first)
        clock.advance(ms=600_001)
        assert attempts.find(KEY) is None


async def test_two_equal_requests_at_once_are_two_calls(new_guard: NewGuard) -> None:
    """Requests that are equal and concurrent are calls of their own, and so are their repetitions."""
    guard = guarded(new_guard, Iterations(9), Budget("$1/1d"))
    async with guard.open(CONTEXT) as admission:

        async def request() -> None:
            before = admission.attempts.find(KEY)
            call = await claimed(guard, before.attempt() if before is not None else None)
            await asyncio.sleep(0)
            call.record(ERROR)
            call.end()
            admission.attempts.note(KEY, call)

        for _ in range(3):
            await asyncio.gather(request(), request())
    assert (await used(guard))["iterations"] == (2, 0)
    made = await records(guard)
    assert sorted(record.attempt for record in made) == [1, 1, 2, 2, 3, 3]
    assert len({record.attempt_of for record in made} - {None}) == 2


async def test_attempts_at_once_take_one_iteration(new_guard: NewGuard) -> None:
    """A1: attempts of one call that are claimed at the same time take one iteration between them, though one is left."""
    guard = guarded(new_guard, Iterations(2), Budget("$1/1d"))
    async with guard.open(CONTEXT):
        (await failing(guard)).end()
        first = await claimed(guard)
        first.release()
        first.end()
        many = await asyncio.gather(*[claimed(guard, first.attempt()) for _ in range(5)])
        assert (await used(guard))["iterations"] == (1, 1)
        assert (await used(guard))["user_budget"] == (0, 5 * HELD)
        for call in many:
            call.record(USED)
            call.end()
    assert (await used(guard))["iterations"] == (2, 0)
    assert (await used(guard))["user_budget"] == (5 * COST, 0)


async def test_attempt_of_an_adopted_call_is_of_the_inner_one(guard: Guard) -> None:
    """A router's retry around a client's request shares with it what is the call's, and its hold is adopted again."""
    async with guard.open(CONTEXT):
        router = new_call(guard.engine, described(guard), ())
        await router.claim()
        token = enter(router)
        sent = await failing(guard)
        retried = await failing(guard, sent.attempt())
        leave(token)
        router.end()
        again = router.attempt()
        await again.claim()
        token = enter(again)
        last = await claimed(guard, retried.attempt())
        leave(token)
        last.record(USED)
        last.end()
        again.end()
    state = await used(guard)
    assert (state["iterations"], state["user_budget"], state["user_rate"]) == ((1, 0), (COST, 0), (1, 0))
    assert [record.attempt for record in await records(guard)] == [1, 2, 3]


async def test_cancelled_attempts_leave_nothing(guard: Guard) -> None:
    """An attempt that is cancelled while it waits for its turn has claimed nothing, and lets the next one through."""
    async with guard.open(CONTEXT):
        first = await failing(guard)
        siblings = first.attempt().siblings
        assert siblings is not None
        async with siblings.turns.take():
            waiting = [asyncio.create_task(first.attempt().claim()) for _ in range(2)]
            await asyncio.sleep(0)
            waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await waiting[1]
        assert await guard.storage.open_holds() == 1


async def test_endless_repetition_is_not_one_call(guard: Guard) -> None:
    """A1: a loop that repeats a request which always fails is counted again: no loop hides among attempts of one call."""
    async with guard.open(CONTEXT) as admission:
        for _ in range(2 * MOST_ATTEMPTS + 1):
            before = admission.attempts.find(KEY)
            call = await failing(guard, before.attempt() if before is not None else None)
            admission.attempts.note(KEY, call)
    assert (await used(guard))["iterations"] == (3, 0)


async def test_what_is_remembered_is_bounded(new_guard: NewGuard) -> None:
    """However many requests fail and are reported in one admission, the last thousand are remembered."""
    guard = guarded(new_guard, Budget("$1/1d"))
    async with guard.open(CONTEXT) as admission:
        call = await failing(guard)
        attempts = admission.attempts
        for number in range(1_500):
            attempts.note(b"%d" % number, call)
            assert attempts.reported(f"id-{number}", "call") is None
        found = [number for number in range(1_500) if attempts.find(b"%d" % number) is not None]
        assert found == list(range(500, 1_500))
        assert attempts.reported("id-1499", "other") == "call"
        assert attempts.reported("id-0", "other") is None


async def test_ledger_tells_what_failed_and_by_whom(guard: Guard) -> None:
    """Conformance 70: a failed attempt is in the ledger at cost 0 with its caller, a broken stream with what it cost;
    nothing that a client sends along changes what the guard writes."""
    async with guard.open(CONTEXT):
        first = await failing(guard)
        second = await claimed(guard, first.attempt())
        second.record_chunk(
            {
                "object": "chat.completion.chunk",
                "model": "test-model",
                "metadata": {"caller": "mallory", "cost_nanousd": 0, "attempt": 7},
                "choices": [{"index": 0, "delta": {"content": "four"}, "finish_reason": None}],
            }
        )
        second.end(ConnectionResetError())
    one, two = await records(guard)
    assert (one.outcome, one.cost_nanousd, one.tokens, one.attempt) == ("provider_error", 0, 0, 1)
    assert (two.outcome, two.cost_nanousd, two.attempt) == ("estimated", 100 * 1_000 + 4 * 2_000, 2)
    assert {(record.caller, record.user, record.session) for record in (one, two)} == {("acme", "ann", "s")}
    assert (await used(guard))["user_budget"] == (108_000, 0)


async def test_turns_are_taken_in_order() -> None:
    """One after the other, in the order in which they came, also when one in between gives up."""
    turns, gate = Turns(), Gate()
    seen: list[int] = []

    async def work(number: int) -> None:
        async with turns.take():
            await gate.step()
            seen.append(number)

    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(work(number)))
        await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.sleep(0)
    gate.release()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert seen == [0, 1, 3]


@pytest.mark.parametrize("seed", range(8))
async def test_any_interleaving_counts_one_iteration(new_guard: NewGuard, seed: int) -> None:
    """A1: whatever the order in which attempts begin and end, sent or not: one iteration if any was sent, else none."""
    guard = guarded(new_guard, Iterations(50), Concurrency(50, counts="calls"), Budget("$1/1d"))
    chance = random.Random(seed)
    spent = iterations = 0
    async with guard.open(CONTEXT):
        for _ in range(5):
            first = await claimed(guard)
            running, sent = [first], False
            last = first
            for _ in range(chance.randint(0, 8)):
                if running and chance.random() < 0.5:
                    ending = running.pop(chance.randrange(len(running)))
                    if chance.random() < 0.5:
                        ending.record(USED)
                        spent, sent = spent + COST, True
                    else:
                        ending.release()
                    ending.end()
                else:
                    last = await claimed(guard, chance.choice([first, last]).attempt())
                    running.append(last)
                assert (await used(guard))["user_concurrency"] == (0, 1 if running else 0)
            for ending in running:
                ending.record(USED)
                spent, sent = spent + COST, True
                ending.end()
            iterations += sent
    state = await used(guard)
    assert state == {"iterations": (iterations, 0), "user_concurrency": (0, 0), "user_budget": (spent, 0)}
    assert await guard.storage.open_holds() == 0
