"""JSON objects, one on each line (NDJSON), read as they pass: from any chunks, in bounded memory.

Source: https://github.com/ndjson/ndjson-spec (lines end with LF; a CR before it is white space)
"""

from __future__ import annotations

from asgi_llm_guard.wire.sse import MAX_EVENT_BYTES, Block

__all__ = ["Lines"]


class Lines:
    """Splits a stream into lines. Keeps the bytes of one unfinished line, at most `longest` and one chunk."""

    __slots__ = ("_longest", "_passing", "_tail", "passed_over")

    def __init__(self, longest: int = MAX_EVENT_BYTES) -> None:
        self._longest = longest
        self._tail = bytearray()
        self._passing = False
        self.passed_over = 0
        """How many lines were too long to be read."""

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished line have been fed."""
        return len(self._tail)

    @property
    def terminator(self) -> bytes:
        """What ends a line that broke off."""
        return b"\n"

    def feed(self, chunk: bytes) -> list[Block]:
        """The lines that `chunk` completes."""
        tail = self._tail
        first, found, rest = chunk.partition(b"\n")
        if not found:
            tail += chunk
            return self._pass() if len(tail) > self._longest or self._passing else []
        blocks = [self._block(bytes(tail) + first + found if tail else first + found)]
        tail.clear()
        *lines, last = rest.split(b"\n")
        blocks += [self._block(line + b"\n") for line in lines]
        tail += last
        return blocks + self._pass() if len(tail) > self._longest else blocks

    def finish(self) -> list[Block]:
        """What is left at the end of the stream: a last line without an end, if any."""
        tail = bytes(self._tail)
        self._tail.clear()
        return [self._block(tail)] if tail else []

    def _pass(self) -> list[Block]:
        """Let go of a line that is too long, but for one byte: it goes on."""
        self.passed_over += not self._passing
        self._passing = True
        raw = bytes(self._tail[:-1])
        del self._tail[:-1]
        return [Block(raw, None, partial=True)] if raw else []

    def _block(self, raw: bytes) -> Block:
        if self._passing or len(raw) > self._longest:
            self.passed_over += not self._passing
            self._passing = False
            return Block(raw, None)
        return Block(raw, None if raw.isspace() else raw)
