"""Who was verified, and how a resolver says so."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import msgspec

from asgi_llm_guard.errors import ConfigurationError, GuardError
from asgi_llm_guard.money import MAX_AMOUNT

__all__ = [
    "MAX_ID_LENGTH",
    "Headers",
    "Identity",
    "IdentityError",
    "Resolver",
    "Scope",
    "check_max_length",
    "check_params",
    "clean",
    "decode",
    "header_name",
    "scan",
    "sent",
    "spellings",
]

Scope = Mapping[str, Any]
"""An ASGI connection scope."""

Headers = Iterable[tuple[bytes, bytes]]
"""`scope["headers"]`: names in lower case, in the order of the request."""

MAX_ID_LENGTH: Final = 256
"""The longest id that is taken, in characters, unless a resolver or extractor says otherwise."""

_NO_PARAMS: Final[Mapping[str, object]] = {}
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_MAX_SEPARATORS: Final = 8


class IdentityError(GuardError):
    """What a request says about itself cannot be accepted.

    The message is for the caller to read: it names the header or field, never the value. Answered
    with `status`: 400 for what is malformed or sent twice (code `invalid_request`), 403 for credentials
    that do not hold (`credentials_invalid`). For these two the guard's `statuses` may say otherwise.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A verified caller, and what its credentials say about it."""

    caller: str
    """The verified principal."""
    user: str | None = None
    """The person behind the caller, where the two differ."""
    departments: tuple[str, ...] = ()
    agent: str | None = None
    params: Mapping[str, object] = _NO_PARAMS
    """Limits that belong to the caller, such as `max_iterations`; checked where they are loaded."""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.caller, str) or not self.caller:
            raise ConfigurationError(
                f"Identity.caller: expected a non-empty text, got {self.caller!r}; "
                "a resolver returns None for the anonymous caller"
            )


class Resolver(Protocol):
    """Tells who asks. Pure and quick: it is called once for every request, on the event loop."""

    def __call__(self, scope: Scope, /) -> Identity | None:
        """The verified caller of the request, or `None` for the shared anonymous one.

        Raises:
            IdentityError: the request is refused; see there.
        """
        ...


# -------------------------------------------------------------------------------------- ids


def check_max_length(max_length: object, *, name: str) -> None:
    """Refuse anything but a whole number from 1 to 4096.

    Raises:
        ConfigurationError: naming `name`.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not 1 <= max_length <= 4096:
        raise ConfigurationError(f"{name}: expected a whole number from 1 to 4096, got {max_length!r}")


def clean(text: str, what: str, max_length: int = MAX_ID_LENGTH) -> str | None:
    """`text` without the spaces around it; `None` if nothing is left.

    Letters, digits, punctuation and inner spaces of every script are taken; control and format
    characters (line breaks and text direction among them) are not.

    Raises:
        IdentityError: too long, or with other characters; says so of `what`.
    """
    text = text.strip(" \t")
    if not text:
        return None
    if len(text) > max_length:
        raise IdentityError(f"{what} is longer than {max_length} characters.")
    if not text.isprintable():
        raise IdentityError(f"{what} contains control characters or characters that cannot be shown.")
    return text


def decode(value: bytes, what: str, max_length: int = MAX_ID_LENGTH) -> str | None:
    """The text of a header's value, as `clean` gives it.

    Raises:
        IdentityError: as `clean`, and for bytes that are not UTF-8.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise IdentityError(f"{what} is not valid UTF-8.") from None
    return clean(text, what, max_length)


# ---------------------------------------------------------------------------------- headers


def header_name(name: object) -> str:
    """`name` in lower case.

    Raises:
        ConfigurationError: not the name of an HTTP header.
    """
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise ConfigurationError(f"header: expected a header's name such as 'x-session-id', got {name!r}")
    if name.count("-") + name.count("_") > _MAX_SEPARATORS:
        raise ConfigurationError(f"header: at most {_MAX_SEPARATORS} hyphens and underscores in a name, got {name!r}")
    return name.lower()


def spellings(names: Iterable[str]) -> dict[bytes, bytes]:
    """Every way to write `names` with hyphens and underscores, each with the hyphenated form.

    Servers and proxies differ in whether they take `x_session_id` and `x-session-id` for one
    header; `scan` uses this table to refuse requests that carry both.
    """
    table: dict[bytes, bytes] = {}
    for name in names:
        parts = re.split("[-_]", name)
        canonical = "-".join(parts).encode()
        for separators in itertools.product("-_", repeat=len(parts) - 1):
            text = parts[0] + "".join(map("".join, zip(separators, parts[1:], strict=True)))
            table[text.encode()] = canonical
    return table


def scan(headers: Headers, table: Mapping[bytes, bytes]) -> dict[bytes, tuple[bytes, bytes]]:
    """The headers in `table` (see `spellings`): hyphenated name → name as sent, and value.

    Raises:
        IdentityError: one of them is there twice, in the same spelling or in two.
    """
    found: dict[bytes, tuple[bytes, bytes]] = {}
    if table.keys().isdisjoint(dict(headers)):
        return found
    for name, value in headers:
        if name in table:
            canonical = table[name]
            if canonical in found:
                raise IdentityError(f"The header {canonical.decode()} must be sent once, in one spelling.")
            found[canonical] = (name, value)
    return found


def sent(name: bytes, found: Mapping[bytes, tuple[bytes, bytes]], table: Mapping[bytes, bytes]) -> bytes | None:
    """The value of `name` among the headers that `scan` found. Another spelling is another header."""
    pair = found.get(table[name])
    return pair[1] if pair is not None and pair[0] == name else None


# ----------------------------------------------------------------------------------- params


def check_params(params: object, *, prefix: str = "params.") -> dict[str, object]:
    """Limits that belong to a key or an agent, checked: `max_iterations` as a whole number.

    A number given as text is taken as a number, and `None` means without limit. Names that start
    with `x_` belong to the service's own policies and are passed on as they are.

    Raises:
        ConfigurationError: another name, or a value that is not a whole number from 0 to 2^53 - 1;
            names `prefix` and the name, and the value.
    """
    if not isinstance(params, Mapping):
        raise ConfigurationError(
            f"{prefix.rstrip('.')}: expected a table such as {{ max_iterations = 25 }}, got {params!r}"
        )
    checked: dict[str, object] = {}
    for name, value in params.items():
        if isinstance(name, str) and name.startswith("x_"):
            checked[name] = value
        elif name == "max_iterations":
            checked[name] = None if value is None else _whole_number(value, name=f"{prefix}{name}")
        else:
            raise ConfigurationError(
                f"{prefix}{name}: unknown parameter; known are max_iterations, and names that start with x_ "
                "for policies of your own"
            )
    return checked


def _whole_number(value: object, *, name: str) -> int:
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9][0-9_]{0,20}\s*", value, re.ASCII):
        number = int(value.replace("_", ""))
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_AMOUNT:
        raise ConfigurationError(f"{name}: expected a whole number from 0 to {MAX_AMOUNT}, got {value!r}")
    return number
