"""The gateway that the chat models of these tests go through."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

from asgi_llm_guard import Context, Guard, background
from asgi_llm_guard.gateway import CooldownRules, Deployment, Gateway, RetryRules
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import Behaviour, FakeProvider, Price
from asgi_llm_guard.testing.sale import FakeRequest

CONTEXT: Final = Context(caller="acme", user="ann")
KEY: Final = "key-that-nobody-sees"

ARGUMENTS: Final[Mapping[str, Mapping[str, object]]] = {
    "Joke": {"setup": "Why do cats purr?", "punchline": "They are paid for it."},
    "JokeDict": {"setup": "Why do cats purr?", "punchline": "They are paid for it."},
    "color_picker": {"fav_color": "purple"},
    "get_weather": {"location": "San Francisco, CA"},
    "greeting_generator": {"answer_style": "pirate"},
    "magic_function": {"input": 3},
    "magic_function_no_args": {},
    "my_adder_tool": {"a": 1, "b": 2},
    "random_image": {},
    "random_pdf": {},
    "unicode_customer": {"customer_name": "你好啊集团 こんにちは株式会社", "description": "a company"},
}
"""What the provider calls a tool of each name with."""


def wanted(request: FakeRequest) -> str | None:
    """The tool that a model would call: the one it must, or the first of those it may if a question is open."""
    tools = [tool.get("function", tool)["name"] for tool in request.body.get("tools", ())]
    choice = request.body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        named = choice.get("function", choice).get("name")
        if named is not None:
            return str(named)
        choice = {"any": "required"}.get(choice["type"], choice["type"])
    if not tools or choice == "none":
        return None
    last = request.messages[-1]
    open_question = last["role"] == "user" and "tool_result" not in str(last["content"])
    return str(tools[0]) if choice == "required" or open_question else None


def _wants_json(request: FakeRequest) -> bool:
    return "response_format" in request.body or "format" in request.body.get("output_config", ())


def _wants(name: str, request: FakeRequest) -> bool:
    return wanted(request) == name


class Stage:
    """A provider, and the gateway over it: `auto` is `openai/small` and `openai/large`, with windows of their own."""

    def __init__(self, provider: FakeProvider, guard: Guard, gateway: Gateway) -> None:
        self.provider = provider
        self.guard = guard
        self.gateway = gateway

    @property
    def body(self) -> Mapping[str, Any]:
        """Of the last request."""
        return self.provider.requests[-1].body

    def settled(self) -> None:
        """Nothing is held, and the ledger has what is on the bill."""
        background.run(self._settled(), anywhere=True)

    async def _settled(self) -> None:
        await self.provider.idle()
        for _ in range(1_000):
            if not await self.guard.storage.open_holds():
                break
            await asyncio.sleep(0)
        records = await self.guard.storage.records()
        assert await self.guard.storage.open_holds() == 0
        assert sum(record.cost_nanousd or 0 for record in records) >= self.provider.total_nanousd


@contextlib.contextmanager
def staged() -> Iterator[Stage]:
    dollars = {"openai/small": (1, 2), "openai/large": (1, 2), "anthropic/claude-small": (1, 2)}
    provider = FakeProvider(
        prices={
            name.partition("/")[2]: Price(input=1000 * put_in, output=1000 * put_out)
            for name, (put_in, put_out) in dollars.items()
        }
    )
    for name, arguments in ARGUMENTS.items():
        provider.when(partial(_wants, name), Behaviour.call_tool(name, **arguments))
    provider.when(_wants_json, Behaviour.answer(json.dumps(ARGUMENTS["Joke"])))
    with provider.serve() as url:
        guard = Guard(
            prices=PriceBook.snapshot(
                overrides={name: {"input": put_in, "output": put_out} for name, (put_in, put_out) in dollars.items()}
            ),
            hold_wait_s=0,
        )
        gateway = Gateway(
            guard,
            [
                *(
                    Deployment(
                        provider="openai", model=model, name=model, api_key=KEY, api_base=url, context_window=window
                    )
                    for model, window in (("small", 100_000), ("large", 200_000))
                ),
                Deployment(provider="anthropic", model="claude-small", api_key=KEY, api_base=url.root, groups=()),
            ],
            aliases={"one": "openai/small"},
            context=CONTEXT,
            retry=RetryRules(retries=0),
            cooldowns=CooldownRules(cooldown_s=0),
        )
        yield Stage(provider, guard, gateway)
        background.run(gateway.aclose(), anywhere=True)
        background.run(guard.aclose(), anywhere=True)
