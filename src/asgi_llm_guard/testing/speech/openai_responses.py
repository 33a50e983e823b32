"""OpenAI Responses: one JSON object, or numbered events with names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.base import CREATED, Call, Streaming, UnreadableError, counted, text_of, typed_event
from asgi_llm_guard.testing.speech.openai_chat import OpenAI, model_in, number_in
from asgi_llm_guard.usage import Usage

__all__ = ["OpenAIResponses", "OpenAIResponsesCount"]


def _texts(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the instructions and of each item of the input. Raises `UnreadableError` if there is no input."""
    asked = body.get("input")
    if isinstance(asked, str):
        items: list[str] = [asked]
    elif isinstance(asked, list) and asked:
        items = [_item(item) for item in asked if isinstance(item, dict)]
    else:
        raise UnreadableError("input: expected a text, or a list of items")
    instructions = body.get("instructions")
    return (*([instructions] if isinstance(instructions, str) else []), *items)


def _item(item: Mapping[str, Any]) -> str:
    return text_of(item.get("content", item.get("output")))


class OpenAIResponses(OpenAI, Streaming):
    dialect = "openai_responses"
    buckets = Streaming.buckets
    path = re.compile(r"(?:/openai)?(?:/v1)?/responses")
    id_prefix = "resp_"
    broken = b'event: response.created\ndata: {"type":\n\n'

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = _texts(body)
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
            allowed_tokens=number_in(body, "max_output_tokens"),
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        written, kept = used.cache_write_tokens or 0, used.cache_write_1h_tokens or 0
        return {
            "input_tokens": used.input_tokens,
            "input_tokens_details": {
                "cached_tokens": used.cache_read_tokens,
                "cache_write_tokens": written,
                "cache_write_tokens_details": {"ttl_30m_tokens": written - kept, "ttl_12h_tokens": kept},
            },
            "output_tokens": used.output_tokens,
            "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
            "total_tokens": used.total_tokens,
        }

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return self._response(sale, self._end(sale), [self._item(sale, "completed", sale.text)])

    def opening(self, sale: Sale) -> Iterator[bytes]:
        yield self._event(sale, "response.created", response=self._response(sale, "in_progress", []))
        yield self._event(sale, "response.in_progress", response=self._response(sale, "in_progress", []))
        item = self._item(sale, "in_progress", None)
        yield self._event(sale, "response.output_item.added", output_index=0, item=item)
        if sale.behaviour.tool is None:
            part = {"type": "output_text", "text": "", "annotations": []}
            yield self._event(sale, "response.content_part.added", **self._place(sale), content_index=0, part=part)

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        if sale.behaviour.tool is not None:
            return self._event(sale, "response.function_call_arguments.delta", **self._place(sale), delta=word)
        return self._event(
            sale, "response.output_text.delta", **self._place(sale), content_index=0, delta=word, logprobs=[]
        )

    def closing(self, sale: Sale) -> Iterator[bytes]:
        place, text = self._place(sale), sale.text
        if sale.behaviour.tool is not None:
            name = sale.behaviour.tool[0]
            yield self._event(sale, "response.function_call_arguments.done", **place, name=name, arguments=text)
        else:
            part = {"type": "output_text", "text": text, "annotations": []}
            yield self._event(sale, "response.output_text.done", **place, content_index=0, text=text, logprobs=[])
            yield self._event(sale, "response.content_part.done", **place, content_index=0, part=part)
        item = self._item(sale, "completed", text)
        yield self._event(sale, "response.output_item.done", output_index=0, item=item)
        end = self._end(sale)
        yield self._event(sale, f"response.{end}", response=self._response(sale, end, [item]))

    def failing(self, sale: Sale) -> bytes:
        response = self._response(sale, "failed", [])
        error = {"code": sale.behaviour.code or "server_error", "message": "the fake provider fails inside the stream"}
        return self._event(sale, "response.failed", response={**response, "error": error, "usage": None})

    @staticmethod
    def _end(sale: Sale) -> str:
        return "incomplete" if sale.finish == "length" else "completed"

    @staticmethod
    def _place(sale: Sale) -> dict[str, Any]:
        return {"item_id": f"item_{sale.number}", "output_index": 0}

    @staticmethod
    def _event(sale: Sale, name: str, /, **fields: object) -> bytes:
        number, sale.events = sale.events, sale.events + 1
        return typed_event(name, {"type": name, "sequence_number": number, **fields})

    @staticmethod
    def _item(sale: Sale, status: str, text: str | None) -> dict[str, Any]:
        """The message or the call of a function; `None`: nothing of it is there yet."""
        if sale.behaviour.tool is not None:
            return {
                "id": f"item_{sale.number}",
                "type": "function_call",
                "status": status,
                "call_id": f"call_{sale.number}",
                "name": sale.behaviour.tool[0],
                "arguments": text or "",
            }
        parts = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
        return {
            "id": f"item_{sale.number}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": parts,
        }

    def _response(self, sale: Sale, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        ended = status in {"completed", "incomplete"}
        return {
            "id": sale.id,
            "object": "response",
            "created_at": CREATED,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": sale.request.body.get("instructions"),
            "metadata": {},
            "model": sale.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": sale.request.body.get("tools", []),
            "top_p": 1.0,
            "usage": self.report(sale) if ended and self.tells(sale) else None,
        }


class OpenAIResponsesCount(OpenAIResponses):
    """How many tokens an input has; free."""

    dialect = "openai_responses_count"
    path = re.compile(r"(?:/openai)?(?:/v1)?/responses/input_tokens")
    free = True

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": sale.input_tokens}
