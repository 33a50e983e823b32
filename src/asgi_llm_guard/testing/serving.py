"""A fake provider behind a real server, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from asgi_llm_guard.errors import NotInstalledError
from asgi_llm_guard.testing.behaviour import ConnectionCut
from asgi_llm_guard.testing.gates import Changes

if TYPE_CHECKING:
    import uvicorn

__all__ = ["BaseURL", "Serving"]


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
        config = uvicorn.Config(self._app, lifespan="off", ws="none", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        logging.getLogger("uvicorn.error").addFilter(self._log_filter)
        self._listener = socket.create_server(("127.0.0.1", 0))
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

    async def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        try:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            # A few turns: the server offers a flag, and no event.
            while not server.started and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
        finally:
            self._ready.set()
        await self._changes.until(self._stopping.is_set)
        server.should_exit = True
        while not serving.done():
            self._stop()
            await asyncio.wait({serving}, timeout=0.02)
        await serving


class _NoCuts(logging.Filter):
    """Keeps the cuts that a test asked for out of the server's error log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ConnectionCut))
