"""Answers that fail, break off or do not say what they used: what the SDK sees, and what the caller is charged."""

from __future__ import annotations

import asyncio
import socket

import httpx2
import openai
import pytest
from tests.sdk.proxy import create_app
from tests.sdk.service import KEY, MODEL, OUTPUT, RECORD, SECRET, Service, Way, example

from asgi_llm_guard import Budget, Guard, Iterations, Route
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.testing import Behaviour, asgi_client

pytestmark = pytest.mark.anyio


def policies() -> tuple[Iterations, Budget]:
    return Iterations(10), Budget("$1/1d")


async def bounds(service: Service) -> tuple[int, int, int]:
    """The provider's bill, what was charged, and what was held, in nano-USD."""
    record = await service.the_record()
    assert record.cost_nanousd is not None
    assert record.estimate_nanousd is not None
    return service.provider.total_nanousd, record.cost_nanousd, record.estimate_nanousd


@pytest.mark.parametrize("status", [429, 500])
async def test_error_of_the_provider(storage: str, way: Way, status: int) -> None:
    """The caller gets the provider's own error, and its SDK retries it; each attempt is a call that costs no money."""
    error = openai.RateLimitError if status == 429 else openai.InternalServerError
    async with example(storage, *policies()) as service:
        service.provider.script(*[Behaviour.error(status, retry_after=0.01)] * 2)
        with pytest.raises(error, match=f"the fake provider answers {status}"):
            await service.ask(way, retries=1)

        assert service.requests.count == service.provider.calls == 2
        assert [(record.outcome, record.cost_nanousd) for record in await service.records()] == [
            ("provider_error", 0)
        ] * 2


async def test_retry_that_succeeds(storage: str, way: Way) -> None:
    """A call that succeeds at the second attempt costs what the provider bills for it."""
    async with example(storage, *policies()) as service:
        service.provider.script(Behaviour.error(500, retry_after=0.01))
        assert (await service.ask(way)).text == "Echo: Say hello to everybody here"

        assert service.requests.count == 2
        assert await service.charged() == service.provider.total_nanousd > 0


@pytest.mark.parametrize("way", ["async stream", "sync stream"])
@pytest.mark.parametrize("behaviour", [Behaviour.cut(after_chunks=3), Behaviour.stream_error(after_chunks=3)])
async def test_stream_that_breaks_off(storage: str, way: Way, behaviour: Behaviour) -> None:
    """The SDK raises, and the call is charged for what came through: no less than billed, no more than held."""
    async with example(storage, *policies()) as service:
        service.provider.script(behaviour)
        with pytest.raises(openai.APIError, match=r"broke off|fails inside the stream"):
            await service.ask(way)

        billed, charged, held = await bounds(service)
        assert 0 < billed <= charged < held
        assert (await service.the_record()).outcome == "estimated"
        assert service.provider.bill[0].output_tokens == 3


@pytest.mark.parametrize("behaviour", [Behaviour.cut(), Behaviour.stream_error()])
async def test_stream_that_breaks_off_at_once(storage: str, behaviour: Behaviour) -> None:
    """A stream that breaks off before its first word is charged no more than it holds, and nothing stays held."""
    async with example(storage, *policies()) as service:
        service.provider.script(behaviour)
        with pytest.raises(openai.APIError):
            await service.ask("async stream")

        _, charged, held = await bounds(service)
        assert 0 <= charged <= held


async def test_caller_that_leaves(storage: str) -> None:
    """When the caller leaves, the provider's connection is closed, and what was generated is charged."""
    async with example(storage, *policies()) as service:
        service.provider.script(Behaviour.slow())
        service.provider.release(3)
        async with service.client() as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                max_completion_tokens=OUTPUT,
                messages=[{"role": "user", "content": "Say hello to everybody here"}],
                stream=True,
            )
            seen = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
            await stream.close()
        await service.provider.until(lambda: service.provider.disconnects == 1)

        assert seen == ["Echo: ", "Say ", "hello "]
        billed, charged, held = await bounds(service)
        assert 0 < billed <= charged < held
        assert (await service.the_record()).outcome == "estimated"


async def test_success_without_usage(storage: str, way: Way) -> None:
    """An answer that does not say what it used is charged what was held, and marked."""
    async with example(storage, *policies()) as service:
        service.provider.script(Behaviour.no_usage())
        assert (await service.ask(way)).text == "Echo: Say hello to everybody here"

        billed, charged, held = await bounds(service)
        assert 0 < billed < charged == held
        assert (await service.the_record()).outcome == "unmetered"


@pytest.mark.parametrize("behaviour", [Behaviour.empty(), Behaviour.malformed(), Behaviour.cut()])
async def test_broken_json(storage: str, behaviour: Behaviour) -> None:
    """A JSON answer that is empty, broken or cut may have been billed in full: the hold is charged."""
    async with example(storage, *policies()) as service:
        service.provider.script(behaviour)
        with pytest.raises((openai.APIError, AttributeError, ValueError)):
            await service.ask("async", retries=0)

        billed, charged, held = await bounds(service)
        assert 0 < billed <= charged == held


async def test_unreachable_provider(storage: str, way: Way) -> None:
    """What could not be sent costs nothing, not even a call of the session; the SDK sees a 502 and tries again."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with example(storage, Iterations(1), provider_url=f"http://127.0.0.1:{port}/v1") as service:
        with pytest.raises(openai.InternalServerError, match="502 - The provider cannot be reached") as caught:
            await service.ask(way, session="s", retries=1)

        assert caught.value.code == "provider_failed"
        assert service.requests.count == 2
        assert await service.records() == []


async def test_provider_that_does_not_answer_in_time() -> None:
    """A call that was sent and not answered in time is a 504, and may have been billed: the hold is charged."""

    def slow(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("too slow", request=request)

    guard = Guard(policies(), identity=ApiKeys([RECORD], secret=SECRET))
    provider = guard.httpx_client(transport=httpx2.MockTransport(slow), base_url="http://provider/v1")
    app = create_app(guard, provider, routes=[Route("/v1/chat/completions")])
    async with guard, provider, asgi_client(app) as client:
        response = await client.post(
            "/v1/chat/completions",
            headers={"authorization": f"Bearer {KEY}"},
            json={"model": MODEL, "max_completion_tokens": 5, "messages": [{"role": "user", "content": "hello"}]},
        )
        (record,) = await guard.storage.records()
        assert await guard.storage.open_holds() == 0

    assert (response.status_code, response.json()["error"]["message"]) == (504, "The provider did not answer in time.")
    assert (record.outcome, record.cost_nanousd) == ("unknown", record.estimate_nanousd)


async def test_caller_that_leaves_a_json_call(storage: str) -> None:
    """A JSON answer that nobody waits for any more is generated and billed all the same, and charged exactly."""
    async with example(storage, *policies()) as service:
        service.provider.script(Behaviour.hang())
        leaving = asyncio.create_task(service.ask("async", retries=0))
        await service.provider.until(lambda: service.provider.open == 1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        service.provider.release()

        billed, charged, held = await bounds(service)
        assert 0 < billed == charged < held
        assert (await service.the_record()).outcome == "measured"


async def test_loop_of_broken_streams_ends(storage: str) -> None:
    """Streams that break off count as calls: a session that retries them for ever is stopped."""
    async with example(storage, Iterations(2)) as service:
        service.provider.script(*[Behaviour.cut(after_chunks=1)] * 9)
        for _ in range(2):
            with pytest.raises(openai.APIError, match="broke off"):
                await service.ask("async stream", session="s")
        with pytest.raises(openai.RateLimitError, match="has used up its calls"):
            await service.ask("async stream", session="s")

        assert (service.requests.count, service.provider.calls) == (3, 2)
        assert len(await service.records()) == 2
