"""The dialect `bedrock_invoke`: the bodies of many vendors, and the frames and headers that Bedrock adds."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from botocore.exceptions import ClientError
from botocore.response import StreamingBody
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import anything, check_answer, check_objects, fixture, frame
from tests.wire.test_bedrock import parsed

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head
from asgi_llm_guard.wire.bedrock_invoke import BedrockInvoke
from asgi_llm_guard.wire.peek import BodyError, read_body

INVOKE = BedrockInvoke()
STREAM = Head(200, [(b"Content-Type", b"application/vnd.amazon.eventstream")])
EVENT = {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}
COUNTS = ("x-amzn-bedrock-input-token-count", "x-amzn-bedrock-output-token-count")
METRICS = Usage(input_tokens=1540, output_tokens=57, cache_read_tokens=1200, cache_write_tokens=300)


def success(usage: Usage | None, text: str, *, finished: bool = True) -> Answer:
    model = None if usage is None else usage.model
    return Answer(kind="success", usage=usage, model=model, text_bytes=len(text.encode()), finished=finished)


ANSWERS: dict[str, Answer] = {
    "response.json": success(Usage(input_tokens=21, output_tokens=9), "Um 7:40 🚆."),
    "response_titan.json": success(Usage(input_tokens=18, output_tokens=7), "Um 7:40Ulm"),
    "response_mistral.json": success(None, "Um 7:40"),
    "anthropic.bin": success(
        msgspec.structs.replace(METRICS, cache_write_1h_tokens=200, model="claude-brook-5"), "Der Zug fährt um 7:40."
    ),
    "nova.bin": success(METRICS, "Der Zug fährt "),
    "llama.bin": success(Usage(input_tokens=21, output_tokens=6), "Der Zug fährt."),
    "chat.bin": success(msgspec.structs.replace(METRICS, model="gpt-oss-brook"), "Der Zug"),
    "cohere.bin": success(METRICS, "Der Zug"),
    "error.bin": Answer(
        kind="error", error="other", usage=Usage(input_tokens=21, output_tokens=3), text_bytes=len("Der Zug ")
    ),
    "truncated.bin": success(Usage(input_tokens=21, output_tokens=3), "Der Zug ", finished=False),
    "error_429.json": Answer(kind="error", error="rate_limit"),
    "error_400_overflow.json": Answer(kind="error", error="context_overflow"),
}
STREAMS = ("anthropic.bin", "nova.bin", "llama.bin", "chat.bin", "cohere.bin")


def ask(members: Mapping[str, object], model: str = "meta.llama-brook-v1:0", operation: str = "invoke") -> Ask:
    return INVOKE.read_request(read_body(msgspec.json.encode(members)), f"/model/{model}/{operation}")


def chunk(value: object, **more: object) -> bytes:
    inner = base64.b64encode(msgspec.json.encode(value)).decode()
    return frame(EVENT, msgspec.json.encode({"bytes": inner, **more}))


def whole(value: object, headers: Mapping[str, str] | None = None, model: str = "m") -> Answer:
    pairs = [(name.encode(), text.encode()) for name, text in (headers or {}).items()]
    meter = INVOKE.meter(Head(200, pairs, f"/model/{model}/invoke"))
    meter.feed(value if isinstance(value, bytes) else msgspec.json.encode(value))
    meter.finish()
    return meter.answer()


@pytest.mark.parametrize("name", ANSWERS)
def test_fixtures(name: str) -> None:
    """C10: each vendor's answer gives usage by bucket, text so far, and how it ended."""
    case = fixture("bedrock_invoke", name)
    meter = case.meter()
    meter.feed(case.data)
    meter.finish()
    assert meter.answer() == ANSWERS[name]


# --------------------------------------------------------------------------------- requests


def test_paths() -> None:
    """Both ways to invoke are known by their path; counting, later and two-way invocations are not."""
    for path in ("/model/m/invoke", "/model/m/invoke-with-response-stream", "/model/arn%3Aaws%3Ax%2Fm/invoke"):
        assert dialect_for(path) is not None
        assert INVOKE.recognises(path)
    for path in (
        "/model/m/converse",
        "/model/m/count-tokens",
        "/async-invoke",
        "/model/m/invoke-with-bidirectional-stream",
    ):
        assert not INVOKE.recognises(path)


def test_request_is_read() -> None:
    """Model and streaming are in the path, the limit where the vendor has it."""
    case = fixture("bedrock_invoke", "request.json")
    assert INVOKE.read_request(read_body(case.data), case.head.path) == Ask(
        model="eu.anthropic.claude-brook-5-v1:0", max_output_tokens=400, wants_usage=True
    )
    assert ask({"max_gen_len": 9}, operation="invoke-with-response-stream").stream


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({"anthropic_version": "x", "max_tokens": 9}, 9),
        ({"prompt": "x", "max_tokens_to_sample": 9}, 9),
        ({"prompt": "x", "max_gen_len": 9}, 9),
        ({"inputText": "x", "textGenerationConfig": {"maxTokenCount": 9}}, 9),
        ({"messages": [], "inferenceConfig": {"maxTokens": 9}}, 9),
        ({"messages": [], "inferenceConfig": {"max_new_tokens": 9}}, 9),
        ({"prompt": "x", "maxTokens": 9}, 9),
        ({"messages": [], "max_completion_tokens": 9}, 9),
        ({"messages": [], "max_completion_tokens": 9, "max_tokens": 10}, 10),
        ({"prompt": "x"}, None),
        ({"prompt": "x", "max_gen_len": 0}, None),
    ],
)
def test_limits_of_vendors(body: dict[str, object], limit: int | None) -> None:
    """Conformance 52: whatever a vendor calls its limit, it is read; of several the largest counts."""
    assert ask(body).max_output_tokens == limit


def test_choices() -> None:
    """Several answers at once are counted, whatever a vendor calls their number."""
    assert ask({"prompt": "x", "num_generations": 4}).choices == 4
    assert ask({"prompt": "x", "numResults": 3}).choices == 3
    assert ask({"messages": [], "n": 2}).choices == 2


def test_models_that_write_nothing() -> None:
    """Vectors and rankings have no output, and images are counted; there is no place for a limit."""
    for model in ("amazon.titan-embed-text-v2:0", "cohere.rerank-v3-5:0", "twelvelabs.marengo-embed-3-0-v1:0"):
        assert ask({"inputText": "x"}, model) == Ask(
            model=model, max_output_tokens=0, limits_output=False, wants_usage=True
        )
    image = ask({"taskType": "TEXT_IMAGE", "imageGenerationConfig": {"numberOfImages": 3}}, "amazon.nova-canvas-v1:0")
    assert (image.images, image.max_output_tokens, image.limits_output) == (3, 0, False)
    assert ask({"taskType": "TEXT_IMAGE"}, "amazon.nova-canvas-v1:0").images == 1
    assert ask({"prompt": "x"}, "stability.sd3-5-large-v1:0").images == 1


def test_malformed_values_are_refused() -> None:
    """What the guard decides on and cannot read is refused, never guessed."""
    bodies: list[dict[str, object]] = [
        {"max_tokens": "9"},
        {"textGenerationConfig": []},
        {"inferenceConfig": {"maxTokens": True}},
        {"n": 0},
        {"imageGenerationConfig": {"numberOfImages": -1}},
    ]
    for body in bodies:
        with pytest.raises(BodyError):
            ask(body)


def rewrite(members: Mapping[str, object], most: int | None) -> object:
    view = read_body(msgspec.json.encode(members))
    return json.loads(INVOKE.rewrite(view, include_usage=True, max_output_tokens=most))


def test_limits_are_lowered_where_they_stand() -> None:
    """A limit is lowered under its own name, and set where the body's shape tells what it is called."""
    assert rewrite({"prompt": "x", "max_gen_len": 60}, 50) == {"prompt": "x", "max_gen_len": 50}
    assert rewrite({"prompt": "x", "max_gen_len": 40}, 50) == {"prompt": "x", "max_gen_len": 40}
    assert rewrite({"inputText": "x"}, 50) == {"inputText": "x", "textGenerationConfig": {"maxTokenCount": 50}}
    assert rewrite({"inputText": "x", "textGenerationConfig": {"topP": 1}}, 50) == {
        "inputText": "x",
        "textGenerationConfig": {"topP": 1, "maxTokenCount": 50},
    }
    assert rewrite({"anthropic_version": "x"}, 50) == {"anthropic_version": "x", "max_tokens": 50}
    assert rewrite({"schemaVersion": "messages-v1"}, 50) == {
        "schemaVersion": "messages-v1",
        "inferenceConfig": {"maxTokens": 50},
    }
    assert rewrite({"prompt": "x"}, 50) == {"prompt": "x"}
    assert rewrite({"prompt": "x", "max_gen_len": 60}, None) == {"prompt": "x", "max_gen_len": 60}


@pytest.mark.parametrize(
    ("body", "place"),
    [({"prompt": "x"}, False), ({"prompt": "x", "max_gen_len": 9}, True), ({"inputText": "x"}, True)],
)
def test_where_a_limit_can_be_put(body: dict[str, object], place: bool) -> None:
    """Where nobody knows what the vendor calls its limit, none is promised to be set."""
    assert ask(body).limits_output is place


# ---------------------------------------------------------------------------------- answers


def test_headers_tell_what_bodies_do_not() -> None:
    """C10: counts in headers are taken where the vendor reports none, and never in place of what it reports."""
    headers = {
        "X-Amzn-Bedrock-Input-Token-Count": "40",
        "X-Amzn-Bedrock-Output-Token-Count": "57",
        "X-Amzn-Bedrock-Cache-Read-Input-Token-Count": "1200",
        "X-Amzn-Bedrock-Cache-Write-Input-Token-Count": "300",
    }
    mistral = json.loads(fixture("bedrock_invoke", "response_mistral.json").data)
    assert whole(mistral, headers) == success(METRICS, "Um 7:40")
    llama = json.loads(fixture("bedrock_invoke", "response.json").data)
    assert whole(llama, headers) == ANSWERS["response.json"]
    for junk in ("x", "-1", "1.5", "", "9" * 5000, "\u0661"):
        assert whole(mistral, {"x-amzn-bedrock-input-token-count": junk.encode().decode("latin-1")}).usage is None
    assert whole(b"\xff not JSON", headers) == Answer(kind="success", usage=METRICS, finished=True, unread=1)


@pytest.mark.parametrize(
    ("headers", "tier"),
    [
        ({"x-amzn-bedrock-service-tier": "flex"}, "flex"),
        (
            {"x-amzn-bedrock-service-tier": "default", "x-amzn-bedrock-performanceconfig-latency": "optimized"},
            "optimized",
        ),
        ({"x-amzn-bedrock-performanceconfig-latency": "standard"}, None),
    ],
)
def test_tier_is_in_a_header(headers: dict[str, str], tier: str | None) -> None:
    """C11: the tier that a response was served on is in its headers, whatever the vendor's body is."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    stream = INVOKE.meter(Head(200, [*pairs, *STREAM.headers]))
    stream.feed(fixture("bedrock_invoke", "llama.bin").data)
    response = {"contentType": "x", "body": "x", "ResponseMetadata": {"HTTPHeaders": {COUNTS[0]: "1", COUNTS[1]: "2"}}}
    response["serviceTier"] = headers.get("x-amzn-bedrock-service-tier", "")
    response["performanceConfigLatency"] = headers.get("x-amzn-bedrock-performanceconfig-latency", "")
    for answer in (
        stream.answer(),
        whole({"generation": "x", "prompt_token_count": 1, "generation_token_count": 2}, headers),
        whole({"generation": "x"}, {**headers, COUNTS[0]: "1", COUNTS[1]: "2"}),
        INVOKE.read_object(response),
    ):
        assert answer is not None
        assert answer.usage is not None
        assert answer.usage.service_tier == tier


@pytest.mark.parametrize(
    ("body", "usage", "text"),
    [
        ({"type": "message", "role": "assistant", "model": "c", "content": [{"type": "text", "text": "ab"}],
          "usage": {"input_tokens": 1, "output_tokens": 2}}, Usage(input_tokens=1, output_tokens=2, model="c"), "ab"),
        ({"output": {"message": {"content": [{"text": "ab"}]}}, "stopReason": "end_turn",
          "usage": {"inputTokens": 1, "outputTokens": 2, "cacheReadInputTokenCount": 3}},
         Usage(input_tokens=4, output_tokens=2, cache_read_tokens=3), "ab"),
        ({"choices": [{"message": {"content": "ab"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
         Usage(input_tokens=1, output_tokens=2), "ab"),
        ({"generations": [{"text": "a"}, {"text": "b"}]}, None, "ab"),
        ({"completions": [{"data": {"text": "ab"}}]}, None, "ab"),
        ({"completion": "ab", "stop_reason": "stop_sequence"}, None, "ab"),
        ({"embedding": [0.5], "inputTextTokenCount": 7}, Usage(input_tokens=7, output_tokens=0), ""),
        ({"images": ["aGk=", "aGk="]}, Usage(input_tokens=0, output_tokens=0, images=2), ""),
        ({"results": [{"tokenCount": -1, "outputText": "ab"}], "inputTextTokenCount": 7}, Usage(input_tokens=7), "ab"),
        ([], None, ""),
    ],
)  # fmt: skip
def test_bodies_of_vendors(body: object, usage: Usage | None, text: str) -> None:
    """Each vendor's body is read by its shape; what none of them sends says nothing."""
    assert whole(body) == success(usage, text)


def test_vectors_have_no_output() -> None:
    """Models that write nothing report input only, in a header, and their output is none."""
    assert whole(
        {"embeddings": [[0.5]]}, {"x-amzn-bedrock-input-token-count": "7"}, "cohere.embed-v4:0"
    ).usage == Usage(input_tokens=7, output_tokens=0)
    assert whole({}, {"x-amzn-bedrock-input-token-count": "7"}, "meta.llama:0").usage == Usage(input_tokens=7)


def test_vendor_is_known_by_its_first_shape() -> None:
    """Chunks that say nothing may come first, and later ones in another shape are not counted."""
    meter = INVOKE.meter(STREAM)
    meter.feed(chunk({"event_type": "stream-start"}) + chunk({"generation": "ab"}) + chunk({"type": "message_stop"}))
    assert meter.answer() == Answer(kind="success", text_bytes=2)


def test_unreadable_chunks_are_counted() -> None:
    """Chunks that are no base64, or whose content is not JSON, are forwarded and counted."""
    junk = frame(EVENT, b'{"bytes":"%%%"}') + frame(EVENT, b"{}")
    inner = frame(EVENT, msgspec.json.encode({"bytes": base64.b64encode(b"{oops").decode()}))
    meter = INVOKE.meter(STREAM)
    data = junk + inner + chunk({"generation": "ab"}) + inner
    assert meter.feed(data) is data
    assert meter.answer() == Answer(kind="success", text_bytes=2, unread=4)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("throttlingException", "rate_limit"),
        ("modelTimeoutException", "other"),
        ("serviceUnavailableException", "overload"),
    ],
)
def test_errors_in_the_middle_of_a_stream(kind: str, error: ErrorKind) -> None:
    """An exception frame makes the answer an error, and keeps the text before it."""
    meter = INVOKE.meter(STREAM)
    meter.feed(chunk({"generation": "ab"}))
    assert meter.text_bytes == 2
    meter.feed(frame({":exception-type": kind, ":message-type": "exception"}, b'{"message":"x"}'))
    assert meter.answer() == Answer(kind="error", error=error, text_bytes=2)


def test_error_of_the_vendor() -> None:
    """An error that a vendor tells inside a chunk is one."""
    meter = INVOKE.meter(STREAM)
    meter.feed(chunk({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}))
    assert meter.answer() == Answer(kind="error", error="overload")


# ---------------------------------------------------------------------------------- objects


def test_boto3_response() -> None:
    """Of a response as boto3 gives it the headers tell what was used, and its body can still be read."""
    headers = {"x-amzn-bedrock-input-token-count": "40", "x-amzn-bedrock-output-token-count": "57"}
    response = {
        "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": headers},
        "contentType": "application/json",
        "body": StreamingBody(io.BytesIO(b"{}"), 2),
    }
    assert meter_object(response) == Answer(
        kind="success", usage=Usage(input_tokens=40, output_tokens=57), finished=True
    )
    assert response["body"].read() == b"{}"
    response["ResponseMetadata"] = {"HTTPHeaders": []}
    assert meter_object(response) == Answer(kind="success", finished=True)


@pytest.mark.parametrize("name", STREAMS)
def test_boto3_streams(name: str) -> None:
    """The items of boto3's stream add up to what its bytes do, and so do pieces of the bytes."""
    data = fixture("bedrock_invoke", name).data
    headers = {"content-type": "application/vnd.amazon.eventstream", "x-amzn-bedrock-content-type": "application/json"}
    response = parsed("InvokeModelWithResponseStream", 200, headers, data)
    of_items, of_bytes = item_meter(), INVOKE.item_meter()
    for item in response["body"]:
        of_items.add(item)
    for at in range(0, len(data), 33):
        of_bytes.add(data[at : at + 33])
    assert of_items.answer() == of_bytes.answer() == ANSWERS[name]


def test_boto3_errors() -> None:
    """What botocore makes of an error of an invocation is told like the response."""
    error = {"Error": {"Code": "ThrottlingException", "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": 429}}
    for operation in ("InvokeModel", "InvokeModelWithResponseStream"):
        assert meter_object(ClientError(error, operation)) == Answer(kind="error", error="rate_limit")
    assert INVOKE.read_object(ClientError(error, "PutObject")) is None


@pytest.mark.parametrize("obj", [None, 7, {"body": 1}, {"chunk": "x"}, {"chunk": {"bytes": "eA=="}}, "text", b"bytes"])
def test_objects_of_other_shapes(obj: object) -> None:
    """What is neither a response nor an item of one says nothing."""
    assert INVOKE.read_object(obj) is None
    meter = INVOKE.item_meter()
    meter.add(obj)
    assert meter.answer() is None


@given(
    st.lists(
        anything(
            *("type", "usage", "message", "delta", "content", "generation", "results", "outputs", "choices", "images"),
            *(
                "tokenCount",
                "prompt_token_count",
                "inputTextTokenCount",
                "amazon-bedrock-invocationMetrics",
                "embedding",
            ),
            *("inputTokenCount", "outputTokenCount", "generation_token_count", "completions", "data", "text", "output"),
        ),
        max_size=4,
    )
)
def test_any_body(values: list[Any]) -> None:
    """Values of any shape, with the members this dialect reads, raise nothing and give believable counts."""
    check_objects(INVOKE, [{"chunk": {"bytes": json.dumps(value).encode()}} for value in values])
    for value in values:
        check_answer(whole(json.dumps(value).encode()))
