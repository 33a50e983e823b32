"""Backup and restore, and from one kind of store to another, without losing a nano-dollar."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.ledger_flow.kit import CAP, admit, kept, record, settle, write
from tests.servers import shared_redis, unique_namespace
from tests.storage.values import START

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.storage.export import read_line
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.migrate import copy_storage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


async def test_a_store_moves_to_redis_and_back_with_its_totals(tmp_path: Path) -> None:
    """S19: SQLite to Redis to SQLite: the checksums of counters, holds and records agree at each step, what is open is
    settled at the end of the journey, and a ledger that drains on the way has every record once."""
    clock = FrozenClock(START)
    first = SqliteStorage(tmp_path / "first.db", clock=clock)
    between = RedisStorage(shared_redis().url, namespace=unique_namespace(), clock=clock, timeout_s=10)
    last = SqliteStorage(tmp_path / "last.db", clock=clock)
    ledger = Ledger.open("sqlite://:memory:")
    await write(first, map(record, range(300)))
    await admit(first, 1_000)
    await admit(first, 1_001)
    await settle(first, 1_001, 77)

    there = await copy_storage(first, between)
    await Drain(between, ledger).run()
    back = await copy_storage(between, last)
    status = await settle(last, 1_000, 55)

    assert there == back
    assert (there.records, there.holds, there.cost_nanousd) == (301, 1, sum(1_000 + n for n in range(300)) + 77)
    assert await kept(ledger) == {**{f"call-{n}": 1_000 + n for n in range(300)}, "call-1001": 77}
    assert (status, (await last.read([CAP]))[0].used) == ("settled", 77 + 55)
    assert len(await last.records()) == 302
    await first.aclose()
    await between.aclose()
    await last.aclose()
    await ledger.aclose()


async def test_a_backup_names_its_schema_and_a_changed_one_is_refused() -> None:
    """S19: a backup says which schema it has; one of another schema, or one that was changed, is not restored at all."""
    storage = MemoryStorage()
    await write(storage, map(record, range(5)))
    lines = [line async for line in storage.export()]
    header = read_line(lines[0]).export
    changed = [line.replace(b'"cost_nanousd":1003', b'"cost_nanousd":1004') for line in lines]
    newer = [lines[0].replace(b'"schema":1', b'"schema":99'), *lines[1:]]

    assert header is not None
    assert header.schema == 1
    assert changed != lines
    for wrong, said in ((changed, "cost_nanousd"), (newer, "expected an export of schema 1, got schema 99")):
        target = MemoryStorage()
        with pytest.raises(StorageError, match=said):
            await target.load(wrong)
        assert await target.records() == []
