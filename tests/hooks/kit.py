"""Guarded clients of both libraries, synchronous and not, in front of a provider that keeps its own bill."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx
import httpx2
from tests.exits.kit import BILLED, CONTEXT, MAX_TOKENS, Stage

from asgi_llm_guard.httpx import AsyncGuardTransport, GuardTransport

Way = Literal["httpx async", "httpx sync", "httpx2 async", "httpx2 sync"]
WAYS: tuple[Way, ...] = ("httpx async", "httpx sync", "httpx2 async", "httpx2 sync")
LIBRARIES: dict[str, Any] = {"httpx": httpx, "httpx2": httpx2}


def asked(text: str = "one two three", **more: Any) -> dict[str, Any]:
    return {"model": BILLED, "messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS, **more}


def library_of(way: Way) -> Any:
    return LIBRARIES[way.split()[0]]


class Client:
    """One guarded client, of any way, as if all were asynchronous."""

    def __init__(self, way: Way, client: Any) -> None:
        self._sync = way.endswith("sync") and not way.endswith("async")
        self.client = client

    async def post(self, json: Any = None, path: str = "/chat/completions", **options: Any) -> Any:
        """One request, and its whole answer."""
        if not self._sync:
            return await self.client.post(path, json=json, **options)
        return await in_thread(lambda: self.client.post(path, json=json, **options))

    async def chunks(self, json: Any, *, most: int | None = None) -> list[bytes]:
        """One request, and its answer as it comes; `most`: leave it after so many chunks."""
        if self._sync:
            return list(await in_thread(lambda: self._chunks(json, most)))
        seen: list[bytes] = []
        async with self.client.stream("POST", "/chat/completions", json=json) as response:
            async for chunk in response.aiter_bytes():
                seen.append(chunk)
                if len(seen) == most:
                    break
        return seen

    def _chunks(self, json: Any, most: int | None) -> list[bytes]:
        seen: list[bytes] = []
        with self.client.stream("POST", "/chat/completions", json=json) as response:
            for chunk in response.iter_bytes():
                seen.append(chunk)
                if len(seen) == most:
                    break
        return seen

    async def aclose(self) -> None:
        if self._sync:
            await in_thread(self.client.close)
        else:
            await self.client.aclose()


async def in_thread(work: Callable[[], Any]) -> Any:
    """`work`, with this task's context, in a thread."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(None, context.run, work)


@asynccontextmanager
async def hooked(stage: Stage, way: Way, **options: Any) -> AsyncIterator[Client]:
    """A guarded client of the stage's provider."""
    options = {"base_url": stage.base_url, "trust_env": False, **options}
    library: Any = way.split()[0]
    make: Any = stage.guard.httpx_client if way.endswith("async") else stage.guard.httpx_client_sync
    client = Client(way, make(library=library, **options))
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def admitted(stage: Stage, way: Way, **options: Any) -> AsyncIterator[Client]:
    """As `hooked`, inside an admission."""
    async with hooked(stage, way, **options) as client, stage.guard.open(CONTEXT):
        yield client


@asynccontextmanager
async def over(stage: Stage, way: Way, handler: Callable[[Any], Any], **options: Any) -> AsyncIterator[Client]:
    """As `admitted`, over a handler of requests in place of the network."""
    library = library_of(way)
    mock = library.MockTransport(handler)
    if way.endswith("async"):
        made = library.AsyncClient(transport=AsyncGuardTransport(stage.guard, mock, **options), base_url=stage.base_url)
    else:
        made = library.Client(transport=GuardTransport(stage.guard, mock, **options), base_url=stage.base_url)
    client = Client(way, made)
    try:
        async with stage.guard.open(CONTEXT):
            yield client
    finally:
        await client.aclose()


def pieces(way: Way, parts: Iterable[bytes]) -> Any:
    """A body that comes in parts."""
    return _later(parts) if way.endswith("async") else iter(parts)


async def _later(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def text_of(chunks: list[bytes]) -> str:
    """The text of a streamed chat completion."""
    lines = b"".join(chunks).split(b"\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ()))
