"""Usage records as streams: what is read, what was dropped before, and what is removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from tests.ledger_flow.conftest import MakeStorage
from tests.ledger_flow.kit import admit, ids, read_all, record, settle, stream_of, write
from tests.servers import OwnRedis, RedisServer, unique_namespace, wait_until
from tests.storage.values import OTHER, START

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.redis_codec import write_record
from asgi_llm_guard.storage.redis_stream import RedisStream
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import Usage

pytestmark = pytest.mark.anyio

MakeRedis = Callable[..., RedisStorage]


async def test_all_records_are_read_once_in_the_order_in_which_they_were_written(make_storage: MakeStorage) -> None:
    """A reader that goes on from its position sees each record once, however its pages are cut."""
    storage = make_storage()
    stream = stream_of(storage)
    written = [record(number) for number in range(1_203)]
    await write(storage, written[:700])
    first, position = await read_all(stream, limit=333)
    await write(storage, written[700:])

    rest, end = await read_all(stream, position, limit=10_000)
    again = await stream.read(end, 10)

    assert first + rest == written
    assert (again.records, again.position, again.behind) == ((), end, 0)


async def test_a_record_comes_back_as_it_was_written(make_storage: MakeStorage) -> None:
    """What other models did for an answer is part of it."""
    storage = make_storage()
    beside = (Usage(input_tokens=3, output_tokens=1, model="helper"), Usage(web_searches=2))
    usage = Usage(input_tokens=7, output_tokens=2, service_tier="flex", extra=beside)
    written = msgspec.structs.replace(record(1), usage=usage, tags=("a", "b"), attempt=2, attempt_of="call-0")
    await write(storage, [written])

    assert (await stream_of(storage).read(None, 10)).records == (written,)
    assert await storage.records() == [written]


async def test_what_the_bound_drops_before_it_is_read_is_counted_exactly(make_storage: MakeStorage) -> None:
    """A reader that comes too late is told how many records it has missed, once, and reads the others."""
    storage = make_storage(max_records=10)
    stream = stream_of(storage)
    await write(storage, map(record, range(7)))
    seen, position = await read_all(stream)
    await write(storage, map(record, range(7, 20)))

    read = await stream.read(position, 4)
    then = await stream.read(read.position, 100)

    assert (ids(seen)[-1], read.lost, ids(read.records)) == ("call-6", 3, [f"call-{n}" for n in range(10, 14)])
    assert (then.lost, ids(then.records)) == (0, [f"call-{n}" for n in range(14, 20)])


async def test_drops_while_nothing_is_read_are_still_counted(make_storage: MakeStorage) -> None:
    """Where all that came since was dropped twice over, the count is what went, not what is there."""
    storage = make_storage(max_records=5)
    stream = stream_of(storage)
    position = (await stream.read(None, 10)).position
    await write(storage, map(record, range(23)))

    read = await stream.read(position, 100)

    assert (read.lost, len(read.records), read.behind) == (18, 5, 0)


async def test_a_late_settlement_is_written_behind_its_estimate(make_storage: MakeStorage) -> None:
    """Both are read, the late one last; neither counts as dropped; the storage itself keeps one record."""
    clock = FrozenClock(START)
    storage = make_storage(clock=clock)
    stream = stream_of(storage)
    await admit(storage, 1)
    await write(storage, [record(2)])
    clock.advance(seconds=20)
    await storage.heartbeat(OTHER)

    estimate, position = await read_all(stream)
    status = await settle(storage, 1, 70)
    late, end = await read_all(stream, position)

    assert [(one.call_id, one.outcome, one.cost_nanousd) for one in estimate][-1] == ("call-1", "expired", 10**9)
    assert (status, [(one.call_id, one.late, one.cost_nanousd) for one in late]) == ("late", [("call-1", True, 70)])
    assert (await stream.read(end, 5)).lost == 0
    assert sorted(ids(await storage.records())) == ["call-1", "call-2"]


async def test_the_id_of_a_replaced_record_is_remembered_when_the_estimate_is_removed(make_redis: MakeRedis) -> None:
    """Removing the estimate's entry leaves the late one known, so that its call is not settled once more."""
    clock = FrozenClock(START)
    storage = make_redis(clock=clock, tombstone_ms=1_000)
    stream = stream_of(storage)
    await admit(storage, 1)
    clock.advance(seconds=20)
    await storage.heartbeat(OTHER)
    assert await settle(storage, 1, 70) == "late"
    _, position = await read_all(stream)
    clock.advance(seconds=10**9)

    assert await stream.trim(position, keep_ms=0, limit=100) == 1

    assert await settle(storage, 1, 99) == "duplicate"
    assert [one.cost_nanousd for one in await storage.records()] == [70]


async def test_only_what_is_old_and_read_is_removed_and_the_last_one_stays(make_redis: MakeRedis) -> None:
    """`trim` removes the oldest entries up to the position, at most so many, none that is younger than said."""
    storage = make_redis()
    stream = stream_of(storage)
    await write(storage, map(record, range(20)))
    position = (await stream.read(None, 12)).position

    young = await stream.trim(position, keep_ms=600_000, limit=100)
    some = await stream.trim(position, keep_ms=-60_000, limit=4)
    rest = await stream.trim(position, keep_ms=-60_000, limit=100)

    assert (young, some, rest) == (0, 4, 7)
    assert ids(await storage.records()) == [f"call-{n}" for n in range(11, 20)]
    read = await stream.read(position, 100)
    assert (ids(read.records), read.lost, read.anew) == ([f"call-{n}" for n in range(12, 20)], 0, False)


async def test_a_call_whose_entry_was_removed_is_forgotten_with_it(make_redis: MakeRedis, own_redis: OwnRedis) -> None:
    """What remembers call ids does not outgrow the stream."""
    server = own_redis()
    storage = make_redis(server.url)
    stream = stream_of(storage)
    await write(storage, map(record, range(5)))
    _, position = await read_all(stream)

    await stream.trim(position, keep_ms=-60_000, limit=100)

    assert server.call("HKEYS", server.call("KEYS", "*:li")[0]) == [b"call-4"]


async def test_a_flushed_store_is_read_from_its_start(make_redis: MakeRedis, own_redis: OwnRedis) -> None:
    """Rule 4 of streams: a position in data that is gone leads to the start of what there is."""
    server = own_redis()
    storage = make_redis(server.url)
    stream = stream_of(storage)
    await write(storage, map(record, range(5)))
    _, position = await read_all(stream)
    server.flush()
    await write(storage, map(record, range(5, 12)))

    cut = await stream.trim(position, keep_ms=-60_000, limit=100)
    read = await stream.read(position, 100)

    assert cut == 0
    assert (read.anew, read.lost, ids(read.records)) == (True, 0, [f"call-{n}" for n in range(5, 12)])
    assert not (await stream.read(read.position, 100)).anew


async def test_a_store_that_is_replaced_between_two_pages_ends_the_reading_there() -> None:
    """What was read before is whole and keeps its position; the next reading finds that the data is another."""
    epochs = ["one", "one", "two", "two", "two"]

    async def ask(arguments: Sequence[bytes]) -> Any:
        epoch, from_, count = epochs.pop(0), arguments[1].decode(), int(arguments[2])
        first = int(from_.partition("-")[2]) if from_ else 0
        numbers = range(first + 1, first + 1 + count)
        entries = [[b"1-%d" % n, [b"c", f"{epoch}-{n}".encode(), b"r", write_record(record(0))]] for n in numbers]
        found = f"{epoch}-{first}".encode() if from_ else None
        return [0, f"{epoch} 0 ".encode(), 5_000, 5_000, b"1-5000", found, entries]

    stream = RedisStream(ask, "any")
    read = await stream.read(None, 1_200)
    then = await stream.read(read.position, 1)

    assert (len(read.records), read.anew, ids(read.records)[-1]) == (800, False, "one-800")
    assert (then.anew, ids(then.records)) == (True, ["two-1"])


@pytest.mark.parametrize("clock_behind", [False, True])
async def test_a_replica_that_lacks_the_newest_entries_is_read_from_its_start(
    make_redis: MakeRedis, own_redis: OwnRedis, clock_behind: bool
) -> None:
    """After a failover that lost entries which were drained, nothing that the new master writes is passed over, also where
    its clock is behind and it gives ids that lie before the position."""
    master = own_redis()
    replica = own_redis(replica_of=master)
    namespace = unique_namespace()
    before, after = make_redis(master.url, namespace=namespace), make_redis(replica.url, namespace=namespace)
    await write(before, map(record, range(5)))
    key = f"llmguard1:{{{namespace}}}:l"
    wait_until(lambda: replica.call("XLEN", key) == 5, "the replica has what was written")
    replica.call("REPLICAOF", "NO", "ONE")
    _, shared = await read_all(stream_of(before))
    await write(before, map(record, range(5, 8)))
    _, position = await read_all(stream_of(before))
    if clock_behind:
        last = _last(replica, key)
        at, _, number = last.partition("-")
        fields = before_fields(master, key)
        for n in range(4):
            replica.call("XADD", key, f"{at}-{int(number) + 1 + n}", "c", f"new-{n}", *fields[2:4])
        expected = [f"new-{n}" for n in range(4)]
    else:
        await write(after, map(record, range(20, 24)))
        expected = [f"call-{n}" for n in range(20, 24)]

    read = await stream_of(after).read(position, 100)
    went_on = await stream_of(after).read(shared, 100)

    assert (read.anew, ids(read.records)) == (True, [f"call-{n}" for n in range(5)] + expected)
    assert (went_on.anew, ids(went_on.records)) == (False, expected)


def _last(server: RedisServer, key: str) -> str:
    (entry,) = server.call("XREVRANGE", key, "+", "-", "COUNT", 1)
    return bytes(entry[0]).decode()


def before_fields(server: RedisServer, key: str) -> list[bytes]:
    (entry,) = server.call("XREVRANGE", key, "+", "-", "COUNT", 1)
    return list(entry[1])


async def test_a_position_of_another_entry_with_the_same_id_is_noticed(
    make_redis: MakeRedis, own_redis: OwnRedis
) -> None:
    """Two masters can give the same id to different entries: the call id tells them apart."""
    server = own_redis()
    storage = make_redis(server.url)
    stream = stream_of(storage)
    await write(storage, map(record, range(3)))
    _, position = await read_all(stream)
    key = server.call("KEYS", "*:l")[0].decode()
    entry, fields = _last(server, key), before_fields(server, key)
    copied = server.call("XRANGE", key, "-", f"({entry}")
    server.call("DEL", key)
    for id_, values in copied:
        server.call("XADD", key, id_, *values)
    server.call("XADD", key, entry, "c", "another", *fields[2:])

    read = await stream.read(position, 10)

    assert (read.anew, ids(read.records)) == (True, ["call-0", "call-1", "another"])


async def test_a_text_that_is_no_position_begins_anew(make_storage: MakeStorage) -> None:
    """A position that cannot be read counts as one of data that is gone."""
    storage = make_storage()
    await write(storage, map(record, range(3)))

    read = await stream_of(storage).read("nonsense", 10)

    assert (read.anew, len(read.records)) == (True, 3)
    assert await stream_of(storage).trim("nonsense", keep_ms=0, limit=10) == 0


async def test_the_streams_of_shards_have_each_record_once() -> None:
    """A sharded storage has one stream for each shard, under names of their own."""
    sharded = ShardedStorage([MemoryStorage() for _ in range(4)])
    await write(sharded, map(record, range(60)))
    await admit(sharded, 100)
    await settle(sharded, 100, 5)

    streams = sharded.streams()
    parts = [(await read_all(stream))[0] for stream in streams]

    assert len({stream.name for stream in streams}) == 4
    assert sum(map(bool, parts)) > 1
    assert sorted(one for part in parts for one in ids(part)) == sorted([*(f"call-{n}" for n in range(60)), "call-100"])


async def test_leases_show_the_stream_behind_them(tmp_path: object) -> None:
    """A storage with leases has the streams of its store, and says so where that has none."""
    memory = MemoryStorage()
    leasing = LeasingStorage(memory)
    without = LeasingStorage(SqliteStorage(f"{tmp_path}/guard.db"))

    assert leasing.streams() == memory.streams()
    with pytest.raises(ConfigurationError, match="SqliteStorage keeps no stream"):
        without.streams()
    with pytest.raises(ConfigurationError, match="not every shard"):
        ShardedStorage([memory, SqliteStorage(f"{tmp_path}/other.db")]).streams()
