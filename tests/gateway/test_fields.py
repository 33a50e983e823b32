"""T14: what a client's body says of the connection is refused, and reaches neither URLs nor credentials."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.errors import FieldNotAllowed
from asgi_llm_guard.gateway.fields import refuse_connection_fields
from asgi_llm_guard.gateway.providers.base import ModelRequest, read_whole
from asgi_llm_guard.gateway.providers.http import HttpProvider

pytestmark = pytest.mark.anyio

NAMES = [
    "api_base", "base_url", "api_key", "api_version", "apiBase", "API-KEY", " api_key", "custom_llm_provider",
    "aws_access_key_id", "aws_bedrock_runtime_endpoint", "vertex_credentials", "azure_ad_token", "azure_endpoint",
    "litellm_params", "litellm_credential_name", "extra_body", "extra_headers", "extra_query", "headers", "model_list",
    "proxy", "ssl_verify", "success_callback", "langfuse_host", "organization_id", "user_config", "Authorization",
]  # fmt: skip
CHAT = {
    "model": "gpt-5",
    "messages": [{"role": "user", "content": "my api_key is lost"}],
    "temperature": 1,
    "metadata": {"team": "blue", "trace": ["a", {"b": 1}]},
    "stream_options": {"include_usage": True},
    "provider": {"order": ["a"]},
    "user": "u",
}


@pytest.mark.parametrize("name", NAMES)
def test_fields_of_the_connection_are_refused(name: str) -> None:
    """T14: each of them is refused at the top, nested in others and in lists; the error names it, and not its value."""
    value = "http://169.254.169.254/secret-value"
    for path, body in [
        (name, {**CHAT, name: value}),
        (f"metadata.{name}", {**CHAT, "metadata": {name: value}}),
        (f"provider.deep[1].{name}", {**CHAT, "provider": {"deep": [0, {name: value}]}}),
    ]:
        with pytest.raises(FieldNotAllowed) as raised:
            refuse_connection_fields(body)
        assert (raised.value.status, raised.value.param) == (400, path)
        assert path in str(raised.value)
        assert "secret-value" not in str(raised.value)


def test_what_people_write_is_not_looked_into() -> None:
    """Messages, tools and schemas may have every name; the other parameters of the API pass."""
    schema = {"type": "object", "properties": {"api_key": {"type": "string"}, "base_url": {"type": "string"}}}
    refuse_connection_fields(CHAT)
    refuse_connection_fields(
        {
            **CHAT,
            "messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"api_base": "x"}}]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        }
    )


def test_deep_bodies_are_read_without_recursion() -> None:
    """A body nested 100,000 deep is neither a crash nor a way past the rule."""
    deep: dict[str, Any] = {"api_base": "x"}
    for _ in range(100_000):
        deep = {"a": [deep]}

    with pytest.raises(FieldNotAllowed):
        refuse_connection_fields({"metadata": deep})


@pytest.mark.parametrize("provider", ["openai", "azure", "anthropic", "bedrock", "custom"])
async def test_urls_and_keys_are_the_deployments(provider: str) -> None:
    """T14: even if nobody refuses it before, nothing of a body or of forwarded headers changes URL or credentials."""
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(200, json={})

    carrier = HttpProvider(transport=lambda: httpx2.MockTransport(answer))
    made = Deployment(provider=provider, model="m", api_key="right-key", api_base="https://right.example/v1")
    hostile = {name.strip(): "https://wrong.example" for name in NAMES}
    headers = [(name.encode(), b"wrong") for name in ("Authorization", "api-key", "X-API-Key", "Host", "Cookie")]
    dialect = made.platform.dialects[0]

    await read_whole(await carrier.send(made, ModelRequest(dialect=dialect, body={"messages": []})))
    request = ModelRequest(dialect=dialect, body={"messages": [], "model": "other", **hostile}, headers=headers)
    await read_whole(await carrier.send(made, request))

    plain, attacked = requests
    assert attacked.url == plain.url
    drop = {"content-length"}
    assert {k: v for k, v in attacked.headers.items() if k not in drop} == {
        k: v for k, v in plain.headers.items() if k not in drop
    }
    assert b'"model":"m"' in attacked.content
