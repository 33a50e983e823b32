"""What the SQLite tests share: meters, clocks, and worker processes that are driven through pipes."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Plan, Refused, Rule, Unit, meter_key
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Rolling, Slots, Window

CENT = 10_000_000
DOLLAR = 100 * CENT

RULES = {
    Unit.NANOUSD: Rule.BUDGET,
    Unit.TOKENS: Rule.QUOTA,
    Unit.SLOTS: Rule.SLOTS,
    Unit.CALLS: Rule.ITERATIONS,
    Unit.IDS: Rule.IDS,
}


class AheadClock:
    """The host's clock, so much ahead."""

    def __init__(self, ahead_ms: int) -> None:
        self.ahead_ms = ahead_ms

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


def meter(unit: Unit, limit: int | None, *, subject: str = "all", window: Window | None = None) -> Meter:
    if window is None:
        window = Slots() if unit is Unit.SLOTS else Rolling(7 * 86_400_000)
    return Meter(
        key=meter_key("test", unit, window, subject),
        policy="test",
        scope="global",
        subject=subject,
        unit=unit,
        rule=RULES[unit],
        limit=limit,
        window=window,
    )


def money(limit: int | None = 5 * DOLLAR, subject: str = "all") -> Meter:
    return meter(Unit.NANOUSD, limit, subject=subject)


def slots(limit: int, subject: str = "all") -> Meter:
    return meter(Unit.SLOTS, limit, subject=subject)


def draft(call_id: str, **fields: object) -> UsageRecord:
    return UsageRecord(call_id=call_id, at_ms=1_800_000_000_000, **fields)  # type: ignore[arg-type]


def plan(call_id: str, *claims: Claim, record: UsageRecord | None = None) -> Plan:
    return (Bundle(call_id, claims, record),)


async def take(storage: SqliteStorage, call_id: str, *claims: Claim, owner: str = "me") -> Granted | Refused | Ended:
    return await storage.reserve(owner, [plan(call_id, *claims, record=draft(call_id))])


async def granted(asked: Sequence[Awaitable[Granted | Refused | Ended]]) -> int:
    """How many of these are granted, asked for at the same time."""
    return sum(type(answer) is Granted for answer in await asyncio.gather(*asked))


Work = Callable[[Path, int, Connection], None]


@contextmanager
def workers(count: int, work: Work, path: Path) -> Generator[list[tuple[BaseProcess, Connection]]]:
    """New interpreters that run `work(path, number, pipe)`, all ready; whatever is left of them ends here."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[BaseProcess, Connection]] = []
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=work, args=(path, number, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        for _, pipe in started:
            assert pipe.recv() == "ready"
        yield started
    finally:
        for process, pipe in started:
            process.kill()
            process.join()
            process.close()
            pipe.close()
