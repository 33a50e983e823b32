"""What worker processes do that follow administration data; in a module of its own, because they import it anew."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.control.kit import ANNA, SECRET

from asgi_llm_guard import Context, Guard, Iterations, LimitExceeded
from asgi_llm_guard.control import Control
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
DATABASE, STORE = "control.db", "guard.db"
LIMIT_S = 60.0
POLL_S = 0.02
"""So long a worker waits between two calls."""


def open_store(folder: Path) -> Storage:
    """A SQLite file of the folder, or the Redis and the namespace that a file in it names."""
    named = folder / "redis"
    if not named.exists():
        return SqliteStorage(folder / STORE)
    url, namespace = named.read_text().split()
    return RedisStorage(url, namespace=namespace, timeout_s=10)


def database(folder: Path) -> str:
    return f"sqlite:///{folder / DATABASE}"


def follow(folder: Path, number: int, pipe: Connection) -> None:
    """Call now and then until a call is refused; say when each call was. Needs no word of when it begins."""
    asyncio.run(_follow(folder, pipe, Control(database(folder), secret=SECRET)))


def follow_from_afar(folder: Path, number: int, pipe: Connection) -> None:
    """The same: the first reaches the database, and the others the storage alone."""
    url = database(folder) if number == 0 else NOWHERE
    asyncio.run(_follow(folder, pipe, Control(url, secret=SECRET)))


async def _follow(folder: Path, pipe: Connection, control: Control) -> None:
    guard = Guard([Iterations(1_000_000)], storage=open_store(folder), control=control)
    context = Context(caller="svc", agent="writer", session="s1")
    assert await _until(guard, context, refused=False)
    pipe.send("ready")
    called_at = await _until(guard, context, refused=True)
    pipe.send((called_at, guard.control_version) if called_at else None)
    await guard.aclose()
    await control.aclose()


async def _until(guard: Guard, context: Context, *, refused: bool) -> list[float]:
    """When each call was answered, up to the first that was answered so; none, if it never was."""
    called_at: list[float] = []
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        answer = await _refused(guard, context)
        called_at.append(time.time())
        if answer is refused:
            return called_at
        await asyncio.sleep(POLL_S)
    return []


async def _refused(guard: Guard, context: Context) -> bool:
    try:
        async with guard.open(context), guard.call(model="openai/gpt-4o", input_tokens=1, max_output_tokens=1):
            return False
    except LimitExceeded:
        return True


def write_and_die(folder: Path, number: int, pipe: Connection) -> None:
    """Write a change, and be killed before anybody could be told."""
    pipe.send("ready")
    pipe.recv()

    async def write() -> None:
        control = Control(database(folder), secret=SECRET)
        await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(write())
