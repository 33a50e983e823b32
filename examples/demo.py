"""`make demo`: the Starlette example behind a real server, called by the real SDKs; all its providers are one fake.

With `--stay` it goes on afterwards, and so do some calls, until Ctrl+C: to look at its pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from anthropic import AsyncAnthropic
from examples.starlette_app.app import from_environment
from openai import APIStatusError, AsyncOpenAI
from starlette.types import Receive, Scope, Send

from asgi_llm_guard.money import from_nano
from asgi_llm_guard.testing import DEFAULT_PRICE, Behaviour, FakeProvider, Price

PRICES = {
    "gpt-4o-mini": DEFAULT_PRICE,
    "gpt-4o": Price(input=2500, output=10000, cache_read=1250),
    "claude-haiku-4-5": Price(input=1000, output=5000, cache_read=100),
}
SECRET = "demo-secret-of-the-starlette-app"  # noqa: S105 - as published in its README
ADMIN_TOKEN = "demo-token-of-the-administration-page"  # noqa: S105 - as published there
LONGEST_S = 15
PAUSE_S = 0.5


class Requests:
    """An ASGI app that counts what reaches the one inside it."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.count += scope["type"] == "http"
        await self.app(scope, receive, send)


@asynccontextmanager
async def serve(app: Any) -> AsyncIterator[str]:
    """The app under uvicorn on a free loopback port; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio does so only for sockets that it makes; without it, answers of two writes take 40 ms longer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=75,  # longer than clients keep connections: none asks on one that is just being closed
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):  # noqa: ASYNC110 - the server offers a flag, and no event
            await asyncio.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


class Scenes:
    """The calls of the demo, and what is wrong with what came back."""

    def __init__(self, url: str, requests: Requests, provider: FakeProvider) -> None:
        self.url = url
        self.requests = requests
        self.provider = provider
        self.http = httpx2.AsyncClient(trust_env=False)
        self.problems: list[str] = []
        self.answered_by = ""

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.problems.append(what)
            print(f"   NOT AS IT SHOULD BE: {what}")

    def client(self, name: str) -> AsyncOpenAI:
        return AsyncOpenAI(api_key=f"demo-key-for-{name}", base_url=f"{self.url}/v1", http_client=self.http)

    async def ask(self, name: str, text: str, *, model: str = "gpt-4o-mini", session: str | None = None) -> int:
        """One call with the SDK's own retries; shows and gives the status."""
        before = self.requests.count
        headers = {} if session is None else {"x-session-id": session}
        try:
            answer = await self.client(name).chat.completions.create(
                model=model,
                max_completion_tokens=450,
                messages=[{"role": "user", "content": text}],
                extra_headers=headers,
            )
        except APIStatusError as error:
            sent = self.requests.count - before
            print(f"   {name}: {type(error).__name__}, after {sent} HTTP request{'s' * (sent != 1)}:")
            print(textwrap.fill(error.message, 100, initial_indent="      ", subsequent_indent="      "))
            self.check(sent == 1, f"the SDK sent {sent} HTTP requests for one refused call")
            return error.status_code
        usage = answer.usage
        tokens = "?" if usage is None else f"{usage.prompt_tokens} + {usage.completion_tokens}"
        words = shortened(answer.choices[0].message.content or "")
        print(f"   {name}: 200, {tokens} tokens of {answer.model}: {words}")
        self.answered_by = answer.model
        return 200

    async def message(self, name: str, text: str, *, model: str) -> None:
        """The same with the SDK of Anthropic, whoever serves the model."""
        client = AsyncAnthropic(api_key=f"demo-key-for-{name}", base_url=self.url, http_client=self.http)
        answer = await client.messages.create(model=model, max_tokens=450, messages=[{"role": "user", "content": text}])
        words = "".join(block.text for block in answer.content if block.type == "text")
        print(
            f"   {name}, by Anthropic's SDK: {answer.usage.output_tokens} tokens of {answer.model}: {shortened(words)}"
        )
        self.check(bool(words), "the message is empty")

    async def stream(self, name: str, text: str) -> None:
        chunks = [
            chunk
            async for chunk in await self.client(name).chat.completions.create(
                model="gpt-4o-mini",
                max_completion_tokens=450,
                messages=[{"role": "user", "content": text}],
                stream=True,
            )
        ]
        words = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        print(f"   {name}: {len(chunks)} chunks: {shortened(words)}")
        self.check(bool(words), "the stream is empty")
        self.check(all(chunk.usage is None for chunk in chunks), "the caller sees usage that it did not ask for")

    async def play(self) -> None:
        print("1. A call, a streamed one, and one by the SDK of Anthropic")
        self.check(await self.ask("alice", "What is a llama?") == 200, "the first call is not admitted")
        await self.stream("alice", "And an alpaca?")
        await self.message("alice", "And a vicuña?", model="openai/gpt-4o-mini")

        print("\n2. An agent that does not stop: its sessions may make 3 calls")
        statuses = [await self.ask("crawler", "next page", session="crawl-17") for _ in range(4)]
        self.check(statuses == [200, 200, 200, 429], f"expected three calls and a 429, got {statuses}")

        print("\n3. A model that the department may not call")
        self.check(await self.ask("bob", "Sell this.", model="gpt-4o") == 403, "expected a 403")
        self.check(await self.ask("bob", "Sell this.") == 200, "expected the cheaper model to be allowed")

        print("\n4. A budget of one cent a day, spent")
        self.provider.script(*[Behaviour.answer(output_tokens=450)] * 2)
        statuses = [await self.ask("trial", "Write a long report.", model="gpt-4o") for _ in range(3)]
        self.check(statuses == [200, 200, 402], f"expected two calls and a 402, got {statuses}")

        print("\n5. The provider fails: the caller sees its error, and no money is charged")
        self.provider.script(Behaviour.error(400))
        self.check(await self.ask("alice", "What is a llama?") == 400, "expected the provider's own 400")

        print("\n6. OpenAI is overloaded: after a second try Anthropic answers, as guard.toml says")
        self.provider.script(*[Behaviour.error(503)] * 2)
        self.check(await self.ask("alice", "What is a llama?", model="quick") == 200, "expected an answer")
        self.check(self.answered_by.startswith("claude"), f"expected Claude to answer, got {self.answered_by}")

    async def go_on(self) -> None:
        """Calls without an end: conversations, and one that is stopped again and again."""
        for number in itertools.count():
            name, session = ("crawler", "crawl-18") if number % 5 == 0 else ("alice", f"talk-{number // 20}")
            with contextlib.suppress(APIStatusError):
                await self.client(name).chat.completions.create(
                    model="gpt-4o-mini",
                    max_completion_tokens=450,
                    messages=[{"role": "user", "content": f"Question {number}"}],
                    extra_headers={"x-session-id": session},
                )
            await asyncio.sleep(PAUSE_S)


async def books(guard: Any, scenes: Scenes) -> None:
    """The ledger beside the provider's bill."""
    records = await guard.storage.records()
    print("\nThe ledger")
    print(
        f"   {'time':<9}{'caller':<9}{'department':<11}{'session':<10}{'model':<13}{'tokens':>7}{'cost':>14}  outcome"
    )
    for record in records:
        at = datetime.fromtimestamp(record.at_ms / 1000, UTC)
        row = f"{at:%H:%M:%S} {record.caller or '-':<9}{', '.join(record.departments) or '-':<11}"
        row += f"{record.session or '-':<10}{record.model or '-':<13}{record.tokens or 0:>7}"
        print(f"   {row}{dollars(record.cost_nanousd or 0):>14}  {record.outcome}")
    billed, charged = scenes.provider.total_nanousd, sum(record.cost_nanousd or 0 for record in records)
    equal = "=" if billed == charged else "≠"
    print(f"\nprovider's bill {equal} ledger, to the nano-dollar: {dollars(billed)} {equal} {dollars(charged)}")
    scenes.check(billed == charged > 0, "the ledger is not the provider's bill")
    held = await guard.storage.open_holds()
    print(f"calls that still hold money: {held}")
    scenes.check(held == 0, "something is still held")


async def main(*, stay: bool = False) -> int:
    provider = FakeProvider(prices=PRICES)
    async with asyncio.timeout(LONGEST_S) as until:
        with tempfile.TemporaryDirectory() as folder:
            async with provider.serve() as provider_url:
                os.environ.update(
                    LLM_GUARD_STORAGE=f"sqlite:///{Path(folder) / 'guard.db'}",
                    LLM_GUARD_IDENTITY__SECRET=SECRET,
                    LLM_GUARD_ADMIN__SECRET=SECRET,
                    PROVIDER_URL=provider_url,
                    OPENAI_API_KEY="not needed here",
                    ANTHROPIC_API_KEY="nor here",
                )
                app = from_environment()
                requests = Requests(app)
                async with serve(requests) as url:
                    print(f"examples/starlette_app on {url}, its provider on {provider_url.removesuffix('/v1')}\n")
                    scenes = Scenes(url, requests, provider)
                    async with scenes.http:
                        await scenes.play()
                    await books(app.state.guard, scenes)
                    if stay:
                        until.reschedule(None)
                        print(f"\nIts pages: {url}/admin/ with the token {ADMIN_TOKEN}")
                        print(f"           curl -H 'Authorization: Bearer demo-key-for-alice' {url}/usage/")
                        print("Calls go on until Ctrl+C.", flush=True)
                        async with httpx2.AsyncClient(trust_env=False) as scenes.http:
                            await scenes.go_on()
    print("\nEverything is as it should be." if not scenes.problems else json.dumps(scenes.problems, indent=2))
    return 1 if scenes.problems else 0


def dollars(nanousd: int) -> str:
    return f"${from_nano(nanousd):.9f}"


def shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(stay="--stay" in sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit(130)
