"""Wire formats: what requests ask for, what answers used. Pure, and told apart by path or by shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.wire.base import Answer, Dialect, ItemMeter

__all__ = ["dialect_for", "dialect_named", "dialects", "is_readable", "item_meter", "meter_object"]


@cache
def dialects() -> tuple[Dialect, ...]:
    """Every dialect there is, in the order in which objects are tried."""
    from asgi_llm_guard.wire.registry import DIALECTS

    return DIALECTS


@cache
def _by_name() -> dict[str, Dialect]:
    return {dialect.name: dialect for dialect in dialects()}


def dialect_for(path: str, host: str = "") -> Dialect | None:
    """The dialect that requests to `path` (at `host`, where it is known) speak; `None`: no dialect has such a path."""
    return next((dialect for dialect in dialects() if dialect.recognises(path, host)), None)


def dialect_named(name: str) -> Dialect:
    """The dialect called `name`.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    dialect = _by_name().get(name)
    if dialect is not None:
        return dialect
    known = ", ".join(repr(dialect.name) for dialect in dialects())
    raise ConfigurationError(f"dialect: expected one of {known}, got {name!r}")


_READABLE: Final = re.compile(rb"json|^text/event-stream|^application/vnd\.amazon\.eventstream|^audio/", re.IGNORECASE)


def is_readable(content_type: bytes) -> bool:
    """Whether something is known of a body of this type: JSON, a stream of it, or speech, of which the request tells."""
    return b"json" in content_type or _READABLE.search(content_type) is not None


def meter_object(obj: object) -> Answer | None:
    """What a library's or framework's object, a dict or an HTTP response says; `None`: nobody knows its shape."""
    for dialect in dialects():
        if (answer := dialect.read_object(obj)) is not None:
            return answer
    from asgi_llm_guard.wire.frameworks import read_framework_object

    return read_framework_object(obj)


def item_meter() -> ItemMeter:
    """A meter for streamed items of any dialect: the first that knows the shape of an item reads the rest."""
    return _AnyItems(dialects())


class _AnyItems:
    def __init__(self, known: Iterable[Dialect]) -> None:
        from asgi_llm_guard.wire.frameworks import FrameworkItems

        self._meters: list[ItemMeter] = [*(dialect.item_meter() for dialect in known), FrameworkItems()]

    def add(self, item: object) -> None:
        for meter in self._meters:
            meter.add(item)
            if len(self._meters) > 1 and meter.answer() is not None:
                self._meters = [meter]
                return

    def answer(self) -> Answer | None:
        return next((answer for meter in self._meters if (answer := meter.answer()) is not None), None)
