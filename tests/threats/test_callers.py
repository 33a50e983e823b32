"""Callers who want more than their share: by other names, other addresses, fresh sessions, or all at once."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from typing import Any

import pytest
from tests.decorator.values import USED, ledger
from tests.middleware.asgi import request
from tests.middleware.values import ASK, Provider, ask, guarded, new_guard

from asgi_llm_guard import Budget, Iterations, RateLimit
from asgi_llm_guard.identity import ApiKeys, PeerAddress, TrustedHeaders
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import Gate

pytestmark = pytest.mark.anyio

SECRET = "a pepper that is long enough"
HOLD = 400_000
"""More than any call here is held for, in nano-USD."""


def usd(nanousd: int) -> str:
    return f"${nanousd / 10**9:.9f}"


async def test_invented_users(storage: Storage) -> None:
    """T1: 1,000 calls with one credential and random user ids cost what that credential may, in its own name."""
    key, record = ApiKeys.generate("team-a", secret=SECRET)
    cap = 5 * USED + HOLD
    guard = new_guard(Budget(f"{usd(cap)}/1d", per="user"), storage=storage, identity=ApiKeys([record], secret=SECRET))
    provider = Provider()
    app = guarded(provider, guard)
    statuses: Counter[int] = Counter()
    for number in range(1000):
        name = secrets.token_hex(8).encode()
        invented = [(header, name) for header in (b"x-user-id", b"x-tenant", b"x-agent-id", b"x-litellm-end-user-id")]
        body = {**ASK, "user": f"user-{number}", "metadata": {"user_id": f"user-{number}"}}
        exchange = await ask(app, body, headers=[(b"x-api-key", key.encode()), *invented])
        statuses[exchange.status] += 1
        assert exchange.status == 200 or name.decode() not in exchange.body.decode()
    assert statuses.keys() == {200, 402}
    records = await storage.records()
    assert sum(each.cost_nanousd or 0 for each in records) == statuses[200] * USED <= cap
    assert {(each.caller, each.user, each.agent) for each in records} == {("team-a", None, None)}
    assert len(provider.bodies) == statuses[200]


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"forwarded", b"x-real-ip", b"cf-connecting-ip"])
async def test_invented_addresses(storage: Storage, header: bytes) -> None:
    """T2: forwarded addresses from a peer that is no proxy all count as that peer; other peers have their own share."""
    guard = new_guard(RateLimit("3/hour", per="caller"), storage=storage, identity=PeerAddress(proxies=["10.0.0.0/8"]))
    app = guarded(Provider([b"{}"]), guard)
    statuses: Counter[int] = Counter()
    for number in range(50):
        exchange = await request("/agents", headers=[(header, f"198.51.100.{number}".encode())]).run(app)
        statuses[exchange.status] += 1
    assert statuses == {200: 3, 429: 47}
    assert (await request("/agents", client=("203.0.113.10", 1)).run(app)).status == 200


async def test_fresh_sessions(storage: Storage) -> None:
    """T3: 200 fresh sessions spend as much as one: the caller's budget trips at the same dollar."""
    identity = TrustedHeaders(trust_headers=True, caller="x-user")
    cap = 7 * USED + HOLD
    guard = new_guard(
        Budget(f"{usd(cap)}/1d", per="user"), Iterations(1000), storage=storage, identity=identity, session_limit=500
    )
    app = guarded(Provider(), guard)
    admitted: Counter[str] = Counter()
    for user, session in [("one", "always the same"), ("many", "fresh")]:
        for number in range(200):
            name = session if user == "one" else f"{session} {number}"
            headers = [(b"x-user", user.encode()), (b"x-session-id", name.encode())]
            exchange = await ask(app, headers=headers, session=False)
            admitted[user] += exchange.status == 200
    assert admitted["one"] == admitted["many"] > 0
    spent = Counter[str]()
    for record in await storage.records():
        spent[str(record.caller)] += record.cost_nanousd or 0
    assert spent["one"] == spent["many"] <= cap


async def test_first_calls_at_the_same_time(storage: Storage) -> None:
    """T20, A1: of 200 first calls at once, under a cap for ten, at most ten are dispatched."""
    gate, dispatched = Gate(), 0

    async def provider(scope: Any, receive: Any, send: Any) -> None:
        nonlocal dispatched
        dispatched += 1
        await gate.step()
        await Provider()(scope, receive, send)

    body = {**ASK, "messages": []}
    probe = new_guard(Budget("$1/1d", per="caller"))
    await ask(guarded(Provider(), probe), body)
    (record,) = await probe.storage.records()
    assert record.estimate_nanousd is not None

    guard = new_guard(Budget(f"{usd(10 * record.estimate_nanousd)}/1d", per="caller"), storage=storage)
    app = guarded(provider, guard)
    calls = {asyncio.ensure_future(ask(app, body)) for _ in range(200)}
    refused: set[asyncio.Future[Any]] = set()
    while len(refused) < 190:
        done, _ = await asyncio.wait(calls - refused, return_when=asyncio.FIRST_COMPLETED)
        refused |= done
    assert {call.result().status for call in refused} == {429}
    gate.release()
    answered = await asyncio.gather(*calls)
    assert sum(exchange.status == 200 for exchange in answered) == dispatched == 10
    assert await ledger(guard) == [("measured", USED)] * 10
