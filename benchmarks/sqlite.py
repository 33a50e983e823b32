"""What the SQLite storage costs, beside the same rows written bare in the same transactions, interleaved in one run.

    python benchmarks/sqlite.py [rounds] [cycles] [processes …]

A cycle is one `reserve` of six claims and one `settle` with its usage record; 64 tasks of each
process have one under way. "Bare" is what the storage wrote in the round before: the same statements
with the same rows, as many at once, in the same order and the same transactions, into the same
tables and indexes of another file in the same folder, by one `sqlite3` connection per process with
the same settings. The rows are at hand: no reads, no decisions, no encoding, no event loop, no
second thread. Left out are the numbers of templates, a handful in all, and the search for old rows.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Rule, Settlement, Unit, meter_key
from asgi_llm_guard.storage import sqlite_rows
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.storage.sqlite_file import QueueLock, connect, prepare
from asgi_llm_guard.storage.sqlite_tables import write_rows
from asgi_llm_guard.usage import Usage, UsageRecord
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling, Sliding, Slots, Window

TASKS = 64
BIG = 2**50

Turn = list[tuple[str, Sequence[tuple[object, ...]]]]


def _meter(policy: str, unit: Unit, rule: Rule, window: Window, subject: str) -> Meter:
    key = meter_key(policy, unit, window, subject)
    return Meter(key=key, policy=policy, scope="user", subject=subject, unit=unit, rule=rule, limit=BIG, window=window)


def claims(process: int, task: int) -> tuple[Claim, ...]:
    """Each task has a session and a user of its own; teams, provider and the total are shared."""
    me = f"{process}-{task}"
    return (
        Claim(_meter("iterations", Unit.CALLS, Rule.ITERATIONS, Lifetime(3_600_000), f"session-{me}"), 1),
        Claim(_meter("provider", Unit.NANOUSD, Rule.BUDGET, Rolling(86_400_000), "openai"), 30_000_000),
        Claim(_meter("budget", Unit.NANOUSD, Rule.BUDGET, Rolling(604_800_000), f"team-{task % 4}"), 30_000_000),
        Claim(_meter("monthly", Unit.NANOUSD, Rule.QUOTA, Calendar("month"), "all"), 30_000_000),
        Claim(_meter("rate", Unit.CALLS, Rule.RATE, Sliding(60_000), f"user-{me}"), 1),
        Claim(_meter("slots", Unit.SLOTS, Rule.SLOTS, Slots(), f"user-{me}"), 1),
    )


ACTUALS = (1, 12_345_678, 12_345_678, 12_345_678, 1, 1)


class Recording(sqlite_rows.SqliteDatabase):
    """Keeps what it writes."""

    turns: list[Turn]

    def apply(self, operations: Sequence[object]) -> Sequence[object]:
        self._begin()
        return super().apply(operations)

    def tidy(self) -> None:
        self._begin()
        super().tidy()

    def _begin(self) -> None:
        self.turn: Turn = []
        self.turns.append(self.turn)

    def _many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if rows:
            self.turn.append((statement, rows))
        super()._many(statement, rows)


async def cycles(storage: SqliteStorage, process: int, first: int, count: int) -> None:
    """`count` cycles, as many at a time as there are tasks."""
    numbers = iter(range(first, first + count))

    async def task(which: int) -> None:
        asked = claims(process, which)
        for number in numbers:
            call_id = f"call-{process}-{number:012d}"
            now_ms = time.time_ns() // 1_000_000
            draft = UsageRecord(
                call_id=call_id, at_ms=now_ms, caller="key-7", user=f"user-{which}", departments=("research", "all"),
                route="/v1/chat/completions", provider="openai", model="gpt-5.6-mini", estimate_nanousd=30_000_000,
            )  # fmt: skip
            granted = await storage.reserve("owner", ((Bundle(call_id, asked, draft),),))
            assert type(granted) is Granted
            usage = Usage(input_tokens=1200, output_tokens=340, cache_read_tokens=0)
            record = UsageRecord(
                call_id=call_id, at_ms=now_ms, ended_ms=now_ms + 900, caller="key-7", user=f"user-{which}",
                departments=("research", "all"), route="/v1/chat/completions", provider="openai", model="gpt-5.6-mini",
                billed_model="gpt-5.6-mini", usage=usage, cost_nanousd=12_345_678, estimate_nanousd=30_000_000,
                tokens=1540, latency_ms=900,
            )  # fmt: skip
            await storage.settle((Settlement(call_id, ACTUALS, record),))

    await asyncio.gather(*map(task, range(TASKS)))


class Queue:
    """Bare writers of several processes take turns by the same lock, so that both are equally fair."""

    def __init__(self, path: Path, processes: int) -> None:
        self._lock = QueueLock(path) if processes > 1 else None

    def acquire(self) -> None:
        if self._lock is not None:
            self._lock.acquire(30.0)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def bare(connection: sqlite3.Connection, queue: Queue, turns: Sequence[Turn]) -> None:
    """The same rows in the same transactions."""
    for turn in turns:
        queue.acquire()
        connection.execute("BEGIN IMMEDIATE")
        for statement, rows in turn:
            write_rows(connection, statement, rows)
        connection.execute("COMMIT")
        queue.release()


def process(number: int, folder: str, rounds: int, count: int, barrier: Barrier, answers: Connection) -> None:
    """One process: per round the storage, then the bare rows, each begun by all at once."""
    Recording.turns = []
    sqlite_rows.SqliteDatabase = Recording  # type: ignore[misc]
    storage = SqliteStorage(Path(folder, "guard.db"), timeout_s=30.0)
    other = Path(folder, "bare.db")
    connection = connect(other, synchronous="NORMAL", timeout_s=30.0)
    queue = Queue(Path(folder, "bare.db.lock"), barrier.parties)

    async def run() -> None:
        for which in range(-1, rounds):  # one round warms up
            gc.collect()
            gc.disable()  # as in the other benchmarks; and the rows that are kept are not the storage's
            barrier.wait()
            begun = time.perf_counter()
            await cycles(storage, number, (which + 1) * count, count)
            own = time.perf_counter() - begun
            turns, Recording.turns = [turn for turn in Recording.turns if turn], []
            barrier.wait()
            begun = time.perf_counter()
            bare(connection, queue, turns)
            plain = time.perf_counter() - begun
            gc.enable()
            answers.send((which, own, plain, len(turns)))
        stalls: list[float] = []
        with timed_handles(stalls):
            await cycles(storage, number, (rounds + 1) * count, count)
        answers.send(sorted(stalls))
        await storage.aclose()

    asyncio.run(run())
    connection.close()


class timed_handles:  # noqa: N801 - read as a verb
    """How long each callback and each step of a task keeps the event loop."""

    def __init__(self, stalls: list[float]) -> None:
        self.stalls = stalls

    def __enter__(self) -> None:
        self.run = run = asyncio.events.Handle._run  # noqa: SLF001
        stalls = self.stalls

        def timed(handle: Any) -> None:
            begun = time.perf_counter()
            run(handle)
            stalls.append(time.perf_counter() - begun)

        asyncio.events.Handle._run = timed  # type: ignore[method-assign, assignment]  # noqa: SLF001

    def __exit__(self, *_: object) -> None:
        asyncio.events.Handle._run = self.run  # type: ignore[method-assign]  # noqa: SLF001


def measure(processes: int, rounds: int, count: int) -> list[str]:
    """The lines of a table for so many processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        prepare(Path(folder, "guard.db"))
        prepare(Path(folder, "bare.db"))
        barrier = context.Barrier(processes)
        pipes, workers = [], []
        for number in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=process, args=(number, folder, rounds, count, barrier, theirs))
            worker.start()
            pipes.append(ours)
            workers.append(worker)
        answers = [[pipe.recv() for _ in range(rounds + 1)][1:] for pipe in pipes]
        stalls = [pipe.recv() for pipe in pipes]
        for worker in workers:
            worker.join()
    own, plain, ratio, fairness, turn = [], [], [], [], []
    for each in zip(*answers, strict=True):
        slow_own, slow_plain = max(a[1] for a in each), max(a[2] for a in each)
        own.append(processes * count / slow_own)
        plain.append(processes * count / slow_plain)
        ratio.append(slow_plain / slow_own)
        fairness.append(min(a[1] for a in each) / slow_own)
        turn.append(2 * processes * count / sum(a[3] for a in each))
    late = [at(part, 99.9) * 1e3 for part in stalls]
    return [
        row(processes, "storage, cycles/s", own, "{:,.0f}"),
        row(processes, "bare rows, cycles/s", plain, "{:,.0f}"),
        row(processes, "storage / bare (target 0.6)", ratio, "{:.2f}"),
        row(processes, "slowest / fastest process (target 0.6)", fairness, "{:.2f}"),
        row(processes, "operations per transaction", turn, "{:.0f}"),
        row(processes, "event loop held, p99.9 in ms (target 5)", late, "{:.2f}"),
        row(processes, "event loop held, longest in ms", [part[-1] * 1e3 for part in stalls], "{:.2f}"),
    ]


def at(ordered: Sequence[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def row(processes: int, name: str, values: Sequence[float], form: str) -> str:
    cells = " | ".join(form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"| {processes} | {name} | {cells} |"


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:]]
    rounds, count, *processes = numbers if len(numbers) > 2 else [*numbers, *(10, 5_000, 1, 4)[len(numbers) :]]
    print(f"SQLite {sqlite3.sqlite_version}, {TASKS} tasks per process, {rounds} rounds of {count} cycles each\n")
    print("| processes | | min | median | max |\n|---|---|---|---|---|")
    for number in processes:
        print("\n".join(measure(number, rounds, count)), flush=True)


if __name__ == "__main__":
    main()
