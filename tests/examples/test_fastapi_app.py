"""The FastAPI example; the real OpenAI SDK in its handlers talks to a fake provider."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from examples.demo import PRICES, serve
from examples.fastapi_app.app import STEPS, create_app, create_guard, from_environment
from fastapi import FastAPI
from openai import AsyncOpenAI

from asgi_llm_guard import Guard
from asgi_llm_guard.testing import Behaviour, FakeProvider, asgi_client

pytestmark = pytest.mark.anyio

README = Path(__file__).parents[2] / "examples" / "fastapi_app" / "README.md"
SECRET = "demo-secret-of-the-fastapi-app"


class Service(NamedTuple):
    app: FastAPI
    client: httpx2.AsyncClient
    guard: Guard
    provider: FakeProvider

    async def ask(self, path: str, name: str = "rita", session: str | None = None) -> httpx2.Response:
        headers = {"authorization": f"Bearer demo-key-for-{name}"}
        if session is not None:
            headers["x-session-id"] = session
        return await self.client.post(path, json={"text": "Do llamas hum?"}, headers=headers)

    async def check_books(self) -> None:
        """Nothing is held, and the ledger is the bill."""
        assert await self.guard.storage.open_holds() == 0
        records = await self.guard.storage.records()
        assert [record.cost_nanousd for record in records] == [line.cost_nanousd for line in self.provider.bill]
        assert {record.outcome for record in records} == {"measured"}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    provider = FakeProvider(prices=PRICES)
    guard = create_guard(secret=SECRET, storage=f"sqlite:///{tmp_path / 'guard.db'}")
    async with provider.serve() as provider_url:
        http = httpx2.AsyncClient(trust_env=False)
        app = create_app(guard, AsyncOpenAI(api_key="any", base_url=provider_url, http_client=http))
        async with app.router.lifespan_context(app), asgi_client(app) as client:
            yield Service(app, client, guard, provider)


async def test_answer(service: Service) -> None:
    """A handler's return value is metered, and charged to the departments of its caller's key."""
    response = await service.ask("/answers")

    assert response.json()["choices"][0]["message"]["content"] == "Echo: Do llamas hum?"
    await service.check_books()
    (record,) = await service.guard.storage.records()
    assert (record.caller, record.departments, record.route) == ("rita", ("research",), "/answers")


async def test_streamed_answer(service: Service) -> None:
    """A stream is passed on event by event, and metered exactly."""
    response = await service.ask("/answers/stream")

    events = response.text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert (response.status_code, text) == (200, "Echo: Do llamas hum?")
    await service.check_books()


async def test_agent_that_finds_its_answer(service: Service) -> None:
    """The loop calls the tools that the model asks for, and every step is a call of its own."""
    service.provider.script(
        Behaviour.call_tool("look_up", animal="llama"),
        Behaviour.call_tool("look_up", animal="unicorn"),
        Behaviour.answer("Yes, they do."),
    )
    response = await service.ask("/research", session="s")

    assert response.json() == {
        "answer": "Yes, they do.",
        "steps": 3,
        "notes": ["Llamas hum.", "Nothing is known about it."],
        "stopped": None,
    }
    assert service.provider.requests[-1].messages[-1]["content"] == "Nothing is known about it."
    await service.check_books()


async def test_agent_that_does_not_stop(service: Service) -> None:
    """A loop ends at its session's limit, and says so; the session's next request is refused as a whole."""
    service.provider.script(*[Behaviour.call_tool("look_up", animal="alpaca")] * 9)
    report = (await service.ask("/research", session="s")).json()
    again = await service.ask("/research", session="s")

    assert (report["answer"], report["steps"]) == (None, STEPS)
    assert report["notes"] == ["Alpacas spit less than llamas."] * STEPS
    assert report["stopped"].startswith(
        f"Stopped after {STEPS} steps without an answer. research: session 's' has used up its calls"
    )
    assert (again.status_code, again.json()["code"]) == (429, "session_iterations_exhausted")
    assert service.provider.calls == STEPS
    await service.check_books()


async def test_agent_needs_a_session(service: Service) -> None:
    """Without a session id the loop could not be counted: the refusal says where to put one."""
    response = await service.ask("/research")

    assert response.status_code == 400
    assert "header x-session-id" in response.json()["detail"]
    assert service.provider.calls == 0


@pytest.mark.parametrize("arguments", [{"plant": "tree"}, {}])
async def test_wrong_tool_arguments_are_the_models_to_correct(service: Service, arguments: dict[str, str]) -> None:
    """A tool that is called wrongly tells the model so."""
    service.provider.script(Behaviour.call_tool("look_up", **arguments), Behaviour.answer("I see."))

    assert (await service.ask("/research", session="s")).json()["notes"] == ["Give the name of an animal."]


async def test_quota_of_a_department(service: Service) -> None:
    """A department whose tokens are used up is refused, and another is not; its callers may look all the same."""
    service.provider.script(*[Behaviour.answer(input_tokens=4_975)] * 4)
    first = [await service.ask("/answers", "sam") for _ in range(4)]
    refused = [await service.ask(path, "sam") for path in ("/answers", "/answers/stream")]

    assert [response.status_code for response in first] == [200] * 4
    assert [response.status_code for response in refused] == [429, 429]
    assert refused[0].json()["code"] == "quota_exceeded"
    assert (await service.ask("/answers", "rita")).status_code == 200
    headers = {"authorization": "Bearer demo-key-for-sam", "accept": "text/html"}
    left = await service.client.get("/usage/", headers=headers)
    assert (left.status_code, "What is left" in left.text, "sam" in left.text) == (200, True, True)
    await service.check_books()


async def test_dependency_sees_the_verified_caller(service: Service) -> None:
    """`current_admission` gives handlers the caller that the key belongs to."""
    headers = {"authorization": "Bearer demo-key-for-sam"}

    assert (await service.client.get("/me", headers=headers)).json() == {"caller": "sam", "departments": ["support"]}


async def test_start_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service starts with the variables that its README names."""
    page = README.read_text("utf-8")
    assert f"KEYS_SECRET={SECRET}" in page
    monkeypatch.setenv("KEYS_SECRET", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("STORAGE", f"sqlite:///{tmp_path / 'guard.db'}")
    app = from_environment()
    async with app.router.lifespan_context(app), asgi_client(app) as client:
        assert (await client.get("/me")).json() == {"caller": None, "departments": []}


async def test_reader_that_leaves(service: Service) -> None:
    """When the reader of a stream leaves, the provider's connection is closed, and what was generated is charged."""
    service.provider.script(Behaviour.slow())
    service.provider.release(2)
    headers = {"authorization": "Bearer demo-key-for-rita"}
    async with serve(service.app) as url, httpx2.AsyncClient(trust_env=False, base_url=url) as client:
        body = {"text": "Do llamas hum?"}
        async with client.stream("POST", "/answers/stream", json=body, headers=headers) as response:
            lines = response.aiter_lines()
            seen = [await anext(lines) for _ in range(3)]
        await service.provider.until(lambda: service.provider.disconnects == 1)
        (record,) = await service.guard.storage.records()
        held = await service.guard.storage.open_holds()

    assert ("Echo: " in seen[0], "Do " in seen[2]) == (True, True)
    assert (record.outcome, held) == ("estimated", 0)
    assert 0 < service.provider.total_nanousd <= (record.cost_nanousd or 0) <= (record.estimate_nanousd or 0)
