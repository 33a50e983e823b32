"""What admitting a call over Redis costs, beside what a user would take instead, interleaved in one run.

    python -m benchmarks.redis_peers [rounds] [operations] [--litellm PYTHON]

In process, without HTTP, one and 64 at a time; all on one server that this script starts and that shares the machine.
Rows do different things. `limits` and `fastapi-limiter` count requests: no money, no settlement, no record.
`RedisStorage` takes six claims (a session's iterations, a provider's budget, a department's money and tokens, a
user's rate and slots) or none of them, with receipts, and with "settlement" replaces them by what was used and
writes a usage record. Everything is compared to one EVALSHA that counts four keys.

"reserve" leaves its holds open. With "settlement handed over" nobody waits for it, as in a guarded request.

`--litellm`: LiteLLM's hooks on the same server, by a Python that has `litellm[proxy]`; see `peers_litellm.sh`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
import limits
import limits.aio.storage
import limits.aio.strategies
import pyrate_limiter
import redis.asyncio
import uvloop
from benchmarks._evalsha import NAME, four_counters
from benchmarks._harness import compare_async, table
from benchmarks.redis import ACTUALS, SUBJECTS, Guarded, _record
from fastapi_limiter.depends import RateLimiter
from starlette.requests import Request
from starlette.responses import Response
from tests.servers import RedisServer

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Rule, Settlement, Unit, meter_key
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Sliding

MOST = 10**9
Operation = Callable[[], Awaitable[Any]]


def settled(guarded: Guarded) -> Operation:
    """A reserve, and its settlement waited for."""

    async def operation() -> None:
        call_id, receipts = await guarded.reserve()
        await guarded.storage.settle((Settlement(call_id, ACTUALS, _record(call_id), receipts),))

    return operation


def limited(storage: limits.aio.storage.RedisStorage, count: int) -> Operation:
    """`count` limits of the `limits` package, one after the other, by its cheapest strategy."""
    limiter = limits.aio.strategies.FixedWindowRateLimiter(storage)
    items = [limits.RateLimitItemPerMinute(MOST, n) for n in range(1, count + 1)]
    numbers = itertools.count()

    async def operation() -> None:
        user = f"user-{next(numbers) % SUBJECTS}"
        for item in items:
            assert await limiter.hit(item, user)

    return operation


def through_limits(storage: LimitsStorage, count: int) -> Operation:
    """The same number of limits by `LimitsStorage`, which looks at all of them before it takes one."""
    claims = []
    for n in range(SUBJECTS):
        windows = [Sliding(60_000 * each, 60) for each in range(1, count + 1)]
        claims.append(tuple(Claim(_rate(window, f"user-{n}"), 1) for window in windows))
    numbers = itertools.count()

    async def operation() -> None:
        number = next(numbers)
        call_id = f"call-{number}"
        answer = await storage.reserve("owner", ((Bundle(call_id, claims[number % SUBJECTS]),),))
        assert isinstance(answer, Granted)
        storage.settle((Settlement(call_id, ()),))

    return operation


def _rate(window: Sliding, user: str) -> Meter:
    return Meter(
        key=meter_key("rate", Unit.CALLS, window, user),
        policy="rate",
        scope="user",
        subject=user,
        unit=Unit.CALLS,
        rule=Rule.RATE,
        limit=MOST,
        window=window,
    )


async def depended(client: redis.asyncio.Redis) -> Operation:
    """The dependency of fastapi-limiter, called as FastAPI calls it, on an application of one route."""
    rates = [pyrate_limiter.Rate(MOST, pyrate_limiter.Duration.MINUTE)]
    bucket = await pyrate_limiter.RedisBucket.init(rates, client, "fastapi-limiter")
    limiter = RateLimiter(limiter=pyrate_limiter.Limiter(bucket))
    app = fastapi.FastAPI(openapi_url=None)

    @app.post("/chat", dependencies=[fastapi.Depends(limiter)])
    async def chat() -> None:
        """Is not called."""

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/chat",
        "headers": [],
        "app": app,
        "client": ("127.0.0.1", 1234),
        "query_string": b"",
    }

    async def operation() -> None:
        await limiter(Request(scope), Response())

    return operation


async def measure(server: RedisServer, rounds: int, operations: int) -> None:
    client = redis.asyncio.Redis.from_url(server.url, protocol=2, max_connections=100)
    pool = redis.asyncio.BlockingConnectionPool.from_url(server.url, protocol=2, max_connections=100)
    package = limits.aio.storage.RedisStorage(server.url, implementation="redispy", connection_pool=pool)  # type: ignore[arg-type]
    guarded = Guarded(RedisStorage(server.url, timeout_s=10, remember_refusals_ms=0))
    own = LimitsStorage(server.url, strategy="fixed", timeout_s=10)
    rows: dict[str, Operation] = {
        NAME: await four_counters(client),
        "**RedisStorage, six claims: reserve**": guarded.reserve,
        "**RedisStorage: reserve, settlement handed over**": guarded.cycle,
        "**RedisStorage: reserve, settlement waited for**": settled(guarded),
        "limits, 1 limit": limited(package, 1),
        "limits, 4 limits in turn": limited(package, 4),
        "LimitsStorage, 4 limits": through_limits(own, 4),
        "fastapi-limiter, 1 limit": await depended(client),
    }
    for operation in rows.values():
        for _ in range(20):
            await operation()
    for tasks in (1, 64):
        results = await compare_async(rows, operations=operations, tasks=tasks, rounds=rounds)
        print(table(results, title=f"{tasks} at a time: wall-clock time each") + "\n", flush=True)
    await guarded.storage.aclose()
    await own.aclose()
    await client.aclose()
    await pool.aclose()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    parser.add_argument("operations", nargs="?", type=int, default=320)
    parser.add_argument("--litellm", help="a Python that has litellm[proxy]")
    given = parser.parse_args()
    with RedisServer() as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(measure(server, given.rounds, given.operations))
        if given.litellm:
            command = [
                given.litellm,
                "-m",
                "benchmarks._litellm",
                str(server.port),
                str(given.rounds),
                str(given.operations),
            ]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
