"""What the processes of one guard share beside counters: documents, tallies and marks; and which calls are open.

A storage that keeps the first three is a `KeepsShared`, and one that can list open calls a `ListsCalls`.

Rule 1: a document has a name, a version and its bytes. The highest version that was published stays, whoever comes last;
a reader that names the version it knows is told a newer one, or that there is none.

Rule 2: a tally counts keys by the hour. Sums are exact however many processes add at once. An hour of a name has at most
as many keys as `most` says; what comes after them counts as `OTHER`. Hours end: see `TALLY_MS`.

Rule 3: of all who `mark` a name, over all processes, exactly one is told that it did, until the mark is over by the
storage's own clock or was taken away.

Rule 4: no operation changes a counter, a hold or a record. None of this is exported.

Rule 5: an operation whose reply was lost may be asked again, by the storage too: `publish` then says what is so, a
`mark` is its own, and a `tally` counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

import msgspec

from asgi_llm_guard.claims import Unit
from asgi_llm_guard.usage import UsageRecord

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "MAX_NAME_CHARS",
    "OTHER",
    "TALLY_MS",
    "TALLY_MS_REDIS",
    "Document",
    "KeepsShared",
    "ListsCalls",
    "OpenCall",
    "OpenHold",
    "Shared",
    "Tally",
    "check_counts",
    "check_name",
    "check_publish",
]

MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
"""No document is longer."""

MAX_NAME_CHARS: Final = 512
"""Nor the name of a document, a tally, a key in one, or a mark."""

TALLY_MS: Final = 90 * 86_400_000
"""How long an hour of a tally is kept by memory and SQLite, from its beginning."""

TALLY_MS_REDIS: Final = 8 * 86_400_000
"""The same by Redis and Valkey."""

OTHER: Final = "other"
"""The key of a tally under which is counted what has found no room."""

_MOST_MS: Final = 1 << 52  # exact in a double, which is what scripts of Redis count in


class Document(msgspec.Struct, frozen=True):
    """What was published last under a name."""

    version: int
    data: bytes


class Tally(msgspec.Struct, frozen=True):
    """How often a key was counted in an hour."""

    hour_ms: int
    """When the hour began."""
    key: str
    count: int


class OpenHold(msgspec.Struct, frozen=True):
    """What an open call has taken of one counter."""

    policy: str
    scope: str
    subject: str
    unit: Unit
    amount: int
    """Tokens, calls, slots, iterations or nano-USD, as `unit` says."""


class OpenCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that was reserved and not settled yet, by whichever process."""

    call_id: str
    owner: str
    """The process that holds it."""
    at_ms: int
    """When it was reserved, by the storage's clock."""
    draft: UsageRecord | None
    """What will be recorded if nobody settles it; `None`: nothing."""
    held: tuple[OpenHold, ...]
    """Not what came out of a local share (leases), which is counted with its lease."""


class Shared(Protocol):
    """What the processes of one guard share. See the rules at the top of this file. From any thread that runs an event loop.

    Every operation raises `StorageError` where the store does not answer; its outcome is then unknown.
    """

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        """Keep the document if its version is higher than that of the one that is there; whether it is the one that is
        there now. The same version with other bytes is not.

        Versions count from 1. Documents have no end.
        """
        ...

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        """The document, if its version is higher than `known`. One small read if it is not."""
        ...

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        """Add the counts, each from 1, to the hour that began at `hour_ms`. `most`: how many keys it may have, `OTHER` apart."""
        ...

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        """The hours that began at or after `since_ms`, the oldest first, and in each the keys in their order."""
        ...

    async def mark(self, name: str, *, until_ms: int) -> bool:
        """Whether this caller has marked the name: `False` if somebody else has, and its mark is not over. It lasts
        until `until_ms`; one that is over from the start is not kept, and says `False`."""
        ...

    async def unmark(self, name: str) -> None:
        """Take the mark away, whoever has made it."""
        ...


@runtime_checkable
class KeepsShared(Protocol):
    """A storage that keeps documents, tallies and marks."""

    def shared(self) -> Shared:
        """Cheap; touches nothing that is kept.

        Raises:
            ConfigurationError: this storage cannot keep them after all.
        """
        ...


@runtime_checkable
class ListsCalls(Protocol):
    """A storage that can say which calls are open."""

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        """Open calls of all processes, the newest first, at most `limit`.

        Calls that are reserved or settled meanwhile may be there or not; none is there twice.

        Raises:
            StorageError: the store does not answer.
        """
        ...


def check_name(name: str) -> str:
    """The name.

    Raises:
        ValueError: it is empty, or longer than `MAX_NAME_CHARS`, or cannot be written in UTF-8.
    """
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise ValueError(f"shared: a name has from 1 to {MAX_NAME_CHARS} characters, got {len(name)}")
    name.encode()
    return name


def check_publish(name: str, version: int, data: bytes) -> None:
    """Refuse what no storage takes.

    Raises:
        ValueError: the name is none, the version is below 1, or the document is longer than `MAX_DOCUMENT_BYTES`.
    """
    check_name(name)
    if not 0 < version < _MOST_MS:
        raise ValueError(f"shared: versions count from 1, got {version}")
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"shared: document {name!r} has {len(data)} bytes; at most {MAX_DOCUMENT_BYTES} are kept")


def check_counts(name: str, hour_ms: int, counts: Mapping[str, int], most: int) -> None:
    """Refuse what no storage takes.

    Raises:
        ValueError: a name is none, the instant is not the beginning of an hour, or a count or `most` is below 1.
    """
    check_name(name)
    if hour_ms % 3_600_000 or not 0 <= hour_ms < _MOST_MS:
        raise ValueError(f"shared: tally {name!r}: {hour_ms} is not the beginning of an hour")
    if most < 1:
        raise ValueError(f"shared: tally {name!r}: at least one key must have room, got most={most}")
    for key, count in counts.items():
        check_name(key)
        if not 0 < count < _MOST_MS:
            raise ValueError(f"shared: tally {name!r}: counts are whole numbers from 1, got {key!r}: {count}")
