"""Cohere: chat, embed and rerank of version 2. Numbers are written with a decimal point."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from asgi_llm_guard.testing.behaviour import Behaviour
from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import (
    Call,
    Fault,
    Speech,
    Streaming,
    Troubles,
    UnreadableError,
    chat_texts,
    counted,
    typed_event,
)
from asgi_llm_guard.testing.speech.openai_chat import model_in, number_in
from asgi_llm_guard.testing.speech.openai_completions import prompt_tokens
from asgi_llm_guard.testing.speech.openai_media import vector
from asgi_llm_guard.usage import Usage

__all__ = ["CohereChat", "CohereEmbed", "CohereRerank"]

_DIMENSIONS: Final = 8
_DOCUMENTS_PER_UNIT: Final = 100


class Cohere(Speech):
    """What Cohere's operations have in common."""

    id_header = "x-debug-trace-id"
    id_prefix = "cohere-"
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, None, "You are past the limit of requests per minute."),
        "quota": (402, None, "The billing limit of this API key is reached."),
        "overloaded": (503, None, "The service is overloaded."),
        "context": (400, None, "too many tokens: the size limit is exceeded by 808 tokens."),
        "unknown_model": (404, None, "There is no such model."),
    }

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        return {"id": "fake-error", "message": fault.message}, ()


class CohereChat(Cohere, Streaming):
    dialect = "cohere_chat"
    buckets = frozenset({"cache_read"})
    path = re.compile(r"/v2/chat")
    broken = b'event: content-delta\ndata: {"type":\n\n'

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = chat_texts(body.get("messages"))
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
            allowed_tokens=number_in(body, "max_tokens"),
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        counts = {
            "input_tokens": _floating(used.input_tokens),
            "output_tokens": _floating(used.output_tokens),
        }
        return {"billed_units": counts, "tokens": counts, "cached_tokens": _floating(used.cache_read_tokens)}

    def body(self, sale: Sale) -> Mapping[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": sale.text}]}
        if sale.behaviour.tool is not None:
            plan = "I will use a tool."
            message = {"role": "assistant", "tool_plan": plan, "tool_calls": [self._tool(sale, sale.text)]}
        body = {"id": sale.id, "finish_reason": self._finish(sale), "message": message}
        return {**body, "usage": self.report(sale)} if self.tells(sale) else body

    def opening(self, sale: Sale) -> Iterator[bytes]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": [],
            "tool_plan": "",
            "tool_calls": [],
            "citations": [],
        }
        yield _event("message-start", id=sale.id, delta={"message": message})
        if sale.behaviour.tool is None:
            yield _event("content-start", index=0, delta={"message": {"content": {"type": "text", "text": ""}}})
        else:
            yield _event("tool-plan-delta", delta={"message": {"tool_plan": "I will use a tool."}})
            yield _event("tool-call-start", index=0, delta={"message": {"tool_calls": self._tool(sale, "")}})

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        if sale.behaviour.tool is None:
            return _event("content-delta", index=0, delta={"message": {"content": {"text": word}}})
        calls = {"tool_calls": {"function": {"arguments": word}}}
        return _event("tool-call-delta", index=0, delta={"message": calls})

    def closing(self, sale: Sale) -> Iterator[bytes]:
        yield _event("content-end" if sale.behaviour.tool is None else "tool-call-end", index=0)
        delta: dict[str, Any] = {"finish_reason": self._finish(sale)}
        if self.tells(sale):
            delta["usage"] = self.report(sale)
        yield _event("message-end", delta=delta)
        yield b"data: [DONE]\n\n"

    def failing(self, sale: Sale) -> bytes:  # noqa: ARG002
        delta = {"finish_reason": "ERROR", "error": "the fake provider fails inside the stream"}
        return _event("message-end", delta=delta)

    @staticmethod
    def _finish(sale: Sale) -> str:
        return {"tool": "TOOL_CALL", "length": "MAX_TOKENS"}.get(sale.finish, "COMPLETE")

    @staticmethod
    def _tool(sale: Sale, arguments: str) -> dict[str, Any]:
        assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
        function = {"name": sale.behaviour.tool[0], "arguments": arguments}
        return {"id": f"call-{sale.number}", "type": "function", "function": function}


class CohereEmbed(Cohere):
    dialect = "cohere_embed"
    path = re.compile(r"/v2/embed")

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = body.get("texts")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UnreadableError("texts: expected a list of at least one text")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=model_in(body),
            stream=False,
            texts=tuple(texts),
            counted_tokens=prompt_tokens(texts),
        )

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:  # noqa: ARG002
        return (), "stop"

    def consumed(self, sale: Sale) -> Usage:
        return Usage(input_tokens=sale.input_tokens, output_tokens=0, model=sale.model)

    def usage(self, used: Usage) -> Mapping[str, Any]:
        return {"billed_units": {"input_tokens": _floating(used.input_tokens)}}

    def body(self, sale: Sale) -> Mapping[str, Any]:
        texts = sale.request.texts
        body = {
            "id": sale.id,
            "response_type": "embeddings_by_type",
            "texts": texts,
            "embeddings": {"float": [vector(text, _DIMENSIONS) for text in texts]},
        }
        version: dict[str, Any] = {"api_version": {"version": "2"}}
        return {**body, "meta": {**version, **self.report(sale)} if self.tells(sale) else version}


class CohereRerank(Cohere):
    """Billed by the search: one unit for up to a hundred documents."""

    dialect = "cohere_rerank"
    path = re.compile(r"/v2/rerank")

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        query, documents = body.get("query"), body.get("documents")
        if not isinstance(query, str) or not isinstance(documents, list) or not documents:
            raise UnreadableError("expected a query and a list of documents")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=model_in(body),
            stream=False,
            texts=(query, *(str(document) for document in documents)),
            counted_tokens=0,
        )

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:  # noqa: ARG002
        return (), "stop"

    def consumed(self, sale: Sale) -> Usage:
        documents = len(sale.request.texts) - 1
        return Usage(search_units=-(-documents // _DOCUMENTS_PER_UNIT), model=sale.model)

    def usage(self, used: Usage) -> Mapping[str, Any]:
        return {"billed_units": {"search_units": _floating(used.search_units)}}

    def body(self, sale: Sale) -> Mapping[str, Any]:
        count = len(sale.request.texts) - 1
        shown = min(count, number_in(sale.request.body, "top_n") or count)
        results = [{"index": index, "relevance_score": 1 / (index + 2)} for index in range(shown)]
        version: dict[str, Any] = {"api_version": {"version": "2"}}
        meta = {**version, **self.report(sale)} if self.tells(sale) else version
        return {"id": sale.id, "results": results, "meta": meta}


def _floating(count: int | None) -> float | None:
    return None if count is None else float(count)


def _event(name: str, **fields: object) -> bytes:
    return typed_event(name, {"type": name, **fields})
