"""Streams of one API as the other's: wherever they are cut, whatever they hold."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway.translate.kit import metered
from tests.gateway.translate.test_answers import OTHER, comparable
from tests.wire.harness import Fixture, fixture, fixtures, mutate, pieces

from asgi_llm_guard.decision import Denied
from asgi_llm_guard.gateway.translate import (
    ChunksToEvents,
    EventsToChunks,
    Transcoder,
    answer_to_anthropic,
    answer_to_openai,
)
from asgi_llm_guard.wire.refusals import stream_error

STREAMS = [each for each in fixtures("stream") if each.dialect in ("anthropic", "openai")]
BILLED_BESIDE = ("compaction_advisor.sse", "fallback.sse")
"""Streams of Anthropic's that other models took part in, which only a request that the other API has not can ask for."""


def transcoder(spoken: str) -> Transcoder:
    return EventsToChunks(created=5, include_usage=True) if spoken == "anthropic" else ChunksToEvents()


def run(spoken: str, chunks: Iterable[bytes]) -> bytes:
    stream = transcoder(spoken)
    written = b"".join([stream.feed(chunk) for chunk in chunks]) + stream.finish()
    assert stream.ended
    return written


def sse(*values: Any) -> bytes:
    """A stream of these values: events with a name where they have a type, and text as it is."""
    written = b""
    for value in values:
        if isinstance(value, dict):
            name = f"event: {value['type']}\n" if "type" in value else ""
            written += f"{name}data: {json.dumps(value)}\n\n".encode()
        else:
            written += f"data: {value}\n\n".encode()
    return written


def read(data: bytes) -> list[Any]:
    """The values of a stream, each event whole and named by its type."""
    assert data.endswith(b"\n\n")
    values = []
    for event in data.decode().split("\n\n")[:-1]:
        lines = event.split("\n")
        if lines[0].startswith(":"):
            continue
        data_line = lines[-1].removeprefix("data: ")
        value = data_line if data_line == "[DONE]" else json.loads(data_line)
        if len(lines) == 2 and isinstance(value, dict):
            assert lines[0] == f"event: {value['type']}"
        values.append(value)
    return values


def chunk(choice: dict[str, Any] | None = None, **delta: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": None, **(choice or {})}]
    return {"id": "c1", "object": "chat.completion.chunk", "model": "gpt", "choices": choices}


def tool(index: int, identifier: str | None = None, name: str | None = None, arguments: str | None = None) -> Any:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"index": index, "function": function} | ({} if identifier is None else {"id": identifier})


START: dict[str, Any] = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "usage": {"input_tokens": 7, "output_tokens": 1},
    },
}


def ended(stop: str = "end_turn", **delta: Any) -> list[dict[str, Any]]:
    return [
        {"type": "message_delta", "delta": {"stop_reason": stop, **delta}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]


def block(index: int, opened: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": opened},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


# -------------------------------------------------------------------------- every fixture


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_every_split_gives_the_same(case: Fixture) -> None:
    """In one piece, in two wherever they part, and byte by byte: the same bytes."""
    expected = run(case.dialect, [case.data])

    read(expected)
    assert run(case.dialect, [bytes([byte]) for byte in case.data]) == expected
    for at in range(1, len(case.data), 3):
        assert run(case.dialect, [case.data[:at], case.data[at:]]) == expected, f"split at {at}"


@pytest.mark.parametrize("case", [each for each in STREAMS if each.name not in BILLED_BESIDE], ids=str)
def test_both_sides_of_a_stream_meter_alike(case: Fixture) -> None:
    """Usage with all its buckets, model and ending are the same to the meters of both dialects."""
    before = metered(case.dialect, case.data)
    after = metered(OTHER[case.dialect], run(case.dialect, [case.data]))

    if before.finished:
        assert comparable(after.usage) == comparable(before.usage)
        assert (after.finished, after.error) == (True, None)
    else:
        assert after.kind == "error"
        assert after.error == (before.error or "other")
    assert after.model == before.model or not before.text_bytes
    assert after.text_bytes == before.text_bytes or case.name in ("two_choices.sse", "server_tool.sse")


@pytest.mark.parametrize("spoken", ["anthropic", "openai"])
def test_memory_is_bounded(spoken: str) -> None:
    """Pieces of an answer are not kept, however long it becomes."""
    stream = transcoder(spoken)
    text = {"type": "text_delta", "text": "x" * 900}
    piece = sse(chunk(content="x" * 900))
    if spoken == "anthropic":
        piece = sse({"type": "content_block_delta", "index": 0, "delta": text})
        stream.feed(
            sse(START, {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        )
    stream.feed(piece)
    size = 0
    tracemalloc.start()
    try:
        for _ in range(500):
            size += len(stream.feed(piece))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 450_000
    assert kept < 50_000


# ------------------------------------------------------------------------------ to OpenAI


def test_a_stream_of_anthropic_for_openai() -> None:
    """D7: text, thinking with its signature, calls by their index and piece, the reason, usage, and the end."""
    data = sse(
        START,
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "hm"},
            {"type": "signature_delta", "signature": "sig"},
        ),
        {"type": "ping"},
        *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "So."}),
        *block(
            2,
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {}},
            {"type": "input_json_delta", "partial_json": ""},
            {"type": "input_json_delta", "partial_json": '{"city":'},
            {"type": "input_json_delta", "partial_json": '"Ulm"}'},
        ),
        {"type": "an_event_of_tomorrow", "value": 1},
        *block(3, {"type": "tool_use", "id": "t2", "name": "now", "input": {}}),
        *ended("tool_use"),
    )
    written = run("anthropic", [data])
    values = read(written)

    assert values[-1] == "[DONE]"
    assert {(each["id"], each["object"], each["created"], each["model"]) for each in values[:-1]} == {
        ("msg_1", "chat.completion.chunk", 5, "claude")
    }
    assert [each["choices"][0]["delta"] for each in values[:-3]] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "sig"}]},
        {"content": "So."},
        {
            "tool_calls": [
                {"index": 0, "id": "t1", "type": "function", "function": {"name": "weather", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Ulm"}'}}]},
        {"tool_calls": [{"index": 1, "id": "t2", "type": "function", "function": {"name": "now", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
    ]
    assert values[-3]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]
    assert values[-2]["choices"] == []
    assert values[-2]["usage"]["total_tokens"] == 12
    assert b": ping\n\n" in written


def test_usage_comes_only_if_asked() -> None:
    """Without `include_usage` the stream ends without the chunk that only reports."""
    stream = EventsToChunks()
    values = read(stream.feed(sse(START, *ended())))

    assert [each["choices"][0]["finish_reason"] for each in values[:-1]] == [None, "stop"]
    assert values[-1] == "[DONE]"


@pytest.mark.parametrize(
    "events, kind",
    [
        ([{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}], "overload"),
        ([{"type": "error", "error": {"type": "rate_limit_error", "message": "Slow"}}], "rate_limit"),
        (
            [{"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long"}}],
            "context_overflow",
        ),
        (["{oops"], "other"),
        (["[]"], "other"),
        ([{"type": "content_block_delta", "index": 0, "delta": None}], "other"),
        ([{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 5}}], "other"),
        ([{"type": "message_start", "message": None}], "other"),
        ([], "other"),
        (["x" * (1 << 20)], "other"),
    ],
)
def test_what_ends_a_stream_of_anthropic_early(events: list[Any], kind: str) -> None:
    """An error, something unreadable and a stream that breaks off end with one error, and nothing comes after it."""
    data = sse(START, *block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "So"})[:2], *events)
    written = run("anthropic", [data, sse(*ended())] if events else [data])
    values = read(written)

    assert values[1]["choices"][0]["delta"] == {"content": "So"}
    assert list(values[-1]) == ["error"]
    assert len(values) == 3
    assert metered("openai", written).error == kind


def test_events_before_the_start_are_errors() -> None:
    """A stream that does not begin with its message cannot be told."""
    piece = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}}
    assert list(read(run("anthropic", [sse(piece)]))[0]) == ["error"]
    assert list(read(run("anthropic", [sse(*ended())]))[0]) == ["error"]
    assert list(read(run("anthropic", [sse(START, START)]))[1]) == ["error"]
    assert list(read(run("anthropic", [b""]))[0]) == ["error"]


def test_refusals_in_a_stream_of_anthropic() -> None:
    """Why the provider refused is in the last chunk, beside the reason."""
    why = {"type": "refusal", "explanation": "unsafe"}
    values = read(run("anthropic", [sse(START, *ended("refusal", stop_details=why))]))

    assert values[1]["choices"] == [{"index": 0, "delta": {"refusal": "unsafe"}, "finish_reason": "content_filter"}]


# ---------------------------------------------------------------------------- to Anthropic


def test_a_stream_of_openai_for_anthropic() -> None:
    """D7: text, thinking, calls in blocks of their own, the reason, usage, and the end."""
    data = sse(
        {"id": "", "model": "", "object": "chat.completion.chunk", "choices": [], "prompt_filter_results": []},
        chunk(role="assistant", content=""),
        chunk(reasoning_content="hm"),
        chunk(content="So"),
        chunk(content="."),
        chunk(tool_calls=[tool(0, "t1", "weather", "")]),
        chunk(tool_calls=[tool(0, None, None, '{"city":')]),
        chunk(tool_calls=[tool(0, None, None, '"Ulm"}')]),
        chunk(tool_calls=[tool(1, "t2", "now", "{}")]),
        chunk({"finish_reason": "tool_calls"}),
        {**chunk(), "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}},
        "[DONE]",
    )
    values = read(run("openai", [data]))

    unknown = {"input_tokens": None, "output_tokens": None}
    started = {"id": "c1", "type": "message", "role": "assistant", "model": "gpt", "content": []}
    assert values == [
        {
            "type": "message_start",
            "message": {**started, "stop_reason": None, "stop_sequence": None, "usage": unknown},
        },
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "hm"},
        ),
        *block(
            1,
            {"type": "text", "text": ""},
            {"type": "text_delta", "text": "So"},
            {"type": "text_delta", "text": "."},
        ),
        *block(
            2,
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {}},
            {"type": "input_json_delta", "partial_json": '{"city":'},
            {"type": "input_json_delta", "partial_json": '"Ulm"}'},
        ),
        *block(
            3,
            {"type": "tool_use", "id": "t2", "name": "now", "input": {}},
            {"type": "input_json_delta", "partial_json": "{}"},
        ),
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {
                "input_tokens": 9,
                "cache_creation_input_tokens": None,
                "cache_read_input_tokens": None,
                "output_tokens": 4,
            },
        },
        {"type": "message_stop"},
    ]


@pytest.mark.parametrize(
    "pieces_of_calls",
    [
        [[tool(0, "a", "x", "{}")], [tool(0, "b", "y", "{}")]],  # all calls have the same index
        [[tool(0, "a", "x", "{")], [tool(0, "a", None, "}")], [tool(1, "b", "y", "{}")]],  # the id comes again
        [[tool(0, "a", "x", "{}"), tool(1, "b", "y", "{}")]],  # both in one chunk
        [[tool(0, "", "x", "{}")], [tool(1, "", "y", "{}")]],  # without ids
    ],
)
def test_ways_of_servers_with_calls(pieces_of_calls: list[Any]) -> None:
    """Calls are told apart however a server numbers them."""
    data = sse(*(chunk(tool_calls=calls) for calls in pieces_of_calls), chunk({"finish_reason": "stop"}), "[DONE]")
    values = read(run("openai", [data]))

    starts = [each["content_block"] for each in values if each["type"] == "content_block_start"]
    assert [start["name"] for start in starts] == ["x", "y"]
    assert len({start["id"] for start in starts}) == 2
    assert "".join(each["delta"]["partial_json"] for each in values if each["type"] == "content_block_delta") == "{}{}"
    assert values[-2]["delta"]["stop_reason"] == "tool_use"


def test_calls_that_take_turns_cannot_be_told() -> None:
    """A call that goes on after another one has begun ends the stream with an error that says it."""
    data = sse(
        chunk(tool_calls=[tool(0, "a", "x", "{")]),
        chunk(tool_calls=[tool(1, "b", "y", "{")]),
        chunk(tool_calls=[tool(0, None, None, "}")]),
    )
    values = read(run("openai", [data]))

    assert values[-1]["type"] == "error"
    assert "tool call" in values[-1]["error"]["message"]


@pytest.mark.parametrize(
    "chunks, kind",
    [
        ([{"error": {"message": "busy", "code": "server_is_overloaded"}}], "overload"),
        ([{"error": {"message": "slow", "code": 429}}], "rate_limit"),
        ([{"error": {"message": "big", "code": "context_length_exceeded"}}], "context_overflow"),
        (["{oops"], "other"),
        (["7"], "other"),
        ([{"choices": [{"index": 0, "delta": 5}]}], "other"),
        ([chunk(tool_calls=[tool(0, "a", "x"), {"index": 0, "function": {"arguments": 5}}])], "other"),
        ([chunk({"finish_reason": "error"})], "other"),
        ([], "other"),
        (["x" * (1 << 20)], "other"),
    ],
)
def test_what_ends_a_stream_of_openai_early(chunks: list[Any], kind: str) -> None:
    """An error, something unreadable and a stream that breaks off end with one error, and nothing comes after it."""
    data = sse(chunk(content="So"), *chunks)
    rest = [sse(chunk({"finish_reason": "stop"}), "[DONE]")] if chunks else []
    written = run("openai", [data, *rest])
    values = read(written)

    assert values[2]["delta"] == {"type": "text_delta", "text": "So"}
    assert values[-1]["type"] == "error"
    assert [each["type"] for each in values].count("error") == 1
    assert metered("anthropic", written).error == kind


def test_an_end_without_done() -> None:
    """Servers that end without `[DONE]` after the reason have come to the end; without a reason they broke off."""
    assert read(run("openai", [sse(chunk(content="x"), chunk({"finish_reason": "stop"}))]))[-1] == {
        "type": "message_stop"
    }
    assert read(run("openai", [sse("[DONE]")]))[-1]["type"] == "error"
    assert read(run("openai", [b""]))[-1]["type"] == "error"


def test_comments_keep_the_connection_alive() -> None:
    """A comment that a server sends while it works is a ping, once the message has begun."""
    data = (
        b": working\n\n" + sse(chunk(content="x")) + b": working\n\n" + sse(chunk({"finish_reason": "stop"}), "[DONE]")
    )
    kinds = [each["type"] for each in read(run("openai", [data]))]

    assert kinds[0] == "message_start"
    assert kinds.count("ping") == 1


def test_only_the_first_choice_is_told() -> None:
    """What other choices say does not mix with it, nor does their end end it."""
    other = {"index": 1, "finish_reason": "length"}
    assert read(run("openai", [sse(chunk(content="a"), chunk(other, content="b"))]))[-1]["type"] == "error"
    other = {"index": 1}
    data = sse(
        chunk(content="a"), chunk(other, content="b"), chunk(content="c"), chunk({"finish_reason": "stop"}), "[DONE]"
    )
    values = read(run("openai", [data]))

    assert "".join(each["delta"]["text"] for each in values if each["type"] == "content_block_delta") == "ac"


def test_the_last_report_counts() -> None:
    """Reports replace each other, and chunks without one take none away."""
    reports = [{"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count} for count in (1, 4)]
    data = sse(
        {**chunk(content="a"), "usage": reports[0]},
        {**chunk({"finish_reason": "stop"}), "usage": reports[1]},
        {**chunk(), "choices": [], "usage": None},
        "[DONE]",
    )

    assert read(run("openai", [data]))[-2]["usage"]["output_tokens"] == 4


def test_refusals_in_a_stream_of_openai() -> None:
    """A refusal in the model's own words is text, and the reason says that it is one."""
    values = read(
        run("openai", [sse(chunk(refusal="I will"), chunk(refusal=" not."), chunk({"finish_reason": "stop"}))])
    )
    message = put_together(values)

    assert message["content"] == [{"type": "text", "text": "I will not."}]
    assert message["stop_reason"] == "refusal"


def test_thinking_that_is_signed_keeps_its_signature() -> None:
    """A gateway behind this one tells the signature beside the thinking, and it comes out as Anthropic's again."""
    thought = {"type": "thinking", "thinking": "", "signature": ""}
    deltas = [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "sig"}]
    there = run("anthropic", [sse(START, *block(0, thought, *deltas), *ended())])

    assert put_together(read(run("openai", [there])))["content"] == [{**thought, "thinking": "hm", "signature": "sig"}]


def test_content_in_parts() -> None:
    """Servers that stream content as parts, thinking among them, are read as well."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    data = sse(
        chunk(content=[thinking]), chunk(content=[{"type": "text", "text": "So."}]), chunk({"finish_reason": "stop"})
    )

    assert put_together(read(run("openai", [data])))["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "So."},
    ]


def test_stop_sequences_in_streams() -> None:
    """The sequence that ended an answer passes, both ways."""
    there = run("anthropic", [sse(START, *ended("stop_sequence", stop_sequence="END"))])
    message = put_together(read(run("openai", [there])))

    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def test_hidden_thinking_passes() -> None:
    """Thinking that the provider hides can be sent back."""
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    values = read(run("anthropic", [sse(START, *block(0, hidden), *ended())]))

    assert values[1]["choices"][0]["delta"] == {"thinking_blocks": [hidden]}


def test_arguments_that_come_at_once() -> None:
    """A call that begins with its arguments keeps them."""
    call = {"type": "tool_use", "id": "t", "name": "x", "input": {"a": 1}}
    values = read(run("anthropic", [sse(START, *block(0, call), *ended("tool_use"))]))

    assert accumulated(values)["calls"] == [{"id": "t", "name": "x", "arguments": '{"a":1}'}]


@pytest.mark.parametrize("spoken", ["anthropic", "openai"])
def test_the_guards_own_ending_passes_as_it_is(spoken: str) -> None:
    """A refusal in the client's dialect, which ends a stream that is cut, keeps its code and what it says."""
    denied = Denied(
        policy="day", code="budget_exhausted", status=402, retry=False, message="The budget of the day is spent."
    )
    ending = stream_error(denied, OTHER[spoken], "sse")
    begun = sse(START) if spoken == "anthropic" else sse(chunk(content="a"))

    written = run(spoken, [begun + ending, sse(*ended()) if spoken == "anthropic" else sse("[DONE]")])

    assert read(written)[-1] == read(ending)[-1]
    assert metered(OTHER[spoken], written).error == "quota"


# ------------------------------------------------------------------- streams and answers

texts = st.text(min_size=1, max_size=12)
contents = st.lists(
    st.tuples(st.just("text"), texts)
    | st.tuples(st.just("thinking"), texts)
    | st.tuples(st.just("tool_use"), st.dictionaries(texts, texts, max_size=2)),
    max_size=4,
)


def in_pieces(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(3)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(content=contents, seed=st.integers(0, 2**32))
def test_a_stream_of_anthropic_adds_up_to_its_answer(content: list[tuple[str, Any]], seed: int) -> None:
    """What OpenAI's client puts together of a stream is what it gets of the same message whole."""
    rng = random.Random(seed)
    blocks: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for index, (kind, value) in enumerate(content):
        if kind == "tool_use":
            told = {"type": kind, "id": f"t{index}", "name": "x"}
            blocks.append({**told, "input": value})
            pieces_of = in_pieces(rng, json.dumps(value)) if value else []
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces_of]
            events += block(index, {**told, "input": {}}, *deltas)
        else:
            signed = {"signature": ""} if kind == "thinking" else {}
            blocks.append({"type": kind, kind: value, **signed})
            deltas = [{"type": f"{kind}_delta", kind: piece} for piece in in_pieces(rng, value)]
            events += block(index, {"type": kind, kind: "", **signed}, *deltas)
    stop = "tool_use" if any(kind == "tool_use" for kind, _ in content) else "max_tokens"
    whole = {
        **START["message"],
        "content": blocks,
        "stop_reason": stop,
        "usage": {"input_tokens": 7, "output_tokens": 5},
    }
    data = sse(START, *events, *ended(stop))

    streamed = accumulated(read(run("anthropic", pieces(data, [rng.randrange(len(data)) for _ in range(5)]))))

    answer = json.loads(answer_to_openai(200, json.dumps(whole).encode(), created=5)[1])
    message = answer["choices"][0]["message"]
    assert streamed["content"] == (message["content"] or "")
    assert streamed["reasoning"] == message.get("reasoning_content", "")
    assert [(each["id"], each["name"], json.loads(each["arguments"])) for each in streamed["calls"]] == [
        (each["id"], each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in message.get("tool_calls", ())
    ]
    assert streamed["finish"] == answer["choices"][0]["finish_reason"]
    assert streamed["usage"] == answer["usage"]


def accumulated(values: list[Any]) -> dict[str, Any]:
    """As a client of OpenAI's puts a stream together."""
    total: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": None, "usage": None}
    for value in values[:-1]:
        total["usage"] = value.get("usage") or total["usage"]
        for choice in value["choices"]:
            delta = choice["delta"]
            total["content"] += delta.get("content") or ""
            total["reasoning"] += delta.get("reasoning_content") or ""
            total["finish"] = choice["finish_reason"] or total["finish"]
            for each in delta.get("tool_calls", ()):
                if each["index"] == len(total["calls"]):
                    total["calls"].append({"id": each["id"], "name": each["function"]["name"], "arguments": ""})
                total["calls"][each["index"]]["arguments"] += each["function"]["arguments"]
    assert values[-1] == "[DONE]"
    return total


@given(content=contents, seed=st.integers(0, 2**32))
def test_a_stream_of_openai_adds_up_to_its_answer(content: list[tuple[str, Any]], seed: int) -> None:
    """What Anthropic's client puts together of a stream is what it gets of the same completion whole."""
    rng = random.Random(seed)
    ordered = sorted(content, key=lambda each: ("thinking", "text", "tool_use").index(each[0]))
    chunks = []
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for kind, value in ordered:
        if kind == "tool_use":
            index, told = len(message["tool_calls"]), json.dumps(value)
            first, *rest = in_pieces(rng, told)
            chunks.append(chunk(tool_calls=[tool(index, f"t{index}", "x", first)]))
            chunks += [chunk(tool_calls=[tool(index, None, None, piece)]) for piece in rest]
            message["tool_calls"].append(
                {"id": f"t{index}", "type": "function", "function": {"name": "x", "arguments": told}}
            )
        else:
            member = "content" if kind == "text" else "reasoning_content"
            message[member] += value
            deltas: list[dict[str, Any]] = [{member: piece} for piece in in_pieces(rng, value)]
            chunks += [chunk(None, **delta) for delta in deltas]
    finish = "tool_calls" if message["tool_calls"] else "length"
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    choice = {"index": 0, "message": message, "finish_reason": finish}
    whole = {"id": "c1", "object": "chat.completion", "model": "gpt", "choices": [choice], "usage": usage}
    data = sse(
        chunk(role="assistant"),
        *chunks,
        chunk({"finish_reason": finish}),
        {**chunk(), "choices": [], "usage": usage},
        "[DONE]",
    )

    streamed = put_together(read(run("openai", pieces(data, [rng.randrange(len(data)) for _ in range(5)]))))

    assert streamed == json.loads(answer_to_anthropic(200, json.dumps(whole).encode())[1])


def put_together(values: list[Any]) -> dict[str, Any]:
    """As a client of Anthropic's puts a stream together."""
    message: dict[str, Any] = {}
    arguments = ""
    for value in values:
        kind = value["type"]
        if kind == "message_start":
            message = value["message"]
        elif kind == "content_block_start":
            assert value["index"] == len(message["content"])
            message["content"].append(value["content_block"])
            arguments = ""
        elif kind == "content_block_delta":
            opened, delta = message["content"][value["index"]], value["delta"]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                member = delta["type"].removesuffix("_delta")
                opened[member] += delta[member]
        elif kind == "content_block_stop":
            opened = message["content"][value["index"]]
            if opened["type"] == "tool_use":
                opened["input"] = json.loads(arguments or "{}")
        elif kind == "message_delta":
            message |= value["delta"]
            message["usage"] = value["usage"]
    assert values[-1] == {"type": "message_stop"}
    return message


# --------------------------------------------------------------------------------- garbage


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_garbage_never_raises(data: st.DataObject, seed: int) -> None:
    """Whatever the bytes, and wherever they part, every event that is written can be read, and the last one ends it."""
    rng = random.Random(seed)
    sample = data.draw(st.sampled_from(STREAMS))
    damaged = mutate(rng, sample.data)
    chunks = pieces(damaged, [rng.randrange(len(damaged) + 1) for _ in range(4)])
    for spoken in ("anthropic", "openai"):
        values = read(run(spoken, chunks))
        last = values[-1]
        assert last == "[DONE]" or "error" in last or last == {"type": "message_stop"}
        answer = metered(OTHER[spoken], run(spoken, chunks))
        assert answer.unread == 0
        assert answer.finished or answer.kind == "error"


@given(chunks=st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_at_all(chunks: list[bytes]) -> None:
    """Bytes that are no stream end with an error."""
    for spoken in ("anthropic", "openai"):
        assert "error" in read(run(spoken, chunks))[-1]


def test_halves_of_surrogate_pairs_pass() -> None:
    """Servers written in Python split a character over two events: both halves arrive, as they were escaped."""
    data = rb'data: {"choices":[{"index":0,"delta":{"content":"\ud83d"}}]}' + b"\n\n"
    data += rb'data: {"choices":[{"index":0,"delta":{"content":"\ude00"}}]}' + b"\n\n"

    written = run("openai", [data])

    assert rb'"\ud83d"' in written
    assert rb'"\ude00"' in written


def test_a_fixture_of_tools_keeps_its_calls() -> None:
    """The stream of calls of the wire tests has the same calls to Anthropic's clients."""
    values = read(run("openai", [fixture("openai", "tools.sse").data]))

    assert [each["content_block"]["name"] for each in values if each["type"] == "content_block_start"] == ["timetable"]
