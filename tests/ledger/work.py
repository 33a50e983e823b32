"""A process that rolls up: `python -m tests.ledger.work URL`. Says a line after each step, until there is nothing left."""

from __future__ import annotations

import asyncio
import sys

from asgi_llm_guard.ledger import Ledger


async def work(url: str) -> None:
    ledger = Ledger.open(url)
    while count := await ledger.roll_up(at_most=40):
        print(count, flush=True)  # noqa: T201 - it is what the test reads
    await ledger.aclose()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]))
