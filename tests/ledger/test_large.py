"""Reports over many records: what the sums say is what the records say, and it takes less than a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.ledger import QUESTIONS, fill, reports, roll_all

from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.reports import Source, usage
from asgi_llm_guard.sql import Connection

pytestmark = pytest.mark.anyio


async def test_the_sums_say_what_the_records_say(tmp_path: Path) -> None:
    """C9: each of the questions that are measured has the same answer from the sums as from 5,000 records."""
    path = tmp_path / "guard.db"
    fill(path, 5_000)
    ledger = Ledger.open(f"sqlite:///{path}")
    await roll_all(ledger)
    for name, query in QUESTIONS.items():

        def both(connection: Connection, query: object = query) -> bool:
            return usage(connection, query) == usage(connection, query, Source())  # type: ignore[arg-type]

        assert await ledger.database.read(both), name
    await ledger.aclose()


@pytest.mark.slow
async def test_ten_million_records(tmp_path: Path) -> None:
    """C9: reports over ten million records of 5,000 users answer in less than a second each."""
    medians = await reports(10_000_000, tmp_path / "guard.db")
    assert {name: seconds for name, seconds in medians.items() if seconds >= 1} == {}
