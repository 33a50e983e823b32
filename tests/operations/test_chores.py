"""Chores: begun when needed, never twice at a time, ended before the storage, begun anew in a fork."""

from __future__ import annotations

import asyncio
import logging
import os
import threading

import pytest

from asgi_llm_guard import Context, Guard
from asgi_llm_guard.chores import Chores
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing.gates import Changes

pytestmark = pytest.mark.anyio


class Count:
    """A chore that counts its turns, and can be told to fail or to wait."""

    def __init__(self) -> None:
        self.turns = 0
        self.running = 0
        self.most = 0
        self.threads: set[str] = set()
        self.error: Exception | None = None
        self.gate: threading.Event | None = None
        self.changes = Changes()

    async def __call__(self) -> None:
        self.turns += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.threads.add(threading.current_thread().name)
        self.changes.tell()
        try:
            while self.gate is not None and not self.gate.is_set():  # noqa: ASYNC110 - it is set from another loop
                await asyncio.sleep(0.001)
            if self.error is not None:
                raise self.error
        finally:
            self.running -= 1
            self.changes.tell()

    async def until(self, turns: int) -> None:
        async with asyncio.timeout(60):
            await self.changes.until(lambda: self.turns >= turns)


async def test_chores_begin_with_the_first_admission_and_end_with_the_guard() -> None:
    """Nothing runs before anything is admitted; then chores run on the background thread, until `aclose`."""
    guard, count = Guard(), Count()
    guard.chores.add("count", 0.001, count)
    assert (guard.chores.names, guard.chores.begun) == (("count",), False)
    async with guard.open(Context()):
        await count.until(3)
    await guard.aclose()
    turns = count.turns
    await asyncio.sleep(0.01)
    assert (count.turns, guard.chores.begun) == (turns, False)
    assert count.threads == {"llm-guard"}


async def test_a_chore_never_overlaps_with_itself() -> None:
    """A turn that is asked for while another one runs comes after it; what is added later begins at once."""
    chores, count = Chores(), Count()
    chores.begin()
    count.gate = threading.Event()
    chores.add("count", 0.001, count)
    await count.until(1)
    asked = asyncio.create_task(chores.run("count"))
    await asyncio.sleep(0.005)
    assert count.turns == 1
    count.gate.set()
    await asked
    await count.until(5)
    assert count.most == 1
    await chores.stop()


async def test_a_chore_in_place_of_another_one_never_overlaps_with_it() -> None:
    """What takes the place of a chore whose turn is running begins when that has ended."""
    chores, first, second = Chores(), Count(), Count()
    chores.begin()
    first.gate = threading.Event()
    chores.add("count", 0.001, first)
    await first.until(1)
    chores.add("count", 0.001, second)
    asked = asyncio.create_task(chores.run("count"))
    await asyncio.sleep(0.02)
    assert (first.running, second.turns) == (1, 0)
    first.gate.set()
    await asked
    await second.until(3)
    assert first.turns == 1
    await chores.stop()


async def test_a_chore_outlives_what_it_waits_for() -> None:
    """Something that a chore waits for is cancelled, and not the chore: it is tried again at its next turn."""
    chores, turns = Chores(), Count()

    async def work() -> None:
        await turns()
        waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waited.cancel()
        await waited

    chores.add("count", 0.001, work)
    chores.begin()
    await turns.until(3)
    await chores.stop()


async def test_a_stopped_chore_is_waited_for() -> None:
    """`stop` returns when the turn that was running has ended, and `begin` begins again."""
    chores, count = Chores(), Count()
    chores.add("count", 0.001, count)
    count.gate = threading.Event()
    chores.begin()
    await count.until(1)
    stopping = asyncio.create_task(chores.stop())
    await asyncio.sleep(0.005)
    assert not stopping.done()
    count.gate.set()
    await stopping
    assert count.running == 0
    turns = count.turns
    chores.begin()
    await count.until(turns + 2)
    await chores.stop()
    await chores.stop()


async def test_errors_are_told_once_for_each_class(caplog: pytest.LogCaptureFixture) -> None:
    """A chore that fails goes on; the log has one line when the class of the error changes, and one when it is over."""
    chores, count = Chores(), Count()
    chores.add("count", 0.001, count)
    with caplog.at_level(logging.WARNING, logger="asgi_llm_guard"):
        count.error = StorageError("away")
        chores.begin()
        await count.until(4)
        count.error = ValueError("odd")
        await count.until(count.turns + 4)
        count.error = None
        await count.until(count.turns + 4)
        await chores.stop()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "the chore 'count' fails and is tried again: away",
        "the chore 'count' fails and is tried again: odd",
        "the chore 'count' goes well again",
    ]


async def test_a_turn_that_is_asked_for_raises() -> None:
    """Who asks for a turn is told what went wrong, and which chores there are."""
    chores, count = Chores(), Count()
    chores.add("count", 3600, count)
    count.error = StorageError("away")
    with pytest.raises(StorageError, match="away"):
        await chores.run("count")
    with pytest.raises(ConfigurationError, match="known are: count"):
        await chores.run("other")


async def test_a_chore_may_be_replaced_and_removed() -> None:
    """Another one of the same name takes the place of the first, which is done no more."""
    chores, first, second = Chores(), Count(), Count()
    chores.begin()
    chores.add("it", 0.001, first)
    await first.until(2)
    chores.add("it", 0.001, second)
    await second.until(2)
    turns = first.turns
    await second.until(second.turns + 5)
    assert first.turns <= turns + 1
    chores.remove("it")
    chores.remove("it")
    assert chores.names == ()
    await chores.stop()


def test_a_fork_begins_anew() -> None:
    """A child of a process whose chores run has its own, from its first admission on."""
    guard, count = Guard(storage=MemoryStorage()), Count()
    guard.chores.add("count", 0.001, count)

    async def admit() -> None:
        async with guard.open(Context()):
            await count.until(count.turns + 2)

    asyncio.run(admit())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 2 if guard.chores.begun else 1
            asyncio.run(admit())
            code = 0 if code == 1 and guard.chores.begun else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(guard.aclose())


@pytest.mark.parametrize(
    "name, every_s, work", [("", 1, Count()), ("a", 0, Count()), ("a", True, Count()), ("a", 1, 5)]
)
def test_malformed_chores(name: str, every_s: float, work: object) -> None:
    """A name, a pause above 0 and something to call are asked for when a chore is added."""
    with pytest.raises(ConfigurationError, match="chores"):
        Chores().add(name, every_s, work)  # type: ignore[arg-type]
