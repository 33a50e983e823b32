"""What a call costs on a cluster with `shard_by=caller`: claims in one place, in two and in three, interleaved in one run.

    python -m benchmarks.shards [rounds] [calls per block]

Each call is reserved, awaited, and settled without waiting. The cluster is started by this script: three masters on
this machine.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

from benchmarks._harness import duration, percentile
from tests.servers import RedisCluster

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Rule, Settlement, Unit, meter_key
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.windows import Calendar

OWNER = "0123456789abcdef01"
PLACES = {"one place": 1, "two places": 2, "three places": 3}


def _claims(places: int) -> tuple[Claim, ...]:
    """Three claims, of one subject or of several."""
    subjects = [("caller", "ada"), ("department", "research"), ("global",)]
    claims = []
    for n in range(3):
        window, subject = Calendar("year"), subjects[min(n, places - 1)]
        meter = Meter(
            key=meter_key(f"p{n}", Unit.CALLS, window, *subject),
            policy=f"p{n}",
            scope=subject[0],
            subject=subject[-1],
            unit=Unit.CALLS,
            rule=Rule.QUOTA,
            limit=10**12,
            window=window,
        )
        claims.append(Claim(meter, 1))
    return tuple(claims)


async def _block(storage: Storage, claims: tuple[Claim, ...], name: str, calls: int) -> list[float]:
    took = []
    for n in range(calls):
        began = time.perf_counter()
        answer = await storage.reserve(OWNER, ((Bundle(f"{OWNER}-{name}-{n}", claims),),))
        took.append(time.perf_counter() - began)
        if not isinstance(answer, Granted):
            raise TypeError(f"refused: {answer}")
        storage.settle((Settlement(f"{OWNER}-{name}-{n}", (1, 1, 1)),))
    return took


async def _measure(url: str, rounds: int, calls: int) -> None:
    storage = open_storage(f"{url}?shard_by=caller&timeout=5", clock=SystemClock())
    claims = {name: _claims(places) for name, places in PLACES.items()}
    took: dict[str, list[list[float]]] = {name: [] for name in PLACES}
    for name in PLACES:
        await _block(storage, claims[name], f"warm-{name}", 50)
    for number in range(rounds):
        for name in PLACES:
            took[name].append(await _block(storage, claims[name], f"{number}-{name}", calls))
    await storage.aclose()
    print("| claims in | p50 | p99 |\n|---|---|---|")
    for name, blocks in took.items():
        p50, p99 = (statistics.median(percentile(block, share) for block in blocks) for share in (50, 99))
        print(f"| {name} | {duration(p50)} | {duration(p99)} |")


def main() -> None:
    rounds, calls = (int(value) for value in (sys.argv[1:] + ["5", "500"][len(sys.argv) - 1 :])[:2])
    with RedisCluster() as cluster:
        asyncio.run(_measure(cluster.url, rounds, calls))


if __name__ == "__main__":
    main()
