"""Ways out of a request that end in an error: everything is settled, once, and nothing billed is left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from tests.exits.kit import MAX_TOKENS, MODEL, ApplicationError, Stage, body_of
from tests.exits.test_returns import EVERYTHING, app_of

from asgi_llm_guard import GuardMiddleware, Route, guarded
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

Endpoint = Callable[[Request], Any]


async def test_exception_after_the_call(stage: Stage) -> None:
    """A handler that fails after its call was answered is charged what the call used."""

    async def endpoint(request: Request) -> Response:
        await stage.complete()
        raise ApplicationError

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == 500
        (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"


async def test_exception_before_the_call(stage: Stage) -> None:
    """A handler that fails before its call is charged nothing."""

    async def endpoint(request: Request) -> Response:
        raise ApplicationError

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == 500
        await stage.settled(calls=0)


async def test_exception_inside_the_call(stage: Stage) -> None:
    """A failure between the provider's answer and `record` keeps what was held: it was billed."""

    async def endpoint(request: Request) -> Response:
        async with stage.guard.call(**stage.describe("hello")) as call:
            await stage.post(call, "hello")
            call._answer = None  # nothing was recorded
            raise ApplicationError

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == 500
        (record,) = await stage.settled(calls=1, exact=False)
    assert (record.outcome, record.cost_nanousd) == ("unknown", record.estimate_nanousd)


async def test_exception_in_the_middle_of_a_stream(stage: Stage) -> None:
    """A stream that its own handler breaks is charged for the text that was seen."""
    stage.provider.script(Behaviour.slow())

    async def words() -> AsyncIterator[bytes]:
        async for word in stage.stream():
            yield word
            raise ApplicationError

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(words())

    async with stage.serve(app_of(stage, endpoint)) as server:
        stage.provider.release(1)
        with pytest.raises(httpx2.RemoteProtocolError):
            await server.request("/")
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"


async def test_exception_of_a_guarded_stream(stage: Stage) -> None:
    """The same holds for the streaming response of a `@guarded` handler."""
    stage.provider.script(Behaviour.slow())

    async def chunks() -> AsyncIterator[Any]:
        async for word in stage.stream():
            yield word
            raise ApplicationError

    @guarded(model=MODEL, max_output_tokens=MAX_TOKENS)
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(chunks())

    async with stage.serve(app_of(stage, endpoint)) as server:
        stage.provider.release(1)
        with pytest.raises(httpx2.RemoteProtocolError):
            await server.request("/")
        await stage.settled(calls=1, exact=False)


async def test_exception_in_a_background_task(stage: Stage) -> None:
    """A background task that fails after its call changes nothing of what was settled."""

    async def later() -> None:
        await stage.complete("later")
        raise ApplicationError

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await stage.complete(), background=BackgroundTask(later))

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == 200
        await stage.settled(calls=2)


@pytest.mark.parametrize("status", [429, 500])
async def test_error_of_the_provider(stage: Stage, status: int) -> None:
    """An error of the provider, which bills nothing, costs no money."""
    stage.provider.script(Behaviour.error(status))

    async def endpoint(request: Request) -> Response:
        async with stage.guard.call(**stage.describe("hello")) as call:
            response = await stage.client.post("/chat/completions", json={"model": "gpt-test", "messages": [{}]})
            call.record(response)
            return Response(status_code=response.status_code)

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == status
        (record,) = await stage.settled(calls=1)
    assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour.cut(),
        Behaviour.cut(after_chunks=2),
        Behaviour.stream_error(after_chunks=2),
        Behaviour.no_usage(),
        Behaviour.empty(),
        Behaviour.malformed(),
    ],
    ids=["cut at once", "cut", "error event", "no usage", "empty", "malformed"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_answers_that_break(stage: Stage, behaviour: Behaviour, *, streamed: bool) -> None:
    """What a provider bills without saying so is charged at least, and at most what was held."""
    stage.provider.script(behaviour)

    async def endpoint(request: Request) -> Response:
        try:
            if streamed:
                return Response(b"".join([word async for word in stage.stream()]))
            return PlainTextResponse(await stage.complete())
        except (httpx2.HTTPError, ValueError, KeyError):
            return Response(status_code=502)

    async with stage.serve(app_of(stage, endpoint)) as server:
        await server.request("/")
        await stage.settled(calls=1, exact=False)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_timeout_around_the_call(stage: Stage, *, streamed: bool) -> None:
    """A call that runs out of time is charged what it holds; the provider may have billed all of it."""
    stage.provider.script(Behaviour.hang())

    async def endpoint(request: Request) -> Response:
        expiring: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(None) as limit:
                # Over as soon as the provider has the request: no clock decides what this test sees.
                expiring = asyncio.create_task(_expire(stage, limit))
                if streamed:
                    return Response(b"".join([word async for word in stage.stream()]))
                return PlainTextResponse(await stage.complete())
        except TimeoutError:
            assert expiring is not None
            return Response(status_code=504)

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == 504
        (record,) = await stage.settled(calls=1, exact=False)
    assert (record.outcome, record.cost_nanousd) == ("unknown", record.estimate_nanousd)


async def _expire(stage: Stage, limit: asyncio.Timeout) -> None:
    await stage.provider.until(lambda: stage.provider.open == 1)
    limit.reschedule(0)


async def test_handler_that_is_cancelled(stage: Stage) -> None:
    """A handler that is cancelled in the middle of its call is charged what it holds."""
    stage.provider.script(Behaviour.hang())

    async def endpoint(request: Request) -> Response:
        task = asyncio.create_task(stage.complete())
        await stage.provider.until(lambda: stage.provider.open == 1)
        task.cancel()
        await task
        raise AssertionError

    async def answering(request: Request) -> Response:
        try:
            return await endpoint(request)
        except asyncio.CancelledError:
            return Response(status_code=499)

    async with stage.serve(app_of(stage, answering)) as server:
        assert (await server.request("/")).status_code == 499
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.cost_nanousd == record.estimate_nanousd


async def test_cancelled_error_of_the_handler(stage: Stage) -> None:
    """A `CancelledError` that escapes the application passes the guard, and everything is settled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await stage.complete()
        raise asyncio.CancelledError

    async with (
        stage.serve(GuardMiddleware(app, stage.guard, routes=EVERYTHING)) as server,
        server.connection() as connection,
    ):
        connection.ask("/")
        await stage.settled(calls=1)


async def test_no_response_at_all(stage: Stage) -> None:
    """An application that returns without a response is settled before the server answers in its place."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await stage.complete()

    async with stage.serve(GuardMiddleware(app, stage.guard, routes=EVERYTHING)) as server:
        assert (await server.request("/")).status_code == 500
        await stage.settled(calls=1)


async def test_response_that_never_ends(stage: Stage) -> None:
    """An application that returns in the middle of its response is settled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await stage.complete()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async with stage.serve(GuardMiddleware(app, stage.guard, routes=EVERYTHING)) as server:
        with pytest.raises(httpx2.RemoteProtocolError):
            await server.request("/")
        await stage.settled(calls=1)


async def test_response_that_is_sent_twice(stage: Stage) -> None:
    """An application that answers twice gets the server's error, and is settled once."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await stage.complete()
        await PlainTextResponse("once")(scope, receive, send)
        try:
            await PlainTextResponse("twice")(scope, receive, send)
        except RuntimeError:
            raise ApplicationError from None

    async with stage.serve(GuardMiddleware(app, stage.guard, routes=EVERYTHING)) as server:
        assert (await server.request("/")).text == "once"
        await stage.settled(calls=1)


async def test_opaque_route_that_fails(stage: Stage) -> None:
    """Where calls are not seen, a request that fails is charged what it holds, as one `unseen` call."""

    async def endpoint(request: Request) -> Response:
        await stage.client.post("/chat/completions", json=await request.json())
        raise ApplicationError

    app = GuardMiddleware(
        app_of_unguarded(endpoint), stage.guard, routes=[Route("/v1/chat/completions", calls="opaque")]
    )
    async with stage.serve(app) as server:
        response = await server.request("/v1/chat/completions", content=body_of())
        assert response.status_code == 500
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "unseen"


def app_of_unguarded(endpoint: Endpoint) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await endpoint(Request(scope, receive, send)))(scope, receive, send)

    return app
