"""What OpenTelemetry calls things: the attributes of the GenAI conventions, in the two versions that are in use.

The conventions are in development, and no released package has the newer names as constants.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from asgi_llm_guard.usage import Usage

__all__ = [
    "ATTEMPT",
    "ATTEMPT_DURATION",
    "ATTEMPT_NUMBER",
    "CACHE_HIT",
    "CACHE_RESULT",
    "CALL",
    "CHOICES",
    "CODE",
    "CONNECTED",
    "COST",
    "DECISION",
    "DEPLOYMENT",
    "ERROR_TYPE",
    "FIRST_CHUNK",
    "INFERENCES",
    "INPUT_TOKENS",
    "KIND",
    "MAX_TOKENS",
    "MODALITY",
    "OPERATION",
    "OTHER",
    "OUTCOME",
    "OUTPUT_TOKENS",
    "POLICY",
    "PROVIDER",
    "PROVIDER_LIMIT",
    "REMAINING",
    "REQUEST_MODEL",
    "RESPONSE_MODEL",
    "SCOPE",
    "STATUS_CODE",
    "STREAM",
    "SUBJECT",
    "TIME_TO_FIRST",
    "TIME_TO_FIRST_CHUNK",
    "TIME_TO_HEAD",
    "TOKENS",
    "TOKEN_TYPE",
    "VERB",
    "WINDOW",
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
PROVIDER_LIMIT: Final = "llm_guard.provider_budget.limit"
REMAINING: Final = "llm_guard.provider_budget.remaining"
CALL: Final = "llm_guard.call"
CODE: Final = "llm_guard.code"
CACHE_HIT: Final = "llm_guard.cache.hit"
CACHE_RESULT: Final = "llm_guard.cache.result"
COST: Final = "llm_guard.cost"
DECISION: Final = "llm_guard.decision"
KIND: Final = "llm_guard.kind"
SCOPE: Final = "llm_guard.scope"
SUBJECT: Final = "llm_guard.subject"
VERB: Final = "llm_guard.storage.verb"
WINDOW: Final = "llm_guard.window"

# The conventions', of calls: what has a second name has it in the newer version.
MAX_TOKENS: Final = "gen_ai.request.max_tokens"
CHOICES: Final = "gen_ai.request.choice.count"
STREAM: Final = "gen_ai.request.stream"
TIME_TO_FIRST: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
MODALITY: Final = "gen_ai.token.modality"

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


_NEWER_USAGE: Final = (
    ("gen_ai.usage.cache_read.input_tokens", "cache_read_tokens"),
    ("gen_ai.usage.cache_write.input_tokens", "cache_write_tokens"),
    ("gen_ai.usage.reasoning.output_tokens", "reasoning_tokens"),
    ("gen_ai.usage.audio.input_tokens", "input_audio_tokens"),
    ("gen_ai.usage.audio.output_tokens", "output_audio_tokens"),
    ("gen_ai.usage.image.input_tokens", "input_image_tokens"),
    ("gen_ai.usage.image.output_tokens", "output_image_tokens"),
)

INFERENCES: Final = frozenset({"chat", "generate_content", "text_completion"})
"""The operations that the newer conventions call inference."""


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

    def usage(self, usage: Usage) -> dict[str, int]:
        """What is known of a usage, as attributes of a span."""
        found = {INPUT_TOKENS: usage.input_tokens, OUTPUT_TOKENS: usage.output_tokens}
        if self.latest:
            found.update((name, getattr(usage, field)) for name, field in _NEWER_USAGE)
        return {name: tokens for name, tokens in found.items() if tokens is not None}


def operation_of(dialect: str | None) -> str:
    """What is asked for in a wire format; `chat` where that cannot be told."""
    return _OPERATIONS.get(dialect or "", "chat")
