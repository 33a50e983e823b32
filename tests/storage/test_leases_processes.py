"""Several processes with leases on one file, some of which die."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tests.storage.leases_work import CALLS, LEASE, hot, spend_cents
from tests.storage.sqlite_kit import CENT, AheadClock, plan, workers

from asgi_llm_guard.claims import Claim, Granted
from asgi_llm_guard.storage.sqlite import SqliteStorage

pytestmark = pytest.mark.anyio


def billed(pipe: Connection) -> int:
    """How many calls a process has made before it was done, or dead."""
    count = 0
    try:
        while pipe.recv() != "done":
            count += 1
    except (EOFError, OSError):  # it was killed between two messages, or within one
        pass
    return count


async def test_processes_with_leases_spend_a_budget_exactly(tmp_path: Path) -> None:
    """B5: four processes with chunks of $0.20 spend $15.00 in calls of $0.01, never more, and hold nothing afterwards."""
    path = tmp_path / "guard.db"
    with workers(4, spend_cents, path) as started:
        for _, pipe in started:
            pipe.send("go")
        made = [billed(pipe) for _, pipe in started]
    storage = SqliteStorage(path)
    (reading,) = await storage.read([hot()])
    assert (reading.used, reading.held) == (sum(made) * CENT, 0)
    # All that may be missing is a chunk that one of them returned when the others had been refused already.
    assert CALLS - LEASE // CENT <= sum(made) <= CALLS
    await storage.aclose()


async def test_what_a_killed_process_had_leased_is_never_spent_twice(tmp_path: Path) -> None:
    """B5: two of four processes are killed while they spend: all together never make more calls than the budget has, and
    what is lost is no more than their chunks."""
    path = tmp_path / "guard.db"
    with workers(4, spend_cents, path) as started:
        for _, pipe in started:
            pipe.send("go")
        made = 0
        for process, pipe in started[:2]:
            for _ in range(10):
                assert pipe.recv() != "done"
            made += 10
            process.kill()
            process.join()
        made += sum(billed(pipe) for _, pipe in started)
    storage = SqliteStorage(path, clock=AheadClock(60_000))
    await storage.heartbeat("after")
    (reading,) = await storage.read([hot()])
    assert reading.held == 0
    assert made * CENT <= reading.used <= CALLS * CENT
    while isinstance(await storage.reserve("after", (plan(f"after-{made}", Claim(hot(), CENT)),)), Granted):
        made += 1
    assert CALLS - 2 * 3 * LEASE // CENT <= made <= CALLS
    await storage.aclose()
