"""What retention removes, and whether the sums still say what the records say."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from asgi_llm_guard.ledger.pieces import unrolled
from asgi_llm_guard.ledger.tables import DAY_MS, GRAINS, RECORD_SUMS, SUMS, lock, mark, set_mark
from asgi_llm_guard.ledger.unused import note_removed
from asgi_llm_guard.ledger.values import AMOUNTS, Amounts, Difference, NotKeptError, Reconciliation, Retained, Retention
from asgi_llm_guard.sql import Connection

__all__ = ["check_records", "kept_since", "reconcile", "remove"]

_ROWS: Final = 400
"""How many rows a transaction removes from each table."""


def kept_since(connection: Connection, kind: str) -> int:
    """From which instant on rows of this kind (a field of `Retention`) are all there."""
    return mark(connection, f"{kind}_since_ms")


def check_records(connection: Connection, since_ms: int, until_ms: int) -> None:
    """Refuse a period whose records are not all there any more.

    Raises:
        NotKeptError: retention has removed some, or may have.
    """
    kept_ms = kept_since(connection, "raw")
    if max(since_ms, mark(connection, "first_ms", 2**53)) < min(until_ms, kept_ms):
        raise NotKeptError(
            f"ledger: records are kept since {datetime.fromtimestamp(kept_ms // 1000, UTC):%Y-%m-%d} (UTC), and this period "
            "begins before; ask for a later one, or keep more (Retention.raw)"
        )


def remove(connection: Connection, retention: Retention, now_ms: int) -> Retained:
    """Remove some of what is no longer kept; nothing is left when all is 0."""
    lock(connection)
    removed = dict.fromkeys(Retained.__struct_fields__, 0)
    for kind in removed:
        lasts_ms = retention.lasts_ms(kind)
        if lasts_ms is None:
            continue
        since_ms = (now_ms - lasts_ms) // DAY_MS * DAY_MS
        if since_ms <= 0:
            continue
        if since_ms > kept_since(connection, kind):
            # Before the first row goes, so that no report ever takes a part for all.
            set_mark(connection, f"{kind}_since_ms", since_ms)
        if kind == "raw":
            removed[kind] = _remove_records(connection, since_ms)
        elif kind == "refusals":
            removed[kind] = _removed(
                connection.execute(
                    "DELETE FROM ledger_refusals WHERE hour_ms IN"
                    " (SELECT DISTINCT hour_ms FROM ledger_refusals WHERE hour_ms < ? ORDER BY hour_ms LIMIT 4)"
                    " RETURNING 1",
                    (since_ms,),
                )
            )
        else:
            removed[kind] = sum(
                _remove_sums(connection, grain.table, since_ms) for grain in GRAINS if grain.kept == kind
            )
    if any(removed[grain.kept] for grain in GRAINS):
        note_removed(connection)
    return Retained(**removed)


def _remove_records(connection: Connection, since_ms: int) -> int:
    rolled_to = mark(connection, "rolled_to")
    # Never the one at the mark: with it SQLite would give its number to the next record, which would not be rolled up.
    # Nor one whose correction is still to be made.
    rows = connection.execute(
        "DELETE FROM ledger WHERE row IN (SELECT row FROM ledger WHERE at_ms < ? AND +row < ?"
        " AND row NOT IN (SELECT row FROM ledger_replaced) ORDER BY at_ms LIMIT ?) RETURNING 1",
        (since_ms, rolled_to, _ROWS),
    )
    return _removed(rows)


def _remove_sums(connection: Connection, table: str, since_ms: int) -> int:
    return _removed(
        connection.execute(
            f"DELETE FROM {table} WHERE (series, at_ms) IN"  # noqa: S608 - our names
            f" (SELECT series, at_ms FROM {table} WHERE at_ms < ? LIMIT ?) RETURNING 1",
            (since_ms, _ROWS),
        )
    )


def _removed(rows: list[tuple[Any, ...]]) -> int:
    return len(rows)


# ------------------------------------------------------------------------------------ reconcile


def reconcile(connection: Connection, since_ms: int, until_ms: int) -> Reconciliation:
    """Compare the sums of every grain with the records, day by day."""
    begin = max(since_ms, kept_since(connection, "raw")) // DAY_MS * DAY_MS
    end = max(begin, -(-min(until_ms, 2**52) // DAY_MS) * DAY_MS)
    records = _by_day(
        connection.execute(
            f"SELECT at_ms - at_ms % {DAY_MS}, {RECORD_SUMS} FROM ledger"  # noqa: S608 - our names
            " WHERE at_ms >= ? AND at_ms < ? GROUP BY 1",
            (begin, end),
        )
    )
    fresh: dict[int, list[int]] = {}
    for piece in unrolled(connection, begin, end):
        day_ms = piece.at_ms - piece.at_ms % DAY_MS
        row = fresh.setdefault(day_ms, [0] * len(AMOUNTS))
        fresh[day_ms] = [one + other for one, other in zip(row, piece.amounts, strict=True)]
    differences: list[Difference] = []
    for grain in GRAINS:
        first = max(begin, kept_since(connection, grain.kept))
        sums = _by_day(
            connection.execute(
                f"SELECT a.at_ms - a.at_ms % {DAY_MS}, {SUMS} FROM {grain.table} a"  # noqa: S608 - our names
                " WHERE a.at_ms >= ? AND a.at_ms < ? GROUP BY 1",
                (first, end),
            )
        )
        for day_ms in sorted(records.keys() | sums.keys() | fresh.keys()):
            if day_ms < first:
                continue
            nothing = [0] * len(AMOUNTS)
            told = [
                one + other for one, other in zip(sums.get(day_ms, nothing), fresh.get(day_ms, nothing), strict=True)
            ]
            for name, true, seen in zip(AMOUNTS, records.get(day_ms, nothing), told, strict=True):
                if true != seen:
                    differences.append(
                        Difference(day_ms=day_ms, table=grain.table, amount=name, records=true, rolled_up=seen)
                    )
    total = [sum(row[place] for row in records.values()) for place in range(len(AMOUNTS))]
    return Reconciliation(
        since_ms=begin,
        until_ms=end,
        total=Amounts(**dict(zip(AMOUNTS, total, strict=True))),
        differences=tuple(differences),
    )


def _by_day(rows: list[tuple[Any, ...]]) -> dict[int, list[int]]:
    return {row[0]: list(row[1:]) for row in rows}
