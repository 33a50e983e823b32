"""Holds that are changed while something else happens: the call ends, answers are lost, the hold expires."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, ProviderBudget, Usage
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.claims import Bundle, Ended, Granted, Refused
from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, Gate, OutageStorage

pytestmark = pytest.mark.anyio

PRICES = PriceBook.snapshot(
    overrides={name: {"input": 1, "output": 2} for name in ("openai/test-model", "anthropic/other-model")}
)
CONTEXT = Context(caller="acme", session="s")
COST = 20_000
HELD = 200_000
USED = Usage(input_tokens=10, output_tokens=5)


class Slow(MemoryStorage):
    """Changes holds, or answers that it has, only when the gate lets it."""

    def __init__(self, clock: FrozenClock, *, answers_late: bool) -> None:
        super().__init__(clock=clock)
        self.gate = Gate()
        self.answers_late = answers_late

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        if not self.answers_late:
            await self.gate.step()
        answer = await super().amend(owner, bundle)
        if self.answers_late:
            await self.gate.step()
        return answer


def guarded(storage: Any, clock: FrozenClock, **options: Any) -> Guard:
    policies = (ProviderBudget({"anthropic": "$1/1d"}, name="first"), Iterations(9), Budget("$1/1d"))
    return Guard(policies, storage=storage, clock=clock, prices=PRICES, hold_wait_s=0, **options)


async def opened(guard: Guard) -> ActiveCall:
    call = new_call(guard.engine, guard.describe("openai/test-model", input_tokens=100, max_output_tokens=50), ())
    await call.claim()
    return call


def longer(guard: Guard) -> Any:
    """Another call, which also claims on the budget of its provider, before everything else."""
    return guard.describe("anthropic/other-model", input_tokens=100, max_output_tokens=500)


async def money(guard: Guard) -> list[tuple[int, int]]:
    call = guard.describe("openai/test-model", input_tokens=1, max_output_tokens=1)
    claims = [claim for policy in guard.policies for claim in policy.plan(CONTEXT, call, guard.clock.now_ms()).claims]
    return [(each.used, each.held) for each in await guard.storage.read([claim.meter for claim in claims])]


@pytest.mark.parametrize("answers_late", [False, True])
async def test_call_ends_while_it_is_amended(clock: FrozenClock, *, answers_late: bool) -> None:
    """A call that ends while its hold is being changed is charged what it used, once, whichever comes first."""
    storage = Slow(clock, answers_late=answers_late)
    guard = guarded(storage, clock)
    async with guard.open(CONTEXT):
        call = await opened(guard)
        changing = asyncio.create_task(call.amend(longer(guard)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.record(USED)
        call.end()
        assert await money(guard) == [(1, 0), (COST, 0)]
        storage.gate.release()
        await asyncio.gather(changing, return_exceptions=True)
    assert await money(guard) == [(1, 0), (COST, 0)]
    assert await storage.open_holds() == 0


async def test_amendments_come_one_after_the_other(clock: FrozenClock) -> None:
    """Two changes of one hold at once are made in order; the last one is what is held."""
    storage = Slow(clock, answers_late=True)
    guard = guarded(storage, clock)
    storage.gate.release()
    async with guard.open(CONTEXT):
        call = await opened(guard)
        shorter = guard.describe("openai/test-model", input_tokens=100, max_output_tokens=10)
        await asyncio.gather(call.amend(longer(guard)), call.amend(shorter))
        assert await money(guard) == [(0, 1), (0, 120_000)]
        call.record(USED)
        call.end()
    assert await money(guard) == [(1, 0), (COST, 0)]


async def test_answer_to_an_amendment_is_lost(clock: FrozenClock) -> None:
    """Where nobody knows whether a hold was changed, the change is refused, and the call charged what it used."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = guarded(storage, clock)
    async with guard.open(CONTEXT):
        call = await opened(guard)
        storage.lose_replies()
        with pytest.raises(LimitExceeded) as refused:
            await call.amend(longer(guard))
        assert refused.value.denied.code == "guard_unavailable"
        storage.up()
        call.record(USED)
        call.end()
    await guard.heartbeat()
    assert await money(guard) == [(1, 0), (COST, 0)]
    assert await storage.open_holds() == 0


async def test_cancelled_amendment(clock: FrozenClock) -> None:
    """A change that is cancelled on its way leaves a call that goes on, and is charged what it used."""
    storage = Slow(clock, answers_late=True)
    guard = guarded(storage, clock)
    async with guard.open(CONTEXT):
        call = await opened(guard)
        changing = asyncio.create_task(call.amend(longer(guard)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        changing.cancel()
        await asyncio.gather(changing, return_exceptions=True)
        call.record(USED)
        call.end()
    assert await money(guard) == [(1, 0), (COST, 0)]
    assert await storage.open_holds() == 0


async def test_expired_holds_are_not_amended(clock: FrozenClock) -> None:
    """A hold that has expired is charged, and cannot be changed; what the call used is settled late, and not twice."""
    storage = MemoryStorage(clock=clock)
    guard, other = guarded(storage, clock), guarded(storage, clock)
    async with guard.open(CONTEXT):
        call = await opened(guard)
        clock.advance(seconds=16)
        await other.heartbeat()
        assert await money(guard) == [(1, 0), (HELD, 0)]
        with pytest.raises(ContextError, match="has expired"):
            await call.amend(longer(guard))
        call.record(USED)
        call.end()
    assert await money(guard) == [(1, 0), (HELD, 0)]
    (record,) = await storage.records()
    assert (record.late, record.cost_nanousd) == (True, COST)


@pytest.mark.parametrize("times", [0, -1, True, 1.5, "ten"])
def test_overage_is_a_number(times: Any) -> None:
    """What is believed at most is a whole number of times the hold."""
    with pytest.raises(ConfigurationError, match="max_overage: expected a whole number"):
        Guard(max_overage=times)
