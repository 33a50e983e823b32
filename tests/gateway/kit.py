"""A gateway over fake providers on real sockets, with a clock and a sleep that the test moves.

async with fleet(clock, "a", "b", "c") as fleet_:
    fleet_["a"].script(Behaviour.error(500))
    await fleet_.chat("auto")
    assert fleet_.asked == ["a", "b"]
    await fleet_.settled()          # ledger == bill, to the nano-dollar
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

from asgi_llm_guard import Context, Guard
from asgi_llm_guard.events import AttemptEnded, Event
from asgi_llm_guard.gateway import Chunk, Completion, Deployment, Gateway
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import BaseURL, Behaviour, FakeProvider, FrozenClock, Price
from asgi_llm_guard.usage import UsageRecord

CONTEXT: Final = Context(caller="acme", user="ann")
MESSAGES: Final = [{"role": "user", "content": "say it again please"}]

DOLLARS: Final[Mapping[str, tuple[int, int]]] = {
    "openai/model-a": (1, 2),
    "openai/model-b": (3, 6),
    "openai/model-c": (5, 10),
    "anthropic/model-d": (2, 4),
    "mistral/model-e": (4, 8),
}
"""$ per million tokens of input and of output, by model."""
PRICES: Final = PriceBook.snapshot(
    overrides={name: {"input": put_in, "output": put_out} for name, (put_in, put_out) in DOLLARS.items()}
)
BILLED: Final = {
    name.partition("/")[2]: Price(input=1000 * put_in, output=1000 * put_out)
    for name, (put_in, put_out) in DOLLARS.items()
}
"""The same for the fake providers, by the model's bare name."""

MODELS: Final = {
    "a": "openai/model-a",
    "b": "openai/model-b",
    "c": "openai/model-c",
    "d": "anthropic/model-d",
    "e": "mistral/model-e",
}
"""The model of each deployment that a test names by one letter."""


class Fleet:
    """Deployments by name, each with a provider of its own, behind one gateway."""

    def __init__(self, clock: FrozenClock) -> None:
        self.clock = clock
        self.providers: dict[str, FakeProvider] = {}
        self.deployments: dict[str, Deployment] = {}
        self.events: list[Event] = []
        self.slept: list[float] = []
        """How long the gateway has waited, each time. Nothing really waits: the clock moves."""
        self.guard: Guard
        self.gateway: Gateway

    def __getitem__(self, name: str) -> FakeProvider:
        return self.providers[name]

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds=seconds)

    def observe(self, event: Event) -> None:
        self.events.append(event)

    @property
    def ended(self) -> list[AttemptEnded]:
        """What was told of each attempt, in order."""
        return [event for event in self.events if isinstance(event, AttemptEnded)]

    @property
    def asked(self) -> list[str]:
        """The deployments that were asked, in the order in which their answers ended."""
        return [event.deployment for event in self.ended]

    @property
    def billed_nanousd(self) -> int:
        """What all providers together ask for."""
        return sum(provider.total_nanousd for provider in self.providers.values())

    async def records(self) -> Sequence[UsageRecord]:
        """The ledger."""
        return await self.guard.storage.records()

    async def spent_nanousd(self) -> int:
        """What the ledger says was spent."""
        return sum(record.cost_nanousd or 0 for record in await self.records())

    async def settled(self) -> None:
        """Nothing is held any more, and the ledger has what the providers' bills have, to the nano-dollar."""
        for provider in self.providers.values():
            await provider.idle()
        assert await self.guard.storage.open_holds() == 0
        assert await self.spent_nanousd() == self.billed_nanousd

    async def chat(
        self, model: str = "auto", messages: Sequence[Mapping[str, Any]] = MESSAGES, **options: Any
    ) -> Completion:
        """Ask in an admission of its own. The answer is of at most 20 tokens, unless `max_tokens` says otherwise."""
        async with self.guard.open(CONTEXT):
            return await self.gateway.chat(model, messages, **{"max_tokens": 20, **options})

    async def stream(
        self, model: str = "auto", messages: Sequence[Mapping[str, Any]] = MESSAGES, **options: Any
    ) -> list[Chunk]:
        """The same, streamed: every chunk."""
        async with self.guard.open(CONTEXT):
            return [chunk async for chunk in self.gateway.stream(model, messages, **{"max_tokens": 20, **options})]


@contextlib.asynccontextmanager
async def _served(providers: Iterable[FakeProvider]) -> AsyncIterator[list[BaseURL]]:
    """All of them start, and stop, at the same time: a server takes a tenth of a second to notice that it is to end."""
    serving = [provider.serve() for provider in providers]
    urls = await asyncio.gather(*(each.__aenter__() for each in serving))
    try:
        yield urls
    finally:
        await asyncio.gather(*(each.__aexit__(None, None, None) for each in serving))


@contextlib.asynccontextmanager
async def fleet(
    clock: FrozenClock,
    *names: str,
    policies: Sequence[Any] = (),
    storage: Storage | str = "memory://",
    limits: Mapping[str, Mapping[str, Any]] | None = None,
    defaults: Mapping[str, Behaviour] | None = None,
    guard: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Fleet]:
    """A gateway over one provider for each name (`MODELS`); `limits`: more fields of its `Deployment`."""
    made = Fleet(clock)
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            made.providers[name] = FakeProvider(
                prices=BILLED,
                default=(defaults or {}).get(name, Behaviour.answer()),
                platform="mistral" if MODELS[name].startswith("mistral") else "openai",
            )
        urls = await stack.enter_async_context(_served(made.providers.values()))
        for name, url in zip(names, urls, strict=True):
            vendor, _, model = MODELS[name].partition("/")
            base = url.root if vendor == "anthropic" else url
            fields = {"provider": vendor, "model": model, "name": name, "api_key": "key-of-nobody", "api_base": base}
            made.deployments[name] = Deployment(**{**fields, **(limits or {}).get(name, {})})
        made.guard = Guard(
            policies, storage=storage, clock=clock, observers=[made.observe],
            **{"prices": PRICES, "hold_wait_s": 0, **(guard or {})},
        )  # fmt: skip
        made.gateway = Gateway(
            made.guard,
            made.deployments.values(),
            **{"sleep": made.sleep, "random": random.Random(7), **options},
        )
        stack.push_async_callback(made.guard.aclose)
        stack.push_async_callback(made.gateway.aclose)
        yield made
