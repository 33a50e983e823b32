"""A process that drains until it is killed: `python -m tests.ledger_flow.work REDIS_URL NAMESPACE LEDGER_URL`.

It writes a line after each step that took something, so that whoever kills it can choose an instant.
"""

from __future__ import annotations

import asyncio
import sys

from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.storage.redis import RedisStorage


async def main(url: str, namespace: str, ledger_url: str) -> None:
    storage = RedisStorage(url, namespace=namespace, timeout_s=10)
    ledger = Ledger.open(ledger_url)
    drain = Drain(storage, ledger, batch=25)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        step = await drain.step()
        await ledger.roll_up(at_most=20)
        if step.records:
            sys.stdout.write(f"{step.records}\n")
            sys.stdout.flush()
        elif not step.behind:
            await asyncio.sleep(0.001)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
