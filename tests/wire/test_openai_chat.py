"""The dialect `openai`: requests, answers, streams and errors, from bytes, SDK objects and dicts."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import httpx2
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import _AnyItems, dialect_for, dialect_named, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, Dialect, ErrorKind, Head
from asgi_llm_guard.wire.openai_chat import OpenAIChat
from asgi_llm_guard.wire.peek import BodyError, read_body

CHAT = OpenAIChat()
STREAM = Head(200, [(b"Content-Type", b"text/event-stream; charset=utf-8")])
FIXTURES = Path(__file__).parent / "fixtures" / "openai"
MODEL = "gpt-nova-2026-05-02"
USAGE = Usage(
    input_tokens=930,
    output_tokens=75,
    cache_read_tokens=512,
    cache_write_tokens=256,
    reasoning_tokens=48,
    input_audio_tokens=40,
    output_audio_tokens=12,
    service_tier="priority",
    model=MODEL,
)
TEXT_BYTES = len("Der Zug fährt um 7:40 ab\u2028🚆.".encode())


def plain(read: int, written: int) -> Usage:
    return Usage(input_tokens=read, output_tokens=written, service_tier="priority", model=MODEL)


def success(usage: Usage | None, text_bytes: int, *, finished: bool = True) -> Answer:
    return Answer(kind="success", usage=usage, model=MODEL, text_bytes=text_bytes, finished=finished)


STREAMS: dict[str, Answer] = {
    "usage.sse": success(USAGE, TEXT_BYTES),
    "crlf_comments.sse": success(USAGE, TEXT_BYTES),
    "cr_only.sse": success(USAGE, TEXT_BYTES),
    "no_usage.sse": success(None, TEXT_BYTES),
    "truncated.sse": Answer(kind="success", model=MODEL, text_bytes=TEXT_BYTES, finished=False, unread=1),
    "error.sse": Answer(kind="error", model=MODEL, error="overload", text_bytes=len("Der Zug fährt ".encode())),
    "azure.sse": success(USAGE, TEXT_BYTES),
    "vllm_continuous.sse": success(plain(20, 3), len("one two")),
    "groq.sse": success(plain(14, 2), len("Hi")),
    "openrouter_error.sse": Answer(kind="error", model=MODEL, error="overload", text_bytes=len("Well")),
    "openrouter_usage.sse": success(replace(plain(9, 1), reported_nanousd=120_000), len("Well")),
    "tools.sse": success(USAGE, len('timetable{"from":"Ulm"}')),
    "multi_line_data.sse": success(USAGE, len("left")),
    "two_choices.sse": success(USAGE, len("aabbb")),
}
with_streams = pytest.mark.parametrize("name", STREAMS)


def stream(*chunks: bytes, strip: bool = False) -> tuple[bytes, Answer]:
    meter = CHAT.meter(STREAM, strip_usage=strip)
    forwarded = b"".join([meter.feed(chunk) for chunk in chunks]) + meter.finish()
    return forwarded, meter.answer()


def sse(*events: object) -> bytes:
    return b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events)


def chunk(content: str | None = None, **members: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}], **members}


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_bytes())


def ask(body: dict[str, object], path: str = "") -> Ask:
    return CHAT.read_request(read_body(msgspec.json.encode(body)), path)


# --------------------------------------------------------------------------------- requests


def test_request_is_read() -> None:
    """Model, limit, number of choices, streaming and the wish for usage are as the client wrote them."""
    view = read_body((FIXTURES / "request.json").read_bytes())
    assert CHAT.read_request(view) == Ask(
        model="gpt-nova", max_output_tokens=640, choices=2, stream=True, wants_usage=True, service_tier="auto"
    )
    assert ask({"model": "m"}) == Ask(model="m", max_output_tokens=None, choices=1, stream=False, wants_usage=False)
    nulls = {"max_tokens": None, "max_completion_tokens": None, "n": None, "stream": None, "stream_options": None}
    assert ask({"model": "m", **nulls}) == ask({"model": "m"})


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_tokens": 100, "max_completion_tokens": 900}, 900),
        ({"max_tokens": 900, "max_completion_tokens": 100}, 900),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 0, "max_completion_tokens": 7}, None),
        ({}, None),
    ],
)
def test_larger_limit_counts(limits: dict[str, object], expected: int | None) -> None:
    """Conformance 52: of `max_tokens` and `max_completion_tokens` the larger is reserved; 0 and absent are no limit."""
    assert ask({"model": "m", **limits}).max_output_tokens == expected


def test_usage_is_wanted_in_streams_only() -> None:
    """`include_usage` without `stream` gives the client nothing to strip."""
    assert not ask({"model": "m", "stream_options": {"include_usage": True}}).wants_usage
    assert not ask({"model": "m", "stream": True, "stream_options": {"include_usage": False}}).wants_usage


def test_azure_deployment_is_the_model() -> None:
    """On a deployment's path the deployment is billed, whatever model the body names; elsewhere the body decides."""
    path = "/openai/deployments/our-gpt/chat/completions"
    assert ask({"messages": []}, path).model == "our-gpt"
    assert ask({"model": "cheap"}, path).model == "our-gpt"
    assert ask({"model": "m"}, "/v1/chat/completions").model == "m"
    assert ask({"model": "m"}, "/chat/completions").model == "m"
    with pytest.raises(BodyError, match="model: required"):
        ask({"messages": []}, "/openai/v1/chat/completions")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "//v1//chat///completions",
        "/chat/completions",
        "/api/v1/chat/completions",
        "/openai/deployments/our-gpt/chat/completions",
        "/v1beta/openai/chat/completions",
    ],
)
def test_paths_of_the_dialect(path: str) -> None:
    """Whatever stands before `/chat/completions`, and however slashes are doubled, the dialect is known."""
    assert dialect_for(path) == dialect_named("openai")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/v1/completions",
        "/v1/chat",
        "/v1/chat/completions/chatcmpl-1",
        "/v1/xchat/completions",
        "/v1/responses",
    ],
)
def test_other_paths(path: str) -> None:
    """Paths of other endpoints, stored completions among them, are not claimed."""
    assert not CHAT.recognises(path)


def test_dialects_are_found_by_name() -> None:
    """A wrong name in the settings is refused with the names that exist."""
    dialect: Dialect = dialect_named("openai")
    assert (dialect.name, dialect.provider) == ("openai", None)
    with pytest.raises(ConfigurationError, match=r"dialect: expected one of .*'openai'.*, got 'open-ai'"):
        dialect_named("open-ai")


def rewrite(body: bytes, *, include_usage: bool = False, most: int | None = None) -> bytes:
    return CHAT.rewrite(read_body(body), include_usage=include_usage, max_output_tokens=most)


def test_usage_is_asked_for() -> None:
    """Streams get `include_usage`, other stream options stay; what needs no change is the same object."""
    assert rewrite(b'{"model":"m","stream":true}', include_usage=True) == (
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'
    )
    assert rewrite(b'{"stream_options": {"x": 1} ,"stream":true}', include_usage=True) == (
        b'{"stream_options": {"x": 1,"include_usage":true} ,"stream":true}'
    )
    off = b'{"stream":true,"stream_options":{"include_usage":false}}'
    assert rewrite(off, include_usage=True) == off.replace(b"false", b"true")
    null = b'{"stream":true,"stream_options":null}'
    assert rewrite(null, include_usage=True) == null.replace(b"null", b'{"include_usage":true}')
    for same in (b'{"stream":false}', b'{"stream":true,"stream_options":{"include_usage":true}}'):
        assert rewrite(same, include_usage=True) is same


def test_limit_is_set_or_lowered() -> None:
    """Every limit in the request is lowered to the given one, never raised; without any the current name is set."""
    assert rewrite(b'{"model":"m"}', most=50) == b'{"model":"m","max_completion_tokens":50}'
    assert rewrite(b'{"max_tokens":60}', most=50) == b'{"max_tokens":50}'
    assert rewrite(b'{"max_tokens":0}', most=50) == b'{"max_tokens":50}'
    assert rewrite(b'{"max_tokens":60,"max_completion_tokens":40}', most=50) == (
        b'{"max_tokens":50,"max_completion_tokens":40}'
    )
    lower = b'{"max_tokens":40}'
    assert rewrite(lower, most=50) is lower
    assert rewrite(lower) is lower


# --------------------------------------------------------------------------------- streams


@with_streams
def test_streams_are_read(name: str) -> None:
    """C10: each server's way to stream gives usage by bucket, model, text so far, and whether it came to an end."""
    assert stream((FIXTURES / name).read_bytes())[1] == STREAMS[name]


@with_streams
def test_every_split_gives_the_same_answer(name: str) -> None:
    """Wherever a chunk ends, the answer is the same, and every chunk is forwarded at once and untouched."""
    data = (FIXTURES / name).read_bytes()
    for at in range(len(data)):
        meter = CHAT.meter(STREAM, strip_usage=False)
        for piece in (data[:at], data[at:]):
            assert meter.feed(piece) is piece
        assert meter.finish() == b""
        assert meter.answer() == STREAMS[name]
    assert stream(*(bytes([byte]) for byte in data)) == (data, STREAMS[name])


@with_streams
def test_stripping_removes_the_extra_chunk_only(name: str) -> None:
    """Wherever chunks end: the event with usage and no choices is gone, every other byte is there, the answer is the same."""
    data = (FIXTURES / name).read_bytes()
    ends = (b"\r\n\r\n", b"\n\n", b"\r\r")
    end = next(end for end in ends if end in data)
    kept = [event for event in data.split(end) if b'"choices":[],"usage":{' not in event]
    expected = end.join(kept)
    assert (expected != data) == (name not in {
        "no_usage.sse", "truncated.sse", "error.sse", "groq.sse", "openrouter_error.sse", "openrouter_usage.sse",
    })  # fmt: skip
    for at in range(len(data)):
        assert stream(data[:at], data[at:], strip=True) == (expected, STREAMS[name])
    assert stream(*(bytes([byte]) for byte in data), strip=True) == (expected, STREAMS[name])


def test_stripping_holds_back_no_finished_event() -> None:
    """An event is forwarded with the chunk that completes it."""
    meter = CHAT.meter(STREAM, strip_usage=True)
    event = sse(chunk("a"))
    assert meter.feed(event + event[:20]) == event
    assert meter.feed(event[20:]) == event
    assert meter.finish() == b""


def test_stripping_keeps_errors() -> None:
    """A chunk without choices that carries an error is never removed."""
    data = sse({"choices": [], "usage": {"prompt_tokens": 1}, "error": {"message": "x"}})
    assert stream(data, strip=True)[0] == data


def test_cut_stream_tells_what_it_saw() -> None:
    """A stream that is given up in the middle has its text counted and no end."""
    meter = CHAT.meter(STREAM, strip_usage=False)
    meter.feed(sse(chunk("abc", model="m")))
    assert meter.answer() == Answer(kind="success", model="m", text_bytes=3, finished=False)


def test_empty_stream() -> None:
    """A stream without any event is no end, no text and no usage."""
    assert stream(b"") == (b"", Answer(kind="success"))


def test_end_without_marker() -> None:
    """Servers that send no `[DONE]` have finished once every choice has a finish reason, in any order."""
    done = {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}
    one_of_two = sse(chunk("a"), done)
    assert not stream(one_of_two)[1].finished
    both = one_of_two + sse({"choices": [{"index": 0, "finish_reason": "length"}]})
    assert stream(both)[1].finished
    assert stream(both + sse(chunk("", usage={"prompt_tokens": 1})))[1].finished  # OpenRouter: usage beside a choice


def test_last_believable_usage_wins() -> None:
    """Cumulative reports are never summed, and a later one that says less does not replace one that is whole."""
    counts = [
        {"prompt_tokens": 5, "completion_tokens": 1},
        {"prompt_tokens": 5, "completion_tokens": 9},
        {"prompt_tokens": 5, "completion_tokens": None},
        {"prompt_tokens": -1, "completion_tokens": -1},
        None,
    ]
    answer = stream(sse(*(chunk("", usage=count) for count in counts)))[1]
    assert answer.usage == Usage(input_tokens=5, output_tokens=9)


def test_unreadable_events_are_counted() -> None:
    """Events that are not JSON, or too large to keep, are forwarded and counted, and the next one is read."""
    big = b"data: " + b" " * (1 << 20) + b"{}\n\n"
    data = b"data: {oops\n\n" + big + sse(chunk("abc"))
    forwarded, answer = stream(data, strip=True)
    assert forwarded == data
    assert answer == Answer(kind="success", text_bytes=3, unread=2)


def test_sloppy_json_is_read() -> None:
    """Servers written in Python send NaN, infinities and halves of emoji; their events count all the same."""
    data = (
        b'data: {"choices":[{"index":0,"delta":{"content":"ab\\ud83d"},"logprobs":{"x":[NaN,-Infinity]}}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":NaN}}\n\n'
    )
    assert stream(data)[1] == Answer(kind="success", usage=Usage(input_tokens=3), text_bytes=5)


def test_event_named_error() -> None:
    """An event named `error` is one, whatever its data."""
    assert stream(b"event: error\ndata: it broke\n\n")[1] == Answer(kind="error", error="other")
    named = b'event: error\ndata: {"error":{"message":"wait","code":"rate_limit_exceeded"}}\n\n'
    assert stream(named)[1].error == "rate_limit"


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "thinking"]), inner),
    max_leaves=5,
)


def _members(*names: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(names), values | _ANYTHING) | _ANYTHING


_COUNTS = st.integers(0, 9)
_DETAILS = _members("cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens", values=_COUNTS)
_USAGES = st.fixed_dictionaries(
    {"prompt_tokens": _COUNTS | _ANYTHING, "completion_tokens": _COUNTS | _ANYTHING},
    optional={"total_tokens": _COUNTS, "prompt_tokens_details": _DETAILS, "completion_tokens_details": _DETAILS},
)
_DELTAS = _members(
    *("content", "refusal", "reasoning", "reasoning_content", "tool_calls", "function_call", "audio", "function"),
    values=_members("name", "arguments", "transcript", "function", values=_ANYTHING),
)
_CHOICES = _members("delta", "message", "index", "finish_reason", values=_DELTAS)
_ERRORS = _members("message", "type", "code", "status", "metadata", values=st.sampled_from(["slow_down", 429]))
_JSON: st.SearchStrategy[Any] = (
    st.fixed_dictionaries(
        {"choices": st.lists(_CHOICES, max_size=3) | _ANYTHING},
        optional={
            "usage": _USAGES | _ANYTHING,
            "x_groq": st.fixed_dictionaries({"usage": _USAGES}) | _ANYTHING,
            "error": _ERRORS,
            "model": _ANYTHING,
            "object": _ANYTHING,
        },
    )
    | st.fixed_dictionaries({"error": _ERRORS})
    | _ANYTHING
)


@given(st.lists(st.binary() | _JSON.map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n")), st.booleans())
def test_no_bytes_break_a_stream(chunks: list[bytes], strip: bool) -> None:
    """Metering never raises; without stripping the chunks themselves come back; with it only whole events are missing."""
    meter = CHAT.meter(STREAM, strip_usage=strip)
    forwarded = [meter.feed(chunk) for chunk in chunks]
    rest = meter.finish()
    if strip:
        assert len(b"".join(forwarded) + rest) <= len(b"".join(chunks))
    else:
        assert all(out is given for out, given in zip(forwarded, chunks, strict=True))
        assert rest == b""
    answer = meter.answer()
    assert answer.text_bytes >= 0
    check_usage(answer.usage)


@given(_JSON, st.sampled_from([200, 201, 302, 400, 402, 429, 500, 503]))
def test_no_response_breaks_metering(value: object, status: int) -> None:
    """Whatever JSON a response, a dict or an item is, it is read or passed over, and counts are believable."""
    check_usage(CHAT.read_response(status, json.dumps(value).encode()).usage)
    meter = item_meter()
    meter.add(value)
    for answer in (CHAT.read_object(value), meter.answer()):
        check_usage(answer.usage if answer is not None else None)


def check_usage(usage: Usage | None) -> None:
    """What every usage keeps: whole numbers, and parts within what they are part of."""
    if usage is None:
        return
    counts = [usage.input_tokens, usage.output_tokens]
    assert any(count is not None for count in counts)
    assert all(count is None or (type(count) is int and 0 <= count < 2**31) for count in counts)
    cached = (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0)
    assert cached <= (usage.input_tokens or 0)
    assert (usage.reasoning_tokens or 0) <= (usage.output_tokens or 0)


# ------------------------------------------------------------------------------- responses


def test_response_is_read() -> None:
    """C10: usage by bucket, the model and tier that served it, and the size of the text."""
    text = fixture("response.json")["choices"][0]["message"]["content"]
    answer = CHAT.read_response(200, (FIXTURES / "response.json").read_bytes())
    assert answer == success(USAGE, len(text.encode()))


@pytest.mark.parametrize("bad", [None, -1, True, 1.0, 3.7, "9", [], {}, 2**31, 10**12, 10**40])
def test_unbelievable_counts_are_unknown(bad: object) -> None:
    """A count that is not a whole number of a believable size is unknown, never zero, and never an exception."""
    body = json.dumps({"choices": [], "usage": {"prompt_tokens": bad, "completion_tokens": 4}}).encode()
    assert CHAT.read_response(200, body).usage == Usage(output_tokens=4)
    body = json.dumps({"choices": [], "usage": {"prompt_tokens": bad, "completion_tokens": bad}}).encode()
    assert CHAT.read_response(200, body).usage is None


@pytest.mark.parametrize("usage", [None, [], {}, "n/a", 3, {"total_tokens": 9}])
def test_no_usage(usage: object) -> None:
    """A report that tells neither input nor output is no report."""
    body = msgspec.json.encode({"choices": [], "usage": usage})
    assert CHAT.read_response(200, body) == Answer(kind="success", finished=True)


def usage_of(**report: object) -> Usage | None:
    return CHAT.read_response(200, msgspec.json.encode({"choices": [], "usage": report})).usage


def test_parts_larger_than_their_whole_are_unknown() -> None:
    """Details that cannot be true are dropped; the totals stay."""
    details = {"cached_tokens": 8, "cache_write_tokens": 3, "audio_tokens": 11}
    written = {"reasoning_tokens": 6, "audio_tokens": 6}
    assert usage_of(
        prompt_tokens=10, completion_tokens=5, prompt_tokens_details=details, completion_tokens_details=written
    ) == Usage(input_tokens=10, output_tokens=5)


def test_thinking_in_the_total_only_is_output() -> None:
    """Gemini's compatible endpoint: what the total has above prompt and completion was generated, and is billed."""
    assert usage_of(prompt_tokens=10, completion_tokens=5, total_tokens=40) == Usage(
        input_tokens=10, output_tokens=30, reasoning_tokens=25
    )


def test_mistral_names() -> None:
    """`num_cached_tokens` counts as cache reads where no details are given; content may be parts."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}]
    body = {
        "choices": [{"message": {"content": parts}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "num_cached_tokens": 8},
    }
    answer = CHAT.read_response(200, msgspec.json.encode(body))
    assert answer.usage == Usage(input_tokens=9, output_tokens=2, cache_read_tokens=8)
    assert answer.text_bytes == len("hmyes")


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"object": "chat.completion", "model": "m", "service_tier": "flex"},
        {"object": "error", "message": "no"},
        {"object": 7},
        {"error": None},
        {"error": {"message": "no"}},
        {"model": "m" * 300, "service_tier": "\n"},
        {"model": ["m"]},
        {"choices": []},
        {"choices": {}},
        {"choices": [None, {"message": {"content": "one"}}]},
        {"choices": [{"message": None}, {"message": {"content": "ä", "refusal": "no"}}]},
        {"choices": [{"delta": {"content": "d"}, "message": {"content": "longer"}}]},
        {"choices": [{"message": {"content": [{"text": "part"}]}}]},
        {"choices": [{"message": {"content": None, "reasoning": "why"}}]},
        {"choices": [{"message": {"content": None, "reasoning_content": "why"}}]},
        {"choices": [{"message": {"audio": {"transcript": "hum"}}}]},
        {"choices": [{"message": {"function_call": {"name": "f", "arguments": "{}"}}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}, {"type": "x"}]}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]}}]},
        {"usage": None},
        {"usage": {"prompt_tokens": 4}},
        {"usage": {"prompt_tokens": -4, "completion_tokens": 2}},
        {"usage": {"prompt_tokens": 4.0, "completion_tokens": 2}},
        {"usage": {"prompt_tokens": 2**31, "completion_tokens": 2}},
        {"usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 9}},
        {"usage": {"prompt_tokens": 4, "completion_tokens": 2, "num_cached_tokens": 3}},
        {"usage": {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}},
        {
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": 8,
                "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 1, "audio_tokens": 2},
                "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 4},
            }
        },
        {"usage": None, "x_groq": {"usage": {"prompt_tokens": 4, "completion_tokens": 2}}},
    ],
)
def test_plain_completions_are_read_the_same(members: dict[str, object]) -> None:
    """A plain completion with status 200, which is read in a shorter way, gives the same answer as any other."""
    usual: dict[str, object] = {
        "choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2},
    }
    body = msgspec.json.encode(usual | members)
    assert CHAT.read_response(200, body) == CHAT.read_response(201, body)


def test_everything_generated_is_text() -> None:
    """Refusals, reasoning under either name, tool calls, old function calls and transcripts count, reasoning once."""
    message = {
        "content": "ä",
        "refusal": "no",
        "reasoning": "why",
        "reasoning_content": "why",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}, {"type": "custom"}],
        "function_call": {"name": "g", "arguments": "1"},
        "audio": {"data": "AAAA", "transcript": "hum"},
    }
    body = msgspec.json.encode({"choices": [{"message": message}]})
    assert CHAT.read_response(200, body).text_bytes == 2 + 2 + 3 + 3 + 2 + 3
    for name in ("reasoning", "reasoning_content"):
        assert CHAT.read_response(200, msgspec.json.encode({"choices": [{"message": {name: "why"}}]})).text_bytes == 3


def test_names_from_answers_are_bounded() -> None:
    """T16: a model or tier that does not print, or is endless, is not taken over into records."""
    for bad in ("m\r\nx", "m" * 257, "", 7):
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        body = msgspec.json.encode({"choices": [], "model": bad, "service_tier": bad, "usage": usage})
        answer = CHAT.read_response(200, body)
        assert (answer.model, answer.usage) == (None, Usage(input_tokens=1, output_tokens=1))


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"9" * 5000])
def test_unreadable_responses(body: bytes) -> None:
    """A success that cannot be read is a success without usage; an error is told by its status alone."""
    assert CHAT.read_response(200, body) == Answer(kind="success", finished=True)
    assert CHAT.read_response(503, body) == Answer(kind="error", error="overload")


# ---------------------------------------------------------------------------------- errors


def error(message: str = "", **members: object) -> dict[str, object]:
    return {"error": {"message": message, **members}}


ERRORS: list[tuple[int, object, ErrorKind]] = [
    (429, error("Slower, please.", type="requests", code="rate_limit_exceeded"), "rate_limit"),
    (429, error("Slower, please.", type="tokens", code="rate_limit_exceeded"), "rate_limit"),
    (503, error("Ramp up slowly.", code="slow_down"), "rate_limit"),
    (429, {}, "rate_limit"),
    (429, error("No credit left.", type="insufficient_quota", code="insufficient_quota"), "quota"),
    (429, error("No credit left.", type="insufficient_quota", code="credit_balance_exhausted"), "quota"),
    (429, error("Month is over.", type="insufficient_quota", code="organization_spend_limit_exceeded"), "quota"),
    (429, error("Month is over.", type="insufficient_quota", code="project_spend_limit_exceeded"), "quota"),
    (429, error("Month is over.", type="insufficient_quota", code="organization_usage_limit_exceeded"), "quota"),
    (429, error("Month is over.", type="insufficient_quota", code="a_new_one"), "quota"),
    (402, error("Add credits.", code=402), "quota"),
    (402, error("Busy.", code=402, metadata={"limit_source": "openrouter_in_flight_budget"}), "rate_limit"),
    (503, error("Come back.", type="server_error", code="server_is_overloaded"), "overload"),
    (503, {}, "overload"),
    (529, {}, "overload"),
    (502, error("Upstream", code=502), "overload"),
    (400, error("Too long.", type="invalid_request_error", code="context_length_exceeded"), "context_overflow"),
    (400, error("This model's maximum context length is 9 tokens.", code=400), "context_overflow"),
    (400, error("Input tokens exceed the configured limit of 9 tokens."), "context_overflow"),
    (413, error("Your input exceeds the context window of this model."), "context_overflow"),
    (
        400,
        [error("The input token count (9) exceeds the maximum number of tokens allowed (8).", code=400)],
        "context_overflow",
    ),
    (422, error("Prompt is too large for model with 9 maximum context length"), "context_overflow"),
    (400, error("`inputs` tokens + `max_new_tokens` must be <= 9"), "context_overflow"),
    (400, {"error": "the prompt is longer than the context length currently available"}, "context_overflow"),
    (400, {"object": "error", "message": "This model's maximum context length is 9", "code": 400}, "context_overflow"),
    (429, error("maximum context length of your tier: wait"), "rate_limit"),
    (400, error("above the maximum context length of 9", code="string_above_max_length"), "invalid"),
    (400, error("Invalid 'user': string too long. Expected maxLength 64"), "invalid"),
    (413, error("Request too large", code="request_too_large"), "invalid"),
    (400, error("max_tokens is too large", type="invalid_request_error", code="invalid_value"), "invalid"),
    (404, error("No such model", type="invalid_request_error", code="model_not_found"), "invalid"),
    (422, {"detail": [{"msg": "field required"}]}, "invalid"),
    (401, error("Who?", type="invalid_request_error", code="invalid_api_key"), "auth"),
    (401, error("Who?", type="invalid_request_error", code=None), "auth"),
    (403, {"detail": "Forbidden"}, "auth"),
    (429, [{"error": {"code": 429, "message": "Quota", "status": "RESOURCE_EXHAUSTED"}}], "rate_limit"),
    (500, error("Oh.", type="server_error"), "other"),
    (408, {}, "other"),
    (302, {}, "other"),
]


@pytest.mark.parametrize(("status", "body", "kind"), ERRORS)
def test_errors_are_told_apart(status: int, body: object, kind: ErrorKind) -> None:
    """Code first, then type, then status; an overflow only where a status can mean it; look-alikes are not one."""
    assert CHAT.read_response(status, msgspec.json.encode(body)) == Answer(kind="error", error=kind)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (error("x", type="server_error", code=None), "other"),
        (error("x", type="invalid_request_error", code=None), "invalid"),
        (error("x", code="context_length_exceeded"), "context_overflow"),
        (error("maximum context length is 9 tokens", code=400), "context_overflow"),
        (error("maximum context length is 9 tokens", code=429), "rate_limit"),
        ({"error": "it broke"}, "other"),
        ({"object": "error", "message": "x", "code": 503}, "overload"),
    ],
)
def test_errors_in_the_middle_of_a_stream(event: object, kind: ErrorKind) -> None:
    """An error event makes the answer an error, keeps the text before it, and leaves it unfinished even with `[DONE]`."""
    answer = stream(sse(chunk("abc"), event) + b"data: [DONE]\n\n")[1]
    assert answer == Answer(kind="error", error=kind, text_bytes=3, finished=False)


def test_error_members_that_say_nothing() -> None:
    """`error: null` and an empty one beside a good chunk are no errors."""
    empty: list[object] = [None, "", {}]
    for nothing in empty:
        assert stream(sse(chunk("a", error=nothing)))[1].kind == "success"


def test_error_with_status_200() -> None:
    """An error object is one whatever the status says; usage beside it counts."""
    body = {**error("Upstream failed", code=502), "usage": {"prompt_tokens": 3, "completion_tokens": 0}}
    assert CHAT.read_response(200, msgspec.json.encode(body)) == Answer(
        kind="error", error="overload", usage=Usage(input_tokens=3, output_tokens=0)
    )


# --------------------------------------------------------------------------------- objects


def test_sdk_response_object() -> None:
    """The SDK's own `ChatCompletion` gives the same answer as the bytes it was made from, and so does a dict."""
    raw = fixture("response.json")
    from_bytes = CHAT.read_response(200, (FIXTURES / "response.json").read_bytes())
    assert meter_object(ChatCompletion.model_validate(raw)) == from_bytes
    assert meter_object(raw) == from_bytes
    assert meter_object(UserDict(raw)) == from_bytes


def chunks_of(name: str) -> Iterator[dict[str, Any]]:
    for line in (FIXTURES / name).read_text().split("\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("name", ["usage.sse", "no_usage.sse", "azure.sse", "vllm_continuous.sse", "tools.sse"])
def test_sdk_chunks(name: str) -> None:
    """The SDK's chunk objects, and dicts, add up to what the stream's bytes add up to."""
    objects, dicts, wrapped = item_meter(), CHAT.item_meter(), CHAT.item_meter()
    for raw in chunks_of(name):
        item = ChatCompletionChunk.model_construct(**raw) if not raw["model"] else ChatCompletionChunk(**raw)
        objects.add(item)
        dicts.add(raw)
        wrapped.add(SimpleNamespace(type="chunk", chunk=item))
    assert objects.answer() == dicts.answer() == wrapped.answer() == STREAMS[name]


def test_raw_stream_items() -> None:
    """A function may stream the server's events as bytes or text; they are read like the stream they are."""
    data = (FIXTURES / "usage.sse").read_bytes()
    as_bytes, as_text = CHAT.item_meter(), CHAT.item_meter()
    for at in range(0, len(data), 50):
        as_bytes.add(data[at : at + 50])
    for event in data.decode().split("\n\n"):
        as_text.add(event + "\n\n")
    assert as_bytes.answer() == as_text.answer() == STREAMS["usage.sse"]


def test_items_of_unknown_shape() -> None:
    """A function that streams something else says nothing: `None`, not an answer without usage."""
    meter = CHAT.item_meter()
    for item in ("Hello", b"Hello", 7, None, object(), [1], {"text": "x"}, "\ud800"):
        meter.add(item)
    assert meter.answer() is None


def test_first_dialect_that_knows_an_item_reads_the_rest() -> None:
    """Of several dialects one counts, so nothing is counted twice, also when the first items told nothing."""
    meter = _AnyItems((CHAT, CHAT))
    meter.add("Hello")
    assert meter.answer() is None
    for raw in chunks_of("usage.sse"):
        meter.add(raw)
    assert meter.answer() == STREAMS["usage.sse"]
    assert len(meter._meters) == 1


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_http_responses(library: Any) -> None:
    """Responses of httpx and httpx2 are read by their shape; one that was not read yet says nothing."""
    body = (FIXTURES / "response.json").read_bytes()
    assert meter_object(library.Response(200, content=body)) == CHAT.read_response(200, body)
    failure = library.Response(429, json=error("x", code="rate_limit_exceeded"))
    assert meter_object(failure) == Answer(kind="error", error="rate_limit")
    assert meter_object(library.Response(200, content=b"<html>")) is None
    assert meter_object(library.Response(200, stream=library.ByteStream(body))) is None


def test_sdk_errors() -> None:
    """The SDK's status errors are told apart like the responses they come from."""
    body = error("x", type="insufficient_quota", code="insufficient_quota")
    response = httpx2.Response(429, json=body, request=httpx2.Request("POST", "https://llm.example/v1"))
    for part in (body, body["error"]):
        assert meter_object(openai.RateLimitError("x", response=response, body=part)) == Answer(
            kind="error", error="quota"
        )
    assert meter_object(ValueError("x")) is None


@pytest.mark.parametrize(
    "obj",
    [
        None,
        7,
        "choices",
        b"{}",
        [],
        object(),
        {"choices": "a, b"},
        {"error": "not found"},
        {"error": {"message": "ours"}},
        {"error": {"type": "ours"}},
        {"type": "error", "error": {"type": "overloaded_error", "message": "x"}},
        {"object": "response", "status": "failed", "error": {"code": "x", "message": "x"}},
        SimpleNamespace(status_code=200, content="text"),
    ],
)
def test_objects_of_other_shapes(obj: object) -> None:
    """What is not a completion says nothing, a function's own error dict and other providers' errors included."""
    assert CHAT.read_object(obj) is None


def test_hostile_objects() -> None:
    """An object whose attributes raise is passed over."""

    class Hostile:
        @property
        def choices(self) -> list[object]:
            raise RuntimeError("not now")

    assert meter_object(Hostile()) is None
