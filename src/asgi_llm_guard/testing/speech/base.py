"""What every dialect is spoken with: a request read, an answer as one body or as a stream, an error.

Nothing here, or in the dialects, uses the code that reads answers for the guard: what is spoken and what is
understood must not share a mistake.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import msgspec

from asgi_llm_guard.testing.behaviour import Behaviour, Trouble
from asgi_llm_guard.testing.clock import NEW_YEAR
from asgi_llm_guard.testing.sale import FakeRequest, Filler, Sale
from asgi_llm_guard.usage import Usage

__all__ = [
    "CREATED",
    "EVENT_STREAM",
    "NOWHERE",
    "Call",
    "Fault",
    "Speech",
    "Streaming",
    "Troubles",
    "UnreadableError",
    "chat_texts",
    "counted",
    "dump",
    "event",
    "known_words",
    "text_of",
    "typed_event",
]

CREATED: Final = int(NEW_YEAR.timestamp())
NOWHERE: Final = re.compile(r"(?!)")
"""The path of those that have none of their own."""
EVENT_STREAM: Final = "text/event-stream; charset=utf-8"


Bucket = Literal["cache_read", "cache_write", "cache_write_1h", "reasoning"]
Troubles = Mapping[Trouble, tuple[int, str | None, str]]
"""Status, code and message of each."""


class UnreadableError(ValueError):
    """What no provider would take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request before anybody has read it."""

    platform: str
    """Whose API it is: told by the host, else what the fake provider is."""
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    raw: bytes
    named: Mapping[str, str]
    """What the path says: the model, the operation."""

    def json(self) -> dict[str, Any]:
        """Raises `UnreadableError` for what is no JSON object."""
        try:
            body = msgspec.json.decode(self.raw)
        except msgspec.DecodeError as error:
            raise UnreadableError(f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise UnreadableError("the body is no JSON object")
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error, before it is put into a dialect's words."""

    status: int
    message: str
    code: str | None = None
    retry_after: str | None = None


class Speech(ABC):
    """How one API is spoken."""

    dialect: ClassVar[str]
    path: ClassVar[re.Pattern[str]]
    """Of the whole path; its groups are `Call.named`."""
    shared_path: ClassVar[re.Pattern[str] | None] = None
    """A path that is other dialects' as well, and this one's on its platform."""
    platform: ClassVar[str] = ""
    free: ClassVar[bool] = False
    """Whether it generates nothing, and is not a call."""
    buckets: ClassVar[frozenset[Bucket]] = frozenset({"cache_read", "cache_write", "cache_write_1h", "reasoning"})
    """What the API tells apart, and so prices apart: other parts of input and output are like the rest of it."""
    id_prefix: ClassVar[str] = ""
    id_header: ClassVar[str] = ""
    """Where an answer's id stands; empty: nowhere."""
    troubles: ClassVar[Troubles] = {}
    """Status, code and message of what goes wrong in this provider's words."""

    def hears(self, path: str, platform: str) -> Mapping[str, str] | None:
        """What the path says, if it is spoken on; `None` if it is not."""
        matched = self.path.fullmatch(path)
        if matched is None and self.shared_path is not None and platform == self.platform:
            matched = self.shared_path.fullmatch(path)
        return matched and {name: text for name, text in matched.groupdict().items() if text is not None}

    @abstractmethod
    def read(self, call: Call) -> FakeRequest:
        """Raises `UnreadableError`."""

    def words(self, request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:
        """The words of an answer, and why it ends."""
        return known_words(request, behaviour)

    def consumed(self, sale: Sale) -> Usage:
        """What has been used so far, to be billed."""
        behaviour, buckets = sale.behaviour, self.buckets
        return Usage(
            input_tokens=sale.input_tokens,
            output_tokens=sale.produced + sale.reasoning_tokens,
            cache_read_tokens=behaviour.cache_read_tokens if "cache_read" in buckets else 0,
            cache_write_tokens=behaviour.cache_write_tokens if "cache_write" in buckets else 0,
            cache_write_1h_tokens=behaviour.cache_write_1h_tokens if "cache_write_1h" in buckets else 0,
            reasoning_tokens=sale.reasoning_tokens if "reasoning" in buckets else 0,
            model=sale.model,
        )

    def tells(self, sale: Sale) -> bool:
        """Whether a complete answer says what it used."""
        return sale.tells

    def report(self, sale: Sale) -> Mapping[str, Any]:
        """What the answer says it used: the truth so far, unless the behaviour has something else to say."""
        reports = sale.behaviour.reports
        if isinstance(reports, Usage):
            return self.usage(reports)
        return reports if reports is not None else self.usage(self.consumed(sale))

    @abstractmethod
    def usage(self, used: Usage) -> Mapping[str, Any]:
        """Usage as the dialect writes it."""

    def whole(self, sale: Sale) -> tuple[bytes, str]:
        """The answer as one body, and its type."""
        return dump(self.body(sale)), "application/json"

    @abstractmethod
    def body(self, sale: Sale) -> Mapping[str, Any]:
        """The answer as one JSON object."""

    def counts(self, sale: Sale) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 - only some have any
        """Headers of an answer in one body that say what it used."""
        return ()

    def fault(self, behaviour: Behaviour, *, status: int) -> Fault:
        """The error that a behaviour stands for."""
        code, message = behaviour.code, f"the fake provider answers {status}"
        if behaviour.trouble is not None:
            _, code, message = self.troubles[behaviour.trouble]
        return Fault(
            status=status,
            message=behaviour.message or message,
            code=code,
            retry_after=dict(behaviour.headers).get("retry-after"),
        )

    def status(self, behaviour: Behaviour) -> int:
        """The status that a behaviour answers with."""
        return behaviour.status if behaviour.trouble is None else self.troubles[behaviour.trouble][0]

    @abstractmethod
    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        """Body and headers of an error."""


class Streaming(Speech):
    """How an API is spoken that answers word by word, if it is asked to."""

    stream_type: ClassVar[str] = EVENT_STREAM
    broken: ClassVar[bytes] = b'data: {"id":\n\n'
    """An event that breaks off."""

    def begins(self, sale: Sale) -> str:  # noqa: ARG002 - only some have several
        """The type of a stream."""
        return self.stream_type

    def breaking(self, sale: Sale) -> bytes:  # noqa: ARG002 - as above
        """An event that breaks off."""
        return self.broken

    def opening(self, sale: Sale) -> Iterator[bytes]:  # noqa: ARG002 - dialects without one say nothing
        """The events before the first word."""
        yield from ()

    @abstractmethod
    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:
        """One word."""

    @abstractmethod
    def closing(self, sale: Sale) -> Iterator[bytes]:
        """The events after the last word."""

    @abstractmethod
    def failing(self, sale: Sale) -> bytes:
        """An error inside the stream."""


def dump(body: object) -> bytes:
    """As most providers write JSON: without spaces, in UTF-8."""
    return msgspec.json.encode(body)


def event(data: object) -> bytes:
    """One event without a name."""
    return b"data: " + dump(data) + b"\n\n"


def typed_event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + dump(data) + b"\n\n"


def text_of(content: object) -> str:
    """The text of a message, whether it is a text or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return " ".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def chat_texts(messages: object) -> tuple[str, ...]:
    """The text of each message. Raises `UnreadableError` if there is none."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UnreadableError("messages: expected a list of at least one message")
    return tuple(text_of(message.get("content")) for message in messages)


def counted(texts: Sequence[str]) -> int:
    """The tokens of a prompt: one for every four bytes, three for each message and three for the answer."""
    return sum(math.ceil(len(text.encode()) / 4) + 3 for text in texts) + 3


def known_words(request: FakeRequest, behaviour: Behaviour) -> tuple[Sequence[str], str]:
    """The words of an answer as the behaviour and the request's limit have it."""
    if behaviour.tool is not None:
        return json.dumps(behaviour.tool[1]).split(" "), "tool"
    if behaviour.output_tokens is not None:
        return Filler(behaviour.output_tokens, word_bytes=behaviour.word_bytes), "stop"
    text = behaviour.text if behaviour.text is not None else f"Echo: {request.texts[-1] if request.texts else ''}"
    words = text.split()
    allowed = request.allowed_tokens
    if allowed is not None and allowed < len(words):
        return words[:allowed], "length"
    return words, "stop"
