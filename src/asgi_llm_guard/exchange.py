"""One physical request to a provider, whatever carries it: admitted, sent, metered as its answer passes, settled.

A client hook (`hook.py`) makes an `Exchange` for each request that is billed, and whoever has the client drives it:

    hook.begin(...)      `None`: not billed, let it pass; a `Denied`; or an exchange
    exchange.admit()     a `Denied` has taken nothing; else `exchange.body` is what is to be sent
    exchange.answered()  the head of the answer
    exchange.feed()      what to give to the client of each chunk
    exchange.finish()    the answer has come to its end, or
    exchange.fail()      it has not come, or broke off, or
    exchange.close()     nobody reads it any more

Rule 1: a refusal is an answer that the hook returns. An exception would be taken for a lost connection by
the libraries on top, and be sent again.
Rule 2: what is not known to have been left unsent is charged.
Rule 3: what passes is not changed, but for what the hook was told to change.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from asgi_llm_guard import background
from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.admission import Admission, Scope
from asgi_llm_guard.cache import CacheRequest, Lookup, ProviderAnswer
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Denied, Refusal
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.halting import Wait
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.streams import StreamGuard
from asgi_llm_guard.wire.base import Answer, Ask, Dialect, Head, Headers
from asgi_llm_guard.wire.encodings import Decoder, decoder_for
from asgi_llm_guard.wire.forms import FormView, read_any
from asgi_llm_guard.wire.peek import BodyError, BodyView, body_too_large, check_encoding, read_body
from asgi_llm_guard.wire.refusals import container_of, stream_error

if TYPE_CHECKING:
    from asgi_llm_guard.hook import Hook

__all__ = ["Exchange", "Outgoing"]

_log = logging.getLogger("asgi_llm_guard")

T = TypeVar("T")

_CLAMPS: Final = 2
_NO_RULES: Final = StreamRules()


class Outgoing(msgspec.Struct, frozen=True):
    """A request as it is about to be sent, without its body."""

    method: str
    url: str
    host: str
    path: str
    headers: Headers

    @property
    def target(self) -> str:
        """The path with its query."""
        return urlsplit(self.url)._replace(scheme="", netloc="", fragment="").geturl()

    def header(self, name: bytes) -> bytes:
        """The first header of this name (given in lower case); empty if there is none."""
        return next((value for key, value in self.headers if key.lower() == name), b"")


class Exchange:
    """One request that is billed, and its answer."""

    __slots__ = (
        "_admission",
        "_decoder",
        "_dialect",
        "_found",
        "_hook",
        "_key",
        "_last",
        "_moved",
        "_outgoing",
        "_own",
        "_rules",
        "_scope",
        "_status",
        "_stream",
        "_strip",
        "ask",
        "body",
        "call",
        "ended",
        "kept",
        "rewritten",
    )

    def __init__(
        self, hook: Hook, outgoing: Outgoing, dialect: Dialect, admission: Admission, scope: Scope | None
    ) -> None:
        self._hook = hook
        self._outgoing = outgoing
        self._dialect = dialect
        self._admission = admission
        self._scope = scope
        self._own = scope is None
        """The admission is this request's alone, and ends with it."""
        self.ask: Ask | None = None
        self.call: ActiveCall | None = None
        self.body = b""
        """What is to be sent."""
        self.rewritten = False
        """`body` is another one than was given."""
        self.ended = False
        """Everything is settled."""
        self.kept: ProviderAnswer | None = None
        """The answer, if it is kept: it is to be given, and nothing sent. Everything is settled."""
        self._found: Lookup | None = None
        self._strip = False
        self._rules = _NO_RULES
        self._stream: StreamGuard | None = None
        self._decoder: Decoder | None = None
        self._status = 0
        self._moved = False
        self._key = b""
        self._last = b""

    # -------------------------------------------------------------------------------- admit

    @property
    def max_body_bytes(self) -> int:
        """A longer body is refused: see `too_large`."""
        return self._hook.guard.max_body_bytes

    def too_large(self, seen: int | None = None) -> Denied:
        """The refusal of a body that has more bytes than are read; `seen`: how many it has at least."""
        return self._body_refused(body_too_large(self.max_body_bytes, seen))

    async def admit(self, body: bytes) -> Denied | None:
        """Read what is asked for, and claim it. A `Denied` has taken nothing."""
        hook, admission = self._hook, self._admission
        self.body = body
        if len(body) > self.max_body_bytes:
            return self.too_large(len(body))
        self._key = _digest(self._outgoing, body)
        try:
            check_encoding(self._outgoing.headers)
            view = read_any(body, self._outgoing.headers)
            ask = self._dialect.read_request(view, self._outgoing.path)
            call = hook.guard.engine.describer.describe_body(
                ask,
                view,
                provider=self._dialect.provider,
                dialect=self._dialect.name,
                assumed_output_tokens=hook.assumed_output_tokens,
                host=self._outgoing.host,
            )
        except BodyError as error:
            return self._body_refused(error)
        self.ask = ask
        if ask.stream:
            self._rules = hook.streams
        if self._own:
            hook.guard.track(admission)
        try:
            denied = await self._claim(call)
            if denied is None and self.kept is None:
                self._rewrite(view, call)
        except BodyError as error:  # what is to be changed in it is malformed, and was not read before
            self.unsent()
            return self._body_refused(error)
        except BaseException:
            self.unsent()
            raise
        if denied is not None or self.kept is not None:
            self.ended = True
            self._abandon()
            self._leave()
        return denied

    def admit_sync(self, body: bytes) -> Denied | None:
        """As `admit`, for synchronous code, on whatever thread it runs."""
        return background.run(self.admit(body), undo=self.unsent, anywhere=True)

    def unsent(self) -> None:
        """Nothing was sent: what was claimed is given back."""
        if self.call is not None:
            self.call.release()
        self.close()

    async def _claim(self, described: Call) -> Denied | None:
        admission = self._admission
        if self._own:
            denied = await admission.open(None, calls=False)
            if denied is not None:
                return denied
        parent = self._scope if isinstance(self._scope, ActiveCall) else None
        policies = admission.policies if parent is None else parent.policies
        lowers = self._hook.clamp and not self._signed and (self.ask is None or self.ask.limits_output)
        clamps = _CLAMPS if lowers else 0
        failed = admission.attempts.find(self._key)
        while True:
            if failed is not None:
                call = failed.attempt(described)
            else:
                call = ActiveCall(admission, parent, policies, described)
            try:
                if await self._is_kept(call):
                    return None
                await call.claim()
            except LimitExceeded as error:
                fits = error.denied.fits_max_tokens
                if clamps and fits:
                    clamps -= 1
                    described = self._hook.guard.engine.describer.clamped(described, fits)
                    continue
                if failed is not None:
                    admission.attempts.note(self._key, call)  # a refusal that is waited for is followed by another one
                return error.denied
            except BaseException:
                if failed is not None:
                    admission.attempts.note(self._key, failed)  # it is still to be repeated
                raise
            self.call = call
            call.dispatched()
            return None

    async def _is_kept(self, call: ActiveCall) -> bool:
        """Whether the answer is kept, and nothing has to be claimed and sent. Asked once."""
        cache, outgoing = self._hook.cache, self._outgoing
        if cache is None or self._found is not None or self.ask is None:
            return False
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in outgoing.headers]
        request = CacheRequest(
            host=urlsplit(outgoing.url).netloc,
            path=outgoing.target,
            body=self.body,
            headers=headers,
            dialect=self._dialect.name,
            stream=self.ask.stream,
        )
        self._found = await cache.look_up(call, request)
        self.kept = self._found.answer if self._found.hit else None
        return self.kept is not None

    def _rewrite(self, view: BodyView, described: Call) -> None:
        """Put into the body what the hook was told to: usage on streams, and the output limit that was held for."""
        hook, ask = self._hook, self.ask
        assert ask is not None  # noqa: S101 - `admit` read it
        assert self.call is not None  # noqa: S101 - and claimed it
        held, limit = self.call.call, None
        if hook.clamp and held is not None and held.max_output_tokens != described.max_output_tokens:
            limit = held.max_output_tokens
        include = hook.include_usage and ask.stream
        more = hook.prompt_cache(self._admission.context)
        if not include and limit is None and not more:
            return
        if self._signed:
            return
        body = self._dialect.rewrite(view, include_usage=include, max_output_tokens=limit)
        self._strip = include and not ask.wants_usage and body is not self.body
        if more and not isinstance(view, FormView):
            body = read_body(body).replace(more)
        if body is not self.body:
            self.body = body
            self.rewritten = True

    @property
    def _signed(self) -> bool:
        """The request is signed together with its body, which has to stay as it is."""
        return self._outgoing.header(b"authorization").startswith(b"AWS4-")

    @property
    def plain(self) -> bool:
        """The answer should come without a content-encoding: something has to be taken out of it."""
        return self._strip or self._rules.watches

    # ------------------------------------------------------------------------------- answer

    def answered(self, status: int, headers: Headers) -> None:
        """The head of the answer has come."""
        self._status = status
        head = Head(status, headers, self._outgoing.path, self.ask)
        self._moved = 300 <= status < 400 and head.header(b"location") != b""
        if self._found is not None:
            self._found.answered(status, head.header(b"content-type").decode("latin-1"))
        encoding = head.header(b"content-encoding")
        strip = self._strip
        if encoding and encoding.strip().lower() != b"identity":
            self._decoder = decoder_for(encoding)
            strip = False
            if self._decoder is None:
                _log.warning("an answer in %r cannot be metered, and is charged what was held", encoding)
                return
        assert self.call is not None  # noqa: S101 - `admit` claimed it
        name, container = self._dialect.name, container_of(head.header(b"content-type"))
        meter = self._dialect.meter(head, strip_usage=strip)
        self._stream = StreamGuard(self.call, meter, self._rules, lambda denied: stream_error(denied, name, container))
        self.call.seen_by(self._stream.answer)

    def feed(self, chunk: bytes) -> bytes:
        """What to give to the client of a chunk of the answer."""
        stream = self._stream
        if stream is None:
            return chunk
        if not stream.fed and self.call is not None:
            self.call.first_part()
        if self._decoder is None:
            forward = stream.feed(chunk)
            if self._found is not None:
                self._found.feed(forward)
            return forward
        try:
            for piece in self._decoder.feed(chunk):
                forward = stream.feed(piece)
                if self._found is not None:
                    self._found.feed(forward)
        except ValueError as error:
            _log.warning("an answer is not encoded as it says, and cannot be metered any further: %s", error)
            self._blind(stream)
            self._abandon()
        return chunk

    def _blind(self, stream: StreamGuard) -> None:
        """No more can be read of an answer: what was read tells of all of it only if it was told its usage."""
        self._stream = None
        assert self.call is not None  # noqa: S101 - its answer has begun
        answer = stream.answer()
        if answer is None or answer.usage is None or not answer.finished:
            self.call.seen_by(lambda: None)

    @property
    def wants_growth(self) -> bool:
        """The stream has nearly used up what it holds: call `grow`."""
        return self._stream is not None and self._stream.wants_growth

    async def grow(self) -> bytes:
        """Hold more for a stream that goes on. What to give to the client: nothing, or its end."""
        return b"" if self._stream is None else await self._stream.grow()

    def grow_sync(self) -> bytes:
        """As `grow`, for synchronous code."""
        return background.run(self.grow(), anywhere=True)

    @property
    def cut(self) -> bool:
        """The client has got the last it gets, though the answer goes on."""
        return self._stream is not None and self._stream.ended

    @property
    def timed(self) -> bool:
        """The answer has deadlines: see `wait_s`."""
        return self._stream is not None and self._stream.wait_s() is not None

    def wait_s(self) -> float | None:
        """How long until the next deadline, in seconds; `None`: there is none."""
        return None if self._stream is None else self._stream.wait_s()

    def expire(self) -> bytes:
        """A deadline has passed: what to give to the client, which gets nothing more then."""
        return b"" if self._stream is None else self._stream.expire()

    @property
    def drains(self) -> bool:
        """When the client leaves, the answer is read to its end all the same."""
        if self.ended or self._stream is None or self.call is None or self.call.halted is not None:
            return False
        return self._rules.drain == "read" and self.call.outcome is None

    # --------------------------------------------------------------------------------- halted

    async def sending(self, send: Callable[..., Awaitable[T]], request: object) -> T:
        """`await send(request)`, the request of this exchange.

        Raises:
            Halted: it was ended from outside before the answer began.
        """
        assert self.call is not None  # noqa: S101 - `admit` claimed it
        return await Wait(self.call).on(send, request)

    @property
    def halted(self) -> Denied | None:
        """Why it was ended from outside."""
        return None if self.call is None else self.call.halted

    def halt(self) -> bool:
        """End the answer that was ended from outside: whether that could be done at once. What is still to be given
        to the client then comes with `halted_end`; else with what is fed next."""
        stream, halted = self._stream, self.halted
        if stream is None or halted is None or not self._is_stream or self._decoder is not None:
            return True
        self._last += stream.halt(halted)
        return stream.ended

    def halted_end(self) -> bytes | None:
        """The last that the client gets of an answer that was ended from outside; `None`: it has no end but an error."""
        stream = self._stream
        if stream is None or not self._is_stream or self._decoder is not None:
            return None
        last, self._last = self._last, b""
        return last if stream.ended else last + stream.finish()

    @property
    def _is_stream(self) -> bool:
        return self.ask is not None and self.ask.stream

    def finish(self) -> bytes:
        """The answer has come to its end: what is still to be given to the client. Everything is settled."""
        whole = self._stream is not None and not self._stream.ended
        rest = b"" if self._stream is None else self._stream.finish()
        self._end(None, complete=True)
        if self._found is not None and whole:
            self._found.feed(rest)
            self._found.finish()
        else:
            self._abandon()
        return rest if self._decoder is None else b""

    def fail(self, error: BaseException) -> None:
        """The request or its answer broke off with `error`."""
        self._end(error, complete=False)
        self._abandon()

    def close(self) -> None:
        """Nobody reads the answer any more. After its end, nothing happens."""
        if not self.ended:
            stream = self._stream
            answer = None if stream is None or stream.ended else stream.answer()
            self._end(None, complete=False)
            # Some SDKs leave a stream at its last event, before the body ends. The cache judges itself what is whole.
            if self._found is not None and answer is not None and answer.finished:
                self._found.finish()
            else:
                self._abandon()

    def _abandon(self) -> None:
        """There is no answer to be kept."""
        if self._found is not None:
            self._found.abandon()

    def _end(self, error: BaseException | None, *, complete: bool) -> None:
        if self.ended:
            return
        self.ended = True
        call, stream = self.call, self._stream
        if call is not None:
            if stream is not None and stream.fed and not (self._moved and stream.tells_nothing):
                stream.end(error, complete=complete)
            elif self._moved:
                call.release()  # sent on to another place, where it is asked again
                call.end()
            else:
                if self._status >= 300:
                    call.answered(Answer(kind="error"))
                call.end(error, complete=complete)
            if call.failed:
                self._admission.attempts.note(self._key, call)
        self._leave()

    def _leave(self) -> None:
        if self._own:
            self._admission.end()
            self._hook.guard.untrack(self._admission)

    def _body_refused(self, error: BodyError) -> Denied:
        refusal = Refusal(policy="request", code=error.code, message=str(error), status=error.status)
        return self._hook.guard.engine.refused(self._admission.context, None, refusal)


def _digest(outgoing: Outgoing, body: bytes) -> bytes:
    """What a request and those that repeat it have in common."""
    digest = blake2b(body, digest_size=16)
    digest.update(f"\0{outgoing.method} {outgoing.url}".encode("utf-8", "surrogatepass"))
    return digest.digest()
