"""When calls to a server have waited too long: one timer for all calls of a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Final

from asgi_llm_guard.storage.redis_wire import Call

__all__ = ["Expiry", "overdue"]

_GRAIN_S: Final = 0.01


class Expiry:
    """One timer for all calls of a link, instead of one for each call.

    `expire` fails what is overdue at the instant it is given, and says when the next call will be, or
    `None` if none waits.
    """

    __slots__ = ("_expire", "_loop", "_timeout_s", "_timer", "armed")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeout_s: float, expire: Callable[[float], float | None]
    ) -> None:
        self.armed = False
        self._loop = loop
        self._timeout_s = timeout_s
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None

    def arm(self) -> None:
        """A call begins to wait, and no timer runs. None is due earlier than the shortest timeout from now."""
        self.armed = True
        self._timer = self._loop.call_later(self._timeout_s, self._pass)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.armed = False

    def _pass(self) -> None:
        now = monotonic()
        due = self._expire(now)
        self.armed = due is not None
        if due is not None:
            # Not for each call by itself: those that were handed over together become overdue together.
            self._timer = self._loop.call_later(max(due - now, _GRAIN_S), self._pass)


def overdue(calls: Iterable[Call], now: float, timeout_s: float) -> tuple[list[Call], float | None]:
    """Which calls have waited too long, and when the next one will have. The oldest come first."""
    late: list[Call] = []
    due: float | None = None
    for call in calls:
        at = call.at + call.timeout_s
        if not call.future.done():
            if at <= now:
                late.append(call)
            elif due is None or at < due:
                due = at
        if call.at + timeout_s > now:
            break  # those behind it came later, and no timeout is shorter
    return late, due
