"""Documents, tallies, marks and open calls between processes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.servers import RedisServer
from tests.shared.work import COUNTS, HOUR, MARKS, VERSIONS, hold, open_store, race
from tests.storage.sqlite_kit import draft, workers

from asgi_llm_guard.storage.shared import OTHER, Document, OpenCall, Tally

KINDS = ["sqlite", "redis", "sharded"]


def address_of(kind: str, folder: Path, server: RedisServer, namespace: str) -> Path:
    if kind == "sqlite":
        return folder / "guard.db"
    return Path(f"{server.url}{'?shard_by=caller&shards=4' if kind == 'sharded' else ''}#{namespace}")


@pytest.mark.parametrize("kind", KINDS)
def test_processes_race(kind: str, tmp_path: Path, redis_server: RedisServer, namespace: str) -> None:
    """Over four processes each mark has exactly one winner, the highest version stays, and counts are exact and bounded."""
    address = address_of(kind, tmp_path, redis_server, namespace)
    with workers(4, race, address) as started:
        for _, pipe in started:
            pipe.send("go")
        won = [pipe.recv() for _, pipe in started]
    assert sorted(n for of in won for n in of) == list(range(MARKS))

    async def look() -> tuple[Document | None, list[Tally]]:
        store = open_store(str(address))
        found = await store.shared().document("control"), list(await store.shared().tallies("refusals", HOUR))
        await store.aclose()
        return found

    document, tallies = asyncio.run(look())
    assert document == Document(4 * VERSIONS, str(4 * VERSIONS).encode())
    counts = {tally.key: tally.count for tally in tallies}
    assert counts["all"] == 4 * COUNTS
    assert len(counts) == 101
    assert sum(counts.values()) == 3 * 4 * COUNTS
    assert counts[OTHER] == 2 * (4 * COUNTS - 99)


@pytest.mark.parametrize("kind", KINDS)
def test_open_calls_of_all_processes(kind: str, tmp_path: Path, redis_server: RedisServer, namespace: str) -> None:
    """The open calls of all processes are there with their drafts, and nothing that was settled."""
    address = address_of(kind, tmp_path, redis_server, namespace)
    with workers(3, hold, address) as started:
        for _, pipe in started:
            pipe.send("go")
        assert [pipe.recv() for _, pipe in started] == ["held"] * 3

        async def look() -> list[OpenCall]:
            store = open_store(str(address))
            found = list(await store.open_calls())
            await store.aclose()
            return found

        calls = {call.call_id: call for call in asyncio.run(look())}
        assert sorted(calls) == ["open-0", "open-1", "open-2"]
        for n in range(3):
            call = calls[f"open-{n}"]
            assert (call.owner, call.draft) == (f"p{n}", draft(f"open-{n}", user=f"u{n}"))
            assert [hold.amount for hold in call.held] == [7]
            assert abs(call.at_ms - time.time() * 1000) < 120_000
