"""A guard tells nobody anything until there is an SDK that takes it; one may be installed after `instrument`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from opentelemetry import trace

from asgi_llm_guard import events
from asgi_llm_guard.storage.base import Storage, Verbs
from asgi_llm_guard.telemetry.instruments import Instruments

__all__ = ["Attachment", "Handlers", "Measured", "Tracing"]

Handlers = Mapping[type[events.Event], Callable[[Any], None]]
"""What takes the events of a kind."""

_ENDS: Final = (events.CallEnded, events.AttemptEnded)


class Measured(Protocol):
    """What is watched: a `Guard`."""

    def observe(self, observer: events.Observer, /) -> Callable[[], None]:
        """Tell `observer` every event, until what is given is called."""
        ...

    def measure(self, around: Callable[[Storage], Verbs] | None, /) -> None:
        """Ask the storage through what `around` makes of it; `None`: directly."""
        ...


class Tracing:
    """Whether spans are taken: from now on, perhaps later, or never."""

    __slots__ = ("_provider", "ever", "tracer")

    def __init__(self, scope: str, provider: trace.TracerProvider | None) -> None:
        self._provider = provider
        self.tracer: Final = trace.get_tracer(scope, tracer_provider=provider)
        self.ever: Final = not isinstance(self.tracer, trace.NoOpTracer)

    @property
    def live(self) -> bool:
        provider = trace.get_tracer_provider() if self._provider is None else self._provider
        return self.ever and not isinstance(provider, trace.ProxyTracerProvider)


class Attachment:
    """Has a guard tell its events, and measures its storage, as soon as there is somebody who takes it.

    As long as spans may be taken later, and nothing else is, events are only looked at to see whether they are.
    """

    def __init__(
        self,
        guard: Measured,
        around: Callable[[Storage], Verbs],
        handlers: Sequence[Handlers],
        instruments: Instruments,
        tracing: Tracing,
    ) -> None:
        self._guard = guard
        self._around = around
        self._tracing = tracing
        self._lock = threading.Lock()
        self._closed = self._awake = False
        self._handlers: dict[type[events.Event], tuple[Callable[[Any], None], ...]] = {}
        for each in handlers:
            for kind, handler in each.items():
                self._handlers[kind] = (*self._handlers.get(kind, ()), handler)
        self._stop = guard.observe(self._asleep) if tracing.ever and not instruments.live else _nothing
        self._forget = instruments.when_live(self._measure)
        if tracing.live:
            self._wake()

    def close(self) -> None:
        """Have the guard tell nothing more."""
        with self._lock:
            self._closed = True
        self._forget()
        self._guard.measure(None)
        self._stop()

    def _measure(self) -> None:
        if not self._closed:
            self._guard.measure(self._around)
            self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._closed or self._awake:
                return
            self._awake = True
            self._stop()
            self._stop = self._guard.observe(self._tell)

    def _tell(self, event: events.Event, /) -> None:
        for handler in self._handlers.get(type(event), ()):
            handler(event)

    def _asleep(self, event: events.Event, /) -> None:
        # To ask for the provider looks into the environment, so it is done once a call.
        if trace.get_current_span().is_recording() or (isinstance(event, _ENDS) and self._tracing.live):
            self._wake()
            self._tell(event)


def _nothing() -> None:
    """Nothing is to be stopped."""
