"""The Starlette example as its files describe it, in front of a fake that is all its providers."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from examples.demo import PRICES
from examples.starlette_app.app import from_environment

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.testing import Behaviour, FakeProvider, asgi_client

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
README = Path(__file__).parents[2] / "examples" / "starlette_app" / "README.md"
SECRET = "demo-secret-of-the-starlette-app"


@pytest.fixture
async def provider() -> FakeProvider:
    return FakeProvider(prices=PRICES)


@pytest.fixture
async def client(
    provider: FakeProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the app that the environment describes."""
    async with provider.serve() as provider_url:
        monkeypatch.setenv("LLM_GUARD_STORAGE", f"sqlite:///{tmp_path / 'guard.db'}")
        monkeypatch.setenv("LLM_GUARD_IDENTITY__SECRET", SECRET)
        monkeypatch.setenv("PROVIDER_URL", provider_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-of-anthropic")
        app = from_environment()
        async with app.router.lifespan_context(app), asgi_client(app) as client:
            yield client


async def ask(
    client: httpx2.AsyncClient, name: str | None, *, model: str = "gpt-4o-mini", session: str | None = None
) -> httpx2.Response:
    headers = {} if name is None else {"authorization": f"Bearer demo-key-for-{name}"}
    if session is not None:
        headers["x-session-id"] = session
    body = {"model": model, "max_completion_tokens": 450, "messages": [{"role": "user", "content": "hello"}]}
    return await client.post(PATH, headers=headers, json=body)


async def test_deployments_of_the_readme(client: httpx2.AsyncClient, provider: FakeProvider) -> None:
    """Each model is answered by the deployment that the table says, with the key of its provider and not the caller's."""
    answers = [await ask(client, "alice", model=model) for model in ("quick", "gpt-4o", "claude-haiku-4-5")]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"Echo: hello"}
    named = [answer.headers["x-guard-deployment"] for answer in answers]
    assert named == re.findall(r"^\| `(\w+)` \| `(?:gpt|claude)", README.read_text("utf-8"), re.MULTILINE)
    openai, _, anthropic = provider.requests
    assert openai.headers["authorization"] == "Bearer sk-of-openai"
    assert anthropic.headers["x-api-key"] == "sk-of-anthropic"
    assert not [request for request in provider.requests if "demo-key" in str(request.headers)]


async def test_another_provider_answers(client: httpx2.AsyncClient, provider: FakeProvider) -> None:
    """When OpenAI fails twice, `haiku` answers, for a department that may ask it; the others are told."""
    provider.when(lambda request: request.model == "gpt-4o-mini", Behaviour.error(503))
    answer = await ask(client, "alice")
    refused = await ask(client, "bob")

    assert (answer.status_code, answer.headers["x-guard-deployment"]) == (200, "haiku")
    assert answer.headers["x-guard-attempts"] == "3"
    assert refused.status_code >= 400
    assert "haiku" not in [request.model for request in provider.requests[3:]]


async def test_nobody_is_anonymous(client: httpx2.AsyncClient, provider: FakeProvider) -> None:
    """Without a key nothing is spent, and nothing shown; probes need none."""
    response = await ask(client, None)

    assert response.status_code == 403
    assert "Send an API key" in response.json()["error"]["message"]
    assert (await client.get("/v1/models")).status_code == 403
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json()["deployments"] == 3
    assert provider.calls == 0


async def test_keys_of_the_readme(client: httpx2.AsyncClient, provider: FakeProvider) -> None:
    """Each key of the README's table is stopped by what the table says."""
    provider.script(*[Behaviour.answer(output_tokens=450)] * 2)
    trial = [(await ask(client, "trial", model="gpt-4o")).status_code for _ in range(3)]
    crawler = [(await ask(client, "crawler", session="s")).status_code for _ in range(4)]
    alice = [(await ask(client, "alice", session="s")).status_code for _ in range(26)]
    bob = [(await ask(client, "bob", model=model)).status_code for model in ("gpt-4o-mini", "gpt-4o")]

    assert trial == [200, 200, 402]
    assert crawler == [200, 200, 200, 429]
    assert alice == [*[200] * 25, 429]
    assert bob == [200, 403]


def test_readme_names_the_keys() -> None:
    """The keys and the secret that these tests use are those of the README."""
    page = README.read_text("utf-8")

    assert [name for name in ("alice", "bob", "crawler", "trial") if f"`demo-key-for-{name}`" not in page] == []
    assert f"LLM_GUARD_IDENTITY__SECRET={SECRET}" in page


def test_start_needs_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the secret of the keys the service does not start, and the message says what is missing."""
    monkeypatch.delenv("LLM_GUARD_IDENTITY__SECRET", raising=False)
    with pytest.raises(ConfigurationError, match="secret"):
        from_environment()


def test_start_needs_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any provider's key it does not start either."""
    monkeypatch.setenv("LLM_GUARD_STORAGE", "memory://")
    monkeypatch.setenv("LLM_GUARD_IDENTITY__SECRET", SECRET)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="deployments: none is left"):
        from_environment()
