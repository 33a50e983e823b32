"""The client hook of httpx and httpx2: transports that guard what the SDKs on top of them send.

    client = AsyncOpenAI(http_client=guard.httpx_client())
    client = httpx.AsyncClient(transport=AsyncGuardTransport(guard))

Both libraries have the same interface and different classes, and an SDK takes the one it was built on. A
transport answers each request with a response of the library that the request is of. `import httpx` does not
tell which that is: `httpx2.alias_httpx()` may have made it the other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import cache, partial
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack

from asgi_llm_guard import background
from asgi_llm_guard.cache import ProviderAnswer
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import ConfigurationError, NotInstalledError
from asgi_llm_guard.exchange import Exchange, Hook, HookOptions, Outgoing
from asgi_llm_guard.guard import Guard
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

__all__ = ["AsyncGuardTransport", "GuardTransport", "Library", "async_client", "sync_client"]

_log = logging.getLogger("asgi_llm_guard")

Library = Literal["auto", "httpx", "httpx2"]

_LIBRARIES: Final = ("httpx2", "httpx")
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_CODING: Final = frozenset({b"content-length", b"content-encoding"})
_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 600.0
_ENDED: Final = "the admission that this answer was asked for in has ended, and what came of it is charged"


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
            transport = _library(library).AsyncHTTPTransport()
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
            response = await self._transport.handle_async_request(_to_send(request, exchange))
            return _answered(request, response, exchange, "AsyncByteStream", _AsyncBody)
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
            transport = _library(library).HTTPTransport()
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
            return _answered(request, response, exchange, "SyncByteStream", _Body)
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


# ----------------------------------------------------------------------------------- clients


def async_client(guard: Guard, *, library: Library = "auto", **options: Any) -> Any:
    """An `AsyncClient` whose requests are guarded; see `Guard.httpx_client`."""
    made = _library(library)
    hooked, plain = _split(made, options)
    return _wrap(made.AsyncClient(**plain), lambda transport: AsyncGuardTransport(guard, transport, **hooked))


def sync_client(guard: Guard, *, library: Library = "auto", **options: Any) -> Any:
    """A `Client` whose requests are guarded; see `Guard.httpx_client`."""
    made = _library(library)
    hooked, plain = _split(made, options)
    return _wrap(made.Client(**plain), lambda transport: GuardTransport(guard, transport, **hooked))


def _split(library: ModuleType, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the hook and those of the client, with the defaults that the SDKs give to theirs."""
    hooked = {name: value for name, value in options.items() if name in HookOptions.__annotations__}
    plain = {name: value for name, value in options.items() if name not in HookOptions.__annotations__}
    plain.setdefault("follow_redirects", True)
    plain.setdefault("timeout", library.Timeout(_ANSWER_S, connect=_CONNECT_S))
    plain.setdefault("limits", library.Limits(max_connections=1000, max_keepalive_connections=100))
    return hooked, plain


def _wrap(client: Any, wrapped: Callable[[Any], Any]) -> Any:
    """`client` with every transport of its own wrapped, those of proxies too."""
    # No public name leads to them, and a client with a transport of its own takes no notice of proxies, limits
    # and certificates.
    client._transport = wrapped(client._transport)  # noqa: SLF001
    client._mounts = {  # noqa: SLF001
        pattern: None if transport is None else wrapped(transport)
        for pattern, transport in client._mounts.items()  # noqa: SLF001
    }
    return client


def _library(name: Library) -> ModuleType:
    if name not in ("auto", *_LIBRARIES):
        raise ConfigurationError(f"library: expected 'auto', 'httpx' or 'httpx2', got {name!r}")
    for candidate in _LIBRARIES if name == "auto" else (name,):
        try:
            return importlib.import_module(candidate)
        except ImportError:
            continue
    raise NotInstalledError("a guarded client", "httpx")


# ---------------------------------------------------------------------------------- requests


def _library_of(request: Any) -> ModuleType:
    """The library that a request is of: by its class, or the one that its class comes from."""
    for kind in type(request).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _LIBRARIES:
            return sys.modules[root]
    raise TypeError(f"a guarded transport got a request of {type(request)!r}, which is of neither httpx nor httpx2")


def _outgoing(request: Any) -> Outgoing:
    url = request.url
    return Outgoing(request.method, str(url), url.host, url.path, request.headers.raw)


def _content(request: Any) -> bytes | None:
    """The body, if it is there as a whole."""
    try:
        content: bytes = request.content
    except _library_of(request).RequestNotRead:
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
    return _library_of(request).Request(
        request.method, request.url, headers=headers, content=exchange.body, extensions=request.extensions
    )


# --------------------------------------------------------------------------------- responses


def _refusal(hook: Hook, denied: Denied, outgoing: Outgoing, request: Any) -> Any:
    rendered = hook.rendered(denied, outgoing)
    return _library_of(request).Response(
        rendered.status, headers=rendered.headers, content=rendered.body, extensions={REFUSED: denied}
    )


def _kept(request: Any, answer: ProviderAnswer) -> Any:
    return _library_of(request).Response(answer.status, headers=answer.headers, content=answer.body)


def _answered(request: Any, response: Any, exchange: Exchange, kind: str, body: type) -> Any:
    """`response` with a body that is metered as it is read."""
    stream, headers = response.stream, response.headers.raw
    if response.is_stream_consumed or response.is_closed:
        # A transport below has read it: what is left is the content, decoded.
        headers = [(name, value) for name, value in headers if name.lower() not in _CODING]
        stream = _library_of(request).ByteStream(response.content)
    exchange.answered(response.status_code, headers)
    if exchange.plain:
        headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    library = _library_of(request)
    return library.Response(
        response.status_code,
        headers=headers,
        stream=_stream_class(library, kind, body)(stream, exchange),
        extensions=response.extensions,
    )


@cache
def _stream_class(library: ModuleType, kind: str, body: type) -> Callable[[Any, Exchange], Any]:
    """The class of response bodies: clients ask whether a body is one of their library's."""
    made: Callable[[Any, Exchange], Any] = type("GuardedStream", (body, getattr(library, kind)), {})
    return made


class _Expired(Exception):  # noqa: N818 - no error: a deadline has passed
    pass


class _AsyncBody:
    """The body of an answer, metered as it passes. Not a generator: nobody but its owner closes it."""

    def __init__(self, stream: Any, exchange: Exchange) -> None:
        self._stream = stream
        self._exchange = exchange
        self._parts: AsyncIterator[bytes] | None = None
        self._over = False
        self._left = False
        self._loop = asyncio.get_running_loop()
        self._abandoned = weakref.finalize(self, background.later, partial(_give_up, stream, exchange, self._loop))
        self._abandoned.atexit = False
        if exchange.call is not None:
            exchange.call.leave = partial(_leave, weakref.ref(self))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        exchange = self._exchange
        if self._left:
            raise _library_of(self).ReadError(_ENDED)
        while not self._over:
            try:
                forward = exchange.feed(await self._next())
                if exchange.wants_growth:
                    forward += await exchange.grow()
            except StopAsyncIteration:
                self._over = True
                # Before the client can see the end: its next request finds this one settled.
                forward = exchange.finish()
                self._abandoned.detach()
            except _Expired:
                forward = exchange.expire()
                await self._leave()
            except BaseException as error:
                self._over = True
                exchange.fail(error)
                raise
            if exchange.cut and not self._over:
                await self._leave()
            if forward:
                return forward
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        if self._parts is None:
            self._parts = aiter(self._stream)
            if self._exchange.call is not None:
                self._exchange.call.task = asyncio.current_task()  # which may be another one than has asked for it
        if not self._exchange.timed:
            return await anext(self._parts)
        waiting = asyncio.timeout(self._exchange.wait_s())
        try:
            async with waiting:
                return await anext(self._parts)
        except TimeoutError:
            if waiting.expired():
                raise _Expired from None
            raise

    async def _leave(self) -> None:
        if not self._stop():
            await self._stream.aclose()

    def _stop(self) -> bool:
        """The client gets nothing more. Whether the answer is read to its end, in the background; else close it."""
        self._over = True
        self._abandoned.detach()
        if not self._exchange.drains:
            self._exchange.close()
            return False
        task = _in_background(self._loop, self._drain())
        if self._exchange.call is not None:
            self._exchange.call.task = task  # it goes on when the request that asked for it has ended
        return True

    def leave(self) -> None:
        """Its admission has ended, and nobody goes on with it: who does gets an error."""
        if self._over:
            return
        self._left = True
        if not self._stop():
            _in_background(self._loop, _close(self._stream))

    async def _drain(self) -> None:
        exchange = self._exchange
        try:
            while True:
                exchange.feed(await self._next())
        except StopAsyncIteration:
            exchange.finish()
        except _Expired:
            pass
        except Exception:  # noqa: BLE001 - nobody waits for it: what was counted until then is charged
            _log.debug("an answer that was read to its end for its usage broke off", exc_info=True)
        finally:
            exchange.close()
            await self._stream.aclose()

    async def aclose(self) -> None:
        if not self._over:
            await self._leave()
        elif not self._exchange.drains:
            await self._stream.aclose()


_background: Final[set[asyncio.Task[None]]] = set()
"""The event loop alone would forget them."""


def _in_background(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = loop.create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


async def _close(stream: Any) -> None:
    try:
        await stream.aclose()
    except Exception:  # noqa: BLE001 - nobody waits for it
        _log.debug("an answer that nobody reads could not be closed", exc_info=True)


def _leave(body: weakref.ref[_AsyncBody]) -> None:
    """Stop reading what nobody can go on with. From whatever thread; the body need not be there any more."""
    alive = body()
    if alive is None:
        return
    loop = alive._loop  # noqa: SLF001 - in this module
    try:
        here = asyncio.get_running_loop() is loop
    except RuntimeError:
        here = False
    if here:
        alive.leave()
        return
    with contextlib.suppress(RuntimeError):  # its event loop is closed, and its connections with it
        loop.call_soon_threadsafe(alive.leave)


def _give_up(stream: Any, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> None:
    """A body was dropped without being closed."""
    exchange.close()
    with contextlib.suppress(RuntimeError):  # as above
        loop.call_soon_threadsafe(lambda: _in_background(loop, _close(stream)))


class _Body:
    """As `_AsyncBody`, for synchronous clients, which cannot stop waiting: a deadline that has passed shows when
    the next part has come."""

    def __init__(self, stream: Any, exchange: Exchange) -> None:
        self._stream = stream
        self._exchange = exchange
        self._parts: Iterator[bytes] | None = None
        self._over = False
        self._left = False
        self._abandoned = weakref.finalize(self, background.later, partial(_give_up_sync, stream, exchange))
        self._abandoned.atexit = False
        if exchange.call is not None:
            exchange.call.leave = partial(_leave_sync, weakref.ref(self))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        exchange = self._exchange
        if self._left and not self._over:
            self.close()
            raise _library_of(self).ReadError(_ENDED)
        while not self._over:
            try:
                forward = exchange.feed(self._next())
                if exchange.wants_growth:
                    forward += exchange.grow_sync()
            except StopIteration:
                self._over = True
                forward = exchange.finish()
                self._abandoned.detach()
            except _Expired:
                forward = exchange.expire()
                self._leave()
            except BaseException as error:
                self._over = True
                exchange.fail(error)
                raise
            if exchange.cut and not self._over:
                self._leave()
            if forward:
                return forward
        raise StopIteration

    def _next(self) -> bytes:
        if self._parts is None:
            self._parts = iter(self._stream)
        part = next(self._parts)
        if self._exchange.wait_s() == 0:
            self._exchange.feed(part)
            raise _Expired
        return part

    def _leave(self) -> None:
        self._over = True
        self._abandoned.detach()
        if self._exchange.drains:
            threading.Thread(target=self._drain, name="llm-guard-drain", daemon=True).start()
            return
        self._exchange.close()
        self._stream.close()

    def _drain(self) -> None:
        exchange = self._exchange
        try:
            while True:
                exchange.feed(self._next())
        except StopIteration:
            exchange.finish()
        except _Expired:
            pass
        except Exception:  # noqa: BLE001 - as above
            _log.debug("an answer that was read to its end for its usage broke off", exc_info=True)
        finally:
            exchange.close()
            self._stream.close()

    def leave(self) -> None:
        """Its admission has ended, and nobody goes on with it: who does gets an error, and the answer is closed."""
        self._left = True

    def close(self) -> None:
        if not self._over:
            self._leave()
        elif not self._exchange.drains:
            self._stream.close()


def _leave_sync(body: weakref.ref[_Body]) -> None:
    alive = body()
    if alive is not None:
        alive.leave()


def _give_up_sync(stream: Any, exchange: Exchange) -> None:
    exchange.close()
    try:
        stream.close()
    except Exception:  # noqa: BLE001 - nobody waits for it
        _log.debug("an answer that nobody reads could not be closed", exc_info=True)
