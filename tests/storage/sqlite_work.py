"""What worker processes of the SQLite tests do. In a file of its own, for new interpreters import it."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

from tests.storage.sqlite_kit import CENT, draft, granted, money, slots, take

from asgi_llm_guard.claims import Bundle, Claim, Settlement
from asgi_llm_guard.storage.sqlite import SqliteStorage


def spend_dimes(path: Path, number: int, pipe: Connection) -> None:
    """25 times $0.10 at once; answers how many were granted."""

    async def main() -> None:
        storage = SqliteStorage(path)
        await storage.open_holds()
        pipe.send("ready")
        pipe.recv()
        pipe.send(await granted([take(storage, f"{number}-{n}", Claim(money(), 10 * CENT)) for n in range(25)]))
        await storage.aclose()

    asyncio.run(main())


def take_slots(path: Path, number: int, pipe: Connection) -> None:
    """Five slots at once; answers how many were granted, and keeps them."""

    async def main() -> None:
        storage = SqliteStorage(path)
        await storage.open_holds()
        pipe.send("ready")
        pipe.recv()
        pipe.send(await granted([take(storage, f"{number}-{n}", Claim(slots(10), 1)) for n in range(5)]))
        pipe.recv()
        await storage.aclose()

    asyncio.run(main())


def first_calls(path: Path, number: int, pipe: Connection) -> None:
    """50 first calls on a scope that nobody has used before, at once; answers how many were granted."""

    async def main() -> None:
        storage = SqliteStorage(path)
        await storage.open_holds()
        pipe.send("ready")
        subject = pipe.recv()
        meter = money(10 * CENT, subject)
        pipe.send(await granted([take(storage, f"{subject}-{number}-{n}", Claim(meter, CENT)) for n in range(50)]))
        await storage.aclose()

    asyncio.run(main())


def hold_fifty(path: Path, number: int, pipe: Connection) -> None:
    """Settle ten calls and hold fifty more, then wait to be killed."""

    async def main() -> None:
        storage = SqliteStorage(path)
        for n in range(60):
            await take(storage, f"call-{n}", Claim(money(None), 10 * CENT), Claim(slots(60), 1), owner="victim")
        done = [Settlement(f"call-{n}", (CENT, 1), draft(f"call-{n}", cost_nanousd=CENT)) for n in range(10)]
        await storage.settle(done)
        pipe.send("ready")
        pipe.recv()

    asyncio.run(main())


def settle_endlessly(path: Path, number: int, pipe: Connection) -> None:
    """Reserve and settle, 16 at a time, and report each settlement once it is acknowledged; until killed."""

    async def task(storage: SqliteStorage, which: int) -> None:
        n = 0
        while True:
            call_id = f"{number}-{which}-{n}"
            bundle = Bundle(call_id, (Claim(money(None), 10 * CENT),), draft(call_id))
            await storage.reserve(f"owner-{number}", [[bundle]])
            await storage.settle([Settlement(call_id, (CENT,), draft(call_id, cost_nanousd=CENT))])
            pipe.send(call_id)
            n += 1

    async def main() -> None:
        storage = SqliteStorage(path)
        await storage.open_holds()
        pipe.send("ready")
        await asyncio.gather(*[task(storage, which) for which in range(16)])

    asyncio.run(main())
