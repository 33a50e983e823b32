"""Many at once, through the whole stack: exactly those are admitted that fit."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send
from tests.exits.kit import BILL, MAX_TOKENS, MODEL, PRICES, SLOTS, Stage, _messages
from tests.exits.service import storage_at
from tests.exits.test_returns import app_of
from tests.exits.test_shutdown import service
from tests.servers import shared_cluster, shared_redis, shared_sentinel, unique_namespace

from asgi_llm_guard import Budget, Guard, GuardMiddleware, Route
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock, Gate, asgi_client

pytestmark = pytest.mark.anyio


async def test_a_hundred_dimes_on_five_dollars(storage: Storage, clock: FrozenClock) -> None:
    """A hundred requests at once at $0.10 on a budget of $5.00: exactly 50 are admitted."""
    prices = PriceBook.snapshot(overrides={MODEL: {"input": 0, "output": 10_000}})
    guard = Guard([Budget("$5.00/1d", per="global")], storage=storage, clock=clock, prices=prices, hold_wait_s=0)
    gate, inside = Gate(), 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal inside
        async with guard.call(model=MODEL, input_tokens=0, max_output_tokens=10):
            inside += 1
            await gate.step()
        await PlainTextResponse("done")(scope, receive, send)

    routes = [Route("/{rest:path}", dialect=None, calls="hooked")]
    async with asgi_client(GuardMiddleware(app, guard, routes=routes)) as client:
        requests = [asyncio.create_task(client.post("/")) for _ in range(100)]
        await first(requests, 50)
        assert inside == 50
        gate.release()
        statuses = Counter(response.status_code for response in await asyncio.gather(*requests))
    assert statuses == {200: 50, 429: 50}
    assert len(await storage.records()) == 50
    assert await storage.open_holds() == 0


async def test_twenty_on_ten_slots(stage: Stage) -> None:
    """Twenty requests at once on ten slots: exactly ten are admitted, and all ten slots are free afterwards."""
    stage.guard.engine.waiters.wait_s = 0
    stage.provider.when(lambda request: True, Behaviour.hang())

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await stage.complete())

    async with stage.serve(app_of(stage, endpoint)) as server:
        requests = [asyncio.create_task(server.request("/")) for _ in range(2 * SLOTS)]
        await first(requests, SLOTS)
        await stage.provider.until(lambda: stage.provider.open == SLOTS)
        stage.provider.release()
        statuses = Counter(response.status_code for response in await asyncio.gather(*requests))
        assert statuses == {200: SLOTS, 429: SLOTS}
        await stage.settled(calls=SLOTS, requests=2 * SLOTS)


@pytest.mark.parametrize("kind", ["sqlite", "redis", "sentinel", "cluster"])
async def test_four_processes(tmp_path: Path, kind: str) -> None:
    """T20: of 200 first calls at once, in four processes on one store with room for ten, exactly ten are dispatched."""
    provider = FakeProvider(prices=BILL, default=Behaviour.hang())
    place = str(tmp_path / "guard.db")
    if kind != "sqlite":
        url = {"redis": shared_redis().url, "sentinel": shared_sentinel().url, "cluster": shared_cluster().url}[kind]
        place = f"{url}?namespace={unique_namespace()}&timeout=10"
    call = Guard(prices=PRICES).describe(MODEL, input=_messages("one two three"), max_output_tokens=MAX_TOKENS)
    assert call.cost_nanousd is not None
    dollars = f"${call.cost_nanousd * 10 / 10**9:.9f}/1d"
    async with AsyncExitStack() as stack:
        base_url = await stack.enter_async_context(provider.serve())
        services = [await stack.enter_async_context(service(place, base_url, f"--budget={dollars}")) for _ in range(4)]
        for running in services:
            await running.says(b"Application startup complete")
        requests = [
            asyncio.create_task(running.server.request("/call", timeout=60)) for _ in range(50) for running in services
        ]
        await first(requests, 190)
        await provider.until(lambda: provider.calls == 10, timeout_s=60)
        provider.release()
        statuses = Counter(response.status_code for response in await asyncio.gather(*requests))
        await asyncio.gather(*(running.end(signal.SIGTERM) for running in services))
    assert statuses == {200: 10, 429: 190}
    assert provider.calls == 10
    store = storage_at(place)
    holds, records = await store.open_holds(), await store.records()
    await store.aclose()
    assert (holds, len(records)) == (0, 10)
    assert sum(record.cost_nanousd or 0 for record in records) == provider.total_nanousd


async def first(requests: Sequence[asyncio.Task[Any]], number: int) -> None:
    """Wait until so many of them have been answered."""
    async with asyncio.timeout(60):
        while sum(request.done() for request in requests) < number:
            pending = [request for request in requests if not request.done()]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
