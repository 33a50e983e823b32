"""How long the storage takes, by verb: measured around it, as the engine sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.metrics import Histogram, Meter

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Plan, Refused, Settled, Settlement
from asgi_llm_guard.storage.base import Pending, Storage
from asgi_llm_guard.telemetry import names

__all__ = ["MeasuredStorage", "measuring"]

_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


def measuring(meter: Meter) -> Callable[[Storage], MeasuredStorage]:
    """What puts a `MeasuredStorage` around a storage."""
    histogram = meter.create_histogram(
        "llm_guard.storage.duration",
        unit="s",
        description="How long the storage took, by verb.",
        explicit_bucket_boundaries_advisory=_SECONDS,
    )

    def around(storage: Storage) -> MeasuredStorage:
        return MeasuredStorage(storage, histogram)

    return around


class MeasuredStorage:
    """The verbs of a storage, measured.

    A settlement is measured from its handing over until it is settled, which no request waits for.
    """

    __slots__ = ("_histogram", "_storage")

    def __init__(self, storage: Storage, histogram: Histogram) -> None:
        self._storage = storage
        self._histogram = histogram

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        began = time.perf_counter()
        try:
            answer = await self._storage.reserve(owner, plans)
        except Exception as error:
            self._failed(began, "reserve", error)
            raise
        self._histogram.record(time.perf_counter() - began, _RESERVE)
        return answer

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        began = time.perf_counter()
        try:
            answer = await self._storage.amend(owner, bundle)
        except Exception as error:
            self._failed(began, "amend", error)
            raise
        self._histogram.record(time.perf_counter() - began, _AMEND)
        return answer

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        began = time.perf_counter()
        try:
            pending = self._storage.settle(settlements)
        except Exception as error:
            self._failed(began, "settle", error)
            raise

        def done(pending: Pending[tuple[Settled, ...]]) -> None:
            try:
                pending.result()
            except Exception as error:  # noqa: BLE001 - whoever waits for it sees it; here it is only counted
                self._failed(began, "settle", error)
            else:
                self._histogram.record(time.perf_counter() - began, _SETTLE)

        pending.add_done_callback(done)
        return pending

    async def heartbeat(self, owner: str) -> Heartbeat:
        began = time.perf_counter()
        try:
            answer = await self._storage.heartbeat(owner)
        except Exception as error:
            self._failed(began, "heartbeat", error)
            raise
        self._histogram.record(time.perf_counter() - began, _HEARTBEAT)
        return answer

    def _failed(self, began: float, verb: str, error: Exception) -> None:
        labels = {names.VERB: verb, names.ERROR_TYPE: type(error).__name__}
        self._histogram.record(time.perf_counter() - began, labels)


_RESERVE: Final = {names.VERB: "reserve"}
_AMEND: Final = {names.VERB: "amend"}
_SETTLE: Final = {names.VERB: "settle"}
_HEARTBEAT: Final = {names.VERB: "heartbeat"}
