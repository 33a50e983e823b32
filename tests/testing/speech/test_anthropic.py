"""Anthropic messages as Anthropic's SDK reads them, directly and behind Bedrock."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx2
import pytest
from tests.plain import PLAIN
from tests.testing.speech.requests import ECHO, HELLO

from asgi_llm_guard.testing import Behaviour, FakeProvider, Price

pytestmark = pytest.mark.anyio

ASKED: Any = [{"role": "user", "content": HELLO}]
COUNTS = Behaviour.answer(
    "one two",
    input_tokens=100,
    cache_read_tokens=40,
    cache_write_tokens=20,
    cache_write_1h_tokens=5,
    reasoning_tokens=7,
)


@asynccontextmanager
async def sdk(provider: FakeProvider) -> AsyncGenerator[anthropic.AsyncAnthropic]:
    async with (
        provider.serve() as base_url,
        httpx2.AsyncClient(**PLAIN) as http,
        anthropic.AsyncAnthropic(api_key="any", base_url=base_url.root, max_retries=0, http_client=http) as client,
    ):
        yield client


async def test_plain_and_streamed_counts() -> None:
    """Fresh input, cache reads, both kinds of cache writes and thoughts are told apart, and add up to the bill."""
    price = Price(input=3_000, output=15_000, cache_read=300, cache_write=3_750, cache_write_1h=6_000)
    provider = FakeProvider(prices={"m": price}, default=COUNTS)
    async with sdk(provider) as client:
        answer = await client.messages.create(model="m", max_tokens=100, messages=ASKED, system="be brief")
        async with client.messages.stream(model="m", max_tokens=100, messages=ASKED) as stream:
            streamed = await stream.get_final_message()

    for message in (answer, streamed):
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (40, 40, 20)
        assert usage.cache_creation is not None
        assert usage.cache_creation.ephemeral_5m_input_tokens == 15
        assert usage.cache_creation.ephemeral_1h_input_tokens == 5
        assert usage.output_tokens == 9
        assert usage.output_tokens_details is not None
        assert usage.output_tokens_details.thinking_tokens == 7
    cost = 40 * 3_000 + 40 * 300 + 15 * 3_750 + 5 * 6_000 + 9 * 15_000
    assert [line.cost_nanousd for line in provider.bill] == [cost, cost]
    assert provider.requests[0].texts == ("be brief", HELLO)


async def test_stream() -> None:
    """A stream is put together to its text; what it used stands at both of its ends."""
    provider = FakeProvider()
    async with sdk(provider) as client:
        async with client.messages.stream(model="m", max_tokens=100, messages=ASKED) as stream:
            text = "".join([word async for word in stream.text_stream])
        events: list[Any] = [
            event async for event in await client.messages.create(model="m", max_tokens=2, messages=ASKED, stream=True)
        ]

    assert text == ECHO
    assert (events[0].message.usage.input_tokens, events[0].message.usage.output_tokens) == (13, 1)
    assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("max_tokens", 2)
    assert [line.reported for line in provider.bill] == [True, True]


async def test_tool_call() -> None:
    """The call of a tool comes with its arguments, in one piece or in many."""
    provider = FakeProvider(default=Behaviour.call_tool("search", query="llamas and alpacas"))
    async with sdk(provider) as client:
        answer = await client.messages.create(model="m", max_tokens=100, messages=ASKED)
        async with client.messages.stream(model="m", max_tokens=100, messages=ASKED) as stream:
            streamed = await stream.get_final_message()

    for message in (answer, streamed):
        (block,) = message.content
        assert block.type == "tool_use"
        assert (block.name, block.input) == ("search", {"query": "llamas and alpacas"})
        assert message.stop_reason == "tool_use"


async def test_nothing_is_said_of_usage() -> None:
    """An answer without usage is still one that the SDK can put together."""
    provider = FakeProvider(default=Behaviour.no_usage())
    async with sdk(provider) as client:
        answer = await client.messages.create(model="m", max_tokens=100, messages=ASKED)
        async with client.messages.stream(model="m", max_tokens=100, messages=ASKED) as stream:
            streamed = await stream.get_final_message()

    told: tuple[object, object] = (answer.usage.input_tokens, streamed.usage.output_tokens)
    assert told == (None, None)
    assert [line.reported for line in provider.bill] == [False, False]


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Behaviour.refuse("rate_limit"), anthropic.RateLimitError),
        (Behaviour.refuse("quota"), anthropic.EnforcedSpendLimitReachedError),
        (Behaviour.refuse("overloaded"), anthropic.OverloadedError),
        (Behaviour.refuse("context"), anthropic.BadRequestError),
        (Behaviour.refuse("unknown_model"), anthropic.NotFoundError),
        (Behaviour.error(402), anthropic.PaymentRequiredError),
    ],
)
async def test_errors(behaviour: Behaviour, error: type[Exception]) -> None:
    """Each kind of error is the SDK's own."""
    provider = FakeProvider(default=behaviour)
    async with sdk(provider) as client:
        with pytest.raises(error):
            await client.messages.create(model="m", max_tokens=100, messages=ASKED)

    assert [(attempt.billed, attempt.retry) for attempt in provider.attempts] == [(False, 0)]


async def test_error_inside_a_stream() -> None:
    """An error event ends the stream with the SDK's error, after the words before it."""
    provider = FakeProvider(default=Behaviour.stream_error(after_chunks=2))
    words = []
    async with sdk(provider) as client:
        with pytest.raises(anthropic.APIStatusError, match="fails inside"):
            async with client.messages.stream(model="m", max_tokens=100, messages=ASKED) as stream:
                async for word in stream.text_stream:
                    words.append(word)

    assert words == ["Echo: ", "say "]
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(2, False)]


async def test_counting_is_free() -> None:
    """A count of tokens is what would be billed, and no call."""
    provider = FakeProvider()
    async with sdk(provider) as client:
        counted = await client.messages.count_tokens(model="m", messages=ASKED)

    assert counted.input_tokens == 13
    assert (provider.calls, provider.others) == (0, ["POST /v1/messages/count_tokens"])


def test_behind_bedrock() -> None:
    """The same SDK reads the frames of Bedrock, and the model of the path is billed."""
    provider = FakeProvider(default=COUNTS)
    with (
        provider.serve() as base_url,
        httpx2.Client(**PLAIN) as http,
        anthropic.AnthropicBedrock(
            aws_access_key="any",
            aws_secret_key="any",
            aws_region="eu-central-1",
            base_url=base_url.root,
            http_client=http,
        ) as client,
    ):
        answer = client.messages.create(model="eu.anthropic.claude-m-v1:0", max_tokens=100, messages=ASKED)
        with client.messages.stream(model="eu.anthropic.claude-m-v1:0", max_tokens=100, messages=ASKED) as stream:
            streamed = stream.get_final_message()

    assert answer.usage.cache_read_input_tokens == streamed.usage.cache_read_input_tokens == 40
    assert [(line.dialect, line.model) for line in provider.bill] == [
        ("bedrock_anthropic", "eu.anthropic.claude-m-v1:0")
    ] * 2


def test_behind_vertex() -> None:
    """The same SDK finds its messages on the paths of Vertex, where the model and the stream are in the path."""
    provider = FakeProvider()
    with (
        provider.serve() as base_url,
        httpx2.Client(**PLAIN) as http,
        anthropic.AnthropicVertex(
            region="eu", project_id="p", access_token="any", base_url=f"{base_url.root}/v1", http_client=http
        ) as client,
    ):
        answer = client.messages.create(model="claude-m@1", max_tokens=100, messages=ASKED)
        with client.messages.stream(model="claude-m@1", max_tokens=100, messages=ASKED) as stream:
            streamed = stream.get_final_text()

    assert answer.content[0].type == "text"
    assert answer.content[0].text == streamed == ECHO
    assert [line.model for line in provider.bill] == ["claude-m@1"] * 2
