"""LiteLLM's Router leaves out deployments whose provider has spent its budget, whatever its strategy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import litellm
import pytest

from asgi_llm_guard import Context, Guard, LimitExceeded, ProviderBudget
from asgi_llm_guard.denials.wording import utc
from asgi_llm_guard.integrations.litellm import GuardCallback, Refused
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import BaseURL, Behaviour, FakeProvider, Price

pytestmark = pytest.mark.anyio

ASKED: list[Any] = [{"role": "user", "content": "one two three"}]
MODELS = {"openai": "gpt-test", "mistral": "mistral-test"}
BILL = {model: Price(input=1_000, output=1_000_000) for model in MODELS.values()}
PRICES = PriceBook.snapshot(
    overrides={f"{provider}/{model}": {"input": 1, "output": 1_000} for provider, model in MODELS.items()}
)


class Stage:
    """A Router over one deployment of each provider, all of them behind one fake one."""

    def __init__(self, guard: Guard, provider: FakeProvider, url: BaseURL) -> None:
        self.guard = guard
        self.provider = provider
        self.url = url
        litellm.callbacks = [GuardCallback(guard)]

    def router(self, *providers: str, strategy: str = "simple-shuffle", **options: Any) -> litellm.Router:
        deployments = [
            {
                "model_name": "auto",
                "litellm_params": {
                    "model": f"{provider}/{MODELS[provider]}",
                    "api_base": str(self.url),
                    "api_key": "k",
                },
            }
            for provider in providers
        ]
        return litellm.Router(model_list=deployments, routing_strategy=strategy, num_retries=0, **options)

    async def ask(self, router: litellm.Router) -> str:
        """One call, which costs five thousandths of a dollar; the model that was asked."""
        async with self.guard.open(Context(caller="acme")):
            await router.acompletion(model="auto", messages=ASKED, max_tokens=20)
        return self.provider.requests[-1].model

    def budgets(self, **limits: str) -> None:
        self.guard.policies = self.guard.engine.bind((ProviderBudget(limits),))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    provider = FakeProvider(prices=BILL, default=Behaviour.answer(output_tokens=5))
    guard = Guard([], prices=PRICES, hold_wait_s=0)
    async with provider.serve() as url, guard:
        yield Stage(guard, provider, url)
        assert await guard.storage.open_holds() == 0
        litellm.logging_callback_manager._reset_all_callbacks()
        await litellm.close_litellm_async_clients()


@pytest.mark.parametrize("strategy", ["simple-shuffle", "least-busy", "latency-based-routing"])
async def test_router_asks_only_who_is_under_budget(stage: Stage, strategy: str) -> None:
    """B2: a provider that has spent its budget is asked no more, and the other gets every call."""
    stage.budgets(openai="$0.00/1d", mistral="$10/1d")
    router = stage.router("openai", "mistral", strategy=strategy)
    assert {await stage.ask(router) for _ in range(8)} == {MODELS["mistral"]}


async def test_providers_without_a_budget_stay(stage: Stage) -> None:
    """B2: a provider that has no budget may be asked whatever others have spent."""
    stage.budgets(openai="$0/1d")
    assert await stage.ask(stage.router("openai", "mistral")) == MODELS["mistral"]


async def test_spending_moves_calls_to_the_other(stage: Stage) -> None:
    """B2: a provider whose budget has less left than a call may cost is passed over, and no call is lost."""
    stage.budgets(openai="$0.03/1d")
    router = stage.router("openai", "mistral")
    asked = [await stage.ask(router) for _ in range(30)]
    assert asked.count(MODELS["openai"]) == 2  # each is held for as 20 tokens, and costs 5
    assert sum(line.cost_nanousd for line in stage.provider.bill if line.model == MODELS["openai"]) <= 30_000_000


async def test_a_rest_that_is_too_small_everywhere_is_refused(stage: Stage) -> None:
    """B3: where no budget has enough left for the call, the attempt is refused and nobody is asked."""
    stage.budgets(openai="$0.01/1d", mistral="$0.01/1d")
    with pytest.raises(Refused):
        await stage.ask(stage.router("openai", "mistral"))
    assert stage.provider.calls == 0


async def test_none_left_is_one_error_with_each_provider(stage: Stage) -> None:
    """B3: nobody is asked; the error has spend, limit and reset of each provider, and is no failure of a deployment."""
    stage.budgets(openai="$0.021/1d", mistral="$0/1h")
    stage.provider.script(Behaviour.answer(output_tokens=21))
    assert await stage.ask(stage.router("openai")) == MODELS["openai"]
    router = stage.router("openai", "mistral", allowed_fails=0)
    with pytest.raises(LimitExceeded) as raised:
        await stage.ask(router)
    denied = raised.value.denied
    assert isinstance(raised.value, Refused)
    assert stage.provider.calls == 1
    assert denied.resets_at_ms is not None
    soonest = utc(denied.resets_at_ms)
    assert denied.details == (
        f"openai: $0.02101 of $0.021 spent, resets at {soonest}",
        "mistral: $0.00 of $0.00 spent",
        f"soonest reset: openai at {soonest}",
    )
    stage.budgets(openai="$10/1d")
    await stage.ask(router)
    assert stage.provider.calls == 2


async def test_fallbacks_of_the_router_are_tried(stage: Stage) -> None:
    """B2: where a whole group has spent its budget, the Router goes on to its fallback group."""
    stage.budgets(openai="$0/1d")
    router = stage.router("openai", fallbacks=[{"auto": ["spare"]}])
    router.add_deployment(
        litellm.Deployment(
            model_name="spare",
            litellm_params=litellm.LiteLLM_Params(
                model=f"mistral/{MODELS['mistral']}", api_base=str(stage.url), api_key="k"
            ),
        )
    )
    assert await stage.ask(router) == MODELS["mistral"]
