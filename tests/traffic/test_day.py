"""A day of traffic through a real service: whatever happens in it, all books agree to the nano-dollar."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from tests.servers import OwnRedis
from tests.traffic.books import compare
from tests.traffic.day import BEGINS, LASTS_S, batches
from tests.traffic.service import Service, service

from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

_SMALL: Final = 900
_LARGE: Final = 200_000
CALLS: Final = [pytest.param(_SMALL), pytest.param(_LARGE, marks=pytest.mark.slow)]


async def live(service: Service, calls: int, *, seed: int) -> None:
    """Let the day pass."""
    for begun_s, asked in batches(calls, seed=seed):
        await service.play(begun_s, asked)
    service.clock.set(round(BEGINS.timestamp() * 1000) + LASTS_S * 1000)
    kinds = service.answered, service.failed, service.refused
    assert service.answered > calls / 2, kinds
    assert service.failed > 0, kinds
    assert {"quota_exceeded", "model_not_allowed", "request_exceeds_budget"} <= service.refused.keys(), kinds


@pytest.mark.parametrize("calls", CALLS)
async def test_sqlite(tmp_path: Path, calls: int) -> None:
    """C9: with SQLite, bill = ledger = sums of hours and days = CSV, over a day with a change of clocks."""
    clock = FrozenClock(BEGINS)
    async with service(f"sqlite:///{tmp_path / 'guard.db'}", clock) as made:
        await live(made, calls, seed=calls)
        assert made.guard.books is not None
        await made.guard.books.catch_up()
        await compare(made, made.guard.books.ledger)


@contextlib.asynccontextmanager
async def killed_at_random(storage_url: str, ledger_url: str, *, seed: int) -> AsyncIterator[list[int]]:
    """A drainer that is killed and started again, at random; gives the list of how often it was, of one entry."""
    chance = random.Random(seed)
    kills = [0]
    over = asyncio.Event()

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.traffic.drainer", storage_url, ledger_url]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    async def run() -> None:
        while not over.is_set():
            process = start()
            try:
                assert process.stdout is not None
                await asyncio.to_thread(process.stdout.readline)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), chance.uniform(0.01, 1.0))
            finally:
                process.kill()
                await asyncio.to_thread(process.communicate)
            kills[0] += 1

    running = asyncio.create_task(run())
    try:
        yield kills
    finally:
        over.set()
        await running


@pytest.mark.parametrize("calls", CALLS)
async def test_redis_to_postgres(own_redis: OwnRedis, postgres_url: str, calls: int) -> None:
    """C9: the same from Redis to PostgreSQL, with a drain that is killed at random instants."""
    clock = FrozenClock(BEGINS)
    url = f"{own_redis().url}?timeout=5"  # a busy machine is no outage
    ledger = Ledger.open(postgres_url, clock=clock)
    async with service(open_storage(url, clock=clock), clock, ledger=ledger) as made:
        async with killed_at_random(url, postgres_url, seed=calls) as kills:
            await live(made, calls, seed=calls)
        assert kills[0] > 1
        assert made.guard.books is not None
        await made.guard.books.catch_up()
        await compare(made, ledger)
    await ledger.aclose()
