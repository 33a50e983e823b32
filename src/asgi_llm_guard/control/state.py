"""All that is administered at one version, and as the document that every process follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from asgi_llm_guard.control.data import read, written
from asgi_llm_guard.control.values import (
    KINDS,
    Agent,
    Department,
    Key,
    Kind,
    KnowledgeBase,
    Price,
    Value,
    check_kind,
    name_of,
)
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.stops import Stop

__all__ = ["FORMAT", "ControlState", "Entry", "Head", "NewerRelease", "decode", "encode", "kept_row", "made"]

FORMAT: Final = 1
"""Of the document. A reader refuses others whole."""

T = TypeVar("T")


class NewerRelease(ConfigurationError):  # noqa: N818 - what is so, as with `DataLost`
    """The data have kinds, fields or a format that this release does not know. Nothing of them was taken."""

    made: int | None = None
    """The version of a change that was made before they were read; `None`: none was."""


class Entry(NamedTuple, Generic[T]):
    """A value, and the version at which it was changed last."""

    value: T
    version: int


class Head(NamedTuple):
    """The last row of the audit."""

    seq: int
    digest: str


def _no_entries() -> Mapping[str, Any]:
    return MappingProxyType({})


class ControlState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one version."""

    version: int
    """Grows with every change. That of a change is the time in ms, or one more than the last where that is later, so that
    a database that was replaced or restored is ahead of what was published from another."""
    head: Head = Head(0, "")
    departments: Mapping[str, Entry[Department]] = msgspec.field(default_factory=_no_entries)
    agents: Mapping[str, Entry[Agent]] = msgspec.field(default_factory=_no_entries)
    keys: Mapping[str, Entry[Key]] = msgspec.field(default_factory=_no_entries)
    prices: Mapping[str, Entry[Price]] = msgspec.field(default_factory=_no_entries)
    knowledge_bases: Mapping[str, Entry[KnowledgeBase]] = msgspec.field(default_factory=_no_entries)
    raises: Mapping[str, Entry[Raise]] = msgspec.field(default_factory=_no_entries)
    stops: Mapping[str, Entry[Stop]] = msgspec.field(default_factory=_no_entries)

    def of(self, kind: Kind) -> Mapping[str, Entry[Any]]:
        """The entries of one kind, by name."""
        entries: Mapping[str, Entry[Any]] = getattr(self, _FIELDS[kind])
        return entries

    def __iter__(self) -> Iterator[tuple[Kind, str, Entry[Any]]]:
        """Every entry, by kind and name."""
        for kind in KINDS:
            for name, entry in self.of(kind).items():
                yield kind, name, entry


_FIELDS: Final[Mapping[Kind, str]] = {
    "department": "departments",
    "agent": "agents",
    "key": "keys",
    "price": "prices",
    "knowledge_base": "knowledge_bases",
    "raise": "raises",
    "stop": "stops",
}


def made(version: int, head: Head, entries: Iterator[tuple[Kind, Value, int]]) -> ControlState:
    """A state of values, each with the version of its last change."""
    kinds: dict[Kind, dict[str, Entry[Any]]] = {kind: {} for kind in KINDS}
    for kind, value, changed in entries:
        kinds[kind][name_of(value)] = Entry(value, changed)
    fields: dict[str, Any] = {
        _FIELDS[kind]: MappingProxyType(dict(sorted(found.items()))) for kind, found in kinds.items()
    }
    return ControlState(version=version, head=head, **fields)


def encode(state: ControlState) -> bytes:
    """The state as a document: the digests of keys are in it, and nothing that is more secret."""
    kinds: dict[str, dict[str, list[object]]] = {}
    for kind, name, entry in state:
        kinds.setdefault(kind, {})[name] = [entry.version, written(entry.value)]
    document = {"format": FORMAT, "version": state.version, "head": list(state.head), "entries": kinds}
    return msgspec.json.encode(document, order="deterministic")


def decode(data: bytes) -> ControlState:
    """The state of a document, checked entry by entry.

    Raises:
        NewerRelease: it has a format, a kind or a field that this release does not know.
        ConfigurationError: it is no such document, or an entry of it is malformed.
    """
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"control: what was published cannot be read: {error}") from None
    if document.format != FORMAT:
        raise NewerRelease(f"control: what was published has format {document.format}; this release reads {FORMAT}")

    def entries() -> Iterator[tuple[Kind, Value, int]]:
        for kind, named in document.entries.items():
            for name, (version, fields) in named.items():
                known = kept_kind(kind)
                yield known, kept(known, name, fields), version

    return made(document.version, Head(*document.head), entries())


def kept_kind(kind: str) -> Kind:
    """The kind of something that was kept by some release.

    Raises:
        NewerRelease: this one does not know it.
    """
    try:
        return check_kind(kind)
    except ConfigurationError:
        raise NewerRelease(f"control: there are entries of a kind that this release does not know: {kind!r}") from None


def kept(kind: Kind, name: str, fields: object) -> Value:
    """The value of something that was kept by some release.

    Raises:
        NewerRelease: this one cannot read it.
    """
    try:
        return read(kind, name, fields)
    except ConfigurationError as error:
        raise NewerRelease(f"control: an entry cannot be read by this release: {error}") from None


def kept_row(kind: Kind, name: str, text: str) -> Value:
    """As `kept`, of the text of a row.

    Raises:
        NewerRelease: this release cannot read it.
    """
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise NewerRelease(f"control: {kind} {name!r} cannot be read by this release: {error}") from None
    return kept(kind, name, fields)


class _Document(msgspec.Struct):
    format: int
    version: int = 0
    head: tuple[int, str] = (0, "")
    entries: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {}
