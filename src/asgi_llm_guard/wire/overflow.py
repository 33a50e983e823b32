"""How servers say that the input is larger than the model's window, where no code says it."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["says_overflow"]

_LONGEST: Final = 4096
"""Characters of a message that are looked at."""

_OVERFLOWS: Final = re.compile(
    "maximum context length"  # OpenAI, vLLM, OpenRouter; Mistral: too large for model with N maximum context length
    "|input tokens exceed the configured limit"
    "|exceeds the context window"
    "|prompt is too long"  # Anthropic
    "|exceed context limit"
    "|exceeds the maximum number of tokens allowed"  # Gemini
    "|input is too long for requested model|too many input tokens|expected maxlength"  # Bedrock
    "|too many tokens:"  # Cohere; without the colon Bedrock throttles
    "|prompt is longer than the context length|input length exceeds the context length"  # Ollama
    "|exceeds the available context size"  # llama.cpp
    "|`inputs` tokens \\+ `max_new_tokens` must be"  # text-generation-inference
)
_LOOKALIKE: Final = "string too long"
"""A text that is too long for its field is a parameter error, though it reads much the same."""


def says_overflow(message: object) -> bool:
    """Whether an error's message says that the input is too large. Ask only where the status can mean it."""
    if not isinstance(message, str):
        return False
    text = message[:_LONGEST].lower()
    return _OVERFLOWS.search(text) is not None and _LOOKALIKE not in text
