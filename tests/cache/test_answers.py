"""Which answers may be kept, in all dialects, as a whole and as a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cache.kit import answer_of, chat

from asgi_llm_guard.cache.answers import ProviderAnswer, unfit, unfit_value

TOOL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def gemini(reason: str | None = "STOP", **part: Any) -> dict[str, Any]:
    candidate = {"content": {"parts": [{"text": "Hi", **part}], "role": "model"}, "index": 0}
    return {"candidates": [candidate | ({} if reason is None else {"finishReason": reason})]}


def claude(reason: str | None = "end_turn", **block: Any) -> dict[str, Any]:
    return {"type": "message", "content": [{"type": "text", "text": "Hi", **block}], "stop_reason": reason}


def responses(status: str = "completed", *output: dict[str, Any], **fields: Any) -> dict[str, Any]:
    message = {"type": "message", "content": [{"type": "output_text", "text": "Hi"}]}
    return {"object": "response", "status": status, "error": None, "output": [message, *output], **fields}


def converse(reason: str = "end_turn", **block: Any) -> dict[str, Any]:
    return {"output": {"message": {"content": [{"text": "Hi", **block}]}}, "stopReason": reason}


def cohere(reason: str = "COMPLETE", **message: Any) -> dict[str, Any]:
    return {"message": {"content": [{"type": "text", "text": "Hi"}], **message}, "finish_reason": reason}


def ollama(**fields: Any) -> dict[str, Any]:
    return {"message": {"content": "Hi"}, "done": True, "done_reason": "stop", **fields}


FIT: dict[str, dict[str, Any]] = {
    "chat": chat(),
    "chat, two choices": chat(choices=[{"finish_reason": "stop", "message": {"content": "a"}}] * 2),
    "chat, no tools called": chat(message={"tool_calls": None, "refusal": None}),
    "completion": {"choices": [{"text": "Hi", "finish_reason": "stop", "index": 0}]},
    "claude": claude(),
    "claude, stop sequence": claude("stop_sequence"),
    "claude, thinking": claude()
    | {"content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "Hi"}]},
    "gemini": gemini(),
    "responses": responses(),
    "responses, with tools to call": responses(tools=[{"type": "function", "name": "f"}], parallel_tool_calls=True),
    "converse": converse(),
    "cohere": cohere(),
    "ollama": ollama(),
    "ollama generate": {"response": "Hi", "done": True, "done_reason": "stop"},
    "embeddings": {"object": "list", "data": [{"object": "embedding", "embedding": [0.1], "index": 0}]},
    "embeddings of cohere": {"embeddings": {"float": [[0.1]]}},
    "embeddings of gemini": {"embedding": {"values": [0.1]}},
}

UNFIT: dict[str, dict[str, Any]] = {
    "chat, tool call": chat(message={"tool_calls": [TOOL]}, choice={"finish_reason": "tool_calls"}),
    "chat, tool call that says stop": chat(message={"tool_calls": [TOOL]}),
    "chat, function call": chat(message={"function_call": {"name": "f"}}),
    "chat, cut": chat(choice={"finish_reason": "length"}),
    "chat, filtered": chat(choice={"finish_reason": "content_filter"}),
    "chat, not ended": chat(choice={"finish_reason": None}),
    "chat, second choice not ended": chat(
        choices=[{"finish_reason": "stop", "message": {"content": "a"}}, {"finish_reason": None, "message": {}}]
    ),
    "chat, second choice without an ending": chat(
        choices=[{"finish_reason": "stop", "message": {"content": "a"}}, {"message": {"content": "b"}}]
    ),
    "gemini, second candidate without an ending": {
        "candidates": [*gemini()["candidates"], {"index": 1, "content": {"parts": [{"text": "half"}]}}]
    },
    "chat, refused": chat(message={"refusal": "I cannot"}),
    "chat, empty": chat(""),
    "chat, no choices": chat(choices=[]),
    "chat, error inside": chat(choice={"error": {"code": 502}}),
    "error": {"error": {"message": "overloaded"}},
    "claude, error": {"type": "error", "error": {"type": "overloaded_error"}},
    "claude, tool": claude("tool_use") | {"content": [{"type": "tool_use", "name": "f", "input": {}}]},
    "claude, server tool": claude() | {"content": [{"type": "server_tool_use"}, {"type": "text", "text": "Hi"}]},
    "claude, cut": claude("max_tokens"),
    "claude, paused": claude("pause_turn"),
    "claude, refused": claude("refusal"),
    "claude, not ended": claude(None),
    "gemini, tool": gemini(functionCall={"name": "f"}),
    "gemini, found by a search": {
        "candidates": [gemini()["candidates"][0] | {"groundingMetadata": {"webSearchQueries": ["news"]}}]
    },
    "chat, found by a search": chat(message={"annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}]}),
    "gemini, cut": gemini("MAX_TOKENS"),
    "gemini, blocked": gemini("SAFETY"),
    "gemini, not ended": gemini(None),
    "gemini, prompt blocked": {"promptFeedback": {"blockReason": "SAFETY"}},
    "responses, tool": responses("completed", {"type": "function_call", "name": "f"}),
    "responses, web search": responses("completed", {"type": "web_search_call"}),
    "responses, incomplete": responses("incomplete", incomplete_details={"reason": "max_output_tokens"}),
    "responses, failed": responses("failed", error={"code": "server_error"}),
    "responses, in progress": responses("in_progress"),
    "converse, tool": converse("tool_use", toolUse={"name": "f"}),
    "converse, cut": converse("max_tokens"),
    "cohere, tool": cohere("TOOL_CALL", tool_calls=[TOOL]),
    "cohere, cut": cohere("MAX_TOKENS"),
    "ollama, tool": ollama(message={"content": "", "tool_calls": [{"function": {}}]}),
    "ollama, not done": ollama(done=False),
    "choices that are none": {"choices": [1, None], "finish_reason": None},
    "images": {"created": 1, "data": [{"url": "https://example.com/1.png"}]},
    "models": {"object": "list", "data": [{"id": "gpt-4o"}]},
    "nothing": {},
}


@pytest.mark.parametrize("name", FIT)
def test_complete_answers_are_kept(name: str) -> None:
    """C13: an answer that says that it is complete may be kept, whatever its dialect."""
    assert unfit(answer_of(FIT[name]), stream=False) is None


@pytest.mark.parametrize("name", UNFIT)
def test_others_are_not(name: str) -> None:
    """C13, T8: an answer that calls a tool, was cut, refused or filtered, is empty or an error is not kept; nor is
    one that says nothing of the kind."""
    assert unfit(answer_of(UNFIT[name]), stream=False)


@pytest.mark.parametrize("status", [199, 201, 204, 301, 400, 429, 500, 529])
def test_only_a_plain_success_is_kept(status: int) -> None:
    """T8: whatever its body says, an answer with another status than 200 is not kept."""
    assert unfit(answer_of(chat(), status=status), stream=False) == f"it has the status {status}"


@pytest.mark.parametrize(
    "kind, body",
    [
        ("text/html", b"<p>Hi</p>"),
        ("application/json", b"{"),
        ("application/json", b"[]"),
        ("application/json", b'"stop"'),
        ("application/json", b"\xff"),
        ("application/json", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        ("application/vnd.amazon.eventstream", b"\x00\x00\x00\x10"),
        ("audio/mpeg", b"ID3"),
        ("", b""),
    ],
)
def test_what_cannot_be_judged_is_not_kept(kind: str, body: bytes) -> None:
    """T8: an answer that cannot be read is not kept."""
    for stream in (False, True):
        assert unfit(ProviderAnswer(status=200, content_type=kind, body=body), stream=stream)


# ------------------------------------------------------------------------------------- streams


def sse(*events: dict[str, Any] | str) -> ProviderAnswer:
    data = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = b"".join(b"data: %s\n\n" % event.encode() for event in data)
    return ProviderAnswer(status=200, content_type="text/event-stream; charset=utf-8", body=body)


def chunk(content: str | None, reason: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": content, **delta}, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


USAGE = {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}}
CHAT = [chunk("H"), chunk("i"), chunk(None, "stop"), USAGE, "[DONE]"]
CLAUDE: list[dict[str, Any] | str] = [
    {"type": "message_start", "message": {"stop_reason": None, "content": []}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}},
    {"type": "message_stop"},
]
RESPONSES: list[dict[str, Any] | str] = [
    {"type": "response.created", "response": responses("in_progress") | {"output": []}},
    {"type": "response.output_item.added", "item": {"type": "message", "status": "in_progress", "content": []}},
    {"type": "response.output_text.delta", "delta": "Hi"},
    {"type": "response.completed", "response": responses()},
]
GEMINI: list[dict[str, Any] | str] = [gemini(None), gemini("STOP")]
STREAMS: dict[str, list[Any]] = {"chat": CHAT, "claude": CLAUDE, "responses": RESPONSES, "gemini": GEMINI}


@pytest.mark.parametrize("name", STREAMS)
def test_complete_streams_are_kept(name: str) -> None:
    """C13: a stream that came to its own end may be kept."""
    assert unfit(sse(*STREAMS[name]), stream=True) is None


@pytest.mark.parametrize("name", STREAMS)
def test_no_beginning_of_a_stream_is_kept(name: str) -> None:
    """T8: a stream that breaks off anywhere before its last event is not kept."""
    for count in range(len(STREAMS[name])):
        assert unfit(sse(*STREAMS[name][:count]), stream=True), count


@given(st.data())
def test_no_cut_stream_is_kept(data: st.DataObject) -> None:
    """T8: nor one that breaks off inside an event."""
    for events in STREAMS.values():
        whole = sse(*events)
        cut = data.draw(st.integers(0, len(whole.body) - 2))
        assert unfit(ProviderAnswer(status=200, content_type="text/event-stream", body=whole.body[:cut]), stream=True)


@pytest.mark.parametrize(
    "events",
    [
        [chunk("Hi"), chunk(None, tool_calls=[TOOL]), chunk(None, "stop"), "[DONE]"],
        [chunk("Hi"), chunk(None, "tool_calls"), "[DONE]"],
        [chunk("Hi"), chunk(None, "length"), "[DONE]"],
        [chunk("Hi"), {"error": {"message": "overloaded"}}, chunk(None, "stop"), "[DONE]"],
        [chunk("Hi"), chunk("Ho", index=1), chunk(None, "stop"), "[DONE]"],
        [chunk(""), chunk(None, "stop"), "[DONE]"],
        ["[DONE]"],
        ["not JSON", "[DONE]"],
        [*CLAUDE[:3], {"type": "error", "error": {"type": "overloaded_error"}}, *CLAUDE[3:]],
        [*CLAUDE[:3], {"type": "content_block_start", "content_block": {"type": "tool_use"}}, *CLAUDE[3:]],
        [*RESPONSES[:2], {"type": "response.output_item.added", "item": {"type": "function_call"}}, *RESPONSES[2:]],
        [*RESPONSES[:3], {"type": "response.incomplete", "response": responses("incomplete")}],
        [*RESPONSES[:3], {"type": "response.failed", "response": responses("failed")}, RESPONSES[3]],
        [gemini(None), gemini("STOP", functionCall={"name": "f"})],
    ],
)
def test_streams_with_errors_or_tools_are_not_kept(events: list[Any]) -> None:
    """C13, T8: a stream that has an error or a tool call anywhere, or no text, is not kept."""
    assert unfit(sse(*events), stream=True)


def test_values_that_are_nested_too_deeply() -> None:
    """T8: a value that exhausts the stack when it is judged is not kept."""
    value: dict[str, Any] = {"choices": []}
    for _ in range(100_000):
        value = {"choices": value}
    assert unfit_value(value) == "it is nested too deeply"
    assert unfit(sse({"choices": [1]}), stream=True)


def test_lines_and_arrays() -> None:
    """C13: streams of JSON lines, and arrays that are streamed, are judged like events."""
    lines = [{"message": {"content": "Hi"}, "done": False}, ollama(message={"content": ""})]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    for kind in ("application/x-ndjson", "application/jsonl"):
        assert unfit(ProviderAnswer(status=200, content_type=kind, body=body), stream=True) is None
        assert unfit(ProviderAnswer(status=200, content_type=kind, body=body[:60]), stream=True)
    array = ProviderAnswer(status=200, content_type="application/json", body=json.dumps(GEMINI).encode())
    assert unfit(array, stream=True) is None
    assert unfit(array, stream=False)
    cut = json.dumps(GEMINI[:1]).encode()
    assert unfit(ProviderAnswer(status=200, content_type="application/json", body=cut), stream=True)
    for item in (b"[1]", b"[[]]", b"[]"):
        assert unfit(ProviderAnswer(status=200, content_type="application/json", body=item), stream=True)


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(chat(choice={"finish_reason": "canary " * 10_000})),
        answer_of(chat(choice={"finish_reason": {"canary": 1}})),
        answer_of({"status": "canary@example.com", "output": []}),
        ProviderAnswer(status=200, content_type="text/" + "canary" * 10, body=b""),
    ],
    ids=range(4),
)
def test_reasons_repeat_nothing_that_could_be_said_in_an_answer(answer: ProviderAnswer) -> None:
    """T15: a reason, which is counted and shown, is short, and has no words of the answer but plain names."""
    reason = unfit(answer, stream=False)
    assert reason
    assert "canary" not in reason
    assert len(reason) < 100


def test_values_of_applications_are_their_own_word() -> None:
    """C13: what a function returns is judged only where it is an answer of a provider."""
    for value in ("Hi", 1, None, ["Hi"], {"title": "Hi"}, {"choices": ["a", "b"]}, chat(), claude(), responses()):
        assert unfit_value(value) is None
    for value in (
        chat(choice={"finish_reason": "tool_calls"}),
        claude("tool_use"),
        responses("failed"),
        gemini("SAFETY"),
    ):
        assert unfit_value(value)


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text()), lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.sampled_from(["choices", "finish_reason", "type", "index", "status", "done", "error", "content",
                                     "candidates", "tool_calls", "object"]), inner, max_size=4),
), max_leaves=10))  # fmt: skip
def test_no_shape_raises(value: Any) -> None:
    """T8: whatever a provider answers, judging it does not fail."""
    body = json.dumps(value).encode()
    for kind in ("application/json", "text/event-stream", "application/x-ndjson"):
        data = b"data: " + body + b"\n\n" if kind.startswith("text") else body
        for stream in (False, True):
            unfit(ProviderAnswer(status=200, content_type=kind, body=data), stream=stream)
    unfit_value(value)
