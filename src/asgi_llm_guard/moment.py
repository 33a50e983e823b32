"""Moments: whether a task has waited for something.

All that a task does from one wait to the next happens in one moment of its event loop. Whoever keeps
the moment in which something began can tell later whether there was a wait in between; and without
one, no coroutine gets an answer over a network.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import Context
from typing import Final

__all__ = ["Moment", "this_moment"]

_EMPTY: Final = Context()


class Moment:
    """A stretch of time in which an event loop goes from one callback to the next without a turn in between."""

    __slots__ = ("loop", "over")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: asyncio.AbstractEventLoop | None = loop
        """`None` when it is over."""
        self.over = False
        """The loop has gone on: whoever was running may have waited."""

    def end(self) -> None:
        """The loop goes on."""
        self.over = True
        self.loop = None


class _Here(threading.local):
    moment: Moment | None = None


_here = _Here()


def this_moment() -> Moment | None:
    """The moment of the event loop that runs in this thread; `None`: none does."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    moment = _here.moment
    if moment is None or moment.loop is not loop:
        moment = _here.moment = Moment(loop)
        # Loops call in the order in which they were asked to. Whatever wakes a task that begins to wait from
        # here on comes after this.
        loop.call_soon(moment.end, context=_EMPTY)
    return moment
