"""Attempts: the physical requests of one call, as client libraries and routers repeat them after an error.

Rule 1: each attempt holds and settles its own money and tokens: each may be billed, and by another model.

Rule 2: what is counted in calls (iterations, rates and quotas of calls) belongs to the call. The first attempt
that is granted takes it, those after it find it taken. It is given back only when none was sent. What a deployment
may be asked for is each attempt's own: every request counts there.

Rule 3: a call has one slot at a time. An attempt that begins while another one has the slot shares it, and one
that begins later takes it anew. What an ended attempt holds for those that share it is settled after them.

Rule 4: attempts of one call are granted one after the other, so that no two take what is the call's.

Rule 5: an attempt is recognised inside this process and one admission only: the same request, after one that ended
in an error, and for one of those who repeat it. Everything else is a call of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

from asgi_llm_guard.claims import ATTEMPT_SCOPE, Settlement, Unit

if TYPE_CHECKING:
    from asgi_llm_guard.active_call import ActiveCall
    from asgi_llm_guard.charge import Attempt
    from asgi_llm_guard.claimed import Claimed
    from asgi_llm_guard.engine.holds import Hold

__all__ = ["MOST_ATTEMPTS", "Attempts", "Siblings", "Turns"]

MOST_ATTEMPTS: Final = 20
"""A request that failed so many times is a new call when it is made again: no loop hides among the attempts of one."""

_REMEMBERED_MS: Final = 600_000
_MOST_KEPT: Final = 1_000

_CALLS: Final = Unit.CALLS
_SLOTS: Final = Unit.SLOTS


class Attempts:
    """The attempts of one admission that ended in an error, and the ids of those that were reported."""

    __slots__ = ("_failed", "_kept", "_lock", "_reported")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed: OrderedDict[bytes, deque[tuple[int, ActiveCall]]] = OrderedDict()
        self._kept = 0
        self._reported: OrderedDict[str, str] = OrderedDict()

    def note(self, key: bytes, call: ActiveCall) -> None:
        """`call` has ended. If in an error, the next request with this `key` repeats it.

        `key`: a digest of the request's method, address and body.
        """
        siblings = call.siblings
        if not call.failed or (siblings is not None and siblings.number >= MOST_ATTEMPTS):
            return
        now_ms = call.admission.engine.clock.now_ms()
        with self._lock:
            self._failed.setdefault(key, deque()).append((now_ms, call))
            self._failed.move_to_end(key)
            self._kept += 1
            while self._kept > _MOST_KEPT:
                oldest, calls = next(iter(self._failed.items()))
                self._drop(oldest, calls)

    def find(self, key: bytes) -> ActiveCall | None:
        """The call that a request with this `key` repeats, for exactly one of those who ask; `None`: it is a new call.

        That is one whose last attempt ended in an error at most ten minutes ago.
        """
        if not self._failed:
            return None
        with self._lock:
            while (calls := self._failed.get(key)) is not None:
                noted_ms, call = self._drop(key, calls)
                if call.admission.engine.clock.now_ms() - noted_ms <= _REMEMBERED_MS:
                    return call
        return None

    def _drop(self, key: bytes, calls: deque[tuple[int, ActiveCall]]) -> tuple[int, ActiveCall]:
        self._kept -= 1
        oldest = calls.popleft()
        if not calls:
            del self._failed[key]
        return oldest

    def reported(self, attempt_id: str, call_id: str) -> str | None:
        """Note that the attempt with this id was reported to a call; the id of the call that it was reported to before.

        The attempt's id is the provider's or the client library's. The last thousand are remembered.
        """
        with self._lock:
            before = self._reported.get(attempt_id)
            if before is None:
                self._reported[attempt_id] = call_id
                while len(self._reported) > _MOST_KEPT:
                    self._reported.popitem(last=False)
            return before


class Turns:
    """Lets one at a time go on, in the order in which they came, whatever event loops they run in."""

    __slots__ = ("_last", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: concurrent.futures.Future[None] | None = None

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """A block that nobody else is in."""
        mine: concurrent.futures.Future[None] = concurrent.futures.Future()
        mine.set_running_or_notify_cancel()  # those who wait for it cannot cancel it
        with self._lock:
            before, self._last = self._last, mine
        try:
            if before is not None and not before.done():
                await asyncio.wrap_future(before)
            yield
        finally:
            if before is None:
                mine.set_result(None)
            else:  # one that was cancelled while it waited still passes the turn on in order
                before.add_done_callback(lambda _: mine.set_result(None))


class _Part:
    """What one attempt that is not settled yet has taken of what is the call's."""

    __slots__ = ("ending", "kept", "needed", "own", "shares", "slots")

    def __init__(self, shares: AbstractSet[str]) -> None:
        self.own: frozenset[str] = frozenset()
        """Meters that count calls."""
        self.slots: frozenset[str] = frozenset()
        self.shares = shares
        """What it did not take, because another one had."""
        self.ending: Settlement | None = None
        """It has ended, and this is handed over when nobody shares what it holds."""
        self.kept: Settlement | None = None
        """It was not sent: to be handed over instead, if what it holds was `needed`."""
        self.needed = False
        """One was sent that shares what it holds."""

    @property
    def charged(self) -> bool:
        """What is the call's stays taken."""
        return self.needed or self.kept is None


class Siblings:
    """What the attempts of one call have in common."""

    __slots__ = ("_charged", "_first", "_lock", "_parts", "_sent", "number", "turns")

    def __init__(self) -> None:
        self.turns = Turns()
        """In which they are granted."""
        self._lock = threading.Lock()
        self._parts: dict[Claimed, _Part] = {}
        self._charged: set[str] = set()
        self._first: str | None = None
        self._sent = False
        self.number = 0
        """How many attempts were granted; 0 while none was sent, and none is open."""

    @property
    def next(self) -> Attempt:
        """What the next attempt is."""
        return self._first, self.number + 1

    def taken(self, besides: Claimed | None = None) -> AbstractSet[str]:
        """The meters of what is the call's that an attempt finds taken; `besides` what this one has taken."""
        with self._lock:
            taken = set(self._charged)
            for call, part in self._parts.items():
                if call is not besides:
                    taken |= part.own | part.slots
            return taken

    def granted(self, call: Claimed, hold: Hold, shares: AbstractSet[str] = frozenset()) -> None:
        """`call` holds something from now on. `shares`: meters that it needs as well, which another one has taken."""
        part = _Part(shares)
        part.own, part.slots = _of_the_call(hold)
        with self._lock:
            self._parts[call] = part
            if self._first is None:
                self._first = hold.call_id
            self.number += 1

    def amended(self, call: Claimed, hold: Hold) -> None:
        """What `call` holds was changed."""
        with self._lock:
            part = self._parts[call]
            part.own, part.slots = _of_the_call(hold)

    def adopted(self, call: Claimed, by: Claimed, hold: Hold) -> None:
        """What `call` held is another one's now, which is the same attempt."""
        with self._lock:
            part = self._parts[by] = self._parts.pop(call)
            part.own, part.slots = _of_the_call(hold)

    def was_charged(self, hold: Hold) -> None:
        """The first attempt had ended, and was charged, before there was another one."""
        self._charged |= _of_the_call(hold)[0]
        self._first = hold.call_id
        self._sent = True
        self.number = 1

    def lost(self, call: Claimed, *, charged: bool) -> None:
        """What `call` held is settled already; `charged`: or given back."""
        with self._lock:
            part = self._parts.pop(call)
            if charged:
                self._charged |= part.own
                self._sent = True
            else:
                self._restart()

    def ended(self, call: Claimed, ending: Settlement, kept: Settlement | None) -> list[Settlement]:
        """What to hand over now that `call` has ended: what it holds for others that still run comes after theirs.

        `kept`: it was not sent, and this is handed over instead of `ending` if one that shares what it holds was.
        """
        with self._lock:
            part = self._parts.get(call)
            if part is None:
                return [ending]
            part.ending, part.kept = ending, kept
            if kept is None:  # it was sent, so it needed what it has shared
                for other in self._parts.values():
                    other.needed |= bool(part.shares & other.own)
            return self._over()

    def _over(self) -> list[Settlement]:
        """The endings of those that hold nothing which another one still needs."""
        shared: set[str] = set().union(*[part.shares for part in self._parts.values() if part.ending is None])
        settlements = []
        for call, part in tuple(self._parts.items()):
            if part.ending is None or part.slots & shared or (not part.charged and part.own & shared):
                continue
            del self._parts[call]
            if part.charged:
                self._charged |= part.own
                self._sent = True
            settlements.append(part.kept if part.needed and part.kept is not None else part.ending)
        self._restart()
        return settlements

    def _restart(self) -> None:
        if not self._parts and not self._sent:
            self._first, self.number = None, 0  # as if none had been


def _of_the_call(hold: Hold) -> tuple[frozenset[str], frozenset[str]]:
    """The meters that count calls, and those of slots."""
    return _keys(hold, _CALLS), _keys(hold, _SLOTS)


def _keys(hold: Hold, unit: Unit) -> frozenset[str]:
    return frozenset(
        [claim.meter.key for claim in hold.claims if claim.meter.unit is unit and claim.meter.scope != ATTEMPT_SCOPE]
    )
