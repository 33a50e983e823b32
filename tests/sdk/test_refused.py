"""What the SDK makes of every kind of refusal: its exception, the message, and how many requests it sends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import openai
import pytest
from tests.sdk.service import Way, example

from asgi_llm_guard import Budget, Concurrency, Iterations, ModelAllow, ProviderBudget, Quota, QuotaBook, RateLimit
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

DAY = r"It resets at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A policy, what it lets through, and what the SDK raises then."""

    policy: Policy
    before: int
    """How many calls are admitted first."""
    error: type[openai.APIStatusError]
    status: int
    code: str
    message: Sequence[str]
    """Patterns that the message has."""
    model: str = "gpt-4o-mini"


def research(**quota: object) -> Quota:
    return Quota(QuotaBook({"research": quota}))


# An admitted call uses 150 tokens of output, 0.00009 dollars, and some for its input; one that asks holds a little more.
CASES = {
    "iterations": Case(
        policy=Iterations(2),
        before=2,
        error=openai.RateLimitError,
        status=429,
        code="session_iterations_exhausted",
        message=["^Error code: 429 - iterations: session 's' has used up its calls", "limit 2 calls, used 2", DAY],
    ),
    "provider budget": Case(
        policy=ProviderBudget({"openai": "$0.0002/1d"}),
        before=1,
        error=openai.APIStatusError,
        status=402,
        code="budget_exhausted",
        message=["^Error code: 402 - provider_budget: this provider has used up its 1d budget", DAY],
    ),
    "user budget": Case(
        policy=Budget("$0.0002/daily"),
        before=1,
        error=openai.APIStatusError,
        status=402,
        code="budget_exhausted",
        message=[
            "^Error code: 402 - user_budget: user 'ann' has used up its daily budget",
            r"limit \$0\.0002, used \$0\.00009",
            DAY,
            r"It would fit with max_tokens ≤ \d+",
        ],
    ),
    "quota of tokens": Case(
        policy=research(daily_tokens=500),
        before=1,
        error=openai.RateLimitError,
        status=429,
        code="quota_exceeded",
        message=[
            "^Error code: 429 - quota: this department has used up its daily token quota",
            r"requested \d+",
            DAY,
        ],
    ),
    "quota of cost": Case(
        policy=research(monthly_cost="0.0002"),
        before=1,
        error=openai.RateLimitError,
        status=429,
        code="quota_exceeded",
        message=["^Error code: 429 - quota: this department has used up its monthly", r"requested \$0\.0001", DAY],
    ),
    "quota of models": Case(
        policy=research(models=["openai/gpt-4o-mini"]),
        before=1,
        error=openai.PermissionDeniedError,
        status=403,
        code="model_not_allowed",
        message=[
            "^Error code: 403 - quota: the model 'openai/gpt-4o' is not allowed for the department 'research'",
            "Ask for another one",
        ],
        model="gpt-4o",
    ),
    "models": Case(
        policy=ModelAllow(["openai/gpt-4o-mini"]),
        before=1,
        error=openai.PermissionDeniedError,
        status=403,
        code="model_not_allowed",
        message=["^Error code: 403 - models: the model 'openai/gpt-4o' is not allowed", "Ask for another one"],
        model="gpt-4o",
    ),
    "slow rate": Case(
        policy=RateLimit("2/day"),
        before=2,
        error=openai.RateLimitError,
        status=429,
        code="rate_limit_exceeded",
        message=["^Error code: 429 - user_rate: ", r"limit 2 calls per 1d, used 2", r"Try again at \d{4}-"],
    ),
    "request alone too large": Case(
        policy=Budget("$0.00005/1d"),
        before=0,
        error=openai.APIStatusError,
        status=402,
        code="request_exceeds_budget",
        message=["^Error code: 402 - user_budget: ", r"limit \$0\.00005", r"max_tokens ≤ \d+"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_refusal(storage: str, way: Way, case: Case) -> None:
    """The SDK sends exactly one request, raises its own exception and shows a message that says what to do."""
    async with example(storage, case.policy) as service:
        service.provider.script(*[Behaviour.answer(output_tokens=150)] * case.before)
        for _ in range(case.before):
            await service.ask(way, session="s")
        sent = service.requests.count
        with pytest.raises(openai.APIStatusError) as caught:
            await service.ask(way, session="s", model=case.model)

        error = caught.value
        assert (type(error), error.status_code, error.code) == (case.error, case.status, case.code)
        missing = [pattern for pattern in case.message if not re.search(pattern, str(error))]
        assert (missing, str(error)) == ([], str(error))
        assert service.requests.count - sent == 1
        assert error.response.headers["x-should-retry"] == "false"
        assert service.provider.calls == case.before
        assert await service.charged() == service.provider.total_nanousd


async def test_taken_slots(storage: str, way: Way) -> None:
    """While the only slot is taken, another call is told to come back in a second; afterwards it is admitted."""
    async with example(storage, Concurrency(1)) as service:
        service.provider.script(Behaviour.slow())
        async with service.client() as client:
            stream = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "hello"}],
                max_completion_tokens=9,
                stream=True,
            )
            with pytest.raises(openai.RateLimitError) as caught:
                await service.ask(way, retries=0)
            service.provider.release()
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert text == "Echo: hello"
        assert caught.value.code == "concurrency_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert "x-should-retry" not in caught.value.response.headers
        assert "user_concurrency: " in str(caught.value)
        assert (await service.ask(way)).text
        assert await service.charged() == service.provider.total_nanousd > 0


@pytest.mark.parametrize("way", ["async", "sync stream"])
async def test_short_rate_is_waited_for(storage: str, way: Way) -> None:
    """A refusal by a rate that is free again within seconds is retried by the SDK, and then admitted."""
    async with example(storage, RateLimit("1/second")) as service:
        await service.ask(way)
        answer = await service.ask(way)

        assert answer.text == "Echo: Say hello to everybody here"
        assert service.requests.count == 3
        assert service.provider.calls == 2
        assert await service.charged() == service.provider.total_nanousd


async def test_stranger(storage: str) -> None:
    """A key that is not known gets a 403 that says so, once."""
    async with example(storage, Budget("$1/1d")) as service, service.client(retries=2) as client:
        with pytest.raises(openai.PermissionDeniedError, match="API key is not known"):
            await client.with_options(api_key="lg-not-a-key-of-ours").chat.completions.create(
                model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}]
            )
        assert (service.requests.count, service.provider.calls) == (1, 0)
        assert await service.records() == []
