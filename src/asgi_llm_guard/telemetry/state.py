"""The state of this process and its storage, as gauges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, date, datetime
from typing import Final, Protocol

from opentelemetry.metrics import Observation

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.telemetry.instruments import Instruments, Merge
from asgi_llm_guard.telemetry.readings import Latest

__all__ = ["GuardState", "Observed"]

_DAY_S: Final = 86_400

_OF_HEALTH: Final = (
    ("unsettled", "llm_guard.settlements.waiting", "{settlement}", sum, "Settlements that wait for the storage."),
    ("degraded", "llm_guard.calls.degraded", "{call}", sum, "Open calls that were admitted without the storage."),
    ("waiting", "llm_guard.calls.waiting", "{call}", sum, "Calls that wait for the holds of others."),
    (
        "processes", "llm_guard.processes", "{process}", max,
        "Processes that share the storage, when it last said so.",
    ),
    (
        "behind", "llm_guard.ledger.behind", "{record}", max,
        "Records that were not in the ledger when it was last looked at.",
    ),
)  # fmt: skip


class _Prices(Protocol):
    @property
    def date(self) -> str: ...


class Observed(Protocol):
    """What is looked at: a `Guard`."""

    @property
    def clock(self) -> Clock: ...

    @property
    def prices(self) -> _Prices: ...

    @property
    def open_admissions(self) -> int: ...

    @property
    def skew_ms(self) -> int: ...

    def health(self) -> Mapping[str, object]: ...

    def begin_counting(self) -> Future[int]:
        """Count the open holds of all processes, in the background."""
        ...


class GuardState:
    """Observable gauges. All but the open holds are known to the process itself, and ask nobody."""

    def __init__(self, guard: Observed, instruments: Instruments) -> None:
        self._guard = guard
        self._holds = Latest(guard.begin_counting, guard.clock)
        self._instruments = instruments
        self._gauges: list[Callable[[], None]] = []
        for key, name, unit, merge, what in _OF_HEALTH:
            self._gauge(name, unit, merge, what, self._number(key))
        for name, unit, merge, what, read in _OF_GUARDS:
            self._gauge(name, unit, merge, what, read)
        self._gauge("llm_guard.holds.open", "{hold}", max, "Open holds of all processes.", self._open_holds)

    def close(self) -> None:
        """Give no more points."""
        for remove in self._gauges:
            remove()
        self._holds.close()

    def _gauge(self, name: str, unit: str, merge: Merge, what: str, read: Callable[[Observed], float | None]) -> None:
        def points() -> list[Observation]:
            value = read(self._guard)
            return [] if value is None else [Observation(value)]

        self._gauges.append(self._instruments.gauge(name, points, merge=merge, unit=unit, description=what))

    def _number(self, key: str) -> Callable[[Observed], float | None]:
        def read(guard: Observed) -> float | None:
            value = guard.health()[key]
            return value if isinstance(value, int) else None

        return read

    def _open_holds(self, _guard: Observed) -> float | None:
        return self._holds.answer()


def _open(guard: Observed) -> float:
    return guard.open_admissions


def _available(guard: Observed) -> float:
    return int(guard.health()["storage"] == "ok")


def _ready(guard: Observed) -> float:
    return int(bool(guard.health()["ready"]))


def _version(guard: Observed) -> float | None:
    known = guard.health()["control"]
    version = known["version"] if isinstance(known, dict) else None
    return version if isinstance(version, int) else None


def _following(guard: Observed) -> float | None:
    known = guard.health()["control"]
    return int(known["state"] == "ok") if isinstance(known, dict) else None


def _skew(guard: Observed) -> float:
    return guard.skew_ms / 1000


def _price_age(guard: Observed) -> float:
    shipped = date.fromisoformat(guard.prices.date)
    today = datetime.fromtimestamp(guard.clock.now_ms() / 1000, UTC).date()
    return max(0, (today - shipped).days) * _DAY_S


_OF_GUARDS: Final = (
    ("llm_guard.requests.open", "{request}", sum, "Open requests and jobs of this process.", _open),
    ("llm_guard.storage.available", "", min, "Whether the storage decides: 1, or 0.", _available),
    ("llm_guard.ready", "", min, "Whether this process takes new calls and can decide: 1, or 0.", _ready),
    (
        "llm_guard.storage.clock_skew", "s", max,
        "How far the storage's clock is ahead of this process's.", _skew,
    ),
    ("llm_guard.prices.age", "s", max, "Since the day that the list prices are from.", _price_age),
    (
        "llm_guard.control.version", "{version}", min,
        "The version of the administration data in force.", _version,
    ),
    (
        "llm_guard.control.following", "", min,
        "Whether administration data can be followed: 1, or 0.", _following,
    ),
)  # fmt: skip
