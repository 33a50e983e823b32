"""Anthropic Messages, as Anthropic, Vertex, Bedrock's mantle and compatible servers (vLLM, Ollama) speak it.

Source: https://platform.claude.com/docs/en/api/messages, and the types of anthropic 2.11 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

import msgspec

from asgi_llm_guard.wire.anthropic_usage import Report
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.faults import kind_of_status
from asgi_llm_guard.wire.items import Items
from asgi_llm_guard.wire.meters import Streamed, Whole, told_early
from asgi_llm_guard.wire.overflow import says_overflow
from asgi_llm_guard.wire.peek import BodyError, BodyView, read_body
from asgi_llm_guard.wire.shape import (
    LONGEST_NAME,
    MOST_TOKENS,
    decode,
    items,
    name_of,
    path_parts,
    pick,
    pick_path,
    text_length,
)
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["Anthropic", "MessageTally", "most_tokens", "named_models", "within_limit"]

_MOST_FALLBACKS: Final = 64
_RAW_PREDICT: Final = (":rawPredict", ":streamRawPredict")
_LEAST_THINKING: Final = 1024
"""The provider takes no smaller thinking budget."""


class Anthropic:
    """The dialect `anthropic`: requests to `…/v1/messages`, and to Anthropic's models on Vertex."""

    __slots__ = ()

    name: Final = "anthropic"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        """Whether `path` ends in `/v1/messages`, or names a model of Anthropic on Vertex.

        Counting tokens is free; batches are billed later and at other prices.
        """
        return path_parts(path)[-2:] == ["v1", "messages"] or _vertex_model(path) is not None

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for.

        `max_tokens` is required, and 0 is a limit: it fills the cache. Thinking counts within it. Models in
        `fallbacks` may answer instead, each with a limit of its own, of which the largest counts; an advisor is
        asked beside the model.

        Raises:
            BodyError: `model` or `max_tokens` is missing, or one of the values read here is malformed.
        """
        model = _vertex_model(path) or view.text("model", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "model: required, got none", "model")
        limit = most_tokens(view)
        if limit is None:
            raise BodyError("invalid_request", 400, "max_tokens: required, got none", "max_tokens")
        stream = view.flag("stream")
        return Ask(
            model=model,
            max_output_tokens=limit,
            stream=stream or path.endswith(_RAW_PREDICT[1]),
            wants_usage=stream,
            service_tier="fast" if _is_fast(view) else name_of(view.get("service_tier")),
            alternatives=named_models(view),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send. Usage is reported without being asked for.

        A thinking budget has to be less than the limit, and is lowered with it.

        Raises:
            BodyError: as `read_request`.
        """
        changes = {} if max_output_tokens is None else within_limit(view, max_output_tokens)
        return view.replace(changes) if changes else view.body

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says. An error object counts as an error even with status 200."""
        value = decode(body)
        if not 200 <= status < 300:
            return Answer(kind="error", error=classify(status, value))
        tally = MessageTally()
        tally.add(value)
        return tally.answer(whole=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - nothing is sent that was not there before
        """A meter for the body of a response: server-sent events, or one JSON value."""
        if head.streams(b"text/event-stream"):
            return Streamed(Blocks(), MessageTally())
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a message as a model or a dict, an HTTP response, or an SDK's status error."""
        status = pick(obj, "status_code")
        if isinstance(status, int):
            content = pick(obj, "body") if isinstance(obj, BaseException) else pick(obj, "content")
            value = decode(content) if isinstance(content, bytes) else content
            if _is_error(value):
                return Answer(kind="error", error=classify(status, value))
            return self.read_response(status, content) if isinstance(content, bytes) and _is_message(value) else None
        if not _is_message(obj) and not _is_error(obj):
            return None
        tally = MessageTally()
        tally.add(obj)
        return tally.answer(whole=True)

    def item_meter(self) -> ItemMeter:
        """A meter for event objects and dicts, and pieces of a raw stream."""
        return Items(MessageTally, Blocks())


# --------------------------------------------------------------------------------- requests


def most_tokens(view: BodyView) -> int | None:
    """The most output tokens that an answer may have, whichever model gives it; `None`: the request has no limit.

    Raises:
        BodyError: a limit, or a member that is read here, is malformed.
    """
    limits = [limit for inner in (view, *_fallbacks(view)) if (limit := _limit(inner)) is not None]
    _budget(view)
    return max(limits) if limits else None


def named_models(view: BodyView) -> tuple[str, ...]:
    """The models that may answer instead of the one asked, in their order, and those that advise it.

    Raises:
        BodyError: one of them is malformed.
    """
    found: dict[str, None] = {}
    for inner in _fallbacks(view):
        model = inner.text("model", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "fallbacks: expected a model in each, got none", "fallbacks")
        found[model] = None
    tools = view.raw("tools") or b""
    if b"advisor" in tools:
        for tool in items(decode(tools)):
            kind, model = pick(tool, "type"), name_of(pick(tool, "model"))
            if model is not None and isinstance(kind, str) and kind.startswith("advisor"):
                found[model] = None
    return tuple(found)


def within_limit(view: BodyView, most: int) -> dict[str, object]:
    """What has to be changed so that no answer has more than `most` output tokens. Limits are lowered, never raised.

    Raises:
        BodyError: as `most_tokens`.
    """
    limit = _limit(view)
    changes = _lowered(view, most, limit)
    if limit is None:
        changes["max_tokens"] = most
    fallbacks = _fallbacks(view)
    lowered = [_lowered(inner, most, limit) for inner in fallbacks]
    if any(lowered):
        changes["fallbacks"] = [
            msgspec.Raw(inner.replace(change)) for inner, change in zip(fallbacks, lowered, strict=True)
        ]
    return changes


def _lowered(view: BodyView, most: int, inherited: int | None) -> dict[str, object]:
    """The limits of a request, or of a model that may answer instead, which else has the request's limit."""
    changes: dict[str, object] = {}
    limit, budget = _limit(view), _budget(view)
    if limit is not None and limit > most:
        changes["max_tokens"] = most
    within = inherited if limit is None else limit
    # Thinking between tools may take more than the limit, and keeps its budget.
    if budget is not None and within is not None and _LEAST_THINKING < most <= budget < within:
        thinking = view.inside("thinking")
        assert thinking is not None, "its budget was read"  # noqa: S101
        changes["thinking"] = msgspec.Raw(thinking.replace({"budget_tokens": most - 1}))
    return changes


def _is_fast(view: BodyView) -> bool:
    return any(inner.get("speed") == "fast" for inner in (view, *_fallbacks(view)))


def _limit(view: BodyView) -> int | None:
    return view.whole("max_tokens", least=0, most=MOST_TOKENS)


def _budget(view: BodyView) -> int | None:
    thinking = view.inside("thinking")
    return None if thinking is None else thinking.whole("budget_tokens", least=0, most=MOST_TOKENS)


def _fallbacks(view: BodyView) -> list[BodyView]:
    """The entries of `fallbacks`; none when the provider chooses them itself."""
    raw = view.raw("fallbacks")
    if raw is None or not raw.startswith(b"["):
        return []
    entries: list[msgspec.Raw] = msgspec.json.decode(raw, type=list[msgspec.Raw])
    if len(entries) > _MOST_FALLBACKS:
        message = f"fallbacks: expected at most {_MOST_FALLBACKS}, got {len(entries)}"
        raise BodyError("invalid_request", 400, message, "fallbacks")
    try:
        return [read_body(bytes(entry)) for entry in entries]
    except BodyError as error:
        raise BodyError(error.code, error.status, f"fallbacks: {error.message}", "fallbacks") from None


def _vertex_model(path: str) -> str | None:
    """The model in `…/publishers/anthropic/models/{model}:rawPredict`; `None`: no such path."""
    if not path.endswith(_RAW_PREDICT):
        return None
    parts = path_parts(path)[-3:]
    if parts[:2] != ["anthropic", "models"]:
        return None
    model = name_of(unquote(parts[2].rpartition(":")[0]))
    return None if model == "count-tokens" else model


# ---------------------------------------------------------------------------------- answers


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    content: str | None = None


class _Piece(msgspec.Struct, gc=False):
    """The event that nearly all are: to decode only what is read of it takes a fifth of the time."""

    delta: _Delta


_PIECE: Final = msgspec.json.Decoder(_Piece)
_STARTS_PIECE: Final = (b'{"type":"content_block_delta"', b'{"type": "content_block_delta"')


class MessageTally:
    """What an answer says, from its events or as one piece. Reports of usage replace each other, field by field."""

    __slots__ = ("_done", "_error", "_model", "_report", "_told_at", "_undecoded", "seen", "text_bytes")

    def __init__(self) -> None:
        self._model: str | None = None
        self._report = Report()
        self._error: ErrorKind | None = None
        self._undecoded = 0
        self._told_at = 0
        """How much text had come when the output was reported."""
        self._done = False
        self.text_bytes = 0
        self.seen = False
        """Something had the shape of a message, an event or an error."""

    def add(self, value: object) -> None:
        """Count a message, an event or an error."""
        self.seen = self.seen or _is_event(value) or _is_message(value) or _is_error(value)
        kind = pick(value, "type")
        if kind == "content_block_delta":
            delta = pick(value, "delta")
            self.text_bytes += sum(text_length(pick(delta, name)) for name in _Delta.__struct_fields__)
        elif kind == "message_delta":
            self._report.update(pick(value, "usage"))
            self._told_at = self.text_bytes
            self._done = self._done or pick_path(value, "delta", "stop_reason") is not None
        elif kind == "message_start":
            message = pick(value, "message")
            self._model = name_of(pick(message, "model")) or self._model
            # The output in it is a placeholder, however long the answer becomes.
            self._report.update(pick(message, "usage"), output=False)
        elif kind == "content_block_start":
            self.text_bytes += _block_bytes(pick(value, "content_block"))
        elif kind == "message_stop":
            self._done = True
        elif kind == "message":
            self._model = name_of(pick(value, "model")) or self._model
            self._report.update(pick(value, "usage"))
            self._told_at = self.text_bytes = self.text_bytes + sum(map(_block_bytes, items(pick(value, "content"))))
        elif kind == "error":
            self._error = classify(None, value)

    def event(self, block: Block) -> bool:
        """Count the block; none only reports usage."""
        data = block.data
        if data is None:
            return False
        if data.startswith(_STARTS_PIECE):
            try:
                delta = _PIECE.decode(data).delta
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # read by its shape
            else:
                self.seen = True
                text = delta.text or delta.thinking or delta.partial_json or delta.content
                if text:
                    self.text_bytes += len(text) if text.isascii() else text_length(text)
                return False
        value = decode(data)
        self.add(value)
        if block.error:
            self._error = self._error or "other"
        elif value is None and data.strip() != b"[DONE]":  # compatible servers may end so
            self._undecoded += 1
        return False

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        usage = self._report.usage(self._model)
        if usage is not None and self.text_bytes > self._told_at:
            usage = told_early(usage)
        return Answer(
            kind="success" if self._error is None else "error",
            usage=usage,
            model=self._model,
            error=self._error,
            text_bytes=self.text_bytes,
            finished=(whole or self._done) and self._error is None,
            unread=unread + self._undecoded,
        )


_EVENTS: Final = frozenset(
    {"message_start", "message_delta", "message_stop", "content_block_start", "content_block_delta"}
)
_PARTS: Final = {
    "message_start": "message",
    "message_delta": "usage",
    "content_block_start": "content_block",
    "content_block_delta": "delta",
}


def _is_event(value: object) -> bool:
    kind = pick(value, "type")
    if not isinstance(kind, str) or kind not in _EVENTS:
        return False
    return kind == "message_stop" or pick(value, _PARTS[kind]) is not None


def _is_message(value: object) -> bool:
    return (
        pick(value, "type") == "message"
        and pick(value, "role") == "assistant"
        and isinstance(pick(value, "content"), (list, tuple))
        and pick(value, "usage") is not None
    )


def _is_error(value: object) -> bool:
    """Whether it is an error in its envelope; a function's own `{"error": "…"}` is none."""
    error = pick(value, "error")
    return (
        pick(value, "type") == "error"
        and pick(value, "code") is None  # of OpenAI's Responses
        and isinstance(pick(error, "type"), str)
        and isinstance(pick(error, "message"), str)
    )


def _block_bytes(block: object) -> int:
    """UTF-8 bytes of what the model wrote in a block of content."""
    kind = pick(block, "type")
    if kind == "text":
        return text_length(pick(block, "text"))
    if kind == "thinking":
        return text_length(pick(block, "thinking"))
    if kind == "redacted_thinking":
        return text_length(pick(block, "data")) * 3 // 4  # base64 of what was written
    if kind == "compaction":
        return text_length(pick(block, "content"))
    if isinstance(kind, str) and kind.endswith("tool_use"):
        return text_length(pick(block, "name")) + _json_bytes(pick(block, "input"))
    return 0


def _json_bytes(value: object) -> int:
    if not value:  # a block that has just begun
        return 0
    try:
        return len(msgspec.json.encode(value))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return 0


# ----------------------------------------------------------------------------------- errors

_TYPES: Final[dict[object, ErrorKind]] = {
    "rate_limit_error": "rate_limit",
    "overloaded_error": "overload",
    "billing_error": "quota",
    "authentication_error": "auth",
    "permission_error": "auth",
    "invalid_request_error": "invalid",
    "not_found_error": "invalid",
    "request_too_large": "invalid",
    "api_error": "other",
    "timeout_error": "other",
}
_CODES: Final[dict[object, ErrorKind]] = {
    "contract_spend_limit_reached": "quota",
    "enforced_spend_limit_reached": "quota",
    "linked_organization_billing_unavailable": "quota",
    "linked_organization_spend_limit_reached": "quota",
    "organization_on_hold": "auth",
    "ramp_limit_exceeded": "rate_limit",
}
_SPENT: Final = ("credit balance is too low", "reached your specified api usage limits")


def classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is; `status` is `None` in the middle of a stream."""
    error = pick(value, "error") or value
    kind, message = pick(error, "type"), error if isinstance(error, str) else pick(error, "message")
    # A body of too many bytes (413) is another limit than the model's window.
    if status in (None, 400, 422) and says_overflow(message):
        return "context_overflow"
    text = message[:4096].lower() if isinstance(message, str) else ""
    if status in (None, 400, 403) and any(said in text for said in _SPENT):
        return "quota"
    code = pick_path(error, "details", "error_code")
    for found, known in ((code, _CODES), (kind, _TYPES)):
        if isinstance(found, str) and found in known:
            return "quota" if status == 402 else known[found]
    return kind_of_status(status)
