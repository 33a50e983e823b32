"""Numbers that are too large to be kept, or even to be shown. Pure.

Python refuses to write a whole number of more than 4,300 digits as text, with an error that names neither the field nor
what is allowed: https://docs.python.org/3/library/stdtypes.html#int-max-str-digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["check_sizes", "told"]

_MOST_BITS: Final = 2_000
"""Larger ones are checked here; smaller ones by whoever knows what the field may be."""
_MOST_DEPTH: Final = 16
_MOST_SHOWN: Final = 200


def told(value: object) -> str:
    """A value as messages show it, whatever it is."""
    try:
        text = repr(value)
    except ValueError:
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def check_sizes(value: object, where: str, depth: int = 0) -> None:
    """Check that a value, and everything in it, can be shown in a message.

    Raises:
        ConfigurationError: a number is far too large; names where it stands.
    """
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise ConfigurationError(
                f"{where}: numbers are whole up to 2^53 - 1, got one of {value.bit_length():,} bits"
            )
    elif depth > _MOST_DEPTH:
        return  # it is refused for that, by whoever reads it
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            check_sizes(getattr(value, name), f"{where}: {name}", depth + 1)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_sizes(name, f"{where}: the name of a field", depth + 1)
            check_sizes(item, f"{where}: {name}" if depth == 0 else f"{where}.{name}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_sizes(item, where, depth + 1)
