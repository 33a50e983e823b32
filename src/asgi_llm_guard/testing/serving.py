"""A fake provider behind a real server, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final

from starlette.types import ASGIApp

from asgi_llm_guard.errors import NotInstalledError
from asgi_llm_guard.testing.behaviour import ConnectionCut
from asgi_llm_guard.testing.gates import Changes

if TYPE_CHECKING:
    import uvicorn

__all__ = ["BaseURL", "Serving"]

_TICK_S: Final = 1.0
_TURN_S: Final = 0.002


class BaseURL(str):
    """Where a served provider is, as SDKs of OpenAI take it: with `/v1` at its end."""

    __slots__ = ()

    @property
    def root(self) -> str:
        """Without it, as most other SDKs take it."""
        return self.removesuffix("/v1")


class Serving:
    """Serves an app on a free loopback port, between the ends of a `with` or an `async with` block."""

    def __init__(self, app: ASGIApp, *, stop: Callable[[], None]) -> None:
        """`stop` ends what is still being answered; it is called in the server's event loop."""
        self._app = app
        self._stop = stop
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._changes = Changes()
        self._log_filter = _NoCuts()
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> BaseURL:
        """Raises `NotInstalledError` if uvicorn is missing."""
        try:
            import uvicorn
        except ImportError as error:
            raise NotInstalledError("FakeProvider.serve", "testing") from error
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,  # longer than clients keep connections: none meets one that is just being closed
        )
        server = self._server(uvicorn.Server, config)
        logging.getLogger("uvicorn.error").addFilter(self._log_filter)
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Its connections have it too; asyncio sets it only where the socket names its protocol.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=asyncio.run, args=[self._run(server, self._listener)], daemon=True)
        self._thread.start()
        self._ready.wait()
        return BaseURL(f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None  # noqa: S101 - entered before
        assert self._listener is not None  # noqa: S101 - as above
        self._stopping.set()
        self._changes.tell()
        self._thread.join()
        self._listener.close()
        logging.getLogger("uvicorn.error").removeFilter(self._log_filter)

    async def __aenter__(self) -> BaseURL:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ends in the server's thread may wait for this loop, so this loop does not wait for the thread.
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def _server(self, kind: type[uvicorn.Server], config: uvicorn.Config) -> uvicorn.Server:
        """A server that ends at once. Uvicorn's own looks ten times a second whether it should, and then waits again."""
        changes, stopping, stop = self._changes, self._stopping, self._stop

        class Server(kind):  # type: ignore[valid-type, misc]
            async def main_loop(self) -> None:
                while not stopping.is_set():
                    await self.on_tick(0)  # what time it is
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TICK_S):
                            await changes.until(stopping.is_set)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - as uvicorn's
                for server in self.servers:
                    server.close()
                await asyncio.sleep(_TURN_S)  # what was accepted last becomes a connection
                for connection in list(self.server_state.connections):
                    connection.shutdown()
                while self.server_state.connections or self.server_state.tasks:
                    stop()
                    await asyncio.sleep(_TURN_S)

        return Server(config)

    async def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        try:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            # A few turns: the server offers a flag, and no event.
            while not server.started and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
        finally:
            self._ready.set()
        await serving


class _NoCuts(logging.Filter):
    """Keeps the cuts that a test asked for out of the server's error log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ConnectionCut))
