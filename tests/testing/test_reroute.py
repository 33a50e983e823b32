"""Requests to real hosts that a fake provider answers."""

from __future__ import annotations

from typing import Any

import anthropic
import groq
import httpx
import httpx2
import openai
import pytest
from mistralai.client import Mistral

from asgi_llm_guard.testing import FakeProvider, Rerouted

pytestmark = pytest.mark.anyio

ASKED: Any = [{"role": "user", "content": "say hello"}]


async def test_async_clients_keep_their_hosts() -> None:
    """SDKs call the addresses that they know, and the host tells the provider whose words to use."""
    provider = FakeProvider()
    async with (
        provider.serve() as base_url,
        httpx2.AsyncClient(transport=Rerouted(httpx2.AsyncHTTPTransport(), base_url)) as http,
        httpx.AsyncClient(transport=Rerouted(httpx.AsyncHTTPTransport(), base_url)) as older,
    ):
        await openai.AsyncOpenAI(api_key="any", http_client=http).chat.completions.create(model="m", messages=ASKED)
        await anthropic.AsyncAnthropic(api_key="any", http_client=http).messages.create(
            model="m", max_tokens=9, messages=ASKED
        )
        await Mistral(api_key="any", async_client=http).chat.complete_async(model="m", messages=ASKED)
        stream = await groq.AsyncGroq(api_key="any", http_client=older).chat.completions.create(
            model="m", messages=ASKED, stream=True
        )
        chunks = [chunk async for chunk in stream]

    assert len(chunks) == 4
    assert [attempt.dialect for attempt in provider.attempts] == [
        "openai_chat",
        "anthropic_messages",
        "mistral_chat",
        "groq_chat",
    ]
    assert [request.headers["host"] for request in provider.requests] == [
        "api.openai.com",
        "api.anthropic.com",
        "api.mistral.ai",
        "api.groq.com",
    ]


def test_sync_clients_keep_their_hosts() -> None:
    """The same for synchronous clients of both libraries."""
    provider = FakeProvider()
    with (
        provider.serve() as base_url,
        httpx2.Client(transport=Rerouted(httpx2.HTTPTransport(), base_url)) as http,
        httpx.Client(transport=Rerouted(httpx.HTTPTransport(), base_url)) as older,
    ):
        openai.OpenAI(api_key="any", http_client=http).responses.create(model="m", input="say hello")
        groq.Groq(api_key="any", http_client=older).chat.completions.create(model="m", messages=ASKED)

    assert [attempt.dialect for attempt in provider.attempts] == ["openai_responses", "groq_chat"]


async def test_closing_reaches_the_transport() -> None:
    """A client that is closed without a block closes the real transport as well."""
    provider = FakeProvider()
    async with provider.serve() as base_url:
        awaited = httpx2.AsyncClient(transport=Rerouted(httpx2.AsyncHTTPTransport(), base_url))
        assert (await awaited.get("https://api.openai.com/v1/models")).json()["data"] == []
        await awaited.aclose()
        made = httpx2.Client(transport=Rerouted(httpx2.HTTPTransport(), base_url))
        assert made.post("https://api.openai.com/v1/chat/completions", json={}).status_code == 400
        made.close()

    assert provider.others == ["GET /v1/models", "POST /v1/chat/completions"]
