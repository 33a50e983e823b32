"""OpenAI chat completions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from starlette.types import Scope

from asgi_llm_guard.testing.behaviour import Behaviour
from asgi_llm_guard.testing.clock import NEW_YEAR
from asgi_llm_guard.testing.sale import FakeRequest, Sale

__all__ = ["chunk", "completion", "error_body", "error_type", "parse", "sell", "tool_call", "usage_body"]

CREATED: Final = int(NEW_YEAR.timestamp())


class _Essentials(msgspec.Struct):
    """What a request cannot do without."""

    model: str
    messages: Annotated[list[dict[str, object]], msgspec.Meta(min_length=1)]
    stream: bool = False


def parse(scope: Scope, body: bytes) -> FakeRequest:
    """Raises `msgspec.DecodeError` for what no provider would take."""
    msgspec.json.decode(body, type=_Essentials)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return FakeRequest(headers=headers, body=msgspec.json.decode(body))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return " ".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def sell(call_id: str, request: FakeRequest, behaviour: Behaviour) -> Sale:
    texts = [_text(message.get("content")) for message in request.messages]
    counted = sum(math.ceil(len(text.encode()) / 4) + 3 for text in texts) + 3
    words = (behaviour.text if behaviour.text is not None else f"Echo: {texts[-1]}").split()
    allowed = request.body.get("max_completion_tokens") or request.body.get("max_tokens")
    finish = "stop"
    if behaviour.tool is not None:
        words, finish = json.dumps(behaviour.tool[1]).split(" "), "tool_calls"
    elif behaviour.output_tokens is not None:
        words = [f"word{number}" for number in range(1, behaviour.output_tokens + 1)]
    elif isinstance(allowed, int) and allowed < len(words):
        words, finish = words[:allowed], "length"
    return Sale(
        id=call_id,
        request=request,
        behaviour=behaviour,
        words=words,
        finish=finish,
        input_tokens=counted if behaviour.input_tokens is None else behaviour.input_tokens,
    )


def usage_body(sale: Sale) -> dict[str, object]:
    usage = sale.usage()
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def completion(sale: Sale) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": " ".join(sale.words)}
    if sale.behaviour.tool is not None:
        message |= {"content": None, "tool_calls": [tool_call(sale, " ".join(sale.words))]}
    body: dict[str, object] = {
        "id": sale.id,
        "object": "chat.completion",
        "created": CREATED,
        "model": sale.model,
        "choices": [
            {"index": choice, "message": message, "finish_reason": sale.finish} for choice in range(sale.choices)
        ],
    }
    if sale.behaviour.usage:
        body["usage"] = usage_body(sale)
    return body


def tool_call(sale: Sale, arguments: str, position: int | None = None) -> dict[str, object]:
    """A whole call of the tool, or a part of it in a stream: only the first names the function."""
    assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
    named = {"id": f"call-{sale.id}", "type": "function"}
    if position is None:
        return {**named, "function": {"name": sale.behaviour.tool[0], "arguments": arguments}}
    if position == 0:
        return {"index": 0, **named, "function": {"name": sale.behaviour.tool[0], "arguments": arguments}}
    return {"index": 0, "function": {"arguments": arguments}}


def chunk(sale: Sale, choice: int, delta: Mapping[str, object], *, finish: str | None = None) -> dict[str, object]:
    chunk: dict[str, object] = {
        "id": sale.id,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": sale.model,
        "choices": [{"index": choice, "delta": delta, "finish_reason": finish}],
        "obfuscation": "x" * (sale.produced % 7),  # real streams are padded to lengths that tell nothing
    }
    if sale.usage_wanted:
        chunk["usage"] = None
    return chunk


def error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
