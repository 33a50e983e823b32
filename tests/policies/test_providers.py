from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.policies.providers import (
    KNOWN_PROVIDERS,
    canonical_model,
    canonical_provider,
    provider_of,
    qualified,
)

NAMES: list[tuple[str, str | None, str]] = [
    ("openai/gpt-5", "openai", "gpt-5"),
    ("OpenAI/gpt-5", "openai", "gpt-5"),
    ("openai:gpt-5", "openai", "gpt-5"),
    ("azure_openai/my-deployment", "azure", "my-deployment"),
    ("openrouter/anthropic/claude-sonnet-4-5", "openrouter", "anthropic/claude-sonnet-4-5"),
    ("google-gla:gemini-3-pro", "gemini", "gemini-3-pro"),
    ("gpt-5.6-mini", "openai", "gpt-5.6-mini"),
    ("o3", "openai", "o3"),
    ("o4-mini", "openai", "o4-mini"),
    ("ft:gpt-4o:acme::id", "openai", "ft:gpt-4o:acme::id"),
    ("claude-opus-4-5", "anthropic", "claude-opus-4-5"),
    ("models/gemini-3-pro", "gemini", "models/gemini-3-pro"),
    ("mistral-large-latest", "mistral", "mistral-large-latest"),
    ("codestral-2508", "mistral", "codestral-2508"),
    ("command-a-03-2025", "cohere", "command-a-03-2025"),
    ("grok-4", "xai", "grok-4"),
    ("deepseek-chat", "deepseek", "deepseek-chat"),
    ("sonar", "perplexity", "sonar"),
    ("us.anthropic.claude-sonnet-4-5-v1:0", "bedrock", "us.anthropic.claude-sonnet-4-5-v1:0"),
    ("amazon.nova-pro-v1:0", "bedrock", "amazon.nova-pro-v1:0"),
    ("meta-llama/Llama-3-70b", None, "meta-llama/Llama-3-70b"),
    ("llama3:8b", None, "llama3:8b"),
    ("o3abc", None, "o3abc"),
    ("openai/", None, "openai/"),
    ("/gpt-5", None, "/gpt-5"),
    ("bedrockz/claude", None, "bedrockz/claude"),
    ("", None, ""),
]

HOSTS: list[tuple[str, str | None]] = [
    ("api.openai.com", "openai"),
    ("https://api.openai.com:443/v1", "openai"),
    ("eu.api.openai.com.", "openai"),
    ("acme.openai.azure.com", "azure"),
    ("acme.services.ai.azure.com", "azure_ai"),
    ("bedrock-runtime.eu-central-1.amazonaws.com", "bedrock"),
    ("europe-west4-aiplatform.googleapis.com", "vertex_ai"),
    ("generativelanguage.googleapis.com", "gemini"),
    ("api.z.ai", "zai"),
    ("openai.com.evil.example", None),
    ("notopenai.com", None),
    ("s3.amazonaws.com", None),
    ("localhost:4000", None),
    ("", None),
]


@pytest.mark.parametrize("model, provider, bare", NAMES)
def test_provider_by_name(model: str, provider: str | None, bare: str) -> None:
    """B8: a provider's prefix, or a name that only one provider uses, tells the provider."""
    assert provider_of(model) == (provider, bare)


@pytest.mark.parametrize("host, provider", HOSTS)
def test_provider_by_host(host: str, provider: str | None) -> None:
    """B8: the host that is called tells the provider; one that only looks like it does not."""
    assert provider_of("my-model", host=host) == (provider, "my-model")


def test_host_wins_over_name() -> None:
    """B8: who is called sends the bill, whatever the model is called there."""
    assert provider_of("openai/gpt-5", host="openrouter.ai") == ("openrouter", "openai/gpt-5")
    assert provider_of("openrouter/openai/gpt-5", host="openrouter.ai") == ("openrouter", "openai/gpt-5")
    assert provider_of("openai/gpt-5", host="proxy.internal") == ("openai", "gpt-5")


def test_own_providers() -> None:
    """B8: providers of one's own are told by their prefix once they are known."""
    assert provider_of("acme/llama") == (None, "acme/llama")
    assert provider_of("ACME/llama", known={"acme"}) == ("acme", "llama")
    assert provider_of("acme/", known={"acme"}) == (None, "acme/")


@given(st.one_of(st.text(), st.none(), st.integers(), st.binary()), st.one_of(st.text(), st.none(), st.integers()))
def test_never_raises(model: object, host: object) -> None:
    """Conformance 24: no model and no host makes it raise."""
    provider, bare = provider_of(model, host=host, known=["acme"])
    assert provider is None or provider
    assert isinstance(bare, str)


def test_long_names_are_not_remembered() -> None:
    """T9: names longer than any model's are worked out each time, with the same answer."""
    assert provider_of("openai/" + "x" * 1000) == ("openai", "x" * 1000)
    assert qualified("openai", "x" * 1000) == "openai/" + "x" * 1000


@pytest.mark.parametrize(
    "name, canonical",
    [
        ("AZURE_OPENAI", "azure"),
        (" OpenAI ", "openai"),
        ("together-ai", "together_ai"),
        ("Acme-Corp", "acme-corp"),
        ("", None),
        (3, None),
    ],
)
def test_canonical_providers(name: object, canonical: str | None) -> None:
    """One provider has one name, however it is written; unknown ones are kept in lower case."""
    assert canonical_provider(name) == canonical


@pytest.mark.parametrize("name", sorted(KNOWN_PROVIDERS))
def test_canonical_names_stay(name: str) -> None:
    """A canonical name is its own canonical name, and its prefix is understood."""
    assert canonical_provider(name) == name
    assert provider_of(f"{name}/m") == (name, "m")


@pytest.mark.parametrize(
    "provider, model, full",
    [
        ("openai", "gpt-5", "openai/gpt-5"),
        ("OPENAI", "openai/GPT-5", "openai/gpt-5"),
        (None, "GPT-5", "openai/gpt-5"),
        (None, "llama", "llama"),
        ("azure", "gpt-5", "azure/gpt-5"),
        ("openrouter", "openai/gpt-5", "openrouter/openai/gpt-5"),
        ("acme", "acme/llama", "acme/llama"),
        ("gemini", "models/gemini-3-pro", "gemini/gemini-3-pro"),
        ("bedrock", "anthropic.claude-v2:1", "bedrock/anthropic.claude-v2:1"),
    ],
)
def test_qualified_names(provider: str | None, model: str, full: str) -> None:
    """A model has one full name, however it and its provider are written."""
    assert qualified(provider, model) == full


def test_canonical_model() -> None:
    """A name that carries its provider becomes the full name."""
    assert canonical_model("OpenAI/GPT-5") == canonical_model("gpt-5") == "openai/gpt-5"
