"""Scopes nest: which call takes over which hold."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, LimitExceeded, RateLimit, Usage
from asgi_llm_guard.admission import Admission, enter, leave
from asgi_llm_guard.events import Event, Refused

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CONTEXT = Context(caller="acme", session="s")


async def opened(guard: Guard, *, described: bool = False) -> Admission:
    """A request's admission: one call claimed for it, as the middleware does where all calls are seen."""
    admission = guard.new_admission(CONTEXT, opaque=False)
    call = guard.describe(MODEL, input_tokens=100, max_output_tokens=50) if described else None
    denied = await admission.open(call)
    assert denied is None
    return admission


async def used(guard: Guard) -> list[tuple[str, int, int]]:
    """Policy, used and held of every counter that the policies claim for `CONTEXT`."""
    call = guard.describe(MODEL, input_tokens=1, max_output_tokens=1)
    claims = [c for p in guard.policies for c in p.plan(CONTEXT, call, guard.clock.now_ms()).claims]
    readings = await guard.storage.read([claim.meter for claim in claims])
    return [(c.meter.policy, r.used, r.held) for c, r in zip(claims, readings, strict=True)]


async def test_one_call_in_a_request_is_charged_once(new_guard: NewGuard) -> None:
    """A request that makes one call is charged one iteration: the call adopts what the request claimed."""
    guard = new_guard(Iterations(5), Budget("$1/1d"))
    admission = await opened(guard)
    token = enter(admission.scope)
    async with guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as call:
        assert await used(guard) == [("iterations", 0, 1), ("user_budget", 0, 200_000)]
        call.record(Usage(input_tokens=10, output_tokens=5))
    leave(token)
    await admission.end()

    assert await used(guard) == [("iterations", 1, 0), ("user_budget", 20_000, 0)]
    assert await guard.storage.open_holds() == 0


async def test_ten_calls_in_a_request_are_charged_ten_times(new_guard: NewGuard) -> None:
    """An agent loop that makes ten calls inside one request is charged ten iterations, and the eleventh is refused."""
    guard = new_guard(Iterations(10))
    admission = await opened(guard)
    token = enter(admission.scope)
    for _ in range(10):
        async with guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
            call.record(Usage(input_tokens=1, output_tokens=1))
    with pytest.raises(LimitExceeded, match="iterations"):
        await guard.call(model=MODEL, input_tokens=1, max_output_tokens=1).__aenter__()
    leave(token)
    await admission.end()

    assert await used(guard) == [("iterations", 10, 0)]


async def test_exactly_one_of_concurrent_calls_adopts(new_guard: NewGuard) -> None:
    """Of twenty concurrent calls under one request one adopts its hold and nineteen claim their own."""
    guard = new_guard(Iterations(100))
    admission = await opened(guard)
    token = enter(admission.scope)
    entered = asyncio.Barrier(20)

    async def one() -> str:
        async with guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
            await entered.wait()
            call.record(Usage(input_tokens=1, output_tokens=1))
            assert call.hold is not None
            return call.hold.call_id

    ids = await asyncio.gather(*(one() for _ in range(20)))
    leave(token)
    await admission.end()

    assert len(set(ids)) == 20
    assert await used(guard) == [("iterations", 20, 0)]


async def test_exactly_one_of_concurrent_threads_adopts(new_guard: NewGuard) -> None:
    """The same holds for synchronous calls in worker threads."""
    guard = new_guard(Iterations(100))
    admission = await opened(guard)
    token = enter(admission.scope)
    entered = threading.Barrier(8)

    def one() -> str:
        with guard.call_sync(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
            entered.wait(60)
            call.record(Usage(input_tokens=1, output_tokens=1))
            assert call.hold is not None
            return call.hold.call_id

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(8) as pool:
        ids = await asyncio.gather(*(loop.run_in_executor(pool, copy_context().run, one) for _ in range(8)))
    leave(token)
    await admission.end()

    assert len(set(ids)) == 8
    assert await used(guard) == [("iterations", 8, 0)]


async def test_nested_scopes_never_double_charge(new_guard: NewGuard) -> None:
    """Request, outer call and inner call are one call: the innermost settles, what the outer one records is superseded."""
    guard = new_guard(Iterations(5), Budget("$1/1d"))
    admission = await opened(guard, described=True)
    token = enter(admission.scope)
    async with guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as outer:
        async with guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as inner:
            inner.record(Usage(input_tokens=10, output_tokens=5))
        outer.record(Usage(input_tokens=1_000, output_tokens=1_000))
    leave(token)
    await admission.end()

    assert await used(guard) == [("iterations", 1, 0), ("user_budget", 20_000, 0)]
    assert [record.cost_nanousd for record in await guard.storage.records()] == [20_000]


async def test_refused_adoption_leaves_the_request_as_it_was(new_guard: NewGuard) -> None:
    """A call that does not fit inside a request is refused, and the request's own hold stays for the next one."""
    guard = new_guard(Iterations(5), Budget("$0.001/1d"))
    admission = await opened(guard)
    token = enter(admission.scope)
    with pytest.raises(LimitExceeded) as caught:
        await guard.call(model=MODEL, input_tokens=1_000_000, max_output_tokens=1).__aenter__()
    assert caught.value.denied.policy == "user_budget"
    assert await used(guard) == [("iterations", 0, 1), ("user_budget", 0, 0)]
    async with guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as call:
        call.record(Usage(input_tokens=10, output_tokens=5))
    leave(token)
    await admission.end()

    assert await used(guard) == [("iterations", 1, 0), ("user_budget", 20_000, 0)]


async def test_interrupted_while_a_refused_adoption_is_told(new_guard: NewGuard) -> None:
    """A call that is interrupted while observers are told that it was refused leaves the request its hold, as any other
    refused call."""

    def interrupt(event: Event) -> None:
        if isinstance(event, Refused):
            raise asyncio.CancelledError

    guard = new_guard(Iterations(5), Budget("$0.001/1d"), observers=[interrupt])
    admission = await opened(guard)
    token = enter(admission.scope)
    with pytest.raises(asyncio.CancelledError):
        await guard.call(model=MODEL, input_tokens=1_000_000, max_output_tokens=1).__aenter__()
    async with guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as call:
        call.record(Usage(input_tokens=10, output_tokens=5))
    leave(token)
    await admission.end()

    assert await used(guard) == [("iterations", 1, 0), ("user_budget", 20_000, 0)]
    assert await guard.storage.open_holds() == 0


async def test_request_whose_only_call_was_refused_is_charged_nothing(new_guard: NewGuard) -> None:
    """When the one call in a request is refused, the iteration that the request held is given back."""
    guard = new_guard(Iterations(5), Budget("$0.001/1d"))
    admission = await opened(guard)
    admission.opaque = True
    token = enter(admission.scope)
    with pytest.raises(LimitExceeded):
        await guard.call(model=MODEL, input_tokens=1_000_000, max_output_tokens=1).__aenter__()
    leave(token)
    admission.refusal_answered()
    await admission.end()

    assert await used(guard) == [("iterations", 0, 0), ("user_budget", 0, 0)]
    assert await guard.storage.records() == []


@pytest.mark.parametrize(("status", "charged"), [(200, 1), (429, 0), (503, 0)])
async def test_refusal_that_the_application_handles(new_guard: NewGuard, status: int, charged: int) -> None:
    """On an opaque route, an answer of success after a refused call may rest on one that nobody saw: the request is
    charged what it holds. An answer of failure is the refusal, in the application's words."""
    guard = new_guard(Iterations(5), Budget("$0.001/1d"))
    admission = await opened(guard)
    admission.opaque = True
    token = enter(admission.scope)
    with pytest.raises(LimitExceeded):
        await guard.call(model=MODEL, input_tokens=1_000_000, max_output_tokens=1).__aenter__()
    leave(token)
    await admission.end(status=status)

    assert await used(guard) == [("iterations", charged, 0), ("user_budget", 0, 0)]


@pytest.mark.parametrize("opaque", [True, False], ids=["opaque", "hooked"])
async def test_call_cancelled_while_it_adopts(new_guard: NewGuard, *, opaque: bool) -> None:
    """A call that is cancelled while it takes over a hold leaves nothing held, and does not make the request free."""
    guard = new_guard(Iterations(5), Budget("$0.0003/1d"), hold_wait_s=30)
    admission = await opened(guard, described=True)
    admission.opaque = opaque
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=50, max_output_tokens=0) as other:
        other.release()
        token = enter(admission.scope)
        waiting = asyncio.ensure_future(guard.call(model=MODEL, input_tokens=300, max_output_tokens=0).__aenter__())
        leave(token)
        for _ in range(10_000):
            if guard.engine.waiting:
                break
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await admission.end(status=200)

    assert await used(guard) == [("iterations", int(opaque), 0), ("user_budget", 200_000 * opaque, 0)]
    assert await guard.storage.open_holds() == 0


async def test_block_left_while_its_hold_is_lent(new_guard: NewGuard) -> None:
    """A block that is left while a call inside it asks for its hold settles when that one is refused: nothing leaks."""
    guard = new_guard(Iterations(5), Budget("$0.0003/1d"), hold_wait_s=0.05)
    async with guard.open(CONTEXT):
        outer = guard.call(model=MODEL, input_tokens=200, max_output_tokens=0)
        async with guard.call(model=MODEL, input_tokens=50, max_output_tokens=0) as other:
            other.dispatched()
            call = await outer.__aenter__()
            inner = asyncio.ensure_future(guard.call(model=MODEL, input_tokens=300, max_output_tokens=0).__aenter__())
            for _ in range(10_000):
                if guard.engine.waiting:
                    break
                await asyncio.sleep(0.001)
            await outer.__aexit__(None, None, None)
            with pytest.raises(LimitExceeded):
                await inner
            assert call.hold is not None
            other.release()
    assert await guard.storage.open_holds() == 0
    assert [held for _, _, held in await used(guard)] == [0, 0]


async def test_lower_limit_of_an_inner_scope_holds(new_guard: NewGuard) -> None:
    """Two policies on one meter claim once, under the lower limit, also where the inner one adopts."""
    guard = new_guard(Iterations(25))

    async def one() -> None:
        admission = await opened(guard)
        token = enter(admission.scope)
        try:
            async with guard.call(model=MODEL, input_tokens=1, max_output_tokens=1, extra=[Iterations(2)]) as call:
                call.record(Usage(input_tokens=1, output_tokens=1))
        finally:
            leave(token)
            await admission.end()

    await one()
    await one()
    with pytest.raises(LimitExceeded) as caught:
        await one()

    assert caught.value.denied.limit == 2
    assert (await used(guard))[0] == ("iterations", 2, 0)


async def test_background_call_claims_its_own(new_guard: NewGuard) -> None:
    """A call that starts after the response has ended claims its own iteration, under the same context."""
    guard = new_guard(Iterations(5))
    admission = await opened(guard)
    admission.opaque = True
    token = enter(admission.scope)
    await admission.end()
    async with guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
        call.record(Usage(input_tokens=1, output_tokens=1))
    leave(token)

    assert await used(guard) == [("iterations", 2, 0)]


async def test_call_that_outlives_its_request_keeps_its_hold(new_guard: NewGuard) -> None:
    """A call that is still open when the response ends settles when it ends itself, once."""
    guard = new_guard(Iterations(5), Budget("$1/1d"))
    admission = await opened(guard)
    token = enter(admission.scope)
    call = await guard.call(model=MODEL, input_tokens=100, max_output_tokens=50).__aenter__()
    await admission.end()
    assert await used(guard) == [("iterations", 0, 1), ("user_budget", 0, 200_000)]
    call.record(Usage(input_tokens=10, output_tokens=5))
    await call.end()
    leave(token)

    assert await used(guard) == [("iterations", 1, 0), ("user_budget", 20_000, 0)]


async def test_rates_and_slots_belong_to_the_request(new_guard: NewGuard) -> None:
    """Three calls in one request take one unit of its rate and one slot, and the slot is free when it ends."""
    guard = new_guard(RateLimit("10/minute"), Concurrency(1), Iterations(9))
    admission = await opened(guard)
    token = enter(admission.scope)
    for _ in range(3):
        async with guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
            call.record(Usage(input_tokens=1, output_tokens=1))
    assert [held for _, _, held in await used(guard)][1] == 1
    leave(token)
    await admission.end()

    assert [(rate, held) for _, rate, held in await used(guard)] == [(1, 0), (0, 0), (3, 0)]
