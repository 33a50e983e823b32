"""Wire formats: what requests ask for, what answers used. Pure, and told apart by path or by shape."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.wire.base import Answer, Dialect
from asgi_llm_guard.wire.openai_chat import OpenAIChat

__all__ = ["DIALECTS", "dialect_for", "dialect_named", "meter_object"]

DIALECTS: Final[tuple[Dialect, ...]] = (OpenAIChat(),)
"""Every dialect there is, in the order in which objects are tried."""


def dialect_for(path: str) -> Dialect | None:
    """The dialect that requests to `path` speak; `None`: no dialect has such a path."""
    return next((dialect for dialect in DIALECTS if dialect.recognises(path)), None)


def dialect_named(name: str) -> Dialect:
    """The dialect called `name`.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    known = ", ".join(repr(dialect.name) for dialect in DIALECTS)
    raise ConfigurationError(f"dialect: expected one of {known}, got {name!r}")


def meter_object(obj: object) -> Answer | None:
    """What a library's response object, a dict or an HTTP response says; `None`: no dialect knows its shape."""
    return next((answer for dialect in DIALECTS if (answer := dialect.read_object(obj)) is not None), None)
