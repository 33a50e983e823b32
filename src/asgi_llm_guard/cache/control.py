"""`Cache-Control` of a request: the caller may ask for less of the cache than it would give, never for more.

Source: RFC 9111 §5.2.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

__all__ = ["ANYTHING", "CacheControl", "read_control"]


class CacheControl(msgspec.Struct, frozen=True, kw_only=True):
    """What a request allows the cache to do."""

    store: bool = True
    """The answer may be kept."""
    give: bool = True
    """An answer that was kept will do."""
    max_age_s: int | None = None
    """One that is older will not do; `None`: any."""


ANYTHING = CacheControl()


def read_control(values: Iterable[str]) -> CacheControl:
    """The strictest of all headers of that name. What would widen anything, and what is unknown, is passed over."""
    store = give = True
    max_age_s: int | None = None
    for directive in (part for value in values for part in value.split(",")):
        name, _, argument = directive.strip().lower().partition("=")
        if name == "no-store":
            store = give = False
        elif name == "no-cache":
            give = False
        elif name == "max-age":
            argument = argument.strip('" ')
            # One that cannot be read is taken for the strictest.
            age_s = int(argument) if argument.isascii() and argument.isdigit() and len(argument) < 12 else 0
            max_age_s = age_s if max_age_s is None else min(age_s, max_age_s)
    if store and give and max_age_s is None:
        return ANYTHING
    return CacheControl(store=store, give=give and max_age_s != 0, max_age_s=max_age_s)
