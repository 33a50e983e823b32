"""The messages of ASGI, from the server's end of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from starlette.types import Receive, Send

__all__ = ["hung_up", "lifespan", "read_body", "send_body", "send_event", "send_json", "start"]


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; `None` if the client left first."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send: Send, status: int, headers: Sequence[tuple[str, str]]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_body(send: Send, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
    length = ("content-length", str(len(body)))
    await start(send, status, (*headers, length, ("content-type", "application/json")))
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_json(send: Send, status: int, body: object, *, headers: Sequence[tuple[str, str]] = ()) -> None:
    await send_body(send, status, msgspec.json.encode(body), headers)


async def send_event(send: Send, data: bytes | Mapping[str, object]) -> None:
    encoded = data if isinstance(data, bytes) else msgspec.json.encode(data)
    await send({"type": "http.response.body", "body": b"data: " + encoded + b"\n\n", "more_body": True})
