"""Answers `usage`: from the sums that know enough, and from the records for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from typing import Any, Final, NamedTuple

from asgi_llm_guard.ledger.filters import column_of, record_conditions, series_conditions
from asgi_llm_guard.ledger.keeping import kept_since
from asgi_llm_guard.ledger.pieces import Piece, list_of, unrolled
from asgi_llm_guard.ledger.spans import Segment, Span, cut, segment_at, segments
from asgi_llm_guard.ledger.tables import DAY_MS, GRAINS, RECORD_SUMS, SERIES_COLUMNS, SETS, SUMS, Grain, mark
from asgi_llm_guard.ledger.values import AMOUNTS, TIMES, Amounts, NotKeptError, UsageQuery, UsageReport, UsageRow
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage_rows import quoted

__all__ = ["Source", "sources", "usage"]

_FEW: Final = 3
"""Above so many single hours or days, one statement asks for all of them."""

_SEEKS: Final = 50_000
"""Up to so many rows are looked up one by one; for more, all of the period are read."""

_PART: Final = 3
"""SQLite looks up the rows of so small a part of all series faster than it reads all of the period and sorts them."""

Group = tuple[int, tuple[Any, ...]]
"""A segment's number and the values of the columns."""


class Source(NamedTuple):
    """The tables that are to answer; with neither, the records alone."""

    days: Grain | None = None
    hours: Grain | None = None


def usage(connection: Connection, query: UsageQuery, source: Source | None = None) -> UsageReport:
    """The report; `source`: from there, whatever would be faster.

    Raises:
        NotKeptError: only rows that retention has removed could tell.
    """
    columns = tuple(column_of(name) for name in query.by if name not in TIMES)
    asked = {*columns, *map(column_of, query.where)}
    since_ms, until_ms = _bounds(connection, query)
    parts = segments(since_ms, until_ms, query.by, query.tz)
    spans = _chosen(connection, parts, [source] if source else sources(asked, query.by)) if parts else []
    sums: dict[Group, list[int]] = {}
    for (number, values), sign, row in _read(connection, spans, columns, query):
        _add(sums, (number, values), row, sign)
    if any(span.grain for span in spans):
        _bring_up_to_date(connection, sums, spans, parts, columns, query.where)
    return _report(sums, parts, columns, query)


def sources(columns: set[str], by: Sequence[str] = ()) -> Iterator[Source]:
    """What can answer for these columns of the ledger, the least to be read first."""
    grains = [grain for grain in GRAINS if columns <= set(grain.columns)]
    hours = next((grain for grain in grains if grain.step_ms < DAY_MS), None)
    if "hour" not in by:
        for days in grains:
            if days.step_ms == DAY_MS:
                yield Source(days, hours)
                yield Source(days)
    if hours is not None:
        yield Source(hours=hours)
    yield Source()


# ----------------------------------------------------------------------------------- planning


def _bounds(connection: Connection, query: UsageQuery) -> tuple[int, int]:
    """The period, without what lies before the first and after the last of all records there ever were."""
    first = mark(connection, "first_ms", 2**53)
    last = mark(connection, "last_ms")
    (oldest,), (newest,) = (
        connection.execute(f"SELECT {which}(at_ms) FROM ledger")[0]  # noqa: S608 - one at a time, for SQLite's index
        for which in ("MIN", "MAX")
    )
    if oldest is not None:
        first = min(first, oldest // DAY_MS * DAY_MS)
        last = max(last, (newest // DAY_MS + 1) * DAY_MS)
    return max(query.since_ms, first), min(query.until_ms, last)


def _chosen(connection: Connection, parts: Sequence[Segment], among: Iterable[Source]) -> list[Span]:
    """The spans of the first source of which everything is still kept."""
    kept: dict[str, int] = {kind: kept_since(connection, kind) for kind in ("raw", "hours", "days", "people")}
    missing: dict[str, int] = {}
    for source in among:
        spans = list(cut(parts, days=source.days, hours=source.hours))
        lost: dict[str, int] = {
            kind: kept[kind] for span in spans if span.since_ms < kept[kind := span.grain.kept if span.grain else "raw"]
        }
        if not lost:
            return spans
        missing |= lost
    since = ", ".join(
        f"{kind} since {datetime.fromtimestamp(at_ms // 1000, UTC):%Y-%m-%d}" for kind, at_ms in sorted(missing.items())
    )
    raise NotKeptError(
        f"usage: this report needs rows that are no longer kept (there are {since}, UTC); ask for a later period, for "
        "fewer dimensions or whole UTC days, or keep more (Retention)"
    )


# ------------------------------------------------------------------------------------ reading


def _read(
    connection: Connection, spans: Sequence[Span], columns: Sequence[str], query: UsageQuery
) -> Iterator[tuple[Group, int, Sequence[int]]]:
    """Each group of each span, with its sign and its amounts."""
    by_grain: dict[Grain, list[Span]] = defaultdict(list)
    for span in spans:
        if span.grain is None:
            yield from _from_records(connection, span, columns, query.where)
        else:
            by_grain[span.grain].append(span)
    lists = _Lists(connection, columns)
    for grain, some in by_grain.items():
        single = {span.since_ms: span for span in some if span.sign > 0 and _steps(span, grain) == 1}
        first, last = min(single, default=0), max(single, default=0) + grain.step_ms
        if len(single) <= _FEW or len(single) * grain.step_ms * 2 < last - first:
            single.clear()
        else:
            for at_ms, values, row in _from_sums(connection, grain, first, last, columns, query.where, each=True):
                if at_ms in single:
                    yield (single[at_ms].segment, lists.named(values)), 1, row
        # What one local day takes from its neighbour, the neighbour gives: the same rows, read once.
        period, rows = (0, 0), list[tuple[tuple[Any, ...], Sequence[int]]]()
        for span in sorted(some, key=lambda span: span.since_ms):
            if single.get(span.since_ms) is span:
                continue
            if period != (span.since_ms, span.until_ms):
                period = span.since_ms, span.until_ms
                found = _from_sums(connection, grain, *period, columns, query.where)
                rows = [(lists.named(values), row) for _, values, row in found]
            for values, row in rows:
                yield (span.segment, values), span.sign, row


def _steps(span: Span, grain: Grain) -> int:
    return (span.until_ms - span.since_ms) // grain.step_ms


def _from_records(
    connection: Connection, span: Span, columns: Sequence[str], where: Mapping[str, str | None]
) -> Iterator[tuple[Group, int, Sequence[int]]]:
    conditions, parameters = record_conditions(where, connection.dialect)
    names = ", ".join(map(quoted, columns))
    for row in connection.iterate(
        f"SELECT {names}{', ' if names else ''}{RECORD_SUMS} FROM ledger WHERE at_ms >= ? AND at_ms < ?"  # noqa: S608
        f"{conditions}{f' GROUP BY {names}' if names else ''}",
        (span.since_ms, span.until_ms, *parameters),
    ):
        values = [
            list_of(value) if name in SETS else value for name, value in zip(columns, row[: len(columns)], strict=True)
        ]
        yield (span.segment, tuple(values)), span.sign, row[len(columns) :]


def _from_sums(
    connection: Connection,
    grain: Grain,
    since_ms: int,
    until_ms: int,
    columns: Sequence[str],
    where: Mapping[str, str | None],
    *,
    each: bool = False,
) -> Iterator[tuple[int, tuple[Any, ...], Sequence[int]]]:
    """Rows of rolled-up amounts by columns; `each`: and by hour or day, which comes first."""
    names = [f"s.{quoted(name)}" for name in columns]
    group = [*(["a.at_ms"] if each else []), *names]
    grouped = f" GROUP BY {', '.join(group)}" if group else ""
    statement, parameters = _statement(connection, grain, since_ms, until_ms, names, where, each=each)
    for row in connection.iterate(
        f"SELECT {', '.join([*group, SUMS])} FROM {statement}{grouped}",  # noqa: S608 - our names
        parameters,
    ):
        yield row[0] if each else 0, row[len(group) - len(names) : len(group)], row[len(group) :]


def _statement(
    connection: Connection,
    grain: Grain,
    since_ms: int,
    until_ms: int,
    names: Sequence[str],
    where: Mapping[str, str | None],
    *,
    each: bool,
) -> tuple[str, Sequence[object]]:
    """What to sum up: rolled-up rows `a` with their series `s`. CROSS JOIN keeps SQLite to this order."""
    conditions, parameters = series_conditions(where)
    series = f"FROM ledger_series s WHERE s.grain = ?{conditions}"
    of_series: tuple[object, ...] = (grain.number, *parameters)
    period = since_ms, until_ms
    step_count = (until_ms - since_ms) // grain.step_ms
    named = "CROSS JOIN ledger_series s WHERE s.id = a.series"
    if where:
        steps = (
            "(WITH RECURSIVE steps (at_ms) AS (SELECT CAST(? AS BIGINT) UNION ALL"  # noqa: S608 - our names
            f" SELECT at_ms + {grain.step_ms} FROM steps WHERE at_ms + {grain.step_ms} < ?) SELECT at_ms FROM steps) t"
        )
        (count,) = connection.execute(f"SELECT count(*) {series}", of_series)[0]
        if connection.dialect == "sqlite" and not each:
            (among,) = connection.execute("SELECT count(*) FROM ledger_series WHERE grain = ?", (grain.number,))[0]
            if count * _PART <= among:  # one series after the other, so that nothing has to be sorted
                sums = (
                    f"(SELECT s.id AS series, {SUMS} FROM ledger_series s CROSS JOIN {steps} CROSS JOIN {grain.table} a"  # noqa: S608
                    f" WHERE s.grain = ?{conditions} AND a.at_ms = t.at_ms AND a.series = s.id GROUP BY s.id) a"
                )
                return f"{sums} {named}" if names else sums, (*period, *of_series)
        if count * step_count <= _SEEKS:
            return (
                f"{steps} CROSS JOIN (SELECT s.* {series}) s CROSS JOIN {grain.table} a"
                " WHERE a.at_ms = t.at_ms AND a.series = s.id"
            ), (*period, *of_series)
    rows = f"{grain.table} a WHERE a.at_ms >= ? AND a.at_ms < ?"
    values: tuple[object, ...] = period
    if where:
        rows += f" AND a.series IN (SELECT s.id {series})"
        values = (*period, *of_series)
    if not names:
        return rows, values
    if each or step_count <= _FEW:
        return f"(SELECT a.* FROM {rows}) a {named}", values  # noqa: S608 - our names
    # First by number, which is less to sort by.
    by_series = f"(SELECT a.series, {SUMS} FROM {rows} GROUP BY a.series) a"  # noqa: S608 - our names
    return f"{by_series} {named}", values


class _Lists:
    """What the numbers of lists stand for."""

    def __init__(self, connection: Connection, columns: Sequence[str]) -> None:
        self._places = [place for place, name in enumerate(columns) if name in SETS]
        rows = connection.execute("SELECT id, members FROM ledger_sets") if self._places else []
        self._members = {number: list_of(members) for number, members in rows}

    def named(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._places:
            return values
        named = list(values)
        for place in self._places:
            named[place] = self._members[values[place]]
        return tuple(named)


# -------------------------------------------------------------------------- what is not rolled up


def _bring_up_to_date(
    connection: Connection,
    sums: dict[Group, list[int]],
    spans: Sequence[Span],
    parts: Sequence[Segment],
    columns: Sequence[str],
    where: Mapping[str, str | None],
) -> None:
    """Add what the sums do not know yet, except where it was read from the records."""
    places = [SERIES_COLUMNS.index(name) for name in columns]
    raw = [span for span in spans if span.grain is None]
    since_ms, until_ms = min(span.since_ms for span in spans), max(span.until_ms for span in spans)
    for piece in unrolled(connection, since_ms, until_ms):
        if not _matches(piece, where):
            continue
        values = tuple(
            list_of(piece.values[place]) if name in SETS else piece.values[place]
            for name, place in zip(columns, places, strict=True)
        )
        number = segment_at(parts, piece.at_ms)
        if number is not None:
            _add(sums, (number, values), piece.amounts, 1)
        for span in raw:
            if span.since_ms <= piece.at_ms < span.until_ms:
                _add(sums, (span.segment, values), piece.amounts, -span.sign)


def _matches(piece: Piece, where: Mapping[str, str | None]) -> bool:
    for name, wanted in where.items():
        column = column_of(name)
        value = piece.values[SERIES_COLUMNS.index(column)]
        if column in SETS:
            members = list_of(value)
            if (wanted not in members) if wanted is not None else members:
                return False
        elif value != wanted:
            return False
    return True


def _add(sums: dict[Group, list[int]], group: Group, row: Sequence[int], sign: int) -> None:
    found = sums.get(group)
    if found is None:
        sums[group] = [sign * amount for amount in row]
    else:
        sums[group] = [one + sign * other for one, other in zip(found, row, strict=True)]


# ------------------------------------------------------------------------------------ writing


def _report(
    sums: Mapping[Group, Sequence[int]], parts: Sequence[Segment], columns: Sequence[str], query: UsageQuery
) -> UsageReport:
    total = [0] * len(AMOUNTS)
    keyed: dict[tuple[str | None, ...], list[int]] = {}
    for (number, values), row in sums.items():
        if not any(row):
            continue
        total = [one + other for one, other in zip(total, row, strict=True)]
        named = dict(zip(columns, values, strict=True))
        texts = parts[number].texts
        choices = [
            (texts[name],) if name in TIMES else _each(named[column_of(name)], query.where.get(name))
            for name in query.by
        ]
        for key in product(*choices):
            found = keyed.get(key)
            keyed[key] = list(row) if found is None else [one + other for one, other in zip(found, row, strict=True)]
    rows = sorted(keyed.items(), key=_ORDERS[query.order]) if query.by else []
    return UsageReport(
        rows=tuple(UsageRow(key, _amounts(row)) for key, row in rows[: query.limit] if any(row)),
        total=_amounts(total),
        left_out=max(0, len(rows) - query.limit),
    )


def _each(value: object, only: str | None) -> tuple[Any, ...]:
    """The values that a record counts for: each of a list in full; of a list that was filtered, the one asked for."""
    if not isinstance(value, tuple):
        return (value,)
    return (only,) if only is not None else value or (None,)


def _amounts(row: Sequence[int]) -> Amounts:
    return Amounts(**dict(zip(AMOUNTS, row, strict=True)))


_Row = tuple[tuple[str | None, ...], list[int]]
_COST, _CALLS = AMOUNTS.index("cost_nanousd"), AMOUNTS.index("calls")


def _key(item: _Row) -> tuple[tuple[bool, str], ...]:
    return tuple((value is not None, value or "") for value in item[0])


_ORDERS: Final = {
    "cost": lambda item: (-item[1][_COST], _key(item)),
    "calls": lambda item: (-item[1][_CALLS], _key(item)),
    "key": _key,
}
