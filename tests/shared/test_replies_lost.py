"""What processes share while connections break, servers hang and files are locked."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import RedisServer
from tests.shared.kit import HOUR
from tests.storage.values import START, START_MS

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.storage.shared import Document, Shared, Tally
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

FAR_MS = 1 << 45


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis_server.url) as proxy:
        yield proxy


@pytest.fixture
async def storage(proxy: FaultProxy, namespace: str) -> AsyncIterator[RedisStorage]:
    """Has been used once, so that the server knows the script."""
    storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=2)
    await storage.shared().document("warm")
    yield storage
    proxy.heal()
    await storage.aclose()


def operations(shared: Shared) -> list[Callable[[], Awaitable[object]]]:
    return [
        lambda: shared.publish("d", 2, b"two"),
        lambda: shared.document("d"),
        lambda: shared.tally("t", HOUR, {"a": 1}),
        lambda: shared.tallies("t", 0),
        lambda: shared.mark("m", until_ms=FAR_MS),
        lambda: shared.unmark("m"),
    ]


@pytest.mark.parametrize("executed", [True, False])
async def test_what_breaks_once_is_done_once(proxy: FaultProxy, storage: RedisStorage, *, executed: bool) -> None:
    """A connection that breaks before or after an operation is executed changes no answer: who marks has marked, and a
    count counts once."""
    cut = proxy.cut_at_reply if executed else proxy.cut_at_request
    shared, hour = storage.shared(), HOUR + (1 << 40) // 3_600_000 * 3_600_000
    cut(of="EVALSHA")
    assert await shared.publish("d", 1, b"one")
    cut(of="EVALSHA")
    assert await shared.document("d") == Document(1, b"one")
    cut(of="EVALSHA")
    await shared.tally("t", hour, {"a": 3, "b": 1})
    cut(of="EVALSHA")
    assert await shared.tallies("t", hour) == [Tally(hour, "a", 3), Tally(hour, "b", 1)]
    cut(of="EVALSHA")
    assert await shared.mark("m", until_ms=FAR_MS)
    assert not await shared.mark("m", until_ms=FAR_MS)
    cut(of="EVALSHA")
    await shared.unmark("m")
    assert await shared.mark("m", until_ms=FAR_MS)
    assert proxy.counts.cuts == 6


async def test_a_server_that_is_away_or_hangs_is_told_in_time(
    proxy: FaultProxy, redis_server: RedisServer, namespace: str
) -> None:
    """With the server away, or silent, every operation raises `StorageError` within its timeout."""
    storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=1)
    shared = storage.shared()
    await shared.document("warm")
    proxy.refuse()
    proxy.cut()
    for operation in (*operations(shared), storage.open_calls):
        begun_s = time.monotonic()
        with pytest.raises(StorageError):
            await operation()
        assert time.monotonic() - begun_s < 20
    proxy.heal()
    await storage.aclose()


async def test_a_locked_file_is_told_in_time(tmp_path: Path) -> None:
    """While another program keeps the file locked, operations raise `StorageError` within the timeout."""
    storage = SqliteStorage(tmp_path / "guard.db", timeout_s=0.2)
    shared = storage.shared()
    await shared.publish("d", 1, b"one")
    with closing(sqlite3.connect(tmp_path / "guard.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begun_s = time.monotonic()
        answers = await asyncio.gather(*(operation() for operation in operations(shared)), return_exceptions=True)
        assert [type(answer) for answer in answers if not isinstance(answer, StorageError)] == []
        assert time.monotonic() - begun_s < 30
        other.execute("ROLLBACK")
    assert await shared.document("d") == Document(1, b"one")
    await storage.aclose()


async def test_a_file_without_shared_things_has_no_tables_for_them(tmp_path: Path) -> None:
    """The tables are made by the first operation, beside whatever it shares its transaction with; and again where they
    were taken away."""
    path = tmp_path / "guard.db"
    storage = SqliteStorage(path)
    shared = storage.shared()
    sought = "SELECT name FROM sqlite_master WHERE name LIKE 'shared%' AND type = 'table' ORDER BY name"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(sought).fetchall() == []
        await asyncio.gather(*(operation() for operation in operations(shared)))
        assert len(connection.execute(sought).fetchall()) == 3
        for (table,) in connection.execute(sought).fetchall():
            connection.execute(f"DROP TABLE {table}")
        connection.commit()
    assert await shared.mark("m", until_ms=FAR_MS)
    assert await shared.publish("d", 1, b"one")
    await storage.aclose()


async def test_sqlite_forgets_marks_that_are_over(tmp_path: Path) -> None:
    """Marks whose time is over go with those that come."""
    clock, path = FrozenClock(START), tmp_path / "guard.db"
    storage = SqliteStorage(path, clock=clock)
    memory = MemoryStorage(clock=clock)
    for n in range(40):
        for shared in (storage.shared(), memory.shared()):
            await shared.mark(f"m{n}", until_ms=START_MS + 10)
    clock.advance(ms=10)
    for n in range(12):
        for shared in (storage.shared(), memory.shared()):
            await shared.mark(f"n{n}", until_ms=START_MS + 20)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM shared_marks1").fetchone() == (12,)
    assert memory.shared().size()["marks"] == 12
    await storage.aclose()


async def test_redis_keys_end_by_themselves(redis_server: RedisServer, namespace: str) -> None:
    """Every key that is shared in Redis lies in its namespace's slot and has an end; a document in use gets a new one."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    shared = storage.shared()
    hour = int(time.time() * 1000) // 3_600_000 * 3_600_000
    await shared.publish("d", 1, b"one")
    await shared.tally("t", hour, {"a": 1})
    await shared.mark("m", until_ms=hour + 86_400_000)
    keys = redis_server.call("KEYS", f"*{{{namespace}}}:[pqr]*")
    assert len(keys) == 5
    assert all(redis_server.call("PTTL", key) > 0 for key in keys)
    (document,) = [key for key in keys if key.endswith(b":p:d")]
    redis_server.call("PEXPIRE", document, 5_000)
    await shared.document("d", known=1)
    assert redis_server.call("PTTL", document) > 86_400_000
    await storage.aclose()


async def test_nothing_new_is_one_small_read(redis_server: RedisServer, namespace: str) -> None:
    """Asking for a document that has not changed is one call with a reply of a few bytes, however long the document is."""
    async with FaultProxy(redis_server.url) as proxy:
        storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=10)
        await storage.shared().publish("d", 1, bytes(1_000_000))
        before = proxy.counts
        assert await storage.shared().document("d", known=1) is None
        assert proxy.counts.requests - before.requests == 1
        await storage.aclose()


async def test_storages_that_keep_nothing() -> None:
    """A storage that cannot keep what processes share says so when it is asked."""
    limits = LimitsStorage.from_url("memory://")
    for storage in (ShardedStorage([MemoryStorage(), limits]), LeasingStorage(limits), OutageStorage(limits)):
        with pytest.raises(ConfigurationError, match="shar"):
            storage.shared()
        assert list(await storage.open_calls()) == []


async def test_a_store_that_goes_away_in_tests() -> None:
    """`OutageStorage` takes what processes share away with everything else, and loses answers of what was done."""
    storage = OutageStorage(MemoryStorage())
    shared = storage.shared()
    storage.down()
    for operation in (*operations(shared), storage.open_calls):
        with pytest.raises(StorageError):
            await operation()
    storage.lose_replies()
    with pytest.raises(StorageError):
        await shared.publish("d", 3, b"three")
    storage.up()
    assert await shared.document("d") == Document(3, b"three")
