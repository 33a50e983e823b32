"""What is sent has the types that the provider's own SDK gives for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from anthropic import types as anthropic_types
from hypothesis import given
from openai.types import chat as openai_types
from pydantic import TypeAdapter
from tests.gateway.translate.test_requests import requests

from asgi_llm_guard.gateway.translate import request_to_anthropic, request_to_openai

_BLOCKS: dict[str, Any] = {
    "text": anthropic_types.TextBlockParam,
    "image": anthropic_types.ImageBlockParam,
    "tool_use": anthropic_types.ToolUseBlockParam,
    "tool_result": anthropic_types.ToolResultBlockParam,
}
_MESSAGES: dict[str, Any] = {
    "system": openai_types.ChatCompletionSystemMessageParam,
    "user": openai_types.ChatCompletionUserMessageParam,
    "assistant": openai_types.ChatCompletionAssistantMessageParam,
    "tool": openai_types.ChatCompletionToolMessageParam,
}
_PARTS: dict[str, Any] = {
    "text": openai_types.ChatCompletionContentPartTextParam,
    "image_url": openai_types.ChatCompletionContentPartImageParam,
}
_NOT_IN_THE_NEWEST_VERSION = frozenset({"temperature", "top_p"})
"""Of Anthropic's API: deployments of it are asked by a version that has them."""


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def conforms(value: dict[str, Any], kind: Any, *, beside: frozenset[str] = frozenset()) -> None:
    """The value has the members that it needs, of their types, and no others."""
    adapter(kind).validate_python(value)
    names = {name for base in (kind, *getattr(kind, "__orig_bases__", ())) for name in _names(base)}
    assert set(value) - beside <= names, kind


def _names(kind: Any) -> set[str]:
    return set(getattr(kind, "__annotations__", ()))


@given(body=requests())
def test_requests_for_anthropic_have_its_types(body: dict[str, Any]) -> None:
    """D7: every block, tool and setting is one that Anthropic's SDK knows."""
    written: Any = request_to_anthropic(body, most_tokens=4_096)
    written.pop("stream", None)  # chooses between two types that are otherwise the same

    whole = anthropic_types.message_create_params.MessageCreateParamsNonStreaming
    conforms(written, whole, beside=_NOT_IN_THE_NEWEST_VERSION)
    for block in written.get("system", ()):
        conforms(block, anthropic_types.TextBlockParam)
    for message in written["messages"]:
        assert message["role"] in ("assistant", "system", "user")
        for block in message["content"]:
            conforms(block, _BLOCKS[block["type"]])
    for tool in written.get("tools", ()):
        conforms(tool, anthropic_types.ToolParam)
    for name, kind in (
        ("thinking", anthropic_types.ThinkingConfigParam),
        ("tool_choice", anthropic_types.ToolChoiceParam),
        ("output_config", anthropic_types.OutputConfigParam),
        ("metadata", anthropic_types.MetadataParam),
    ):
        if name in written:
            adapter(kind).validate_python(written[name])


@given(body=requests())
def test_requests_for_openai_have_its_types(body: dict[str, Any]) -> None:
    """D7: every message, part, tool and setting is one that OpenAI's SDK knows."""
    written: Any = request_to_openai(request_to_anthropic(body, most_tokens=4_096))
    written.pop("stream", None)

    whole = openai_types.completion_create_params.CompletionCreateParamsNonStreaming
    conforms(written, whole)
    for message in written["messages"]:
        conforms(message, _MESSAGES[message["role"]])
        for part in message["content"] if isinstance(message["content"], list) else ():
            conforms(part, _PARTS[part["type"]])
        for call in message.get("tool_calls", ()):
            conforms(call, openai_types.ChatCompletionMessageFunctionToolCallParam)
    for tool in written.get("tools", ()):
        conforms(tool, openai_types.ChatCompletionFunctionToolParam)
