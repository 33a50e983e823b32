"""LiteLLM's callback: asynchronous calls are admitted, metered and settled, attempt by attempt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import litellm
import pytest
from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, ModelAllow
from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.integrations.litellm import GuardCallback, Refused
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import Behaviour, FakeProvider, Price
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

MODEL, OTHER = "gpt-test", "gpt-other"
BILL = {MODEL: Price(input=1_000, output=2_000), OTHER: Price(input=3_000, output=4_000)}
PRICES = PriceBook.snapshot(
    overrides={f"openai/{MODEL}": {"input": 1, "output": 2}, f"openai/{OTHER}": {"input": 3, "output": 4}}
)
ASKED: list[Any] = [{"role": "user", "content": "one two three"}]
CONTEXT = Context(session="s")


class Stage:
    """A guard whose callback LiteLLM has, and a provider that keeps its own bill."""

    def __init__(self, guard: Guard, provider: FakeProvider, base_url: str) -> None:
        self.guard = guard
        self.provider = provider
        self.base_url = base_url
        self.callback = GuardCallback(guard)
        litellm.callbacks = [self.callback]
        self.options: dict[str, Any] = {"api_base": base_url, "api_key": "k", "max_tokens": 20, "max_retries": 0}

    async def ask(self, model: str = MODEL, **options: Any) -> Any:
        return await litellm.acompletion(model=f"openai/{model}", messages=ASKED, **(self.options | options))

    def policies(self, *policies: Any) -> None:
        self.guard.policies = self.guard.engine.bind(policies)

    async def records(self) -> list[UsageRecord]:
        await self.provider.idle()
        return list(await self.guard.storage.records())

    async def told(self) -> None:
        """LiteLLM tells of the end of a stream, and of what its cache has answered, in a task of its own."""
        await asyncio.sleep(0)  # these tasks begin
        await GLOBAL_LOGGING_WORKER.flush()
        async with asyncio.timeout(10):
            await asyncio.gather(*self.callback._calls._looking)

    async def check_bill(self) -> None:
        """The ledger has what was billed, and nothing is held."""
        records = await self.records()
        assert sum(record.cost_nanousd or 0 for record in records) == self.provider.total_nanousd
        assert await self.guard.storage.open_holds() == 0

    def router(self, *models: str, **options: Any) -> litellm.Router:
        deployments = [
            {
                "model_name": model,
                "litellm_params": {"model": f"openai/{model}", "api_base": self.base_url, "api_key": "k"},
            }
            for model in models
        ]
        return litellm.Router(model_list=deployments, retry_after=0, **options)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    provider = FakeProvider(prices=BILL)
    guard = Guard([Budget("$1/1d", per="global"), Iterations(50)], prices=PRICES)
    async with provider.serve() as base_url, guard:
        yield Stage(guard, provider, str(base_url))
        litellm.logging_callback_manager._reset_all_callbacks()
        await litellm.close_litellm_async_clients()


async def test_bill_is_what_was_settled(stage: Stage) -> None:
    """B9: the provider's bill is what the ledger has, in one record."""
    async with stage.guard.open(CONTEXT):
        answer = await stage.ask()
    assert answer.choices[0].message.content == "Echo: one two three"
    await stage.check_bill()
    (record,) = await stage.records()
    assert (record.outcome, record.provider, record.model) == ("measured", "openai", MODEL)


async def test_streams_tell_what_they_used(stage: Stage) -> None:
    """A stream is settled at its end by what the provider says, and its chunks can be read as always."""
    async with stage.guard.open(CONTEXT):
        chunks = await stage.ask(stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
    await stage.told()
    assert text == "Echo: one two three"
    await stage.check_bill()


async def test_streams_that_are_left_are_charged(stage: Stage) -> None:
    """A stream that is left is charged what it holds when its admission ends."""
    async with stage.guard.open(CONTEXT):
        chunks = await stage.ask(stream=True)
        await anext(chunks)
        await chunks.aclose()
    await stage.told()
    (record,) = await stage.records()
    assert (record.cost_nanousd or 0) >= stage.provider.total_nanousd
    assert (record.cost_nanousd or 0) > 0
    assert await stage.guard.storage.open_holds() == 0


async def test_refusal_sends_nothing(stage: Stage) -> None:
    """A1: a refused call raises before anything is sent; LiteLLM's own retries send nothing either."""
    stage.policies(Iterations(1))
    async with stage.guard.open(CONTEXT):
        await stage.ask()
        with pytest.raises(LimitExceeded, match="iteration") as caught:
            await stage.ask(num_retries=2)
    assert isinstance(caught.value, Refused)
    assert caught.value.denied.status == 429
    assert stage.provider.calls == 1
    await stage.check_bill()


async def test_router_neither_repeats_nor_cools_down(stage: Stage) -> None:
    """A refusal of ours is no failure of a deployment: the Router tries once, and uses it again afterwards."""
    router = stage.router(MODEL, num_retries=3, allowed_fails=0)
    refusals: list[object] = []
    stage.guard.engine.telling.observers = (
        lambda event: refusals.append(event) if "Refused" in type(event).__name__ else None,
    )
    stage.policies(Budget("$0/1d", per="global"))
    async with stage.guard.open(CONTEXT):
        with pytest.raises(LimitExceeded):
            await router.acompletion(model=MODEL, messages=ASKED, max_tokens=20)
        assert len(refusals) == 1
    stage.policies(Budget("$1/1d", per="global"))
    async with stage.guard.open(CONTEXT):
        await router.acompletion(model=MODEL, messages=ASKED, max_tokens=20)
    assert stage.provider.calls == 1
    await stage.check_bill()


async def test_retries_and_fallbacks_are_attempts(stage: Stage) -> None:
    """The Router's retries and fallbacks take one iteration together; each attempt is priced by its own model."""
    stage.policies(Iterations(1), Budget("$1/1d", per="global"))
    stage.provider.script(Behaviour.error(500), Behaviour.error(500))
    router = stage.router(MODEL, OTHER, num_retries=1, fallbacks=[{MODEL: [OTHER]}])
    async with stage.guard.open(CONTEXT):
        await router.acompletion(model=MODEL, messages=ASKED, max_tokens=20)
    assert stage.provider.calls == 3
    await stage.check_bill()
    records = await stage.records()
    assert [(record.attempt, record.model, record.outcome) for record in records] == [
        (1, MODEL, "provider_error"),
        (2, MODEL, "provider_error"),
        (3, OTHER, "measured"),
    ]
    assert {record.attempt_of for record in records[1:]} == {records[0].call_id}


async def test_fallback_models_are_checked(stage: Stage) -> None:
    """M8: a fallback to a model that is not allowed is refused, and nothing is sent to it."""
    stage.policies(ModelAllow([f"openai/{MODEL}"]))
    stage.provider.script(Behaviour.error(500))
    router = stage.router(MODEL, OTHER, num_retries=0, fallbacks=[{MODEL: [OTHER]}])
    async with stage.guard.open(CONTEXT):
        with pytest.raises((LimitExceeded, litellm.exceptions.InternalServerError)):
            await router.acompletion(model=MODEL, messages=ASKED, max_tokens=20)
    assert [request.model for request in stage.provider.requests] == [MODEL]


async def test_errors_are_settled(stage: Stage) -> None:
    """A provider's error costs no money, a connection that was not made nothing at all, a timeout what was held."""
    async with stage.guard.open(CONTEXT):
        stage.provider.script(Behaviour.error(400))
        with pytest.raises(litellm.exceptions.BadRequestError):
            await stage.ask()
        with pytest.raises(litellm.exceptions.InternalServerError):  # LiteLLM's word for it
            await stage.ask(api_base="http://127.0.0.1:1/v1")
        stage.provider.script(Behaviour.hang())
        with pytest.raises(litellm.exceptions.Timeout):
            await stage.ask(timeout=1)
    outcomes = [record.outcome for record in await stage.records()]
    assert outcomes == ["provider_error", "unknown"]
    assert (await stage.records())[1].cost_nanousd
    assert await stage.guard.storage.open_holds() == 0


async def test_own_cache_gives_back(stage: Stage) -> None:
    """What LiteLLM's own cache answers takes nothing."""
    litellm.cache = litellm.Cache(type="local")
    try:
        async with stage.guard.open(CONTEXT):
            await stage.ask(caching=True)
            await stage.told()
            await stage.ask(caching=True)
        await stage.told()
    finally:
        litellm.cache = None
    assert stage.provider.calls == 1
    await stage.check_bill()


async def test_embeddings_are_guarded(stage: Stage) -> None:
    """B9: an embedding is a call like any other."""
    async with stage.guard.open(CONTEXT):
        await litellm.aembedding(model=f"openai/{MODEL}", input=["one two"], api_base=stage.base_url, api_key="k")
    await stage.check_bill()
    assert stage.provider.total_nanousd > 0


async def test_outside_of_an_admission(stage: Stage) -> None:
    """Without an admission a call needs a context of its own."""
    with pytest.raises(ContextError):
        await stage.ask()
    assert stage.provider.calls == 0
    litellm.callbacks = [GuardCallback(stage.guard, context=Context(caller="job:nightly"))]
    await stage.ask()
    (record,) = await stage.records()
    assert record.caller == "job:nightly"
    with pytest.raises(ConfigurationError):
        GuardCallback("guard")  # type: ignore[arg-type]


async def test_synchronous_functions(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """LiteLLM lets no callback stop a synchronous call: it is said once, and `call_sync` guards it."""

    def ask() -> Any:
        return litellm.completion(model=f"openai/{MODEL}", messages=ASKED, **stage.options)

    def guarded() -> None:
        with (
            stage.guard.open_sync(CONTEXT),
            stage.guard.call_sync(model=f"openai/{MODEL}", max_output_tokens=20) as call,
        ):
            call.record(ask())

    await asyncio.to_thread(guarded)
    await stage.check_bill()
    assert stage.provider.total_nanousd > 0
    with caplog.at_level(logging.ERROR, "asgi_llm_guard"):
        await asyncio.to_thread(ask)
        await asyncio.to_thread(ask)
    assert caplog.text.count("is not guarded") == 1


async def test_a_guarded_client_below_charges_once(stage: Stage) -> None:
    """With a guarded client of LiteLLM's own below, a call is charged once."""
    stage.policies(Iterations(1), Budget("$1/1d", per="global"))
    client = stage.guard.httpx_client(library="httpx")
    assert isinstance(client, httpx.AsyncClient)
    litellm.aclient_session = client
    try:
        async with stage.guard.open(CONTEXT):
            await stage.ask()
    finally:
        litellm.aclient_session = None
        await client.aclose()
    await stage.check_bill()
