"""The ledger in the file of a SQLite storage: records are there with their settlement, corrected when it comes late."""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from tests.ledger.kit import roll_all
from tests.storage.sqlite_kit import CENT, money, plan
from tests.storage.values import START

from asgi_llm_guard.claims import Claim, Granted, Settlement
from asgi_llm_guard.ledger import Ledger, Retention, UsageQuery
from asgi_llm_guard.storage.base import LAPSE_MS
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

OLD = Path(__file__).parents[1] / "storage" / "files" / "schema3.db.gz"
ALL = UsageQuery(since_ms=0, until_ms=2**52, by=("department", "outcome"))


def draft(call_id: str, clock: FrozenClock, cost_nanousd: int | None = None, **fields: object) -> UsageRecord:
    return UsageRecord(
        call_id=call_id, at_ms=clock.now_ms(), departments=("red", "blue"), cost_nanousd=cost_nanousd, **fields  # type: ignore[arg-type]
    )  # fmt: skip


@asynccontextmanager
async def opened(path: Path, clock: FrozenClock) -> AsyncIterator[tuple[SqliteStorage, Ledger]]:
    storage, ledger = SqliteStorage(path, clock=clock), Ledger.open(f"sqlite:///{path}", clock=clock)
    try:
        yield storage, ledger
    finally:
        await ledger.aclose()
        await storage.aclose()


async def costs(ledger: Ledger) -> dict[tuple[str | None, ...], int]:
    return {row.key: row.amounts.cost_nanousd for row in (await ledger.usage(ALL)).rows}


async def test_a_settlement_is_in_the_reports_at_once(tmp_path: Path) -> None:
    """C9: what was settled is in the next report, before anything was rolled up, and for each department in full."""
    clock = FrozenClock(START)
    async with opened(tmp_path / "guard.db", clock) as (storage, ledger):
        await storage.settle([Settlement("a", (), draft("a", clock, 5))])
        assert await costs(ledger) == {("blue", "measured"): 5, ("red", "measured"): 5}
        assert (await ledger.usage(ALL)).total.cost_nanousd == 5


@pytest.mark.parametrize("rolled", ["before", "between", "never"])
async def test_a_late_settlement_corrects_what_was_rolled_up(tmp_path: Path, rolled: str) -> None:
    """C9: a hold expires and is charged by its estimate; the settlement that comes late replaces it in every sum, to
    the nano-dollar, whether the estimate was rolled up or not."""
    clock = FrozenClock(START)
    async with opened(tmp_path / "guard.db", clock) as (storage, ledger):
        taken = await storage.reserve(
            "gone", [plan("a", Claim(money(), 5 * CENT), record=draft("a", clock, estimate_nanousd=5 * CENT))]
        )
        assert type(taken) is Granted
        if rolled == "before":  # so that the tables, and the mark, are there
            await roll_all(ledger)
        clock.advance(ms=LAPSE_MS + 1)
        await storage.heartbeat("another")
        assert await costs(ledger) == {("blue", "expired"): 5 * CENT, ("red", "expired"): 5 * CENT}
        if rolled != "never":
            assert await roll_all(ledger) == 1
        (settled,) = await storage.settle([Settlement("a", (2 * CENT,), draft("a", clock, 2 * CENT))])
        assert settled.status == "late"
        for _ in range(2):
            assert await costs(ledger) == {("blue", "measured"): 2 * CENT, ("red", "measured"): 2 * CENT}
            found = await ledger.reconcile(0, 2**52)
            assert found.equal, found.differences
            await roll_all(ledger)
        with closing(sqlite3.connect(tmp_path / "guard.db")) as connection:
            assert connection.execute("SELECT count(*) FROM ledger_replaced").fetchone() == (0,)


@pytest.mark.parametrize("ledger_first", [False, True])
async def test_a_file_of_the_release_before(tmp_path: Path, ledger_first: bool) -> None:
    """A file that the release before made (schema 3, with an open hold and an expired one) is taken over with all that
    is in it, by whichever part opens it first; its records are rolled up, and a late settlement is corrected."""
    path = tmp_path / "guard.db"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    clock = FrozenClock(START)
    clock.advance(seconds=21)
    if ledger_first:
        early = Ledger.open(f"sqlite:///{path}", clock=clock)
        assert await roll_all(early) == 2
        await early.aclose()
    async with opened(path, clock) as (storage, ledger):
        assert await storage.open_holds() == 1
        (reading,) = await storage.read([money()])
        assert (reading.used, reading.held) == (7 * CENT, 5 * CENT)
        assert await roll_all(ledger) == (0 if ledger_first else 2)
        (settled,) = await storage.settle([Settlement("expired", (CENT,), draft("expired", clock, CENT))])
        assert settled.status == "late"
        assert await costs(ledger) == {("blue", "measured"): 3 * CENT, ("red", "measured"): 3 * CENT}
        assert (await ledger.reconcile(0, 2**52)).equal
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (4,)


async def test_the_ledger_may_make_the_file(tmp_path: Path) -> None:
    """A file that a ledger has made first, on the command line say, takes a storage afterwards, and they share records."""
    path, clock = tmp_path / "guard.db", FrozenClock(START)
    early = Ledger.open(f"sqlite:///{path}", clock=clock)
    await early.append([draft("before", clock, 1)])
    await early.aclose()
    async with opened(path, clock) as (storage, ledger):
        await storage.settle([Settlement("after", (), draft("after", clock, 2))])
        assert await roll_all(ledger) == 2
        assert (await ledger.usage(ALL)).total.cost_nanousd == 3


async def test_two_open_an_old_file_at_once(tmp_path: Path) -> None:
    """Of two storages on an old file each finds it as the other left it."""
    path = tmp_path / "guard.db"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    SqliteStorage(path)
    SqliteStorage(path)


async def test_numbers_of_removed_rows_are_not_given_again(tmp_path: Path) -> None:
    """SQLite gives the number after the highest that is there: after retention has removed all it may, records that
    come then are rolled up all the same."""
    clock = FrozenClock(START)
    path = tmp_path / "guard.db"
    storage = SqliteStorage(path, clock=clock)
    ledger = Ledger.open(f"sqlite:///{path}", clock=clock, retention=Retention(raw="1d"))
    for name in ("a", "b", "c"):
        await storage.settle([Settlement(name, (), draft(name, clock, 1))])
    await roll_all(ledger)
    clock.advance(seconds=3 * 86_400)
    assert (await ledger.retain()).raw == 2
    await storage.settle([Settlement("d", (), draft("d", clock, 1))])
    assert await roll_all(ledger) == 1
    assert (await ledger.usage(ALL)).total.cost_nanousd == 4
    await ledger.aclose()
    await storage.aclose()
