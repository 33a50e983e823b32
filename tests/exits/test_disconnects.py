"""Clients that leave: before the first byte, in the middle, at the last chunk. The provider's bill is paid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route as Path_
from starlette.types import Receive, Scope, Send
from tests.exits.kit import MAX_TOKENS, MODEL, Stage, body_of
from tests.exits.test_returns import app_of

from asgi_llm_guard import GuardMiddleware, Route, guarded
from asgi_llm_guard.testing import Behaviour, Disconnect, Gate

pytestmark = pytest.mark.anyio


async def test_before_the_body_is_complete(stage: Stage) -> None:
    """A client that leaves in the middle of its own request has taken nothing."""

    async def endpoint(request: Request) -> Response:
        raise AssertionError

    app = Starlette(
        routes=[Path_("/v1/chat/completions", endpoint, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=stage.guard)],
    )
    async with stage.serve(app) as server:
        async with server.connection() as connection:
            connection.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            await connection.writer.drain()
            watch = stage.watch
            assert watch is not None
            await watch.until(lambda: watch.begun == 1)
        await stage.settled(calls=0)


async def test_before_the_first_byte(stage: Stage) -> None:
    """A client that leaves before there is an answer changes nothing: the call is made, billed and charged."""
    stage.provider.script(Behaviour.hang())

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await stage.complete())

    async with stage.serve(app_of(stage, endpoint)) as server:
        async with server.connection() as connection:
            connection.ask("/")
            await stage.provider.until(lambda: stage.provider.open == 1)
        stage.provider.release()
        await stage.settled(calls=1)


async def test_before_the_first_byte_of_a_stream(stage: Stage) -> None:
    """A client that leaves before the first word of a stream ends the provider's stream; the hold is charged."""
    stage.provider.script(Behaviour.hang())

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:
        async with server.connection() as connection:
            connection.ask("/")
            await stage.provider.until(lambda: stage.provider.open == 1)
        await stage.provider.until(lambda: stage.provider.disconnects == 1)
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "unknown"


@pytest.mark.parametrize("how", ["call", "guarded", "base"])
async def test_in_the_middle_of_a_stream(stage: Stage, how: str) -> None:
    """T18: a client that leaves after two words ends the provider's stream, and the input and two words are charged."""
    stage.provider.script(Behaviour.slow())

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    if how == "guarded":
        endpoint = guarded(model=MODEL, max_output_tokens=MAX_TOKENS)(endpoint)
    other = (Middleware(BaseHTTPMiddleware, passing),) if how == "base" else ()
    async with stage.serve(app_of(stage, endpoint, *other)) as server:
        async with server.connection() as connection:
            connection.ask("/")
            stage.provider.release(2)
            await connection.until(b"one")
        await stage.provider.until(lambda: stage.provider.disconnects == 1)
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"
    assert record.cost_nanousd is not None
    assert record.estimate_nanousd is not None
    assert record.cost_nanousd < record.estimate_nanousd


async def test_at_the_last_chunk(stage: Stage) -> None:
    """A client that leaves when the last word has come, before usage was sent, is charged for all words."""
    stage.provider.script(Behaviour.slow())

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:
        async with server.connection() as connection:
            connection.ask("/")
            stage.provider.release(4)
            await connection.until(b"three")
        await stage.provider.until(lambda: stage.provider.disconnects == 1)
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"


async def test_after_the_last_chunk(stage: Stage) -> None:
    """A client that leaves when everything was sent changes nothing."""

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:
        async with server.connection() as connection:
            connection.ask("/")
            await connection.until(b"three")
        await stage.settled(calls=1, exact=False)


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("after", range(6))
async def test_at_every_message(stage: Stage, after: int, *, raises: bool) -> None:
    """Whichever message of the response is the last that a client takes, the provider's bill is paid once."""

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        version = {"version": "3.0", "spec_version": "2.4" if raises else "2.3"}
        await Disconnect(app_of(stage, endpoint), after_messages=after, raises=raises)(
            {**scope, "asgi": version}, receive, send
        )

    async with stage.serve(app) as server:
        async with server.connection() as connection:
            connection.ask("/")
            assert stage.watch is not None
            await stage.watch.idle()
        await stage.settled(calls=None, exact=False)


async def test_forwarded_stream(stage: Stage) -> None:
    """On a route that only forwards, a client that leaves is charged for the text that passed."""
    stage.provider.script(Behaviour.slow())

    async def forwarded(body: bytes) -> AsyncIterator[bytes]:
        async with stage.client.stream("POST", "/chat/completions", content=body) as response:
            async for piece in response.aiter_raw():
                yield piece

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(forwarded(await request.body()), media_type="text/event-stream")

    app = Starlette(
        routes=[Path_("/v1/chat/completions", endpoint, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=stage.guard, routes=[Route("/v1/chat/completions")])],
    )
    async with stage.serve(app) as server:
        async with server.connection() as connection:
            connection.ask("/v1/chat/completions", body=body_of(stream=True))
            stage.provider.release(3)
            await connection.until(b"two")
        await stage.provider.until(lambda: stage.provider.disconnects == 1)
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"


async def test_many_clients_that_leave(stage: Stage) -> None:
    """Ten clients that leave in the middle at once leave no slot and no hold behind."""
    gates = [Gate() for _ in range(10)]
    stage.provider.script(*(Behaviour.slow(gate=gate) for gate in gates))

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:

        async def leave(gate: Gate) -> None:
            async with server.connection() as connection:
                connection.ask("/")
                gate.release(1)
                await connection.until(b"Echo")

        await asyncio.gather(*map(leave, gates))
        await stage.settled(calls=10, exact=False, requests=10)
