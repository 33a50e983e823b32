"""Attempts as spans and histograms: names, parents, times, and nothing that is nobody's business."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from tests.gateway.kit import CONTEXT, PRICES, fleet
from tests.gateway.test_router import in_order
from tests.telemetry.kit import Telemetry

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, Usage
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import AttemptEnded, CacheHit, Event
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import Behaviour, FrozenClock

pytestmark = pytest.mark.anyio

SWITCH = "OTEL_SEMCONV_STABILITY_OPT_IN"
NEWER = "http, gen_ai_latest_experimental"
CANARY = "canary-4711"


def ended(deployment: str = "a", model: str = "openai/gpt-4o-mini", **fields: Any) -> AttemptEnded:
    """The end of an attempt whose model has a price."""
    known: dict[str, Any] = {
        "provider": "openai",
        "model": "gpt-4o-mini",
        "dialect": "openai",
        "price_source": "list",
        "stream": True,
    }
    made: dict[str, Any] = {
        "context": CONTEXT,
        "call": Call(**known),
        "number": 1,
        "outcome": "measured",
        "status": 200,
        "usage": Usage(input_tokens=100, output_tokens=20, cache_read_tokens=30, model="gpt-4o-mini-2024-07-18"),
        "connected_ms": 250.0,
        "first_ms": 500.0,
        "total_ms": 2000.0,
        **fields,
    }
    return AttemptEnded(deployment=deployment, model=model, **made)


def attribute(span: ReadableSpan, name: str) -> object:
    """`None`: it has none of that name."""
    return None if span.attributes is None else span.attributes.get(name)


def tell(guard: Guard, event: Event) -> None:
    for observer in guard.engine.observers:
        observer(event)


async def test_a_span_for_each_attempt(clock: FrozenClock, told: Telemetry) -> None:
    """C15: each request to a provider is a span of its own name under the caller's span, and a failed one is an error."""
    async with in_order(clock, "a", "b") as made:
        told.instrument(made.guard)
        made["a"].script(Behaviour.refuse("overloaded"))
        with told.tracer.start_as_current_span("request") as outer:
            await made.chat()
        provided = made["b"].calls

    failed, good = told.attempts
    assert provided == 1
    assert (failed.name, good.name) == ("llm_guard.attempt model-a", "llm_guard.attempt model-b")
    for number, span in enumerate((failed, good), start=1):
        assert span.kind is SpanKind.CLIENT
        assert span.parent is not None
        assert span.parent.span_id == outer.get_span_context().span_id
        assert attribute(span, "llm_guard.attempt.number") == number
        assert attribute(span, "gen_ai.operation.name") == "chat"
    assert (failed.status.status_code, good.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert (attribute(failed, "error.type"), attribute(good, "error.type")) == ("overload", None)
    assert (attribute(failed, "http.response.status_code"), attribute(good, "http.response.status_code")) == (503, 200)
    assert attribute(failed, "gen_ai.usage.input_tokens") is None
    assert attribute(good, "gen_ai.response.model") == "model-b"
    assert attribute(good, "llm_guard.outcome") == "measured"


@pytest.mark.parametrize("streamed", [False, True])
async def test_usage_is_what_was_settled(clock: FrozenClock, told: Telemetry, *, streamed: bool) -> None:
    """C15: a span and the token histogram have the tokens of the ledger, of streams too."""
    async with fleet(clock, "a") as made:
        told.instrument(made.guard)
        await (made.stream() if streamed else made.chat())
        (record,) = await made.records()

    (span,) = told.attempts
    assert record.usage is not None
    used = {"input": record.usage.input_tokens, "output": record.usage.output_tokens}
    assert None not in used.values()
    assert {kind: attribute(span, f"gen_ai.usage.{kind}_tokens") for kind in used} == used
    points = told.collect()["llm_guard.attempt.tokens"]
    assert {point.attributes["gen_ai.token.type"]: point.sum for point in points} == used


@pytest.mark.parametrize("streamed", [False, True])
async def test_no_second_span_of_the_call(clock: FrozenClock, told: Telemetry, *, streamed: bool) -> None:
    """C15: no span is called `chat`, which is what instrumented SDKs call theirs, and an attempt is one call in the
    conventions' metrics: nothing is counted twice."""
    async with fleet(clock, "a") as made:
        told.instrument(made.guard)
        await (made.stream() if streamed else made.chat())

    assert [span.name for span in told.spans] == ["llm_guard.attempt model-a"]
    metrics = told.collect()
    (duration,) = metrics["gen_ai.client.operation.duration"]
    assert duration.count == 1
    assert sum(point.count for point in metrics["gen_ai.client.token.usage"]) == 2


def test_times_are_those_of_the_attempt(clock: FrozenClock, told: Telemetry) -> None:
    """D8: a span has the true begin and end, its events tell of head and first text, and histograms count all three."""
    guard = Guard(clock=clock)
    told.instrument(guard)
    clock.advance(seconds=60)
    tell(guard, ended())

    (span,) = told.attempts
    end_ns = clock.now_ms() * 1_000_000
    assert (span.start_time, span.end_time) == (end_ns - 2_000_000_000, end_ns)
    assert [(event.name, event.timestamp) for event in span.events] == [
        ("llm_guard.connected", end_ns - 1_750_000_000),
        ("llm_guard.first_chunk", end_ns - 1_500_000_000),
    ]
    points = told.collect()
    for name, seconds in (("duration", 2.0), ("time_to_head", 0.25), ("time_to_first_chunk", 0.5)):
        (point,) = points[f"llm_guard.attempt.{name}"]
        assert (point.count, point.sum) == (1, seconds)
        assert point.explicit_bounds[0] == 0.01
        assert point.explicit_bounds[-1] == 81.92
        (exemplar,) = point.exemplars
        assert exemplar.span_id == span.context.span_id


def test_no_answer_has_no_times_of_one(clock: FrozenClock, told: Telemetry) -> None:
    """D8: of an attempt that nobody answered only its length is counted."""
    guard = Guard(clock=clock)
    told.instrument(guard)
    silent: dict[str, Any] = dict.fromkeys(("usage", "status", "connected_ms", "first_ms", "call"))
    tell(guard, ended(failure="connection", outcome="not_dispatched", **silent))

    (span,) = told.attempts
    assert span.events == ()
    attempts = {name for name in told.collect() if name.startswith("llm_guard.attempt.")}
    assert attempts == {"llm_guard.attempt.duration"}


@pytest.mark.parametrize(
    ("switch", "key", "names", "only_newer"),
    [
        (None, "gen_ai.system", ["mistral_ai", "azure.ai.openai", "xai", "gcp.vertex_ai", "my_own"], False),
        ("http", "gen_ai.system", ["mistral_ai", "azure.ai.openai", "xai", "gcp.vertex_ai", "my_own"], False),
        (NEWER, "gen_ai.provider.name", ["mistral_ai", "azure.ai.openai", "x_ai", "gcp.vertex_ai", "my_own"], True),
    ],
)
def test_both_versions_of_the_conventions(
    clock: FrozenClock,
    told: Telemetry,
    monkeypatch: pytest.MonkeyPatch,
    switch: str | None,
    key: str,
    names: list[str],
    *,
    only_newer: bool,
) -> None:
    """C15: the names are those of version 1.36 of the conventions, or the newer ones if the environment says so."""
    if switch is None:
        monkeypatch.delenv(SWITCH, raising=False)
    else:
        monkeypatch.setenv(SWITCH, switch)
    guard = Guard(clock=clock)
    told.instrument(guard)
    for provider in ("mistral", "azure", "xai", "vertex_ai", "my_own"):
        tell(guard, ended(model=f"{provider}/model"))

    assert [attribute(span, key) for span in told.attempts] == names
    for span in told.attempts:
        assert span.attributes is not None
        assert ("gen_ai.provider.name" in span.attributes, "gen_ai.system" in span.attributes) == (
            only_newer,
            not only_newer,
        )
        assert attribute(span, "gen_ai.request.model") == "model"
        assert attribute(span, "gen_ai.usage.cache_read.input_tokens") == (30 if only_newer else None)
        assert attribute(span, "gen_ai.response.time_to_first_chunk") == (0.5 if only_newer else None)


async def test_nobodys_secrets_are_told(clock: FrozenClock, told: Telemetry) -> None:
    """C15: no prompt, answer, key, caller, user, session, tag or request id is in any span or metric."""
    secret = Context(
        caller=CANARY, user=CANARY, departments=(CANARY,), agent=CANARY, session=CANARY, tags=(CANARY,),
        request_id=CANARY,
    )  # fmt: skip
    policies = [Iterations(2, per="session"), Budget("$1/1d", per="user")]
    async with in_order(
        clock, "a", "b", policies=policies, limits={"a": {"api_key": CANARY}, "b": {"api_key": CANARY}}
    ) as made:
        told.instrument(made.guard)
        made["a"].script(Behaviour.refuse("overloaded"))
        messages = [{"role": "user", "content": CANARY}]
        with told.tracer.start_as_current_span("request"):
            async with made.guard.open(secret):
                await made.gateway.chat("auto", messages, max_tokens=20)
                await made.gateway.chat("auto", messages, max_tokens=20)
                with pytest.raises(LimitExceeded):
                    await made.gateway.chat("auto", messages, max_tokens=20)

    assert len(told.attempts) == 3
    assert CANARY not in "".join(span.to_json() for span in told.spans)
    assert CANARY not in repr(told.collect())


async def test_decisions_are_part_of_the_trace(clock: FrozenClock, told: Telemetry) -> None:
    """B7: each check is an event of the caller's current span, and says what refused."""
    guard = Guard([Iterations(1, per="caller")], clock=clock, prices=PRICES)
    told.instrument(guard)
    with told.tracer.start_as_current_span("request"):
        async with guard.open(CONTEXT):
            async with guard.call(model="openai/model-a", input_tokens=10, max_output_tokens=10):
                pass
            with pytest.raises(LimitExceeded):
                await guard.call(model="openai/model-a", input_tokens=10, max_output_tokens=10).__aenter__()
    await guard.aclose()

    call, span = told.spans
    assert call.name == "llm_guard.call model-a"
    assert [event.name for event in span.events] == ["llm_guard.admitted"] * 2 + ["llm_guard.refused"]
    refused = span.events[-1].attributes
    assert refused is not None
    assert refused["llm_guard.policy"] == "iterations"


def test_cache_hits_are_part_of_the_trace(clock: FrozenClock, told: Telemetry) -> None:
    """C15: an answer from the cache is an event of the caller's current span, and no attempt."""
    guard = Guard(clock=clock)
    told.instrument(guard)
    with told.tracer.start_as_current_span("request"):
        tell(guard, CacheHit(CONTEXT, None, age_ms=1_500, waited=False))

    (span,) = told.spans
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("llm_guard.cache_hit", {"llm_guard.cache.age": 1.5})
    ]


@pytest.mark.parametrize("unknown", ["deny", "allow", "charge_as"])
async def test_invented_models_make_no_series(clock: FrozenClock, told: Telemetry, unknown: str) -> None:
    """T11: 1,000 models that a client has invented add one series to each metric, whatever becomes of their price."""
    rule: Any = {"charge_as": "openai/gpt-4o-mini"} if unknown == "charge_as" else unknown
    guard = Guard(clock=clock, prices=PriceBook.snapshot(unknown=rule))
    told.instrument(guard)
    tell(guard, ended())
    known = {name: len(points) for name, points in told.of_attempts().items()}
    for number in range(1_000):
        call = guard.describe(f"openai/junk-{number}", input_tokens=1, max_output_tokens=1)
        tell(guard, ended(model=f"openai/junk-{number}", call=call))
    await guard.aclose()

    points = told.of_attempts()
    assert {name: len(found) for name, found in points.items()} == {name: 2 * count for name, count in known.items()}
    models = {point.attributes["gen_ai.request.model"] for found in points.values() for point in found}
    assert models == {"gpt-4o-mini", "other"}


def test_series_are_bounded(clock: FrozenClock, told: Telemetry) -> None:
    """T11: of 1,000 models with a price, and as many deployments, the first 200 pairs have series; all others share one."""
    guard = Guard(clock=clock)
    told.instrument(guard)
    for number in range(1_000):
        tell(guard, ended(f"deployment-{number}", f"openai/model-{number}"))

    points = told.collect()["llm_guard.attempt.duration"]
    assert len(points) == 201
    assert {point.count for point in points if point.attributes["llm_guard.deployment"] == "other"} == {800}


def test_uninstrument(clock: FrozenClock, told: Telemetry) -> None:
    """After `uninstrument` nothing is told; a guard is instrumented once at a time."""
    guard = Guard(clock=clock)
    first = told.instrument(guard)
    with pytest.raises(ConfigurationError, match="instrumented already"):
        told.instrument(guard)
    first.uninstrument()
    first.uninstrument()
    tell(guard, ended())
    assert told.spans == []
    assert guard.engine.observers == ()

    told.instrument(guard)
    tell(guard, ended())
    assert len(told.attempts) == 1
