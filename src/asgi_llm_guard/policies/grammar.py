"""How limits are written: `"$5/1d"`, `"200000 tokens/daily"`, whole numbers, durations.

Every function here checks one setting and says, when it is wrong, what was seen and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT, format_usd, to_nano
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling, duration_ms, parse_window

__all__ = [
    "LIMIT_GRAMMAR",
    "Limit",
    "cents",
    "check_lease",
    "parse_lease",
    "parse_limit",
    "parse_limits",
    "ttl_ms",
    "whole",
]

LIMIT_GRAMMAR: Final = (
    "'$5/1d', '$100/monthly', '200000 tokens/1d', without a period for a limit over the whole life of its subject, "
    "or a mapping such as {'budget_limit': 100, 'time_period': '1d'}"
)
_MAPPING_KEYS: Final = frozenset({"budget_limit", "tokens", "time_period"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """So much of one unit in one window."""

    amount: int | None
    """nano-USD or tokens. 0 blocks everything; `None`: counted, without a limit."""
    unit: Unit
    window: Lifetime | Rolling | Calendar

    def __post_init__(self) -> None:
        if self.unit not in {Unit.NANOUSD, Unit.TOKENS}:
            raise ConfigurationError(f"unit: a limit is in nanousd or tokens, got {self.unit!r}")
        if self.amount is not None:
            whole(self.amount, name="amount")
        if not isinstance(self.window, (Lifetime, Rolling, Calendar)):
            raise ConfigurationError(f"window: expected Lifetime, Rolling or Calendar, got {self.window!r}")

    def __str__(self) -> str:
        if self.amount is None:
            return f"unlimited {self.unit}"
        return format_usd(self.amount) if self.unit is Unit.NANOUSD else f"{self.amount} tokens"


def whole(value: object, *, name: str) -> int:
    """A whole number from 0 to 2^53 - 1; text such as `"25"` is taken for the number.

    Raises:
        ConfigurationError: anything else, booleans and floats included.
    """
    number = value
    if isinstance(value, str):
        text = value.strip().replace("_", "").replace(",", "")
        # isdecimal() alone admits digits of other scripts; the length bound keeps int() cheap.
        number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 16 else None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_AMOUNT:
        raise ConfigurationError(f"{name}: expected a whole number from 0 to {MAX_AMOUNT}, got {value!r}")
    return number


def cents(value: object, *, name: str) -> int:
    """US cents (whole, fractional or text) as nano-USD.

    Raises:
        ConfigurationError: as `money.to_nano`.
    """
    if isinstance(value, (int, float, str, Decimal)) and not isinstance(value, bool):
        try:
            return to_nano(Decimal(str(value)).scaleb(-2), name=name)
        except ArithmeticError:  # not a number, or an exponent that Decimal itself refuses
            pass
    raise ConfigurationError(f"{name}: expected cents such as 1250, got {value!r}")


def ttl_ms(value: object, *, name: str = "ttl") -> int:
    """A duration (`"1h"`) or whole seconds (`3600`) in milliseconds.

    Raises:
        ConfigurationError: neither of them, or zero.
    """
    if isinstance(value, str):
        return duration_ms(value, name=name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"{name}: expected whole seconds such as 3600 or a duration such as '1h', got {value!r}"
        )
    return value * 1000


def parse_limit(value: object, *, lifetime: Lifetime, tz: str = "UTC", name: str = "limit") -> Limit:
    """One limit from text, a mapping or a `Limit`. Without a period it holds for `lifetime`.

    A mapping has `budget_limit` (dollars) or `tokens`, and `time_period`. One that has a period and
    no amount is counted without a limit.

    Raises:
        ConfigurationError: anything else; the message shows the grammar.
    """
    if isinstance(value, Limit):
        return value
    if isinstance(value, str):
        return _from_text(value, lifetime, tz, name)
    if isinstance(value, Mapping) and value and _MAPPING_KEYS.issuperset(value):
        return _from_mapping(value, lifetime, tz, name)
    raise ConfigurationError(f"{name}: expected {LIMIT_GRAMMAR}, got {value!r}")


def parse_limits(value: object, *, lifetime: Lifetime, tz: str = "UTC", name: str = "limits") -> tuple[Limit, ...]:
    """One limit or a list of them: several windows at once.

    Raises:
        ConfigurationError: as `parse_limit`; an empty list; two limits of one unit over the same window.
    """
    each_of: Sequence[object] = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    limits = tuple(parse_limit(each, lifetime=lifetime, tz=tz, name=name) for each in each_of)
    if not limits:
        raise ConfigurationError(f"{name}: expected at least one limit such as {LIMIT_GRAMMAR}, got {value!r}")
    if len({(limit.unit, limit.window.code) for limit in limits}) < len(limits):
        raise ConfigurationError(f"{name}: two limits over the same window; keep the lower one, got {value!r}")
    return limits


def _from_text(text: str, lifetime: Lifetime, tz: str, name: str) -> Limit:
    amount, slash, period = (part.strip() for part in text.partition("/"))
    window = parse_window(period, tz=tz, name=name) if slash else lifetime
    if amount.startswith("$"):
        return Limit(amount=to_nano(amount, name=name), unit=Unit.NANOUSD, window=window)
    number, _, unit = amount.partition(" ")
    if unit.strip() in {"token", "tokens"}:
        return Limit(amount=whole(number, name=name), unit=Unit.TOKENS, window=window)
    raise ConfigurationError(f"{name}: expected {LIMIT_GRAMMAR}, got {text!r}")


def _from_mapping(value: Mapping[str, object], lifetime: Lifetime, tz: str, name: str) -> Limit:
    usd, tokens, period = value.get("budget_limit"), value.get("tokens"), value.get("time_period")
    if usd is not None and tokens is not None:
        raise ConfigurationError(f"{name}: expected either budget_limit or tokens, got both in {dict(value)!r}")
    if usd is None and tokens is None and period is None:
        raise ConfigurationError(f"{name}: expected {LIMIT_GRAMMAR}, got {dict(value)!r}")
    window = lifetime if period is None else parse_window(period, tz=tz, name=f"{name}.time_period")  # type: ignore[arg-type]  # checked there
    if tokens is not None:
        return Limit(amount=whole(tokens, name=f"{name}.tokens"), unit=Unit.TOKENS, window=window)
    amount = None if usd is None else to_nano(usd, name=f"{name}.budget_limit")
    return Limit(amount=amount, unit=Unit.NANOUSD, window=window)


def parse_lease(value: object, *, name: str) -> tuple[Unit, int]:
    """A chunk that a worker may hold: `"$1"` of money; `1000`, `"1000"` or `"1000 tokens"` of tokens.

    Raises:
        ConfigurationError: anything else, and 0.
    """
    if isinstance(value, str) and value.strip().startswith("$"):
        unit, amount = Unit.NANOUSD, to_nano(value, name=name)
    else:
        number, _, word = value.strip().partition(" ") if isinstance(value, str) else (value, "", "")
        if word.strip() not in {"", "token", "tokens"}:
            raise ConfigurationError(f"{name}: expected '$1', 1000 or '1000 tokens', got {value!r}")
        unit, amount = Unit.TOKENS, whole(number, name=name)
    return unit, _some(amount, value, name)


def check_lease(lease: object, limits: Iterable[int | None], *, name: str, unit: Unit = Unit.TOKENS) -> int:
    """A chunk, as a whole number, that fits into each of these limits; those of 0 and `None` aside.

    Raises:
        ConfigurationError: not a whole number from 1, or larger than one of the limits.
    """
    amount = _some(whole(lease, name=name), lease, name)
    lowest = min((limit for limit in limits if limit), default=amount)
    if amount > lowest:
        shown = format_usd if unit is Unit.NANOUSD else str
        raise ConfigurationError(f"{name}: must not be larger than the limit of {shown(lowest)}, got {shown(amount)}")
    return amount


def _some(amount: int, value: object, name: str) -> int:
    if not amount:
        raise ConfigurationError(f"{name}: at least 1; leave it out for no lease, got {value!r}")
    return amount
