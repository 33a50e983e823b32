"""A guarded service, a provider that costs nothing, a few calls, and what comes back: `make demo`."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys

import httpx2
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_llm_guard import Guard, GuardMiddleware, Iterations, ProviderBudget, guarded
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.money import format_usd
from asgi_llm_guard.testing import Behaviour, FakeProvider, asgi_client

MODEL = "gpt-4o-mini"
SHOWN = ("ratelimit", "retry-after", "x-should-retry")


def service(guard: Guard, llm: AsyncOpenAI) -> Starlette:
    """One endpoint that asks a model."""

    @guarded(model=f"openai/{MODEL}", max_output_tokens=400, input=lambda question: question)
    async def ask(question: str) -> ChatCompletion:
        return await llm.chat.completions.create(
            model=MODEL, max_completion_tokens=400, messages=[{"role": "user", "content": question}]
        )

    async def chat(request: Request) -> JSONResponse:
        answer = await ask((await request.json())["question"])
        return JSONResponse({"answer": (answer.choices[0].message.content or "")[:40]})

    return Starlette(
        routes=[Route("/chat", chat, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=guard)],
    )


async def post(client: httpx2.AsyncClient, session: str) -> int:
    """Ask once, and show what comes back."""
    response = await client.post("/chat", json={"question": "hello"}, headers={"x-session-id": session})
    shown = [f"{name}: {response.headers[name]}" for name in SHOWN if name in response.headers]
    print(f"\nPOST /chat  (session {session})  ->  {response.status_code}")
    print("\n".join(f"    {line}" for line in (*shown, *json.dumps(response.json(), indent=2).splitlines())))
    return response.status_code


async def main() -> int:
    secret = secrets.token_urlsafe()
    key, record = ApiKeys.generate("demo", secret=secret)
    guard = Guard(
        policies=[Iterations(3), ProviderBudget({"openai": "$0.001/1d"})],
        identity=ApiKeys([record], secret=secret),
    )
    provider = FakeProvider()
    async with (
        provider.serve() as base_url,
        httpx2.AsyncClient(trust_env=False) as http,
        AsyncOpenAI(api_key="any", base_url=base_url, http_client=http) as llm,
        asgi_client(service(guard, llm)) as client,
    ):
        client.headers["authorization"] = f"Bearer {key}"
        print("== A session may make three calls: a loop ends there ==")
        loop = [await post(client, "agent-1") for _ in range(4)]
        print("\n== All sessions together may spend $0.001 a day ==")
        provider.script(*[Behaviour.answer(output_tokens=390)] * 4)
        budget = [await post(client, f"agent-{number}") for number in range(2, 7)]
        records = await guard.storage.records()
    await guard.aclose()
    spent = sum(record.cost_nanousd or 0 for record in records)
    print(f"\nThe provider answered {provider.calls} calls and billed {format_usd(provider.total_nanousd)}.")
    print(f"The guard's ledger has {len(records)} calls and {format_usd(spent)}.")
    as_promised = loop == [200, 200, 200, 429] and budget == [200, 200, 200, 200, 402]
    return 0 if as_promised and spent == provider.total_nanousd else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
