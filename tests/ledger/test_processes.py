"""Several processes on one ledger, some of which are killed."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.ledger.kit import DAY_MS, HOUR_MS, START_MS, check_numbers, expected, record, shown, unused_names

from asgi_llm_guard.ledger import Ledger, Retention, UsageQuery
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


def many(count: int) -> list[UsageRecord]:
    return [
        record(
            f"call-{number}",
            START_MS + number * HOUR_MS // 50,
            user=f"u{number % 7}",
            departments=("red", "blue")[: number % 3],
            cost_nanousd=number,
        )
        for number in range(count)
    ]


def start(url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ledger.work", url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


async def check(ledger: Ledger, records: list[UsageRecord]) -> None:
    found = await ledger.reconcile(0, 2**52)
    assert found.equal, found.differences
    assert found.total.records == len(records)
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department",)))
    costs = {row.key[0]: row.amounts.cost_nanousd for row in report.rows}
    assert costs["red"] == sum(each.cost_nanousd or 0 for each in records if "red" in each.departments)
    assert report.total.cost_nanousd == sum(each.cost_nanousd or 0 for each in records)


async def test_rollers_that_are_killed(ledger: Ledger, url: str) -> None:
    """C9: processes that roll up are killed (SIGKILL) at random; every record is in every sum exactly once."""
    records = many(3_000)
    await ledger.append(records)
    chance = random.Random(7)
    for _ in range(4):
        process = start(url)
        assert process.stdout is not None
        with process:
            for _ in range(chance.randrange(1, 12)):
                process.stdout.readline()
            process.kill()
    assert 0 < await ledger.roll_up(at_most=10_000) < len(records)
    await check(ledger, records)


async def test_rollers_at_the_same_time(ledger: Ledger, url: str) -> None:
    """C9: four processes roll up at once, while records come and estimates are replaced; every one counts once."""
    records = {each.call_id: each for each in many(2_000)}
    estimates = [
        record(call_id, each.at_ms, outcome="expired", cost_nanousd=10**9, departments=("green",))
        for call_id, each in records.items()
        if int(call_id[5:]) % 20 == 0
    ]
    known = {each.call_id for each in estimates}
    await ledger.append([*estimates, *(each for each in list(records.values())[:1_500] if each.call_id not in known)])
    with ExitStack() as stack:
        processes = [stack.enter_context(start(url)) for _ in range(4)]
        for process in processes:
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)
        for first in range(0, 2_000, 100):
            await ledger.append(list(records.values())[first : first + 100])
        done = [await asyncio.to_thread(process.communicate) for process in processes]
        assert [process.returncode for process in processes] == [0] * 4
        assert any(told for told, _ in done)
    while await ledger.roll_up():
        pass
    await check(ledger, list(records.values()))


async def test_retention_beside_rollers_in_other_processes(ledger: Ledger, url: str, clock: FrozenClock) -> None:
    """C9: while three processes roll up, a fourth removes sums and the names that only these had, again and again; names
    come back with later records, and what is kept is in the sums of its own users, each record once."""
    ledger.retention = Retention(raw=None, hours="1d", days="1d", people="1d")
    records = [
        record(f"call-{n}", START_MS + n % 10 * DAY_MS, user=f"u{n % 70}", departments=(f"d{n % 10}",), cost_nanousd=n)
        for n in range(2_000)
    ]
    await ledger.append(records[:1_000])
    with ExitStack() as stack:
        processes = [stack.enter_context(start(url)) for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)
        for first in range(1_000, 2_000, 100):
            await ledger.append(records[first : first + 100])
            clock.set(START_MS + (first // 200) * DAY_MS)
            await ledger.retain()
        for process in processes:
            await asyncio.to_thread(process.communicate)
        assert [process.returncode for process in processes] == [0] * 3
    while await ledger.roll_up():
        pass
    await ledger.retain()
    await ledger.database.read(check_numbers)
    assert await ledger.database.read(unused_names) == 0
    for by in (("user",), ("department",)):
        query = UsageQuery(since_ms=START_MS + 8 * DAY_MS, until_ms=2**52, by=by)
        report = await ledger.usage(query)
        assert (shown(report), report.total) == expected(records, query)
