"""How fast records get from Redis streams into a ledger, and how long a drain keeps the server from others meanwhile.

    taskset -c 0,1 .venv/bin/python -m benchmarks.drain [records]

Redis and PostgreSQL are processes of the benchmark's own, on the same two cores. PostgreSQL does not wait for its disk;
SQLite runs as the ledger opens it. "With sums" rolls up what was drained as well, which a service does beside it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from tests.postgres import shared_postgres
from tests.servers import RedisServer, shared_redis, unique_namespace

from asgi_llm_guard.claims import Settlement
from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.usage import Usage, UsageRecord

RECORDS: Final = 60_000
ROUNDS: Final = 5
AT_MS: Final = 1_767_225_600_000


def record(number: int) -> UsageRecord:
    """As a gateway writes them: every column of a measured call."""
    return UsageRecord(
        call_id=f"worker-{number % 8}-{number:012x}",
        at_ms=AT_MS + number * 7,
        ended_ms=AT_MS + number * 7 + 900,
        request_id=f"req-{number:012x}",
        caller=f"key-{number % 400}",
        user=f"user-{number % 5_000}",
        departments=(f"department-{number % 20}",),
        agent=f"agent-{number % 12}",
        session=f"session-{number // 40}",
        route="/v1/chat/completions",
        provider="openai",
        model=f"model-{number % 8}",
        billed_model=f"model-{number % 8}",
        usage=Usage(input_tokens=900 + number % 700, output_tokens=200, cache_read_tokens=512, reasoning_tokens=64),
        cost_nanousd=1_000_000 + number,
        estimate_nanousd=9_000_000,
        tokens=1_100 + number % 700,
        price_source="genai-prices 0.2, 2026-01-01",
        dispatched_ms=AT_MS + number * 7,
        first_token_ms=300,
        latency_ms=900,
        deployment="primary",
    )


@asynccontextmanager
async def filled(records: int) -> AsyncIterator[RedisStorage]:
    """A namespace with so many records in its stream."""
    storage = RedisStorage(shared_redis().url, namespace=unique_namespace(), timeout_s=10)
    for at in range(0, records, 200):
        some = [record(number) for number in range(at, min(at + 200, records))]
        await storage.settle([Settlement(call_id=one.call_id, actuals=(), record=one) for one in some])
    yield storage
    shared_redis().flush()
    await storage.aclose()


async def drained(storage: RedisStorage, ledger: Ledger, *, sums: bool) -> float:
    """Records per second."""
    drain = Drain(storage, ledger)
    began = time.perf_counter()
    done = await drain.run()
    if sums:
        while await ledger.roll_up():
            pass
    return done.records / (time.perf_counter() - began)


async def read(storage: RedisStorage) -> float:
    """Records per second, only read and thrown away."""
    (stream,) = storage.streams()
    position, count, began = None, 0, time.perf_counter()
    while True:
        found = await stream.read(position, 2_000)
        position, count = found.position, count + len(found.records)
        if not found.behind:
            return count / (time.perf_counter() - began)


def calls_us(server: RedisServer) -> list[int]:
    """How long each call of a script has kept the server, in microseconds."""
    entries = server.call("SLOWLOG", "GET", 10_000)
    return [int(entry[2]) for entry in entries if bytes(entry[3][0]).upper() == b"EVALSHA"]


async def rates(records: int, url: str | None, *, sums: bool = False) -> float:
    async with filled(records) as storage:
        shared_redis().call("SLOWLOG", "RESET")
        if url is None:
            return await read(storage)
        ledger = Ledger.open(url)
        await ledger.prepare()
        rate = await drained(storage, ledger, sums=sums)
        await ledger.aclose()
        return rate


async def main(arguments: Sequence[str]) -> None:
    records = int(arguments[0]) if arguments else RECORDS
    postgres = shared_postgres()
    shared_redis().call("CONFIG", "SET", "slowlog-log-slower-than", 0)
    shared_redis().call("CONFIG", "SET", "slowlog-max-len", 10_000)
    results: dict[str, list[float]] = {}
    calls: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name, sums in (
                ("read only", False),
                ("SQLite", False),
                ("SQLite", True),
                ("PostgreSQL", False),
                ("PostgreSQL", True),
            ):
                url = None
                if name == "SQLite":
                    url = f"sqlite:///{folder}/{number}-{sums}.db"
                elif name == "PostgreSQL":
                    url = postgres.new_database()
                rate = await rates(records, url, sums=sums)
                results.setdefault(f"{name}, with sums" if sums else name, []).append(rate)
                calls += calls_us(shared_redis())
                if name == "PostgreSQL" and url is not None:
                    postgres.drop_database(url)
    print("| into | records/s | slowest round |\n|---|---|---|")
    for name, found in results.items():
        print(f"| {name} | {statistics.median(found):,.0f} | {min(found):,.0f} |")
    calls.sort()
    median, p99 = statistics.median(calls) / 1_000, calls[len(calls) * 99 // 100] / 1_000
    print(f"\nA call of a drain keeps Redis for {median:.1f} ms (median), {p99:.1f} ms (p99)")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
