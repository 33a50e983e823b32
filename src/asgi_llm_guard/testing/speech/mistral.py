"""Mistral chat completions: like OpenAI's, with usage on the last chunk and errors without a wrapper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from asgi_llm_guard.testing.sale import Sale
from asgi_llm_guard.testing.speech.base import CREATED, NOWHERE, Fault, Troubles, event
from asgi_llm_guard.testing.speech.openai_chat import OpenAIChat
from asgi_llm_guard.usage import Usage

__all__ = ["MistralChat"]


class MistralChat(OpenAIChat):
    dialect = "mistral_chat"
    buckets = frozenset({"cache_read"})
    path = NOWHERE
    shared_path = OpenAIChat.path
    platform = "mistral"
    id_prefix = "cmpl-"
    id_header = "mistral-correlation-id"
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, "1300", "The limit of requests is reached."),
        "quota": (402, "3001", "The credit of this workspace is used up."),
        "overloaded": (503, "3505", "There is too much to do at the moment."),
        "context": (400, "3051", "The prompt is too large for model with 8192 maximum context length"),
        "unknown_model": (404, "1500", "There is no such model."),
    }

    def usage(self, used: Usage) -> Mapping[str, Any]:
        return {
            "prompt_tokens": used.input_tokens,
            "completion_tokens": used.output_tokens,
            "total_tokens": used.total_tokens,
            "num_cached_tokens": used.cache_read_tokens,
            "prompt_tokens_details": {"cached_tokens": used.cache_read_tokens},
        }

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {"usage": {}, **super().body(sale)}  # the SDK does not take an answer without it

    def tells(self, sale: Sale) -> bool:
        return sale.tells

    @staticmethod
    def tool_call(sale: Sale, arguments: str, position: int | None = None) -> dict[str, Any]:
        assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
        function = {"name": sale.behaviour.tool[0], "arguments": arguments}
        return {"id": f"call{sale.number:05}", "function": function, "index": 0 if position is None else position}

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:
        # A tool's call comes in one piece, with the last word of its arguments.
        if sale.behaviour.tool is None:
            return super().piece(sale, choice, position, word)
        delta: dict[str, Any] = {} if position else {"role": "assistant", "content": ""}
        if position == len(sale.words) - 1:
            delta["tool_calls"] = [self.tool_call(sale, sale.text)]
        return event(self.chunk(sale, choice, delta))

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            chunk = self.chunk(sale, choice, {"content": ""}, finish=self.finish(sale))
            if sale.tells and choice == sale.request.choices - 1:
                chunk["usage"] = self.report(sale)
            yield event(chunk)
        yield b"data: [DONE]\n\n"

    def chunk(
        self, sale: Sale, choice: int, delta: Mapping[str, object], *, finish: str | None = None
    ) -> dict[str, Any]:
        return {
            "id": sale.id,
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": sale.model,
            "choices": [{"index": choice, "delta": delta, "finish_reason": finish}],
        }

    def error_body(self, fault: Fault) -> dict[str, object]:
        if fault.status == 422:
            return {"detail": [{"type": "value_error", "loc": ["body"], "msg": fault.message, "input": {}}]}
        kind = "rate_limited" if fault.status == 429 else "invalid_request_error" if fault.status < 500 else "internal"
        return {"object": "error", "message": fault.message, "type": kind, "param": None, "code": fault.code}
