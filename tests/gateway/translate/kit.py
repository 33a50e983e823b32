"""A transport for real SDKs: what they ask in one dialect is sent to a fake provider in the other, and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from asgi_llm_guard.gateway.translate import Translation, translate
from asgi_llm_guard.testing import FakeProvider
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Answer, Head

PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}
STREAM = Head(200, [(b"content-type", b"text/event-stream")])


def through(translation: Translation, data: bytes, size: int | None = None) -> bytes:
    """A provider's whole stream as the client's, fed in pieces of `size` bytes."""
    transcoder = translation.stream()
    step = size or max(len(data), 1)
    written = [transcoder.feed(data[start : start + step]) for start in range(0, len(data), step)]
    return b"".join(written) + transcoder.finish()


def metered(dialect: str, data: bytes) -> Answer:
    """What the dialect's meter says of a stream."""
    meter = dialect_named(dialect).meter(STREAM)
    meter.feed(data)
    meter.finish()
    return meter.answer()


class Translating(httpx2.AsyncBaseTransport):
    """Answers requests asked in one dialect with a provider that is asked in the other. Keeps what passed."""

    def __init__(self, provider: FakeProvider, asked: str, spoken: str) -> None:
        self._upstream = httpx2.ASGITransport(app=provider)
        self._asked = asked
        self._spoken = spoken
        self.sent: list[dict[str, Any]] = []
        self.received = b""
        """The provider's last body."""
        self.written = b""
        """The client's last body."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(await request.aread())
        translation = translate(self._asked, self._spoken, body, most_tokens=4096, now=1_790_000_000)
        self.sent.append(translation.body)
        onward = httpx2.Request("POST", f"http://provider{PATHS[self._spoken]}", json=translation.body)
        upstream = await self._upstream.handle_async_request(onward)
        self.received = await upstream.aread()
        if upstream.headers["content-type"].startswith("text/event-stream"):
            self.written = through(translation, self.received, 17)
            headers = {"content-type": "text/event-stream"}
            return httpx2.Response(200, headers=headers, content=_pieces(self.written), request=request)
        status, self.written = translation.answer(upstream.status_code, self.received)
        headers = {"content-type": "application/json"}
        return httpx2.Response(status, headers=headers, content=self.written, request=request)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 11):
        yield data[start : start + 11]
