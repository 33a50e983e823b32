"""Wire formats: what requests ask for, what answers used. Pure, and told apart by path or by shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.wire.anthropic import Anthropic
from asgi_llm_guard.wire.base import Answer, Dialect, ItemMeter
from asgi_llm_guard.wire.bedrock import BedrockConverse
from asgi_llm_guard.wire.bedrock_invoke import BedrockInvoke
from asgi_llm_guard.wire.cohere import Cohere
from asgi_llm_guard.wire.cohere_embed import CohereEmbed
from asgi_llm_guard.wire.cohere_rerank import CohereRerank
from asgi_llm_guard.wire.frameworks import FrameworkItems, read_framework_object
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

__all__ = ["DIALECTS", "dialect_for", "dialect_named", "is_readable", "item_meter", "meter_object"]

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


def dialect_for(path: str, host: str = "") -> Dialect | None:
    """The dialect that requests to `path` (at `host`, where it is known) speak; `None`: no dialect has such a path."""
    return next((dialect for dialect in DIALECTS if dialect.recognises(path, host)), None)


def dialect_named(name: str) -> Dialect:
    """The dialect called `name`.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    known = ", ".join(repr(dialect.name) for dialect in DIALECTS)
    raise ConfigurationError(f"dialect: expected one of {known}, got {name!r}")


_READABLE: Final = re.compile(
    rb"json|^text/event-stream|^application/vnd\.amazon\.eventstream|^audio/", re.IGNORECASE
)


def is_readable(content_type: bytes) -> bool:
    """Whether something is known of a body of this type: JSON, a stream of it, or speech, of which the request tells."""
    return _READABLE.search(content_type) is not None


def meter_object(obj: object) -> Answer | None:
    """What a library's or framework's object, a dict or an HTTP response says; `None`: nobody knows its shape."""
    for dialect in DIALECTS:
        if (answer := dialect.read_object(obj)) is not None:
            return answer
    return read_framework_object(obj)


def item_meter() -> ItemMeter:
    """A meter for streamed items of any dialect: the first that knows the shape of an item reads the rest."""
    return _AnyItems(DIALECTS)


class _AnyItems:
    def __init__(self, dialects: Iterable[Dialect]) -> None:
        self._meters: list[ItemMeter] = [*(dialect.item_meter() for dialect in dialects), FrameworkItems()]

    def add(self, item: object) -> None:
        for meter in self._meters:
            meter.add(item)
            if len(self._meters) > 1 and meter.answer() is not None:
                self._meters = [meter]
                return

    def answer(self) -> Answer | None:
        return next((answer for meter in self._meters if (answer := meter.answer()) is not None), None)
