"""Bedrock's InvokeModel and InvokeModelWithResponseStream: bodies as each vendor has them, within Bedrock's frames.

Source: https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters.html, the service model of botocore
1.44, and the stream decoder of anthropic 2.11 (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.anthropic import MessageTally
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.bedrock import ConverseTally
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
from asgi_llm_guard.wire.bedrock_texts import Texts
from asgi_llm_guard.wire.eventstream import CONTENT_TYPE, Frames, exception_type
from asgi_llm_guard.wire.items import Items
from asgi_llm_guard.wire.meters import Streamed, Whole
from asgi_llm_guard.wire.openai_chat import OpenAIChat
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.shape import MOST_CHOICES, MOST_TOKENS, count_of, decode, name_of, pick, pick_path
from asgi_llm_guard.wire.sse import Block

__all__ = ["BedrockInvoke"]

_STREAM: Final = "invoke-with-response-stream"
_OPERATIONS: Final = ("invoke", _STREAM)
_CLIENT_OPERATIONS: Final = ("InvokeModel", "InvokeModelWithResponseStream")
_METRICS: Final = b"amazon-bedrock-invocationMetrics"
_COUNT: Final = "x-amzn-bedrock-{}-token-count"
_CHOICES: Final = ("n", "num_generations", "numResults")
_WITHOUT_TEXT: Final = ("embed", "marengo", "rerank")
"""In the names of models that write nothing: their output is vectors, or an order."""


class BedrockInvoke:
    """The dialect `bedrock_invoke`: requests to `/model/{model}/invoke` and `…/invoke-with-response-stream`."""

    __slots__ = ()

    name: Final = "bedrock_invoke"
    provider: Final = "bedrock"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - a proxy may have any host
        """Whether `path` ends in `/model/…/invoke` or `…/invoke-with-response-stream`."""
        return model_in(path, _OPERATIONS) is not None

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. The path says which model, and whether it streams; the body is the vendor's.

        Limits are read under every name that vendors have for them, and the larger counts. Where a body has
        none it is not known where one would have to stand, unless its shape tells.

        Raises:
            BodyError: the path names no model, or one of the values read here is malformed.
        """
        model = model_of(path, _OPERATIONS, view)
        limits = limits_of(view)
        silent = any(part in model for part in _WITHOUT_TEXT) or _images(view, model) > 0
        counts = [count for name in _CHOICES if (count := view.whole(name, least=1, most=MOST_CHOICES)) is not None]
        return Ask(
            model=model,
            max_output_tokens=0 if silent else max(limits) if limits and min(limits) > 0 else None,
            limits_output=not silent and (bool(limits) or _place(view) is not None),
            choices=max(counts, default=1),
            stream=path.rstrip("/").endswith(_STREAM),
            wants_usage=True,
            images=_images(view, model),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send: usage is reported without being asked for. Limits are lowered under the names they have.

        Raises:
            BodyError: as `read_request`.
        """
        if max_output_tokens is None:
            return view.body
        changes = lowered(view, max_output_tokens)
        place = None if any(limits_of(view)) else _place(view)
        if place is not None:
            outer, name = place
            limited = {name: max_output_tokens}
            inner = view.inside(outer) if outer else None
            changes |= {outer: msgspec.Raw(inner.replace(limited)) if inner else limited} if outer else limited
        return view.replace(changes) if changes else view.body

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says, without its headers."""
        return _read(Head(status), body)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - nothing is sent that was not there before
        """A meter for the body of a response: an event stream, or what the vendor sends."""
        if head.streams(CONTENT_TYPE):
            return Streamed(Frames(), _Tally(_tier(head)))
        return Whole(lambda body: _read(head, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response as boto3 gives it, whose body is left unread, or botocore's `ClientError`.

        Of a response as boto3 gives it the headers tell what was used.
        """
        headers = pick_path(obj, "ResponseMetadata", "HTTPHeaders")
        if pick(obj, "contentType") is not None and pick(obj, "body") is not None and headers is not None:
            usage = _usage_in_headers(headers if isinstance(headers, Mapping) else {})
            if usage is not None:
                fast = pick(obj, "performanceConfigLatency") == "optimized"
                tier = "optimized" if fast else name_of(pick(obj, "serviceTier"))
                usage = msgspec.structs.replace(usage, service_tier=tier)
            return Answer(kind="success", usage=usage, finished=True)
        return read_client_error(obj, _CLIENT_OPERATIONS)

    def item_meter(self) -> ItemMeter:
        """A meter for the items of boto3's `EventStream`, and pieces of a raw stream."""
        return Items(_Tally, Frames())


# --------------------------------------------------------------------------------- requests


def _images(view: BodyView, model: str) -> int:
    """At most so many images are generated."""
    config = view.inside("imageGenerationConfig") if "imageGenerationConfig" in view else None
    if config is not None:
        return config.whole("numberOfImages", least=1, most=MOST_CHOICES) or 1
    return 1 if "taskType" in view or "stability." in model else 0


def _place(view: BodyView) -> tuple[str, str] | None:
    """Where a body of this shape has its limit: the object it is in, empty for the body itself, and its name."""
    if "anthropic_version" in view:
        return "", "max_tokens"
    if "inputText" in view:
        return "textGenerationConfig", "maxTokenCount"
    if "schemaVersion" in view:  # Nova
        return "inferenceConfig", "maxTokens"
    return None


# ---------------------------------------------------------------------------------- answers


def _read(head: Head, body: bytes) -> Answer:
    if not 200 <= head.status < 300:
        return error_answer(head, body)
    tier = _tier(head)
    tally = _Tally(tier)
    tally.inner(body)
    answer = tally.answer()
    usage = answer.usage
    if usage is None or usage.total_tokens is None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers}
        told = _usage_in_headers(headers)
        if told is not None:
            usage = msgspec.structs.replace(told, model=answer.model, service_tier=tier)
        usage = _with_silent(usage, head.path)
    return msgspec.structs.replace(answer, usage=usage, finished=answer.kind == "success")


def _tier(head: Head) -> str | None:
    """The tier that the headers say it was served on."""
    if head.header(b"x-amzn-bedrock-performanceconfig-latency") == b"optimized":
        return "optimized"
    return name_of(head.header(b"x-amzn-bedrock-service-tier").decode("latin-1"))


def _with_silent(usage: Usage | None, path: str) -> Usage | None:
    """Models that write nothing report no output."""
    model = model_in(path, _OPERATIONS) or ""
    if usage is not None and usage.output_tokens is None and any(part in model for part in _WITHOUT_TEXT):
        return msgspec.structs.replace(usage, output_tokens=0)
    return usage


def _usage_in_headers(headers: Mapping[str, object]) -> Usage | None:
    def counted(kind: str) -> int | None:
        value = headers.get(_COUNT.format(kind))
        if (
            not isinstance(value, str)
            or not value.isdecimal()
            or not value.isascii()
            or len(value) > len(str(MOST_TOKENS))
        ):
            return None
        return count_of(int(value))

    return usage_of(
        counted("input"), counted("output"), found=counted("cache-read-input"), stored=counted("cache-write-input")
    )


class _Chunk(msgspec.Struct, gc=False):
    data: bytes = msgspec.field(name="bytes")


_CHUNK: Final = msgspec.json.Decoder(_Chunk)


class _Tally:
    """What an answer says, in the words of whichever vendor, and what Bedrock itself reports at the end."""

    __slots__ = ("_error", "_messages", "_metrics", "_tier", "_undecoded", "_vendor", "_vendors", "seen")

    def __init__(self, tier: str | None = None) -> None:
        self._tier = tier
        self._messages = MessageTally()
        self._vendors: tuple[_Vendor, ...] = (self._messages, ConverseTally(), _Chat(), Texts())
        self._vendor: _Vendor | None = None
        self._metrics: Usage | None = None
        self._error: ErrorKind | None = None
        self._undecoded = 0
        self.seen = False
        """Something was counted."""

    @property
    def text_bytes(self) -> int:
        return 0 if self._vendor is None else self._vendor.text_bytes

    def add(self, value: object) -> None:
        """Count an item of boto3's `EventStream`."""
        inner = pick_path(value, "chunk", "bytes")
        if isinstance(inner, bytes):
            self.seen = True
            self.inner(inner)

    def event(self, block: Block) -> bool:
        """Count the frame; none only reports usage."""
        data = block.data
        if data is None:
            return False
        if block.error:
            self.seen = True
            self._error = classify(None, exception_type(block.raw), decode(data))
            return False
        try:
            inner = _CHUNK.decode(data).data
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._undecoded += 1
        else:
            self.seen = True
            self.inner(inner)
        return False

    def inner(self, data: bytes) -> None:
        """Count what the vendor says, in a frame or as a whole body."""
        if self._vendor is self._messages:
            self._messages.event(Block(data, data))
        else:
            value = decode(data)
            if value is None:
                self._undecoded += 1
            for vendor in self._vendors if self._vendor is None else (self._vendor,):
                vendor.add(value)
                if vendor.seen:
                    self._vendor = vendor
                    break
        if _METRICS in data:
            report = pick(decode(data), _METRICS.decode())
            self._metrics = usage_of(
                count_of(pick(report, "inputTokenCount")),
                count_of(pick(report, "outputTokenCount")),
                found=count_of(pick(report, "cacheReadInputTokenCount")),
                stored=count_of(pick(report, "cacheWriteInputTokenCount")),
            )

    def answer(self, *, unread: int = 0) -> Answer:
        """The sum so far. What the vendor says goes before what Bedrock does, which tells less of the cache."""
        said = Answer(kind="success") if self._vendor is None else self._vendor.answer()
        usage = said.usage
        if self._metrics is not None and (usage is None or usage.total_tokens is None):
            usage = msgspec.structs.replace(self._metrics, model=said.model)
        if usage is not None and self._tier is not None and usage.service_tier is None:
            usage = msgspec.structs.replace(usage, service_tier=self._tier)
        error = self._error or said.error
        return msgspec.structs.replace(
            said,
            kind="success" if error is None else "error",
            usage=usage,
            error=error,
            finished=error is None and (said.finished or self._metrics is not None),
            unread=said.unread + self._undecoded + unread,
        )


class _Vendor(Protocol):
    """The tally of one vendor's answers."""

    @property
    def seen(self) -> bool:
        """Something had the vendor's shape."""
        ...

    @property
    def text_bytes(self) -> int: ...

    def add(self, value: object) -> None: ...

    def answer(self) -> Answer: ...


class _Chat:
    """Completions in the shape of OpenAI's: of its open models, DeepSeek, Qwen, AI21 and Mistral."""

    __slots__ = ("_tally", "seen")

    def __init__(self) -> None:
        self._tally = _CHAT.tally()
        self.seen = False

    @property
    def text_bytes(self) -> int:
        return self._tally.text_bytes

    def add(self, value: object) -> None:
        if _CHAT.is_ours(value):
            self.seen = True
            self._tally.add(value)

    def answer(self) -> Answer:
        return self._tally.answer()


_CHAT: Final = OpenAIChat()
