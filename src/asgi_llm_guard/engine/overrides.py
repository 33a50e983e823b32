"""What operators lay over the policies for a while: limits that are higher, and who may call no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from asgi_llm_guard.claims import Meter
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.overlay import Raise, Raises
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.stops import Stop, Stops

__all__ = ["Overrides"]


class Overrides:
    """The raises and stops that are in force. Each has two origins that hold together: code, and administration data."""

    def __init__(self, clock: Clock) -> None:
        self.raises: Raises | None = None
        """Limits that are higher for a while; `None`: none is."""
        self.stops: Stops | None = None
        """What may call no more; `None`: nothing is stopped."""
        self.stopping: list[Callable[[Stops], object]] = []
        """Who ends what is running when something is stopped."""
        self._clock = clock
        self._raises: list[Sequence[Raise]] = [(), ()]
        self._stops: list[Sequence[Stop]] = [(), ()]
        self.forked()

    def forked(self) -> None:
        """This is a new process: who held the lock is not in it."""
        self._lock = threading.Lock()

    def set_raises(
        self, raises: Sequence[Raise], policies: Sequence[Policy] = (), *, administered: bool = False
    ) -> None:
        """From now on these limits are higher, each until it ends, and no others but those of the other origin. From any
        thread.

        Raises:
            ConfigurationError: one of them cannot be, for one of the `policies`; nothing was changed.
        """
        laid = Raises(raises)
        for each in laid.raises:
            each.check(policies)
        with self._lock:
            self._raises[administered] = laid.raises
            self.raises = Raises((*self._raises[False], *self._raises[True])) or None

    def set_stops(self, stops: Sequence[Stop], *, administered: bool = False) -> None:
        """From now on these may call no more, each until it ends, and no others but those of the other origin. What is
        running ends. From any thread.

        Raises:
            ConfigurationError: one of them is no `Stop`; nothing was changed.
        """
        stopped = Stops(stops)
        with self._lock:
            self._stops[administered] = stopped.stops
            stopped = Stops((*self._stops[False], *self._stops[True]))
            self.stops = stopped or None
        for tell in self.stopping:
            tell(stopped)

    def stopped(self, context: Context, call: Call | None) -> Refusal | None:
        """The refusal of a request or call that is stopped now; `None`: it may be made."""
        stops = self.stops
        stop = None if stops is None else stops.find(context, call, self._clock.now_ms())
        return None if stop is None else stop.refusal

    def raised(self, meters: Sequence[Meter]) -> tuple[Meter, ...]:
        """The meters under the limits that hold now."""
        raises = self.raises
        return tuple(meters) if raises is None else raises.meters(meters, self._clock.now_ms())
