"""An application that streams, waits and answers in every way in which a guard is used."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.routing import Route as Path_
from tests.exits.kit import BILLED, MODEL, Server, Stage, body_of

from asgi_llm_guard import GuardMiddleware, Route, guarded
from asgi_llm_guard.gateway import Gateway

CHAT = "/v1/chat/completions"
EVENTS = "text/event-stream"


def application(stage: Stage, gateway: Gateway) -> Starlette:
    """`/own` streams what `call.stream` meters, `/function` what a guarded generator gives, `/hook` what a hooked
    client reads, `/opaque` what any client reads; `/llm` is a gateway; `/wait` and `/wait-opaque` do not stream."""
    guard = stage.guard
    # No connection is kept: it is closed in another event loop than it is used in.
    hooked = guard.httpx_client(base_url=stage.base_url, limits=httpx2.Limits(max_keepalive_connections=0))

    def events(words: AsyncIterator[bytes]) -> Response:
        async def told() -> AsyncIterator[bytes]:
            async for word in words:
                yield b"data: " + json.dumps(word.decode()).encode() + b"\n\n"

        return StreamingResponse(told(), media_type=EVENTS)

    @guarded(model=MODEL, max_output_tokens=20)
    async def words() -> AsyncIterator[dict[str, Any]]:
        async for chunk in stage.chunks("one two three"):
            yield chunk

    async def own(request: Request) -> Response:
        return events(stage.stream())

    async def function(request: Request) -> Response:
        async def told() -> AsyncIterator[bytes]:
            async for chunk in words():
                yield json.dumps(chunk).encode()

        return events(told())

    async def relayed(client: httpx2.AsyncClient, request: Request) -> Response:
        asked = client.build_request("POST", "/chat/completions", content=await request.body(), headers=_JSON)
        answer = await client.send(asked, stream=True)

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()

        return StreamingResponse(parts(), status_code=answer.status_code, media_type=EVENTS)

    async def hook(request: Request) -> Response:
        return await relayed(hooked, request)

    async def opaque(request: Request) -> Response:
        return await relayed(stage.client, request)

    async def wait(request: Request) -> Response:
        answer = await hooked.post("/chat/completions", content=await request.body(), headers=_JSON)
        answer.raise_for_status()
        return JSONResponse(answer.json())

    async def wait_opaque(request: Request) -> Response:
        answer = await stage.client.post("/chat/completions", content=await request.body(), headers=_JSON)
        return JSONResponse(answer.json())

    async def health(request: Request) -> Response:
        return PlainTextResponse("well")

    async def close() -> None:
        await hooked.aclose()

    app = Starlette(
        routes=[
            Path_("/own", own, methods=["POST"]),
            Path_("/function", function, methods=["POST"]),
            Path_("/hook" + CHAT, hook, methods=["POST"]),
            Path_("/opaque" + CHAT, opaque, methods=["POST"]),
            Path_("/wait" + CHAT, wait, methods=["POST"]),
            Path_("/wait-opaque" + CHAT, wait_opaque, methods=["POST"]),
            Path_("/health", health, methods=["GET", "POST"]),
            Mount("/llm", gateway.app()),
        ],
        middleware=[
            Middleware(
                GuardMiddleware,
                guard=guard,
                routes=[
                    Route("/own", dialect=None, calls="hooked"),
                    Route("/function", dialect=None, calls="hooked"),
                    Route("/hook/{rest:path}", dialect="openai", calls="hooked"),
                    Route("/llm/{rest:path}", dialect="openai", calls="hooked"),
                    Route("/wait/{rest:path}", dialect="openai", calls="hooked"),
                    Route("/opaque/{rest:path}", dialect="openai", calls="opaque"),
                    Route("/wait-opaque/{rest:path}", dialect="openai", calls="opaque"),
                ],
            )
        ],
    )
    app.state.close = close
    return app


_JSON = {"content-type": "application/json"}


@asynccontextmanager
async def served(stage: Stage) -> AsyncIterator[Server]:
    """The application on a real socket."""
    deployment = {
        "model_name": BILLED,
        "litellm_params": {"model": MODEL, "api_base": stage.base_url, "api_key": "sk-test"},
    }
    gateway = Gateway(stage.guard, [deployment])
    app = application(stage, gateway)
    try:
        async with stage.serve(app) as server:
            yield server
            await asyncio.sleep(0)
    finally:
        await gateway.aclose()
        await app.state.close()


class Reader:
    """Reads a streamed answer."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.text = b""
        self._parts = response.aiter_raw()

    async def until(self, words: bytes) -> None:
        """Read until these words have come."""
        async with asyncio.timeout(60):
            while words not in self.text:
                self.text += await anext(self._parts)

    async def rest(self) -> None:
        """Read to the end."""
        async with asyncio.timeout(60):
            async for part in self._parts:
                self.text += part

    @property
    def events(self) -> list[Any]:
        """What the events say. Fails if one of them is not whole."""
        assert self.text.endswith(b"\n\n"), self.text[-80:]
        data = [event.removeprefix(b"data: ") for event in self.text.split(b"\n\n") if b"data: " in event]
        return [json.loads(each.partition(b"data: ")[2] or each) for each in data if each != b"[DONE]"]


@asynccontextmanager
async def reading(server: Server, path: str, **headers: str) -> AsyncIterator[Reader]:
    """A request whose answer streams."""
    async with (
        httpx2.AsyncClient(base_url=server.url, verify=False, timeout=20) as client,
        client.stream(
            "POST", path, content=body_of(stream=True), headers={"x-session-id": "s", **_JSON, **headers}
        ) as response,
    ):
        yield Reader(response)
