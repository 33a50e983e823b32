"""How much is kept: what each storage does beyond its bounds, and with what is over."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.entries.kit import CLAIM_MS, TTL_MS, MakeEntries, Store, begin, keep, value_of
from tests.servers import RedisServer
from tests.storage.values import START

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.entries import EPOCH_MS, Bounds, InFlight
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

here = pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)


@here
async def test_the_oldest_make_room(make_entries: MakeEntries) -> None:
    """Beyond so many values, or so many bytes, those that were stored first go, and as many as have to."""
    entries = make_entries("cache", Bounds(max_entries=3, max_bytes=100))
    for n in range(5):
        assert await keep(entries, str(n), b"x" * 10)
    assert [await value_of(entries, str(n)) is not None for n in range(5)] == [False, False, True, True, True]
    assert await keep(entries, "large", b"x" * 85)
    assert [await value_of(entries, str(n)) is not None for n in range(5)] == [False, False, False, False, True]
    assert await value_of(entries, "large") == b"x" * 85
    assert await keep(entries, "4", b"y")
    assert await keep(entries, "larger", b"x" * 99)
    assert [await value_of(entries, key) is not None for key in ("4", "large", "larger")] == [True, False, True]


@here
async def test_what_alone_is_too_much_is_not_kept(make_entries: MakeEntries) -> None:
    """A value that is larger than all values may be together is not kept, and the caller is told so."""
    entries = make_entries("cache", Bounds(max_bytes=10))
    assert not await keep(entries, "k", b"x" * 11)
    assert await value_of(entries, "k") is None
    assert await keep(entries, "k", b"x" * 10)


@here
async def test_claims_are_never_pushed_out(make_entries: MakeEntries) -> None:
    """However much is stored meanwhile, a leader keeps its lead."""
    entries = make_entries("cache", Bounds(max_entries=1))
    await begin(entries, "claimed", "a")
    for n in range(5):
        await keep(entries, str(n), b"v")
    assert await begin(entries, "claimed", "b") == InFlight("", CLAIM_MS)
    assert await entries.store("claimed", "a", b"v", ttl_ms=TTL_MS)


@here
async def test_spaces_do_not_push_each_other_out(make_entries: MakeEntries) -> None:
    """A full cache takes no room from what another feature keeps."""
    one, other = make_entries("cache", Bounds(max_entries=1)), make_entries("idempotency", Bounds(max_entries=2))
    assert await keep(other, "a", b"a")
    for n in range(5):
        await keep(one, str(n), b"v")
    assert await keep(other, "b", b"b")
    assert (await value_of(other, "a"), await value_of(other, "b")) == (b"a", b"b")


async def test_memory_forgets_what_is_over() -> None:
    """What is kept in memory is about as much as is alive: values, claims and epochs."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    entries = storage.entries("cache")
    for n in range(1000):
        await keep(entries, f"v{n}", b"0123456789", f"n{n}")
        await begin(entries, f"c{n}", "a")
    assert entries.size() == {"values": 1000, "claims": 1000, "bytes": 10_000, "epochs": 1000}
    clock.advance(ms=TTL_MS)
    for n in range(1001):
        await keep(entries, f"w{n}", b"0")
    assert entries.size() == {"values": 1001, "claims": 0, "bytes": 1001, "epochs": 1000}
    clock.advance(ms=EPOCH_MS)
    await begin(entries, "k", "a", "n")
    assert entries.size()["epochs"] == 1


async def test_memory_does_not_grow_with_what_comes_and_goes() -> None:
    """The same key begun and abandoned again and again leaves nothing behind."""
    entries = MemoryStorage(clock=FrozenClock(START)).entries("cache")
    for n in range(1000):
        await begin(entries, "k", str(n))
        await entries.abandon("k", str(n))
    assert entries.size() == {"values": 0, "claims": 0, "bytes": 0, "epochs": 0}
    assert len(entries._line) <= 2


def rows(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        count: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        return count


async def test_sqlite_forgets_what_is_over(tmp_path: Path) -> None:
    """Rows whose time is over go with those that come, and the sums follow."""
    clock, path = FrozenClock(START), tmp_path / "guard.db"
    storage = SqliteStorage(path, clock=clock)
    entries = storage.entries("cache")
    for n in range(40):
        await keep(entries, f"v{n}", b"0123456789", f"n{n}")
    assert (rows(path, "entries1"), rows(path, "entry_epochs1")) == (40, 40)
    clock.advance(ms=EPOCH_MS)
    for n in range(12):
        await keep(entries, f"w{n}", b"0", "n")
    assert (rows(path, "entries1"), rows(path, "entry_epochs1")) == (12, 37)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT * FROM entry_sums1").fetchall() == [("cache", 12, 12)]
    await storage.aclose()


async def test_sqlite_keeps_values_over_restarts(tmp_path: Path) -> None:
    """Values in a file outlive the process, and are shared by all that have it open."""
    clock, path = FrozenClock(START), tmp_path / "guard.db"
    one, other = SqliteStorage(path, clock=clock), SqliteStorage(path, clock=clock)
    await keep(one.entries("cache"), "k", b"v", "n")
    assert await value_of(other.entries("cache"), "k") == b"v"
    await other.entries("cache").bump("n")
    assert await value_of(one.entries("cache"), "k") is None
    await keep(one.entries("cache"), "k", b"w", "n")
    await one.aclose()
    await other.aclose()
    later = SqliteStorage(path, clock=clock)
    assert await value_of(later.entries("cache"), "k") == b"w"
    await later.aclose()


async def test_a_file_without_a_cache_has_no_tables_for_it(tmp_path: Path) -> None:
    """The tables are made when somebody asks for a space, not before."""
    path = tmp_path / "guard.db"
    storage = SqliteStorage(path)
    with closing(sqlite3.connect(path)) as connection:
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'entr%'").fetchall()
    storage.entries("cache")
    assert rows(path, "entries1") == 0
    await storage.aclose()


async def test_a_file_that_went_away_is_a_wrong_setting(tmp_path: Path) -> None:
    """Tables that cannot be made are an error when the space is asked for."""
    storage = SqliteStorage(tmp_path / "guard.db")
    (tmp_path / "guard.db").unlink()
    (tmp_path / "guard.db").mkdir()
    with pytest.raises(ConfigurationError, match=r"guard\.db"):
        storage.entries("cache")
    await storage.aclose()


async def test_redis_forgets_by_time(redis_server: RedisServer, namespace: str) -> None:
    """Every key that a cache makes in Redis ends by itself, and lies in its namespace's slot."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    entries = storage.entries("cache")
    await keep(entries, "k", b"v", "n")
    await begin(entries, "claimed", "a", "n")
    await entries.bump("other")
    keys = sorted(redis_server.call("KEYS", f"*{{{namespace}}}:[vw]:*"))
    assert [key.rpartition(b":")[2] for key in keys] == [b"claimed", b"k", b"n", b"other"]
    most_ms = (CLAIM_MS + 1000, TTL_MS + 1000, EPOCH_MS, EPOCH_MS)
    ends_ms = [redis_server.call("PTTL", key) for key in keys]
    assert all(0 < end_ms <= most for end_ms, most in zip(ends_ms, most_ms, strict=True))
    await storage.aclose()


async def test_redis_finds_an_evicted_epoch_to_be_another(redis_server: RedisServer, namespace: str) -> None:
    """T6: a server that drops epochs to save memory ends them; it never brings back what was revoked."""
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    entries = storage.entries("cache")
    await keep(entries, "k", b"v", "n")
    assert redis_server.call("DEL", *redis_server.call("KEYS", f"*{{{namespace}}}:w:*")) == 1
    assert await value_of(entries, "k") is None
    await begin(entries, "k", "a", "n")
    assert await value_of(entries, "k") is None
    await storage.aclose()


def test_bounds_are_whole_numbers() -> None:
    """Bounds of nothing, or of no number, are refused when they are built."""
    for options in ({"max_value_bytes": 0}, {"max_bytes": -1}, {"max_entries": True}, {"max_entries": 1.5}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            Bounds(**options)


async def test_a_copy_begins_without_entries(store: Store) -> None:
    """Exports leave out what caches keep."""
    await keep(store.storage.entries("cache"), "k", b"needle", "n")
    assert not [line async for line in store.storage.export() if b"needle" in line]


async def test_shards_that_keep_nothing(tmp_path: Path) -> None:
    """A storage one of whose shards cannot keep entries says so when it is asked for a space."""
    storage = ShardedStorage([MemoryStorage(), LimitsStorage.from_url("memory://")])
    with pytest.raises(ConfigurationError, match="shard"):
        storage.entries("cache")
    with pytest.raises(ConfigurationError, match="LimitsStorage"):
        OutageStorage(LimitsStorage.from_url("memory://")).entries("cache")


async def test_a_shard_that_does_not_hear_of_a_revocation() -> None:
    """T6: a bump that did not reach every shard is an error, and may be repeated."""
    shards = [OutageStorage(MemoryStorage(clock=FrozenClock(START))) for _ in range(2)]
    entries = ShardedStorage(shards).entries("cache")
    for n in range(10):
        await keep(entries, str(n), b"v", "n")
    shards[1].down()
    with pytest.raises(StorageError):
        await entries.bump("n")
    shards[1].up()
    await entries.bump("n")
    assert [await value_of(entries, str(n)) for n in range(10)] == [None] * 10
