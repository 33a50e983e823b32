"""How providers speak: each API as its own SDK reads it, written without the code that measures it."""

from asgi_llm_guard.testing.speech.anthropic import AnthropicCount, AnthropicMessages
from asgi_llm_guard.testing.speech.base import Call, Fault, Speech, Streaming, UnreadableError
from asgi_llm_guard.testing.speech.bedrock import BedrockAnthropic, BedrockConverse, BedrockCount, BedrockLlama
from asgi_llm_guard.testing.speech.cohere import CohereChat, CohereEmbed, CohereRerank
from asgi_llm_guard.testing.speech.compatible import AzureChat, GeminiCompatibleChat, GroqChat, OpenRouterChat, VllmChat
from asgi_llm_guard.testing.speech.gemini import GeminiContent, GeminiCount, GeminiEmbed
from asgi_llm_guard.testing.speech.gemini_interactions import GeminiInteractions
from asgi_llm_guard.testing.speech.mistral import MistralChat
from asgi_llm_guard.testing.speech.ollama import OllamaChat, OllamaGenerate
from asgi_llm_guard.testing.speech.openai_chat import OpenAIChat
from asgi_llm_guard.testing.speech.openai_completions import OpenAICompletions
from asgi_llm_guard.testing.speech.openai_media import (
    OpenAIEmbeddings,
    OpenAIImages,
    OpenAISpeech,
    OpenAITranscriptions,
)
from asgi_llm_guard.testing.speech.openai_responses import OpenAIResponses, OpenAIResponsesCount

__all__ = ["SPEECHES", "Call", "Fault", "Speech", "Streaming", "UnreadableError"]

SPEECHES: tuple[Speech, ...] = (
    # Those that share OpenAI's paths come first: they are asked for by the platform.
    MistralChat(),
    GroqChat(),
    OpenRouterChat(),
    VllmChat(),
    OpenAIChat(),
    AzureChat(),
    GeminiCompatibleChat(),
    OpenAIResponses(),
    OpenAIResponsesCount(),
    OpenAICompletions(),
    OpenAIEmbeddings(),
    OpenAIImages(),
    OpenAISpeech(),
    OpenAITranscriptions(),
    AnthropicMessages(),
    AnthropicCount(),
    GeminiContent(),
    GeminiCount(),
    GeminiEmbed(),
    GeminiInteractions(),
    BedrockConverse(),
    BedrockCount(),
    BedrockAnthropic(),
    BedrockLlama(),
    CohereChat(),
    CohereEmbed(),
    CohereRerank(),
    OllamaChat(),
    OllamaGenerate(),
)
