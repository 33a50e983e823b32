"""Rows in, decisions, rows out: what one transaction of the SQLite storage does.

What the operations of a turn need is read in a few statements, the functions of `cells.py` decide
on it in the order of the operations, and what differs afterwards is written: one row per changed
meter and turn, however many operations changed it.

What was read or written stays in memory for the next turn. If another connection has changed the
file meanwhile (`PRAGMA data_version`), the table `turns` says which rows are to be read again. A
rollback forgets all of it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage import cells
from asgi_llm_guard.storage.counting import GRACE_MS, disposable
from asgi_llm_guard.storage.sqlite_codec import HoldCodec
from asgi_llm_guard.storage.sqlite_file import QueueLock, Synchronous, connect
from asgi_llm_guard.storage.sqlite_members import SqliteMembers
from asgi_llm_guard.storage.sqlite_operations import Group, grouped
from asgi_llm_guard.storage.sqlite_tables import (
    CELL_COLUMNS,
    DELETE_CELL,
    DELETE_HOLD,
    DELETE_OWNER,
    DELETE_TOMBSTONE,
    DELETE_TURN,
    INSERT_TURN,
    UPSERT_CELL,
    UPSERT_HOLD,
    UPSERT_OWNER,
    UPSERT_RECORD,
    UPSERT_TOMBSTONE,
    TableOperation,
    cell_of_row,
    hold_row,
    row_of_cell,
    tombstone_of_row,
    tombstone_row,
    write_rows,
)
from asgi_llm_guard.storage.sqlite_writer import LockTimeoutError
from asgi_llm_guard.storage.state import Hold, Owner, State, Tombstone
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.usage_rows import row_of_record

__all__ = ["SqliteDatabase"]

_TIDY_EVERY: Final = 1024
"""Old rows are looked for each time that many operations were decided."""

_TIDY_ROWS: Final = 4096
"""How many rows of each table that is: more than as many operations make."""

_MAX_CACHED: Final = 50_000
"""How many cells, or holds, are kept in memory at most."""

_KEPT_TURNS: Final = 64
"""Who has missed more turns than that reads everything anew."""

_ALONE: Final = 16
"""After so many turns in a row, nobody is told any more what changes in them: the first to come reads everything anew."""

_encode_changed = msgspec.msgpack.Encoder().encode
_decode_changed = msgspec.msgpack.Decoder(tuple[list[str], list[str]]).decode


class _Ledger:
    """What a turn knows of the ledger, and adds to it."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.added: dict[str, UsageRecord] = {}

    def __contains__(self, call_id: object) -> bool:
        return call_id in self.known

    def append(self, record: UsageRecord) -> None:
        self.replace(record.call_id, record)

    def replace(self, call_id: str, record: UsageRecord) -> None:
        self.known.add(call_id)
        self.added[call_id] = record

    def clear(self) -> None:
        self.known.clear()
        self.added.clear()


class SqliteDatabase:
    """One connection, and what is known of the file. Made and used by the writer."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        synchronous: Synchronous,
        lapse_ms: int,
        tombstone_ms: int,
        timeout_s: float,
    ) -> None:
        self._path = path
        self._clock = clock
        self._timeout_s = timeout_s
        self._connection = connect(path, synchronous=synchronous, timeout_s=timeout_s)
        self._identity = _identity(path)
        self._queue = QueueLock(path.with_name(path.name + ".lock"))
        self._codec = HoldCodec(self._connection)
        self._members = SqliteMembers(self._connection)
        self._ledger = _Ledger()
        self._state = State(members=self._members, ledger=self._ledger, lapse_ms=lapse_ms, tombstone_ms=tombstone_ms)
        self._version = -1
        self._turn = -1
        self._turns_alone = 0
        self._changed: tuple[list[str], list[str]] = ([], [])
        # Cells as they are in the file, and the keys of those that no other process can have changed.
        self._cell_rows: dict[str, tuple[object, ...]] = {}
        self._trusted: set[str] = set()
        self._owner_rows: dict[str, tuple[int, int]] = {}
        self._untidied = 0
        self._tidied_to = ""

    def apply(self, operations: Sequence[object]) -> Sequence[object]:
        replies: list[object] = []
        groups = grouped(operations)  # before the transaction, which others wait for
        with self._transaction() as now_ms:
            for group in groups:
                if isinstance(group, Group):
                    replies += self._decide(group, now_ms)
                elif hasattr(group, "run_at"):
                    replies.append(group.run_at(self._connection, now_ms))
                else:
                    replies.append(self._run(group))
        self._untidied += len(operations)
        return replies

    def tidy(self) -> None:
        if self._untidied < _TIDY_EVERY:
            return
        self._untidied = 0
        with self._transaction() as now_ms:
            self._connection.execute(
                "DELETE FROM tombstones WHERE row IN (SELECT row FROM"
                " (SELECT row, until_ms FROM tombstones ORDER BY row LIMIT ?) WHERE until_ms <= ?)",
                (_TIDY_ROWS, now_ms),
            )
            self._tidy_cells(now_ms)
            self._members.tidy(now_ms, rows=_TIDY_ROWS)

    def close(self) -> None:
        self._connection.close()
        self._queue.close()

    def _run(self, operation: TableOperation[object]) -> object:
        changes = self._connection.total_changes
        reply = operation.run(self._connection, self._codec)
        if self._connection.total_changes != changes:
            self._forget()
            self._turns_alone = _ALONE  # in this turn more has changed than could be told
            self._changed[0].append("")
        return reply

    # ---------------------------------------------------------------------------- transaction

    @contextmanager
    def _transaction(self) -> Generator[int]:
        """A write transaction, in this process's turn; gives the instant at which all in it happens."""
        if not self._queue.acquire(self._timeout_s):
            raise LockTimeoutError(self._locked())
        try:
            self._check_file()
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    raise LockTimeoutError(self._locked()) from error
                raise
            try:
                version = self._connection.execute("PRAGMA data_version").fetchone()[0]
                if len(self._cell_rows) > _MAX_CACHED or len(self._state.holds) > _MAX_CACHED:
                    self._forget()
                if version != self._version or self._turn < 0:
                    self._catch_up()
                else:
                    self._turns_alone += 1
                self._version = version
                yield self._clock.now_ms()
                self._tell_changes()
                self._connection.execute("COMMIT")
            except BaseException:
                self._forget()
                self._turn = -1
                self._codec = HoldCodec(self._connection)
                if self._connection.in_transaction:  # some errors have rolled it back already
                    self._connection.execute("ROLLBACK")
                raise
        finally:
            self._queue.release()

    def _check_file(self) -> None:
        # A file that was removed goes on working for those who have it open, and only for them.
        if _identity(self._path) != self._identity:
            raise StorageError(
                f"{self._path}: was removed or replaced while in use; put it back and restart every process that uses it"
            )

    def _locked(self) -> str:
        return f"{self._path}: other processes kept it locked for more than {self._timeout_s} s; the operation had no effect"

    def _catch_up(self) -> None:
        """Other connections have written: what they changed has to be looked up again."""
        self._turns_alone = 0
        turns = self._connection.execute(
            "SELECT turn, changed FROM turns WHERE turn > ? ORDER BY turn", (self._turn,)
        ).fetchall()
        if not turns or turns[0][0] != self._turn + 1 or not all(changed for _, changed in turns):
            self._distrust()
            if turns or self._turn < 0:
                self._turn = turns[-1][0] if turns else 0
            return
        self._turn = turns[-1][0]
        for _, changed in turns:
            keys, calls = _decode_changed(changed)
            self._trusted.difference_update(keys)
            for call_id in calls:
                self._state.holds.pop(call_id, None)
        self._look_again()

    def _tell_changes(self) -> None:
        """Note for other processes what this turn has changed of what they may remember."""
        keys, calls = self._changed
        if not keys and not calls:
            return
        self._turn += 1
        data = _encode_changed(self._changed) if self._turns_alone < _ALONE else None
        self._many(INSERT_TURN, [(self._turn, data)])
        self._many(DELETE_TURN, [(self._turn - _KEPT_TURNS,)])
        keys.clear()
        calls.clear()

    def _look_again(self) -> None:
        """Forget what is so little that its changes are not noted."""
        self._state.owners.clear()
        self._owner_rows.clear()
        self._members.forget()

    def _distrust(self) -> None:
        """Whatever is known has to be looked up again."""
        self._trusted.clear()
        self._state.holds.clear()
        self._look_again()

    def _forget(self) -> None:
        self._distrust()
        self._state.cells.clear()
        self._state.ended.clear()
        self._cell_rows.clear()
        self._ledger.clear()
        for changed in self._changed:
            changed.clear()

    # ------------------------------------------------------------------------------- deciding

    def _decide(self, group: Group, now_ms: int) -> list[object]:
        state, operations, needs = self._state, group.operations, group.needs
        self._read(group, now_ms)
        holds = {call_id: state.holds.get(call_id) for call_id in needs.calls}
        ended = dict(state.ended)
        replies = [operation.decide(state, now_ms) for operation in operations]
        self._write_cells(needs.keys)
        self._write_holds(holds, group.amended)
        self._write_ended(ended)
        self._write_owners()
        self._write_records(group.rows)
        self._members.write()
        state.ended.clear()
        self._ledger.clear()
        return replies

    def _read(self, group: Group, now_ms: int) -> None:
        """Bring into the state what the operations need."""
        needs, state = group.needs, self._state
        if not self._owner_rows:
            for name, *times in self._connection.execute("SELECT owner, lapse_at_ms, lapsed_ms FROM owners"):
                self._owner_rows[name] = (times[0], times[1])
                state.owners[name] = Owner(*times)
        self._read_calls(needs.calls.difference(state.holds))
        sweeping = set(group.retired)
        if cells.any_lapsed(state, now_ms):
            sweeping |= {name for name, owner in state.owners.items() if 0 < owner.lapse_at_ms <= now_ms}
        for name in sweeping:
            for call_id, data in self._connection.execute("SELECT call_id, data FROM holds WHERE owner = ?", (name,)):
                self._known_hold(call_id, data)
                needs.calls.add(call_id)
        for call_id in needs.calls.intersection(state.holds):
            needs.of_hold(state.holds[call_id])
        for tombstone in state.ended.values():
            needs.of_hold(tombstone.hold)
        self._read_cells(needs.keys - self._trusted)

    def _read_calls(self, call_ids: set[str]) -> None:
        for call_id, data in self._select("SELECT call_id, data FROM holds WHERE call_id", call_ids):
            self._known_hold(call_id, data)
            call_ids.discard(call_id)
        for row in self._select("SELECT call_id, reason, until_ms, data FROM tombstones WHERE call_id", call_ids):
            call_id, tombstone = tombstone_of_row(row, self._codec)
            self._state.ended[call_id] = tombstone
        self._ledger.known.update(row[0] for row in self._select("SELECT call_id FROM ledger WHERE call_id", call_ids))

    def _known_hold(self, call_id: str, data: bytes) -> None:
        if call_id not in self._state.holds:
            self._state.holds[call_id] = self._codec.decode(data)

    def _read_cells(self, keys: set[str]) -> None:
        rows, found = self._cell_rows, self._state.cells
        gone = keys.intersection(rows)
        for row in self._select(f"SELECT {CELL_COLUMNS} FROM cells WHERE key", keys):  # noqa: S608 - our names
            key = row[0]
            gone.discard(key)
            if rows.get(key) != row:  # else the cell that was made of it is still the right one
                rows[key] = row
                _, found[key] = cell_of_row(row)
        for key in gone:
            del rows[key], found[key]
        self._trusted |= keys

    def _select(self, query: str, values: Iterable[str]) -> list[tuple[Any, ...]]:
        """The rows whose column, the last word of `query`, is one of `values`."""
        values = list(values)
        if not values:
            return []
        # Few different lengths, so that few statements are prepared: a value may be listed twice.
        length = 1 << (len(values) - 1).bit_length()
        values += values[:1] * (length - len(values))
        return self._connection.execute(f"{query} IN ({','.join('?' * length)})", values).fetchall()

    def _write_cells(self, keys: Iterable[str]) -> None:
        rows: list[tuple[Any, ...]] = []
        row: tuple[Any, ...]
        known, found = self._cell_rows, self._state.cells
        for key in keys:
            cell = found.get(key)
            if cell is not None:
                if cell.parts is None:  # as `row_of_cell`, whose call would cost as much as the row
                    row = (key, cell.kind, cell.used, cell.held, cell.start, cell.end, None)
                else:
                    row = row_of_cell(key, cell)
                if known.get(key) != row:
                    known[key] = row
                    rows.append(row)
        self._many(UPSERT_CELL, rows)
        self._changed[0].extend([row[0] for row in rows])

    def _write_holds(self, before: dict[str, Hold | None], amended: set[str]) -> None:
        rows, gone = [], []
        changed = self._changed[1]
        for call_id, old in before.items():
            hold = self._state.holds.get(call_id)
            if hold is None:
                if old is not None:
                    gone.append((call_id,))
            elif hold is not old or call_id in amended:
                rows.append(hold_row(hold, self._codec))
                if old is not None:
                    changed.append(call_id)
        self._many(UPSERT_HOLD, rows)
        self._many(DELETE_HOLD, gone)
        changed.extend([call_id for (call_id,) in gone])

    def _write_ended(self, before: dict[str, Tombstone]) -> None:
        rows, gone = [], [(call_id,) for call_id in before.keys() - self._state.ended.keys()]
        for call_id, tombstone in self._state.ended.items():
            if tombstone is before.get(call_id):
                continue
            if tombstone.reason == "settled" and tombstone.hold is None and call_id in self._ledger:
                # The ledger says as much. Without this row a call costs two writes less.
                if call_id in before:
                    gone.append((call_id,))
                continue
            rows.append(tombstone_row(call_id, tombstone, self._codec))
        self._many(UPSERT_TOMBSTONE, rows)
        self._many(DELETE_TOMBSTONE, gone)

    def _write_owners(self) -> None:
        rows, owners = [], self._state.owners
        for name, owner in owners.items():
            row = (owner.lapse_at_ms, owner.lapsed_ms)
            if self._owner_rows.get(name) != row:
                self._owner_rows[name] = row
                rows.append((name, *row))
        gone = [name for name in self._owner_rows if name not in owners]
        for name in gone:
            del self._owner_rows[name]
        self._many(UPSERT_OWNER, rows)
        self._many(DELETE_OWNER, [(name,) for name in gone])

    def _write_records(self, rows: dict[int, tuple[object, ...]]) -> None:
        added = self._ledger.added.values()
        self._many(UPSERT_RECORD, [rows.get(id(record)) or row_of_record(record) for record in added])

    def _many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if rows:
            write_rows(self._connection, statement, rows)

    # -------------------------------------------------------------------------------- tidying

    def _tidy_cells(self, now_ms: int) -> None:
        """Look at the next some cells, in the order of their keys, and forget those that say nothing."""
        last = self._connection.execute(
            "SELECT key FROM cells WHERE key > ? ORDER BY key LIMIT 1 OFFSET ?", (self._tidied_to, _TIDY_ROWS - 1)
        ).fetchone()
        # A first choice by the statement, for most rows are of use; the rule itself is `disposable`.
        rows = self._connection.execute(
            f"SELECT {CELL_COLUMNS} FROM cells WHERE key > ? AND (? IS NULL OR key <= ?) AND held = 0 AND ends_ms <= ?",  # noqa: S608
            (self._tidied_to, *(last or (None,)) * 2, now_ms - GRACE_MS),
        ).fetchall()
        self._tidied_to = last[0] if last else ""
        gone = [(key,) for key, cell in map(cell_of_row, rows) if disposable(cell, now_ms)]
        self._many(DELETE_CELL, gone)
        for (key,) in gone:
            self._changed[0].append(key)
            self._state.cells.pop(key, None)
            self._cell_rows.pop(key, None)
            self._trusted.discard(key)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - per turn: without the detour over Path
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
