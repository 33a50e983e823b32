"""Frameworks over the SDKs: LangChain, Pydantic AI and OpenAI's agents read the fake provider as they read others."""

from __future__ import annotations

from typing import Any

import agents
import anthropic
import httpx2
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from tests.plain import PLAIN
from tests.testing.speech.requests import ECHO, HELLO

from asgi_llm_guard.testing import BaseURL, Behaviour, FakeProvider

pytestmark = pytest.mark.anyio


def langchain(kind: str, base_url: BaseURL) -> BaseChatModel:
    if kind == "anthropic":
        return ChatAnthropic(
            model_name="m",
            api_key=SecretStr("any"),
            base_url=base_url.root,
            max_retries=0,
            max_tokens_to_sample=100,
            timeout=None,
            stop=None,
        )
    responses = kind == "openai responses"
    return ChatOpenAI(
        model="m",
        api_key=SecretStr("any"),
        base_url=base_url,
        max_retries=0,
        stream_usage=True,
        use_responses_api=responses,
    )


@pytest.mark.parametrize("kind", ["openai", "openai responses", "anthropic"])
async def test_langchain(kind: str) -> None:
    """Plain, streamed, and with a tool, LangChain finds text, usage and calls."""
    provider = FakeProvider()
    provider.script(Behaviour(), Behaviour(), Behaviour.call_tool("search", query="llamas and alpacas"))
    async with provider.serve() as base_url:
        model = langchain(kind, base_url)
        plain = await model.ainvoke(HELLO)
        chunks = [chunk async for chunk in model.astream(HELLO)]
        called = await model.ainvoke(HELLO)

    streamed: Any = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    assert isinstance(plain, AIMessage)
    assert isinstance(streamed, AIMessageChunk)
    assert plain.text == streamed.text == ECHO
    for message in (plain, streamed):
        assert message.usage_metadata is not None
        assert message.usage_metadata["total_tokens"] == provider.bill[0].usage.total_tokens == 19
    assert isinstance(called, AIMessage)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [
        ("search", {"query": "llamas and alpacas"}),
    ]


def pydantic_ai(kind: str, http: httpx2.AsyncClient, base_url: BaseURL) -> Model:
    if kind == "anthropic":
        client = anthropic.AsyncAnthropic(api_key="any", base_url=base_url.root, http_client=http, max_retries=0)
        return AnthropicModel("m", provider=AnthropicProvider(anthropic_client=client))
    provider = OpenAIProvider(
        openai_client=openai.AsyncOpenAI(api_key="any", base_url=base_url, http_client=http, max_retries=0)
    )
    if kind == "openai responses":
        return OpenAIResponsesModel("m", provider=provider)
    return OpenAIChatModel("m", provider=provider)


@pytest.mark.parametrize("kind", ["openai", "openai responses", "anthropic"])
async def test_pydantic_ai(kind: str) -> None:
    """An agent of Pydantic AI calls its tool and ends, plain and streamed; its usage is the bill's."""
    provider = FakeProvider()
    provider.script(Behaviour.call_tool("add", one=2, two=3), Behaviour.answer("it is 5"), Behaviour.answer("so it is"))
    async with provider.serve() as base_url, httpx2.AsyncClient(**PLAIN) as http:
        agent = Agent(pydantic_ai(kind, http, base_url))

        @agent.tool_plain
        def add(one: int, two: int) -> int:
            return one + two

        result = await agent.run(HELLO)
        async with agent.run_stream(HELLO) as streaming:
            text = await streaming.get_output()
            streamed = streaming.usage

    assert (result.output, text) == ("it is 5", "so it is")
    billed = [line.usage.total_tokens or 0 for line in provider.bill]
    assert result.usage.total_tokens == billed[0] + billed[1]
    assert streamed.total_tokens == billed[2]


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_openai_agents(kind: str) -> None:
    """An agent of OpenAI's framework calls its tool and ends, plain and streamed; its usage is the bill's."""
    agents.set_tracing_disabled(disabled=True)
    provider = FakeProvider()
    provider.script(Behaviour.call_tool("add", one=2, two=3), Behaviour.answer("it is 5"), Behaviour.answer("so it is"))

    @agents.function_tool
    def add(one: int, two: int) -> int:
        return one + two

    async with provider.serve() as base_url, httpx2.AsyncClient(**PLAIN) as http:
        client = openai.AsyncOpenAI(api_key="any", base_url=base_url, http_client=http, max_retries=0)
        model: agents.Model = (
            agents.OpenAIChatCompletionsModel("m", client)
            if kind == "chat"
            else agents.OpenAIResponsesModel("m", client)
        )
        agent = agents.Agent(
            name="adder",
            model=model,
            tools=[add],
            model_settings=agents.ModelSettings(include_usage=True),
        )
        result = await agents.Runner.run(agent, HELLO)
        streaming = agents.Runner.run_streamed(agent, HELLO)
        async for _ in streaming.stream_events():
            pass

    assert (result.final_output, streaming.final_output) == ("it is 5", "so it is")
    billed = [line.usage.total_tokens or 0 for line in provider.bill]
    assert result.context_wrapper.usage.total_tokens == billed[0] + billed[1]
    assert streaming.context_wrapper.usage.total_tokens == billed[2]
