"""Tables for people: they fit the terminal, and nothing in a cell can move the cursor or change a colour."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

__all__ = ["Column", "count", "instant", "safe", "table", "usd", "width_of"]

_GAP: Final = "  "
_NARROWEST: Final = 6
"""No column is cut below this many characters."""


class Column(msgspec.Struct, frozen=True):
    """A heading, and how its cells stand."""

    name: str
    align: Literal["left", "right"] = "left"
    keep: bool = False
    """Never cut; numbers are not either."""


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], *, width: int | None = None) -> str:
    """Rows under their headings, in at most `width` columns (default: the terminal's; unlimited in a pipe).

    The widest texts are cut first, with an ellipsis. `None` is shown as `-`.
    """
    cells = [[column.name for column in columns]]
    cells += [[_cell(value) for value in row] for row in rows]
    widths = [max(width_of(line[place]) for line in cells) for place in range(len(columns))]
    most = terminal_width() if width is None else width
    if most is not None:
        _narrow(columns, widths, most - len(_GAP) * (len(columns) - 1))
    lines = []
    for line in cells:
        parts = [
            _padded(_cut(text, room), room, column) for text, room, column in zip(line, widths, columns, strict=True)
        ]
        lines.append(_GAP.join(parts).rstrip())
    lines.insert(1, _GAP.join("─" * room for room in widths))
    return "\n".join(lines)


def terminal_width() -> int | None:
    """How wide a line may be: $COLUMNS, or the terminal; `None`: as wide as it gets."""
    if os.environ.get("COLUMNS", "").isdecimal() or (sys.stdout is not None and sys.stdout.isatty()):
        return max(40, shutil.get_terminal_size().columns)
    return None


def safe(text: str) -> str:
    """`text` with what cannot be printed written as escapes: ids come from callers."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def usd(nanousd: int | None) -> str:
    """Money, with as many digits as tell something."""
    if nanousd is None:
        return "-"
    sign, amount = ("-", -nanousd) if nanousd < 0 else ("", nanousd)
    if amount >= 10_000_000 or not amount:
        return f"{sign}${amount / 1e9:,.2f}"
    if amount < 1_000:
        return f"{sign}<$0.000001"
    return f"{sign}${amount / 1e9:.6f}".rstrip("0")


def count(number: int | None) -> str:
    """A whole number, in groups of three."""
    return "-" if number is None else f"{number:,}"


def instant(at_ms: int | None) -> str:
    """A date and time (UTC) to the second."""
    return "-" if at_ms is None else f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def width_of(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(each) else 2 if _is_wide(each) else 1 for each in text)


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return count(value) if isinstance(value, int) else safe(str(value))


def _narrow(columns: Sequence[Column], widths: list[int], room: int) -> None:
    while sum(widths) > room:
        places = [
            place
            for place, column in enumerate(columns)
            if not column.keep and column.align == "left" and widths[place] > _NARROWEST
        ]
        if not places:
            return
        widest = max(places, key=lambda place: widths[place])
        widths[widest] -= 1


def _cut(text: str, room: int) -> str:
    if width_of(text) <= room:
        return text
    kept = ""
    for each in text:
        if width_of(kept + each) > room - 1:
            break
        kept += each
    return f"{kept}…"


def _padded(text: str, room: int, column: Column) -> str:
    space = " " * (room - width_of(text))
    return space + text if column.align == "right" else text + space
