"""Usage that a stream tells before the rest of its text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Head

MORE = "x" * 500


def _chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": {"content": text}}], **more}


def _google(text: str, **more: Any) -> dict[str, Any]:
    return {"modelVersion": "m", "candidates": [{"index": 0, "content": {"parts": [{"text": text}]}}], **more}


_START = {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 10, "output_tokens": 1}}}
_TOLD = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 2}}

EVENTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "openai": (
        [_chat("a", usage={"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12})],
        _chat(MORE),
    ),
    "openai_completions": (
        [{"model": "m", "choices": [{"text": "a"}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}],
        {"model": "m", "choices": [{"text": MORE}]},
    ),
    "anthropic": ([_START, _TOLD], {"type": "content_block_delta", "delta": {"type": "text_delta", "text": MORE}}),
    "gemini": (
        [_google("a", usageMetadata={"promptTokenCount": 10, "candidatesTokenCount": 2, "totalTokenCount": 12})],
        _google(MORE),
    ),
    "gemini_interactions": (
        [{"event_type": "step.stop", "index": 0, "usage": {"total_input_tokens": 10, "total_output_tokens": 2}}],
        {"event_type": "step.delta", "index": 1, "delta": {"type": "text", "text": MORE}},
    ),
}


@pytest.mark.parametrize("name", EVENTS)
def test_text_behind_a_report(name: str) -> None:
    """T4: a report of usage stands for the text before it; once more has come, it tells of the input only."""
    before, after = EVENTS[name]
    meter = dialect_named(name).meter(Head(200, ((b"content-type", b"text/event-stream"),)))
    for event in before:
        meter.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    told = meter.answer().usage
    assert told is not None
    assert (told.input_tokens, told.output_tokens) == (10, 2)

    meter.feed(b"data: " + json.dumps(after).encode() + b"\n\n")
    answer = meter.answer()
    assert answer.text_bytes >= len(MORE)
    assert answer.usage == Usage(input_tokens=10, model=told.model)


@pytest.mark.parametrize(("behind", "written"), [([], None), ([{"choices": [], "usage": (10, 7)}], 7)])
def test_reports_of_single_choices(behind: list[dict[str, Any]], written: int | None) -> None:
    """T4: reports all along that tell of one choice each are none of the whole, which the last report tells."""
    meter = dialect_named("openai").meter(Head(200, ((b"content-type", b"text/event-stream"),)))
    parts: list[dict[str, Any]] = [
        {"choices": [{"index": index, "delta": {"content": "word "}}], "usage": (10, number)}
        for number in (1, 2, 3)
        for index in (0, 1)
    ]
    for part in parts + behind:
        entered, told = part["usage"]
        report = {"prompt_tokens": entered, "completion_tokens": told, "total_tokens": entered + told}
        meter.feed(b"data: " + json.dumps({**part, "usage": report}).encode() + b"\n\n")

    assert meter.answer().usage == Usage(input_tokens=10, output_tokens=written)
