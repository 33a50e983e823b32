"""Refusals: counted where they happen, summed up over processes, and once in the ledger."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence

import pytest
from tests.ledger_flow.conftest import MakeLedger, MakeStorage
from tests.servers import OwnRedis, unique_namespace, wait_until
from tests.storage.values import START, START_MS

from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Code, Denied
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Refused, ShadowMisfit, StorageRecovered
from asgi_llm_guard.ledger import Ledger, RefusalQuery
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.ledger.refusals import REFUSALS, RefusalDrain, RefusalTally
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.shared import OTHER, Document, KeepsShared, Shared, Tally
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

HOUR_MS = 3_600_000
EVER = RefusalQuery(since_ms=0, until_ms=2**52)

Counts = dict[tuple[int, str, str, str, str | None], int]


def refused(
    policy: str = "budget", *, code: Code = "budget_exhausted", scope: str = "user", route: str | None = "/v1/chat"
) -> Refused:
    denied = Denied(policy=policy, code=code, message="", status=402, retry=False, scope=scope)
    return Refused(Context(caller="c", route=route), None, denied)


def shared_of(storage: object) -> Shared:
    assert isinstance(storage, KeepsShared)
    return storage.shared()


async def told(ledger: Ledger) -> Counts:
    """Hours since START, policy, scope, code, route: how often."""
    return {
        ((one.hour_ms - START_MS) // HOUR_MS, one.policy, one.scope, one.code, one.route): one.count
        for one in await ledger.refusals(EVER)
    }


async def test_refusals_are_numbers_in_their_hour(make_storage: MakeStorage, ledger: Ledger) -> None:
    """Refusals of several processes are summed up per hour, policy, scope, code and route; none is a usage record; what
    a shadow would have refused is counted beside them."""
    clock = FrozenClock(START)
    storage = make_storage(clock=clock)
    one, two = RefusalTally(shared_of(storage), clock=clock), RefusalTally(shared_of(storage), clock=clock)
    for _ in range(3):
        one(refused())
    two(refused())
    two(refused(route=None))
    two(refused("rate", code="rate_limit_exceeded", scope="caller"))
    two(ShadowMisfit(Context(caller="c", route="/v1/chat"), None, "quota.shadow", 1, 2, 3, 4))
    two(StorageRecovered())
    clock.advance(seconds=3_600)
    one(refused())

    assert (await one.flush(), await two.flush(), await one.flush()) == (4, 4, 0)
    drain = Drain(storage, ledger)
    assert ((await drain.step()).refusals, await drain.refusals()) == (8, 0)

    assert await told(ledger) == {
        (0, "budget", "user", "budget_exhausted", "/v1/chat"): 4,
        (0, "budget", "user", "budget_exhausted", None): 1,
        (0, "rate", "caller", "rate_limit_exceeded", "/v1/chat"): 1,
        (0, "quota.shadow", "", "shadow", "/v1/chat"): 1,
        (1, "budget", "user", "budget_exhausted", "/v1/chat"): 1,
    }
    assert await storage.records() == []


async def test_several_drains_take_each_refusal_once(make_storage: MakeStorage, make_ledger: MakeLedger) -> None:
    """Drains at once, again and again, while hours go on: every refusal is in the ledger once."""
    clock = FrozenClock(START)
    storage = make_storage(clock=clock)
    tally = RefusalTally(shared_of(storage), clock=clock)
    drains = [RefusalDrain(shared_of(storage), make_ledger(), source="one") for _ in range(3)]
    for turn in range(8):
        for _ in range(turn):
            tally(refused(f"policy-{turn % 2}"))
        await tally.flush()
        clock.advance(seconds=1_200)
        await asyncio.gather(*(drain.step() for drain in drains))
    taken = [await drain.step() for drain in drains]

    counts = await told(make_ledger())
    assert sum(counts.values()) == sum(range(8))
    assert {key[1]: sum(n for other, n in counts.items() if other[1] == key[1]) for key in counts} == {
        "policy-0": 0 + 2 + 4 + 6,
        "policy-1": 1 + 3 + 5 + 7,
    }
    assert taken == [0, 0, 0]


async def test_an_hour_that_has_not_come_yet_hides_no_other(make_storage: MakeStorage, ledger: Ledger) -> None:
    """A process whose clock is a year ahead counts under its hour; what all others count goes on being taken, once."""
    clock = FrozenClock(START)
    storage = make_storage(clock=clock)
    right = RefusalTally(shared_of(storage), clock=clock)
    wrong = RefusalTally(shared_of(storage), clock=FrozenClock(START_MS + 8760 * HOUR_MS))
    drain = RefusalDrain(shared_of(storage), ledger, source="one", clock=clock)
    taken = []
    for tally in (right, wrong, right, wrong, right):
        tally(refused())
        await tally.flush()
        taken.append(await drain.step())
        clock.advance(seconds=3_600)

    assert taken == [1, 1, 1, 1, 1]
    assert {key[0]: count for key, count in (await told(ledger)).items()} == {0: 1, 2: 1, 4: 1, 8760: 2}


async def test_two_stores_of_one_name_count_apart(ledger: Ledger) -> None:
    """Two services whose storages have the same name fill one ledger: each refusal of both is in it once."""
    clock = FrozenClock(START)
    stores = [MemoryStorage(clock=clock).shared() for _ in range(2)]
    tallies = [RefusalTally(shared, clock=clock) for shared in stores]
    drains = [RefusalDrain(shared, ledger, source="refusals:redis:guard", clock=clock) for shared in stores]
    for tally, count in ((tallies[0], 10), (tallies[1], 3)):
        for _ in range(count):
            tally(refused())
        await tally.flush()

    taken = [[await drain.step() for drain in drains] for _ in range(3)]

    assert taken == [[10, 3], [0, 0], [0, 0]]
    assert sum((await told(ledger)).values()) == 13


async def test_a_replica_that_lacks_the_newest_counts_is_not_counted_again(own_redis: OwnRedis, ledger: Ledger) -> None:
    """After a failover that lost some counts only what comes then is added."""
    master = own_redis()
    replica = own_redis(replica_of=master)
    namespace = unique_namespace()
    before, after = (RedisStorage(one.url, namespace=namespace, timeout_s=10) for one in (master, replica))
    tally = RefusalTally(before.shared())
    for _ in range(50):
        tally(refused())
    await tally.flush()
    assert await RefusalDrain(before.shared(), ledger, source="one").step() == 50
    wait_until(lambda: bool(replica.call("KEYS", "*:p:refusals")), "the replica has what was counted")
    replica.call("REPLICAOF", "NO", "ONE")
    tally(refused())
    await tally.flush()
    assert await RefusalDrain(before.shared(), ledger, source="one").step() == 1

    drain = RefusalDrain(after.shared(), ledger, source="one")
    lagging = await drain.step()
    again = RefusalTally(after.shared())
    for _ in range(3):
        again(refused())
    await again.flush()
    assert (lagging, await drain.step(), await drain.step()) == (0, 3, 0)
    assert sum((await told(ledger)).values()) == 54
    await before.aclose()
    await after.aclose()


async def test_a_sqlite_storage_tells_its_own_file(tmp_path: object) -> None:
    """Where the storage's file is the ledger, refusals get from one table of it to the other."""
    storage = SqliteStorage(f"{tmp_path}/guard.db")
    ledger = Ledger.open(f"sqlite:///{tmp_path}/guard.db")
    tally = RefusalTally(shared_of(storage))
    tally(refused())
    await tally.flush()

    assert await RefusalDrain(shared_of(storage), ledger, source="own").step() == 1
    assert [one.count for one in await ledger.refusals(EVER)] == [1]
    await storage.aclose()
    await ledger.aclose()


async def test_a_flood_of_different_refusals_is_bounded() -> None:
    """T25: beyond 1,000 different ones in an hour the rest is `other`; none is lost in the sum."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    tally = RefusalTally(storage.shared(), clock=clock)
    for number in range(3_000):
        tally(refused(f"policy-{number}", route="/" + "r" * 900))
    flushed = await tally.flush()
    tallies = await storage.shared().tallies(REFUSALS, 0)

    assert flushed == sum(one.count for one in tallies) == 3_000
    assert len(tallies) <= 1_001
    assert max(tallies, key=lambda one: one.count).key == OTHER
    ledger = Ledger.open("sqlite://:memory:")
    await RefusalDrain(storage.shared(), ledger, source="one").step()
    counts = await ledger.refusals(EVER)
    await ledger.aclose()
    assert (sum(one.count for one in counts), len(counts) <= 1_001) == (3_000, True)
    assert counts[0].policy == OTHER


def _refuse(tally: RefusalTally, times: int) -> None:
    for _ in range(times):
        tally(refused())


async def test_a_flood_is_bounded_in_memory_too() -> None:
    """T25: what a process keeps until it flushes has as many keys as an hour may have."""
    shared = Unsure()
    tally = RefusalTally(shared, clock=FrozenClock(START))
    for number in range(3_000):
        tally(refused(f"policy-{number}"))
    with pytest.raises(StorageError):
        await tally.flush()

    assert (shared.asked, shared.keys) == ([3_000], 1_001)


async def test_threads_count_together() -> None:
    """An observer is called from any thread: no refusal is lost between them."""
    storage = MemoryStorage()
    tally = RefusalTally(storage.shared(), clock=FrozenClock(START))
    threads = [threading.Thread(target=_refuse, args=(tally, 2_000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        await tally.flush()
        await asyncio.sleep(0)
    for thread in threads:
        thread.join()
    await tally.flush()

    assert [one.count for one in await storage.shared().tallies(REFUSALS, 0)] == [8_000]


async def test_what_did_not_arrive_is_kept_for_the_next_flush(own_redis: OwnRedis) -> None:
    """A store that is away when refusals are handed on gets them when it is back, once."""
    server = own_redis(appendonly=True)
    namespace = unique_namespace()
    storage = RedisStorage(server.url, namespace=namespace, timeout_s=5)
    clock = FrozenClock(START)
    tally = RefusalTally(storage.shared(), clock=clock)
    server.kill()
    tally(refused())
    with pytest.raises(StorageError):
        await tally.flush()
    clock.advance(seconds=3_600)
    tally(refused())
    server.start()
    again = RedisStorage(server.url, namespace=namespace, timeout_s=5)
    later = RefusalTally(again.shared(), clock=clock)
    later(refused())

    assert await later.flush() == 1
    assert await _flushed(tally) == 2
    assert sorted(one.count for one in await again.shared().tallies(REFUSALS, 0)) == [1, 2]
    await storage.aclose()
    await again.aclose()


async def _flushed(tally: RefusalTally) -> int:
    """As soon as the store answers."""
    while True:
        try:
            return await tally.flush()
        except StorageError:
            await asyncio.sleep(0)


class Unsure:
    """What processes share, where the reply to a tally is lost."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.keys = 0

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        raise NotImplementedError

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        raise NotImplementedError

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        self.asked.append(sum(counts.values()))
        self.keys = max(self.keys, len(counts))
        if len(self.asked) == 1:
            raise StorageError("the reply was lost")

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        raise NotImplementedError

    async def mark(self, name: str, *, until_ms: int) -> bool:
        raise NotImplementedError

    async def unmark(self, name: str) -> None:
        raise NotImplementedError


async def test_what_may_have_arrived_is_not_handed_on_twice() -> None:
    """Where it is not known whether counts have arrived, they are let go; those of the next hour are kept."""
    clock = FrozenClock(START)
    shared = Unsure()
    tally = RefusalTally(shared, clock=clock)
    tally(refused())
    clock.advance(seconds=3_600)
    tally(refused())
    tally(refused())

    with pytest.raises(StorageError):
        await tally.flush()

    assert await tally.flush() == 2
    assert shared.asked == [1, 2]
