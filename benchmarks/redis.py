"""What admitting six claims in one trip costs on Redis, beside the least that it can cost, interleaved in one run.

    python -m benchmarks.redis [rounds] [operations per block] [asyncio | uvloop]

The plan: a session's iterations, a provider's budget, a department's money and tokens, a user's rate and slots.
Beside `RedisStorage`:

- the floor: a bare `asyncio.Protocol` with hiredis, the same script, the same batching, arguments that were encoded
  beforehand, and replies that nobody reads. No call ids to be made, no receipts, no timeouts, no reconnecting.
- redis-py: the same script and the same arguments, one EVALSHA for each plan, as its client sends it.

Then what a settlement adds, what the server's own time is, and what a hold, a tombstone and a session take in memory.
The server is started by this script, and shares the machine with it.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec
import redis.asyncio
from benchmarks._harness import compare_async, duration, percentile, table
from benchmarks.redis_link import Bare
from tests.servers import RedisServer

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Receipt, Rule, Settlement, Unit, meter_key
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.redis_codec import Codec, Shape
from asgi_llm_guard.storage.redis_lane import Group, Lane
from asgi_llm_guard.storage.redis_scripts import RESERVE, script
from asgi_llm_guard.storage.redis_wire import pack
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling, Sliding, Slots, Window

OWNER = "0123456789abcdef01"
AMOUNTS = (1, 12_345_678, 12_345_678, 4_321, 1, 1)
ACTUALS = (1, 10_000_000, 10_000_000, 4_000, 1, 1)
SUBJECTS = 100
LIMITS = (1_000_000, 10**13, 10**13, 4_000_000_000, 1_000_000, 100_000)
PROVIDER_S = 0.01

Call = Callable[[], Awaitable[Any]]


def _meter(policy: str, window: Window, unit: Unit, rule: Rule, scope: str, *subject: str) -> Meter:
    key = meter_key(policy, unit, window, *subject)
    return Meter(key=key, policy=policy, scope=scope, subject=subject[-1], unit=unit, rule=rule, limit=1, window=window)


def _claims(n: int) -> tuple[Claim, ...]:
    day = 86_400_000
    department, user = ("department", "research"), ("user", f"u-{n:04}")
    meters = (
        _meter("iterations", Lifetime(day, renew=True), Unit.CALLS, Rule.ITERATIONS, "session", "caller", "acme", "session", f"s-{n:06}"),
        _meter("provider_budget", Rolling(day), Unit.NANOUSD, Rule.BUDGET, "provider", "provider", "openai"),
        _meter("quota", Calendar("day"), Unit.NANOUSD, Rule.QUOTA, "department", *department),
        _meter("quota", Calendar("month"), Unit.TOKENS, Rule.QUOTA, "department", *department),
        _meter("user_rate", Sliding(60_000, 60), Unit.CALLS, Rule.RATE, "user", *user),
        _meter("user_concurrency", Slots(), Unit.SLOTS, Rule.SLOTS, "user", *user),
    )  # fmt: skip
    limited = [msgspec.structs.replace(meter, limit=limit) for meter, limit in zip(meters, LIMITS, strict=True)]
    return tuple(Claim(meter, amount) for meter, amount in zip(limited, AMOUNTS, strict=True))


def _record(call_id: str) -> UsageRecord:
    return UsageRecord(
        call_id=call_id,
        at_ms=time.time_ns() // 1_000_000,
        request_id="req-0123456789",
        caller="acme",
        user="u-0017",
        departments=("research",),
        agent="researcher",
        session="s-000017",
        route="/v1/chat/completions",
        provider="openai",
        model="gpt-5.6-mini",
        estimate_nanousd=12_345_678,
        price_source="snapshot 2026-11-01",
    )


class Guarded:
    """`RedisStorage` as the engine uses it."""

    def __init__(self, storage: RedisStorage) -> None:
        self.storage = storage
        self.claims = [_claims(n) for n in range(SUBJECTS)]
        self.numbers = itertools.count()

    async def reserve(self) -> tuple[str, tuple[Receipt, ...]]:
        number = next(self.numbers)
        call_id = f"{OWNER}-{number:x}"
        bundle = Bundle(call_id, self.claims[number % SUBJECTS], _record(call_id))
        answer = await self.storage.reserve(OWNER, ((bundle,),))
        assert isinstance(answer, Granted)
        return call_id, answer.receipts

    async def cycle(self) -> None:
        call_id, receipts = await self.reserve()
        self.storage.settle((Settlement(call_id, ACTUALS, _record(call_id), receipts),))


class Floor:
    """The same script calls from arguments that are there already."""

    def __init__(self, bare: Bare, namespace: str) -> None:
        self.bare = bare
        self.key = f"llmguard1:{{{namespace}}}:e".encode()
        self.head: list[bytes] = []
        self.arguments = self.prepared()
        self.lane = Lane(asyncio.get_running_loop(), self)

    def prepared(self) -> Iterator[bytes]:
        codec, claims = Codec(), [_claims(n) for n in range(SUBJECTS)]
        made = []
        for number in range(200_000):
            shapes: list[Shape] = []
            call_id = f"floor-{number:x}"
            plans = ((Bundle(call_id, claims[number % SUBJECTS], _record(call_id)),),)
            made.append(codec.plans(OWNER, plans, time.time_ns() // 1_000_000, shapes))
        return iter(made)

    def reserve(self) -> asyncio.Future[Any]:
        return self.lane.reserve(next(self.arguments))

    def send_reserves(self, arguments: list[bytes]) -> asyncio.Future[Any]:
        return self.bare.submit(pack(("EVALSHA", script(RESERVE).sha, 1, self.key, *self.head, *arguments)))

    def send_settles(self, arguments: list[bytes]) -> asyncio.Future[Any]:
        raise NotImplementedError

    def confirm(self, durable: str) -> asyncio.Future[None]:
        raise NotImplementedError

    def settled(self, group: Group, replies: Sequence[Any], now_ms: int) -> bool:
        raise NotImplementedError


async def _beat(storage: RedisStorage) -> None:
    """Without it the holds would be taken for those of a dead process."""
    while True:
        await asyncio.sleep(5)
        await storage.heartbeat(OWNER)


async def _latencies(call: Call, count: int) -> list[float]:
    samples = []
    for _ in range(count):
        begun = time.perf_counter()
        await call()
        samples.append(time.perf_counter() - begun)
    return samples


async def measure(server: RedisServer, rounds: int, operations: int) -> None:
    namespace = "llm-guard"
    storage = RedisStorage(server.url, namespace=namespace, timeout_s=10, remember_refusals_ms=0)
    guarded = Guarded(storage)
    await guarded.cycle()
    loop = asyncio.get_running_loop()
    heart = loop.create_task(_beat(storage))
    _, bare = await loop.create_connection(Bare, server.host, server.port)
    floor = Floor(bare, namespace)
    floor.head = storage._namespace.reserve_arguments([])  # noqa: SLF001 - just what the storage itself says
    client = redis.asyncio.Redis.from_url(server.url, protocol=2, max_connections=100)

    async def plain() -> Any:
        arguments = (*floor.head, next(floor.arguments))
        return await client.execute_command("EVALSHA", script(RESERVE).sha, 1, floor.key, *arguments)  # type: ignore[no-untyped-call]

    ways: dict[str, Call] = {"floor": floor.reserve, "RedisStorage": guarded.reserve, "redis-py": plain}
    for tasks in (1, 64):
        results = await compare_async(ways, operations=operations, tasks=tasks, rounds=rounds)
        print(table(results, title=f"reserve six claims, {tasks} task{'s' * (tasks > 1)}: wall-clock time each") + "\n")
        for result in results:
            print(
                f"- {result.name}: {1 / result.median_s:,.0f}/s, {1 / statistics.median(result.ratios):.2f} of the floor"
            )
        print()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            samples[name] += await _latencies(call, operations // 10)
    print("### latency alone\n\n| | p50 | p99 | p50 to the floor |\n|---|---|---|---|")
    least = statistics.median(samples["floor"])
    for name, values in samples.items():
        print(f"| {name} | {duration(statistics.median(values))} | {duration(percentile(values, 99))} | {statistics.median(values) / least:.2f} |")  # fmt: skip
    print()
    for tasks in (1, 64):
        both: dict[str, Call] = {"reserve": guarded.reserve, "reserve, and settle behind it": guarded.cycle}
        results = await compare_async(both, operations=operations, tasks=tasks, rounds=rounds)
        print(table(results, title=f"as fast as it goes, {tasks} task{'s' * (tasks > 1)}") + "\n")

    async def provider(admit: Call) -> None:
        await asyncio.sleep(PROVIDER_S)
        await admit()

    calls: dict[str, Call] = {
        "reserve": lambda: provider(guarded.reserve),
        "reserve, and settle behind it": lambda: provider(guarded.cycle),
    }
    results = await compare_async(calls, operations=operations, tasks=16, rounds=rounds)
    print(table(results, title="calls of 10 ms, 16 tasks: what a settlement adds") + "\n")
    await _server_time(server, storage, guarded)
    await _memory(server, storage, guarded, namespace)
    heart.cancel()
    bare.transport.close()
    await storage.aclose()
    await client.aclose()


async def _server_time(server: RedisServer, storage: RedisStorage, guarded: Guarded) -> None:
    def spent() -> float:
        info = server.call("INFO", "commandstats").decode()
        return float(info.split("cmdstat_evalsha:")[1].split("usec=")[1].split(",")[0])

    print("### the server's own time\n\n| | each |\n|---|---|")
    for tasks in (1, 16, 64):
        server.call("CONFIG", "RESETSTAT")
        reserved: list[tuple[str, tuple[Receipt, ...]]] = []

        async def some(into: list[tuple[str, tuple[Receipt, ...]]], count: int) -> None:
            into += [await guarded.reserve() for _ in range(count)]

        await asyncio.gather(*(some(reserved, 3_200 // tasks) for _ in range(tasks)))
        print(f"| reserve, {tasks} at a time | {spent() / len(reserved):.1f} µs |")
        server.call("CONFIG", "RESETSTAT")
        for call_id, receipts in reserved:
            pending = storage.settle((Settlement(call_id, ACTUALS, _record(call_id), receipts),))
            if tasks == 1 or call_id == reserved[-1][0]:
                await pending
        print(f"| settle, {'1' if tasks == 1 else 'up to 32'} at a time | {spent() / len(reserved):.1f} µs |")
    print()


async def _memory(server: RedisServer, storage: RedisStorage, guarded: Guarded, namespace: str) -> None:
    def size(key: str) -> int:
        return int(server.call("MEMORY", "USAGE", f"llmguard1:{{{namespace}}}:{key}", "SAMPLES", 0))

    before = int(server.call("INFO", "memory").decode().split("used_memory:")[1].split("\r")[0])
    held = [await guarded.reserve() for _ in range(2_000)]
    after = int(server.call("INFO", "memory").decode().split("used_memory:")[1].split("\r")[0])
    call_id, receipts = held[0]
    print("### memory\n\n| | bytes |\n|---|---|")
    print(f"| open hold of six claims, with its draft | {size(f'h:{call_id}')} |")
    print(
        f"| the same, its place among its owner's and the server's tables included | {(after - before) / 2_000:.0f} |"
    )
    await storage.settle((Settlement(call_id, ACTUALS, _record(call_id), receipts),))
    print(f"| tombstone | {size(f'h:{call_id}')} |")
    claims = _claims(9_999)  # of whom nothing was known before
    await storage.reserve(OWNER, ((Bundle("pair", claims),),))
    pair = [size(f"c:{claims[n].meter.key}") for n in (0, 4, 5)]
    print(f"| user and session: iterations, rate, slots | {sum(pair)} |")
    records = int(server.call("XLEN", f"llmguard1:{{{namespace}}}:l"))
    print(f"| usage record, and its place in the index | {(size('l') + size('li')) / records:.0f} |")


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    rounds, operations = [*numbers, *(15, 3_200)[len(numbers) :]]
    run: Callable[[Any], Any] = asyncio.run
    if "uvloop" in sys.argv:
        import uvloop

        run = uvloop.run
    with RedisServer() as server:
        print(f"Python {sys.version.split()[0]}, {run.__module__}, {rounds} rounds of {operations} plans each\n")
        run(measure(server, rounds, operations))


if __name__ == "__main__":
    main()
