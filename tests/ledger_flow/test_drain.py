"""From the streams of a storage into a ledger: exactly once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import pytest
from tests.ledger_flow.conftest import MakeLedger, MakeStorage
from tests.ledger_flow.kit import admit, kept, record, settle, write
from tests.servers import OwnRedis, shared_redis, unique_namespace, wait_until
from tests.storage.values import OTHER, START

from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.events import Event, RecordsLost
from asgi_llm_guard.ledger import Ledger, UsageQuery
from asgi_llm_guard.ledger.drain import Drain, Drained
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

MakeRedis = Callable[..., RedisStorage]
EVER = UsageQuery(since_ms=0, until_ms=2**52)


def costs(numbers: range) -> dict[str, int]:
    return {f"call-{number}": 1_000 + number for number in numbers}


async def test_every_record_is_in_the_ledger_once(make_storage: MakeStorage, ledger: Ledger) -> None:
    """C9, S7: what was written is in the ledger, to the nano-dollar, in however many steps; nothing more comes of another."""
    storage = make_storage()
    drain = Drain(storage, ledger, batch=150)
    await write(storage, map(record, range(400)))

    first = await drain.step()
    await write(storage, map(record, range(400, 500)))
    rest = await drain.run()
    nothing = await drain.step()

    assert (first.records, first.behind, rest.records) == (150, 250, 350)
    assert nothing == Drained()
    assert await kept(ledger) == costs(range(500))
    assert (await ledger.usage(EVER)).total.cost_nanousd == sum(costs(range(500)).values())


async def test_several_drains_at_once_count_nothing_twice(make_redis: MakeRedis, make_ledger: MakeLedger) -> None:
    """Drains with connections of their own, while others write: the sum of what they took is what was written."""
    namespace = unique_namespace()
    writer = make_redis(namespace=namespace)
    drains = [Drain(make_redis(namespace=namespace), make_ledger(), batch=70) for _ in range(4)]

    async def keep_writing() -> None:
        for at in range(0, 600, 50):
            await write(writer, map(record, range(at, at + 50)))

    async def keep_draining(drain: Drain) -> Drained:
        done = Drained()
        for _ in range(12):
            done += await drain.step()
        return done

    writing = asyncio.ensure_future(keep_writing())
    taken = await asyncio.gather(*map(keep_draining, drains))
    await writing
    taken.append(await drains[0].run())

    assert sum(one.records for one in taken) == 600
    assert sum(one.replaced for one in taken) == 0
    assert await kept(make_ledger()) == costs(range(600))


async def test_all_shards_are_drained(ledger: Ledger) -> None:
    """A storage of several shards has a cursor in the ledger for each of them."""
    url = f"{shared_redis().url}?shard_by=caller&shards=4&namespace={unique_namespace()}"
    storage = open_storage(url, clock=SystemClock())
    drain = Drain(storage, ledger, batch=30)
    await write(storage, map(record, range(200)))

    done = await drain.run()
    again = await Drain(storage, ledger).step()
    await storage.aclose()

    assert (done.records, again.records) == (200, 0)
    assert await kept(ledger) == costs(range(200))


@pytest.mark.parametrize("drained_between", [False, True])
async def test_a_late_settlement_takes_the_place_of_the_estimate(
    make_storage: MakeStorage, ledger: Ledger, drained_between: bool
) -> None:
    """Whether the estimate was drained before, or both come together: the ledger has the late one, once."""
    clock = FrozenClock(START)
    storage = make_storage(clock=clock)
    drain = Drain(storage, ledger)
    await admit(storage, 1)
    clock.advance(seconds=20)
    await storage.heartbeat(OTHER)
    if drained_between:
        await drain.step()
        assert await kept(ledger) == {"call-1": 10**9}
        await ledger.roll_up()
    assert await settle(storage, 1, 70) == "late"

    done = await drain.step()
    await ledger.roll_up()

    assert (done.records, done.lost) == (1 - drained_between, 0)
    assert await kept(ledger) == {"call-1": 70}
    assert (await ledger.usage(EVER)).total.cost_nanousd == 70
    assert (await ledger.reconcile(0, 2**52)).equal


async def test_what_was_dropped_before_it_was_drained_is_told_once(
    make_redis: MakeRedis, make_ledger: MakeLedger, caplog: pytest.LogCaptureFixture
) -> None:
    """Records that the stream's bound has dropped are counted and logged by the one drain that moves past them."""
    namespace = unique_namespace()
    storage = make_redis(namespace=namespace, max_records=50)
    events: list[Event] = []
    drains = [
        Drain(one, make_ledger(), observers=[events.append]) for one in (storage, make_redis(namespace=namespace))
    ]
    await write(storage, map(record, range(20)))
    await drains[0].run()
    await write(storage, map(record, range(20, 120)))

    with caplog.at_level(logging.ERROR, "asgi_llm_guard.ledger"):
        taken = await asyncio.gather(*(drain.step() for drain in drains))
        later = [await drain.step() for drain in drains]

    assert sorted(one.lost for one in (*taken, *later)) == [0, 0, 0, 50]
    assert events == [RecordsLost(f"redis:{namespace}", 50)]
    assert len(caplog.messages) == 1
    assert "50 usage records were dropped" in caplog.messages[0]
    assert await kept(make_ledger()) == costs(range(20)) | costs(range(70, 120))


async def test_a_flushed_store_is_drained_from_its_start(
    make_redis: MakeRedis, own_redis: OwnRedis, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes after a flush is drained, what was there before stays, and the log says what happened."""
    server = own_redis()
    storage = make_redis(server.url)
    drain = Drain(storage, ledger)
    await write(storage, map(record, range(30)))
    await drain.run()
    server.flush()
    await write(storage, map(record, range(30, 40)))

    done = await drain.step()

    assert (done.records, done.lost, done.anew) == (10, 0, 1)
    assert await kept(ledger) == costs(range(40))
    assert "read from its start" in caplog.text


async def test_a_replica_without_the_newest_entries_counts_nothing_twice(
    make_redis: MakeRedis, own_redis: OwnRedis, ledger: Ledger
) -> None:
    """A failover that loses a late settlement which was drained: its estimate, which comes again, does not come back."""
    master = own_redis()
    replica = own_redis(replica_of=master)
    namespace = unique_namespace()
    clock = FrozenClock(START)
    before = make_redis(master.url, namespace=namespace, clock=clock)
    after = make_redis(replica.url, namespace=namespace, clock=clock)
    await write(before, map(record, range(2, 10)))
    await admit(before, 1)
    clock.advance(seconds=20)
    await before.heartbeat(OTHER)
    key = f"llmguard1:{{{namespace}}}:l"
    wait_until(lambda: replica.call("XLEN", key) == 9, "the replica has what was written")
    replica.call("REPLICAOF", "NO", "ONE")
    assert await settle(before, 1, 70) == "late"
    await Drain(before, ledger).run()
    await write(after, map(record, range(10, 15)))

    done = await Drain(after, ledger).run()

    assert (done.records, done.anew) == (5, 1)
    assert await kept(ledger) == {**costs(range(2, 15)), "call-1": 70}


async def test_drained_entries_leave_the_stream_when_they_are_old(make_redis: MakeRedis, ledger: Ledger) -> None:
    """Entries that are older than `keep` are removed after they were drained, a few at a time; the rest of the stream
    stays readable."""
    namespace = unique_namespace()
    young, old = make_redis(namespace=namespace), make_redis(namespace=namespace, clock=FrozenClock(START))
    await write(young, map(record, range(60)))

    kept_all = await Drain(young, ledger, batch=20).run()
    removed = [(await Drain(old, ledger, batch=20).step()).removed for _ in range(3)]
    await write(young, map(record, range(60, 70)))
    more = await Drain(young, ledger).step()

    assert (kept_all.records, kept_all.removed) == (60, 0)
    assert removed == [40, 19, 0]
    assert (more.records, more.lost, more.anew) == (10, 0, 0)
    assert await kept(ledger) == costs(range(70))


async def test_what_was_drained_is_not_settled_twice(make_redis: MakeRedis, ledger: Ledger) -> None:
    """A settlement that is repeated after its record was drained is a duplicate, as long as the entry is kept."""
    storage = make_redis(tombstone_ms=1)
    await admit(storage, 1)
    assert await settle(storage, 1, 70) == "settled"
    await Drain(storage, ledger).run()

    assert await settle(storage, 1, 90) == "duplicate"
    assert (await Drain(storage, ledger).run()).records == 0
    assert await kept(ledger) == {"call-1": 70}


async def test_a_storage_that_is_away_costs_no_record(
    own_redis: OwnRedis, make_redis: MakeRedis, ledger: Ledger
) -> None:
    """A step that cannot reach the storage raises, and the next one goes on where the last one ended."""
    server = own_redis(appendonly=True)
    storage = make_redis(server.url)
    await write(storage, map(record, range(10)))
    await Drain(storage, ledger, batch=4).step()
    server.kill()

    with pytest.raises(StorageError):
        await Drain(RedisStorage(server.url, namespace="any", timeout_s=0.05), ledger).step()
    server.start()
    again = RedisStorage(server.url, namespace=storage.streams()[0].name.removeprefix("redis:"), timeout_s=10)
    await Drain(again, ledger).run()
    await again.aclose()

    assert await kept(ledger) == costs(range(10))


async def test_a_store_that_comes_and_goes_costs_no_record(make_storage: MakeStorage, ledger: Ledger) -> None:
    """A storage that is away, or whose replies are lost, at random instants of a drain: every record is in the ledger once."""
    rng = random.Random(7)
    store = make_storage()
    storage = OutageStorage(store)
    drain = Drain(storage, ledger, batch=7)
    failed = 0
    for turn in range(30):
        await write(store, map(record, range(turn * 5, turn * 5 + 5)))
        rng.choice((storage.up, storage.down, storage.lose_replies, lambda: storage.down(after=1)))()
        try:
            await drain.step()
        except StorageError:
            failed += 1
    storage.up()
    await drain.run()

    assert failed > 5
    assert await kept(ledger) == costs(range(150))


async def test_a_shard_that_is_away_does_not_hold_up_the_others(ledger: Ledger) -> None:
    """What the other shards have is drained; the step says that one of them did not answer."""
    shards = [OutageStorage(MemoryStorage()) for _ in range(4)]
    storage = ShardedStorage(shards)
    await write(storage, map(record, range(80)))
    counts = [len(await shard.records()) for shard in shards]
    away = shards[counts.index(max(counts))]
    away.down()

    with pytest.raises(StorageError):
        await Drain(storage, ledger).step()
    there = len(await kept(ledger))
    away.up()
    await Drain(storage, ledger).run()

    assert there == 80 - max(counts)
    assert await kept(ledger) == costs(range(80))


async def test_a_ledger_that_refuses_has_neither_records_nor_position(tmp_path: object) -> None:
    """Records and position are one transaction: what fails in the midst of it leaves both as they were."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    storage, ledger = MemoryStorage(), Ledger.open(url)
    await ledger.prepare()
    await write(storage, map(record, range(10)))
    await ledger.database.write(
        lambda connection: connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON ledger WHEN NEW.call_id = 'call-7' BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    )
    with pytest.raises(StorageError, match="full"):
        await Drain(storage, ledger).step()
    assert await kept(ledger) == {}
    await ledger.database.write(lambda connection: connection.execute("DROP TRIGGER full"))

    done = await Drain(storage, ledger).step()

    assert (done.records, await kept(ledger)) == (10, costs(range(10)))
    await ledger.aclose()


async def test_drains_at_random_lose_and_double_nothing(make_redis: MakeRedis, make_ledger: MakeLedger) -> None:
    """S7: writers, late settlements, roll-ups and drains in a random order: the ledger has every cost once, and its sums
    agree with its records."""
    rng = random.Random(4)
    clock = FrozenClock(START)
    namespace = unique_namespace()
    storage = make_redis(namespace=namespace, clock=clock)
    ledgers = [make_ledger(), make_ledger()]
    drains = [Drain(make_redis(namespace=namespace), one, batch=rng.randint(3, 40)) for one in ledgers]
    expected: dict[str, int] = {}
    number, expired = 0, list[int]()
    for _ in range(40):
        choice = rng.random()
        if choice < 0.35:
            some = range(number, number + rng.randint(1, 30))
            number = some.stop
            await write(storage, map(record, some))
            expected |= costs(some)
        elif choice < 0.5:
            await admit(storage, number, owner=f"dying-{number}")
            expected[f"call-{number}"] = 10**9
            expired.append(number)
            number += 1
            clock.advance(seconds=20)
            await storage.heartbeat(OTHER)
        elif choice < 0.65 and expired:
            late = expired.pop(rng.randrange(len(expired)))
            if await settle(storage, late, 5 + late) == "late":
                expected[f"call-{late}"] = 5 + late
        elif choice < 0.8:
            await rng.choice(ledgers).roll_up(at_most=rng.randint(1, 50))
        else:
            await asyncio.gather(*(drain.step() for drain in rng.sample(drains, rng.randint(1, 2))))
    for drain in drains:
        await drain.run()
    while await ledgers[0].roll_up():
        pass

    assert await kept(ledgers[1]) == expected
    assert (await ledgers[0].usage(EVER)).total.cost_nanousd == sum(expected.values())
    assert (await ledgers[0].reconcile(0, 2**52)).equal


async def test_a_drain_says_what_it_cannot_do(tmp_path: object) -> None:
    """A storage without streams, and bounds that would undo the guard against double settlements, are refused at once."""
    ledger = Ledger.open("sqlite://:memory:")
    with pytest.raises(ConfigurationError, match="SqliteStorage keeps no stream"):
        Drain(SqliteStorage(f"{tmp_path}/guard.db"), ledger)
    with pytest.raises(ConfigurationError, match="at least '10m', got '5m'"):
        Drain(MemoryStorage(), ledger, keep="5m")
    with pytest.raises(ConfigurationError, match="from 1 to 100000, got 0"):
        Drain(MemoryStorage(), ledger, batch=0)
    await ledger.aclose()
