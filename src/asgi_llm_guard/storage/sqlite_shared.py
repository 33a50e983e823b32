"""Documents, tallies, marks and open calls in the file of a SQLite storage; see `shared.py`.

Each operation is one job of the writer, so it shares a transaction with whatever else gathers. The tables are in
`sqlite_shared.sql`; the operation that first finds them missing makes them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Final, Generic, TypeVar

import msgspec

from asgi_llm_guard.storage.open_calls import open_call
from asgi_llm_guard.storage.shared import (
    OTHER,
    TALLY_MS,
    Document,
    OpenCall,
    Tally,
    check_counts,
    check_name,
    check_publish,
)
from asgi_llm_guard.storage.sqlite_codec import HoldCodec
from asgi_llm_guard.storage.sqlite_entries import Submit

__all__ = ["SqliteShared", "newest_calls"]

_PURGE: Final = 4  # rows looked at for each one that is made: the rest is at most about as much as what is alive

T = TypeVar("T")


class SqliteShared:
    """What the processes on one file share."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        check_publish(name, version, data)
        return await self._submit(_Publish(name, version, bytes(data)))

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        return await self._submit(_Find(check_name(name), known))

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        check_counts(name, hour_ms, counts, most)
        if counts:
            await self._submit(_Count(name, hour_ms, dict(counts), most))

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        return await self._submit(_Counts(check_name(name), since_ms))

    async def mark(self, name: str, *, until_ms: int) -> bool:
        return await self._submit(_Mark(check_name(name), until_ms))

    async def unmark(self, name: str) -> None:
        await self._submit(_Unmark(check_name(name)))


def newest_calls(connection: sqlite3.Connection, limit: int) -> Iterator[OpenCall]:
    """Open calls, the newest first."""
    codec = HoldCodec(connection)
    # Row numbers follow the order in which calls were reserved: a hold that is changed keeps its own.
    rows = connection.execute("SELECT data FROM holds ORDER BY rowid DESC LIMIT ?", (limit,))
    return (open_call(codec.decode(data)) for (data,) in rows)


# -------------------------------------------------------------------------------- operations


class _Operation(msgspec.Struct, Generic[T], frozen=True):
    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> T:
        try:
            return self.run_on(connection, now_ms)
        except sqlite3.OperationalError as error:
            # Said before the first statement has changed anything: every operation begins with a look at its table.
            if "no such table: shared_" not in str(error):
                raise
            _make_tables(connection)
            return self.run_on(connection, now_ms)

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> T:
        raise NotImplementedError


class _Publish(_Operation[bool], frozen=True):
    name: str
    version: int
    data: bytes

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> bool:  # noqa: ARG002 - see EntryOperation
        row = connection.execute("SELECT version FROM shared_documents1 WHERE name = ?", (self.name,)).fetchone()
        if row is not None and self.version < row[0]:
            return False
        if row is not None and self.version == row[0]:
            same: int = connection.execute(
                "SELECT data = ? FROM shared_documents1 WHERE name = ?", (self.data, self.name)
            ).fetchone()[0]
            return bool(same)
        connection.execute(
            "INSERT INTO shared_documents1 (name, version, data) VALUES (?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET version = excluded.version, data = excluded.data",
            (self.name, self.version, self.data),
        )
        return True


class _Find(_Operation[Document | None], frozen=True):
    name: str
    known: int

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> Document | None:  # noqa: ARG002
        row = connection.execute(
            "SELECT version, data FROM shared_documents1 WHERE name = ? AND version > ?", (self.name, self.known)
        ).fetchone()
        return None if row is None else Document(*row)


class _Count(_Operation[None], frozen=True):
    name: str
    hour_ms: int
    counts: dict[str, int]
    most: int

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> None:
        over_ms = now_ms - TALLY_MS
        connection.execute("DELETE FROM shared_tallies1 WHERE name = ? AND hour_ms <= ?", (self.name, over_ms))
        if self.hour_ms <= over_ms:
            return
        keys = {
            key
            for (key,) in connection.execute(
                "SELECT key FROM shared_tallies1 WHERE name = ? AND hour_ms = ?", (self.name, self.hour_ms)
            )
        }
        room = self.most - len(keys - {OTHER})
        sums: dict[str, int] = {}
        for key, count in self.counts.items():
            place = key
            if key not in keys and key != OTHER:
                place = key if room > 0 else OTHER
                room -= 1
            sums[place] = sums.get(place, 0) + count
        connection.executemany(
            "INSERT INTO shared_tallies1 (name, hour_ms, key, count) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (name, hour_ms, key) DO UPDATE SET count = count + excluded.count",
            [(self.name, self.hour_ms, key, count) for key, count in sums.items()],
        )


class _Counts(_Operation[list[Tally]], frozen=True):
    name: str
    since_ms: int

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> list[Tally]:
        rows = connection.execute(
            "SELECT hour_ms, key, count FROM shared_tallies1 WHERE name = ? AND hour_ms >= ? AND hour_ms > ?"
            " ORDER BY hour_ms, key",
            (self.name, self.since_ms, now_ms - TALLY_MS),
        )
        return [Tally(*row) for row in rows]


class _Mark(_Operation[bool], frozen=True):
    name: str
    until_ms: int

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> bool:
        connection.execute(
            "DELETE FROM shared_marks1 WHERE name IN (SELECT name FROM shared_marks1 WHERE until_ms <= ? LIMIT ?)",
            (now_ms, _PURGE),
        )
        if self.until_ms <= now_ms:
            return False
        connection.execute(
            "INSERT INTO shared_marks1 (name, until_ms) VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET until_ms = excluded.until_ms WHERE shared_marks1.until_ms <= ?",
            (self.name, self.until_ms, now_ms),
        )
        return bool(connection.execute("SELECT changes()").fetchone()[0])


class _Unmark(_Operation[None], frozen=True):
    name: str

    def run_on(self, connection: sqlite3.Connection, now_ms: int) -> None:  # noqa: ARG002
        connection.execute("DELETE FROM shared_marks1 WHERE name = ?", (self.name,))


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in resources.files(__package__).joinpath("sqlite_shared.sql").read_text("utf-8").split(";\n"):
        connection.execute(statement)
