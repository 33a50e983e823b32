"""What admitted calls get and what they are charged: the provider's bill, to the nano-dollar."""

from __future__ import annotations

import asyncio

import pytest
from tests.sdk.service import Way, example

from asgi_llm_guard import Budget, Concurrency, Iterations, ProviderBudget, Quota, QuotaBook, RateLimit
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio


async def test_ledger_is_the_bill(storage: str, way: Way) -> None:
    """Calls under every kind of policy are answered in full, and the ledger is the provider's bill."""
    policies = (
        Iterations(10),
        ProviderBudget({"openai": "$1/1d"}),
        Budget("$1/daily"),
        Quota(QuotaBook({"research": {"daily_tokens": 10_000, "monthly_cost": 5, "models": ["openai/gpt-4o*"]}})),
        RateLimit("60/minute"),
        Concurrency(2),
    )
    async with example(storage, *policies) as service:
        service.provider.script(
            Behaviour.answer(),
            Behaviour.answer(output_tokens=100, reasoning_tokens=30, input_tokens=4_000, cache_read_tokens=3_000),
            Behaviour.answer("word " * 150),
        )
        answers = [await service.ask(way, session="s") for _ in range(3)]

        assert answers[0].text == "Echo: Say hello to everybody here"
        assert [len(answer.text.split()) for answer in answers[1:]] == [100, 150]
        assert service.requests.count == service.provider.calls == 3
        records = await service.records()
        assert [record.cost_nanousd for record in records] == [line.cost_nanousd for line in service.provider.bill]
        assert {record.outcome for record in records} == {"measured"}
        assert (records[0].caller, records[0].departments, records[0].session) == ("ann", ("research",), "s")


async def test_usage_is_shown_to_those_who_ask(storage: str) -> None:
    """Streams are metered exactly whether or not the caller asks for usage, and only those who ask see it."""
    async with example(storage, Budget("$1/1d")) as service:
        asked = await service.ask("async stream", wants_usage=True)
        not_asked = await service.ask("async stream")

        assert (asked.usage_seen, not_asked.usage_seen) == (True, False)
        assert asked.text == not_asked.text
        assert await service.charged() == service.provider.total_nanousd > 0


async def test_what_fits_is_admitted_under_concurrency(storage: str) -> None:
    """Of many calls at the same time exactly as many are admitted as fit, and the ledger is the bill."""
    async with example(storage, Iterations(5)) as service:
        service.provider.script(*[Behaviour.answer(output_tokens=7)] * 20)
        outcomes = await asyncio.gather(
            *(service.ask("async stream" if number % 2 else "async", session="s") for number in range(20)),
            return_exceptions=True,
        )

        assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 5
        assert (service.requests.count, service.provider.calls) == (20, 5)
        assert await service.charged() == service.provider.total_nanousd > 0
