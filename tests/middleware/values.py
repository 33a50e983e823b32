"""Guards and small applications that the tests of the middleware share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tests.decorator.values import ANSWER, PRICES, event
from tests.middleware.asgi import JSON_HEADERS, App, Exchange, request

from asgi_llm_guard import Guard, GuardMiddleware
from asgi_llm_guard.policies.base import Policy

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": "openai/test-model",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "hello"}],
}
EVENTS = [event("hel"), event("lo", last=True), b"data: [DONE]\n\n"]
SSE_HEADERS = ((b"content-type", b"text/event-stream"),)
SESSION = ((b"x-session-id", b"s"),)


def new_guard(*policies: Policy, **options: Any) -> Guard:
    return Guard(policies, **{"prices": PRICES, "hold_wait_s": 0, **options})


class Provider:
    """An application that remembers what it was asked, and answers like a provider."""

    def __init__(
        self,
        pieces: Sequence[bytes] | None = None,
        *,
        status: int = 200,
        headers: Sequence[tuple[bytes, bytes]] = JSON_HEADERS,
    ) -> None:
        self.pieces = [json.dumps(ANSWER).encode()] if pieces is None else list(pieces)
        self.status = status
        self.headers = headers
        self.bodies: list[bytes] = []
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": self.status, "headers": list(self.headers)})
        for number, piece in enumerate(self.pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(self.pieces)})

    @property
    def asked(self) -> Any:
        """The last request's body."""
        return json.loads(self.bodies[-1])


def raises(error: Callable[[], BaseException]) -> App:
    """An application that does nothing but raise."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error()

    return app


async def ask(
    app: App,
    body: Any = ASK,
    *,
    path: str = CHAT,
    headers: Sequence[tuple[bytes, bytes]] = (),
    method: str = "POST",
    session: bool = True,
) -> Exchange:
    """One request with a JSON body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = (*JSON_HEADERS, (b"content-length", b"%d" % len(content)), *(SESSION if session else ()), *headers)
    return await request(path, body=content, headers=all_headers, method=method).run(app)


def guarded(app: App, guard: Guard, **options: Any) -> GuardMiddleware:
    return GuardMiddleware(app, guard, **options)
