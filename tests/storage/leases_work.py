"""What worker processes of the tests of leases do. In a file of its own, for new interpreters import it."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec
from tests.storage.sqlite_kit import CENT, money, plan

from asgi_llm_guard.claims import Claim, Granted, Meter, Settlement
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

LEASE: Final = 20 * CENT
CALLS: Final = 1_500
"""How many calls there is money for."""


def hot() -> Meter:
    return msgspec.structs.replace(money(CALLS * CENT), lease=LEASE)


def spend_cents(path: Path, number: int, pipe: Connection) -> None:
    """Spend $0.01 a time, 8 at a time, and say so before each is settled; until refused, or killed."""

    async def task(storage: LeasingStorage, which: int) -> None:
        n = 0
        while True:
            call_id = f"{number}-{which}-{n}"
            answer = await storage.reserve(f"owner-{number}", (plan(call_id, Claim(hot(), CENT)),))
            if not isinstance(answer, Granted):
                return
            pipe.send(call_id)
            await asyncio.sleep(0.001)
            storage.settle([Settlement(call_id, (CENT,))])
            n += 1

    async def main() -> None:
        storage = LeasingStorage(SqliteStorage(path), workers=4)
        await storage.open_holds()
        pipe.send("ready")
        pipe.recv()
        await asyncio.gather(*[task(storage, which) for which in range(8)])
        await storage.retire(f"owner-{number}")
        await storage.aclose()
        pipe.send("done")

    asyncio.run(main())
