"""The store's clock, as far as a process can know it between two answers: never earlier than it is there."""

from __future__ import annotations

import time

from asgi_llm_guard.clock import Clock

__all__ = ["StoreClock"]


class StoreClock:
    """An upper bound of the store's clock. `clock`: what passes between two answers; `None`: a monotonic one."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock or _Monotonic()
        self._synced = (0, 0)

    def local_ms(self) -> int:
        """An instant of this process, for `heard`. Taken before the store is asked."""
        return self._clock.now_ms()

    def heard(self, asked_ms: int, said_ms: int) -> None:
        """The store was asked at `asked_ms` of this process, and has answered at `said_ms` of its own clock."""
        self._synced = (asked_ms, said_ms)

    def now_ms(self) -> int:
        """The store's clock, or a little later.

        It was asked at `asked_ms` and answered no earlier, so it cannot have gone further than this. 1/1024 of what
        has passed is added, in case one of the two clocks is being slewed.
        """
        asked_ms, said_ms = self._synced
        passed_ms = self._clock.now_ms() - asked_ms
        return said_ms + passed_ms + (passed_ms >> 10)


class _Monotonic:
    """Time that no administrator sets."""

    __slots__ = ()

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000
