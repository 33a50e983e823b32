"""What is granted under `durable=` is where the policy wants it, or it is not granted."""

from __future__ import annotations

import msgspec
import pytest
from tests.servers import OwnRedis, wait_until
from tests.storage.values import DAY_MS, ask, claim, level, meter, settle

from asgi_llm_guard.claims import Durable, Granted, Meter
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Rolling

pytestmark = pytest.mark.anyio


def money(durable: Durable | None) -> Meter:
    return msgspec.structs.replace(meter(Rolling(DAY_MS), 10), durable=durable)


async def test_a_replica_has_what_was_granted(own_redis: OwnRedis) -> None:
    """A claim on a `replica` meter counts as granted only when a replica has it; without one it is given back."""
    master = own_redis()
    replica = own_redis(replica_of=master)
    wait_until(lambda: b"state=online" in master.call("INFO", "replication"), "the replica")
    patient, storage = RedisStorage(master.url, timeout_s=20), RedisStorage(master.url, timeout_s=1)
    try:
        assert isinstance(await ask(patient, "a", claim(money("replica"), 3)), Granted)
        assert replica.call("DBSIZE") > 0
        replica.pause()
        with pytest.raises(StorageError, match="0 of 1"):
            await ask(storage, "b", claim(money("replica"), 3))
        await settle(storage, "b")  # what the engine does with what it cannot be sure of
        assert await level(storage, money(None)) == (0, 3)
        assert isinstance(await ask(storage, "c", claim(money(None), 3)), Granted)
    finally:
        replica.resume()
        await storage.aclose()
        await patient.aclose()


async def test_the_disk_has_what_was_granted(own_redis: OwnRedis) -> None:
    """A claim on a `disk` meter waits for the append-only file; where there is none it is not granted."""
    with_file = own_redis(program="valkey", appendonly=True)
    without = own_redis(program="valkey")
    kept, lost = RedisStorage(with_file.url, timeout_s=20), RedisStorage(without.url, timeout_s=1)
    try:
        assert isinstance(await ask(kept, "a", claim(money("disk"), 3)), Granted)
        with_file.kill()
        with_file.restart()
        assert await level(kept, money(None)) == (0, 3)
        with pytest.raises(StorageError):
            await ask(lost, "a", claim(money("disk"), 3))
    finally:
        await kept.aclose()
        await lost.aclose()
