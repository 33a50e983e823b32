"""Answers and pieces of answers as the gateway gives them: OpenAI's, whoever the provider is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.gateway.translate.answers import texts_of, thoughts_of
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.openai_errors import error_of
from asgi_llm_guard.wire.openai_usage import completion_usage
from asgi_llm_guard.wire.shape import decode, items, name_of, pick, pick_path
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["Chunk", "ChunkReader", "Completion", "Timings", "ToolCall"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool that the model wants, or the next piece of one."""

    index: int = 0
    """Which call of its answer it is. Pieces with the same index are of the same call."""
    id: str = ""
    """Empty in pieces after the first."""
    name: str = ""
    """Empty in pieces after the first."""
    arguments: str = ""
    """JSON as the model wrote it, which may not be valid; in a piece, a part of it."""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """How long the provider took, in milliseconds from the sending of the request. `None`: not seen."""

    connected_ms: float | None = None
    """Until the head of the response."""
    first_ms: float | None = None
    """Until its first bytes."""
    total_ms: float | None = None
    """Until its end."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer: its first choice, which is the only one unless more were asked for."""

    raw: dict[str, Any]
    """OpenAI's chat completion, all of it."""
    text: str = ""
    """Empty beside tool calls."""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    """`stop`, `length`, `tool_calls` or `content_filter`; servers have more."""
    refusal: str | None = None
    """The model's own words for why it does not answer."""
    reasoning: str = ""
    """What the model thought, where it shows it."""
    usage: Usage | None = None
    """`None`: not reported."""
    model: str | None = None
    """The model that answered."""
    deployment: str | None = None
    timings: Timings | None = None

    @classmethod
    def of(
        cls, raw: Mapping[str, Any] | bytes, *, deployment: str | None = None, timings: Timings | None = None
    ) -> Completion:
        """From a chat completion of OpenAI, or its JSON.

        Raises:
            ValueError: it is none.
        """
        value = _object(raw)
        choice = next(iter(items(value.get("choices"))), None)
        message = pick(choice, "message")
        if not isinstance(message, dict):
            raise ValueError("expected a chat completion with a choice that has a message")  # noqa: TRY004
        return cls(
            raw=value,
            text="".join(texts_of(message)),
            tool_calls=_calls(message),
            finish_reason=_text_or_none(pick(choice, "finish_reason")),
            refusal=_text_or_none(message.get("refusal")),
            reasoning="".join(thoughts_of(message)),
            usage=_usage(value),
            model=name_of(value.get("model")),
            deployment=deployment,
            timings=timings,
        )


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer: what it adds to the first choice."""

    raw: dict[str, Any]
    """OpenAI's chunk, all of it."""
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    """In the piece that ends the choice only."""
    refusal: str | None = None
    reasoning: str = ""
    usage: Usage | None = None
    """Of the whole answer, in a piece that reports it."""
    model: str | None = None
    deployment: str | None = None
    timings: Timings | None = None
    error: dict[str, Any] | None = None
    """The error that ends the stream, as OpenAI has it; everything else is then empty."""

    @classmethod
    def of(
        cls, raw: Mapping[str, Any] | bytes, *, deployment: str | None = None, timings: Timings | None = None
    ) -> Chunk:
        """From a chunk of OpenAI's stream, or its JSON. Choices other than the first are in `raw` only.

        Raises:
            ValueError: it is none.
        """
        value = _object(raw)
        error = error_of(value)
        if error is not None:
            told = error if isinstance(error, dict) else {"message": str(error)}
            return cls(raw=value, error=told, deployment=deployment, timings=timings)
        if not isinstance(value.get("choices"), list):
            raise ValueError("expected a chunk with choices, or an error")  # noqa: TRY004
        choice = next((each for each in items(value["choices"]) if pick(each, "index") in (None, 0)), None)
        delta = pick(choice, "delta")
        return cls(
            raw=value,
            text="".join(texts_of(delta)),
            tool_calls=_calls(delta),
            finish_reason=_text_or_none(pick(choice, "finish_reason")),
            refusal=_text_or_none(pick(delta, "refusal")),
            reasoning="".join(thoughts_of(delta)),
            usage=_usage(value),
            model=name_of(value.get("model")),
            deployment=deployment,
            timings=timings,
        )


_BROKEN: Final[dict[str, Any]] = {
    "error": {
        "message": "the provider sent something that could not be read",
        "type": "server_error",
        "param": None,
        "code": None,
    }
}


class ChunkReader:
    """Reads the chunks of OpenAI's stream from its bytes, chunked anyhow, in bounded memory.

    What cannot be read gives a chunk with an error, and is the last.
    """

    __slots__ = ("_blocks", "_deployment", "done", "ended")

    def __init__(self, *, deployment: str | None = None) -> None:
        self._blocks = Blocks()
        self._deployment = deployment
        self.done = False
        """The stream has said that it is complete."""
        self.ended = False
        """It is complete, or has told an error: nothing more is read."""

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks that these bytes complete. Never raises."""
        return self._chunks(self._blocks.feed(data))

    def finish(self) -> list[Chunk]:
        """The chunks that were not complete before the end of the stream."""
        return self._chunks(self._blocks.finish())

    def _chunks(self, blocks: list[Block]) -> list[Chunk]:
        chunks = []
        for block in blocks:
            if self.ended:
                break
            if block.data is None:
                if self._blocks.passed_over:
                    chunks.append(self._broken())
            elif block.data.strip() == b"[DONE]":
                self.done = self.ended = True
            else:
                try:
                    chunk = Chunk.of(block.data, deployment=self._deployment)
                except ValueError:
                    chunk = self._broken()
                self.ended = chunk.error is not None
                chunks.append(chunk)
        return chunks

    def _broken(self) -> Chunk:
        self.ended = True
        return Chunk.of(_BROKEN, deployment=self._deployment)


def _object(raw: Mapping[str, Any] | bytes) -> dict[str, Any]:
    value = decode(raw) if isinstance(raw, bytes) else raw
    if not isinstance(value, Mapping):
        raise ValueError("expected a JSON object")  # noqa: TRY004 - of bytes, it is their value that is wrong
    return dict(value)


def _usage(value: dict[str, Any]) -> Usage | None:
    usage = completion_usage(value.get("usage")) or completion_usage(pick_path(value, "x_groq", "usage"))
    if usage is None:
        return None
    return msgspec.structs.replace(
        usage, model=name_of(value.get("model")), service_tier=name_of(value.get("service_tier"))
    )


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _calls(message: object) -> tuple[ToolCall, ...]:
    calls = []
    for place, call in enumerate(items(pick(message, "tool_calls"))):
        index, function = pick(call, "index"), pick(call, "function")
        calls.append(
            ToolCall(
                index=index if type(index) is int and index >= 0 else place,
                id=name_of(pick(call, "id")) or "",
                name=name_of(pick(function, "name")) or "",
                arguments=_text_or_none(pick(function, "arguments")) or "",
            )
        )
    return tuple(calls)
