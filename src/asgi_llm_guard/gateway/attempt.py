"""One attempt of a call: one request to one deployment, metered, settled, and told of.

Rule 1: nothing reaches the client before there is something of an answer, so that another deployment may still be
asked; after that, none is.

Rule 2: what is not known to have been left unsent is charged; an error of the provider costs nothing, an empty answer
what it says.
"""

from __future__ import annotations

import inspect
import logging
import time as clock
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import AttemptEnded, emit
from asgi_llm_guard.gateway.errors import CannotExpress, Failure
from asgi_llm_guard.gateway.failures import ErrorClass, class_of, class_of_error
from asgi_llm_guard.gateway.providers.base import TransportFailed, Upstream, let_go, read_whole
from asgi_llm_guard.gateway.running import CLASSES, Running
from asgi_llm_guard.gateway.saying import message_of, retry_after_s, says_something
from asgi_llm_guard.gateway.translate import Timings
from asgi_llm_guard.halting import Halted, Wait
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.streams import StreamGuard
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Answer, Dialect, Head
from asgi_llm_guard.wire.peek import BodyError
from asgi_llm_guard.wire.refusals import stream_error
from asgi_llm_guard.wire.shape import decode

if TYPE_CHECKING:
    from asgi_llm_guard.gateway.request import Place, Question
    from asgi_llm_guard.gateway.stats import Run

__all__ = ["Attempt", "Health", "Whole"]

_log = logging.getLogger("asgi_llm_guard")

_SHOWN: Final = 2_000


class Health(Protocol):
    """Who is told how attempts went."""

    def succeeded(self, deployment: str, /) -> None: ...

    async def failed(
        self,
        deployment: str,
        failure: ErrorClass,
        *,
        alone: bool,
        status: int | None = None,
        message: str = "",
        retry_after_s: float | None = None,
    ) -> object: ...


class Whole:
    """A whole answer in the dialect of the client. Everything is settled."""

    __slots__ = ("body",)

    def __init__(self, body: bytes) -> None:
        self.body = body


class Attempt:
    """One request to one deployment. `call` has been granted."""

    __slots__ = (
        "_alone",
        "_began",
        "_connected",
        "_first",
        "_health",
        "_over",
        "_run",
        "_time",
        "call",
        "place",
        "question",
        "rules",
        "status",
        "total",
    )

    def __init__(
        self,
        question: Question,
        place: Place,
        call: ActiveCall,
        run: Run,
        *,
        health: Health,
        alone: bool,
        rules: StreamRules,
        time: Callable[[], float] = clock.perf_counter,
    ) -> None:
        self.question = question
        self.place = place
        self.call = call
        self.rules = rules
        self.status: int | None = None
        self.total: float | None = None
        self._run = run
        self._health = health
        self._alone = alone
        self._time = time
        self._began = time()
        self._connected: float | None = None
        self._first: float | None = None
        self._over = False

    @property
    def timings(self) -> Timings:
        """So far."""
        return Timings(connected_ms=self._connected, first_ms=self._first, total_ms=self.total)

    def _elapsed_ms(self) -> float:
        return round((self._time() - self._began) * 1000, 3)

    @property
    def open(self) -> bool:
        """It has not been settled."""
        return not self._over

    def first_part(self) -> None:
        """Something of the answer has come."""
        if self._first is None:
            self._first = self._elapsed_ms()
            self.call.first_part()
            self._run.first_byte(self._first)

    # ----------------------------------------------------------------------------------- make

    async def make(self) -> Whole | Running | Failure:
        """Send it. A `Failure` has been settled, and told of.

        Raises:
            BodyError, CannotExpress: it cannot be said to this deployment; nothing was sent, and nothing is held.
            LimitExceeded: it was ended from outside.
        """
        question, place, call = self.question, self.place, self.call
        waiting = Wait(call)
        try:
            request = question.request(place)
            self._began = self._time()
            call.dispatched()
            sending = place.provider.send(place.deployment, request)
            upstream = await waiting.on(_value, sending) if inspect.isawaitable(sending) else sending
            if inspect.iscoroutine(upstream):
                upstream.close()
                return await self._misbuilt("send() gives a coroutine when it is awaited")
        except (BodyError, CannotExpress):
            self.drop()
            raise
        except TransportFailed as error:
            return await self._not_answered(error)
        except Halted as halted:
            self.broken_off(halted)
            raise halted.refused() from None
        except Exception as error:  # noqa: BLE001 - somebody's own provider may raise anything
            return await self._raised(error)
        except BaseException as error:
            self.broken_off(error)
            raise
        try:
            return await waiting.on(self._answered, upstream)
        except Halted as halted:
            try:
                await let_go(upstream)
            finally:
                self.broken_off(halted)
            raise halted.refused() from None
        except BaseException as error:
            try:
                await let_go(upstream)
            finally:
                self.broken_off(error)
            raise

    async def _answered(self, upstream: Upstream) -> Whole | Running | Failure:
        self._connected = self._elapsed_ms()
        self.status = upstream.status
        question = self.question
        head = Head(upstream.status, upstream.headers, upstream.path, question.ask)
        dialect = dialect_named(upstream.dialect)
        kind = head.header(b"content-type").lower()
        if not 200 <= upstream.status < 300 or not question.stream:
            return await self._whole(upstream, head, dialect)
        if kind and not kind.startswith(b"text/event-stream"):
            return await self._whole(upstream, head, dialect)
        return await self._stream(upstream, head, dialect)

    # ---------------------------------------------------------------------------------- whole

    async def _whole(self, upstream: Upstream, head: Head, dialect: Dialect) -> Whole | Failure:
        try:
            body = await read_whole(upstream)
        except TransportFailed as error:
            if head.status >= 400:  # what it says is not known, but that it is an error is
                self.call.answered(Answer(kind="error"))
                return await self.failed(class_of(head.status), error=error, head=head)
            return await self._not_answered(error)
        except Exception as error:  # noqa: BLE001 - as in `make`
            return await self._raised(error)
        answer = dialect.read_response(head.status, body)
        self.call.answered(answer)
        if not 200 <= head.status < 300:
            kind = class_of(head.status, answer.error, body)
            return await self.failed(kind, message=message_of(body), head=head)
        self.first_part()
        value = decode(body)
        if answer.kind == "error":
            return await self.failed(class_of(None, answer.error, body), message=message_of(body), head=head)
        if not isinstance(value, dict):
            return await self.failed("empty", message="the answer is no JSON object")
        if self.question.stream:
            return await self.failed("empty", message="the answer is no stream, though one was asked for")
        if not says_something(self.place.dialect, value):
            return await self.failed("empty", message="the answer has neither text nor a tool call")
        translation = self.question.translation(self.place)
        if translation is not None:
            told, body = translation.answer(head.status, body)
            if told != head.status:
                return await self.failed("empty", message="the answer cannot be read")
        self.ended(complete=True)
        return Whole(body)

    # --------------------------------------------------------------------------------- stream

    async def _stream(self, upstream: Upstream, head: Head, dialect: Dialect) -> Running | Failure:
        question = self.question
        translation = question.translation(self.place)
        strip = translation is None and not question.ask.wants_usage
        meter = dialect.meter(head, strip_usage=strip)
        asked = question.dialect
        stream = StreamGuard(self.call, meter, self.rules, lambda denied: stream_error(denied, asked, "sse"))
        self.call.seen_by(stream.answer)
        pieces = upstream.__aiter__()
        if inspect.iscoroutine(pieces):
            pieces.close()
            await let_go(upstream)
            return await self._misbuilt("__aiter__() of its answer is a coroutine; make it an async generator")
        running = Running(self, upstream, pieces, stream, None if translation is None else translation.stream())
        failure = await running.begin()
        return running if failure is None else failure

    # ------------------------------------------------------------------------------- failures

    async def _misbuilt(self, what: str) -> Failure:
        provider = type(self.place.provider).__name__
        message = f"the provider {self.place.deployment.via!r} ({provider}) is not built as one: {what}"
        _log.error("%s", message)
        return await self.failed("other", message=message)

    async def _raised(self, error: Exception) -> Failure:
        """Somebody's own provider raised something of its own."""
        provider = type(self.place.provider).__name__
        _log.warning("the provider %s of %s raised %s", provider, self.place.name, type(error).__name__, exc_info=error)
        return await self.failed(
            class_of_error(error), error=error, message=f"{provider} raised {type(error).__name__}"
        )

    async def _not_answered(self, error: TransportFailed) -> Failure:
        if not error.sent:
            self.call.release()
        return await self.failed(CLASSES[error.kind], error=error, message=str(error), sent=error.sent)

    async def failed(
        self,
        kind: ErrorClass,
        *,
        error: BaseException | None = None,
        message: str = "",
        sent: bool = True,
        head: Head | None = None,
    ) -> Failure:
        """It is over, and another one may be made."""
        place = self.place
        wait_s = None if head is None else retry_after_s(head, self.call.admission.engine.clock.now_ms())
        message = place.deployment.redacted(message)[:_SHOWN]
        self.ended(error, complete=error is None, failure=kind)
        await self._tell(kind, message, wait_s)
        return Failure(
            deployment=place.name,
            model=place.deployment.full_model,
            kind=kind,
            status=self.status,
            sent=sent,
            message=message,
            retry_after_s=wait_s,
        )

    async def _tell(self, kind: ErrorClass, message: str, wait_s: float | None) -> None:
        try:
            await self._health.failed(
                self.place.name, kind, alone=self._alone, status=self.status, message=message, retry_after_s=wait_s
            )
        except StorageError:
            _log.warning("a cooldown of %s could not be shared", self.place.name, exc_info=True)

    # ------------------------------------------------------------------------------------ end

    def drop(self) -> None:
        """It was not sent after all, and is no attempt."""
        if not self._over:
            self._over = True
            self._run.drop()
            self.call.discard()

    def broken_off(self, error: BaseException) -> None:
        """Nobody waits for it any more."""
        if not self._over:
            self._over = True
            self.call.end(error, complete=False)
            self._told(None)

    def ended(self, error: BaseException | None = None, *, complete: bool, failure: str | None = None) -> None:
        """What it has used is known: settle it."""
        if self._over:
            return
        self._over = True
        self.call.end(error, complete=complete)
        self._told(failure)
        if failure is None:
            self._health.succeeded(self.place.name)

    def stream_ended(
        self, stream: StreamGuard, error: BaseException | None, *, complete: bool, failure: ErrorClass | None
    ) -> None:
        """As `ended`, by what was seen of a stream."""
        if self._over:
            return
        self._over = True
        stream.end(error, complete=complete)
        self._told(failure)
        if failure is None and complete:
            self._health.succeeded(self.place.name)

    async def tell_broken(self, kind: ErrorClass, message: str) -> None:
        """It failed in the middle of its answer."""
        await self._tell(kind, message, None)

    def _told(self, failure: str | None) -> None:
        self.total = self._elapsed_ms()
        call = self.call
        usage = call.usage
        held = call.call
        tokens = usage.total_tokens if usage is not None else None
        if call.outcome in ("not_dispatched", "provider_error"):
            tokens = 0
        elif tokens is None:
            tokens = held.total_tokens if held is not None else 0
        self._run.end(tokens)
        emit(
            call.admission.engine.observers,
            AttemptEnded(
                context=call.admission.context,
                call=held,
                deployment=self.place.name,
                model=self.place.deployment.full_model,
                number=call.attempt_number[1],
                failure=failure,
                status=self.status,
                outcome=call.outcome,
                usage=usage,
                connected_ms=self._connected,
                first_ms=self._first,
                total_ms=self.total,
            ),
        )


async def _value(sending: Awaitable[Upstream]) -> Upstream:
    return await sending
