"""OpenAI's first API: a prompt, or several, and their completions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import CREATED, Call, Streaming, UnreadableError, event
from asgi_llm_guard.testing.speech.openai_chat import OpenAI, model_in, number_in

__all__ = ["OpenAICompletions", "prompt_texts", "prompt_tokens"]

_DEFAULT_TOKENS: Final = 16
"""What an answer may be if the request does not say."""


def prompt_texts(prompt: object) -> tuple[str, ...]:
    """Each prompt, whether it is a text, tokens, or a list of either. Raises `UnreadableError` if it is none."""
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise UnreadableError("expected a text, or a list of texts or of tokens")
    if all(isinstance(part, int) for part in prompt):
        return (" ".join(str(part) for part in prompt),)
    return tuple(part if isinstance(part, str) else " ".join(str(token) for token in part) for part in prompt)


def prompt_tokens(prompt: object) -> int:
    """A token for every four bytes of each text, or as many as are given."""
    if isinstance(prompt, str):
        return -(-len(prompt.encode()) // 4)
    parts = prompt if isinstance(prompt, list) else ()
    return sum(1 if isinstance(part, int) else prompt_tokens(part) for part in parts)


class OpenAICompletions(OpenAI, Streaming):
    dialect = "openai_completions"
    path = re.compile(r"(?:/openai)?(?:/v1)?/completions|/openai/deployments/(?P<model>[^/]+)/completions")
    id_prefix = "cmpl-"

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = prompt_texts(body.get("prompt"))
        allowed, several = number_in(body, "max_tokens"), number_in(body, "n") or 1
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(body),
            stream=body.get("stream") is True,
            texts=texts,
            counted_tokens=prompt_tokens(body["prompt"]),
            # All of `best_of` are made and billed, though only `n` of them come back.
            choices=len(texts) * max(several, number_in(body, "best_of") or 1),
            allowed_tokens=_DEFAULT_TOKENS if allowed is None else allowed,
        )

    def tells(self, sale: Sale) -> bool:
        options = sale.request.body.get("stream_options")
        asked = isinstance(options, dict) and options.get("include_usage") is True
        return sale.tells and (not sale.request.stream or asked)

    def body(self, sale: Sale) -> Mapping[str, Any]:
        shown = len(sale.request.texts) * (number_in(sale.request.body, "n") or 1)
        choices = [self._choice(choice, sale.text, self._finish(sale)) for choice in range(shown)]
        body = self._object(sale, choices)
        return {**body, "usage": self.report(sale)} if self.tells(sale) else body

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        return event(self._object(sale, [self._choice(choice, word, None)]))

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            yield event(self._object(sale, [self._choice(choice, "", self._finish(sale))]))
        if self.tells(sale):
            yield event({**self._object(sale, []), "usage": self.report(sale)})
        yield b"data: [DONE]\n\n"

    @staticmethod
    def _finish(sale: Sale) -> str:
        return "length" if sale.finish == "length" else "stop"

    @staticmethod
    def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    @staticmethod
    def _object(sale: Sale, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": sale.id,
            "object": "text_completion",
            "created": CREATED,
            "model": sale.model,
            "choices": choices,
        }
