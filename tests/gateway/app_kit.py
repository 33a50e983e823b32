"""The gateway's application behind a real server, over a fake provider that is all providers, called by real SDKs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Literal, Self

import anthropic
import httpx2
import openai
from examples.demo import serve
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import ASGIApp
from tests.gateway.kit import BILLED, PRICES
from tests.plain import PLAIN
from tests.sdk.service import InFlight

from asgi_llm_guard import Guard, GuardMiddleware
from asgi_llm_guard.gateway import Deployment, Gateway, RetryRules
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.testing import FakeProvider
from asgi_llm_guard.usage import UsageRecord

Way = Literal["alone", "mounted", "inside"]
WAYS: Final[tuple[Way, ...]] = ("alone", "mounted", "inside")
"""Served by itself; mounted in an application without a guard; mounted in one that the same guard is around."""

SECRET: Final = "the secret of these tests"
KEY, RECORD = ApiKeys.generate("ann", secret=SECRET, departments=["research"])
CANARY: Final = "sk-canary-7f3b9a"
"""The beginning of every provider's key: it must not show up anywhere."""
ASKED: Final[Any] = [{"role": "user", "content": "Say hello to everybody here"}]
ECHO: Final = "Echo: Say hello to everybody here"

MODELS: Final = {"berlin": "openai/model-a", "geneva": "openai/model-c", "lugano": "anthropic/model-d"}
"""The model of each deployment."""


class Service:
    """An application with the gateway in it, and everything around it."""

    def __init__(self, url: str, guard: Guard, gateway: Gateway, provider: FakeProvider, requests: InFlight) -> None:
        self.url = url
        self.guard = guard
        self.gateway = gateway
        self.provider = provider
        self.requests = requests
        self._clients = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._clients.aclose()

    async def http(self) -> httpx2.AsyncClient:
        client = httpx2.AsyncClient(base_url=self.url, **PLAIN, headers={"authorization": f"Bearer {KEY}"}, timeout=20)
        return await self._clients.enter_async_context(client)

    async def openai(self, *, retries: int = 2, key: str = KEY) -> openai.AsyncOpenAI:
        http = await self._clients.enter_async_context(httpx2.AsyncClient(**PLAIN, timeout=20))
        return openai.AsyncOpenAI(api_key=key, base_url=f"{self.url}/v1", http_client=http, max_retries=retries)

    async def anthropic(self, *, retries: int = 2, key: str = KEY) -> anthropic.AsyncAnthropic:
        http = await self._clients.enter_async_context(httpx2.AsyncClient(**PLAIN, timeout=20))
        return anthropic.AsyncAnthropic(api_key=key, base_url=self.url, http_client=http, max_retries=retries)

    async def records(self) -> Sequence[UsageRecord]:
        """The ledger, once everything is over; nothing may be held any more."""
        await self.requests.until(0)
        await self.provider.idle()
        assert await self.guard.storage.open_holds() == 0
        return await self.guard.storage.records()

    async def charged_nanousd(self) -> int:
        return sum(record.cost_nanousd or 0 for record in await self.records())

    async def check_books(self) -> None:
        """The ledger is the bill, and there is one."""
        assert await self.charged_nanousd() == self.provider.total_nanousd > 0


@contextlib.asynccontextmanager
async def service(
    *policies: Policy,
    way: Way = "alone",
    expose: bool = False,
    deployments: Mapping[str, Mapping[str, Any]] | None = None,
    guard: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Service]:
    """The application, guarded by these policies. `options`: of the gateway."""
    async with contextlib.AsyncExitStack() as stack:
        provider = FakeProvider(prices=BILLED)
        url = await stack.enter_async_context(provider.serve())
        made = []
        for name, model in MODELS.items():
            vendor, _, bare = model.partition("/")
            fields: dict[str, Any] = {"provider": vendor, "model": bare, "name": name, "groups": ()}
            fields |= {"api_base": str(url.root if vendor == "anthropic" else url), "api_key": f"{CANARY}-{name}"}
            made.append(Deployment(**{**fields, **(deployments or {}).get(name, {})}))
        identity = ApiKeys([RECORD], secret=SECRET)
        given: dict[str, Any] = {"prices": PRICES, "identity": identity, **(guard or {})}
        the_guard = await stack.enter_async_context(Guard(policies, **given))
        options = {"retry": RetryRules(retries=0), **options}
        gateway = await stack.enter_async_context(Gateway(the_guard, made, **options))
        app, prefix = arranged(way, gateway, expose=expose)
        requests = InFlight(app)
        root = await stack.enter_async_context(serve(requests))
        yield await stack.enter_async_context(Service(root + prefix, the_guard, gateway, provider, requests))


def arranged(way: Way, gateway: Gateway, *, expose: bool = False) -> tuple[ASGIApp, str]:
    """The application, and the path that the gateway is under."""
    app: Any = gateway.app(expose=expose)
    if way == "alone":
        return app, ""
    around = [Middleware(GuardMiddleware, guard=gateway.guard)] if way == "inside" else []
    return Starlette(routes=[Mount("/llm", app)], middleware=around), "/llm"
