"""SIGTERM and SIGINT: drain, and let whoever handled the signal before go on at the same time.

Rule 1: a server stops listening and waits for its connections; meanwhile the guard refuses what is new, gives streams
their time, and ends the rest, so that the server need not wait for ever.

Rule 2: where nobody handled the signal, the process ends by it, after the drain.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import FrameType
from typing import Any, Final

from asgi_llm_guard import background
from asgi_llm_guard.errors import ConfigurationError

__all__ = ["Signals"]

_log = logging.getLogger("asgi_llm_guard")

_NUMBERS: Final = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """The handlers of one guard.

    Args:
        drain: what is done when a signal comes, once.
    """

    __slots__ = ("_before", "_drain", "_draining")

    def __init__(self, drain: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._drain = drain
        self._before: dict[int, Any] = {}
        self._draining: Future[object] | None = None

    def install(self) -> bool:
        """Handle the signals from now on, in front of whoever does now. Whether that could be done: on the main thread
        only. Servers put their own handlers in when they start; so this may be repeated, and does nothing twice."""
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in _NUMBERS:
            current = signal.getsignal(number)
            if current != self._handle:
                self._before[number] = current
                signal.signal(number, self._handle)
        return True

    def remove(self) -> None:
        """Put the handlers of before back, where nobody came in front of these. On the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError("signals: handlers can be put back on the main thread only")
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        first = self._draining is None
        if first:
            _log.warning("%s: draining", signal.Signals(number).name)
            self._draining = background.begin(self._drain())
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN and self._draining is not None:
            if first:
                # From here, which is another thread then, nobody may change handlers: it is sent again.
                self._draining.add_done_callback(lambda _: os.kill(os.getpid(), number))
            else:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
