"""Values of any shape, read with care: dicts, a library's objects, and bytes that may not be JSON.

Nothing here raises: what has not the expected shape is `None`, which is never the same as zero.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

__all__ = [
    "LONGEST_NAME",
    "MOST_CHOICES",
    "MOST_TOKENS",
    "count_of",
    "decode",
    "first_count",
    "items",
    "name_of",
    "path_parts",
    "pick",
    "pick_path",
    "text_length",
    "within",
]

MOST_TOKENS: Final = 2**31 - 1
"""No request may ask for more, and a report of more is not believed."""
MOST_CHOICES: Final = 65_536  # times MOST_TOKENS still an exact amount in every storage
LONGEST_NAME: Final = 256

_log = logging.getLogger(__name__)


def decode(data: bytes) -> object:
    """The JSON value in `data`; `None` when it is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        pass
    try:  # servers written in Python send NaN as a log probability, and halves of surrogate pairs
        return json.loads(data.decode("utf-8", "replace"))
    except (RecursionError, ValueError):
        return None


def pick(value: object, member: str) -> object:
    """The member of a dict, or the attribute of another object; `None` when there is none."""
    if type(value) is dict:
        return value.get(member)
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        return None
    if isinstance(value, Mapping):
        return value.get(member)
    try:
        return getattr(value, member, None)
    except Exception:  # noqa: BLE001 - a property of somebody else's class may raise anything (httpx: ResponseNotRead)
        _log.debug("%s.%s could not be read for metering", type(value).__name__, member, exc_info=True)
        return None


def pick_path(value: object, *members: str) -> object:
    """The member of the member of … a value; `None` where one of them is missing."""
    for member in members:
        value = pick(value, member)
    return value


def items(value: object) -> Iterable[object]:
    """The items of a list; nothing for anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def name_of(value: object) -> str | None:
    """A name as it may stand in records and labels; `None` for anything else, such as an empty one."""
    if isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable():
        return value
    return None


def text_length(text: object) -> int:
    """UTF-8 bytes of a text; 0 for anything else."""
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def count_of(value: object) -> int | None:
    """A number of tokens; `None` for what is not believable as one."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def first_count(*values: object) -> int | None:
    """The first of the values that is a number of tokens."""
    return next((number for value in values if (number := count_of(value)) is not None), None)


def within(part: int | None, whole: int | None) -> int | None:
    """A part, if it is not larger than what it is a part of."""
    return part if part is not None and whole is not None and part <= whole else None


def path_parts(path: str) -> list[str]:
    """The segments of a path, empty ones left out."""
    return [part for part in path.split("/") if part]
