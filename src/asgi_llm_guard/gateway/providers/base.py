"""What carries a request to a deployment, and what comes back.

A provider sends one request, once: it does not repeat, choose or count. An answer is an answer whatever its status;
what is no answer is a `TransportFailed`. Nothing in a request says where it goes, or with whose key: that is the
deployment's alone (`gateway.fields`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from asgi_llm_guard.gateway.deployment import Deployment, Timeouts
from asgi_llm_guard.gateway.errors import GatewayError
from asgi_llm_guard.wire.base import Headers

__all__ = [
    "FORWARDED",
    "FailureKind",
    "ModelRequest",
    "Provider",
    "TransportFailed",
    "Upstream",
    "forwarded",
    "let_go",
    "pick_dialect",
    "read_whole",
]

_log = logging.getLogger("asgi_llm_guard")

FailureKind = Literal[
    "connect",  # no connection: refused, no such host, no free one in time
    "tls",  # no connection that can be trusted
    "timeout",  # it took longer than it may
    "cut",  # the connection ended before the answer did
    "malformed",  # what came is no HTTP, or not encoded as it says
]

FORWARDED: Final = frozenset(
    {
        b"anthropic-beta",
        b"baggage",
        b"idempotency-key",
        b"openai-beta",
        b"traceparent",
        b"tracestate",
        b"x-client-request-id",
    }
)
"""The only headers of a request that are sent on; none of them says who asks, or where."""


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a deployment."""

    dialect: str
    """The body's; one that `Provider.dialect` has given."""
    body: Mapping[str, object]
    """`model` and `stream` in it have no meaning."""
    model: str = ""
    """Empty: the deployment's."""
    stream: bool = False
    headers: Headers = ()
    """Those in `FORWARDED` are sent on."""
    timeouts: Timeouts | None = None
    """`None`: the deployment's."""


class TransportFailed(GatewayError):  # noqa: N818 - what happened, as the other errors of the gateway
    """No answer came, or not to its end. The message has no key, no body and no text of a library in it."""

    status = 502
    code = "provider_unreachable"

    def __init__(self, kind: FailureKind, message: str, *, sent: bool, deployment: str = "") -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.sent = sent
        """`False`: the provider surely has not got the request; nothing is owed."""
        self.deployment = deployment
        if kind == "timeout":
            self.status = 504


class Upstream(Protocol):
    """A running answer. Read to its end, or closed."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    @property
    def dialect(self) -> str:
        """The wire dialect that reads it."""
        ...

    @property
    def path(self) -> str:
        """Where the request was sent, for meters."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, decoded; once.

        Raises:
            TransportFailed: it does not come to its end; always `sent`.
        """
        ...

    async def aclose(self) -> None:
        """Nobody reads it any more: the connection is given up. May be called at any time, and again."""
        ...


class Provider(Protocol):
    """Carries requests to deployments."""

    def dialect(self, deployment: Deployment, asked: str) -> str | None:
        """The dialect in which it takes what is asked in the dialect `asked`; `None`: it cannot do that at all."""
        ...

    async def send(self, deployment: Deployment, request: ModelRequest) -> Upstream:
        """Send it, once, and give the answer as soon as its head is there.

        Raises:
            TransportFailed: no answer came.
            CannotExpress: the request has something that cannot be said to this provider.
        """
        ...

    async def aclose(self) -> None:
        """Close what is kept open."""
        ...


def forwarded(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that are sent on, under lower-case names."""
    return [(lower, value) for name, value in headers if (lower := name.lower()) in FORWARDED]


async def read_whole(upstream: Upstream, *, most: int = 64 * 1024 * 1024) -> bytes:
    """The whole body of an answer, which is closed then.

    Raises:
        TransportFailed: it does not come to its end, or is longer than `most` bytes.
    """
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in upstream:
            size += len(piece)
            if size > most:
                raise TransportFailed("malformed", f"the answer is longer than {most} bytes", sent=True)
            pieces.append(piece)
    finally:
        await let_go(upstream)
    return b"".join(pieces)


async def let_go(upstream: Upstream) -> None:
    """Close an answer. One that cannot be closed is logged: what it has cost is charged all the same."""
    try:
        await upstream.aclose()
    except Exception as error:  # noqa: BLE001 - of somebody's own provider, or of the library below
        _log.warning("an answer of a provider cannot be closed (%s)", type(error).__name__)


def pick_dialect(taken: Sequence[str], asked: str) -> str | None:
    """Of the dialects that are taken: the one asked in, or the one that it can be translated to."""
    if asked in taken:
        return asked
    other = {"openai": "anthropic", "anthropic": "openai"}.get(asked)
    return other if other in taken else None
