"""One background event loop per process: heartbeats, and the engine for synchronous code."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

from asgi_llm_guard.errors import ContextError
from asgi_llm_guard.storage.base import LAPSE_MS

__all__ = ["begin", "keep_alive", "later", "let_go", "run"]

_log = logging.getLogger("asgi_llm_guard")
_BEAT_S: Final = LAPSE_MS / 3000

T = TypeVar("T")


class Beating(Protocol):
    """What is kept alive."""

    async def heartbeat(self) -> None: ...


class _Background:
    """A daemon thread with an event loop. Made when first needed, and made anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._hearts: weakref.WeakSet[Beating] = weakref.WeakSet()

    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            with self._lock:
                if self._loop is None:
                    loop = asyncio.new_event_loop()
                    self._thread = threading.Thread(target=self._run, args=(loop,), name="llm-guard", daemon=True)
                    self._thread.start()
                    self._loop = loop
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(self._beat())
        loop.run_forever()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            for heart in tuple(self._hearts):
                try:
                    await heart.heartbeat()
                except Exception:  # noqa: BLE001 - one guard's failure must not stop the others' heartbeats
                    _log.exception("a heartbeat failed; the next one is in %s s", _BEAT_S)

    def keep_alive(self, heart: Beating) -> None:
        if heart not in self._hearts:
            self._hearts.add(heart)
            self.loop()

    def let_go(self, heart: Beating) -> None:
        self._hearts.discard(heart)

    def run(self, work: Coroutine[Any, Any, T], undo: Callable[[], object] | None, *, anywhere: bool) -> T:
        loop = self.loop()
        if threading.current_thread() is self._thread or (not anywhere and _in_event_loop()):
            work.close()
            raise ContextError(
                "the synchronous API was called on an event loop's thread, which it would block; "
                "use `async with guard.call(...)` there, or call it from a worker thread"
            )
        waiting = None
        try:
            waiting = asyncio.run_coroutine_threadsafe(work, loop)
            return waiting.result()
        except BaseException as error:
            if isinstance(error, Exception) and (waiting is None or _comes_from(waiting, error)):
                raise
            # Interrupted (Ctrl-C, which inside of `Condition.wait` may come out as a RuntimeError): nobody takes the
            # answer any more. In the loop's order: if the work is not done when it is cancelled, it undoes what it did
            # itself.
            if waiting is not None:
                waiting.cancel()
            if undo is not None:
                loop.call_soon_threadsafe(undo)
            raise


def _comes_from(work: Future[Any], error: Exception) -> bool:
    """Whether it is by this error that the work has ended. One that has come to another end is undone all the same."""
    return work.done() and (work.cancelled() or work.exception() is error)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_background = _Background()


def keep_alive(heart: Beating) -> None:
    """Send heartbeats for `heart` every 5 seconds, for as long as it lives or until `let_go`."""
    _background.keep_alive(heart)


def let_go(heart: Beating) -> None:
    """Send no more heartbeats for `heart`; one that is being sent may still end."""
    _background.let_go(heart)


def run(work: Coroutine[Any, Any, T], *, undo: Callable[[], object] | None = None, anywhere: bool = False) -> T:
    """Run `work` on the background loop and wait for it. For synchronous code.

    `undo`: called in the loop if the wait is interrupted (`KeyboardInterrupt`), for work that was done by then.
    `anywhere`: on the thread of another event loop too, which stands still meanwhile: for callers who block it anyway.

    Raises:
        ContextError: called on the thread of an event loop.
    """
    return _background.run(work, undo, anywhere=anywhere)


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run `work` on the background loop, and do not wait for it. From any thread."""
    return asyncio.run_coroutine_threadsafe(work, _background.loop())


def later(work: Callable[[], object]) -> None:
    """Have `work` called on the background loop, soon.

    For finalizers: they run wherever the garbage collector happens to be, inside a lock that they would need too.
    """
    _background.loop().call_soon_threadsafe(work)
