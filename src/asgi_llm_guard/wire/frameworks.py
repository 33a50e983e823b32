"""What the objects of agent frameworks say was used: LangChain, pydantic-ai and the OpenAI Agents SDK, by shape.

Not a wire format: no request is read here. An object that stands for several calls (the result of an agent's
run) gives the sum of them, at the price of the one model that it names.

Source: langchain-core 1.7 (`messages.ai.UsageMetadata`: totals are inclusive, chunks add up), pydantic-ai 2.68
(`usage.UsageBase`: inclusive), openai-agents 0.24 (`usage.Usage`: as the Responses API) (2026-11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer
from asgi_llm_guard.wire.shape import count_of, first_count, items, name_of, pick, pick_path, text_length, within

__all__ = ["FrameworkItems", "read_framework_object"]


def read_framework_object(obj: object) -> Answer | None:
    """What a message, a result or a run of a framework says; `None`: it is none of theirs."""
    for read in (_langchain, _generations, _pydantic_ai, _agents):
        answer = read(obj)
        if answer is not None:
            return answer
    return None


# -------------------------------------------------------------------------------- LangChain


def _is_message(value: object) -> bool:
    return (
        pick(value, "type") in ("ai", "AIMessageChunk")
        and hasattr(value, "usage_metadata")
        and hasattr(value, "response_metadata")
    )


def _langchain(obj: object) -> Answer | None:
    """An `AIMessage`, alone or in a generation, or under `raw` as structured outputs have it."""
    for message in (obj, pick(obj, "message"), pick(obj, "raw")):
        if _is_message(message):
            return _answer(
                [_metadata_usage(message)],
                text_bytes=_content_bytes(pick(message, "content")) + _tool_bytes(message),
            )
    return None


def _generations(obj: object) -> Answer | None:
    """An `LLMResult` or `ChatResult`: generations of one prompt share one report, each prompt has its own."""
    batches = pick(obj, "generations")
    if not isinstance(batches, list) or not batches:
        return None
    prompts = [batch if isinstance(batch, list) else batches for batch in batches[: None if _nested(batches) else 1]]
    usages: list[Usage | None] = []
    size = 0
    for prompt in prompts:
        messages = [message for generation in prompt if _is_message(message := pick(generation, "message"))]
        if not messages:
            return None
        reports = [usage for message in messages if (usage := _metadata_usage(message)) is not None]
        usages.append(reports[0] if reports else None)
        size += sum(_content_bytes(pick(message, "content")) + _tool_bytes(message) for message in messages)
    return _answer(usages, text_bytes=size)


def _nested(batches: Sequence[object]) -> bool:
    return isinstance(batches[0], list)


def _metadata_usage(message: object) -> Usage | None:
    report = pick(message, "usage_metadata")
    entered, written = count_of(pick(report, "input_tokens")), count_of(pick(report, "output_tokens"))
    about = pick(message, "response_metadata")
    model = name_of(pick(about, "model_name")) or name_of(pick(about, "model"))
    tier = name_of(pick(about, "service_tier"))
    if entered is None or written is None or not entered + written:
        return None
    of_input, of_output = pick(report, "input_token_details"), pick(report, "output_token_details")
    long = count_of(pick(of_input, "ephemeral_1h_input_tokens"))
    parts = [long, count_of(pick(of_input, "ephemeral_5m_input_tokens"))]
    split = sum(part for part in parts if part is not None)
    stored = split or _of_tier(of_input, "cache_creation")
    cached = _of_tier(of_input, "cache_read")
    if (cached or 0) + (stored or 0) > entered:
        cached = stored = long = None
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=cached,
        cache_write_tokens=stored,
        cache_write_1h_tokens=within(long, stored),
        reasoning_tokens=within(_of_tier(of_output, "reasoning"), written),
        input_audio_tokens=within(count_of(pick(of_input, "audio")), entered),
        output_audio_tokens=within(count_of(pick(of_output, "audio")), written),
        service_tier=tier,
        model=model,
    )


def _of_tier(details: object, member: str) -> int | None:
    """A count that LangChain files under another name where a service tier has its own price."""
    return first_count(*(pick(details, f"{prefix}{member}") for prefix in ("", "priority_", "flex_")))


def _content_bytes(content: object) -> int:
    """Text and reasoning of a message's content: a text, or a list of parts."""
    if isinstance(content, str):
        return text_length(content)
    size = 0
    for part in items(content):
        if isinstance(part, str):
            size += text_length(part)
            continue
        for member in ("text", "thinking", "reasoning", "partial_json", "arguments"):
            size += text_length(pick(part, member))
        for summary in items(pick(part, "summary")):
            size += text_length(pick(summary, "text"))
    return size


def _tool_bytes(message: object) -> int:
    """Names and arguments of a message's tool calls, whole or in chunks."""
    chunks = list(items(pick(message, "tool_call_chunks")))
    if chunks:
        return sum(text_length(pick(chunk, "name")) + text_length(pick(chunk, "args")) for chunk in chunks)
    calls = items(pick(message, "tool_calls"))
    return sum(text_length(pick(call, "name")) + len(str(pick(call, "args") or "")) for call in calls)


# ------------------------------------------------------------------------------ pydantic-ai


def _pydantic_ai(obj: object) -> Answer | None:
    """A run's result (its `usage` is the sum), a `ModelResponse`, or a `RunUsage` itself."""
    size, model = 0, None
    if pick(obj, "kind") == "response" and isinstance(parts := pick(obj, "parts"), (list, tuple)):
        size = sum(text_length(pick(part, "content")) + text_length(pick(part, "args")) for part in parts)
        model = name_of(pick(obj, "model_name"))
    elif not hasattr(obj, "all_messages") and not hasattr(obj, "tool_calls"):
        return None
    report = pick(obj, "usage")
    report = obj if report is None else report
    if not hasattr(report, "cache_read_tokens") or not hasattr(report, "output_reasoning_tokens"):
        return None
    return _answer([_run_usage(report, model)], text_bytes=size)


def _run_usage(report: object, model: str | None) -> Usage | None:
    entered, written = count_of(pick(report, "input_tokens")), count_of(pick(report, "output_tokens"))
    if entered is None or written is None or not entered + written or pick(report, "unmeasured_requests"):
        return None
    stored, cached = count_of(pick(report, "cache_write_tokens")), count_of(pick(report, "cache_read_tokens"))
    if (cached or 0) + (stored or 0) > entered:
        cached = stored = None
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=cached,
        cache_write_tokens=stored,
        cache_write_1h_tokens=within(count_of(pick(report, "cache_write_1h_tokens")), stored),
        reasoning_tokens=within(count_of(pick(report, "output_reasoning_tokens")), written),
        input_audio_tokens=within(count_of(pick(report, "input_audio_tokens")), entered),
        output_audio_tokens=within(count_of(pick(report, "output_audio_tokens")), written),
        model=model,
    )


# ------------------------------------------------------------------------- OpenAI Agents SDK


def _agents(obj: object) -> Answer | None:
    """A run's result: its context counts every request, each with its own entry."""
    report = pick_path(obj, "context_wrapper", "usage")
    entries = pick(report, "request_usage_entries")
    if report is None or not isinstance(entries, list):
        return None
    requests = count_of(pick(report, "requests"))
    if not entries or requests != len(entries):  # a request without a report has no entry
        return _answer([_agents_usage(report)] if requests == 1 else [None])
    return _answer([_agents_usage(entry) for entry in entries])


def _agents_usage(report: object) -> Usage | None:
    entered, written = count_of(pick(report, "input_tokens")), count_of(pick(report, "output_tokens"))
    if entered is None or written is None or not entered + written:
        return None
    of_input, of_output = pick(report, "input_tokens_details"), pick(report, "output_tokens_details")
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=within(count_of(pick(of_input, "cached_tokens")), entered),
        cache_write_tokens=within(count_of(pick(of_input, "cache_write_tokens")), entered),
        reasoning_tokens=within(count_of(pick(of_output, "reasoning_tokens")), written),
    )


# -------------------------------------------------------------------------------------- sums


def _answer(usages: Sequence[Usage | None], *, text_bytes: int = 0) -> Answer:
    """What all of them used; unknown where one of them is."""
    usage = _sum([usage for usage in usages if usage is not None]) if None not in usages else None
    return Answer(
        kind="success",
        usage=usage,
        model=usage.model if usage is not None else None,
        text_bytes=text_bytes,
        finished=True,
    )


_COUNTS = tuple(name for name in Usage.__struct_fields__ if name.endswith("_tokens"))


def _sum(usages: Sequence[Usage]) -> Usage | None:
    if len(usages) < 2:
        return usages[0] if usages else None
    counts: dict[str, Any] = {
        name: sum(present) if (present := [n for usage in usages if (n := getattr(usage, name)) is not None]) else None
        for name in _COUNTS
    }
    last = usages[-1]
    return Usage(**counts, model=last.model, service_tier=last.service_tier)


class FrameworkItems:
    """The meter of the items that a framework streams: LangChain's chunks, whose usage adds up."""

    __slots__ = ("_finished", "_known", "_model", "_size", "_tier", "_usages")

    def __init__(self) -> None:
        self._known = False
        self._usages: list[Usage] = []
        self._size = 0
        self._model: str | None = None
        self._tier: str | None = None
        self._finished = False

    def add(self, item: object) -> None:
        """Count one item: a message chunk, alone or in a generation."""
        for message in (item, pick(item, "message")):
            if _is_message(message):
                self._known = True
                self._size += _content_bytes(pick(message, "content")) + _tool_bytes(message)
                about = pick(message, "response_metadata")
                self._model = name_of(pick(about, "model_name")) or name_of(pick(about, "model")) or self._model
                self._tier = name_of(pick(about, "service_tier")) or self._tier
                self._finished |= pick(message, "chunk_position") == "last" or pick(message, "type") == "ai"
                usage = _metadata_usage(message)
                if usage is not None:
                    total = _sum([*self._usages, usage])
                    self._usages = [] if total is None else [total]
                return

    def answer(self) -> Answer | None:
        """What was seen so far; `None`: no item had a known shape."""
        if not self._known:
            return None
        usage = None
        if self._usages and self._finished:  # the first chunk may tell the input alone
            counts: dict[str, Any] = {name: getattr(self._usages[0], name) for name in _COUNTS}
            usage = Usage(**counts, model=self._model, service_tier=self._tier)
        return Answer(kind="success", usage=usage, model=self._model, text_bytes=self._size, finished=self._finished)
