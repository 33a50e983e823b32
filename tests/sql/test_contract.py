"""What every database keeps: whole transactions, consistent reads, our errors only."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.sql import Connection, Database, open_database

pytestmark = pytest.mark.anyio


def make(connection: Connection) -> None:
    connection.execute("CREATE TABLE books (name TEXT PRIMARY KEY, pages BIGINT NOT NULL)")


def count(connection: Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM books")[0][0])


async def test_rows_come_back_as_written(database: Database) -> None:
    """Text, whole numbers up to 2^63 - 1 and NULL survive, with `?` as the mark on every database."""
    await database.write(make)
    rows = [("a'?%s", 2**63 - 1), ("b%", 0)]

    def work(connection: Connection) -> list[tuple[object, ...]]:
        connection.execute_many("INSERT INTO books (name, pages) VALUES (?, ?)", rows)
        assert connection.execute("SELECT NULL, name FROM books WHERE name LIKE '%?%'") == [(None, "a'?%s")]
        assert list(connection.iterate("SELECT name FROM books WHERE pages % 2 = ? ORDER BY name", (0,))) == [("b%",)]
        return connection.execute("SELECT name, pages FROM books WHERE pages >= ? ORDER BY name", (0,))

    assert await database.write(work) == rows
    assert database.read_sync(count) == 2


async def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    """What raises in the middle leaves nothing behind, and its own error comes out."""
    await database.write(make)

    def work(connection: Connection) -> None:
        connection.execute("INSERT INTO books VALUES ('a', 1)")
        raise LookupError("in the middle")

    with pytest.raises(LookupError, match="in the middle"):
        await database.write(work)
    assert await database.read(count) == 0


async def test_errors_of_the_driver_are_ours(database: Database) -> None:
    """A statement that the database refuses is a `StorageError`, undone, and the next transaction works."""
    await database.write(make)

    def work(connection: Connection) -> None:
        connection.execute("INSERT INTO books VALUES ('a', 1)")
        connection.execute("INSERT INTO books VALUES ('a', 2)")

    with pytest.raises(StorageError) as caught:
        await database.write(work)
    assert not caught.value.sent
    assert await database.read(count) == 0


async def test_a_read_changes_nothing(kept_database: Database) -> None:
    """Who only may read cannot write: neither by accident nor in a forgotten test."""
    await kept_database.write(make)
    with pytest.raises(StorageError):
        await kept_database.read(lambda connection: connection.execute("INSERT INTO books VALUES ('a', 1)"))
    assert await kept_database.read(count) == 0


async def test_a_read_sees_one_state(kept_database: Database) -> None:
    """What others write while a read goes on is not seen by it."""
    await kept_database.write(make)
    first, written = threading.Event(), threading.Event()

    def look(connection: Connection) -> tuple[int, int]:
        before = count(connection)
        first.set()
        assert written.wait(60)
        return before, count(connection)

    reading = asyncio.ensure_future(kept_database.read(look))
    await asyncio.to_thread(first.wait, 20)
    await kept_database.write(lambda connection: connection.execute("INSERT INTO books VALUES ('a', 1)"))
    written.set()
    assert await reading == (0, 0)
    assert await kept_database.read(count) == 1


async def test_writers_take_turns(database: Database) -> None:
    """Twenty that add one at the same time, each reading before it writes in one statement, make twenty."""
    await database.write(make)
    await database.write(lambda connection: connection.execute("INSERT INTO books VALUES ('a', 0)"))

    def work(connection: Connection) -> None:
        connection.execute("UPDATE books SET pages = pages + 1")

    await asyncio.gather(*(database.write(work) for _ in range(20)))
    assert await database.read(lambda connection: connection.execute("SELECT pages FROM books")) == [(20,)]


async def test_two_on_one_database(kept_database: Database, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Another connection sees what was written."""
    await kept_database.write(make)
    url = (
        request.getfixturevalue("postgres_url")
        if kept_database.dialect == "postgresql"
        else f"sqlite:///{tmp_path}/test.db"
    )
    other = open_database(url)
    assert await other.read(count) == 0
    await other.aclose()


async def test_closed_is_closed(database: Database) -> None:
    """After `aclose` every use says so."""
    await database.aclose()
    with pytest.raises(StorageError, match="is closed"):
        await database.write(make)
    with pytest.raises(StorageError, match="is closed"):
        database.read_sync(count)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("guard.db", "there is no|has no ://"),
        ("mysql://user:secret-word@host/db", "got the scheme 'mysql'"),
        ("sqlite://guard.db", "sqlite:///file.db"),
        ("sqlite:///a.db?x=1", "without options"),
        ("sqlite:////nowhere/at/all/a.db", "the folder /nowhere/at/all does not exist"),
        ("postgresql://u:secret-word@host:port-word/db?nonsense=1", "expected postgresql://"),
    ],
)
def test_urls_that_name_nothing(url: str, message: str) -> None:
    """A URL that names no usable database is refused when it is given, without showing a password."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        open_database(url, name="ledger")
    assert "secret-word" not in str(caught.value)


async def test_a_fork_has_connections_of_its_own(kept_database: Database) -> None:
    """Parent and child write through the same object after a fork, and neither disturbs the other's connection."""
    kept_database.write_sync(make)

    def add(name: str) -> None:
        kept_database.write_sync(lambda connection: connection.execute("INSERT INTO books VALUES (?, 1)", (name,)))

    child = os.fork()
    if child == 0:
        try:
            for number in range(20):
                add(f"child {number}")
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it is, the child must not go on with the parent's tests
            os._exit(1)
    for number in range(20):
        add(f"parent {number}")
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert await kept_database.read(count) == 40


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """A file of another kind is told as one, with the next step, and stays as it is."""
    path = tmp_path / "notes.txt"
    path.write_text("no database at all, but long enough to have a header " * 20, "utf-8")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="not a database; restore it from a backup, or give another path"):
        open_database(f"sqlite:///{path}")
    assert path.read_bytes() == before


@pytest.mark.parametrize("put", [False, True], ids=["removed", "replaced"])
async def test_a_file_that_is_gone(tmp_path: Path, *, put: bool) -> None:
    """A file that was removed or replaced is neither read nor written any more: nobody else would see it."""
    path, other = tmp_path / "test.db", tmp_path / "other.db"
    for each in (path, other):
        database = open_database(f"sqlite:///{each}")
        await database.write(make)
        await database.aclose()
    database = open_database(f"sqlite:///{path}")
    assert await database.read(count) == 0
    if put:
        other.rename(path)
    else:
        path.unlink()
    for work in (database.read(count), database.write(count)):
        with pytest.raises(StorageError, match=r"test\.db: was removed or replaced while in use") as caught:
            await work
        assert caught.value.sent is False
    await database.aclose()
