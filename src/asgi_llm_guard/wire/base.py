"""What every wire format (dialect) can tell: what a request asks for, and what an answer used.

Pure code: bytes and values in, values out. Reading a request refuses what it cannot bound
(`BodyError`); reading an answer never fails, because metering must not break a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.peek import BodyView

__all__ = ["Answer", "Ask", "Dialect", "ErrorKind", "Head", "Headers", "ItemMeter", "Meter"]

Headers = Sequence[tuple[bytes, bytes]]
"""As ASGI has them: names may be in any case, and come more than once."""

ErrorKind = Literal[
    "rate_limit",  # waiting helps
    "quota",  # waiting does not help: credit or spend limit used up
    "overload",  # the provider is short of capacity
    "context_overflow",  # the input is larger than the model's window
    "invalid",  # the request is wrong
    "auth",  # the credentials are wrong, or not enough
    "other",
]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for."""

    model: str
    """The model as the request names it."""
    max_output_tokens: int | None = None
    """The most output tokens that one choice may have; `None`: the request sets no limit."""
    limits_output: bool = True
    """The request has a place for `max_output_tokens`, and a lower one may be put there."""
    choices: int = 1
    """How many answers are generated, each up to `max_output_tokens`."""
    stream: bool = False
    wants_usage: bool = False
    """The client asked for the usage of the stream itself; it must not be stripped."""
    service_tier: str | None = None
    """The tier that the request asks for, where prices differ by it."""
    input_tokens: int | None = None
    """At most so many tokens are sent, where the body is a form with files; `None`: the body tells."""
    images: int = 0
    """At most so many images are generated, over all choices, where each has its price."""
    characters: int = 0
    """So many characters are to be spoken, where speech is billed by them."""
    audio_ms: int = 0
    """At most so much audio is sent along, in milliseconds, where it is billed by its length."""
    alternatives: tuple[str, ...] = ()
    """Other models that the request names, which may answer instead of `model` or beside it."""


class Head(msgspec.Struct, frozen=True):
    """The head of a response, and what it answers."""

    status: int
    headers: Headers = ()
    path: str = ""
    """Where the request was sent."""
    ask: Ask | None = None
    """What the request asked for; `None`: not known."""

    def header(self, name: bytes) -> bytes:
        """The first header of this name (given in lower case); empty if there is none."""
        length = len(name)
        for key, value in self.headers:
            if len(key) == length and key.lower() == name:
                return value
        return b""

    def streams(self, *types: bytes) -> bool:
        """Whether the body is a stream of one of these content types. An error is read as one piece, whatever its type."""
        return 200 <= self.status < 300 and self.header(b"content-type").lower().startswith(types)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer, or the part of it that was seen, says about itself."""

    kind: Literal["success", "error"]
    usage: Usage | None = None
    """As the provider reports it; `None`: not reported, or not believable."""
    model: str | None = None
    """The model that answered, as the answer names it."""
    error: ErrorKind | None = None
    """For `kind="error"` only."""
    text_bytes: int = 0
    """UTF-8 bytes of generated text, tool-call arguments, refusal and reasoning, over all choices. For answers
    that were cut before they told their usage; an error with `text_bytes` came in the middle of a stream."""
    finished: bool = False
    """The answer came to its own end. `False`: it was cut, or broke off with an error."""
    unread: int = 0
    """Stream events that could not be read: not JSON, or too large. `text_bytes` is then a lower bound."""


class Meter(Protocol):
    """Reads the body of one response as it passes: a whole body or a stream, in bounded memory."""

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of generated text so far. Cheap: it is asked for after every chunk."""
        ...

    @property
    def ended(self) -> bool:
        """The ending given to `cut` has been forwarded: nothing more is."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """What to forward now. Without stripping or cutting it is `chunk` itself; never raises, whatever the bytes."""
        ...

    def cut(self, ending: bytes) -> bytes:
        """End the stream for the client: forward what is left of the event that has begun, then `ending`.

        Gives what to forward at once: `ending`, if no event has begun; else it comes with a later `feed`, or with
        `finish`. What is fed after it is still read, and not forwarded.
        """
        ...

    def finish(self) -> bytes:
        """The stream has ended by itself: what is still to be forwarded. Not for streams that broke off."""
        ...

    def answer(self) -> Answer:
        """What was seen so far."""
        ...


class ItemMeter(Protocol):
    """Reads the items that a function streams: a library's chunk objects, dicts, or pieces of a raw stream."""

    def add(self, item: object) -> None:
        """Count one item. Items of unknown shape are passed over; never raises."""
        ...

    def answer(self) -> Answer | None:
        """What was seen so far; `None`: no item had a known shape."""
        ...


class Dialect(Protocol):
    """One wire format. Stateless."""

    @property
    def name(self) -> str:
        """Names the dialect in settings and refusals."""
        ...

    @property
    def provider(self) -> str | None:
        """The provider that alone speaks it; `None`: many do, and the dialect does not tell which."""
        ...

    def recognises(self, path: str, host: str = "") -> bool:
        """Whether POST requests to this path speak it, and are billed. `host`: where it is known, in lower case."""
        ...

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. `path`: where it was sent, for dialects that name the model there.

        Raises:
            BodyError: a value that the guard decides on is missing or malformed; names it.
        """
        ...

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:
        """The body to send: asking for the usage of the stream, and for no more output tokens than given.

        A limit that the request sets is lowered, never raised. Nothing to change gives the body itself.

        Raises:
            BodyError: as `read_request`.
        """
        ...

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says. A body that cannot be read is an answer without usage."""
        ...

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:
        """A meter for the body of a response, which must not be content-encoded.

        `strip_usage`: the guard asked for usage and the client did not. A body of a kind that cannot be read gives
        a meter that forwards it, and says what is known without it.
        """
        ...

    def read_object(self, obj: object) -> Answer | None:
        """What a library's response object, a dict or an HTTP response says, by its shape; `None`: of another shape."""
        ...

    def item_meter(self) -> ItemMeter:
        """A meter for the items that a function streams."""
        ...
