"""Floods: of session ids, of deep and long bodies, of headers. What is kept stays bounded, and nobody else is hurt."""

from __future__ import annotations

import json
import logging
import resource
import secrets
import time
from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace
from tests.middleware.asgi import App, request
from tests.middleware.values import ASK, CHAT, Provider, ask, guarded, new_guard

from asgi_llm_guard import Context, Guard, Iterations
from asgi_llm_guard.identity import TrustedHeaders
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

IDENTITY = TrustedHeaders(trust_headers=True, caller="x-user")


async def call(app: App, session: str, user: str | None = None) -> int:
    """The status of one call in a session."""
    headers = [(b"x-session-id", session.encode())]
    if user is not None:
        headers.append((b"x-user", user.encode()))
    return (await request("/agents", headers=headers).run(app)).status


async def kept(storage: Storage) -> int:
    """How many things the storage keeps, records of calls that were made left out."""
    return sum([json.loads(line).get("kind") != "record" async for line in storage.export()])


async def flood(app: App, number: int, user: str | None) -> Counter[int]:
    statuses: Counter[int] = Counter()
    for _ in range(number):
        statuses[await call(app, secrets.token_hex(16), user)] += 1
    return statuses


@pytest.mark.parametrize("user", ["mallory", None], ids=["verified", "anonymous"])
async def test_random_session_ids(storage: Storage, user: str | None) -> None:
    """T9: a flood of random ids leaves a bounded number of things in the storage, and who was blocked stays blocked."""
    number = 20_000 if isinstance(storage, MemoryStorage) else 1_500
    guard = new_guard(Iterations(1), storage=storage, identity=IDENTITY, session_limit=200, anonymous_session_limit=200)
    app = guarded(Provider([b"{}"]), guard)
    for name in (user, "victim"):
        assert [await call(app, "loop", name) for _ in range(2)] == [200, 429]
    statuses = await flood(app, number, user)

    assert statuses == {200: 199, 429: number - 199}
    assert [await call(app, "loop", name) for name in (user, "victim")] == [429, 429]
    assert await call(app, "fresh", "victim") == 200
    assert await kept(storage) < 3_000
    assert await storage.open_holds() == 0


@pytest.mark.slow
async def test_million_session_ids() -> None:
    """T9: after the first ten thousand ids, a million more take no memory, and who was blocked stays blocked."""
    guard = new_guard(Iterations(1))
    context = Context(caller="mallory")

    async def admitted(session: str) -> bool:
        admission = guard.new_admission(replace(context, session=session), opaque=True)
        denied = await admission.open(None)
        await admission.end()
        return denied is None

    assert await admitted("loop")
    assert sum([await admitted(secrets.token_hex(16)) for _ in range(20_000)]) == 9_999
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1_000_000):
        assert not await admitted(secrets.token_hex(16))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # KB, on Linux
    assert not await admitted("loop")


async def test_full_table_denies_only_the_new(storage: Storage) -> None:
    """T10: with a caller's table full, its known sessions go on, new ones are refused, and other callers notice nothing."""
    guard = new_guard(Iterations(3), storage=storage, identity=IDENTITY, session_limit=5)
    app = guarded(Provider([b"{}"]), guard)
    assert [await call(app, f"s{number}", "mallory") for number in range(7)] == [200] * 5 + [429] * 2
    assert [await call(app, f"s{number}", "mallory") for number in range(5)] == [200] * 5
    assert [await call(app, f"s{number}", "alice") for number in range(5)] == [200] * 5

    headers = [(b"x-session-id", b"new"), (b"x-user", b"mallory")]
    exchange = await request("/agents", headers=headers).run(app)
    assert exchange.json["code"] == "session_overflow"
    assert exchange.headers["x-should-retry"] == "false"


async def test_full_table_shares_one_pool(storage: Storage) -> None:
    """T10: with `session_overflow="share"` all new sessions of that caller have one session's limit between them."""
    guard = new_guard(Iterations(3), storage=storage, identity=IDENTITY, session_limit=5, session_overflow="share")
    app = guarded(Provider([b"{}"]), guard)
    assert [await call(app, f"s{number}", "mallory") for number in range(5)] == [200] * 5
    statuses = await flood(app, 20, "mallory")
    assert statuses == {200: 3, 429: 17}
    assert [await call(app, f"s{number}", "mallory") for number in range(5)] == [200] * 5
    assert await call(app, "any", "alice") == 200


async def test_table_forgets(storage: Storage) -> None:
    """T10: an id that is not seen for `session_ttl` makes room for a new one."""
    clock = FrozenClock()
    guard = new_guard(
        Iterations(3, ttl="1h"), storage=MemoryStorage(clock=clock), clock=clock, session_limit=2, session_ttl="2h"
    )
    guard = Guard(
        guard.policies, storage=guard.storage, clock=clock, anonymous_session_limit=2, session_ttl="2h", hold_wait_s=0
    )
    app = guarded(Provider([b"{}"]), guard)
    assert [await call(app, name) for name in ("a", "b", "c")] == [200, 200, 429]
    clock.advance(seconds=2 * 3600 + 1)
    assert [await call(app, name) for name in ("c", "a", "b")] == [200, 200, 429]


# ------------------------------------------------------------------------------------ T16


@pytest.mark.parametrize(
    "value", [b"a\r\nX: y", b"a\nb", b"a\x00b", b"a\x1b[31mb", b"\x7f", "a\u202eb".encode(), b"\xff\xfe"]
)
@pytest.mark.parametrize("place", ["header", "body"])
async def test_injected_ids(value: bytes, place: str, caplog: pytest.LogCaptureFixture) -> None:
    """T16: an id that could break out of a header or a log line is a 400; nothing of it is sent back or logged."""
    caplog.set_level(logging.DEBUG)
    provider = Provider()
    app = guarded(provider, new_guard(Iterations(1)))
    canary = b"canary" + value
    if place == "header":
        exchange = await ask(app, headers=[(b"x-session-id", canary)], session=False)
    else:
        text = canary.decode("utf-8", "surrogateescape")
        exchange = await ask(app, {**ASK, "metadata": {"session_id": text}}, session=False)
    assert exchange.status == 400
    assert provider.bodies == []
    for name, sent in exchange.sent[0]["headers"]:
        assert b"canary" not in name + sent
        assert not {b"\r"[0], b"\n"[0]} & set(name + sent)
    assert b"canary" not in exchange.body
    assert not [record for record in caplog.records if "canary" in record.getMessage()]
    assert len([record for record in caplog.records if record.name == "asgi_llm_guard"]) <= 1


# ------------------------------------------------------------------------------------ T17


def cpu_s(started: float) -> float:
    return time.process_time() - started


DEPTH = 100_000
BOMBS: dict[str, tuple[bytes, int]] = {
    "lists": (b'{"model":"openai/test-model","messages":' + b"[" * DEPTH + b"]" * DEPTH + b"}", 400),
    "objects": (b'{"model":"openai/test-model","metadata":' + b'{"a":' * DEPTH + b"1" + b"}" * DEPTH + b"}", 400),
    "unfinished": (b"[" * DEPTH, 400),
    "keys": (b"{" + b",".join(b'"k%d":1' % number for number in range(DEPTH)) + b"}", 400),
    "number": (b'{"model":"openai/test-model","max_tokens":' + b"9" * DEPTH + b"}", 400),
    "escapes": (b'{"model":"' + b"\\u0041" * DEPTH + b'"}', 400),
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_json_bombs(bomb: str) -> None:
    """T17: JSON that is deep, wide or long to no purpose is a 400, in linear time and without a crash."""
    body, status = BOMBS[bomb]
    provider = Provider()
    app = guarded(provider, new_guard(Iterations(5)))
    spent = []
    for _ in range(5):
        started = time.process_time()
        exchange = await ask(app, body)
        spent.append(cpu_s(started))
        assert exchange.status == status
    assert provider.bodies == []
    assert min(spent) < 1


async def test_body_of_fifty_megabytes() -> None:
    """T17: fifty megabytes are a 413 as soon as the limit is passed; the rest is never read."""
    piece = b"x" * 64 * 1024
    started = time.process_time()
    exchange = await request(CHAT, body=[piece] * 800).run(guarded(Provider(), new_guard()))
    assert (exchange.status, exchange.json["error"]["code"]) == (413, "body_too_large")
    assert exchange.received == 129
    assert cpu_s(started) < 5


async def test_body_of_fifty_megabytes_where_none_is_read() -> None:
    """T17: a route whose body the guard does not read passes it on piece by piece."""
    pieces = [b"x" * 64 * 1024] * 800
    seen = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal seen
        for piece in pieces:
            message = await receive()
            assert message["body"] is piece
            seen += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    await request("/upload", body=pieces).run(guarded(app, new_guard(Iterations(1))))
    assert seen == 800


@pytest.mark.parametrize(
    "name, status", [(b"x-session-id", 400), (b"baggage", 200), (b"x-request-id", 200), (b"accept", 200)]
)
async def test_long_headers(name: bytes, status: int) -> None:
    """T17: a header of 64 KB is refused where it is an id and ignored elsewhere, in linear time."""
    app = guarded(Provider(), new_guard(Iterations(5)))
    started = time.process_time()
    exchange = await ask(app, headers=[(name, b"a,=;" * 16 * 1024)], session=False)
    assert exchange.status == status
    assert cpu_s(started) < 1
