"""What an answer says. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from asgi_llm_guard.wire.base import Head
from asgi_llm_guard.wire.shape import decode, items, pick

__all__ = ["begins_tool_call", "message_of", "retry_after_s", "says_something"]

_TOOL: Final = re.compile(rb'"tool_calls"\s*:\s*\[\s*\{|"tool_use"|"function_call"|"image_generation_call"')
_PARTS: Final = ("text", "refusal", "thinking_text")


def begins_tool_call(chunk: bytes) -> bool:
    """Whether a piece of a stream, of any dialect, begins a call of a tool."""
    return _TOOL.search(chunk) is not None


def says_something(dialect: str, value: object) -> bool:
    """Whether a whole answer has text or a tool call, or what else it was asked for. Thoughts alone are no answer."""
    if dialect == "openai_embeddings":
        return bool(pick(value, "data"))
    if dialect == "openai_responses":
        return any(map(_is_output, items(pick(value, "output"))))
    if dialect == "anthropic":
        return any(
            pick(block, "type") == "tool_use" or bool(pick(block, "text")) for block in items(pick(value, "content"))
        )
    return any(map(_is_choice, items(pick(value, "choices"))))


def _is_choice(choice: object) -> bool:
    if pick(choice, "text"):  # a legacy completion
        return True
    message = pick(choice, "message")
    content = pick(message, "content")
    if isinstance(content, list):
        content = any(any(pick(part, name) for name in _PARTS) for part in content)
    return bool(content) or any(
        bool(pick(message, name)) for name in ("tool_calls", "function_call", "refusal", "audio", "images")
    )


def _is_output(item: object) -> bool:
    kind = pick(item, "type")
    if kind == "reasoning":
        return False
    if kind != "message":
        return kind is not None
    return any(pick(part, "text") or pick(part, "refusal") for part in items(pick(item, "content")))


def retry_after_s(head: Head, now_ms: int) -> float | None:
    """How long the provider asks to be left alone; `None`: it does not say, or nothing that can be read."""
    for name, unit_s in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        text = head.header(name).decode("latin-1").strip()
        if not text:
            continue
        try:
            seconds = float(text) * unit_s
        except ValueError:
            try:
                at = parsedate_to_datetime(text)
                at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
                seconds = (at - datetime.fromtimestamp(now_ms / 1000, UTC)).total_seconds()
            except (ValueError, OverflowError):  # no date, or one that no calendar has
                continue
        if 0 <= seconds < 10**9:  # neither is a `nan`
            return seconds
    return None


def message_of(body: bytes) -> str:
    """What an error says, for people to read."""
    value = decode(body)
    for part in (value.get("error") if isinstance(value, dict) else None, value):
        if isinstance(part, str):
            return part
        if isinstance(part, dict):
            for name in ("message", "detail"):
                if isinstance(part.get(name), str):
                    return str(part[name])
    return ""
