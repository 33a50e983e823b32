"""When a server that keeps failing is left alone, and for how long. No I/O, and no clock of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

__all__ = ["FAILURES", "Breaker", "State"]

State: TypeAlias = Literal["closed", "open", "half-open"]

FAILURES: Final = 3
"""So many failures in a row open the breaker."""

FIRST_WAIT_S: Final = 0.05
LONGEST_WAIT_S: Final = 1.0


class Breaker:
    """Counts failures in a row, and says when the next attempt may begin.

    Transitions: closed -> open at the `failures`-th failure in a row · open -> half-open by `probe`,
    when the wait is over · half-open -> closed by a success, -> open by a failure, after which the
    wait is twice as long. A closed one asks for the same waits between attempts to connect.

    The wait after the n-th failure is `first_wait_s * 2**(n-1)`, at most `longest_wait_s`, of which a
    random part of up to one half is left out, so that many processes do not come back in step.
    """

    __slots__ = ("_clock", "_count", "_failures", "_first_wait_s", "_jitter", "_longest_wait_s", "_next_at", "state")

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        failures: int = FAILURES,
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.state: State = "closed"
        self._clock = clock
        self._failures = failures
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._jitter = jitter
        self._count = 0
        self._next_at = 0.0

    @property
    def troubled(self) -> bool:
        """Whether a success would change anything."""
        return self._count > 0

    @property
    def wait_s(self) -> float:
        """How long until the next attempt may begin; 0 is now."""
        return max(0.0, self._next_at - self._clock()) if self._count else 0.0

    def failed(self, *, at_once: bool = False) -> bool:
        """An attempt failed. True if this opened a closed breaker; `at_once` does it by itself.

        While it is open, failures are of calls begun before, and say nothing new.
        """
        if self.state == "open":
            return False
        self._count += 1
        # The exponent is bounded before the power is taken: an outage of a week is thousands of failures.
        wait_s = min(self._longest_wait_s, self._first_wait_s * 2 ** min(self._count - 1, 32))
        self._next_at = self._clock() + wait_s * (1 - self._jitter() / 2)
        opened = self.state == "closed" and (at_once or self._count >= self._failures)
        if opened or self.state == "half-open":
            self.state = "open"
        return opened

    def succeeded(self) -> bool:
        """An attempt succeeded. True if this closed the breaker.

        While it is open only a probe counts, and a probe makes it half-open first.
        """
        if self.state == "open":
            return False
        closed = self.state == "half-open"
        self.state = "closed"
        self._count = 0
        return closed

    def probe(self) -> bool:
        """Whether one attempt may be made now. True makes an open breaker half-open: its outcome decides."""
        if self.state == "half-open" or self.wait_s > 0:
            return False
        if self.state == "open":
            self.state = "half-open"
        return True
