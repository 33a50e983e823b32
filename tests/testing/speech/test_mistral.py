"""Mistral's chat as Mistral's SDK reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from mistralai.client import Mistral
from mistralai.client.errors import HTTPValidationError, SDKError
from tests.plain import PLAIN
from tests.testing.speech.requests import ECHO, HELLO

from asgi_llm_guard.testing import Behaviour, FakeProvider

ASKED: Any = [{"role": "user", "content": HELLO}]


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider(platform="mistral")


@pytest.fixture
def client(provider: FakeProvider) -> Iterator[Mistral]:
    with (
        provider.serve() as base_url,
        httpx2.Client(**PLAIN) as http,
        Mistral(api_key="any", server_url=base_url.root, client=http) as made,
    ):
        yield made


def test_plain(provider: FakeProvider, client: Mistral) -> None:
    """Cached input is told in two places, and is part of the prompt."""
    provider.script(Behaviour.answer("one two", input_tokens=100, cache_read_tokens=40))
    answer = client.chat.complete(model="m", messages=ASKED)

    message: Any = answer.choices[0].message
    assert message.content == "one two"
    usage: Any = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (100, 2, 102)
    assert usage.num_cached_tokens == 40
    assert provider.bill[0].usage.total_tokens == 102


def test_stream(provider: FakeProvider, client: Mistral) -> None:
    """Usage comes unasked, with the end of the last choice."""
    chunks = [event.data for event in client.chat.stream(model="m", messages=ASKED)]

    assert "".join(str(chunk.choices[0].delta.content) for chunk in chunks) == ECHO
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == provider.bill[0].usage.total_tokens == 19
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_call(provider: FakeProvider, client: Mistral, *, streamed: bool) -> None:
    """The call of a tool comes whole, in a stream as well."""
    provider.script(Behaviour.call_tool("search", query="llamas and alpacas"))
    if streamed:
        parts: list[Any] = [event.data.choices[0].delta for event in client.chat.stream(model="m", messages=ASKED)]
    else:
        parts = [client.chat.complete(model="m", messages=ASKED).choices[0].message]

    (call,) = [call for part in parts for call in part.tool_calls or ()]
    assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"query": "llamas and alpacas"})


def test_nothing_is_said_of_usage(provider: FakeProvider, client: Mistral) -> None:
    """An answer without counts is still one that the SDK takes."""
    provider.script(Behaviour.no_usage())
    answer = client.chat.complete(model="m", messages=ASKED)

    assert answer.choices[0].finish_reason == "stop"
    assert not provider.bill[0].reported


@pytest.mark.parametrize(
    ("behaviour", "error", "said"),
    [
        (Behaviour.refuse("rate_limit"), SDKError, '"code":"1300"'),
        (Behaviour.refuse("quota"), SDKError, "Status 402"),
        (Behaviour.refuse("context"), SDKError, "maximum context length"),
        (Behaviour.error(422), HTTPValidationError, "detail"),
        (Behaviour.error(500), SDKError, "Status 500"),
    ],
)
def test_errors(
    provider: FakeProvider, client: Mistral, behaviour: Behaviour, error: type[Exception], said: str
) -> None:
    """Errors have no wrapper, but those of a request's form."""
    provider.script(behaviour)
    with pytest.raises(error) as caught:
        client.chat.complete(model="m", messages=ASKED)

    assert said in str(caught.value)
    assert provider.bill == []


@pytest.mark.anyio
async def test_async(provider: FakeProvider) -> None:
    """The asynchronous client reads the same."""
    async with (
        provider.serve() as base_url,
        httpx2.AsyncClient(**PLAIN) as http,
        Mistral(api_key="any", server_url=base_url.root, async_client=http) as client,
    ):
        answer = await client.chat.complete_async(model="m", messages=ASKED)
        chunks = [event.data async for event in await client.chat.stream_async(model="m", messages=ASKED)]

    assert answer.usage.total_tokens == 19
    assert chunks[-1].usage is not None
    assert [line.reported for line in provider.bill] == [True, True]
