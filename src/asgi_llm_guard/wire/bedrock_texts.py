"""Answers of the models on Bedrock that are text and counts, and nothing around them: Llama, Titan, Mistral, Cohere.

Source: https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters.html (2026-11).
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer
from asgi_llm_guard.wire.shape import count_of, first_count, items, pick, pick_path, text_length

__all__ = ["Texts"]

_TEXTS: Final = (
    "generation",  # Llama
    "outputText",  # Titan, in a stream
    "completion",  # Anthropic's text completions
    "text",  # Cohere
)
_LISTS: Final = (
    ("results", ("outputText",)),  # Titan
    ("outputs", ("text",)),  # Mistral
    ("generations", ("text",)),  # Cohere
    ("completions", ("data", "text")),  # AI21's Jurassic
)
_ENDS: Final = ("stop_reason", "completionReason", "finish_reason")
_INPUTS: Final = ("prompt_token_count", "inputTextTokenCount")
_OUTPUTS: Final = ("generation_token_count", "totalOutputTextTokenCount")


class Texts:
    """What such an answer says, from its chunks or as one piece. The last report of each count wins."""

    __slots__ = ("_done", "_entered", "_images", "_written", "seen", "text_bytes")

    def __init__(self) -> None:
        self._entered: int | None = None
        self._written: int | None = None
        self._images: int | None = None
        self._done = False
        self.text_bytes = 0
        self.seen = False
        """Something had one of these shapes."""

    def add(self, value: object) -> None:
        """Count an answer or a chunk of one."""
        texts: list[object] = [pick(value, name) for name in _TEXTS]
        ends: list[object] = [pick(value, name) for name in _ENDS]
        counted: int | None = None
        for name, path in _LISTS:
            for item in items(pick(value, name)):
                texts.append(pick_path(item, *path))
                ends += [pick(item, end) for end in _ENDS]
                if (count := count_of(pick(item, "tokenCount"))) is not None:
                    counted = (counted or 0) + count
        entered = first_count(*[pick(value, name) for name in _INPUTS])
        written = first_count(*[pick(value, name) for name in _OUTPUTS], counted)
        if isinstance(pick(value, "embedding"), (list, tuple)) or isinstance(pick(value, "embeddingsByType"), dict):
            written = 0
        images = pick(value, "images")
        if isinstance(images, (list, tuple)):
            entered, written, self._images = 0, 0, len(images)
        self.text_bytes += sum(map(text_length, texts))
        self._entered = self._entered if entered is None else entered
        self._written = self._written if written is None else written
        self._done = self._done or any(end is not None for end in ends)
        if entered is not None or written is not None or any(isinstance(text, str) for text in texts):
            self.seen = True

    def answer(self) -> Answer:
        """The sum so far."""
        usage = None
        if self._entered is not None or self._written is not None:
            usage = Usage(input_tokens=self._entered, output_tokens=self._written, images=self._images)
        return Answer(kind="success", usage=usage, text_bytes=self.text_bytes, finished=self._done)
