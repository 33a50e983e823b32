"""Fields that say where a request goes, or with whose key. Only a deployment says that. Pure.

Rule 1: URLs and credentials are made of a deployment's fields, and of nothing that a client sent.
Rule 2: a body that has such a field is refused, so that nobody believes it was heeded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from asgi_llm_guard.gateway.errors import FieldNotAllowed

__all__ = ["is_connection_field", "refuse_connection_fields"]


def _folded(name: str) -> str:
    """`api_base`, `API-Base` and `apiBase` are one name."""
    return name.strip().lower().replace("_", "").replace("-", "")


_NAMES: Final = frozenset(
    _folded(name)
    for name in (
        "api_base", "api_url", "api_host", "api_key", "api_keys", "api_version", "api_type", "apikey",
        "base_url", "base_urls", "base_model", "endpoint", "endpoint_url", "host_url", "proxy", "proxies",
        "http_client", "client_id", "client_secret", "custom_llm_provider", "custom_provider", "credentials",
        "credential_name", "model_list", "user_config", "deployment_id", "model_group", "router_settings",
        "organization_id", "tenant_id", "project_id", "region_name", "azure_ad_token",
        "azure_ad_token_provider", "azure_endpoint", "azure_username", "azure_password", "azure_scope",
        "headers", "default_headers", "default_query", "authorization", "bearer_token", "access_token",
        "auth_token", "ssl_verify", "ssl_certificate", "callbacks", "success_callback", "failure_callback",
        "service_callback", "mock_response",
    )
)  # fmt: skip
_BEGINNINGS: Final = tuple(
    _folded(name)
    for name in (
        "litellm_", "aws_", "vertex_", "watsonx_", "langfuse_", "langsmith_", "gcs_", "s3_", "arize_", "oci_",
        "sagemaker_",
    )
)  # fmt: skip
_SPREAD: Final = frozenset(map(_folded, ("extra_body", "extra_headers", "extra_query")))
"""What SDKs and LiteLLM lay over the request: under them any field may stand, `model` among them."""
_TEXTS: Final = frozenset(
    {
        "messages", "system", "input", "instructions", "prompt", "contents", "tools", "functions",
        "tool_choice", "function_call", "response_format", "text", "prediction", "documents", "output_config",
        "output_format",
    }
)  # fmt: skip
"""What people wrote, and schemas: the names in them are the client's own, and nobody reads them as settings."""


def is_connection_field(name: str) -> bool:
    """Whether a field of this name says where a request goes, or with whose key; in any spelling."""
    folded = _folded(name)
    return folded in _NAMES or folded in _SPREAD or folded.startswith(_BEGINNINGS)


def refuse_connection_fields(body: Mapping[str, Any]) -> None:
    """Let a client's body pass that says nothing of the connection, at any depth.

    Messages, tools and schemas are not looked into.

    Raises:
        FieldNotAllowed: it has such a field; names the path to it.
    """
    waiting: list[tuple[str, object]] = []
    for name, value in body.items():
        if is_connection_field(name):
            raise FieldNotAllowed(name)
        if name not in _TEXTS:
            waiting.append((name, value))
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if isinstance(name, str) and is_connection_field(name):
                    raise FieldNotAllowed(f"{path}.{name}")
                waiting.append((f"{path}.{name}", inner))
        elif isinstance(value, (list, tuple)):
            waiting.extend((f"{path}[{index}]", inner) for index, inner in enumerate(value))
