"""One entry for all LLM calls of an application: deployments, routing under budgets, fallbacks."""

from asgi_llm_guard.gateway.deployment import Deployment, Timeouts
from asgi_llm_guard.gateway.errors import (
    CannotExpress,
    ContextOverflow,
    Failure,
    FieldNotAllowed,
    GatewayError,
    NoDeployment,
    NotInitialised,
    ProviderFailed,
    RequestRejected,
    UnknownModel,
)
from asgi_llm_guard.gateway.gateway import Gateway, Reply, Result
from asgi_llm_guard.gateway.health import CooldownRules
from asgi_llm_guard.gateway.policy import Fallbacks, RetryRules
from asgi_llm_guard.gateway.providers.base import ModelRequest, Provider, TransportFailed, Upstream
from asgi_llm_guard.gateway.router import Router, TierDown
from asgi_llm_guard.gateway.secret import Secret
from asgi_llm_guard.gateway.strategies import Strategy
from asgi_llm_guard.gateway.translate import Chunk, Completion, Timings, ToolCall

__all__ = [
    "CannotExpress",
    "Chunk",
    "Completion",
    "ContextOverflow",
    "CooldownRules",
    "Deployment",
    "Failure",
    "Fallbacks",
    "FieldNotAllowed",
    "Gateway",
    "GatewayError",
    "ModelRequest",
    "NoDeployment",
    "NotInitialised",
    "Provider",
    "ProviderFailed",
    "Reply",
    "RequestRejected",
    "Result",
    "RetryRules",
    "Router",
    "Secret",
    "Strategy",
    "TierDown",
    "Timeouts",
    "Timings",
    "ToolCall",
    "TransportFailed",
    "UnknownModel",
    "Upstream",
]
