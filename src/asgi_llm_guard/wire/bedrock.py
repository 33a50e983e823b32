"""Bedrock's Converse and ConverseStream, the same for every model.

Source: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html, and the service model
of botocore 1.44 (2026-11).
"""

from __future__ import annotations

from typing import Final, TypeGuard

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.bedrock_common import (
    classify,
    error_answer,
    limits_of,
    lowered,
    model_in,
    model_of,
    read_client_error,
    usage_of,
)
from asgi_llm_guard.wire.eventstream import CONTENT_TYPE, Frames, exception_type
from asgi_llm_guard.wire.items import Items
from asgi_llm_guard.wire.meters import Streamed, Whole
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.shape import count_of, decode, first_count, items, name_of, pick, pick_path, text_length
from asgi_llm_guard.wire.sse import Block

__all__ = ["BedrockConverse", "ConverseTally", "is_converse_event", "is_converse_response"]

_STREAM: Final = "converse-stream"
_OPERATIONS: Final = ("converse", _STREAM)
_CLIENT_OPERATIONS: Final = ("Converse", "ConverseStream")


class BedrockConverse:
    """The dialect `bedrock`: requests to `/model/{model}/converse` and `…/converse-stream`."""

    __slots__ = ()

    name: Final = "bedrock"
    provider: Final = "bedrock"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - a proxy may have any host
        """Whether `path` ends in `/model/…/converse` or `…/converse-stream`. Counting tokens is free."""
        return model_in(path, _OPERATIONS) is not None

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. The path says which model, and whether it streams.

        Fields for the model alone may hide a limit under the vendor's name for it; the larger counts.

        Raises:
            BodyError: the path names no model, or one of the values read here is malformed.
        """
        limits = limits_of(view)
        return Ask(
            model=model_of(path, _OPERATIONS, view),
            max_output_tokens=max(limits) if limits and min(limits) > 0 else None,
            stream=path.rstrip("/").endswith(_STREAM),
            wants_usage=True,
            service_tier=_tier(view),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send. Usage is reported without being asked for.

        Raises:
            BodyError: as `read_request`.
        """
        if max_output_tokens is None:
            return view.body
        changes = lowered(view, max_output_tokens)
        config = view.inside("inferenceConfig")
        limit = None if config is None else count_of(config.get("maxTokens"))
        if not limit:
            limited = {"maxTokens": max_output_tokens}
            changes["inferenceConfig"] = limited if config is None else msgspec.Raw(config.replace(limited))
        return view.replace(changes) if changes else view.body

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says."""
        return _read(Head(status), body)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - nothing is sent that was not there before
        """A meter for the body of a response: an event stream, or one JSON value."""
        if head.streams(CONTENT_TYPE):
            return Streamed(Frames(), ConverseTally())
        return Whole(lambda body: _read(head, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response as boto3 gives it, an HTTP response, or botocore's `ClientError`."""
        status = pick(obj, "status_code")
        if isinstance(status, int):
            content, kind = pick(obj, "content"), name_of(pick_path(obj, "headers", "x-amzn-errortype"))
            value = decode(content) if isinstance(content, bytes) else None
            if kind is not None and not 200 <= status < 300:
                return Answer(kind="error", error=classify(status, kind, value))
            obj = value
        if is_converse_response(obj):
            tally = ConverseTally()
            tally.add(obj)
            return tally.answer(whole=True)
        return read_client_error(obj, _CLIENT_OPERATIONS)

    def item_meter(self) -> ItemMeter:
        """A meter for the items of boto3's `EventStream`, and pieces of a raw stream."""
        return Items(ConverseTally, Frames())


def _tier(view: BodyView) -> str | None:
    tier, performance = view.inside("serviceTier"), view.inside("performanceConfig")
    if performance is not None and performance.get("latency") == "optimized":
        return "optimized"
    return None if tier is None else name_of(tier.get("type"))


def _read(head: Head, body: bytes) -> Answer:
    if not 200 <= head.status < 300:
        return error_answer(head, body)
    tally = ConverseTally()
    tally.add(decode(body))
    return tally.answer(whole=True)


# ---------------------------------------------------------------------------------- answers


class _ToolDelta(msgspec.Struct, gc=False):
    input: str | None = None


class _ReasoningDelta(msgspec.Struct, gc=False):
    text: str | None = None
    redactedContent: None = None  # noqa: N815 - on the wire; what is not plain text is read by its shape


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    toolUse: _ToolDelta | None = None  # noqa: N815
    reasoningContent: _ReasoningDelta | None = None  # noqa: N815


class _Piece(msgspec.Struct, gc=False):
    """The event that nearly all are: to decode only what is read of it takes a fifth of the time."""

    delta: _Delta


_PIECE: Final = msgspec.json.Decoder(_Piece)


class ConverseTally:
    """What an answer says, from its events or as one piece. The last report of usage wins."""

    __slots__ = ("_done", "_error", "_model", "_tier", "_undecoded", "_usage", "seen", "text_bytes")

    def __init__(self) -> None:
        self._model: str | None = None
        self._tier: str | None = None
        self._usage: Usage | None = None
        self._error: ErrorKind | None = None
        self._undecoded = 0
        self._done = False
        self.text_bytes = 0
        self.seen = False
        """Something was counted."""

    def add(self, value: object) -> None:
        """Count a response, or an event, under its name or without."""
        if is_converse_event(value):
            self.seen = True
            (value,) = value.values()
        self.seen = self.seen or is_converse_response(value)
        usage = _usage(pick(value, "usage"))
        if usage is not None and (usage.total_tokens is not None or self._usage is None):
            self._usage = usage
        tier = name_of(pick_path(value, "serviceTier", "type"))
        if pick_path(value, "performanceConfig", "latency") == "optimized":
            tier = "optimized"
        self._tier = tier or self._tier
        self._model = name_of(pick_path(value, "trace", "promptRouter", "invokedModelId")) or self._model
        for block in items(pick_path(value, "output", "message", "content")):
            self.text_bytes += _block_bytes(block)
        self.text_bytes += _block_bytes(pick(value, "delta")) + _block_bytes(pick(value, "start"))
        self._done = self._done or pick(value, "stopReason") is not None

    def event(self, block: Block) -> bool:
        """Count the frame; none only reports usage."""
        data = block.data
        if data is None:
            return False
        if block.error:
            self.seen = True
            self._error = classify(None, exception_type(block.raw), decode(data))
            return False
        if b'"delta"' in data:
            try:
                delta = _PIECE.decode(data).delta
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # read by its shape
            else:
                self.seen = True
                text = delta.text
                if text is None and delta.toolUse is not None:
                    text = delta.toolUse.input
                if text is None and delta.reasoningContent is not None:
                    text = delta.reasoningContent.text
                if text:
                    self.text_bytes += len(text) if text.isascii() else text_length(text)
                return False
        value = decode(data)
        if value is None:
            self._undecoded += 1
        else:
            self.add(value)
        return False

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        usage = self._usage
        if usage is not None and (self._model is not None or self._tier is not None):
            usage = msgspec.structs.replace(usage, model=self._model, service_tier=self._tier)
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
    {"messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata"}
)


def is_converse_event(value: object) -> TypeGuard[dict[str, object]]:
    """Whether it is an event under its name, as boto3 gives them and Nova streams them."""
    if type(value) is not dict or len(value) != 1:
        return False
    ((name, inner),) = value.items()
    if name == "metadata":
        return isinstance(pick_path(inner, "usage", "inputTokens"), int)
    return name in _EVENTS and isinstance(inner, dict)


def is_converse_response(value: object) -> bool:
    """Whether it is a whole answer."""
    return (
        isinstance(pick_path(value, "output", "message", "content"), (list, tuple))
        and pick(value, "stopReason") is not None
    )


def _block_bytes(block: object) -> int:
    """UTF-8 bytes of what the model wrote in a block of content, or in a part of one."""
    if block is None:
        return 0
    size = text_length(pick(block, "text"))
    tool = pick(block, "toolUse")
    if tool is not None:
        entered = pick(tool, "input")
        size += text_length(pick(tool, "name"))
        size += text_length(entered) if isinstance(entered, str) else _json_bytes(entered)
    reasoning = pick(block, "reasoningContent")
    if reasoning is not None:
        size += text_length(pick(reasoning, "text")) + text_length(pick_path(reasoning, "reasoningText", "text"))
        hidden = pick(reasoning, "redactedContent")
        size += len(hidden) if isinstance(hidden, bytes) else text_length(hidden) * 3 // 4  # base64 on the wire
    for part in items(pick_path(block, "citationsContent", "content")):
        size += text_length(pick(part, "text"))
    return size


def _json_bytes(value: object) -> int:
    if not value:
        return 0
    try:
        return len(msgspec.json.encode(value))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return 0


def _usage(report: object) -> Usage | None:
    """The token counts of a report; `None` when it tells neither input nor output."""
    if report is None:
        return None
    long = [
        count
        for detail in items(pick(report, "cacheDetails"))
        if pick(detail, "ttl") == "1h" and (count := count_of(pick(detail, "inputTokens"))) is not None
    ]
    # Nova's own reports have `…TokenCount`.
    return usage_of(
        count_of(pick(report, "inputTokens")),
        count_of(pick(report, "outputTokens")),
        found=first_count(pick(report, "cacheReadInputTokens"), pick(report, "cacheReadInputTokenCount")),
        stored=first_count(pick(report, "cacheWriteInputTokens"), pick(report, "cacheWriteInputTokenCount")),
        stored_1h=sum(long) if items(pick(report, "cacheDetails")) else None,
    )
