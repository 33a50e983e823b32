"""The messages of ASGI, from the server's end of an answer."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence

from starlette.types import Receive, Send

__all__ = ["Headers", "Reply", "hung_up", "lifespan", "read_body"]

Headers = Sequence[tuple[str, str]]


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


class Reply:
    """One answer on its way, encoded if that is asked for."""

    def __init__(self, send: Send, *, zipped: bool = False) -> None:
        self._send = send
        self._zipped = zipped
        self._encoder = zlib.compressobj(wbits=31) if zipped else None

    async def whole(self, status: int, body: bytes, *, kind: str, headers: Headers = ()) -> None:
        """All of it, with its length."""
        await self._start(status, (*headers, ("content-type", kind)), length=len(body := self._encoded(body)))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def half(self, status: int, body: bytes, *, kind: str, headers: Headers = ()) -> None:
        """The first half, and the promise of all."""
        await self._start(status, (*headers, ("content-type", kind)), length=len(body := self._encoded(body)))
        await self._send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})

    async def begin(self, *, kind: str, headers: Headers) -> None:
        """The head of a stream."""
        await self._start(200, (*headers, ("content-type", kind)), length=None)

    async def write(self, chunk: bytes) -> None:
        if self._encoder is not None:
            chunk = self._encoder.compress(chunk) + self._encoder.flush(zlib.Z_SYNC_FLUSH)
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        rest = b"" if self._encoder is None else self._encoder.flush()
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})

    def _encoded(self, body: bytes) -> bytes:
        return gzip.compress(body, mtime=0) if self._zipped else body

    async def _start(self, status: int, headers: Headers, *, length: int | None) -> None:
        if self._zipped:
            headers = (*headers, ("content-encoding", "gzip"))
        if length is not None:
            headers = (*headers, ("content-length", str(length)))
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
