"""How a response is ended from outside while the application is still at it; see `halting.py`.

Rule 1: only what is streamed is ended. An application that has not answered yet is left to end: its calls are refused,
and those that wait for a provider are called back; what it makes of that is its answer.

Rule 2: streams inside, of a gateway or a client hook, end by themselves first: they know where their events end.

Rule 3: the last event comes between two others. One that has begun is given time to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from asgi_llm_guard.halting import EVENT_S

if TYPE_CHECKING:
    from asgi_llm_guard.decision import Denied

__all__ = ["Ending", "Response", "Socket"]


class Response(Protocol):
    """What is ended."""

    @property
    def is_streaming(self) -> bool:
        """Its first part is on its way to the client, and its last is not."""
        ...

    def end_at_once(self, denied: Denied) -> bool:
        """Prepare its last event; whether no other one has begun."""
        ...


class Socket:
    """A WebSocket, which has no events: it is closed.

    Args:
        is_open: whether it is.
    """

    __slots__ = ("_is_open",)

    def __init__(self, is_open: Callable[[], bool]) -> None:
        self._is_open = is_open

    @property
    def is_streaming(self) -> bool:
        return self._is_open()

    def end_at_once(self, denied: Denied) -> bool:  # noqa: ARG002 - see Response
        return True


_OVER: Final = Socket(lambda: False)


class Ending:
    """Ends the response of one task. Made in that task.

    Args:
        response: what is ended.
    """

    __slots__ = ("_cancelled", "_loop", "_response", "_task", "fired")

    def __init__(self, response: Response) -> None:
        self._response: Response = response
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self.fired = False
        """The response is at its end: whatever the application still sends goes nowhere."""
        self._cancelled = False

    def halt(self, denied: Denied, *, patiently: bool) -> None:
        """End it. From any thread. `patiently`: what is inside may end it by itself."""
        with contextlib.suppress(RuntimeError):  # its loop is closed, and so is its connection
            self._loop.call_soon_threadsafe(self.begin, denied, patiently)

    def begin(self, denied: Denied, patiently: bool) -> None:
        """As `halt`, in its event loop."""
        if self._task is None or self.fired or not self._response.is_streaming:
            return
        if patiently:
            self._loop.call_later(EVENT_S, self.begin, denied, False)
        elif self._response.end_at_once(denied):
            self._fire()
        else:
            self._loop.call_later(EVENT_S, self._fire)

    def _fire(self) -> None:
        if self._task is not None and not self.fired and self._response.is_streaming:
            self.fired = self._cancelled = True
            self._task.cancel()

    def is_it(self) -> bool:
        """Whether the task was cancelled by this, and by nobody else: then it goes on. Takes back that it was."""
        cancelled, self._cancelled = self._cancelled, False
        return cancelled and self._task is not None and self._task.uncancel() == 0

    def over(self) -> None:
        """The task is done with the response."""
        self._task = None
        self._response = _OVER  # they know each other: only the garbage collector would free the two of them
