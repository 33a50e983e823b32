"""Reports over many records, and what the ledger adds to an admission on SQLite.

    taskset -c 0,1 .venv/bin/python -m benchmarks.ledger reports --records 10000000
    taskset -c 0,1 .venv/bin/python -m benchmarks.ledger overhead

`reports` makes a SQLite storage's file with so many records of 90 days (5,000 users, 20 departments, 12 agents,
8 models), rolls them up, and asks what people ask. `--file` keeps it for the next time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast

from benchmarks._harness import compare_async, table

from asgi_llm_guard import Budget, Context, Guard, Iterations, RateLimit
from asgi_llm_guard.claims import Bundle, Ended, Granted, Plan, Refused, Settled, Settlement
from asgi_llm_guard.ledger import Ledger, RecordQuery, UsageQuery
from asgi_llm_guard.ledger.values import Dimension
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.base import Pending, Storage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.usage import Usage, UsageRecord

DAY_MS: Final = 86_400_000
START_MS: Final = 1_767_225_600_000  # 2026-01-01, UTC
DAYS: Final = 90

# Numbers that look random, and are the same on every machine.
_FILL: Final = """
WITH RECURSIVE numbers (n) AS (SELECT ?1 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < ?2),
drawn AS (SELECT n, (n * 2654435761 + 12345) % 4294967296 AS a, (n * 40503 * 69069 + 99) % 4294967291 AS b FROM numbers),
users AS (SELECT n, a, b, ((a / 7) % 5000) * ((b / 11) % 5000) / 5000 AS u FROM drawn),
chosen AS (SELECT n, a, b, u, (u * 7 + (a / 13) % 3) % 12 AS agent, (u + (b / 17) % 3) % 8 AS model FROM users)
INSERT INTO ledger (
    call_id, at_ms, ended_ms, request_id, caller, user, departments, agent, session, tags, route, provider, model,
    billed_model, cost_nanousd, estimate_nanousd, tokens, outcome, late, price_source, dispatched_ms, first_token_ms,
    latency_ms, attempt_of, attempt, deployment, has_usage, input_tokens, output_tokens, cache_read_tokens,
    reasoning_tokens
)
SELECT
    printf('call-%016x', n * 2654435761), ?3 + n * ?4 / ?5, ?3 + n * ?4 / ?5 + 900, NULL, 'key-' || (u % 400),
    'user-' || u,
    CASE WHEN u % 10 = 0 THEN '["dept-' || (u % 20) || '","platform"]' ELSE '["dept-' || (u % 20) || '"]' END,
    'agent-' || agent, 'session-' || (n / 40), CASE WHEN u % 5 = 0 THEN '["batch"]' ELSE '[]' END,
    '/v1/route-' || (agent % 4), 'provider-' || (model % 3), 'model-' || model, 'model-' || model,
    CASE WHEN a % 500 = 0 THEN NULL ELSE 20000 + b % 9000000 END, 10000000, 100 + a % 4000,
    CASE WHEN a % 100 < 94 THEN 'measured' WHEN a % 100 < 97 THEN 'cached' WHEN a % 100 < 99 THEN 'provider_error' ELSE 'estimated' END,
    0, 'book 2026-01-01', ?3, 200 + a % 500, 800 + a % 4000, CASE WHEN a % 50 = 0 THEN 'call-x' END, 1,
    'deployment-' || (model % 3), 1, 80 + a % 3000, 20 + b % 1000, a % 80, 0
FROM chosen
"""


# ------------------------------------------------------------------------------------ reports


def fill(path: Path, records: int, *, days: float = DAYS) -> None:
    """Make a storage's file with so many records that are not rolled up."""
    SqliteStorage(path)
    step = 250_000
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -400000")
        for start in range(0, records, step):
            end = min(start + step, records)
            connection.execute("BEGIN")
            connection.execute(_FILL, (start, end, START_MS, int(days * DAY_MS), records))
            connection.execute("COMMIT")


async def roll_all(ledger: Ledger) -> float:
    """Roll up what there is; records per second."""
    done, begun = 0, time.perf_counter()
    while count := await ledger.roll_up(at_most=100_000):
        done += count
    return done / (time.perf_counter() - begun)


def day(number: int) -> int:
    return START_MS + number * DAY_MS


def ask(
    first: int, last: int, *by: Dimension, tz: str = "UTC", ms: int = 0, where: Mapping[str, str | None] | None = None
) -> UsageQuery:
    return UsageQuery(since_ms=day(first) + ms, until_ms=day(last) + ms, by=by, tz=tz, where=where or {})


BERLIN: Final = "Europe/Berlin"
HOUR_MS: Final = 3_600_000

QUESTIONS: Final[dict[str, UsageQuery]] = {
    "90 days in total": ask(0, 90),
    "90 days by department": ask(0, 90, "department"),
    "90 days by model and provider": ask(0, 90, "model", "provider"),
    "90 days by department and day": ask(0, 90, "department", "day"),
    "90 days by department and day of Berlin": ask(0, 90, "department", "day", tz=BERLIN, ms=-HOUR_MS),
    "90 days by department and month": ask(0, 90, "department", "month"),
    "90 days by user": ask(0, 90, "user"),
    "90 days by user of one department": ask(0, 90, "user", where={"department": "dept-3"}),
    "90 days by user of one model": ask(0, 90, "user", where={"model": "model-3"}),
    "90 days of one user by model": ask(0, 90, "model", where={"user": "user-77"}),
    "90 days of one user by day of Berlin": ask(30, 60, "day", where={"user": "user-77"}, tz=BERLIN, ms=-HOUR_MS),
    "90 days by tag": ask(0, 90, "tag"),
    "30 days by agent, model and day of Berlin": ask(30, 60, "agent", "model", "day", tz=BERLIN, ms=-HOUR_MS),
    "7 days by hour": ask(60, 67, "hour"),
    "7 days by department and hour": ask(60, 67, "department", "hour"),
    "1 day by user, in Berlin": ask(60, 61, "user", tz=BERLIN, ms=-HOUR_MS),
    "half an hour by session": UsageQuery(since_ms=day(60), until_ms=day(60) + HOUR_MS // 2, by=("session",)),
}


async def reports(records: int, file: Path | None, repeat: int = 5) -> dict[str, float]:
    """The median seconds of each question; prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        path = file or Path(folder) / "guard.db"
        if not path.exists():
            begun = time.perf_counter()
            fill(path, records)
            print(f"made {records:,} records in {time.perf_counter() - begun:.0f} s", flush=True)
        ledger = Ledger.open(f"sqlite:///{path}")
        speed = await roll_all(ledger)
        print(f"rolled up at {speed:,.0f} records/s; the file has {path.stat().st_size / 2**30:.2f} GiB\n", flush=True)
        print(f"| {records:,} records | median | slowest |\n|---|---|---|")
        medians: dict[str, float] = {}
        for name, query in QUESTIONS.items():
            samples = []
            for _ in range(repeat):
                begun = time.perf_counter()
                await ledger.usage(query)
                samples.append(time.perf_counter() - begun)
            medians[name] = statistics.median(samples)
            print(f"| {name} | {medians[name] * 1000:,.0f} ms | {max(samples) * 1000:,.0f} ms |", flush=True)
        begun = time.perf_counter()
        await ledger.records(RecordQuery(limit=100, where={"department": "dept-3"}))
        print(f"| a page of 100 records of a department | {(time.perf_counter() - begun) * 1000:,.0f} ms | |")
        await ledger.aclose()
        return medians


# ----------------------------------------------------------------------------------- overhead


class Without:
    """A storage that is told of no records: what it would be without a ledger."""

    def __init__(self, storage: SqliteStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        if name == "ledger_url":  # else the guard would look after the ledger itself
            raise AttributeError(name)
        return getattr(self._storage, name)

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        bare = [tuple([Bundle(each.call_id, each.claims, self._draft(each.draft)) for each in plan]) for plan in plans]
        return await self._storage.reserve(owner, bare)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        return self._storage.settle([
            Settlement(each.call_id, each.actuals, self._draft(each.record), each.receipts, each.debits)
            for each in settlements
        ])  # fmt: skip

    def _draft(self, record: UsageRecord | None) -> UsageRecord | None:  # noqa: ARG002 - see `With`
        return None


class With(Without):
    """The same detour, with the records: so that it costs both alike."""

    def _draft(self, record: UsageRecord | None) -> UsageRecord | None:
        return record


async def overhead(rounds: int) -> None:
    """A call of the guard, from admission to settlement: without its record, with it, and while the ledger rolls up."""
    with tempfile.TemporaryDirectory() as folder:
        storages = {name: SqliteStorage(Path(folder) / f"{name}.db") for name in ("without", "with", "rolled")}
        ledger = Ledger.open(f"sqlite:///{folder}/rolled.db")
        await ledger.prepare()

        async def roll() -> None:
            while True:
                await ledger.roll_up()
                await asyncio.sleep(1)

        guards = {
            "no record": Guard(
                policies=_policies(), storage=cast("Storage", Without(storages["without"])), ledger=None
            ),
            "with its record": Guard(
                policies=_policies(), storage=cast("Storage", With(storages["with"])), ledger=None
            ),
            "with its record, rolled up meanwhile": Guard(
                policies=_policies(), storage=cast("Storage", With(storages["rolled"])), ledger=None
            ),
        }
        calls = {name: _call(guard) for name, guard in guards.items()}
        for tasks in (1, 16):
            rolling = asyncio.ensure_future(roll())
            results = await compare_async(calls, operations=100, tasks=tasks, rounds=rounds)
            rolling.cancel()
            await asyncio.gather(rolling, return_exceptions=True)
            print(table(results, title=f"A call on SQLite, admitted and settled, {tasks} at a time"), end="\n\n")
            # What rolls up would be counted to whatever runs at the same time: see below.
            await _processor_time({name: calls[name] for name in ("no record", "with its record")}, tasks, rounds)
        written = Ledger.open(f"sqlite:///{folder}/with.db")
        await written.prepare()
        begun, count = time.process_time(), 0
        while some := await written.roll_up():
            count += some
        spent = (time.process_time() - begun) / count
        print(f"Rolling up {count:,} records takes {spent * 1e6:.0f} µs of processor time for each, in another thread")
        await written.aclose()
        for guard in guards.values():
            await guard.aclose()
        await ledger.aclose()


async def _processor_time(calls: Mapping[str, Callable[[], Awaitable[object]]], tasks: int, rounds: int) -> None:
    """What the same takes of the processor, which a busy machine changes less than the time that passes."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in random.sample(list(calls.items()), len(calls)):
            begun = time.process_time()
            for _ in range(96 // tasks):
                await asyncio.gather(*(call() for _ in range(tasks)))
            spent[name].append((time.process_time() - begun) / 96)
    first = statistics.median(next(iter(spent.values())))
    print("| processor time | median | to the first |\n|---|---|---|")
    for name, samples in spent.items():
        print(f"| {name} | {statistics.median(samples) * 1e6:.0f} µs | {statistics.median(samples) / first:.3f} |")
    print()


def _policies() -> list[Policy]:
    return [
        Iterations(10**9),
        Budget("$1000000/1mo", per="user"),
        Budget("$1000000/1d"),
        RateLimit("1000000/minute", per="user"),
    ]


def _call(guard: Guard) -> Callable[[], Awaitable[object]]:
    numbers = itertools.count()
    usage = Usage(input_tokens=400, output_tokens=200, cache_read_tokens=100)

    async def operation() -> None:
        number = next(numbers)
        context = Context(
            caller=f"key-{number % 50}", user=f"user-{number % 500}", departments=("research",), agent="researcher",
            session=f"session-{number % 1000}",
        )  # fmt: skip
        async with (
            guard.open(context),
            guard.call(model="openai/gpt-4o-mini", input="?" * 1600, max_output_tokens=300) as call,
        ):
            call.record(usage)

    return operation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reports", "overhead"], nargs="?")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if given.what != "reports":
        asyncio.run(overhead(given.rounds))
    if given.what != "overhead":
        asyncio.run(reports(given.records, given.file))


if __name__ == "__main__":
    main()
