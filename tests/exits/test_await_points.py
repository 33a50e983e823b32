"""Cancelled, closed or interrupted at every point where it waits: whatever runs under the guard leaves nothing held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.exits.kit import CONTEXT, HEADERS, MAX_TOKENS, MODEL, Stage, new_stage

from asgi_llm_guard import Budget, Concurrency, GuardMiddleware, LimitExceeded, Route, Usage, guarded
from asgi_llm_guard.claims import Bundle, Ended, Granted, Plan, Refused
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FakeProvider, FrozenClock

pytestmark = pytest.mark.anyio

USAGE = Usage(input_tokens=10, output_tokens=5, model="gpt-test")

Job = Callable[[Stage], Coroutine[Any, Any, None]]


class Turn:
    """One point at which a coroutine waits."""

    def __await__(self) -> Generator[None]:
        yield


class SlowMemory(MemoryStorage):
    """Waits before and after each decision, as a storage behind a wire does."""

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        await Turn()
        answer = await super().reserve(owner, plans)
        await Turn()
        return answer

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        await Turn()
        answer = await super().amend(owner, bundle)
        await Turn()
        return answer


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = (
        SlowMemory(clock=clock) if request.param == "memory" else SqliteStorage(tmp_path / "guard.db", clock=clock)
    )
    yield made
    await made.aclose()


@pytest.fixture
async def stage(storage: Storage, clock: FrozenClock) -> AsyncIterator[Stage]:
    stage = new_stage(storage, FakeProvider(), "http://nowhere", clock, hold_wait_s=60)
    yield stage
    await stage.guard.aclose()


# ------------------------------------------------------------------------------------- jobs


async def nested_calls(stage: Stage) -> None:
    async with stage.guard.open(CONTEXT):
        await Turn()
        async with stage.guard.call(**stage.describe("outer")):
            await Turn()
            async with stage.guard.call(**stage.describe("inner, which is longer")) as inner:
                await Turn()
                inner.record(USAGE)
                await Turn()
        async with stage.guard.call(**stage.describe("another")) as another:
            await Turn()
            another.record(USAGE)


async def guarded_function(stage: Stage) -> None:
    @guarded(Concurrency(1, per="global", name="one"), model=MODEL, max_output_tokens=MAX_TOKENS)
    async def function(text: str) -> None:
        await Turn()
        async with stage.guard.call(**stage.describe(text)) as call:
            await Turn()
            call.record(USAGE)

    async with stage.guard.open(CONTEXT):
        await function("once")
        await function("twice")


async def guarded_function_of_its_own(stage: Stage) -> None:
    @guarded(
        Concurrency(1, per="global", name="one"),
        model=MODEL,
        max_output_tokens=MAX_TOKENS,
        guard=stage.guard,
        context=CONTEXT,
    )
    async def function(text: str) -> Usage:
        await Turn()
        return USAGE

    await function("once")


async def guarded_generator(stage: Stage) -> None:
    @guarded(Concurrency(1, per="global", name="one"), model=MODEL, max_output_tokens=MAX_TOKENS)
    async def words(text: str) -> AsyncIterator[str]:
        await Turn()
        yield "one"
        await Turn()
        yield "two"

    async with stage.guard.open(CONTEXT):
        async for _ in words("text"):
            await Turn()


async def stream_that_is_left(stage: Stage) -> None:
    async def words() -> AsyncIterator[str]:
        async with stage.guard.call(**stage.describe("text")):
            await Turn()
            yield "one"
            yield "two"

    async with stage.guard.open(CONTEXT):
        async for _ in words():
            await Turn()
            break


async def request(stage: Stage) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with stage.guard.call(**stage.describe("text")) as call:
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            call.record(USAGE)
        await send({"type": "http.response.body", "body": b"two"})
        async with stage.guard.call(**stage.describe("in the background")) as call:
            await Turn()
            call.record(USAGE)

    async def receive() -> dict[str, object]:
        await Turn()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        await Turn()

    routes = [Route("/{rest:path}", dialect=None, extra=[Concurrency(1, per="global", name="one")])]
    await GuardMiddleware(app, stage.guard, routes=routes)(scope_of("http"), receive, send)


async def websocket(stage: Stage) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        async with stage.guard.call(**stage.describe("text")) as call:
            await send({"type": "websocket.send", "text": "one"})
            call.record(USAGE)
        await send({"type": "websocket.close"})

    async def receive() -> dict[str, object]:
        await Turn()
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        await Turn()

    await GuardMiddleware(app, stage.guard)(scope_of("websocket"), receive, send)


def scope_of(kind: str) -> dict[str, Any]:
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    return {"type": kind, "method": "POST", "path": "/", "headers": headers, "client": ("127.0.0.1", 1)}


JOBS: list[Job] = [
    nested_calls,
    guarded_function,
    guarded_function_of_its_own,
    guarded_generator,
    stream_that_is_left,
    request,
    websocket,
]


# ----------------------------------------------------------------------------------- driving


async def drive(job: Coroutine[Any, Any, None], stop_at: int, error: type[BaseException], *, late: bool) -> bool:
    """Step through `job` by hand and throw `error` into it where it waits for the `stop_at`-th time.

    `late`: when what it waits for has come, and it does not know yet. Gives whether there was such a point.
    """
    waits = 0
    reached = False
    throw = False
    while True:
        try:
            if throw:
                throw, reached = False, True
                if error is GeneratorExit:
                    job.close()
                    return True
                waited = job.throw(error())
            else:
                waited = job.send(None)
        except StopIteration:
            return reached
        except error:
            return True
        throw = waits == stop_at
        waits += 1
        if isinstance(waited, asyncio.Future):
            waited._asyncio_future_blocking = False
            if late or not throw:
                await asyncio.wait({waited})


STOPS = [
    pytest.param(job, error, id=f"{job.__name__}-{error.__name__}")
    for job in JOBS
    for error in (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit)
    # Before 3.13, Python drops an async generator that is waited for when the coroutine around it is closed:
    # no line of it runs any more, and no error reaches it.
    if error is not GeneratorExit or job not in {guarded_generator, stream_that_is_left}
]


@pytest.mark.parametrize("job, error", STOPS)
async def test_every_point(stage: Stage, job: Job, error: type[BaseException]) -> None:
    """Wherever a job is stopped, nothing is held afterwards, and every call is settled once."""
    for late in (False, True):
        stop_at = 0
        while await drive(job(stage), stop_at, error, late=late):
            await nothing_is_held(stage, f"stopped at point {stop_at}, late={late}")
            stop_at += 1
        assert stop_at > 1
    await nothing_is_held(stage, "at the end")


async def nothing_is_held(stage: Stage, when: str) -> None:
    await asyncio.sleep(0)  # generators that were left are closed by a task
    assert await stage.storage.open_holds() == 0, when
    records = await stage.storage.records()
    iterations, nanousd, slots = await stage.counters()
    assert (len(records), slots) == (iterations, 0), when
    assert sum(record.cost_nanousd or 0 for record in records) == nanousd, when
    assert {event.settled.status for event in stage.settlements.seen} <= {"settled"}, when
    assert not stage.guard.open_admissions, when


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit])
async def test_while_waiting_for_the_holds_of_others(stage: Stage, error: type[BaseException]) -> None:
    """A call that is stopped while it waits for others takes nothing, and stands in nobody's way."""

    async def waiting() -> None:
        async with stage.guard.open(CONTEXT, extra=[_dear(stage)]), stage.guard.call(**stage.describe("waiting")):
            raise AssertionError

    for late in (False, True):
        for stop_at in range(6):
            async with (
                stage.guard.open(CONTEXT, extra=[_dear(stage)]),
                stage.guard.call(**stage.describe("first")) as first,
            ):
                first.release()
                assert await drive(waiting(), stop_at, error, late=late)
                assert stage.guard.engine.waiting == 0
                assert await stage.storage.open_holds() == 2
    await nothing_is_held(stage, "at the end")


def _dear(stage: Stage) -> Any:
    return Budget("$0.0003/1d", per="global", name="room_for_one")


async def test_refusals_take_nothing(stage: Stage) -> None:
    """A job that is refused in the middle holds nothing afterwards."""

    async def refused() -> None:
        @guarded(Concurrency(0, per="global", name="none"))
        async def function() -> None:
            raise AssertionError

        async with stage.guard.open(CONTEXT):
            await function()

    with pytest.raises(LimitExceeded):
        await refused()
    await nothing_is_held(stage, "at the end")
