"""What the dialects of OpenAI's API have in common: JSON or server-sent events, and where an operation's path begins."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.meters import Streamed, Whole, told_early
from asgi_llm_guard.wire.openai_errors import classify, error_of
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import LONGEST_NAME, decode, name_of, path_parts, pick
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = [
    "Family",
    "FamilyTally",
    "asking_for_usage",
    "deployment",
    "model_of",
    "operation",
    "text_in",
    "wants_usage",
]

_BASE: Final = re.compile(r"v\d+\w*|openai|beta|codex")
"""A segment that an API's operations stand under: a version, or a word that compatible servers put there."""


def operation(path: str) -> tuple[str, ...]:
    """What a path asks for, as the segments after its version: `/openai/v1/audio/speech` is `audio`, `speech`.

    Azure's deployments are a base as well. A path without any is an operation as a whole.
    """
    parts = path_parts(path)
    start = 0
    for at, part in enumerate(parts):
        if _BASE.fullmatch(part):
            start = at + 1
        elif part == "deployments" and at and parts[at - 1] == "openai":
            start = at + 2
    return tuple(parts[start:])


def deployment(path: str) -> str | None:
    """The model in `/openai/deployments/{model}/…`; `None`: it is no such path."""
    if "deployments" not in path:
        return None
    parts = path_parts(path)
    for at, part in enumerate(parts[:-2]):
        if part == "deployments" and (at == 0 or parts[at - 1] == "openai"):
            return name_of(parts[at + 1])
    return None


def model_of(view: BodyView, path: str) -> str:
    """The model of a request. In an Azure deployment's path the deployment is the model, whatever the body says.

    Raises:
        BodyError: there is none, or it is malformed.
    """
    model = deployment(path) or view.text("model", longest=LONGEST_NAME)
    if model is None:
        raise BodyError("invalid_request", 400, "model: required, got none", "model")
    return model


def text_in(view: BodyView, member: str) -> str | None:
    """The text under a name; `None` for anything else, which the provider may refuse.

    Raises:
        BodyError: it is an object or a list.
    """
    value = view.get(member) if member in view else None
    return value if isinstance(value, str) else None


def wants_usage(view: BodyView) -> bool:
    """Whether the client asked for the usage of its stream.

    Raises:
        BodyError: what it asks with is malformed.
    """
    options = view.inside("stream_options")
    asked = options is not None and options.flag("include_usage")
    return asked and view.flag("stream")


def asking_for_usage(view: BodyView) -> dict[str, object]:
    """What to change in a request so that its stream reports usage: nothing where it is asked for, or no stream,
    since `stream_options` is an error elsewhere.

    Raises:
        BodyError: as `wants_usage`.
    """
    if not view.flag("stream"):
        return {}
    options = view.inside("stream_options")
    if options is None:
        return {"stream_options": {"include_usage": True}}
    if options.flag("include_usage"):
        return {}
    return {"stream_options": msgspec.Raw(options.replace({"include_usage": True}))}


class FamilyTally(ABC):
    """What an answer says, from its events or as one piece. The last report of usage wins; none are summed."""

    __slots__ = ("_told_at", "done", "error", "model", "text_bytes", "tier", "undecoded", "usage")

    def __init__(self) -> None:
        self.model: str | None = None
        self.tier: str | None = None
        self.usage: Usage | None = None
        self.error: ErrorKind | None = None
        self.text_bytes = 0
        self._told_at = 0
        """How much text had come when the usage was reported."""
        self.undecoded = 0
        self.done = False
        """The answer has told its end."""

    @abstractmethod
    def add(self, value: object) -> bool:
        """Count a whole answer, an event or an error; `False`: it is none of them."""

    def only_reports(self, value: object) -> bool:  # noqa: ARG002 - see below
        """Whether the event only reports usage, and no client takes it that did not ask: none, where all do."""
        return False

    def event(self, block: Block) -> bool:
        """Count a piece of a stream; see `Tally`."""
        data = block.data
        if data is None:
            return False
        if data.strip() == b"[DONE]":
            self.done = True
            return False
        value = decode(data)
        self.add(value)
        if block.error:
            self.error = self.error or "other"
        elif value is None:
            self.undecoded += 1
        return self.only_reports(value)

    def take_error(self, value: object) -> bool:
        """Whether the value is, or has with it, an error."""
        if error_of(value) is None:
            return False
        self.error = classify(None, value)
        return True

    def take_names(self, value: object) -> None:
        """The model and tier that the value names."""
        if (model := pick(value, "model")) != self.model:
            self.model = name_of(model) or self.model
        if (tier := pick(value, "service_tier")) != self.tier:
            self.tier = name_of(tier) or self.tier

    def take_usage(self, usage: Usage | None) -> None:
        """A later report counts, unless it tells less than one before; one of nothing is none. The text that comes
        with it has been counted."""
        if usage is None or _is_empty(usage):
            return
        if usage.total_tokens is not None or self.usage is None:
            self.keep_usage(usage)

    def keep_usage(self, usage: Usage) -> None:
        """This is the report that counts so far."""
        self.usage = usage
        self._told_at = self.text_bytes

    def told_in_part(self) -> None:
        """The last report leaves out some of the text that came before it."""
        self._told_at = -1

    @property
    def ended(self) -> bool:
        """What was seen is all there is to come."""
        return self.done

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        usage = self.usage
        if usage is not None and self.text_bytes > self._told_at:
            usage = told_early(usage)
        if usage is not None and (self.model is not None or self.tier is not None):
            usage = msgspec.structs.replace(usage, model=self.model, service_tier=self.tier)
        return Answer(
            kind="success" if self.error is None else "error",
            usage=usage,
            model=self.model,
            error=self.error,
            text_bytes=self.text_bytes,
            finished=(whole or self.ended) and self.error is None,
            unread=unread + self.undecoded,
        )


def _is_empty(usage: Usage) -> bool:
    """Whether nothing at all was used, as servers say that do not count."""
    return usage.total_tokens == 0 and not (
        usage.audio_ms or usage.web_searches or usage.extra or usage.reported_nanousd
    )


class Family(ABC):
    """A dialect whose answers are one JSON value or server-sent events, and whose errors have OpenAI's shape."""

    __slots__ = ()

    @abstractmethod
    def tally(self) -> FamilyTally:
        """A new sum."""

    @abstractmethod
    def is_ours(self, value: object) -> bool:
        """Whether an object that may be anything has the shape of one of this dialect's answers or events."""

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body as it is: there is no place in it for either."""
        return view.body

    def read_plain(self, body: bytes) -> Answer | None:
        """What the usual answer with status 200 says, decoded in a shorter way; `None`: it is not of that kind."""
        del body
        return None

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says. An error object counts as an error even with status 200."""
        if status == 200 and (answer := self.read_plain(body)) is not None:
            return answer
        value = decode(body)
        tally = self.tally()
        tally.add(value)
        if not 200 <= status < 300:
            return Answer(kind="error", error=classify(status, value), usage=tally.usage)
        return tally.answer(whole=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:
        """A meter for the body of a response: server-sent events, or one JSON value."""
        if head.streams(b"text/event-stream"):
            return Streamed(Blocks(), self.tally(), strip=strip_usage)
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: an answer as a model or a dict, or an HTTP response with one."""
        status = pick(obj, "status_code")
        if isinstance(status, int):
            content = pick(obj, "content")
            if not isinstance(content, bytes) or not self.is_ours(decode(content)):
                return None
            return self.read_response(status, content)
        if not self.is_ours(obj):
            return None
        tally = self.tally()
        tally.add(obj)
        return tally.answer(whole=True)

    def item_meter(self) -> ItemMeter:
        """A meter for event objects, dicts, events that carry a `chunk` or `data`, and pieces of a raw stream."""
        return _Items(self)


class _Items:
    """The meter of the items that one function streams."""

    __slots__ = ("_family", "_known", "_raw", "_tally")

    def __init__(self, family: Family) -> None:
        self._family = family
        self._tally = family.tally()
        self._raw: _Raw | None = None
        self._known = False

    def add(self, item: object) -> None:
        if isinstance(item, str):
            item = item.encode("utf-8", "surrogatepass")
        if isinstance(item, bytes):
            if self._raw is None:
                self._raw = _Raw(self._family)
            self._raw.stream.feed(item)
            return
        for shape in (item, pick(item, "chunk"), pick(item, "data")):  # SDKs' own events wrap what was sent
            if self._family.is_ours(shape):
                self._known = True
                self._tally.add(shape)

    def answer(self) -> Answer | None:
        if self._known:
            return self._tally.answer()
        return self._raw.stream.answer() if self._raw is not None and self._raw.known else None


class _Raw:
    """The sum of a raw stream, and whether anything in it was of the family."""

    __slots__ = ("_family", "_tally", "known", "stream")

    def __init__(self, family: Family) -> None:
        self._family = family
        self._tally = family.tally()
        self.known = False
        self.stream = Streamed(Blocks(), self)

    @property
    def text_bytes(self) -> int:
        return self._tally.text_bytes

    def event(self, block: Block) -> bool:
        if not self.known and block.data is not None:
            self.known = self._family.is_ours(decode(block.data))
        return self._tally.event(block)

    def answer(self, *, unread: int = 0) -> Answer:
        return self._tally.answer(unread=unread)
