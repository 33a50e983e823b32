"""Whose turn it is to do something for the ledger, where clocks differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.ledger_flow.kit import record, write
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard import Budget, Context, Guard, Usage
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.ledger import Ledger, UsageQuery
from asgi_llm_guard.ledger.attach import Bookkeeping
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

EVER = UsageQuery(since_ms=0, until_ms=2**52)


class Wrong(SystemClock):
    """A host's clock that is off by so much. Not the storage's: Redis goes by its own."""

    def __init__(self, off_ms: int) -> None:
        self._off_ms = off_ms

    def now_ms(self) -> int:
        return super().now_ms() + self._off_ms


async def work(guard: Guard) -> None:
    async with (
        guard.open(Context(caller="ada")),
        guard.call(model="openai/gpt-4o-mini", input_tokens=100, max_output_tokens=50) as call,
    ):
        call.record(Usage(input_tokens=80, output_tokens=20))


@pytest.mark.parametrize("first_ms", [-60_000, 86_400_000])
async def test_clocks_that_differ_keep_nobody_from_draining(tmp_path: Path, first_ms: int) -> None:
    """C9: a process whose clock is behind that of Redis takes records over all the same, and one whose clock is ahead
    leaves the others their turn."""
    url = f"{shared_redis().url}?namespace={unique_namespace()}&timeout=10"
    guard = Guard([Budget("$5/daily")], storage=url, ledger=f"sqlite:///{tmp_path}/ledger.db", clock=Wrong(first_ms))
    other = Guard([Budget("$5/daily")], storage=url, ledger=f"sqlite:///{tmp_path}/ledger.db")
    assert guard.books is not None
    assert other.books is not None
    assert guard.ledger is not None
    await work(guard)
    await guard.heartbeat()
    await guard.books.drain()
    assert (await guard.ledger.usage(EVER)).total.calls == 1

    await work(other)
    await other.heartbeat()
    for _ in range(200):
        await other.books.drain()
    assert (await guard.ledger.usage(EVER)).total.calls == 2
    await guard.aclose()
    await other.aclose()


async def test_a_mark_that_does_not_end_keeps_nobody_from_draining_for_long() -> None:
    """C9: whatever has marked a turn for a year, every process takes one now and then."""
    clock = FrozenClock()
    storage, ledger = MemoryStorage(clock=clock), Ledger.open("sqlite://:memory:")
    books = Bookkeeping(ledger, storage, own=False, clock=clock, store_ms=clock.now_ms)
    await storage.shared().mark("ledger drain", until_ms=clock.now_ms() + 365 * 86_400_000)
    cursors = []
    for number in range(130):
        await write(storage, [record(number)])
        await books.drain()
        cursors.append((await ledger.usage(EVER)).total.calls)
    await ledger.aclose()
    await storage.aclose()

    assert (cursors[59], cursors[60], cursors[120], cursors[121]) == (0, 61, 61, 122)
