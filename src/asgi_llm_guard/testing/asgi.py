"""Clients that call an app in this process, and clients that leave it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_llm_guard.errors import NotInstalledError

if TYPE_CHECKING:
    import httpx2

__all__ = ["Disconnect", "asgi_client", "kill_self"]


class Disconnect:
    """An ASGI app whose client leaves once it has been sent so many messages of the response.

    From then on the app receives `http.disconnect` (or `websocket.disconnect`), and what it sends
    raises `OSError`, as servers of ASGI 2.4 do, or goes nowhere (`raises=False`), as older ones.
    With `after_messages=0` the client leaves as soon as the request has been read.
    """

    def __init__(self, app: ASGIApp, *, after_messages: int, raises: bool = True) -> None:
        self._app = app
        self._after = after_messages
        self._raises = raises

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()
        sent = 0

        async def leaving_receive() -> Message:
            message = None if gone.is_set() else await _first(receive, gone)
            if message is None:
                return {"type": f"{scope['type']}.disconnect"}
            if self._after == 0 and not message.get("more_body", False):
                gone.set()
            return message

        async def leaving_send(message: Message) -> None:
            nonlocal sent
            if gone.is_set():
                if self._raises:
                    raise OSError("the client has left")
                return
            await send(message)
            sent += 1
            if sent == self._after:
                gone.set()

        await self._app(scope, leaving_receive, leaving_send)


async def _first(receive: Receive, gone: asyncio.Event) -> Message | None:
    """The next message, or `None` if the client leaves before it comes."""
    message, leaving = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({message, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return message.result() if message.done() else None
    finally:
        message.cancel()
        leaving.cancel()


def kill_self() -> NoReturn:
    """End this process as `kill -9` does: nothing is flushed, no `finally` runs. For subprocesses of tests."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable: nobody survives SIGKILL")


def asgi_client(app: ASGIApp, *, base_url: str = "http://testserver") -> httpx2.AsyncClient:
    """A client that calls the app in this process. Answers arrive whole: streams need `FakeProvider.serve`.

    Raises:
        NotInstalledError: httpx2 is missing.
    """
    try:
        import httpx2
    except ImportError as error:
        raise NotInstalledError("asgi_client", "httpx") from error
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=base_url)
