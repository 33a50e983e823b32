"""Copying a whole storage into another one: every pair, with all that a storage can hold."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tests.servers import shared_redis, unique_namespace
from tests.storage.conftest import FACTORIES
from tests.storage.values import (
    CENT,
    DAY_MS,
    HOUR_MS,
    ME,
    OTHER,
    START,
    WINDOWS,
    Make,
    ask,
    claim,
    draft,
    level,
    meter,
    record,
    refuse,
    settle,
    state_of,
    take,
)

from asgi_llm_guard.claims import Claim, Ended, Granted, Settlement
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.migrate import Migrated, copy_storage, open_and_copy
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Distinct, Rolling, Sliding

pytestmark = pytest.mark.anyio

KINDS = ("memory", "sqlite", "redis")
CHAIN = ("redis", *(name for name in FACTORIES if name not in KINDS), "memory")  # the same code on other servers
PAIRS = [f"{source} to {target}" for source, target in (*itertools.product(KINDS, KINDS), *itertools.pairwise(CHAIN))]
PAIRS = list(dict.fromkeys(PAIRS))
METERS = {name: meter(window, subject=name) for name, window in WINDOWS.items()}
DRAFT_COST = 3 * CENT


@pytest.fixture
async def makes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Make, Make]]:
    """Makes of the pair that the test is about, whose storages are closed after it."""
    async with contextlib.AsyncExitStack() as made:

        def keeping(name: str, side: str) -> Make:
            folder = tmp_path / side
            folder.mkdir()
            build = FACTORIES[name](folder)

            def make(clock: FrozenClock, **options: Any) -> Storage:
                storage = build(clock, **options)
                made.push_async_callback(storage.aclose)
                return storage

            return cast("Make", make)

        source, target = request.param.split(" to ")
        yield keeping(source, "source"), keeping(target, "target")


def each(amount: int, member: str) -> list[Claim]:
    """The same amount of every meter, and one id."""
    return [Claim(on, amount, member if isinstance(on.window, Distinct) else None) for on in METERS.values()]


async def fill(storage: Storage, clock: FrozenClock) -> None:
    """Something of everything that a storage can keep."""
    await take(storage, "lapsing", claim(METERS["rolling"], 7), owner="dead", draft=draft("lapsing", cost=7))
    clock.advance(seconds=20)
    await storage.heartbeat(ME)  # the dead owner's call is expired
    for number in range(3):
        await take(storage, f"settled-{number}", *each(2, f"id-{number}"), draft=draft(f"settled-{number}"))
        actuals = [None if number else 3] * len(METERS)
        await settle(storage, f"settled-{number}", *actuals, record=record(f"settled-{number}", CENT * (number + 1)))
        clock.advance(seconds=70)  # so that sliding windows have several parts
    await settle(storage, "cancelled")
    await take(storage, "open", *each(5, "open"), draft=draft("open", cost=DRAFT_COST))
    await take(storage, "of-another", claim(METERS["calendar"], 4), owner=OTHER)


@pytest.mark.parametrize("makes", PAIRS, indirect=True)
async def test_everything_is_copied(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """Counters, holds, owners, ids, tombstones and records of the target are those of the source, which stays as it was."""
    source, target = makes[0](clock), makes[1](clock)
    await fill(source, clock)
    before = await state_of(source)

    copied = await copy_storage(source, target)

    assert (copied.members, copied.holds, copied.records) == (4, 2, 4)
    assert copied.tombstones in {2, 5}, "settled calls may be known by their records alone"
    assert copied.owners >= 2
    assert copied.cost_nanousd == 6 * CENT + 7
    assert await state_of(source) == before
    assert await state_of(target) == before
    assert await target.records() == await source.records()
    assert await target.read(list(METERS.values())) == await source.read(list(METERS.values()))


@pytest.mark.parametrize("makes", PAIRS, indirect=True)
async def test_work_goes_on_in_the_target(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """What was open settles once and into its own window, what had ended stays ended, and the room left is the same."""
    source, target = makes[0](clock), makes[1](clock)
    await fill(source, clock)
    await copy_storage(source, target)
    answers = []
    for storage in (source, target):
        full = await refuse(storage, "large", *each(100, "new"))
        replayed = await ask(storage, "open", *each(5, "open"))
        assert isinstance(replayed, Granted)
        ended = await ask(storage, "settled-1", claim(METERS["rolling"]))
        assert isinstance(ended, Ended)
        first = await settle(storage, "open", *(1 for _ in METERS), record=record("open", CENT))
        late = await settle(storage, "lapsing", 9, record=record("lapsing", 9))
        again = await settle(storage, "settled-1", 50)
        readings, records = await storage.read(list(METERS.values())), await storage.records()
        answers.append((full, replayed, ended, first, late, again, readings, records))
    assert answers[0] == answers[1]
    assert [settled.status for settled in answers[0][3:6]] == ["settled", "late", "duplicate"]


@pytest.mark.parametrize("makes", PAIRS, indirect=True)
async def test_calls_of_the_old_processes_lapse_in_the_target(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """Holds of processes that ended with the copy are charged in the target when their owners lapse."""
    source, target = makes[0](clock), makes[1](clock)
    await fill(source, clock)
    await copy_storage(source, target)
    clock.advance(seconds=16)
    beat = await target.heartbeat("new")
    assert sorted(beat.expired) == ["of-another", "open"]
    (found,) = [found for found in await target.records() if found.call_id == "open"]
    assert (found.outcome, found.cost_nanousd) == ("expired", DRAFT_COST)


@pytest.mark.parametrize("makes", PAIRS, indirect=True)
async def test_what_is_over_may_be_forgotten_by_either_side(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """Windows, ids and tombstones past their end are not compared: one storage drops them, the other does not."""
    source, target = makes[0](clock, lapse_ms=400 * DAY_MS), makes[1](clock, lapse_ms=400 * DAY_MS)
    await fill(source, clock)
    await take(source, "short", claim(meter(Rolling(60_000), subject="short")))
    await settle(source, "short")
    clock.advance(seconds=3 * DAY_MS // 1000)
    copied = await copy_storage(source, target)
    assert (copied.members, copied.tombstones, copied.holds) == (0, 0, 3)
    assert copied.cells == len(METERS) - 1, "those of which something is held; ids have none"
    assert copied.records == 3


@pytest.mark.parametrize("makes", PAIRS, indirect=True)
async def test_there_and_back_is_the_same(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """Copied on into a third storage of the first kind, the digest is the same."""
    source, target, third = makes[0](clock), makes[1](clock), makes[0](clock)
    await fill(source, clock)
    assert await copy_storage(source, target) == await copy_storage(target, third)


@pytest.mark.parametrize("makes", PAIRS, indirect=True)
async def test_a_storage_that_is_not_empty_is_no_target(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """A target with a counter, or with a guard's heartbeat, is refused and not changed."""
    source = makes[0](clock)
    await fill(source, clock)
    counted, running = makes[1](clock), makes[1](clock)
    await take(counted, "call", claim(METERS["rolling"]))
    await running.heartbeat(ME)
    await take(running, "call", claim(meter(Rolling(DAY_MS), subject="held")))
    for target in (counted, running):
        before = await state_of(target)
        with pytest.raises(StorageError, match="the target is not empty, or a guard is running on it"):
            await copy_storage(source, target)
        assert await state_of(target) == before


class Damaged:
    """A source whose export is changed on its way."""

    def __init__(self, source: Storage, damage: Callable[[list[bytes]], list[bytes]]) -> None:
        self.source = source
        self.damage = damage

    async def export(self) -> AsyncIterator[bytes]:
        for line in self.damage([line async for line in self.source.export()]):
            yield line


DAMAGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "cut short": lambda lines: lines[:-1],
    "a line is missing": lambda lines: lines[:3] + lines[4:],
    "a line is there twice": lambda lines: [*lines[:3], *lines[2:]],
    "a number is another": lambda lines: [
        line.replace(b'"cost_nanousd":10000000', b'"cost_nanousd":1') for line in lines
    ],
    "not JSON": lambda lines: [*lines[:-2], b"\xff\n", *lines[-1:]],
    "another schema": lambda lines: [lines[0].replace(b'"schema":1', b'"schema":99'), *lines[1:]],
    "no header": lambda lines: lines[1:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("makes", [f"memory to {target}" for target in KINDS], indirect=True)
async def test_a_damaged_stream_leaves_the_target_empty(
    makes: tuple[Make, Make], clock: FrozenClock, damage: str
) -> None:
    """Whatever happened to the lines, the target takes nothing of them, and can be copied into afterwards."""
    source, target = makes[0](clock), makes[1](clock)
    await fill(source, clock)
    with pytest.raises(StorageError, match="import: "):
        await copy_storage(cast("Storage", Damaged(source, DAMAGES[damage])), target)
    assert await state_of(target) == []
    assert (await copy_storage(source, target)).records == 4


async def test_a_target_that_does_not_say_the_same_is_an_error(clock: FrozenClock) -> None:
    """A target that keeps less than the source is an error that says of what."""
    source, target = MemoryStorage(clock=clock), MemoryStorage(clock=clock, max_records=3)
    await fill(source, clock)
    with pytest.raises(
        StorageError, match=r"records 3 instead of 4, cost_nanousd \d+ instead of \d+; empty the target"
    ):
        await copy_storage(source, target)


async def test_a_difference_that_no_sum_shows_is_found(clock: FrozenClock) -> None:
    """Two states with the same counts and sums are told apart by the digest."""

    class Renaming(MemoryStorage):
        async def export(self) -> AsyncIterator[bytes]:
            async for line in super().export():
                yield line.replace(b'"cancelled"', b'"cancelles"', 1)

    source, target = MemoryStorage(clock=clock), Renaming(clock=clock)
    await fill(source, clock)
    with pytest.raises(StorageError, match="does not say what the source said: the digest of the lines"):
        await copy_storage(source, target)


@pytest.mark.parametrize("makes", [f"{source} to memory" for source in KINDS], indirect=True)
async def test_a_source_that_is_used_meanwhile_is_an_error(makes: tuple[Make, Make], clock: FrozenClock) -> None:
    """A settlement between export and end of the copy is noticed, so that no call is lost in silence."""
    source, target = makes[0](clock), makes[1](clock)
    await fill(source, clock)

    def interfere(stage: str, _lines: int) -> None:
        if stage == "load":
            source.settle([Settlement("open", (), record("open", 5))])

    with pytest.raises(StorageError, match=r"the source was used while it was copied: .*records 5 instead of 4"):
        await copy_storage(source, target, progress=interfere)


async def test_progress_is_told_by_stage(clock: FrozenClock) -> None:
    """Every stage tells how far it is: each 10,000 lines, and its end."""
    source, target = MemoryStorage(clock=clock), MemoryStorage(clock=clock)
    ids = meter(Distinct(HOUR_MS), 20_000)
    for number in range(10_500):
        await take(source, f"call-{number}", claim(ids, 1, f"id-{number}"))
        await settle(source, f"call-{number}")
    told: list[tuple[str, int]] = []
    copied = await copy_storage(source, target, progress=lambda stage, lines: told.append((stage, lines)))
    assert (copied.members, copied.tombstones) == (10_500, 10_500)
    lines = 10_500 + 10_500 + copied.owners + copied.cells + 2  # header and last line
    expected = [(stage, at) for stage in ("export", "load", "compare", "look") for at in (10_000, 20_000, lines)]
    assert told == expected


async def test_the_order_of_lines_does_not_matter(clock: FrozenClock) -> None:
    """A state whose lines come in another order, and whose windows list their parts in another one, is the same."""
    on = meter(Sliding(HOUR_MS, 60))
    first = MemoryStorage(clock=clock)
    for number in range(3):
        await take(first, f"call-{number}", claim(meter(Rolling(DAY_MS), subject=str(number))))
    await take(first, "sliding", claim(on))
    clock.advance(seconds=60)
    await take(first, "sliding-2", claim(on))

    class Reordering(MemoryStorage):
        async def export(self) -> AsyncIterator[bytes]:
            lines = [line async for line in super().export()]
            for line in (lines[0], *reversed(lines[1:-1]), lines[-1]):
                parts = line.partition(b"[[")
                if parts[1]:
                    inner, _, rest = parts[2].partition(b"]]")
                    yield parts[0] + b"[[" + b"],[".join(reversed(inner.split(b"],["))) + b"]]" + rest
                else:
                    yield line

    reordering = Reordering(clock=clock)
    assert await copy_storage(first, reordering) == await copy_storage(first, MemoryStorage(clock=clock))


async def test_stores_of_the_limits_package_are_neither_source_nor_target(clock: FrozenClock) -> None:
    """A storage that cannot list its counters is an error that says so, before anything is written."""
    full, limits = MemoryStorage(clock=clock), LimitsStorage("memory://")
    await fill(full, clock)
    for source, target in ((limits, MemoryStorage(clock=clock)), (full, limits)):
        with pytest.raises(StorageError, match="cannot list its counters"):
            await copy_storage(source, target)
    await limits.aclose()


# ---------------------------------------------------------------------------------------- by URL


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_storages_are_opened_by_url(tmp_path: Path) -> None:
    """Two URLs are enough: both storages are opened, compared and closed."""
    source_url, target_url = f"sqlite:///{tmp_path}/old.db", f"sqlite:///{tmp_path}/new.db?synchronous=FULL"
    source = open_storage(source_url, clock=SystemClock())
    on = meter(Rolling(DAY_MS))
    await take(source, "call", claim(on, 7), draft=draft("call"))
    await settle(source, "call", 5, record=record("call", CENT))
    await source.aclose()

    copied = await open_and_copy(source_url, target_url)

    assert (copied.cells, copied.used, copied.records, copied.cost_nanousd) == (1, 5, 1, CENT)
    assert sorted(file.name for file in files(tmp_path)) == ["new.db", "new.db.lock", "old.db", "old.db.lock"]
    target = open_storage(target_url, clock=SystemClock())
    assert await level(target, on) == (5, 0)
    assert [found.call_id for found in await target.records()] == ["call"]
    await target.aclose()
    with pytest.raises(StorageError, match="the target is not empty"):
        await open_and_copy(source_url, target_url)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("sqlite:///{}/none.db", "sqlite:///{}/new.db", r"the source .*none\.db does not exist"),
        ("sqlite:///{}/none.db", "sqlite:///{}/none.db", "source and target are the same"),
        ("memory://", "sqlite:///{}/new.db", "the source memory:// is nobody's"),
        ("sqlite:///{}/some.db", "memory://", "the target memory:// is nobody's"),
        ("nothing://", "sqlite:///{}/new.db", "scheme 'nothing'"),
    ],
)
def test_wrong_urls_are_errors_and_make_no_file(source: str, target: str, message: str, tmp_path: Path) -> None:
    """A URL that cannot be meant is a configuration error, and leaves no new file behind."""
    with pytest.raises(ConfigurationError, match=message):
        asyncio.run(open_and_copy(source.format(tmp_path), target.format(tmp_path)))
    assert files(tmp_path) == []


async def test_a_file_is_copied_into_redis_and_back(tmp_path: Path) -> None:
    """URLs of different kinds do as well: nothing changes on the way from a file to Redis and into another file."""
    first, second = f"sqlite:///{tmp_path}/first.db", f"sqlite:///{tmp_path}/second.db"
    between = f"{shared_redis().url}?namespace={unique_namespace()}&timeout=10"
    source = open_storage(first, clock=SystemClock())
    await take(source, "call", *each(5, "id"), draft=draft("call", cost=CENT))
    await source.aclose()
    there = await open_and_copy(first, between)
    assert there.holds == 1
    assert await open_and_copy(between, second) == there


async def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    """Copying nothing is taken for a mistaken address, and makes no target."""
    empty = open_storage(f"sqlite:///{tmp_path}/empty.db", clock=SystemClock())
    await empty.aclose()
    with pytest.raises(StorageError, match="the source is empty"):
        await open_and_copy(f"sqlite:///{tmp_path}/empty.db", f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()


async def test_an_empty_storage_copies_to_an_empty_one() -> None:
    """Between objects, nothing to copy is no error."""
    clock = FrozenClock(START)
    assert await copy_storage(MemoryStorage(clock=clock), MemoryStorage(clock=clock)) == Migrated(digest="0" * 64)
