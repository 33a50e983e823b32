"""What a lease saves: admitting and settling one claim from a chunk, beside one trip to the store, interleaved in one run.

    python -m benchmarks.leases [rounds] [operations per block]

"Local" is `reserve` of one leased claim and `settle` of what was used, without a record; both are done in the process.
"One trip" is `reserve` of the same claim without a lease, and handing over its settlement, on SQLite and on Redis.
Then, for plans that pass through: the same calls with a `LeasingStorage` around the memory storage and without one.
At the end, how many trips leases make for each call at several sizes of the chunk. The Redis server is started by
this script and shares the machine with it.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from benchmarks._harness import compare_async, table
from tests.servers import RedisServer

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Plan, Refused, Rule, Settlement, Unit, meter_key
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.windows import Calendar

OWNER = "0123456789abcdef01"
LIMIT = 2**50
AMOUNT, USED = 1_000, 400
NUMBERS = itertools.count()


def meter(lease: int) -> Meter:
    window = Calendar("month")
    return Meter(
        key=meter_key("budget", Unit.NANOUSD, window, f"lease-{lease}"),
        policy="budget",
        scope="global",
        subject="",
        unit=Unit.NANOUSD,
        rule=Rule.BUDGET,
        limit=LIMIT,
        window=window,
        lease=lease,
    )


def cycle(storage: Storage, on: Meter) -> Callable[[], Awaitable[None]]:
    """One call: reserved, and its settlement handed over."""
    claims = (Claim(on, AMOUNT),)

    async def run() -> None:
        call_id = f"call-{next(NUMBERS):x}"
        answer = await storage.reserve(OWNER, ((Bundle(call_id, claims),),))
        assert isinstance(answer, Granted)
        storage.settle((Settlement(call_id, (USED,), None, answer.receipts),))

    return run


def admission(storage: LeasingStorage, on: Meter) -> Callable[[], Awaitable[None]]:
    """The same, as a guard does it: what leases have is admitted without a coroutine."""
    claims = (Claim(on, AMOUNT),)

    async def run() -> None:
        call_id = f"call-{next(NUMBERS):x}"
        granted = storage.admit(OWNER, (Bundle(call_id, claims),))
        assert granted is not None
        storage.settle((Settlement(call_id, (USED,), None, granted.receipts),))

    return run


class Counting(MemoryStorage):
    """Counts what reaches it."""

    trips = 0

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        self.trips += 1
        return await super().reserve(owner, plans)


async def warmed(storage: LeasingStorage, on: Meter) -> LeasingStorage:
    """With a chunk at hand."""
    await cycle(storage, on)()
    await asyncio.sleep(0.05)
    return storage


async def trips(calls_in_chunk: int) -> float:
    """How many trips a call makes, if so many calls of 64 at a time fit into a chunk and each uses what it held."""
    store = Counting()
    storage, on = LeasingStorage(store), meter(calls_in_chunk * AMOUNT)
    claims = (Claim(on, AMOUNT),)

    async def work(calls: int) -> None:
        for _ in range(calls):
            call_id = f"call-{next(NUMBERS):x}"
            answer = await storage.reserve(OWNER, ((Bundle(call_id, claims),),))
            assert isinstance(answer, Granted)
            await asyncio.sleep(0.001)
            storage.settle((Settlement(call_id, (AMOUNT,), None, answer.receipts),))

    await asyncio.gather(*(work(100) for _ in range(64)))
    return store.trips / 6_400


async def main(rounds: int, operations: int) -> None:
    hot, plain = meter(2**40), meter(0)
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server:
        local = await warmed(LeasingStorage(MemoryStorage()), hot)
        sqlite = SqliteStorage(Path(folder) / "guard.db")
        redis = RedisStorage(server.url)
        paths = {
            "local, as a guard admits it": admission(local, hot),
            "local, by `reserve`": cycle(local, hot),
            "one trip, SQLite": cycle(sqlite, plain),
            "one trip, Redis": cycle(redis, plain),
        }
        for tasks in (1, 64):
            results = await compare_async(paths, operations=operations, rounds=rounds, tasks=tasks)
            print(table(results, title=f"one claim, reserved and settled, {tasks} at a time"), "\n")
        bare, around = MemoryStorage(max_records=1), LeasingStorage(MemoryStorage(max_records=1))
        passing = {"memory": cycle(bare, plain), "memory, with leases around it": cycle(around, plain)}
        results = await compare_async(passing, operations=20 * operations, rounds=rounds)
        print(table(results, title="what passes through"), "\n")
        for storage in (local, sqlite, redis, bare, around):
            await storage.aclose()
    print("### trips to the store for each call\n\n| calls in a chunk | trips per call |\n|---|---|")
    for size in (20, 100, 1_000, 10_000):
        print(f"| {size:,} | {await trips(size):.4f} |")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    asyncio.run(main(*(arguments + [30, 500][len(arguments) :])))
