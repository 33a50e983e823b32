"""When settlements are handed over, and who waits until they are written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from tests.exits.kit import CONTEXT, PRICES, ApplicationError
from tests.exits.test_await_points import scope_of

from asgi_llm_guard import Concurrency, Guard, GuardMiddleware, Iterations, Route, Usage
from asgi_llm_guard.claims import Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.storage.memory import MemoryStorage

pytestmark = pytest.mark.anyio

MODEL = "openai/gpt-test"
GUARDED = [Route("/{rest:path}", dialect=None, calls="hooked")]


async def turns() -> None:
    """Let everything run that can, in this event loop."""
    for _ in range(50):
        await asyncio.sleep(0)


class Letter:
    """A settlement on its way: written when the test says so, or never."""

    def __init__(self, write: Callable[[], tuple[Settled, ...]]) -> None:
        self._write = write
        self._reply: tuple[Settled, ...] | None = None
        self._error: StorageError | None = None
        self._written = asyncio.Event()
        self._callbacks: list[Callable[[Pending[tuple[Settled, ...]]], object]] = []

    def write(self) -> None:
        self._reply = self._write()
        self._tell()

    def lose(self) -> None:
        self._error = StorageError("lost")
        self._tell()

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback(self)
        self._written.set()

    def done(self) -> bool:
        return self._reply is not None or self._error is not None

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        self._callbacks.append(callback)

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        yield from self._written.wait().__await__()
        return self.result()


class Post(MemoryStorage):
    """A storage that settles when the test lets it."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.letters: list[Letter] = []

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        self.log.append("settle")
        letter = Letter(lambda: super(Post, self).settle(settlements).result())
        self.letters.append(letter)
        return letter


class Case:
    """One request to an application behind a guard whose storage is slow to write."""

    def __init__(
        self, app: Callable[[Case], Any], *, routes: Sequence[Route] | None = GUARDED, method: str = "POST"
    ) -> None:
        self.log: list[str] = []
        self.storage = Post(self.log)
        policies = (Iterations(100), Concurrency(1, per="global"))
        self.guard = Guard(policies, storage=self.storage, prices=PRICES, hold_wait_s=0)
        self._app = app
        middleware = GuardMiddleware(self.app, self.guard, routes=routes)
        scope = {**scope_of("http"), "method": method}
        self.task = asyncio.create_task(middleware(scope, self.receive, self.send))

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(self)(scope, receive, send)

    async def receive(self) -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        more = message.get("more_body", False)
        self.log.append(message["type"].removeprefix("http.response.") + (" (more)" if more else ""))

    async def waits(self) -> bool:
        """Whether the request's task still runs when there is nothing more for it to do."""
        await turns()
        return not self.task.done()

    async def call(self) -> None:
        async with self.guard.call(model=MODEL, input_tokens=10, max_output_tokens=5) as call:
            call.record(Usage(input_tokens=10, output_tokens=5))


def answering(case: Case) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await case.call()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    return app


async def test_settled_before_the_end_is_sent() -> None:
    """What a call and a request hold is handed over before the last part of the body is sent."""
    case = Case(answering)
    assert await case.waits()
    assert case.log == ["settle", "start", "body (more)", "settle", "body"]
    for letter in case.storage.letters:
        letter.write()
    await case.task


@pytest.mark.parametrize("first", [0, 1], ids=["the call", "the request"])
async def test_task_lives_until_all_is_written(first: int) -> None:
    """The request's task, which servers wait for, ends when its calls and the request itself are written; not before."""
    case = Case(answering)
    assert await case.waits()
    case.storage.letters[first].write()
    assert await case.waits()
    case.storage.letters[1 - first].write()
    await case.task
    assert await case.storage.open_holds() == 0
    assert not case.guard.open_admissions


async def test_task_of_an_unguarded_request_lives_as_long() -> None:
    """The same holds for a request that is not guarded: the calls inside it are."""
    case = Case(answering, routes=None, method="GET")
    assert await case.waits()
    (letter,) = case.storage.letters
    letter.write()
    await case.task
    assert len(await case.storage.records()) == 1


async def test_task_that_is_cancelled_while_it_waits() -> None:
    """Cancelled while it waits for the storage, the task ends, and what was handed over is written all the same."""
    case = Case(answering)
    assert await case.waits()
    case.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await case.task
    for letter in case.storage.letters:
        letter.write()
    assert await case.storage.open_holds() == 0
    assert len(await case.storage.records()) == 1


async def test_storage_that_loses_settlements() -> None:
    """A storage that fails after the response breaks nothing: the settlements are handed over again."""
    case = Case(answering)
    assert await case.waits()
    for letter in tuple(case.storage.letters):
        letter.lose()
    await case.task
    assert case.guard.engine.unsettled == 2
    await case.guard.heartbeat()
    assert case.guard.engine.unsettled == 0
    case.storage.letters[-1].write()
    assert await case.storage.open_holds() == 0
    assert len(await case.storage.records()) == 1


async def test_storage_that_loses_what_a_job_used() -> None:
    """A job whose settlement fails ends as it would have, and its settlement is handed over again."""
    log: list[str] = []
    storage = Post(log)
    guard = Guard((Concurrency(1, per="global"),), storage=storage, prices=PRICES)

    async def job() -> str:
        async with guard.open(CONTEXT):
            return "done"

    task = asyncio.create_task(job())
    await turns()
    (letter,) = storage.letters
    letter.lose()
    assert await task == "done"
    assert guard.engine.unsettled == 1


async def test_error_waits_too() -> None:
    """An exception reaches the server when everything is written."""

    def failing(case: Case) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await case.call()
            raise ApplicationError

        return app

    case = Case(failing)
    assert await case.waits()
    assert case.log == ["settle", "settle"]
    for letter in case.storage.letters:
        letter.write()
    with pytest.raises(ApplicationError):
        await case.task


async def test_refusal_in_the_handler_is_sent_after_the_settlement() -> None:
    """The slot of a request whose call is refused is handed over before the refusal is sent."""

    def refused(case: Case) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with case.guard.call(model="openai/x", extra=[Iterations(0, name="none")]):
                raise AssertionError

        return app

    case = Case(refused)
    assert await case.waits()
    assert case.log[-3:] == ["settle", "start", "body"]
    for letter in case.storage.letters:
        letter.write()
    await case.task


async def test_length_that_is_known_ends_the_response() -> None:
    """Where the client can tell by the length that nothing more comes, everything is handed over before it can."""

    def known(case: Case) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await send({"type": "http.response.body", "body": b"two", "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        return app

    case = Case(known)
    assert await case.waits()
    assert case.log == ["start", "body (more)", "settle", "body (more)", "body"]
    for letter in case.storage.letters:
        letter.write()
    await case.task


async def test_storage_that_loses_settlements_before_a_drain() -> None:
    """What the storage did not take is handed over again before a drain gives up what is held."""
    case = Case(answering)
    assert await case.waits()
    for letter in tuple(case.storage.letters):
        letter.lose()
    await case.task
    draining = asyncio.create_task(case.guard.drain(0))
    await turns()
    assert case.guard.engine.unsettled == 0
    case.storage.letters[-1].write()
    await draining
    assert await case.storage.open_holds() == 0
    assert len(await case.storage.records()) == 1


@pytest.mark.parametrize("end", ["websocket.close", "websocket.http.response.start", "websocket.disconnect"])
async def test_websocket_is_settled_before_its_end_is_sent(end: str) -> None:
    """What a connection holds is handed over before its client sees the end, or when its end is seen."""
    log: list[str] = []
    guard = Guard((Concurrency(1, per="global"),), storage=Post(log), prices=PRICES)
    guard.hooked = True

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if end == "websocket.disconnect":
            await receive()
            log.append("seen")
        else:
            await send({"type": end})

    async def receive() -> Message:
        return {"type": "websocket.disconnect"}

    async def send(message: Message) -> None:
        log.append("sent")

    task = asyncio.create_task(GuardMiddleware(app, guard)(scope_of("websocket"), receive, send))
    await turns()
    assert log == ["settle", "seen" if end == "websocket.disconnect" else "sent"]
    assert isinstance(guard.storage, Post)
    guard.storage.letters[0].write()
    await task
