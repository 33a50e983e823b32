"""Gemini's APIs as Google's SDK reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from google import genai
from google.genai import errors, types
from tests.plain import PLAIN
from tests.testing.speech.requests import CONTENTS, ECHO, HELLO

from asgi_llm_guard.testing import Behaviour, FakeProvider, asgi_client


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def client(provider: FakeProvider) -> Iterator[genai.Client]:
    with provider.serve() as base_url, httpx2.Client(**PLAIN) as http:
        options = types.HttpOptions(base_url=base_url.root, httpx_client=http)
        made = genai.Client(api_key="any", http_options=options)
        yield made
        made.close()


def test_plain(provider: FakeProvider, client: genai.Client) -> None:
    """Thoughts are counted beside the answer, cached input inside the prompt, and both are on the bill."""
    provider.script(Behaviour.answer("one two", input_tokens=100, cache_read_tokens=40, reasoning_tokens=7))
    config = types.GenerateContentConfig(system_instruction="be brief")
    answer = client.models.generate_content(model="gemini-m", contents=HELLO, config=config)

    assert answer.text == "one two"
    usage = answer.usage_metadata
    assert usage is not None
    assert (usage.prompt_token_count, usage.cached_content_token_count) == (100, 40)
    assert (usage.candidates_token_count, usage.thoughts_token_count, usage.total_token_count) == (2, 7, 109)
    assert provider.bill[0].output_tokens == 9
    assert (provider.requests[0].model, provider.requests[0].texts) == ("gemini-m", ("be brief", HELLO))


def test_stream(provider: FakeProvider, client: genai.Client) -> None:
    """Every chunk says what was used so far; the last says all of it."""
    chunks = list(client.models.generate_content_stream(model="m", contents=HELLO))

    assert "".join(chunk.text or "" for chunk in chunks) == ECHO
    totals = [chunk.usage_metadata.total_token_count for chunk in chunks if chunk.usage_metadata]
    assert totals == [14, 15, 16, 17, 18, 19, 19]
    assert provider.bill[0].usage.total_tokens == 19


@pytest.mark.anyio
async def test_stream_as_an_array() -> None:
    """Without `alt=sse` the same chunks are the entries of one array, even if the last is an error."""
    provider = FakeProvider()
    provider.script(Behaviour(), Behaviour.stream_error(after_chunks=1), Behaviour.stream_error())
    async with asgi_client(provider) as http:
        good, failing, failed = [
            json.loads((await http.post("/v1beta/models/m:streamGenerateContent", json=CONTENTS)).content)
            for _ in range(3)
        ]

    texts = [entry["candidates"][0]["content"]["parts"][0]["text"] for entry in good]
    assert "".join(texts) == ECHO
    assert good[-1]["usageMetadata"]["totalTokenCount"] == 19
    assert failing[-1]["error"]["status"] == "UNAVAILABLE"
    assert len(failed) == 1


def test_candidates(provider: FakeProvider, client: genai.Client) -> None:
    """Each candidate is an answer, and all of them are billed."""
    config = types.GenerateContentConfig(candidate_count=2, max_output_tokens=2)
    answer = client.models.generate_content(model="m", contents=HELLO, config=config)

    assert answer.candidates is not None
    assert [candidate.finish_reason for candidate in answer.candidates] == [types.FinishReason.MAX_TOKENS] * 2
    assert provider.bill[0].output_tokens == 4


@pytest.mark.parametrize("streamed", [False, True])
def test_function_call(provider: FakeProvider, client: genai.Client, *, streamed: bool) -> None:
    """The call of a function comes whole, in a stream as well."""
    provider.script(Behaviour.call_tool("search", query="llamas and alpacas"))
    if streamed:
        answers = list(client.models.generate_content_stream(model="m", contents=HELLO))
    else:
        answers = [client.models.generate_content(model="m", contents=HELLO)]

    (call,) = [call for answer in answers for call in answer.function_calls or ()]
    assert (call.name, call.args) == ("search", {"query": "llamas and alpacas"})
    assert provider.bill[0].output_tokens == 4


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        (Behaviour.refuse("rate_limit", retry_after=46), "RESOURCE_EXHAUSTED"),
        (Behaviour.refuse("overloaded"), "UNAVAILABLE"),
        (Behaviour.refuse("context"), "INVALID_ARGUMENT"),
        (Behaviour.refuse("unknown_model"), "NOT_FOUND"),
        (Behaviour.error(500), "INTERNAL"),
    ],
)
def test_errors(provider: FakeProvider, client: genai.Client, behaviour: Behaviour, status: str) -> None:
    """Each kind of error is the SDK's own, with Google's word for it."""
    provider.script(behaviour)
    with pytest.raises(errors.APIError) as caught:
        client.models.generate_content(model="m", contents=HELLO)

    assert caught.value.status == status
    assert provider.bill == []
    if behaviour.headers:
        details: Any = caught.value.details
        assert details["error"]["details"][0]["retryDelay"] == "46s"


def test_error_inside_a_stream(provider: FakeProvider, client: genai.Client) -> None:
    """An error ends the stream with the SDK's error."""
    provider.script(Behaviour.stream_error(after_chunks=1))
    with pytest.raises(errors.ServerError, match="fails inside"):
        list(client.models.generate_content_stream(model="m", contents=HELLO))

    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(1, False)]


def test_embeddings(provider: FakeProvider, client: genai.Client) -> None:
    """Vectors cost their input, and do not say so."""
    answer = client.models.embed_content(model="m", contents=["llamas and", "alpacas"])

    assert answer.embeddings is not None
    assert [len(entry.values or ()) for entry in answer.embeddings] == [8, 8]
    assert [(line.input_tokens, line.output_tokens, line.reported) for line in provider.bill] == [(5, 0, False)]


def test_counting_is_free(provider: FakeProvider, client: genai.Client) -> None:
    """A count of tokens is what would be billed, and no call."""
    assert client.models.count_tokens(model="m", contents=HELLO).total_tokens == 13
    assert (provider.calls, provider.bill) == (0, [])


def test_interactions(provider: FakeProvider, client: genai.Client) -> None:
    """An interaction has its steps, and every count of the bill."""
    provider.script(Behaviour.answer("one two", input_tokens=100, cache_read_tokens=40, reasoning_tokens=7))
    answer: Any = client.interactions.create(model="m", input=HELLO)

    assert (answer.status, answer.output_text) == ("completed", "one two")
    usage = answer.usage
    assert usage is not None
    assert (usage.total_input_tokens, usage.total_cached_tokens) == (100, 40)
    assert (usage.total_output_tokens, usage.total_thought_tokens, usage.total_tokens) == (2, 7, 109)


def test_interactions_stream(provider: FakeProvider, client: genai.Client) -> None:
    """Events tell the steps, and the last one what was used."""
    events: list[Any] = list(client.interactions.create(model="m", input=HELLO, stream=True))

    assert [event.event_type for event in events if event.event_type != "step.delta"] == [
        "interaction.created",
        "step.start",
        "step.stop",
        "interaction.completed",
    ]
    assert "".join(event.delta.text for event in events if event.event_type == "step.delta") == ECHO
    assert events[-1].interaction.usage.total_tokens == provider.bill[0].usage.total_tokens == 19


def test_interactions_that_call_or_fail(provider: FakeProvider, client: genai.Client) -> None:
    """The call of a function is a step that needs an action; an error is an event."""
    provider.script(Behaviour.call_tool("search", query="llamas"), Behaviour.stream_error(after_chunks=1))
    answer: Any = client.interactions.create(model="m", input=[{"type": "text", "text": HELLO}])
    failed: list[Any] = list(client.interactions.create(model="m", input=HELLO, stream=True))

    assert answer.status == "requires_action"
    assert answer.steps is not None
    step: Any = answer.steps[0]
    assert step.type == "function_call"
    assert (step.name, step.arguments) == ("search", {"query": "llamas"})
    assert (failed[-1].event_type, failed[-1].error.code) == ("error", "api_error")


@pytest.mark.anyio
async def test_async(provider: FakeProvider) -> None:
    """The asynchronous client reads the same."""
    async with provider.serve() as base_url, httpx2.AsyncClient(**PLAIN) as http:
        options = types.HttpOptions(base_url=base_url.root, httpx_async_client=http)
        client = genai.Client(api_key="any", http_options=options)
        answer = await client.aio.models.generate_content(model="m", contents=HELLO)
        chunks = [chunk async for chunk in await client.aio.models.generate_content_stream(model="m", contents=HELLO)]
        await client.aio.aclose()
        client.close()

    assert answer.text == "".join(chunk.text or "" for chunk in chunks) == ECHO
    assert [line.reported for line in provider.bill] == [True, True]
