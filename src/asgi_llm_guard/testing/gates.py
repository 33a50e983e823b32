"""What waits, waits for a gate: never for the time of day."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Changes", "Gate"]


class Changes:
    """Wakes whoever waits for a condition, in whichever thread and event loop they wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def tell(self) -> None:
        """Something changed: look again."""
        with self._lock:
            waiting = tuple(self._waiting)
        for loop, event in waiting:
            with suppress(RuntimeError):  # its loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(event.set)

    async def until(self, condition: Callable[[], bool]) -> None:
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        with self._lock:  # registered before the first look, so that no change is missed
            self._waiting.add(entry)
        try:
            while not condition():
                await event.wait()
                event.clear()
        finally:
            with self._lock:
                self._waiting.discard(entry)


class Gate:
    """Closed until released: by steps, or for good. Works across threads and event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes = Changes()
        self._steps: float = 0

    def release(self, steps: int | None = None) -> None:
        """Let `steps` more steps through, whoever comes first; `None`: everything, from here on."""
        with self._lock:
            self._steps += math.inf if steps is None else steps
        self._changes.tell()

    async def step(self) -> None:
        """Wait for one step, and take it."""
        await self._changes.until(self._take)

    def _take(self) -> bool:
        with self._lock:
            if self._steps < 1:
                return False
            self._steps -= 1
            return True
