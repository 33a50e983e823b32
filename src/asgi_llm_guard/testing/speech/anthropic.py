"""Anthropic messages, and how Anthropic writes usage and errors; also behind Vertex."""

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
    chat_texts,
    counted,
    text_of,
    typed_event,
)
from asgi_llm_guard.testing.speech.openai_chat import model_in, number_in
from asgi_llm_guard.usage import Usage

__all__ = ["AnthropicCount", "AnthropicMessages", "anthropic_prompt"]

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_UNKNOWN: Final[Mapping[str, None]] = {"input_tokens": None, "output_tokens": None}
"""Of an answer that does not say what it used: SDKs take an answer apart that has no usage at all."""


def anthropic_prompt(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of the system prompt and of each message. Raises `UnreadableError` if there is no message."""
    system = text_of(body.get("system"))
    return (*([system] if system else []), *chat_texts(body.get("messages")))


class AnthropicMessages(Streaming):
    dialect = "anthropic_messages"
    path = re.compile(
        r"(?:/anthropic)?/v1/messages|/v1\w*/projects/.+/publishers/anthropic/models/(?P<model>[^/:]+):(?P<method>rawPredict|streamRawPredict)"
    )
    id_prefix = "msg_"
    id_header = "request-id"
    broken = b'event: content_block_delta\ndata: {"type":\n\n'
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, None, "This request would exceed the rate limit of input tokens per minute."),
        "quota": (429, "enforced_spend_limit_reached", "The spend limit of this workspace is reached."),
        "overloaded": (529, None, "Overloaded"),
        "context": (400, None, "prompt is too long: 9000 tokens > 8192 maximum"),
        "unknown_model": (404, None, "There is no such model."),
    }

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = anthropic_prompt(body)
        method = call.named.get("method")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(body),
            stream=body.get("stream") is True if method is None else method == "streamRawPredict",
            texts=texts,
            counted_tokens=counted(texts),
            allowed_tokens=number_in(body, "max_tokens"),
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        read, written = used.cache_read_tokens or 0, used.cache_write_tokens or 0
        kept = used.cache_write_1h_tokens or 0
        return {
            "input_tokens": (used.input_tokens or 0) - read - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
            "cache_creation": {"ephemeral_5m_input_tokens": written - kept, "ephemeral_1h_input_tokens": kept},
            "output_tokens": used.output_tokens,
            "output_tokens_details": {"thinking_tokens": used.reasoning_tokens or 0},
            "server_tool_use": None,
            "service_tier": "standard",
        }

    def body(self, sale: Sale) -> Mapping[str, Any]:
        message = self._message(sale, [self._block(sale, sale.text)], self.stop_reason(sale))
        return {**message, "usage": self.report(sale) if self.tells(sale) else _UNKNOWN}

    def opening(self, sale: Sale) -> Iterator[bytes]:
        message = self._message(sale, [], None)
        message["usage"] = _UNKNOWN
        if self.tells(sale):
            # What will have been generated is not known yet: providers write a small number.
            message["usage"] = {**self.report(sale), "output_tokens": 1, "output_tokens_details": None}
        yield self.event({"type": "message_start", "message": message})
        yield self.event({"type": "content_block_start", "index": 0, "content_block": self._block(sale, None)})
        yield self.event({"type": "ping"})

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        delta = {"type": "text_delta", "text": word}
        if sale.behaviour.tool is not None:
            delta = {"type": "input_json_delta", "partial_json": word}
        return self.event({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, sale: Sale) -> Iterator[bytes]:
        yield self.event({"type": "content_block_stop", "index": 0})
        delta: dict[str, Any] = {
            "type": "message_delta",
            "delta": {"stop_reason": self.stop_reason(sale), "stop_sequence": None},
            "usage": _UNKNOWN,
        }
        if self.tells(sale):
            # All counts again, but not which part of what was written is kept for longer.
            delta["usage"] = {name: count for name, count in self.report(sale).items() if name != "cache_creation"}
        yield self.event(delta)
        yield self.event({"type": "message_stop"})

    def failing(self, sale: Sale) -> bytes:
        error = {
            "type": sale.behaviour.code or "overloaded_error",
            "message": "the fake provider fails inside the stream",
        }
        return self.event({"type": "error", "error": error, "request_id": sale.id})

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        kind = _KINDS.get(fault.status, "invalid_request_error" if fault.status < 500 else "api_error")
        error: dict[str, object] = {"type": kind, "message": fault.message}
        if fault.code is not None:
            error["details"] = {"error_code": fault.code}
        return {"type": "error", "error": error, "request_id": "req_fake"}, ()

    def event(self, data: Mapping[str, Any]) -> bytes:
        return typed_event(data["type"], data)

    @staticmethod
    def stop_reason(sale: Sale) -> str:
        return {"tool": "tool_use", "length": "max_tokens"}.get(sale.finish, "end_turn")

    @staticmethod
    def _message(sale: Sale, content: list[dict[str, Any]], stop_reason: str | None) -> dict[str, Any]:
        return {
            "id": sale.id,
            "type": "message",
            "role": "assistant",
            "model": sale.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
        }

    @staticmethod
    def _block(sale: Sale, text: str | None) -> dict[str, Any]:
        """The text or the call of a tool; `None`: nothing of it is there yet."""
        if sale.behaviour.tool is None:
            return {"type": "text", "text": text or "", "citations": None}
        name, arguments = sale.behaviour.tool
        given = {} if text is None else arguments
        return {"type": "tool_use", "id": f"toolu_{sale.number}", "name": name, "input": given}


class AnthropicCount(AnthropicMessages):
    """How many tokens a prompt has; free."""

    dialect = "anthropic_count"
    path = re.compile(r"(?:/anthropic)?/v1/messages/count_tokens")
    free = True

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {"input_tokens": sale.input_tokens}
