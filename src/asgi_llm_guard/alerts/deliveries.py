"""Sending alerts: at least once to every webhook, and once where nothing breaks, whichever process does it.

Rule 1: who has marked an alert for a webhook (its *turn*) sends it, and nobody else, for as long as the mark lasts. A
process that dies leaves a turn that ends by itself; every process that knows of the alert then asks for the next one.

Rule 2: what was taken by the receiver has a second mark (*sent*), until the window is over. It is made for the time of
a turn first, to see whether it is there, and for good after the receiver has answered.

Rule 3: nothing here is on the path of a call. Attempts of a turn come ever more rarely, and so do turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.alerts.webhook import DeliveryError, Webhook
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Alert
from asgi_llm_guard.storage.shared import Shared

_random: Final = random.SystemRandom()  # of its own: the module's may be seeded by the application
__all__ = ["Deliveries", "Due"]

_log = logging.getLogger("asgi_llm_guard")

MOST: Final = 1_000
"""So many alerts wait for one webhook; more are taken when there is room."""
_AT_ONCE: Final = 4
_LONGEST_PAUSE_S: Final = 30.0
_LONGEST_TURNS_MS: Final = 3_600_000


class Due(msgspec.Struct, frozen=True):
    """An alert that is to be sent to one webhook."""

    alert: Alert
    webhook: Webhook
    until_ms: int
    """When the window is over that it is about: it is news until then."""
    turns: int = 0
    """How often this process has asked for it."""

    @property
    def turn(self) -> str:
        """The name of the mark of whoever sends it."""
        return f"alert:{self.alert.id}:{self.webhook.id}:turn"

    @property
    def sent(self) -> str:
        """The name of the mark that it was taken."""
        return f"alert:{self.alert.id}:{self.webhook.id}:sent"


class Deliveries:
    """All of them in one process, on one event loop.

    `now_ms`: the storage's clock, as far as it is known. `patience_ms`: how long a turn lasts. `spread`: gives a factor
    for pauses.
    """

    def __init__(
        self,
        shared: Shared,
        now_ms: Callable[[], int],
        *,
        patience_ms: int,
        spread: Callable[[], float] | None = None,
    ) -> None:
        self._shared = shared
        self._now_ms = now_ms
        self._patience_ms = patience_ms
        self._spread = spread or _spread
        self._later: list[tuple[int, int, Due]] = []
        self._order = itertools.count()
        self._waiting: dict[str, int] = {}
        self._tasks: dict[asyncio.Task[None], Due] = {}
        self._gates: dict[str, asyncio.Semaphore] = {}

    def has_room(self, webhooks: Sequence[Webhook]) -> bool:
        """Whether one more alert can wait for each of them."""
        return all(self._waiting.get(webhook.id, 0) < MOST for webhook in webhooks)

    def add(self, due: Due) -> None:
        """Send it, or see to it that somebody does. Where there is room; see `has_room`."""
        self._put(due, self._now_ms())

    async def ask(self) -> None:
        """Ask for the turns whose time has come, and begin to send what is this process's.

        Raises:
            StorageError: the store does not answer; all of it is asked again.
        """
        now_ms = self._now_ms()
        while self._later and self._later[0][0] <= now_ms:
            at_ms, order, due = heapq.heappop(self._later)
            try:
                mine = await self._take(due, now_ms)
            except BaseException:
                heapq.heappush(self._later, (at_ms, order, due))
                raise
            if mine:
                task = asyncio.get_running_loop().create_task(self._deliver(due))
                self._tasks[task] = due
                task.add_done_callback(lambda task: self._tasks.pop(task, None))

    async def _take(self, due: Due, now_ms: int) -> bool:
        """Whether it is this process's to send."""
        shared, over_ms = self._shared, now_ms + self._patience_ms
        is_over = now_ms >= due.until_ms
        if not is_over and not await shared.mark(due.turn, until_ms=over_ms):
            self._count(due, -1)
            self._next_turn(due)  # unless it was sent by then
            return False
        if is_over or not await shared.mark(due.sent, until_ms=over_ms):
            self._count(due, -1)
            return False
        return True

    def _next_turn(self, due: Due) -> None:
        again = msgspec.structs.replace(due, turns=due.turns + 1)
        pause_ms = min(self._patience_ms << min(due.turns, 8), max(self._patience_ms, _LONGEST_TURNS_MS))
        self._put(again, self._now_ms() + int(pause_ms * (1 + self._spread() / 4)))

    def _put(self, due: Due, at_ms: int) -> None:
        self._count(due, 1)
        heapq.heappush(self._later, (at_ms, next(self._order), due))

    def _count(self, due: Due, more: int) -> None:
        self._waiting[due.webhook.id] = self._waiting.get(due.webhook.id, 0) + more

    async def _deliver(self, due: Due) -> None:
        """Attempts, until one is taken or the turn is nearly over."""
        loop = asyncio.get_running_loop()
        webhook = due.webhook
        deadline_s = loop.time() + 0.75 * self._patience_ms / 1000 - webhook.timeout_s
        gate = self._gates.setdefault(webhook.id, asyncio.Semaphore(_AT_ONCE))
        pause_s, taken = webhook.first_retry_s, False
        try:
            async with gate:
                while not taken:
                    try:
                        await webhook.send(due.alert)
                        taken = True
                    except DeliveryError as error:
                        wait_s = pause_s * self._spread()
                        if loop.time() + wait_s > deadline_s:
                            _log.warning("alert %s was not delivered and is tried again later: %s", due.alert.id, error)
                            break
                        _log.info("alert %s was not taken, once more in %.1f s: %s", due.alert.id, wait_s, error)
                        await asyncio.sleep(wait_s)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except asyncio.CancelledError:
            await self._give_up(due)
            self._next_turn(due)
            raise
        finally:
            self._count(due, -1)
        await self._finish(due, taken=taken)

    async def _finish(self, due: Due, *, taken: bool) -> None:
        shared = self._shared
        try:
            await shared.unmark(due.sent)
            if taken:
                await shared.mark(due.sent, until_ms=due.until_ms)
        except StorageError as error:
            # The mark of the turn's time ends by itself; whoever asks then sends it once more, under the same id.
            _log.warning("alert %s: that it was sent could not be noted: %s", due.alert.id, error)
        if not taken:
            self._next_turn(due)

    async def _give_up(self, due: Due) -> None:
        """Let another process send it at once."""
        with contextlib.suppress(StorageError):
            await self._shared.unmark(due.sent)
            await self._shared.unmark(due.turn)

    async def flush(self, timeout_s: float) -> None:
        """Wait for what is being sent, and give up what takes longer."""
        tasks = tuple(self._tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if late:
            _log.warning("%d alerts were not delivered before the end; another process may send them", len(late))


def _spread() -> float:
    return _random.uniform(0.5, 1)
