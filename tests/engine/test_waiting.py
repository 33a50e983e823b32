"""Holds of others: a call waits for them, for a while, and a sequential agent never meets its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextvars import Context as TaskContext
from contextvars import copy_context
from typing import Any

import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Budget, Context, Guard, LimitExceeded, Usage

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CONTEXT = Context(caller="acme")


def beside(siblings: TaskContext, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run `call` beside the calls that were entered since `siblings` was copied, not inside them."""
    return asyncio.get_running_loop().create_task(call, context=siblings)


async def waiting_calls(guard: Guard, number: int) -> None:
    for _ in range(10_000):
        if guard.engine.waiting == number:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"{guard.engine.waiting} calls wait, not {number}")


async def test_call_waits_for_the_hold_of_another(new_guard: NewGuard) -> None:
    """A call that only another call's hold stands in the way of is admitted as soon as that one settles for less."""
    guard = new_guard(Budget("$0.001/1d"), hold_wait_s=30)
    async with guard.open(CONTEXT):
        siblings = copy_context()
        first = guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=0)
        held = await first.__aenter__()
        waiting = beside(siblings, guard.call(model=MODEL, input_tokens=500, max_output_tokens=0).__aenter__())
        await waiting_calls(guard, 1)
        held.record(Usage(input_tokens=100, output_tokens=0))
        await first.__aexit__(None, None, None)
        second = await asyncio.wait_for(waiting, 60)
        second.release()
        await second.end()


async def test_forked_child_has_none_of_those_who_wait(new_guard: NewGuard) -> None:
    """In a forked process nobody waits yet: those of its parent take no place in its queue, and are not woken by it."""
    guard = new_guard(Budget("$0.001/1d"), hold_wait_s=30)
    read, write = os.pipe()
    async with guard.open(CONTEXT):
        siblings = copy_context()
        async with guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=0) as held:
            waiting = beside(siblings, guard.call(model=MODEL, input_tokens=500, max_output_tokens=0).__aenter__())
            await waiting_calls(guard, 1)
            child = os.fork()
            if child == 0:
                os.write(write, str(guard.engine.waiting).encode())
                os._exit(0)
            held.record(Usage(input_tokens=100, output_tokens=0))
        second = await asyncio.wait_for(waiting, 60)
        await second.end()
    await asyncio.to_thread(os.waitpid, child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "0"


async def test_refusal_after_the_wait_says_that_others_hold(new_guard: NewGuard) -> None:
    """After `hold_wait_s` the refusal says `held_by_others`, with a short Retry-After."""
    guard = new_guard(Budget("$0.001/1d"), hold_wait_s=0.02)
    async with guard.open(CONTEXT):
        siblings = copy_context()
        async with guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=0):
            with pytest.raises(LimitExceeded) as caught:
                await beside(siblings, guard.call(model=MODEL, input_tokens=500, max_output_tokens=0).__aenter__())
    denied = caught.value.denied
    assert (denied.code, denied.status, denied.retry) == ("held_by_others", 429, True)
    assert denied.retry_after_s is not None
    assert denied.retry_after_s <= 2


async def test_spent_budget_is_refused_without_waiting(new_guard: NewGuard) -> None:
    """A budget that is spent, and not merely held, is refused at once."""
    guard = new_guard(Budget("$0.001/1d"), hold_wait_s=30)
    async with guard.open(CONTEXT):
        async with guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=0) as call:
            call.record(Usage(input_tokens=1_000, output_tokens=0))
        with pytest.raises(LimitExceeded) as caught:
            await asyncio.wait_for(guard.call(model=MODEL, input_tokens=1, max_output_tokens=0).__aenter__(), 10)
    assert caught.value.denied.code == "budget_exhausted"


async def test_queue_of_waiting_calls_is_bounded(new_guard: NewGuard) -> None:
    """No more than `max_waiting` calls wait; the next one is refused at once."""
    guard = new_guard(Budget("$0.001/1d"), hold_wait_s=30, max_waiting=1)
    async with guard.open(CONTEXT):
        siblings = copy_context()
        async with guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=0) as call:
            waiting = beside(siblings, guard.call(model=MODEL, input_tokens=500, max_output_tokens=0).__aenter__())
            await waiting_calls(guard, 1)
            more = guard.call(model=MODEL, input_tokens=500, max_output_tokens=0)
            with pytest.raises(LimitExceeded):
                await asyncio.wait_for(beside(siblings.copy(), more.__aenter__()), 10)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            call.release()
    assert guard.engine.waiting == 0
    assert await guard.storage.open_holds() == 0


async def test_sequential_agent_is_never_refused_on_its_own_hold(new_guard: NewGuard) -> None:
    """Each call of a loop finds the one before it settled, although nobody waited for that: no wait is needed."""
    guard = new_guard(Budget("$0.002/1d"), hold_wait_s=0)
    async with guard.open(CONTEXT):
        for _ in range(20):
            async with guard.call(model=MODEL, input_tokens=1_500, max_output_tokens=0) as call:
                call.record(Usage(input_tokens=10, output_tokens=0))
    assert len(await guard.storage.records()) == 20


async def test_cancelled_admission_holds_nothing(new_guard: NewGuard) -> None:
    """A caller that goes away while it waits leaves neither a hold nor a place in the queue."""
    guard = new_guard(Budget("$0.001/1d"), hold_wait_s=30)
    async with guard.open(CONTEXT):
        siblings = copy_context()
        async with guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=0) as call:
            blocks = [guard.call(model=MODEL, input_tokens=500, max_output_tokens=0) for _ in range(5)]
            waiting = [beside(siblings.copy(), block.__aenter__()) for block in blocks]
            await waiting_calls(guard, 5)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            call.record(Usage(input_tokens=1, output_tokens=0))
    assert guard.engine.waiting == 0
    assert await guard.storage.open_holds() == 0
