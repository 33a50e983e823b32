"""Frames of AWS event streams.

A frame is its length, the length of its headers, a CRC of these two, headers, payload, and a CRC of all that.
Source: the specification of `application/vnd.amazon.eventstream` (Smithy, event stream framing).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Final

__all__ = ["EVENT_STREAM_TYPE", "frame"]

EVENT_STREAM_TYPE: Final = "application/vnd.amazon.eventstream"
_STRING: Final = 7
"""The type of a header's value."""


def frame(payload: bytes, headers: Mapping[str, str]) -> bytes:
    """One message."""
    encoded = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", _STRING, len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", len(encoded) + len(payload) + 16, len(encoded))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + encoded + payload
    return message + struct.pack("!I", zlib.crc32(message))
