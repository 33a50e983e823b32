"""Limits with what is left of them, and where they will be when their window ends. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.claims import Meter, Reading, Unit
from asgi_llm_guard.denials.receipts import capacity
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

__all__ = ["Budget", "budget_of", "forecast", "window_told"]

_MIN_SHARE: Final = 50


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """One limit. Amounts are in `unit`; money in nano-dollars."""

    key: str
    policy: str
    scope: str
    subject: str
    unit: str
    window: str
    limit: int
    used: int
    held: int
    remaining: int
    """0 where more than the limit was used."""
    resets_at_ms: int | None = None
    forecast: int | None = None
    """What will be used when the window ends, if it goes on as it did; `None`: too early to tell, or there is no end."""
    enforce: bool = True

    @property
    def share(self) -> float:
        """How much of it is used and held: 1 is all."""
        return (self.used + self.held) / self.limit if self.limit else 1.0


def budget_of(meter: Meter, reading: Reading, now_ms: int) -> Budget | None:
    """The limit of a meter in money or tokens; `None`: it has none, or counts something else."""
    if meter.limit is None or meter.unit not in (Unit.NANOUSD, Unit.TOKENS):
        return None
    limit = capacity(meter)
    return Budget(
        key=meter.key,
        policy=meter.policy,
        scope=meter.scope,
        subject=meter.subject,
        unit=meter.unit.value,
        window=window_told(meter.window),
        limit=limit,
        used=reading.used,
        held=reading.held,
        remaining=max(0, limit - reading.used - reading.held),
        resets_at_ms=_resets(meter.window, reading, now_ms),
        forecast=forecast(meter.window, reading, now_ms),
        enforce=meter.enforce,
    )


def _resets(window: Window, reading: Reading, now_ms: int) -> int | None:
    """A day ends whether something was used of it or not."""
    return window.bounds(now_ms)[1] if isinstance(window, Calendar) else reading.resets_at_ms


def forecast(window: Window, reading: Reading, now_ms: int) -> int | None:
    """What will be used at the window's end: what was used until now, stretched over the whole window.

    What is held counts as used. `None`: the window has no end, or less than a fiftieth of it is over.
    """
    if isinstance(window, Calendar):
        start, end = window.bounds(now_ms)
    elif isinstance(window, Rolling) and reading.resets_at_ms is not None:
        start, end = reading.resets_at_ms - window.period_ms, reading.resets_at_ms
    else:
        return None
    elapsed, whole = now_ms - start, end - start
    if elapsed * _MIN_SHARE < whole or elapsed > whole:
        return None
    return (reading.used + reading.held) * whole // elapsed


def window_told(window: Window) -> str:
    """The window in words: `a day (Europe/Berlin)`, `7 d from the first use`."""
    match window:
        case Calendar():
            return f"a {window.unit} ({window.tz})" if window.unit != "hour" else f"an hour ({window.tz})"
        case Rolling():
            return f"{_length(window.period_ms)} from the first use"
        case Sliding():
            return f"any {_length(window.period_ms)}"
        case Lifetime():
            return f"until {_length(window.ttl_ms)} {'idle' if window.renew else 'after the first use'}"
        case Bucket():
            return f"drains in {_length(window.period_ms)}"
        case Slots():
            return "at the same time"
        case Distinct():
            return f"each for {_length(window.ttl_ms)}"


def _length(ms: int) -> str:
    for size, unit in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")):
        if ms % size == 0:
            return f"{ms // size}\N{NO-BREAK SPACE}{unit}"
    return f"{ms}\N{NO-BREAK SPACE}ms"
