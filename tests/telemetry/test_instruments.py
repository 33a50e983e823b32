"""Several guards, guards that come and go, and an SDK that is installed late or never."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.trace import NoOpTracerProvider
from tests.decorator.values import ANSWER, BOUND, PRICES
from tests.telemetry.kit import Telemetry

from asgi_llm_guard import Budget, Context, Guard, Iterations, ProviderBudget
from asgi_llm_guard.events import Expired, emit
from asgi_llm_guard.telemetry import instrument
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

ADA = Context(caller="ada")


def new(clock: FrozenClock, *policies: Any) -> Guard:
    return Guard(policies or [Iterations(100)], clock=clock, prices=PRICES)


async def one_call(guard: Guard) -> None:
    async with guard.open(ADA), guard.call(**BOUND) as call:
        call.record(ANSWER)


async def collected(told: Telemetry) -> dict[str, dict[tuple[str, ...], float]]:
    """Each point that is a number, by the values of its labels."""
    found = await anyio.to_thread.run_sync(told.collect)
    return {
        name: {tuple(map(str, point.attributes.values())): point.value for point in points if hasattr(point, "value")}
        for name, points in found.items()
    }


async def test_two_guards(clock: FrozenClock, told: Telemetry) -> None:
    """S17: guards whose metrics go to one provider have all their gauges; counts are added up, and of limits and of
    states with the same labels it is the worst that is told."""
    one = new(clock, ProviderBudget({"openai": "$1/1d"}), Budget("$9/1d", per="global", name="all"))
    other = new(clock, ProviderBudget({"anthropic": "$2/1d"}), Budget("$3/1d", per="global", name="all"))
    for guard in (one, other):
        told.instrument(guard)
        await one_call(guard)
    async with one.open(ADA), other.open(ADA):
        assert (await collected(told))["llm_guard.requests.open"] == {(): 2}
    assert (await collected(told))["llm_guard.ready"] == {(): 1}
    await other.drain()
    found = await collected(told)
    assert found["llm_guard.provider_budget.limit"] == {
        ("openai", "provider_budget"): 1,
        ("anthropic", "provider_budget"): 2,
    }
    assert set(found["llm_guard.budget.limit"].values()) == {3}
    assert found["llm_guard.ready"] == {(): 0}
    assert found["llm_guard.decisions"]["admitted", "call"] == 2
    for guard in (one, other):
        await guard.aclose()


async def test_guards_that_come_and_go(clock: FrozenClock, told: Telemetry) -> None:
    """S17: a guard that is instrumented anew has its gauges again, its counters go on where they were, and the first
    instrumentation stops nothing of the second."""
    guard = new(clock, ProviderBudget({"openai": "$1/1d"}))
    first = told.instrument(guard)
    await one_call(guard)
    first.uninstrument()
    await one_call(guard)
    found = await collected(told)
    assert "llm_guard.ready" not in found
    assert "llm_guard.provider_budget.limit" not in found
    assert found["llm_guard.calls"] == {("openai", "test-model", "measured"): 1}

    told.instrument(guard)
    first.uninstrument()
    await one_call(guard)
    found = await collected(told)
    assert found["llm_guard.ready"] == {(): 1}
    assert found["llm_guard.provider_budget.limit"] == {("openai", "provider_budget"): 1}
    assert found["llm_guard.calls"] == {("openai", "test-model", "measured"): 2}
    await guard.aclose()


async def test_first_point_of_what_should_not_happen(clock: FrozenClock, told: Telemetry) -> None:
    """S17: what is out of the ordinary has a point of 0 from the start, so that its first time is a change."""
    guard = new(clock)
    told.instrument(guard)
    assert (await collected(told))["llm_guard.holds.expired"] == {(): 0}
    emit(guard.engine.observers, Expired(("a", "b")))
    assert (await collected(told))["llm_guard.holds.expired"] == {(): 2}
    await guard.aclose()


async def test_counters_are_told_as_changes_where_asked_for(clock: FrozenClock) -> None:
    """S17: an exporter that takes changes gets those of counters, and each once."""
    reader = InMemoryMetricReader(preferred_temporality={ObservableCounter: AggregationTemporality.DELTA})
    meters = MeterProvider([reader])
    guard = new(clock)
    instrument(guard, meter_provider=meters)

    def changes() -> Any:
        data: Any = reader.get_metrics_data()
        (metrics,) = [scope.metrics for resource in data.resource_metrics for scope in resource.scope_metrics]
        return sum(
            point.value for metric in metrics if metric.name == "llm_guard.calls" for point in metric.data.data_points
        )

    counted = []
    for calls in (1, 2):
        for _ in range(calls):
            await one_call(guard)
        counted.append(await anyio.to_thread.run_sync(changes))
    assert counted == [1, 2]
    await guard.aclose()
    meters.shutdown()


async def test_nothing_is_done_for_nobody(clock: FrozenClock) -> None:
    """S17: with providers that take nothing, no event is made and the storage is asked directly."""
    guard = new(clock)
    instrumentation = instrument(guard, tracer_provider=NoOpTracerProvider(), meter_provider=NoOpMeterProvider())
    assert guard.engine.observers == ()
    assert guard.engine.store.verbs is guard.engine.storage
    instrumentation.uninstrument()
    await guard.aclose()


async def test_guards_that_are_gone_are_forgotten(clock: FrozenClock) -> None:
    """S17: a process that makes guards and lets go of them keeps none of them, also where no SDK ever comes."""
    meters = NoOpMeterProvider()
    guard = new(clock)
    instrument(guard, meter_provider=meters).uninstrument()
    await guard.aclose()
    gone = weakref.ref(guard)
    del guard
    gc.collect()
    assert gone() is None


LATER = """
import asyncio
from opentelemetry import metrics, trace
from asgi_llm_guard import Context, Guard, Iterations, Usage
from asgi_llm_guard.telemetry import instrument

guard = Guard([Iterations(100)])
{before}
instrumentation = instrument(guard)

async def one_call(guard=guard):
    async with guard.open(Context(caller="ada")), guard.call(model="openai/gpt-4o-mini") as call:
        call.record(Usage(input_tokens=1, output_tokens=1))

async def main():
    await one_call()
    assert guard.engine.store.verbs is guard.engine.storage
    {later}
    await one_call()
    await guard.aclose()

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

reader, exporter, tracers = InMemoryMetricReader(), InMemorySpanExporter(), TracerProvider()
meters = MeterProvider([reader])
tracers.add_span_processor(SimpleSpanProcessor(exporter))
asyncio.run(main())
told = reader.get_metrics_data()
calls = [
    point.value
    for resource in (told.resource_metrics if told else ())
    for metric in resource.scope_metrics[0].metrics
    if metric.name == "llm_guard.calls"
    for point in metric.data.data_points
]
print(calls, len(exporter.get_finished_spans()), guard.engine.store.verbs is guard.engine.storage)
"""
METERS = "metrics.set_meter_provider(meters)"
TRACERS = "trace.set_tracer_provider(tracers)"


@pytest.mark.parametrize(
    ("before", "later", "expected"),
    [
        ("", f"{TRACERS}; await one_call()", "[] 2 True"),
        ("", f"{TRACERS}; await one_call(); {METERS}", "[1] 2 False"),
        ("", f"{METERS}; other = Guard(); instrument(other); await one_call(other)", "[2] 0 False"),
        ("instrument(guard).uninstrument(); second = Guard(); instrument(second)", METERS, "[1] 0 False"),
        ("", "instrumentation.uninstrument(); " + METERS, "[] 0 True"),
    ],
)
def test_sdk_that_is_installed_later(before: str, later: str, expected: str) -> None:
    """S17: without an SDK nothing is measured; what one that is installed after `instrument` takes is told from then on."""
    script = LATER.format(before=before, later=later)
    ran = subprocess.run(  # a process has one global provider
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, expected), ran.stderr
    assert "raised" not in ran.stderr


def test_events_without_an_sdk_leave_nothing(clock: FrozenClock) -> None:
    """S17: until there is an SDK, a guard with the global providers only looks whether there is one."""
    guard = new(clock)
    instrumentation = instrument(guard)
    watching: Callable[..., None]
    (watching,) = guard.engine.observers
    watching(Expired(("a",)))
    assert guard.engine.observers == (watching,)
    instrumentation.uninstrument()
    assert len(guard.engine.observers) == 0
