"""Meters of response bodies: read as one piece, or event by event as they pass.

A stream's container is taken apart by a `Splitter` (server-sent events, lines, frames, …), and what its
events say is summed by the dialect's `Tally`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer
from asgi_llm_guard.wire.sse import Block

__all__ = ["MAX_BODY_BYTES", "Opaque", "Splitter", "Streamed", "Tally", "Whole", "told_early"]

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""A body longer than this is forwarded unread."""
_LARGE: Final = 16 * 1024


class Splitter(Protocol):
    """Takes a stream apart, whatever chunks it comes in, in bounded memory.

    The pieces, one after the other, are the stream.
    """

    passed_over: int
    """How many pieces were too long to be read."""

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished piece have been fed."""
        ...

    @property
    def terminator(self) -> bytes:
        """What ends a piece that broke off, so that another may follow."""
        ...

    def feed(self, chunk: bytes) -> list[Block]:
        """The pieces that `chunk` completes."""
        ...

    def finish(self) -> list[Block]:
        """What is left at the end of the stream."""
        ...


class Tally(Protocol):
    """Sums what the events of one stream say."""

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of generated text so far."""
        ...

    def event(self, block: Block) -> bool:
        """Count one piece that has data. Whether it only reports usage, and the client may do without it."""
        ...

    def answer(self, *, unread: int = 0) -> Answer:
        """The sum so far. `unread`: pieces that were too long."""
        ...


def told_early(usage: Usage) -> Usage | None:
    """What is left of a report that more text has followed: its input, since the output goes on; `None`: nothing."""
    if not usage.output_tokens:
        return usage
    if usage.input_tokens is None:
        return None
    return msgspec.structs.replace(
        usage,
        output_tokens=None,
        reasoning_tokens=None,
        output_audio_tokens=None,
        output_image_tokens=None,
        reported_nanousd=None,
    )


class Streamed:
    """The meter of a streamed response."""

    __slots__ = ("_ending", "_splitter", "_strip", "_tally", "ended")

    def __init__(self, splitter: Splitter, tally: Tally, *, strip: bool = False) -> None:
        self._splitter = splitter
        self._tally = tally
        self._strip = strip
        self._ending: bytes | None = None
        self.ended = False

    @property
    def text_bytes(self) -> int:
        return self._tally.text_bytes

    def feed(self, chunk: bytes) -> bytes:
        if self._ending is not None:
            return self._feed_to_end(chunk)
        blocks = self._splitter.feed(chunk)
        if self._strip:
            kept = b"".join([block.raw for block in blocks if not self._count(block)])
            return b"" if self.ended else kept
        for block in blocks:
            self._count(block)
        return b"" if self.ended else chunk

    def cut(self, ending: bytes) -> bytes:
        if self.ended or self._ending is not None:
            return b""
        if self._strip or not self._splitter.pending:  # pieces that are stripped go out whole
            self.ended = True
            return ending
        self._ending = ending
        return b""

    def finish(self) -> bytes:
        blocks = self._splitter.finish()
        forward = b"".join([block.raw for block in blocks if not self._count(block)])
        if self._ending is not None:
            return self._end(self._splitter.terminator)
        return forward if self._strip and not self.ended else b""

    def answer(self) -> Answer:
        return self._tally.answer(unread=self._splitter.passed_over)

    def _feed_to_end(self, chunk: bytes) -> bytes:
        """The rest of the piece that has begun, and the ending after it."""
        end = -self._splitter.pending
        ended = False
        for block in self._splitter.feed(chunk):
            self._count(block)
            if not ended:
                end += len(block.raw)
                ended = not block.partial
        return self._end(chunk[: max(end, 0)]) if ended else chunk

    def _end(self, rest: bytes) -> bytes:
        ending, self._ending = self._ending or b"", None
        self.ended = True
        return rest + ending

    def _count(self, block: Block) -> bool:
        return block.data is not None and self._tally.event(block)


class Whole:
    """The meter of a body that is read as one piece."""

    __slots__ = ("_kept", "_read", "_size", "_small", "ended")

    text_bytes: Final = 0

    def __init__(self, read: Callable[[bytes], Answer]) -> None:
        self._kept: list[bytes] | None = []
        self._small = bytearray()
        self._size = 0
        self._read = read
        self.ended = False

    def feed(self, chunk: bytes) -> bytes:
        if self._kept is not None:
            self._size += len(chunk)
            if self._size > MAX_BODY_BYTES:
                self._kept = None
            elif len(chunk) >= _LARGE and not self._small:
                self._kept.append(bytes(chunk))  # not copied
            else:  # a list of very many small ones would take several times their bytes
                self._small += chunk
                if len(self._small) >= _LARGE:
                    self._kept.append(bytes(self._small))
                    self._small = bytearray()
        return chunk

    def cut(self, ending: bytes) -> bytes:  # noqa: ARG002 - see Meter: there is no place for it in a whole body
        return b""

    def finish(self) -> bytes:
        return b""

    def answer(self) -> Answer:
        if self._kept is None:
            return Answer(kind="success", finished=True, unread=1)
        return self._read(b"".join([*self._kept, self._small]))


class Opaque:
    """The meter of a body that says nothing; what is known comes from elsewhere (the request, the headers)."""

    __slots__ = ("_answer", "ended")

    text_bytes: Final = 0

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.ended = False

    def feed(self, chunk: bytes) -> bytes:
        return chunk

    def cut(self, ending: bytes) -> bytes:  # noqa: ARG002 - see Meter
        return b""

    def finish(self) -> bytes:
        return b""

    def answer(self) -> Answer:
        return self._answer
