"""Ways out of a WebSocket: whoever closes it, and however it breaks, its calls and its slot are settled once."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect
from tests.exits.kit import SLOTS, ApplicationError, Server, Stage
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from asgi_llm_guard import GuardMiddleware
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio


def app_of(stage: Stage, *, extensions: bool = True) -> Any:
    """Answers every message with a call; `bye` closes, `fail` raises, `long` streams, `limit` is refused."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        while True:
            try:
                text = await socket.receive_text()
            except WebSocketDisconnect:
                return
            if text == "bye":
                await socket.close(4000)
                return
            if text == "fail":
                raise ApplicationError
            if text == "long":
                async for word in stage.stream():
                    await socket.send_text(word.decode())
            else:
                await socket.send_text(await stage.complete(text))

    # The first call in a connection takes over the one that the handshake claimed; without any, nothing was called.
    guarded = GuardMiddleware(app, stage.guard)
    stage.guard.hooked = True

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        await guarded(scope if extensions else {**scope, "extensions": {}}, receive, send)

    return plain


def open_socket(server: Server) -> connect:
    url = server.url.replace("http", "ws")
    return connect(url, additional_headers={"x-session-id": "s"}, proxy=None, compression=None)


async def ask(socket: ClientConnection, text: str) -> str:
    await socket.send(text)
    return str(await socket.recv())


async def test_close_by_the_client(stage: Stage) -> None:
    """A conversation of three messages that its client closes is three calls."""
    async with stage.serve(app_of(stage)) as server:
        async with open_socket(server) as socket:
            for text in ("one", "two", "three"):
                assert await ask(socket, text) == f"Echo: {text}"
        await stage.settled(calls=3)


async def test_close_by_the_server(stage: Stage) -> None:
    """When the client sees the server's close, the slot of the connection is free."""
    stage.guard.engine.waiters.wait_s = 0
    async with stage.serve(app_of(stage)) as server:
        for _ in range(2 * SLOTS):
            async with open_socket(server) as socket:
                await socket.send("bye")
                with pytest.raises(ConnectionClosed) as closed:
                    await socket.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 4000
                assert await stage.storage.open_holds() == 0
        await stage.settled(calls=0, requests=2 * SLOTS)


async def test_exception(stage: Stage) -> None:
    """A connection that its handler breaks is settled."""
    async with stage.serve(app_of(stage)) as server:
        async with open_socket(server) as socket:
            await ask(socket, "one")
            await socket.send("fail")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
        await stage.settled(calls=1)


async def test_disconnect_without_a_close(stage: Stage) -> None:
    """A client whose connection breaks between messages is settled."""
    async with stage.serve(app_of(stage)) as server:
        async with open_socket(server) as socket:
            await ask(socket, "one")
            socket.transport.abort()
        await stage.settled(calls=1)


async def test_disconnect_in_the_middle_of_a_stream(stage: Stage) -> None:
    """A client whose connection breaks in the middle of a streamed answer pays for what the provider bills."""
    stage.provider.script(Behaviour.slow())
    async with stage.serve(app_of(stage)) as server:
        async with open_socket(server) as socket:
            stage.provider.release(2)
            await ask(socket, "long")
            socket.transport.abort()
        stage.provider.release()
        await stage.settled(calls=1, exact=False)


@pytest.mark.parametrize("extensions", [True, False], ids=["as a response", "as a close"])
async def test_refused_handshake(stage: Stage, *, extensions: bool) -> None:
    """A handshake that is refused takes nothing: 429 where the server can say so, else 403; the others go on."""
    stage.guard.engine.waiters.wait_s = 0
    async with stage.serve(app_of(stage, extensions=extensions)) as server:
        sockets = [await open_socket(server) for _ in range(SLOTS)]
        with pytest.raises(InvalidStatus) as refused:
            await open_socket(server)
        assert refused.value.response.status_code == (429 if extensions else 403)
        for socket in sockets:
            assert await ask(socket, "hello") == "Echo: hello"
            await socket.close()
        await stage.settled(calls=SLOTS, requests=SLOTS + 1)


async def test_drained_handshake(stage: Stage) -> None:
    """A guard that drains refuses handshakes with a 503."""
    async with stage.serve(app_of(stage)) as server:
        await stage.guard.drain(0)
        with pytest.raises(InvalidStatus) as refused:
            await open_socket(server)
        assert refused.value.response.status_code == 503
        await stage.settled(calls=0)
