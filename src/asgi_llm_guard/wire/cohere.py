"""Cohere's chat, of both versions of its API. Counts come as numbers with a fraction, and without the model.

Source: https://docs.cohere.com/v2/reference/chat, and the types of cohere 7.3 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

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
    within,
)
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["Cohere", "billed", "classify", "error_of_sdk", "usage_of", "whole_number"]


class Cohere:
    """The dialect `cohere`: POST to `/v2/chat`, and to the older `/v1/chat`."""

    __slots__ = ()

    name: Final = "cohere"
    provider: Final = "cohere"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - gateways speak it too
        """Whether `path` ends in a version and `chat`."""
        return path_parts(path)[-2:] in (["v2", "chat"], ["v1", "chat"])

    def read_request(self, view: BodyView, path: str = "") -> Ask:  # noqa: ARG002 - the body names the model
        """What the request asks for. `max_tokens` includes thinking; a limit of 0 counts as none.

        Raises:
            BodyError: `model` is missing (the older API has a default, which is not ours to know), or a value read
                here is malformed.
        """
        model = view.text("model", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "model: required, got none", "model")
        return Ask(
            model=model,
            max_output_tokens=view.whole("max_tokens", least=0, most=MOST_TOKENS) or None,
            stream=view.flag("stream"),
            wants_usage=True,
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send. Usage comes unasked.

        Raises:
            BodyError: as `read_request`.
        """
        if max_output_tokens is None:
            return view.body
        limit = view.whole("max_tokens", least=0, most=MOST_TOKENS)
        return view.body if limit and limit <= max_output_tokens else view.replace({"max_tokens": max_output_tokens})

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says."""
        value = decode(body)
        if not 200 <= status < 300:
            return Answer(kind="error", error=classify(status, value))
        tally = _Tally()
        tally.add(value)
        return tally.answer(whole=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - usage is never asked for
        """A meter for the body: server-sent events, the lines of the older API, or one JSON value."""
        if head.streams(b"text/event-stream"):
            return Streamed(Blocks(), _Tally())
        if head.streams(b"application/stream+json", b"application/x-ndjson"):
            return Streamed(Lines(), _Tally())
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response or an event as a model or dict, an HTTP response, or the SDK's error."""
        if isinstance(obj, BaseException):
            return error_of_sdk(obj)
        status = pick(obj, "status_code")
        if type(status) is int:
            content = pick(obj, "content")
            if not isinstance(content, bytes) or not _is_ours(decode(content)):
                return None
            return self.read_response(status, content)
        if not _is_ours(obj):
            return None
        tally = _Tally()
        tally.add(obj)
        return tally.answer(whole=True)

    def item_meter(self) -> ItemMeter:
        """A meter for event objects, dicts, and pieces of server-sent events."""
        return Items(_Tally, Blocks())


# ---------------------------------------------------------------------------------- answers

# Nearly every event is one: a piece of text.
_PIECE: Final = b'{"type":"content-delta"'


class _Content(msgspec.Struct):
    text: str | None = None
    thinking: str | None = None


class _Message(msgspec.Struct):
    content: _Content
    tool_plan: None = None
    tool_calls: None = None


class _Delta(msgspec.Struct):
    message: _Message


class _Plain(msgspec.Struct):
    type: str
    delta: _Delta


_PLAIN: Final = msgspec.json.Decoder(_Plain)

_DELTAS: Final = frozenset(
    {
        "message-start", "content-start", "content-delta", "content-end", "tool-plan-delta", "tool-call-start",
        "tool-call-delta", "tool-call-end", "citation-start", "citation-end", "message-end",
    }
)  # fmt: skip
_OLDER: Final = frozenset(
    {"stream-start", "text-generation", "tool-calls-chunk", "tool-calls-generation", "stream-end"}
)
_FAILED: Final = ("ERROR", "TIMEOUT", "ERROR_TOXIC")


class _Tally:
    """What a chat says, from its events or as one piece."""

    __slots__ = ("_error", "_finished", "_undecoded", "_usage", "seen", "text_bytes")

    def __init__(self) -> None:
        self._usage: Usage | None = None
        self._error: ErrorKind | None = None
        self._finished = False
        self._undecoded = 0
        self.seen = False
        self.text_bytes = 0

    def event(self, block: Block) -> bool:
        data = block.data
        if data is None:
            return False
        if data.startswith(_PIECE):
            try:
                content = _PLAIN.decode(data).delta.message.content
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # and is read by its shape
            else:
                self.seen = True
                self.text_bytes += text_length(content.text) + text_length(content.thinking)
                return False
        value = decode(data)
        if value is None:
            self._undecoded += data.strip() != b"[DONE]"
        self.add(value)
        return False  # the last event says more than usage

    def add(self, value: object) -> None:
        """Count a response, or an event of one."""
        kind = pick(value, "type")
        if isinstance(kind, str) and kind in _DELTAS:
            delta = pick(value, "delta")
            if kind == "message-end":
                self.seen = True
                self._end(delta, pick(delta, "usage"))
            elif isinstance(delta, dict) or delta is not None:
                self.seen = True
                self.text_bytes += _message_bytes(pick(delta, "message"))
            return
        kind = pick(value, "event_type")
        if isinstance(kind, str):
            if kind in _OLDER:
                self.seen = True
                self._add_older(kind, value)
            return
        if _is_ours(value):
            self.seen = True
            self.text_bytes += _message_bytes(pick(value, "message")) + text_length(pick(value, "text"))
            self.text_bytes += sum(_call_bytes(call) for call in items(pick(value, "tool_calls")))
            self._end(value, pick(value, "usage") or pick(value, "meta"))

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        return Answer(
            kind="success" if self._error is None else "error",
            usage=self._usage,
            error=self._error,
            text_bytes=self.text_bytes,
            finished=(whole or self._finished) and self._error is None,
            unread=unread + self._undecoded,
        )

    def _add_older(self, kind: str, value: object) -> None:
        if kind == "text-generation":
            self.text_bytes += text_length(pick(value, "text"))
        elif kind == "tool-calls-chunk":
            delta = pick(value, "tool_call_delta")
            self.text_bytes += text_length(pick(delta, "name")) + text_length(pick(delta, "parameters"))
            self.text_bytes += text_length(pick(value, "text"))
        elif kind == "stream-end":
            self._end(value, pick_path(value, "response", "meta"))

    def _end(self, value: object, report: object) -> None:
        self._usage = usage_of(report) or self._usage
        reason = pick(value, "finish_reason")
        if reason in _FAILED or pick(value, "error"):
            self._error = "context_overflow" if is_overflow(None, pick(value, "error")) else "other"
        self._finished = reason is not None


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything has the shape of a chat's response, or of an event of one."""
    kind = pick(value, "type")
    if isinstance(kind, str) and kind in _DELTAS:
        return pick(value, "delta") is not None or "end" in kind
    kind = pick(value, "event_type")
    if isinstance(kind, str) and kind in _OLDER:
        return True
    if isinstance(pick(value, "text"), str) and billed(pick(value, "meta")):
        return True
    report = pick(value, "usage")
    return billed(report) or (
        pick_path(value, "message", "role") == "assistant"
        and isinstance(pick(value, "finish_reason"), str)
        and isinstance(pick(value, "id"), str)
        and pick(value, "choices") is None
    )


def _message_bytes(message: object) -> int:
    """UTF-8 bytes of what the model wrote in a message or delta: text, thinking, its plan, calls of tools."""
    if message is None:
        return 0
    size = text_length(pick(message, "tool_plan"))
    content = pick(message, "content")
    for part in content if isinstance(content, (list, tuple)) else (content,):  # a delta has one part alone
        size += text_length(pick(part, "text")) + text_length(pick(part, "thinking"))
    calls = pick(message, "tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else (calls,):
        size += _call_bytes(pick(call, "function"))
    return size


def _call_bytes(call: object) -> int:
    arguments = pick(call, "arguments")
    return 0 if call is None else text_length(pick(call, "name")) + text_length(arguments)


# ------------------------------------------------------------------------------------ usage


def whole_number(value: object) -> int | None:
    """A count, which Cohere writes as `12.0`; `None` for what is not believable as one."""
    if isinstance(value, float) and 0 <= value <= MOST_TOKENS and value.is_integer():
        return int(value)
    return count_of(value)


def billed(report: object) -> bool:
    """Whether an object is what Cohere reports usage with."""
    units, tokens = pick(report, "billed_units"), pick(report, "tokens")
    names = ("input_tokens", "output_tokens", "search_units", "images", "classifications")
    return any(isinstance(pick(part, name), (int, float)) for part in (units, tokens) for name in names)


def usage_of(report: object) -> Usage | None:
    """The counts of a `usage` or `meta` object; `None` when it tells none.

    `tokens` is what the model read and wrote; where it is missing, `billed_units` stands in for it. What is billed
    is often less: the provider's own prompt around a message, and what it had cached, are left out there.
    """
    if report is None:
        return None
    units, tokens = pick(report, "billed_units"), pick(report, "tokens")
    charged_input = whole_number(pick(units, "input_tokens"))
    charged_output = whole_number(pick(units, "output_tokens"))
    entered, written = whole_number(pick(tokens, "input_tokens")), whole_number(pick(tokens, "output_tokens"))
    entered = charged_input if entered is None else entered
    written = charged_output if written is None else written
    searches = whole_number(pick(units, "search_units"))
    if entered is None and written is None and searches is None:
        return None
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=within(whole_number(pick(report, "cached_tokens")), entered),
        billed_input_tokens=None if charged_input == entered else charged_input,
        billed_output_tokens=None if charged_output == written else charged_output,
        search_units=searches,
    )


# ----------------------------------------------------------------------------------- errors


def classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is: `{"message": …}`, told by its status."""
    message = pick(value, "message") or (value if isinstance(value, str) else None)
    if is_overflow(status, message):
        return "context_overflow"
    if status == 429 and isinstance(message, str) and "month" in message[:4096].lower():
        return "quota"  # a trial key's calls of the month are used up
    return kind_of_status(status)


def error_of_sdk(error: BaseException) -> Answer | None:
    """What the SDK's `ApiError` says; `None`: it is none.

    Told from other SDKs' errors by its body: an object with `message` and without an envelope, or text.
    """
    status, body = status_error(error), pick(error, "body")
    if (
        status is None
        or not isinstance(pick(error, "headers"), (dict, type(None)))
        or pick(error, "response") is not None
    ):
        return None
    message = pick(body, "message")
    if not isinstance(message, str) or pick(body, "object") == "error" or name_of(pick(body, "type")) is not None:
        return None
    return Answer(kind="error", error=classify(status, body))
