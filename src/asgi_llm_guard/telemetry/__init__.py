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

from asgi_llm_guard import events
from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.base import Storage, Verbs
from asgi_llm_guard.telemetry.attempts import AttemptObserver
from asgi_llm_guard.telemetry.budgets import RemainingBudgets
from asgi_llm_guard.telemetry.calls import CallObserver, OpenCalls
from asgi_llm_guard.telemetry.decisions import DecisionObserver
from asgi_llm_guard.telemetry.ids import IdHash
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.logs import JsonLines, LogCorrelation, LogRefusals
from asgi_llm_guard.telemetry.names import Conventions
from asgi_llm_guard.telemetry.state import GuardState, Observed
from asgi_llm_guard.telemetry.storing import measuring

__all__ = ["Instrumentation", "Instrumented", "JsonLines", "LogCorrelation", "LogRefusals", "instrument"]

_SCOPE: Final = "asgi_llm_guard"
_lock: Final = threading.Lock()
_instrumented: Final[WeakSet[Instrumented]] = WeakSet()


class Instrumented(Observed, Protocol):
    """What is watched: a `Guard`."""

    @property
    def policies(self) -> Sequence[Policy]: ...

    def observe(self, observer: events.Observer, /) -> Callable[[], None]:
        """Tell `observer` every event, until what is given is called."""
        ...

    def measure(self, around: Callable[[Storage], Verbs] | None, /) -> None:
        """Ask the storage through what `around` makes of it; `None`: directly."""
        ...

    def raised(self, meters: Sequence[Meter], /) -> tuple[Meter, ...]:
        """The meters under the limits that hold now."""
        ...

    def begin_reading(self, meters: Sequence[Meter], /) -> Future[tuple[Reading, ...]]:
        """Read meters in the background."""
        ...


class Instrumentation:
    """A guard that is watched. Made by `instrument`."""

    __slots__ = ("_budgets", "_guard", "_state", "_stop")

    def __init__(
        self, guard: Instrumented, stop: Callable[[], None], budgets: RemainingBudgets, state: GuardState
    ) -> None:
        self._guard = guard
        self._stop = stop
        self._budgets = budgets
        self._state = state

    def uninstrument(self) -> None:
        """No more spans and no more points come from it. May be called again."""
        with _lock:
            if self._guard in _instrumented:
                _instrumented.discard(self._guard)
                self._guard.measure(None)
        self._stop()
        self._budgets.close()
        self._state.close()


class _Everything:
    """Hands each event to those whom it concerns."""

    __slots__ = ("_attempts", "_calls", "_decisions")

    def __init__(self, attempts: AttemptObserver, calls: CallObserver, decisions: DecisionObserver) -> None:
        self._attempts = attempts
        self._calls = calls
        self._decisions = decisions

    def __call__(self, event: events.Event, /) -> None:
        if isinstance(event, events.CallEnded):
            self._calls.ended(event)
            return
        self._attempts(event)
        self._decisions(event)


def instrument(
    guard: Instrumented,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    id_secret: str | None = None,
) -> Instrumentation:
    """Make spans and metrics of what a guard does; `docs/telemetry.md` lists them.

    `OTEL_SEMCONV_STABILITY_OPT_IN` is read here, once.

    Args:
        guard: the guard, with its gateways if it has any.
        tracer_provider: where spans go; `None`: the global one.
        meter_provider: where metrics go; `None`: the global one.
        id_secret: spans of calls have the ids of caller, user, agent and session as hashes under this secret (16 to 64
            bytes); `None`: in no form.

    Raises:
        ConfigurationError: it is instrumented already, or the secret is too short.
    """
    hashed = None if id_secret is None else IdHash(id_secret)
    with _lock:
        if guard in _instrumented:
            raise ConfigurationError("instrument: the guard is instrumented already; call uninstrument() first")
        _instrumented.add(guard)
    meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
    tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
    conventions, labels, open_calls = Conventions.chosen(), Labels(), OpenCalls()
    budgets = RemainingBudgets(lambda: guard.policies, guard.raised, guard.begin_reading, guard.clock, meter)
    state = GuardState(guard, meter)
    everything = _Everything(
        AttemptObserver(tracer, meter, guard.clock, conventions, labels),
        CallObserver(tracer, meter, conventions, labels, open_calls, hashed),
        DecisionObserver(meter, guard.clock, labels, open_calls),
    )
    guard.measure(measuring(meter))
    return Instrumentation(guard, guard.observe(everything), budgets, state)
