"""A guarded application on a real socket, in front of a provider on another one that keeps its own bill."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.events import Event, SettledCall
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import FakeProvider, Price
from asgi_llm_guard.testing.gates import Changes
from asgi_llm_guard.usage import UsageRecord

MODEL = "openai/gpt-test"
BILLED = "gpt-test"

#: $1 per million tokens in, $2 per million out: 1,000 and 2,000 nano-USD a token.
PRICES = PriceBook.snapshot(overrides={MODEL: {"input": 1, "output": 2}})
BILL = {BILLED: Price(input=1_000, output=2_000)}

HEADERS = {"x-session-id": "s"}
CONTEXT = Context(session="s")
MAX_TOKENS = 20
SLOTS = 10


class ApplicationError(Exception):
    """What the applications of these tests raise."""


class Settlements:
    """An observer: every settlement that a storage applied, in order."""

    def __init__(self) -> None:
        self.seen: list[SettledCall] = []
        self._changes = Changes()

    def __call__(self, event: Event) -> None:
        if isinstance(event, SettledCall):
            self.seen.append(event)
            self._changes.tell()

    async def until(self, number: int) -> None:
        """Wait until so many calls were settled."""
        async with asyncio.timeout(60):
            await self._changes.until(lambda: len(self.seen) >= number)


class Watch:
    """An ASGI app around another: knows when nothing runs in it any more, and what it raised."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.begun = 0
        self.running = 0
        self.raised: list[type[BaseException]] = []
        self._changes = Changes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        self.begun += 1
        self.running += 1
        self._changes.tell()
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            self.raised.append(type(error))
            raise
        finally:
            self.running -= 1
            self._changes.tell()

    async def idle(self, begun: int = 1) -> None:
        """Wait until at least so many requests have begun, and all of them have ended."""
        await self.until(lambda: self.begun >= begun and not self.running)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds of what has begun and what is running."""
        async with asyncio.timeout(60):
            await self._changes.until(condition)


@dataclass
class Stage:
    """A guard, its storage, and the provider that its applications call."""

    storage: Storage
    provider: FakeProvider
    base_url: str
    guard: Guard
    settlements: Settlements
    clients: dict[int, httpx2.AsyncClient] = field(default_factory=dict)
    watch: Watch | None = None

    # ---------------------------------------------------------------- what applications do

    @property
    def client(self) -> httpx2.AsyncClient:
        """A client for the event loop that asks."""
        loop = id(asyncio.get_running_loop())
        if loop not in self.clients:
            self.clients[loop] = httpx2.AsyncClient(base_url=self.base_url, verify=False)
        return self.clients[loop]

    def describe(self, text: str) -> dict[str, Any]:
        return {"model": MODEL, "input": _messages(text), "max_output_tokens": MAX_TOKENS}

    async def complete(self, text: str = "one two three") -> str:
        """One guarded call; gives the answer."""
        async with self.guard.call(**self.describe(text)) as call:
            return await self.post(call, text)

    async def post(self, call: ActiveCall, text: str) -> str:
        response = await self.client.post("/chat/completions", json=_body(text))
        call.record(response)
        return str(response.json()["choices"][0]["message"]["content"])

    async def stream(self, text: str = "one two three") -> AsyncGenerator[bytes]:
        """One guarded call, streamed; gives the words."""
        async with self.guard.call(**self.describe(text)) as call:
            async for chunk in call.stream(self.chunks(text)):
                if chunk["choices"]:
                    yield chunk["choices"][0]["delta"].get("content", "").encode()

    async def chunks(self, text: str) -> AsyncGenerator[dict[str, Any]]:
        body = {**_body(text), "stream": True, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", "/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    def complete_sync(self, text: str = "one two three") -> str:
        """As `complete`, for synchronous code in a worker thread."""
        with self.guard.call_sync(**self.describe(text)) as call:
            return self.post_sync(call, text)

    def post_sync(self, call: ActiveCall, text: str) -> str:
        with httpx2.Client(base_url=self.base_url, verify=False) as client:
            response = client.post("/chat/completions", json=_body(text))
        call.record(response)
        return str(response.json()["choices"][0]["message"]["content"])

    def stream_sync(self, text: str = "one two three") -> Iterator[bytes]:
        with self.guard.call_sync(**self.describe(text)) as call:
            for chunk in call.stream_sync(self._chunks_sync(text)):
                if chunk["choices"]:
                    yield chunk["choices"][0]["delta"].get("content", "").encode()

    def _chunks_sync(self, text: str) -> Iterator[dict[str, Any]]:
        body = {**_body(text), "stream": True, "stream_options": {"include_usage": True}}
        with (
            httpx2.Client(base_url=self.base_url, verify=False) as client,
            client.stream("POST", "/chat/completions", json=body) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    # ------------------------------------------------------------------------ what is served

    @asynccontextmanager
    async def serve(self, app: ASGIApp, **options: Any) -> AsyncGenerator[Server]:
        """Serve `app` on a free loopback port, in a thread of its own."""
        self.watch = Watch(app)
        async with serve(self.watch, self._close_client, **options) as port:
            yield Server(port)

    async def _close_client(self) -> None:
        client = self.clients.pop(id(asyncio.get_running_loop()), None)
        if client is not None:
            await client.aclose()

    # --------------------------------------------------------------------------- what counts

    async def settled(self, *, calls: int | None, exact: bool = True, requests: int = 1) -> list[UsageRecord]:
        """Wait until everything has ended, and compare the provider's bill with the ledger and the counters.

        `calls`: how many reached the provider, each of which has one record and is settled once; `None`: as
        many as there were, and some may have been cancelled on their way, which nobody can know.
        `exact`: the provider told what it used; else the ledger may say more, up to the hold.
        """
        if self.watch is not None:
            await self.watch.idle(requests)
        if calls is not None:
            await self.settlements.until(calls)
        await self.provider.idle()
        assert await self.storage.open_holds() == 0
        records = list(await self.storage.records())
        if calls is None:
            calls = len(records)
            assert self.provider.calls <= calls
        assert self.provider.calls == calls or not exact
        assert len(records) == calls
        assert [event.settled.status for event in self.settlements.seen] == ["settled"] * calls
        assert sorted(event.record.call_id for event in self.settlements.seen) == sorted(r.call_id for r in records)
        ledger = sum(record.cost_nanousd or 0 for record in records)
        held = sum(record.estimate_nanousd or 0 for record in records)
        if exact:
            assert ledger == self.provider.total_nanousd
        else:
            assert self.provider.total_nanousd <= ledger <= held
        assert await self.counters() == (calls, ledger, 0)
        return records

    async def counters(self) -> tuple[int, int, int]:
        """Iterations, nano-USD and slots that are used; nothing is held."""
        call = self.guard.describe(MODEL, input_tokens=1, max_output_tokens=1)
        now_ms = self.guard.clock.now_ms()
        meters = [claim.meter for policy in self.guard.policies for claim in policy.plan(CONTEXT, call, now_ms).claims]
        readings = await self.storage.read(meters)
        assert [reading.held for reading in readings] == [0] * len(readings)
        iterations, nanousd, slots = (reading.used for reading in readings)
        return iterations, nanousd, slots


class Server:
    """Where an application is served, and plain connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    async def request(
        self, path: str, *, method: str = "POST", content: bytes = b"", **options: Any
    ) -> httpx2.Response:
        """One request, on a connection of its own."""
        async with httpx2.AsyncClient(base_url=self.url, verify=False, headers=HEADERS) as client:
            return await client.request(method, path, content=content, **options)

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A bare connection, closed at the end."""
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield connection
        finally:
            connection.leave()


class Connection:
    """A client that can leave at any byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, path: str, *, method: str = "POST", body: bytes = b"") -> None:
        """Send a request."""
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: test\r\nx-session-id: s\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def until(self, text: bytes) -> bytes:
        """Read until `text` has come."""
        async with asyncio.timeout(60):
            return await self.reader.readuntil(text)

    def leave(self) -> None:
        """Go away without a word."""
        self.writer.transport.abort()


class PromptServer(uvicorn.Server):
    """Ends at once when it is told to. Uvicorn's own looks ten times a second whether it should, and then waits again."""

    def __init__(self, config: uvicorn.Config, told: Callable[[], Awaitable[object]]) -> None:
        super().__init__(config)
        self._told = told

    async def main_loop(self) -> None:
        await self.on_tick(0)  # what time it is
        await self._told()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.002)  # what was accepted last becomes a connection
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110 - it offers no event
            await asyncio.sleep(0.002)
        await self.lifespan.shutdown()


@asynccontextmanager
async def serve(
    app: ASGIApp, on_stop: Callable[[], Awaitable[None]] | None = None, *, lifespan: str = "off", http: str = "auto"
) -> AsyncIterator[int]:
    """Serve `app` with uvicorn in a thread of its own; gives the port."""
    caller, ready, ended, stopping = asyncio.get_running_loop(), asyncio.Event(), Changes(), threading.Event()

    async def run(listener: socket.socket) -> None:
        config: Any = uvicorn.Config(
            app,
            lifespan=lifespan,  # type: ignore[arg-type]
            http=http,
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,  # longer than clients keep connections: none asks on one that is just being closed
        )
        server = PromptServer(config, lambda: ended.until(stopping.is_set))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        # A few turns: the server offers a flag, and no event.
        while not server.started and not serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        caller.call_soon_threadsafe(ready.set)
        await serving
        if on_stop is not None:
            await on_stop()

    log, quiet = logging.getLogger("uvicorn.error"), _NoApplicationErrors()
    log.addFilter(quiet)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # asyncio does so only for sockets that it makes; without it, answers of two writes take 40 ms longer.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            port: int = listener.getsockname()[1]
            thread = asyncio.create_task(asyncio.to_thread(asyncio.run, run(listener)))
            try:
                await ready.wait()
                yield port
            finally:
                stopping.set()
                ended.tell()
                await thread
    finally:
        log.removeFilter(quiet)


class _NoApplicationErrors(logging.Filter):
    """Keeps the errors that a test asked for out of the server's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ApplicationError))


def new_stage(storage: Storage, provider: FakeProvider, base_url: str, clock: Any, **options: Any) -> Stage:
    """A guard with one policy of each kind that these tests count."""
    settlements = Settlements()
    guard = Guard(
        (Iterations(1_000), Budget("$10/1d", per="global"), Concurrency(SLOTS, per="global")),
        storage=storage,
        clock=clock,
        prices=PRICES,
        observers=(settlements,),
        **options,
    )
    return Stage(storage, provider, base_url, guard, settlements)


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _body(text: str) -> dict[str, Any]:
    return {"model": BILLED, "messages": _messages(text), "max_tokens": MAX_TOKENS}


def body_of(text: str = "one two three", **more: Any) -> bytes:
    """A request for a chat completion, as a client sends it."""
    return json.dumps({**_body(text), **more}).encode()
