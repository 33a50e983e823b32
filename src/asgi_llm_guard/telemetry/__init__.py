"""Spans and metrics of OpenTelemetry. Only its API is needed; where they go, the application's SDK decides.

    instrumentation = instrument(guard)
    ...
    instrumentation.uninstrument()

No prompt, answer, key, caller, user or session is in any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, Protocol
from weakref import WeakSet

from opentelemetry import metrics, trace

from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.telemetry.attempts import AttemptObserver
from asgi_llm_guard.telemetry.budgets import RemainingBudgets
from asgi_llm_guard.telemetry.calls import CallObserver, OpenCalls
from asgi_llm_guard.telemetry.decisions import DecisionObserver
from asgi_llm_guard.telemetry.ids import IdHash
from asgi_llm_guard.telemetry.instruments import Instruments, instruments_of
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.logs import JsonLines, LogCorrelation, LogRefusals
from asgi_llm_guard.telemetry.names import Conventions
from asgi_llm_guard.telemetry.state import GuardState, Observed
from asgi_llm_guard.telemetry.storing import measuring
from asgi_llm_guard.telemetry.waking import Attachment, Measured, Tracing

__all__ = ["Instrumentation", "Instrumented", "JsonLines", "LogCorrelation", "LogRefusals", "instrument"]

_SCOPE: Final = "asgi_llm_guard"
_lock: Final = threading.Lock()
_instrumented: Final[WeakSet[Instrumented]] = WeakSet()


class Instrumented(Observed, Measured, Protocol):
    """What is watched: a `Guard`."""

    @property
    def policies(self) -> Sequence[Policy]: ...

    def raised(self, meters: Sequence[Meter], /) -> tuple[Meter, ...]:
        """The meters under the limits that hold now."""
        ...

    def begin_reading(self, meters: Sequence[Meter], /) -> Future[tuple[Reading, ...]]:
        """Read meters in the background."""
        ...


class Instrumentation:
    """A guard that is watched. Made by `instrument`."""

    __slots__ = ("_attachment", "_budgets", "_closed", "_guard", "_state")

    def __init__(
        self, guard: Instrumented, attachment: Attachment, budgets: RemainingBudgets, state: GuardState
    ) -> None:
        self._guard = guard
        self._attachment = attachment
        self._budgets = budgets
        self._state = state
        self._closed = False

    def uninstrument(self) -> None:
        """No more spans and no more points come from it. May be called again."""
        with _lock:
            if self._closed:
                return
            self._closed = True
            _instrumented.discard(self._guard)
        self._attachment.close()
        self._budgets.close()
        self._state.close()


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
        made = _instrumentation(guard, tracer_provider, instruments_of(meter_provider), hashed)
        _instrumented.add(guard)
    return made


def _instrumentation(
    guard: Instrumented,
    tracer_provider: trace.TracerProvider | None,
    instruments: Instruments,
    hashed: IdHash | None,
) -> Instrumentation:
    tracing = Tracing(_SCOPE, tracer_provider)
    conventions, labels, open_calls = Conventions.chosen(), Labels(), OpenCalls()
    handlers = (
        AttemptObserver(tracing.tracer, instruments.meter, guard.clock, conventions, labels).handlers,
        CallObserver(tracing.tracer, instruments, conventions, labels, open_calls, hashed).handlers,
        DecisionObserver(instruments, guard.clock, labels, open_calls).handlers,
    )
    budgets = RemainingBudgets(lambda: guard.policies, guard.raised, guard.begin_reading, guard.clock, instruments)
    state = GuardState(guard, instruments)
    attachment = Attachment(guard, measuring(instruments.meter), handlers, instruments, tracing)
    return Instrumentation(guard, attachment, budgets, state)
