"""What every storage promises of what processes share, rule by rule of `storage/shared.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.shared.kit import HOUR, Sharing
from tests.storage.values import DAY_MS, HOUR_MS, START_MS

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.shared import MAX_DOCUMENT_BYTES, OTHER, TALLY_MS, TALLY_MS_REDIS, Document, Shared, Tally
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

BINARY = bytes(range(256)) * 40


# --------------------------------------------------------------------------------- documents


async def test_a_document_is_read_as_it_was_published(shared: Shared) -> None:
    """Any bytes come back under any name, and no other name has them."""
    assert await shared.document("control") is None
    assert await shared.publish("control", 1, BINARY)
    assert await shared.document("control") == Document(1, BINARY)
    assert await shared.document("contro") is None
    assert await shared.publish("ä:{x}%*", 2, b"")
    assert await shared.document("ä:{x}%*") == Document(2, b"")


async def test_only_what_is_newer_is_told(shared: Shared) -> None:
    """Who names the version it knows is told a higher one, or nothing."""
    await shared.publish("d", 7, b"seven")
    assert await shared.document("d", known=7) is None
    assert await shared.document("d", known=8) is None
    assert await shared.document("d", known=6) == Document(7, b"seven")


async def test_the_highest_version_stays(shared: Shared) -> None:
    """A lower version, or the same with other bytes, is not kept and says so; the same again is the one that is there."""
    assert await shared.publish("d", 5, b"five")
    assert not await shared.publish("d", 4, b"four")
    assert not await shared.publish("d", 5, b"cinq")
    assert await shared.publish("d", 5, b"five")
    assert await shared.publish("d", 10, b"ten")
    assert not await shared.publish("d", 9, b"nine")
    assert await shared.document("d") == Document(10, b"ten")


async def test_a_race_of_publishers_keeps_the_highest(shared: Shared) -> None:
    """However many publish at once, the highest version is there in the end."""
    await asyncio.gather(
        *(shared.publish("d", version, str(version).encode()) for version in (*range(2, 40, 2), *range(39, 0, -2)))
    )
    assert await shared.document("d") == Document(39, b"39")


async def test_a_large_document_comes_whole(shared: Shared) -> None:
    """A document of megabytes comes back as it was."""
    large = BINARY * 200
    assert await shared.publish("large", 1, large)
    assert await shared.document("large") == Document(1, large)


# ----------------------------------------------------------------------------------- tallies


async def test_counts_add_up(shared: Shared) -> None:
    """Counts of an hour are summed by key; hours, names and keys stay apart and come in their order."""
    await shared.tally("refusals", HOUR, {"b": 1, "a": 2})
    await shared.tally("refusals", HOUR, {"b": 40})
    await shared.tally("refusals", HOUR - HOUR_MS, {"b": 5})
    await shared.tally("others", HOUR, {"b": 7})
    await shared.tally("refusals", HOUR, {})
    both = [Tally(HOUR - HOUR_MS, "b", 5), Tally(HOUR, "a", 2), Tally(HOUR, "b", 41)]
    assert await shared.tallies("refusals", 0) == both
    assert await shared.tallies("refusals", HOUR) == both[1:]
    assert await shared.tallies("refusals", HOUR + 1) == []


async def test_concurrent_counts_are_exact(shared: Shared) -> None:
    """Nothing is lost of what many add at once."""
    await asyncio.gather(*(shared.tally("t", HOUR, {"a": 1, str(n % 3): n}) for n in range(1, 61)))
    assert {tally.key: tally.count for tally in await shared.tallies("t", 0)} == {
        "a": 60,
        **{str(rest): sum(n for n in range(1, 61) if n % 3 == rest) for rest in range(3)},
    }


async def test_an_hour_has_room_for_so_many_keys(shared: Shared) -> None:
    """Keys beyond `most` count as `other`; those that are there go on counting, and the total stays exact."""
    await shared.tally("t", HOUR, {f"k{n}": 1 for n in range(5)}, most=3)
    await shared.tally("t", HOUR, {"k0": 1, "k9": 2, OTHER: 4}, most=3)
    assert await shared.tallies("t", 0) == [
        Tally(HOUR, "k0", 2),
        Tally(HOUR, "k1", 1),
        Tally(HOUR, "k2", 1),
        Tally(HOUR, OTHER, 8),
    ]
    await shared.tally("t", HOUR + HOUR_MS, {"fresh": 1}, most=3)
    assert (await shared.tallies("t", HOUR + HOUR_MS)) == [Tally(HOUR + HOUR_MS, "fresh", 1)]


async def test_the_rest_takes_no_room(shared: Shared) -> None:
    """The key `other` is not one of the `most`."""
    await shared.tally("t", HOUR, {OTHER: 1, "a": 1}, most=1)
    await shared.tally("t", HOUR, {"b": 1}, most=2)
    assert {tally.key: tally.count for tally in await shared.tallies("t", 0)} == {OTHER: 1, "a": 1, "b": 1}


async def test_hours_are_kept_for_days(store: Sharing, clock: FrozenClock) -> None:
    """An hour is there for its days, and not longer; one that is over from the start is not counted."""
    shared = store.shared()
    kept_ms = TALLY_MS_REDIS if "Redis" in repr(store) else TALLY_MS
    await shared.tally("t", HOUR, {"a": 1})
    clock.advance(ms=kept_ms - (START_MS - HOUR) - 1)
    await shared.tally("t", HOUR + HOUR_MS, {"b": 1})
    assert [tally.key for tally in await shared.tallies("t", 0)] == ["a", "b"]
    clock.advance(ms=1)
    assert [tally.key for tally in await shared.tallies("t", 0)] == ["b"]
    await shared.tally("t", HOUR, {"late": 1})
    assert [tally.key for tally in await shared.tallies("t", 0)] == ["b"]


# ------------------------------------------------------------------------------------- marks


async def test_one_marks(shared: Shared) -> None:
    """Of many that mark a name exactly one is told so; another name is another mark."""
    answers = await asyncio.gather(*(shared.mark("m", until_ms=START_MS + 1000) for _ in range(40)))
    assert sum(answers) == 1
    assert await shared.mark("n", until_ms=START_MS + 1000)


async def test_a_mark_is_over_in_time(shared: Shared, clock: FrozenClock) -> None:
    """A mark lasts until its end by the storage's clock, and then somebody else may mark, however long it lasted."""
    for length_ms in (1, 1000, 40 * DAY_MS, 400 * DAY_MS):
        until_ms = clock.now_ms() + length_ms
        assert await shared.mark("m", until_ms=until_ms)
        clock.advance(ms=length_ms - 1)
        assert not await shared.mark("m", until_ms=until_ms + 1000)
        clock.advance(ms=1)
    assert await shared.mark("m", until_ms=clock.now_ms() + 1)


async def test_a_mark_that_is_over_from_the_start(shared: Shared) -> None:
    """What would be over already is nobody's, and stands in no one's way."""
    assert not await shared.mark("m", until_ms=START_MS)
    assert not await shared.mark("m", until_ms=0)
    assert await shared.mark("m", until_ms=START_MS + 1)


async def test_a_mark_can_be_taken_away(shared: Shared) -> None:
    """After `unmark` the next one marks; taking away what is not there changes nothing."""
    await shared.unmark("m")
    assert await shared.mark("m", until_ms=START_MS + 1000)
    await shared.unmark("m")
    assert await shared.mark("m", until_ms=START_MS + 9000)
    assert not await shared.mark("m", until_ms=START_MS + 1000)


async def test_marks_that_were_taken_away_do_not_end_later_ones(shared: Shared, clock: FrozenClock) -> None:
    """The end that a mark had before it was taken away is not that of the one that took its place."""
    await shared.mark("m", until_ms=START_MS + 1000)
    await shared.unmark("m")
    assert await shared.mark("m", until_ms=START_MS + 9000)
    clock.advance(ms=1000)
    assert not await shared.mark("m", until_ms=START_MS + 9000)


# ------------------------------------------------------------------------------ apart, refused


async def test_nothing_of_it_is_counted_or_exported(store: Sharing) -> None:
    """Exports leave out what processes share, and counters do not see it."""
    before = [line async for line in store.export()]
    shared = store.shared()
    await shared.publish("needle", 1, b"needle")
    await shared.tally("needle", HOUR, {"needle": 1})
    await shared.mark("needle", until_ms=START_MS + 1000)
    assert [line async for line in store.export()] == before
    assert await store.open_holds() == 0


async def test_what_no_storage_takes(shared: Shared) -> None:
    """What cannot be kept everywhere is refused everywhere, before anything is kept."""
    wrong: list[Callable[[], Awaitable[object]]] = [
        lambda: shared.publish("", 1, b""),
        lambda: shared.publish("d", 0, b""),
        lambda: shared.publish("d", 1 << 53, b""),
        lambda: shared.publish("d", 1, bytes(MAX_DOCUMENT_BYTES + 1)),
        lambda: shared.document("d" * 513),
        lambda: shared.tally("t", HOUR + 1, {"a": 1}),
        lambda: shared.tally("t", HOUR, {"a": 0}),
        lambda: shared.tally("t", HOUR, {"": 1}),
        lambda: shared.tally("t", HOUR, {"a": 1}, most=0),
        lambda: shared.tallies("", 0),
        lambda: shared.mark("", until_ms=START_MS + 1),
        lambda: shared.unmark(""),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="shared:"):
            await call()
    assert await shared.document("d") is None
    assert await shared.tallies("t", 0) == []


async def test_a_closed_storage_says_so(store: Sharing) -> None:
    """After `aclose` every operation raises `StorageError`."""
    shared = store.shared()
    await shared.publish("d", 1, b"v")
    await store.aclose()
    for call in (shared.document("d"), shared.publish("d", 2, b"w"), shared.mark("m", until_ms=START_MS + 1)):
        with pytest.raises(StorageError):
            await call
