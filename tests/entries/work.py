"""What worker processes do with entries; in a module of its own, because they import it anew."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

from asgi_llm_guard.storage.entries import Entries, Flights, Kept, Leading
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

KEYS = 30


def lead_or_follow(address: Path, number: int, pipe: Connection) -> None:
    """For each key: make the value, or take another process's; send which were made, and all values."""
    asyncio.run(_lead_or_follow(str(address), number, pipe))


async def _lead_or_follow(address: str, number: int, pipe: Connection) -> None:
    url, _, namespace = address.partition("#")
    storage: RedisStorage | SqliteStorage
    if namespace:
        storage = RedisStorage(url.replace(":/", "://", 1), namespace=namespace, timeout_s=10)
    else:
        storage = SqliteStorage(url, timeout_s=30)
    flights = Flights(storage.entries("cache"))
    await flights.entries.find("none")
    pipe.send("ready")
    pipe.recv()
    pipe.send(await asyncio.gather(*(_value(flights.entries, flights, f"k{n}", number) for n in range(KEYS))))
    await storage.aclose()


async def _value(entries: Entries, flights: Flights, key: str, number: int) -> tuple[bool, bytes]:
    token, value = f"{key}-{number}", f"{key} by {number}".encode()
    found = await flights.join(key, token, claim_ms=60_000, wait_s=60)
    if isinstance(found, Leading):
        assert await flights.store(key, token, value, ttl_ms=60_000)
        return True, value
    assert isinstance(found, Kept)
    return False, found.value
