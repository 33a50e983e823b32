"""A PostgreSQL database, by psycopg 3: `postgresql://user:password@host:5432/name`, with libpq's own options.

Needs the extra `postgres`. Works behind PgBouncer too: nothing is kept on a connection between transactions.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, TypeVar

from asgi_llm_guard.errors import ConfigurationError, NotInstalledError, StorageError
from asgi_llm_guard.sql.base import Connection, Dialect
from asgi_llm_guard.sql.threads import Threads

try:
    import psycopg
    from psycopg import errors
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
except ImportError as error:
    raise NotInstalledError("PostgreSQL", "postgres") from error

_random: Final = random.SystemRandom()  # of its own: the module's may be seeded by the application
__all__ = ["PostgresDatabase"]

T = TypeVar("T")

_CONNECTIONS: Final = 4
_TRIES: Final = 6
_DEFAULTS: Final = {
    "connect_timeout": "5",
    "tcp_user_timeout": "15000",  # a host that is gone without a word is noticed after 15 s
    "application_name": "asgi-llm-guard",
}

_PATIENCE: Final = "SET LOCAL lock_timeout = '10s'; SET LOCAL idle_in_transaction_session_timeout = '60s'"
"""A process that stops in the middle of a transaction (SIGSTOP, a paused container) must not stop all others."""


class PostgresDatabase:
    """The database that `url` names. It is not asked for anything until the first transaction.

    Raises:
        ConfigurationError: the URL cannot be read. The message never shows it, for it may hold a password.
        NotInstalledError: psycopg is missing.
    """

    dialect: Dialect = "postgresql"

    def __init__(self, url: str, *, name: str = "database") -> None:
        try:
            given = conninfo_to_dict(url)
        except psycopg.Error:
            raise ConfigurationError(
                f"{name}: expected postgresql://user:password@host:5432/name (special characters in percent form)"
            ) from None
        self._conninfo = make_conninfo("", **{**_DEFAULTS, **given})
        self._secret = str(given.get("password") or "")
        host, base = given.get("host", "localhost"), given.get("dbname", given.get("user", "postgres"))
        self._name = f"postgresql://{host}:{given.get('port', 5432)}/{base}"
        self._threads = Threads(self._name, most=_CONNECTIONS)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._idle: list[psycopg.Connection[tuple[Any, ...]]] = []
        self._abandoned: list[psycopg.Connection[tuple[Any, ...]]] = []
        self._closed = False

    @property
    def place(self) -> str:
        return self._name

    async def write(self, work: Callable[[Connection], T]) -> T:
        return await self._threads.run(lambda: self.write_sync(work))

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await self._threads.run(lambda: self.read_sync(work))

    def write_sync(self, work: Callable[[Connection], T]) -> T:
        return self._retried(work, f"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {_PATIENCE}")

    def read_sync(self, work: Callable[[Connection], T]) -> T:
        return self._retried(work, f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {_PATIENCE}")

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        self._threads.close()
        with self._lock:
            self._closed = True
            if self._pid == os.getpid():
                for connection in self._idle:
                    connection.close()
                self._idle.clear()

    # ------------------------------------------------------------------------------- transactions

    def _retried(self, work: Callable[[Connection], T], begin: str) -> T:
        for attempt in range(1, _TRIES + 1):
            connection = self._taken()
            committing = False
            try:
                connection.execute(begin)
                done = work(_Connection(connection))
                committing = True
                connection.execute("COMMIT")
            except (errors.SerializationFailure, errors.DeadlockDetected, errors.OperationalError) as error:
                # The server has undone it (40001, 40P01), or the connection broke before COMMIT was sent: so it
                # can be done again. Nobody knows what became of a COMMIT that was not answered.
                undone = isinstance(error, errors.SerializationFailure | errors.DeadlockDetected)
                unknown = committing and not undone
                self._returned(connection, broken=not undone)
                if unknown or attempt == _TRIES or not (undone or connection.broken or connection.closed):
                    raise self._failure(error, sent=unknown) from error
                time.sleep(_random.uniform(0, 0.02 * 2**attempt))
            except psycopg.Error as error:
                self._returned(connection)
                raise self._failure(error, sent=False) from error
            except BaseException:
                self._returned(connection)
                raise
            else:
                self._returned(connection)
                return done
        raise AssertionError("the last try either returns or raises")

    def _taken(self) -> psycopg.Connection[tuple[Any, ...]]:
        with self._lock:
            if self._pid != os.getpid():  # a fork must not use its parent's connections, nor close them
                self._pid = os.getpid()
                self._abandoned, self._idle = self._idle, []
            if self._closed:
                raise self._failure("is closed", sent=False)
            if self._idle:
                return self._idle.pop()
        try:
            # Prepared statements belong to a connection, which a pool between us and the server may change.
            return psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=None)
        except psycopg.Error as error:
            raise self._failure(error, sent=False) from None

    def _returned(self, connection: psycopg.Connection[tuple[Any, ...]], *, broken: bool = False) -> None:
        """Keep the connection for the next transaction, after undoing what is left of this one."""
        if not broken and not connection.closed:
            try:
                if connection.info.transaction_status is not psycopg.pq.TransactionStatus.IDLE:
                    connection.execute("ROLLBACK")
                with self._lock:
                    if not self._closed and len(self._idle) < _CONNECTIONS:
                        self._idle.append(connection)
                        return
            except psycopg.Error:
                pass  # it is closed below, which undoes the rest
        connection.close()

    def _failure(self, error: object, *, sent: bool) -> StorageError:
        text = " ".join(str(error).split())
        if self._secret:
            text = text.replace(self._secret, "***")
        failure = StorageError(f"{self._name}: {text}")
        failure.sent = sent
        return failure


class _Connection:
    dialect: Dialect = "postgresql"

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        self._connection = connection

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        cursor = self._connection.execute(_translated(statement), parameters)
        return cursor.fetchall() if cursor.description is not None else []

    def execute_many(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        with self._connection.cursor() as cursor:
            cursor.executemany(_translated(statement), rows)

    def iterate(self, statement: str, parameters: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        with self._connection.cursor(f"rows_{id(statement)}") as cursor:  # named: it lives on the server
            cursor.itersize = 2_000
            cursor.execute(_translated(statement), parameters)
            yield from cursor


@lru_cache(maxsize=1_000)
def _translated(statement: str) -> bytes:
    """The statement with psycopg's marks: `?` outside of quotes becomes `%s`."""
    parts = statement.replace("%", "%%").split("'")  # every second one is inside quotes; '' leaves an empty one
    parts[::2] = [part.replace("?", "%s") for part in parts[::2]]
    return "'".join(parts).encode()
