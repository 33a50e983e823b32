"""The dialect `anthropic`: requests, answers, streams and errors, from bytes, SDK objects and dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest
from anthropic.lib.streaming import TextEvent
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.beta import BetaMessage, BetaRawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tests.wire.harness import anything, check_objects, fixture, sse_items

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, item_meter, meter_object
from asgi_llm_guard.wire.anthropic import Anthropic
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head
from asgi_llm_guard.wire.peek import BodyError, read_body

MESSAGES = Anthropic()
STREAM = Head(200, [(b"Content-Type", b"text/event-stream; charset=utf-8")])
MODEL = "claude-brook-5"
TEXT_BYTES = len("Der Zug fährt um 7:40\u2028ab\n🚆.".encode())
INPUT = Usage(
    input_tokens=1540,
    cache_read_tokens=1200,
    cache_write_tokens=300,
    cache_write_1h_tokens=200,
    service_tier="priority",
    model=MODEL,
)


def used(output_tokens: int | None = 57, **members: Any) -> Usage:
    return msgspec.structs.replace(INPUT, output_tokens=output_tokens, **members)


def success(usage: Usage | None, text_bytes: int = TEXT_BYTES, *, finished: bool = True) -> Answer:
    return Answer(kind="success", usage=usage, model=MODEL, text_bytes=text_bytes, finished=finished)


ANSWERS: dict[str, Answer] = {
    "response.json": success(
        used(88, reasoning_tokens=31, web_searches=2),
        len("Erst nachsehen…".encode()) + 6 + len("Um 7:40 🚆.".encode()) + len('timetable{"to":"Ulm"}'),
    ),
    "response_fast_overflow.json": success(
        Usage(input_tokens=199_990, output_tokens=10, service_tier="fast", model=MODEL), len("Der Zug")
    ),
    "usage.sse": success(used(reasoning_tokens=0)),
    "crlf.sse": success(used()),
    "vertex.sse": success(used()),
    "thinking_tools.sse": success(used(reasoning_tokens=12), len('Erst nachsehen.timetable{"to": "Ulm"}')),
    "server_tool.sse": success(
        used(130, input_tokens=7740, cache_read_tokens=2400, web_searches=1), len('web_search{"query":"Ulm"}Um 7:40.')
    ),
    "compaction_advisor.sse": success(
        Usage(
            input_tokens=94_700,
            output_tokens=1560,
            cache_read_tokens=4000,
            cache_write_tokens=0,
            cache_write_1h_tokens=0,
            service_tier="priority",
            model=MODEL,
            extra=(
                Usage(
                    input_tokens=850,
                    output_tokens=200,
                    cache_read_tokens=0,
                    cache_write_tokens=50,
                    cache_write_1h_tokens=50,
                    service_tier="priority",
                    model="claude-river-5",
                ),
            ),
        ),
        TEXT_BYTES + len("Bisher: Ulm."),
    ),
    "fallback.sse": success(
        Usage(
            input_tokens=500,
            output_tokens=10,
            cache_read_tokens=0,
            cache_write_tokens=0,
            service_tier="priority",
            model=MODEL,
            extra=(
                Usage(
                    input_tokens=1000,
                    output_tokens=60,
                    cache_read_tokens=0,
                    cache_write_tokens=0,
                    service_tier="priority",
                    model="claude-creek-4",
                ),
            ),
        )
    ),
    "error.sse": Answer(
        kind="error", error="overload", usage=used(None), model=MODEL, text_bytes=len("Der Zug fährt ".encode())
    ),
    "truncated.sse": Answer(kind="success", usage=used(None), model=MODEL, text_bytes=TEXT_BYTES, unread=1),
    "error_429.json": Answer(kind="error", error="rate_limit"),
    "error_429_quota.json": Answer(kind="error", error="quota"),
    "error_402.json": Answer(kind="error", error="quota"),
    "error_529.json": Answer(kind="error", error="overload"),
    "error_400_overflow.json": Answer(kind="error", error="context_overflow"),
    "error_413.json": Answer(kind="error", error="invalid"),
}
STREAMS = [name for name in ANSWERS if name.endswith(".sse")]


def body(name: str) -> Any:
    return json.loads(fixture("anthropic", name).data)


def ask(members: Mapping[str, object], path: str = "/v1/messages") -> Ask:
    return MESSAGES.read_request(read_body(msgspec.json.encode({"model": "m", "max_tokens": 9, **members})), path)


def stream(*events: object) -> Answer:
    meter = MESSAGES.meter(STREAM)
    for event in events:
        kind = event.get("type", "x") if isinstance(event, dict) else "x"
        meter.feed(b"event: " + str(kind).encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n")
    meter.finish()
    return meter.answer()


def delta(**usage: object) -> dict[str, object]:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


def message(**usage: object) -> Answer:
    value = {"type": "message", "role": "assistant", "model": MODEL, "content": [], "usage": usage}
    return MESSAGES.read_response(200, msgspec.json.encode(value))


@pytest.mark.parametrize("name", ANSWERS)
def test_fixtures(name: str) -> None:
    """C10: each kind of answer gives usage by bucket, what other models did, text so far, and how it ended."""
    case = fixture("anthropic", name)
    meter = case.meter()
    meter.feed(case.data)
    meter.finish()
    assert meter.answer() == ANSWERS[name]


# --------------------------------------------------------------------------------- requests


def test_request_is_read() -> None:
    """Model, limit, streaming and tier are as the client wrote them."""
    view = read_body(fixture("anthropic", "request.json").data)
    assert MESSAGES.read_request(view) == Ask(
        model=MODEL, max_output_tokens=900, stream=True, wants_usage=True, service_tier="auto"
    )
    assert ask({"max_tokens": 0}) == Ask(model="m", max_output_tokens=0)
    assert ask({"speed": "fast", "service_tier": "auto"}).service_tier == "fast"
    assert ask({"speed": "standard", "service_tier": "standard_only"}).service_tier == "standard_only"


def test_limit_is_required() -> None:
    """Conformance 52: a request without a limit, which the provider refuses, or with one that is none, is refused."""
    for limit in (None, "9", -1, 1.5, True, 2**31, [9]):
        with pytest.raises(BodyError, match="max_tokens: ") as raised:
            ask({"max_tokens": limit})
        assert raised.value.status == 400
    with pytest.raises(BodyError, match="model: required"):
        ask({"model": None})


@pytest.mark.parametrize(
    "members",
    [
        {"speed": ["fast"]},
        {"stream": 1},
        {"service_tier": {}},
        {"thinking": "on"},
        {"thinking": {"budget_tokens": "1"}},
        {"fallbacks": [{}]},
        {"fallbacks": ["m"]},
        {"fallbacks": [{"model": "x", "max_tokens": -1}]},
        {"fallbacks": [{"model": "x", "Max_Tokens": 1}]},
        {"fallbacks": [{"model": "x"}] * 65},
    ],
)
def test_malformed_values_are_refused(members: dict[str, object]) -> None:
    """What the guard decides on and cannot read is refused, never guessed."""
    with pytest.raises(BodyError):
        ask(members)


def test_key_twice_in_a_fallback() -> None:
    """B8: a model named twice in an entry of `fallbacks` is refused like one in the body itself."""
    raw = b'{"model":"m","max_tokens":9,"fallbacks":[{"model":"a","model":"b"}]}'
    with pytest.raises(BodyError, match=r"fallbacks: .*twice"):
        MESSAGES.read_request(read_body(raw))


def test_other_models_are_told() -> None:
    """Models that may answer instead, and advisors, are named once each; the largest limit of all counts."""
    fallbacks = [{"model": "a"}, {"model": "b", "max_tokens": 50, "speed": "fast"}, {"model": "a", "max_tokens": None}]
    tools = [{"type": "advisor_20260301", "name": "advisor", "model": "c"}, {"name": "advisor", "model": "d"}]
    asked = ask({"fallbacks": fallbacks, "tools": tools})
    assert (asked.alternatives, asked.max_output_tokens, asked.service_tier) == (("a", "b", "c"), 50, "fast")
    assert ask({"fallbacks": "default", "tools": None}).alternatives == ()


VERTEX = "/v1/projects/p/locations/eu/publishers/anthropic/models/claude-brook-5%4020260301"


def test_paths() -> None:
    """Paths that are billed are known wherever they are; counting and batches are not, nor other publishers' models."""
    for path in (
        "/v1/messages",
        "//v1/messages/",
        "/anthropic/v1/messages",
        f"{VERTEX}:rawPredict",
        f"{VERTEX}:streamRawPredict",
    ):
        assert dialect_for(path) is not None
        assert MESSAGES.recognises(path)
    for path in (
        "/v1/messages/count_tokens",
        "/v1/messages/batches",
        "/v1/threads/t/messages",
        "/messages",
        f"{VERTEX}:predict",
        "/v1/projects/p/locations/eu/publishers/anthropic/models/count-tokens:rawPredict",
        "/v1/projects/p/locations/eu/publishers/mistralai/models/m:rawPredict",
    ):
        assert not MESSAGES.recognises(path)


def test_vertex_names_the_model_in_its_path() -> None:
    """On Vertex the path says what is billed and whether it streams, whatever the body says."""
    asked = ask({"model": "cheap"}, f"{VERTEX}:streamRawPredict")
    assert (asked.model, asked.stream) == ("claude-brook-5@20260301", True)
    assert not ask({}, f"{VERTEX}:rawPredict").stream


def rewrite(members: Mapping[str, object], most: int | None) -> object:
    view = read_body(msgspec.json.encode(members))
    return json.loads(MESSAGES.rewrite(view, include_usage=True, max_output_tokens=most))


def test_limits_are_lowered() -> None:
    """Every limit is lowered to the given one, never raised; without any it is set; thinking keeps inside it."""
    assert rewrite({"model": "m"}, 50) == {"model": "m", "max_tokens": 50}
    assert rewrite({"max_tokens": 60}, 50) == {"max_tokens": 50}
    assert rewrite({"max_tokens": 40}, 50) == {"max_tokens": 40}
    assert rewrite({"max_tokens": 0}, 50) == {"max_tokens": 0}
    thinking = {"type": "enabled", "budget_tokens": 3000}
    assert rewrite({"max_tokens": 4000, "thinking": thinking}, 2000) == {
        "max_tokens": 2000,
        "thinking": {"type": "enabled", "budget_tokens": 1999},
    }
    for most, limit in ((3500, 4000), (900, 4000), (1500, 2500)):  # inside, too small for any, between tools
        assert rewrite({"max_tokens": limit, "thinking": thinking}, most) == {"max_tokens": most, "thinking": thinking}
    fallbacks = [{"model": "a"}, {"model": "b", "max_tokens": 70}, {"model": "c", "thinking": thinking}]
    assert rewrite({"max_tokens": 4000, "fallbacks": fallbacks}, 60) == {
        "max_tokens": 60,
        "fallbacks": [{"model": "a"}, {"model": "b", "max_tokens": 60}, {"model": "c", "thinking": thinking}],
    }
    assert rewrite({"max_tokens": 4000, "fallbacks": fallbacks[2:]}, 2000) == {
        "max_tokens": 2000,
        "fallbacks": [{"model": "c", "thinking": {"type": "enabled", "budget_tokens": 1999}}],
    }


def test_nothing_to_change_is_the_same_body() -> None:
    """Usage comes without being asked for: the body is sent as it is."""
    view = read_body(b'{"model":"m" , "max_tokens":5,"stream":true}')
    assert MESSAGES.rewrite(view, include_usage=True, max_output_tokens=None) is view.body
    assert MESSAGES.rewrite(view, include_usage=True, max_output_tokens=5) is view.body


# ------------------------------------------------------------------------------------ usage


def test_each_field_replaces_the_one_before() -> None:
    """Cumulative counts are never summed; a field that is missing, null or not believable leaves the one before."""
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}
    answer = stream(
        start,
        delta(output_tokens=3, input_tokens=50),
        delta(output_tokens=7, input_tokens=None, cache_read_input_tokens=-1),
        delta(output_tokens=2**31),
    )
    assert answer.usage == Usage(input_tokens=50, output_tokens=7)


def test_output_of_a_cut_stream_is_not_known() -> None:
    """What a stream says of its output as it begins is a placeholder: the output of one that is cut is unknown."""
    start = {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 5, "output_tokens": 1}}}
    assert stream(start) == Answer(kind="success", usage=Usage(input_tokens=5, model="m"), model="m")


def test_writes_to_the_cache_by_lifetime() -> None:
    """What was written with the longer lifetime is told; what no breakdown covers counts as the dearer if any is."""
    created = {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20}

    def writes(**usage: object) -> tuple[int | None, ...]:
        report = message(output_tokens=1, **usage).usage
        assert report is not None
        return report.input_tokens, report.cache_write_tokens, report.cache_write_1h_tokens

    assert writes(input_tokens=1, cache_creation_input_tokens=30, cache_creation=created) == (31, 30, 20)
    assert writes(input_tokens=1, cache_creation=created) == (31, 30, 20)
    assert writes(input_tokens=1, cache_creation_input_tokens=40, cache_creation=created) == (41, 40, 30)
    assert writes(input_tokens=1, cache_creation_input_tokens=5, cache_creation=created) == (6, 5, 0)
    assert writes(input_tokens=1, cache_creation_input_tokens=40) == (41, 40, None)
    assert writes(cache_creation_input_tokens=40) == (None, None, None)
    assert writes(input_tokens=2**31 - 1, cache_creation_input_tokens=40) == (None, None, None)


def test_parts_larger_than_the_whole() -> None:
    """More thinking than output is taken for unknown."""
    answer = message(input_tokens=1, output_tokens=2, output_tokens_details={"thinking_tokens": 3})
    assert answer.usage == Usage(input_tokens=1, output_tokens=2, model=MODEL)


def iteration(kind: str, read: object, written: object, model: str | None = None) -> dict[str, object]:
    return {"type": kind, "input_tokens": read, "output_tokens": written, "model": model}


@pytest.mark.parametrize(
    ("top", "main"),
    [
        ((100, 10), (100, 10)),  # the message's own turns: others are beside it
        ((100 + 30 + 50, 10 + 3 + 5), (100, 10)),
        ((100 + 50, 10 + 5), (100, 10)),
        ((100 + 30, 10 + 3), (100, 10)),
        ((50, 5), (0, 0)),  # what answered instead, alone
        ((77, 7), (77, 7)),  # nothing adds up: rather too much
    ],
)
def test_counts_of_other_models_are_taken_out_where_they_are_in(top: tuple[int, int], main: tuple[int, int]) -> None:
    """Whether a message's counts have those of advisors and stand-ins in them is told by what adds up."""
    iterations = [
        iteration("message", 60, 4),
        iteration("message", 40, 6, MODEL),
        iteration("advisor_message", 20, 1, "a"),
        iteration("advisor_message", 10, 2, "a"),
        iteration("fallback_message", 50, 5, "b"),
        iteration("advisor_message", None, 2, "a"),  # says too little
    ]
    usage = message(input_tokens=top[0], output_tokens=top[1], iterations=iterations).usage
    assert usage == Usage(
        input_tokens=main[0],
        output_tokens=main[1],
        model=MODEL,
        extra=(
            Usage(input_tokens=30, output_tokens=3, model="a"),
            Usage(input_tokens=50, output_tokens=5, model="b"),
        ),
    )


def test_compaction_is_added() -> None:
    """C11: what it took to compact the context is billed, and not in the message's counts; unknown stays unknown."""
    both = [iteration("compaction", 1000, 90), iteration("message", 5, 6)]
    assert message(input_tokens=5, output_tokens=6, iterations=both).usage == Usage(
        input_tokens=1005, output_tokens=96, model=MODEL
    )
    assert message(input_tokens=5, iterations=both).usage == Usage(input_tokens=1005, model=MODEL)
    assert message(output_tokens=5, iterations="x").usage == Usage(output_tokens=5, model=MODEL)


def test_no_usage() -> None:
    """A message without counts has no usage, whatever else it reports."""
    assert message(service_tier="standard").usage is None
    assert message(input_tokens="5", output_tokens=1.5).usage is None


# ---------------------------------------------------------------------------------- streams


def test_sloppy_and_unknown_events() -> None:
    """Spaces, escapes, other orders of members and events nobody knows are read like any; junk is counted."""
    meter = MESSAGES.meter(STREAM)
    for data in (
        b'{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a\\u00fc"}}',
        b'{"delta":{"text":"bc","type":"text_delta"},"type":"content_block_delta"}',
        b'{"type":"content_block_delta","delta":{"text":7}}',
        b'{"type":"content_block_delta","delta":null}',
        b'{"type":"content_block_delta","delta":{"text":"\\ud83d"}}',
        b'{"type":"a_new_one","delta":{"text":"zz"}}',
        b'{"type":"content_block_delta","delta',
        b"[DONE]",
    ):
        meter.feed(b"data: " + data + b"\n\n")
    assert meter.answer() == Answer(kind="success", text_bytes=3 + 2 + 3, unread=1)


def test_errors_in_the_middle_of_a_stream() -> None:
    """An error event makes the answer an error, and leaves it unfinished, whatever follows."""
    text = {"type": "content_block_delta", "delta": {"text": "abc"}}
    for kind, expected in (
        ("overloaded_error", "overload"),
        ("api_error", "other"),
        ("rate_limit_error", "rate_limit"),
    ):
        answer = stream(text, {"type": "error", "error": {"type": kind, "message": "x"}}, {"type": "message_stop"})
        assert answer == Answer(kind="error", error=expected, text_bytes=3)  # type: ignore[arg-type]
    meter = MESSAGES.meter(STREAM)
    meter.feed(b"event: error\ndata: it broke\n\n")
    assert meter.answer() == Answer(kind="error", error="other")


# ----------------------------------------------------------------------------------- errors


def error(kind: str, message: str = "x", code: str | None = None) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message, "details": {"error_code": code}}}


ERRORS: list[tuple[int, object, ErrorKind]] = [
    (429, error("rate_limit_error"), "rate_limit"),
    (429, error("rate_limit_error", code="ramp_limit_exceeded"), "rate_limit"),
    (429, error("rate_limit_error", code="contract_spend_limit_reached"), "quota"),
    (429, {}, "rate_limit"),
    (402, error("billing_error"), "quota"),
    (402, error("rate_limit_error"), "quota"),
    (402, error("billing_error", code="linked_organization_spend_limit_reached"), "quota"),
    (402, {}, "quota"),
    (400, error("invalid_request_error", "You have reached your specified API usage limits."), "quota"),
    (400, error("invalid_request_error", "Your credit balance is too low to access the API"), "quota"),
    (529, error("overloaded_error"), "overload"),
    (529, {}, "overload"),
    (503, {}, "overload"),
    (
        400,
        error("invalid_request_error", "input length and `max_tokens` exceed context limit: 9 + 8 > 7"),
        "context_overflow",
    ),
    (400, {"error": {"message": "This model's maximum context length is 9", "code": 400}}, "context_overflow"),
    (413, error("request_too_large", "prompt is too long"), "invalid"),
    (429, error("rate_limit_error", "prompt is too long for your tier"), "rate_limit"),
    (400, error("invalid_request_error", "max_tokens: too large"), "invalid"),
    (404, error("not_found_error"), "invalid"),
    (401, error("authentication_error"), "auth"),
    (403, error("permission_error"), "auth"),
    (403, {}, "auth"),
    (422, {}, "invalid"),
    (500, error("api_error"), "other"),
    (504, error("timeout_error"), "other"),
    (302, {}, "other"),
    (500, [], "other"),
]


@pytest.mark.parametrize(("status", "value", "kind"), ERRORS)
def test_errors_are_told_apart(status: int, value: object, kind: ErrorKind) -> None:
    """Code first, then type, then status; an overflow only where a status can mean it; too many bytes are not one."""
    assert MESSAGES.read_response(status, msgspec.json.encode(value)) == Answer(kind="error", error=kind)


def test_error_with_status_200() -> None:
    """An error object is one whatever the status says."""
    assert MESSAGES.read_response(200, msgspec.json.encode(error("overloaded_error"))) == Answer(
        kind="error", error="overload"
    )


# ---------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("name", ["response.json", "response_fast_overflow.json"])
def test_sdk_messages(name: str) -> None:
    """The SDK's own messages, of both kinds, give the same answer as the bytes, and so does a dict."""
    raw = body(name)
    for obj in (raw, Message.model_validate(raw), BetaMessage.model_validate(raw)):
        assert meter_object(obj) == ANSWERS[name]


@pytest.mark.parametrize("name", STREAMS)
def test_sdk_events(name: str) -> None:
    """The SDK's events, and dicts, add up to what the stream's bytes do; its derived events count nothing."""
    raws = [item for item in sse_items(fixture("anthropic", name).data) if isinstance(item, dict)]
    expected = msgspec.structs.replace(ANSWERS[name], unread=0)
    plain, dicts, beta = item_meter(), item_meter(), item_meter()
    of_plain: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    of_beta: TypeAdapter[Any] = TypeAdapter(BetaRawMessageStreamEvent)
    for raw in raws:
        dicts.add(raw)
        if raw["type"] in ("ping", "error"):
            plain.add(raw)
            beta.add(raw)
            continue
        beta.add(of_beta.validate_python(raw))
        if name != "compaction_advisor.sse":
            plain.add(of_plain.validate_python(raw))
            plain.add(TextEvent(type="text", text="Zug", snapshot="Der Zug"))
    assert dicts.answer() == beta.answer() == expected
    if name not in ("compaction_advisor.sse", "fallback.sse"):  # which the plain types do not know
        assert plain.answer() == expected


def test_raw_stream_items() -> None:
    """A function may stream the server's events as bytes or text; they are read like the stream they are."""
    data = fixture("anthropic", "usage.sse").data
    as_bytes, as_text = item_meter(), MESSAGES.item_meter()
    for at in range(0, len(data), 50):
        as_bytes.add(data[at : at + 50])
    for event in data.decode().split("\n\n"):
        as_text.add(event + "\n\n")
    assert as_bytes.answer() == as_text.answer() == ANSWERS["usage.sse"]


def test_http_responses_and_sdk_errors() -> None:
    """HTTP responses are read by their shape, and the SDK's errors like the responses they come from."""
    data = fixture("anthropic", "response.json").data
    assert meter_object(httpx2.Response(200, content=data)) == ANSWERS["response.json"]
    value = error("rate_limit_error", code="enforced_spend_limit_reached")
    response = httpx2.Response(429, json=value, request=httpx2.Request("POST", "https://llm.example/v1"))
    assert MESSAGES.read_object(response) == Answer(kind="error", error="quota")
    assert MESSAGES.read_object(anthropic.RateLimitError("x", response=response, body=value)) == Answer(
        kind="error", error="quota"
    )
    assert MESSAGES.read_object(value) == Answer(kind="error", error="quota")
    assert MESSAGES.read_object(httpx2.Response(200, content=b"<html>")) is None


@pytest.mark.parametrize(
    "obj",
    [
        None,
        7,
        "message",
        [],
        object(),
        {"type": "message"},
        {"type": "message", "role": "user", "content": [], "usage": {}},
        {"type": "message", "role": "assistant", "content": "Hello", "usage": {}},
        {"type": "message", "role": "assistant", "content": []},
        {"type": "error"},
        {"type": "error", "error": "x"},
        {"type": "error", "code": "x", "message": "x", "error": {"type": "x", "message": "x"}},
        {"error": {"type": "x", "message": "x"}},
        {"type": "message_delta"},
        {"type": ["message_stop"]},
        SimpleNamespace(status_code=200, content="text"),
    ],
)
def test_objects_of_other_shapes(obj: object) -> None:
    """What is no message, event or error of this API says nothing."""
    assert MESSAGES.read_object(obj) is None
    meter = MESSAGES.item_meter()
    meter.add(obj)
    assert meter.answer() is None


@given(
    st.lists(
        anything(
            *("type", "usage", "message", "delta", "content_block", "content", "text", "error", "iterations", "role"),
            *("input_tokens", "output_tokens", "cache_creation", "cache_read_input_tokens", "model", "input", "data"),
        ),
        max_size=4,
    )
)
def test_any_object(values: list[Any]) -> None:
    """Values of any shape, with the members this dialect reads, raise nothing and give believable counts."""
    kinds = ("message", "message_start", "message_delta", "content_block_start", "content_block_delta", "error")
    check_objects(MESSAGES, values)
    check_objects(MESSAGES, [{**value, "type": kind} for value in values if isinstance(value, dict) for kind in kinds])
