"""Cohere's APIs as Cohere's SDK reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import pytest
from cohere.core.api_error import ApiError
from cohere.core.request_options import RequestOptions
from tests.plain import PLAIN
from tests.testing.speech.requests import ECHO, HELLO

from asgi_llm_guard.testing import Behaviour, FakeProvider, Price, asgi_client

ASKED: Any = [{"role": "user", "content": HELLO}]
ONCE = RequestOptions(max_retries=0)


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def client(provider: FakeProvider) -> Iterator[cohere.ClientV2]:
    with provider.serve() as base_url, httpx.Client(**PLAIN) as http:
        yield cohere.ClientV2(api_key="any", base_url=base_url.root, httpx_client=http)


def test_chat(provider: FakeProvider, client: cohere.ClientV2) -> None:
    """The numbers are floating, and those of the bill."""
    provider.script(Behaviour.answer("one two", input_tokens=100, cache_read_tokens=40))
    answer = client.chat(model="m", messages=ASKED)

    assert answer.message.content is not None
    (part,) = answer.message.content
    assert part.type == "text"
    assert part.text == "one two"
    usage: Any = answer.usage
    assert (usage.tokens.input_tokens, usage.tokens.output_tokens, usage.cached_tokens) == (100.0, 2.0, 40.0)
    assert provider.bill[0].usage.total_tokens == 102


@pytest.mark.anyio
async def test_numbers_have_a_decimal_point() -> None:
    """On the wire every count is a floating number."""
    async with asgi_client(FakeProvider()) as http:
        answer = await http.post("/v2/chat", json={"model": "m", "messages": ASKED})

    assert b'"input_tokens":13.0,"output_tokens":6.0' in answer.content


def test_chat_stream(provider: FakeProvider, client: cohere.ClientV2) -> None:
    """The last event says what was used."""
    events: list[Any] = list(client.chat_stream(model="m", messages=ASKED))

    text = "".join(event.delta.message.content.text for event in events if event.type == "content-delta")
    assert text == ECHO
    assert (events[-1].type, events[-1].delta.finish_reason) == ("message-end", "COMPLETE")
    assert events[-1].delta.usage.tokens.output_tokens == provider.bill[0].output_tokens == 6


def test_tools(provider: FakeProvider, client: cohere.ClientV2) -> None:
    """The call of a tool comes with its arguments, in one piece or in many."""
    provider.script(*[Behaviour.call_tool("search", query="llamas and alpacas")] * 2)
    answer = client.chat(model="m", messages=ASKED)
    events: list[Any] = list(client.chat_stream(model="m", messages=ASKED))

    assert answer.finish_reason == "TOOL_CALL"
    assert answer.message.tool_calls is not None
    function: Any = answer.message.tool_calls[0].function
    assert (function.name, json.loads(function.arguments)) == ("search", {"query": "llamas and alpacas"})
    parts = [event.delta.message.tool_calls.function.arguments for event in events if event.type == "tool-call-delta"]
    assert json.loads("".join(parts)) == {"query": "llamas and alpacas"}


def test_error_inside_a_stream(provider: FakeProvider, client: cohere.ClientV2) -> None:
    """A failure is told by the last event, without usage."""
    provider.script(Behaviour.stream_error(after_chunks=1))
    last: Any = list(client.chat_stream(model="m", messages=ASKED))[-1]

    assert (last.delta.finish_reason, last.delta.usage) == ("ERROR", None)
    assert "fails inside" in last.delta.error


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        (Behaviour.refuse("rate_limit"), 429),
        (Behaviour.refuse("quota"), 402),
        (Behaviour.refuse("overloaded"), 503),
        (Behaviour.refuse("context"), 400),
        (Behaviour.refuse("unknown_model"), 404),
    ],
)
def test_errors(provider: FakeProvider, client: cohere.ClientV2, behaviour: Behaviour, status: int) -> None:
    """Each kind of error has its status, and a message."""
    provider.script(behaviour)
    with pytest.raises(ApiError) as caught:
        client.chat(model="m", messages=ASKED, request_options=ONCE)

    assert caught.value.status_code == status
    assert provider.bill == []


def test_embed_and_rerank(client: cohere.ClientV2, provider: FakeProvider) -> None:
    """Vectors cost their input; a ranking costs a unit for each hundred documents."""
    embedded: Any = client.embed(
        model="m", texts=["llamas and", "alpacas"], input_type="search_query", embedding_types=["float"]
    )
    ranked: Any = client.rerank(model="m", query=HELLO, documents=[str(number) for number in range(101)], top_n=3)

    assert [len(numbers) for numbers in embedded.embeddings.float_] == [8, 8]
    assert embedded.meta.billed_units.input_tokens == provider.bill[0].input_tokens == 5
    assert [result.index for result in ranked.results] == [0, 1, 2]
    assert ranked.meta.billed_units.search_units == provider.bill[1].usage.search_units == 2
    assert Price(input=1, output=1, search_unit=2_000_000).cost_nanousd(provider.bill[1].usage) == 4_000_000


@pytest.mark.anyio
async def test_async(provider: FakeProvider) -> None:
    """The asynchronous client reads the same."""
    async with provider.serve() as base_url, httpx.AsyncClient(**PLAIN) as http:
        client = cohere.AsyncClientV2(api_key="any", base_url=base_url.root, httpx_client=http)
        answer = await client.chat(model="m", messages=ASKED)
        events = [event.type async for event in client.chat_stream(model="m", messages=ASKED)]

    assert answer.usage is not None
    assert events[-1] == "message-end"
    assert [line.reported for line in provider.bill] == [True, True]
