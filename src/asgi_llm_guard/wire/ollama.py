"""Ollama's own API: chat, text and embeddings of models that run on one's own machines.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md, and the types of ollama 0.6 for Python (2026-11).
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.faults import is_overflow, kind_of_status, status_error
from asgi_llm_guard.wire.items import Items
from asgi_llm_guard.wire.lines import Lines
from asgi_llm_guard.wire.meters import Streamed, Whole
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import (
    LONGEST_NAME,
    MOST_TOKENS,
    count_of,
    decode,
    items,
    name_of,
    path_parts,
    pick,
    pick_path,
    text_length,
)
from asgi_llm_guard.wire.sse import Block

__all__ = ["Ollama"]

_WRITES: Final = frozenset({"chat", "generate"})
_EMBEDS: Final = frozenset({"embed", "embeddings"})
_UNLIMITED: Final = -2  # until the context is full; -1: without an end


class Ollama:
    """The dialect `ollama`: POST to `/api/chat`, `/api/generate`, `/api/embed` and the older `/api/embeddings`."""

    __slots__ = ()

    name: Final = "ollama"
    provider: Final = "ollama"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - it runs anywhere
        """Whether `path` ends in `api` and one of what is recognised."""
        parts = path_parts(path)[-2:]
        return len(parts) == 2 and parts[0] == "api" and (parts[1] in _WRITES or parts[1] in _EMBEDS)

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. It streams unless it says otherwise; `num_predict` of -1, -2 or 0 is no limit.

        Raises:
            BodyError: `model` is missing, or a value read here is malformed.
        """
        model = view.text("model", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "model: required, got none", "model")
        if path_parts(path)[-1:] and path_parts(path)[-1] in _EMBEDS:
            return Ask(model=model, max_output_tokens=0, limits_output=False)
        limit = _limit(view)
        return Ask(
            model=model,
            max_output_tokens=limit if limit is not None and limit > 0 else None,
            stream=view.raw("stream") in (None, b"null") or view.flag("stream"),
            wants_usage=True,
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send. Usage comes unasked. Embeddings have no limit.

        Raises:
            BodyError: as `read_request`.
        """
        if max_output_tokens is None or not ("messages" in view or "prompt" in view):
            return view.body
        limit = _limit(view)
        if limit is not None and 0 < limit <= max_output_tokens:
            return view.body
        options = view.inside("options")
        if options is None:
            return view.replace({"options": {"num_predict": max_output_tokens}})
        return view.replace({"options": msgspec.Raw(options.replace({"num_predict": max_output_tokens}))})

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says: one object, or all the lines of a stream."""
        if not 200 <= status < 300:
            return Answer(kind="error", error=_classify(status, decode(body)))
        tally = _Tally()
        value = decode(body)
        if value is None and b"\n" in body.strip():
            for block in (*(lines := Lines()).feed(body), *lines.finish()):
                tally.event(block)
            return tally.answer()
        tally.add(value)
        return tally.answer(whole=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - usage is never asked for
        """A meter for the body: lines of JSON, or one JSON value."""
        if head.streams(b"application/x-ndjson", b"application/jsonl"):
            return Streamed(Lines(), _Tally())
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response as a model or dict, an HTTP response, or the SDK's error."""
        if isinstance(obj, BaseException):
            failed, text = status_error(obj), pick(obj, "error")
            if failed is None or not isinstance(text, str):
                return None
            return Answer(kind="error", error=_classify(None if failed < 0 else failed, {"error": text}))
        status = pick(obj, "status_code")
        if type(status) is int:
            content = pick(obj, "content")
            if not isinstance(content, bytes) or not _is_ours(decode(content) or decode(content.partition(b"\n")[0])):
                return None
            return self.read_response(status, content)
        if not _is_ours(obj):
            return None
        tally = _Tally()
        tally.add(obj)
        return tally.answer(whole=True)

    def item_meter(self) -> ItemMeter:
        """A meter for parts of a response as objects, dicts, and pieces of lines."""
        return Items(_Tally, Lines())


def _limit(view: BodyView) -> int | None:
    options = view.inside("options")
    return None if options is None else options.whole("num_predict", least=_UNLIMITED, most=MOST_TOKENS)


# ------------------------------------------------------------------------------- plain lines

# Nearly every line is one: a piece of text. What does not fit these types is read by shape.


class _Message(msgspec.Struct):
    content: str | None = None
    thinking: str | None = None
    tool_calls: None = None


class _Plain(msgspec.Struct):
    model: str
    done: bool
    message: _Message | None = None
    response: str | None = None
    thinking: str | None = None
    prompt_eval_count: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)] | None = None
    eval_count: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)] | None = None
    error: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)


# ---------------------------------------------------------------------------------- answers


class _Tally:
    """What a response says, from its lines or as one piece. Counts are those of the last line."""

    __slots__ = ("_done", "_error", "_model", "_undecoded", "_usage", "seen", "text_bytes")

    def __init__(self) -> None:
        self._model: object = None
        self._usage: Usage | None = None
        self._error: ErrorKind | None = None
        self._done = False
        self._undecoded = 0
        self.seen = False
        self.text_bytes = 0

    def event(self, block: Block) -> bool:
        data = block.data
        if data is None:
            return False
        try:
            plain = _PLAIN.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            value = decode(data)
            self._undecoded += value is None
            self.add(value)
            return False
        self.seen = True
        self._model = plain.model
        message = plain.message
        if message is not None:
            self.text_bytes += text_length(message.content) + text_length(message.thinking)
        self.text_bytes += text_length(plain.response) + text_length(plain.thinking)
        if plain.done:
            self._end(plain.prompt_eval_count, plain.eval_count)
        return False  # the last line says more than usage

    def add(self, value: object) -> None:
        """Count a response, a part of one, or an error."""
        if isinstance(text := pick(value, "error"), str) and text:
            self.seen = True
            self._error = _classify(None, value)
            return
        if not _is_ours(value):
            return
        self.seen = True
        self._model = pick(value, "model") or self._model
        message = pick(value, "message")
        for part in (value, message):
            self.text_bytes += text_length(pick(part, "thinking"))
        self.text_bytes += text_length(pick(value, "response")) + text_length(pick(message, "content"))
        for call in items(pick(message, "tool_calls")):
            function = pick(call, "function")
            self.text_bytes += text_length(pick(function, "name")) + _length(pick(function, "arguments"))
        if pick(value, "done") is True:
            self._end(count_of(pick(value, "prompt_eval_count")), count_of(pick(value, "eval_count")))
        elif _vectors(value):
            self._done = True
            if (entered := count_of(pick(value, "prompt_eval_count"))) is not None:
                self._usage = Usage(input_tokens=entered, output_tokens=0)

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        model = name_of(self._model)
        usage = self._usage
        return Answer(
            kind="success" if self._error is None else "error",
            usage=usage if usage is None else msgspec.structs.replace(usage, model=model),
            model=model,
            error=self._error,
            text_bytes=self.text_bytes,
            finished=(whole or self._done) and self._error is None,
            unread=unread + self._undecoded,
        )

    def _end(self, entered: int | None, written: int | None) -> None:
        """Counts are left out where they are 0: for a prompt that was cached, and for an answer without text."""
        self._done = True
        if entered is None and written is None:
            return
        if written is None and self.text_bytes == 0:
            written = 0
        self._usage = Usage(input_tokens=entered, output_tokens=written)


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything has the shape of a response, or of a part of one."""
    if not isinstance(pick(value, "model"), str):
        return False
    done = pick(value, "done")
    if isinstance(done, bool):
        return isinstance(pick(value, "response"), str) or pick(value, "message") is not None
    return _vectors(value) and any(
        isinstance(pick(value, name), int) for name in ("prompt_eval_count", "total_duration", "load_duration")
    )


def _vectors(value: object) -> bool:
    """Whether a response has embeddings: lists of numbers."""
    vectors = pick(value, "embeddings")
    return isinstance(vectors, (list, tuple)) and all(isinstance(vector, (list, tuple)) for vector in vectors[:1])


def _length(arguments: object) -> int:
    if isinstance(arguments, str):
        return text_length(arguments)
    try:
        return len(msgspec.json.encode(arguments)) if arguments else 0
    except (TypeError, ValueError, RecursionError):
        return 0


# ----------------------------------------------------------------------------------- errors


def _classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is: `{"error": "text"}`, told by its status."""
    error = pick(value, "error")
    if is_overflow(status, error if isinstance(error, str) else pick_path(error, "message")):
        return "context_overflow"
    return kind_of_status(status)
