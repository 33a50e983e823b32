"""How records become sums: exactly once each, in any process, and corrected where a record was replaced.

Rule 1: `rolled_to` in ledger_meta is the row number up to which all records are in the sums. It moves in the same
transaction in which they are added, and so does `rolls`, which counts these transactions. What to add is read and added up
before, while others write (`pieces.py`); it is added only where `rolls` is still what it was then.

Rule 2: a record that was replaced after it was rolled up is subtracted as it was then, and added as it is now.
`ledger_replaced` has what it was. So the sums are at any time those of one state of the records: the *rolled* one. What was
replaced after a batch was read is in the sums as it was; its replacement stays in `ledger_replaced` for the next one.

Rule 3: what a report adds to the sums to be up to date is `unrolled`: the records behind the mark, and the difference
that replaced ones make.

Rule 4: a `Roller` remembers the numbers of series and lists only as long as `names` in ledger_meta is what it was; it
looks in each transaction, in which nobody else can move it. Who takes names away moves it in the transaction after
which they are not to be used (see `unused.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec

from asgi_llm_guard.ledger.bulk import Kind, add_to_sums, chunks, marks, numbered, numbers_of
from asgi_llm_guard.ledger.pace import Pace
from asgi_llm_guard.ledger.pieces import Batch, Sums, list_of, look
from asgi_llm_guard.ledger.tables import DAY_MS, GRAINS, SERIES_COLUMNS, SETS, Grain, lock, mark, set_mark
from asgi_llm_guard.sql import Connection

__all__ = ["Roller", "forget_numbers"]

_MAX_KNOWN: Final = 200_000

_SET_PLACES: Final = tuple(tuple(place for place, name in enumerate(grain.columns) if name in SETS) for grain in GRAINS)
"""Where a grain's values are lists."""

_encode = msgspec.json.Encoder().encode


def forget_numbers(connection: Connection) -> int:
    """Let every roller look for names anew from this transaction on; a number that was never given before."""
    number = mark(connection, "names") + 1
    set_mark(connection, "names", number)
    return number


class Roller:
    """Rolls up, and remembers the numbers of series from one transaction to the next. For one user at a time."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._known: list[dict[tuple[Any, ...], int]] = [{} for _ in GRAINS]
        self._texts: dict[str | None, str | None] = {}
        """Of what is known, each once: few users and models make many combinations."""
        self._in_doubt = False
        self._rolled_to = 0
        self._names = 0

    def step(self, connection: Connection, most: int) -> int:
        """Roll up at most so many records and corrections, or as many as its pace is; how many were.

        Reads and adds in one transaction. Call `confirm` when it has ended well.
        """
        lock(connection)
        self.pace.note(connection)
        batch = look(connection, min(most, self.pace.most(connection.dialect)))
        if batch is not None:
            self._write(connection, batch)
            return batch.size
        if self._in_doubt:
            self._forget()
        return 0

    def add(self, connection: Connection, batch: Batch) -> int | None:
        """Add it to the sums; its size. `None`: somebody else was faster, or waits behind so much: do a `step`.

        Call `confirm` when the transaction has ended well: numbers that were given out in one that failed are nobody's.
        """
        lock(connection)
        self.pace.note(connection)
        if mark(connection, "rolls") != batch.rolls or batch.size > 2 * self.pace.most(connection.dialect):
            return None
        self._write(connection, batch)
        return batch.size

    def confirm(self) -> None:
        """The transaction of the last `step`, or of the last `add` that did something, has ended well."""
        self._in_doubt = False

    def _write(self, connection: Connection, batch: Batch) -> None:
        names = mark(connection, "names")
        # The mark never goes back, but in a database that was restored: there its numbers are others' too.
        if self._in_doubt or batch.rolled_to < self._rolled_to or names != self._names:
            self._forget()
        self._in_doubt = True
        self._names = names
        self._rolled_to = batch.last
        self._add(connection, batch.sums)
        for some in chunks(batch.corrected):
            connection.execute(
                f"DELETE FROM ledger_replaced WHERE row IN ({marks(some)}) AND seq <= ?",  # noqa: S608 - our names
                (*some, batch.seen),
            )
        if batch.last > batch.rolled_to:
            # These were added as they were when the batch was read.
            connection.execute(
                "DELETE FROM ledger_replaced WHERE row > ? AND row <= ? AND seq <= ?",
                (batch.rolled_to, batch.last, batch.seen),
            )
            set_mark(connection, "rolled_to", batch.last)
        set_mark(connection, "rolls", batch.rolls + 1)
        _note_period(connection, batch)

    def _forget(self) -> None:
        for known in self._known:
            known.clear()
        self._texts.clear()

    def _add(self, connection: Connection, sums: Sequence[Sums]) -> None:
        self._learn(connection, sums)
        for grain, known, found in zip(GRAINS, self._known, sums, strict=True):
            rows = [(at_ms, known[values], *row) for (at_ms, values), row in found.items()]
            rows.sort()  # in the order of the key, so that pages are met once
            add_to_sums(connection, grain, rows)

    def _learn(self, connection: Connection, sums: Sequence[Sums]) -> None:
        """Find the number of each combination that is not known; give one to those that have none."""
        if sum(map(len, self._known)) > _MAX_KNOWN:
            self._forget()
        unknown = [
            {values for _, values in found if values not in known}
            for known, found in zip(self._known, sums, strict=True)
        ]
        if not any(unknown):
            return
        lists = _numbered_lists(
            connection,
            {
                values[place]
                for some, places in zip(unknown, _SET_PLACES, strict=True)
                for values in some
                for place in places
            },
        )
        combinations: dict[str, tuple[int, tuple[Any, ...]]] = {}
        rows: dict[str, tuple[Any, ...]] = {}
        for place, (grain, some, list_places) in enumerate(zip(GRAINS, unknown, _SET_PLACES, strict=True)):
            for values in some:
                named = list(values)
                for list_place in list_places:
                    named[list_place] = lists[values[list_place]]
                name = _encode((grain.number, *named)).decode()
                combinations[name] = place, values
                rows[name] = _series_row(name, grain, named)
        numbers = numbers_of(connection, "ledger_series", "name", rows)
        missing = [rows[name] for name in sorted(rows.keys() - numbers.keys())]
        if missing:
            numbers |= numbered(connection, "ledger_series", _SERIES_ROW, missing)
            set_mark(connection, "series_made", mark(connection, "series_made") + len(missing))
        share = self._texts.setdefault
        for name, (place, values) in combinations.items():
            self._known[place][tuple([share(value, value) for value in values])] = numbers[name]


def _numbered_lists(connection: Connection, texts: Collection[str]) -> dict[str, int]:
    """The number of each list; new ones are added."""
    numbers = numbers_of(connection, "ledger_sets", "members", texts)
    missing = sorted(text for text in texts if text not in numbers)
    if missing:
        numbers |= numbered(connection, "ledger_sets", {"members": "text"}, [(text,) for text in missing])
        connection.execute_many(
            "INSERT INTO ledger_members (member, id) VALUES (?, ?)",
            [(member, numbers[text]) for text in missing for member in list_of(text)],
        )
    return numbers


def _note_period(connection: Connection, batch: Batch) -> None:
    """Between which days there is anything: so that a report for all time need not look at all time."""
    first, last = batch.first_ms // DAY_MS * DAY_MS, (batch.last_ms // DAY_MS + 1) * DAY_MS
    if first < mark(connection, "first_ms", 2**53):
        set_mark(connection, "first_ms", first)
    if last > mark(connection, "last_ms"):
        set_mark(connection, "last_ms", last)


_SERIES_ROW: Final[dict[str, Kind]] = {
    "name": "text",
    "grain": "bigint",
    **{name: "bigint" if name in SETS else "text" for name in SERIES_COLUMNS},
}


def _series_row(name: str, grain: Grain, values: Sequence[Any]) -> tuple[Any, ...]:
    """A new row of `ledger_series`: columns that the grain does not have are NULL."""
    of_column = dict(zip(grain.columns, values, strict=True))
    return (name, grain.number, *map(of_column.get, SERIES_COLUMNS))
