"""Spans and metrics in memory, of a guard that is instrumented for one test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asgi_llm_guard import Guard
from asgi_llm_guard.telemetry import Instrumentation, instrument


class Telemetry:
    """What has been told, and the tracer of the application."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("application")

    def instrument(self, guard: Guard, **options: Any) -> Instrumentation:
        return instrument(guard, tracer_provider=self.tracers, meter_provider=self.meters, **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        """All that have ended, in order."""
        return list(self._exporter.get_finished_spans())

    @property
    def calls(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name.startswith("llm_guard.call ")]

    @property
    def attempts(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name.startswith("llm_guard.attempt ")]

    def collect(self) -> dict[str, list[Any]]:
        """The points of each metric, now."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def of_attempts(self) -> dict[str, list[Any]]:
        """The points of the metrics of attempts."""
        return {name: points for name, points in self.collect().items() if name.startswith("llm_guard.attempt.")}

    def remaining(self) -> dict[str, float]:
        """What the gauge says is left, in USD, by provider."""
        points = self.collect().get("llm_guard.provider_budget.remaining", [])
        return {point.attributes["llm_guard.provider"]: point.value for point in points}


@contextlib.contextmanager
def telemetry() -> Iterator[Telemetry]:
    """Exporters of its own, shut down at the end."""
    made = Telemetry()
    try:
        yield made
    finally:
        made.tracers.shutdown()
        made.meters.shutdown()
