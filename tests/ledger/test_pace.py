"""How many records a transaction takes, by who else writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.ledger import fill
from tests.ledger.kit import record

from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.pace import ALONE, LARGE, SMALL, TOGETHER, Pace
from asgi_llm_guard.ledger.rollups import Roller
from asgi_llm_guard.sql import Database, open_database

pytestmark = pytest.mark.anyio


def paces(database: Database, pace: Pace, times: int) -> list[int]:
    found = []
    for _ in range(times):
        database.write_sync(pace.note)
        found.append(pace.most(database.dialect))
    return found


def wrote(database: Database, number: int) -> None:
    database.write_sync(lambda connection: connection.execute(f"CREATE TABLE other_{number} (value BIGINT)"))


def test_steps_grow_only_where_nobody_else_writes(tmp_path: Path) -> None:
    """Transactions are short from the first one until nobody else has written between many in a row; and again after
    anybody has. What this process's ledger writes itself keeps nobody waiting."""
    ours, others = (open_database(f"sqlite:///{tmp_path}/guard.db") for _ in range(2))
    pace = Pace()
    assert paces(ours, pace, ALONE + 2) == [SMALL] * ALONE + [LARGE] * 2
    wrote(ours, 1)
    assert paces(ours, pace, 1) == [LARGE]
    wrote(others, 2)
    assert paces(ours, pace, ALONE - 1) == [SMALL] * (ALONE - 1)
    wrote(others, 3)
    assert paces(ours, pace, ALONE + 1) == [SMALL] * ALONE + [LARGE]
    ours.close()
    others.close()


def test_postgresql_has_one_pace(postgres_url: str) -> None:
    """Nobody settles there."""
    database = open_database(postgres_url)
    assert paces(database, Pace(), 2) == [TOGETHER] * 2
    database.close()


async def test_a_backlog_is_rolled_up_in_large_steps(tmp_path: Path) -> None:
    """C9: of records that nobody adds to, the first are rolled up in small steps and then in large ones; in small ones
    again when somebody has added one; and all of them are in the sums once."""
    path = tmp_path / "guard.db"
    fill(path, SMALL * ALONE + LARGE + 400)
    ledger, other = (Ledger.open(f"sqlite:///{path}") for _ in range(2))
    await ledger.prepare()
    roller = Roller()

    def steps(count: int) -> list[int]:
        done = []
        for _ in range(count):
            done.append(ledger.database.write_sync(lambda connection: roller.step(connection, 10**6)))
            roller.confirm()
        return done

    assert steps(ALONE + 1) == [SMALL] * ALONE + [LARGE]
    await other.append([record("one more")])
    assert steps(3) == [SMALL, 101, 0]
    found = await ledger.reconcile(0, 2**52)
    assert found.equal, found.differences
    assert found.total.records == SMALL * ALONE + LARGE + 401
    await ledger.aclose()
    await other.aclose()
