"""Every client in every mode, whatever its provider does: the ledger has what the provider's bill has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.matrix.clients import LIMIT, MODEL, TOOL, Client, Mode, ways

from asgi_llm_guard import Budget, Context, Guard, Iterations
from asgi_llm_guard.events import Event, Refused
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import Behaviour, FakeProvider, Price
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

PRICES = PriceBook.snapshot(overrides={MODEL: {"input": 1, "output": 2, "cache_read": 0.5}})
BILL = {MODEL: Price(input=1_000, output=2_000, cache_read=500)}
CONTEXT = Context(session="s")
TEXT = "one two three"
ECHO = f"Echo: {TEXT}"
AT_ONCE = (("retry-after-ms", "1"),)

WAYS = [pytest.param(client, mode, id=f"{client.name}-{mode}") for client, mode in ways()]
every_way = pytest.mark.parametrize(("kind", "mode"), WAYS)


class Stage:
    """A guard, and a client of a provider that keeps its own bill."""

    def __init__(self, guard: Guard, provider: FakeProvider, client: Client, refusals: list[Refused]) -> None:
        self.guard = guard
        self.provider = provider
        self.client = client
        self.refusals = refusals

    async def records(self) -> list[UsageRecord]:
        await self.provider.idle()
        return list(await self.guard.storage.records())

    async def check_bill(self) -> list[UsageRecord]:
        """The ledger has what was billed to the nano-dollar, and nothing is held."""
        records = await self.records()
        assert sum(record.cost_nanousd or 0 for record in records) == self.provider.total_nanousd
        assert await self.guard.storage.open_holds() == 0
        return records

    async def check_bound(self, *, unread: int = 0) -> list[UsageRecord]:
        """Where the provider does not say, the ledger has at least what was billed, and at most what was held.

        `unread`: what a provider has produced, in nano-USD, that its reader did not wait for.
        """
        records = await self.records()
        for record in records:
            assert (record.cost_nanousd or 0) <= (record.estimate_nanousd or 0)
        assert sum(record.cost_nanousd or 0 for record in records) >= self.provider.total_nanousd - unread > 0
        assert await self.guard.storage.open_holds() == 0
        return records

    def policies(self, *policies: Any) -> None:
        self.guard.policies = self.guard.engine.bind(policies)


@asynccontextmanager
async def staged(kind: type[Client], mode: Mode, *, retries: int = 0) -> AsyncIterator[Stage]:
    refusals: list[Refused] = []

    def observe(event: Event) -> None:
        if isinstance(event, Refused):
            refusals.append(event)

    provider = FakeProvider(prices=BILL, platform=kind.platform)
    guard = Guard([Budget("$1/1d", per="global"), Iterations(50)], prices=PRICES, observers=[observe])
    async with provider.serve() as base_url, guard:
        client = kind(guard, base_url, mode, retries=retries)
        try:
            yield Stage(guard, provider, client, refusals)
        finally:
            await client.aclose()


@every_way
async def test_plain(kind: type[Client], mode: Mode) -> None:
    """B9: an answer is settled as billed, to the nano-dollar."""
    async with staged(kind, mode) as stage:
        async with stage.guard.open(CONTEXT):
            assert await stage.client.plain(TEXT) == ECHO
        (record,) = await stage.check_bill()
        assert (record.outcome, record.model) == ("measured", MODEL)
        assert record.cost_nanousd


@every_way
async def test_stream(kind: type[Client], mode: Mode) -> None:
    """B9: a stream is settled at its end, as billed; a client that did not ask for usage sees none."""
    async with staged(kind, mode) as stage:
        async with stage.guard.open(CONTEXT):
            assert await stage.client.stream(TEXT) == ECHO
        (record,) = await stage.check_bill()
        assert record.outcome == "measured"


@every_way
async def test_refused(kind: type[Client], mode: Mode) -> None:
    """402: a budget's refusal is one request in every client, reaches no provider, and is the client's own error."""
    async with staged(kind, mode, retries=2) as stage:
        stage.policies(Budget("$0/1d", per="global"))
        async with stage.guard.open(CONTEXT):
            with pytest.raises(Exception, match=r"(?i)budget|402"):
                await stage.client.plain(TEXT)
        assert stage.provider.calls == 0
        assert len(stage.refusals) == 1
        assert stage.refusals[0].denied.status == 402


@every_way
@pytest.mark.slow
async def test_refused_stream(kind: type[Client], mode: Mode) -> None:
    """402: as an answer, so a stream: one request, and the client's own error."""
    async with staged(kind, mode, retries=2) as stage:
        stage.policies(Budget("$0/1d", per="global"))
        async with stage.guard.open(CONTEXT):
            with pytest.raises(Exception, match=r"(?i)budget|402"):
                await stage.client.stream(TEXT)
        assert stage.provider.calls == 0
        assert len(stage.refusals) == 1


@every_way
@pytest.mark.slow
async def test_limited(kind: type[Client], mode: Mode) -> None:
    """429: exactly one request in the clients that read `x-should-retry`, and none that reaches the provider."""
    async with staged(kind, mode, retries=2) as stage:
        stage.policies(Iterations(1))
        async with stage.guard.open(CONTEXT):
            await stage.client.plain(TEXT)
            if not kind.reads_should_retry:
                stage.client.retrying = 0
                return
            with pytest.raises(Exception, match=r"(?i)iteration|429"):
                await stage.client.plain(TEXT)
        assert stage.provider.calls == 1
        assert [refusal.denied.status for refusal in stage.refusals] == [429]


@every_way
@pytest.mark.slow
async def test_tool_call(kind: type[Client], mode: Mode) -> None:
    """The call of a tool is an answer like any other, and is settled as billed."""
    async with staged(kind, mode) as stage:
        stage.provider.script(Behaviour.call_tool(TOOL, query="llamas"))
        async with stage.guard.open(CONTEXT):
            assert await stage.client.plain(TEXT, tools=True) == TOOL
        for record in await stage.check_bill():
            assert record.outcome == "measured"


@every_way
@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500])
async def test_error_then_answer(kind: type[Client], mode: Mode, status: int) -> None:
    """An error of the provider, and the client's own retry: one iteration, each attempt settled by itself."""
    if not kind.retries:
        return
    async with staged(kind, mode, retries=2) as stage:
        stage.policies(Budget("$1/1d", per="global"), Iterations(1))
        stage.provider.script(Behaviour(status=status, headers=AT_ONCE))
        async with stage.guard.open(CONTEXT):
            assert await stage.client.plain(TEXT) == ECHO
        assert stage.provider.calls == 2
        failed, answered = await stage.check_bill()
        assert (failed.outcome, failed.cost_nanousd) == ("provider_error", 0)
        assert (answered.attempt, answered.attempt_of) == (2, failed.call_id)


@every_way
@pytest.mark.slow
async def test_cut_stream(kind: type[Client], mode: Mode) -> None:
    """A stream that breaks off is charged by what has come, never 0, never above what was held."""
    async with staged(kind, mode) as stage:
        stage.provider.script(Behaviour.cut(after_chunks=2))
        async with stage.guard.open(CONTEXT):
            with pytest.raises(Exception):  # noqa: B017 - each client has its own, and some pass the library's on
                await stage.client.stream(TEXT)
        (record,) = await stage.check_bound()
        assert record.outcome in ("estimated", "measured", "unknown")


@every_way
@pytest.mark.slow
async def test_left_stream(kind: type[Client], mode: Mode) -> None:
    """A stream that its reader leaves is charged by what has come, and the provider sees the reader go."""
    async with staged(kind, mode) as stage:
        stage.provider.script(Behaviour.slow())
        stage.provider.release(2)
        async with stage.guard.open(CONTEXT):
            await stage.client.stream(TEXT, most=1)
        await stage.check_bound(unread=BILL[MODEL].output)
        assert stage.provider.disconnects == 1


@every_way
@pytest.mark.slow
async def test_cancelled(kind: type[Client], mode: Mode) -> None:
    """A call that is cancelled while it waits may have been billed: it is charged what it holds."""
    if mode == "sync":
        return  # a thread is not cancelled
    async with staged(kind, mode) as stage:
        stage.provider.script(Behaviour.hang())
        async with stage.guard.open(CONTEXT):
            asking = asyncio.create_task(stage.client.plain(TEXT))
            await stage.provider.until(lambda: stage.provider.open == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        (record,) = await stage.check_bound()
        assert record.outcome == "unknown"


@every_way
@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
async def test_no_usage(kind: type[Client], mode: Mode, *, streamed: bool) -> None:
    """An answer that does not say what it used is never free."""
    async with staged(kind, mode) as stage:
        stage.provider.script(Behaviour.no_usage())
        async with stage.guard.open(CONTEXT):
            try:
                await (stage.client.stream(TEXT) if streamed else stage.client.plain(TEXT))
            except Exception:  # noqa: BLE001 - a client may insist on usage; its provider has billed all the same
                assert kind.name in ("anthropic", "langchain-anthropic", "mistralai")
        (record,) = await stage.check_bound()
        assert record.outcome in ("unmetered", "estimated")
