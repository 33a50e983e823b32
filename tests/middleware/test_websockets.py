"""WebSockets: handshakes are guarded like POST requests, and the admission lasts until the socket is closed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.decorator.values import ledger
from tests.middleware.asgi import Message, websocket
from tests.middleware.test_answers import REFUSAL
from tests.middleware.values import SESSION, guarded, new_guard

from asgi_llm_guard import Concurrency, Iterations, RateLimit, Route, current_admission
from asgi_llm_guard.identity import TrustedHeaders

pytestmark = pytest.mark.anyio

DISCONNECT: Message = {"type": "websocket.disconnect", "code": 1001}


async def accepts(scope: Any, receive: Any, send: Any) -> None:
    """Accepts, answers every message with the session's id, and closes."""
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": current_admission().context.session})
    await send({"type": "websocket.close", "code": 1000})


async def test_handshake_is_claimed() -> None:
    """A handshake takes what a request costs; the next one beyond the limit is closed with 1008 and a reason."""
    guard = new_guard(Iterations(1))
    app = guarded(accepts, guard)
    messages: list[Message] = [{"type": "websocket.receive", "text": "hello"}, DISCONNECT]
    exchange = await websocket("/ws", headers=SESSION, messages=messages).run(app)
    assert [message["type"] for message in exchange.sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert exchange.sent[1]["text"] == "s"
    assert len(await ledger(guard)) == 1

    exchange = await websocket("/ws", headers=SESSION).run(app)
    (message,) = exchange.sent
    assert (message["type"], message["code"]) == ("websocket.close", 1008)
    assert message["reason"].startswith("session_iterations_exhausted")


async def test_refusal_as_a_response() -> None:
    """Where the server can send a response, a refused handshake gets the whole of it, rate-limit fields included."""
    identity = TrustedHeaders(trust_headers=True, caller="x-user")
    guard = new_guard(RateLimit("1/minute", per="caller", name="rpm"), identity=identity)
    headers = [(b"x-user", b"alice"), (b"x-request-id", b"req-1")]
    app = guarded(accepts, guard)
    await websocket("/ws", headers=headers, messages=[DISCONNECT]).run(app)
    exchange = await websocket("/ws", headers=headers, can_refuse=True).run(app)
    assert [message["type"] for message in exchange.sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (exchange.status, exchange.headers["ratelimit-policy"]) == (429, '"rpm";q=1;w=60')
    told = json.loads(exchange.body)
    assert (told["code"], told["instance"]) == ("rate_limit_exceeded", "req-1")


async def test_slot_lasts_as_long_as_the_socket() -> None:
    """A slot that a WebSocket takes is free again once it is closed, by either side or by an error."""
    guard = new_guard(Concurrency(1, per="caller"))

    async def closes(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        inner = await websocket("/ws").run(guarded(accepts, guard))
        assert inner.sent[0]["code"] == 1013
        await send({"type": "websocket.close", "code": 1000})
        assert await guard.storage.open_holds() == 0

    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("a bug")

    await websocket("/ws").run(guarded(closes, guard))
    with pytest.raises(KeyError):
        await websocket("/ws").run(guarded(breaks, guard))
    exchange = await websocket("/ws", messages=[DISCONNECT]).run(guarded(accepts, guard))
    assert exchange.sent[0]["type"] == "websocket.accept"
    assert await guard.storage.open_holds() == 0


@pytest.mark.parametrize("path", ["/ws", "/unguarded"])
@pytest.mark.parametrize("closed", [False, True])
async def test_refusal_inside_the_handler(path: str, closed: bool) -> None:
    """A refusal that escapes the handler closes the socket with its reason, unless it is closed already."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if closed:
            await send({"type": "websocket.close", "code": 1000})
        raise ExceptionGroup("tasks", [REFUSAL])

    exchange = websocket(path)
    middleware = guarded(app, new_guard(), routes=[Route("/ws")])
    if closed:
        with pytest.raises(ExceptionGroup):
            await exchange.run(middleware)
    else:
        await exchange.run(middleware)
    assert [message["type"] for message in exchange.sent] == ["websocket.accept", "websocket.close"]
    assert exchange.sent[1]["code"] == (1000 if closed else 1008)


async def test_client_has_left() -> None:
    """After the client has left, a refusal has nobody to be told to."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert [(await receive())["type"] for _ in range(2)] == ["websocket.connect", "websocket.disconnect"]
        raise REFUSAL

    exchange = websocket("/ws", messages=[DISCONNECT])
    with pytest.raises(type(REFUSAL)):
        await exchange.run(guarded(app, new_guard()))
    assert exchange.sent == []


async def test_other_handshakes_that_are_refused() -> None:
    """Handshakes are refused for unlisted paths, malformed ids and while the instance drains, as requests are."""
    guard = new_guard()
    app = guarded(accepts, guard, routes=[Route("/ws")], unlisted="deny")
    exchange = await websocket("/other", can_refuse=True).run(app)
    assert exchange.status == 403
    exchange = await websocket("/ws", headers=[*SESSION, *SESSION], can_refuse=True).run(app)
    assert exchange.status == 400
    await guard.drain()
    exchange = await websocket("/ws", can_refuse=True).run(app)
    assert exchange.status == 503
