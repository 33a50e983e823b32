"""Whole answers and errors of one API as the other's."""

from __future__ import annotations

import json
import random
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import Fixture, anything, fixtures, mutate

from asgi_llm_guard.gateway.translate import answer_to_anthropic, answer_to_openai
from asgi_llm_guard.gateway.translate.faults import as_anthropic, as_openai
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import anthropic, dialect_named, openai_errors
from asgi_llm_guard.wire.base import ErrorKind

TRANSLATE = {"anthropic": answer_to_openai, "openai": answer_to_anthropic}
OTHER = {"anthropic": "openai", "openai": "anthropic"}


def of(dialect: str, *kinds: Any) -> list[Fixture]:
    return [each for each in fixtures(*kinds) if each.dialect == dialect]


def message(*content: dict[str, Any], **members: Any) -> bytes:
    usage = {"input_tokens": 3, "output_tokens": 4}
    whole = {"type": "message", "id": "msg_1", "role": "assistant", "model": "claude", "usage": usage}
    return json.dumps({**whole, "content": content, "stop_reason": "end_turn", **members}).encode()


def completion(finish: object = "stop", choice: dict[str, Any] | None = None, **message: Any) -> bytes:
    whole = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **(choice or {})}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return json.dumps(
        {"id": "c1", "object": "chat.completion", "model": "gpt", "choices": [whole], "usage": usage}
    ).encode()


def to_openai(body: bytes) -> dict[str, Any]:
    status, written = answer_to_openai(200, body, created=5)
    assert status == 200
    value: dict[str, Any] = json.loads(written)
    return value


def to_anthropic(body: bytes) -> dict[str, Any]:
    status, written = answer_to_anthropic(200, body)
    assert status == 200
    value: dict[str, Any] = json.loads(written)
    return value


def comparable(usage: Usage | None) -> Usage | None:
    """What both APIs can tell: not the tokens of audio and images, nor other models' work, nor searches."""
    if usage is None:
        return None
    names = {"standard": "default"}
    return msgspec.structs.replace(
        usage,
        service_tier=None if usage.service_tier is None else names.get(usage.service_tier, usage.service_tier),
        input_audio_tokens=None,
        output_audio_tokens=None,
        input_image_tokens=None,
        output_image_tokens=None,
        web_searches=None,
        reported_nanousd=None,
        extra=(),
    )


def test_an_answer_of_anthropic_for_openai() -> None:
    """D7: text, thinking with its signature, calls, id, model, reason and every bucket of the usage."""
    thought = {"type": "thinking", "thinking": "hm", "signature": "sig"}
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    usage = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 30,
        "cache_read_input_tokens": 20,
        "cache_creation": {"ephemeral_5m_input_tokens": 12, "ephemeral_1h_input_tokens": 18},
        "output_tokens": 9,
        "output_tokens_details": {"thinking_tokens": 4},
        "service_tier": "standard",
    }
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm"}}
    text = [{"type": "text", "text": "So "}, {"type": "text", "text": "dry."}]

    assert to_openai(message(thought, hidden, *text, call, stop_reason="tool_use", usage=usage)) == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": 5,
        "model": "claude",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "So dry.",
                    "refusal": None,
                    "tool_calls": [
                        {
                            "id": "toolu_1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"Ulm"}'},
                        }
                    ],
                    "reasoning_content": "hm",
                    "thinking_blocks": [thought, hidden],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 60,
            "completion_tokens": 9,
            "total_tokens": 69,
            "prompt_tokens_details": {
                "cached_tokens": 20,
                "cache_write_tokens": 30,
                "cache_write_tokens_details": {"ttl_5m_tokens": 12, "ttl_1h_tokens": 18},
            },
            "completion_tokens_details": {"reasoning_tokens": 4},
        },
    }


def test_an_answer_of_openai_for_anthropic() -> None:
    """D7: text, thinking, calls, id, model, reason and every bucket of the usage."""
    calls = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]
    value = json.loads(completion("tool_calls", content="So.", reasoning_content="hm", tool_calls=calls))
    value["usage"] |= {
        "prompt_tokens": 60,
        "total_tokens": 64,
        "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }

    assert to_anthropic(json.dumps({**value, "service_tier": "default"}).encode()) == {
        "id": "c1",
        "type": "message",
        "role": "assistant",
        "model": "gpt",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "So."},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Ulm"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 30,
            "cache_read_input_tokens": 20,
            "output_tokens": 4,
            "output_tokens_details": {"thinking_tokens": 2},
            "service_tier": "standard",
        },
    }


@pytest.mark.parametrize(
    "stop, finish",
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("a new one", "stop"),
        (None, "stop"),
    ],
)
def test_stop_reasons_for_openai(stop: object, finish: str) -> None:
    """Every reason that Anthropic has is one of OpenAI's."""
    assert to_openai(message(stop_reason=stop))["choices"][0]["finish_reason"] == finish


@pytest.mark.parametrize(
    "finish, stop",
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("tool_calls", "tool_use"),
        ("function_call", "tool_use"),
        ("content_filter", "refusal"),
        ("a new one", "end_turn"),
    ],
)
def test_finish_reasons_for_anthropic(finish: object, stop: str) -> None:
    """Every reason that OpenAI has is one of Anthropic's."""
    assert to_anthropic(completion(finish, content="x"))["stop_reason"] == stop


def test_stop_sequences_are_told_where_they_are_known() -> None:
    """The sequence that ended an answer passes as servers like vLLM tell it, both ways."""
    value = to_openai(message(stop_reason="stop_sequence", stop_sequence="END"))
    back = to_anthropic(json.dumps(value).encode())

    assert value["choices"][0]["stop_reason"] == "END"
    assert (back["stop_reason"], back["stop_sequence"]) == ("stop_sequence", "END")


def test_calls_beside_stop_are_calls() -> None:
    """Servers that say `stop` beside tool calls mean the calls."""
    calls = [{"id": "a", "function": {"name": "now", "arguments": ""}}]
    written = to_anthropic(completion("stop", content=None, tool_calls=calls))

    assert written["stop_reason"] == "tool_use"
    assert written["content"] == [{"type": "tool_use", "id": "a", "name": "now", "input": {}}]


def test_content_in_parts() -> None:
    """Servers that give content as parts, thinking among them, are read as well."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    content = [thinking, {"type": "text", "text": "So"}, {"type": "text", "text": "."}]

    assert to_anthropic(completion(content=content))["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "So."},
    ]


def test_refusals() -> None:
    """A refusal in the model's own words is text that was refused, and why Anthropic refused is OpenAI's refusal."""
    refused = to_anthropic(completion("stop", content=None, refusal="I will not."))
    told = to_openai(message(stop_reason="refusal", stop_details={"type": "refusal", "explanation": "unsafe"}))

    assert (refused["content"], refused["stop_reason"]) == ([{"type": "text", "text": "I will not."}], "refusal")
    assert told["choices"][0]["message"]["refusal"] == "unsafe"
    assert told["choices"][0]["finish_reason"] == "content_filter"


def test_usage_that_is_not_told_is_not_zero() -> None:
    """An answer without usage has none on the other side."""
    value = json.loads(completion(content="x"))
    del value["usage"]
    unknown = {"input_tokens": None, "output_tokens": None}

    assert to_anthropic(json.dumps(value).encode())["usage"] == unknown
    assert "usage" not in to_openai(message(usage=unknown))


@pytest.mark.parametrize("case", [*of("anthropic", "response"), *of("openai", "response")], ids=str)
def test_both_sides_of_an_answer_meter_alike(case: Fixture) -> None:
    """What the meter of either dialect reads of an answer is the same before and after."""
    status, written = TRANSLATE[case.dialect](200, case.data)
    before = case.spoken.read_response(200, case.data)
    after = dialect_named(OTHER[case.dialect]).read_response(status, written)

    assert after.kind == before.kind == "success"
    assert comparable(after.usage) == comparable(before.usage)
    assert after.model == before.model


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("case", [*of("anthropic", "error"), *of("openai", "error")], ids=str)
def test_errors_keep_their_kind(case: Fixture) -> None:
    """An error of one provider is one of the same kind, with the same words, to clients of the other."""
    status, written = TRANSLATE[case.dialect](case.head.status, case.data)
    before = case.spoken.read_response(case.head.status, case.data)
    after = dialect_named(OTHER[case.dialect]).read_response(status, written)

    assert (after.kind, after.error) == ("error", before.error)
    assert json.loads(case.data)["error"]["message"] in json.loads(written)["error"]["message"]


@pytest.mark.parametrize("status", [None, 400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529])
@pytest.mark.parametrize("kind", get_args(ErrorKind))
def test_every_kind_is_read_again(kind: ErrorKind, status: int | None) -> None:
    """Whatever an error came with, it is written so that both dialects read the kind from it, in a stream too."""
    told, value = as_openai(kind, "words", status)
    assert openai_errors.classify(told, value) == openai_errors.classify(None, value) == kind
    told, value = as_anthropic(kind, "words", status)
    assert anthropic.classify(told, value) == anthropic.classify(None, value) == kind
    assert 400 <= told < 600


@pytest.mark.parametrize(
    "status, told_openai, told_anthropic",
    [
        (401, 401, 401),
        (403, 403, 403),
        (404, 404, 404),
        (413, 413, 413),
        (429, 429, 429),
        (503, 503, 529),
        (529, 503, 529),
    ],
)
def test_statuses(status: int, told_openai: int, told_anthropic: int) -> None:
    """The status is the one that the other SDK has a class for; an overload is 529 on one side and 503 on the other."""
    assert answer_to_openai(status, b"{}")[0] == told_openai
    told, written = answer_to_anthropic(status, b"{}")
    assert told == told_anthropic
    assert (
        json.loads(written)["error"]["type"]
        == {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
            529: "overloaded_error",
        }[told]
    )


def test_an_overflow_has_its_code() -> None:
    """Where one API has a code for an overflow the other has words, and both are written."""
    text = "prompt is too long: 9 tokens > 8 maximum"
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": text}}
    status, written = answer_to_openai(400, json.dumps(body).encode())
    assert (status, json.loads(written)["error"]["code"]) == (400, "context_length_exceeded")

    coded = {"error": {"message": "Too much.", "type": "invalid_request_error", "code": "context_length_exceeded"}}
    status, written = answer_to_anthropic(400, json.dumps(coded).encode())
    assert (status, json.loads(written)["error"]["message"]) == (400, "prompt is too long: Too much.")


@pytest.mark.parametrize("body", [b"", b"<html>", b"null", b"[]", b'{"error":"text"}', b'{"detail":[{"msg":"x"}]}'])
@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_errors_without_their_shape(body: bytes, status: int) -> None:
    """A proxy's page is an error all the same, in the client's shape."""
    told, written = answer_to_openai(status, body)
    assert isinstance(json.loads(written)["error"]["message"], str)
    assert told >= 400
    told, written = answer_to_anthropic(status, body)
    assert json.loads(written)["type"] == "error"
    assert told >= 400


@pytest.mark.parametrize(
    "body", [b"", b"null", b'{"choices":', b'{"choices":[]}', b'{"choices":[{"message":null}]}', b'{"type":"message"}']
)
def test_answers_that_cannot_be_read(body: bytes) -> None:
    """An answer that is none is a bad gateway's error, and no empty answer."""
    for translated in (answer_to_openai, answer_to_anthropic):
        status, written = translated(200, body)
        assert status == 502
        assert "could not be read" in json.loads(written)["error"]["message"]


def test_arguments_that_are_no_object() -> None:
    """Anthropic has no place for arguments that are not JSON: the answer is an error, not a call without them."""
    calls = [{"id": "a", "function": {"name": "now", "arguments": "{oops"}}]

    assert answer_to_anthropic(200, completion("tool_calls", content=None, tool_calls=calls))[0] == 502


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_garbage_never_raises(data: st.DataObject, seed: int) -> None:
    """Whatever the bytes and the status, there is an answer or an error, and it is JSON."""
    rng = random.Random(seed)
    sample = data.draw(st.sampled_from([*of("anthropic", "response", "error"), *of("openai", "response", "error")]))
    body = mutate(rng, sample.data)
    status = rng.choice((200, 201, 302, 400, 402, 429, 500, 503))

    for translated in (answer_to_openai, answer_to_anthropic):
        told, written = translated(status, body)
        assert 200 <= told < 600
        assert isinstance(json.loads(written), dict)


@given(
    value=anything(
        "choices", "message", "content", "type", "text", "tool_calls", "function", "usage", "error", "finish_reason"
    )
)
def test_values_of_any_shape_never_raise(value: Any) -> None:
    """Members of any type give an answer or an error."""
    body = json.dumps(value).encode()
    for part in (value, {"choices": [{"message": value}]}, {"type": "message", "content": [value], "usage": value}):
        body = json.dumps(part).encode()
        assert isinstance(json.loads(answer_to_openai(200, body)[1]), dict)
        assert isinstance(json.loads(answer_to_anthropic(200, body)[1]), dict)
