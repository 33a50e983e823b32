"""What records add to the sums: read, and added up, without keeping anybody from writing.

A `Batch` is what to add in one transaction. It is of one state of the ledger, and says of which: see rule 1 of
`rollups.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import add, itemgetter
from typing import Any, Final, NamedTuple

import msgspec

from asgi_llm_guard.ledger.bulk import chunks, marks
from asgi_llm_guard.ledger.tables import GRAINS, RECORD_AMOUNTS, SERIES_COLUMNS, SETS, mark
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage_rows import quoted

__all__ = ["Batch", "Piece", "Sums", "list_of", "look", "unrolled"]

# What is read of a record: see `Piece`.
_READ: Final = f"row, at_ms, {', '.join(map(quoted, SERIES_COLUMNS))}, {RECORD_AMOUNTS}"
_WIDTH: Final = len(SERIES_COLUMNS)
_VALUES_OF: Final = tuple(itemgetter(*map(SERIES_COLUMNS.index, grain.columns)) for grain in GRAINS)
_STEPS_MS: Final = tuple(grain.step_ms for grain in GRAINS)
_SET_PLACES: Final = tuple(place for place, name in enumerate(SERIES_COLUMNS) if name in SETS)

_encode = msgspec.json.Encoder().encode
_decode_list = msgspec.json.Decoder(list[str]).decode

Sums = Mapping[tuple[int, tuple[Any, ...]], Sequence[int]]
"""Amounts by the start of the hour or day, and by the values of a grain's columns. Lists are texts, one for each list."""


class Piece(NamedTuple):
    """What a record adds to the sums, or takes from them."""

    at_ms: int
    values: tuple[Any, ...]
    """Of `SERIES_COLUMNS`, as they are in the ledger."""
    amounts: Sequence[int]
    """Of `AMOUNTS`."""


class Batch(NamedTuple):
    """What some records, and corrections of others, add to the sums."""

    rolls: int
    """How often sums were added to before it was looked at."""
    size: int
    """Records and corrections that it is of: of each as many as were asked for, or fewer."""
    rolled_to: int
    last: int
    """The records behind the first of these row numbers, up to the second, are in it."""
    corrected: Sequence[int]
    """Rows of records whose corrections are in it."""
    seen: int
    """The last replacement that it knows of."""
    first_ms: int
    last_ms: int
    sums: Sequence[Sums]
    """By grain."""


def list_of(text: str) -> tuple[str, ...]:
    """What a list of departments or tags names, each once."""
    return tuple(sorted(set(_decode_list(text)))) if text != "[]" else ()


def look(connection: Connection, most: int) -> Batch | None:
    """At most so many records, and corrections, that the sums do not know; `None`: they know all."""
    rolled_to = mark(connection, "rolled_to")
    rows = connection.execute(
        f"SELECT {_READ} FROM ledger WHERE row > ? ORDER BY row LIMIT ?",  # noqa: S608 - our names
        (rolled_to, most),
    )
    pieces, corrected = _corrections(connection, rolled_to, most)
    if not rows and not pieces:
        return None
    instants = [row[1] for row in rows] + [piece.at_ms for piece in pieces]
    return Batch(
        rolls=mark(connection, "rolls"),
        size=len(rows) + len(corrected),
        rolled_to=rolled_to,
        last=rows[-1][0] if rows else rolled_to,
        corrected=corrected,
        seen=connection.execute("SELECT COALESCE(MAX(seq), 0) FROM ledger_replaced")[0][0],
        first_ms=min(instants),
        last_ms=max(instants),
        sums=_added_up(chain(pieces, map(_piece, rows))),
    )


def _added_up(pieces: Iterable[Piece]) -> Sequence[Sums]:
    texts: dict[str, str] = {}
    sums: list[dict[tuple[int, tuple[Any, ...]], Sequence[int]]] = [{} for _ in GRAINS]
    for at_ms, values, amounts in pieces:
        named = list(values)
        for place in _SET_PLACES:
            text = named[place]
            if text not in texts:
                texts[text] = _encode(list_of(text)).decode()
            named[place] = texts[text]
        for step_ms, values_of, found in zip(_STEPS_MS, _VALUES_OF, sums, strict=True):
            key = at_ms - at_ms % step_ms, values_of(named)
            row = found.get(key)
            found[key] = amounts if row is None else tuple(map(add, row, amounts))
    return sums


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


def _piece(row: tuple[Any, ...]) -> Piece:
    return Piece(row[1], row[2 : 2 + _WIDTH], row[2 + _WIDTH :])
