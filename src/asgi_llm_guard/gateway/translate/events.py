"""OpenAI's stream of chunks as Anthropic's stream of events, as it passes and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from asgi_llm_guard.gateway.translate.answers import name_in, texts_of, thoughts_of
from asgi_llm_guard.gateway.translate.counts import NOTHING_KNOWN, anthropic_counts, anthropic_tier
from asgi_llm_guard.gateway.translate.faults import BROKEN_OFF, UNREADABLE, as_anthropic, error_to_anthropic
from asgi_llm_guard.gateway.translate.reasons import stop_reason
from asgi_llm_guard.gateway.translate.writing import dump, typed_event
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.openai_errors import error_of
from asgi_llm_guard.wire.openai_usage import completion_usage
from asgi_llm_guard.wire.shape import decode, items, pick, pick_path
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["ChunksToEvents"]

_PING: Final = typed_event({"type": "ping"})
_EMPTY: Final[dict[str, dict[str, object]]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
_INTERLEAVED: Final = "the provider went back to a tool call that another one had followed, which cannot be told"


class _Delta(msgspec.Struct, gc=False):
    content: str
    # The rest is read by shape.
    refusal: None = None
    tool_calls: None = None
    reasoning: None = None
    reasoning_content: None = None
    thinking_blocks: None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta
    index: int = 0
    finish_reason: None = None


class _Chunk(msgspec.Struct, gc=False):
    """The chunk that nearly all are."""

    choices: tuple[_Choice]
    usage: None = None
    error: None = None
    x_groq: None = None


_CHUNK: Final = msgspec.json.Decoder(_Chunk)


class _Call(NamedTuple):
    """The tool call that is being told."""

    place: object
    id: str


class _UnreadableError(Exception):
    """A chunk that the answer cannot do without is not what it has to be."""


class ChunksToEvents:
    """Reads one stream of OpenAI's, or of a server like it, chunked anyhow, and writes Anthropic's.

    One choice is read. A tool call whose arguments come after another one has begun ends the answer with an error.
    """

    __slots__ = (
        "_block",
        "_blocks",
        "_call",
        "_called",
        "_finish",
        "_grow",
        "_next",
        "_refused",
        "_sequence",
        "_started",
        "_tier",
        "_usage",
        "ended",
    )

    def __init__(self) -> None:
        self._blocks = Blocks()
        self._block: str | None = None
        self._grow = b""
        self._next = 0
        self._call: _Call | None = None
        self._called = self._refused = self._started = False
        self._finish: object = None
        self._sequence: str | None = None
        self._usage: Usage | None = None
        self._tier = ""
        self.ended = False
        """The last byte of the answer has been written: nothing more is."""

    def feed(self, chunk: bytes) -> bytes:
        """What to send for these bytes, perhaps nothing. Never raises."""
        written = [self._read(block) for block in self._blocks.feed(chunk)]
        return written[0] if len(written) == 1 else b"".join(written)

    def finish(self) -> bytes:
        """The provider's stream is over: what is left to send. An answer that has not come to its end gets an error."""
        written = b"".join([self._read(block) for block in self._blocks.finish()])
        if self.ended:
            return written
        return written + (self._fail(BROKEN_OFF) if self._finish is None else self._stopped())

    def _read(self, block: Block) -> bytes:
        if self.ended:
            return b""
        data = block.data
        if data is None:
            if self._blocks.passed_over:
                return self._fail(UNREADABLE)
            return _PING if self._started and block.raw.startswith(b":") else b""  # servers keep a connection alive
        if self._block == "text":
            try:
                choice = _CHUNK.decode(data).choices[0]
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # read by its shape
            else:
                text = choice.delta.content
                return self._grow + dump(text) + b"}}\n\n" if text and choice.index == 0 else b""
        if data.strip() == b"[DONE]":
            return self._stopped() if self._started else self._fail(BROKEN_OFF)
        value = decode(data)
        error = error_of(value)
        if isinstance(value, dict) and value.get("type") == "error" and isinstance(value.get("error"), dict):
            self.ended = True
            return typed_event(value)  # Anthropic's already, as the guard ends a stream that it cuts
        if block.error or error is not None or pick(value, "object") == "error":
            self.ended = True
            return typed_event(error_to_anthropic(None, value)[1])
        if not isinstance(value, dict):
            return self._fail(UNREADABLE)
        try:
            return b"".join(self._chunk(value))
        except _UnreadableError as problem:
            return self._fail(str(problem) or UNREADABLE)

    def _chunk(self, value: dict[str, object]) -> Iterator[bytes]:
        # As metering takes them: the last report counts, and Groq has its own place for one.
        reported = completion_usage(value.get("usage")) or completion_usage(pick_path(value, "x_groq", "usage"))
        self._usage = reported or self._usage
        self._tier = name_in(value, "service_tier") or self._tier
        for choice in items(value.get("choices")):
            index = pick(choice, "index")
            if index not in (None, 0):
                continue
            if not self._started:
                yield self._start(value)
            delta = pick(choice, "delta")
            if delta is None:
                delta = pick(choice, "message")
            if delta is not None and not isinstance(delta, dict):
                raise _UnreadableError
            yield from self._delta(delta or {})
            finish = pick(choice, "finish_reason")
            if finish == "error":
                raise _UnreadableError
            self._finish = finish if isinstance(finish, str) else self._finish
            sequence = pick(choice, "stop_reason")
            self._sequence = sequence if isinstance(sequence, str) else self._sequence

    def _start(self, value: dict[str, object]) -> bytes:
        self._started = True
        message: dict[str, object] = {
            "id": name_in(value, "id"),
            "type": "message",
            "role": "assistant",
            "model": name_in(value, "model"),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": NOTHING_KNOWN,
        }
        return typed_event({"type": "message_start", "message": message})

    def _delta(self, delta: dict[str, object]) -> Iterator[bytes]:
        for thought in thoughts_of(delta):
            yield self._write("thinking", thought)
        for signed in items(delta.get("thinking_blocks")):
            signature = pick(signed, "signature")
            if self._block == "thinking" and isinstance(signature, str) and signature:
                yield self._event({"type": "signature_delta", "signature": signature})
        for text in texts_of(delta):
            yield self._write("text", text)
        refusal = delta.get("refusal")
        if isinstance(refusal, str):
            self._refused = True
            yield self._write("text", refusal)
        for call in items(delta.get("tool_calls")):
            yield self._calls(call)

    def _write(self, kind: str, text: str) -> bytes:
        if not text:
            return b""
        opening = b"" if self._block == kind else self._open(kind, _EMPTY[kind])
        return opening + self._grow + dump(text) + b"}}\n\n"

    def _calls(self, call: object) -> bytes:
        function = pick(call, "function")
        index, identifier = pick(call, "index"), name_in(call, "id")
        name, piece = name_in(function, "name"), pick(function, "arguments")
        if piece is not None and not isinstance(piece, str):
            raise _UnreadableError
        now = self._call
        # Some servers give all calls the same index, and repeat the id of a call with each piece of it.
        begins = now is None or (identifier != now.id if identifier else index != now.place)
        if begins and not name:
            raise _UnreadableError(_INTERLEAVED if self._called else "")
        opening = b""
        if begins:
            self._called = True
            block: dict[str, object] = {
                "type": "tool_use",
                "id": identifier or f"call_{self._next}",
                "name": name,
                "input": {},
            }
            opening = self._open("tool_use", block)
            self._call = _Call(index, identifier)
        elif self._block != "tool_use":
            raise _UnreadableError(_INTERLEAVED)
        return opening + self._grow + dump(piece) + b"}}\n\n" if piece else opening

    def _open(self, kind: str, block: dict[str, object]) -> bytes:
        closing = self._close()
        index = self._next
        self._next += 1
        self._block = kind
        member = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}[kind]
        change = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}[kind]
        self._grow = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
            f'"delta":{{"type":"{change}","{member}":'
        ).encode()
        return closing + typed_event({"type": "content_block_start", "index": index, "content_block": block})

    def _close(self) -> bytes:
        if self._block is None:
            return b""
        self._block = None
        return typed_event({"type": "content_block_stop", "index": self._next - 1})

    def _event(self, delta: dict[str, object]) -> bytes:
        return typed_event({"type": "content_block_delta", "index": self._next - 1, "delta": delta})

    def _stopped(self) -> bytes:
        self.ended = True
        stop = stop_reason(self._finish, called=self._called, refused=self._refused, sequence=self._sequence)
        counts = anthropic_counts(self._usage)
        if self._usage is not None:
            counts |= anthropic_tier(self._tier)
        delta = {"stop_reason": stop, "stop_sequence": self._sequence if stop == "stop_sequence" else None}
        ending = typed_event({"type": "message_delta", "delta": delta, "usage": counts})
        return self._close() + ending + typed_event({"type": "message_stop"})

    def _fail(self, message: str) -> bytes:
        self.ended = True
        return typed_event(as_anthropic("other", message)[1])
