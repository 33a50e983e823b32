"""What a connection remembers of the file is never older than what others have written to it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.storage.sqlite_kit import CENT, DOLLAR, money, slots, take

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Refused, Settled, Settlement
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

MANY = 100
"""More turns than are kept, and more than one is alone in before it stops to tell."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guard.db"


async def spend(storage: SqliteStorage, call_id: str, on: Meter, amount: int = CENT) -> str:
    """Reserve and settle; gives the settlement's status."""
    assert type(await take(storage, call_id, Claim(on, amount))) is Granted
    (settled,) = await storage.settle([Settlement(call_id, (amount,))])
    return settled.status


async def used(storage: SqliteStorage, on: Meter) -> int:
    (reading,) = await storage.read([on])
    return reading.used


@pytest.mark.parametrize("turns", [1, 2, 10, MANY])
async def test_what_others_spend_meanwhile_counts(path: Path, turns: int) -> None:
    """A1: however many turns a connection has missed, it sees all that was spent in them and refuses by it."""
    budget = money(3 * CENT * turns)
    mine, theirs = SqliteStorage(path), SqliteStorage(path)
    await spend(mine, "mine", budget, CENT * turns)
    for number in range(turns):
        await spend(theirs, f"theirs-{number}", budget, CENT)
    assert await used(mine, budget) == 2 * CENT * turns
    assert type(await take(mine, "too much", Claim(budget, CENT * turns + 1))) is Refused
    assert type(await take(mine, "just right", Claim(budget, CENT * turns))) is Granted
    await mine.aclose()
    await theirs.aclose()


async def test_changes_are_seen_while_both_write(path: Path) -> None:
    """Two connections that change a shared meter and one of their own by turns both know every sum after every turn."""
    shared, own = money(None, "shared"), [money(None, "first"), money(None, "second")]
    storages = [SqliteStorage(path), SqliteStorage(path)]
    for number in range(MANY):
        which = number % 2
        await spend(storages[which], f"shared-{number}", shared)
        await spend(storages[which], f"own-{number}", own[which])
        for storage in storages:
            assert await used(storage, shared) == (number + 1) * CENT
            assert await used(storage, own[which]) == (number // 2 + 1) * CENT
    for storage in storages:
        await storage.aclose()


@pytest.mark.parametrize("alone", [0, MANY])
async def test_a_hold_that_others_settled_is_settled(path: Path, alone: int) -> None:
    """A hold that another connection has settled is not settled again by the one that made and remembers it."""
    budget = money()
    mine, theirs = SqliteStorage(path), SqliteStorage(path)
    assert type(await take(mine, "call", Claim(budget, CENT))) is Granted
    for number in range(alone):
        await spend(theirs, f"theirs-{number}", money(None, "other"))
    settlement = Settlement("call", (CENT // 2,))
    assert await theirs.settle([settlement]) == (Settled("call", "settled", (0,)),)
    assert (await mine.settle([settlement]))[0].status == "duplicate"
    assert await used(mine, budget) == CENT // 2
    await mine.aclose()
    await theirs.aclose()


async def test_a_hold_that_others_amended_is_settled_as_amended(path: Path) -> None:
    """What another connection has amended is replaced by the actuals, not what was first reserved."""
    budget, own = money(), slots(3)
    mine, theirs = SqliteStorage(path), SqliteStorage(path)
    assert type(await take(mine, "call", Claim(budget, CENT), Claim(own, 1))) is Granted
    amended = await theirs.amend("me", Bundle("call", (Claim(budget, 5 * CENT),)))
    assert type(amended) is Granted
    (settled,) = await mine.settle([Settlement("call", (7 * CENT,))])
    assert settled == Settled("call", "settled", (2 * CENT,))
    readings = await mine.read([budget, own])
    assert [(reading.used, reading.held) for reading in readings] == [(7 * CENT, 0), (0, 0)]
    await mine.aclose()
    await theirs.aclose()


async def test_a_hold_that_others_expired_is_late(path: Path) -> None:
    """C5: the owner that remembers a hold, but was found lapsed by another connection, settles it late."""
    clock, budget = FrozenClock(), money()
    mine, theirs = SqliteStorage(path, clock=clock), SqliteStorage(path, clock=clock)
    assert type(await take(mine, "call", Claim(budget, CENT))) is Granted
    clock.advance(seconds=60)
    assert (await theirs.heartbeat("other")).expired == ("call",)
    (settled,) = await mine.settle([Settlement("call", (3 * CENT,))])
    assert settled == Settled("call", "late", (2 * CENT,))
    await mine.aclose()
    await theirs.aclose()


async def test_what_was_imported_is_seen(path: Path, tmp_path: Path) -> None:
    """A connection that knows a meter as unused learns of an import by another one."""
    budget = money()
    mine, theirs, source = SqliteStorage(path), SqliteStorage(path), SqliteStorage(tmp_path / "source.db")
    await spend(source, "there", budget, DOLLAR)
    assert await used(mine, budget) == 0
    await theirs.load([line async for line in source.export()])
    assert await used(mine, budget) == DOLLAR
    for storage in (mine, theirs, source):
        await storage.aclose()


@pytest.mark.parametrize("alone", [0, MANY])
async def test_what_a_person_changed_is_seen(path: Path, alone: int) -> None:
    """A counter that was corrected with the `sqlite3` shell, which notes no turn, is read anew."""
    budget = money(None)
    storage = SqliteStorage(path)
    for number in range(alone + 1):
        await spend(storage, f"call-{number}", budget)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE cells SET used = 7")
    assert await used(storage, budget) == 7
    assert await spend(storage, "after", budget) == "settled"
    assert await used(storage, budget) == 7 + CENT
    await storage.aclose()


async def test_turns_that_are_over_are_not_kept(path: Path) -> None:
    """The notes of changes do not grow with the turns, and one who is alone with the file lists nothing in them."""
    storage, other = SqliteStorage(path), SqliteStorage(path)
    for number in range(MANY):
        await spend(storage, f"call-{number}", money(None))
        await used(other, money(None))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*), max(turn), count(changed) FROM turns").fetchone() == (
            64, 2 * MANY, 0,
        )  # fmt: skip
    await spend(other, "other", money(None))
    await spend(storage, "last", money(None))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*), count(changed) FROM turns").fetchone() == (64, 4)
    await storage.aclose()
    await other.aclose()


async def test_one_who_missed_more_turns_than_are_kept_sees_them_all(path: Path) -> None:
    """What has changed in turns whose notes are gone is read anew, also where the notes that are left name nothing of it."""
    early, late = money(None, "early"), money(None, "late")
    mine, others = SqliteStorage(path), [SqliteStorage(path), SqliteStorage(path)]
    assert await used(mine, early) == 0
    assert type(await take(mine, "call", Claim(early, CENT))) is Granted
    (settled,) = await others[0].settle([Settlement("call", (2 * CENT,))])
    assert settled.status == "settled"
    for number in range(MANY):  # by turns, so that each notes all for the other
        await spend(others[number % 2], f"late-{number}", late)
    assert await used(mine, early) == 2 * CENT
    assert (await mine.settle([Settlement("call", (CENT,))]))[0].status == "duplicate"
    for storage in (mine, *others):
        await storage.aclose()
