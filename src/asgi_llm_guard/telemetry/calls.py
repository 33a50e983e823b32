"""Calls as spans and metrics, whichever way in they came: `guard.call`, `@guarded`, a hook, a route, or a gateway."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final, Protocol, cast, runtime_checkable

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from asgi_llm_guard.events import CallEnded
from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.genai import CallLabels, GenAiMetrics
from asgi_llm_guard.telemetry.ids import IdHash
from asgi_llm_guard.telemetry.instruments import Instruments
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.points import Attributes, billed
from asgi_llm_guard.telemetry.waking import Handlers
from asgi_llm_guard.usage import Usage

__all__ = ["CallObserver", "OpenCalls"]

_MOST_OPEN: Final = 10_000
_NS: Final = 1_000_000
_NANO: Final = 1_000_000_000
_NO_ERROR: Final = frozenset({"measured", "cached", "unmetered", "unseen"})

_UNKNOWN: Final = Usage()
_MOST_KEPT: Final = 1_000
"""Sets of labels that are kept made: as many as most services ever have."""


@runtime_checkable
class _Readable(Protocol):
    @property
    def attributes(self) -> Mapping[str, object] | None: ...


class OpenCalls:
    """The span that was current where each open call was admitted: where it ends, another one may be, or none.

    At most 10,000; the oldest are forgotten first, and end under the span that is current then.
    """

    __slots__ = ("_lock", "_spans")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, Span] = {}

    def begin(self, call_id: str, span: Span) -> bool:
        """Whether it is another call, and not one that took over the hold of one that is known."""
        with self._lock:
            known = self._spans.pop(call_id, None)
            self._spans[call_id] = span
            if len(self._spans) > _MOST_OPEN:
                del self._spans[next(iter(self._spans))]
        return known is None

    def end(self, call_id: str) -> Span | None:
        with self._lock:
            return self._spans.pop(call_id, None)


class CallObserver:
    """Makes a span, and points of the conventions' metrics, of each call that was sent or answered from the cache.

    Where an SDK has a span of the same call already (the current one, with `gen_ai.operation.name`), it gets an event
    and no second span beside it. A gateway's attempts have spans of their own, and get none here.
    """

    def __init__(
        self,
        tracer: Tracer,
        instruments: Instruments,
        conventions: names.Conventions,
        labels: Labels,
        open_calls: OpenCalls,
        hashed: IdHash | None,
    ) -> None:
        self._tracer = tracer
        self._conventions = conventions
        self._labels = labels
        self._open = open_calls
        self._hashed = hashed
        self._readable: dict[type[Span], bool] = {}
        self._kept: dict[tuple[str, str, str, str | None], CallLabels] = {}
        self._metrics = GenAiMetrics(instruments, conventions)
        # Ours are the same whichever conventions were chosen, so that what is drawn of them goes on.
        ours = (names.PROVIDER, names.REQUEST_MODEL)
        self._calls = instruments.counter(
            "llm_guard.calls",
            (*ours, names.OUTCOME),
            unit="{call}",
            description="Calls that have ended, by what they are charged as.",
        )
        self._tokens = instruments.counter(
            "llm_guard.tokens",
            (*ours, names.TOKEN_TYPE),
            unit="{token}",
            description="Tokens that calls were billed for, as far as they are known.",
        )
        self._cost = instruments.counter(
            "llm_guard.cost",
            ours,
            unit="{USD}",
            description="What calls were charged with; of those whose cost is known.",
            scale=_NANO,
        )

    @property
    def handlers(self) -> Handlers:
        """What takes events."""
        return {CallEnded: self._ended}

    def _ended(self, event: CallEnded) -> None:
        """A call is over."""
        parent = self._open.end(event.call_id) or trace.get_current_span()
        if event.outcome == "not_dispatched":
            return
        call = event.call
        provider, model = self._labels.model(call)
        failure = None if event.outcome in _NO_ERROR and event.failure is None else event.failure or event.outcome
        error = None if failure is None else self._labels.name("error", failure)
        labels = self._labels_of(names.operation_of(None if call is None else call.dialect), provider, model, error)
        context = trace.set_span_in_context(self._span(event, parent, labels.common))
        self._calls.add(1, provider, model, event.outcome)
        if event.cost_nanousd:
            self._cost.add(event.cost_nanousd, provider, model)
        if event.outcome == "cached":  # nobody was asked: it took no time, and no tokens
            return
        for kind, tokens in billed(event.usage or _UNKNOWN):
            self._tokens.add(tokens, provider, model, kind)
        self._metrics.record(labels, event.usage, max(0, event.ended_ms - event.began_ms) / 1000, context)
        if event.streamed:
            self._metrics.record_stream(labels, _first_s(event), event.gaps_s, context)

    def _labels_of(self, operation: str, provider: str, model: str, error: str | None) -> CallLabels:
        key = (operation, provider, model, error)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            found = self._kept[key] = CallLabels(self._conventions, *key)
        return found

    def _span(self, event: CallEnded, parent: Span, common: Attributes) -> Span:
        """The span that tells of the call: its own, or that of somebody who traces it already."""
        if event.call is not None and event.call.deployment is not None:
            return parent
        if parent.is_recording() and self._tells_of_a_call(parent):
            parent.add_event(names.CALL, self._told(event), timestamp=event.ended_ms * _NS)
            return parent
        model = event.call.model if event.call is not None else (event.usage and event.usage.model) or "unknown"
        span = self._tracer.start_span(
            f"{names.CALL} {model}",
            context=trace.set_span_in_context(parent),
            kind=SpanKind.CLIENT,
            attributes={**common, names.REQUEST_MODEL: model},
            start_time=event.began_ms * _NS,
        )
        if not span.is_recording():
            return span
        span.set_attributes({**self._described(event), **self._told(event)})
        if event.streamed and event.first_ms is not None:
            span.add_event(names.FIRST_CHUNK, timestamp=max(event.first_ms, event.began_ms) * _NS)
        if names.ERROR_TYPE in common:
            span.set_status(Status(StatusCode.ERROR, str(common[names.ERROR_TYPE])))
        span.end(max(event.ended_ms, event.began_ms) * _NS)
        return span

    def _tells_of_a_call(self, span: Span) -> bool:
        # The API's spans only take attributes; those of the SDK show them. Asked once for each class: it takes long.
        kind = type(span)
        readable = self._readable.get(kind)
        if readable is None:
            readable = self._readable[kind] = isinstance(span, _Readable)
        return readable and names.OPERATION in (cast("_Readable", span).attributes or {})

    def _told(self, event: CallEnded) -> Attributes:
        """What only the guard knows."""
        told: Attributes = {
            names.OUTCOME: event.outcome,
            names.CACHE_HIT: event.outcome == "cached",
            names.ATTEMPT_NUMBER: event.attempt,
        }
        if event.cost_nanousd is not None:
            told[names.COST] = event.cost_nanousd / _NANO
        if self._hashed is not None:
            told.update(self._hashed.of(event.context))
        return told

    def _described(self, event: CallEnded) -> Attributes:
        call, usage = event.call, event.usage
        found: dict[str, str | int | float | bool | None] = {}
        if call is not None:
            found[names.MAX_TOKENS] = call.max_output_tokens
            found[names.CHOICES] = None if call.choices == 1 else call.choices
        if self._conventions.latest and event.streamed:
            found[names.STREAM] = True
            found[names.TIME_TO_FIRST] = _first_s(event)
        if usage is not None and event.outcome != "cached":
            found[names.RESPONSE_MODEL] = usage.model
            found.update(self._conventions.usage(usage))
        return {name: value for name, value in found.items() if value is not None}


def _first_s(event: CallEnded) -> float | None:
    return None if event.first_ms is None else max(0, event.first_ms - event.began_ms) / 1000
