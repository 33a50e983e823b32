"""Anthropic's stream of events as OpenAI's stream of chunks, as it passes and in bounded memory."""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.gateway.translate.answers import name_in
from asgi_llm_guard.gateway.translate.counts import openai_counts, openai_tier
from asgi_llm_guard.gateway.translate.faults import BROKEN_OFF, UNREADABLE, as_openai, error_to_openai
from asgi_llm_guard.gateway.translate.reasons import finish_reason
from asgi_llm_guard.gateway.translate.writing import data_event, dump
from asgi_llm_guard.wire.anthropic_usage import Report
from asgi_llm_guard.wire.shape import decode, pick, pick_path
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["EventsToChunks"]

_DONE: Final = b"data: [DONE]\n\n"
_PING: Final = b": ping\n\n"
_STARTS_PIECE: Final = (b'{"type":"content_block_delta"', b'{"type": "content_block_delta"')


class _Text(msgspec.Struct, gc=False):
    type: str
    text: str


class _Piece(msgspec.Struct, gc=False):
    """The event that nearly all are."""

    delta: _Text


_PIECE: Final = msgspec.json.Decoder(_Piece)


class _UnreadableError(Exception):
    """An event that the answer cannot do without is not what it has to be."""


class EventsToChunks:
    """Reads one stream of Anthropic's, chunked anyhow, and writes OpenAI's.

    `created`: Unix time, which Anthropic does not tell. `include_usage`: the client asked for the usage chunk.
    """

    __slots__ = (
        "_begin",
        "_blocks",
        "_created",
        "_id",
        "_include_usage",
        "_kind",
        "_model",
        "_report",
        "_silent",
        "_stop",
        "_tool",
        "ended",
    )

    def __init__(self, *, created: int = 0, include_usage: bool = False) -> None:
        self._blocks = Blocks()
        self._created = created
        self._include_usage = include_usage
        self._report = Report()
        self._id = self._model = ""
        self._begin = b""
        self._kind: object = None
        self._silent = False
        self._tool = -1
        self._stop: object = None
        self.ended = False
        """The last byte of the answer has been written: nothing more is."""

    def feed(self, chunk: bytes) -> bytes:
        """What to send for these bytes, perhaps nothing. Never raises."""
        written = [self._block(block) for block in self._blocks.feed(chunk)]
        return written[0] if len(written) == 1 else b"".join(written)

    def finish(self) -> bytes:
        """The provider's stream is over: what is left to send. An answer that has not come to its end gets an error."""
        written = b"".join([self._block(block) for block in self._blocks.finish()])
        return written if self.ended else written + self._fail(BROKEN_OFF)

    def _block(self, block: Block) -> bytes:
        if self.ended:
            return b""
        data = block.data
        if data is None:
            return self._fail(UNREADABLE) if self._blocks.passed_over else b""
        if data.startswith(_STARTS_PIECE) and self._begin:
            try:
                delta = _PIECE.decode(data).delta
                if delta.type == "text_delta":
                    return self._begin + b'{"content":' + dump(delta.text) + b'},"finish_reason":null}]}\n\n'
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # read by its shape
        if data.strip() == b"[DONE]":  # compatible servers may end so
            return b""
        value = decode(data)
        if not isinstance(value, dict):
            return self._fail(UNREADABLE)
        if value.get("type") is None and isinstance(value.get("error"), dict):
            self.ended = True
            return data_event(value)  # OpenAI's already, as the guard ends a stream that it cuts
        if block.error or value.get("type") == "error":
            self.ended = True
            return data_event(error_to_openai(None, value)[1])
        try:
            return self._event(value)
        except _UnreadableError:
            return self._fail(UNREADABLE)

    def _event(self, value: dict[str, object]) -> bytes:
        kind = value.get("type")
        if kind == "message_start":
            return self._started(value.get("message"))
        if kind == "ping":
            return _PING
        if kind not in (
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ):
            return b""
        if not self._begin:
            raise _UnreadableError
        if kind == "content_block_start":
            return self._opened(value.get("content_block"))
        if kind == "content_block_delta":
            return self._grown(value.get("delta"))
        if kind == "content_block_stop":
            return self._closed()
        if kind == "message_delta":
            self._report.update(value.get("usage"))
            delta = value.get("delta")
            self._stop = delta if pick(delta, "stop_reason") is not None else self._stop
            return b""
        return self._stopped()

    def _started(self, message: object) -> bytes:
        if not isinstance(message, dict) or self._begin:
            raise _UnreadableError
        self._report.update(message.get("usage"), output=False)
        self._id, self._model = name_in(message, "id"), name_in(message, "model")
        head = dump({"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model})
        self._begin = b"data: " + head[:-1] + b',"choices":[{"index":0,"delta":'
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, object]) -> bytes:
        return self._begin + dump(delta) + b',"finish_reason":null}]}\n\n'

    def _opened(self, block: object) -> bytes:
        self._kind = kind = pick(block, "type")
        if kind == "text":
            return self._said("content", pick(block, "text"))
        if kind == "thinking":
            return self._said("reasoning_content", pick(block, "thinking"))
        if kind == "redacted_thinking":
            return self._chunk({"thinking_blocks": [block]})
        if kind != "tool_use":
            return b""
        self._tool += 1
        given = pick(block, "input")
        arguments = dump(given).decode() if given else ""
        self._silent = not arguments
        call = {
            "index": self._tool,
            "id": name_in(block, "id"),
            "type": "function",
            "function": {"name": name_in(block, "name"), "arguments": arguments},
        }
        return self._chunk({"tool_calls": [call]})

    def _grown(self, delta: object) -> bytes:
        kind = pick(delta, "type")
        if kind == "text_delta":
            return self._said("content", pick(delta, "text"))
        if kind == "thinking_delta":
            return self._said("reasoning_content", pick(delta, "thinking"))
        if kind == "signature_delta":
            signed = {"type": "thinking", "thinking": "", "signature": pick(delta, "signature")}
            return self._chunk({"thinking_blocks": [signed]})
        if kind == "input_json_delta" and self._kind == "tool_use":
            piece = pick(delta, "partial_json")
            if not isinstance(piece, str):
                raise _UnreadableError
            return self._argued(piece) if piece else b""
        if not isinstance(kind, str):
            raise _UnreadableError
        return b""

    def _said(self, member: str, text: object) -> bytes:
        if not isinstance(text, str):
            raise _UnreadableError
        return self._chunk({member: text}) if text else b""

    def _argued(self, piece: str) -> bytes:
        self._silent = False
        return self._chunk({"tool_calls": [{"index": self._tool, "function": {"arguments": piece}}]})

    def _closed(self) -> bytes:
        """A call without arguments has none in Anthropic's stream, and `{}` in OpenAI's."""
        silent = self._kind == "tool_use" and self._silent
        self._kind = None
        return self._argued("{}") if silent else b""

    def _stopped(self) -> bytes:
        self.ended = True
        usage = self._report.usage(self._model or None)
        head: dict[str, object] = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            **openai_tier(usage),
        }
        stop = pick(self._stop, "stop_reason")
        why = pick_path(self._stop, "stop_details", "explanation")
        delta = {"refusal": why} if stop == "refusal" and isinstance(why, str) else {}
        choice: dict[str, object] = {"index": 0, "delta": delta, "finish_reason": finish_reason(stop)}
        if stop == "stop_sequence":
            choice["stop_reason"] = pick(self._stop, "stop_sequence")
        written = data_event({**head, "choices": [choice]})
        counts = openai_counts(usage) if self._include_usage else None
        if counts is not None:
            written += data_event({**head, "choices": [], "usage": counts})
        return written + _DONE

    def _fail(self, message: str) -> bytes:
        self.ended = True
        return data_event(as_openai("other", message)[1])
