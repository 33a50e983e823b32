"""Calls of every way in: one span each, and the conventions' metrics, by the names of both generations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from starlette.types import Receive, Scope, Send
from tests.decorator.values import ANSWER, BOUND, MODEL, PRICES, event
from tests.gateway.kit import fleet
from tests.middleware.values import SSE_HEADERS, Provider, ask, guarded
from tests.telemetry.kit import Telemetry

from asgi_llm_guard import Budget, CacheScope, Context, Guard, Iterations, LimitExceeded, Usage
from asgi_llm_guard import guarded as marked
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.claims import Granted
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Admission, CallEnded, emit
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock

pytestmark = pytest.mark.anyio

SWITCH = "OTEL_SEMCONV_STABILITY_OPT_IN"
LATEST = "gen_ai_latest_experimental"
ADA = Context(caller="ada", session="s")
SECRET = "a secret of the telemetry"
ASK = {"model": "test-model", "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}

Way = Callable[[Guard], Awaitable[None]]


async def by_hand(guard: Guard) -> None:
    async with guard.open(ADA), guard.call(**BOUND) as call:
        call.record(ANSWER)


async def by_hand_in_a_thread(guard: Guard) -> None:
    def work() -> None:
        with guard.open_sync(ADA), guard.call_sync(**BOUND) as call:
            call.record(ANSWER)

    await asyncio.to_thread(work)


async def by_a_function(guard: Guard) -> None:
    @marked(model=MODEL, guard=guard)
    async def answer() -> Any:
        return ANSWER

    async with guard.open(ADA):
        await answer()


async def by_a_stream_of_a_function(guard: Guard) -> None:
    @marked(model=MODEL, guard=guard)
    async def answer() -> AsyncIterator[Any]:
        yield ANSWER

    async with guard.open(ADA):
        assert [item async for item in answer()]


async def by_a_route(guard: Guard) -> None:
    assert (await ask(guarded(Provider(), guard))).status == 200


async def by_a_streamed_route(guard: Guard) -> None:
    pieces = [event("hel"), event("lo", last=True), b"data: [DONE]\n\n"]
    app = guarded(Provider(pieces, headers=SSE_HEADERS), guard)
    body = {"model": MODEL, "stream": True, "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}
    assert (await ask(app, body)).status == 200


async def by_a_hook(guard: Guard) -> None:
    async with guard.open(ADA):
        await by_a_hook_here(guard)


async def by_everything_around_each_other(guard: Guard) -> None:
    @marked(model=MODEL, guard=guard)
    async def answer() -> None:
        async with guard.call(**BOUND):
            await by_a_hook_here(guard)

    async with guard.open(ADA):
        await answer()


async def by_a_hook_here(guard: Guard) -> None:
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=ANSWER))
    async with guard.httpx_client(transport=transport) as client:
        await client.post("https://api.openai.com/v1/chat/completions", json=ASK)


WAYS: list[Way] = [
    by_hand, by_hand_in_a_thread, by_a_function, by_a_stream_of_a_function, by_a_route, by_a_streamed_route, by_a_hook,
    by_everything_around_each_other,
]  # fmt: skip


def new(clock: FrozenClock, *policies: Any, **options: Any) -> Guard:
    return Guard([Budget("$1/1d", per="global"), *policies], clock=clock, **{"prices": PRICES, **options})


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("latest", [False, True])
async def test_every_way_in(
    clock: FrozenClock, told: Telemetry, monkeypatch: pytest.MonkeyPatch, way: Way, *, latest: bool
) -> None:
    """C15: whichever way a call comes in, it is one span and one point, with the tokens and the cost of the ledger."""
    monkeypatch.setenv(SWITCH, LATEST if latest else "")
    guard = new(clock)
    told.instrument(guard)
    with told.tracer.start_as_current_span("request") as request:
        await way(guard)
    (record,) = await guard.storage.records()
    await guard.aclose()

    (span,) = told.calls
    found = attributes(span)
    assert record.usage is not None
    assert span.name == f"llm_guard.call {record.model}"
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name" if latest else "gen_ai.system"] == "openai"
    assert found["gen_ai.request.model"] == "test-model"
    assert found["gen_ai.usage.input_tokens"] == record.usage.input_tokens
    assert found["gen_ai.usage.output_tokens"] == record.usage.output_tokens
    assert found["llm_guard.outcome"] == record.outcome == "measured"
    assert found["llm_guard.cost"] == (record.cost_nanousd or 0) / 1e9
    assert found["llm_guard.cache.hit"] is False
    if way is not by_hand_in_a_thread:  # a thread of its own has no span around it here
        assert span.parent is not None
        assert span.parent.span_id == request.get_span_context().span_id

    metrics = told.collect()
    assert [point.value for point in metrics["llm_guard.calls"]] == [1]
    assert sum(point.value for point in metrics["llm_guard.cost"]) == found["llm_guard.cost"]
    used = {"input": record.usage.input_tokens, "output": record.usage.output_tokens}
    assert {point.attributes["gen_ai.token.type"]: point.value for point in metrics["llm_guard.tokens"]} == used
    assert {point.attributes["llm_guard.provider"] for point in metrics["llm_guard.tokens"]} == {"openai"}
    if latest:
        assert "gen_ai.client.token.usage" not in metrics
        assert "gen_ai.client.operation.duration" not in metrics
        (duration,) = metrics["gen_ai.client.inference.duration"]
        for kind, tokens in used.items():
            (counted,) = metrics[f"gen_ai.client.inference.usage.{kind}_tokens"]
            assert (counted.value, counted.attributes["gen_ai.token.modality"]) == (tokens, "text")
            (sizes,) = metrics[f"gen_ai.client.inference.operation.{kind}_tokens"]
            assert (sizes.sum, sizes.explicit_bounds[-1]) == (tokens, 67_108_864)
    else:
        assert [name for name in metrics if "inference" in name] == []
        (duration,) = metrics["gen_ai.client.operation.duration"]
        points = metrics["gen_ai.client.token.usage"]
        assert {point.attributes["gen_ai.token.type"]: point.sum for point in points} == used
    assert duration.count == 1
    assert duration.explicit_bounds[0] == 0.01


async def test_attempts_of_a_gateway_have_spans_already(clock: FrozenClock, told: Telemetry) -> None:
    """C15: a gateway's attempts are spans of attempts, one point each, and never a span of a call beside it."""
    async with fleet(clock, "a", "b") as made:
        made["a"].script(Behaviour.error(503))
        made["b"].script(Behaviour.error(503))
        told.instrument(made.guard)
        await made.chat()
        records = await made.records()

    assert len(told.attempts) == len(records) >= 2
    assert told.calls == []
    counted = told.collect()["gen_ai.client.operation.duration"]
    assert sum(point.count for point in counted) == len(records)


async def test_span_of_an_sdk(clock: FrozenClock, told: Telemetry) -> None:
    """C15: where a span tells of the call already, it gets an event with what the guard knows, and there is no second one."""
    guard = new(clock)
    told.instrument(guard)
    with told.tracer.start_as_current_span("chat test-model", attributes={"gen_ai.operation.name": "chat"}):
        await by_a_hook(guard)
    await guard.aclose()

    assert told.calls == []
    (span,) = told.spans
    (ended,) = [each for each in span.events if each.name == "llm_guard.call"]
    assert dict(ended.attributes or {}) == {
        "llm_guard.outcome": "measured",
        "llm_guard.cache.hit": False,
        "llm_guard.attempt.number": 1,
        "llm_guard.cost": 2e-05,
    }
    assert sum(point.count for point in told.collect()["gen_ai.client.operation.duration"]) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_sdk_that_traces_itself(clock: FrozenClock, told: Telemetry, *, streamed: bool) -> None:
    """C15: a call of Anthropic's SDK, which traces itself, has one span with the tokens."""
    provider = FakeProvider(default=Behaviour.answer())
    guard = Guard([Budget("$1/1d", per="global")], clock=clock)
    told.instrument(guard)
    ask: Any = {"model": "claude-haiku-4-5", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
    async with provider.serve() as url, anthropic.AsyncAnthropic(
        api_key="-", base_url=url.root, http_client=guard.httpx_client(), open_telemetry={"tracer_provider": told.tracers}
    ) as client, guard.open(ADA):  # fmt: skip
        if streamed:
            async with client.messages.stream(**ask) as stream:
                await stream.get_final_message()
        else:
            await client.messages.create(**ask)
    await guard.aclose()

    counting = [span.name for span in told.spans if "gen_ai.usage.output_tokens" in attributes(span)]
    assert len(counting) == 1
    assert told.calls == []


@pytest.mark.parametrize("latest", [False, True])
async def test_streams(clock: FrozenClock, told: Telemetry, monkeypatch: pytest.MonkeyPatch, *, latest: bool) -> None:
    """C15: of streamed answers, and of no others, it is told when the first part came, and of each further one how
    long it took; with the labels of the conventions, which have no errors among them."""
    monkeypatch.setenv(SWITCH, LATEST if latest else "")
    prefix = "gen_ai.client.inference" if latest else "gen_ai.client.operation"
    guard = new(clock)
    told.instrument(guard)
    for way in (by_a_route, by_hand, by_a_hook):
        await way(guard)
    assert [name for name in told.collect() if "chunk" in name] == []
    assert [event.name for span in told.calls for event in span.events] == []

    await by_a_streamed_route(guard)
    await guard.aclose()
    metrics = told.collect()
    (gaps,), (first,) = metrics[f"{prefix}.time_per_output_chunk"], metrics[f"{prefix}.time_to_first_chunk"]
    assert (gaps.count, first.count) == (2, 1)
    for point in (gaps, first):
        assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (0.01, 81.92)
        assert dict(point.attributes) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name" if latest else "gen_ai.system": "openai",
            "gen_ai.request.model": "test-model",
        }
    assert [event.name for event in told.calls[-1].events] == ["llm_guard.first_chunk"]
    assert attributes(told.calls[-1]).get("gen_ai.request.stream") == (True if latest else None)
    assert all("gen_ai.response.time_to_first_chunk" not in attributes(span) for span in told.calls[:-1])


async def test_stream_that_is_seen_twice(clock: FrozenClock, told: Telemetry) -> None:
    """C15: a stream that a hook sees and the route around it passes on is told of once, as the hook saw it."""
    guard = new(clock)
    told.instrument(guard)
    pieces = [event("hel"), event("l"), event("o", last=True), b"data: [DONE]\n\n"]
    body = {"model": MODEL, "stream": True, "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}

    async def parts() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def application(_scope: Scope, _receive: Receive, send: Send) -> None:
        answer = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=parts())
        async with guard.httpx_client(transport=httpx2.MockTransport(lambda _: answer)) as client:
            url, inner = "https://api.openai.com/v1/chat/completions", {**body, "model": "test-model"}
            async with client.stream("POST", url, json=inner) as response:
                taken = b"".join([part async for part in response.aiter_raw()])
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        for half in (taken[:10], taken[10:]):
            await send({"type": "http.response.body", "body": half, "more_body": half == taken[:10]})

    assert (await ask(guarded(application, guard), body)).status == 200
    await guard.aclose()
    metrics = told.collect()
    assert [point.count for point in metrics["gen_ai.client.operation.time_per_output_chunk"]] == [3]
    assert [point.count for point in metrics["gen_ai.client.operation.time_to_first_chunk"]] == [1]


def test_gaps_are_told_as_they_were(clock: FrozenClock, told: Telemetry) -> None:
    """C15: each time that was taken between two parts is one of the histogram's, in seconds, also of a stream that failed."""
    guard = new(clock)
    told.instrument(guard)
    call = guard.describe(MODEL, input_tokens=10, max_output_tokens=10)
    ended = CallEnded(
        context=ADA, call=call, call_id="1", outcome="estimated", failure="ValueError", began_ms=0, first_ms=250,
        ended_ms=9_000, streamed=True, gaps_s=(0.005, 0.015, 5.0),
    )  # fmt: skip
    emit(guard.engine.observers, ended)

    metrics = told.collect()
    (gaps,) = metrics["gen_ai.client.operation.time_per_output_chunk"]
    assert (gaps.count, gaps.sum, gaps.bucket_counts[:2], gaps.max) == (3, pytest.approx(5.02), (1, 1), 5.0)
    (first,) = metrics["gen_ai.client.operation.time_to_first_chunk"]
    assert first.sum == 0.25
    (duration,) = metrics["gen_ai.client.operation.duration"]
    assert duration.attributes["error.type"] == "ValueError"
    assert "error.type" not in {**gaps.attributes, **first.attributes}

    unbegun = CallEnded(
        context=ADA, call=call, call_id="2", outcome="unknown", began_ms=0, ended_ms=9_000, streamed=True
    )
    emit(guard.engine.observers, unbegun)
    metrics = told.collect()
    assert sum(point.count for point in metrics["gen_ai.client.operation.duration"]) == 2
    assert [point.count for point in metrics["gen_ai.client.operation.time_to_first_chunk"]] == [1]


def test_more_labels_than_are_kept(clock: FrozenClock, told: Telemetry) -> None:
    """T11: sets of labels are kept made for a thousand kinds of calls at most, and every call is counted all the same."""
    guard = new(clock)
    told.instrument(guard)
    for number in range(1_100):
        call = Call(provider="own", model=f"model-{number % 11}", price_source="override")
        ended = CallEnded(
            context=ADA,
            call=call,
            call_id="1",
            outcome="unknown",
            failure=f"Error{number // 11}",
            began_ms=0,
            ended_ms=1,
        )
        emit(guard.engine.observers, ended)
    points = told.collect()["gen_ai.client.operation.duration"]
    assert (len(points), sum(point.count for point in points)) == (1_100, 1_100)


async def test_cache_hits(clock: FrozenClock, told: Telemetry) -> None:
    """C15: an answer from the cache is a span that says so, and adds nothing to tokens, durations or costs."""
    guard = new(clock, CacheScope(), cache=Cache())
    told.instrument(guard)
    for _ in range(2):
        async with guard.open(ADA), guard.call(cache_key="question", **BOUND) as call:
            if not call.hit:
                call.record(ANSWER)
                call.keep("answer")
    await guard.aclose()

    assert [attributes(span)["llm_guard.cache.hit"] for span in told.calls] == [False, True]
    assert "gen_ai.usage.input_tokens" not in attributes(told.calls[1])
    metrics = told.collect()
    looked_up = {
        point.attributes["llm_guard.cache.result"]: point.value for point in metrics["llm_guard.cache.lookups"]
    }
    assert looked_up == {"miss": 1, "hit": 1}
    assert sum(point.count for point in metrics["gen_ai.client.operation.duration"]) == 1
    outcomes = {point.attributes["llm_guard.outcome"]: point.value for point in metrics["llm_guard.calls"]}
    assert outcomes == {"measured": 1, "cached": 1}
    assert sum(point.value for point in metrics["llm_guard.cost"]) == pytest.approx(2e-05)


async def test_errors(clock: FrozenClock, told: Telemetry) -> None:
    """C15: a call that ends in an error has its class as `error.type`, and the status of an error."""
    guard = new(clock)
    told.instrument(guard)
    with pytest.raises(ZeroDivisionError):
        async with guard.open(ADA), guard.call(**BOUND) as call:
            call.dispatched()
            raise ZeroDivisionError("secret")
    transport = httpx2.MockTransport(lambda _: httpx2.Response(500, json={"error": {"message": "secret"}}))
    async with guard.open(ADA), guard.httpx_client(transport=transport) as client:
        await client.post("https://api.openai.com/v1/chat/completions", json=ASK)
    await guard.aclose()

    assert [attributes(span)["error.type"] for span in told.calls] == ["ZeroDivisionError", "other"]
    assert {span.status.status_code for span in told.calls} == {StatusCode.ERROR}
    assert "secret" not in "".join(span.to_json() for span in told.spans)


async def test_what_was_not_sent(clock: FrozenClock, told: Telemetry) -> None:
    """C15: a call that was refused, or never sent, is no span and no point of a call."""
    guard = new(clock, Iterations(1, per="caller"))
    told.instrument(guard)
    async with guard.open(ADA):
        async with guard.call(**BOUND) as call:
            call.release()
        async with guard.call(**BOUND) as call:
            call.record(ANSWER)
        with pytest.raises(LimitExceeded):
            await guard.call(**BOUND).__aenter__()
    await guard.aclose()

    assert len(told.calls) == 1
    assert [point.value for point in told.collect()["llm_guard.calls"]] == [1]


async def test_billable_tokens(clock: FrozenClock, told: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15: metrics have the billed tokens where both are known, and spans what was counted; parts of the input and the
    output have counters of their own, and audio and images are told apart from text."""
    monkeypatch.setenv(SWITCH, LATEST)
    guard = new(clock)
    told.instrument(guard)
    async with guard.open(ADA), guard.call(**BOUND) as call:
        call.record(
            Usage(
                input_tokens=90, output_tokens=40, billed_input_tokens=70, input_audio_tokens=20, input_image_tokens=10,
                cache_read_tokens=5, cache_write_tokens=0, reasoning_tokens=30,
            )
        )  # fmt: skip
    await guard.aclose()

    metrics = told.collect()
    counted = {
        (name.removeprefix("gen_ai.client.inference.usage."), point.attributes["gen_ai.token.modality"]): point.value
        for name, points in metrics.items()
        if name.startswith("gen_ai.client.inference.usage.")
        for point in points
    }
    assert counted == {
        ("input_tokens", "audio"): 20,
        ("input_tokens", "image"): 10,
        ("input_tokens", "text"): 40,
        ("output_tokens", "text"): 40,
        ("cache_read.input_tokens", "text"): 5,
        ("cache_write.input_tokens", "text"): 0,
        ("reasoning.output_tokens", "text"): 30,
    }
    (span,) = told.calls
    assert {name: tokens for name, tokens in attributes(span).items() if name.startswith("gen_ai.usage.")} == {
        "gen_ai.usage.input_tokens": 90,
        "gen_ai.usage.output_tokens": 40,
        "gen_ai.usage.audio.input_tokens": 20,
        "gen_ai.usage.image.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 5,
        "gen_ai.usage.cache_write.input_tokens": 0,
        "gen_ai.usage.reasoning.output_tokens": 30,
    }


async def test_times(clock: FrozenClock, told: Telemetry) -> None:
    """C15: a span has the true begin and end of its call, and the time to the first of its answer is counted."""
    guard = new(clock)
    told.instrument(guard)
    async with guard.open(ADA), guard.call(**BOUND) as call:
        call.dispatched()
        began_ns = clock.now_ms() * 1_000_000
        clock.advance(ms=300)
        call.record_chunk(ANSWER)
        clock.advance(ms=700)
    await guard.aclose()

    (span,) = told.calls
    assert (span.start_time, span.end_time) == (began_ns, began_ns + 1_000_000_000)
    assert [(each.name, each.timestamp) for each in span.events] == [("llm_guard.first_chunk", began_ns + 300_000_000)]
    metrics = told.collect()
    (duration,) = metrics["gen_ai.client.operation.duration"]
    (first,) = metrics["gen_ai.client.operation.time_to_first_chunk"]
    assert (duration.sum, first.sum) == (1.0, 0.3)
    (exemplar,) = duration.exemplars
    assert exemplar.span_id == span.context.span_id


async def test_operations_that_are_no_inference(
    clock: FrozenClock, told: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C15: embeddings keep the older name of the duration, as the newer conventions have it."""
    monkeypatch.setenv(SWITCH, LATEST)
    guard = new(clock)
    told.instrument(guard)
    body = {"model": MODEL, "input": "hello"}
    answer = b'{"object": "list", "model": "test-model", "data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}'
    assert (await ask(guarded(Provider([answer]), guard), body, path="/v1/embeddings")).status == 200
    await guard.aclose()

    (duration,) = told.collect()["gen_ai.client.operation.duration"]
    assert duration.attributes["gen_ai.operation.name"] == "embeddings"


async def test_ids_only_as_hashes_and_if_asked(clock: FrozenClock, told: Telemetry) -> None:
    """T15: ids are in no span; with a secret they are there as keyed hashes, of a session together with its caller."""
    found = []
    contexts = [
        Context(caller="ada", user="ada", agent="ada", session="ada", request_id="r"),
        Context(caller="ada", user="ada", agent="ada", session="ada", request_id="r"),
        Context(caller="bob", user="ada", agent="ada", session="ada", request_id="r"),
    ]
    for context, secret in zip(contexts, (None, SECRET, SECRET), strict=True):
        guard = new(clock)
        told.instrument(guard, id_secret=secret)
        async with guard.open(context), guard.call(**BOUND):
            pass
        await guard.aclose()
        found.append({name: text for name, text in attributes(told.calls[-1]).items() if name.endswith(".hash")})

    nothing, ada, bob = found
    assert nothing == {}
    assert set(ada) == {"llm_guard.caller.hash", "llm_guard.agent.hash", "llm_guard.session.hash", "user.hash"}
    assert len(set(ada.values())) == 4
    assert ada["user.hash"] == bob["user.hash"]
    assert ada["llm_guard.session.hash"] != bob["llm_guard.session.hash"]
    assert all(len(text) == 24 for text in ada.values())


def test_secrets_of_hashes(told: Telemetry) -> None:
    """T15: a secret that could be guessed is refused, without being shown, and the guard can still be instrumented."""
    guard = Guard()
    with pytest.raises(ConfigurationError, match="id_secret: expected a text of 16 to 64 bytes") as caught:
        told.instrument(guard, id_secret="too short")
    assert "too short" not in str(caught.value)
    told.instrument(guard)


async def test_open_calls_are_bounded(clock: FrozenClock, told: Telemetry) -> None:
    """T11: what is kept of open calls is bounded, and the span of one that was forgotten is under the current one."""
    guard = new(clock)
    told.instrument(guard)
    async with guard.open(ADA):
        with told.tracer.start_as_current_span("begin"):
            opened = guard.call(**BOUND)
            call = await opened.__aenter__()
        for number in range(10_000):
            emit(guard.engine.observers, Admission(ADA, None, Granted((), 0), call_id=f"call-{number}"))
        with told.tracer.start_as_current_span("end") as end:
            call.record(ANSWER)
            await opened.__aexit__(None, None, None)
    await guard.aclose()

    (span,) = told.calls
    assert span.parent is not None
    assert span.parent.span_id == end.get_span_context().span_id
