"""How long each part of a streamed answer took to come after the one before it."""

from __future__ import annotations

import time as clock
from array import array
from collections.abc import Callable
from typing import Final

__all__ = ["Gaps"]

_MOST: Final = 512


class Gaps:
    """The times between the parts of one stream.

    All of them, up to 512; of longer streams every second one, every fourth, and so on, over the whole of it, so that
    one stream takes 4 kB at most and its end little time.

    Args:
        time: seconds of a clock that does not step.
    """

    __slots__ = ("_every", "_kept", "_last", "_time", "_until")

    def __init__(self, *, time: Callable[[], float] = clock.monotonic) -> None:
        self._time = time
        self._last: float | None = None
        self._kept = array("d")
        self._every = self._until = 1

    def part(self) -> None:
        """Another part has come."""
        now, last = self._time(), self._last
        self._last = now
        if last is None:
            return
        self._until -= 1
        if self._until:
            return
        self._until = self._every
        if len(self._kept) == _MOST:  # the next one is two of these steps after the last one that is kept
            self._kept = self._kept[1::2]
            self._every *= 2
            return
        self._kept.append(now - last)

    @property
    def seconds(self) -> tuple[float, ...]:
        """Those that were kept, in their order."""
        return tuple(self._kept)
