"""How records become sums: exactly once each, in any process, and corrected where a record was replaced.

Rule 1: `rolled_to` in ledger_meta is the row number up to which all records are in the sums. It moves in the same
transaction in which they are added.

Rule 2: a record that was replaced after it was rolled up is subtracted as it was then, and added as it is now.
`ledger_replaced` has what it was. So the sums are at any time those of one state of the records: the *rolled* one.

Rule 3: what a report adds to the sums to be up to date is `unrolled`: the records behind the mark, and the difference
that replaced ones make.

Rule 4: a `Roller` remembers the numbers of series and lists only as long as `names` in ledger_meta is what it was; it
looks in each transaction, in which nobody else can move it. Who takes names away moves it in the transaction after
which they are not to be used (see `unused.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgspec

from asgi_llm_guard.ledger.bulk import Kind, add_to_sums, chunks, marks, numbered, numbers_of
from asgi_llm_guard.ledger.pace import Pace
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
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage_rows import quoted

__all__ = ["Piece", "Roller", "forget_numbers", "list_of", "unrolled"]

_MAX_KNOWN: Final = 200_000

# What is read of a record: see `Piece`.
_READ: Final = f"row, at_ms, {', '.join(map(quoted, SERIES_COLUMNS))}, {RECORD_AMOUNTS}"
_VALUES_OF: Final = tuple(itemgetter(*map(SERIES_COLUMNS.index, grain.columns)) for grain in GRAINS)
_STEPS_MS: Final = tuple(grain.step_ms for grain in GRAINS)
_SET_PLACES: Final = tuple(place for place, name in enumerate(SERIES_COLUMNS) if name in SETS)
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


def forget_numbers(connection: Connection) -> int:
    """Let every roller look for names anew from this transaction on; a number that was never given before."""
    number = mark(connection, "names") + 1
    set_mark(connection, "names", number)
    return number


class Roller:
    """Rolls up, and remembers the numbers of series from one step to the next. For one user at a time."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}
        self._set_ids: dict[str, int] = {}
        self._in_doubt = False
        self._rolled_to = 0
        self._names = 0
        self._pace = Pace()

    def step(self, connection: Connection, most: int) -> int:
        """Roll up at most so many records, or corrections, in this transaction, or as many as its pace is; how many were.

        Call `confirm` when it has ended well: numbers that were given out in one that failed are nobody's.
        """
        lock(connection)
        most = min(most, self._pace.most(connection))
        rolled_to = mark(connection, "rolled_to")
        names = mark(connection, "names")
        # The mark never goes back, but in a database that was restored: there its numbers are others' too.
        if self._in_doubt or rolled_to < self._rolled_to or names != self._names:
            self._known.clear()
            self._set_ids.clear()
        self._in_doubt = True
        self._rolled_to = rolled_to
        self._names = names
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
            connection.execute(f"DELETE FROM ledger_replaced WHERE row IN ({marks(some)})", some)  # noqa: S608
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
        parts: list[dict[tuple[int, tuple[Any, ...]], list[Sequence[int]]]] = [{} for _ in GRAINS]
        for at_ms, values, amounts in pieces:
            named = list(values)
            for place in _SET_PLACES:
                named[place] = numbers[values[place]]
            for step_ms, values_of, found in zip(_STEPS_MS, _VALUES_OF, parts, strict=True):
                found.setdefault((at_ms - at_ms % step_ms, values_of(named)), []).append(amounts)
        series = self._numbered_series(connection, [{values for _, values in found} for found in parts])
        for grain, found, known in zip(GRAINS, parts, series, strict=True):
            rows = [(at_ms, known[values], *_total(some)) for (at_ms, values), some in found.items()]
            rows.sort()  # in the order of the key, so that pages are met once
            add_to_sums(connection, grain, rows)

    def _numbered_lists(self, connection: Connection, lists: Iterable[str]) -> dict[str, int]:
        """The number of each list, by its text in the ledger; new ones are added."""
        if len(self._set_ids) > _MAX_KNOWN:
            self._set_ids.clear()
        members = {text: list_of(text) for text in lists if text not in self._set_ids}
        if members:
            names = {each: _encode(each).decode() for each in set(members.values())}
            known = numbers_of(connection, "ledger_sets", "members", names.values())
            missing = {each: name for each, name in names.items() if name not in known}
            if missing:
                known |= numbered(connection, "ledger_sets", {"members": "text"}, sorted(zip(missing.values())))
                connection.execute_many(
                    "INSERT INTO ledger_members (member, id) VALUES (?, ?)",
                    [(member, known[name]) for each, name in missing.items() for member in each],
                )
            for text, each in members.items():
                self._set_ids[text] = known[names[each]]
        return self._set_ids

    def _numbered_series(
        self, connection: Connection, combinations: Sequence[Iterable[tuple[Any, ...]]]
    ) -> list[dict[tuple[Any, ...], int]]:
        """The number of each combination of each grain; new ones are added."""
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        names = [
            {values: _encode((grain.number, *values)) for values in some}
            for grain, some in zip(GRAINS, combinations, strict=True)
        ]
        unknown = {
            name.decode(): (grain, values)
            for grain, some in zip(GRAINS, names, strict=True)
            for values, name in some.items()
            if name not in self._known
        }
        if unknown:
            found = numbers_of(connection, "ledger_series", "name", unknown)
            missing = [_series_row(name, *unknown[name]) for name in sorted(unknown.keys() - found.keys())]
            if missing:
                found |= numbered(connection, "ledger_series", _SERIES_ROW, missing)
                set_mark(connection, "series_made", mark(connection, "series_made") + len(missing))
            for name, number in found.items():
                self._known[name.encode()] = number
        return [{values: self._known[name] for values, name in some.items()} for some in names]

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
        rows = connection.execute(f"SELECT {_READ} FROM ledger WHERE row IN ({marks(some)})", some)  # noqa: S608
        pieces += map(_piece, rows)
    return pieces, list(old)


def _total(rows: Sequence[Sequence[int]]) -> Iterable[int]:
    return rows[0] if len(rows) == 1 else map(sum, zip(*rows, strict=True))


_SERIES_ROW: Final[dict[str, Kind]] = {
    "name": "text",
    "grain": "bigint",
    **{name: "bigint" if name in SETS else "text" for name in SERIES_COLUMNS},
}


def _series_row(name: str, grain: Grain, values: Sequence[Any]) -> tuple[Any, ...]:
    """A new row of `ledger_series`: columns that the grain does not have are NULL."""
    of_column = dict(zip(grain.columns, values, strict=True))
    return (name, grain.number, *map(of_column.get, SERIES_COLUMNS))


def _piece(row: tuple[Any, ...]) -> Piece:
    return Piece(row[1], row[2 : 2 + _WIDTH], row[2 + _WIDTH :])
