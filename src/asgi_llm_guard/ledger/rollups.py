"""How records become sums: exactly once each, in any process, and corrected where a record was replaced.

Rule 1: `rolled_to` in ledger_meta is the row number up to which all records are in the sums. It moves in the same
transaction in which they are added.

Rule 2: a record that was replaced after it was rolled up is subtracted as it was then, and added as it is now.
`ledger_replaced` has what it was. So the sums are at any time those of one state of the records: the *rolled* one.

Rule 3: what a report adds to the sums to be up to date is `unrolled`: the records behind the mark, and the difference
that replaced ones make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from asgi_llm_guard.ledger.tables import (
    DAY_MS,
    GRAINS,
    RECORD_AMOUNTS,
    SERIES_COLUMNS,
    SETS,
    Grain,
    lock,
    mark,
    set_mark,
)
from asgi_llm_guard.ledger.values import AMOUNTS
from asgi_llm_guard.sql import Connection, Dialect
from asgi_llm_guard.usage_rows import quoted

__all__ = ["STEPS", "Piece", "Roller", "chunks", "list_of", "unrolled"]

STEPS: Final[dict[Dialect, int]] = {"sqlite": 300, "postgresql": 2_000}
"""How many records a transaction rolls up. On SQLite about 12 ms: settlements in the same file wait meanwhile."""

_MAX_KNOWN: Final = 200_000

# What is read of a record: see `Piece`.
_READ: Final = f"row, at_ms, {', '.join(map(quoted, SERIES_COLUMNS))}, {RECORD_AMOUNTS}"
_PLACES: Final = tuple(tuple(SERIES_COLUMNS.index(name) for name in grain.columns) for grain in GRAINS)
_WIDTH: Final = len(SERIES_COLUMNS)

_encode = msgspec.json.Encoder().encode
_decode_list = msgspec.json.Decoder(list[str]).decode


class Piece(NamedTuple):
    """What a record adds to the sums, or takes from them."""

    at_ms: int
    values: tuple[Any, ...]
    """Of `SERIES_COLUMNS`, as they are in the ledger."""
    amounts: Sequence[int]
    """Of `AMOUNTS`."""


def list_of(text: str) -> tuple[str, ...]:
    """What a list of departments or tags names, each once."""
    return tuple(sorted(set(_decode_list(text)))) if text != "[]" else ()


def chunks(values: Iterable[Any], size: int = 400) -> Iterator[list[Any]]:
    """As many at a time as a statement takes parameters."""
    values = list(values)
    return (values[start : start + size] for start in range(0, len(values), size))


def unrolled(connection: Connection, since_ms: int = 0, until_ms: int = 2**53) -> Iterator[Piece]:
    """What the sums do not know yet of this period."""
    rolled_to = mark(connection, "rolled_to")
    period = (since_ms, until_ms)
    for row in connection.iterate(
        f"SELECT {_READ} FROM ledger WHERE row > ? AND +at_ms >= ? AND +at_ms < ?",  # noqa: S608 - our names; not by the index on at_ms
        (rolled_to, *period),
    ):
        yield _piece(row)
    pieces, _ = _corrections(connection, rolled_to, most=2**31)
    for piece in pieces:
        if since_ms <= piece.at_ms < until_ms:
            yield piece


class Roller:
    """Rolls up, and remembers the numbers of series from one step to the next. For one user at a time."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}
        self._set_ids: dict[str, int] = {}
        self._in_doubt = False
        self._rolled_to = 0

    def step(self, connection: Connection, most: int) -> int:
        """Roll up at most so many records, or corrections, in this transaction; how many were.

        Call `confirm` when it has ended well: numbers that were given out in one that failed are nobody's.
        """
        lock(connection)
        rolled_to = mark(connection, "rolled_to")
        # The mark never goes back, but in a database that was restored: there its numbers are others' too.
        if self._in_doubt or rolled_to < self._rolled_to:
            self._known.clear()
            self._set_ids.clear()
        self._in_doubt = True
        self._rolled_to = rolled_to
        rows = connection.execute(
            f"SELECT {_READ} FROM ledger WHERE row > ? ORDER BY row LIMIT ?",  # noqa: S608 - our names
            (rolled_to, most),
        )
        pieces, corrected = _corrections(connection, rolled_to, most)
        if not rows and not corrected:
            return 0
        pieces += map(_piece, rows)
        self._add(connection, pieces)
        for some in chunks(corrected):
            connection.execute(f"DELETE FROM ledger_replaced WHERE row IN ({_marks(some)})", some)  # noqa: S608
        if rows:
            last = rows[-1][0]
            # These were added as they are now.
            connection.execute("DELETE FROM ledger_replaced WHERE row > ? AND row <= ?", (rolled_to, last))
            set_mark(connection, "rolled_to", last)
            self._rolled_to = last
        self._note_period(connection, [piece.at_ms for piece in pieces])
        return len(rows) + len(corrected)

    def confirm(self) -> None:
        """The transaction of the last step has ended well."""
        self._in_doubt = False

    def _add(self, connection: Connection, pieces: Sequence[Piece]) -> None:
        lists = {piece.values[place] for piece in pieces for place in _SET_PLACES}
        numbers = self._numbered_lists(connection, lists)
        sums: list[dict[tuple[int, tuple[Any, ...]], list[int]]] = [{} for _ in GRAINS]
        for at_ms, values, amounts in pieces:
            named = list(values)
            for place in _SET_PLACES:
                named[place] = numbers[values[place]]
            for grain, places, found in zip(GRAINS, _PLACES, sums, strict=True):
                key = (at_ms - at_ms % grain.step_ms, tuple([named[place] for place in places]))
                row = found.get(key)
                if row is None:
                    found[key] = list(amounts)
                else:
                    found[key] = [one + other for one, other in zip(row, amounts, strict=True)]
        for grain, found in zip(GRAINS, sums, strict=True):
            series = self._numbered_series(connection, grain, {values for _, values in found})
            # In the order of the key, so that pages are met once.
            _upsert(connection, grain, sorted((at_ms, series[values], *row) for (at_ms, values), row in found.items()))

    def _numbered_lists(self, connection: Connection, lists: Iterable[str]) -> dict[str, int]:
        """The number of each list, by its text in the ledger; new ones are added."""
        if len(self._set_ids) > _MAX_KNOWN:
            self._set_ids.clear()
        members = {text: list_of(text) for text in lists if text not in self._set_ids}
        if members:
            names = {each: _encode(each).decode() for each in set(members.values())}
            known = _looked_up(connection, "ledger_sets", "members", names.values())
            missing = {each: name for each, name in names.items() if name not in known}
            if missing:
                connection.execute_many(
                    "INSERT INTO ledger_sets (members) VALUES (?)", [(name,) for name in sorted(missing.values())]
                )
                known |= _looked_up(connection, "ledger_sets", "members", missing.values())
                connection.execute_many(
                    "INSERT INTO ledger_members (member, id) VALUES (?, ?)",
                    [(member, known[name]) for each, name in missing.items() for member in each],
                )
            for text, each in members.items():
                self._set_ids[text] = known[names[each]]
        return self._set_ids

    def _numbered_series(
        self, connection: Connection, grain: Grain, combinations: Iterable[tuple[Any, ...]]
    ) -> dict[tuple[Any, ...], int]:
        """The number of each combination of this grain; new ones are added."""
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        names = {values: _encode((grain.number, *values)) for values in combinations}
        unknown = {name.decode(): values for values, name in names.items() if name not in self._known}
        if unknown:
            found = _looked_up(connection, "ledger_series", "name", unknown)
            missing = sorted(unknown.keys() - found.keys())
            if missing:
                columns = ", ".join(map(quoted, grain.columns))
                connection.execute_many(
                    f"INSERT INTO ledger_series (grain, name, {columns})"  # noqa: S608 - our names
                    f" VALUES (?, ?, {_marks(grain.columns)})",
                    [(grain.number, name, *unknown[name]) for name in missing],
                )
                found |= _looked_up(connection, "ledger_series", "name", missing)
            for name, number in found.items():
                self._known[name.encode()] = number
        return {values: self._known[name] for values, name in names.items()}

    def _note_period(self, connection: Connection, instants: Sequence[int]) -> None:
        """Between which days there is anything: so that a report for all time need not look at all time."""
        first, last = min(instants) // DAY_MS * DAY_MS, (max(instants) // DAY_MS + 1) * DAY_MS
        if first < mark(connection, "first_ms", 2**53):
            set_mark(connection, "first_ms", first)
        if last > mark(connection, "last_ms"):
            set_mark(connection, "last_ms", last)


def _corrections(connection: Connection, rolled_to: int, most: int) -> tuple[list[Piece], list[int]]:
    """What replaced records take from the sums and add to them; and the rows of those records."""
    old: dict[int, Piece] = {}
    for row in connection.execute(
        f"SELECT {_READ} FROM ledger_replaced WHERE row <= ? ORDER BY seq LIMIT ?",  # noqa: S608 - our names
        (rolled_to, most),
    ):
        piece = _piece(row)
        # Of several the first: that is what was rolled up.
        old.setdefault(row[0], piece._replace(amounts=[-amount for amount in piece.amounts]))
    pieces = list(old.values())
    for some in chunks(old):
        rows = connection.execute(f"SELECT {_READ} FROM ledger WHERE row IN ({_marks(some)})", some)  # noqa: S608
        pieces += map(_piece, rows)
    return pieces, list(old)


def _looked_up(connection: Connection, table: str, column: str, values: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for some in chunks(values):
        found |= connection.execute(
            f"SELECT {column}, id FROM {table} WHERE {column} IN ({_marks(some)})",  # noqa: S608 - our names
            some,
        )
    return found


def _piece(row: tuple[Any, ...]) -> Piece:
    return Piece(row[1], row[2 : 2 + _WIDTH], row[2 + _WIDTH :])


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


_SET_PLACES: Final = tuple(place for place, name in enumerate(SERIES_COLUMNS) if name in SETS)


def _upsert(connection: Connection, grain: Grain, rows: Sequence[tuple[int, ...]]) -> None:
    """Add amounts to the rows of a grain."""
    columns = ("at_ms", "series", *AMOUNTS)
    changes = ", ".join(f"{name} = {grain.table}.{name} + excluded.{name}" for name in AMOUNTS)
    into = f"INSERT INTO {grain.table} ({', '.join(columns)})"
    conflict = f"ON CONFLICT (series, at_ms) DO UPDATE SET {changes}"
    if connection.dialect == "sqlite":
        connection.execute_many(f"{into} VALUES ({_marks(columns)}) {conflict}", rows)
    elif rows:
        # All rows in one statement, a column in one text: four times as fast as row by row.
        lists = ", ".join("string_to_array(?, ',')::bigint[]" for _ in columns)
        texts = [",".join(map(str, column)) for column in zip(*rows, strict=True)]
        connection.execute(f"{into} SELECT * FROM unnest({lists}) {conflict}", texts)  # noqa: S608 - our names
