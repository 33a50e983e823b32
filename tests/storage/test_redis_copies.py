"""Exports go from every storage into every other, whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.fault_proxy import FaultProxy
from tests.servers import RedisServer, unique_namespace
from tests.storage.values import (
    DAY_MS,
    ME,
    OTHER,
    START,
    WINDOWS,
    ask,
    claim,
    draft,
    level,
    meter,
    record,
    settle,
    sized,
    state_of,
    take,
)

from asgi_llm_guard.claims import Bundle, Ended, Granted
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import TOMBSTONE_MS, Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

METERS = [meter(sized(window, 100), 100) for window in WINDOWS.values()]
Making = Callable[[str], Storage]


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture
async def make(redis_server: RedisServer, tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Making]:
    """Makes storages of each kind."""
    numbers = itertools.count()
    async with contextlib.AsyncExitStack() as made:

        def making(kind: str) -> Storage:
            storage: Storage
            if kind == "memory":
                storage = MemoryStorage(clock=clock)
            elif kind == "sqlite":
                storage = SqliteStorage(tmp_path / f"{next(numbers)}.db", clock=clock)
            else:
                storage = RedisStorage(redis_server.url, namespace=unique_namespace(), clock=clock, timeout_s=10)
            made.push_async_callback(storage.aclose)
            return storage

        yield making


async def fill(storage: Storage, clock: FrozenClock) -> None:
    """Some of everything: open, settled, cancelled, expired, late; ids, debits, a record."""
    claims = [claim(on, 3) for on in METERS]
    await take(storage, "settled", *claims, draft=draft("settled", cost=7))
    await settle(storage, "settled", *[2] * len(claims), record=record("settled", 8))
    await settle(storage, "cancelled")
    await take(storage, "expired", *claims, draft=draft("expired", cost=5), owner="mayfly")
    await take(storage, "late", *claims[:3], draft=draft("late", cost=5), owner="mayfly")
    clock.advance(ms=20_000)
    await storage.heartbeat(ME)
    await settle(storage, "late", 9, record=record("late", 9))
    await take(storage, f"{ME}-open", *claims, draft=draft(f"{ME}-open"))
    await take(storage, "amended", claims[0])
    await storage.amend(OTHER, Bundle("amended", tuple(claims[1:4])))


@pytest.mark.parametrize(
    ("first", "then"), [*itertools.permutations(("memory", "sqlite", "redis"), 2), ("redis", "redis")]
)
async def test_a_copy_goes_on_where_the_original_ends(make: Making, clock: FrozenClock, first: str, then: str) -> None:
    """Rule 10: after an export and a load both have the same state, and give the same answers from then on."""
    original, copy = make(first), make(then)
    await fill(original, clock)
    await copy.load([line async for line in original.export()])
    assert await state_of(copy) == await state_of(original)
    assert await copy.records() == await original.records()

    async def go_on(storage: Storage) -> list[object]:
        await storage.retire(OTHER)
        return [
            await storage.reserve(ME, ((Bundle(f"{ME}-open", tuple(claim(on, 3) for on in METERS)),),)),
            [await ask(storage, call_id, claim(METERS[0])) for call_id in ("settled", "cancelled", "expired", "late")],
            await settle(storage, "expired", *[4] * len(METERS), record=record("expired", 6)),
            await settle(storage, f"{ME}-open", *[1] * len(METERS), record=record(f"{ME}-open", 1)),
            await storage.heartbeat(ME),
            await storage.read(METERS),
            await storage.records(),
            await ask(storage, "next", *[claim(on, 50) for on in METERS[:3]]),
        ]

    answers = await go_on(original)
    assert await go_on(copy) == answers
    assert isinstance(answers[0], Granted)


@pytest.mark.parametrize("nth", [3, 9, 20, 40])
async def test_a_load_that_breaks_leaves_the_namespace_empty(
    make: Making, clock: FrozenClock, redis_server: RedisServer, namespace: str, nth: int
) -> None:
    """A connection that is lost in the midst of a load takes what was loaded with it; the next load finds it empty."""
    original = make("memory")
    await fill(original, clock)
    lines = [line async for line in original.export()]
    async with FaultProxy(redis_server.url) as proxy:
        copy = RedisStorage(proxy.url, namespace=namespace, clock=clock, timeout_s=1)
        assert await copy.open_holds() == 0
        proxy.cut_at_reply(nth)
        with pytest.raises(StorageError):
            await copy.load(lines)
        assert proxy.counts.cuts == 1
        left = {key.decode().partition("}:")[2] for key in redis_server.call("KEYS", f"*{{{namespace}}}*")}
        assert left <= {"e", "s"}
        await copy.load(lines)
        assert await state_of(copy) == await state_of(original)
        await copy.aclose()


@pytest.mark.parametrize("missing", [0, 3, -1])
async def test_a_spoiled_export_is_not_begun(
    make: Making,
    clock: FrozenClock,
    redis_server: RedisServer,
    namespace: str,
    missing: int,
) -> None:
    """Lines that are missing are noticed before anything is written."""
    original = make("memory")
    await fill(original, clock)
    copy = RedisStorage(redis_server.url, namespace=namespace, clock=clock, timeout_s=10)
    lines = [line async for line in original.export()]
    del lines[missing]
    with pytest.raises(StorageError, match="import"):
        await copy.load(lines)
    assert redis_server.call("KEYS", f"*{{{namespace}}}*") == []
    await copy.aclose()


async def test_nothing_is_loaded_over_what_is_there(make: Making, clock: FrozenClock) -> None:
    """A namespace in which anything was counted, open or ended, refuses a load and keeps what it has."""
    original = make("memory")
    await fill(original, clock)
    lines = [line async for line in original.export()]
    for begin in ("open", "tombstone"):
        used = make("redis")
        if begin == "open":
            await take(used, "mine", claim(METERS[0], 1))
        else:
            await settle(used, "mine")
        before = await state_of(used)
        with pytest.raises(StorageError, match="not empty"):
            await used.load(lines)
        assert await state_of(used) == before


async def test_call_ids_of_a_ledger_stay_spent_in_the_copy(make: Making, clock: FrozenClock) -> None:
    """Rule 6: long after its tombstone is gone, a call id that the copied ledger knows is settled."""
    original, copy = make("memory"), make("redis")
    await fill(original, clock)
    await copy.load([line async for line in original.export()])
    clock.advance(ms=DAY_MS)
    answer = await ask(copy, "settled", claim(METERS[0]))
    assert isinstance(answer, Ended)
    assert answer.reason == "settled"
    assert (await settle(copy, "settled", 9, record=record("settled", 9))).status == "duplicate"
    assert await level(copy, METERS[2]) == await level(original, METERS[2])


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_call_admitted_again_after_its_tombstone_is_still_open_in_the_copy(
    make: Making, clock: FrozenClock, kind: str
) -> None:
    """What remains of an earlier end of the same call id does not take the place of its hold."""
    old, new, on = make(kind), make("redis"), METERS[0]
    await take(old, "again", claim(on, 3))
    await old.retire(ME)
    clock.advance(ms=TOMBSTONE_MS)
    await take(old, "again", claim(on, 4))
    await new.load([line async for line in old.export()])
    assert await new.open_holds() == 1
    assert (await settle(new, "again", 1)).status == "settled"
