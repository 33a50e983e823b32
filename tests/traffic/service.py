"""The service that a day of traffic goes through: a gateway with a cache behind a real server, over a fake provider."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import httpx2
from examples.demo import serve
from tests.sdk.service import InFlight
from tests.traffic.day import BEGINS, DEPARTMENTS, MODELS, USERS, Ask

from asgi_llm_guard import Budget, CacheScope, Guard, Quota, QuotaBook
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.gateway import CooldownRules, Deployment, Gateway, RetryRules
from asgi_llm_guard.identity import Identity
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock, Gate, Price

ZONE: Final = "Europe/Berlin"
_DOLLARS: Final[Mapping[str, tuple[str, str]]] = {
    "model-a": ("0.123", "0.457"),
    "model-b": ("3.001", "15.003"),
    "model-c": ("0.999", "4.001"),
    "model-forbidden": ("5", "10"),
}
"""$ per million tokens of input and output: such that sums have odd ends."""
_LATE_S: Final = 20

PRICES: Final = PriceBook.snapshot(
    overrides={f"openai/{name}": {"input": put_in, "output": put_out} for name, (put_in, put_out) in _DOLLARS.items()}
)
BILLED: Final = {
    name: Price(input=round(float(put_in) * 1000), output=round(float(put_out) * 1000))
    for name, (put_in, put_out) in _DOLLARS.items()
}

_USERS: Final = {user.name: user for user in USERS}


def _identity(scope: Mapping[str, Any]) -> Identity:
    name = dict(scope["headers"])[b"x-test-user"].decode()
    user = _USERS[name]
    return Identity(caller=f"key-of-{name}", user=name, departments=user.departments, agent=user.agent)


def _book() -> QuotaBook:
    quotas: dict[str, dict[str, object]] = {
        name: {"models": [f"openai/{model}" for model in MODELS], "monthly_cost": 10_000, "tz": ZONE}
        for name in DEPARTMENTS
    }
    quotas["legal"]["daily_tokens"] = 1_500
    """So little that its calls are refused for the rest of the day."""
    return QuotaBook(quotas)


class Provider(FakeProvider):
    """Meets a request as its text says."""

    def __init__(self) -> None:
        super().__init__(prices=BILLED)
        self.late = Gate()
        self._failed: set[str] = set()
        said = self._said
        self.when(said("flaky", once=True), Behaviour.error(503))
        self.when(said("broken"), Behaviour.error(500))
        self.when(said("overage"), Behaviour.answer(output_tokens=60))
        self.when(said("tool"), Behaviour.call_tool("look_up", query="a b c"))
        self.when(said("late"), Behaviour.hang(gate=self.late))

    def _said(self, word: str, *, once: bool = False) -> Any:
        def holds(request: Any) -> bool:
            text: str = request.texts[-1]
            if not text.startswith(word) or (once and text in self._failed):
                return False
            self._failed.add(text)
            return True

        return holds


class Service:
    """A service that a clock is moved for, its provider, and its client."""

    def __init__(self, guard: Guard, provider: Provider, clock: FrozenClock, http: httpx2.AsyncClient) -> None:
        self.guard = guard
        self.provider = provider
        self.clock = clock
        self.refused: Counter[str] = Counter()
        """Refusals by code, as the clients were told."""
        self.failed = 0
        """Answers of 5xx that are the provider's."""
        self.answered = 0
        self._http = http

    async def play(self, begun_s: float, asked: Sequence[Ask]) -> None:
        """Make these requests at once, at that time of the day; wait until everything of them is over."""
        self.clock.set(BEGINS + timedelta(seconds=begun_s))
        await self.guard.heartbeat()
        tasks = [asyncio.create_task(self._ask(ask)) for ask in asked]
        late = sum(ask.kind == "late" for ask in asked)
        if late:
            prompt = [task for task, ask in zip(tasks, asked, strict=True) if ask.kind != "late"]
            await asyncio.gather(*prompt)
            waiting = [task for task, ask in zip(tasks, asked, strict=True) if ask.kind == "late"]
            await self._until_waiting(waiting)
            self.clock.advance(seconds=_LATE_S)
            await self.guard.heartbeat()  # whoever is thought dead is charged what it holds
            self.provider.late.release(sum(not task.done() for task in waiting))  # the others were refused
        await asyncio.gather(*tasks)
        await self.provider.idle()
        await self._over(late=late > 0)

    async def _over(self, *, late: bool) -> None:
        """Wait until everything is settled. Settlements are not waited for by responses, and streams whose clients left
        are read to their end by nobody's request; a clock that moves meanwhile would make them late."""
        async with asyncio.timeout(60):
            while await self.guard.storage.open_holds() or (late and await self._expired()):  # noqa: ASYNC110 - storages tell nobody
                await asyncio.sleep(0.002)

    async def _expired(self) -> bool:
        lately_ms = self.clock.now_ms() - 2_000 * _LATE_S
        return any(record.outcome == "expired" for record in await self.guard.storage.records(since_ms=lately_ms))

    async def _until_waiting(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Until each of them waits for the provider, or was refused."""
        while True:
            open_tasks = sum(not task.done() for task in tasks)
            if self.provider.open >= open_tasks:
                return
            await asyncio.sleep(0.002)

    async def _ask(self, ask: Ask) -> None:
        body = {
            "model": ask.model,
            "messages": [{"role": "user", "content": ask.text}],
            "max_tokens": ask.max_tokens,
            "stream": ask.kind in {"stream", "left"},
        }
        headers = {"x-test-user": ask.user.name, "x-session-id": ask.session}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if ask.kind == "left" and response.status_code == 200:
                async for _ in response.aiter_bytes():
                    break
                self.answered += 1
                return
            content = await response.aread()
        if response.status_code == 200:
            self.answered += 1
        elif ask.kind == "broken" and response.status_code >= 500:
            self.failed += 1
        else:
            error = response.json().get("error", {})
            self.refused[str(error.get("code"))] += 1
            assert response.status_code in {402, 403, 429}, (response.status_code, content)


@contextlib.asynccontextmanager
async def service(storage: Storage | str, clock: FrozenClock, **options: Any) -> AsyncIterator[Service]:
    """The service over this storage. `options`: of the guard."""
    async with contextlib.AsyncExitStack() as stack:
        provider = Provider()
        url = await stack.enter_async_context(provider.serve())
        guard = Guard(
            [CacheScope(), Budget("$20/daily", per="user", tz=ZONE), Quota(_book())],
            storage=storage,
            clock=clock,
            identity=_identity,
            prices=PRICES,
            cache=Cache(ttl="1d"),
            streams=StreamRules(drain="read", total_s=60),
            **options,
        )
        await stack.enter_async_context(guard)
        deployments = [
            Deployment(name=name, provider="openai", model=name, api_base=str(url), api_key="not needed", groups=())
            for name in _DOLLARS
        ]
        gateway = Gateway(
            guard,
            deployments,
            retry=RetryRules(retries=1, pause_s=0),
            cooldowns=CooldownRules(cooldown_s=0),
        )
        await stack.enter_async_context(gateway)
        requests = InFlight(gateway.app())
        root = await stack.enter_async_context(serve(requests))
        limits = httpx2.Limits(max_connections=64, max_keepalive_connections=64)
        http = httpx2.AsyncClient(base_url=root, trust_env=False, timeout=30, limits=limits)
        made = Service(guard, provider, clock, await stack.enter_async_context(http))
        yield made
        await requests.until(0)
