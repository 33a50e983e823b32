"""A block that is cancelled while it waits for its settlement to be written."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import pytest

from asgi_llm_guard import Context, Guard, Iterations
from asgi_llm_guard.claims import Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.pending import Handed, tell
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


class Unanswered(MemoryStorage):
    """Takes settlements, and says what became of them when the test lets it."""

    def __init__(self, clock: FrozenClock) -> None:
        super().__init__(clock=clock)
        self.handed: list[Handed[tuple[Settled, ...]]] = []
        self.asked = asyncio.Event()

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        self.handed.append(Handed())
        self.asked.set()
        return self.handed[-1]

    def fail(self) -> None:
        for handed in self.handed:
            handed.decide(None, StorageError("nobody knows"))
        tell(self.handed)


async def test_a_cancelled_close_leaves_no_error_that_nobody_takes(clock: FrozenClock) -> None:
    """A client that leaves during an outage is no error in the log: the engine tries the settlement again."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    storage = Unanswered(clock)
    guard = Guard([Iterations(1)], storage=storage, clock=clock)

    async def job() -> None:
        async with guard.open(Context(session="s")), guard.call(model="openai/gpt-4o-mini"):
            pass

    leaving = asyncio.create_task(job())
    await storage.asked.wait()
    await asyncio.sleep(0)
    leaving.cancel()
    assert isinstance((await asyncio.gather(leaving, return_exceptions=True))[0], asyncio.CancelledError)
    storage.fail()
    for _ in range(5):
        await asyncio.sleep(0)
    del leaving
    gc.collect()

    assert complaints == []
    # It waits, unless the heartbeat of the process, which comes when it comes, has handed it over again.
    assert guard.engine.unsettled + len(storage.handed) == 2
