"""Those who speak OpenAI chat completions with an accent: Azure, Gemini, Groq, OpenRouter, vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from asgi_llm_guard.testing.sale import Sale
from asgi_llm_guard.testing.speech.base import CREATED, NOWHERE, Fault, Troubles, event
from asgi_llm_guard.testing.speech.openai_chat import OpenAIChat
from asgi_llm_guard.usage import Usage

__all__ = ["AzureChat", "GeminiCompatibleChat", "GroqChat", "OpenRouterChat", "VllmChat"]

_SAFE = {"hate": {"filtered": False, "severity": "safe"}}


class AzureChat(OpenAIChat):
    """A deployment in the path stands for a model. The first event of a stream has no choices and no model."""

    dialect = "azure_chat"
    path = re.compile(r"/openai/(?:deployments/(?P<model>[^/]+)|v1)/chat/completions")
    id_header = "apim-request-id"

    def body(self, sale: Sale) -> Mapping[str, Any]:
        body = super().body(sale)
        choices = [{**choice, "content_filter_results": _SAFE} for choice in body["choices"]]
        return {
            **body,
            "choices": choices,
            "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": _SAFE}],
        }

    def opening(self, sale: Sale) -> Iterator[bytes]:
        chunk = self.chunk(sale, 0, {})
        results = [{"prompt_index": 0, "content_filter_results": _SAFE}]
        yield event({**chunk, "id": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": results})


class GroqChat(OpenAIChat):
    """Says what it used in an object of its own as well, asked or not."""

    dialect = "groq_chat"
    path = NOWHERE
    shared_path = re.compile(r"/openai/v1/chat/completions|(/v1)?/chat/completions")
    platform = "groq"

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {**super().body(sale), "service_tier": "on_demand", "x_groq": {"id": f"req-{sale.id}"}}

    def tells(self, sale: Sale) -> bool:
        return sale.tells

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            chunk = self.chunk(sale, choice, {}, finish=self.finish(sale))
            if sale.tells and choice == sale.request.choices - 1:
                chunk["x_groq"] = {"id": f"req-{sale.id}", "usage": self.report(sale)}
            yield event(chunk)
        if sale.tells and self.asked_for_usage(sale):
            yield event({**self.chunk(sale, 0, {}), "choices": [], "usage": self.report(sale)})
        yield b"data: [DONE]\n\n"


class OpenRouterChat(OpenAIChat):
    """Says what it used in the last chunk that has choices, asked or not. Sends comments while it waits."""

    dialect = "openrouter_chat"
    path = re.compile(r"/api/v1/chat/completions")
    shared_path = OpenAIChat.path
    platform = "openrouter"
    troubles: ClassVar[Troubles] = {
        **OpenAIChat.troubles,
        "quota": (402, "openrouter_credits", "This account has no credits left."),
        "context": (
            400,
            None,
            "This endpoint's maximum context length is 8192 tokens. However, you requested about 9000",
        ),
    }
    id_prefix = "gen-"

    def tells(self, sale: Sale) -> bool:
        return sale.tells

    def opening(self, sale: Sale) -> Iterator[bytes]:  # noqa: ARG002 - the same for every call
        yield b": OPENROUTER PROCESSING\n\n"

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            chunk = self.chunk(sale, choice, {"content": ""}, finish=self.finish(sale))
            if sale.tells and choice == sale.request.choices - 1:
                chunk["usage"] = self.report(sale)
            yield event(chunk)
        yield b"data: [DONE]\n\n"

    def failing(self, sale: Sale) -> bytes:
        error = {"code": 502, "message": "the fake provider fails inside the stream"}
        return event({**self.chunk(sale, 0, {"content": ""}, finish="error"), "error": error})

    def error_body(self, fault: Fault) -> dict[str, object]:
        return {"error": {"code": fault.status, "message": fault.message, "metadata": {"limit_source": fault.code}}}


class VllmChat(OpenAIChat):
    """Writes the status into errors as a number. Says in every chunk what it used so far, if asked to."""

    dialect = "vllm_chat"
    path = NOWHERE
    shared_path = OpenAIChat.path
    platform = "vllm"

    def chunk(
        self, sale: Sale, choice: int, delta: Mapping[str, object], *, finish: str | None = None
    ) -> dict[str, Any]:
        chunk = super().chunk(sale, choice, delta, finish=finish)
        del chunk["obfuscation"]
        options = sale.request.body.get("stream_options")
        if sale.tells and isinstance(options, dict) and options.get("continuous_usage_stats") is True:
            chunk["usage"] = self.report(sale)
        return chunk

    def error_body(self, fault: Fault) -> dict[str, object]:
        kind = "BadRequestError" if fault.status < 500 else "InternalServerError"
        return {"error": {"message": fault.message, "type": kind, "param": None, "code": fault.status}}


class GeminiCompatibleChat(OpenAIChat):
    """Gemini behind OpenAI's paths: reasoning is in the total alone, and errors come in a list."""

    dialect = "gemini_chat"
    buckets = frozenset({"cache_read", "reasoning"})
    path = re.compile(
        r"/v1(?:beta|alpha)?/(?:projects/.+/endpoints/)?openapi/chat/completions|/v1beta/openai/chat/completions"
    )
    id_header = ""

    def tells(self, sale: Sale) -> bool:
        return sale.tells

    def usage(self, used: Usage) -> Mapping[str, Any]:
        reasoning = used.reasoning_tokens or 0
        return {
            "prompt_tokens": used.input_tokens,
            "completion_tokens": (used.output_tokens or 0) - reasoning,
            "total_tokens": used.total_tokens,
            "prompt_tokens_details": {"cached_tokens": used.cache_read_tokens},
        }

    def chunk(
        self, sale: Sale, choice: int, delta: Mapping[str, object], *, finish: str | None = None
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": sale.id,
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": sale.model,
            "choices": [{"index": choice, "delta": delta, "finish_reason": finish}],
        }
        if sale.tells:
            chunk["usage"] = self.report(sale)
        return chunk

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            yield event(self.chunk(sale, choice, {}, finish=self.finish(sale)))
        yield b"data: [DONE]\n\n"

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        return [{"error": {"code": fault.status, "message": fault.message, "status": fault.code}}], ()
