"""What is left of the budgets of providers, as a gauge."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Final, Protocol, runtime_checkable

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.metrics import Meter as Instruments

from asgi_llm_guard.claims import Meter, Reading, Unit
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.telemetry import names

__all__ = ["ProviderLimits", "RemainingBudgets"]

_log = logging.getLogger("asgi_llm_guard")

_FRESH_MS: Final = 5_000
_GIVEN_UP_MS: Final = 30_000
_WAIT_S: Final = 1.0
_NANO: Final = 1_000_000_000

Read = Callable[[Sequence[Meter]], "Future[tuple[Reading, ...]]"]
"""Begins to read meters, from any thread."""


@runtime_checkable
class ProviderLimits(Protocol):
    """A policy with a budget for each of some providers."""

    @property
    def name(self) -> str: ...

    @property
    def providers(self) -> Sequence[str]:
        """Those that it was configured with."""
        ...

    def meters(self, providers: Sequence[str], /) -> Mapping[str, Meter]: ...


class RemainingBudgets:
    """An observable gauge: what is left for each provider in USD, holds of open calls taken off.

    Below 0: more was used than the budget. A provider whose budget is in tokens, or has no limit, has no point.

    The storage is read when somebody collects, and at most every 5 seconds. Whoever collects waits for it, for up to
    a second; on the thread of an event loop nobody waits, and what the collection before has begun to read is given.
    A storage that does not answer leaves no points.
    """

    def __init__(self, policies: Iterable[ProviderLimits], read: Read, clock: Clock, instruments: Instruments) -> None:
        self._clock = clock
        self._read: Read | None = read
        self._lock = threading.Lock()
        self._reading: Future[tuple[Reading, ...]] | None = None
        self._asked_ms = 0
        self._known: tuple[Reading, ...] | None = None
        self._meters = tuple(
            (meter, meter.limit, {names.PROVIDER: provider, names.POLICY: policy.name})
            for policy in policies
            for provider, meter in policy.meters(policy.providers).items()
            if meter.unit is Unit.NANOUSD and meter.limit is not None
        )
        if self._meters:
            instruments.create_observable_gauge(
                names.REMAINING,
                [self._observe],
                unit="{USD}",
                description="What is left of a provider's budget in its current window.",
            )

    def close(self) -> None:
        """Give no more points: a gauge cannot be taken back from its meter."""
        with self._lock:
            self._read = None

    def _observe(self, _options: CallbackOptions) -> list[Observation]:
        reading = self._latest()
        if reading is None:
            return []
        waits = not _in_event_loop()
        if waits:
            wait([reading], timeout=_WAIT_S)
        if reading.done():
            self._known = _result(reading)
        elif waits:
            return []
        return [
            Observation((limit - each.used - each.held) / _NANO, labels)
            for (_, limit, labels), each in zip(self._meters, self._known or (), strict=False)
        ]

    def _latest(self) -> Future[tuple[Reading, ...]] | None:
        """What is being read, or was not long ago; `None`: nothing any more."""
        with self._lock:
            if self._read is None:
                return None
            now_ms = self._clock.now_ms()
            age_ms = abs(now_ms - self._asked_ms)
            last = self._reading
            if last is None or (age_ms >= _FRESH_MS and last.done()) or age_ms >= _GIVEN_UP_MS:
                if last is not None:
                    self._known = _result(last) if last.done() else None
                self._reading = self._read([meter for meter, _, _ in self._meters])
                self._asked_ms = now_ms
            return self._reading


def _result(reading: Future[tuple[Reading, ...]]) -> tuple[Reading, ...] | None:
    if reading.cancelled():
        return None
    error = reading.exception()
    if error is not None:
        _log.debug("the budgets of providers could not be read", exc_info=error)
        return None
    return reading.result()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
