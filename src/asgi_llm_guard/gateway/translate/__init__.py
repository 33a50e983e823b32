"""Between OpenAI's chat format and Anthropic Messages: requests, answers, streams and errors, both ways.

Pure: bytes and values in, bytes and values out. A request that asks for what the other API has no word for is
refused and says what; answers and streams never fail, and what cannot be read in them becomes an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from asgi_llm_guard.gateway.translate.answers import answer_to_anthropic, answer_to_openai
from asgi_llm_guard.gateway.translate.canonical import Chunk, ChunkReader, Completion, Timings, ToolCall
from asgi_llm_guard.gateway.translate.chunks import EventsToChunks
from asgi_llm_guard.gateway.translate.effort import Thinking
from asgi_llm_guard.gateway.translate.events import ChunksToEvents
from asgi_llm_guard.gateway.translate.to_anthropic import request_to_anthropic
from asgi_llm_guard.gateway.translate.to_openai import request_to_openai
from asgi_llm_guard.wire.shape import pick

__all__ = [
    "TRANSLATED",
    "Chunk",
    "ChunkReader",
    "ChunksToEvents",
    "Completion",
    "EventsToChunks",
    "Thinking",
    "Timings",
    "ToolCall",
    "Transcoder",
    "Translation",
    "answer_to_anthropic",
    "answer_to_openai",
    "request_to_anthropic",
    "request_to_openai",
    "translate",
]

TRANSLATED: Final = frozenset({("openai", "anthropic"), ("anthropic", "openai")})
"""The dialects that a request may be asked in and sent in, where they differ."""


class Transcoder(Protocol):
    """Reads a provider's stream as it passes, and writes it as the client's."""

    @property
    def ended(self) -> bool:
        """The last byte of the answer has been written: nothing more is."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """What to send for these bytes, perhaps nothing. Never raises."""
        ...

    def finish(self) -> bytes:
        """The provider's stream is over, by itself or not: what is left to send. A broken answer ends with an error."""
        ...


class Translation(msgspec.Struct, frozen=True):
    """One request in the dialect that it is sent in, and how to read what comes back."""

    body: dict[str, Any]
    answer: Callable[[int, bytes], tuple[int, bytes]]
    """Status and body of the provider's whole answer or error as the client's. Never raises."""
    stream: Callable[[], Transcoder]
    """A transcoder for the provider's stream. Anything but a stream with status 200 is an `answer`."""


def translate(
    asked: str,
    spoken: str,
    body: Mapping[str, Any],
    *,
    most_tokens: int | None = None,
    thinking: Thinking | None = None,
    cache_control: bool = False,
    now: int = 0,
) -> Translation:
    """The request `body`, asked in the dialect `asked`, for a deployment that speaks `spoken`.

    `most_tokens`: of output, where the request has no limit and needs one. `thinking`: how an Anthropic model is told
    to think; `None`: by its name. `cache_control`: an OpenAI-compatible server takes Anthropic's marks for the cache.
    `now`: Unix time in seconds, which OpenAI's answers have.

    Raises:
        BodyError: something in the request is malformed, or the other API has nothing for it; names it.
        KeyError: the two dialects are not in `TRANSLATED`.
    """
    if (asked, spoken) not in TRANSLATED:
        raise KeyError(f"{asked} is not translated to {spoken}")
    if spoken == "openai":
        written = request_to_openai(body, cache_control=cache_control)
        return Translation(written, answer_to_anthropic, ChunksToEvents)
    written = request_to_anthropic(body, most_tokens=most_tokens, thinking=thinking)
    told = pick(body.get("stream_options"), "include_usage") is True
    return Translation(
        written,
        lambda status, answer: answer_to_openai(status, answer, created=now),
        lambda: EventsToChunks(created=now, include_usage=told),
    )
