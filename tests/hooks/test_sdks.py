"""The real SDKs on a guarded client: what they retry, what they raise, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.exits.kit import CONTEXT, MAX_TOKENS, SLOTS, Settlements, Stage
from tests.hooks.kit import in_thread

from asgi_llm_guard import Budget, Concurrency, Guard, GuardMiddleware, Iterations, ModelAllow, guarded
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock, Price
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

OVERRIDES: Any = {name: {"input": 1, "output": 2} for name in ("openai/gpt-test", "anthropic/claude-test")}
PRICES = PriceBook.snapshot(overrides=OVERRIDES)
BILL = {name: Price(input=1_000, output=2_000) for name in ("gpt-test", "claude-test")}
MESSAGES: Any = [{"role": "user", "content": "one two three"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sdk:
    """One SDK in one mode."""

    ask: Callable[[Any, str, bool], Awaitable[str]]
    """Ask for an answer, streamed or not, and give its text."""
    error: type[Exception]
    """What it raises for a status."""
    broken: tuple[type[Exception], ...]


async def openai_async(stage: Any, base_url: str, stream: bool) -> str:
    async with openai.AsyncOpenAI(api_key="-", base_url=base_url, http_client=client_of(stage)) as client:
        answer: Any = await client.chat.completions.create(
            model="gpt-test", messages=MESSAGES, max_tokens=MAX_TOKENS, stream=stream
        )
        if not stream:
            return said(answer.choices[0].message)
        return "".join([choice.delta.content or "" async for chunk in answer for choice in chunk.choices])


def said(message: Any) -> str:
    return str(message.content or message.tool_calls[0].function.name)


def client_of(stage: Any) -> httpx2.AsyncClient:
    client: httpx2.AsyncClient = stage.guard.httpx_client(trust_env=False)
    return client


async def openai_sync(stage: Any, base_url: str, stream: bool) -> str:
    def ask() -> str:
        http_client = stage.guard.httpx_client_sync(trust_env=False)
        with openai.OpenAI(api_key="-", base_url=base_url, http_client=http_client) as client:
            answer: Any = client.chat.completions.create(
                model="gpt-test", messages=MESSAGES, max_tokens=MAX_TOKENS, stream=stream
            )
            if not stream:
                return said(answer.choices[0].message)
            return "".join(choice.delta.content or "" for chunk in answer for choice in chunk.choices)

    return str(await in_thread(ask))


async def anthropic_async(stage: Any, base_url: str, stream: bool) -> str:
    root = base_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(api_key="-", base_url=root, http_client=client_of(stage)) as client:
        if not stream:
            answer: Any = await client.messages.create(model="claude-test", messages=MESSAGES, max_tokens=MAX_TOKENS)
            return str(getattr(answer.content[0], "text", None) or answer.content[0].name)
        async with client.messages.stream(model="claude-test", messages=MESSAGES, max_tokens=MAX_TOKENS) as events:
            return "".join([text async for text in events.text_stream])


async def anthropic_sync(stage: Any, base_url: str, stream: bool) -> str:
    def ask() -> str:
        http_client = stage.guard.httpx_client_sync(trust_env=False)
        root = base_url.removesuffix("/v1")
        with anthropic.Anthropic(api_key="-", base_url=root, http_client=http_client) as client:
            if not stream:
                answer: Any = client.messages.create(model="claude-test", messages=MESSAGES, max_tokens=MAX_TOKENS)
                return str(getattr(answer.content[0], "text", None) or answer.content[0].name)
            with client.messages.stream(model="claude-test", messages=MESSAGES, max_tokens=MAX_TOKENS) as events:
                return "".join(events.text_stream)

    return str(await in_thread(ask))


_OPENAI: Any = {
    "error": openai.APIStatusError,
    "broken": (openai.APIError, httpx2.RemoteProtocolError),
}
_ANTHROPIC: Any = {
    "error": anthropic.APIStatusError,
    "broken": (anthropic.APIError, httpx2.RemoteProtocolError),
}
SDKS = {
    "openai async": Sdk(ask=openai_async, **_OPENAI),
    "openai sync": Sdk(ask=openai_sync, **_OPENAI),
    "anthropic async": Sdk(ask=anthropic_async, **_ANTHROPIC),
    "anthropic sync": Sdk(ask=anthropic_sync, **_ANTHROPIC),
}


@pytest.fixture(params=SDKS)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    return SDKS[request.param]


@asynccontextmanager
async def on_stage() -> AsyncIterator[Stage]:
    clock = FrozenClock(1_800_000_000_000)
    provider = FakeProvider(prices=BILL)
    settlements = Settlements()
    policies = (Iterations(1_000), Budget("$10/1d", per="global"), Concurrency(SLOTS, per="global", counts="calls"))
    async with (
        provider.serve() as base_url,
        Guard(
            policies, storage=MemoryStorage(clock=clock), clock=clock, prices=PRICES, observers=[settlements]
        ) as guard,
    ):
        yield Stage(guard.storage, provider, base_url, guard, settlements)


async def ledger(stage: Stage, *, exact: bool = True) -> list[UsageRecord]:
    """Every record, once nothing is held; the sum is the provider's bill, if it told what it used."""
    await stage.provider.idle()
    assert await stage.storage.open_holds() == 0
    records = list(await stage.storage.records())
    charged = sum(record.cost_nanousd or 0 for record in records)
    if exact:
        assert charged == stage.provider.total_nanousd
    else:
        assert stage.provider.total_nanousd <= charged <= sum(record.estimate_nanousd or 0 for record in records)
    return records


async def counted(stage: Stage) -> tuple[int, int]:
    """Iterations and slots that are used."""
    call = stage.guard.describe("openai/gpt-test", input_tokens=1, max_output_tokens=1)
    policies = [policy for policy in stage.guard.policies if isinstance(policy, (Iterations, Concurrency))]
    meters = [claim.meter for policy in policies for claim in policy.plan(CONTEXT, call, 1_800_000_000_000).claims]
    iterations, slots = await stage.storage.read(meters)
    return iterations.used + iterations.held, slots.used + slots.held


@pytest.mark.parametrize("stream", [False, True])
async def test_answers(sdk: Sdk, stream: bool) -> None:
    """The SDK gets its answer, and the ledger says what the bill says."""
    async with on_stage() as stage:
        async with stage.guard.open(CONTEXT):
            assert await sdk.ask(stage, stage.base_url, stream) == "Echo: one two three"

        (record,) = await ledger(stage)
        assert (record.outcome, await counted(stage)) == ("measured", (1, 0))


async def test_tool_call(sdk: Sdk) -> None:
    """A call of a tool is an answer."""
    async with on_stage() as stage:
        stage.provider.script(Behaviour.call_tool("look", at="it"))
        async with stage.guard.open(CONTEXT):
            assert await sdk.ask(stage, stage.base_url, False) == "look"

        await ledger(stage)


REFUSALS: dict[str, tuple[Policy, int]] = {
    "budget": (Budget("$0.000001/1d", name="small"), 402),
    "model": (ModelAllow(["openai/other"]), 403),
    "iterations": (Iterations(0, name="none"), 429),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("policy, status", REFUSALS.values(), ids=REFUSALS)
async def test_refused(sdk: Sdk, policy: Policy, status: int, stream: bool) -> None:
    """A refusal is the SDK's own status error, with words for people, after exactly one request."""
    async with on_stage() as stage:
        async with stage.guard.open(CONTEXT, extra=[policy]):
            with pytest.raises(sdk.error, match=policy.name) as caught:
                await sdk.ask(stage, stage.base_url, stream)

        error: Any = caught.value
        assert error.status_code == status
        assert error.response.headers["x-should-retry"] == "false"
        assert "x-stainless-retry-count" not in error.request.headers or (
            error.request.headers["x-stainless-retry-count"] == "0"
        )
        assert stage.provider.calls == 0
        assert await ledger(stage) == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("statuses", [[429], [500, 503]])
async def test_retried(sdk: Sdk, stream: bool, statuses: list[int]) -> None:
    """What the SDK repeats after errors are attempts of one call: one iteration, and each charged as it is billed."""
    async with on_stage() as stage:
        stage.provider.script(*[Behaviour.error(status, retry_after=0.01) for status in statuses])
        async with stage.guard.open(CONTEXT):
            assert await sdk.ask(stage, stage.base_url, stream) == "Echo: one two three"

        records = await ledger(stage)
        assert [record.outcome for record in records] == ["provider_error"] * len(statuses) + ["measured"]
        assert [record.attempt for record in records] == list(range(1, len(statuses) + 2))
        assert [record.attempt_of for record in records] == [None] + [records[0].call_id] * len(statuses)
        assert await counted(stage) == (1, 0)


async def test_retried_inside_a_request(sdk: Sdk) -> None:
    """The first attempt takes over what its request was admitted for, and the second one is still the same call."""
    async with on_stage() as stage:
        stage.provider.script(Behaviour.error(500, retry_after=0.01))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            text = await sdk.ask(stage, stage.base_url, False)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": text.encode()})

        transport = httpx2.ASGITransport(app=GuardMiddleware(app, stage.guard))
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
            body = {"model": "gpt-test", "max_tokens": MAX_TOKENS, "messages": MESSAGES}
            response = await client.post("/v1/chat/completions", headers={"x-session-id": "s"}, json=body)

        assert response.text == "Echo: one two three"
        assert [record.attempt for record in await ledger(stage)] == [1, 2]
        assert await counted(stage) == (1, 0)


async def test_retries_of_two_calls(sdk: Sdk) -> None:
    """The same question asked twice, each time after an error, is two calls."""
    async with on_stage() as stage:
        again = Behaviour.error(500, retry_after=0.01)
        stage.provider.script(again, Behaviour.answer(), again, Behaviour.answer())
        async with stage.guard.open(CONTEXT):
            for _ in range(2):
                await sdk.ask(stage, stage.base_url, False)

        assert [record.attempt for record in await ledger(stage)] == [1, 2, 1, 2]
        assert await counted(stage) == (2, 0)


async def test_retried_to_the_end(sdk: Sdk) -> None:
    """What fails again and again costs one iteration and no money, and the SDK says so."""
    async with on_stage() as stage:
        stage.provider.script(*[Behaviour.error(500, retry_after=0.01)] * 3)
        async with stage.guard.open(CONTEXT):
            with pytest.raises(sdk.error):
                await sdk.ask(stage, stage.base_url, False)

        assert [record.outcome for record in await ledger(stage)] == ["provider_error"] * 3
        assert await counted(stage) == (1, 0)


@pytest.mark.parametrize("behaviour", [Behaviour.cut(after_chunks=2), Behaviour.stream_error(after_chunks=2)])
async def test_stream_that_breaks_off(sdk: Sdk, behaviour: Behaviour) -> None:
    """The SDK raises, and the call is charged what came through: no less than billed, no more than held."""
    async with on_stage() as stage:
        stage.provider.script(behaviour)
        async with stage.guard.open(CONTEXT):
            with pytest.raises(sdk.broken):
                await sdk.ask(stage, stage.base_url, True)

        await ledger(stage, exact=False)


@pytest.mark.parametrize("stream", [False, True])
async def test_success_without_usage(sdk: Sdk, stream: bool) -> None:
    """An answer that does not tell is charged what it held."""
    async with on_stage() as stage:
        stage.provider.script(Behaviour.no_usage())
        async with stage.guard.open(CONTEXT):
            assert await sdk.ask(stage, stage.base_url, stream) == "Echo: one two three"

        (record,) = await ledger(stage, exact=False)
        assert record.cost_nanousd == record.estimate_nanousd


@pytest.mark.parametrize("name", ["openai async", "anthropic async"])
async def test_cancelled(name: str) -> None:
    """A call that is cancelled is charged what it held, and nothing stays held."""
    sdk = SDKS[name]
    async with on_stage() as stage:
        stage.provider.script(Behaviour.hang())
        async with stage.guard.open(CONTEXT):
            task: Any = asyncio.ensure_future(sdk.ask(stage, stage.base_url, False))
            await stage.provider.until(lambda: stage.provider.open == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        (record,) = await ledger(stage, exact=False)
        assert record.cost_nanousd == record.estimate_nanousd


async def test_refusal_that_an_application_lets_through(sdk: Sdk) -> None:
    """An SDK's error for a refusal that nobody catches is answered as that refusal, and not as a 500."""
    async with on_stage() as stage:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await sdk.ask(stage, stage.base_url, False)

        stage.guard.policies = (*stage.guard.policies, Budget("$0.000001/1d", name="small"))
        transport = httpx2.ASGITransport(app=GuardMiddleware(app, stage.guard))
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
            response = await client.post("/ask", headers={"x-session-id": "s"})

        assert response.status_code == 402
        assert response.json()["code"] == "request_exceeds_budget"
        assert await ledger(stage) == []
        assert await counted(stage) == (0, 0)


async def test_refusal_inside_a_function(sdk: Sdk) -> None:
    """A guarded function whose only call is refused costs nothing: the SDK's error is no answer of the provider."""
    async with on_stage() as stage:

        @guarded(model="openai/cheap", max_output_tokens=1)
        async def function(question: str) -> str:
            return await sdk.ask(stage, stage.base_url, False)

        small = Budget("$0.00005/1d", name="small")
        stage.guard.prices = PriceBook.snapshot(
            overrides={**OVERRIDES, "openai/cheap": {"input": 0.01, "output": 0.01}}
        )
        async with client_of(stage), stage.guard.open(CONTEXT, extra=[small]):
            with pytest.raises(sdk.error, match="small"):
                await function("one")

        assert stage.provider.calls == 0
        assert await ledger(stage) == []
        assert await counted(stage) == (0, 0)
