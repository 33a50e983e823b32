"""The time range of a page: which was asked for, and the bars that it is cut into. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, Literal
from zoneinfo import ZoneInfo

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import Calendar

__all__ = ["RANGES", "Period", "read_period", "slots"]

RANGES: Final[Mapping[str, tuple[str, int]]] = {
    "24h": ("24 hours", 86_400_000),
    "7d": ("7 days", 7 * 86_400_000),
    "30d": ("30 days", 30 * 86_400_000),
}
_MOST_MS: Final = 732 * 86_400_000
_HOURS_MOST_MS: Final = 3 * 86_400_000


class Period(msgspec.Struct, frozen=True, kw_only=True):
    """From when until when."""

    name: str
    """A key of `RANGES`, or `custom`."""
    since_ms: int
    until_ms: int
    tz: str
    problem: str | None = None
    """Why what was asked for could not be read; this is the last day then."""

    @property
    def unit(self) -> Literal["hour", "day"]:
        """What one bar stands for."""
        return "hour" if self.until_ms - self.since_ms <= _HOURS_MOST_MS else "day"

    def query(self) -> dict[str, str]:
        """What links of the page carry so that the next one shows the same time."""
        if self.name != "custom":
            return {"range": self.name, "tz": self.tz}
        return {
            "range": "custom",
            "since": self.local(self.since_ms),
            "until": self.local(self.until_ms),
            "tz": self.tz,
        }

    def local(self, at_ms: int) -> str:
        """As a field of type `datetime-local` takes it."""
        return datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(ZoneInfo(self.tz)).strftime("%Y-%m-%dT%H:%M")


def read_period(query: Mapping[str, str], now_ms: int, *, tz: str, default: str = "24h") -> Period:
    """The range that a page was asked for. Whole bars: it begins with the hour or day that its start falls into."""
    problem = None
    zone = query.get("tz", "").strip() or tz
    try:
        Calendar("day", zone)
    except ConfigurationError:
        problem, zone = "This time zone is not known. Write one as Europe/Berlin.", tz
    name = query.get("range", default)
    if name == "custom":
        try:
            since_ms, until_ms = (_instant(query.get(key, ""), zone) for key in ("since", "until"))
        except ValueError:
            problem = "A custom range needs a first and a last moment, such as 2026-05-01T00:00."
        else:
            if 0 <= since_ms < until_ms <= min(since_ms, now_ms) + _MOST_MS:
                return Period(name="custom", since_ms=since_ms, until_ms=until_ms, tz=zone, problem=problem)
            problem = "A range must end after it begins, be no longer than two years, and not lie far ahead."
    elif name not in RANGES:
        problem = "This range is not known."
    if name not in RANGES:
        name = default
    since_ms = now_ms - RANGES[name][1]
    unit: Literal["hour", "day"] = "hour" if name == "24h" else "day"
    return Period(
        name=name, since_ms=Calendar(unit, zone).bounds(since_ms)[1], until_ms=now_ms + 1, tz=zone, problem=problem
    )


def slots(period: Period) -> list[tuple[int, int]]:
    """Start and end of every bar, oldest first. Days are those of the time zone, 23 to 25 hours long."""
    calendar = Calendar(period.unit, period.tz)
    found = []
    start, end = calendar.bounds(period.since_ms)
    while start < period.until_ms:
        found.append((start, end))
        start, end = calendar.bounds(end)
    return found


def _instant(text: str, zone: str) -> int:
    """Raises `ValueError`: it is no date and time."""
    local = datetime.fromisoformat(text)
    if local.tzinfo is None:
        local = local.replace(tzinfo=ZoneInfo(zone))
    return (local - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
