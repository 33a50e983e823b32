"""The state of this process and its storage, as gauges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, date, datetime
from typing import Final, Protocol

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.telemetry.readings import Latest

__all__ = ["GuardState", "Observed"]

_DAY_S: Final = 86_400

_OF_HEALTH: Final = (
    ("unsettled", "llm_guard.settlements.waiting", "{settlement}", "Settlements that wait for the storage."),
    ("degraded", "llm_guard.calls.degraded", "{call}", "Open calls that were admitted without the storage."),
    ("waiting", "llm_guard.calls.waiting", "{call}", "Calls that wait for the holds of others."),
    ("processes", "llm_guard.processes", "{process}", "Processes that share the storage, when it last said so."),
    (
        "behind",
        "llm_guard.ledger.behind",
        "{record}",
        "Records that were not in the ledger when it was last looked at.",
    ),
)


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

    def __init__(self, guard: Observed, meter: Meter) -> None:
        self._guard: Observed | None = guard
        self._holds = Latest(guard.begin_counting, guard.clock)
        self._meter = meter
        for key, name, unit, what in _OF_HEALTH:
            self._gauge(name, unit, what, self._number(key))
        self._gauge("llm_guard.requests.open", "{request}", "Open requests and jobs of this process.", _open)
        self._gauge("llm_guard.storage.available", "", "Whether the storage decides: 1, or 0.", _available)
        self._gauge("llm_guard.ready", "", "Whether this process takes new calls and can decide: 1, or 0.", _ready)
        self._gauge(
            "llm_guard.storage.clock_skew", "s", "How far the storage's clock is ahead of this process's.", _skew
        )
        self._gauge("llm_guard.prices.age", "s", "Since the day that the list prices are from.", _price_age)
        self._gauge(
            "llm_guard.control.version", "{version}", "The version of the administration data in force.", _version
        )
        self._gauge(
            "llm_guard.control.following", "", "Whether administration data can be followed: 1, or 0.", _following
        )
        self._gauge("llm_guard.holds.open", "{hold}", "Open holds of all processes.", self._open_holds)

    def close(self) -> None:
        """Give no more points."""
        self._guard = None
        self._holds.close()

    def _gauge(self, name: str, unit: str, what: str, read: Callable[[Observed], float | None]) -> None:
        def observe(_options: CallbackOptions) -> list[Observation]:
            guard = self._guard
            value = None if guard is None else read(guard)
            return [] if value is None else [Observation(value)]

        self._meter.create_observable_gauge(name, [observe], unit=unit, description=what)

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
