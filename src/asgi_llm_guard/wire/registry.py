"""Every dialect. Imported when the first is asked for: together they are a third of the package."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.wire.anthropic import Anthropic
from asgi_llm_guard.wire.base import Dialect
from asgi_llm_guard.wire.bedrock import BedrockConverse
from asgi_llm_guard.wire.bedrock_invoke import BedrockInvoke
from asgi_llm_guard.wire.cohere import Cohere
from asgi_llm_guard.wire.cohere_embed import CohereEmbed
from asgi_llm_guard.wire.cohere_rerank import CohereRerank
from asgi_llm_guard.wire.gemini import Gemini
from asgi_llm_guard.wire.gemini_interactions import GeminiInteractions
from asgi_llm_guard.wire.mistral import Mistral
from asgi_llm_guard.wire.ollama import Ollama
from asgi_llm_guard.wire.openai_audio import OpenAIAudio
from asgi_llm_guard.wire.openai_chat import OpenAIChat
from asgi_llm_guard.wire.openai_completions import OpenAICompletions
from asgi_llm_guard.wire.openai_embeddings import OpenAIEmbeddings
from asgi_llm_guard.wire.openai_images import OpenAIImages
from asgi_llm_guard.wire.openai_responses import OpenAIResponses

__all__ = ["DIALECTS"]

DIALECTS: Final[tuple[Dialect, ...]] = (
    OpenAIResponses(),
    OpenAICompletions(),
    OpenAIEmbeddings(),
    OpenAIImages(),
    OpenAIAudio(),
    Anthropic(),
    BedrockConverse(),
    BedrockInvoke(),
    Gemini(),
    GeminiInteractions(),
    Cohere(),
    CohereEmbed(),
    CohereRerank(),
    Ollama(),
    Mistral(),
    OpenAIChat(),  # the last two read the errors of many
)
"""Every dialect there is, in the order in which objects are tried."""
