"""Everything that is JSON over HTTP: OpenAI and who speaks like it, Azure, Anthropic.

Rule 1: the URL and the credentials are made when a deployment is first used, of its fields alone.
Rule 2: nothing is repeated, and no redirect is followed, which would take the key along.
Rule 3: the errors of the library have what was sent in their texts; none of them is passed on, or chained.

Source: the references of Azure OpenAI (deployments, and v1 without a version) and Anthropic's messages (2026-11).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from socket import gaierror
from typing import Final, Literal
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakKeyDictionary

import httpx2
import msgspec

from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.errors import CannotExpress
from asgi_llm_guard.gateway.providers.base import (
    FailureKind,
    ModelRequest,
    TransportFailed,
    Upstream,
    forwarded,
    pick_dialect,
)
from asgi_llm_guard.gateway.secret import Secret
from asgi_llm_guard.wire.base import Headers
from asgi_llm_guard.wire.encodings import Decoder, decoder_for

__all__ = ["HttpProvider"]

_LIMITS: Final = ("max_completion_tokens", "max_tokens")
_CHATS: Final = frozenset({"openai", "openai_completions"})
_OF_ITS_CONNECTION: Final = frozenset(
    {
        b"alt-svc", b"connection", b"content-encoding", b"content-length", b"keep-alive", b"proxy-authenticate",
        b"set-cookie", b"strict-transport-security", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
"""What an answer says of the connection, or of a body that is not decoded yet."""
_ERROR_BYTES: Final = 1024 * 1024
"""Of an error's body, which is searched for keys before anybody sees it."""
_NEVER_SENT: Final = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.LocalProtocolError,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)
_CAUSES: Final = 8

_Failure = tuple[FailureKind, str, bool]
"""Kind, what to say, whether it was sent."""


class HttpProvider:
    """Sends JSON over HTTP, with a pool of connections for each host and event loop.

    Args:
        verify: which certificates are trusted; `True`: those that the library trusts.
        proxy: a URL; `None`: what the environment says (`HTTPS_PROXY`, `NO_PROXY`, …).
        max_connections: to one host.
        keepalive_s: how long a connection is kept that nobody uses.
        transport: makes the transport for a host, in place of the library's.
    """

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | Literal[True] = True,
        proxy: str | None = None,
        max_connections: int = 1000,
        keepalive_s: float = 30.0,
        transport: Callable[[], httpx2.AsyncBaseTransport] | None = None,
    ) -> None:
        self._verify = verify
        self._proxy = proxy
        self._limits = httpx2.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=keepalive_s
        )
        self._transport = transport
        self._context: ssl.SSLContext | None = verify if isinstance(verify, ssl.SSLContext) else None
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, httpx2.AsyncBaseTransport]]
        self._pools = WeakKeyDictionary()
        self._routes: dict[tuple[str, str, str], tuple[Deployment, _Route]] = {}

    def dialect(self, deployment: Deployment, asked: str) -> str | None:
        return pick_dialect(deployment.platform.dialects, asked)

    async def send(self, deployment: Deployment, request: ModelRequest) -> Upstream:
        route = self._route(deployment, request)
        content = _encoded(_body(deployment, request))
        times = request.timeouts or deployment.timeouts
        seconds = {"connect": times.connect_s, "pool": times.connect_s, "read": times.read_s, "write": times.read_s}
        sent = httpx2.Request(
            "POST",
            route.url,
            headers=[*route.headers, *forwarded(request.headers)],
            content=content,
            extensions={"timeout": seconds},
        )
        loop = asyncio.get_running_loop()
        pool = self._pool(loop, route)
        deadline = None if times.total_s is None else loop.time() + times.total_s
        response: httpx2.Response | None = None
        failure: _Failure = ("timeout", "no answer came in time", True)
        try:
            async with asyncio.timeout_at(deadline):
                response = await pool.handle_async_request(sent)
        except TimeoutError:
            pass
        except httpx2.TransportError as error:
            failure = _classified(error)
        # Out of the handler, so that the library's error is not in the context of ours.
        if response is None:
            raise _failed(deployment, route, failure)
        encoding = response.headers.get("content-encoding", "").encode("latin-1")
        decoder = decoder_for(encoding) if encoding else None
        if encoding and decoder is None:
            await response.aclose()
            raise _failed(
                deployment, route, ("malformed", f"it is encoded as {encoding[:40]!r}, which nobody asked for", True)
            )
        return _Answer(deployment, route, response, decoder, deadline, route.reads)

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        for pool in self._pools.pop(asyncio.get_running_loop(), {}).values():
            await pool.aclose()

    def _route(self, deployment: Deployment, request: ModelRequest) -> _Route:
        key = (deployment.name, request.dialect, request.model or deployment.model)
        made = self._routes.get(key)
        if made is None or made[0] is not deployment:
            if len(self._routes) > 4096:  # models of deployments that serve any
                self._routes.clear()
            made = self._routes[key] = (deployment, _Route(deployment, request.dialect, key[2]))
        return made[1]

    def _pool(self, loop: asyncio.AbstractEventLoop, route: _Route) -> httpx2.AsyncBaseTransport:
        pools = self._pools.get(loop)
        if pools is None:
            pools = self._pools[loop] = {}
        pool = pools.get(route.origin)
        if pool is None:
            pool = pools[route.origin] = self._make(route) if self._transport is None else self._transport()
        return pool

    def _make(self, route: _Route) -> httpx2.AsyncBaseTransport:
        proxy = self._proxy
        if proxy is None and not proxy_bypass(route.url.host):
            found = getproxies()
            proxy = found.get(route.url.scheme) or found.get("all")
        context = self._context
        if context is None and route.url.scheme == "http" and proxy is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, and the library makes a slow one otherwise
        elif context is None:  # one for all hosts: it is slow to make, and large
            context = self._context = httpx2.create_ssl_context()
        return httpx2.AsyncHTTPTransport(verify=context, limits=self._limits, proxy=proxy)


class _Route:
    """Where the requests of one deployment go in one dialect, and what goes along. Never shown: it has the key."""

    __slots__ = ("headers", "origin", "path", "reads", "url")

    def __init__(self, deployment: Deployment, dialect: str, model: str) -> None:
        platform = deployment.platform
        self.url = httpx2.URL(_url(deployment, dialect, model))
        self.path = self.url.path
        self.origin = f"{self.url.scheme}://{self.url.netloc.decode('ascii')}"
        self.reads = platform.reads.get(dialect, dialect)
        headers: dict[str, str | Secret] = {
            "accept-encoding": "gzip",
            "content-type": "application/json",
            "user-agent": "asgi-llm-guard",
            **dict(platform.headers),
            **_credentials(deployment),
            **deployment.headers,
        }
        self.headers = [
            (name.encode("ascii"), (value.reveal() if isinstance(value, Secret) else value).encode("ascii"))
            for name, value in headers.items()
        ]


def _credentials(deployment: Deployment) -> dict[str, str | Secret]:
    options, key = deployment.options, deployment.key
    said: dict[str, str | Secret] = {}
    token = options.get("azure_ad_token")
    if key is not None:
        if deployment.platform.auth == "bearer":
            said["authorization"] = Secret(f"Bearer {key.reveal()}")
        else:
            said[deployment.platform.auth] = key
    elif isinstance(token, Secret):
        said["authorization"] = Secret(f"Bearer {token.reveal()}")
    for name in ("organization", "project"):
        value = options.get(name)
        if deployment.provider == "openai" and isinstance(value, str):
            said[f"openai-{name}"] = value
    return said


def _url(deployment: Deployment, dialect: str, model: str) -> str:
    base, path = deployment.api_base or "", deployment.platform.paths[dialect]
    version = deployment.options.get("api_version")
    if deployment.provider in ("azure", "azure_ai"):
        base = base.partition("/openai")[0]
        if not isinstance(version, str) or version == "v1" or deployment.provider == "azure_ai":
            return f"{base.removesuffix('/models')}/openai/v1{path}"
        where = "" if dialect == "openai_responses" else f"/deployments/{quote(model, safe='')}"
        return f"{base}/openai{where}{path}?api-version={quote(version, safe='')}"
    first = "/" + path.split("/")[1]
    if base.endswith(first) and first.startswith("/v"):  # `/v1` of a base, and of the path
        base = base.removesuffix(first)
    return base + path


# -------------------------------------------------------------------------------- bodies


def _body(deployment: Deployment, request: ModelRequest) -> dict[str, object]:
    platform, chat = deployment.platform, request.dialect == "openai"
    given = request.body
    body: dict[str, object] = {**_defaults(deployment, request), **given}
    body["model"] = request.model or deployment.model
    body.pop("stream", None)
    if request.stream:
        body["stream"] = True
    wanted = platform.output_limit
    if chat and wanted is not None:
        other = _LIMITS[1] if wanted == _LIMITS[0] else _LIMITS[0]
        limit = body.pop(other, None)
        if limit is not None:
            body.setdefault(wanted, limit)
    if chat and not platform.stream_usage:
        body.pop("stream_options", None)
    elif request.stream and request.dialect in _CHATS:
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return body


def _defaults(deployment: Deployment, request: ModelRequest) -> dict[str, object]:
    """What the deployment says where the request does not, under the names of the dialect."""
    params = dict(deployment.params)
    limit = next((params.pop(name) for name in ("max_output_tokens", *_LIMITS) if name in params), None)
    names = {"openai_responses": ("max_output_tokens",), "openai": _LIMITS, "openai_embeddings": ()}
    spellings = names.get(request.dialect, ("max_tokens",))
    if limit is not None and spellings and not any(name in request.body for name in spellings):
        params[spellings[-1]] = limit
    return params


def _encoded(body: dict[str, object]) -> bytes:
    problem = ""
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        problem = type(error).__name__
    raise CannotExpress("body", f"cannot be written as JSON ({problem}): plain dicts, lists, texts and numbers can")


# -------------------------------------------------------------------------------- answers


class _Answer:
    """A running answer."""

    __slots__ = ("_deadline", "_decoder", "_deployment", "_response", "_route", "dialect", "headers", "path", "status")

    def __init__(
        self,
        deployment: Deployment,
        route: _Route,
        response: httpx2.Response,
        decoder: Decoder | None,
        deadline: float | None,
        dialect: str,
    ) -> None:
        self.status = response.status_code
        self.headers: Headers = [pair for pair in response.headers.raw if pair[0].lower() not in _OF_ITS_CONNECTION]
        self.dialect = dialect
        self.path = route.path
        self._deployment = deployment
        self._route = route
        self._response = response
        self._decoder = decoder
        self._deadline = deadline

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces() if self.status < 400 else self._error()

    async def aclose(self) -> None:
        await self._response.aclose()

    async def _pieces(self) -> AsyncIterator[bytes]:
        decoder = self._decoder
        stream = self._response.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 - of an asynchronous transport
        chunks = aiter(stream)
        failure: _Failure | None = None
        try:
            while failure is None:
                chunk = b""
                try:
                    async with asyncio.timeout_at(self._deadline):
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    failure = ("timeout", "the answer did not end in time", True)
                except httpx2.TransportError as error:
                    kind, what, _ = _classified(error)
                    failure = (kind, what, True)
                if failure is not None:
                    break
                if decoder is None:
                    yield chunk
                    continue
                pieces = decoder.feed(chunk)
                while failure is None:
                    piece: bytes | None = None
                    try:
                        piece = next(pieces, None)
                    except ValueError:
                        failure = ("malformed", "the body is not encoded as it says", True)
                    if piece is None:
                        break
                    yield piece
            raise _failed(self._deployment, self._route, failure)
        finally:
            await self._response.aclose()

    async def _error(self) -> AsyncIterator[bytes]:
        """An error's body: whole, because keys that it repeats may be spread over chunks."""
        body = bytearray()
        most: int | None = None
        async for piece in self._pieces():
            body += piece
            if len(body) >= _ERROR_BYTES:
                most = _ERROR_BYTES // 2  # at the end of what was read there may be the half of a key
                await self.aclose()
                break
        yield self._deployment.redacted(body.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")[
            :most
        ]


def _classified(error: httpx2.TransportError) -> _Failure:
    unsent = isinstance(error, _NEVER_SENT)
    causes = tuple(_causes(error))
    tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
    if unsent and tls is not None:
        said = getattr(tls, "verify_message", "") or getattr(tls, "reason", "") or ""
        return "tls", f"TLS failed{f' ({said})' if said else ''}", False
    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return "connect", "no connection in time", False
    if isinstance(error, httpx2.TimeoutException):
        return "timeout", "no byte came in time", True
    if unsent:
        found = any(isinstance(cause, gaierror) for cause in causes)
        return "connect", "no such host" if found else "no connection", False
    if isinstance(error, httpx2.RemoteProtocolError) and not _ended(error):
        return "malformed", "what came is no HTTP", True
    return "cut", "the connection ended before the answer", True


def _ended(error: Exception) -> bool:
    """Whether the other side went away, rather than saying something that is no HTTP."""
    return any(word in str(error) for word in ("disconnected", "closed connection", "terminated"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _failed(deployment: Deployment, route: _Route, failure: _Failure) -> TransportFailed:
    kind, what, sent = failure
    host = urlsplit(route.origin).netloc
    return TransportFailed(kind, f"{deployment.name} at {host}: {what}", sent=sent, deployment=deployment.name)
