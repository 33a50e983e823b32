"""D7: the chat model over a gateway: what is sent for LangChain's messages, and what comes back of an answer."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from langchain_core.load import dumps
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from pydantic import BaseModel
from tests.langchain.kit import CONTEXT, KEY, Stage

from asgi_llm_guard import Context, Guard, LimitExceeded, ModelAllow
from asgi_llm_guard.errors import ContextError
from asgi_llm_guard.gateway import Completion, Deployment, Gateway, UnknownModel
from asgi_llm_guard.integrations.langchain import GatewayChatModel, StreamFailed
from asgi_llm_guard.integrations.langchain.messages import message_of, messages_for
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

PICTURE = "iVBORw0KGgo="


@tool
def get_weather(location: str) -> str:
    """The weather somewhere."""
    return f"sunny in {location}"


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


def model(stage: Stage, **options: Any) -> GatewayChatModel:
    return GatewayChatModel(**{"gateway": stage.gateway, "model": "one", **options})


def summed(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


# ------------------------------------------------------------------------------ what is sent


async def test_options_are_fields_of_the_request(stage: Stage) -> None:
    """D7: what the model was made with is sent, and what a call says takes its place."""
    chat = model(stage, temperature=0.5, max_tokens=9, stop=["END"], model_kwargs={"seed": 7})
    await chat.ainvoke("hello", stop=["STOP"], temperature=0.1)
    body = stage.body
    assert (body["temperature"], body["stop"], body["seed"]) == (0.1, ["STOP"], 7)
    assert body.get("max_completion_tokens", body.get("max_tokens")) == 9
    assert "fallbacks" not in body
    assert body["model"] == "small"


def test_messages_are_said_as_openai_has_them() -> None:
    """D7: system, developer, human, AI with tool calls and tool messages; text alone stays a text."""
    said = messages_for(
        [
            SystemMessage("be kind"),
            SystemMessage("be brief", additional_kwargs={"__openai_role__": "developer"}),
            HumanMessage("weather?", name="ann"),
            AIMessage(
                "",
                tool_calls=[{"name": "get_weather", "args": {"location": "Zürich"}, "id": "1", "type": "tool_call"}],
                invalid_tool_calls=[
                    InvalidToolCall(name="get_weather", args="{", id="2", error="cut", type="invalid_tool_call")
                ],
            ),
            ToolMessage("sunny", tool_call_id="1", name="get_weather"),
        ]
    )
    assert said == [
        {"role": "system", "content": "be kind"},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "id": "1",
                    "function": {"name": "get_weather", "arguments": '{"location": "Zürich"}'},
                },
                {"type": "function", "id": "2", "function": {"name": "get_weather", "arguments": "{"}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": PICTURE, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
    ],
)
def test_images_are_said_whatever_their_form(block: dict[str, Any]) -> None:
    """D7: an image of LangChain, OpenAI or Anthropic is sent as OpenAI has it; marks for caches stay where they were."""
    (said,) = messages_for(
        [HumanMessage([{"type": "text", "text": "what is it?", "cache_control": {"type": "ephemeral"}}, block])]
    )
    assert said["content"] == [
        {"type": "text", "text": "what is it?", "cache_control": {"type": "ephemeral"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
    ]


def test_blocks_that_cannot_be_said_are_named() -> None:
    """Nothing is left out silently: a block of an unknown kind is an error."""
    with pytest.raises(ValueError, match="hologram"):
        messages_for([HumanMessage([{"type": "hologram", "data": 1}])])


def test_results_of_tools_inside_a_message_become_messages() -> None:
    """D7: Anthropic's tool results, which are parts of a human message, are messages of their own."""
    result = {"type": "tool_result", "tool_use_id": "1", "content": "sunny"}
    assert messages_for([HumanMessage([result])]) == [{"role": "tool", "tool_call_id": "1", "content": "sunny"}]


def test_thoughts_go_back_with_their_signature() -> None:
    """D7: signed thoughts of an answer are sent with it again, put together where a stream had them apart."""
    signed = {"type": "thinking", "thinking": "hm", "signature": "s"}
    whole = AIMessage("yes", additional_kwargs={"thinking_blocks": [signed], "reasoning_content": "hm"})
    streamed = AIMessage(
        "yes", additional_kwargs={"thinking_blocks": [{**signed, "thinking": ""}], "reasoning_content": "hm"}
    )
    block = AIMessage([signed, {"type": "text", "text": "yes"}])
    expected = {"role": "assistant", "content": "yes", "thinking_blocks": [signed]}
    assert messages_for([whole, streamed, block]) == [expected] * 3


def test_thoughts_that_cannot_be_told_apart_stay_here() -> None:
    """D7: of several signatures for one text of thoughts none is sent: none would be valid."""
    bare = [{"type": "thinking", "thinking": "", "signature": each} for each in "ab"]
    (said,) = messages_for([AIMessage("yes", additional_kwargs={"thinking_blocks": bare, "reasoning_content": "hm"})])
    assert "thinking_blocks" not in said


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("any", "required"),
        (True, "required"),
        ("required", "required"),
        ("auto", "auto"),
        ("none", "none"),
        ("get_weather", {"type": "function", "function": {"name": "get_weather"}}),
        ({"type": "function", "function": {"name": "x"}}, {"type": "function", "function": {"name": "x"}}),
        (None, None),
    ],
)
def test_tool_choice_is_said_as_openai_has_it(stage: Stage, choice: Any, sent: Any) -> None:
    """D7: every way in which LangChain says which tool is to be called."""
    bound: Any = model(stage).bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
    assert bound.kwargs.get("tool_choice") == sent
    assert bound.kwargs["parallel_tool_calls"] is False
    assert [each["function"]["name"] for each in bound.kwargs["tools"]] == ["get_weather"]


def test_tool_choice_of_a_missing_tool_is_refused(stage: Stage) -> None:
    """A choice that none of the tools has is an error that names those there are."""
    with pytest.raises(ValueError, match="there are get_weather"):
        model(stage).bind_tools([get_weather], tool_choice="get_time")


# -------------------------------------------------------------------------------- what comes back


async def test_usage_and_metadata_of_an_answer(stage: Stage) -> None:
    """D7: tokens with their details, the model, the deployment and the reason of the end."""
    stage.provider.script(
        Behaviour.answer("well done", input_tokens=30, cache_read_tokens=10, cache_write_tokens=5, reasoning_tokens=4)
    )
    answer = await model(stage).ainvoke("hello")
    assert answer.text == "well done"
    assert answer.usage_metadata == {
        "input_tokens": 30,
        "output_tokens": 6,
        "total_tokens": 36,
        "input_token_details": {"cache_read": 10, "cache_creation": 5},
        "output_token_details": {"reasoning": 4},
    }
    told = dict(answer.response_metadata)
    assert told.pop("id")
    assert told == {"model_name": "small", "deployment": "small", "finish_reason": "stop"}


async def test_streams_say_the_same_as_answers(stage: Stage) -> None:
    """D7: the pieces of a stream add up to the answer; usage and metadata are on the last one alone."""
    good = Behaviour.answer("well done", input_tokens=30, cache_read_tokens=10, reasoning_tokens=4)
    stage.provider.script(good, good)
    whole = await model(stage).ainvoke("hello")
    chunks = [chunk async for chunk in model(stage).astream("hello")]
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    streamed = summed(chunks)
    assert streamed.text == whole.text
    assert streamed.usage_metadata == whole.usage_metadata
    ids = {message.response_metadata.pop("id") for message in (streamed, whole)}
    assert len(ids) == 2
    assert streamed.response_metadata == whole.response_metadata


async def test_tool_calls_come_in_pieces(stage: Stage) -> None:
    """D7: pieces of a call are of the same index, name and id are in the first alone, and they add up to the call."""
    chunks = [chunk async for chunk in model(stage).bind_tools([get_weather]).astream("weather?")]
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]  # type: ignore[attr-defined]
    assert len(pieces) > 1
    assert {piece["index"] for piece in pieces} == {0}
    assert [piece["name"] for piece in pieces] == ["get_weather"] + [None] * (len(pieces) - 1)
    (call,) = summed(chunks).tool_calls  # type: ignore[arg-type]
    assert call["args"] == {"location": "San Francisco, CA"}


def test_arguments_that_are_no_object_are_invalid_calls() -> None:
    """D7: what a model wrote wrongly is kept as it is, and is no call to be made."""
    functions = [{"name": "f", "arguments": text} for text in ('{"a": ', "[1]", "", "{}")]
    calls = [{"id": str(number), "type": "function", "function": each} for number, each in enumerate(functions)]
    choice = {"index": 0, "message": {"role": "assistant", "content": None, "tool_calls": calls}}
    message = message_of(Completion.of({"choices": [choice]}))
    assert [call["id"] for call in message.invalid_tool_calls] == ["0", "1"]
    assert [call["args"] for call in message.invalid_tool_calls] == ['{"a": ', "[1]"]
    assert [(call["id"], call["args"]) for call in message.tool_calls] == [("2", {}), ("3", {})]


def test_what_is_not_known_is_not_told() -> None:
    """An answer that does not say what it used has no usage, rather than one of zero."""
    message = message_of(Completion.of({"choices": [{"message": {"content": "hi", "refusal": "no"}}]}))
    assert message.usage_metadata is None
    assert message.response_metadata == {}
    assert message.additional_kwargs == {"refusal": "no"}


async def test_each_choice_is_a_generation(stage: Stage) -> None:
    """Several answers to one question are several generations, and what they used is told once."""
    result = await model(stage, model_kwargs={"n": 3}).agenerate([[HumanMessage("hello")]])
    messages = [each.message for each in result.generations[0]]  # type: ignore[union-attr]
    assert [message.text for message in messages] == ["Echo: hello"] * 3
    used = [message.usage_metadata for message in messages if isinstance(message, AIMessage)]
    assert [each is not None for each in used] == [True, False, False]


# --------------------------------------------------------------------------- structured output


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
@pytest.mark.parametrize("schema", [Joke, Joke.model_json_schema()], ids=["class", "dict"])
async def test_structured_output(stage: Stage, method: Any, schema: Any) -> None:
    """D7: answers of a schema, by every method, as an object of its class or as a dict."""
    answer = await model(stage).with_structured_output(schema, method=method).ainvoke("a joke in JSON")
    assert isinstance(answer, Joke if schema is Joke else dict)
    if method == "function_calling":
        assert stage.body["tool_choice"] == {"type": "function", "function": {"name": "Joke"}}
    elif method == "json_schema":
        told = stage.body["response_format"]["json_schema"]
        assert told["name"] == "Joke"
        assert set(told["schema"]["properties"]) == {"setup", "punchline"}
    else:
        assert stage.body["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
async def test_strict_holds_the_provider_to_the_schema(stage: Stage, method: Any) -> None:
    """D7: `strict` is sent, and the schema is then one that leaves no other members."""
    await model(stage).with_structured_output(Joke, method=method, strict=True).ainvoke("a joke")
    body = stage.body
    if method == "json_schema":
        told = body["response_format"]["json_schema"]
        schema = told["schema"]
    else:
        told = body["tools"][0]["function"]
        schema = told["parameters"]
    assert told["strict"] is True
    assert schema["additionalProperties"] is False


async def test_raw_answers_beside_what_was_parsed(stage: Stage) -> None:
    """D7: with `include_raw` an answer that cannot be parsed is told, not raised."""
    chat = model(stage).with_structured_output(Joke, method="json_schema", include_raw=True)
    good = await chat.ainvoke("a joke")
    stage.provider.script(Behaviour.answer("no joke"))
    bad = await chat.ainvoke("a joke")
    assert isinstance(good["parsed"], Joke)
    assert isinstance(good["raw"], AIMessage)
    assert good["parsing_error"] is None
    assert bad["parsed"] is None
    assert bad["parsing_error"] is not None
    assert bad["raw"].text == "no joke"


@pytest.mark.parametrize(("schema", "method"), [(Joke, "telepathy"), (None, "json_schema"), (None, "function_calling")])
def test_structured_output_says_what_it_needs(stage: Stage, schema: Any, method: Any) -> None:
    """A method that there is not, or that needs a schema, is an error at once."""
    with pytest.raises(ValueError, match=r"method|schema"):
        model(stage).with_structured_output(schema, method=method)


async def test_json_mode_needs_no_schema(stage: Stage) -> None:
    """Any JSON is parsed where only JSON was asked for."""
    assert set(await model(stage).with_structured_output(method="json_mode").ainvoke("JSON")) == {"setup", "punchline"}


# -------------------------------------------------------------------------- loops and threads


async def test_synchronous_code_asks_in_its_own_admission(stage: Stage) -> None:
    """D7: `invoke` and `stream` on a worker thread belong to the request that has started it."""
    async with stage.guard.open(Context(caller="bob")):
        await asyncio.to_thread(model(stage).invoke, "hello")
        await asyncio.to_thread(lambda: list(model(stage).stream("hello")))
        await model(stage).ainvoke("hello")
    records = await stage.guard.storage.records()
    assert [record.caller for record in records[-3:]] == ["bob"] * 3


@pytest.mark.parametrize("how", ["invoke", "stream"])
async def test_synchronous_methods_do_not_block_a_loop(stage: Stage, how: str) -> None:
    """Called on an event loop's thread they say so, rather than stop it; nothing is sent."""
    with pytest.raises(ContextError, match="event loop's thread"):
        list(getattr(model(stage), how)("hello"))
    assert stage.provider.requests == []


@pytest.mark.parametrize("how", ["stream", "astream"])
async def test_leaving_a_stream_tells_the_provider(stage: Stage, how: str) -> None:
    """D7: whoever leaves a stream in the middle closes it, and pays for what came."""
    before = stage.provider.disconnects
    stage.provider.script(Behaviour(output_tokens=50, paced=True))
    stage.provider.release(3)
    if how == "astream":
        stream: Any = model(stage).astream("hello")
        await anext(stream)
        await stream.aclose()
    else:

        def leave() -> None:
            for _ in model(stage).stream("hello"):
                break

        await asyncio.to_thread(leave)
    await stage.provider.until(lambda: stage.provider.disconnects == before + 1)


@pytest.mark.parametrize("how", ["stream", "astream"])
@pytest.mark.parametrize("trouble", ["fail_after", "cut_after"])
async def test_errors_in_mid_stream_are_raised(stage: Stage, how: str, trouble: str) -> None:
    """D7: a stream that tells an error, or breaks off, is not taken for a complete answer; what came was given."""
    stage.provider.script(Behaviour(text="one two three", **{trouble: 2}))  # type: ignore[arg-type]
    chunks: list[BaseMessage] = []

    def read() -> None:
        chunks.extend(model(stage).stream("hello"))

    with pytest.raises(StreamFailed) as raised:
        if how == "astream":
            async for chunk in model(stage).astream("hello"):
                chunks.append(chunk)
        else:
            await asyncio.to_thread(read)
    assert raised.value.error["message"] == str(raised.value)
    assert "".join(chunk.text for chunk in chunks).strip() == "one two"


async def test_refusals_and_unknown_models_are_raised(stage: Stage) -> None:
    """What the gateway raises comes to whoever asks the model: a refusal, a model that nobody serves."""
    with pytest.raises(UnknownModel):
        await model(stage, model="nobody/serves-it").ainvoke("hello")
    guard = Guard([ModelAllow(["openai/large"])], prices=stage.guard.prices)
    async with guard, Gateway(guard, stage.gateway.deployments, context=CONTEXT) as gateway:
        with pytest.raises(LimitExceeded):
            await GatewayChatModel(gateway=gateway, model="openai/small").ainvoke("hello")
    assert stage.provider.requests == []


# ---------------------------------------------------------------------------------- about it


def test_profile_has_the_smallest_window(stage: Stage) -> None:
    """D7: the profile's window is that of the smallest deployment of the group, and none if one is not known."""
    deployments = [
        Deployment(provider="openai", model="m", name=str(window), api_key="k", groups=("pair",), context_window=window)
        for window in (200_000, 100_000)
    ]
    guard = Guard(prices=stage.guard.prices)
    gateway = Gateway(guard, deployments)
    assert GatewayChatModel(gateway=gateway, model="pair").profile == {"max_input_tokens": 100_000}
    gateway.add(Deployment(provider="openai", model="never-heard-of", name="x", api_key="k", groups=("pair",)))
    assert GatewayChatModel(gateway=gateway, model="pair").profile is None
    assert GatewayChatModel(gateway=Gateway(guard), model="pair").profile is None
    given = GatewayChatModel(gateway=gateway, model="pair", profile={"max_input_tokens": 5})
    assert given.profile == {"max_input_tokens": 5}


@pytest.mark.parametrize(("name", "provider"), [("openai/small", "openai"), ("one", "asgi_llm_guard")])
def test_traces_name_provider_and_model(stage: Stage, name: str, provider: str) -> None:
    """D7: what traces are told: the name that is asked for, its provider where the name says it, and the options."""
    params = model(stage, model=name, temperature=0.5, max_tokens=9, stop=["END"])._get_ls_params()
    assert params == {
        "ls_provider": provider,
        "ls_model_name": name,
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["END"],
    }


def test_no_key_is_shown(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """No key is in what is shown, serialised, traced or logged of the model; the rest of it is."""
    chat = model(stage, temperature=0.5)
    caplog.set_level(logging.DEBUG)
    list(chat.stream("hello"))
    shown = [repr(chat), str(chat), dumps(chat), json.dumps(chat.model_dump()), json.dumps(chat.asdict()), caplog.text]
    assert [KEY in text for text in shown] == [False] * len(shown)
    assert chat.model_dump(exclude_none=True)["model"] == "one"
    assert chat._identifying_params == {"model": "one", "fallbacks": True, "temperature": 0.5}


async def test_conversations_go_on_at_another_provider(stage: Stage) -> None:
    """D7: tool calls and their results are understood by a provider whose API is another one."""
    chat = model(stage).bind_tools([get_weather])
    asked: list[BaseMessage] = [SystemMessage("be kind"), HumanMessage("weather?")]
    called = await chat.ainvoke(asked)
    (call,) = called.tool_calls
    answer = await chat.ainvoke([*asked, called, get_weather.invoke(call)], model="anthropic/claude-small")
    assert answer.response_metadata["model_name"] == "claude-small"
    assert stage.body["system"]
    used, result = stage.body["messages"][-2]["content"], stage.body["messages"][-1]["content"]
    assert [(block["type"], block["id"]) for block in used] == [("tool_use", call["id"])]
    assert [(block["type"], block["tool_use_id"]) for block in result] == [("tool_result", call["id"])]
