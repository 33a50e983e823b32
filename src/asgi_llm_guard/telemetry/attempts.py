"""Attempts as spans and histograms: one for each request that a gateway has sent to a provider."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from opentelemetry import trace
from opentelemetry.metrics import Meter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.events import Admission, AttemptEnded, CacheHit, Event, Refused
from asgi_llm_guard.pricing.book import UNPRICED
from asgi_llm_guard.telemetry import names
from asgi_llm_guard.usage import Usage

__all__ = ["AttemptObserver"]

_SECONDS: Final = tuple(round(0.01 * 2**power, 2) for power in range(14))
_TOKENS: Final = tuple(float(4**power) for power in range(14))
_SERIES: Final = 200
_NS: Final = 1_000_000

_Attributes = dict[str, str | int | float | bool]


class AttemptObserver:
    """An observer: makes a span, and points of histograms, of each `AttemptEnded`.

    A span is made when its attempt is over, with the times at which it began and ended, under the span that is
    current for whoever made the call. Decisions, and answers from the cache, are events of the span that is current.

    Names of deployments and models are labels of metrics as long as there are no more than 200 pairs; models without
    a price of their own, and all further pairs, are `other`.
    """

    def __init__(self, tracer: Tracer, meter: Meter, clock: Clock, conventions: names.Conventions) -> None:
        self._tracer = tracer
        self._clock = clock
        self._conventions = conventions
        self._pairs: dict[tuple[str, str], tuple[str, str]] = {}

        self._duration = meter.create_histogram(
            names.ATTEMPT_DURATION,
            unit="s",
            description="From the sending of a request to the end of its answer.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._head = meter.create_histogram(
            names.TIME_TO_HEAD,
            unit="s",
            description="From the sending of a request to the head of its answer.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._first = meter.create_histogram(
            names.TIME_TO_FIRST_CHUNK,
            unit="s",
            description="From the sending of a request to the first of its answer's text.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._tokens = meter.create_histogram(
            names.TOKENS,
            unit="{token}",
            description="Tokens that an attempt was billed for, as its provider says.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def __call__(self, event: Event, /) -> None:
        """Take an event. Those that are none of these are passed over."""
        match event:
            case AttemptEnded():
                self._ended(event)
            case Admission(degraded=degraded):
                trace.get_current_span().add_event("llm_guard.admitted", {"llm_guard.degraded": degraded})
            case CacheHit(age_ms=age_ms):
                trace.get_current_span().add_event("llm_guard.cache_hit", {"llm_guard.cache.age": age_ms / 1000})
            case Refused(denied=denied):
                attributes = {names.POLICY: denied.policy, "llm_guard.code": denied.code}
                trace.get_current_span().add_event("llm_guard.refused", attributes)

    def _ended(self, event: AttemptEnded) -> None:
        provider, _, model = event.model.partition("/")
        usage = event.usage or _UNKNOWN
        common: _Attributes = {
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
            attributes={**common, names.REQUEST_MODEL: model, **self._details(event, usage)},
            start_time=start_ns,
        )
        for name, after_ms in ((names.CONNECTED, event.connected_ms), (names.FIRST_CHUNK, event.first_ms)):
            if after_ms is not None:
                span.add_event(name, timestamp=start_ns + round(after_ms * _NS))
        if event.failure is not None:
            span.set_status(Status(StatusCode.ERROR, event.failure))
        span.end(end_ns)

        deployment, label = self._labels(event, model)
        labels = {**common, names.REQUEST_MODEL: label, names.DEPLOYMENT: deployment}
        if event.outcome is not None:
            labels[names.OUTCOME] = event.outcome
        self._record(span, event, usage, labels)

    def _details(self, event: AttemptEnded, usage: Usage) -> _Attributes:
        found: dict[str, str | int | float | bool | None] = {
            names.DEPLOYMENT: event.deployment,
            names.ATTEMPT_NUMBER: event.number,
            names.OUTCOME: event.outcome,
            names.STATUS_CODE: event.status,
            names.RESPONSE_MODEL: usage.model,
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
        }
        if self._conventions.latest:
            found["gen_ai.usage.cache_read.input_tokens"] = usage.cache_read_tokens
            found["gen_ai.usage.cache_write.input_tokens"] = usage.cache_write_tokens
            found["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
            if event.call is not None and event.call.stream:
                found["gen_ai.request.stream"] = True
                if event.first_ms is not None:
                    found["gen_ai.response.time_to_first_chunk"] = event.first_ms / 1000
        return {name: value for name, value in found.items() if value is not None}

    def _labels(self, event: AttemptEnded, model: str) -> tuple[str, str]:
        """The deployment and the model, as metrics may name them."""
        call = event.call
        # A deployment may serve whatever its clients ask for. What has a price of its own is no invention of theirs.
        known = call is not None and call.price_source not in (None, UNPRICED) and call.billed_model is None
        pair = (event.deployment, model if known else names.OTHER)
        found = self._pairs.get(pair)
        if found is None:
            if len(self._pairs) >= _SERIES:
                return names.OTHER, names.OTHER
            found = self._pairs.setdefault(pair, pair)
        return found

    def _record(self, span: Span, event: AttemptEnded, usage: Usage, labels: _Attributes) -> None:
        context = trace.set_span_in_context(span)  # examples of a bucket lead to the attempt
        for histogram, after_ms in (
            (self._duration, event.total_ms),
            (self._head, event.connected_ms),
            (self._first, event.first_ms),
        ):
            if after_ms is not None:
                histogram.record(after_ms / 1000, labels, context)
        for kind, tokens in _billed(usage):
            self._tokens.record(tokens, {**labels, names.TOKEN_TYPE: kind}, context)


def _billed(usage: Usage) -> Iterator[tuple[str, int]]:
    for kind, counted, billed in (
        ("input", usage.input_tokens, usage.billed_input_tokens),
        ("output", usage.output_tokens, usage.billed_output_tokens),
    ):
        tokens = counted if billed is None else billed
        if tokens is not None:
            yield kind, tokens


_UNKNOWN: Final = Usage()
