"""Server-sent events, read as they pass: from any chunks, in bounded memory, on bytes.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

__all__ = ["MAX_EVENT_BYTES", "Block", "Blocks"]

MAX_EVENT_BYTES: Final = 1 << 20
"""A block longer than this is passed over unread."""

# Two line ends, one after the other; of a first CR LF only the LF is matched. A CR is a whole line end only
# once the next byte is known not to be LF.
_BLOCK_END: Final = re.compile(rb"(?:\n|\r(?=\r))(?:\r\n|\n|\r(?=[^\n]))")
_BOM: Final = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """Some bytes of the stream: an event or comment with the blank line that ends it, or a part of one too long."""

    raw: bytes
    """As they came. All blocks, one after the other, are the stream."""
    data: bytes | None
    """The event's data; `None`: it has none, or was passed over."""
    error: bool = False
    """The event is named `error`."""
    partial: bool = False
    """A part of one too long, and not its last: nothing else may be put behind it."""


class Blocks:
    """Splits a stream into blocks. Chunks may end anywhere; lines end with LF, CR LF or CR.

    Keeps the bytes of one unfinished block, at most `longest` and one chunk.
    """

    __slots__ = ("_begun", "_longest", "_passing", "_tail", "passed_over")

    def __init__(self, longest: int = MAX_EVENT_BYTES) -> None:
        self._longest = longest
        self._tail = bytearray()
        self._begun = False
        self._passing = False
        self.passed_over = 0
        """How many blocks were too long to be read."""

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished block have been fed."""
        return len(self._tail)

    @property
    def terminator(self) -> bytes:
        """What ends a block that broke off."""
        return b"\n\n"

    def feed(self, chunk: bytes) -> list[Block]:
        """The blocks that `chunk` completes."""
        tail = self._tail
        if not tail and self._begun and not self._passing and len(chunk) <= self._longest:
            data = _only_event(chunk)  # as servers flush nearly every one
            if data is not None:
                return [Block(chunk, data)]
        if tail:
            searched = max(len(tail) - 3, 0)  # an end of up to four bytes may have begun in what is kept
            tail += chunk
            ends = _ends(tail, searched)
            blocks = self._cut(tail, ends)
            if ends:
                del tail[: ends[-1]]
        else:
            ends = _ends(chunk, 0)
            blocks = self._cut(chunk, ends)
            tail += chunk[ends[-1] :] if ends else chunk
        if len(tail) > (3 if self._passing else self._longest):
            self.passed_over += not self._passing
            self._passing = True
            blocks.append(Block(bytes(tail[:-3]), None, partial=True))
            del tail[:-3]
        return blocks

    def finish(self) -> list[Block]:
        """What is left at the end of the stream: a last block that no blank line ends, if any."""
        tail = bytes(self._tail)
        self._tail.clear()
        return [self._block(tail)] if tail else []

    def _cut(self, data: bytes | bytearray, ends: list[int]) -> list[Block]:
        start = 0
        blocks = []
        for end in ends:
            blocks.append(self._block(bytes(data[start:end])))
            start = end
        return blocks

    def _block(self, raw: bytes) -> Block:
        first = not self._begun
        self._begun = True
        if self._passing or len(raw) > self._longest:
            self.passed_over += not self._passing
            self._passing = False
            return Block(raw, None)
        if raw.startswith(b"data: ") and not first:  # nearly every event is one line, and nothing else
            line = raw[6:].rstrip(b"\r\n")
            if b"\n" not in line and b"\r" not in line:
                return Block(raw, line)
        lines = (raw.removeprefix(_BOM) if first else raw).splitlines()  # of bytes: at LF, CR LF and CR only
        data = [line[6:] if line[5:6] == b" " else line[5:] for line in lines if line.startswith(b"data:")]
        error = b"event: error" in lines or b"event:error" in lines
        return Block(raw, b"\n".join(data) if data else None, error)


def _only_event(chunk: bytes) -> bytes | None:
    """The data of the event that a chunk is: one line of it, perhaps after one with a name; `None`: it is not."""
    end = len(chunk) - 2
    if chunk[end:] != b"\n\n":
        end -= 2
        if chunk[end:] == b"\r\n\r\n" and chunk.startswith(b"data: ") and chunk.find(b"\r") == end:
            return chunk[6:end] if chunk.find(b"\n") == end + 1 else None
        return None
    line = chunk.find(b"\n")
    start = 0
    if line != end and chunk.startswith(b"event: ") and not chunk.startswith(b"event: error"):
        start = line + 1
        line = chunk.find(b"\n", start)
    if line != end or not chunk.startswith(b"data: ", start) or b"\r" in chunk:
        return None
    return chunk[start + 6 : end]


def _ends(data: bytes | bytearray, start: int) -> list[int]:
    """Where the blocks end that do so after `start`."""
    # Line ends are nearly always all the same, and looking for one text is much quicker than for a pattern.
    if data.find(b"\r", start) < 0:
        pair = b"\n\n"
    elif data.count(b"\r\n", start) == data.count(b"\r", start) == data.count(b"\n", start):
        pair = b"\n\r\n"
    else:
        return [match.end() for match in _BLOCK_END.finditer(data, start)]
    ends = []
    at = data.find(pair, start)
    while at >= 0:
        at += len(pair)
        ends.append(at)
        at = data.find(pair, at)
    return ends
