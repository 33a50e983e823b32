"""Mistral's chat and fill-in-the-middle: OpenAI's chat with names and errors of its own.

Streams report usage unasked, and refuse `stream_options`. Errors are flat: `{"object": "error", "message", "type",
"code"}`, or `{"detail": …}`.

Source: https://docs.mistral.ai/api, and the types of mistralai 3.7 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.wire.base import Ask
from asgi_llm_guard.wire.openai_chat import OpenAIChat
from asgi_llm_guard.wire.openai_family import operation
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.shape import MOST_TOKENS, pick

__all__ = ["Mistral"]

_HOST: Final = "mistral.ai"
_LIMIT: Final = "max_tokens"
_FIM: Final = ("fim", "completions")
_OWN: Final = ("num_cached_tokens", "prompt_audio_seconds")


class Mistral(OpenAIChat):
    """The dialect `mistral`."""

    __slots__ = ()

    name = "mistral"
    provider = "mistral"

    def recognises(self, path: str, host: str = "") -> bool:
        """Whether it is a chat at Mistral's own host, or fills in the middle, which nobody else has."""
        what = operation(path)
        if what == _FIM:
            return True
        return what == ("chat", "completions") and (host == _HOST or host.endswith("." + _HOST))

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """As of OpenAI's chat.

        Raises:
            BodyError: as there.
        """
        ask = super().read_request(view, path)
        return Ask(
            model=ask.model,
            max_output_tokens=ask.max_output_tokens,
            limits_output=ask.limits_output,
            choices=ask.choices,
            stream=ask.stream,
            wants_usage=ask.stream,
            service_tier=ask.service_tier,
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send, with the limit set or lowered.

        Raises:
            BodyError: as `read_request`.
        """
        limit = view.whole(_LIMIT, least=0, most=MOST_TOKENS)
        if max_output_tokens is None or (limit and limit <= max_output_tokens):
            return view.body
        return view.replace({_LIMIT: max_output_tokens})

    def is_ours(self, value: object) -> bool:
        """Whether it is a completion with counts that only Mistral has, or one of its errors.

        Any other is read as OpenAI's, by the same rules.
        """
        if pick(value, "object") == "error":
            return isinstance(pick(value, "message"), str) and pick(value, "error") is None
        usage = pick(value, "usage")
        if usage is None or not super().is_ours(value):
            return False
        return any(isinstance(pick(usage, name), int) for name in _OWN)
