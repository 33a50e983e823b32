"""Who asks for which change, what comes of it, and what is written down about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.control.numbers import told
from asgi_llm_guard.control.state import Head
from asgi_llm_guard.control.values import MAX_INSTANT_MS, Kind, Value
from asgi_llm_guard.errors import ConfigurationError, GuardError

__all__ = ["Actor", "AuditEntry", "AuditQuery", "Change", "Conflict", "NotThere", "Verified", "text_of"]

_MOST_TEXT: Final = 1_000
_MOST_ROWS: Final = 10_000


class Conflict(GuardError):  # noqa: N818 - what happened, as with `LimitExceeded`
    """Somebody else has changed the entry since it was seen. Nothing was changed."""

    def __init__(self, kind: Kind, name: str, *, expected: int, version: int, by: str | None) -> None:
        what = f"is at version {version}" if version else "is not there"
        seen = f"version {expected} was seen" if expected else "it was to be new"
        whose = f", last changed by {by}" if by else ""
        super().__init__(f"{kind} {name!r} {what}{whose}, but {seen}. Look at it again, and change that.")
        self.kind: Kind = kind
        self.name = name
        self.expected = expected
        """The version that the change was made for; 0: the entry was to be new."""
        self.version = version
        """The version that there is; 0: the entry is not there."""
        self.by = by
        """Who changed it last; `None`: nobody did."""


class NotThere(GuardError):  # noqa: N818 - what happened, as with `LimitExceeded`
    """There is no such entry. Nothing was changed."""

    def __init__(self, kind: Kind, name: str) -> None:
        super().__init__(f"there is no {kind} {name!r}")
        self.kind: Kind = kind
        self.name = name


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One of several changes that are made together."""

    kind: Kind
    name: str
    value: Mapping[str, Any] | Value | None
    """Its data (see `Control.put`) or the value itself; `None`: it is removed."""
    expected: int | None = None
    """The version of the entry that was seen, 0: there is none; `None`: whatever it is."""


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks for a change.

    Raises:
        ConfigurationError: the name is empty.
    """

    name: str
    role: str = ""
    address: str = ""
    """Where the request came from: an address, or `cli`."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not text_of(self.name):
            raise ConfigurationError(f"actor: expected the name of whoever makes the change, got {told(self.name)}")
        for name in "name", "role", "address":
            msgspec.structs.force_setattr(self, name, text_of(getattr(self, name)))


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change, or one try that was refused."""

    seq: int
    """Without gaps, from 1."""
    at_ms: int
    version: int
    """Of the state after it."""
    actor: str
    role: str
    address: str
    verb: str
    """`put`, `remove`, `new_key`, `rotate_key`, `revoke_key`, or what `Control.note` was told."""
    target: str
    """`kind:name` of an entry, or what `Control.note` was told."""
    old: str | None
    """As JSON, without digests of keys; `None`: it was not there."""
    new: str | None
    reason: str
    refused: str | None
    """Why it was refused; `None`: it was done."""
    digest: str


class AuditQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries, the newest first.

    Raises:
        ConfigurationError: the limit is not a whole number from 1 to 10,000, or an instant, number or text is none.
    """

    since_ms: int = 0
    until_ms: int | None = None
    """Before this instant."""
    actor: str | None = None
    verb: str | None = None
    target: str | None = None
    """Exactly; `department:` for all departments."""
    refused: bool | None = None
    """Only tries that were refused, or only what was done."""
    before: int | None = None
    """Only what is older than the entry of this number: for the next page."""
    limit: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 1 <= self.limit <= _MOST_ROWS:
            raise ConfigurationError(
                f"audit: limit: expected a whole number from 1 to {_MOST_ROWS}, got {told(self.limit)}"
            )
        for name in "actor", "verb", "target":
            if not isinstance(getattr(self, name), str | None):
                raise ConfigurationError(f"audit: {name}: expected a text, got {told(getattr(self, name))}")
        for name in "since_ms", "until_ms", "before":
            value = getattr(self, name)
            if (value is not None or name == "since_ms") and (
                isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INSTANT_MS
            ):
                raise ConfigurationError(
                    f"audit: {name}: expected a whole number up to {MAX_INSTANT_MS}, got {told(value)}"
                )


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What looking through the whole audit has shown."""

    rows: int
    """How many there are, up to the first that is wrong."""
    unsealed: int
    """How many of them were written by somebody without the secret."""
    head: Head
    """The last sound one. Keep it elsewhere: a later `verify_audit(since=...)` shows that it is still there."""
    broken_at: int | None = None
    """The number of the first row that is missing or was changed; `None`: none is."""
    why: str = ""

    @property
    def sound(self) -> bool:
        return self.broken_at is None


def text_of(text: object) -> str:
    """A text as the audit keeps it: of one line, and of at most 1,000 characters."""
    shown = "".join(
        [char if char.isprintable() else " " for char in (text if isinstance(text, str) else told(text))[:_MOST_TEXT]]
    )
    return shown.strip()
