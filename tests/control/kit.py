"""What the tests of administration data have in common."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg

from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.control.state import ControlState

CLOCK_MS: Final = 1_795_000_000_000
SECRET: Final = "canary-secret-of-the-control"
ANNA: Final = Actor(name="anna", role="admin", address="10.1.2.3")
BEN: Final = Actor(name="ben", role="operator", address="10.1.2.4")


def run_sql(url: str, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """One statement past everything that this package does, as somebody with access to the database might.

    Raises:
        Exception: what the driver raises.
    """
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            with connection:
                return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()
    with psycopg.connect(url, autocommit=True) as server:
        cursor = server.execute(statement.replace("?", "%s").encode(), parameters)
        return cursor.fetchall() if cursor.description is not None else []


def tables(url: str) -> list[str]:
    """The names of all tables."""
    if url.startswith("sqlite"):
        return [name for (name,) in run_sql(url, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [
        name
        for (name,) in run_sql(url, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    ]


def dump(url: str) -> str:
    """Everything in a database, as text."""
    return "\n".join(repr(row) for name in tables(url) for row in run_sql(url, f"SELECT * FROM {name}"))


class Hanging:
    """An administration that takes questions, and answers them when the test says so."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.answers = threading.Event()

    async def version(self) -> int:
        await asyncio.to_thread(self.answers.wait, 60)
        return await self._control.version()

    async def state(self) -> ControlState:
        await asyncio.to_thread(self.answers.wait, 60)
        return await self._control.state()

    def prepare(self, state: ControlState) -> Callable[[], None]:
        return self._control.prepare(state)

    async def aclose(self) -> None:
        """The test closes what is behind it."""
