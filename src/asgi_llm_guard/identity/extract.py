"""Where ids that the client may choose freely (session ids) are read from.

    first_of(header("x-session-id"), body("metadata.session_id"), baggage("session.id"))

An id read here narrows a limit of its caller and never widens one, so it needs no proof; it
is bounded in length and characters, and refused when it is sent twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import unquote

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import (
    MAX_ID_LENGTH,
    Headers,
    IdentityError,
    check_max_length,
    clean,
    decode,
    header_name,
    scan,
    sent,
    spellings,
)

__all__ = [
    "DEFAULT_SESSION",
    "BaggageEntry",
    "BodyField",
    "BodyLike",
    "Extractor",
    "FirstOf",
    "HeaderField",
    "VendorHeader",
    "baggage",
    "body",
    "first_of",
    "header",
    "vendor_header",
]

_MAX_INTEGER: Final = 10**MAX_ID_LENGTH


class BodyLike(Protocol):
    """A parsed request body."""

    def get(self, path: str, /) -> Any:
        """What stands at the dotted `path`, or `None`."""
        ...


class Extractor(Protocol):
    """Reads one id from a request."""

    @property
    def needs_body(self) -> bool:
        """Whether the body must have been read."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The headers and fields that are read, in order, for messages such as "send one of …"."""
        ...

    def extract(self, headers: Headers, view: BodyLike | None, /) -> str | None:
        """The id, or `None` if the request has none. `view` is `None` if there is no readable body.

        Raises:
            IdentityError: too long, with characters that are not allowed, or sent twice.
        """
        ...


@dataclass(frozen=True, slots=True)
class HeaderField:
    """The value of one header; see `header`."""

    name: str
    max_length: int = MAX_ID_LENGTH
    raw: bytes = field(init=False, repr=False)
    table: Mapping[bytes, bytes] = field(init=False, repr=False, compare=False)
    needs_body: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_max_length(self.max_length, name=f"header({self.name!r}): max_length")
        object.__setattr__(self, "name", header_name(self.name))
        object.__setattr__(self, "raw", self.name.encode())
        object.__setattr__(self, "table", spellings([self.name]))

    @property
    def names(self) -> tuple[str, ...]:
        return (f"header {self.name}",)

    def extract(self, headers: Headers, view: BodyLike | None = None, /) -> str | None:  # noqa: ARG002 - see Extractor
        return self.pick(scan(headers, self.table))

    def pick(self, found: Mapping[bytes, tuple[bytes, bytes]]) -> str | None:
        """The id among headers that were already looked up."""
        value = sent(self.raw, found, self.table)
        return None if value is None else decode(value, f"The header {self.name}", self.max_length)


@dataclass(frozen=True, slots=True)
class BodyField:
    """A field of the JSON body; see `body`."""

    path: str
    max_length: int = MAX_ID_LENGTH
    needs_body: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_max_length(self.max_length, name=f"body({self.path!r}): max_length")
        if not isinstance(self.path, str) or not all(self.path.split(".")):
            raise ConfigurationError(f"body: expected a dotted path such as 'metadata.session_id', got {self.path!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return (f"field {self.path}",)

    def extract(self, headers: Headers, view: BodyLike | None = None, /) -> str | None:  # noqa: ARG002 - see Extractor
        if view is None:
            return None
        value = view.get(self.path)
        if value is None:
            return None
        what = f"The field {self.path}"
        if isinstance(value, str):
            return clean(value, what, self.max_length)
        if isinstance(value, int) and not isinstance(value, bool):
            # Python refuses to write out integers of thousands of digits; such a number is too long anyway.
            return clean(str(value) if abs(value) < _MAX_INTEGER else "9" * 4097, what, self.max_length)
        if isinstance(value, float) and math.isfinite(value):
            return clean(str(value), what, self.max_length)
        raise IdentityError(f"{what} must be a text or a number.")


@dataclass(frozen=True, slots=True)
class BaggageEntry:
    """One entry of the `baggage` header; see `baggage`."""

    key: str
    max_length: int = MAX_ID_LENGTH
    needs_body: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_max_length(self.max_length, name=f"baggage({self.key!r}): max_length")
        if not isinstance(self.key, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", self.key, re.ASCII):
            raise ConfigurationError(f"baggage: expected a key such as 'session.id', got {self.key!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return (f"baggage entry {self.key}",)

    def extract(self, headers: Headers, view: BodyLike | None = None, /) -> str | None:  # noqa: ARG002 - see Extractor
        what, wanted = f"The baggage entry {self.key}", self.key.encode()
        found: bytes | None = None
        for name, line in headers:
            if name != b"baggage" or wanted not in line:
                continue
            for member in line.split(b","):
                key, equals, rest = member.partition(b"=")
                if not equals or key.strip(b" \t") != wanted:
                    continue
                if found is not None:
                    raise IdentityError(f"{what} must be sent once.")
                found = rest.partition(b";")[0]
        if found is None:
            return None
        try:
            text = unquote(found.decode("ascii").strip(" \t"), errors="strict")
        except UnicodeDecodeError:
            raise IdentityError(f"{what} is not percent-encoded UTF-8.") from None
        return clean(text, what, self.max_length)


@dataclass(frozen=True, slots=True)
class VendorHeader:
    """Any header of a family of names; see `vendor_header`."""

    pattern: str
    min_length: int = 8
    max_length: int = MAX_ID_LENGTH
    needs_body: bool = field(default=False, init=False, repr=False)
    ends: tuple[bytes, bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_max_length(self.min_length, name=f"vendor_header({self.pattern!r}): min_length")
        check_max_length(self.max_length, name=f"vendor_header({self.pattern!r}): max_length")
        if not isinstance(self.pattern, str) or self.pattern.count("*") != 1 or len(self.pattern) < 3:
            raise ConfigurationError(
                f"vendor_header: expected a name with one '*' ('x-*-session-id'), got {self.pattern!r}"
            )
        object.__setattr__(self, "pattern", header_name(self.pattern))
        before, _, after = self.pattern.encode().partition(b"*")
        object.__setattr__(self, "ends", (before, after))

    @property
    def names(self) -> tuple[str, ...]:
        return (f"header {self.pattern}",)

    def extract(self, headers: Headers, view: BodyLike | None = None, /) -> str | None:  # noqa: ARG002 - see Extractor
        before, after = self.ends
        shortest = len(before) + len(after) + 1
        for name, value in headers:
            if name.endswith(after) and name.startswith(before) and len(name) >= shortest:
                text = value.strip(b" \t")
                if self.min_length <= len(text) <= self.max_length and _VENDOR_ID.fullmatch(text):
                    return text.decode("ascii")
        return None


_VENDOR_ID: Final = re.compile(rb"[A-Za-z0-9_-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class FirstOf:
    """The first extractor that finds an id; see `first_of`."""

    parts: tuple[Extractor, ...]
    needs_body: bool = field(init=False, repr=False)
    table: Mapping[bytes, bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigurationError("first_of: expected at least one extractor, got none")
        for part in self.parts:
            if isinstance(part, str):
                raise ConfigurationError(f"first_of: expected extractors; say header({part!r}) or body({part!r})")
        object.__setattr__(self, "needs_body", any(part.needs_body for part in self.parts))
        object.__setattr__(self, "table", spellings(part.name for part in self.parts if isinstance(part, HeaderField)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def extract(self, headers: Headers, view: BodyLike | None = None, /) -> str | None:
        found = scan(headers, self.table)  # once for all headers: this runs for every request
        for part in self.parts:
            if isinstance(part, HeaderField):
                if not found:
                    continue
                value = part.pick(found)
            else:
                value = part.extract(headers, view)
            if value is not None:
                return value
        return None


def header(name: str, *, max_length: int = MAX_ID_LENGTH) -> HeaderField:
    """Read the id from the header `name`; letter case does not matter, `-` and `_` do.

    A request that has the header twice, or once as `x-session-id` and once as `x_session_id`, is
    refused. An empty value counts as absent.

    Raises:
        ConfigurationError: not a header's name, or not a length from 1 to 4096.
    """
    return HeaderField(name, max_length)


def body(path: str, *, max_length: int = MAX_ID_LENGTH) -> BodyField:
    """Read the id from the JSON body at the dotted `path`; a number is taken as its text.

    Raises:
        ConfigurationError: not a dotted path, or not a length from 1 to 4096.
    """
    return BodyField(path, max_length)


def baggage(key: str, *, max_length: int = MAX_ID_LENGTH) -> BaggageEntry:
    """Read the id from the entry `key` of the `baggage` header that instrumented callers send.

    Source: W3C Baggage, section 3 (values are percent-encoded; the header may be split over lines).

    Raises:
        ConfigurationError: not a key, or not a length from 1 to 4096.
    """
    return BaggageEntry(key, max_length)


def vendor_header(pattern: str, *, min_length: int = 8, max_length: int = MAX_ID_LENGTH) -> VendorHeader:
    """Read the id from the first header whose name fits `pattern`, which has one `*`: `x-*-session-id`.

    Nobody agreed on the meaning of such a header, so a value that does not look like an id (letters,
    digits, `_` and `-`, of at least `min_length`) is passed over, not refused.

    Raises:
        ConfigurationError: not a name with one `*`, or not a length from 1 to 4096.
    """
    return VendorHeader(pattern, min_length, max_length)


def first_of(*extractors: Extractor) -> FirstOf:
    """Ask `extractors` in order; the first that finds an id wins.

    A header that is sent twice is refused even if an earlier extractor has found an id.

    Raises:
        ConfigurationError: no extractors, or something else among them.
    """
    parts: list[Extractor] = []
    for extractor in extractors:
        parts.extend(extractor.parts if isinstance(extractor, FirstOf) else (extractor,))
    return FirstOf(tuple(parts))


DEFAULT_SESSION: Final = first_of(
    header("x-litellm-session-id"),
    header("x-session-id"),
    body("metadata.session_id"),
    body("litellm_metadata.session_id"),
)
"""Where session ids are looked for unless the guard or a route says otherwise."""
