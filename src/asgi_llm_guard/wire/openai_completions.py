"""OpenAI's legacy completions, which many servers of open models still speak.

Source: https://platform.openai.com/docs/api-reference/completions, and the types of openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.wire.base import Ask
from asgi_llm_guard.wire.openai_errors import error_of
from asgi_llm_guard.wire.openai_family import (
    Family,
    FamilyTally,
    asking_for_usage,
    model_of,
    operation,
    text_in,
    wants_usage,
)
from asgi_llm_guard.wire.openai_usage import completion_usage
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import MOST_CHOICES, MOST_TOKENS, decode, items, name_of, pick, text_length
from asgi_llm_guard.wire.sse import Block

__all__ = ["OpenAICompletions"]

_LIMIT: Final = "max_tokens"
_DEFAULT_LIMIT: Final = 16
"""Where the request sets none. Source: the reference of `max_tokens`."""


class OpenAICompletions(Family):
    """The dialect `openai_completions`."""

    __slots__ = ()

    name: Final = "openai_completions"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        """Whether it completes a text; chats have a path of their own."""
        return operation(path) == ("completions",)

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for: for every prompt, the larger of `n` and `best_of` are generated and billed.

        A limit of 0 scores the prompt in some servers and is none in others, so it counts as none.

        Raises:
            BodyError: `model` is missing, a value is malformed, or too much is asked for at once.
        """
        limit = view.whole(_LIMIT, least=0, most=MOST_TOKENS)
        each = max(view.whole(name, least=1, most=MOST_CHOICES) or 1 for name in ("n", "best_of"))
        choices = _prompts(view) * each
        if choices > MOST_CHOICES:
            message = f"prompt: expected at most {MOST_CHOICES} completions in all, got {choices}"
            raise BodyError("invalid_request", 400, message, "prompt")
        return Ask(
            model=model_of(view, path),
            max_output_tokens=_DEFAULT_LIMIT if limit is None else limit or None,
            choices=choices,
            stream=view.flag("stream"),
            wants_usage=wants_usage(view),
            service_tier=text_in(view, "service_tier"),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:
        """The body to send: as for a chat, and the limit under its only name.

        Raises:
            BodyError: as `read_request`.
        """
        changes = asking_for_usage(view) if include_usage else {}
        limit = view.whole(_LIMIT, least=0, most=MOST_TOKENS)
        limit = _DEFAULT_LIMIT if limit is None else limit or MOST_TOKENS
        if max_output_tokens is not None and limit > max_output_tokens:
            changes[_LIMIT] = max_output_tokens
        return view.replace(changes) if changes else view.body

    def tally(self) -> FamilyTally:
        return _Tally()

    def is_ours(self, value: object) -> bool:
        """Whether it is a completion or a chunk of one. Errors look as in a chat, and are told there."""
        choices = pick(value, "choices")
        if not isinstance(choices, (list, tuple)):
            return False
        return pick(value, "object") == "text_completion" if not choices else isinstance(pick(choices[0], "text"), str)


class _ChunkChoice(msgspec.Struct, gc=False):
    text: str


class _Chunk(msgspec.Struct, gc=False):
    """A chunk in the middle of a stream; the rest is read by shape."""

    choices: tuple[_ChunkChoice]
    model: str | None = None
    service_tier: str | None = None
    usage: None = None
    error: None = None


_CHUNK: Final = msgspec.json.Decoder(_Chunk)


class _Tally(FamilyTally):
    __slots__ = ()

    def event(self, block: Block) -> bool:
        """As every tally; plain chunks, which are nearly all, in a shorter way."""
        if block.data is not None and not block.error:
            try:
                chunk = _CHUNK.decode(block.data)
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # anything but a plain chunk
            else:
                if chunk.model != self.model:
                    self.model = name_of(chunk.model) or self.model
                if chunk.service_tier != self.tier:
                    self.tier = name_of(chunk.service_tier) or self.tier
                self.text_bytes += text_length(chunk.choices[0].text)
                return False
        return super().event(block)

    def add(self, value: object) -> bool:
        choices = pick(value, "choices")
        if not self.take_error(value) and not isinstance(choices, (list, tuple)):
            return False
        self.take_names(value)
        for choice in items(choices):
            self.text_bytes += text_length(pick(choice, "text"))
        self.take_usage(completion_usage(pick(value, "usage")))
        return True

    def only_reports(self, value: object) -> bool:
        """Whether it is the chunk that only reports usage."""
        alone = pick(value, "choices") == [] and error_of(value) is None
        return alone and isinstance(pick(value, "usage"), dict)


def _prompts(view: BodyView) -> int:
    """How many prompts there are: a text, or token ids, are one."""
    raw = view.raw("prompt")
    if raw is None or not raw.startswith(b"["):
        return 1
    prompts = decode(raw)
    return len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
