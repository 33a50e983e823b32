"""Ollama: chat and generate, as one JSON object or one per line. They stream unless they are told not to."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import (
    Call,
    Fault,
    Streaming,
    Troubles,
    UnreadableError,
    chat_texts,
    counted,
    dump,
)
from asgi_llm_guard.testing.speech.openai_chat import model_in
from asgi_llm_guard.usage import Usage

__all__ = ["OllamaChat", "OllamaGenerate"]

_WHEN: Final = "2026-01-01T00:00:00.000000Z"


class Ollama(Streaming):
    """What both have in common."""

    stream_type = "application/x-ndjson"
    buckets = frozenset()
    id_prefix = "ollama-"
    broken = b'{"model":\n'
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, None, "too many requests"),
        "quota": (402, None, "the account has used what it may"),
        "overloaded": (503, None, "server busy, please try again"),
        "context": (400, None, "the input length exceeds the context length"),
        "unknown_model": (404, None, "model not found"),
    }

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = self.texts(body)
        options = body.get("options")
        allowed = options.get("num_predict") if isinstance(options, dict) else None
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=model_in(body),
            stream=body.get("stream") is not False,
            texts=texts,
            counted_tokens=counted(texts),
            # A negative number means: as many as it takes.
            allowed_tokens=allowed if isinstance(allowed, int) and allowed >= 0 else None,
        )

    @abstractmethod
    def texts(self, body: Mapping[str, Any]) -> tuple[str, ...]:
        """Of the messages, or of the prompt. Raises `UnreadableError` if there is none."""

    @abstractmethod
    def said(self, sale: Sale, word: str | None) -> dict[str, Any]:
        """The field that carries the answer, or a part of it; `None`: all of it."""

    def usage(self, used: Usage) -> Mapping[str, Any]:
        counts = {"prompt_eval_count": used.input_tokens, "eval_count": used.output_tokens}
        return {name: count for name, count in counts.items() if count != 0}  # zeros are left out

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {**self._line(sale, self.said(sale, None)), **self._end(sale)}

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        last = position == len(sale.words) - 1
        if sale.behaviour.tool is not None:  # a call comes whole, with the last word of its arguments
            return self._encoded(self._line(sale, self.said(sale, None if last else "")))
        return self._encoded(self._line(sale, self.said(sale, word)))

    def closing(self, sale: Sale) -> Iterator[bytes]:
        yield self._encoded({**self._line(sale, self.said(sale, "")), **self._end(sale)})

    def failing(self, sale: Sale) -> bytes:  # noqa: ARG002
        return self._encoded({"error": "the fake provider fails inside the stream"})

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        return {"error": fault.message}, ()

    @staticmethod
    def _encoded(line: Mapping[str, Any]) -> bytes:
        return dump(line) + b"\n"

    @staticmethod
    def _line(sale: Sale, said: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": sale.model, "created_at": _WHEN, **said, "done": False}

    def _end(self, sale: Sale) -> dict[str, Any]:
        end: dict[str, Any] = {
            "done": True,
            "done_reason": "length" if sale.finish == "length" else "stop",
            "total_duration": 5_000_000,
            "load_duration": 1_000_000,
        }
        return {**end, **self.report(sale)} if self.tells(sale) else end


class OllamaChat(Ollama):
    dialect = "ollama_chat"
    path = re.compile(r"/api/chat")

    def texts(self, body: Mapping[str, Any]) -> tuple[str, ...]:
        return chat_texts(body.get("messages"))

    def said(self, sale: Sale, word: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": sale.text if word is None else word}
        if sale.behaviour.tool is not None:
            name, arguments = sale.behaviour.tool
            message["content"] = ""
            if word is None:
                message["tool_calls"] = [{"function": {"name": name, "arguments": arguments}}]
        return {"message": message}


class OllamaGenerate(Ollama):
    dialect = "ollama_generate"
    path = re.compile(r"/api/generate")

    def texts(self, body: Mapping[str, Any]) -> tuple[str, ...]:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise UnreadableError("prompt: expected a string")
        system = body.get("system")
        return (system, prompt) if isinstance(system, str) else (prompt,)

    def said(self, sale: Sale, word: str | None) -> dict[str, Any]:
        return {"response": sale.text if word is None else word}
