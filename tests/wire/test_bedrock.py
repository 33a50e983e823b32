"""The dialect `bedrock`: Converse requests, answers, streams and errors, from bytes and as boto3 gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import boto3
import httpx2
import msgspec
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError
from botocore.parsers import RestJSONParser
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import anything, check_objects, fixture, frame

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head
from asgi_llm_guard.wire.bedrock import BedrockConverse
from asgi_llm_guard.wire.peek import BodyError, read_body

CONVERSE = BedrockConverse()
MODEL = "eu.anthropic.claude-brook-5-v1:0"
PATH = "/model/eu.anthropic.claude-brook-5-v1%3A0/converse"
STREAM = Head(200, [(b"Content-Type", b"application/vnd.amazon.eventstream")])
EVENT = {":content-type": "application/json", ":message-type": "event"}
USAGE = Usage(
    input_tokens=1544,
    output_tokens=61,
    cache_read_tokens=1200,
    cache_write_tokens=300,
    cache_write_1h_tokens=200,
)


def success(usage: Usage | None, text: str, *, model: str | None = None, hidden: int = 0) -> Answer:
    size = len(text.encode()) + hidden
    return Answer(kind="success", usage=usage, model=model, text_bytes=size, finished=True)


def with_tier(tier: str) -> Usage:
    return msgspec.structs.replace(USAGE, service_tier=tier)


ROUTED = "arn:aws:bedrock:eu-central-1::foundation-model/anthropic.claude-creek-4"
ANSWERS: dict[str, Answer] = {
    "response.json": success(
        with_tier("priority"), 'Erst nachsehen…Um 7:40 🚆.Fahrplantimetable{"to":"Ulm"}', hidden=6
    ),
    "response_routed.json": success(
        Usage(input_tokens=199_000, output_tokens=3, service_tier="optimized", model=ROUTED), "Der Zug", model=ROUTED
    ),
    "usage.bin": success(with_tier("flex"), "Der Zug fährt um 7:40\u2028ab 🚆."),
    "tools.bin": success(with_tier("flex"), 'Erst nachtimetable{"to":"Ulm"}', hidden=6),
    "error.bin": Answer(kind="error", error="rate_limit", text_bytes=len("Der Zug fährt ".encode())),
    "truncated.bin": Answer(kind="success", text_bytes=len("Der Zug fährt ".encode())),
    "error_429.json": Answer(kind="error", error="rate_limit"),
    "error_400_overflow.json": Answer(kind="error", error="context_overflow"),
    "error_503.json": Answer(kind="error", error="overload"),
}
STREAMS = ("usage.bin", "tools.bin")


def ask(members: Mapping[str, object], path: str = PATH) -> Ask:
    return CONVERSE.read_request(read_body(msgspec.json.encode(members)), path)


def parsed(shape: str, status: int, headers: Mapping[str, str], data: bytes) -> Any:
    """What boto3 makes of a response with this body."""
    client = boto3.client("bedrock-runtime", "eu-central-1", aws_access_key_id="x", aws_secret_access_key="x")
    model = client.meta.service_model.operation_model(shape)
    if model.has_event_stream_output:
        raw = AWSResponse("https://bedrock.example", status, headers, _Raw(data))
        return RestJSONParser().parse(
            {"status_code": status, "headers": headers, "body": raw.raw, "context": {"operation_name": shape}},
            model.output_shape,
        )
    return RestJSONParser().parse({"status_code": status, "headers": headers, "body": data}, model.output_shape)


class _Raw:
    """As urllib3 streams a body."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self) -> Iterator[bytes]:
        yield from (self._data[at : at + 33] for at in range(0, len(self._data), 33))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ANSWERS)
def test_fixtures(name: str) -> None:
    """C10: each kind of answer gives usage by bucket, text so far, and how it ended."""
    case = fixture("bedrock", name)
    meter = case.meter()
    meter.feed(case.data)
    meter.finish()
    assert meter.answer() == ANSWERS[name]


# --------------------------------------------------------------------------------- requests


def test_request_is_read() -> None:
    """Model and streaming are in the path; limit and tier as the client wrote them."""
    case = fixture("bedrock", "request.json")
    assert CONVERSE.read_request(read_body(case.data), case.head.path) == Ask(
        model=MODEL, max_output_tokens=700, stream=True, wants_usage=True, service_tier="priority"
    )
    assert ask({}) == Ask(model=MODEL, wants_usage=True)
    fast = {"performanceConfig": {"latency": "optimized"}, "serviceTier": {"type": "default"}}
    assert ask(fast).service_tier == "optimized"
    assert ask({"performanceConfig": {"latency": "standard"}}).service_tier is None


@pytest.mark.parametrize(
    ("members", "limit"),
    [
        ({"inferenceConfig": {"maxTokens": 100}, "additionalModelRequestFields": {"max_tokens": 900}}, 900),
        ({"inferenceConfig": {"maxTokens": 900}, "additionalModelRequestFields": {"max_tokens": 100}}, 900),
        ({"additionalModelRequestFields": {"inferenceConfig": {"max_new_tokens": 70}}}, 70),
        ({"additionalModelRequestFields": {"max_gen_len": 70, "maxTokenCount": 80}}, 80),
        ({"inferenceConfig": {"maxTokens": 0}}, None),
        ({"inferenceConfig": None, "additionalModelRequestFields": None}, None),
    ],
)
def test_larger_limit_counts(members: dict[str, object], limit: int | None) -> None:
    """Conformance 52: a limit that hides among the fields for the model counts, if it is the larger one."""
    assert ask(members).max_output_tokens == limit


@pytest.mark.parametrize(
    "members",
    [
        {"inferenceConfig": []},
        {"inferenceConfig": {"maxTokens": "9"}},
        {"inferenceConfig": {"maxTokens": -1}},
        {"additionalModelRequestFields": {"max_tokens": 1.5}},
        {"additionalModelRequestFields": "x"},
        {"serviceTier": "priority"},
        {"performanceConfig": {"latency": {}}},
    ],
)
def test_malformed_values_are_refused(members: dict[str, object]) -> None:
    """What the guard decides on and cannot read is refused, never guessed."""
    with pytest.raises(BodyError):
        ask(members)


def test_hidden_limit_twice() -> None:
    """B8: a limit that stands twice among the fields for the model is refused."""
    raw = b'{"additionalModelRequestFields":{"max_tokens":1,"max_tokens":9000}}'
    with pytest.raises(BodyError, match="twice"):
        CONVERSE.read_request(read_body(raw), PATH)


ARN = "arn:aws:bedrock:eu-central-1:123456789012:inference-profile/eu.anthropic.claude-brook-5-v1:0"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (PATH, MODEL),
        ("/model/eu.anthropic.claude-brook-5-v1:0/converse-stream", MODEL),
        ("//gateway/model//eu.anthropic.claude-brook-5-v1%3A0/converse/", MODEL),
        (f"/model/{ARN}/converse", ARN),
        (f"/model/{ARN.replace(':', '%3A').replace('/', '%2F')}/converse", ARN),
    ],
)
def test_model_is_in_the_path(path: str, model: str) -> None:
    """Escaped or not, with or without slashes in its name, the model is the one in the path."""
    found = dialect_for(path)
    assert found is not None
    assert found.name == "bedrock"
    assert ask({"modelId": "cheap"}, path).model == model


def test_model_elsewhere() -> None:
    """On a path that names none, `modelId` in the body does; with neither the request is refused."""
    assert ask({"modelId": MODEL}, "/chat").model == MODEL
    for path in ("/chat", "/model/%00/converse", f"/model/{'x' * 300}/converse"):
        with pytest.raises(BodyError, match="model: expected"):
            ask({}, path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/converse",
        "/model/converse",
        "/model/m/count-tokens",
        "/model/m/invoke",
        "/model/m/converse/x",
        "/m/x/converse",
    ],
)
def test_other_paths(path: str) -> None:
    """Paths of other operations are not claimed, those that are free among them."""
    assert not CONVERSE.recognises(path)


def rewrite(members: Mapping[str, object], most: int | None) -> object:
    view = read_body(msgspec.json.encode(members))
    return json.loads(CONVERSE.rewrite(view, include_usage=True, max_output_tokens=most))


def test_limits_are_lowered() -> None:
    """Every limit is lowered to the given one, never raised; without any it is set; thinking keeps inside it."""
    assert rewrite({}, 50) == {"inferenceConfig": {"maxTokens": 50}}
    assert rewrite({"inferenceConfig": {"topP": 1}}, 50) == {"inferenceConfig": {"topP": 1, "maxTokens": 50}}
    assert rewrite({"inferenceConfig": {"maxTokens": 60}}, 50) == {"inferenceConfig": {"maxTokens": 50}}
    assert rewrite({"inferenceConfig": {"maxTokens": 40}}, 50) == {"inferenceConfig": {"maxTokens": 40}}
    both = {"inferenceConfig": {"maxTokens": 40}, "additionalModelRequestFields": {"max_tokens": 60, "k": 1}}
    assert rewrite(both, 50) == {**both, "additionalModelRequestFields": {"max_tokens": 50, "k": 1}}
    thinking = {"type": "enabled", "budget_tokens": 3000}
    assert rewrite(
        {"inferenceConfig": {"maxTokens": 4000}, "additionalModelRequestFields": {"thinking": thinking}}, 2000
    ) == {
        "inferenceConfig": {"maxTokens": 2000},
        "additionalModelRequestFields": {"thinking": {"type": "enabled", "budget_tokens": 1999}},
    }


def test_nothing_to_change_is_the_same_body() -> None:
    """Usage comes without being asked for: the body is sent as it is."""
    view = read_body(b'{"inferenceConfig" : {"maxTokens":5}}')
    assert CONVERSE.rewrite(view, include_usage=True, max_output_tokens=None) is view.body
    assert CONVERSE.rewrite(view, include_usage=True, max_output_tokens=5) is view.body


# ---------------------------------------------------------------------------------- answers


def whole(**usage: object) -> Usage | None:
    body = {"output": {"message": {"content": []}}, "stopReason": "end_turn", "usage": usage}
    return CONVERSE.read_response(200, msgspec.json.encode(body)).usage


def test_input_is_the_sum_of_three() -> None:
    """C10: what was read from the cache and written to it is added; the total that Bedrock gives is not trusted."""
    assert whole(
        inputTokens=1, outputTokens=2, totalTokens=999, cacheReadInputTokens=30, cacheWriteInputTokens=40
    ) == Usage(input_tokens=71, output_tokens=2, cache_read_tokens=30, cache_write_tokens=40)
    assert whole(
        inputTokens=1, outputTokens=2, cacheWriteInputTokens=4, cacheDetails=[{"ttl": "1h", "inputTokens": 5}]
    ) == Usage(input_tokens=5, output_tokens=2, cache_write_tokens=4)
    assert whole(inputTokens=-1, outputTokens=2, cacheReadInputTokens=30) == Usage(output_tokens=2)
    assert whole(inputTokens=2**31 - 1, outputTokens=2, cacheReadInputTokens=30) == Usage(output_tokens=2)
    assert whole(inputTokens="1") is None


def test_usage_comes_after_the_end() -> None:
    """C10: a stream is read to its true end: usage stands in the event after the one that says it has ended."""
    data = fixture("bedrock", "usage.bin").data
    metadata = data.rindex(b":event-type\x07\x00\x08metadata") - 12
    meter = CONVERSE.meter(STREAM)
    meter.feed(data[:metadata])
    assert meter.answer() == msgspec.structs.replace(ANSWERS["usage.bin"], usage=None)
    meter.feed(data[metadata:])
    assert meter.answer() == ANSWERS["usage.bin"]


def test_unreadable_frames_are_counted() -> None:
    """Frames that are not JSON, or damaged, are forwarded and counted; events nobody knows say nothing."""
    text = frame({":event-type": "contentBlockDelta", **EVENT}, b'{"delta":{"text":"abc"},"contentBlockIndex":0}')
    odd = frame({":event-type": "contentBlockDelta", **EVENT}, b'{"delta":{"text":7},"contentBlockIndex":0}')
    junk = frame({":event-type": "contentBlockDelta", **EVENT}, b'{"delta"')
    new = frame({":event-type": "aNewOne", **EVENT}, b'{"x":[1]}')
    data = text + odd + junk + new + text[:-1] + b"\x00" + text
    meter = CONVERSE.meter(STREAM)
    assert meter.feed(data) is data
    assert meter.answer() == Answer(kind="success", text_bytes=6, unread=2)


@pytest.mark.parametrize(
    ("kind", "payload", "error"),
    [
        ("throttlingException", {"message": "x"}, "rate_limit"),
        ("serviceUnavailableException", {"message": "x"}, "overload"),
        ("internalServerException", {"message": "x"}, "other"),
        ("validationException", {"message": "Input is too long for requested model."}, "context_overflow"),
        ("validationException", {"message": "x"}, "invalid"),
        ("modelStreamErrorException", {"message": "x", "originalStatusCode": 429}, "rate_limit"),
        ("modelStreamErrorException", {"message": "x", "originalStatusCode": 503}, "overload"),
        ("modelStreamErrorException", {"message": "x"}, "other"),
    ],
)
def test_errors_in_the_middle_of_a_stream(kind: str, payload: object, error: ErrorKind) -> None:
    """An exception frame makes the answer an error, and keeps the text before it."""
    text = frame({":event-type": "contentBlockDelta", **EVENT}, b'{"delta":{"text":"abc"}}')
    failure = frame({":exception-type": kind, ":message-type": "exception"}, msgspec.json.encode(payload))
    meter = CONVERSE.meter(STREAM)
    meter.feed(text + failure)
    assert meter.answer() == Answer(kind="error", error=error, text_bytes=3)


ERRORS: list[tuple[int, str, str, ErrorKind]] = [
    (429, "ThrottlingException", "Too many tokens, please wait before trying again.", "rate_limit"),
    (429, "ModelNotReadyException", "x", "rate_limit"),
    (400, "ServiceQuotaExceededException", "x", "quota"),
    (503, "ServiceUnavailableException", "x", "overload"),
    (500, "InternalServerException", "x", "other"),
    (408, "ModelTimeoutException", "x", "other"),
    (424, "ModelErrorException", "x", "other"),
    (424, "ModelErrorException", "prompt is too long: 9 tokens > 8 maximum", "context_overflow"),
    (400, "ValidationException", "prompt is too long: 9 tokens > 8 maximum", "context_overflow"),
    (400, "com.amazon.coral.validate#ValidationException:http://internal.amazon.example/", "x", "invalid"),
    (400, "ValidationException", "expected maxLength: 9, actual: 10", "context_overflow"),
    (403, "AccessDeniedException", "x", "auth"),
    (403, "ExpiredTokenException", "x", "auth"),
    (404, "ResourceNotFoundException", "x", "invalid"),
    (402, "", "x", "quota"),
    (403, "", "x", "auth"),
    (500, "", "x", "other"),
    (418, "NewException", "x", "invalid"),
]


@pytest.mark.parametrize(("status", "kind", "message", "error"), ERRORS)
def test_errors_are_told_apart(status: int, kind: str, message: str, error: ErrorKind) -> None:
    """The class is in a header; text counts for what classes do not say, and never as an overflow where it throttles."""
    body = msgspec.json.encode({"message": message})
    headers = [(b"X-Amzn-ErrorType", kind.encode())] if kind else []
    meter = CONVERSE.meter(Head(status, headers))
    meter.feed(body)
    expected = Answer(kind="error", error=error)
    assert meter.answer() == expected
    if kind:
        response = httpx2.Response(status, content=body, headers={"x-amzn-errortype": kind})
        assert meter_object(response) == expected
        details = {"Error": {"Code": kind.rpartition("#")[2].partition(":")[0], "Message": message}}
        answered = {**details, "ResponseMetadata": {"HTTPStatusCode": status}}
        assert meter_object(ClientError(answered, "Converse")) == expected


# ---------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("name", ["response.json", "response_routed.json"])
def test_boto3_responses(name: str) -> None:
    """What boto3 makes of a response gives the same answer as its bytes, and so does an HTTP response."""
    data = fixture("bedrock", name).data
    assert meter_object(parsed("Converse", 200, {}, data)) == ANSWERS[name]
    assert meter_object(httpx2.Response(200, content=data)) == ANSWERS[name]


@pytest.mark.parametrize("name", STREAMS)
def test_boto3_streams(name: str) -> None:
    """The items of boto3's stream add up to what its bytes do, and so do pieces of the bytes."""
    data = fixture("bedrock", name).data
    response = parsed("ConverseStream", 200, {"content-type": "application/vnd.amazon.eventstream"}, data)
    assert meter_object(response) is None
    of_items, of_bytes = item_meter(), CONVERSE.item_meter()
    for item in response["stream"]:
        of_items.add(item)
    for at in range(0, len(data), 33):
        of_bytes.add(data[at : at + 33])
    assert of_items.answer() == of_bytes.answer() == ANSWERS[name]


@pytest.mark.parametrize(
    "obj",
    [
        None,
        {"output": []},
        {"output": {"message": {"content": []}}},
        {"output": {"message": {"content": "x"}}, "stopReason": "x"},
        {"metadata": {"usage": {}}},
        {"metadata": {"usage": {"inputTokens": 1}}, "x": 1},
        {"messageStop": "x"},
        {"message": "x"},
        ClientError({"Error": {"Code": "ThrottlingException", "Message": "x"}}, "PutObject"),
        ClientError({}, "Converse"),
        httpx2.Response(500, content=b"{}"),
    ],
)
def test_objects_of_other_shapes(obj: object) -> None:
    """What is no answer or event of Converse says nothing, errors of other services included."""
    assert CONVERSE.read_object(obj) is None
    meter = CONVERSE.item_meter()
    for item in (obj, "text", b"bytes"):
        meter.add(item)
    assert meter.answer() is None


@given(
    st.lists(
        anything(
            *("output", "message", "content", "text", "toolUse", "input", "reasoningContent", "redactedContent"),
            *("metadata", "usage", "inputTokens", "outputTokens", "cacheReadInputTokens", "cacheDetails", "ttl"),
            *("contentBlockDelta", "delta", "start", "stopReason", "trace", "promptRouter", "serviceTier", "type"),
        ),
        max_size=4,
    )
)
def test_any_object(values: list[Any]) -> None:
    """Values of any shape, with the members this dialect reads, raise nothing and give believable counts."""
    check_objects(CONVERSE, values)
    check_objects(CONVERSE, [{"metadata": {"usage": value}} for value in values])
    check_objects(CONVERSE, [{"contentBlockDelta": {"delta": value}} for value in values])
