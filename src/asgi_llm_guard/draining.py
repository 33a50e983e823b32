"""Going down in good order: what is new is refused, what is open has its time, and the rest is ended and settled."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.admission import Admission
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard_arguments import check_seconds
from asgi_llm_guard.open_admissions import OpenAdmissions
from asgi_llm_guard.opening import DRAINING
from asgi_llm_guard.signals import Signals

__all__ = ["Draining"]

_LONGEST_S: Final = 86_400
_LAST_EVENTS_S: Final = 2.0
"""How long what was ended is given to say so."""


class Draining:
    """Whether one guard takes new requests, and which of them are open."""

    def __init__(self, engine: Engine) -> None:
        self.begun = False
        """New requests are refused, because the service is going down."""
        self.open = OpenAdmissions(engine)
        self._engine = engine
        self._signals: Signals | None = None

    def track(self, admission: Admission) -> None:
        """Count `admission` as open. One that was still being granted as the service went down ends."""
        self.open.add(admission)
        if self.begun and admission.halted is None:
            # Not `Engine.refused`: most of them were not refused anything.
            admission.halt(self._engine.telling.refuse(DRAINING, self._engine.clock.now_ms()))

    async def drain(self, timeout_s: float) -> int:
        """Refuse what is new, wait for what is open, end and settle the rest; gives how many admissions that were."""
        self.begun = True
        left = 0
        if not await self.open.wait(timeout_s) and timeout_s > 0:
            left = self.open.halt(DRAINING)
            await self.open.wait(_LAST_EVENTS_S)
        left = max(left, self.open.abort())
        await self._engine.heart.retire()
        await self._engine.chores.flush()
        return left

    def started(self) -> None:
        """The application is served now: signals are handled if they are to be."""
        if self._signals is not None:
            self._signals.install()

    def handle_signals(self, timeout_s: float) -> None:
        """Drain at SIGTERM and SIGINT.

        Raises:
            ConfigurationError: not on the main thread, or the time is no number of seconds from 0.
        """
        check_seconds("install_signal_handlers", timeout_s, _LONGEST_S)
        signals = Signals(lambda: self.drain(timeout_s))
        if not signals.install():
            raise ConfigurationError("install_signal_handlers: signals can be handled from the main thread only")
        self._signals = signals
