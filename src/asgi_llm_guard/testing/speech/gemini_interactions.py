"""Gemini Interactions: steps instead of messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import (
    Call,
    Fault,
    Streaming,
    Troubles,
    UnreadableError,
    counted,
    text_of,
    typed_event,
)
from asgi_llm_guard.testing.speech.openai_chat import model_in
from asgi_llm_guard.usage import Usage

__all__ = ["GeminiInteractions"]

_WHEN: Final = "2026-01-01T00:00:00Z"
_CODES: Final = {
    400: "invalid_request",
    401: "authentication_error",
    403: "permission_denied",
    404: "not_found",
    429: "rate_limit_exceeded",
    503: "overloaded",
}


def _texts(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the instruction and of each step of the input. Raises `UnreadableError` if there is no input."""
    asked = body.get("input")
    if isinstance(asked, dict):
        asked = [asked]
    if isinstance(asked, str):
        steps = [asked]
    elif isinstance(asked, list) and asked:
        # Steps have their content inside; a list of contents is one step.
        plain = all(isinstance(part, dict) and "text" in part for part in asked)
        steps = [text_of(asked)] if plain else [text_of(step.get("content")) for step in asked]
    else:
        raise UnreadableError("input: expected a text, or a list of steps")
    instruction = body.get("system_instruction")
    return (*([instruction] if isinstance(instruction, str) else []), *steps)


class GeminiInteractions(Streaming):
    dialect = "gemini_interactions"
    buckets = frozenset({"cache_read", "reasoning"})
    path = re.compile(r"/v1\w*/interactions")
    id_prefix = "interaction-"
    broken = b'event: step.delta\ndata: {"event_type":\n\n'
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, "rate_limit_exceeded", "There were too many requests."),
        "quota": (429, "quota_exceeded", "The quota of this project is used up."),
        "overloaded": (503, "overloaded", "The model is overloaded."),
        "context": (400, "invalid_request", "The input token count exceeds the maximum number of tokens allowed."),
        "unknown_model": (404, "not_found", "There is no such model."),
    }

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = _texts(body)
        config = body.get("generation_config")
        allowed = config.get("max_output_tokens") if isinstance(config, dict) else None
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=model_in(body),
            stream=body.get("stream") is True,
            texts=texts,
            counted_tokens=counted(texts),
            allowed_tokens=allowed if isinstance(allowed, int) else None,
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        thoughts = used.reasoning_tokens or 0
        return {
            "total_input_tokens": used.input_tokens,
            "total_output_tokens": (used.output_tokens or 0) - thoughts,
            "total_thought_tokens": thoughts,
            "total_tool_use_tokens": 0,
            "total_cached_tokens": used.cache_read_tokens or 0,
            "total_tokens": used.total_tokens,
            "input_tokens_by_modality": [{"modality": "text", "tokens": used.input_tokens}],
        }

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {**self._interaction(sale, self._end(sale)), "steps": [self._step(sale, sale.text)]}

    def opening(self, sale: Sale) -> Iterator[bytes]:
        yield self._event("interaction.created", interaction=self._interaction(sale, "in_progress"))
        yield self._event("step.start", index=0, step=self._step(sale, None))

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        delta = {"type": "text", "text": word}
        if sale.behaviour.tool is not None:
            delta = {"type": "arguments_delta", "arguments": word}
        return self._event("step.delta", index=0, delta=delta)

    def closing(self, sale: Sale) -> Iterator[bytes]:
        yield self._event("step.stop", index=0)
        yield self._event("interaction.completed", interaction=self._interaction(sale, self._end(sale)))
        yield b"event: done\ndata: [DONE]\n\n"

    def failing(self, sale: Sale) -> bytes:
        error = {"code": sale.behaviour.code or "api_error", "message": "the fake provider fails inside the stream"}
        return self._event("error", error=error)

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        code = fault.code or _CODES.get(fault.status, "api_error" if fault.status >= 500 else "invalid_request")
        return {"error": {"code": code, "message": fault.message}}, ()

    @staticmethod
    def _event(name: str, **fields: object) -> bytes:
        return typed_event(name, {"event_type": name, **fields})

    @staticmethod
    def _end(sale: Sale) -> str:
        return {"tool": "requires_action", "length": "incomplete"}.get(sale.finish, "completed")

    @staticmethod
    def _step(sale: Sale, text: str | None) -> dict[str, Any]:
        """The output or the call of a function; `None`: nothing of it is there yet."""
        if sale.behaviour.tool is not None:
            name, arguments = sale.behaviour.tool
            given = {} if text is None else arguments
            return {"type": "function_call", "id": f"call-{sale.number}", "name": name, "arguments": given}
        return {"type": "model_output", "content": [] if text is None else [{"type": "text", "text": text}]}

    def _interaction(self, sale: Sale, status: str) -> dict[str, Any]:
        interaction: dict[str, Any] = {
            "id": sale.id,
            "object": "interaction",
            "model": sale.model,
            "status": status,
            "created": _WHEN,
            "updated": _WHEN,
        }
        if status != "in_progress" and self.tells(sale):
            interaction["usage"] = self.report(sale)
        return interaction
