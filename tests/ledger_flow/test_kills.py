"""Processes that drain are killed at any instant."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from typing import cast

import pytest
from tests.ledger_flow.kit import kept, record, write
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard.ledger import Ledger, UsageQuery
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.storage.redis import RedisStorage

pytestmark = pytest.mark.anyio


async def start(*arguments: str) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.ledger_flow.work", *arguments, stdout=asyncio.subprocess.PIPE
    )
    return process, cast("asyncio.StreamReader", process.stdout)


async def count(ledger: Ledger) -> int:
    return int(await ledger.database.read(lambda connection: connection.execute("SELECT count(*) FROM ledger")[0][0]))


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_killed_at_any_instant_every_record_is_in_the_ledger_once(
    database: str, tmp_path: object, request: pytest.FixtureRequest
) -> None:
    """C9, S7: two processes drain and roll up, are killed (SIGKILL) at random and started again, while records are written:
    the ledger has each one once, and its sums agree with them."""
    ledger_url = f"sqlite:///{tmp_path}/ledger.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    rng = random.Random(11)
    namespace = unique_namespace()
    storage = RedisStorage(shared_redis().url, namespace=namespace, timeout_s=10)
    ledger = Ledger.open(ledger_url)
    await ledger.prepare()
    written = left = 0
    for _ in range(4):
        started = [await start(shared_redis().url, namespace, ledger_url) for _ in range(2)]
        for _, said in started:
            assert await said.readline() == b"ready\n"
        await write(storage, map(record, range(written, written + 400)))
        written += 400
        taken = rng.randint(written - 400, written - 100)  # then there is some left to take when they are killed
        while await count(ledger) < taken:
            assert any(process.returncode is None for process, _ in started)
            await asyncio.sleep(0)
        for process, _ in started:
            process.send_signal(signal.SIGKILL)
        for process, _ in started:
            await process.communicate()
            assert process.returncode == -signal.SIGKILL
        left += written - await count(ledger)

    await Drain(storage, ledger).run()
    while await ledger.roll_up():
        pass

    assert left > 0
    assert await kept(ledger) == {f"call-{number}": 1_000 + number for number in range(written)}
    assert (await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52))).total.records == written
    assert (await ledger.reconcile(0, 2**52)).equal
    await storage.aclose()
    await ledger.aclose()
