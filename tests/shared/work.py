"""What worker processes do with what they share; in a module of its own, because they import it anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.shared.kit import Sharing
from tests.storage.sqlite_kit import draft, money, plan

from asgi_llm_guard.claims import Claim, Settlement
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.redis_shards import open_redis
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

MARKS = 60
VERSIONS = 40
COUNTS = 50
LONG_MS = 40 * 86_400_000
HOUR = 1_800_000_000_000 - 1_800_000_000_000 % 3_600_000


def open_store(address: str) -> Sharing:
    """A SQLite file, or the URL of a Redis and a namespace behind `#`."""
    url, _, namespace = address.partition("#")
    if not namespace:
        return SqliteStorage(url, timeout_s=30)
    url = url.replace(":/", "://", 1)
    if "shard_by" in url:
        sharded = open_redis(f"{url}&namespace={namespace}", clock=None)
        assert isinstance(sharded, ShardedStorage)
        return sharded
    return RedisStorage(url, namespace=namespace, timeout_s=10)


def race(address: Path, number: int, pipe: Connection) -> None:
    """Mark, publish and count with all others; send which marks were this process's."""
    asyncio.run(_work(address, pipe, lambda store: _race(store, number)))


def hold(address: Path, number: int, pipe: Connection) -> None:
    """Hold one call and settle another; stay until told to go."""

    async def work(store: Sharing) -> None:
        for call_id in (f"open-{number}", f"settled-{number}"):
            await store.reserve(
                f"p{number}", [plan(call_id, Claim(money(), 7), record=draft(call_id, user=f"u{number}"))]
            )
        await store.settle((Settlement(f"settled-{number}", (5,), draft(f"settled-{number}", cost_nanousd=5)),))
        pipe.send("held")
        await asyncio.to_thread(pipe.recv)

    asyncio.run(_work(address, pipe, work))


async def _work(address: Path, pipe: Connection, work: Callable[[Sharing], Coroutine[Any, Any, object]]) -> None:
    store = open_store(str(address))
    await store.shared().document("none")
    pipe.send("ready")
    pipe.recv()
    pipe.send(await work(store))
    await store.aclose()


async def _race(store: Sharing, number: int) -> list[int]:
    shared = store.shared()
    until_ms = 1 << 50

    async def publish() -> None:
        for version in range(number + 1, 4 * VERSIONS + 1, 4):
            kept = await shared.publish("control", version, str(version).encode())
            found = await shared.document("control")
            assert found is not None
            assert found.version >= version if kept else found.version > version

    async def count() -> None:
        for n in range(COUNTS):
            await shared.tally("refusals", HOUR, {"all": 1, f"{number}-{n}": 2}, most=100)

    won, *_ = await asyncio.gather(
        asyncio.gather(*(shared.mark(f"m{n}", until_ms=until_ms) for n in range(MARKS))), publish(), count()
    )
    return [n for n, mine in enumerate(won) if mine]
