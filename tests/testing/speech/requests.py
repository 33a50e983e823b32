"""One small request for each dialect that a fake provider speaks, without an SDK."""

from __future__ import annotations

from typing import Any, NamedTuple

HELLO = "say hello to everybody here"  # 27 bytes: 7 tokens, and 3 + 3 for the message and the opening
ECHO = f"Echo: {HELLO}"
CHAT = {"model": "m", "messages": [{"role": "user", "content": HELLO}]}
CONTENTS = {"contents": [{"role": "user", "parts": [{"text": HELLO}]}]}
CONVERSE = {"messages": [{"role": "user", "content": [{"text": HELLO}]}]}
CLAUDE = {"messages": CHAT["messages"], "max_tokens": 100}


class Way(NamedTuple):
    """How a dialect is asked, plain and streamed."""

    plain: str
    streamed: str
    body: dict[str, Any]
    asks: dict[str, Any]
    """What a streamed request says on top."""
    platform: Any = "openai"


_STREAM: dict[str, Any] = {"stream": True}
_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
_OPENAI = "/v1/chat/completions"
_AZURE = "/openai/deployments/m/chat/completions"
_GEMINI = "/v1/models/m:streamGenerateContent"

WAYS: dict[str, Way] = {
    "openai_chat": Way(_OPENAI, _OPENAI, CHAT, _USAGE),
    "openai_completions": Way("/v1/completions", "/v1/completions", {"model": "m", "prompt": HELLO}, _USAGE),
    "openai_responses": Way("/v1/responses", "/v1/responses", {"model": "m", "input": HELLO}, _STREAM),
    "azure_chat": Way(_AZURE, _AZURE, CHAT, _USAGE),
    "groq_chat": Way(_OPENAI, _OPENAI, CHAT, _STREAM, "groq"),
    "openrouter_chat": Way("/api/v1/chat/completions", "/api/v1/chat/completions", CHAT, _STREAM),
    "vllm_chat": Way(_OPENAI, _OPENAI, CHAT, _USAGE, "vllm"),
    "gemini_chat": Way("/v1beta/openai/chat/completions", "/v1beta/openai/chat/completions", CHAT, _STREAM),
    "mistral_chat": Way(_OPENAI, _OPENAI, CHAT, _STREAM, "mistral"),
    "anthropic_messages": Way("/v1/messages", "/v1/messages", {**CLAUDE, "model": "m"}, _STREAM),
    "gemini_content": Way("/v1/models/m:generateContent", f"{_GEMINI}?alt=sse", CONTENTS, {}),
    "gemini_content, an array": Way("/v1/models/m:generateContent", _GEMINI, CONTENTS, {}),
    "gemini_interactions": Way("/v1beta/interactions", "/v1beta/interactions", {"model": "m", "input": HELLO}, _STREAM),
    "bedrock_converse": Way("/model/m/converse", "/model/m/converse-stream", CONVERSE, {}),
    "bedrock_anthropic": Way("/model/anthropic.m/invoke", "/model/anthropic.m/invoke-with-response-stream", CLAUDE, {}),
    "bedrock_llama": Way("/model/llama/invoke", "/model/llama/invoke-with-response-stream", {"prompt": HELLO}, {}),
    "cohere_chat": Way("/v2/chat", "/v2/chat", CHAT, _STREAM),
    "ollama_chat": Way("/api/chat", "/api/chat", {**CHAT, "stream": False}, _STREAM),
    "ollama_generate": Way("/api/generate", "/api/generate", {"model": "m", "prompt": HELLO, "stream": False}, _STREAM),
}
