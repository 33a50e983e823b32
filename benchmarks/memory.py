"""How much memory the memory storage takes: for each live session, and under a flood of ids that nobody sends twice.

    python -m benchmarks.memory [sessions] [flood]

Every session is one caller's and has an iteration counter, which is what an agent's loop takes, and its id counts
among the caller's live ones. The flood sends as many ids as it likes, from one anonymous caller who may have 1,000
live ones: the rest is refused, and what is kept does not grow. `--full` floods with a million ids.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Final, TypeVar

from asgi_llm_guard import Context, Guard, Iterations
from asgi_llm_guard.storage.memory import MemoryStorage

T = TypeVar("T")

LIMIT_BYTES: Final = 1_536
"""The most that one live session may take."""
KEPT_BYTES: Final = 4 * 1024 * 1024
"""The most that may be kept after a flood, however long it was: the live ids, and what policies remember."""
NEVER_MS: Final = 10**12
LIVE: Final = 1_000


@dataclass
class Ticking:
    """Time that goes on by a millisecond a request."""

    at_ms: int = 1_795_000_000_000

    def now_ms(self) -> int:
        return self.at_ms


async def calls(guard: Guard, clock: Ticking, first: int, count: int, *, caller: str | None) -> int:
    """`count` requests of one call, each with a session of its own; how many were admitted."""
    admitted = 0
    for number in range(first, first + count):
        clock.at_ms += 1
        admission = guard.new_admission(Context(caller=caller, session=f"session-{number:08x}"))
        if await admission.open(guard.describe("openai/gpt-4o-mini", input_tokens=1, max_output_tokens=1)) is None:
            admitted += 1
        admission.end()
    return admitted


def taken() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def sessions(count: int) -> float:
    """Bytes for each of `count` live sessions, apart from the ledger's records and what ended a moment ago."""
    clock = Ticking()
    storage = MemoryStorage(clock=clock, max_records=1, tombstone_ms=1, lapse_ms=NEVER_MS)
    guard = Guard([Iterations(25, ttl="1h")], storage=storage, clock=clock, session_limit=count + LIVE)
    await calls(guard, clock, 0, LIVE, caller="warm")
    before = taken()
    assert await calls(guard, clock, LIVE, count, caller="many") == count
    bytes_each = (taken() - before) / count
    assert storage.size()["cells"] == count + LIVE
    await guard.aclose()
    return bytes_each


async def flood(count: int) -> tuple[int, int, dict[str, int]]:
    """Bytes that are kept after half a flood of random ids and after all of it, and what they are."""
    clock = Ticking()
    storage = MemoryStorage(clock=clock, max_records=1_000, tombstone_ms=1_000, lapse_ms=NEVER_MS)
    guard = Guard([Iterations(25, ttl="1h")], storage=storage, clock=clock, anonymous_session_limit=LIVE)
    await calls(guard, clock, 0, 1, caller=None)
    before = taken()
    admitted = await calls(guard, clock, 1, count // 2, caller=None)
    between = taken()
    admitted += await calls(guard, clock, 1 + count // 2, count // 2, caller=None)
    after = taken()
    assert admitted < LIVE
    size = storage.size()
    await guard.aclose()
    return between - before, after - before, size


def run(measure: Callable[[int], Coroutine[Any, Any, T]], count: int) -> T:
    tracemalloc.start()
    return asyncio.run(measure(count))


def main() -> int:
    full = "--full" in sys.argv
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    count, ids = (*numbers, *(20_000, 1_000_000 if full else 20_000)[len(numbers) :])
    with ProcessPoolExecutor(
        1, get_context("spawn"), max_tasks_per_child=1
    ) as alone:  # what one leaves, the other sees
        each = alone.submit(run, sessions, count).result()
        half, whole, size = alone.submit(run, flood, ids).result()
    print("| | measured | allowed |\n|---|---|---|")
    print(f"| bytes for each of {count:,} live sessions | {each:,.0f} | {LIMIT_BYTES:,} |")
    print(f"| bytes kept after {ids // 2:,} random ids | {half:,} | {KEPT_BYTES:,} |")
    print(f"| bytes kept after {ids:,} random ids | {whole:,} | {KEPT_BYTES:,} |")
    print(f"\nKept after the flood: {', '.join(f'{number:,} {name}' for name, number in size.items())}")
    return 0 if each <= LIMIT_BYTES and max(half, whole) <= KEPT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
