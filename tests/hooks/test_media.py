"""Embeddings, images, speech and transcriptions with OpenAI's SDK: forms and sound are metered as well as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import openai
import pytest
from openai.types import CreateEmbeddingResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from asgi_llm_guard import Budget, Context, Guard, GuardMiddleware, Route
from asgi_llm_guard.httpx import AsyncGuardTransport
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import Behaviour, FakeProvider, Price, asgi_client

pytestmark = pytest.mark.anyio

HOST = "https://api.openai.com/v1"
OVERRIDES: Any = {
    "openai/reader": {"input": 1, "output": 2},
    "openai/painter": {"input": 1, "output": 2},
    "openai/speaker": {"per_million_characters": 10},
    "whisper-test": {"per_audio_minute": "0.006"},
}
PRICES = PriceBook.snapshot(overrides=OVERRIDES)
BILL = {
    "reader": Price(input=1_000, output=2_000),
    "painter": Price(input=1_000, output=2_000),
    "speaker": Price(input=0, output=0, character=10_000),
    "whisper-test": Price(input=0, output=0, audio_ms=100),
}
RECORDING = ("talk.mp3", b"ID3" + bytes(40_000), "audio/mpeg")


async def embed(client: openai.AsyncOpenAI) -> CreateEmbeddingResponse:
    return await client.embeddings.create(model="reader", input=["one two", "three"])


async def paint(client: openai.AsyncOpenAI) -> object:
    return await client.images.generate(model="painter", prompt="a lighthouse", n=2, size="1024x1024")


async def speak(client: openai.AsyncOpenAI) -> object:
    sound = await client.audio.speech.create(model="speaker", voice="coral", input="Die Fähre legt ab.")
    return sound.content


async def listen(client: openai.AsyncOpenAI) -> object:
    return await client.audio.transcriptions.create(model="whisper-test", file=RECORDING)


@pytest.mark.parametrize("ask", [embed, paint, speak, listen])
async def test_bill_is_the_ledger(ask: Callable[[openai.AsyncOpenAI], Awaitable[object]]) -> None:
    """What the provider bills for each is what the ledger has, and no more than was held."""
    provider = FakeProvider(prices=BILL)
    guard = Guard([Budget("$1/1d", per="caller")], prices=PRICES)
    transport = AsyncGuardTransport(guard, httpx2.ASGITransport(provider))
    async with guard, httpx2.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(api_key="-", base_url=HOST, http_client=http)
        async with guard.open(Context(caller="job")):
            assert await ask(client)
        (record,) = await guard.storage.records()
    assert (record.outcome, record.cost_nanousd) == ("measured", provider.total_nanousd)
    assert record.estimate_nanousd is not None
    assert 0 < provider.total_nanousd <= record.estimate_nanousd


async def test_budget_stops_a_form() -> None:
    """A recording that may cost more than is left is not sent."""
    provider = FakeProvider(prices=BILL)
    guard = Guard([Budget("$0.001/1d", per="caller")], prices=PRICES)
    transport = AsyncGuardTransport(guard, httpx2.ASGITransport(provider))
    async with guard, httpx2.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(api_key="-", base_url=HOST, http_client=http)
        async with guard.open(Context(caller="job")):
            with pytest.raises(openai.APIStatusError, match="402"):
                await listen(client)
    assert provider.calls == 0


async def test_clamp_lowers_no_hold_that_it_cannot_enforce() -> None:
    """Where a request has no place for a limit, what does not fit is refused, and not held for at less."""
    provider = FakeProvider(prices=BILL)
    guard = Guard([Budget("$0.01/1d", per="caller")], prices=PRICES)
    transport = AsyncGuardTransport(guard, httpx2.ASGITransport(provider), clamp=True)
    async with guard, httpx2.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(api_key="-", base_url=HOST, http_client=http)
        async with guard.open(Context(caller="job")):
            with pytest.raises(openai.APIStatusError, match="402"):
                await paint(client)
    assert provider.calls == 0


async def test_form_on_a_guarded_route() -> None:
    """A form that comes in is read, reaches the application byte for byte, and its answer is metered."""
    provider = FakeProvider(prices=BILL, default=Behaviour(audio_ms=7_000))
    guard = Guard([Budget("$1/1d", per="global")], prices=PRICES)
    bodies: list[bytes] = []

    async def relay(request: Request) -> Response:
        body = await request.body()
        bodies.append(body)
        async with asgi_client(provider) as client:
            headers = {"content-type": request.headers["content-type"]}
            answer = await client.post("/v1/audio/transcriptions", content=body, headers=headers)
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    app = Starlette(routes=[StarletteRoute("/v1/audio/transcriptions", relay, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, routes=[Route("/v1/audio/transcriptions", clamp=True)])
    async with guard, asgi_client(app) as client:
        sent = client.build_request(
            "POST", "/v1/audio/transcriptions", data={"model": "whisper-test"}, files={"file": RECORDING}
        )
        body = await sent.aread()
        response = await client.send(sent)
        assert response.status_code == 200, response.text
        twice = await client.post(
            "/v1/audio/transcriptions", content=body + b"x", headers={"content-type": sent.headers["content-type"]}
        )
        assert twice.status_code == 400
        (record,) = await guard.storage.records()
    assert bodies == [body]
    assert (record.outcome, record.cost_nanousd) == ("measured", provider.total_nanousd)
    assert record.usage is not None
    assert record.usage.audio_ms == 7_000
