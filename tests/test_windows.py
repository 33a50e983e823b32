"""Windows: when calendar periods begin and end, in every zone and on the days that clocks change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import Calendar, CalendarUnit, Rolling, duration_ms, parse_window

HOUR_MS = 3_600_000
ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",  # used to change its clocks at midnight
    "America/Havana",  # its midnight comes twice in autumn
    "Australia/Lord_Howe",  # half an hour of summer time
    "Asia/Kathmandu",
    "Pacific/Apia",  # left out a whole day in 2011
]


def instant(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * 1000


@pytest.mark.parametrize(
    "unit, zone, now, start, end",
    [
        ("day", "UTC", "2026-11-21T10:30:00", "2026-11-21", "2026-11-22"),
        ("week", "UTC", "2026-11-21T10:30:00", "2026-11-16", "2026-11-23"),
        ("month", "UTC", "2026-11-21T10:30:00", "2026-11-01", "2026-12-01"),
        ("month", "UTC", "2026-01-31T23:59:59", "2026-01-01", "2026-02-01"),
        ("year", "UTC", "2028-02-29T12:00:00", "2028-01-01", "2029-01-01"),
        ("day", "Europe/Berlin", "2026-03-29T12:00:00", "2026-03-29", "2026-03-30"),
        ("day", "Europe/Berlin", "2026-10-25T12:00:00", "2026-10-25", "2026-10-26"),
        ("week", "America/New_York", "2026-03-08T23:00:00", "2026-03-02", "2026-03-09"),
        ("month", "America/New_York", "2026-11-01T00:30:00", "2026-11-01", "2026-12-01"),
    ],
)
def test_bounds(unit: CalendarUnit, zone: str, now: str, start: str, end: str) -> None:
    """Conformance 71: days end at midnight, weeks begin on Monday, months on the 1st, in the zone's own time."""
    bounds = Calendar(unit, zone).bounds(instant(now, zone))
    assert bounds == (instant(start, zone), instant(end, zone))


@pytest.mark.parametrize("day, hours", [("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)])
def test_days_on_which_clocks_change(day: str, hours: int) -> None:
    """Conformance 71: a day on which clocks change is an hour shorter or longer."""
    start, end = Calendar("day", "Europe/Berlin").bounds(instant(f"{day}T12:00:00", "Europe/Berlin"))
    assert end - start == hours * HOUR_MS


def test_midnight_that_does_not_exist() -> None:
    """Where clocks jump over midnight the day begins right after the jump."""
    start, _ = Calendar("day", "America/Sao_Paulo").bounds(instant("2018-11-04T12:00:00", "America/Sao_Paulo"))
    assert datetime.fromtimestamp(start / 1000, ZoneInfo("America/Sao_Paulo")).hour == 1


@given(
    unit=st.sampled_from(get_args(CalendarUnit)),
    zone=st.sampled_from(ZONES),
    now=st.datetimes(datetime(1995, 1, 1), datetime(2060, 1, 1)),  # noqa: DTZ001 - read as UTC below
)
def test_windows_tile_the_time(unit: CalendarUnit, zone: str, now: datetime) -> None:
    """Conformance 71: every instant lies in one window, its end is the next one's start, and rolls forward exactly."""
    now_ms = int(now.replace(tzinfo=UTC).timestamp() * 1000)
    calendar = Calendar(unit, zone)
    start, end = calendar.bounds(now_ms)
    assert start <= now_ms < end
    assert calendar.bounds(start) == (start, end)
    assert calendar.bounds(end - 1) == (start, end)
    assert calendar.bounds(end)[0] == end


@pytest.mark.parametrize("zone", ["Europe/Atlantis", "", "../etc/passwd", "berlin\x00"])
def test_unknown_zone(zone: str) -> None:
    """Conformance 71: a zone that nobody knows is a configuration error."""
    with pytest.raises(ConfigurationError, match="IANA time zone"):
        Calendar("day", zone)


@pytest.mark.parametrize(
    "text, days",
    [("50h", 50 / 24), ("4000m", 4000 / 1440), ("200000s", 200_000 / 86_400), ("8760h", 365), ("1mo", 30), ("2w", 14)],
)
def test_durations(text: str, days: float) -> None:
    """Conformance 72: long durations in short units are as long as they say; a rolling month is 30 days."""
    assert duration_ms(text) == round(days * 86_400_000)
    assert parse_window(text) == Rolling(duration_ms(text))


@pytest.mark.parametrize("text", ["", "5", "h", "0d", "-1d", "1.5h", "1y", "daily ", "Daily", "٣d", "9999999999s", 5.0])
def test_malformed_periods(text: str) -> None:
    """Anything else than a duration or a calendar period is a configuration error that shows the grammar."""
    with pytest.raises(ConfigurationError, match="30s"):
        parse_window(text)


def test_too_long() -> None:
    """No period is longer than a century."""
    with pytest.raises(ConfigurationError, match="100 years"):
        duration_ms("37000d")
