"""What OpenTelemetry calls things: the attributes of the GenAI conventions, in the two versions that are in use.

The conventions are in development, and no released package has the newer names as constants.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

__all__ = [
    "ATTEMPT",
    "ATTEMPT_DURATION",
    "ATTEMPT_NUMBER",
    "CONNECTED",
    "DEPLOYMENT",
    "ERROR_TYPE",
    "FIRST_CHUNK",
    "OPERATION",
    "OTHER",
    "OUTCOME",
    "POLICY",
    "PROVIDER",
    "REMAINING",
    "REQUEST_MODEL",
    "RESPONSE_MODEL",
    "STATUS_CODE",
    "TIME_TO_FIRST_CHUNK",
    "TIME_TO_HEAD",
    "TOKENS",
    "TOKEN_TYPE",
    "Conventions",
    "operation_of",
]

OPERATION: Final = "gen_ai.operation.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - no secret
ERROR_TYPE: Final = "error.type"
STATUS_CODE: Final = "http.response.status_code"

# There are no conventions for what a guard does. These names are our own.
ATTEMPT: Final = "llm_guard.attempt"
ATTEMPT_DURATION: Final = "llm_guard.attempt.duration"
TIME_TO_HEAD: Final = "llm_guard.attempt.time_to_head"
TIME_TO_FIRST_CHUNK: Final = "llm_guard.attempt.time_to_first_chunk"
TOKENS: Final = "llm_guard.attempt.tokens"
ATTEMPT_NUMBER: Final = "llm_guard.attempt.number"
CONNECTED: Final = "llm_guard.connected"
FIRST_CHUNK: Final = "llm_guard.first_chunk"
DEPLOYMENT: Final = "llm_guard.deployment"
OUTCOME: Final = "llm_guard.outcome"
POLICY: Final = "llm_guard.policy"
PROVIDER: Final = "llm_guard.provider"
REMAINING: Final = "llm_guard.provider_budget.remaining"

OTHER: Final = "other"
"""Stands for every label that is not one of a known few."""

_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
_LATEST: Final = "gen_ai_latest_experimental"

_PROVIDERS: Final = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
}
_NEWER_PROVIDERS: Final = {**_PROVIDERS, "moonshot": "moonshot_ai", "xai": "x_ai"}

_OPERATIONS: Final = {
    "cohere_embed": "embeddings",
    "cohere_rerank": "rerank",
    "gemini": "generate_content",
    "gemini_interactions": "generate_content",
    "openai_audio": "audio",
    "openai_completions": "text_completion",
    "openai_embeddings": "embeddings",
    "openai_images": "image_generation",
}


class Conventions:
    """One version of the conventions.

    Args:
        latest: the newer names, as of version 1.37 of the conventions and later; else those of 1.36.
    """

    __slots__ = ("_providers", "latest", "provider_key")

    def __init__(self, *, latest: bool) -> None:
        self.latest = latest
        self.provider_key = "gen_ai.provider.name" if latest else "gen_ai.system"
        self._providers = _NEWER_PROVIDERS if latest else _PROVIDERS

    @classmethod
    def chosen(cls, environ: Mapping[str, str] | None = None) -> Conventions:
        """The version that `OTEL_SEMCONV_STABILITY_OPT_IN` asks for: the older one, unless its list has
        `gen_ai_latest_experimental`."""
        chosen = (os.environ if environ is None else environ).get(_OPT_IN, "")
        return cls(latest=_LATEST in [each.strip() for each in chosen.split(",")])

    def provider(self, provider: str) -> str:
        """What a provider is called; one that has no name there keeps ours."""
        return self._providers.get(provider, provider)


def operation_of(dialect: str | None) -> str:
    """What is asked for in a wire format; `chat` where that cannot be told."""
    return _OPERATIONS.get(dialect or "", "chat")
