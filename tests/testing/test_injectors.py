"""Clients that leave, and processes that die."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from asgi_llm_guard.testing import Disconnect

pytestmark = pytest.mark.anyio

HTTP: Scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.4"}}


class Wire:
    """The server's side: a request in parts, and what was sent to the client."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        return await asyncio.Future()  # the client is there, and silent

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def post() -> Wire:
    return Wire(
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
    )


async def chunks() -> AsyncGenerator[str]:
    for number in range(5):
        yield f"{number}"


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
    await StreamingResponse(chunks())(scope, receive, send)


async def test_messages_before_the_client_leaves_arrive() -> None:
    """With two messages let through the client has the start and one chunk; the app sees an error."""
    wire = post()

    with pytest.raises(ClientDisconnect):
        await Disconnect(streaming, after_messages=2)(HTTP, wire.receive, wire.send)

    assert [message["type"] for message in wire.sent] == ["http.response.start", "http.response.body"]
    assert wire.sent[1]["body"] == b"0"


async def test_older_servers_swallow_what_is_sent() -> None:
    """With `raises=False` the app may send on, and nothing arrives."""
    wire = post()
    finished = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"lost"})
        finished.append(await receive())

    await Disconnect(app, after_messages=1, raises=False)(HTTP, wire.receive, wire.send)

    assert wire.sent == [{"type": "http.response.start", "status": 200}]
    assert finished == [{"type": "http.disconnect"}]


async def test_a_waiting_app_is_told() -> None:
    """An app that waits for a disconnect while it sends receives it at once."""
    wire = Wire()
    told: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        waiting = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200})
        told.append(await waiting)

    await Disconnect(app, after_messages=1)(HTTP, wire.receive, wire.send)

    assert told == [{"type": "http.disconnect"}]


async def test_leaving_before_the_response() -> None:
    """With `after_messages=0` the whole request can be read, and not a byte answered."""
    wire = post()
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.extend([await receive(), await receive(), await receive()])
        await send({"type": "http.response.start", "status": 200})

    with pytest.raises(OSError, match="the client has left"):
        await Disconnect(app, after_messages=0)(HTTP, wire.receive, wire.send)

    assert [message["type"] for message in received] == ["http.request", "http.request", "http.disconnect"]
    assert wire.sent == []


async def test_websockets_leave_in_their_own_words() -> None:
    """A WebSocket app receives `websocket.disconnect`."""
    wire = Wire()
    told: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        told.append(await receive())

    await Disconnect(app, after_messages=1)({**HTTP, "type": "websocket"}, wire.receive, wire.send)

    assert told == [{"type": "websocket.disconnect"}]


async def test_lifespan_is_left_alone() -> None:
    """Start and end of the app are nobody's to leave."""
    wire = Wire({"type": "lifespan.startup"})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "lifespan.startup"}
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    await Disconnect(app, after_messages=0)({"type": "lifespan"}, wire.receive, wire.send)

    assert len(wire.sent) == 2


def test_kill_self_runs_no_finally() -> None:
    """The process dies by SIGKILL, and no `finally` runs."""
    program = (
        "from asgi_llm_guard.testing import kill_self\n"
        "try:\n    kill_self()\nfinally:\n    print('finally', flush=True)"
    )

    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (died.returncode, died.stdout) == (-9, "")
