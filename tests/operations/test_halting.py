"""Where running streams are ended: between two events, in every kind of stream, whoever waits for what."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.exits.kit import CONTEXT, MODEL, PRICES, Stage, body_of

from asgi_llm_guard import Budget, Guard, GuardMiddleware, LimitExceeded, Route, guarded
from asgi_llm_guard.admission import Admission
from asgi_llm_guard.halting import Wait
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.streams import StreamRules
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

ALL = Stop(scope="all")


def event(text: str) -> bytes:
    said = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


async def turns() -> None:
    """Let everything go on that can: in turns of the event loop, however long a busy machine takes for them."""
    for _ in range(100):
        await asyncio.sleep(0)


class Exchange:
    """One streamed request to an application that the test writes, without a server between."""

    def __init__(self, source: Callable[[Exchange], AsyncIterator[bytes]], **options: Any) -> None:
        self.guard = Guard([Budget("$1/1d", per="global")], prices=PRICES)
        self.source = source
        self.sent: list[Any] = []
        self.seen = asyncio.Event()
        self.more = asyncio.Event()
        self.left = ""
        self.lingers = False
        """The application takes its time to end."""
        self.app = GuardMiddleware(self._app, self.guard, routes=[Route("/v1/{rest:path}", calls="opaque", **options)])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            async for part in self.source(self):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self.seen.set()
            await send({"type": "http.response.body", "body": b""})
        except BaseException as error:
            self.left = type(error).__name__
            if self.lingers:
                await asyncio.Event().wait()
            raise

    async def run(self) -> None:
        body = [{"type": "http.request", "body": body_of(stream=True)}]

        async def receive() -> Any:
            if not body:
                await asyncio.Event().wait()
            return body.pop()

        async def send(message: Any) -> None:
            self.sent.append(dict(message))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        await self.app(scope, receive, send)

    @property
    def text(self) -> bytes:
        assert [message.get("more_body", False) for message in self.sent[1:]].count(False) == 1
        return b"".join(message["body"] for message in self.sent[1:])

    async def charged(self) -> int:
        assert await self.guard.storage.open_holds() == 0
        (record,) = await self.guard.storage.records()
        return record.cost_nanousd or 0


WATCHED = [{}, {"streams": StreamRules(total_s=600)}]


@pytest.mark.parametrize("options", WATCHED, ids=["plain", "watched"])
async def test_an_event_that_has_begun_is_ended_first(options: dict[str, Any]) -> None:
    """S8: a stop in the middle of an event lets the rest of that event come, and cuts behind it."""
    whole = event("word " * 40)

    async def source(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event("one")
        yield whole[:30]
        await exchange.more.wait()
        yield whole[30:] + event("too late")
        yield event("much too late")

    exchange = Exchange(source, **options)
    running = asyncio.create_task(exchange.run())
    await exchange.seen.wait()
    await turns()
    exchange.guard.set_stops([ALL])
    await turns()
    exchange.more.set()
    await running
    assert exchange.text.startswith(event("one") + whole)
    assert exchange.text.endswith(b"\n\n")
    assert b"too late" not in exchange.text
    assert b'"stopped"' in exchange.text
    assert exchange.left in ("CutOff", "CancelledError", "GeneratorExit")
    assert await exchange.charged() > 0


@pytest.mark.parametrize("options", WATCHED, ids=["plain", "watched"])
async def test_an_application_that_says_nothing_is_not_waited_for(options: dict[str, Any]) -> None:
    """S8: an application that waits, between events or in the middle of one, is cancelled where it waits."""
    for last in (event("two"), event("two")[:25]):

        async def source(exchange: Exchange, last: bytes = last) -> AsyncIterator[bytes]:
            yield event("one")
            yield last
            await asyncio.Event().wait()

        exchange = Exchange(source, **options)
        running = asyncio.create_task(exchange.run())
        await exchange.seen.wait()
        await turns()
        exchange.guard.set_stops([ALL])
        await asyncio.wait_for(running, 30)
        assert exchange.text.endswith(b"\n\n")
        assert b'"stopped"' in exchange.text.rpartition(b"\n\ndata: ")[2]
        assert exchange.left == "CancelledError"
        assert await exchange.charged() > 0


OPAQUE: list[dict[str, Any]] = [*WATCHED, {"dialect": None}]


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("options", OPAQUE, ids=["plain", "watched", "no dialect"])
async def test_an_application_that_passes_no_cancellation_on_is_ended(options: dict[str, Any], goes_on: bool) -> None:
    """S8: a generator that catches its cancellation, and ends or goes on, ends with the last event all the same, and its
    task is not left half cancelled."""

    async def source(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event("one")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        while goes_on:
            yield event("too late")

    exchange = Exchange(source, **options)
    running = asyncio.create_task(exchange.run())
    await exchange.seen.wait()
    await turns()
    exchange.guard.set_stops([ALL])
    await asyncio.wait_for(running, 30)
    assert running.cancelling() == 0
    assert b"too late" not in exchange.text
    assert b'"stopped"' in exchange.text.removeprefix(event("one"))
    assert (await exchange.charged() > 0) is ("dialect" not in options)


async def test_a_task_that_is_cancelled_where_a_stream_was_ended_stays_cancelled() -> None:
    """A request whose stream a stop ended behind its event, and that its server cancels then, is not kept alive."""

    async def source(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event("one")
        yield event("two")[:25]
        await exchange.more.wait()
        yield event("two")[25:]

    exchange = Exchange(source)
    exchange.lingers = True
    running = asyncio.create_task(exchange.run())
    await exchange.seen.wait()
    await turns()
    exchange.guard.set_stops([ALL])
    await turns()
    exchange.more.set()
    await turns()
    assert b'"stopped"' in exchange.text
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 30)
    assert await exchange.charged() > 0


async def test_a_wait_takes_its_cancellation_back() -> None:
    """Whoever waits for a provider and catches that it was called back is not left half cancelled."""
    guard = Guard()
    begun = asyncio.Event()

    async def work(how: str) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if how == "raises":
                raise ValueError("in its own words") from None
        return "what there was"

    async def wait(how: str) -> object:
        async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call:
            try:
                return await Wait(call).on(work, how)
            except ValueError as error:
                return str(error)

    for how, result in (("returns", "what there was"), ("raises", "in its own words")):
        begun.clear()
        waiting = asyncio.create_task(wait(how))
        await begun.wait()
        assert guard.stop(ALL) == 1
        assert await asyncio.wait_for(waiting, 30) == result
        assert waiting.cancelling() == 0


async def test_a_task_that_others_cancel_stays_cancelled() -> None:
    """A request that its server cancels at the same time is not kept alive by a stop."""

    async def source(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event("one")
        await asyncio.Event().wait()

    exchange = Exchange(source)
    running = asyncio.create_task(exchange.run())
    await exchange.seen.wait()
    exchange.guard.set_stops([ALL])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await exchange.charged() > 0


async def test_what_begins_to_stream_after_the_stop_is_ended() -> None:
    """An application that nobody could see waiting is ended as soon as it streams."""

    async def source(exchange: Exchange) -> AsyncIterator[bytes]:
        exchange.guard.set_stops([ALL])
        yield event("one")
        await asyncio.Event().wait()

    exchange = Exchange(source)
    await asyncio.wait_for(exchange.run(), 30)
    assert b'"stopped"' in exchange.text
    assert await exchange.charged() > 0


async def test_a_guarded_generator_outside_of_requests_is_ended(stage: Stage) -> None:
    """S8: a function that opened its admission by itself ends where it waits, with the refusal."""
    stage.provider.script(Behaviour.slow())

    @guarded(model=MODEL, max_output_tokens=20, guard=stage.guard, context=CONTEXT)
    async def words() -> AsyncIterator[dict[str, Any]]:
        async for chunk in stage.chunks("one two three"):
            yield chunk

    stage.provider.release(3)
    stream = words()
    await anext(stream)
    assert stage.guard.open_admissions == 1
    reading = asyncio.create_task(_all(stream))
    await turns()
    assert stage.guard.stop(Stop(scope="session", subject="s", caller="anonymous")) == 1
    with pytest.raises(LimitExceeded, match="stopped"):
        await reading
    assert stage.guard.open_admissions == 0
    await stage.provider.until(lambda: stage.provider.open == 0)
    await stage.settled(calls=1, exact=False)


async def test_synchronous_streams_end_with_their_next_part(stage: Stage) -> None:
    """S8: a synchronous client cannot be called back; its stream ends with the next part, and the connection closes."""
    stage.provider.script(Behaviour.slow())
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> bytes:
        text = b""
        with (
            stage.guard.open_sync(CONTEXT),
            stage.guard.httpx_client_sync(base_url=stage.base_url) as client,
            client.stream("POST", "/chat/completions", content=body_of(stream=True), headers=_JSON) as answer,
        ):
            for part in answer.iter_raw():
                text += part
                if b"one" in text:
                    loop.call_soon_threadsafe(begun.set)
        return text

    stage.provider.release(2)
    working = asyncio.create_task(asyncio.to_thread(work))
    await asyncio.wait_for(begun.wait(), 60)
    stage.guard.set_stops([ALL])
    stage.provider.release(1)
    text = await asyncio.wait_for(working, 60)
    assert text.endswith(b"\n\n")
    assert b"stopped" in text
    await stage.provider.until(lambda: stage.provider.open == 0)
    await stage.settled(calls=1, exact=False)


async def test_a_websocket_is_closed() -> None:
    """S8: a WebSocket that runs is closed (1008), and its application cancelled."""
    guard = Guard([Budget("$1/1d", per="global")], prices=PRICES)
    begun, left = asyncio.Event(), asyncio.Event()
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {"type": "websocket", "path": "/ws", "headers": []}
    running = asyncio.create_task(GuardMiddleware(app, guard)(scope, receive, send))
    await begun.wait()
    guard.set_stops([ALL])
    await asyncio.wait_for(running, 30)
    assert left.is_set()
    assert (sent[-1]["type"], sent[-1]["code"]) == ("websocket.close", 1008)
    assert await guard.storage.open_holds() == 0


async def _all(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


_JSON = {"content-type": "application/json"}


async def test_a_websocket_that_passes_no_cancellation_on_is_closed() -> None:
    """S8: an application that catches its cancellation and returns leaves its WebSocket closed, with the code that says why."""
    guard, begun = Guard(), asyncio.Event()
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await receive()

    messages = [{"type": "websocket.connect"}]

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/talk", "headers": []}
    running = asyncio.create_task(GuardMiddleware(app, guard)(scope, receive, send))
    await begun.wait()
    assert guard.stop(ALL) == 1
    await asyncio.wait_for(running, 30)
    assert [(each["type"], each.get("code")) for each in sent] == [
        ("websocket.accept", None),
        ("websocket.close", 1008),
    ]
    assert running.cancelling() == 0
    assert await guard.storage.open_holds() == 0


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("options", OPAQUE, ids=["plain", "watched", "no dialect"])
async def test_nothing_of_a_request_waits_for_the_collector(options: dict[str, Any], stopped: bool) -> None:
    """What is known of a request is let go with it, whether it ended by itself or by a stop."""

    async def source(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event("one")
        if stopped:
            await asyncio.Event().wait()

    exchange = Exchange(source, **options)
    gc.collect()
    gc.disable()
    try:
        running = asyncio.create_task(exchange.run())
        await exchange.seen.wait()
        await turns()
        if stopped:
            exchange.guard.set_stops([ALL])
        await asyncio.wait_for(running, 30)
        await exchange.guard.storage.records()
        await turns()
        left = [
            each for each in gc.get_objects() if isinstance(each, Admission) and each.engine is exchange.guard.engine
        ]
        assert left == []
    finally:
        gc.enable()
