"""What is read of a request before the application sees it."""

from __future__ import annotations

from asgi_llm_guard.middleware.answers import Receive, Scope
from asgi_llm_guard.wire.peek import body_too_large

__all__ = ["ClientLeft", "cache_control", "read_body"]


class ClientLeft(Exception):  # noqa: N818 - not an error: nobody is there to answer
    """The client went away before it had sent everything."""


async def read_body(receive: Receive, scope: Scope, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyError: it has more than `limit` bytes.
        ClientLeft: before it was complete.
    """
    length_sent: bytes = dict(scope["headers"]).get(b"content-length", b"")
    if length_sent.isdigit() and int(length_sent[:20]) > limit:  # else it is counted as it comes
        raise body_too_large(limit, int(length_sent[:20]))
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    chunk: bytes = message.get("body", b"")
    if len(chunk) > limit:
        raise body_too_large(limit, len(chunk))
    if not message.get("more_body", False):
        return chunk
    chunks, length = [chunk], len(chunk)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk = message.get("body", b"")
        length += len(chunk)
        if length > limit:
            raise body_too_large(limit, length)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def cache_control(scope: Scope) -> str:
    """What a request says of caches."""
    return b",".join([value for name, value in scope["headers"] if name.lower() == b"cache-control"]).decode("latin-1")
