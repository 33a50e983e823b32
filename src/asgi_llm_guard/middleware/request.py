"""One guarded HTTP request and its response."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from asgi_llm_guard.admission import Admission, enter, leave
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied, Refusal
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.idempotency import KeptResponse
from asgi_llm_guard.identity.base import IdentityError
from asgi_llm_guard.middleware.answers import (
    ErrorPage,
    Message,
    Receive,
    Scope,
    Send,
    refusal_behind,
    refuse,
    unidentified,
)
from asgi_llm_guard.middleware.ending import Ending
from asgi_llm_guard.middleware.incoming import cache_control, read_body
from asgi_llm_guard.middleware.plan import Plan, is_opaque
from asgi_llm_guard.middleware.relay import CutOff, Relay, is_cut_off, say_last
from asgi_llm_guard.replays import Lead
from asgi_llm_guard.streams import StreamGuard
from asgi_llm_guard.wire import is_readable
from asgi_llm_guard.wire.base import Answer, Ask, Dialect, Head, Meter
from asgi_llm_guard.wire.fields import rate_limit_headers
from asgi_llm_guard.wire.forms import read_any
from asgi_llm_guard.wire.meters import Opaque
from asgi_llm_guard.wire.peek import BodyError, BodyView, check_encoding
from asgi_llm_guard.wire.refusals import container_of, stream_error

if TYPE_CHECKING:
    from asgi_llm_guard.middleware.app import GuardMiddleware

__all__ = ["STATE_KEY", "GuardedRequest", "finished"]

STATE_KEY: Final = "asgi_llm_guard"
"""Where the admission stands in the ASGI scope, for code that has lost the context variable."""

_STREAMS: Final = re.compile(rb"text/event-stream|application/(x-)?(ndjson|jsonl)|.*eventstream", re.IGNORECASE)
_BETWEEN: Final = (b"\n\n", b"\r\n\r\n", b"}\n")
_NO_CONTENT: Final = 204
"""Tells no length (RFC 9110 §8.6)."""
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class GuardedRequest:
    """One guarded HTTP request and its response."""

    __slots__ = (
        "accept",
        "admission",
        "ask",
        "body",
        "call",
        "context",
        "cut",
        "denied",
        "dialect",
        "done",
        "ending",
        "fed",
        "guard",
        "headers",
        "kept",
        "last",
        "lead",
        "left",
        "meter",
        "middleware",
        "plan",
        "receive",
        "relay",
        "replayed",
        "scope",
        "send",
        "status",
        "stream",
        "strip",
        "tail",
        "view",
    )

    def __init__(
        self,
        middleware: GuardMiddleware,
        scope: Scope,
        receive: Receive,
        send: Send,
        plan: Plan,
        dialect: Dialect | None,
    ) -> None:
        self.middleware = middleware
        self.guard = middleware.guard
        self.scope = scope
        self.receive = receive
        self.send = send
        self.plan = plan
        self.dialect = dialect
        self.body: bytes | None = None
        self.view: BodyView | None = None
        self.call: Call | None = None
        self.context: Context | None = None
        self.admission: Admission | None = None
        self.ask: Ask | None = None
        self.replayed = False
        self.done = False
        self.status = 0
        self.strip = False
        self.meter: Meter | None = None
        self.relay: Relay | None = None
        self.stream: StreamGuard | None = None
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self.left: int | None = None
        self.fed = False
        self.lead: Lead | None = None
        self.kept: KeptResponse | None = None
        self.ending: Ending | None = None
        self.cut = False
        """The client has got the last event."""
        self.last = b""
        self.tail = b""

    # -------------------------------------------------------------------------------- admit

    async def admit(self) -> Denied | None:
        """Read what is needed, find out who asks, and claim. A `Denied` has taken nothing; nor has what is `kept`.

        Raises:
            ClientLeft: before its body was complete.
        """
        guard, route, dialect = self.guard, self.plan.route, self.dialect
        configuration = self.plan.configuration
        session = route.session or configuration.session
        try:
            if dialect is not None or (self.plan.session_declared and session.needs_body):
                check_encoding(self.scope["headers"])
                self.body = await read_body(self.receive, self.scope, self.guard.max_body_bytes)
                self.view = read_any(self.body, self.scope["headers"])
            context = self.middleware.context(self.scope, self.view, session, route, configuration.identity)
            ask = None
            if dialect is not None and self.view is not None:
                ask = dialect.read_request(self.view, self.scope["path"])
                self.call = guard.engine.describer.describe_body(
                    ask,
                    self.view,
                    provider=dialect.provider,
                    dialect=dialect.name,
                    assumed_output_tokens=route.assumed_output_tokens,
                )
        except BodyError as error:
            return self._refused(_unreadable(error))
        except IdentityError as error:
            return self._refused(unidentified(error))
        self.context = context
        if guard.draining:
            return self._refused(DRAINING)
        repeated = await self._repeated(context)
        if isinstance(repeated, Refusal):
            return self._refused(repeated)
        if isinstance(repeated, KeptResponse):
            self.kept = repeated
            return None
        if repeated is not None:
            self.lead = repeated
            self.send = repeated.watching(self.send)
        admission = guard.new_admission(
            context, extra=self.plan.extra, opaque=is_opaque(guard, route), policies=configuration.policies
        )
        admission.release_on_4xx = route.release_on_4xx
        if guard.cache is not None:
            admission.cache_control = cache_control(self.scope)
        denied = await admission.open(self.call, clamp=route.clamp and (ask is None or ask.limits_output))
        if denied is not None:
            return denied
        self.admission = admission
        self.ask = ask
        return None

    async def _repeated(self, context: Context) -> Lead | KeptResponse | Refusal | None:
        """What an `Idempotency-Key` makes of the request."""
        replays, replay_ms = self.middleware.replays, self.plan.replay_ms
        if replays is None or replay_ms is None:
            return None
        if (stopped := self.guard.engine.overrides.stopped(context, self.call)) is not None:
            return stopped  # nothing is given any more to those who are stopped
        try:
            return await replays.begin(self.scope, context, self._whole_body, replay_ms, self.dialect)
        except BodyError as error:
            return _unreadable(error)

    async def _whole_body(self) -> bytes:
        if self.body is None:
            self.body = await read_body(self.receive, self.scope, self.guard.max_body_bytes)
        return self.body

    def _refused(self, refusal: Refusal) -> Denied:
        context = self.context or Context(route=self.plan.route.path)
        return self.guard.engine.refused(context, self.call, refusal)

    def _rewrite(self, *, wants_usage: bool, stream: bool) -> None:
        """Put what the route asks for into the body: usage on streams, and the output limit that was held for."""
        assert self.admission is not None  # noqa: S101 - `admit` granted it
        assert self.view is not None  # noqa: S101 - what was asked for was read from it
        assert self.dialect is not None  # noqa: S101 - and by it
        root, route = self.admission.root, self.plan.route
        held = root.call if root is not None else None
        limit = None
        lowers = route.clamp and self.ask is not None and self.ask.limits_output
        if lowers and held is not None and self.call is not None:
            if held.max_output_tokens != self.call.max_output_tokens:
                limit = held.max_output_tokens
            elif held.max_output_tokens is None and held.output_tokens:
                limit = held.output_tokens // held.choices
        include = route.inject_usage and stream
        self.strip = include and not wants_usage
        try:
            body = self.dialect.rewrite(self.view, include_usage=include, max_output_tokens=limit)
        except BodyError as error:  # what is to be changed in it is malformed, and was not read before
            raise LimitExceeded(self._refused(_unreadable(error))) from error
        if body is not self.body:
            self.body = body
            headers = [(name, value) for name, value in self.scope["headers"] if name not in _FRAMING]
            self.scope["headers"] = [*headers, (b"content-length", b"%d" % len(body))]

    # ------------------------------------------------------------------------------- handle

    async def handle(self) -> None:
        admission = self.admission
        assert admission is not None  # noqa: S101 - `admit` granted it
        self.scope[STATE_KEY] = admission
        token = enter(admission.scope)
        receive = self.receive if self.body is None else self._replay
        page = ErrorPage(admission, self._send)
        ending = self.ending = admission.front = Ending(self)
        self.guard.track(admission)
        try:
            if self.ask is not None and (self.plan.route.clamp or self.plan.route.inject_usage):
                self._rewrite(wants_usage=self.ask.wants_usage, stream=self.ask.stream)
            if self.plan.watches:
                await self._watched(receive, page.send)
            else:
                await self.middleware.app(self.scope, receive, page.send)
            await page.flush()
        except asyncio.CancelledError:
            if not ending.is_it():
                raise
            await self._cut()
        except Exception as error:
            if (ending.fired or (self.relay is not None and self.relay.gone)) and is_cut_off(error):
                if ending.fired:
                    await self._cut()
                return
            if admission.stopped is not None and self.is_streaming:
                self.end_at_once(admission.stopped)
                await self._cut()
                return
            refusal = refusal_behind(error, admission) or admission.stopped
            if refusal is None or page.started:
                await page.flush()
                raise
            admission.refusal_answered()
            if not self.done:  # before the client sees the refusal, and asks again
                self.done = True
                admission.end(status=refusal.status, complete=False)
            await self.refuse(refusal)
        else:
            if ending.fired:  # it has caught that it was cancelled, and did not pass it on
                await self._cut()
        finally:
            leave(token)
            ending.over()
            admission.front = None
            try:
                if not self.done:
                    admission.end(self._answer(), status=self.status or None, complete=False)
            finally:
                await finished(self.guard, admission)

    # -------------------------------------------------------------------------------- halted

    @property
    def is_streaming(self) -> bool:
        """Its first part is on its way to the client, and its last is not."""
        if self.done or not 0 < self.status < 400:  # an error is left to end, whatever it says that it is
            return False
        if any(name.lower() == b"content-length" for name, _ in self.headers):
            return False
        return _has_stream(self.headers) or (self.ask is not None and self.ask.stream)

    def end_at_once(self, denied: Denied) -> bool:
        """Prepare its last event; whether no other one has begun."""
        if self.stream is not None and self.meter is not None:
            self.last += self.stream.halt(denied)
            return self.stream.ended
        container = container_of(Head(self.status, self.headers).header(b"content-type"))
        # Nobody has read it: an event that may have begun is ended before ours.
        between = b"" if not self.tail or self.tail.endswith(_BETWEEN) else b"\n\n"
        self.last = between + stream_error(denied, self.dialect.name if self.dialect is not None else None, container)
        return True

    async def _cut(self) -> None:
        """The application does no more: the client gets the last event, once."""
        assert self.ending is not None  # noqa: S101 - `handle` made it
        self.ending.is_it()
        if self.cut:
            return
        self.cut = True
        last, stream = self.last, self.stream
        if stream is not None and self.meter is not None and not stream.ended:
            last += stream.finish()
        if not self.done:  # handed over before the client can see the end
            self._end(complete=False)
        if self.relay is not None:
            await self.relay.end(last)
        else:
            await say_last(self.send, last)

    async def _watched(self, receive: Receive, send: Send) -> None:
        app, rules = self.middleware.app, self.plan.streams
        self.relay = Relay(rules, self.send, self._settle)
        watched = self.relay.receive_from(receive)
        await self.relay.run(lambda: app(self.scope, watched, send))

    async def _replay(self) -> Message:
        if self.replayed:
            return await self.receive()
        self.replayed = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            if self.ending is not None and self.ending.fired:
                raise CutOff("the answer was ended")
            if self.stream is not None:
                if message.get("body"):
                    self.stream.first_part()
                if self.relay is not None:
                    self.tail = message.get("body") or self.tail
                    await self.relay.pass_on(message)
                    return
                if self.stream.ended:
                    raise CutOff("the answer was ended")
                message = self._metered(message, self.stream)
                if self.stream.wants_growth:
                    await self.stream.grow()
                if self.stream.ended:  # it was ended in the middle of an event, which has come to its end
                    await self._end_here(message)
            elif self.meter is not None:
                message = self._metered(message, self.meter)
            else:
                self.tail = message.get("body") or self.tail
            if not self.done and (not message.get("more_body", False) or self._is_whole(message)):
                # Handed over before the client can see the end: its next request finds this one settled.
                self._end()
        elif kind == "http.response.start":
            self._start(message)
            await self.send(message)
            self._begin_ending()
            return
        elif kind == "http.response.pathsend" and not self.done:
            self._end()
        await self.send(message)

    async def _end_here(self, message: Message) -> None:
        self.cut = True
        self._end(complete=False)
        await self.send({**message, "more_body": False})
        assert self.ending is not None  # noqa: S101 - nobody else ends it
        self.ending.fired = True
        raise CutOff("the answer was ended")

    def _begin_ending(self) -> None:
        """End what begins after its admission was ended."""
        admission = self.admission
        if admission is not None and admission.halted is not None and self.ending is not None:
            self.ending.begin(admission.halted, bool(admission.calls))

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        self.left = None
        admission = self.admission
        assert admission is not None  # noqa: S101 - `admit` granted it
        headers = list(message.get("headers", ()))
        streamed = self._is_streamed(headers)
        if self.dialect is not None and (self.strip or not admission.seen or (streamed and self.relay is not None)):
            self._start_meter(headers)
        if streamed:
            self._start_stream(headers, admission)
        if (self.strip and self.meter is not None) or (self.stream is not None and self.relay is not None):
            headers = [header for header in headers if header[0].lower() != b"content-length"]
            message["headers"] = headers  # it may come to have another length
        if self.middleware.sends_fields and admission.receipts:
            headers += rate_limit_headers(
                admission.receipts, self.guard.clock.now_ms(), disclose=self.guard.engine.disclose
            )
            message["headers"] = headers
        self.headers = headers

    def _is_streamed(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        if self.ask is not None:
            return self.ask.stream
        if self.relay is None:
            return False
        return _has_stream(headers)

    def _start_stream(self, headers: Sequence[tuple[bytes, bytes]], admission: Admission) -> None:
        call = admission.root
        if call is None or (self.meter is None and self.relay is None):
            return
        meter = self.meter or Opaque(Answer(kind="success"))
        dialect = self.dialect.name if self.dialect is not None else None
        container = container_of(Head(self.status, headers).header(b"content-type"))
        self.stream = StreamGuard(
            call,
            meter,
            self.plan.streams,
            lambda denied: stream_error(denied, dialect, container),
            time=asyncio.get_running_loop().time,
        )
        if self.relay is not None:
            self.relay.begin(self.stream)

    def _is_whole(self, message: Message) -> bool:
        """Whether the client has all of a body whose length it was told, though the end is still to be sent."""
        if self.left is None:
            lengths = [value for name, value in self.headers if name.lower() == b"content-length"]
            self.left = int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else sys.maxsize
        self.left -= len(message.get("body", b""))
        return self.left <= 0

    def _start_meter(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Read the body as it passes, if it is in a form that can be read."""
        assert self.dialect is not None  # noqa: S101 - asked for by `_start` only
        for name, value in headers:
            if name.lower() == b"content-encoding" and value.lower() != b"identity":
                return
        head = Head(self.status, headers, self.scope["path"], self.ask)
        if is_readable(head.header(b"content-type")):
            self.meter = self.dialect.meter(head, strip_usage=self.strip)

    def _metered(self, message: Message, meter: Meter | StreamGuard) -> Message:
        body: bytes = message.get("body", b"")
        self.fed |= bool(body)
        forward = meter.feed(body)
        if not message.get("more_body", False):
            forward += meter.finish()
        return message if forward is body else {**message, "body": forward}

    def _settle(self, complete: bool) -> None:
        self._end(complete=complete)

    def _answer(self) -> Answer | None:
        fed = self.fed or (self.stream is not None and self.stream.fed)
        return self.meter.answer() if self.meter is not None and fed else None

    def _end(self, *, complete: bool = True) -> None:
        self.done = True
        admission = self.admission
        assert admission is not None  # noqa: S101 - `admit` granted it
        admission.end(self._answer(), status=self.status, complete=complete)

    async def replay(self, kept: KeptResponse) -> None:
        """Give an answer again."""
        headers = [*kept.headers, (b"idempotency-replayed", b"true")]
        if kept.status != _NO_CONTENT:
            headers.append((b"content-length", b"%d" % len(kept.body)))
        await self.send({"type": "http.response.start", "status": kept.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": kept.body})

    async def close(self) -> None:
        """Keep the answer for those who send its key again, if there is one."""
        if self.lead is not None:
            stopped = self.admission is not None and self.admission.stopped is not None
            await self.lead.close(cut=stopped or (self.relay is not None and self.relay.gone))

    # ------------------------------------------------------------------------------- refuse

    async def refuse(self, denied: Denied) -> None:
        dialect = self.dialect.name if self.dialect is not None else None
        await refuse(denied, self.scope, self.send, dialect=dialect, fields=self.middleware.fields(denied))


def _has_stream(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and _STREAMS.match(value) for name, value in headers)


def _unreadable(error: BodyError) -> Refusal:
    return Refusal(policy="request", code=error.code, message=str(error), status=error.status)


async def finished(guard: Guard, admission: Admission) -> None:
    """Wait until what was handed over is written: the response has ended, so nobody waits for us.

    It keeps the task alive until then, which servers wait for when they shut down; so nothing is lost
    where no lifespan event reaches us (mounted applications).
    """
    try:
        await admission.close()
    finally:
        guard.untrack(admission)
