"""Several processes on one file, and what is left when one of them dies."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.storage.sqlite_kit import CENT, DOLLAR, AheadClock, granted, money, slots, take, workers
from tests.storage.sqlite_work import first_calls, hold_fifty, settle_endlessly, spend_dimes, take_slots

from asgi_llm_guard.claims import Claim
from asgi_llm_guard.storage.sqlite import SqliteStorage

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guard.db"


async def test_processes_spend_a_budget_exactly(path: Path) -> None:
    """A6: four processes with 25 calls of $0.10 each at once on $5.00 are granted exactly 50."""
    with workers(4, spend_dimes, path) as started:
        for _, pipe in started:
            pipe.send("go")
        assert sum(pipe.recv() for _, pipe in started) == 50
    storage = SqliteStorage(path)
    assert [(reading.used, reading.held) for reading in await storage.read([money()])] == [(0, 5 * DOLLAR)]
    await storage.aclose()


async def test_processes_share_slots_exactly(path: Path) -> None:
    """Of 20 calls of four processes at once on 10 slots exactly 10 are granted, and none more while they are held."""
    with workers(4, take_slots, path) as started:
        for _, pipe in started:
            pipe.send("go")
        assert sum(pipe.recv() for _, pipe in started) == 10
        storage = SqliteStorage(path)
        assert await granted([take(storage, f"late-{n}", Claim(slots(10), 1)) for n in range(10)]) == 0
        assert [reading.held for reading in await storage.read([slots(10)])] == [10]
        await storage.aclose()


async def test_first_calls_on_a_new_scope_race_without_overspend(path: Path) -> None:
    """T20: of 200 first calls of four processes on a scope nobody has seen before, exactly the 10 that fit are granted."""
    with workers(4, first_calls, path) as started:
        for _, pipe in started:
            pipe.send("newcomer")
        assert sum(pipe.recv() for _, pipe in started) == 10


async def test_what_a_killed_process_held_is_freed_and_charged(path: Path) -> None:
    """After `kill -9` and the lapse of its owner slots are free, money is charged, one record each, nothing is lost."""
    with workers(1, hold_fifty, path) as [(process, _)]:
        process.kill()
        process.join()

    storage = SqliteStorage(path, clock=AheadClock(60_000))
    assert await storage.open_holds() == 50
    beat = await storage.heartbeat("survivor")
    assert sorted(beat.expired) == sorted(f"call-{n}" for n in range(10, 60))
    charged, free = await storage.read([money(None), slots(60)])
    assert (charged.used, charged.held) == (50 * 10 * CENT + 10 * CENT, 0)
    assert (free.used, free.held) == (0, 0)
    records = await storage.records()
    assert {record.call_id: record.outcome for record in records} == {
        f"call-{n}": "measured" if n < 10 else "expired" for n in range(60)
    }
    assert len(records) == 60
    assert (await storage.heartbeat("survivor")).expired == ()
    await storage.aclose()


async def test_acknowledged_settlements_survive_kills_between_commits(path: Path) -> None:
    """Two processes killed while they commit without pause lose no settlement that was acknowledged."""
    acknowledged: set[str] = set()
    with workers(2, settle_endlessly, path) as started:
        for process, pipe in started:
            acknowledged.update(pipe.recv() for _ in range(500))
            process.kill()
            process.join()
            try:
                while pipe.poll():
                    acknowledged.add(pipe.recv())
            except (EOFError, OSError):  # the end of what it had written, or the middle of a message
                pass

    storage = SqliteStorage(path, clock=AheadClock(60_000))
    recorded = {record.call_id for record in await storage.records()}
    assert len(acknowledged) >= 1000
    assert acknowledged <= recorded
    # What was not acknowledged is either settled or still held: the meter agrees with the ledger.
    open_holds = await storage.open_holds()
    (reading,) = await storage.read([money(None)])
    assert (reading.used, reading.held) == (len(recorded) * CENT, open_holds * 10 * CENT)
    await storage.aclose()
