"""Takes away series, and lists, that no sum refers to any more: with the last sum of a user goes the user's name.

A series is looked for among millions of sums, which takes too long to keep others from writing. So, without any lock:

    look      which series have no sum?                                           reads
    retire    these get a name that nobody finds, and all rollers forget theirs   writes, some hundred at a time
    look      which of the retired have no sum?                                   reads
    remove    these                                                               writes, some hundred at a time

Until it is retired a series may be found, or be remembered by a roller, and get a sum: also between looking and
retiring. A transaction that retires moves `names` in ledger_meta, and all that roll up come before it or after it (SQLite
has one writer, PostgreSQL the `lock`). Those before it have left their sums where the second look finds them. Those
after it have forgotten every number (rule 4 of `rollups.py`), and find a retired name no more: they make a new series.
So what has no sum at the second look will never have one. A retired series that has got one stays until that is removed
too; reports add up what two series of the same values have.

Of several that do all this at once, one may look, and others remove; SQLite gives a number that is gone to the next
series. So a retired name has the number of its retirement in it, which is never used twice, and only the series is
removed that has the very name that was looked at.

Lists are few, and only series refer to them. A new series counts up `series_made` in ledger_meta: where that is what it
was when somebody looked for unused lists, none is used again. A list that was removed and made anew has made a series.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Final, Literal

from asgi_llm_guard.ledger.bulk import chunks, marks
from asgi_llm_guard.ledger.pieces import list_of
from asgi_llm_guard.ledger.rollups import forget_numbers
from asgi_llm_guard.ledger.tables import GRAINS, lock, mark, set_mark
from asgi_llm_guard.sql import Connection

__all__ = ["Transaction", "note_removed", "sweep"]

Transaction = tuple[Literal["read", "write"], Callable[[Connection], Any]]

_TRIES: Final = 3
"""So often unused lists are looked for while new series are made."""

_RETIRED: Final = "name LIKE '-%'"  # the name of any other is JSON: a list


def note_removed(connection: Connection) -> None:
    """Sums were removed in this transaction: some series may be without any."""
    set_mark(connection, "sums_removed", mark(connection, "sums_removed", 1) + 1)


def sweep() -> Generator[Transaction, Any, None]:
    """What is to be done, one transaction after the other; each is sent back what it gave.

    Nothing, where no sums were removed since the last time. May be broken off anywhere; the next one goes on.
    """
    removed = yield "read", _unswept
    if removed is None:
        return
    for ids in chunks((yield "read", _idle_series)):
        yield "write", partial(_retire, ids=ids)
    for names in chunks((yield "read", _idle_retired)):
        yield "write", partial(_remove_series, names=names)
    for _ in range(_TRIES):
        made, ids = yield "read", _idle_lists
        for some in chunks(ids):
            if not (yield "write", partial(_remove_lists, ids=some, made=made)):
                break
        else:
            yield "write", lambda connection: set_mark(connection, "sums_swept", removed)
            return


def _unswept(connection: Connection) -> int | None:
    """How often sums were removed; `None`: no more often than when all unused series were removed last."""
    removed = mark(connection, "sums_removed", 1)
    return removed if removed != mark(connection, "sums_swept") else None


# -------------------------------------------------------------------------------------- series


def _idle_series(connection: Connection) -> list[int]:
    return [
        number
        for grain in GRAINS
        for (number,) in connection.execute(
            f"SELECT id FROM ledger_series WHERE grain = ? AND NOT {_RETIRED} EXCEPT SELECT series FROM {grain.table}",  # noqa: S608
            (grain.number,),
        )
    ]


def _retire(connection: Connection, ids: Sequence[int]) -> None:
    lock(connection)
    connection.execute(
        f"UPDATE ledger_series SET name = CAST(? AS TEXT) || id WHERE id IN ({marks(ids)}) AND NOT {_RETIRED}",  # noqa: S608
        (f"-{forget_numbers(connection)}-", *ids),
    )


def _idle_retired(connection: Connection) -> list[str]:
    if not connection.execute(f"SELECT 1 FROM ledger_series WHERE {_RETIRED} LIMIT 1"):  # noqa: S608 - our names
        return []
    return [
        name
        for grain in GRAINS
        for (name,) in connection.execute(
            "SELECT name FROM ledger_series WHERE id IN"  # noqa: S608 - our names
            f" (SELECT id FROM ledger_series WHERE grain = ? AND {_RETIRED} EXCEPT SELECT series FROM {grain.table})",
            (grain.number,),
        )
    ]


def _remove_series(connection: Connection, names: Sequence[str]) -> None:
    lock(connection)
    connection.execute(f"DELETE FROM ledger_series WHERE name IN ({marks(names)})", names)  # noqa: S608


# --------------------------------------------------------------------------------------- lists


def _idle_lists(connection: Connection) -> tuple[int, list[int]]:
    """How many series were made so far, and the lists that none of those that are left refers to."""
    rows = connection.execute(
        "SELECT id FROM ledger_sets EXCEPT SELECT departments FROM ledger_series EXCEPT SELECT tags FROM ledger_series"
    )
    return mark(connection, "series_made"), [number for (number,) in rows]


def _remove_lists(connection: Connection, ids: Sequence[int], made: int) -> bool:
    """Whether it was done: not, where series were made since these were looked for."""
    lock(connection)
    if mark(connection, "series_made") != made:
        return False
    forget_numbers(connection)
    rows = connection.execute(f"DELETE FROM ledger_sets WHERE id IN ({marks(ids)}) RETURNING id, members", ids)  # noqa: S608
    connection.execute_many(
        "DELETE FROM ledger_members WHERE member = ? AND id = ?",
        [(member, number) for number, members in rows for member in list_of(members)],
    )
    return True
