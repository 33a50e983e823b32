"""A SQLite file, also one that a SQLite storage counts in: it takes its turn in the same queue of processes."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.sql.base import Connection, Dialect
from asgi_llm_guard.sql.files import (
    APPLICATION_ID,
    QueueLock,
    check_file_system,
    check_sqlite,
    file_system,
    mounts,
    next_step,
)
from asgi_llm_guard.sql.threads import Threads

__all__ = ["SqliteDatabase"]

T = TypeVar("T")

_READERS: Final = 3
_TIMEOUT_S: Final = 10.0
_CACHE_KIB: Final = 32 * 1024


class SqliteDatabase:
    """The database in `path`, which is made if it does not exist; `None`: one in memory, which ends with `close`.

    Writers wait for each other, over all processes, at most ten seconds; readers wait for nobody.

    Raises:
        ConfigurationError: the file cannot be used; the message names it, and what to do.
    """

    dialect: Dialect = "sqlite"

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        check_sqlite(sqlite3.sqlite_version_info)
        self.path = None if path is None else Path(path)
        self._name = "memory" if self.path is None else str(self.path)
        self._threads = Threads(self._name, most=_READERS + 1)
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._idle_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._writer: sqlite3.Connection | None = None
        self._queue: QueueLock | None = None
        self._abandoned: tuple[object, ...] = ()
        self._closed = False
        if self.path is None:
            self._uri = "file::memory:"
        else:
            self._uri = _checked(self.path)
            self._make_file(self.path)
        self._file = _identity(self.path)

    @property
    def place(self) -> str:
        return "sqlite://:memory:" if self.path is None else f"sqlite:///{self.path.absolute()}"

    async def write(self, work: Callable[[Connection], T]) -> T:
        return await self._threads.run(lambda: self.write_sync(work))

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await self._threads.run(lambda: self.read_sync(work))

    def write_sync(self, work: Callable[[Connection], T]) -> T:
        with self._turn() as connection:
            return self._transact(connection, work, "BEGIN IMMEDIATE")

    def read_sync(self, work: Callable[[Connection], T]) -> T:
        if self.path is None:  # there is one connection, and nobody else's changes to be seen
            with self._turn() as connection:
                return self._transact(connection, work, "BEGIN")
        with self._reader() as connection:
            return self._transact(connection, work, "BEGIN")

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        self._threads.close()
        with self._writing, self._idle_lock:
            self._closed = True
            if self._pid == os.getpid():
                for connection in (*self._idle, *filter(None, [self._writer])):
                    connection.close()
                if self._queue is not None:
                    self._queue.close()
            self._idle.clear()
            self._writer = self._queue = None

    # -------------------------------------------------------------------------------- connections

    @contextmanager
    def _turn(self) -> Generator[sqlite3.Connection]:
        """The connection that writes, in this process's turn."""
        if not self._writing.acquire(timeout=_TIMEOUT_S):
            raise self._busy()
        try:
            self._check_open()
            if self._writer is None:
                self._writer = self._connect()
            if self.path is None:
                yield self._writer
                return
            if self._queue is None:
                self._queue = QueueLock(self.path.with_name(self.path.name + ".lock"))
            if not self._queue.acquire(_TIMEOUT_S):
                raise self._busy()
            try:
                yield self._writer
            finally:
                self._queue.release()
        finally:
            self._writing.release()

    @contextmanager
    def _reader(self) -> Generator[sqlite3.Connection]:
        self._check_open()
        with self._idle_lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connect(reading=True)
        try:
            yield connection
        finally:
            with self._idle_lock:
                keep = not self._closed and len(self._idle) < _READERS
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    def _check_open(self) -> None:
        if self._pid != os.getpid():  # a fork must not use its parent's connections, nor close them
            self._pid = os.getpid()
            self._abandoned = (self._idle, self._writer, self._queue)
            self._idle, self._writer, self._queue = [], None, None
        if self._closed:
            raise _failure(f"{self._name}: is closed", sent=False)
        if _identity(self.path) != self._file:  # what is written to a file without a name is gone with this process
            raise _failure(
                f"{self._name}: was removed or replaced while in use; put it back, or restart every process that uses it",
                sent=False,
            )

    def _connect(self, *, reading: bool = False) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                self._uri, uri=True, timeout=_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            if self.path is not None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            connection.execute("PRAGMA temp_store = MEMORY")
            if reading:
                connection.execute("PRAGMA query_only = ON")
        except sqlite3.Error as error:
            raise _failure(f"{self._name}: {error}", sent=False) from error
        return connection

    def _make_file(self, path: Path) -> None:
        try:
            connection = sqlite3.connect(path, timeout=_TIMEOUT_S, isolation_level=None)
            try:
                if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                    connection.execute("BEGIN IMMEDIATE")
                    if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute("COMMIT")
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise ConfigurationError(f"{path}: {error}; {next_step(error, waited_s=_TIMEOUT_S)}") from error

    # ------------------------------------------------------------------------------- transactions

    def _transact(self, connection: sqlite3.Connection, work: Callable[[Connection], T], begin: str) -> T:
        try:
            connection.execute(begin)
            try:
                done = work(_Connection(connection))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # some errors have rolled it back already
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise self._busy() from error
            raise _failure(f"{self._name}: {error}", sent=False) from error  # a commit that fails has no effect
        return done

    def _busy(self) -> StorageError:
        return _failure(
            f"{self._name}: others kept it locked for more than {_TIMEOUT_S:g} s; the operation had no effect",
            sent=False,
        )


class _Connection:
    dialect: Dialect = "sqlite"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement, parameters).fetchall()

    def execute_many(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        self._connection.executemany(statement, rows)

    def iterate(self, statement: str, parameters: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        yield from self._connection.execute(statement, parameters)


def _checked(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        raise ConfigurationError(f"{path}: the folder {folder} does not exist; make it, or give another path")
    if path.is_dir():
        raise ConfigurationError(f"{path}: is a folder; give the path of a file in it")
    check_file_system(path, file_system(folder.resolve(), mounts()))
    return f"{path.resolve().as_uri()}?mode=rw"  # not rwc: a file that is gone must not come back empty


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Which file it is, whatever its name; `None`: there is none."""
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _failure(message: str, *, sent: bool) -> StorageError:
    error = StorageError(message)
    error.sent = sent
    return error
