"""What the middleware answers by itself: refusals, in place of the application's answer or of its error."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any, Final

from asgi_llm_guard.admission import Admission
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.identity.base import IdentityError
from asgi_llm_guard.outcomes import refusal_of
from asgi_llm_guard.wire.refusals import Rendered, render, websocket_close

__all__ = [
    "ASGIApp",
    "ErrorPage",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "refusal_behind",
    "refuse",
    "refuse_websocket",
    "request_id",
    "unidentified",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}")
_CAUSES: Final = 8


class ErrorPage:
    """Passes a response on, except a 500 after a refusal: that one waits until the application says what went wrong.

    The outermost layer of an application answers every exception before it lets it go on. Where the middleware
    is around that layer, the answer to a refusal must not be that page.
    """

    __slots__ = ("_admission", "_held", "_send", "started")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self._held: list[Message] = []
        self.started = False
        """Something was passed on."""

    def send(self, message: Message) -> Awaitable[None]:
        if self._held or (self._admission.refused and message.get("status") == 500 and not self.started):
            return self._hold(message)
        self.started = True
        return self._send(message)

    async def _hold(self, message: Message) -> None:
        self._held.append(message)
        if message.get("more_body", False):
            await self.flush()  # a stream, and no page

    async def flush(self) -> None:
        """Pass on what was held back."""
        held, self._held = self._held, []
        for message in held:
            self.started = True
            await self._send(message)


def unidentified(error: IdentityError) -> Refusal:
    code: Code = "credentials_invalid" if error.status == 403 else "invalid_request"
    status = None if error.status in (400, 403) else error.status  # those of the two codes, unless the guard has others
    return Refusal(policy="identity", code=code, message=str(error), status=status)


def refusal_behind(error: BaseException, admission: Admission, depth: int = 0) -> Denied | None:
    """The refusal of ours that an exception was raised from; of a group, if it consists of nothing else."""
    seen: BaseException | None = error
    while seen is not None and depth < _CAUSES:  # causes may form a ring
        refusal = refusal_of(seen, admission.refusals)
        if refusal is not None:
            return refusal
        depth += 1
        if isinstance(seen, BaseExceptionGroup):
            refusals = [refusal_behind(each, admission, depth) for each in seen.exceptions]
            return refusals[0] if None not in refusals else None
        seen = seen.__cause__
    return None


async def refuse(
    denied: Denied, scope: Scope, send: Send, *, dialect: str | None, fields: Sequence[tuple[bytes, bytes]]
) -> None:
    response = _rendered(denied, scope, dialect, fields)
    await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
    body = b"" if scope.get("method") == "HEAD" else response.body
    await send({"type": "http.response.body", "body": body})


async def refuse_websocket(
    denied: Denied, scope: Scope, receive: Receive, send: Send, *, fields: Sequence[tuple[bytes, bytes]]
) -> None:
    """Answer the handshake: with a whole response where the server can, else by closing."""
    await receive()  # websocket.connect
    if "websocket.http.response" in (scope.get("extensions") or {}):
        response = _rendered(denied, scope, None, fields)
        await send({"type": "websocket.http.response.start", "status": response.status, "headers": response.headers})
        await send({"type": "websocket.http.response.body", "body": response.body})
        return
    code, reason = websocket_close(denied)
    await send({"type": "websocket.close", "code": code, "reason": reason})


def _rendered(denied: Denied, scope: Scope, dialect: str | None, fields: Sequence[tuple[bytes, bytes]]) -> Rendered:
    accept = b", ".join(_headers(scope, b"accept")) or None
    return render(denied, dialect=dialect, accept=accept, instance=request_id(scope), fields=fields)


def request_id(scope: Scope) -> str | None:
    """The request's own id, if it sends one that may stand in records and answers as it is."""
    if b"x-request-id" not in dict(scope["headers"]):
        return None
    ids: list[bytes] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]):
        return ids[0].decode("ascii")
    return None


def _headers(scope: Scope, name: bytes) -> Iterator[bytes]:
    return (value for key, value in scope["headers"] if key == name)
