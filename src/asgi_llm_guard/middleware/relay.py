"""A streamed answer on its way from the application to the client, and what each of them learns of its end.

Rule 1: the client that was cut off has its last event; whatever the application sends after it goes nowhere.

Rule 2: to the application, a client that was cut off has left: `send` raises, and `receive` says so. Unless the answer
is to be read to its end: then the application does not learn that anybody has left.

Rule 3: at a deadline the application is cancelled where it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from asgi_llm_guard.middleware.answers import Message, Receive, Send
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.streams import StreamGuard

__all__ = ["CutOff", "Relay", "is_cut_off", "say_last"]

_LAST_EVENT_S: Final = 1.0
"""How long a client that does not read is given for the last event."""
_CAUSES: Final = 8


class CutOff(OSError):  # noqa: N818 - servers raise an OSError, too, where a client has left
    """What `send` raises in an application whose client was cut off."""


class Relay:
    """Passes one streamed answer on.

    Args:
        rules: what holds for it.
        send: to the client.
        settle: called once when its usage is known as far as it will be, with whether it came to its end.
    """

    __slots__ = ("_deadline", "_gone", "_over", "_rules", "_send", "_settle", "_settled", "_stream", "_timer")

    def __init__(self, rules: StreamRules, send: Send, settle: Callable[[bool], None]) -> None:
        self._rules = rules
        self._send = send
        self._settle = settle
        self._settled = False
        self._stream: StreamGuard | None = None
        self._gone = False
        """The client gets nothing more."""
        self._over = asyncio.Event()
        """The application may learn that its client has left."""
        self._deadline: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def gone(self) -> bool:
        """The client has left, or was cut off."""
        return self._gone

    def begin(self, stream: StreamGuard) -> None:
        """The answer is a stream, and begins now."""
        self._stream = stream
        self._watch()

    async def run(self, application: Callable[[], Awaitable[None]]) -> None:
        """Run the application, until the stream has reached its deadline."""
        try:
            await self._run(application)
        finally:
            self._settle = _nothing  # whoever is told knows this, too: only the garbage collector would free the two

    async def _run(self, application: Callable[[], Awaitable[None]]) -> None:
        if not self._rules.timed:
            await application()
            return
        deadline = self._deadline = asyncio.timeout(None)
        try:
            async with deadline:
                await application()
        except TimeoutError:
            if not deadline.expired():
                raise
            await self._expire()
        finally:
            self._deadline = None
            if self._timer is not None:
                self._timer.cancel()

    async def pass_on(self, message: Message) -> None:
        """Pass one part of the body on. Raises `CutOff` after the client was cut off."""
        stream, body, last = self._stream, message.get("body", b""), not message.get("more_body", False)
        assert stream is not None  # noqa: S101 - `begin` was told
        if self._gone:
            if self._over.is_set():
                raise CutOff("the client has been cut off")
            stream.feed(body)
            if last:
                stream.finish()
                self._finish(complete=True)
            return
        forward: bytes = stream.feed(body)
        if stream.wants_growth:
            forward += await stream.grow()
        if stream.ended and not last:
            await self._cut_off(forward)
            return
        if last:
            forward += stream.finish()
            self._finish(complete=stream.denied is None)
        try:
            await self._send(message if forward is body else {**message, "body": forward})
        except OSError:
            if last or self._rules.drain != "read":
                raise
            self._gone = True

    async def _cut_off(self, forward: bytes) -> None:
        self._gone = True
        if self._rules.drain == "close":
            self._finish(complete=False)
        await self._send({"type": "http.response.body", "body": forward, "more_body": False})

    def _finish(self, *, complete: bool) -> None:
        self._over.set()
        if not self._settled:
            self._settled = True
            self._settle(complete)

    # ------------------------------------------------------------------------------ receive

    def receive_from(self, receive: Receive) -> Receive:
        """What the application receives."""

        async def watched() -> Message:
            if self._over.is_set():
                return _LEFT
            told = asyncio.ensure_future(receive())
            over = asyncio.ensure_future(self._over.wait())
            try:
                await asyncio.wait((told, over), return_when=asyncio.FIRST_COMPLETED)
                if not told.done():
                    return _LEFT
                message = told.result()
                if message["type"] == "http.disconnect" and self._reads_on():
                    self._gone = True
                    await self._over.wait()
                return message
            finally:
                told.cancel()
                over.cancel()

        return watched

    def _reads_on(self) -> bool:
        return self._rules.drain == "read" and self._stream is not None

    # ---------------------------------------------------------------------------- deadlines

    def _watch(self) -> None:
        stream, deadline = self._stream, self._deadline
        if stream is None or deadline is None or (self._settled and self._gone):
            return
        wait_s = stream.wait_s()
        loop = asyncio.get_running_loop()
        if wait_s:
            self._timer = loop.call_later(wait_s, self._watch)
        elif wait_s is not None:
            deadline.reschedule(loop.time())

    async def _expire(self) -> None:
        stream = self._stream
        assert stream is not None  # noqa: S101 - only a stream has a deadline
        await self.end(b"" if self._gone else stream.expire())

    async def end(self, last: bytes) -> None:
        """The application has been cancelled: the client gets `last`, and nothing more."""
        self._finish(complete=False)
        if not self._gone:
            self._gone = True
            await say_last(self._send, last)


def _nothing(complete: bool) -> None:
    """The application is over: nobody settles by what it sends."""


async def say_last(send: Send, last: bytes) -> None:
    """End a response; a client that does not read is not waited for."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LAST_EVENT_S):
            await send({"type": "http.response.body", "body": last, "more_body": False})


_LEFT: Final[Message] = {"type": "http.disconnect"}


def is_cut_off(error: BaseException, depth: int = 0) -> bool:
    """Whether an exception is what became of a `CutOff` on its way through the application."""
    seen: BaseException | None = error
    while seen is not None and depth < _CAUSES:
        if isinstance(seen, CutOff):
            return True
        depth += 1
        if isinstance(seen, BaseExceptionGroup):
            return all(is_cut_off(each, depth) for each in seen.exceptions)
        seen = seen.__cause__ or seen.__context__
    return False
