"""Which rows answer for a period: whole days from sums per day, the rest from sums per hour and from records.

A local day of Berlin begins at 22:00 or 23:00 UTC. It is the UTC day next to it, plus the one or two hours before,
minus those at its end: all sums are whole numbers, so what is subtracted is exact, and few rows are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

from asgi_llm_guard.ledger.tables import DAY_MS, HOUR_MS, Grain
from asgi_llm_guard.windows import Calendar, CalendarUnit

__all__ = ["Segment", "Span", "cut", "segment_at", "segments"]


class Segment(NamedTuple):
    """A part of the period that is one row in time."""

    since_ms: int
    until_ms: int
    texts: dict[str, str]
    """How it is called, by dimension of time."""


class Span(NamedTuple):
    """Rows of one table between two instants that count for a segment."""

    segment: int
    grain: Grain | None
    """`None`: the records themselves."""
    since_ms: int
    until_ms: int
    sign: int
    """-1: they are taken away."""


_UNITS: Final[tuple[CalendarUnit, ...]] = ("hour", "day", "month")


def segments(since_ms: int, until_ms: int, by: Sequence[str], tz: str) -> list[Segment]:
    """The parts of the period that `by` asks to be told apart; one if it names no time."""
    unit = next((unit for unit in _UNITS if unit in by), None)
    if unit is None:
        return [Segment(since_ms, until_ms, {})]
    calendar, zone = Calendar(unit, tz), ZoneInfo(tz)
    found, at_ms = [], since_ms
    while at_ms < until_ms:
        start_ms, end_ms = calendar.bounds(at_ms)
        local = datetime.fromtimestamp(start_ms // 1000, UTC).astimezone(zone)
        texts = {
            "hour": local.isoformat(timespec="minutes"),
            "day": local.date().isoformat(),
            "month": f"{local:%Y-%m}",
        }
        found.append(Segment(at_ms, min(end_ms, until_ms), texts))
        at_ms = end_ms
    return found


def segment_at(parts: Sequence[Segment], at_ms: int) -> int | None:
    """Which of the segments, which follow each other, the instant falls into."""
    place = bisect_right(parts, at_ms, key=lambda part: part.since_ms) - 1
    return place if place >= 0 and at_ms < parts[place].until_ms else None


def cut(parts: Sequence[Segment], *, days: Grain | None, hours: Grain | None) -> Iterator[Span]:
    """The rows that answer for each segment, by the tables that there are."""
    for number, (since_ms, until_ms, _) in enumerate(parts):
        first, last = _midnight(since_ms), _midnight(until_ms)
        if days is None or first >= last:
            yield from _fine(number, hours, since_ms, until_ms, 1)
            continue
        yield Span(number, days, first, last, 1)
        yield from _fine(number, hours, *_edge(since_ms, first))
        yield from _fine(number, hours, *_edge(last, until_ms))


def _midnight(at_ms: int) -> int:
    """The midnight (UTC) that is next to the instant."""
    return (at_ms + DAY_MS // 2) // DAY_MS * DAY_MS


def _edge(since_ms: int, until_ms: int) -> tuple[int, int, int]:
    """From one instant to another, with the sign: backwards takes away."""
    return (since_ms, until_ms, 1) if since_ms <= until_ms else (until_ms, since_ms, -1)


def _fine(segment: int, hours: Grain | None, since_ms: int, until_ms: int, sign: int) -> Iterator[Span]:
    first, last = -(-since_ms // HOUR_MS) * HOUR_MS, until_ms // HOUR_MS * HOUR_MS
    if hours is None or first >= last:
        if since_ms < until_ms:
            yield Span(segment, None, since_ms, until_ms, sign)
        return
    yield Span(segment, hours, first, last, sign)
    if since_ms < first:
        yield Span(segment, None, since_ms, first, sign)
    if last < until_ms:
        yield Span(segment, None, last, until_ms, sign)
