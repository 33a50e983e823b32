"""The bodies of answers, metered as a client reads them, and settled however it leaves them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any, Final, Self

from asgi_llm_guard import background
from asgi_llm_guard.exchange import Exchange
from asgi_llm_guard.halting import Halted, Wait
from asgi_llm_guard.httpx.library import library_of

__all__ = ["async_body", "sync_body"]

_log = logging.getLogger("asgi_llm_guard")

_ENDED: Final = "the admission that this answer was asked for in has ended, and what came of it is charged"


def async_body(library: ModuleType, stream: Any, exchange: Exchange) -> Any:
    """`stream` as a body of the library, for asynchronous clients."""
    return _stream_class(library, "AsyncByteStream", _AsyncBody)(stream, exchange)


def sync_body(library: ModuleType, stream: Any, exchange: Exchange) -> Any:
    """`stream` as a body of the library, for synchronous clients."""
    return _stream_class(library, "SyncByteStream", _Body)(stream, exchange)


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
        self._wait = None if exchange.call is None else Wait(exchange.call, exchange.halt)
        if exchange.call is not None:
            exchange.call.leave = partial(_leave, weakref.ref(self))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        exchange = self._exchange
        if self._left:
            raise library_of(self).ReadError(_ENDED)
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
            except Halted as halted:
                forward = await self._halted(halted)
            except BaseException as error:
                self._over = True
                exchange.fail(error)
                raise
            if exchange.cut and not self._over:
                await self._leave()
            if forward:
                return forward
        raise StopAsyncIteration

    async def _halted(self, halted: Halted) -> bytes:
        last = self._exchange.halted_end()
        await self._leave()
        if last is None:  # no stream, or one that nothing can be added to
            raise library_of(self).ReadError(str(halted))
        return last

    async def _next(self) -> bytes:
        if self._parts is None:
            self._parts = aiter(self._stream)
            if self._exchange.call is not None:
                self._exchange.call.task = asyncio.current_task()  # which may be another one than has asked for it
        if not self._exchange.timed:
            return await self._part()
        waiting = asyncio.timeout(self._exchange.wait_s())
        try:
            async with waiting:
                return await self._part()
        except TimeoutError:
            if waiting.expired():
                raise _Expired from None
            raise

    async def _part(self) -> bytes:
        if self._wait is None:
            return await anext(self._parts)  # type: ignore[arg-type]  # `_next` began it
        return await self._wait.on(anext, self._parts)

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
            raise library_of(self).ReadError(_ENDED)
        while not self._over:
            if exchange.halted is not None and exchange.halt():
                return self._halted(exchange.halted.message)
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

    def _halted(self, message: str) -> bytes:
        last = self._exchange.halted_end()
        self._leave()
        if not last:
            raise library_of(self).ReadError(message)
        return last

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
