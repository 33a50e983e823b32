"""Entries in the file of a SQLite storage; see `entries.py`. The tables are in `sqlite_entries.sql`.

Each operation is one job of the writer, so it shares a transaction with whatever else gathers.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.entries import EPOCH_MS, Bounds, InFlight, Kept, Leading, check_entry
from asgi_llm_guard.storage.sqlite_tables import EntryOperation

__all__ = ["SqliteEntries", "Submit", "prepare_entries"]

_PURGE: Final = 4  # rows looked at for each one that is begun: the rest is at most about as much as what is alive
_DAY_MS: Final = 86_400_000

_encode_epochs = msgspec.json.Encoder().encode
_decode_epochs = msgspec.json.Decoder(dict[str, str]).decode

T = TypeVar("T")


class Submit(Protocol):
    """Hands an operation to the writer."""

    def __call__(self, operation: EntryOperation[T], /) -> Awaitable[T]: ...


def prepare_entries(path: Path) -> None:
    """Make the tables of entries in a file that was prepared, if they are not there.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    statements = resources.files(__package__).joinpath("sqlite_entries.sql").read_text("utf-8").split(";\n")
    try:
        with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in statements:
                connection.execute(statement)
            connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(f"{path}: {error}; let this user write to the file and its folder") from error


class SqliteEntries:
    """One space of one file."""

    def __init__(self, submit: Submit, space: str, bounds: Bounds) -> None:
        self.bounds = bounds
        self._submit = submit
        self._space = space

    async def find(self, key: str) -> Kept | None:
        return await self._submit(_Find(self._space, key))

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        check_entry(ttl_ms=claim_ms)
        return await self._submit(_Begin(self._space, key, token, claim_ms, tuple(names), note, fresh))

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        check_entry(ttl_ms=claim_ms)
        return await self._submit(_Prolong(self._space, key, token, claim_ms))

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        check_entry(ttl_ms=ttl_ms)
        return await self._submit(_Store(self._space, key, token, value, ttl_ms, self.bounds))

    async def abandon(self, key: str, token: str) -> None:
        await self._submit(_Drop(self._space, key, token))

    async def forget(self, key: str) -> None:
        await self._submit(_Drop(self._space, key))

    async def bump(self, name: str) -> None:
        await self._submit(_Bump(self._space, name))


# -------------------------------------------------------------------------------- operations


class _Find(msgspec.Struct, frozen=True):
    space: str
    key: str

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> Kept | None:
        row = _live(connection, self.space, self.key, now_ms)
        return None if row is None or row.size is None else _kept(connection, row, now_ms)


class _Begin(msgspec.Struct, frozen=True):
    space: str
    key: str
    token: str
    claim_ms: int
    names: tuple[str, ...]
    note: str
    fresh: bool

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> Kept | Leading | InFlight:
        epochs = _epochs(connection, self.space, self.names, now_ms)
        row = _live(connection, self.space, self.key, now_ms)
        if row is not None and row.size is not None and (not self.fresh or row.token == self.token):
            return _kept(connection, row, now_ms)
        if row is not None and row.size is None and row.token != self.token:
            return InFlight(row.note, row.until_ms - now_ms)
        _delete(connection, "SELECT row FROM entries1 WHERE space = ? AND key = ?", self.space, self.key)
        _delete(connection, "SELECT row FROM entries1 WHERE until_ms <= ? LIMIT ?", now_ms, _PURGE)
        connection.execute(
            "INSERT INTO entries1 (space, key, token, until_ms, epochs, note) VALUES (?, ?, ?, ?, ?, ?)",
            (self.space, self.key, self.token, now_ms + self.claim_ms, _encode_epochs(epochs).decode(), self.note),
        )
        return Leading()


class _Prolong(msgspec.Struct, frozen=True):
    space: str
    key: str
    token: str
    claim_ms: int

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> bool:
        row = _live(connection, self.space, self.key, now_ms)
        if row is None or row.token != self.token or row.size is not None:
            return False
        connection.execute("UPDATE entries1 SET until_ms = ? WHERE row = ?", (now_ms + self.claim_ms, row.row))
        return True


class _Store(msgspec.Struct, frozen=True):
    space: str
    key: str
    token: str
    value: bytes
    ttl_ms: int
    bounds: Bounds

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> bool:
        row = _row(connection, self.space, self.key)
        if row is None or row.token != self.token:
            return False
        live = _live(connection, self.space, self.key, now_ms)
        if live is not None and live.size is not None:
            return True
        _delete(connection, "SELECT row FROM entries1 WHERE row = ?", row.row)
        size = len(self.value)
        if live is None or size > self.bounds.max_value_bytes:
            return False
        connection.execute(
            "INSERT INTO entries1 (row, space, key, token, until_ms, epochs, note, at_ms, size, value)"
            " VALUES ((SELECT coalesce(max(row), 0) + 1 FROM entries1), ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(self.space, self.key, self.token, now_ms + self.ttl_ms),
                *(_encode_epochs(row.epochs).decode(), row.note, now_ms, size, self.value),
            ),
        )
        _add(connection, self.space, 1, size)
        self._shrink(connection)
        return _row(connection, self.space, self.key) is not None

    def _shrink(self, connection: sqlite3.Connection) -> None:
        while True:
            entries, size = connection.execute(
                "SELECT entries, bytes FROM entry_sums1 WHERE space = ?", (self.space,)
            ).fetchone()
            if entries <= self.bounds.max_entries and size <= self.bounds.max_bytes:
                return
            oldest = "SELECT row FROM entries1 WHERE space = ? AND size IS NOT NULL ORDER BY row LIMIT 1"
            _delete(connection, oldest, self.space)


class _Drop(msgspec.Struct, frozen=True):
    """With a token: its claim only."""

    space: str
    key: str
    token: str | None = None

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> None:  # noqa: ARG002 - see EntryOperation
        claim = "" if self.token is None else " AND size IS NULL AND token = ?"
        values = (self.space, self.key) if self.token is None else (self.space, self.key, self.token)
        _delete(connection, f"SELECT row FROM entries1 WHERE space = ? AND key = ?{claim}", *values)  # noqa: S608 - our words


class _Bump(msgspec.Struct, frozen=True):
    space: str
    name: str

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> None:
        _keep_epoch(connection, self.space, self.name, secrets.token_hex(8), now_ms)


# --------------------------------------------------------------------------------------- rows


class _Row(NamedTuple):
    row: int
    space: str
    token: str
    until_ms: int
    epochs: Mapping[str, str]
    note: str
    at_ms: int | None
    size: int | None


def _row(connection: sqlite3.Connection, space: str, key: str) -> _Row | None:
    found = connection.execute(
        "SELECT row, space, token, until_ms, epochs, note, at_ms, size FROM entries1 WHERE space = ? AND key = ?",
        (space, key),
    ).fetchone()
    if found is None:
        return None
    row, space, token, until_ms, epochs, note, at_ms, size = found
    try:
        known = _decode_epochs(epochs)
    except msgspec.DecodeError:  # damaged: it belongs to no epoch that there is
        known = {"": epochs or "none"}
    return _Row(row, space, token, until_ms, known, note, at_ms, size)


def _live(connection: sqlite3.Connection, space: str, key: str, now_ms: int) -> _Row | None:
    """What is there, and neither over nor of an epoch that has ended."""
    row = _row(connection, space, key)
    if row is None or row.until_ms <= now_ms:
        return None
    for name, epoch in row.epochs.items():
        if _epoch(connection, space, name)[0] != epoch:
            return None
    return row


def _kept(connection: sqlite3.Connection, row: _Row, now_ms: int) -> Kept:
    value = connection.execute("SELECT value FROM entries1 WHERE row = ?", (row.row,)).fetchone()[0]
    return Kept(value, row.note, now_ms - (row.at_ms or 0))


def _epoch(connection: sqlite3.Connection, space: str, name: str) -> tuple[str, int]:
    found: tuple[str, int] | None = connection.execute(
        "SELECT epoch, until_ms FROM entry_epochs1 WHERE space = ? AND name = ?", (space, name)
    ).fetchone()
    return found or ("", 0)


def _epochs(connection: sqlite3.Connection, space: str, names: Sequence[str], now_ms: int) -> dict[str, str]:
    """The epoch of each name: the one that is known, or a new one."""
    epochs = {}
    for name in names:
        epoch, until_ms = _epoch(connection, space, name)
        if until_ms <= now_ms:
            epoch = secrets.token_hex(8)
        if until_ms < now_ms + EPOCH_MS - _DAY_MS:  # else it was noted today that it is in use
            _keep_epoch(connection, space, name, epoch, now_ms)
        epochs[name] = epoch
    return epochs


def _keep_epoch(connection: sqlite3.Connection, space: str, name: str, epoch: str, now_ms: int) -> None:
    connection.execute(
        "INSERT INTO entry_epochs1 (space, name, epoch, until_ms) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (space, name) DO UPDATE SET epoch = excluded.epoch, until_ms = excluded.until_ms",
        (space, name, epoch, now_ms + EPOCH_MS),
    )
    connection.execute(
        "DELETE FROM entry_epochs1 WHERE (space, name) IN"
        " (SELECT space, name FROM entry_epochs1 WHERE until_ms <= ? LIMIT ?)",
        (now_ms, _PURGE),
    )


def _delete(connection: sqlite3.Connection, which: str, *values: Any) -> None:
    """Remove the rows whose numbers `which` selects, and take them out of the sums."""
    rows = [number for (number,) in connection.execute(which, values)]
    for number in rows:
        space, size = connection.execute("SELECT space, size FROM entries1 WHERE row = ?", (number,)).fetchone()
        connection.execute("DELETE FROM entries1 WHERE row = ?", (number,))
        if size is not None:
            _add(connection, space, -1, -size)


def _add(connection: sqlite3.Connection, space: str, entries: int, size: int) -> None:
    connection.execute(
        "INSERT INTO entry_sums1 (space, entries, bytes) VALUES (?, ?, ?)"
        " ON CONFLICT (space) DO UPDATE SET entries = entries + excluded.entries, bytes = bytes + excluded.bytes",
        (space, entries, size),
    )
