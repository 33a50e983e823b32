"""The SDKs of OpenAI and Anthropic read what the other provider answered."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx2
import msgspec
import openai
import pytest
from tests.gateway.translate.kit import Translating, metered

from asgi_llm_guard.testing import Behaviour, FakeProvider
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_named

pytestmark = pytest.mark.anyio

TOOL: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
BUCKETS: Any = {"input_tokens": 900, "cache_read_tokens": 500, "cache_write_tokens": 200, "reasoning_tokens": 12}


def openai_client(provider: FakeProvider) -> tuple[openai.AsyncOpenAI, Translating]:
    transport = Translating(provider, "openai", "anthropic")
    client = httpx2.AsyncClient(transport=transport)
    return openai.AsyncOpenAI(api_key="k", base_url="http://gateway/v1", http_client=client, max_retries=0), transport


def anthropic_client(provider: FakeProvider) -> tuple[anthropic.AsyncAnthropic, Translating]:
    transport = Translating(provider, "anthropic", "openai")
    client = httpx2.AsyncClient(transport=transport)
    return anthropic.AsyncAnthropic(
        api_key="k", base_url="http://gateway", http_client=client, max_retries=0
    ), transport


async def test_openai_sdk_reads_an_answer_of_anthropic() -> None:
    """D7: text, reason, model and usage with its buckets reach OpenAI's SDK, and the bill is the same."""
    provider = FakeProvider(default=Behaviour.answer("a quiet harbour", cache_write_1h_tokens=150, **BUCKETS))
    client, transport = openai_client(provider)

    completion = await client.chat.completions.create(
        model="claude-opus-5", messages=[{"role": "user", "content": "Where?"}]
    )

    assert completion.choices[0].message.content == "a quiet harbour"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "claude-opus-5"
    assert completion.created == 1_790_000_000
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (900, 15, 915)
    assert usage.prompt_tokens_details.cached_tokens == 500
    assert usage.prompt_tokens_details.cache_write_tokens == 200
    assert usage.completion_tokens_details.reasoning_tokens == 12
    assert_same_usage("anthropic", transport.received, "openai", transport.written)
    assert provider.bill[0].usage.cache_write_1h_tokens == 150


async def test_anthropic_sdk_reads_an_answer_of_openai() -> None:
    """D7: text, reason, model and usage with its buckets reach Anthropic's SDK, and the bill is the same."""
    provider = FakeProvider(default=Behaviour.answer("a quiet harbour", **BUCKETS))
    client, transport = anthropic_client(provider)

    message = await client.messages.create(
        model="gpt-nova", max_tokens=100, messages=[{"role": "user", "content": "Where?"}]
    )

    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "a quiet harbour"}]
    assert message.stop_reason == "end_turn"
    assert message.model == "gpt-nova"
    assert message.usage.output_tokens == 15
    assert message.usage.cache_read_input_tokens == 500
    total = message.usage.input_tokens + 500 + (message.usage.cache_creation_input_tokens or 0)
    assert total == 900
    assert_same_usage("openai", transport.received, "anthropic", transport.written)


async def test_openai_sdk_reads_a_stream_of_anthropic() -> None:
    """D7: the pieces add up to the answer, and the chunk with the usage comes last because it was asked for."""
    provider = FakeProvider(default=Behaviour.answer("one two three", cache_write_1h_tokens=150, **BUCKETS))
    client, transport = openai_client(provider)

    stream = await client.chat.completions.create(
        model="claude-opus-5",
        messages=[{"role": "user", "content": "Count."}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 900
    assert metered("openai", transport.written).usage == same_tier(metered("anthropic", transport.received).usage)


async def test_no_usage_chunk_unless_asked() -> None:
    """A client that did not ask for usage gets no chunk without choices."""
    client, _ = openai_client(FakeProvider())

    stream = await client.chat.completions.create(
        model="claude-opus-5", messages=[{"role": "user", "content": "Count."}], stream=True
    )

    assert all(chunk.choices and chunk.usage is None for chunk in [chunk async for chunk in stream])


async def test_anthropic_sdk_reads_a_stream_of_openai() -> None:
    """D7: Anthropic's SDK accumulates the events to the message, whose usage comes with the last of them."""
    provider = FakeProvider(default=Behaviour.answer("one two three", **BUCKETS))
    client, transport = anthropic_client(provider)

    async with client.messages.stream(
        model="gpt-nova", max_tokens=50, messages=[{"role": "user", "content": "Count."}]
    ) as stream:
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()

    assert "".join(texts) == "one two three"
    assert message.stop_reason == "end_turn"
    assert message.usage.cache_read_input_tokens == 500
    assert message.usage.output_tokens == 15
    expected, seen = metered("openai", transport.received).usage, metered("anthropic", transport.written).usage
    assert seen == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_sdk_reads_a_tool_call_of_anthropic(*, stream: bool) -> None:
    """D7: name, arguments and reason of a tool call, whole and streamed; its result goes back to the provider."""
    provider = FakeProvider()
    provider.script(Behaviour.call_tool("weather", city="Ulm"), Behaviour.answer("dry"))
    client, transport = openai_client(provider)
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": TOOL}}]
    messages: list[Any] = [{"role": "user", "content": "Rain?"}]

    if stream:
        async with client.chat.completions.stream(model="claude-opus-5", messages=messages, tools=tools) as events:
            completion: Any = await events.get_final_completion()
    else:
        completion = await client.chat.completions.create(model="claude-opus-5", messages=messages, tools=tools)
    choice = completion.choices[0]
    call = choice.message.tool_calls[0]
    messages.append(choice.message.to_dict())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "none"})
    await client.chat.completions.create(model="claude-opus-5", messages=messages, tools=tools)

    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("weather", '{"city":"Ulm"}')
    assert transport.sent[1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": call.id, "name": "weather", "input": {"city": "Ulm"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "none"}]},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropic_sdk_reads_a_tool_call_of_openai(*, stream: bool) -> None:
    """D7: name, arguments and reason of a tool call, whole and streamed; its result goes back to the provider."""
    provider = FakeProvider()
    provider.script(Behaviour.call_tool("weather", city="Ulm"), Behaviour.answer("dry"))
    client, transport = anthropic_client(provider)
    tools: Any = [{"name": "weather", "input_schema": TOOL}]
    messages: list[Any] = [{"role": "user", "content": "Rain?"}]

    if stream:
        async with client.messages.stream(model="gpt", max_tokens=90, messages=messages, tools=tools) as events:
            message: Any = await events.get_final_message()
    else:
        message = await client.messages.create(model="gpt", max_tokens=90, messages=messages, tools=tools)
    block = message.content[0]
    messages.append({"role": "assistant", "content": [block.to_dict()]})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "no report", "is_error": True}
    messages.append({"role": "user", "content": [result]})
    await client.messages.create(model="gpt", max_tokens=90, messages=messages, tools=tools)

    assert message.stop_reason == "tool_use"
    assert (block.type, block.name, block.input) == ("tool_use", "weather", {"city": "Ulm"})
    assert transport.sent[1]["messages"][2] == {
        "role": "tool",
        "tool_call_id": block.id,
        "content": "Error: no report",
    }


@pytest.mark.parametrize(
    "trouble, error, status",
    [
        ("rate_limit", openai.RateLimitError, 429),
        ("overloaded", openai.InternalServerError, 503),
        ("context", openai.BadRequestError, 400),
        ("unknown_model", openai.NotFoundError, 404),
        ("quota", openai.APIStatusError, 402),
    ],
)
async def test_openai_sdk_reads_errors_of_anthropic(
    trouble: Any, error: type[openai.APIStatusError], status: int
) -> None:
    """A refusal of Anthropic's raises the class that OpenAI's users catch; an overflow has the code they know."""
    client, _ = openai_client(FakeProvider(default=Behaviour.refuse(trouble)))

    with pytest.raises(error) as raised:
        await client.chat.completions.create(model="claude", messages=[{"role": "user", "content": "?"}])

    assert raised.value.status_code == status
    if trouble == "context":
        assert raised.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "trouble, error, status",
    [
        ("rate_limit", anthropic.RateLimitError, 429),
        ("overloaded", anthropic.InternalServerError, 529),
        ("context", anthropic.BadRequestError, 400),
        ("unknown_model", anthropic.NotFoundError, 404),
        ("quota", anthropic.APIStatusError, 402),
    ],
)
async def test_anthropic_sdk_reads_errors_of_openai(
    trouble: Any, error: type[anthropic.APIStatusError], status: int
) -> None:
    """A refusal of OpenAI's raises the class that Anthropic's users catch."""
    client, _ = anthropic_client(FakeProvider(default=Behaviour.refuse(trouble)))

    with pytest.raises(error) as raised:
        await client.messages.create(model="gpt", max_tokens=5, messages=[{"role": "user", "content": "?"}])

    assert raised.value.status_code == status


@pytest.mark.parametrize("behaviour", [Behaviour.stream_error(after_chunks=1), Behaviour.malformed()])
async def test_sdks_raise_in_a_broken_stream(behaviour: Behaviour) -> None:
    """An error in the middle of a stream, and one that cannot be read, raise in the SDKs of both sides."""
    of_openai, _ = openai_client(FakeProvider(default=behaviour))
    of_anthropic, _ = anthropic_client(FakeProvider(default=behaviour))

    with pytest.raises(openai.APIError):
        async for _chunk in await of_openai.chat.completions.create(
            model="claude", messages=[{"role": "user", "content": "a b c"}], stream=True
        ):
            pass
    with pytest.raises(anthropic.APIError):
        async for _event in await of_anthropic.messages.create(
            model="gpt", max_tokens=9, messages=[{"role": "user", "content": "a b c"}], stream=True
        ):
            pass


async def test_openai_sdk_parses_structured_output_of_anthropic() -> None:
    """D7: a JSON schema reaches Anthropic as its own output format, and the answer is the JSON text."""
    provider = FakeProvider(default=Behaviour.answer('{"city": "Ulm"}'))
    client, transport = openai_client(provider)
    schema = {**TOOL, "required": ["city"], "additionalProperties": False}

    completion = await client.chat.completions.create(
        model="claude-opus-5",
        messages=[{"role": "user", "content": "Where?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}},
    )

    assert completion.choices[0].message.content == '{"city": "Ulm"}'
    assert transport.sent[0]["output_config"] == {"format": {"type": "json_schema", "schema": schema}}


def same_tier(usage: Usage | None) -> Usage | None:
    """Anthropic's `standard` is OpenAI's `default`."""
    assert usage is not None
    names = {"standard": "default"}
    tier = usage.service_tier
    return msgspec.structs.replace(usage, service_tier=None if tier is None else names.get(tier, tier))


def assert_same_usage(spoken: str, received: bytes, asked: str, written: bytes) -> None:
    one = dialect_named(spoken).read_response(200, received).usage
    other = dialect_named(asked).read_response(200, written).usage
    assert one is not None
    assert same_tier(other) == same_tier(one)
