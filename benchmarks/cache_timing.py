"""What a look-up costs, and whether its time tells what others were given.

    python -m benchmarks.cache_timing [samples]

First, look-ups of prompts that another caller was given an answer to ("foreign"), beside look-ups of prompts that nobody
was ("novel"): interleaved in random order, on each storage, as many of each as `samples` (500). The Kolmogorov-Smirnov
test compares the two distributions; with p below 0.01, twice, they can be told apart. Once more for the caller's own
prompts, which can be told apart, to show that the test sees something.
Then the latency of a hit beside that of a miss. A hit is one look-up, one reservation of rates, and a settlement handed
over. The Redis server is started by this script and shares the machine with it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks._harness import duration, percentile
from tests.servers import RedisServer

from asgi_llm_guard import CacheScope, Context, Guard, RateLimit
from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.cache import Cache, CacheRequest, Lookup, ProviderAnswer
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

ME, OTHER = Context(caller="me"), Context(caller="other")
TOLD_APART = 0.01
ANSWER = json.dumps({"choices": [{"message": {"content": "word " * 200}, "finish_reason": "stop"}]}).encode()


async def look_up(guard: Guard, context: Context, prompt: str) -> Lookup:
    assert guard.cache is not None
    admission = guard.new_admission(context)
    call = ActiveCall(admission, None, admission.policies, None)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}]}).encode()
    request = CacheRequest(host="api.example.com", path="/v1/chat/completions", body=body)
    return await guard.cache.look_up(call, request)


async def keep(guard: Guard, context: Context, prompt: str) -> None:
    found = await look_up(guard, context, prompt)
    assert await found.store(ProviderAnswer(status=200, content_type="application/json", body=ANSWER))


async def timed(guard: Guard, prompt: str) -> float:
    begun = time.perf_counter()
    found = await look_up(guard, ME, prompt)
    took_s = time.perf_counter() - begun
    found.abandon()
    await asyncio.sleep(0)
    return took_s


async def measure(guard: Guard, samples: int, attempt: int) -> dict[str, list[float]]:
    """Seconds of each look-up, by what is looked up."""
    for n in range(samples):
        await keep(guard, OTHER, f"{attempt} foreign {n}")
        await keep(guard, ME, f"{attempt} own {n}")
    prompts = [(kind, f"{attempt} {kind} {n}") for kind in ("foreign", "novel", "own") for n in range(samples)]
    random.Random(1).shuffle(prompts)
    for n in range(50):
        await timed(guard, f"{attempt} warm-up {n}")
    times: dict[str, list[float]] = {"foreign": [], "novel": [], "own": []}
    for kind, prompt in prompts:
        times[kind].append(await timed(guard, prompt))
    return times


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The largest distance between the two distributions, and how likely one as large is if they are the same.

    Source: Stephens, "Use of the Kolmogorov-Smirnov statistics without extensive tables", 1970 (asymptotic).
    """
    values = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    seen, largest = [0, 0], 0.0
    for n, (value, which) in enumerate(values):
        seen[which] += 1
        if n + 1 == len(values) or values[n + 1][0] != value:
            largest = max(largest, abs(seen[0] / len(one) - seen[1] / len(other)))
    root = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    scaled = (root + 0.12 + 0.11 / root) * largest
    if scaled < 0.2:
        return largest, 1.0
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * scaled * scaled) for k in range(1, 101))
    return largest, min(max(p, 0.0), 1.0)


@asynccontextmanager
async def storages() -> AsyncIterator[dict[str, Storage]]:
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server:
        made: dict[str, Storage] = {
            "memory": MemoryStorage(),
            "SQLite": SqliteStorage(Path(folder) / "guard.db"),
            "Redis": RedisStorage(server.url, timeout_s=10),
        }
        yield made
        for storage in made.values():
            await storage.aclose()


async def main(samples: int) -> int:
    apart = 0
    rows, latencies = [], []
    async with storages() as made:
        for name, storage in made.items():
            guard = Guard(
                [CacheScope(), RateLimit("1000000/hour", per="caller", counts="calls")], storage=storage, cache=Cache()
            )
            times = await measure(guard, samples, 1)
            distance, p = kolmogorov_smirnov(times["foreign"], times["novel"])
            if p < TOLD_APART:  # one in a hundred is, by chance
                times = await measure(guard, samples, 2)
                distance, p = kolmogorov_smirnov(times["foreign"], times["novel"])
            own_distance, own_p = kolmogorov_smirnov(times["own"], times["novel"])
            apart += p < TOLD_APART
            rows.append(f"| {name} | {distance:.3f} | {p:.3f} | {own_distance:.3f} | {own_p:.2g} |")
            for kind, what in (("novel", "miss"), ("own", "hit")):
                shown = [duration(percentile(times[kind], percent)) for percent in (10, 50, 99)]
                latencies.append(f"| {name}, {what} | {' | '.join(shown)} |")
    print(f"### Can it be told what others were given? ({samples} look-ups of each kind)\n")
    print("| storage | foreign and novel: KS distance | p | own and novel: KS distance | p |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print("\n### What a look-up takes\n\n| | p10 | median | p99 |\n|---|---|---|---|")
    print("\n".join(latencies))
    print(f"\n{apart or 'No'} storage tells foreign prompts from novel ones at p < {TOLD_APART}.")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)))
