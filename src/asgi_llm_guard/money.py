"""Money: `Decimal` US dollars at the API, integer nano-dollars inside.

1 USD = 1,000,000,000 nano-USD. A price of $0.05 per million tokens is 50 nano-USD per
token, so a nano-dollar is the smallest unit in which every published price is whole.
"""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["MAX_AMOUNT", "NANO", "format_usd", "from_nano", "to_nano"]

NANO = 1_000_000_000

#: The largest amount or limit: exact in Python, in SQLite and in a Lua double.
MAX_AMOUNT = 2**53 - 1


def to_nano(usd: object, *, name: str = "amount") -> int:
    """US dollars as whole nano-dollars.

    Takes `Decimal`, `int`, `float` and text (`"12.50"`, `"$12.50"`). Floats are read by
    their shortest decimal form, so `0.1` is ten cents.

    Raises:
        ConfigurationError: not a number, NaN, infinite, negative, a boolean, below one
            nano-dollar but not zero, or above $9,007,199.25 (2^53 - 1 nano-dollars).
    """
    if isinstance(usd, bool) or not isinstance(usd, (int, float, str, Decimal)):
        raise ConfigurationError(f"{name}: expected dollars such as 12.5 or '$12.50', got {usd!r}")
    if isinstance(usd, float) and not math.isfinite(usd):
        raise ConfigurationError(f"{name}: expected a finite number of dollars, got {usd!r}")
    text = usd.strip().removeprefix("$").replace("_", "").replace(",", "") if isinstance(usd, str) else str(usd)
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ConfigurationError(f"{name}: expected dollars such as 12.5 or '$12.50', got {usd!r}") from None
    if not value.is_finite():
        raise ConfigurationError(f"{name}: expected a finite number of dollars, got {usd!r}")
    if value < 0:
        raise ConfigurationError(f"{name}: must not be negative, got {usd!r}")
    if value.adjusted() > 7:  # 10^8 dollars and more; also keeps the next line cheap for '1e999999'
        raise ConfigurationError(f"{name}: at most ${from_nano(MAX_AMOUNT)} per meter, got {usd!r}")
    nano = int(value * NANO)
    if value > 0 and nano < 1:
        raise ConfigurationError(
            f"{name}: below one nano-dollar ($0.000000001), got {usd!r}; use 0 to block everything"
        )
    if nano > MAX_AMOUNT:
        raise ConfigurationError(f"{name}: at most ${from_nano(MAX_AMOUNT)} per meter, got {usd!r}")
    return nano


def from_nano(nanousd: int) -> Decimal:
    """Whole nano-dollars as `Decimal` US dollars, exact."""
    return Decimal(nanousd).scaleb(-9)


def format_usd(nanousd: int) -> str:
    """`$1.25`, `$0.0004`: at least two decimals, no trailing zeros beyond them, never an exponent."""
    sign = "-" if nanousd < 0 else ""
    dollars, rest = divmod(abs(nanousd), NANO)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${dollars}.{decimals}"
