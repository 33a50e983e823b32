"""OpenAI chat completions, and how OpenAI writes usage and errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import (
    CREATED,
    Call,
    Fault,
    Speech,
    Streaming,
    Troubles,
    UnreadableError,
    chat_texts,
    counted,
    event,
)
from asgi_llm_guard.usage import Usage

__all__ = ["OpenAI", "OpenAIChat", "model_in", "number_in"]


def model_in(body: Mapping[str, Any]) -> str:
    """The model that a body names. Raises `UnreadableError` if it names none."""
    model = body.get("model")
    if not isinstance(model, str):
        raise UnreadableError("model: expected a string")
    return model


def number_in(body: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is a number."""
    return next((body[name] for name in names if isinstance(body.get(name), int)), None)


class OpenAI(Speech):
    """What OpenAI's APIs have in common."""

    id_header = "x-request-id"
    buckets = frozenset({"cache_read", "cache_write", "reasoning"})
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, "rate_limit_exceeded", "Too many tokens per minute. Try again in a moment."),
        "quota": (429, "insufficient_quota", "The quota of this account is used up. See your plan."),
        "overloaded": (503, "server_is_overloaded", "There is too much to do at the moment."),
        "context": (400, "context_length_exceeded", "This model's maximum context length is 8192 tokens."),
        "unknown_model": (404, "model_not_found", "There is no such model."),
    }

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        return self.error_body(fault), ()

    def error_body(self, fault: Fault) -> dict[str, object]:
        return {
            "error": {"message": fault.message, "type": self.error_type(fault), "param": None, "code": fault.code},
        }

    @staticmethod
    def error_type(fault: Fault) -> str:
        if fault.code == "insufficient_quota":
            return "insufficient_quota"
        if fault.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if fault.status < 500 else "server_error"

    def failing(self, sale: Sale) -> bytes:
        fault = Fault(status=500, message="the fake provider fails inside the stream", code=sale.behaviour.code)
        return event(self.error_body(fault))

    def usage(self, used: Usage) -> Mapping[str, Any]:
        return {
            "prompt_tokens": used.input_tokens,
            "completion_tokens": used.output_tokens,
            "total_tokens": used.total_tokens,
            "prompt_tokens_details": {
                "cached_tokens": used.cache_read_tokens,
                "cache_write_tokens": used.cache_write_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        }


class OpenAIChat(OpenAI, Streaming):
    """Chat completions. Streams say what they used if they are asked to."""

    dialect = "openai_chat"
    path = re.compile(r"(/v1)?/chat/completions")
    id_prefix = "chatcmpl-"

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = chat_texts(body.get("messages"))
        choices = body.get("n")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named.get("model") or model_in(body),
            stream=body.get("stream") is True,
            texts=texts,
            counted_tokens=counted(texts),
            choices=choices if isinstance(choices, int) and choices > 0 else 1,
            allowed_tokens=number_in(body, "max_completion_tokens", "max_tokens"),
        )

    def asked_for_usage(self, sale: Sale) -> bool:
        options = sale.request.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def tells(self, sale: Sale) -> bool:
        return sale.tells and (not sale.request.stream or self.asked_for_usage(sale))

    # ------------------------------------------------------------------------------ one body

    def body(self, sale: Sale) -> Mapping[str, Any]:
        body: dict[str, Any] = {
            "id": sale.id,
            "object": "chat.completion",
            "created": CREATED,
            "model": sale.model,
            "choices": [
                {"index": choice, "message": self.message(sale), "finish_reason": self.finish(sale)}
                for choice in range(sale.request.choices)
            ],
        }
        if self.tells(sale):
            body["usage"] = self.report(sale)
        return body

    def message(self, sale: Sale) -> dict[str, Any]:
        if sale.behaviour.tool is None:
            return {"role": "assistant", "content": sale.text}
        return {"role": "assistant", "content": None, "tool_calls": [self.tool_call(sale, sale.text)]}

    @staticmethod
    def finish(sale: Sale) -> str:
        return "tool_calls" if sale.finish == "tool" else sale.finish

    @staticmethod
    def tool_call(sale: Sale, arguments: str, position: int | None = None) -> dict[str, Any]:
        """A whole call of the tool, or a part of it in a stream: only the first names the function."""
        assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
        named = {"id": f"call-{sale.id}", "type": "function"}
        if position is None:
            return {**named, "function": {"name": sale.behaviour.tool[0], "arguments": arguments}}
        if position == 0:
            return {"index": 0, **named, "function": {"name": sale.behaviour.tool[0], "arguments": arguments}}
        return {"index": 0, "function": {"arguments": arguments}}

    # ------------------------------------------------------------------------------ a stream

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:
        delta: dict[str, Any] = {} if position else {"role": "assistant"}
        if sale.behaviour.tool is None:
            delta["content"] = word
        else:
            delta["tool_calls"] = [self.tool_call(sale, word, position)]
        return event(self.chunk(sale, choice, delta))

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            yield event(self.chunk(sale, choice, {}, finish=self.finish(sale)))
        if self.tells(sale):
            yield event({**self.chunk(sale, 0, {}), "choices": [], "usage": self.report(sale)})
        yield b"data: [DONE]\n\n"

    def chunk(
        self, sale: Sale, choice: int, delta: Mapping[str, object], *, finish: str | None = None
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": sale.id,
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": sale.model,
            "choices": [{"index": choice, "delta": delta, "finish_reason": finish}],
            "obfuscation": "x" * (sale.produced % 7),  # real streams are padded to lengths that tell nothing
        }
        if self.asked_for_usage(sale):
            chunk["usage"] = None
        return chunk
