"""The SDKs of OpenAI and Anthropic, and an agent of LangGraph, run unchanged against the mounted gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import SecretStr
from tests.gateway.app_kit import ASKED, ECHO, KEY, WAYS, Service, Way, service
from tests.plain import PLAIN

from asgi_llm_guard import Budget, Iterations, ModelAllow, ProviderBudget, RateLimit
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

SMALL = "openai/model-a"
LARGE = "openai/model-c"
OTHER = "anthropic/model-d"


def policies() -> tuple[Policy, ...]:
    return Iterations(50), Budget("$1/daily"), ProviderBudget({"openai": "$1/1d", "anthropic": "$1/1d"})


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


# ------------------------------------------------------------------------------------ OpenAI


@pytest.mark.parametrize("model", [SMALL, OTHER])
async def test_openai_chat(way: Way, model: str) -> None:
    """A completion comes from a provider of either API; the call is charged once, wherever the middleware is."""
    async with service(*policies(), way=way) as app:
        client = await app.openai()
        completion = await client.chat.completions.create(model=model, messages=ASKED, max_completion_tokens=50)

        assert completion.choices[0].message.content == ECHO
        assert completion.usage is not None
        assert (app.requests.count, app.provider.calls) == (1, 1)
        await app.check_books()
        (record,) = await app.records()
        assert (record.caller, record.departments, record.outcome) == ("ann", ("research",), "measured")
        assert record.tokens == completion.usage.total_tokens


@pytest.mark.parametrize("model", [SMALL, OTHER])
@pytest.mark.parametrize("wants_usage", [True, False])
async def test_openai_chat_stream(model: str, wants_usage: bool) -> None:
    """A stream comes in chunks, with the usage if the client asked for it."""
    async with service(*policies()) as app:
        client = await app.openai()
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if wants_usage else {}
        stream: Any = await client.chat.completions.create(
            model=model, messages=ASKED, max_completion_tokens=50, stream=True, **options
        )
        chunks = [chunk async for chunk in stream]

        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ECHO
        assert any(chunk.usage is not None for chunk in chunks) is wants_usage
        await app.check_books()


@pytest.mark.parametrize("model", [SMALL, OTHER])
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_tools(model: str, stream: bool) -> None:
    """Calls of tools come through, whole and streamed."""
    async with service(*policies()) as app:
        app.provider.script(Behaviour.call_tool("weather", city="Bern"))
        client = await app.openai()
        options: dict[str, Any] = {"model": model, "messages": ASKED, "tools": [WEATHER], "max_completion_tokens": 50}
        if stream:
            async with client.chat.completions.stream(**options) as events:
                completion = await events.get_final_completion()
        else:
            completion = await client.chat.completions.create(**options)

        (call,) = completion.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, call.function.arguments.replace(" ", "")) == ("weather", '{"city":"Bern"}')
        assert completion.choices[0].finish_reason == "tool_calls"
        await app.check_books()


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_sync(stream: bool) -> None:
    """The synchronous client works as well, on a thread of its own."""
    async with service(*policies()) as app:

        def ask() -> str:
            with (
                httpx2.Client(**PLAIN) as http,
                openai.OpenAI(api_key=KEY, base_url=f"{app.url}/v1", http_client=http) as client,
            ):
                options: Any = {"model": SMALL, "messages": ASKED, "max_completion_tokens": 50}
                if not stream:
                    return client.chat.completions.create(**options).choices[0].message.content or ""
                chunks = list(client.chat.completions.create(**options, stream=True))
                return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

        assert await asyncio.to_thread(ask) == ECHO
        await app.check_books()


async def test_openai_responses(way: Way) -> None:
    """Responses, whole and streamed."""
    async with service(*policies(), way=way) as app:
        client = await app.openai()
        options: Any = {"model": SMALL, "input": "Say hello to everybody here", "max_output_tokens": 50}
        async with client.responses.stream(**options) as events:
            streamed = await events.get_final_response()
        response = await client.responses.create(**options)

        assert response.output_text == streamed.output_text == ECHO
        assert app.provider.calls == len(await app.records()) == 2
        await app.check_books()


async def test_openai_embeddings(way: Way) -> None:
    """Embeddings, in the form that the SDK asks for."""
    async with service(*policies(), way=way) as app:
        client = await app.openai()
        made = await client.embeddings.create(model=SMALL, input=["one text", "another text"])

        assert [item.index for item in made.data] == [0, 1]
        assert all(isinstance(number, float) for number in made.data[0].embedding)
        await app.check_books()


async def test_openai_models(way: Way) -> None:
    """The SDK lists what can be asked for, and finds one of them by its name."""
    async with service(way=way, aliases={"quick": SMALL}) as app:
        client = await app.openai()
        listed = [model.id async for model in client.models.list()]

        assert {"quick", SMALL, LARGE, OTHER} <= set(listed)
        assert (await client.models.retrieve(SMALL)).id == SMALL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-of-nobody")
        assert app.provider.calls == 0


# --------------------------------------------------------------------------------- Anthropic


@pytest.mark.parametrize("model", [OTHER, SMALL])
async def test_anthropic_messages(way: Way, model: str) -> None:
    """A message comes from a provider of either API."""
    async with service(*policies(), way=way) as app:
        client = await app.anthropic()
        message = await client.messages.create(model=model, max_tokens=50, messages=ASKED)

        assert [block.text for block in message.content if block.type == "text"] == [ECHO]
        assert message.stop_reason == "end_turn"
        await app.check_books()


@pytest.mark.parametrize("model", [OTHER, SMALL])
async def test_anthropic_stream(model: str) -> None:
    """The SDK puts a stream of either API together."""
    async with service(*policies()) as app:
        client = await app.anthropic()
        async with client.messages.stream(model=model, max_tokens=50, messages=ASKED) as stream:
            pieces = [text async for text in stream.text_stream]
            message = await stream.get_final_message()

        assert "".join(pieces) == ECHO
        assert len(pieces) > 1
        assert message.usage.output_tokens > 0
        await app.check_books()


@pytest.mark.parametrize("model", [OTHER, SMALL])
async def test_anthropic_tools(model: str) -> None:
    """A model of either API asks for a tool."""
    async with service(*policies()) as app:
        app.provider.script(Behaviour.call_tool("weather", city="Bern"))
        client = await app.anthropic()
        tools: Any = [{"name": "weather", "input_schema": WEATHER["function"]["parameters"]}]
        message = await client.messages.create(model=model, max_tokens=50, messages=ASKED, tools=tools)

        (used,) = [block for block in message.content if block.type == "tool_use"]
        assert (used.name, used.input, message.stop_reason) == ("weather", {"city": "Bern"}, "tool_use")
        await app.check_books()


async def test_anthropic_sync() -> None:
    """The synchronous client works as well."""
    async with service(*policies()) as app:

        def ask() -> str:
            with (
                httpx2.Client(**PLAIN) as http,
                anthropic.Anthropic(api_key=KEY, base_url=app.url, http_client=http) as client,
                client.messages.stream(model=OTHER, max_tokens=50, messages=ASKED) as stream,
            ):
                return stream.get_final_text()

        assert await asyncio.to_thread(ask) == ECHO
        await app.check_books()


async def test_anthropic_models() -> None:
    """The SDK of Anthropic lists the same models, in its own words."""
    async with service() as app:
        client = await app.anthropic()
        assert {SMALL, OTHER} <= {model.id async for model in client.models.list()}
        assert (await client.models.retrieve(OTHER)).type == "model"


# ---------------------------------------------------------------------------------- refusals

REFUSALS: dict[str, tuple[Policy, int, type[openai.APIStatusError], type[anthropic.APIStatusError]]] = {
    "spent": (Budget("$0.0000001/daily"), 402, openai.APIStatusError, anthropic.APIStatusError),
    "forbidden": (
        ModelAllow(["openai/model-c"]),
        403,
        openai.PermissionDeniedError,
        anthropic.PermissionDeniedError,
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_refusals_in_openai(way: Way, case: str) -> None:
    """A refusal is the SDK's own error, after exactly one request, and no provider is asked."""
    policy, status, error, _ = REFUSALS[case]
    async with service(policy, way=way) as app:
        client = await app.openai()
        for number, stream in enumerate((False, True), start=1):
            asked: dict[str, Any] = {"model": SMALL, "messages": ASKED, "max_completion_tokens": 50, "stream": stream}
            with pytest.raises(error) as caught:
                await client.chat.completions.create(**asked)
            assert caught.value.status_code == status
            assert caught.value.body is not None
            assert (app.requests.count, app.provider.calls) == (number, 0)
        assert await app.records() == []


@pytest.mark.parametrize("case", REFUSALS)
async def test_refusals_in_anthropic(way: Way, case: str) -> None:
    """As OpenAI's: its own error, one request, and the type that its API has for it."""
    policy, status, _, error = REFUSALS[case]
    async with service(policy, way=way) as app:
        client = await app.anthropic()
        with pytest.raises(error) as caught:
            await client.messages.create(model=OTHER, max_tokens=50, messages=ASKED)

        assert caught.value.status_code == status
        body: Any = caught.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == ("billing_error" if status == 402 else "permission_error")
        assert (app.requests.count, app.provider.calls) == (1, 0)


async def test_rate_is_counted_once(way: Way) -> None:
    """What a request costs is claimed once, though the gateway could claim it as well as the middleware around it."""
    async with service(RateLimit("2/day"), Iterations(2), way=way) as app:
        client = await app.openai()
        for _ in range(2):
            await client.chat.completions.create(model=SMALL, messages=ASKED, extra_headers={"x-session-id": "s"})
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model=SMALL, messages=ASKED, extra_headers={"x-session-id": "t"})

        assert app.provider.calls == len(await app.records()) == 2


async def test_stranger() -> None:
    """An unknown key is turned away in the SDK's own words: from calls, and from the list of models."""
    async with service(Budget("$1/daily")) as app:
        client, other = await app.openai(key="sk-of-nobody"), await app.anthropic(key="sk-of-nobody")
        with pytest.raises(openai.PermissionDeniedError):
            await client.chat.completions.create(model=SMALL, messages=ASKED)
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.list()
        with pytest.raises(anthropic.PermissionDeniedError):
            await other.messages.create(model=OTHER, max_tokens=5, messages=ASKED)

        assert app.provider.calls == 0


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("behaviour", [Behaviour.error(500), Behaviour.refuse("overloaded"), Behaviour.empty()])
async def test_failures_of_the_provider(behaviour: Behaviour) -> None:
    """Where nobody answers, the SDK raises for a status of the gateway's; no key and no address is in it."""
    async with service(*policies()) as app:
        app.provider.script(*[behaviour] * 4)
        client, other = await app.openai(retries=0), await app.anthropic(retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=SMALL, messages=ASKED, max_completion_tokens=50)
        with pytest.raises(anthropic.InternalServerError) as other_caught:
            await other.messages.create(model=OTHER, max_tokens=50, messages=ASKED)

        for error in (caught.value, other_caught.value):
            assert error.status_code == 502
            assert_discreet(error.response.text)


async def test_fallback_answers() -> None:
    """Where one model's provider fails, the next one answers the same request; only what was sold is charged."""
    async with service(*policies(), fallbacks={SMALL: [OTHER]}) as app:
        app.provider.when(lambda request: request.model == "model-a", Behaviour.error(503))
        client = await app.openai(retries=0)
        completion = await client.chat.completions.create(model=SMALL, messages=ASKED, max_completion_tokens=50)

        assert completion.choices[0].message.content == ECHO
        assert "model-d" in completion.model
        assert app.requests.count == 1
        await app.check_books()


@pytest.mark.parametrize("model", [SMALL, OTHER])
@pytest.mark.parametrize("behaviour", [Behaviour.cut(after_chunks=2), Behaviour.stream_error(after_chunks=2)])
async def test_stream_that_breaks_off(behaviour: Behaviour, model: str) -> None:
    """A failure in mid-stream is the last event, and both SDKs raise their own error from it."""
    async with service(*policies()) as app:
        app.provider.script(behaviour, behaviour)
        client, other = await app.openai(retries=0), await app.anthropic(retries=0)
        stream: Any = await client.chat.completions.create(
            model=model, messages=ASKED, max_completion_tokens=50, stream=True
        )
        seen = []
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                seen += [choice.delta.content or "" for choice in chunk.choices]
        with pytest.raises(anthropic.APIError) as other_caught:
            async with other.messages.stream(model=model, max_tokens=50, messages=ASKED) as events:
                await events.get_final_message()

        assert "".join(seen) == "Echo: Say "
        assert_discreet(f"{caught.value} {caught.value.body} {other_caught.value} {other_caught.value.body}")
        assert {record.outcome for record in await app.records()} == {"estimated"}


async def test_responses_stream_that_breaks_off() -> None:
    """So it is with Responses."""
    async with service(*policies()) as app:
        app.provider.script(Behaviour.cut(after_chunks=2))
        client = await app.openai(retries=0)
        with pytest.raises(openai.APIError) as caught:
            async with client.responses.stream(model=SMALL, input="Say hello", max_output_tokens=50) as events:
                await events.get_final_response()

        assert_discreet(f"{caught.value} {caught.value.body}")


def assert_discreet(text: str) -> None:
    """Nothing of where a request goes is in it."""
    found = [word for word in ("sk-canary", "127.0.0.1", "localhost", "http:", "berlin", "lugano") if word in text]
    assert (found, text) == ([], text)


# -------------------------------------------------------------------------------------- agent


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


@pytest.mark.parametrize("model", [SMALL, OTHER])
async def test_agent_of_langgraph(way: Way, model: str) -> None:
    """An agent that calls a tool and reads its answer: each step is a call of its own, charged exactly."""
    async with service(*policies(), way=way) as app:
        app.provider.script(Behaviour.call_tool("weather", city="Bern"), Behaviour.answer("It rains there."))
        answer = await run_agent(app, model)

        assert answer == "It rains there."
        assert app.provider.calls == len(await app.records()) == 2
        assert {record.session for record in await app.records()} == {"trip"}
        await app.check_books()


async def test_agent_of_langgraph_is_stopped() -> None:
    """An agent that never stops is stopped by the calls of its session."""
    async with service(Iterations(3)) as app:
        app.provider.script(*[Behaviour.call_tool("weather", city="Bern")] * 9)
        with pytest.raises(openai.RateLimitError, match="has used up its calls"):
            await run_agent(app, SMALL)

        assert (app.requests.count, app.provider.calls) == (4, 3)


async def run_agent(app: Service, model: str) -> str:
    """What a graph of a model and a tool comes to, with LangChain's own client for OpenAI."""
    async with httpx2.AsyncClient(**PLAIN) as http:
        chat = ChatOpenAI(
            model=model,
            api_key=SecretStr(KEY),
            base_url=f"{app.url}/v1",
            http_async_client=http,
            max_retries=0,
            default_headers={"x-session-id": "trip"},
        ).bind_tools([weather])

        async def think(state: MessagesState) -> dict[str, Any]:
            return {"messages": [await chat.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("think", think)
        graph.add_node("tools", ToolNode([weather]))
        graph.add_edge(START, "think")
        graph.add_conditional_edges("think", tools_condition)
        graph.add_edge("tools", "think")
        state = await graph.compile().ainvoke({"messages": [HumanMessage("How is the weather in Bern?")]})
        return str(state["messages"][-1].content)
