"""What a request to a provider is, by method, host and path."""

from __future__ import annotations

import pytest
from tests.wire.harness import every_fixture

from asgi_llm_guard.wire.registry import DIALECTS
from asgi_llm_guard.wire.surfaces import surface_of

GOOGLE = "generativelanguage.googleapis.com"
VERTEX = "europe-west4-aiplatform.googleapis.com"
BEDROCK = "bedrock-runtime.eu-west-1.amazonaws.com"
PROJECT = "/v1/projects/p/locations/l/publishers"

METERED: list[tuple[str, str, str]] = [
    ("api.openai.com", "/v1/chat/completions", "openai"),
    ("eu.api.openai.com", "/v1/chat/completions", "openai"),
    ("api.openai.com", "/v1/responses", "openai_responses"),
    ("api.openai.com", "/v1/responses/compact", "openai_responses"),
    ("api.openai.com", "/v1/embeddings", "openai_embeddings"),
    ("api.openai.com", "/v1/completions", "openai_completions"),
    ("api.openai.com", "/v1/images/edits", "openai_images"),
    ("api.openai.com", "/v1/audio/speech", "openai_audio"),
    ("ours.openai.azure.com", "/openai/deployments/d/chat/completions", "openai"),
    ("ours.openai.azure.com", "/openai/v1/responses", "openai_responses"),
    ("ours.services.ai.azure.com", "/openai/v1/chat/completions", "openai"),
    ("ours.cognitiveservices.azure.com", "/openai/deployments/d/embeddings", "openai_embeddings"),
    ("api.anthropic.com", "/v1/messages", "anthropic"),
    (VERTEX, f"{PROJECT}/anthropic/models/claude:streamRawPredict", "anthropic"),
    (GOOGLE, "/v1/models/gemini-3:generateContent", "gemini"),
    (GOOGLE, "/v1beta/models/gemini-3:streamGenerateContent", "gemini"),
    (VERTEX, f"{PROJECT}/google/models/gemini-3:generateContent", "gemini"),
    (GOOGLE, "/v1beta/interactions", "gemini_interactions"),
    (GOOGLE, "/v1beta/openai/chat/completions", "openai"),
    (BEDROCK, "/model/eu.anthropic.claude-v1%3A0/converse-stream", "bedrock"),
    (BEDROCK, "/model/eu.anthropic.claude-v1%3A0/invoke", "bedrock_invoke"),
    (BEDROCK, "/openai/v1/chat/completions", "openai"),
    ("bedrock-mantle.eu-west-1.api.aws", "/openai/v1/responses", "openai_responses"),
    ("bedrock-mantle.eu-west-1.api.aws", "/anthropic/v1/messages", "anthropic"),
    ("api.cohere.com", "/v2/chat", "cohere"),
    ("api.cohere.com", "/v2/embed", "cohere_embed"),
    ("api.cohere.com", "/v2/rerank", "cohere_rerank"),
    ("api.mistral.ai", "/v1/chat/completions", "mistral"),
    ("api.mistral.ai", "/v1/fim/completions", "mistral"),
    ("api.mistral.ai", "/v1/embeddings", "openai_embeddings"),
    ("openrouter.ai", "/api/v1/chat/completions", "openai"),
    ("localhost:11434", "/api/chat", "ollama"),
    ("localhost:11434", "/v1/messages", "anthropic"),
    ("vllm.internal:8000", "/v1/completions", "openai_completions"),
    ("api.groq.com", "/openai/v1/chat/completions", "openai"),
]
FREE: list[tuple[str, str]] = [
    ("api.openai.com", "/v1/responses/input_tokens"),
    ("api.openai.com", "/v1/responses/resp_1/cancel"),
    ("api.openai.com", "/v1/batches/b/cancel"),
    ("api.openai.com", "/v1/chat/completions/c1"),
    ("api.openai.com", "/v1/files"),
    ("api.openai.com", "/v1/uploads/u/parts"),
    ("api.openai.com", "/v1/moderations"),
    ("api.openai.com", "/v1/conversations"),
    ("api.openai.com", "/v1/threads/t/messages"),
    ("api.openai.com", "/v1/organization/projects"),
    ("api.anthropic.com", "/v1/messages/count_tokens"),
    ("api.anthropic.com", "/v1/files"),
    (GOOGLE, "/v1beta/models/gemini-3:countTokens"),
    (VERTEX, f"{PROJECT}/google/models/gemini-3:countTokens"),
    (GOOGLE, "/upload/v1beta/files"),
    (GOOGLE, "/v1beta/batches/b:cancel"),
    (BEDROCK, "/model/x/count-tokens"),
    ("api.cohere.com", "/v1/tokenize"),
]
UNMETERABLE: list[tuple[str, str]] = [
    ("api.openai.com", "/v1/batches"),
    ("api.openai.com", "/v1/videos"),
    ("api.openai.com", "/v1/videos/v/remix"),
    ("api.openai.com", "/v1/realtime/client_secrets"),
    ("api.openai.com", "/v1/live/sessions"),
    ("api.openai.com", "/v1/agents/sessions"),
    ("api.openai.com", "/v1/fine_tuning/jobs"),
    ("api.openai.com", "/v1/evals/e/runs"),
    ("api.openai.com", "/v1/containers"),
    ("api.openai.com", "/v1/vector_stores/v/search"),
    ("api.openai.com", "/v1/threads/t/runs"),
    ("api.openai.com", "/v1/threads/runs"),
    ("api.openai.com", "/v1/decisions"),
    ("ours.openai.azure.com", "/openai/deployments/d/batches"),
    ("api.anthropic.com", "/v1/messages/batches"),
    ("api.anthropic.com", "/v1/sessions/s/events"),
    ("api.anthropic.com", "/v1/deployments/d/run"),
    (GOOGLE, "/v1beta/models/gemini-3:batchGenerateContent"),
    (GOOGLE, "/v1beta/models/veo-4:predictLongRunning"),
    (GOOGLE, "/v1beta/cachedContents"),
    (GOOGLE, "/v1alpha/auth_tokens"),
    (GOOGLE, "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"),
    (VERTEX, "/v1/projects/p/locations/l/batchPredictionJobs"),
    (VERTEX, "/v1/projects/p/locations/l/endpoints/7:predict"),
    (BEDROCK, "/model/x/invoke-with-bidirectional-stream"),
    (BEDROCK, "/async-invoke"),
    (BEDROCK, "/guardrail/g/version/1/apply"),
    ("bedrock-agent-runtime.eu-west-1.amazonaws.com", "/agents/a/agentAliases/b/sessions/c/text"),
    ("api.cohere.com", "/v1/embed-jobs"),
    ("api.cohere.com", "/v1/classify"),
    ("api.mistral.ai", "/v1/conversations"),
    ("api.mistral.ai", "/v1/agents/completions"),
    ("api.mistral.ai", "/v1/ocr"),
    ("api.mistral.ai", "/v1/moderations"),
    ("api.mistral.ai", "/v1/batch/jobs"),
]
UNKNOWN: list[tuple[str, str]] = [
    ("hooks.example.com", "/v1/batches"),
    ("hooks.example.com", "/sessions"),
    ("api.openai.com", "/v1/something_new"),
    ("api.openai.com", "/v1"),
    ("api.openai.com", ""),
    ("api.openai.com", "/a" * 10_000),
    ("notopenai.com", "/v1/videos"),
]


@pytest.mark.parametrize(("host", "path", "dialect"), METERED)
def test_metered(host: str, path: str, dialect: str) -> None:
    """What is billed by its answer is read by its dialect, whoever's host it is."""
    surface = surface_of("POST", host, path)
    assert surface.kind == "metered"
    assert surface.dialect is not None
    assert surface.dialect.name == dialect


@pytest.mark.parametrize(("host", "path"), FREE)
def test_free(host: str, path: str) -> None:
    """What is not billed is told apart from what is, also right beside it."""
    assert surface_of("POST", host, path).kind == "free"


@pytest.mark.parametrize(("host", "path"), UNMETERABLE)
def test_unmeterable(host: str, path: str) -> None:
    """Work that is billed later or elsewhere is known for it, and does not pass for free."""
    surface = surface_of("POST", host, path)
    assert surface.kind == "unmeterable"
    assert surface.provider is not None
    assert surface.name


@pytest.mark.parametrize(("host", "path"), UNKNOWN)
def test_unknown(host: str, path: str) -> None:
    """Hosts of nobody that is known have no table, however their paths look; a path of great length is no work."""
    assert surface_of("POST", host, path).kind == "unknown"


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_reading_is_free(method: str) -> None:
    """To read a response again, or to delete one, is not metered a second time."""
    for host, path, _ in METERED:
        assert surface_of(method, host, path).kind == "free"
    assert surface_of(method, "api.openai.com", "/v1/responses/resp_1").kind == "free"
    assert surface_of(method, "api.openai.com", "/v1/realtime").kind == "unmeterable", "a handshake is a GET"


def test_handshakes() -> None:
    """A WebSocket to a provider is billed in a protocol that is not read; to anybody else it is not known."""
    assert surface_of("WEBSOCKET", "api.openai.com", "/v1/responses").kind == "unmeterable"
    assert surface_of("WEBSOCKET", "chat.example.com", "/v1/responses").kind == "unknown"


def test_requests_that_come_in() -> None:
    """Without a host the table holds for whoever is meant."""
    assert surface_of("POST", "", "/v1/batches").kind == "unmeterable"
    assert surface_of("POST", "", "/v1/messages").kind == "metered"
    assert surface_of("POST", "", "/login").kind == "unknown"


def test_every_dialect_is_reached() -> None:
    """Each dialect's fixtures are metered by that dialect, and there is no dialect that no row above reaches."""
    for case in every_fixture():
        surface = surface_of("POST", case.host, case.head.path)
        assert (surface.kind, surface.dialect) == ("metered", case.spoken)
    assert {dialect for _, _, dialect in METERED} == {dialect.name for dialect in DIALECTS}
