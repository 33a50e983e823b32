"""A drain while Sentinels put a replica in the master's place."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from tests.ledger_flow.kit import kept, record, write
from tests.servers import RedisSentinel, unique_namespace, wait_until

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.drain import Drain, Drained
from asgi_llm_guard.storage.redis import RedisStorage

pytestmark = pytest.mark.anyio


async def test_a_failover_neither_loses_nor_doubles_what_the_replica_has() -> None:
    """The master is killed between two steps: what the replica had received and was not drained is drained from there, what
    was drained is not counted again, and what comes after is not passed over."""
    with RedisSentinel() as servers:
        namespace = unique_namespace()
        storage = RedisStorage(servers.url, namespace=namespace, timeout_s=5)
        ledger = Ledger.open("sqlite://:memory:")
        drain = Drain(storage, ledger, batch=30)
        await write(storage, map(record, range(100)))
        first = await drain.step()
        replica = next(node for node in servers.nodes if node is not servers.master)
        key = f"llmguard1:{{{namespace}}}:l"
        await asyncio.to_thread(
            wait_until, lambda: replica.call("XLEN", key) == 100, "the replica has what was written"
        )
        old = servers.kill_master()
        await asyncio.to_thread(servers.wait_promoted, old)

        done = Drained()
        while done.records < 70:
            with contextlib.suppress(StorageError):
                done += await drain.step()
            await asyncio.sleep(0)
        await write(storage, map(record, range(100, 130)))
        last = await drain.run()

        assert (first.records, done.records, last.records) == (30, 70, 30)
        assert (done.anew, last.anew, done.lost + last.lost) == (0, 0, 0)
        assert await kept(ledger) == {f"call-{number}": 1_000 + number for number in range(130)}
        await storage.aclose()
        await ledger.aclose()
