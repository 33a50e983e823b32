"""Spans and metrics of OpenTelemetry. Only its API is needed; where they go, the application's SDK decides.

    instrumentation = instrument(guard)
    ...
    instrumentation.uninstrument()

No prompt, answer, key, caller, user or session is in any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final, Protocol
from weakref import WeakSet

from opentelemetry import metrics, trace

from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Observer
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.telemetry.attempts import AttemptObserver
from asgi_llm_guard.telemetry.budgets import ProviderLimits, RemainingBudgets
from asgi_llm_guard.telemetry.names import Conventions

__all__ = ["Instrumentation", "Instrumented", "instrument"]

_SCOPE: Final = "asgi_llm_guard"
_lock: Final = threading.Lock()
_instrumented: Final[WeakSet[Instrumented]] = WeakSet()


class Instrumented(Protocol):
    """What is watched: a `Guard`."""

    @property
    def clock(self) -> Clock: ...

    @property
    def policies(self) -> Sequence[Policy]: ...

    def observe(self, observer: Observer, /) -> Callable[[], None]:
        """Tell `observer` every event, until what is given is called."""
        ...

    def begin_reading(self, meters: Sequence[Meter], /) -> Future[tuple[Reading, ...]]:
        """Read meters in the background."""
        ...


class Instrumentation:
    """A guard that is watched. Made by `instrument`."""

    __slots__ = ("_budgets", "_guard", "_stop")

    def __init__(self, guard: Instrumented, stop: Callable[[], None], budgets: RemainingBudgets) -> None:
        self._guard = guard
        self._stop = stop
        self._budgets = budgets

    def uninstrument(self) -> None:
        """No more spans and no more points come from it. May be called again."""
        self._stop()
        self._budgets.close()
        with _lock:
            _instrumented.discard(self._guard)


def instrument(
    guard: Instrumented,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> Instrumentation:
    """Make spans and metrics of what a guard does; `docs/telemetry.md` lists them.

    `OTEL_SEMCONV_STABILITY_OPT_IN` is read here, once.

    Args:
        guard: the guard, with its gateways if it has any.
        tracer_provider: where spans go; `None`: the global one.
        meter_provider: where metrics go; `None`: the global one.

    Raises:
        ConfigurationError: it is instrumented already.
    """
    with _lock:
        if guard in _instrumented:
            raise ConfigurationError("instrument: the guard is instrumented already; call uninstrument() first")
        _instrumented.add(guard)
    instruments = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
    tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
    limits = [policy for policy in guard.policies if isinstance(policy, ProviderLimits)]
    budgets = RemainingBudgets(limits, guard.begin_reading, guard.clock, instruments)
    stop = guard.observe(AttemptObserver(tracer, instruments, guard.clock, Conventions.chosen()))
    return Instrumentation(guard, stop, budgets)
