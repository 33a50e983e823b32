"""Storage in one SQLite file, for the processes of one host. Survives restarts and `kill -9`.

It decides with the same functions as the memory storage (`cells.py`), inside a write
transaction that all processes on the file take turns in. Where to read on: `sqlite_file.py`
opens the file, `sqlite_writer.py` is the thread that writes, `sqlite_operations.py` is what it is
handed, `sqlite_rows.py` brings rows to the functions and back, `sqlite.sql` is the tables.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Final, TypeVar, cast

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage import sqlite_operations as operations
from asgi_llm_guard.storage import sqlite_rows as rows
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Pending
from asgi_llm_guard.storage.entries import Bounds, check_space
from asgi_llm_guard.storage.export import parse_lines, write_lines
from asgi_llm_guard.storage.open_calls import newest
from asgi_llm_guard.storage.shared import OpenCall
from asgi_llm_guard.storage.sqlite_entries import SqliteEntries, prepare_entries
from asgi_llm_guard.storage.sqlite_file import Synchronous, connect, prepare
from asgi_llm_guard.storage.sqlite_shared import SqliteShared, newest_calls
from asgi_llm_guard.storage.sqlite_tables import (
    CountHolds,
    EntryOperation,
    Load,
    TableOperation,
    records_since,
    snapshot,
)
from asgi_llm_guard.storage.sqlite_writer import Job, Writer
from asgi_llm_guard.usage import UsageRecord

__all__ = ["SqliteStorage"]

T = TypeVar("T")

_SPOOL_BYTES: Final = 8 * 2**20
"""An export up to this size is kept in memory until it is read, a larger one in a temporary file."""

_EXIT_S: Final = 5.0
"""At exit the interpreter waits at most this long for what was handed over."""


class SqliteStorage:
    """A `Storage` in the file `path`, which is made if it does not exist.

    `synchronous="NORMAL"`: nothing is lost when a process dies, and the last commits may be when
    the machine does. `"FULL"`: not even then, at about two thirds of the speed. `timeout_s` is how
    long an operation waits for other processes on the file before it fails.

    Beside the file lie `-wal` and `-shm`, which are SQLite's, and `.lock`, which orders processes.

    Raises:
        ConfigurationError: the file cannot be used; the message names it, and what to do.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Clock | None = None,
        synchronous: str = "NORMAL",
        lapse_ms: int = LAPSE_MS,
        tombstone_ms: int = TOMBSTONE_MS,
        timeout_s: float = 5.0,
    ) -> None:
        if str(path).startswith(":memory:") or not str(path):
            raise ConfigurationError(f"path: expected the path of a file, got {str(path)!r}; for memory use memory://")
        if synchronous not in {"NORMAL", "FULL"}:
            raise ConfigurationError(f"synchronous: expected NORMAL or FULL, got {synchronous!r}")
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"timeout_s: expected a positive number of seconds, got {timeout_s!r}")
        for name, value in (("lapse_ms", lapse_ms), ("tombstone_ms", tombstone_ms)):
            if value <= 0:
                raise ConfigurationError(f"{name}: expected a positive number of milliseconds, got {value!r}")
        self.path = Path(path)
        self._clock = clock or SystemClock()
        self._synchronous = cast("Synchronous", synchronous)
        self._lapse_ms = lapse_ms
        self._tombstone_ms = tombstone_ms
        self._timeout_s = timeout_s
        self._starting = threading.Lock()
        self._reading = threading.Lock()
        self._writer: Writer | None = None
        self._closed = False
        self._spaces: dict[str, SqliteEntries] = {}
        prepare(self.path)
        _storages.add(self)

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        return await self._submit(operations.Reserve(owner, plans))

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        return await self._submit(operations.Amend(owner, bundle))

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        return self._submit(operations.Settle(settlements))

    async def heartbeat(self, owner: str) -> Heartbeat:
        return await self._submit(operations.Beat(owner))

    async def retire(self, owner: str) -> None:
        await self._submit(operations.Retire(owner))

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        return await self._submit(operations.Read(meters))

    async def reset(self, meters: Sequence[Meter]) -> None:
        await self._submit(operations.Reset(meters))

    @property
    def ledger_url(self) -> str:
        return f"sqlite:///{self.path.absolute()}"

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        await self._submit(operations.Read(()))  # what was handed over before is to be seen
        return await asyncio.to_thread(self._records, since_ms, limit)

    async def export(self) -> AsyncIterator[bytes]:
        await self._submit(operations.Read(()))
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            # Copied in one go: a snapshot that is held for a slow reader keeps the -wal file growing.
            await asyncio.to_thread(self._export_to, spool)
            while lines := await asyncio.to_thread(spool.readlines, _SPOOL_BYTES // 8):
                for line in lines:
                    yield line

    async def load(self, lines: Iterable[bytes]) -> None:
        snapshot = await asyncio.to_thread(parse_lines, lines)
        await self._submit(Load(snapshot))

    async def open_holds(self) -> int:
        return await self._submit(CountHolds())

    def entries(self, space: str, bounds: Bounds | None = None) -> SqliteEntries:
        kept = self._spaces.get(check_space(space))
        if kept is None:
            prepare_entries(self.path)
            kept = self._spaces[space] = SqliteEntries(self._submit, space, bounds or Bounds())
        elif bounds is not None:
            kept.bounds = bounds
        return kept

    def shared(self) -> SqliteShared:
        return SqliteShared(self._submit)

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        await self._submit(operations.Read(()))  # what was handed over before is to be seen
        return await asyncio.to_thread(self._open_calls, limit)

    async def aclose(self) -> None:
        self._closed = True
        writer = self._writer
        if writer is not None:
            await asyncio.to_thread(writer.stop, None)

    # ------------------------------------------------------------------------------- the writer

    def _submit(self, operation: operations.Operation[T] | TableOperation[T] | EntryOperation[T]) -> Job[T]:
        writer = self._writer
        if writer is None or writer.pid != os.getpid():
            writer = self._start()
        return writer.submit(Job(operation))

    def _start(self) -> Writer:
        with self._starting:
            if self._writer is None or self._writer.pid != os.getpid():
                if self._closed:
                    raise StorageError(f"{self.path}: this storage is closed; open a new one to go on")
                database = partial(
                    rows.SqliteDatabase,
                    self.path,
                    clock=self._clock,
                    synchronous=self._synchronous,
                    lapse_ms=self._lapse_ms,
                    tombstone_ms=self._tombstone_ms,
                    timeout_s=self._timeout_s,
                )
                self._writer = Writer(database, name=str(self.path))
                weakref.finalize(self, self._writer.stop, 0).atexit = False
            return self._writer

    def finish(self, timeout_s: float) -> None:
        """Write what was handed over, at most for `timeout_s`; for the end of the process."""
        if self._writer is not None:
            self._writer.stop(timeout_s)

    # -------------------------------------------------------------------------------- reading

    def _records(self, since_ms: int, limit: int | None) -> list[UsageRecord]:
        with self._reader() as connection:
            return list(records_since(connection, since_ms, limit))

    def _open_calls(self, limit: int) -> list[OpenCall]:
        with self._reader() as connection:
            return newest(newest_calls(connection, limit), limit)

    def _export_to(self, spool: IO[bytes]) -> None:
        with self._reader() as connection:
            spool.writelines(write_lines(snapshot(connection), self._clock.now_ms()))
        spool.seek(0)

    @contextmanager
    def _reader(self) -> Generator[sqlite3.Connection]:
        """A snapshot of the file, for one thread and a short time."""
        with self._reading:
            try:
                with closing(
                    connect(self.path, synchronous=self._synchronous, timeout_s=self._timeout_s)
                ) as connection:
                    connection.execute("BEGIN")
                    yield connection
            except sqlite3.Error as error:
                raise StorageError(f"{self.path}: {error}") from error

    # ----------------------------------------------------------------------------------- forks

    def park(self) -> None:
        """Close the file for as long as this process forks; see rule 5 of `sqlite_writer.py`."""
        self._starting.acquire()
        self._reading.acquire()
        if self._writer is not None:
            self._writer.park()

    def resume(self) -> None:
        """Go on in the process that forked."""
        if self._writer is not None:
            self._writer.resume()
        self._reading.release()
        self._starting.release()

    def begin_anew(self) -> None:
        """Begin in the process that was forked: with nothing of its parent's."""
        self._starting, self._reading = threading.Lock(), threading.Lock()
        self._writer = None


# --------------------------------------------------------------------------- process events

_storages: weakref.WeakSet[SqliteStorage] = weakref.WeakSet()
_parked: list[SqliteStorage] = []


def _before_fork() -> None:
    for storage in list(_storages):
        storage.park()
        _parked.append(storage)


def _after_fork_in_parent() -> None:
    while _parked:
        _parked.pop().resume()


def _after_fork_in_child() -> None:
    while _parked:
        _parked.pop().begin_anew()


def _at_exit() -> None:
    deadline_s = time.monotonic() + _EXIT_S
    for storage in list(_storages):
        storage.finish(max(0.0, deadline_s - time.monotonic()))


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
