"""What a failover to an asynchronous replica loses: admissions that were answered, and that the replica has never seen.

    python -m benchmarks.failover [rounds] [milliseconds that the replica lags]

32 tasks reserve one unit each of one budget, as fast as it goes. In the middle the primary is killed, and the replica
made the primary. Lost is what was granted and is not held there. With `durable="replica"` each grant waits for the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import sys
import threading
import time

import msgspec
from tests.servers import RedisServer, wait_until

from asgi_llm_guard.claims import Bundle, Claim, Durable, Granted, Meter, Rule, Unit, meter_key
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Rolling

TASKS = 32
BEFORE_S = 1.0
DAY = Rolling(86_400_000)
BUDGET = Meter(
    key=meter_key("budget", Unit.CALLS, DAY, "global"),
    policy="budget",
    scope="global",
    subject="",
    unit=Unit.CALLS,
    rule=Rule.BUDGET,
    limit=10**9,
    window=DAY,
)


class Lag:
    """Passes bytes on between a replica and its primary, those to the replica some time later."""

    def __init__(self, primary: RedisServer, lag_s: float) -> None:
        self.primary = primary
        self.lag_s = lag_s
        self.port = 0
        self._ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._ready.wait()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await server.serve_forever()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_primary, to_primary = await asyncio.open_connection(self.primary.host, self.primary.port)
        except OSError:  # it is dead, and the replica asks for it
            writer.close()
            return
        loop = asyncio.get_running_loop()

        async def back() -> None:
            while data := await reader.read(65_536):
                to_primary.write(data)

        passing = asyncio.create_task(back())
        with contextlib.suppress(OSError):
            while data := await from_primary.read(65_536):
                loop.call_later(self.lag_s, _write, writer, data)
        # What is still on its way when the primary dies is lost, as it is in a network.
        writer.close()
        passing.cancel()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)


async def fail_over(lag_ms: int, durable: Durable | None) -> tuple[int, float, int]:
    """How many grants were answered, how many of them each second, and how many of them were lost."""
    meter = msgspec.structs.replace(BUDGET, durable=durable)
    with RedisServer() as primary:
        lag = Lag(primary, lag_ms / 1000)
        with RedisServer(config=[f"replicaof 127.0.0.1 {lag.port}"]) as replica:
            wait_until(lambda: b"state=online" in primary.call("INFO", "replication"), "the replica")
            storage = RedisStorage(primary.url, timeout_s=1.0)
            granted, numbers, over = 0, itertools.count(), False

            async def work() -> None:
                nonlocal granted
                while not over:
                    bundle = Bundle(f"owner-{next(numbers)}", (Claim(meter, 1),))
                    with contextlib.suppress(StorageError):
                        answer = await storage.reserve("owner", ((bundle,),))
                        granted += isinstance(answer, Granted)

            begun = time.perf_counter()
            tasks = [asyncio.create_task(work()) for _ in range(TASKS)]
            await asyncio.sleep(BEFORE_S)
            primary.kill()
            over = True
            rate = granted / (time.perf_counter() - begun)
            await asyncio.gather(*tasks)
            replica.call("REPLICAOF", "NO", "ONE")
            heir = RedisStorage(replica.url, timeout_s=1.0)
            (reading,) = await heir.read((BUDGET,))
            await heir.aclose()
            with contextlib.suppress(StorageError):
                await storage.aclose()
            return granted, rate, max(0, granted - reading.held)


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:]]
    rounds, lag_ms = (*numbers, *(5, 20)[len(numbers) :])
    print(f"the replica lags {lag_ms} ms, {TASKS} tasks, {rounds} rounds\n")
    print("| a grant waits for | granted each second, median | lost, median | min … max |\n|---|---|---|---|")
    cases: tuple[tuple[str, Durable | None], ...] = (("the primary", None), ("a replica", "replica"))
    for name, durable in cases:
        results = [asyncio.run(fail_over(lag_ms, durable)) for _ in range(rounds)]
        lost = [missing for _, _, missing in results]
        rate = statistics.median(rate for _, rate, _ in results)
        print(f"| {name} | {rate:,.0f} | {statistics.median(lost):,.0f} | {min(lost)} … {max(lost)} |")


if __name__ == "__main__":
    main()
