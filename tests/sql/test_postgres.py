"""What is PostgreSQL's own: passwords, lost connections, deadlocks."""

from __future__ import annotations

import asyncio
import threading
import traceback

import pytest
from tests.postgres import PASSWORD, shared_postgres

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.sql import Connection, open_database

pytestmark = pytest.mark.anyio


def one(connection: Connection) -> int:
    return int(connection.execute("SELECT 1")[0][0])


async def test_a_refused_password_is_not_shown(postgres_url: str) -> None:
    """T15: neither the error nor its traceback shows the password, wrong or right."""
    database = open_database(postgres_url.replace(PASSWORD, "wrong-secret"))
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        await database.read(one)
    text = "".join(traceback.format_exception(caught.value))
    assert "wrong-secret" not in text
    assert PASSWORD not in text
    assert not caught.value.sent
    await database.aclose()


async def test_lost_connections_are_made_again(postgres_url: str) -> None:
    """After the server has ended every connection, the next transaction works, and is done once."""
    database = open_database(postgres_url)
    await database.write(lambda connection: connection.execute("CREATE TABLE t (n INT)"))
    name = postgres_url.rpartition("/")[2]
    shared_postgres().execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    await database.write(lambda connection: connection.execute("INSERT INTO t VALUES (1)"))
    assert await database.read(lambda connection: connection.execute("SELECT n FROM t")) == [(1,)]
    await database.aclose()


async def test_deadlocks_are_done_again(postgres_url: str) -> None:
    """Two transactions that lock each other out both end well: the one that the server undoes is run again."""
    database = open_database(postgres_url)

    def make(connection: Connection) -> None:
        connection.execute("CREATE TABLE t (name TEXT PRIMARY KEY, n INT)")
        connection.execute("INSERT INTO t VALUES ('a', 0), ('b', 0)")

    await database.write(make)
    meeting = threading.Barrier(2)
    tries: list[str] = []

    def cross(first: str, second: str) -> None:
        def work(connection: Connection) -> None:
            tries.append(first)
            connection.execute("UPDATE t SET n = n + 1 WHERE name = ?", (first,))
            if len(tries) <= 2:
                meeting.wait(60)
            connection.execute("UPDATE t SET n = n + 1 WHERE name = ?", (second,))

        database.write_sync(work)

    await asyncio.gather(asyncio.to_thread(cross, "a", "b"), asyncio.to_thread(cross, "b", "a"))
    assert await database.read(lambda connection: connection.execute("SELECT n FROM t ORDER BY name")) == [(2,), (2,)]
    assert len(tries) > 2
    await database.aclose()


async def test_a_server_that_is_away_is_a_storage_error() -> None:
    """Nobody listens: a `StorageError` that says so, and that nothing was sent."""
    database = open_database("postgresql://guard:secret@127.0.0.1:9/guard")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/guard: connection failed") as caught:
        await database.write(one)
    assert not caught.value.sent
    await database.aclose()


async def test_who_stops_in_the_middle_stops_nobody_for_long(postgres_url: str) -> None:
    """A process that is paused inside a transaction loses it, with its locks, after a minute; others wait ten seconds for a
    lock, and then say so. What was lost was not done."""
    database, other = open_database(postgres_url), open_database(postgres_url)
    await database.write(lambda connection: connection.execute("CREATE TABLE t (n INT PRIMARY KEY)"))
    asked = "SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')"
    assert await database.write(lambda connection: connection.execute(asked)) == [("10s", "1min")]
    assert await other.read(lambda connection: connection.execute(asked)) == [("10s", "1min")]
    locked, over = threading.Event(), threading.Event()

    def pause(connection: Connection) -> None:
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = '1500ms'")
        connection.execute("INSERT INTO t VALUES (1)")
        locked.set()
        over.wait(60)

    def impatient(connection: Connection) -> None:
        connection.execute("SET LOCAL lock_timeout = '50ms'")
        connection.execute("INSERT INTO t VALUES (1)")

    paused = asyncio.ensure_future(database.write(pause))
    await asyncio.to_thread(locked.wait, 30)
    with pytest.raises(StorageError, match="lock timeout") as caught:
        await other.write(impatient)
    assert not caught.value.sent
    await other.write(lambda connection: connection.execute("INSERT INTO t VALUES (1)"))  # as soon as the lock is free
    over.set()
    with pytest.raises(StorageError) as lost:
        await paused
    assert not lost.value.sent
    assert await database.read(lambda connection: connection.execute("SELECT count(*) FROM t")) == [(1,)]
    await database.aclose()
    await other.aclose()
