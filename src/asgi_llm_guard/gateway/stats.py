"""What this process knows of each deployment: calls in flight, the last minute, how soon answers begin.

One process' view, for choosing well; what a deployment may be asked for is counted by `limits.py`, exactly.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from asgi_llm_guard.clock import Clock, SystemClock

__all__ = ["Run", "Stats"]

_MINUTE_MS: Final = 60_000
_PART_MS: Final = 5_000
_NEW: Final = 0.3
"""How much the newest answer has to say in the moving average."""


class _Minute:
    """A sum over the last 60 seconds, in parts of 5."""

    __slots__ = ("_parts", "_sum")

    def __init__(self) -> None:
        self._parts: deque[list[int]] = deque()
        self._sum = 0

    def add(self, amount: int, now_ms: int) -> None:
        part = now_ms // _PART_MS
        # A clock that steps back adds to the newest part: nothing is forgotten too early.
        if not self._parts or self._parts[-1][0] < part:
            self._parts.append([part, 0])
        self._parts[-1][1] += amount
        self._sum += amount

    def take_back(self, amount: int, at_ms: int) -> None:
        """What was added at `at_ms` was not so; nothing, if that is forgotten already."""
        for part in self._parts:
            if part[0] == at_ms // _PART_MS:
                part[1] -= amount
                self._sum -= amount
                return

    def total(self, now_ms: int) -> int:
        oldest = (now_ms - _MINUTE_MS) // _PART_MS
        while self._parts and self._parts[0][0] < oldest:
            self._sum -= self._parts.popleft()[1]
        return self._sum


class _Known:
    """Of one deployment."""

    __slots__ = ("first_ms", "held", "in_flight", "measured_ms", "requests", "tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.held = 0
        """The tokens that calls in flight may use."""
        self.requests = _Minute()
        self.tokens = _Minute()
        self.first_ms: float | None = None
        self.measured_ms = 0


class Stats:
    """What is known of the deployments of one gateway. From any thread; one that was never called is all zeros."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}

    def begin(self, name: str, tokens: int = 0) -> Run:
        """A call is meant for `name` and may use so many tokens.

        To be told before anything is awaited: of many calls that are made at once, each must see the others' choices.
        """
        return Run(self, name, tokens)

    def in_flight(self, name: str) -> int:
        """Calls that have begun and not ended."""
        known = self._known.get(name)
        return 0 if known is None else known.in_flight

    def requests(self, name: str) -> int:
        """Calls that began in the last 60 seconds, up to 5 seconds more."""
        known = self._known.get(name)
        if known is None:
            return 0
        with self._lock:
            return known.requests.total(self._clock.now_ms())

    def tokens(self, name: str) -> int:
        """Tokens of calls that ended in the last 60 seconds, up to 5 seconds more, and all that those in flight may use."""
        known = self._known.get(name)
        if known is None:
            return 0
        with self._lock:
            return known.held + known.tokens.total(self._clock.now_ms())

    def first_ms(self, name: str) -> float | None:
        """How long answers take to begin, as a moving average; `None`: none began in the last 60 seconds."""
        known = self._known.get(name)
        if known is None or known.first_ms is None or known.measured_ms < self._clock.now_ms() - _MINUTE_MS:
            return None
        return known.first_ms

    def forget(self, name: str) -> None:
        """The deployment is gone. Calls of it that are in flight end as if they had never begun."""
        self._known.pop(name, None)

    def _take(self, name: str, tokens: int, now_ms: int) -> _Known:
        with self._lock:
            known = self._known.get(name)
            if known is None:
                known = self._known[name] = _Known()
            known.in_flight += 1
            known.held += tokens
            known.requests.add(1, now_ms)
            return known


class Run:
    """One attempt at one deployment."""

    __slots__ = ("_begun_ms", "_known", "_stats", "_tokens")

    def __init__(self, stats: Stats, name: str, tokens: int) -> None:
        self._stats = stats
        self._take(name, tokens)

    def _take(self, name: str, tokens: int) -> None:
        self._begun_ms = self._stats._clock.now_ms()  # noqa: SLF001 - its own
        self._known: _Known | None = self._stats._take(name, tokens, self._begun_ms)  # noqa: SLF001 - its own
        self._tokens = tokens

    def move(self, name: str, tokens: int = 0) -> None:
        """It goes to another one after all, from now on."""
        self.drop()
        self._take(name, tokens)

    def drop(self) -> None:
        """It was not sent."""
        known = self._ended(0)
        if known is not None:
            with self._stats._lock:  # noqa: SLF001 - its own
                known.requests.take_back(1, self._begun_ms)

    def first_byte(self, took_ms: float) -> None:
        """The answer has begun, so long after it was asked for. Told of good answers only: an error that comes at once
        is not fast."""
        known, now_ms = self._known, self._stats._clock.now_ms()  # noqa: SLF001 - its own
        if known is not None:
            earlier = known.first_ms if known.measured_ms >= now_ms - _MINUTE_MS else None
            known.first_ms = took_ms if earlier is None else earlier * (1 - _NEW) + took_ms * _NEW
            known.measured_ms = now_ms

    def end(self, tokens: int = 0) -> None:
        """It is over, and has used so many tokens. Only the first time counts."""
        self._ended(tokens)

    def _ended(self, tokens: int) -> _Known | None:
        now_ms = self._stats._clock.now_ms()  # noqa: SLF001 - its own
        with self._stats._lock:  # noqa: SLF001 - its own
            known, self._known = self._known, None
            if known is not None:
                known.in_flight -= 1
                known.held -= self._tokens
                known.tokens.add(tokens, now_ms)
            return known
