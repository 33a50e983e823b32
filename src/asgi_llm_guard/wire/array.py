"""One JSON array, read element by element as it passes: from any chunks, in bounded memory.

Only what gives an array its structure is looked at (strings, brackets and braces); elements are objects or
arrays, and are decoded by whoever reads them. A body that is one object instead is one element.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from asgi_llm_guard.wire.meters import Streamed, Tally
from asgi_llm_guard.wire.sse import MAX_EVENT_BYTES, Block

__all__ = ["ArrayMeter", "Elements"]

# The next bracket or brace outside of strings; or a string that goes on beyond the chunk, and after it the first half
# of an escape, if there is one; or the end of the chunk.
_TOKEN: Final = re.compile(
    rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+(?:[{}\[\]]|"(?:[^"\\]++|\\.)*+(\\?)\Z|\Z)', re.DOTALL
)
_REST: Final = re.compile(rb'(?:[^"\\]++|\\.)*+(?:"|(\\?)\Z)', re.DOTALL)
_ANY: Final = msgspec.json.Decoder(msgspec.Raw)
_OPEN, _CLOSE = b"[{", b"]}"
_LIST: Final = ord("[")


class Elements:
    """Splits an array into elements, and what is between them. Keeps one unfinished element, at most `longest`
    bytes and one chunk."""

    __slots__ = (
        "_depth",
        "_escaped",
        "_in_array",
        "_in_string",
        "_last",
        "_longest",
        "_passing",
        "_tail",
        "passed_over",
    )

    def __init__(self, longest: int = MAX_EVENT_BYTES) -> None:
        self._longest = longest
        self._tail = bytearray()
        self._passing = False
        self._depth = 0  # inside the element; 0: between elements
        self._in_array = False
        self._in_string = self._escaped = False
        self._last = b""  # the last byte outside of elements that is not white space; `}`: an element
        self.passed_over = 0
        """How many elements were too long to be read."""

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished element have been fed."""
        return len(self._tail)

    @property
    def terminator(self) -> bytes:
        """Nothing ends an element that broke off."""
        return b""

    def place(self, ending: bytes) -> bytes:
        """`,element]` as it must stand where the array is now, between two elements; nothing once it has ended."""
        if not self._last:
            return b"[" + ending[1:]
        if not self._in_array:
            return b""
        return ending[1:] if self._last in b"[," else ending

    def feed(self, chunk: bytes) -> list[Block]:
        """The elements that `chunk` completes, and what it has between elements."""
        blocks: list[Block] = []
        if self._in_array and self._depth == 0 and not self._in_string and self._is_one(chunk, blocks):
            return blocks
        start = at = 0
        if self._in_string and chunk:
            rest = _REST.match(chunk, int(self._escaped))
            assert rest is not None  # noqa: S101 - it matches at every place
            self._in_string = rest[1] is not None
            self._escaped = bool(rest[1])
            at = rest.end()
        size, depth = len(chunk), self._depth
        while at < size:
            token = _TOKEN.match(chunk, at)
            assert token is not None  # noqa: S101 - it matches at every place
            at = token.end()
            if token[1] is not None:
                self._in_string, self._escaped = True, bool(token[1])
                break
            byte = chunk[at - 1]
            if byte in _OPEN:
                if depth == 0:
                    if byte == _LIST and not self._last and not chunk[start : at - 1].strip():
                        self._in_array = True
                        self._last = b"["
                        continue
                    self._between(chunk[start : at - 1], blocks)
                    start = at - 1
                depth += 1
            elif byte not in _CLOSE:
                break  # the end of the chunk
            elif depth == 0:  # of the array itself, unless it is no JSON
                self._in_array = False
                self._last = b"]"
            else:
                depth -= 1
                if depth == 0:
                    blocks.append(self._element(chunk[start:at]))
                    start = at
        self._depth = depth
        if self._depth == 0:
            self._between(chunk[start:], blocks)
        else:
            self._tail += chunk[start:] if start else chunk
            if self._passing or len(self._tail) > self._longest:
                self._pass(blocks)
        return blocks

    def finish(self) -> list[Block]:
        """What is left at the end of the stream: an element that broke off, if any."""
        tail = bytes(self._tail)
        self._tail.clear()
        if not tail:
            return []
        return [Block(tail, None if self._passing else tail)]

    def _is_one(self, chunk: bytes, blocks: list[Block]) -> bool:
        """Whether the chunk is one element with what is around it, as servers flush them; then it has been read."""
        element = chunk.strip(b", \t\r\n")
        if element[:1] != b"{" or len(element) > self._longest:
            return False
        try:
            _ANY.decode(element)
        except (msgspec.DecodeError, RecursionError):
            return False
        start = chunk.index(b"{")
        self._between(chunk[:start], blocks)
        blocks.append(self._element(element))
        self._between(chunk[start + len(element) :], blocks)
        return True

    def _element(self, end: bytes) -> Block:
        raw = bytes(self._tail) + end if self._tail else end
        self._tail.clear()
        self._last = b"}"
        if self._passing or len(raw) > self._longest:
            self.passed_over += not self._passing
            self._passing = False
            return Block(raw, None)
        return Block(raw, raw)

    def _between(self, raw: bytes, blocks: list[Block]) -> None:
        if not raw:
            return
        blocks.append(Block(raw, None))
        if text := raw.rstrip():
            self._last = text[-1:]

    def _pass(self, blocks: list[Block]) -> None:
        """Let go of an element that is too long, but for one byte: it goes on."""
        self.passed_over += not self._passing
        self._passing = True
        if raw := bytes(self._tail[:-1]):
            blocks.append(Block(raw, None, partial=True))
            del self._tail[:-1]


class ArrayMeter(Streamed):
    """The meter of a streamed array. What it is cut with is `,element]`, whatever has passed by then."""

    __slots__ = ("_elements",)

    def __init__(self, tally: Tally) -> None:
        self._elements = Elements()
        super().__init__(self._elements, tally)

    def cut(self, ending: bytes) -> bytes:
        at_once = super().cut(ending)
        return self._elements.place(at_once) if at_once else b""
