"""What `instrument` costs a call: a guard without it, one with it where no SDK is installed, and one with the SDK.

    python -m benchmarks.telemetry

A call is one `guard.open` with one `guard.call` inside, over storage in memory, under three policies. With the SDK every
span is made and handed to a processor in batches, as an exporter takes them, and every metric is counted.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence

from benchmarks._harness import compare_async, table
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from asgi_llm_guard import Budget, Context, Guard, Iterations, RateLimit, Usage
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.telemetry import instrument

CONTEXT = Context(caller="ada", session="s")
USED = Usage(input_tokens=800, output_tokens=100)


class Nowhere(SpanExporter):
    """Takes spans, and lets them go."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002 - as the SDK asks
        return SpanExportResult.SUCCESS


def new_guard() -> Guard:
    policies: list[Policy] = [
        Iterations(10**9),
        Budget("$9000000/1d", per="user"),
        RateLimit("1000000000/second", per="user"),
    ]
    return Guard(policies)


def work(guard: Guard) -> Callable[[], Awaitable[None]]:
    described = guard.describe("openai/gpt-4o-mini", input_tokens=1_000, max_output_tokens=500)

    async def one() -> None:
        async with (
            guard.open(CONTEXT),
            guard.call(model=described.model, provider="openai", input_tokens=1_000, max_output_tokens=500) as call,
        ):
            call.record(USED)

    return one


async def main() -> None:
    plain, silent, sampled, told = (new_guard() for _ in range(4))
    instrument(silent)  # with the providers that the API has while no SDK is installed
    tracers = [TracerProvider(sampler=TraceIdRatioBased(0.01)), TracerProvider()]
    for guard, tracer in zip((sampled, told), tracers, strict=True):
        tracer.add_span_processor(BatchSpanProcessor(Nowhere()))
        instrument(guard, tracer_provider=tracer, meter_provider=MeterProvider([InMemoryMetricReader()]))
    alternatives = {
        "not instrumented": work(plain),
        "instrumented, no SDK": work(silent),
        "SDK, 1 % of the traces": work(sampled),
        "SDK, all traces": work(told),
    }
    results = await compare_async(alternatives, operations=500, rounds=40)
    print(table(results, title="A call and its telemetry"))
    for guard in (plain, silent, sampled, told):
        await guard.aclose()
    for tracer in tracers:
        tracer.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit()
