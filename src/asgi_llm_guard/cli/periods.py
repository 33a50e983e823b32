"""Periods as people write them: `24h`, `today`, `2026-11`, `2026-11-01`, `2026-11-01T08:00Z`."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from datetime import time as day_time
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import duration_ms

__all__ = ["Period", "begin_of", "check_length", "end_of", "instant_of", "period_options"]

_GRAMMAR: Final = (
    "a time ago (24h, 7d), today, yesterday, month, a month (2026-11), a day (2026-11-01), or an instant "
    "(2026-11-01T08:00Z)"
)
_DURATION: Final = re.compile(r"\d+[a-z]+", re.ASCII)
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})", re.ASCII)

Period = tuple[int, int]
"""From, and up to, in milliseconds since the epoch."""


def instant_of(text: str, *, now_ms: int, tz: str = "UTC") -> int:
    """The instant that `text` names, in milliseconds. Days and months begin at midnight in `tz`.

    Raises:
        ConfigurationError: it names none; shows what does.
    """
    zone = _zone(tz)
    now = datetime.fromtimestamp(now_ms / 1000, zone)
    named = {
        "now": lambda: now,
        "today": lambda: _midnight(now.date(), zone),
        "yesterday": lambda: _midnight(now.date() - timedelta(days=1), zone),
        "month": lambda: _midnight(now.date().replace(day=1), zone),
    }
    if text in named:
        return _ms(named[text]())
    try:
        if match := _MONTH.fullmatch(text):
            return _ms(_midnight(date(int(match[1]), int(match[2]), 1), zone))
        if len(text) == len("2026-11-01"):
            return _ms(_midnight(date.fromisoformat(text), zone))
        if text[:1].isdigit() and "T" in text.upper():
            at = datetime.fromisoformat(text)
            return _ms(at if at.tzinfo is not None else at.replace(tzinfo=zone))
        return now_ms - duration_ms(text)
    except (ValueError, ConfigurationError):
        raise ConfigurationError(f"expected {_GRAMMAR}; got {text!r}") from None


def begin_of(text: str, *, name: str) -> int:
    """When something begins that is looked at, in milliseconds: as `instant_of`, from now.

    Raises:
        UsageError: `text` names no instant.
    """
    try:
        return instant_of(text, now_ms=time.time_ns() // 1_000_000)
    except ConfigurationError as error:
        raise click.UsageError(f"{name}: {error}") from None


def check_length(_context: click.Context, parameter: click.Parameter, value: str) -> str:
    """For `callback`: a duration as it was written, or `0s`."""
    try:
        if value != "0s":
            duration_ms(value, name=f"--{parameter.name}")
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    return value


def end_of(text: str, *, name: str) -> int:
    """When something ends: a time from now (`2h`, `90d`), a day or an instant, in milliseconds.

    Raises:
        UsageError: it is none of these, or over already.
    """
    now_ms = time.time_ns() // 1_000_000
    try:
        at_ms = instant_of(text, now_ms=now_ms)
    except ConfigurationError:
        raise click.UsageError(
            f"{name}: expected a time from now (2h, 90d), a day (2027-06-30) or an instant (2027-06-30T18:00Z), "
            f"got {text!r}"
        ) from None
    if _DURATION.fullmatch(text):
        at_ms = 2 * now_ms - at_ms
    if at_ms <= now_ms:
        raise click.UsageError(f"{name}: {text} is over already")
    return at_ms


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(f"tz: expected a time zone such as Europe/Berlin, got {name!r}") from None


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, day_time(), zone)


def _ms(at: datetime) -> int:
    return round(at.astimezone(UTC).timestamp() * 1000)


def period_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--since`, `--until` and `--tz`; the command is given `period` and `tz`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @click.option("--since", default=default, show_default=True, metavar="WHEN", help=f"From: {_GRAMMAR}.")
        @click.option("--until", default="now", show_default=True, metavar="WHEN", help="Up to, and without.")
        @click.option(
            "--tz", default="UTC", show_default=True, metavar="ZONE", help="The time zone of days and months."
        )
        @functools.wraps(function)
        def with_period(*arguments: Any, since: str, until: str, tz: str, **others: Any) -> Any:
            now_ms = time.time_ns() // 1_000_000
            period = []
            for name, text in (("--since", since), ("--until", until)):
                try:
                    period.append(instant_of(text, now_ms=now_ms, tz=tz))
                except ConfigurationError as error:
                    raise click.UsageError(f"{name}: {error}") from None
            if period[0] >= period[1]:
                raise click.UsageError(f"--since {since} is not before --until {until}")
            return function(*arguments, period=(period[0], period[1]), tz=tz, **others)

        return with_period

    return decorate
