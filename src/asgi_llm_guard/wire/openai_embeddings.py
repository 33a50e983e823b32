"""OpenAI's embeddings, and those of the many servers that speak them: Azure, Mistral, vLLM, Ollama.

Source: https://platform.openai.com/docs/api-reference/embeddings, and the types of openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask
from asgi_llm_guard.wire.openai_family import Family, FamilyTally, model_of, operation, text_in
from asgi_llm_guard.wire.openai_usage import completion_usage
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.shape import count_of, first_count, pick

__all__ = ["OpenAIEmbeddings"]


class OpenAIEmbeddings(Family):
    """The dialect `openai_embeddings`. Nothing is generated: output is 0."""

    __slots__ = ()

    name: Final = "openai_embeddings"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        return operation(path) == ("embeddings",)

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. A token id takes a byte or more, so the body's length bounds lists of them too.

        Raises:
            BodyError: `model` is missing or malformed.
        """
        return Ask(
            model=model_of(view, path),
            max_output_tokens=0,
            limits_output=False,
            service_tier=text_in(view, "service_tier"),
        )

    def tally(self) -> FamilyTally:
        return _Tally()

    def is_ours(self, value: object) -> bool:
        """Whether it is a list of embeddings with their usage. Errors look as in a chat, and are told there."""
        return (
            pick(value, "object") == "list"
            and isinstance(pick(value, "data"), (list, tuple))
            and count_of(pick(pick(value, "usage"), "prompt_tokens")) is not None
        )

    def read_plain(self, body: bytes) -> Answer | None:
        try:
            plain = _PLAIN.decode(body)  # passes over the vectors
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        tally = _Tally()
        tally.add(plain)
        return tally.answer(whole=True)


class _Plain(msgspec.Struct):
    object: str
    usage: dict[str, Any]
    model: str | None = None
    error: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)


class _Tally(FamilyTally):
    __slots__ = ()

    def add(self, value: object) -> bool:
        if not self.take_error(value) and pick(value, "usage") is None:
            return False
        self.take_names(value)
        report = pick(value, "usage")
        entered = first_count(pick(report, "prompt_tokens"), pick(report, "total_tokens"))
        usage = completion_usage(report) or Usage()
        if entered is not None:
            self.take_usage(
                Usage(
                    input_tokens=entered,
                    output_tokens=0,
                    cache_read_tokens=usage.cache_read_tokens,
                    reported_nanousd=usage.reported_nanousd,
                )
            )
        return True
