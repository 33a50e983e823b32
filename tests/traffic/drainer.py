"""A process that drains a storage into a ledger and rolls up, until it is told to stop or killed: `python -m tests.traffic.drainer`."""

from __future__ import annotations

import asyncio
import sys

from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.storage import open_storage


async def main(storage_url: str, ledger_url: str) -> None:
    """Until the standard input ends."""
    loop = asyncio.get_running_loop()
    ended = loop.run_in_executor(None, sys.stdin.buffer.read)
    storage = open_storage(storage_url, clock=SystemClock())
    ledger = Ledger.open(ledger_url)
    drain = Drain(storage, ledger, batch=200)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not ended.done():
        done = await drain.step()
        rolled = await ledger.roll_up(at_most=500)
        if not (done.behind or rolled):
            await asyncio.sleep(0.01)
    await ledger.aclose()
    await storage.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
