"""Answers and pieces of answers as values."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway.translate.kit import metered
from tests.wire.harness import anything, fixture, fixtures, mutate, pieces

from asgi_llm_guard.gateway.translate import Chunk, ChunkReader, Completion, Timings, ToolCall
from asgi_llm_guard.wire import dialect_named

STREAMS = [each for each in fixtures("stream") if each.dialect == "openai"]


def read(data: bytes, *, deployment: str | None = None) -> tuple[list[Chunk], ChunkReader]:
    reader = ChunkReader(deployment=deployment)
    return reader.feed(data) + reader.finish(), reader


def test_a_completion() -> None:
    """D7: an answer tells its text, calls, reason, thinking, refusal, usage and model, and keeps the whole of it."""
    raw = {
        "model": "gpt",
        "service_tier": "default",
        "choices": [
            {
                "message": {
                    "content": "So.",
                    "refusal": "no",
                    "reasoning_content": "hm",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    }
    timings = Timings(first_ms=1.5)
    completion = Completion.of(json.dumps(raw).encode(), deployment="east", timings=timings)

    assert completion.raw == raw
    assert (completion.text, completion.refusal, completion.reasoning) == ("So.", "no", "hm")
    assert completion.tool_calls == (ToolCall(index=0, id="a", name="now", arguments="{}"),)
    assert (completion.finish_reason, completion.model) == ("tool_calls", "gpt")
    assert (completion.deployment, completion.timings) == ("east", timings)
    assert completion.usage == dialect_named("openai").read_response(200, json.dumps(raw).encode()).usage


def test_a_completion_of_the_wire_tests() -> None:
    """The usage is what metering reads."""
    case = fixture("openai", "response.json")

    assert Completion.of(case.data).usage == case.spoken.read_response(200, case.data).usage


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", {"choices": []}, {"choices": [{"message": None}]}])
def test_what_is_no_completion(raw: Any) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="expected"):
        Completion.of(raw)


def test_a_stream_of_chunks() -> None:
    """The chunks of a stream tell pieces of calls by index, the reason once, and the usage at last."""
    chunks, reader = read(fixture("openai", "tools.sse").data, deployment="east")

    assert reader.done
    assert "".join(call.arguments for each in chunks for call in each.tool_calls) == '{"from":"Ulm"}'
    assert [call.name for each in chunks for call in each.tool_calls if call.name] == ["timetable"]
    assert [each.finish_reason for each in chunks if each.finish_reason] == ["tool_calls"]
    assert {each.deployment for each in chunks} == {"east"}
    assert chunks[-1].usage == metered("openai", fixture("openai", "tools.sse").data).usage


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_every_split_gives_the_same_chunks(case: Any) -> None:
    """Wherever the bytes part, the chunks are the same."""
    expected, whole = read(case.data)
    for at in range(1, len(case.data), 5):
        reader = ChunkReader()
        seen = reader.feed(case.data[:at]) + reader.feed(case.data[at:]) + reader.finish()
        assert (seen, reader.done, reader.ended) == (expected, whole.done, whole.ended)


def test_an_error_in_the_stream_is_a_chunk() -> None:
    """An error is the last chunk, and has what the provider said."""
    chunks, reader = read(b'data: {"error":{"message":"busy","code":"x"}}\n\ndata: {"choices":[]}\n\n')

    assert [each.error for each in chunks] == [{"message": "busy", "code": "x"}]
    assert (reader.done, reader.ended) == (False, True)
    assert read(b'data: {"error":"busy"}\n\n')[0][0].error == {"message": "busy"}


@pytest.mark.parametrize("data", [b"data: {oops\n\n", b"data: 7\n\n", b"data: {}\n\n", b"data: " + b"x" * (1 << 21)])
def test_what_cannot_be_read_is_an_error(data: bytes) -> None:
    """Something that is no chunk ends the stream with an error."""
    chunks, reader = read(data)

    assert [each.error is not None for each in chunks] == [True]
    assert reader.ended


def test_other_choices_are_raw_only() -> None:
    """A piece of another choice adds nothing to the first."""
    chunk = Chunk.of({"choices": [{"index": 1, "delta": {"content": "b"}, "finish_reason": "stop"}]})

    assert (chunk.text, chunk.finish_reason) == ("", None)
    assert chunk.raw["choices"][0]["index"] == 1


@given(value=anything("choices", "message", "delta", "tool_calls", "function", "index", "usage", "error"))
def test_values_of_any_shape(value: Any) -> None:
    """Members of any type give a value or a `ValueError`."""
    for made in (value, {"choices": value}, {"choices": [{"delta": value, "message": value}]}):
        for kind in (Completion, Chunk):
            with contextlib.suppress(ValueError):
                assert kind.of(made).raw == made


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_garbage_never_raises(data: st.DataObject, seed: int) -> None:
    """Whatever the bytes, chunks come out, and nothing after an error."""
    rng = random.Random(seed)
    damaged = mutate(rng, data.draw(st.sampled_from(STREAMS)).data)
    reader = ChunkReader()
    chunks = [chunk for piece in pieces(damaged, [rng.randrange(len(damaged) + 1)]) for chunk in reader.feed(piece)]
    chunks += reader.finish()

    assert all(chunk.error is None for chunk in chunks[:-1])
