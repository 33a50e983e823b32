"""What counts as an answer, and how long a provider asks to be left alone."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_llm_guard.gateway.saying import begins_tool_call, retry_after_s, says_something
from asgi_llm_guard.wire.base import Head


def chat(**message: object) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": None, **message}}]}


@pytest.mark.parametrize(
    ("dialect", "value"),
    [
        ("openai", chat(content="words")),
        ("openai", chat(content=[{"type": "text", "text": "words"}])),
        ("openai", chat(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": ""}}])),
        ("openai", chat(function_call={"name": "f", "arguments": ""})),
        ("openai", chat(refusal="no")),
        ("openai", chat(audio={"id": "1", "data": "…"})),
        ("openai", {"choices": [chat()["choices"][0], chat(content="words")["choices"][0]]}),
        ("openai_completions", {"choices": [{"text": "words"}]}),
        ("anthropic", {"content": [{"type": "text", "text": "words"}]}),
        ("anthropic", {"content": [{"type": "tool_use", "name": "f", "input": {}}]}),
        ("openai_responses", {"output": [{"type": "message", "content": [{"type": "output_text", "text": "words"}]}]}),
        ("openai_responses", {"output": [{"type": "reasoning"}, {"type": "function_call", "name": "f"}]}),
        ("openai_embeddings", {"data": [{"embedding": [0.5]}]}),
    ],
)
def test_answers(dialect: str, value: object) -> None:
    """C3: text, a refusal in words and a tool call, with or without arguments, are answers."""
    assert says_something(dialect, value)


@pytest.mark.parametrize(
    ("dialect", "value"),
    [
        ("openai", chat(content="")),
        ("openai", chat(content=[], tool_calls=[])),
        ("openai", chat(reasoning_content="hm")),
        ("openai", {"choices": []}),
        ("openai", {}),
        ("anthropic", {"content": []}),
        ("anthropic", {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": ""}]}),
        ("openai_responses", {"output": [{"type": "reasoning"}]}),
        ("openai_responses", {"output": [{"type": "message", "content": []}]}),
        ("openai_embeddings", {"data": []}),
    ],
)
def test_empty_answers(dialect: str, value: object) -> None:
    """C3: no text and no tool call is no answer; thoughts alone are none."""
    assert not says_something(dialect, value)


@pytest.mark.parametrize(
    ("chunk", "begins"),
    [
        (b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":""}}]}}]}', True),
        (b'data: {"choices":[{"delta":{"tool_calls": [ {"index":0}]}}]}', True),
        (b'data: {"choices":[{"delta":{"tool_calls":[]}}]}', False),
        (b'data: {"type":"content_block_start","content_block":{"type":"tool_use","name":"f"}}', True),
        (b'data: {"type":"response.output_item.added","item":{"type":"function_call"}}', True),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}', False),
    ],
)
def test_tool_calls_in_streams(chunk: bytes, *, begins: bool) -> None:
    """C4: a tool call without arguments is the beginning of an answer."""
    assert begins_tool_call(chunk) is begins


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"retry-after", b"7")], 7.0),
        ([(b"Retry-After", b"2.5")], 2.5),
        ([(b"retry-after-ms", b"1500"), (b"retry-after", b"9")], 1.5),
        ([(b"retry-after", b"Fri, 15 Jan 2027 08:00:30 GMT")], 30.0),
        ([(b"retry-after", b"soon")], None),
        ([(b"retry-after", b"-5")], None),
        ([(b"retry-after", b"nan")], None),
        ([(b"retry-after", b"inf")], None),
        ([], None),
    ],
)
def test_retry_after(headers: list[tuple[bytes, bytes]], expected: float | None) -> None:
    """D3: in seconds, milliseconds or as a date; what cannot be read says nothing."""
    assert retry_after_s(Head(429, headers), 1_800_000_000_000) == expected
