"""The admissions of one guard that are open in this process: what is waited for, ended and counted."""

from __future__ import annotations

import asyncio
import contextlib

from asgi_llm_guard.admission import Admission
from asgi_llm_guard.decision import Denied, Refusal
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.stops import Stops

__all__ = ["OpenAdmissions"]


class OpenAdmissions:
    """From any thread."""

    __slots__ = ("_admissions", "_engine", "_waiting")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.forked()
        engine.overrides.stopping.append(self.stop)
        engine.forking.append(self.forked)

    def forked(self) -> None:
        """This is a child process now: what is open is its parent's."""
        self._admissions: set[Admission] = set()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def __len__(self) -> int:
        return len(self._admissions)

    def add(self, admission: Admission) -> None:
        """It is open until `discard`. One that is stopped already ends."""
        self._admissions.add(admission)
        if (stops := self._engine.overrides.stops) is not None:
            self._end_stopped(admission, stops)

    def discard(self, admission: Admission) -> None:
        """It has ended."""
        self._admissions.discard(admission)
        if self._waiting and not self._admissions:
            for loop, event in tuple(self._waiting):
                # A loop that was closed meanwhile has nobody waiting.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(event.set)

    async def wait(self, timeout_s: float) -> bool:
        """Wait until there is none, at most so many seconds; whether there is none."""
        if timeout_s > 0:
            waiter = (asyncio.get_running_loop(), asyncio.Event())
            self._waiting.add(waiter)
            try:
                if self._admissions:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(waiter[1].wait(), timeout_s)
            finally:
                self._waiting.discard(waiter)
        return not self._admissions

    # ---------------------------------------------------------------------------------- end

    def stop(self, stops: Stops) -> int:
        """End those that are stopped, and the calls inside others that are; gives how many admissions that are."""
        return sum([self._end_stopped(admission, stops) for admission in tuple(self._admissions)])

    def halt(self, refusal: Refusal) -> int:
        """End all of them: streams with their last event. Gives how many there are."""
        admissions = tuple(self._admissions)
        for admission in admissions:
            admission.halt(self._denied(admission, refusal))
        return len(admissions)

    def abort(self) -> int:
        """Settle all of them by what was seen, though they are still running. Gives how many there are."""
        admissions = tuple(self._admissions)
        for admission in admissions:
            admission.abort()
        return len(admissions)

    def _end_stopped(self, admission: Admission, stops: Stops) -> bool:
        if admission.halted is not None:
            return False
        now_ms = self._engine.clock.now_ms()
        stop = stops.of_context(admission.context, now_ms)
        root = admission.root
        if stop is None and root is not None and root.is_open and root.call is not None:
            stop = stops.of_call(root.call, now_ms)
        if stop is not None:
            admission.halt(self._denied(admission, stop.refusal))
            return True
        stopped = [
            (call, stop)
            for call in tuple(admission.calls)
            if call.call is not None
            and call.halted is None
            and call.is_open
            and (stop := stops.of_call(call.call, now_ms)) is not None
        ]
        if stopped:
            admission.halt_calls(self._denied(admission, stopped[0][1].refusal), [call for call, _ in stopped])
        return bool(stopped)

    def _denied(self, admission: Admission, refusal: Refusal) -> Denied:
        return self._engine.refused(admission.context, None, refusal)
