"""The public names as users write them. Never run: type checkers read it (`scripts/types`, strict)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import assert_type

import anthropic
import httpx
import httpx2
import openai
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from asgi_llm_guard import (
    Budget,
    CacheScope,
    Concurrency,
    Context,
    Denied,
    DepartmentQuota,
    Guard,
    GuardMiddleware,
    Iterations,
    LimitExceeded,
    ModelAllow,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
    Route,
    Usage,
    current_admission,
    guarded,
)
from asgi_llm_guard.admission import Admission
from asgi_llm_guard.events import Event, SettledCall
from asgi_llm_guard.httpx import AsyncGuardTransport, GuardTransport
from asgi_llm_guard.identity import ApiKeys, ScopeUser, TrustedHeaders, baggage, body, first_of, header
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.testing import FakeProvider, FrozenClock

# ---------------------------------------------------------------------------------- guards


def observe(event: Event) -> None:
    if isinstance(event, SettledCall):
        assert_type(event.record.cost_nanousd, int | None)


book = QuotaBook({"research": DepartmentQuota(models=["openai/*"], daily_tokens=100_000, monthly_cost=Decimal(50))})
policies: list[Policy] = [
    Iterations(25, missing="principal", renew=True),
    Budget("$5/1d", per="user"),
    Budget(["$1/1d", "200000 tokens/daily"], per="session"),
    Budget({"research": "$50/1d", "*": "$5/1d"}, per="department"),
    ProviderBudget({"openai": "$100/1d", "anthropic": {"budget_limit": 500, "time_period": "7d"}}),
    Quota(book),
    RateLimit("60/minute", per="user"),
    Concurrency(5, per="caller"),
    ModelAllow(["openai/*"]),
    CacheScope(),
    Iterations(10).shadow(),
]
guard = Guard(
    policies,
    storage="sqlite:///guard.db",
    identity=ScopeUser(),
    agents={"researcher": {"max_iterations": 25}},
    session=first_of(header("x-session-id"), body("metadata.session_id"), baggage("session.id")),
    clock=FrozenClock(),
    observers=[observe],
    statuses={"budget_exhausted": 429},
)
assert_type(Guard.from_file("guard.toml"), Guard)
assert_type(guard.policies, tuple[Policy, ...])
assert_type(guard.ready, bool)
assert_type(guard.health(), dict[str, object])
Guard([Iterations(25, on_outage="deny"), Budget("$5/daily", lease="$1", durable="disk")], on_data_loss="rebuild")

# -------------------------------------------------------------------------------- applications

fastapi = FastAPI()
fastapi.add_middleware(
    GuardMiddleware,
    guard=guard,
    routes=[Route("/v1/chat/completions", clamp=True), Route("/agents/{name}", extra=[Iterations(10)])],
    exempt=["/health"],
    unlisted="deny",
)
starlette = Starlette(middleware=[Middleware(GuardMiddleware, guard=guard)])
raw = GuardMiddleware(starlette, guard)
nested = GuardMiddleware(FakeProvider(), guard=Guard(identity=TrustedHeaders(trust_headers=True)))


# ------------------------------------------------------------------------- decorated functions


@guarded(Iterations(5), model="openai/gpt-5.6-mini", max_output_tokens=500)
async def answer(question: str, *, times: int = 1) -> dict[str, str]:
    return {question: str(times)}


@guarded()
def answer_sync(question: str) -> str:
    return question


@guarded()
async def items(count: int) -> AsyncIterator[int]:
    yield count


@guarded()
def items_sync(count: int) -> Iterator[int]:
    yield count


@guarded(Concurrency(1))
class Endpoint(HTTPEndpoint):
    async def post(self, request: Request) -> Response:
        return JSONResponse({})


@fastapi.post("/answer")
@guarded(guard=guard, context=Context(caller="job"))
async def handler(question: str) -> StreamingResponse:
    assert_type(current_admission(), Admission)
    return StreamingResponse(str(item) async for item in items(3))


@guarded(guard=guard, context=lambda tenant: Context(caller=tenant))
async def job(tenant: str) -> None: ...


async def use() -> None:
    """Decorated functions keep their types, arguments included."""
    assert_type(await answer("why", times=2), dict[str, str])
    assert_type(answer_sync("why"), str)
    assert_type(items(3), AsyncIterator[int])
    assert_type(items_sync(3), Iterator[int])
    assert_type(await handler("why"), StreamingResponse)
    await answer(3)  # type: ignore[arg-type]
    answer_sync()  # type: ignore[call-arg]
    guarded(5)  # type: ignore[arg-type]
    Endpoint({}, None, None)  # type: ignore[arg-type]
    Guard([3])  # type: ignore[list-item]
    Route("/x", calls="some")  # type: ignore[arg-type]

    async with guard.open(Context(caller="job:nightly", departments=("research",))) as admission:
        assert_type(admission, Admission)
        async with guard.call(model="anthropic/claude-sonnet-4-5", max_output_tokens=800) as call:
            call.record(Usage(input_tokens=10, output_tokens=5))
            async for item in call.stream(items(3)):
                assert_type(item, int)
    try:
        await job("acme")
    except LimitExceeded as error:
        assert_type(error.denied, Denied)
        assert_type(error.denied.retry_after_s, int | None)


def use_sync() -> None:
    with guard.open_sync(Context(caller="job")), guard.call_sync(model="openai/gpt-5.6-mini") as call:
        for item in call.stream_sync(items_sync(3)):
            assert_type(item, int)


key, record = ApiKeys.generate("team-a", secret="a pepper that is long enough")
assert_type(key, str)
assert_type(ApiKeys([record], secret="a pepper that is long enough"), ApiKeys)


# ------------------------------------------------------------------------------------ hooks


def hooked_clients(guard: Guard) -> None:
    assert_type(guard.httpx_client(), httpx2.AsyncClient)
    assert_type(guard.httpx_client(library="httpx"), httpx.AsyncClient)
    assert_type(guard.httpx_client_sync(), httpx2.Client)
    assert_type(guard.httpx_client_sync(library="httpx"), httpx.Client)
    openai.AsyncOpenAI(http_client=guard.httpx_client())
    openai.OpenAI(http_client=guard.httpx_client_sync())
    anthropic.AsyncAnthropic(http_client=guard.httpx_client())
    httpx.AsyncClient(transport=AsyncGuardTransport(guard, clamp=True, context=Context(caller="job")))
    httpx2.AsyncClient(transport=AsyncGuardTransport(guard, hosts=["api.openai.com"]))
    httpx.Client(transport=GuardTransport(guard, httpx.HTTPTransport()))
    httpx2.Client(transport=GuardTransport(guard, streams=StreamRules(cut=True)))
