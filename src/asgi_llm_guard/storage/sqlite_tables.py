"""The statements that write rows, and the operations on whole tables: count, export, import."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final, Protocol, TypeVar

import msgspec

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.counting import Cell
from asgi_llm_guard.storage.export import Snapshot
from asgi_llm_guard.storage.sqlite_codec import HoldCodec
from asgi_llm_guard.storage.state import Hold, Owner, Tombstone
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.usage_rows import LEDGER_COLUMNS, LEDGER_LIST, record_of_row, row_of_record

__all__ = [
    "CELL_COLUMNS",
    "DELETE_CELL",
    "DELETE_HOLD",
    "DELETE_OWNER",
    "DELETE_TOMBSTONE",
    "DELETE_TURN",
    "INSERT_TURN",
    "UPSERT_CELL",
    "UPSERT_CROWD",
    "UPSERT_HOLD",
    "UPSERT_MEMBER",
    "UPSERT_OWNER",
    "UPSERT_RECORD",
    "UPSERT_TOMBSTONE",
    "CountHolds",
    "EntryOperation",
    "Load",
    "TableOperation",
    "cell_of_row",
    "hold_row",
    "records_since",
    "row_of_cell",
    "snapshot",
    "tombstone_of_row",
    "tombstone_row",
    "write_rows",
]

T_co = TypeVar("T_co", covariant=True)

_encode_parts = msgspec.msgpack.Encoder().encode
_decode_parts = msgspec.msgpack.Decoder(dict[int, list[int]]).decode


def _upsert(table: str, key: str, *columns: str) -> str:
    """Insert a row, or change the one with the same key, which keeps its row number."""
    keys = key.split(", ")
    names = (*keys, *columns)
    marks = ", ".join("?" * len(names))
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) ON CONFLICT ({key}) DO UPDATE SET {changes}"  # noqa: S608 - our names


CELL_COLUMNS: Final = "key, kind, used, held, starts, ends_ms, parts"

UPSERT_CELL: Final = _upsert("cells", "key", "kind", "used", "held", "starts", "ends_ms", "parts")
UPSERT_CROWD: Final = _upsert("crowds", "key", "live", "first_ms", "last_ms")
UPSERT_MEMBER: Final = _upsert("members", "key, member", "until_ms")
UPSERT_HOLD: Final = _upsert("holds", "call_id", "owner", "data")
UPSERT_OWNER: Final = _upsert("owners", "owner", "lapse_at_ms", "lapsed_ms")
UPSERT_RECORD: Final = _upsert("ledger", *LEDGER_COLUMNS)
# Replaced whole, with a new row number: row numbers follow the order in which tombstones may be forgotten.
UPSERT_TOMBSTONE: Final = "REPLACE INTO tombstones (call_id, reason, until_ms, data) VALUES (?, ?, ?, ?)"

DELETE_CELL: Final = "DELETE FROM cells WHERE key IN (VALUES (?))"
DELETE_HOLD: Final = "DELETE FROM holds WHERE call_id IN (VALUES (?))"
DELETE_OWNER: Final = "DELETE FROM owners WHERE owner IN (VALUES (?))"
DELETE_TOMBSTONE: Final = "DELETE FROM tombstones WHERE call_id IN (VALUES (?))"
DELETE_TURN: Final = "DELETE FROM turns WHERE turn IN (VALUES (?))"
INSERT_TURN: Final = "INSERT INTO turns (turn, changed) VALUES (?, ?)"

_VALUES: Final = re.compile(r"(?<=VALUES )\([?, ]+\)")
_MAX_ROWS: Final = 64


def write_rows(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Run a statement for many rows, 64 of them at once.

    `executemany` hands the interpreter to another thread for each single row; here SQLite is left
    alone with all of them, which leaves the event loop that much time, and is a little faster.
    """
    begun, left = 0, len(rows)
    while left:
        # In powers of two, so that few statements are prepared.
        count = _MAX_ROWS if left >= _MAX_ROWS else 1 << (left.bit_length() - 1)
        values = list(chain.from_iterable(rows[begun : begun + count]))
        connection.execute(_for_rows(statement, count), values)
        begun += count
        left -= count


@cache
def _for_rows(statement: str, count: int) -> str:
    return _VALUES.sub(lambda marks: ", ".join([marks.group()] * count), statement)


def row_of_cell(key: str, cell: Cell) -> tuple[Any, ...]:
    """The row of `UPSERT_CELL`."""
    parts = cell.parts
    return key, cell.kind, cell.used, cell.held, cell.start, cell.end, None if parts is None else _encode_parts(parts)


def cell_of_row(row: tuple[Any, ...]) -> tuple[str, Cell]:
    """The key and the cell of a row of `CELL_COLUMNS`."""
    key, kind, used, held, start, end, parts = row
    return key, Cell(kind, used, held, start, end, None if parts is None else _decode_parts(parts))


def hold_row(hold: Hold, codec: HoldCodec) -> tuple[str, str, bytes]:
    """The row of `UPSERT_HOLD`."""
    return hold.call_id, hold.owner, codec.encode(hold)


def tombstone_of_row(row: tuple[Any, ...], codec: HoldCodec) -> tuple[str, Tombstone]:
    """The call id and the tombstone of a row `call_id, reason, until_ms, data`."""
    call_id, reason, until_ms, data = row
    hold = None if data is None else codec.decode(data)
    return call_id, Tombstone(reason, until_ms, hold)


def tombstone_row(call_id: str, tombstone: Tombstone, codec: HoldCodec) -> tuple[str, str, int, bytes | None]:
    """The row of `UPSERT_TOMBSTONE`."""
    data = None if tombstone.hold is None else codec.encode(tombstone.hold)
    return call_id, tombstone.reason, tombstone.until_ms, data


# --------------------------------------------------------------------------------- questions


def records_since(connection: sqlite3.Connection, since_ms: int, limit: int | None) -> Iterator[UsageRecord]:
    """Usage records by instant and call id."""
    rows = connection.execute(
        f"SELECT {LEDGER_LIST} FROM ledger WHERE at_ms >= ? ORDER BY at_ms, call_id LIMIT ?",  # noqa: S608 - our names
        (since_ms, -1 if limit is None else limit),
    )
    return map(record_of_row, rows)


def snapshot(connection: sqlite3.Connection) -> Snapshot:
    """All state, read as it is iterated over: in one transaction to be of one instant."""
    codec = HoldCodec(connection)
    ask = connection.execute
    return Snapshot(
        cells=map(cell_of_row, ask(f"SELECT {CELL_COLUMNS} FROM cells ORDER BY key")),  # noqa: S608 - our names
        members=ask("SELECT key, member, until_ms FROM members ORDER BY key, until_ms, member"),
        owners=((row[0], Owner(*row[1:])) for row in ask("SELECT owner, lapse_at_ms, lapsed_ms FROM owners")),
        holds=(codec.decode(data) for (data,) in ask("SELECT data FROM holds ORDER BY rowid")),
        tombstones=(
            tombstone_of_row(row, codec)
            for row in ask("SELECT call_id, reason, until_ms, data FROM tombstones ORDER BY row")
        ),
        records=records_since(connection, -(2**63), None),
    )


# -------------------------------------------------------------------------------- operations


class TableOperation(Protocol[T_co]):
    """An operation on whole tables, in the writer's transaction. It sees all that was decided before it."""

    def run(self, connection: sqlite3.Connection, codec: HoldCodec) -> T_co: ...


class EntryOperation(Protocol[T_co]):
    """An operation on tables that have nothing to do with counters, in the writer's transaction."""

    def run_at(self, connection: sqlite3.Connection, now_ms: int) -> T_co: ...


class CountHolds(msgspec.Struct, frozen=True):
    def run(self, connection: sqlite3.Connection, codec: HoldCodec) -> int:  # noqa: ARG002 - see TableOperation
        count: int = connection.execute("SELECT count(*) FROM holds").fetchone()[0]
        return count


class Load(msgspec.Struct, frozen=True):
    """Take over an export.

    Raises:
        StorageError: the tables are not empty.
    """

    snapshot: Snapshot

    def run(self, connection: sqlite3.Connection, codec: HoldCodec) -> None:
        for table in ("cells", "crowds", "holds", "tombstones", "ledger"):
            if connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():  # noqa: S608 - our names
                raise StorageError(f"import: this storage is not empty (it has {table}); load into a new one")
        source = self.snapshot
        connection.executemany(UPSERT_CELL, (row_of_cell(key, cell) for key, cell in source.cells))
        members = list(source.members)
        connection.executemany(UPSERT_MEMBER, members)
        connection.executemany(UPSERT_CROWD, _crowds(members))
        connection.executemany(
            UPSERT_OWNER, ((name, owner.lapse_at_ms, owner.lapsed_ms) for name, owner in source.owners)
        )
        connection.executemany(UPSERT_HOLD, (hold_row(hold, codec) for hold in source.holds))
        connection.executemany(
            UPSERT_TOMBSTONE, (tombstone_row(call_id, tombstone, codec) for call_id, tombstone in source.tombstones)
        )
        connection.executemany(UPSERT_RECORD, map(row_of_record, source.records))


def _crowds(members: list[tuple[str, str, int]]) -> Iterator[tuple[str, int, int, int]]:
    untils: dict[str, list[int]] = {}
    for key, _, until_ms in members:
        untils.setdefault(key, []).append(until_ms)
    for key, all_ms in untils.items():
        yield key, len(all_ms), min(all_ms), max(all_ms)
