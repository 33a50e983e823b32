"""What the matrix is made of: a client, as if all were asked in the same way, and a stage for it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

import pytest

from asgi_llm_guard import Budget, Context, Guard, Iterations
from asgi_llm_guard.events import Event, Refused
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import BaseURL, FakeProvider, Price
from asgi_llm_guard.usage import UsageRecord

Mode = Literal["async", "sync"]

MODEL = "m"
LIMIT = 20
"""What every call may generate."""
TOOL = "search"
FUNCTION: Any = {
    "name": TOOL,
    "description": "Find something.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}

PRICES = PriceBook.snapshot(overrides={MODEL: {"input": 1, "output": 2, "cache_read": 0.5}})
BILL = {MODEL: Price(input=1_000, output=2_000, cache_read=500)}
CONTEXT = Context(session="s")
TEXT = "one two three"
ECHO = f"Echo: {TEXT}"


class Client(ABC):
    """One client in one mode. All answers are texts; of a tool call, the tool's name."""

    name: ClassVar[str]
    library: ClassVar[Literal["httpx", "httpx2"]] = "httpx2"
    modes: ClassVar[tuple[Mode, ...]] = ("async", "sync")
    retries: ClassVar[bool] = True
    """It repeats a request after an error of the provider, or can be told to."""
    reads_should_retry: ClassVar[bool] = False
    """It sends nothing again after a 429 with `x-should-retry: false`."""
    says_without_usage: ClassVar[bool] = True
    """It gives an answer that does not say what it used; else it may raise."""
    counts: ClassVar[bool] = False
    """Where a stream does not say what it used it counts, and says that."""
    platform: ClassVar[Any] = "openai"

    def __init__(self, guard: Guard, base_url: BaseURL, mode: Mode, *, retries: int = 0) -> None:
        self.guard = guard
        self.base_url = base_url
        self.mode = mode
        self.retrying = retries
        self.http: Any = self.make_http()
        self.sdk: Any = self.make_async() if mode == "async" else self.make_sync()

    def make_http(self) -> Any:
        make: Any = self.guard.httpx_client if self.mode == "async" else self.guard.httpx_client_sync
        return make(library=self.library, trust_env=False)

    @abstractmethod
    def make_async(self) -> Any: ...

    @abstractmethod
    def make_sync(self) -> Any: ...

    @abstractmethod
    def call(self, text: str, *, tools: bool) -> Any:
        """One call; in the asynchronous mode, what is to be awaited."""

    @abstractmethod
    def read(self, answer: Any) -> str: ...

    @abstractmethod
    def chunks(self, text: str) -> Any:
        """A stream; an (asynchronous) iterator, or what gives one when awaited."""

    @abstractmethod
    def read_chunk(self, chunk: Any) -> str: ...

    async def plain(self, text: str, *, tools: bool = False) -> str:
        """One answer."""
        if self.mode == "async":
            return self.read(await self.call(text, tools=tools))
        return self.read(await in_thread(lambda: self.call(text, tools=tools)))

    async def stream(self, text: str, *, most: int | None = None) -> str:
        """A streamed answer; `most`: left after so many chunks."""
        if self.mode == "sync":
            return str(await in_thread(lambda: self._stream(text, most)))
        parts: list[str] = []
        stream = self.chunks(text)
        stream = await stream if asyncio.iscoroutine(stream) else stream
        async with contextlib.AsyncExitStack() as stack:
            if hasattr(stream, "__aenter__"):
                stream = await stack.enter_async_context(stream)
            async for chunk in stream:
                parts.append(self.read_chunk(chunk))
                if len(parts) == most:
                    break
            if hasattr(stream, "aclose"):
                await stream.aclose()
        return "".join(parts)

    def _stream(self, text: str, most: int | None) -> str:
        parts: list[str] = []
        stream = self.chunks(text)
        with contextlib.ExitStack() as stack:
            if hasattr(stream, "__enter__"):
                stream = stack.enter_context(stream)
            for chunk in stream:
                parts.append(self.read_chunk(chunk))
                if len(parts) == most:
                    break
            if hasattr(stream, "close"):
                stream.close()
        return "".join(parts)

    async def told(self) -> None:  # noqa: B027 - most tell at once
        """Wait until the library has told of what has ended, if it does so later."""

    async def aclose(self) -> None:
        if self.mode == "async":
            await self.http.aclose()
        else:
            await in_thread(self.http.close)


async def in_thread(work: Callable[[], Any]) -> Any:
    """`work`, with this task's context, in a thread."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(None, context.run, work)


class Stage:
    """A guard, and a client of a provider that keeps its own bill."""

    def __init__(self, guard: Guard, provider: FakeProvider, client: Client, refusals: list[Refused]) -> None:
        self.guard = guard
        self.provider = provider
        self.client = client
        self.refusals = refusals

    async def records(self) -> list[UsageRecord]:
        await self.client.told()
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


def every_way(clients: Iterable[type[Client]]) -> list[Any]:
    """Every client in each of its modes."""
    return [pytest.param(client, mode, id=f"{client.name}-{mode}") for client in clients for mode in client.modes]
