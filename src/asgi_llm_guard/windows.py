"""Windows: over which time a limit holds, and when it starts anew.

| window | instance | a settlement after its end |
|---|---|---|
| `Lifetime` | from the first use until idle (or since the first use) for `ttl_ms` | changes nothing |
| `Rolling` | starts at the first admitted use, lasts `period_ms` | changes nothing |
| `Calendar` | an hour, day, ISO week, month or year in a time zone | changes nothing |
| `Sliding` | the last `period_ms`, in sub-buckets; the oldest one counts whole | changes nothing |
| `Bucket` | exact leaky bucket: `limit` units drain per `period_ms`, `burst` fit | refunds only what has not drained |
| `Slots` | as long as the call lives | frees the slot |
| `Distinct` | each id for `ttl_ms` after it was last seen | changes nothing |

All instants are milliseconds since the Unix epoch on the storage's clock.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import ClassVar, Final, Literal
from zoneinfo import ZoneInfo

import msgspec

from asgi_llm_guard.errors import ConfigurationError

__all__ = [
    "BUCKET",
    "CALENDAR",
    "DISTINCT",
    "LIFETIME",
    "PERIOD_GRAMMAR",
    "ROLLING",
    "SLIDING",
    "SLOTS",
    "Bucket",
    "Calendar",
    "Distinct",
    "Lifetime",
    "Rolling",
    "Sliding",
    "Slots",
    "Window",
    "duration_ms",
    "leasable",
    "parse_window",
]

# What storages dispatch on: an integer compares faster than a type, and is what a script can read.
LIFETIME: Final = 0
ROLLING: Final = 1
CALENDAR: Final = 2
SLIDING: Final = 3
BUCKET: Final = 4
SLOTS: Final = 5
DISTINCT: Final = 6

_MAX_MS: Final = 100 * 366 * 86_400_000  # a century: beyond it a limit is a typing error

CalendarUnit = Literal["hour", "day", "week", "month", "year"]


def _positive(name: str, value: object, *, most: int = _MAX_MS) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ConfigurationError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")


class Lifetime(msgspec.Struct, frozen=True):
    """One instance that ends `ttl_ms` after its first use; with `renew`, after its last admitted use."""

    ttl_ms: int
    renew: bool = False
    kind: ClassVar[int] = LIFETIME

    def __post_init__(self) -> None:
        _positive("ttl_ms", self.ttl_ms)

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return f"life{self.ttl_ms}" + ("r" if self.renew else "")


class Rolling(msgspec.Struct, frozen=True):
    """Starts at the first admitted use, lasts `period_ms`, then a new one starts at the next use."""

    period_ms: int
    kind: ClassVar[int] = ROLLING

    def __post_init__(self) -> None:
        _positive("period_ms", self.period_ms)

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return f"roll{self.period_ms}"


class Calendar(msgspec.Struct, frozen=True):
    """An hour, day, ISO week (from Monday), month or year of the wall clock in `tz`.

    A local day is 23 to 25 hours long where summer time changes; where midnight does not
    exist, the day starts at the first instant that does.
    """

    unit: CalendarUnit
    tz: str = "UTC"
    kind: ClassVar[int] = CALENDAR

    def __post_init__(self) -> None:
        if self.unit not in {"hour", "day", "week", "month", "year"}:
            raise ConfigurationError(f"calendar unit: expected hour, day, week, month or year, got {self.unit!r}")
        _zone(self.tz)

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return f"{self.unit}@{self.tz}"

    def bounds(self, now_ms: int) -> tuple[int, int]:
        """The start (inclusive) and the end (exclusive) of the instance that `now_ms` falls into."""
        start, end = _last_bounds.get((self.unit, self.tz), (1, 0))
        if not start <= now_ms < end:
            start, end = _calendar_bounds(self.unit, self.tz, now_ms)
            _last_bounds[self.unit, self.tz] = (start, end)
        return start, end


# The instance last computed for each unit and zone: a pure function's memory, bounded by the configuration.
_last_bounds: dict[tuple[str, str], tuple[int, int]] = {}


class Sliding(msgspec.Struct, frozen=True):
    """The last `period_ms`, counted in `buckets` sub-buckets.

    A use stays counted until its whole sub-bucket has left the window, so the window is
    effectively between `period_ms` and `period_ms * (1 + 1 / buckets)` long: it never
    admits more than the limit in any `period_ms`.
    """

    period_ms: int
    buckets: int = 60
    kind: ClassVar[int] = SLIDING

    def __post_init__(self) -> None:
        _positive("period_ms", self.period_ms)
        _positive("buckets", self.buckets, most=1000)
        if self.period_ms % self.buckets:
            raise ConfigurationError(
                f"buckets: must divide the period of {self.period_ms} ms evenly, got {self.buckets}"
            )

    @property
    def bucket_ms(self) -> int:
        """The length of one sub-bucket in milliseconds."""
        return self.period_ms // self.buckets

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return f"slide{self.period_ms}x{self.buckets}"


class Bucket(msgspec.Struct, frozen=True):
    """An exact integer leaky bucket (equivalent to GCRA): `limit` units drain per `period_ms`, `burst` units fit.

    The backlog is kept in unit-milliseconds, so no rounding takes place. Its key carries the
    rate: changing the rate changes the meter.
    """

    period_ms: int
    burst: int
    kind: ClassVar[int] = BUCKET

    def __post_init__(self) -> None:
        _positive("period_ms", self.period_ms)
        _positive("burst", self.burst, most=2**52)
        if self.burst * self.period_ms > 2**52:
            raise ConfigurationError(
                f"burst: burst x period must stay below 2^52 to be exact, got {self.burst} x {self.period_ms} ms"
            )

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return f"bucket{self.period_ms}b{self.burst}"


class Slots(msgspec.Struct, frozen=True):
    """Units of concurrency: held for as long as the call or stream lives, then free again."""

    kind: ClassVar[int] = SLOTS

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return "slots"


class Distinct(msgspec.Struct, frozen=True):
    """Live distinct ids: each counts once, until `ttl_ms` after it was last admitted."""

    ttl_ms: int
    kind: ClassVar[int] = DISTINCT

    def __post_init__(self) -> None:
        _positive("ttl_ms", self.ttl_ms)

    @property
    def code(self) -> str:
        """A short text that tells windows apart in storage keys."""
        return f"ids{self.ttl_ms}"


Window = Lifetime | Rolling | Calendar | Sliding | Bucket | Slots | Distinct


def leasable(window: Window) -> bool:
    """Whether a chunk of a meter may be spent later than it was taken, without loosening the limit.

    Not of a bucket, which drains meanwhile; not where each use renews the window, which would end early; not of
    slots, which are freed when a process is taken for dead; and ids are no amounts.
    """
    if isinstance(window, Lifetime):
        return not window.renew
    return isinstance(window, (Rolling, Calendar, Sliding))


# ---------------------------------------------------------------------------------- grammar

PERIOD_GRAMMAR: Final = (
    "a number and a unit (30s, 5m, 12h, 1d, 7d, 2w, 1mo, 3mo; a rolling month is 30 days), "
    "or hourly, daily, weekly, monthly, yearly for calendar windows"
)
_UNIT_MS: Final = {
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 7 * 86_400_000,
    "mo": 30 * 86_400_000,
}
_CALENDAR: Final[dict[str, CalendarUnit]] = {
    "hourly": "hour",
    "daily": "day",
    "weekly": "week",
    "monthly": "month",
    "yearly": "year",
}
_DURATION: Final = re.compile(r"([1-9][0-9]{0,8})(s|m|h|d|w|mo)", re.ASCII)


def duration_ms(text: str, *, name: str = "duration") -> int:
    """The length of `30s`, `5m`, `12h`, `1d`, `2w` or `1mo` (30 days) in milliseconds.

    Raises:
        ConfigurationError: anything else; the message shows the grammar.
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(
            f"{name}: expected a number and a unit such as 30s, 5m, 12h, 1d, 2w or 1mo, got {text!r}"
        )
    length = int(match[1]) * _UNIT_MS[match[2]]
    if length > _MAX_MS:
        raise ConfigurationError(f"{name}: at most 100 years, got {text!r}")
    return length


def parse_window(text: str, *, tz: str = "UTC", name: str = "window") -> Rolling | Calendar:
    """`1d` and other durations as a `Rolling` window, `daily` and its kin as a `Calendar` one in `tz`.

    Raises:
        ConfigurationError: anything else; the message shows the grammar.
    """
    if isinstance(text, str) and text in _CALENDAR:
        return Calendar(_CALENDAR[text], tz)
    if isinstance(text, str) and _DURATION.fullmatch(text):
        return Rolling(duration_ms(text, name=name))
    raise ConfigurationError(f"{name}: expected {PERIOD_GRAMMAR}, got {text!r}")


# --------------------------------------------------------------------------------- calendar


@lru_cache(maxsize=256)
def _zone(tz: str) -> ZoneInfo:
    try:
        return ZoneInfo(tz)
    except (KeyError, ValueError, OSError, TypeError):  # what zoneinfo raises for unknown and for malformed keys
        raise ConfigurationError(f"tz: expected an IANA time zone such as Europe/Berlin, got {tz!r}") from None


def _calendar_bounds(unit: CalendarUnit, tz: str, now_ms: int) -> tuple[int, int]:
    zone = _zone(tz)
    local = datetime.fromtimestamp(now_ms // 1000, UTC).astimezone(zone)
    if unit == "hour":
        # Wall-clock hours: the offset in force is a whole number of minutes, and an hour that
        # summer time repeats is two instances of one hour each.
        offset_ms = int((local.utcoffset() or timedelta()).total_seconds()) * 1000
        start = (now_ms + offset_ms) // 3_600_000 * 3_600_000 - offset_ms
        return start, start + 3_600_000
    first = datetime(local.year, local.month, local.day)  # noqa: DTZ001 - naive on purpose: wall-clock arithmetic
    if unit == "day":
        following = first + timedelta(days=1)
    elif unit == "week":
        first -= timedelta(days=first.weekday())
        following = first + timedelta(days=7)
    elif unit == "month":
        first = first.replace(day=1)
        following = (first + timedelta(days=31)).replace(day=1)
    else:
        first = first.replace(month=1, day=1)
        following = first.replace(year=first.year + 1)
    return _instant(first, zone), _instant(following, zone)


def _instant(wall: datetime, zone: ZoneInfo) -> int:
    """The first instant at which the wall clock of `zone` shows `wall` or later."""
    aware = wall.replace(tzinfo=zone, fold=0)
    instant = aware.astimezone(UTC)
    if instant.astimezone(zone).replace(tzinfo=None) != wall:
        # `wall` falls into a gap. Read with the offset from before it (fold=0), the result lies
        # behind the jump by as much as `wall` lies inside the gap; PEP 495 names the two offsets.
        after = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
        lo, hi = int(min(instant, after).timestamp()), int(max(instant, after).timestamp())
        while lo < hi:  # the transition: the first second whose wall clock is past `wall`
            middle = (lo + hi) // 2
            if datetime.fromtimestamp(middle, UTC).astimezone(zone).replace(tzinfo=None) >= wall:
                hi = middle
            else:
                lo = middle + 1
        return lo * 1000
    return int(instant.timestamp()) * 1000
