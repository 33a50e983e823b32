"""What is worth an alert: thresholds of limits, and how fast they are used up. Values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from asgi_llm_guard.claims import Meter, Rule
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Sliding, Slots, Window, duration_ms

__all__ = ["AlertRule", "BurnRate", "Threshold", "crossed", "instance_of", "is_fixed", "period_ms"]

_MOST_PERCENT: Final = 1_000
_MOST_TIMES: Final = 100_000
_LONGEST_MS: Final = 30 * 86_400_000
_SHORTEST_MS: Final = 60_000
_WILD: Final = frozenset("*?[")
_BILLED: Final = frozenset({Rule.BUDGET, Rule.QUOTA})


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """An alert when so many percent of a limit are used, once per window, for each scope and threshold.

    Args:
        policy: its name, or a pattern (`budget*`). A pattern means budgets and quotas only; other policies are named.
        at: percent of the limit, above 0, also above 100.
        scope: what the limit is for (`department`, `user`, …), or a pattern.
        of: `used`: what was charged; `held`: that and what open calls hold, which is what a refusal goes by.
        shadow: also for policies that only watch.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    policy: str = "*"
    at: tuple[float, ...] = (50, 80, 95, 100)
    scope: str = "*"
    of: Literal["used", "held"] = "used"
    shadow: bool = False

    def __post_init__(self) -> None:
        _pattern("Threshold.policy", self.policy)
        _pattern("Threshold.scope", self.scope)
        if self.of not in ("used", "held"):
            raise ConfigurationError(f"Threshold.of: expected 'used' or 'held', got {self.of!r}")
        if not isinstance(self.at, Iterable) or isinstance(self.at, str | bytes):
            raise ConfigurationError(f"Threshold.at: expected percents such as (50, 80, 100), got {self.at!r}")
        percents = sorted({_number("Threshold.at", percent, _MOST_PERCENT) for percent in self.at})
        if not percents:
            raise ConfigurationError("Threshold.at: expected at least one percent of the limit, got none")
        object.__setattr__(self, "at", tuple(percents))

    def matches(self, meter: Meter) -> bool:
        """Whether the rule is about this meter."""
        return _about(self, meter)

    @property
    def lowest(self) -> float:
        """The first percent that is worth an alert."""
        return self.at[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnRate:
    """An alert when a limit is used up so many times as fast as would just last to the end of its window.

    $720 for 30 days just last at $1 an hour; with `window="1h"` and `times=10`, $10 within an hour are worth an alert,
    and at most once an hour.

    Args:
        policy, scope, shadow: as of `Threshold`.
        window: what is looked at, from `1m` to `30d`, shorter than the limit's own.
        times: so many times what would just last, above 0.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    policy: str = "*"
    window: str = "1h"
    times: float = 10
    scope: str = "*"
    shadow: bool = False

    def __post_init__(self) -> None:
        _pattern("BurnRate.policy", self.policy)
        _pattern("BurnRate.scope", self.scope)
        _number("BurnRate.times", self.times, _MOST_TIMES)
        if not _SHORTEST_MS <= duration_ms(self.window, name="BurnRate.window") <= _LONGEST_MS:
            raise ConfigurationError(f"BurnRate.window: expected a time from 1m to 30d, got {self.window!r}")

    @property
    def window_ms(self) -> int:
        """What is looked at, in milliseconds."""
        return duration_ms(self.window, name="BurnRate.window")

    def matches(self, meter: Meter) -> bool:
        """Whether the rule is about this meter: only where what was used does not drain by itself."""
        return _about(self, meter) and is_fixed(meter.window) and self.window_ms < period_ms(meter.window, 0)

    def worth(self, meter: Meter, at_ms: int) -> int:
        """So much spent within `window_ms` is worth an alert."""
        return math.ceil(self.times * (meter.limit or 0) * self.window_ms / period_ms(meter.window, at_ms))


AlertRule = Threshold | BurnRate


def level_of(percent: float, limit: int) -> int:
    """What has to be used of a limit to cross so many percent of it."""
    return math.ceil(percent * limit / 100)


def crossed(level: int, percent: float, limit: int) -> bool:
    """Whether `level` is `percent` of the limit, or more."""
    return level * 100 >= percent * limit


def is_fixed(window: Window) -> bool:
    """Whether its instances begin and end, and what was used in one only grows, but for resets."""
    if isinstance(window, Lifetime):
        return not window.renew
    return not isinstance(window, Sliding | Bucket | Slots | Distinct)


def instance_of(window: Window, resets_at_ms: int | None) -> str:
    """Names the instance of a fixed window that ends then; empty for windows that have none."""
    return str(resets_at_ms) if is_fixed(window) and resets_at_ms is not None else ""


def period_ms(window: Window, at_ms: int) -> int:
    """How long a window is, at that instant; 0 for those that have no length."""
    if isinstance(window, Calendar):
        begin_ms, end_ms = window.bounds(at_ms)
        return end_ms - begin_ms
    if isinstance(window, Slots | Distinct):
        return 0
    return window.ttl_ms if isinstance(window, Lifetime) else window.period_ms


def _about(rule: AlertRule, meter: Meter) -> bool:
    if not meter.limit or isinstance(meter.window, Slots | Distinct) or not (meter.enforce or rule.shadow):
        return False
    if not fnmatchcase(meter.policy, rule.policy) or not fnmatchcase(meter.scope, rule.scope):
        return False
    # What refills by the second would be worth an alert by the second.
    return meter.rule in _BILLED or not _WILD & set(rule.policy)


def _pattern(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name}: expected a name or a pattern such as 'budget*', got {value!r}")


def _number(name: str, value: object, most: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ConfigurationError(f"{name}: expected a number above 0, at most {most}, got {value!r}")
    return value
