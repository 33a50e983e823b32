"""Every provider that existing configurations name, and where its requests go."""

from __future__ import annotations

import httpx2
import pytest

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.platforms import PLATFORMS, platform_named
from asgi_llm_guard.gateway.providers.base import ModelRequest, read_whole
from asgi_llm_guard.gateway.providers.http import HttpProvider
from asgi_llm_guard.policies.providers import canonical_provider, provider_of
from asgi_llm_guard.wire import dialect_for

pytestmark = pytest.mark.anyio

EXISTING = [
    "OPENAI",
    "ANTHROPIC",
    "GROQ",
    "COHERE",
    "GOOGLE",
    "OLLAMA",
    "MISTRAL",
    "AZURE_OPENAI",
    "OPENROUTER",
    "COMETAPI",
    "XAI",
    "BEDROCK",
    "AWS_BEDROCK",
    "VERTEX_AI",
    "TOGETHER_AI",
    "FIREWORKS_AI",
    "REPLICATE",
    "PERPLEXITY",
    "ANYSCALE",
    "DEEPINFRA",
    "CEREBRAS",
    "SAMBANOVA",
    "AI21",
    "CLOUDFLARE",
    "DATABRICKS",
    "DEEPSEEK",
    "ALIBABA_QWEN",
    "MOONSHOT",
    "ZHIPU",
    "GITHUB_MODELS",
    "HUGGINGFACE",
    "CUSTOM",
]
MORE = ["vLLM", "hosted_vllm", "gemini", "azure", "together", "fireworks", "lm_studio", "nebius", "voyage"]

# Of requests for chat, but for the last.
ADDRESSES = {
    "OPENAI": "https://api.openai.com/v1/chat/completions",
    "ANTHROPIC": "https://api.anthropic.com/v1/messages",
    "GROQ": "https://api.groq.com/openai/v1/chat/completions",
    "COHERE": "https://api.cohere.ai/compatibility/v1/chat/completions",
    "GOOGLE": "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
    "OLLAMA": "http://localhost:11434/v1/chat/completions",
    "MISTRAL": "https://api.mistral.ai/v1/chat/completions",
    "OPENROUTER": "https://openrouter.ai/api/v1/chat/completions",
    "COMETAPI": "https://api.cometapi.com/v1/chat/completions",
    "XAI": "https://api.x.ai/v1/chat/completions",
    "AWS_BEDROCK": "https://bedrock-runtime.eu-central-1.amazonaws.com/openai/v1/chat/completions",
    "TOGETHER_AI": "https://api.together.xyz/v1/chat/completions",
    "FIREWORKS_AI": "https://api.fireworks.ai/inference/v1/chat/completions",
    "PERPLEXITY": "https://api.perplexity.ai/chat/completions",
    "ANYSCALE": "https://api.endpoints.anyscale.com/v1/chat/completions",
    "DEEPINFRA": "https://api.deepinfra.com/v1/openai/chat/completions",
    "CEREBRAS": "https://api.cerebras.ai/v1/chat/completions",
    "SAMBANOVA": "https://api.sambanova.ai/v1/chat/completions",
    "AI21": "https://api.ai21.com/studio/v1/chat/completions",
    "CLOUDFLARE": "https://api.cloudflare.com/client/v4/accounts/acc1/ai/v1/chat/completions",
    "DEEPSEEK": "https://api.deepseek.com/v1/chat/completions",
    "ALIBABA_QWEN": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1/chat/completions",
    "MOONSHOT": "https://api.moonshot.ai/v1/chat/completions",
    "ZHIPU": "https://open.bigmodel.cn/api/paas/v4/chat/completions",
    "zai": "https://api.z.ai/api/paas/v4/chat/completions",
    "GITHUB_MODELS": "https://models.github.ai/inference/chat/completions",
    "HUGGINGFACE": "https://router.huggingface.co/v1/chat/completions",
    "voyage": "https://api.voyageai.com/v1/embeddings",
}
OPTIONS = {"AWS_BEDROCK": {"aws_region_name": "eu-central-1"}, "CLOUDFLARE": {"account_id": "acc1"}}


def seen_by(requests: list[httpx2.Request]) -> HttpProvider:
    """A provider whose requests end here."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(200, json={})

    return HttpProvider(transport=lambda: httpx2.MockTransport(answer))


async def sent(deployment: Deployment, dialect: str | None = None) -> httpx2.Request:
    """The request that a deployment gets."""
    requests: list[httpx2.Request] = []
    dialect = dialect or deployment.platform.dialects[0]
    request = ModelRequest(dialect=dialect, body={"messages": []})
    await read_whole(await seen_by(requests).send(deployment, request))
    return requests[0]


@pytest.mark.parametrize("name", [*EXISTING, *MORE])
def test_names_of_existing_files_are_known(name: str) -> None:
    """D1: every provider that existing files name is known, in any case, under its canonical name."""
    for spelling in (name, name.lower(), name.title(), name.replace("_", "-")):
        assert platform_named(spelling).name == canonical_provider(name)


@pytest.mark.parametrize("name", EXISTING)
def test_each_can_be_deployed(name: str) -> None:
    """D1: with a key, and an address where the provider has none, each provider is a deployment."""
    address = "https://host.example/v1" if platform_named(name).base_url is None else None
    options = {"region": "eu-central-1", "account_id": "acc1"}

    made = Deployment(provider=name, model="m", api_key="any-key", api_base=address, options=options)

    assert (made.provider, made.model) == (canonical_provider(name), "m")
    assert made.via == ("litellm" if made.provider in {"vertex_ai", "replicate"} else "http")
    assert made.via == "litellm" or made.platform.dialects


@pytest.mark.parametrize("name", ADDRESSES)
async def test_addresses(name: str) -> None:
    """Each provider is called at its own address."""
    made = Deployment(provider=name, model="m", api_key="any-key", options=OPTIONS.get(name, {}), environ={})

    request = await sent(made)

    assert str(request.url) == ADDRESSES[name]


@pytest.mark.parametrize("name", [name for name, url in ADDRESSES.items() if "localhost" not in url])
async def test_hosts_are_those_of_budgets(name: str) -> None:
    """B8: the provider whose budget a deployment takes from is the one that its address stands for."""
    made = Deployment(provider=name, model="m", api_key="any-key", options=OPTIONS.get(name, {}), environ={})

    request = await sent(made)

    assert provider_of("m", host=request.url.host)[0] == made.provider


@pytest.mark.parametrize("name", sorted(PLATFORMS))
async def test_paths_are_those_of_the_dialects(name: str) -> None:
    """What is sent in a dialect goes to a path that the same dialect recognises, so hooks and meters agree."""
    address = "https://host.example/v1"
    made = Deployment(
        provider=name, model="m", api_key="any-key", api_base=address, options={"api_version": "2026-01-01"}, via="http"
    )

    for dialect in made.platform.dialects:
        request = await sent(made, dialect)
        found = dialect_for(request.url.path)
        assert found is not None
        assert found.name == dialect


@pytest.mark.parametrize(
    ("provider", "header", "value"),
    [
        ("openai", "authorization", "Bearer any-key"),
        ("gemini", "authorization", "Bearer any-key"),
        ("azure", "api-key", "any-key"),
        ("anthropic", "x-api-key", "any-key"),
        ("bedrock", "authorization", "Bearer any-key"),
    ],
)
async def test_keys_are_shown_in_one_header(provider: str, header: str, value: str) -> None:
    """The key is in the header that the provider reads, and in no other, nor in the URL."""
    made = Deployment(provider=provider, model="m", api_key="any-key", api_base="https://host.example")

    request = await sent(made)

    assert request.headers[header] == value
    assert [name for name, text in request.headers.items() if "any-key" in text] == [header]
    assert "any-key" not in str(request.url)


async def test_tokens_of_entra() -> None:
    """Azure takes a token in place of a key."""
    made = Deployment(
        provider="azure",
        model="m",
        api_base="https://x.openai.azure.com",
        options={"azure_ad_token": "any-token"},
        environ={},
    )

    request = await sent(made)

    assert request.headers["authorization"] == "Bearer any-token"
    assert "api-key" not in request.headers


async def test_only_needed_headers_are_sent() -> None:
    """Requests say nothing of the machine or the library that they come from."""
    request = await sent(Deployment(provider="openai", model="m", api_key="any-key"))

    assert sorted(request.headers) == sorted(
        ["accept-encoding", "authorization", "content-length", "content-type", "host", "user-agent"]
    )
    assert request.headers["user-agent"] == "asgi-llm-guard"


async def test_anthropic_is_told_the_version() -> None:
    """Anthropic's API refuses requests that do not say which version they are written for."""
    request = await sent(Deployment(provider="anthropic", model="m", api_key="any-key"))

    assert request.headers["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize("base", ["", "/", "/openai", "/openai/v1", "/openai/deployments/other"])
@pytest.mark.parametrize(
    ("dialect", "version", "path"),
    [
        ("openai", None, "/openai/v1/chat/completions"),
        ("openai", "2026-01-01", "/openai/deployments/my%20gpt%2F1/chat/completions?api-version=2026-01-01"),
        ("openai_embeddings", "2026-01-01", "/openai/deployments/my%20gpt%2F1/embeddings?api-version=2026-01-01"),
        ("openai_responses", "2026-01-01", "/openai/responses?api-version=2026-01-01"),
        ("openai_responses", None, "/openai/v1/responses"),
    ],
)
async def test_azure(base: str, dialect: str, version: str | None, path: str) -> None:
    """Azure has the deployment in the path where a version is said, and the model in the body where none is."""
    options = {} if version is None else {"api_version": version}
    made = Deployment(
        provider="AZURE_OPENAI", model="m", api_key="k", api_base=f"https://x.openai.azure.com{base}", options=options
    )
    requests: list[httpx2.Request] = []
    request = ModelRequest(dialect=dialect, body={}, model="my gpt/1")

    await read_whole(await seen_by(requests).send(made, request))

    assert requests[0].url.raw_path.decode() == path


@pytest.mark.parametrize(
    ("provider", "base", "url"),
    [
        ("ollama", "http://gpu:11434", "http://gpu:11434/v1/chat/completions"),
        ("openai", "https://eu.api.openai.com", "https://eu.api.openai.com/v1/chat/completions"),
        ("openai", "https://proxy.example/llm/v1/", "https://proxy.example/llm/v1/chat/completions"),
        ("openai", "https://proxy.example/v1/chat/completions", "https://proxy.example/v1/chat/completions"),
        ("anthropic", "https://proxy.example/v1", "https://proxy.example/v1/messages"),
        ("anthropic", "https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1/messages"),
        ("vllm", "http://gpu:8000/v1", "http://gpu:8000/v1/chat/completions"),
        ("custom", "http://gpu:8000", "http://gpu:8000/chat/completions"),
        ("replicate", "https://proxy.example/v1", "https://proxy.example/v1/chat/completions"),
    ],
)
async def test_addresses_of_ones_own(provider: str, base: str, url: str) -> None:
    """A host alone gets the provider's own path; a path that is given is kept."""
    made = Deployment(provider=provider, model="m", api_key="any-key", api_base=base, via="http")

    request = await sent(made)

    assert str(request.url) == url


async def test_organization_and_project_of_openai() -> None:
    """OpenAI is told which organization and project pays."""
    options = {"organization": "org-1", "project": "proj-1"}

    request = await sent(Deployment(provider="openai", model="m", api_key="k", options=options))

    assert (request.headers["openai-organization"], request.headers["openai-project"]) == ("org-1", "proj-1")


def test_unknown_providers_are_told_with_the_known_ones() -> None:
    """D1: a provider that nobody knows is an error that lists those there are."""
    with pytest.raises(ConfigurationError) as raised:
        platform_named("OPNEAI")

    message = str(raised.value)
    assert "'OPNEAI'" in message
    assert all(name in message for name in PLATFORMS)
