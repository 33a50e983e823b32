"""What the tests of leases are about: leased meters, workers around one store, and a store that can be made to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from tests.storage.values import meter

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Refused
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage
from asgi_llm_guard.windows import Calendar, Window


def leased(
    limit: int | None = 1_000,
    lease: int = 100,
    *,
    window: Window | None = None,
    subject: str = "hot",
    refund: bool = False,
    enforce: bool = True,
) -> Meter:
    """A meter from which a worker may take `lease` at a time; of the day, unless told otherwise."""
    on = meter(window or Calendar("day"), limit, subject=subject, refund=refund, enforce=enforce)
    return msgspec.structs.replace(on, lease=lease)


def around(store: Storage, clock: FrozenClock, *, workers: int = 1) -> LeasingStorage:
    """One process's view of the store. Nothing is held back at the end of a window."""
    return LeasingStorage(store, clock=clock, workers=workers, skew_ms=0)


def fetches() -> list[asyncio.Task[object]]:
    """The chunks that are on their way in this loop."""
    return [task for task in asyncio.all_tasks() if "Chunks._fetch" in repr(task.get_coro())]


async def turn() -> None:
    """Let chunks come that have been asked for."""
    while under_way := fetches():
        await asyncio.wait(under_way)


class Waiting(MemoryStorage):
    """A store in memory the answers of which can be made to wait, after it has decided or before."""

    def __init__(self, *, clock: FrozenClock) -> None:
        super().__init__(clock=clock)
        self.decides_first = True
        self.open = asyncio.Event()
        self.open.set()

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        if not self.decides_first:
            await self.open.wait()
        answer = await super().reserve(owner, plans)
        await self.open.wait()
        return answer

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        answer = await super().amend(owner, bundle)
        await self.open.wait()
        return answer


class Watchful(OutageStorage):
    """A store that notices with each heartbeat, too, that its data was lost."""

    async def heartbeat(self, owner: str) -> Heartbeat:
        async with self._reached(decides=True):
            return await self.inner.heartbeat(owner)
