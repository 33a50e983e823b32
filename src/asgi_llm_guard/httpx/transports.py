"""Transports that guard what a client of httpx or httpx2 sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from asgi_llm_guard.cache import ProviderAnswer
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.exchange import Exchange, Outgoing
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.halting import Halted
from asgi_llm_guard.hook import Hook, HookOptions
from asgi_llm_guard.httpx.bodies import async_body, sync_body
from asgi_llm_guard.httpx.library import Library, library_named, library_of
from asgi_llm_guard.outcomes import REFUSED

if TYPE_CHECKING:
    import httpx
    import httpx2

    class _AsyncTransport(httpx.AsyncBaseTransport, httpx2.AsyncBaseTransport):
        """A transport of either library, for type checkers."""

        async def handle_async_request(self, request: Any) -> Any: ...

        async def __aenter__(self) -> Self: ...

        async def __aexit__(
            self,
            kind: type[BaseException] | None = ...,
            error: BaseException | None = ...,
            trace: TracebackType | None = ...,
        ) -> None: ...

    class _Transport(httpx.BaseTransport, httpx2.BaseTransport):
        """As above, synchronous."""

        def handle_request(self, request: Any) -> Any: ...

        def __enter__(self) -> Self: ...

        def __exit__(
            self,
            kind: type[BaseException] | None = ...,
            error: BaseException | None = ...,
            trace: TracebackType | None = ...,
        ) -> None: ...
else:
    _AsyncTransport = _Transport = object

__all__ = ["AsyncGuardTransport", "GuardTransport"]

_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_CODING: Final = frozenset({b"content-length", b"content-encoding"})


class AsyncGuardTransport(_AsyncTransport):
    """Guards the requests of an asynchronous client of httpx or httpx2.

    Args:
        guard: decides, and settles.
        transport: what sends the requests; `None`: a new transport of `library`.
        library: `auto`: httpx2 if it is installed, else httpx. A `transport` is of its own library.
        options: see `HookOptions`.

    Raises:
        ConfigurationError: an argument is wrong.
        NotInstalledError: the library is missing.
    """

    def __init__(
        self,
        guard: Guard,
        transport: Any = None,
        *,
        library: Library = "auto",
        **options: Unpack[HookOptions],
    ) -> None:
        if transport is None:
            transport = library_named(library).AsyncHTTPTransport()
        elif not callable(getattr(transport, "handle_async_request", None)):
            raise ConfigurationError(
                f"transport: expected an asynchronous transport such as httpx2.AsyncHTTPTransport(), got {transport!r}"
            )
        self._transport = transport
        self._hook = Hook(guard, caches=True, **options)

    async def handle_async_request(self, request: Any) -> Any:
        outgoing = _outgoing(request)
        exchange = self._hook.begin(outgoing)
        if exchange is None:
            return await self._transport.handle_async_request(request)
        if isinstance(exchange, Denied):
            return _refusal(self._hook, exchange, outgoing, request)
        body = await _read_async(request, exchange.max_body_bytes)
        denied = exchange.too_large() if body is None else await exchange.admit(body)
        if denied is not None:
            return _refusal(self._hook, denied, outgoing, request)
        if exchange.kept is not None:
            return _kept(request, exchange.kept)
        try:
            response = await exchange.sending(self._transport.handle_async_request, _to_send(request, exchange))
            return _answered(request, response, exchange, async_body)
        except Halted as halted:
            exchange.fail(halted)
            return _refusal(self._hook, halted.denied, outgoing, request)
        except BaseException as error:
            exchange.fail(error)
            raise

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(kind, error, trace)


class GuardTransport(_Transport):
    """Guards the requests of a synchronous client of httpx or httpx2; see `AsyncGuardTransport`.

    What is claimed is claimed on a thread of the package's own, so that a client works wherever it worked
    before, on the thread of an event loop too.

    Raises:
        ConfigurationError: an argument is wrong.
        NotInstalledError: the library is missing.
    """

    def __init__(
        self,
        guard: Guard,
        transport: Any = None,
        *,
        library: Library = "auto",
        **options: Unpack[HookOptions],
    ) -> None:
        if transport is None:
            transport = library_named(library).HTTPTransport()
        elif not callable(getattr(transport, "handle_request", None)):
            raise ConfigurationError(
                f"transport: expected a synchronous transport such as httpx2.HTTPTransport(), got {transport!r}"
            )
        self._transport = transport
        self._hook = Hook(guard, caches=True, **options)

    def handle_request(self, request: Any) -> Any:
        outgoing = _outgoing(request)
        exchange = self._hook.begin(outgoing)
        if exchange is None:
            return self._transport.handle_request(request)
        if isinstance(exchange, Denied):
            return _refusal(self._hook, exchange, outgoing, request)
        body = _read(request, exchange.max_body_bytes)
        denied = exchange.too_large() if body is None else exchange.admit_sync(body)
        if denied is not None:
            return _refusal(self._hook, denied, outgoing, request)
        if exchange.kept is not None:
            return _kept(request, exchange.kept)
        try:
            response = self._transport.handle_request(_to_send(request, exchange))
            return _answered(request, response, exchange, sync_body)
        except BaseException as error:
            exchange.fail(error)
            raise

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(kind, error, trace)


# ---------------------------------------------------------------------------------- requests


def _outgoing(request: Any) -> Outgoing:
    url = request.url
    return Outgoing(request.method, str(url), url.host, url.path, request.headers.raw)


def _content(request: Any) -> bytes | None:
    """The body, if it is there as a whole."""
    try:
        content: bytes = request.content
    except library_of(request).RequestNotRead:
        return None
    return content


async def _read_async(request: Any, most: int) -> bytes | None:
    """The body; `None`: it is longer than `most` bytes."""
    content = _content(request)
    if content is not None:
        return content
    parts, length = [], 0
    async for part in request.stream:
        length += len(part)
        if length > most:
            return None
        parts.append(part)
    return b"".join(parts)


def _read(request: Any, most: int) -> bytes | None:
    content = _content(request)
    if content is not None:
        return content
    parts, length = [], 0
    for part in request.stream:
        length += len(part)
        if length > most:
            return None
        parts.append(part)
    return b"".join(parts)


def _to_send(request: Any, exchange: Exchange) -> Any:
    """`request` itself where nothing is changed and it can still be sent, else one like it."""
    if not exchange.rewritten and _content(request) is not None:
        return request
    headers = [(name, value) for name, value in request.headers.raw if name.lower() not in _FRAMING]
    if exchange.plain:
        headers = [(name, value) for name, value in headers if name.lower() != b"accept-encoding"]
        headers.append((b"Accept-Encoding", b"identity"))
    return library_of(request).Request(
        request.method, request.url, headers=headers, content=exchange.body, extensions=request.extensions
    )


# --------------------------------------------------------------------------------- responses


def _refusal(hook: Hook, denied: Denied, outgoing: Outgoing, request: Any) -> Any:
    rendered = hook.rendered(denied, outgoing)
    return _made(request, rendered.status, rendered.headers, rendered.body, {REFUSED: denied})


def _kept(request: Any, answer: ProviderAnswer) -> Any:
    return _made(request, answer.status, answer.headers, answer.body, {})


def _made(request: Any, status: int, headers: Sequence[Any], body: bytes, extensions: dict[str, Any]) -> Any:
    library = library_of(request)
    # A stream, which the client has still to read: of a body that is there already it does not note when it came.
    return library.Response(status, headers=headers, stream=library.ByteStream(body), extensions=extensions)


def _answered(request: Any, response: Any, exchange: Exchange, body: Callable[..., Any]) -> Any:
    """`response` with a body that is metered as it is read."""
    stream, headers = response.stream, response.headers.raw
    if response.is_stream_consumed or response.is_closed:
        # A transport below has read it: what is left is the content, decoded.
        headers = [(name, value) for name, value in headers if name.lower() not in _CODING]
        stream = library_of(request).ByteStream(response.content)
    exchange.answered(response.status_code, headers)
    if exchange.plain:
        headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    library = library_of(request)
    return library.Response(
        response.status_code,
        headers=headers,
        stream=body(library, stream, exchange),
        extensions=response.extensions,
    )
