"""A proxy under a real server, in front of a fake provider, called by the real OpenAI SDK."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import httpx2
import openai
import uvicorn
from examples.demo import PRICES, Requests
from starlette.types import Receive, Scope, Send
from tests.exits.kit import PromptServer
from tests.plain import PLAIN
from tests.sdk.proxy import create_app, provider_client

from asgi_llm_guard import Guard, Route
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.testing import FakeProvider
from asgi_llm_guard.usage import UsageRecord

Way = Literal["async", "async stream", "sync", "sync stream"]
WAYS: tuple[Way, ...] = ("async", "async stream", "sync", "sync stream")

SECRET = "the secret of these tests"
KEY, RECORD = ApiKeys.generate("ann", secret=SECRET, departments=["research"])
MODEL = "gpt-4o-mini"
OUTPUT = 150
"""What every call may generate: it holds at most 0.00009 dollars for it."""


class Answer(NamedTuple):
    """What the SDK made of an answer."""

    text: str
    usage_seen: bool


class InFlight(Requests):
    """Counts requests, and knows when none is being answered."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._open = 0
        self._changed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._open -= 1
            self._changed.set()

    async def until(self, open_requests: int) -> None:
        """Wait until so many requests are being answered."""
        async with asyncio.timeout(60):
            while self._open != open_requests:
                self._changed.clear()
                await self._changed.wait()


class Service:
    """The proxy and everything around it."""

    def __init__(self, guard: Guard, provider: FakeProvider, requests: InFlight, url: str) -> None:
        self.guard = guard
        self.provider = provider
        self.requests = requests
        self.url = url

    async def ask(
        self,
        way: Way = "async",
        *,
        text: str = "Say hello to everybody here",
        model: str = MODEL,
        session: str | None = None,
        retries: int = 2,
        max_tokens: int = OUTPUT,
        wants_usage: bool = False,
    ) -> Answer:
        """One call with the SDK, which retries as it sees fit.

        Raises:
            openai.OpenAIError: as the SDK does.
        """
        wanted: dict[str, Any] = {
            "model": model,
            "max_completion_tokens": max_tokens,
            "messages": [{"role": "user", "content": text}],
            "extra_headers": {} if session is None else {"x-session-id": session},
        }
        if way.endswith("stream"):
            wanted |= {"stream": True, **({"stream_options": {"include_usage": True}} if wants_usage else {})}
        if way.startswith("sync"):
            return await asyncio.to_thread(self._ask_sync, wanted, retries)
        async with self.client(retries) as client:
            answer: Any = await client.chat.completions.create(**wanted)
            return _read([chunk async for chunk in answer] if "stream" in wanted else answer)

    def client(self, retries: int = 0) -> openai.AsyncOpenAI:
        http = httpx2.AsyncClient(**PLAIN)
        return openai.AsyncOpenAI(api_key=KEY, base_url=f"{self.url}/v1", http_client=http, max_retries=retries)

    def _ask_sync(self, wanted: dict[str, Any], retries: int) -> Answer:
        http = httpx2.Client(**PLAIN)
        with openai.OpenAI(api_key=KEY, base_url=f"{self.url}/v1", http_client=http, max_retries=retries) as client:
            answer: Any = client.chat.completions.create(**wanted)
            return _read(list(answer) if "stream" in wanted else answer)

    async def records(self) -> Sequence[UsageRecord]:
        """The ledger, once everything is over; nothing may be held any more."""
        await self.requests.until(0)
        await self.provider.idle()
        assert await self.guard.storage.open_holds() == 0
        return await self.guard.storage.records()

    async def the_record(self) -> UsageRecord:
        (record,) = await self.records()
        return record

    async def charged(self) -> int:
        """The sum of the ledger, in nano-USD."""
        return sum(record.cost_nanousd or 0 for record in await self.records())


def _read(answer: Any) -> Answer:
    if not isinstance(answer, list):
        return Answer(answer.choices[0].message.content or "", answer.usage is not None)
    text = "".join(choice.delta.content or "" for chunk in answer for choice in chunk.choices)
    return Answer(text, any(chunk.usage is not None for chunk in answer))


@asynccontextmanager
async def serve(app: Any) -> AsyncIterator[str]:
    """The app on a free loopback port, in this event loop; gives its URL."""
    told = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio does so only for sockets that it makes; without it, answers of two writes take 40 ms longer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,  # longer than clients keep connections: none asks on one that is just being closed
        )
        server = PromptServer(config, told.wait)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):  # noqa: ASYNC110 - the server offers a flag, and no event
            await asyncio.sleep(0)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            told.set()
            await serving


@asynccontextmanager
async def example(storage: str, *policies: Policy, provider_url: str | None = None) -> AsyncIterator[Service]:
    """The proxy, guarded by these policies."""
    provider = FakeProvider(prices=PRICES)
    guard = Guard(policies, storage=storage, identity=ApiKeys([RECORD], secret=SECRET))
    async with provider.serve() as served:
        route = Route("/v1/chat/completions", ["POST"], dialect="openai")
        app = create_app(guard, provider_client(guard, provider_url or served, "any"), routes=[route], unlisted="deny")
        requests = InFlight(app)
        async with serve(requests) as url:
            yield Service(guard, provider, requests, url)
