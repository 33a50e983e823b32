"""Every surface of every provider's API through a guarded client: each moves the provider's own counter."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from asgi_llm_guard import Context, Guard, ProviderBudget
from asgi_llm_guard.httpx import AsyncGuardTransport
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import FakeProvider, Price

pytestmark = pytest.mark.anyio

SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 8}
GEMINI: dict[str, Any] = {
    "contents": [{"role": "user", "parts": [{"text": "one two"}]}],
    "generationConfig": {"maxOutputTokens": 8},
}
CONVERSE: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"text": "one two"}]}],
    "inferenceConfig": {"maxTokens": 8},
}
GOOGLE = "generativelanguage.googleapis.com"
BEDROCK = "bedrock-runtime.eu-west-1.amazonaws.com"
INVOKED = {"anthropic_version": "bedrock-2023-05-31", **SAID}

SURFACES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("openai", "api.openai.com", "/v1/chat/completions", SAID),
    ("openai", "api.openai.com", "/v1/responses", {"input": "one two", "max_output_tokens": 8}),
    ("openai", "api.openai.com", "/v1/completions", {"prompt": "one two", "max_tokens": 8}),
    ("openai", "api.openai.com", "/v1/embeddings", {"input": "one two"}),
    ("openai", "api.openai.com", "/v1/images/generations", {"prompt": "one two"}),
    ("anthropic", "api.anthropic.com", "/v1/messages", SAID),
    ("gemini", GOOGLE, "/v1beta/models/m:generateContent", GEMINI),
    ("bedrock", BEDROCK, "/model/m/converse", CONVERSE),
    ("bedrock", BEDROCK, "/model/anthropic.m/invoke", INVOKED),
    ("cohere", "api.cohere.com", "/v2/chat", SAID),
    ("cohere", "api.cohere.com", "/v2/rerank", {"model": "ranker", "query": "one", "documents": ["two", "three"]}),
    ("mistral", "api.mistral.ai", "/v1/chat/completions", SAID),
    ("groq", "api.groq.com", "/openai/v1/chat/completions", SAID),
    ("openrouter", "openrouter.ai", "/api/v1/chat/completions", SAID),
]
PROVIDERS = sorted({provider for provider, *_ in SURFACES})
OVERRIDES: Any = {f"{name}/{model}": {"input": 1, "output": 2} for name in PROVIDERS for model in ("m", "anthropic.m")}
PRICES = PriceBook.snapshot(overrides={**OVERRIDES, "cohere/ranker": {"per_search_unit": "0.002"}})
BILLED = Price(input=1_000, output=2_000, search_unit=2_000_000)


@pytest.mark.parametrize(("provider", "host", "path", "body"), SURFACES, ids=[f"{row[1]}{row[2]}" for row in SURFACES])
async def test_every_surface_moves_the_counter(provider: str, host: str, path: str, body: dict[str, Any]) -> None:
    """Conformance 31: a call to any surface is charged to its provider's budget, and to no other, as it is billed."""
    fake = FakeProvider(prices=lambda _, usage: BILLED.cost_nanousd(usage))
    budget = ProviderBudget(dict.fromkeys(PROVIDERS, "$1/1d"))
    guard = Guard([budget], prices=PRICES)
    transport = AsyncGuardTransport(guard, httpx2.ASGITransport(fake))
    async with guard, httpx2.AsyncClient(transport=transport) as client:
        async with guard.open(Context(caller="job")):
            response = await client.post(f"https://{host}{path}", json={"model": "m", **body})
            assert response.status_code == 200, response.text
        (record,) = await guard.storage.records()
        meters = budget.meters(PROVIDERS)
        states = await guard.storage.read(list(meters.values()))
        used = {name: state.used for name, state in zip(meters, states, strict=True)}
    assert (record.provider, record.outcome) == (provider, "measured")
    assert record.cost_nanousd == fake.total_nanousd > 0
    assert used == dict.fromkeys(PROVIDERS, 0) | {provider: fake.total_nanousd}


async def test_a_batch_is_counted_nowhere_and_refused() -> None:
    """Conformance 31: a batch is billed where no answer tells, so a guarded client does not send one."""
    fake = FakeProvider()
    guard = Guard([ProviderBudget({"openai": "$1/1d"})], prices=PRICES)
    transport = AsyncGuardTransport(guard, httpx2.ASGITransport(fake))
    async with guard, httpx2.AsyncClient(transport=transport) as client, guard.open(Context(caller="job")):
        response = await client.post("https://api.openai.com/v1/batches", json={"input_file_id": "f"})
    assert response.status_code == 403
    assert (fake.calls, fake.others) == (0, [])
