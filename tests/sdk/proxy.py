"""A proxy of one provider's chat API, as a service may write it by itself: middleware outside, a guarded client inside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from asgi_llm_guard import Guard, GuardMiddleware

PASSED_ON = ("content-type", "retry-after", "retry-after-ms", "x-request-id", "x-should-retry")


class ChatCompletions:
    """Hands a request on to the provider, and the answer back as it comes.

    The middleware has read the body, and admitted the call that it describes. The provider's client is guarded,
    and takes that over: it meters what passes, and settles it however the request ends.
    """

    def __init__(self, provider: httpx2.AsyncClient) -> None:
        self.provider = provider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        try:
            async with self.provider.stream("POST", "chat/completions", content=body) as answer:
                response = await respond(answer)
                await response(scope, receive, send)
        except httpx2.TransportError as error:
            await failure(error)(scope, receive, send)


async def respond(answer: httpx2.Response) -> Response:
    """The provider's answer as a response of ours."""
    headers = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
    if headers.get("content-type", "").startswith("text/event-stream"):
        return StreamingResponse(events(answer), answer.status_code, headers)
    return Response(await answer.aread(), answer.status_code, headers)


async def events(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The provider's events, and an event that says so if they break off."""
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    except httpx2.TransportError as error:
        yield b"\n\ndata: " + failure(error).body + b"\n\n"


def failure(error: httpx2.TransportError) -> JSONResponse:
    """What callers are told when the provider does not answer, or not to the end."""
    status, message = 502, "The provider's answer broke off."
    if isinstance(error, httpx2.TimeoutException):
        status, message = 504, "The provider did not answer in time."
    elif isinstance(error, httpx2.ConnectError):
        message = "The provider cannot be reached."
    content = {"message": message, "type": "server_error", "param": None, "code": "provider_failed"}
    return JSONResponse({"error": content}, status)


def create_app(guard: Guard, provider: httpx2.AsyncClient, **guarding: Any) -> Starlette:
    """The service. `guarding`: further arguments of `GuardMiddleware`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with guard, provider:
            yield

    return Starlette(
        routes=[Route("/v1/chat/completions", ChatCompletions(provider), methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=guard, **guarding)],
        lifespan=lifespan,
    )


def provider_client(guard: Guard, url: str, key: str) -> httpx2.AsyncClient:
    """A guarded client of the provider's OpenAI-compatible API."""
    return guard.httpx_client(
        base_url=url,
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
        trust_env=False,
    )
