"""Streams on real sockets whose client leaves: read on or closed, the ledger is held against the provider's bill."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as Path_
from tests.exits.kit import BILLED, MAX_TOKENS, Stage, body_of

from asgi_llm_guard import GuardMiddleware, Route
from asgi_llm_guard.streams import StreamRules
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
GEMINI = f"/v1beta/models/{BILLED}:streamGenerateContent"
WORDS = "one two three four five six seven eight"


def forwarding(stage: Stage, rules: StreamRules) -> Starlette:
    """Forwards requests to the provider, and its answers as they come."""

    async def forwarded(path: str, body: bytes) -> AsyncIterator[bytes]:
        url = stage.base_url.removesuffix("/v1") + path
        async with stage.client.stream("POST", url, content=body) as response:
            async for piece in response.aiter_raw():
                yield piece

    async def endpoint(request: Request) -> Response:
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return StreamingResponse(forwarded(path, await request.body()), media_type="text/event-stream")

    routes = [Route(CHAT, inject_usage=True, streams=rules), Route("/v1beta/{rest:path}", streams=rules)]
    return Starlette(
        routes=[Path_("/{rest:path}", endpoint, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=stage.guard, routes=routes)],
    )


async def test_stream_is_read_on(stage: Stage) -> None:
    """T18: a client that leaves after chunk 5 of a stream that is read to its end: the ledger is the provider's bill."""
    stage.provider.script(Behaviour.slow())
    rules = StreamRules(drain="read", total_s=600)
    async with stage.serve(forwarding(stage, rules)) as server:
        async with server.connection() as connection:
            connection.ask(CHAT, body=body_of(WORDS, stream=True))
            stage.provider.release(5)
            await connection.until(b"three")
        stage.provider.release()
        (record,) = await stage.settled(calls=1)
    assert stage.provider.disconnects == 0
    assert record.outcome == "measured"


async def test_stream_that_reports_all_along_is_closed(stage: Stage) -> None:
    """T18: where usage comes with every chunk, a stream that ends with its client is charged as the provider bills it."""
    stage.provider.script(Behaviour.slow())
    body = {
        "contents": [{"role": "user", "parts": [{"text": WORDS}]}],
        "generationConfig": {"maxOutputTokens": MAX_TOKENS},
    }
    async with stage.serve(forwarding(stage, StreamRules())) as server:
        async with server.connection() as connection:
            connection.ask(GEMINI + "?alt=sse", body=json.dumps(body).encode())
            stage.provider.release(5)
            await connection.until(b"three")
        await stage.provider.until(lambda: stage.provider.disconnects == 1)
        (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "measured"
    assert record.cost_nanousd is not None
    assert record.cost_nanousd == pytest.approx(stage.provider.total_nanousd, rel=0.02)
