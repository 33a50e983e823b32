"""How figures, instants and ids are written on pages. Pure.

Unknown is written as unknown, never as nothing or zero. Ids are other people's text: what cannot be seen in them is
written so that it can, and long ones are cut with their whole beside them.
"""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final
from zoneinfo import ZoneInfo

from asgi_llm_guard.money import format_usd, from_nano

__all__ = [
    "UNKNOWN",
    "calls",
    "compact",
    "count",
    "cut",
    "dollars",
    "exact_usd",
    "instant",
    "length",
    "money",
    "percent",
    "plain",
    "quantity",
]

UNKNOWN: Final = "unknown"

_CENT: Final = 10_000_000
_STEPS: Final = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def money(nanousd: int | None) -> str:
    """`$1,234.50`; below a cent two digits that count: `$0.0042`; `unknown` where no price is known."""
    if nanousd is None:
        return UNKNOWN
    sign, size = ("-" if nanousd < 0 else ""), abs(nanousd)
    if size == 0 or size >= _CENT:
        return f"{sign}${from_nano(size).quantize(Decimal('0.01'), ROUND_HALF_EVEN):,}"
    value = from_nano(size)
    return f"{sign}${value.quantize(Decimal(1).scaleb(value.adjusted() - 1), ROUND_HALF_EVEN).normalize():f}"


def exact_usd(nanousd: int | None) -> str:
    """To the nano-dollar."""
    return UNKNOWN if nanousd is None else format_usd(nanousd)


def dollars(nanousd: int) -> str:
    """`10.8885`: exact, for programs and fields of forms."""
    return format_usd(nanousd).replace("$", "")


def count(number: int | None) -> str:
    """`1,234,567`."""
    return UNKNOWN if number is None else f"{number:,}"


def calls(number: int, which: str = "") -> str:
    """`1 call`, `2 open calls`."""
    return " ".join(part for part in (f"{number:,}", which, "call" if number == 1 else "calls") if part)


def compact(number: int | None) -> str:
    """`1.2 M`: three digits at most, for tiles."""
    if number is None:
        return UNKNOWN
    for step, letter in _STEPS:
        if abs(number) >= step:
            scaled = Decimal(number) / step
            digits = 0 if abs(scaled) >= 100 else 1
            return f"{round(scaled, digits):,}\N{NO-BREAK SPACE}{letter}"
    return str(number)


def quantity(amount: int | None, unit: str) -> str:
    """An amount of a meter's unit: money, or a number with its unit."""
    if amount is None:
        return UNKNOWN
    return money(amount) if unit == "nanousd" else f"{amount:,}\N{NO-BREAK SPACE}{unit}"


def percent(part: int, whole: int | None) -> str:
    """`42 %`, and `< 1 %` for what is not nothing; empty where there is nothing to take it of."""
    if not whole:
        return ""
    if 0 < part * 100 < whole:
        return "<\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%"
    return f"{min(999, part * 100 // whole)}\N{NO-BREAK SPACE}%"


def instant(at_ms: int | None, tz: str, *, seconds: bool = False) -> str:
    """`2026-11-21 19:05` on the wall clock of `tz`."""
    if at_ms is None:
        return ""
    local = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(ZoneInfo(tz))
    return local.strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def length(ms: int) -> str:
    """`3 h 12 min`: two units at most."""
    seconds = max(0, ms) // 1000
    parts = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        number, seconds = divmod(seconds, size)
        if number:
            parts.append(f"{number}\N{NO-BREAK SPACE}{unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0\N{NO-BREAK SPACE}s"


def plain(text: str) -> str:
    """`text` with every character made visible that would not be, or that would turn the text around it."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def cut(text: str, most: int = 48) -> str:
    """As `plain`, and its middle left out if it is longer than `most` characters."""
    whole = plain(text)
    if len(whole) <= most:
        return whole
    head = most * 2 // 3
    return f"{whole[:head]}\N{HORIZONTAL ELLIPSIS}{whole[-(most - head - 1) :]}"


def _escaped(character: str) -> str:
    name = unicodedata.name(character, "")
    return f"\\u{{{ord(character):x}}}" if name or not character.isspace() else f"\\x{ord(character):02x}"
