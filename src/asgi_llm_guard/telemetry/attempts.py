"""Attempts as spans and histograms: one for each request that a gateway has sent to a provider."""

from __future__ import annotations

from typing import Final

from opentelemetry import trace
from opentelemetry.metrics import Meter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.events import Admission, AttemptEnded, CacheHit, Refused
from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.points import SECONDS, TOKENS, Attributes, billed
from asgi_llm_guard.telemetry.waking import Handlers
from asgi_llm_guard.usage import Usage

__all__ = ["AttemptObserver"]

_NS: Final = 1_000_000


class AttemptObserver:
    """Makes a span, and points of histograms, of each `AttemptEnded`.

    A span is made when its attempt is over, with the times at which it began and ended, under the span that is
    current for whoever made the call. Decisions, and answers from the cache, are events of the span that is current.

    Names of deployments and models are labels of metrics as long as there are no more than 200 pairs; models without
    a price of their own, and all further pairs, are `other`.
    """

    def __init__(
        self, tracer: Tracer, meter: Meter, clock: Clock, conventions: names.Conventions, labels: Labels
    ) -> None:
        self._tracer = tracer
        self._clock = clock
        self._conventions = conventions
        self._labels = labels
        self._duration = meter.create_histogram(
            names.ATTEMPT_DURATION,
            unit="s",
            description="From the sending of a request to the end of its answer.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._head = meter.create_histogram(
            names.TIME_TO_HEAD,
            unit="s",
            description="From the sending of a request to the head of its answer.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._first = meter.create_histogram(
            names.TIME_TO_FIRST_CHUNK,
            unit="s",
            description="From the sending of a request to the first of its answer's text.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._tokens = meter.create_histogram(
            names.TOKENS,
            unit="{token}",
            description="Tokens that an attempt was billed for, as its provider says.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )

    @property
    def handlers(self) -> Handlers:
        """What takes events."""
        return {
            AttemptEnded: self._ended,
            Admission: self._admitted,
            CacheHit: self._hit,
            Refused: self._refused,
        }

    def _admitted(self, event: Admission) -> None:
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event("llm_guard.admitted", {"llm_guard.degraded": event.degraded})

    def _hit(self, event: CacheHit) -> None:
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event("llm_guard.cache_hit", {"llm_guard.cache.age": event.age_ms / 1000})

    def _refused(self, event: Refused) -> None:
        span = trace.get_current_span()
        if span.is_recording():
            attributes = {names.POLICY: event.denied.policy, names.CODE: event.denied.code}
            span.add_event("llm_guard.refused", attributes)

    def _ended(self, event: AttemptEnded) -> None:
        provider, _, model = event.model.partition("/")
        usage = event.usage or _UNKNOWN
        common: Attributes = {
            names.OPERATION: names.operation_of(None if event.call is None else event.call.dialect),
            self._conventions.provider_key: self._conventions.provider(provider),
        }
        if event.failure is not None:
            common[names.ERROR_TYPE] = event.failure

        end_ns = self._clock.now_ms() * _NS
        start_ns = end_ns - round((event.total_ms or 0) * _NS)
        span = self._tracer.start_span(
            f"{names.ATTEMPT} {model}",
            kind=SpanKind.CLIENT,
            attributes={**common, names.REQUEST_MODEL: model},
            start_time=start_ns,
        )
        if span.is_recording():
            self._describe(span, event, usage, start_ns)
        span.end(end_ns)

        deployment, label = self._labels.deployment(event.deployment, event.call, model)
        labels = {**common, names.REQUEST_MODEL: label, names.DEPLOYMENT: deployment}
        if event.outcome is not None:
            labels[names.OUTCOME] = event.outcome
        self._record(span, event, usage, labels)

    def _describe(self, span: Span, event: AttemptEnded, usage: Usage, start_ns: int) -> None:
        span.set_attributes(self._details(event, usage))
        for name, after_ms in ((names.CONNECTED, event.connected_ms), (names.FIRST_CHUNK, event.first_ms)):
            if after_ms is not None:
                span.add_event(name, timestamp=start_ns + round(after_ms * _NS))
        if event.failure is not None:
            span.set_status(Status(StatusCode.ERROR, event.failure))

    def _details(self, event: AttemptEnded, usage: Usage) -> Attributes:
        found: dict[str, str | int | float | bool | None] = {
            names.DEPLOYMENT: event.deployment,
            names.ATTEMPT_NUMBER: event.number,
            names.OUTCOME: event.outcome,
            names.STATUS_CODE: event.status,
            names.RESPONSE_MODEL: usage.model,
            **self._conventions.usage(usage),
        }
        if self._conventions.latest and event.call is not None and event.call.stream:
            found[names.STREAM] = True
            if event.first_ms is not None:
                found[names.TIME_TO_FIRST] = event.first_ms / 1000
        return {name: value for name, value in found.items() if value is not None}

    def _record(self, span: Span, event: AttemptEnded, usage: Usage, labels: Attributes) -> None:
        context = trace.set_span_in_context(span)  # examples of a bucket lead to the attempt
        for histogram, after_ms in (
            (self._duration, event.total_ms),
            (self._head, event.connected_ms),
            (self._first, event.first_ms),
        ):
            if after_ms is not None:
                histogram.record(after_ms / 1000, labels, context)
        for kind, tokens in billed(usage):
            self._tokens.record(tokens, {**labels, names.TOKEN_TYPE: kind}, context)


_UNKNOWN: Final = Usage()
