"""What the link to Redis costs, beside other ways to make the same call, interleaved in one run.

    python -m benchmarks.redis_link [rounds] [operations per block] [asyncio | uvloop]

The call is one EVALSHA of a script that checks and adds to three counters, alone and with 64 tasks
that have one under way each. Beside the link:

- a bare `asyncio.Protocol` with hiredis: one future per call and one write per turn of the loop. No
  timeouts, no reconnecting, no scripts, no bound. It is the floor: what a call costs in any case.
- redis-py with its connection pool, as most services use it.
- redis-py with the calls of a turn in one pipeline.

The server is started by this script, and shares the machine with it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

import hiredis
import redis.asyncio
from benchmarks._harness import compare_async, duration, percentile, table
from tests.servers import RedisServer

from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_link import Link, Script
from asgi_llm_guard.storage.redis_wire import pack

SCRIPT = Script(
    """
local used = redis.call('HMGET', KEYS[1], 'a', 'b', 'c')
for n = 1, 3 do
  if (tonumber(used[n]) or 0) + tonumber(ARGV[n]) > tonumber(ARGV[n + 3]) then return {0, n} end
end
redis.call('HINCRBY', KEYS[1], 'a', ARGV[1])
redis.call('HINCRBY', KEYS[1], 'b', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'c', ARGV[3])
return {1, 0}
"""
)
KEY = b"{bench}:counters"
ARGS = [b"1", b"100", b"12345678", b"9007199254740991", b"9007199254740991", b"9007199254740991"]
COMMAND = ("EVALSHA", SCRIPT.sha, 1, KEY, *ARGS)

Call = Callable[[], Awaitable[Any]]


class Bare(asyncio.Protocol):
    """The floor: calls out, replies in."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.buffer: list[bytes] = []
        self.reader = hiredis.Reader()
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def submit(self, packed: bytes = b"") -> asyncio.Future[Any]:
        future = self.loop.create_future()
        packed = packed or pack(COMMAND)
        if self.waiting:
            if not self.buffer:
                self.loop.call_soon(self.flush)
            self.buffer.append(packed)
        else:
            self.transport.write(packed)
        self.waiting.append(future)
        return future

    def flush(self) -> None:
        self.transport.write(b"".join(self.buffer))
        self.buffer.clear()

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            self.waiting.popleft().set_result(reply)


class Pipelined:
    """The calls of a turn in one pipeline of redis-py."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client = client
        self.waiting: list[asyncio.Future[Any]] = []
        self.loop = asyncio.get_running_loop()
        self.tasks: set[asyncio.Task[None]] = set()

    def submit(self) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        if not self.waiting:
            self.loop.call_soon(self.begin)
        self.waiting.append(future)
        return future

    def begin(self) -> None:
        waiting, self.waiting = self.waiting, []
        task = self.loop.create_task(self.run(waiting))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def run(self, waiting: list[asyncio.Future[Any]]) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for _ in waiting:
            pipeline.execute_command(*COMMAND)
        for future, reply in zip(waiting, await pipeline.execute(), strict=True):
            future.set_result(reply)


async def latencies(call: Call, count: int) -> list[float]:
    samples = []
    for _ in range(count):
        begun = time.perf_counter()
        await call()
        samples.append(time.perf_counter() - begun)
    return samples


async def measure(url: str, rounds: int, operations: int) -> None:
    address, _ = Address.parse(url)
    loop = asyncio.get_running_loop()
    _, bare = await loop.create_connection(Bare, address.endpoints[0].host, address.endpoints[0].port)
    link = Link(address, scripts=[SCRIPT], timeout_s=10.0)
    client = redis.asyncio.Redis.from_url(url, protocol=2, max_connections=100)
    pipelined = Pipelined(client)
    await link.submit(SCRIPT, KEY, ARGS)
    ways: dict[str, Call] = {
        "bare protocol": bare.submit,
        "link": lambda: link.submit(SCRIPT, KEY, ARGS),
        "redis-py, pool": lambda: client.execute_command(*COMMAND),  # type: ignore[no-untyped-call]
        "redis-py, pipeline per turn": pipelined.submit,
    }
    for tasks in (1, 64):
        results = await compare_async(ways, operations=operations, tasks=tasks, rounds=rounds)
        print(table(results, title=f"one EVALSHA, {tasks} task{'s' * (tasks > 1)}: wall-clock time per call") + "\n")
        for result in results:
            rate, ratio = 1 / result.median_s, 1 / statistics.median(result.ratios)
            print(f"- {result.name}: {rate:,.0f} calls/s, {ratio:.2f} of the bare protocol")
        print()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            samples[name] += await latencies(call, operations // 10)
    print("### latency of a lone call\n\n| | p50 | p99 | p50 to the bare protocol |\n|---|---|---|---|")
    floor = statistics.median(samples["bare protocol"])
    for name, values in samples.items():
        middle, late = statistics.median(values), percentile(values, 99)
        print(f"| {name} | {duration(middle)} | {duration(late)} | {middle / floor:.2f} |")
    bare.transport.close()
    await link.aclose()
    await client.aclose()


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    rounds, operations = [*numbers, *(20, 6_400)[len(numbers) :]]
    run: Callable[[Any], Any] = asyncio.run
    if "uvloop" in sys.argv:
        import uvloop

        run = uvloop.run
    with RedisServer() as server:
        print(f"Python {sys.version.split()[0]}, {run.__module__}, {rounds} rounds of {operations} calls each\n")
        run(measure(server.url, rounds, operations))


if __name__ == "__main__":
    main()
