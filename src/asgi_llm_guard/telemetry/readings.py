"""What the storage says for gauges: read when somebody collects, at most every 5 seconds, and never on an event loop's time."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, Generic, TypeVar

from asgi_llm_guard.clock import Clock

__all__ = ["Latest"]

_log = logging.getLogger("asgi_llm_guard")

_FRESH_MS: Final = 5_000
_GIVEN_UP_MS: Final = 30_000
_WAIT_S: Final = 1.0

T = TypeVar("T")


class Latest(Generic[T]):
    """The latest answer to a question that is asked in the background.

    Args:
        ask: begins to ask, from any thread.
        clock: the guard's.
    """

    def __init__(self, ask: Callable[[], Future[T]], clock: Clock) -> None:
        self._ask: Callable[[], Future[T]] | None = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._asking: Future[T] | None = None
        self._asked_ms = 0
        self._known: T | None = None

    def close(self) -> None:
        """Ask no more."""
        with self._lock:
            self._ask = None

    def answer(self, *, waits: bool = True) -> T | None:
        """The answer, no older than 5 seconds; `None`: there is none, or it does not come within a second.

        On the thread of an event loop nobody waits: there it is what the collection before has begun to ask for.
        `waits`: whether to wait elsewhere; of several that are collected together, one need.
        """
        asking = self._begun()
        if asking is None:
            return None
        looped = _in_event_loop()
        if waits and not looped:
            wait([asking], timeout=_WAIT_S)
        if asking.done():
            self._known = _result(asking)
        elif not looped:
            return None
        return self._known

    def _begun(self) -> Future[T] | None:
        """What is being asked, or was not long ago; `None`: nothing any more."""
        with self._lock:
            if self._ask is None:
                return None
            now_ms = self._clock.now_ms()
            age_ms = abs(now_ms - self._asked_ms)
            last = self._asking
            if last is None or (age_ms >= _FRESH_MS and last.done()) or age_ms >= _GIVEN_UP_MS:
                if last is not None:
                    self._known = _result(last) if last.done() else None
                self._asking = self._ask()
                self._asked_ms = now_ms
            return self._asking


def _result(asking: Future[T]) -> T | None:
    if asking.cancelled():
        return None
    error = asking.exception()
    if error is not None:
        _log.debug("the storage could not be read for a gauge", exc_info=error)
        return None
    return asking.result()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
