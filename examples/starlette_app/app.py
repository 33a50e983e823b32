"""An OpenAI-compatible endpoint in front of a provider, guarded as `guard.toml` says.

Callers use any OpenAI SDK with a key of `keys.toml`; the provider's key stays here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from asgi_llm_guard import Guard, GuardMiddleware
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.identity import Identity, IdentityError, Resolver
from asgi_llm_guard.settings import build_guard_arguments, build_middleware_arguments, load_settings

HERE = Path(__file__).parent
PASSED_ON = ("content-type", "retry-after", "retry-after-ms", "x-request-id", "x-should-retry")


class ChatCompletions:
    """Hands a request on to the provider, and the answer back as it comes."""

    def __init__(self, guard: Guard, provider: httpx2.AsyncClient) -> None:
        self.guard = guard
        self.provider = provider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The middleware has read the body, and admitted the call that it describes: `guard.call` stands for it.
        # However this block is left, the call is settled and the provider's connection is let go.
        body = await Request(scope, receive).body()
        try:
            async with (
                self.guard.call() as call,
                self.provider.stream("POST", "chat/completions", content=body) as answer,
            ):
                response = await respond(call, answer)
                await response(scope, receive, send)
        except httpx2.TransportError as error:
            await failure(error)(scope, receive, send)


async def respond(call: ActiveCall, answer: httpx2.Response) -> Response:
    """The provider's answer as a response of ours, recorded on its call."""
    headers = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
    if headers.get("content-type", "").startswith("text/event-stream"):
        return StreamingResponse(events(call, answer), answer.status_code, headers)
    content = await answer.aread()
    call.record(answer)  # an error says that nothing was generated: it costs no money
    call.end()
    return Response(content, answer.status_code, headers)


async def events(call: ActiveCall, answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The provider's events, metered as they pass."""
    try:
        async for chunk in call.stream(answer.aiter_raw()):
            yield chunk
        call.end()  # before the caller sees the end, so that its next call finds this one settled
    except httpx2.TransportError as error:
        call.end(error)
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


def key_required(keys: Resolver) -> Resolver:
    """Nobody is anonymous here: what callers spend is real money."""

    def resolve(scope: Mapping[str, Any]) -> Identity:
        identity = keys(scope)
        if identity is None:
            raise IdentityError("Send an API key of this service: Authorization: Bearer …", status=403)
        return identity

    return resolve


async def health(request: Request) -> Response:  # noqa: ARG001 - Starlette passes it
    return PlainTextResponse("ok")


def create_app(guard: Guard, provider: httpx2.AsyncClient, **guarding: Any) -> Starlette:
    """The service. `guarding`: further arguments of `GuardMiddleware`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:  # noqa: ARG001 - Starlette passes it
        async with guard, provider:
            yield

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(guard, provider), methods=["POST"]),
            Route("/health", health),
        ],
        middleware=[Middleware(GuardMiddleware, guard=guard, **guarding)],
        lifespan=lifespan,
    )
    app.state.guard = guard
    return app


def provider_client(url: str, key: str) -> httpx2.AsyncClient:
    """A client of the provider's OpenAI-compatible API."""
    return httpx2.AsyncClient(
        base_url=url,
        headers={
            "authorization": f"Bearer {key}",
            "content-type": "application/json",
            "accept-encoding": "identity",  # what is compressed cannot be metered as it passes
        },
        timeout=httpx2.Timeout(600, connect=5),
        trust_env=False,
    )


def from_environment() -> Starlette:
    """The service as `guard.toml` and the environment describe it: `uvicorn --factory app:from_environment`."""
    settings = load_settings(os.environ.get("GUARD_FILE") or HERE / "guard.toml")
    arguments = build_guard_arguments(settings)
    guard = Guard(**{**arguments, "identity": key_required(arguments["identity"])})
    url = os.environ.get("PROVIDER_URL", "https://api.openai.com/v1")
    provider = provider_client(url, os.environ["PROVIDER_KEY"])
    return create_app(guard, provider, **build_middleware_arguments(settings))
