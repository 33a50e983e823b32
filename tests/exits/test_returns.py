"""Ways out of a request that end well: everything is settled, once, and the bill is the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.routing import Route as Path_
from starlette.types import Message, Receive, Scope, Send
from tests.exits.kit import MAX_TOKENS, MODEL, Stage, body_of

from asgi_llm_guard import Concurrency, GuardMiddleware, Route, guarded

pytestmark = pytest.mark.anyio

EVERYTHING = [Route("/{rest:path}", dialect=None, calls="hooked")]
"""Guards every path and method; a request in which no call is made costs nothing."""


def app_of(
    stage: Stage, endpoint: Callable[..., Any], *more: Middleware, inside: Middleware | None = None
) -> Starlette:
    """One endpoint at every path, behind the guard; `more` stands around the guard, `inside` within it."""
    layers = [*more, Middleware(GuardMiddleware, guard=stage.guard, routes=EVERYTHING)]
    if inside is not None:
        layers.append(inside)
    return Starlette(routes=[Path_("/{rest:path}", endpoint, methods=["POST", "GET"])], middleware=layers)


async def test_plain_return(stage: Stage) -> None:
    """A handler that makes one call and returns is charged what the provider bills."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await stage.complete())

    async with stage.serve(app_of(stage, endpoint)) as server:
        response = await server.request("/plain")
        assert response.text == "Echo: one two three"
        (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"


async def test_ten_calls(stage: Stage) -> None:
    """A handler that makes ten calls at once is charged for ten."""

    async def endpoint(request: Request) -> Response:
        await asyncio.gather(*(stage.complete(f"question {number}") for number in range(10)))
        return PlainTextResponse("done")

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/agent")).status_code == 200
        await stage.settled(calls=10)


async def test_no_call(stage: Stage) -> None:
    """A handler that makes no call costs nothing where calls are hooked."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("done")

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/none")).status_code == 200
        await stage.settled(calls=0)


async def test_stream(stage: Stage) -> None:
    """A stream that is read to its end is charged what the provider bills."""

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/stream")).text == "Echo: one two three"
        (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"


async def test_guarded_stream(stage: Stage) -> None:
    """A streaming response of a `@guarded` handler is metered as it is sent, and settled at its end."""

    @guarded(model=MODEL, max_output_tokens=MAX_TOKENS)
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/stream")).text == "Echo: one two three"
        await stage.settled(calls=1)


async def test_generator_in_another_task(stage: Stage) -> None:
    """A generator that another task pulls from belongs to the request in which that task was made."""

    async def pull(words: AsyncIterator[bytes]) -> bytes:
        return b"".join([word async for word in words])

    async def endpoint(request: Request) -> Response:
        return Response(await asyncio.create_task(pull(stage.stream())))

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/stream")).content == b"Echo: one two three"
        (record,) = await stage.settled(calls=1)
    assert record.session == "s"


async def test_synchronous_stream(stage: Stage) -> None:
    """A synchronous generator, whose steps run in worker threads, is settled at its end."""

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream_sync())

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/stream")).text == "Echo: one two three"
        await stage.settled(calls=1)


async def test_thread_pool(stage: Stage) -> None:
    """A plain function in the thread pool is settled by `guard.call_sync`."""

    def endpoint(request: Request) -> Response:
        return PlainTextResponse(stage.complete_sync())

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/thread")).status_code == 200
        await stage.settled(calls=1)


async def test_guarded_thread_pool(stage: Stage) -> None:
    """A `@guarded` plain function in the thread pool is settled by the call that was made in it."""

    @guarded(model=MODEL, max_output_tokens=MAX_TOKENS)
    def endpoint(request: Request) -> Response:
        return PlainTextResponse(stage.complete_sync())

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/thread")).status_code == 200
        await stage.settled(calls=1)


async def test_background_tasks(stage: Stage) -> None:
    """Calls of background tasks claim their own, under the context of the request that started them."""

    async def endpoint(request: Request) -> Response:
        tasks = BackgroundTasks()
        tasks.add_task(stage.complete, "later")
        tasks.add_task(stage.complete_sync, "later still")
        return PlainTextResponse(await stage.complete("now"), background=tasks)

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/background")).status_code == 200
        records = await stage.settled(calls=3)
    assert [record.session for record in records] == ["s"] * 3


async def test_background_task_after_a_stream(stage: Stage) -> None:
    """The slot of a request is free while its background task runs."""

    async def later() -> None:
        assert await stage.counters() == (1, stage.provider.total_nanousd, 0)
        await stage.complete("later")

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream(), background=BackgroundTask(later))

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/background")).status_code == 200
        await stage.settled(calls=2)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("layer", ["gzip", "base"])
@pytest.mark.parametrize("where", ["around", "inside"])
async def test_other_middleware(stage: Stage, layer: str, where: str, *, streamed: bool) -> None:
    """Compression and `BaseHTTPMiddleware`, around the guard and inside it, change nothing."""

    async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    async def endpoint(request: Request) -> Response:
        background = BackgroundTask(stage.complete, "later")
        if streamed:
            return StreamingResponse(stage.stream(), background=background)
        return PlainTextResponse(await stage.complete("word " * 15), background=background)

    other = Middleware(GZipMiddleware, minimum_size=1) if layer == "gzip" else Middleware(BaseHTTPMiddleware, passing)
    app = app_of(stage, endpoint, other) if where == "around" else app_of(stage, endpoint, inside=other)
    async with stage.serve(app) as server:
        response = await server.request("/")
        assert response.text.startswith("Echo:")
        assert (response.headers.get("content-encoding") == "gzip") == (layer == "gzip")
        await stage.settled(calls=2)


async def test_mounted_application(stage: Stage) -> None:
    """A guard inside a mounted application, which no lifespan event reaches, settles all the same."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await stage.complete())

    outer = Starlette(routes=[Mount("/inner", app_of(stage, endpoint))])
    async with stage.serve(outer, lifespan="on") as server:
        assert (await server.request("/inner/x")).status_code == 200
        await stage.settled(calls=1)


async def test_unguarded_route(stage: Stage) -> None:
    """A call inside a request that is not guarded claims and settles its own."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await stage.complete())

    app = Starlette(
        routes=[Path_("/{rest:path}", endpoint)], middleware=[Middleware(GuardMiddleware, guard=stage.guard)]
    )
    async with stage.serve(app) as server:
        assert (await server.request("/", method="GET")).status_code == 200
        await stage.settled(calls=1)


@pytest.mark.parametrize("status", [200, 204, 304])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_answers_without_a_body(stage: Stage, method: str, status: int) -> None:
    """HEAD, 204, 304 and empty bodies end a request as any other."""

    async def endpoint(request: Request) -> Response:
        await stage.complete()
        return Response(status_code=status)

    async with stage.serve(app_of(stage, endpoint)) as server:
        response = await server.request("/empty", method=method)
        assert (response.status_code, response.content) == (status, b"")
        await stage.settled(calls=1)


async def test_body_that_is_never_read(stage: Stage) -> None:
    """A handler that never reads a body of a megabyte, and one that gets no body, are settled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await stage.complete()
        await JSONResponse({})(scope, receive, send)

    async with stage.serve(GuardMiddleware(app, stage.guard, routes=EVERYTHING)) as server:
        assert (await server.request("/", content=b"x" * 2**20)).status_code == 200
        assert (await server.request("/")).status_code == 200
        await stage.settled(calls=2, requests=2)


async def test_file_response(stage: Stage, tmp_path: Path) -> None:
    """A response that is a file ends the request."""
    (tmp_path / "answer.txt").write_bytes(b"x" * 200_000)

    async def endpoint(request: Request) -> Response:
        await stage.complete()
        return FileResponse(tmp_path / "answer.txt")

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert len((await server.request("/file")).content) == 200_000
        await stage.settled(calls=1)


async def test_file_that_the_server_sends(stage: Stage, tmp_path: Path) -> None:
    """Where the server sends the file itself, the path is the end of the response, and everything is settled before."""
    (tmp_path / "answer.txt").write_text("hello")

    async def endpoint(request: Request) -> Response:
        await stage.complete()
        return FileResponse(tmp_path / "answer.txt")

    sent: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            sent.append(message["type"])
            if message["type"] == "http.response.pathsend":
                assert await stage.storage.open_holds() == 0
                message = {"type": "http.response.body", "body": b"hello"}
            await send(message)

        extensions: dict[str, dict[str, object]] = {"http.response.pathsend": {}}
        await app_of(stage, endpoint)({**scope, "extensions": extensions}, receive, sending)

    async with stage.serve(app) as server:
        assert (await server.request("/file")).text == "hello"
        await stage.settled(calls=1)
    assert sent == ["http.response.start", "http.response.pathsend"]


async def test_route_with_a_dialect(stage: Stage) -> None:
    """A route that only forwards is charged by the usage in the body it sends, whole or streamed."""

    async def endpoint(request: Request) -> Response:
        body = await request.json()
        answer = await stage.client.post("/chat/completions", json=body)
        return Response(answer.content, media_type=answer.headers["content-type"])

    app = Starlette(
        routes=[Path_("/v1/chat/completions", endpoint, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=stage.guard)],
    )
    streamed = body_of(stream=True, stream_options={"include_usage": True})
    async with stage.serve(app) as server:
        for content in (body_of(), streamed):
            response = await server.request("/v1/chat/completions", content=content)
            assert b"Echo" in response.content
        records = await stage.settled(calls=2, requests=2)
    assert [record.outcome for record in records] == ["measured", "measured"]


def tight(stage: Stage) -> list[Any]:
    """Room for one request at a time."""
    return [Concurrency(1, per="global", name="one_at_a_time")]


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_one_connection(stage: Stage, http: str, *, streamed: bool) -> None:
    """The next request on a connection finds the one before it settled, though there is room for one and no waiting."""
    stage.guard.engine.waiters.wait_s = 0

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream()) if streamed else PlainTextResponse(await stage.complete())

    routes = [Route("/{rest:path}", dialect=None, calls="hooked", extra=tight(stage))]
    app = Starlette(
        routes=[Path_("/{rest:path}", endpoint, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=stage.guard, routes=routes)],
    )
    async with stage.serve(app, http=http) as server, server.connection() as connection:
        for _ in range(10):
            connection.ask("/")
            head = await connection.until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await connection.until(b"three")
            if streamed:
                await connection.until(b"0\r\n\r\n")
        for _ in range(5):  # without waiting for the answers
            connection.ask("/")
        for _ in range(5):
            head = await connection.until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await connection.until(b"0\r\n\r\n" if streamed else b"three")
        await stage.settled(calls=15, requests=15)
