"""T15: canaries in every key, secret, prompt and answer of a whole service are nowhere once it has been used."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.servers import RedisServer, unique_namespace
from tests.threats.canaries import PROMPT, SURFACES, Service, ask_everything, service

from asgi_llm_guard import Context
from asgi_llm_guard.storage.entries import Bounds, KeepsEntries, Leading

pytestmark = pytest.mark.anyio


async def hits(made: Service) -> dict[str, list[str]]:
    """Where which canaries were found, and what stands around the first."""
    found = {}
    for name, surface in SURFACES.items():
        text = await surface(made)
        canaries = made.found(text)
        if canaries:
            place = text.index(canaries[0])
            found[name] = [*canaries, text[max(0, place - 200) : place + 200]]
    return found


async def test_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T15: after 1,000 requests of every kind no secret, prompt or answer is in a log, span, metric, table, file, export,
    error, page or command."""
    async with service(tmp_path, monkeypatch.setenv) as made:
        await ask_everything(made, 1_000)
        await made.guard.chores.run("alerts")
        assert await hits(made) == {}

        # It was used, and what was searched is what it says.
        assert {200, 400, 403, 429, 502} <= made.statuses.keys()
        assert made.provider.calls > 300
        assert "POST /hooks" in made.provider.others
        assert {record.outcome for record in await made.guard.storage.records()} >= {
            "measured", "estimated", "unmetered", "unknown", "provider_error",
        }  # fmt: skip
        texts = {name: await surface(made) for name, surface in SURFACES.items()}
        for name, sign in SIGNS.items():
            assert sign in texts[name], name
        assert SURFACES.keys() - SIGNS.keys() == {"server"}
    assert made.found(await asyncio.to_thread(read_all, tmp_path, "guard.db*")) == []


def read_all(folder: Path, names: str) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in folder.glob(names))


SIGNS = {
    "logs": '"code":"credentials_invalid"',
    "spans": "llm_guard.caller.hash",
    "metrics": "llm_guard_decisions_total",
    "error bodies and heads": "Incorrect API key provided: ***",
    "files": "caller-3",
    "tables": "caller-3",
    "export": "caller-3",
    "records": "caller-3",
    "state": "<Quota 'quota'>",
    "probes": '"storage":"ok"',
    "models": "gpt-4o-mini",
    "usage pages": "caller-1",
    "administration pages": "caller-",
    "commands": "caller-",
}
"""Something that each surface has if it is what it is taken for."""


async def test_nothing_is_found_on_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    """T15: the same where Redis counts and a file of its own is the ledger: nothing is in any key of the server."""
    namespace = unique_namespace()

    def dump() -> str:
        return "\n".join(str(value_of(redis_server, key)) for key in redis_server.call("KEYS", f"*{namespace}*"))

    url = f"{redis_server.url}?namespace={namespace}&timeout=10"
    async with service(tmp_path, monkeypatch.setenv, storage=url, dump=dump) as made:
        await ask_everything(made, 300)
        await made.guard.chores.run("drain")
        assert await hits(made) == {}
        assert "caller-3" in await SURFACES["server"](made)
        assert "caller-3" in await SURFACES["tables"](made)


def value_of(server: RedisServer, key: bytes) -> Any:
    """A key and all that it holds."""
    read = {
        b"none": ("GET", key),  # it was over since it was listed
        b"string": ("GET", key),
        b"hash": ("HGETALL", key),
        b"list": ("LRANGE", key, 0, -1),
        b"set": ("SMEMBERS", key),
        b"zset": ("ZRANGE", key, 0, -1),
        b"stream": ("XRANGE", key, "-", "+"),
    }
    kind = server.call("TYPE", key)
    return key, server.call(*read[kind.encode() if isinstance(kind, str) else kind])


async def test_answers_are_in_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T15, C12: with a cache, answers are where the cache keeps them and nowhere else; keys are not even there."""
    async with service(tmp_path, monkeypatch.setenv, cached=True) as made:
        await ask_everything(made, 300)
        assert "cached" in {record.outcome for record in await made.guard.storage.records()}
        assert await hits(made) == {}
    kept = await asyncio.to_thread(read_all, tmp_path, "answers.db*")
    assert made.found(kept) == [PROMPT]


def by_a_log(made: Service) -> None:
    logging.getLogger("asgi_llm_guard").debug("the key was %s", made.keys[3])


def by_a_traceback(made: Service) -> None:
    try:
        int(made.keys[3])
    except ValueError:
        logging.getLogger("asgi_llm_guard.storage").exception("a callback failed")


def by_a_span(made: Service) -> None:
    made.tracers.get_tracer("leak").start_span(f"llm_guard.call {PROMPT}").end()


def by_a_metric(made: Service) -> None:
    made.meters.get_meter("leak").create_counter("leak").add(1, {"user": made.keys[3]})


def by_an_error(made: Service) -> None:
    made.errors.append(f"401 {made.keys[3]}")


LEAKS: dict[Callable[[Service], None], str] = {
    by_a_log: "logs",
    by_a_traceback: "logs",
    by_a_span: "spans",
    by_a_metric: "metrics",
    by_an_error: "error bodies and heads",
}


async def test_leaks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T15: a key or a prompt that is let out on purpose is found where it was let out, and only there."""
    async with service(tmp_path, monkeypatch.setenv) as made:
        let_out = set()
        for leak, where in LEAKS.items():
            leak(made)
            await ask_everything(made, 4)
            let_out.add(where)
            assert (await hits(made)).keys() == let_out, leak.__name__


async def test_leaks_into_the_storage_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T15: a prompt in a record, and an answer in an entry, are found in the tables, the files and the export."""
    async with service(tmp_path, monkeypatch.setenv) as made:
        described = made.guard.call(model="openai/gpt-4o-mini", input_tokens=1, max_output_tokens=1)
        async with made.guard.open(Context(caller="caller-3", tags=(PROMPT,))), described as call:
            call.dispatched()
        assert {"tables", "files", "export", "records"} <= (await hits(made)).keys()
    (tmp_path / "other").mkdir()
    async with service(tmp_path / "other", monkeypatch.setenv) as made:
        assert isinstance(made.guard.storage, KeepsEntries)
        entries = made.guard.storage.entries("leak", Bounds(max_value_bytes=99, max_bytes=999, max_entries=9))
        assert isinstance(await entries.begin("key", "token", claim_ms=1_000), Leading)
        await entries.store("key", "token", PROMPT.encode(), ttl_ms=60_000)
        assert {"tables", "files"} <= (await hits(made)).keys()
