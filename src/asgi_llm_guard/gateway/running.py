"""A streamed answer on its way: held back until its first words, then passed on to its end, or to where it broke off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, Final

from asgi_llm_guard.gateway.errors import Failure
from asgi_llm_guard.gateway.failures import ErrorClass, class_of, class_of_error
from asgi_llm_guard.gateway.faults import last_event
from asgi_llm_guard.gateway.providers.base import TransportFailed, Upstream, let_go
from asgi_llm_guard.gateway.saying import begins_tool_call, message_of
from asgi_llm_guard.gateway.translate import Transcoder
from asgi_llm_guard.halting import Halted, Wait
from asgi_llm_guard.streams import StreamGuard

if TYPE_CHECKING:
    from asgi_llm_guard.decision import Denied
    from asgi_llm_guard.gateway.attempt import Attempt

__all__ = ["CLASSES", "Running"]

_log = logging.getLogger("asgi_llm_guard")

CLASSES: Final[dict[str, ErrorClass]] = {
    "connect": "connection",
    "tls": "connection",
    "timeout": "timeout",
    "cut": "connection",
    "malformed": "connection",
}
"""What it means that no answer came, or not to its end."""


class Running:
    """A streamed answer in the dialect of the client, from its first words on."""

    __slots__ = ("_attempt", "_drain", "_held", "_last", "_pieces", "_stream", "_transcoder", "_upstream", "_wait")

    def __init__(
        self,
        attempt: Attempt,
        upstream: Upstream,
        pieces: AsyncIterator[bytes],
        stream: StreamGuard,
        transcoder: Transcoder | None,
    ) -> None:
        self._attempt = attempt
        self._upstream = upstream
        self._pieces = pieces
        self._stream = stream
        self._transcoder = transcoder
        self._held: list[bytes] = []
        self._drain: asyncio.Task[None] | None = None
        self._last = b""
        self._wait = Wait(attempt.call, self._end_at_once)
        attempt.call.leave = self.leave

    async def begin(self) -> Failure | None:
        """Read up to the first words; what has come of them is given later. A `Failure`: there are none."""
        attempt, stream = self._attempt, self._stream
        try:
            while True:
                chunk = await self._next()
                if chunk is None:
                    break
                self._held.append(await self._through(chunk))
                answer = stream.meter.answer()
                if answer.unread:  # no client could go on after it
                    return await self._no_answer("empty", "the stream begins with an event that cannot be read")
                if stream.meter.text_bytes or begins_tool_call(chunk):
                    attempt.first_part()
                    return None
                if answer.kind == "error":
                    return await self._no_answer(class_of(None, answer.error, chunk), message_of(_data_of(chunk)))
        except TransportFailed as error:
            return await self._no_answer(CLASSES[error.kind], str(error), error)
        except Halted:
            raise
        except TimeoutError as error:
            stream.expire()
            return await self._no_answer("timeout", "nothing has come in time", error)
        except TypeError as error:
            _log.warning("the answer of %s is not built as one", attempt.place.name, exc_info=error)
            return await self._no_answer("other", f"{type(attempt.place.provider).__name__}: {error}", error)
        except Exception as error:  # noqa: BLE001 - the answer of somebody's own provider
            _log.warning("the answer of %s broke off", attempt.place.name, exc_info=error)
            what = f"{type(attempt.place.provider).__name__} raised {type(error).__name__}"
            return await self._no_answer(class_of_error(error), what, error)
        self._held.append(self._finish())
        answer = stream.meter.answer()
        if answer.kind == "error":
            return await self._no_answer(class_of(None, answer.error), "the stream is an error")
        return await self._no_answer("empty", "the stream has neither text nor a tool call")

    async def _no_answer(self, kind: ErrorClass, message: str, error: BaseException | None = None) -> Failure:
        await let_go(self._upstream)
        answer = self._stream.answer()
        if answer is not None:
            self._attempt.call.answered(answer)
        return await self._attempt.failed(kind, error=error, message=message)

    async def _next(self) -> bytes | None:
        """The next piece of the upstream; `None`: it has come to its end."""
        wait_s = self._stream.wait_s()
        try:
            if wait_s is None:
                return await self._wait.on(anext, self._pieces)
            async with asyncio.timeout(wait_s):
                return await self._wait.on(anext, self._pieces)
        except StopAsyncIteration:
            return None

    async def _through(self, chunk: bytes) -> bytes:
        stream = self._stream
        forward = stream.feed(chunk)
        if stream.wants_growth:
            forward += await stream.grow()
        return forward if self._transcoder is None else self._transcoder.feed(forward)

    def _finish(self) -> bytes:
        forward = self._stream.finish()
        if self._transcoder is None:
            return forward
        return (self._transcoder.feed(forward) if forward else b"") + self._transcoder.finish()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes for the client. Never raises but for the client's own sake."""
        stream, attempt = self._stream, self._attempt
        try:
            held, self._held = b"".join(self._held), []
            if held:
                yield held
            while not stream.ended:
                try:
                    chunk = await self._next()
                    if chunk is None:
                        break
                    forward = await self._through(chunk)
                except TransportFailed as error:
                    last = self._broken(error)
                    attempt.stream_ended(stream, error, complete=False, failure=CLASSES[error.kind])
                    await attempt.tell_broken(CLASSES[error.kind], str(error))
                    yield last
                    return
                except Halted as halted:
                    last = self._halted_end(halted.denied)
                    attempt.stream_ended(stream, None, complete=False, failure=None)
                    yield last
                    return
                except TimeoutError:
                    last = stream.expire()
                    attempt.stream_ended(stream, None, complete=False, failure="timeout")
                    yield last
                    return
                except Exception as error:  # noqa: BLE001 - the answer of somebody's own provider
                    _log.warning("the answer of %s broke off", attempt.place.name, exc_info=error)
                    last = self._broken(_own(error))
                    attempt.stream_ended(stream, error, complete=False, failure=class_of_error(error))
                    await attempt.tell_broken(class_of_error(error), type(error).__name__)
                    yield last
                    return
                if forward:
                    yield forward
            last = b"" if stream.ended else self._finish()
            answer = stream.meter.answer()
            kind = class_of(None, answer.error) if answer.kind == "error" else None
            # Handed over before the client can see the end: its next request finds this one settled.
            attempt.stream_ended(stream, None, complete=stream.denied is None, failure=kind)
            if kind is not None:
                await attempt.tell_broken(kind, "an error in mid-stream")
            if last:
                yield last
        finally:
            await self.aclose()

    def _end_at_once(self) -> bool:
        """End the stream for the client, that was ended from outside; whether that could be done at once."""
        halted = self._attempt.call.halted
        if self._transcoder is None and halted is not None:
            self._last += self._stream.halt(halted)
            return self._stream.ended
        return True  # what is translated goes out in whole events

    def _halted_end(self, denied: Denied) -> bytes:
        if self._transcoder is not None:
            return self._stream.last_event(denied)
        return self._last if self._stream.ended else self._last + self._stream.finish()

    def _broken(self, error: TransportFailed) -> bytes:
        """What tells the client that the answer broke off."""
        meter = self._stream.meter
        if self._transcoder is not None:
            return self._transcoder.finish()
        forward = meter.cut(last_event(error, self._attempt.question.dialect))
        return forward if meter.ended else forward + meter.finish()

    def leave(self) -> None:
        """Its admission has ended, and nobody goes on with it."""
        if not self._drains():
            _in_background(self.aclose())

    async def aclose(self) -> None:
        """Nobody reads it any more: the upstream is closed, and what was counted is charged. May be called again.

        Where streams are to be read to their end that is done in the background.
        """
        if self._drains():
            return
        try:
            await let_go(self._upstream)
        finally:
            self._attempt.stream_ended(self._stream, None, complete=False, failure=None)

    def _drains(self) -> bool:
        """Whether it is read to its end for what it says of its usage, in a task that has been begun."""
        attempt = self._attempt
        if self._drain is None and attempt.rules.drain == "read" and attempt.open:
            self._drain = _in_background(self._read_on())
            attempt.call.task = self._drain  # it goes on when the request that asked for it has ended
        return self._drain is not None

    async def _read_on(self) -> None:
        stream = self._stream
        try:
            while (chunk := await self._next()) is not None:
                stream.feed(chunk)
            stream.finish()
            self._attempt.stream_ended(stream, None, complete=True, failure=None)
        except (TransportFailed, TimeoutError):
            _log.debug("an answer that was read to its end for its usage broke off", exc_info=True)
        finally:
            await let_go(self._upstream)
            self._attempt.stream_ended(stream, None, complete=False, failure=None)


_background: Final[set[asyncio.Task[None]]] = set()
"""The event loop alone would forget them."""


def _in_background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


def _own(error: Exception) -> TransportFailed:
    return TransportFailed("cut", f"the answer broke off ({type(error).__name__})", sent=True)


def _data_of(chunk: bytes) -> bytes:
    """What the last event in a piece of a stream says."""
    return chunk.rpartition(b"data:")[2].strip()
