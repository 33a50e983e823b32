"""Calls an ASGI application message by message, as a server does, and shows every message that it sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from asgi_llm_guard.errors import ConfigurationError

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]

_LAST = {"http.response.body", "websocket.close", "websocket.http.response.body"}
JSON_HEADERS = ((b"content-type", b"application/json"),)


class Exchange:
    """One request and everything that was sent in answer to it."""

    def __init__(self, scope: dict[str, Any], incoming: Sequence[Message]) -> None:
        self.scope = scope
        self.sent: list[Message] = []
        self._incoming = list(incoming)
        self.received = 0
        """How many messages the application has asked for."""
        self._answered = asyncio.Event()

    async def run(self, app: App) -> Exchange:
        """Let the application answer."""
        await app(self.scope, self.receive, self.send)
        return self

    async def receive(self) -> Message:
        self.received += 1
        if self._incoming:
            return self._incoming.pop(0)
        await self._answered.wait()  # the client stays until it has its answer
        return {"type": f"{self.scope['type']}.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] in _LAST and not message.get("more_body", False):
            self._answered.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(
    path: str,
    *,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes | Sequence[bytes] = b"",
    root_path: str = "",
    client: tuple[str, int] = ("203.0.113.9", 4711),
) -> Exchange:
    """An HTTP request; `body` in one message, or in as many as there are pieces."""
    pieces = [body] if isinstance(body, bytes) else list(body)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": list(headers),
        "client": client,
        "server": ("testserver", 80),
        "extensions": {},
    }
    incoming = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, 1)
    ]
    return Exchange(scope, incoming)


def websocket(
    path: str,
    *,
    headers: Sequence[tuple[bytes, bytes]] = (),
    messages: Sequence[Message] = (),
    can_refuse: bool = False,
    root_path: str = "",
) -> Exchange:
    """A WebSocket handshake and what the client sends after it. `can_refuse`: the server can answer with a response."""
    exchange = request(path, headers=headers, root_path=root_path)
    scope = {**exchange.scope, "type": "websocket", "scheme": "ws", "subprotocols": []}
    del scope["method"]
    scope["extensions"] = {"websocket.http.response": {}} if can_refuse else {}
    return Exchange(scope, [{"type": "websocket.connect"}, *messages])


async def start(app: App) -> list[Message]:
    """Run the application's start-up, and its shut-down if it came up; gives the messages that it sent. One that failed
    to start ends with an error, for which test clients wait, and says it once."""
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    exchange = Exchange(scope, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    try:
        await exchange.run(app)
    except ConfigurationError:
        assert [message["type"] for message in exchange.sent] == ["lifespan.startup.failed"]
    else:
        assert all(message["type"] != "lifespan.startup.failed" for message in exchange.sent)
    return exchange.sent
