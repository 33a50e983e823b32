"""Those who wait for the holds of others: calls that would fit if calls in flight used less than they hold."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Final

from asgi_llm_guard.claims import Ended, Granted, Refused
from asgi_llm_guard.denials.receipts import held_by_others

__all__ = ["Answer", "Waiters"]

Answer = Granted | Refused | Ended

_FIRST_PAUSE_S: Final = 0.005


class Waiters:
    """The calls of one guard that wait.

    Args:
        wait_s: how long one waits at most.
        most: how many may wait at the same time; more are refused at once.
    """

    __slots__ = ("_lock", "_waiting", "most", "wait_s")

    def __init__(self, wait_s: float, most: int) -> None:
        self.wait_s = wait_s
        self.most = most
        self.forked()

    def forked(self) -> None:
        """This is a new process: nobody waits in it."""
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, answer: Answer, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """Where only holds of others stand in the way, wait for them up to `wait_s`, and ask again."""
        if len(self._waiting) >= self.most:
            return answer
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self.wait_s, _FIRST_PAUSE_S
        while (
            isinstance(answer, Refused)
            and any(map(held_by_others, answer.states))
            and (left := deadline - loop.time()) > 0
        ):
            # Settlements of this process wake it; those of others are found by asking again.
            await self._next_settlement(loop, min(pause, left))
            pause *= 2
            answer = await attempt()
        return answer

    async def _next_settlement(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        waiter = (loop, loop.create_future())
        with self._lock:
            self._waiting.add(waiter)
        try:
            await asyncio.wait((waiter[1],), timeout=timeout_s)
        finally:
            with self._lock:
                self._waiting.discard(waiter)
            waiter[1].cancel()

    def wake(self) -> None:
        """Something was settled: let them ask again. From any thread."""
        if not self._waiting:
            return
        with self._lock:
            waiting = tuple(self._waiting)
        for loop, future in waiting:
            # A loop that was closed meanwhile has nobody waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set, future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
