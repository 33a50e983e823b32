"""Answers `usage`: from the sums that know enough, and from the records for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from typing import Any, Final, NamedTuple

from asgi_llm_guard.ledger.filters import column_of, record_conditions, series_conditions
from asgi_llm_guard.ledger.keeping import kept_since
from asgi_llm_guard.ledger.rollups import Piece, list_of, unrolled
from asgi_llm_guard.ledger.spans import Segment, Span, cut, segment_at, segments
from asgi_llm_guard.ledger.tables import DAY_MS, GRAINS, RECORD_SUMS, SERIES_COLUMNS, SETS, SUMS, Grain, mark
from asgi_llm_guard.ledger.values import AMOUNTS, TIMES, Amounts, NotKeptError, UsageQuery, UsageReport, UsageRow
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage_rows import quoted

__all__ = ["Source", "sources", "usage"]

_FEW: Final = 3
"""Above so many single hours or days, one statement asks for all of them."""

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
        lost = {
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
        single = {
            span.since_ms: span.segment
            for span in some
            if span.sign > 0 and span.until_ms - span.since_ms == grain.step_ms
        }
        if len(single) > _FEW:
            period = min(single), max(single) + grain.step_ms
            for at_ms, values, row in _from_sums(connection, grain, *period, columns, query.where, each=True):
                if at_ms in single:
                    yield (single[at_ms], lists.named(values)), 1, row
        else:
            single.clear()
        for span in some:
            if span.since_ms in single and span.sign > 0 and span.until_ms - span.since_ms == grain.step_ms:
                continue
            for _, values, row in _from_sums(connection, grain, span.since_ms, span.until_ms, columns, query.where):
                yield (span.segment, lists.named(values)), span.sign, row


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
    conditions, parameters = series_conditions(where)
    names = [quoted(name) for name in columns]
    time = ["at_ms"] if each else []
    inner = [*(f"a.{name}" for name in time), *(f"s.{name}" for name in names)]
    outer = [*time, *names]
    # CROSS JOIN: for each series its rows, which lie together; so SQLite need not sort what it sums up.
    parts = (
        f"SELECT {', '.join([*inner, SUMS])} FROM ledger_series s CROSS JOIN {grain.table} a"  # noqa: S608
        f" WHERE s.grain = ? AND a.series = s.id AND a.at_ms >= ? AND a.at_ms < ?{conditions}"
        f" GROUP BY s.id{', a.at_ms' if each else ''}"
    )
    group = f" GROUP BY {', '.join(outer)}" if outer else ""
    for row in connection.iterate(
        f"SELECT {', '.join([*outer, SUMS])} FROM ({parts}) a{group}",  # noqa: S608 - our names
        (grain.number, since_ms, until_ms, *parameters),
    ):
        yield row[0] if each else 0, row[len(time) : len(outer)], row[len(outer) :]


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
