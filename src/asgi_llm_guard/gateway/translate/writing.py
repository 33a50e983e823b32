"""JSON and server-sent events, written so that nothing that was read fails to be."""

from __future__ import annotations

import json

import msgspec

__all__ = ["data_event", "dump", "typed_event"]


def dump(value: object) -> bytes:
    """A value as JSON. Halves of surrogate pairs, which servers split over two events, stay as they came."""
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError):
        return json.dumps(value, separators=(",", ":")).encode()


def data_event(value: object) -> bytes:
    """An event without a name, as OpenAI sends them."""
    return b"data: " + dump(value) + b"\n\n"


def typed_event(value: dict[str, object]) -> bytes:
    """An event with the name that its data has as its type, as Anthropic sends them."""
    return b"event: " + str(value["type"]).encode() + b"\ndata: " + dump(value) + b"\n\n"
