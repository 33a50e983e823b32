"""Gemini: generateContent, and streamGenerateContent as events or as one JSON array; also behind Vertex."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from asgi_llm_guard.testing.behaviour import Behaviour
from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import (
    EVENT_STREAM,
    Call,
    Fault,
    Streaming,
    Troubles,
    UnreadableError,
    counted,
    dump,
    text_of,
)
from asgi_llm_guard.testing.speech.openai_completions import prompt_tokens
from asgi_llm_guard.testing.speech.openai_media import vector
from asgi_llm_guard.usage import Usage

__all__ = ["GeminiContent", "GeminiCount", "GeminiEmbed"]

_DIMENSIONS: Final = 8

_MODEL: Final = r"/v1\w*/(?:projects/.+/publishers/google/)?models/(?P<model>[^/:]+)"
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def _texts(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the instruction and of each content. Raises `UnreadableError` if there is no content."""
    body = body.get("generateContentRequest", body)
    contents = body.get("contents")
    if not isinstance(contents, list) or not contents or not all(isinstance(content, dict) for content in contents):
        raise UnreadableError("contents: expected a list of at least one content")
    instruction = body.get("systemInstruction", body.get("system_instruction"))
    instructions = [text_of(instruction.get("parts"))] if isinstance(instruction, dict) else []
    return (*instructions, *(text_of(content.get("parts")) for content in contents))


class GeminiContent(Streaming):
    """Every chunk of a stream says what was used so far. Thoughts are counted apart from the answer."""

    dialect = "gemini_content"
    buckets = frozenset({"cache_read", "reasoning"})
    path = re.compile(_MODEL + r":(?P<method>generateContent|streamGenerateContent)")
    id_prefix = "gemini-"
    broken = b'data: {"candidates":\r\n\r\n'
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, None, "You exceeded your quota of tokens per minute."),
        "quota": (402, None, "The billing account of this project is closed."),
        "overloaded": (503, None, "The model is overloaded. Please try again later."),
        "context": (400, None, "The input token count (9000) exceeds the maximum number of tokens allowed (8192)."),
        "unknown_model": (404, None, "There is no such model."),
    }

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = _texts(body)
        config = body.get("generationConfig", body.get("generation_config"))
        config = config if isinstance(config, dict) else {}
        choices, allowed = config.get("candidateCount"), config.get("maxOutputTokens")
        return FakeRequest(
            headers=call.headers,
            body={**body, "alt": call.query.get("alt")},
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named["model"],
            stream=call.named.get("method") == "streamGenerateContent",
            texts=texts,
            counted_tokens=counted(texts),
            choices=choices if isinstance(choices, int) and choices > 0 else 1,
            allowed_tokens=allowed if isinstance(allowed, int) else None,
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        thoughts = used.reasoning_tokens or 0
        said: dict[str, Any] = {
            "promptTokenCount": used.input_tokens,
            "candidatesTokenCount": (used.output_tokens or 0) - thoughts,
            "totalTokenCount": used.total_tokens,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": used.input_tokens}],
        }
        if thoughts:
            said["thoughtsTokenCount"] = thoughts
        if used.cache_read_tokens:
            said["cachedContentTokenCount"] = used.cache_read_tokens
            said["cacheTokensDetails"] = [{"modality": "TEXT", "tokenCount": used.cache_read_tokens}]
        return said

    def body(self, sale: Sale) -> Mapping[str, Any]:
        part = self._call(sale) if sale.behaviour.tool is not None else {"text": sale.text}
        return self._answer(
            sale, [self._candidate(choice, [part], self._finish(sale)) for choice in range(sale.request.choices)]
        )

    # ------------------------------------------------------------------------------ a stream

    def begins(self, sale: Sale) -> str:
        return EVENT_STREAM if self._as_events(sale) else "application/json"

    def opening(self, sale: Sale) -> Iterator[bytes]:
        if not self._as_events(sale):
            yield b"["

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:
        parts: list[dict[str, Any]] = [{"text": word}]
        if sale.behaviour.tool is not None:  # a call comes whole, with the last word of its arguments
            parts = [self._call(sale)] if position == len(sale.words) - 1 else []
        return self._part(sale, self._answer(sale, [self._candidate(choice, parts, None)]))

    def closing(self, sale: Sale) -> Iterator[bytes]:
        for choice in range(sale.request.choices):
            last = self._candidate(choice, [{"text": ""}], self._finish(sale))
            yield self._part(sale, self._answer(sale, [last]))
        if not self._as_events(sale):
            yield b"\n]"

    def failing(self, sale: Sale) -> bytes:
        fault = Fault(status=503, message="the fake provider fails inside the stream")
        begun = b"" if sale.started or self._as_events(sale) else b"["
        return begun + self._part(sale, self.error(fault)[0]) + (b"" if self._as_events(sale) else b"\n]")

    def breaking(self, sale: Sale) -> bytes:
        return self.broken if self._as_events(sale) else b'{"candidates":'

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        status = fault.code or _STATUSES.get(fault.status, "INTERNAL" if fault.status >= 500 else "FAILED_PRECONDITION")
        error: dict[str, Any] = {"code": fault.status, "message": fault.message, "status": status}
        if fault.retry_after is not None:
            error["details"] = [
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{fault.retry_after}s"}
            ]
        return {"error": error}, ()

    @staticmethod
    def _as_events(sale: Sale) -> bool:
        return bool(sale.request.body["alt"] == "sse")

    def _part(self, sale: Sale, data: object) -> bytes:
        if self._as_events(sale):
            return b"data: " + dump(data) + b"\r\n\r\n"
        number, sale.events = sale.events, sale.events + 1
        return (b"\n,\r\n" if number else b"") + dump(data)

    @staticmethod
    def _finish(sale: Sale) -> str:
        return "MAX_TOKENS" if sale.finish == "length" else "STOP"

    @staticmethod
    def _candidate(choice: int, parts: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": choice}
        return candidate if finish is None else {**candidate, "finishReason": finish}

    @staticmethod
    def _call(sale: Sale) -> dict[str, Any]:
        assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
        name, arguments = sale.behaviour.tool
        return {"functionCall": {"id": f"call-{sale.number}", "name": name, "args": arguments}}

    def _answer(self, sale: Sale, candidates: list[dict[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = {"candidates": candidates, "modelVersion": sale.model, "responseId": sale.id}
        if self.tells(sale):
            answer["usageMetadata"] = self.report(sale)
        return answer


class GeminiCount(GeminiContent):
    """How many tokens a prompt has; free."""

    dialect = "gemini_count"
    path = re.compile(_MODEL + r":countTokens")
    free = True

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {"totalTokens": sale.input_tokens}


class GeminiEmbed(GeminiContent):
    """Embeddings of one content, or of several. The answer does not say what was used."""

    dialect = "gemini_embed"
    path = re.compile(_MODEL + r":(?P<method>embedContent|batchEmbedContents)")

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        asked = body.get("requests", [body])
        if not isinstance(asked, list):
            raise UnreadableError("requests: expected a list")
        contents = [one["content"] for one in asked if isinstance(one, dict) and isinstance(one.get("content"), dict)]
        if not contents:
            raise UnreadableError("expected a content, or requests with one each")
        texts = tuple(text_of(content.get("parts")) for content in contents)
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named["model"],
            stream=False,
            texts=texts,
            counted_tokens=prompt_tokens(list(texts)),
        )

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:  # noqa: ARG002
        return (), "stop"

    def consumed(self, sale: Sale) -> Usage:
        return Usage(input_tokens=sale.input_tokens, output_tokens=0, model=sale.model)

    def tells(self, sale: Sale) -> bool:  # noqa: ARG002
        return False

    def body(self, sale: Sale) -> Mapping[str, Any]:
        embeddings = [{"values": vector(text, _DIMENSIONS)} for text in sale.request.texts]
        return {"embeddings": embeddings} if "requests" in sale.request.body else {"embedding": embeddings[0]}
