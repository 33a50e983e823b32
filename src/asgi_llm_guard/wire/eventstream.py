"""AWS event streams, read as they pass: from any chunks, in bounded memory, checksums verified.

A frame is: its length, the length of its headers, the CRC-32 of these eight bytes, headers, payload, and the
CRC-32 of all before it; numbers are big-endian, lengths count the whole frame. A header is: the length of its
name, the name, a type, and a value, whose length stands before it if the type is text or bytes.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/RESTSelectObjectAppendix.html and botocore 1.44
(2026-11), whose reader is the oracle of the tests.
"""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Final

from asgi_llm_guard.wire.sse import MAX_EVENT_BYTES, Block

__all__ = ["CONTENT_TYPE", "Frames", "exception_type"]

CONTENT_TYPE: Final = b"application/vnd.amazon.eventstream"

_PRELUDE: Final = struct.Struct(">III")
_LEAST: Final = 16
"""The shortest frame: prelude and checksum."""
_IS_EVENT: Final = b"\x0d:message-type\x07\x00\x05event"
_ERRORS: Final = frozenset({"exception", "error"})
_TEXT: Final = 7
_SIZES: Final = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
"""Of values by their type; bytes (6) and text (7) say their own."""


class Frames:
    """Splits a stream into frames. Chunks may end anywhere.

    A frame whose checksum is wrong, or that is longer than `longest`, is passed over. Where the checksum of the
    two lengths is wrong nobody can say where the next frame begins: all that follows is passed over, as one.
    Keeps the bytes of one unfinished frame, at most `longest` and one chunk.
    """

    __slots__ = ("_left", "_length", "_longest", "_tail", "passed_over")

    def __init__(self, longest: int = MAX_EVENT_BYTES) -> None:
        self._longest = longest
        self._tail = bytearray()
        self._length = 0
        self._left = 0
        self.passed_over = 0
        """How many frames were too long to be read, or damaged."""

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished frame have been fed."""
        return len(self._tail)

    @property
    def terminator(self) -> bytes:
        """Nothing: a frame says beforehand how long it is, and can be ended in no other way."""
        return b""

    def feed(self, chunk: bytes) -> list[Block]:
        """The frames that `chunk` completes. A block's data is the payload; its error: it is no event."""
        data: bytes | bytearray = chunk
        if self._tail:
            self._tail += chunk
            data = self._tail
        blocks: list[Block] = []
        start, size = 0, len(data)
        while True:
            if self._left:
                start = self._pass(data, start, blocks)
                if self._left:
                    break
            elif self._length:
                end = start + self._length
                if end > size:
                    break
                blocks.append(self._frame(bytes(data[start:end])))
                start, self._length = end, 0
            elif size - start < _PRELUDE.size:
                break
            else:
                self._measure(data, start)
        if data is chunk:
            self._tail += chunk[start:]
        else:
            del self._tail[:start]
        return blocks

    def finish(self) -> list[Block]:
        """What is left at the end of the stream: a frame that broke off, which says nothing."""
        tail = bytes(self._tail)
        self._tail.clear()
        return [Block(tail, None)] if tail else []

    def _measure(self, data: bytes | bytearray, start: int) -> None:
        """See how long the frame is that starts there, and whether it is read or passed over."""
        length, headers, checksum = _PRELUDE.unpack_from(data, start)
        if zlib.crc32(data[start : start + 8]) != checksum or not _LEAST <= length - headers <= length:
            length = sys.maxsize
        elif length <= self._longest:
            self._length = length
            return
        self.passed_over += 1
        self._left = length

    def _pass(self, data: bytes | bytearray, start: int, blocks: list[Block]) -> int:
        """Give more of a frame that is passed over; one byte of it is kept back until its last has come, so that
        it is seen to be pending. Where the frame, or what there is of it, ends."""
        there = len(data) - start
        last = there >= self._left
        part = self._left if last else max(there - 1, 0)
        if part:
            self._left -= part
            blocks.append(Block(bytes(data[start : start + part]), None, partial=not last))
        return start + part

    def _frame(self, raw: bytes) -> Block:
        if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:]):
            self.passed_over += 1
            return Block(raw, None)
        payload = _PRELUDE.size + int.from_bytes(raw[4:8])
        is_event = raw.find(_IS_EVENT, _PRELUDE.size, payload) >= 0
        return Block(raw, raw[payload:-4], not is_event and _headers(raw).get(b":message-type") in _ERRORS)


def exception_type(raw: bytes) -> str | None:
    """What kind of error a whole frame tells of: an exception's type, or an error's code; `None`: it tells of none."""
    headers = _headers(raw)
    return headers.get(b":exception-type") or headers.get(b":error-code")


def _headers(raw: bytes) -> dict[bytes, str]:
    """The headers of a frame that are text; what cannot be read ends them."""
    block = raw[_PRELUDE.size : _PRELUDE.size + int.from_bytes(raw[4:8])]
    found: dict[bytes, str] = {}
    at = 0
    while at < len(block):
        end = at + 1 + block[at]
        name, kind = block[at + 1 : end], block[end : end + 1]
        at = end + 1
        size = _SIZES.get(kind[0]) if kind else None
        if size is None:
            if not kind or kind[0] not in (6, _TEXT):
                break
            size, at = int.from_bytes(block[at : at + 2]), at + 2
            if kind[0] == _TEXT:
                found[name] = block[at : at + size].decode("utf-8", "replace")
        at += size
    return found
