"""Objects of agent frameworks: what they say was used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from agents import Agent, RunContextWrapper
from agents.usage import Usage as AgentsUsage
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolCallChunk
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import RequestUsage, RunUsage

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import item_meter, meter_object

USED = UsageMetadata(
    input_tokens=100,
    output_tokens=20,
    total_tokens=120,
    input_token_details=InputTokenDetails(cache_read=60, cache_creation=10),
    output_token_details=OutputTokenDetails(reasoning=5),
)
EXPECTED = Usage(
    input_tokens=100,
    output_tokens=20,
    cache_read_tokens=60,
    cache_write_tokens=10,
    reasoning_tokens=5,
    model="claude-nova",
)


def message(usage: UsageMetadata | None = USED, **about: Any) -> AIMessage:
    return AIMessage(
        content="Well then", usage_metadata=usage, response_metadata={"model_name": "claude-nova", **about}
    )


@pytest.mark.parametrize(
    "obj",
    [
        message(),
        ChatGeneration(message=message()),
        {"raw": message(), "parsed": None, "parsing_error": None},
        LLMResult(generations=[[ChatGeneration(message=message())]]),
        ChatResult(generations=[ChatGeneration(message=message()), ChatGeneration(message=message())]),
    ],
    ids=["message", "generation", "structured", "result", "two choices"],
)
def test_langchain_answers_are_read(obj: object) -> None:
    """A message's totals are inclusive; two choices of one prompt are one report; the model is the answer's."""
    answer = meter_object(obj)
    assert answer is not None
    assert answer.usage == EXPECTED
    assert answer.finished
    assert answer.text_bytes


def test_langchain_batches_add_up() -> None:
    """Each prompt of a batch was a request; one without a report leaves the sum unknown."""
    both = LLMResult(generations=[[ChatGeneration(message=message())], [ChatGeneration(message=message())]])
    answer = meter_object(both)
    assert answer is not None
    assert answer.usage is not None
    assert answer.usage.total_tokens == 240
    half = LLMResult(generations=[[ChatGeneration(message=message())], [ChatGeneration(message=message(None))]])
    answer = meter_object(half)
    assert answer is not None
    assert answer.usage is None


def test_langchain_tiers_and_lifetimes() -> None:
    """A service tier renames LangChain's counts; writes by lifetime stand in for their sum."""
    tiered = UsageMetadata(
        input_tokens=9,
        output_tokens=4,
        total_tokens=13,
        input_token_details={"priority_cache_read": 3},  # type: ignore[typeddict-unknown-key]
    )
    answer = meter_object(message(tiered, service_tier="priority"))
    assert answer is not None
    assert answer.usage is not None
    assert (answer.usage.cache_read_tokens, answer.usage.service_tier) == (3, "priority")
    long = UsageMetadata(
        input_tokens=90,
        output_tokens=4,
        total_tokens=94,
        input_token_details={"cache_creation": 0, "ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30},  # type: ignore[typeddict-unknown-key]
    )
    answer = meter_object(message(long))
    assert answer is not None
    assert answer.usage is not None
    assert (answer.usage.cache_write_tokens, answer.usage.cache_write_1h_tokens) == (50, 30)


def test_langchain_chunks_add_up() -> None:
    """Usage comes in parts, which add up; before the last chunk it is not known, and the text counts."""
    meter = item_meter()
    first = UsageMetadata(input_tokens=12, output_tokens=0, total_tokens=12)
    last = UsageMetadata(input_tokens=0, output_tokens=7, total_tokens=7)
    meter.add(AIMessageChunk(content="Good ", usage_metadata=first))
    meter.add(ChatGenerationChunk(message=AIMessageChunk(content="day", response_metadata={"model_name": "m-1"})))
    cut = meter.answer()
    assert cut is not None
    assert (cut.usage, cut.text_bytes, cut.finished) == (None, 8, False)
    meter.add(AIMessageChunk(content="", usage_metadata=last, chunk_position="last"))
    whole = meter.answer()
    assert whole is not None
    assert whole.usage == Usage(input_tokens=12, output_tokens=7, model="m-1")
    assert whole.finished


def test_tool_calls_are_text() -> None:
    """Names and arguments of tool calls count where usage is missing."""
    meter = item_meter()
    chunk = ToolCallChunk(name="find", args='{"q":', id="1", index=0, type="tool_call_chunk")
    meter.add(AIMessageChunk(content="", tool_call_chunks=[chunk]))
    answer = meter.answer()
    assert answer is not None
    assert answer.text_bytes == len('find{"q":')


async def run_agent() -> Any:
    return await PydanticAgent(TestModel(custom_output_text="Well then")).run("say it")


@pytest.mark.anyio
async def test_pydantic_ai_runs_are_read() -> None:
    """The result of a run tells the sum of its requests, as its own usage says."""
    result = await run_agent()
    answer = meter_object(result)
    assert answer is not None
    assert answer.usage is not None
    assert answer.usage.input_tokens == result.usage.input_tokens > 0
    assert answer.usage.output_tokens == result.usage.output_tokens > 0


def test_pydantic_ai_values_are_read() -> None:
    """A response with its parts, and a run's usage by itself; one that was not measured is unknown."""
    usage = RequestUsage(
        input_tokens=100, output_tokens=20, cache_read_tokens=60, cache_write_tokens=10, output_reasoning_tokens=5
    )
    response = ModelResponse(
        parts=[TextPart("Well "), ToolCallPart("find", args="{}")], usage=usage, model_name="claude-nova"
    )
    answer = meter_object(response)
    assert answer is not None
    assert answer.usage is not None
    assert answer.usage.model == "claude-nova"
    assert answer.usage.cache_read_tokens == 60
    assert answer.text_bytes == len("Well {}")
    answer = meter_object(RunUsage(requests=2, input_tokens=5, output_tokens=6))
    assert answer is not None
    assert answer.usage is not None
    assert answer.usage.total_tokens == 11
    answer = meter_object(RunUsage(requests=2, input_tokens=5, output_tokens=6, unmeasured_requests=1))
    assert answer is not None
    assert answer.usage is None


def run_result(*entries: AgentsUsage, requests: int | None = None) -> object:
    total = AgentsUsage()
    for entry in entries:
        total.add(entry)
    if requests is not None:
        total.requests = requests
    return SimpleNamespace(context_wrapper=RunContextWrapper(context=None, usage=total), last_agent=Agent("a"))


def test_agents_runs_are_read() -> None:
    """The requests of a run add up; a run with a request that told nothing is unknown."""
    one = AgentsUsage(
        requests=1,
        input_tokens=100,
        output_tokens=20,
        total_tokens=120,
        input_tokens_details=InputTokensDetails(cached_tokens=60, cache_write_tokens=0),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=5),
    )
    answer = meter_object(run_result(one))
    assert answer is not None
    assert answer.usage == Usage(
        input_tokens=100, output_tokens=20, cache_read_tokens=60, cache_write_tokens=0, reasoning_tokens=5
    )
    answer = meter_object(run_result(one, one))
    assert answer is not None
    assert answer.usage is not None
    assert answer.usage.total_tokens == 240
    answer = meter_object(run_result(one, requests=2))
    assert answer is not None
    assert answer.usage is None


@pytest.mark.parametrize(
    "obj",
    [HumanMessage("hi"), {"generations": []}, {"usage": {"input_tokens": 3}}, SimpleNamespace(usage=3), object(), None],
    ids=["human", "empty", "dict", "namespace", "object", "none"],
)
def test_other_objects_are_nobodys(obj: object) -> None:
    """What has none of the shapes says nothing."""
    assert meter_object(obj) is None
