"""What a call is charged when one inside it was refused: nothing if nothing can have been sent, else what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import anyio.to_thread
import pytest
from tests.engine.conftest import PRICES, NewGuard

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, guarded
from asgi_llm_guard.claims import Bundle, Ended, Granted, Refused
from asgi_llm_guard.moment import this_moment
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CONTEXT = Context(caller="acme", session="s")
BOUND: Any = {"model": MODEL, "input_tokens": 100, "max_output_tokens": 50}
HELD = 200_000
"""What a call of `BOUND` holds, in nano-USD."""

NOTHING: list[tuple[str, int | None]] = []
HOLD = [("unknown", HELD)]

Wait = Callable[[], Awaitable[object]]

LOOPS = [asyncio.new_event_loop]
if find_spec("uvloop") is not None:  # there is none for Windows
    LOOPS.append(import_module("uvloop").new_event_loop)


class AnsweredError(Exception):
    """As an application's own error, made from a refusal."""


@pytest.fixture
def guard(new_guard: NewGuard) -> Guard:
    return new_guard(Iterations(9), Budget("$1/1d"))


async def ledger(guard: Guard) -> list[tuple[str, int | None]]:
    """Outcome and cost of every call so far; nothing is held any more, and what is used is what the records say."""
    call = guard.describe(MODEL, input_tokens=1, max_output_tokens=1)
    meters = [c.meter for p in guard.policies for c in p.plan(CONTEXT, call, guard.clock.now_ms()).claims]
    iterations, budget = await guard.storage.read(meters)
    records = await guard.storage.records()
    assert await guard.storage.open_holds() == 0
    assert (iterations.held, budget.held) == (0, 0)
    assert (iterations.used, budget.used) == (len(records), sum(record.cost_nanousd or 0 for record in records))
    return [(record.outcome, record.cost_nanousd) for record in records]


async def refused(guard: Guard) -> None:
    """A call that never fits."""
    async with guard.call(model=MODEL, input_tokens=10**7):
        raise AssertionError


def refused_sync(guard: Guard) -> None:
    with guard.call_sync(model=MODEL, input_tokens=10**7):
        raise AssertionError


async def unseen() -> None:
    """A call to a provider by a client that the guard does not see: it waits for its answer."""
    await asyncio.sleep(0)


async def at_once() -> None:
    """Nothing."""


# -------------------------------------------------------------------------- nothing was sent


async def test_function_refused_at_once(guard: Guard) -> None:
    """A function whose first act is a call that is refused has sent nothing, and costs nothing."""

    @guarded(**BOUND)
    async def ask() -> None:
        await refused(guard)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == NOTHING


async def test_generator_refused_at_once(guard: Guard) -> None:
    """The same holds for a function that streams."""

    @guarded(**BOUND)
    async def ask() -> AsyncIterator[object]:
        await refused(guard)
        yield None

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await anext(ask())
    assert await ledger(guard) == NOTHING


async def test_block_refused_at_once(guard: Guard) -> None:
    """The same holds for a block."""
    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            async with guard.call(**BOUND):
                await refused(guard)
    assert await ledger(guard) == NOTHING


async def test_refused_again_and_again(guard: Guard) -> None:
    """However many calls were refused inside, if nothing was done but asking for them nothing was sent."""

    @guarded(**BOUND)
    async def ask() -> None:
        for _ in range(3):
            with pytest.raises(LimitExceeded):
                await refused(guard)
        await refused(guard)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == NOTHING


async def test_two_decorators(guard: Guard) -> None:
    """Of two decorators on one function the inner one's refusal costs nothing: the function did not run."""

    @guarded()
    @guarded(model=MODEL, input_tokens=10**7)
    async def ask() -> None:
        raise AssertionError

    @guarded()
    @guarded(model=MODEL, input_tokens=10**7)
    async def stream() -> AsyncIterator[None]:
        yield

    @guarded()
    @guarded(model=MODEL, input_tokens=10**7)
    def ask_sync() -> None:
        raise AssertionError

    @guarded()
    @guarded(model=MODEL, input_tokens=10**7)
    def stream_sync() -> Iterator[None]:
        yield

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
        with pytest.raises(LimitExceeded):
            await anext(stream())
        with pytest.raises(LimitExceeded):
            await anyio.to_thread.run_sync(ask_sync)
        with pytest.raises(LimitExceeded):
            await anyio.to_thread.run_sync(list, stream_sync())
    assert await ledger(guard) == NOTHING


async def test_where_all_calls_are_seen(guard: Guard) -> None:
    """Once a client hook is installed every call is seen: a function of which none was seen has sent nothing."""
    guard.hooked = True

    @guarded(**BOUND)
    async def ask() -> None:
        await unseen()
        await refused(guard)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == NOTHING


# --------------------------------------------------------------------------- it is not known


async def test_function_that_has_waited(guard: Guard) -> None:
    """A function that has waited for something before a call in it is refused may have made a call that nobody saw:
    it is charged what it holds."""

    @guarded(**BOUND)
    async def ask() -> None:
        await unseen()
        await refused(guard)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == HOLD


async def test_block_that_has_waited(guard: Guard) -> None:
    """The same holds for a block: the answer may be on its way to `record`."""
    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            async with guard.call(**BOUND):
                await unseen()
                await refused(guard)
    assert await ledger(guard) == HOLD


async def test_function_that_has_waited_after_the_refusal(guard: Guard) -> None:
    """What is done after a refusal counts as well: another way may have been tried before giving up."""

    @guarded(**BOUND)
    async def ask() -> None:
        try:
            await refused(guard)
        except LimitExceeded:
            await unseen()
            raise

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == HOLD


async def test_function_that_has_blocked(guard: Guard, clock: FrozenClock) -> None:
    """A client that blocks the event loop does not wait, and is found by the time that has passed."""

    @guarded(**BOUND)
    async def ask(ms: int) -> None:
        clock.advance(ms=ms)
        await refused(guard)

    async with guard.open(CONTEXT):
        for ms in (4, 5, -1):  # the host's clock may be set back meanwhile
            with pytest.raises(LimitExceeded):
                await ask(ms)
    assert await ledger(guard) == HOLD * 2


async def test_calls_side_by_side(guard: Guard) -> None:
    """A call that nobody sees may be on its way while another one is refused."""

    @guarded(**BOUND)
    async def ask() -> None:
        await asyncio.gather(unseen(), refused(guard))

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == HOLD


async def test_plain_function(guard: Guard) -> None:
    """What a plain function does before a call in it is refused is not seen: it is charged what it holds."""

    @guarded(**BOUND)
    def ask() -> None:
        refused_sync(guard)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await anyio.to_thread.run_sync(ask)
    assert await ledger(guard) == HOLD


async def test_call_in_a_thread(guard: Guard) -> None:
    """Nor is what happens in a thread that a coroutine waits for."""

    @guarded(**BOUND)
    async def ask() -> None:
        await anyio.to_thread.run_sync(refused_sync, guard)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == HOLD


async def test_refusal_of_another_guard(guard: Guard, clock: FrozenClock) -> None:
    """What another guard refuses is no word on what was sent before it was asked."""
    other = Guard([Iterations(0, per="caller")], clock=clock)

    @guarded(**BOUND)
    async def ask() -> None:
        await unseen()
        async with other.open(CONTEXT):
            await refused(other)

    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await ask()
    assert await ledger(guard) == HOLD


@pytest.mark.parametrize("wait", [unseen, at_once])
async def test_error_made_from_a_refusal(guard: Guard, wait: Wait) -> None:
    """An error that is raised from a refusal says what the refusal says."""
    async with guard.open(CONTEXT):
        with pytest.raises(AnsweredError):
            async with guard.call(**BOUND):
                await wait()
                try:
                    await refused(guard)
                except LimitExceeded as error:
                    raise AnsweredError from error
    assert await ledger(guard) == (HOLD if wait is unseen else NOTHING)


async def test_error_made_from_a_refusal_after_dispatch(guard: Guard) -> None:
    """A call that is on its way is not taken for unsent either."""
    async with guard.open(CONTEXT):
        with pytest.raises(AnsweredError):
            async with guard.call(**BOUND) as call:
                call.dispatched()
                try:
                    await refused(guard)
                except LimitExceeded as error:
                    raise AnsweredError from error
    assert await ledger(guard) == HOLD


class SlowMemory(MemoryStorage):
    """Does not say what has become of a changed hold."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.amended = asyncio.Event()

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        answer = await super().amend(owner, bundle)
        self.amended.set()
        await asyncio.Event().wait()
        return answer


async def test_call_cancelled_while_it_takes_a_function_over(clock: FrozenClock) -> None:
    """A function of which the hold is lost on its way to a call inside is charged it, outside requests too: it may
    have made a call that nobody saw."""
    storage = SlowMemory(clock=clock)
    guard = Guard([Iterations(9), Budget("$1/1d")], storage=storage, clock=clock, prices=PRICES)

    @guarded(**BOUND)
    async def ask() -> None:
        await unseen()
        async with guard.call(model=MODEL, input_tokens=300, max_output_tokens=0):
            raise AssertionError

    async with guard.open(CONTEXT):
        waiting = asyncio.ensure_future(ask())
        await storage.amended.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert await ledger(guard) == HOLD


# --------------------------------------------------------------------------------- moments


async def test_moment_ends_with_the_first_wait() -> None:
    """One moment lasts from one wait to the next, however many ask for it."""
    moment = this_moment()
    assert moment is this_moment()
    assert moment is not None
    assert not moment.over
    await asyncio.sleep(0)
    assert moment.over
    assert this_moment() is not moment


@pytest.mark.parametrize("new_loop", LOOPS, ids=lambda new_loop: new_loop.__module__)
def test_every_wait_is_seen(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Whatever a task waits for, on either event loop, its moment is over when it goes on."""
    over: list[bool] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        await writer.drain()
        writer.close()

    async def call(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        moment = this_moment()
        writer.write(b"x")
        await reader.read(1)
        writer.close()
        assert moment is not None
        over.append(moment.over)

    async def future() -> None:
        waited = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(waited.set_result, None)
        await waited

    async def watch(wait: Callable[[], Awaitable[object]]) -> None:
        for _ in range(10):
            moment = this_moment()
            assert moment is not None
            await wait()
            over.append(moment.over)

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        waits = (unseen, future, lambda: call(port), lambda: asyncio.to_thread(str))
        await asyncio.gather(*(watch(wait) for wait in waits * 3))
        server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    assert over == [True] * 150


def test_moment_of_a_loop_that_is_gone() -> None:
    """A moment that its loop did not live to end is none of the next loop's."""

    async def ask() -> object:
        asyncio.get_running_loop().stop()
        return this_moment()

    def run() -> object:
        loop = asyncio.new_event_loop()
        task = loop.create_task(ask())
        loop.run_forever()
        loop.close()
        return task.result()

    assert run() is not run()


def test_no_moment_without_a_loop() -> None:
    """Where no event loop is running there is no moment."""
    assert this_moment() is None
