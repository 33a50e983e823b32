"""The row that everybody takes who changes something, and all entries as one state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from asgi_llm_guard.control.state import ControlState, Head, kept_kind, kept_row, made
from asgi_llm_guard.control.values import Kind, Value
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.sql import Connection

__all__ = ["meta_of", "release", "state_of", "take", "version_of"]


def meta_of(connection: Connection) -> tuple[int, Head]:
    """The version, and the last row of the audit."""
    return _of_row(connection.execute("SELECT version, audit_seq, audit_digest FROM control_meta WHERE id = 1"))


def _of_row(rows: Sequence[tuple[Any, ...]]) -> tuple[int, Head]:
    if not rows:
        raise StorageError("control: the row of control_meta is gone; restore the database")
    ((version, seq, digest),) = rows
    return version, Head(seq, digest)


def version_of(connection: Connection) -> int:
    return meta_of(connection)[0]


def take(connection: Connection) -> tuple[int, Head]:
    """As `meta_of`, and nobody else's until this transaction ends."""
    return _of_row(
        connection.execute(
            "UPDATE control_meta SET version = version WHERE id = 1 RETURNING version, audit_seq, audit_digest"
        )
    )


def release(connection: Connection, version: int, head: Head) -> None:
    """Write what the transaction has come to."""
    connection.execute(
        "UPDATE control_meta SET version = ?, audit_seq = ?, audit_digest = ? WHERE id = 1", (version, *head)
    )


def state_of(connection: Connection, known: ControlState | None) -> ControlState:
    """Everything as it is; `known`: what was read last, which may still be it.

    Raises:
        NewerRelease: there are entries that this release does not know.
    """
    version, head = meta_of(connection)
    if known is not None and known.version == version:
        return known if known.head == head else msgspec.structs.replace(known, head=head)

    def entries() -> Iterator[tuple[Kind, Value, int]]:
        for kind, name, changed, value in connection.execute("SELECT kind, name, version, value FROM control_entries"):
            known_kind = kept_kind(kind)
            yield known_kind, kept_row(known_kind, name, value), changed

    return made(version, head, entries())
