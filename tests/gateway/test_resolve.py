"""Who serves a model: by `provider/model`, alias, group, name, or alone."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.errors import NotInitialised, UnknownModel
from asgi_llm_guard.gateway.resolve import Directory


def at(provider: str, model: str, **fields: Any) -> Deployment:
    address = "https://x.openai.azure.com" if provider == "azure" else None
    return Deployment(provider=provider, model=model, api_key="any-key", api_base=address, **fields)


OPENAI = at("openai", "gpt-5")
SECOND = at("openai", "gpt-5", name="second", groups=("auto", "Paid"))
CLAUDE = at("anthropic", "claude-opus-4-5")
SHARED_HERE = at("groq", "llama-3.3-70b", groups=())
SHARED_THERE = at("together_ai", "Llama-3.3-70B", groups=())
ROUTED = at("openrouter", "openai/gpt-5-mini", groups=())
DIRECTORY = Directory(
    [OPENAI, SECOND, CLAUDE, SHARED_HERE, SHARED_THERE, ROUTED],
    aliases={"Smart": "claude-opus-4-5", "best": "smart", "any": "auto"},
)


def found(name: str, directory: Directory = DIRECTORY) -> tuple[Deployment, ...]:
    return directory.resolve(name).deployments


@pytest.mark.parametrize(
    ("name", "deployments"),
    [
        ("openai/gpt-5", (OPENAI, SECOND)),
        ("OpenAI/GPT-5", (OPENAI, SECOND)),
        ("openai:gpt-5", (OPENAI, SECOND)),
        (" openai/gpt-5 ", (OPENAI, SECOND)),
        ("gpt-5", (OPENAI, SECOND)),
        ("GPT-5", (OPENAI, SECOND)),
        ("second", (SECOND,)),
        ("auto", (OPENAI, SECOND, CLAUDE)),
        ("AUTO", (OPENAI, SECOND, CLAUDE)),
        ("paid", (SECOND,)),
        ("smart", (CLAUDE,)),
        ("BEST", (CLAUDE,)),
        ("any", (OPENAI, SECOND, CLAUDE)),
        ("groq/llama-3.3-70b", (SHARED_HERE,)),
        ("together/llama-3.3-70b", (SHARED_THERE,)),
        ("TOGETHER_AI/llama-3.3-70b", (SHARED_THERE,)),
        ("openrouter/openai/gpt-5-mini", (ROUTED,)),
        ("openai/gpt-5-mini", (ROUTED,)),
    ],
)
def test_names(name: str, deployments: tuple[Deployment, ...]) -> None:
    """C1: a provider's prefix, an alias, a group and a bare name find those who serve it, in any spelling."""
    assert found(name) == deployments


def test_bare_names_of_several_providers() -> None:
    """C1: a bare name that two providers serve is an error that says what to write."""
    with pytest.raises(UnknownModel) as raised:
        found("llama-3.3-70b")

    assert "groq/llama-3.3-70b or together_ai/llama-3.3-70b" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["gpt-4", "anthropic/gpt-5", "azure/gpt-5", "openai/", "/", "*", "openai/*", "second/"]
)
def test_unknown_names(name: str) -> None:
    """C1: what nobody serves is a 404 that names it, and what there is."""
    with pytest.raises(UnknownModel) as raised:
        found(name)

    assert (raised.value.status, raised.value.code) == (404, "model_not_found")
    assert repr(name) in str(raised.value)
    assert "openai/gpt-5" in str(raised.value)


@pytest.mark.parametrize("name", ["", "  ", "x" * 257])
def test_names_that_are_none(name: str) -> None:
    """A name is a text of bounded length, and a long one is not repeated."""
    with pytest.raises(UnknownModel, match="expected a name of 1 to 256"):
        found(name)


def test_deployments_of_every_model() -> None:
    """C1: a provider that is registered without models serves each of them; what is served is what was asked for."""
    anything = at("anthropic", "*", name="claude", rpm=5)
    directory = Directory([OPENAI, anything])

    (resolved,) = found("anthropic/claude-new", directory)
    (bare,) = found("claude-new", directory)

    assert (resolved.model, resolved.name, resolved.rpm) == ("claude-new", "claude", 5)
    assert bare == resolved
    assert found("auto", directory) == (OPENAI,)
    with pytest.raises(UnknownModel):
        found("unheard-of", directory)
    with pytest.raises(UnknownModel):
        found("claude", directory)


def test_one_provider_serves_bare_names() -> None:
    """C1: where one provider alone is registered, a bare name that says nothing of a provider is its own."""
    (served,) = found("my-finetune", Directory([at("openai", "*")]))

    assert (served.provider, served.model) == ("openai", "my-finetune")
    with pytest.raises(UnknownModel):
        found("claude-opus-4-5", Directory([at("openai", "*")]))


def test_names_are_listed() -> None:
    """What may be asked for can be asked for."""
    assert DIRECTORY.names == (
        "smart", "best", "any", "auto", "paid", "openai/gpt-5", "anthropic/claude-opus-4-5", "groq/llama-3.3-70b",
        "together_ai/llama-3.3-70b", "openrouter/openai/gpt-5-mini",
    )  # fmt: skip
    assert all(found(name) for name in DIRECTORY.names)


@pytest.mark.parametrize(
    ("aliases", "what"),
    [
        ({"a": "nothing"}, "is not known here"),
        ({"a": "b", "b": "a"}, "leads in a circle"),
        ({"a": "A"}, "leads in a circle"),
        ({"a": ""}, "expected names of models"),
        ({f"a{i}": f"a{i + 1}" for i in range(12)} | {"a12": "gpt-5"}, "through more than 8"),
    ],
)
def test_wrong_aliases(aliases: dict[str, str], what: str) -> None:
    """An alias that leads nowhere is told when the gateway is made."""
    with pytest.raises(ConfigurationError, match=what):
        Directory([OPENAI], aliases=aliases)


def test_before_initialisation() -> None:
    """D6: without deployments the count is 0, and use is `NotInitialised`, a 503."""
    directory = Directory()

    assert (len(directory), directory.deployments, directory.names) == (0, (), ())
    with pytest.raises(NotInitialised) as raised:
        directory.resolve("gpt-5")
    assert raised.value.status == 503


def test_initialisation_is_idempotent() -> None:
    """D6: a second initialisation changes nothing, and says how many there are."""
    directory = Directory()

    assert directory.initialise([OPENAI, CLAUDE]) == 2
    assert directory.initialise([SECOND]) == 2
    assert directory.deployments == (OPENAI, CLAUDE)


def test_initialisation_that_failed_can_be_repeated() -> None:
    """D6: entries of which none is left are an error, and leave the directory as it was."""
    directory = Directory()
    with pytest.raises(ConfigurationError, match="none is left"):
        directory.initialise([{"provider": "OPENAI", "model_name": "gpt-5"}], environ={})

    assert len(directory) == 0
    assert directory.initialise([OPENAI]) == 1


def test_deployments_come_and_go() -> None:
    """Conformance 27: one that is added is found at once, one that is removed is not any more."""
    directory = Directory([OPENAI])
    with pytest.raises(UnknownModel):
        found("claude-opus-4-5", directory)

    directory.add(CLAUDE)
    assert found("claude-opus-4-5", directory) == (CLAUDE,)
    assert directory.get("anthropic/claude-opus-4-5") is CLAUDE
    assert directory.remove("anthropic/claude-opus-4-5") is CLAUDE
    with pytest.raises(UnknownModel):
        found("claude-opus-4-5", directory)

    with pytest.raises(ConfigurationError, match="there is no deployment called"):
        directory.remove("nobody")
    with pytest.raises(ConfigurationError, match="there is a deployment called"):
        directory.add(OPENAI)


def test_floods_of_names_are_not_kept() -> None:
    """Names that clients make up fill no memory."""
    directory = Directory([at("openai", "*")])
    for number in range(2000):
        directory.resolve(f"openai/m{number}")

    assert len(directory._memo) <= 1024
