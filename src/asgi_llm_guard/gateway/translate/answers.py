"""Whole answers of one API as answers of the other. What cannot be read becomes an error, and nothing raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from asgi_llm_guard.gateway.translate.counts import anthropic_counts, anthropic_tier, openai_counts, openai_tier
from asgi_llm_guard.gateway.translate.faults import (
    UNREADABLE,
    as_anthropic,
    as_openai,
    error_to_anthropic,
    error_to_openai,
)
from asgi_llm_guard.gateway.translate.fields import arguments_of
from asgi_llm_guard.gateway.translate.reasons import finish_reason, stop_reason
from asgi_llm_guard.gateway.translate.writing import dump
from asgi_llm_guard.wire.anthropic_usage import Report
from asgi_llm_guard.wire.openai_errors import error_of
from asgi_llm_guard.wire.openai_usage import completion_usage
from asgi_llm_guard.wire.shape import decode, items, name_of, pick, pick_path

__all__ = ["answer_to_anthropic", "answer_to_openai", "name_in", "texts_of", "thoughts_of"]

_BAD_GATEWAY: Final = 502


def name_in(value: object, member: str) -> str:
    """A name as an answer has it; empty where there is none."""
    return name_of(pick(value, member)) or ""


# ------------------------------------------------------------------------------ to OpenAI


def answer_to_openai(status: int, body: bytes, *, created: int = 0) -> tuple[int, bytes]:
    """Anthropic's answer or error as OpenAI's, with its status. `created`: Unix time, which Anthropic does not tell.

    Citations are left out. Thinking comes as `reasoning_content`, and with its signature as `thinking_blocks`, which
    a request may bring back.
    """
    value = decode(body)
    if not 200 <= status < 300 or pick(value, "type") == "error":
        told, error = error_to_openai(status if status >= 400 else None, value)
        return told, dump(error)
    content = pick(value, "content")
    if pick(value, "type") != "message" or not isinstance(content, list):
        return _BAD_GATEWAY, dump(as_openai("other", UNREADABLE)[1])
    report = Report()
    report.update(pick(value, "usage"))
    model = name_in(value, "model")
    usage = report.usage(model or None)
    stop = pick(value, "stop_reason")
    choice: dict[str, object] = {
        "index": 0,
        "message": _message(value, content),
        "logprobs": None,
        "finish_reason": finish_reason(stop),
    }
    if stop == "stop_sequence":
        choice["stop_reason"] = pick(value, "stop_sequence")
    completion: dict[str, object] = {
        "id": name_in(value, "id"),
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        **openai_tier(usage),
    }
    counts = openai_counts(usage)
    if counts is not None:
        completion["usage"] = counts
    return 200, dump(completion)


def _message(value: object, content: list[object]) -> dict[str, object]:
    texts: list[str] = []
    thoughts: list[object] = []
    calls: list[dict[str, object]] = []
    for block in content:
        kind, text = pick(block, "type"), pick(block, "text")
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind in ("thinking", "redacted_thinking"):
            thoughts.append(block)
        elif kind == "tool_use":
            given = pick(block, "input")
            arguments = dump(given if isinstance(given, dict) else {}).decode()
            function = {"name": name_in(block, "name"), "arguments": arguments}
            calls.append({"id": name_in(block, "id"), "type": "function", "function": function})
    message: dict[str, object] = {
        "role": "assistant",
        "content": "".join(texts) if texts or not calls else None,
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "".join(str(pick(each, "thinking") or "") for each in thoughts)
        message["thinking_blocks"] = thoughts
    why = pick_path(value, "stop_details", "explanation")
    if pick(value, "stop_reason") == "refusal" and isinstance(why, str):
        message["refusal"] = why
    return message


# --------------------------------------------------------------------------- to Anthropic


def answer_to_anthropic(status: int, body: bytes) -> tuple[int, bytes]:
    """OpenAI's answer or error, or that of a server like it, as Anthropic's, with its status. One choice is read."""
    value = decode(body)
    choices = pick(value, "choices")
    if not 200 <= status < 300 or (error_of(value) is not None and not choices):
        told, error = error_to_anthropic(status if status >= 400 else None, value)
        return told, dump(error)
    choice = next(iter(choices), None) if isinstance(choices, list) else None
    message = pick(choice, "message")
    content = None if not isinstance(message, dict) else _blocks(message)
    if content is None or pick(choice, "finish_reason") == "error":
        return _BAD_GATEWAY, dump(as_anthropic("other", UNREADABLE)[1])
    usage = completion_usage(pick(value, "usage"))
    counts = anthropic_counts(usage)
    if usage is not None:
        counts |= anthropic_tier(name_in(value, "service_tier"))
    sequence = pick(choice, "stop_reason")
    stop = stop_reason(
        pick(choice, "finish_reason"),
        called=any(block["type"] == "tool_use" for block in content),
        refused=isinstance(pick(message, "refusal"), str),
        sequence=sequence if isinstance(sequence, str) else None,
    )
    written = {
        "id": name_in(value, "id"),
        "type": "message",
        "role": "assistant",
        "model": name_in(value, "model"),
        "content": content,
        "stop_reason": stop,
        "stop_sequence": sequence if stop == "stop_sequence" else None,
        "usage": counts,
    }
    return 200, dump(written)


def _blocks(message: dict[str, object]) -> list[dict[str, object]] | None:
    """The blocks of a message; `None`: the arguments of a call are no JSON object."""
    blocks: list[dict[str, object]] = []
    thought = "".join(thoughts_of(message))
    if thought:
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    refusal = message.get("refusal")
    text = "".join((*texts_of(message), refusal if isinstance(refusal, str) else ""))
    if text:
        blocks.append({"type": "text", "text": text})
    for call in items(message.get("tool_calls")):
        function = pick(call, "function")
        given = arguments_of(pick(function, "arguments"))
        if given is None:
            return None
        blocks.append(
            {"type": "tool_use", "id": name_in(call, "id"), "name": name_in(function, "name"), "input": given}
        )
    return blocks


def texts_of(message: object) -> Iterator[str]:
    """The texts of a message or delta; content may come as a list of parts."""
    content = pick(message, "content")
    if isinstance(content, str):
        yield content
    for part in items(content):
        text = pick(part, "text")
        if isinstance(text, str):
            yield text


def thoughts_of(message: object) -> Iterator[str]:
    """What the model thought, under the names that servers have for it; Mistral's are parts of the content."""
    thought = pick(message, "reasoning_content") or pick(message, "reasoning")
    if isinstance(thought, str):
        yield thought
    for part in items(pick(message, "content")):
        for piece in items(pick(part, "thinking")):
            text = pick(piece, "text")
            if isinstance(text, str):
                yield text
