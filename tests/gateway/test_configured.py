"""A gateway from the table `[gateway]` of a settings file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from asgi_llm_guard import Guard
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.gateway.configured import gateway_arguments
from asgi_llm_guard.settings import build_gateway_arguments, build_guard_arguments, load_settings

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"
ENTRY = {"provider": "openai", "model_name": "gpt-4o-mini", "api_key": "sk-canary"}


def write(folder: Path, text: str) -> Path:
    file = folder / "guard.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_page_builds_a_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1: what the page shows of `[gateway]` is what the gateway has then."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    page = DOCS.read_text("utf-8")
    (table,) = re.findall(r"^\[gateway\].*?(?=^\[\[routes\]\])", page, re.DOTALL | re.MULTILINE)
    settings = load_settings(write(tmp_path, table))
    gateway = Gateway(
        Guard(**build_guard_arguments(settings)), **{**build_gateway_arguments(settings), "tier_down": None}
    )

    (deployment,) = gateway.deployments
    assert (deployment.full_model, deployment.rpm) == ("openai/gpt-4o-mini", 500)
    assert "quick" in gateway.names
    router = gateway.router
    assert dict(router.fallbacks.models) == {"openai/gpt-4o-mini": ("anthropic/claude-haiku-4-5",)}
    assert (router.retry.retries, router.retry.pause_s) == (3, 5)
    assert build_gateway_arguments(settings)["tier_down"].at == 0.9
    assert build_gateway_arguments(settings)["cooldowns"].allowed_fails == 3
    assert "sk-canary" not in repr(settings)


def test_keys_in_the_file_are_not_shown(tmp_path: Path) -> None:
    """T15: a key that stands in the file is in no representation of the settings."""
    text = '[[gateway.deployments]]\nprovider = "openai"\nmodel_name = "gpt-4o"\napi_key = "sk-canary"\n'
    settings = load_settings(write(tmp_path, text))
    assert "sk-canary" not in f"{settings!r} {settings}"


def test_a_file_without_a_gateway(tmp_path: Path) -> None:
    """A file that says nothing of a gateway is named."""
    settings = load_settings(write(tmp_path, 'storage = "memory://"\n'))
    with pytest.raises(ConfigurationError, match=r"guard\.toml: gateway: is missing"):
        build_gateway_arguments(settings)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"deployment": []}, r"^deployment: unknown key; expected one of deployments, "),
        ({}, r"^deployments: expected a list of tables"),
        ({"deployments": {}}, r"^deployments: expected a list of tables"),
        ({"deployments": [ENTRY], "aliases": ["a"]}, r"^aliases: expected a table, got a list"),
        ({"deployments": [ENTRY], "strategy": "best"}, r"strategy"),
        ({"deployments": [ENTRY], "fallbacks": {"a": "b"}}, r"models"),
        ({"deployments": [ENTRY], "retry": {"tries": 1}}, r"^retry\.tries: unknown key; expected one of retries, "),
        ({"deployments": [ENTRY], "retry": {"retries": -1}}, r"^retry: retries: expected"),
        ({"deployments": [ENTRY], "cooldowns": 7}, r"^cooldowns: expected a table, got a int"),
        ({"deployments": [ENTRY], "tier_down": {"at": 0.5}}, r"^tier_down: Missing required argument 'to'"),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], message: str) -> None:
    """Each mistake is told with the key that it is in, and no key of a provider."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        gateway_arguments(table)
    assert "sk-canary" not in str(caught.value)


def test_other_names_for_the_list() -> None:
    """The list of deployments may be called what other files call it."""
    for name in ("deployments", "models", "model_list"):
        assert gateway_arguments({name: [ENTRY]}) == {"deployments": [ENTRY]}
