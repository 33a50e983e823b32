"""LangChain's messages as OpenAI's chat API has them, and answers of the gateway as LangChain's messages. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    InvalidToolCall,
    ToolMessage,
    convert_to_openai_messages,
)
from langchain_core.messages import ToolCall as LangChainToolCall
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers.openai_tools import make_invalid_tool_call, parse_tool_call

from asgi_llm_guard.gateway import Chunk, Completion
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.shape import items, pick_path

__all__ = ["ending_of", "message_of", "messages_for", "piece_of", "usage_metadata"]

_CALLS: Final = frozenset({"function_call", "input_json_delta", "invalid_tool_call", "tool_call", "tool_call_chunk", "tool_use"})  # fmt: skip
"""Blocks of an answer that repeat what its tool calls say."""
_SIGNED: Final = frozenset({"redacted_thinking", "thinking"})


# ----------------------------------------------------------------------------- what is asked


def messages_for(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """As OpenAI's chat API has them. Thoughts go back with their signature, or not at all.

    Raises:
        ValueError: a block of a message's content is of no kind that can be said.
    """
    return [written for message in messages for written in _written(message)]


def _written(message: BaseMessage) -> Iterator[dict[str, Any]]:
    answer = isinstance(message, AIMessage) or (isinstance(message, ChatMessage) and message.role == "assistant")
    (written,) = convert_to_openai_messages([message.model_copy(update={"content": ""})])
    if isinstance(message, ToolMessage):
        written.pop("name", None)  # its call has it
    if isinstance(message, AIMessage) and message.invalid_tool_calls:
        written["tool_calls"] = [*written.get("tool_calls", ()), *map(_as_written, message.invalid_tool_calls)]
    content: list[dict[str, Any]] = []
    thoughts: list[Mapping[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in _blocks(message.content):
        kind = block.get("type")
        if answer and kind in _SIGNED:
            thoughts.append({key: value for key, value in block.items() if key != "index"})
        elif answer and (kind in _CALLS or kind == "reasoning"):
            continue
        elif answer and kind == "refusal":
            written["refusal"] = block.get("refusal")
        elif kind == "tool_result":
            results += convert_to_openai_messages([HumanMessage([block])])
        else:
            content.append(_part(block))
    if answer:
        thoughts += _signed(message.additional_kwargs)
        if thoughts:
            written["thinking_blocks"] = thoughts
    written["content"] = _shortest(content)
    if content or not results:
        yield written
    yield from results


def _signed(kept: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The thoughts that came with an answer. In streams their text and their signature come apart."""
    thoughts: list[Mapping[str, Any]] = [each for each in items(kept.get("thinking_blocks")) if isinstance(each, dict)]
    reasoning = kept.get("reasoning_content")
    bare = [thought for thought in thoughts if thought.get("type") == "thinking" and not thought.get("thinking")]
    if reasoning and len(bare) == 1:
        return [{**thought, "thinking": reasoning} if thought is bare[0] else thought for thought in thoughts]
    if reasoning:  # which part of the text each signs cannot be told
        return [thought for thought in thoughts if not any(thought is each for each in bare)]
    return thoughts


def _blocks(content: str | Sequence[str | dict[Any, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]


def _part(block: dict[str, Any]) -> dict[str, Any]:
    if block.get("type") == "text" and isinstance(block.get("text"), str):
        part = {"type": "text", "text": block["text"]}
    else:
        (message,) = convert_to_openai_messages(
            [HumanMessage([block])], text_format="block", pass_through_unknown_blocks=False
        )
        (part,) = message["content"]
    if "cache_control" in block:
        part = {**part, "cache_control": block["cache_control"]}
    return part


def _shortest(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One plain text as a text: some servers take no lists."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        return str(parts[0]["text"])
    return parts


def _as_written(call: InvalidToolCall) -> dict[str, Any]:
    function = {"name": call.get("name") or "", "arguments": call.get("args") or ""}
    return {"type": "function", "id": call.get("id"), "function": function}


# --------------------------------------------------------------------------- what is answered


def message_of(completion: Completion) -> AIMessage:
    """The answer. Arguments of a tool that are no JSON object are in `invalid_tool_calls`."""
    calls: list[LangChainToolCall] = []
    invalid: list[InvalidToolCall] = []
    for call in completion.tool_calls:
        raw = {"id": call.id or None, "function": {"name": call.name, "arguments": call.arguments or "{}"}}
        try:
            parsed = parse_tool_call(raw, return_id=True)
            if parsed is None or not isinstance(parsed["args"], dict):
                raise ValueError(f"the arguments of {call.name!r} are no JSON object")  # noqa: TRY301
            calls.append(LangChainToolCall(name=parsed["name"], args=parsed["args"], id=parsed["id"], type="tool_call"))
        except ValueError as error:
            invalid.append(make_invalid_tool_call(raw, str(error)))
    return AIMessage(
        content=completion.text,
        additional_kwargs=_kept(completion, completion.raw, "message"),
        response_metadata=_metadata(completion, completion.finish_reason),
        tool_calls=calls,
        invalid_tool_calls=invalid,
        usage_metadata=usage_metadata(completion.usage),
    )


def piece_of(chunk: Chunk) -> AIMessageChunk | None:
    """What a chunk adds to the answer; `None`: nothing. What is said once for all of it is in `ending_of`."""
    kept = _kept(chunk, chunk.raw, "delta")
    if not chunk.text and not chunk.tool_calls and not kept:
        return None
    return AIMessageChunk(
        content=chunk.text,
        additional_kwargs=kept,
        tool_call_chunks=[
            tool_call_chunk(name=call.name or None, args=call.arguments, id=call.id or None, index=call.index)
            for call in chunk.tool_calls
        ],
    )


def ending_of(chunk: Chunk | None, finish_reason: str | None, usage: Usage | None) -> AIMessageChunk:
    """The last piece of an answer. `chunk`: the last one that came, if any did."""
    return AIMessageChunk(
        content="",
        response_metadata={} if chunk is None else _metadata(chunk, finish_reason),
        usage_metadata=usage_metadata(usage),
        chunk_position="last",
    )


def usage_metadata(usage: Usage | None) -> UsageMetadata | None:
    """What was used; `None`: not known. Details that are not known are left out."""
    if usage is None or usage.input_tokens is None or usage.output_tokens is None:
        return None
    told = UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
    )
    put_in = InputTokenDetails()
    if usage.cache_read_tokens is not None:
        put_in["cache_read"] = usage.cache_read_tokens
    if usage.cache_write_tokens is not None:
        put_in["cache_creation"] = usage.cache_write_tokens
    if usage.input_audio_tokens is not None:
        put_in["audio"] = usage.input_audio_tokens
    put_out = OutputTokenDetails()
    if usage.reasoning_tokens is not None:
        put_out["reasoning"] = usage.reasoning_tokens
    if usage.output_audio_tokens is not None:
        put_out["audio"] = usage.output_audio_tokens
    if put_in:
        told["input_token_details"] = put_in
    if put_out:
        told["output_token_details"] = put_out
    return told


def _kept(answer: Completion | Chunk, raw: Mapping[str, Any], part: Literal["message", "delta"]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if answer.reasoning:
        kept["reasoning_content"] = answer.reasoning
    if answer.refusal:
        kept["refusal"] = answer.refusal
    choice = next(iter(items(raw.get("choices"))), None)
    thoughts = list(items(pick_path(choice, part, "thinking_blocks")))
    if thoughts:
        kept["thinking_blocks"] = thoughts
    return kept


def _metadata(answer: Completion | Chunk, finish_reason: str | None) -> dict[str, Any]:
    told = {
        "id": answer.raw.get("id"),
        "model_name": answer.model,
        "deployment": answer.deployment,
        "finish_reason": finish_reason,
        "service_tier": answer.raw.get("service_tier"),
    }
    return {name: value for name, value in told.items() if value is not None}
