"""One server: the connection to it, what waits for that, and whether it is to be left alone for now.

Rule 1: calls reach the server in the order in which they were put. What is sent back because a
script was not loaded is sent again in that order, before anything that was put later.

Rule 2: calls that were put before the connection is there wait for it, within their timeout.

Rule 3: nothing is sent twice that may have been executed.

Rule 4: between attempts to connect there is a timer, not a task, so that nothing is left behind by
a loop that ends without closing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Final, Protocol

from asgi_llm_guard.storage.breaker import Breaker
from asgi_llm_guard.storage.redis_address import Address, Endpoint
from asgi_llm_guard.storage.redis_answers import MAX_TRIES, see_fit, translated
from asgi_llm_guard.storage.redis_expiry import Expiry, overdue
from asgi_llm_guard.storage.redis_wire import Call, Internal, LinkError, ServerError, Wire, ask, fail, open_wire, pack

__all__ = ["Node", "Redirects"]

logger = logging.getLogger("asgi_llm_guard.storage")

_SHORT_LIFE_S: Final = 1.0

# After these the address is looked up anew: the server is not, or no longer, the one that takes writes.
_LOOK_AGAIN: Final = frozenset({"LOADING", "MASTERDOWN", "NOAUTH", "READONLY"})


def _parted(calls: Iterable[Call], slot: int) -> tuple[list[Call], list[Call]]:
    """The calls of a slot, and the others. What was sent ahead of its slot belongs where it is."""
    parts: tuple[list[Call], list[Call]] = ([], [])
    for call in calls:
        parts[call.slot != slot or call.asking].append(call)
    return parts


class Redirects(Protocol):
    """A cluster, as its nodes see it."""

    def redirected(self, node: Node, calls: Sequence[Call], error: ServerError) -> None:
        """The calls came back with MOVED or ASK; they were surely not executed."""

    def troubled(self, node: Node) -> None:
        """The node cannot be reached, or does not take writes any more."""


class Node:
    """A server that calls can be put to. See the rules at the top of this file."""

    def __init__(
        self,
        address: Address,
        find: Callable[[], Awaitable[Endpoint]],
        *,
        endpoint: Endpoint | None = None,
        scripts: Sequence[bytes],
        timeout_s: float,
        most: int,
        expiry: Expiry,
        breaker: Breaker,
        on_change: Callable[[object, str], None],
        redirects: Redirects | None = None,
    ) -> None:
        self.name = str(endpoint or address)
        self.endpoint = endpoint or address.endpoints[0]
        """Where it is; behind Sentinels, the first of them."""
        self.breaker = breaker
        self.reason = ""
        """Why it was last out of reach."""
        self._loop = asyncio.get_running_loop()
        self._address = address
        self._find = find
        self._scripts = scripts
        self._timeout_s = timeout_s
        self._most = most
        self._expiry = expiry
        self._on_change = on_change
        self._redirects = redirects
        self._wire: Wire | None = None
        self._through: Wire | None = None
        """The wire, while calls go straight to it: connected, the breaker closed, nothing held back."""
        self._kept: deque[Call] = deque()
        self._again: list[Call] | None = None
        """Calls that came back because the scripts were not loaded, while they are loaded."""
        self._leaving = False
        self._served = False
        """Whether the connection has answered a call."""
        self._task: asyncio.Task[None] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._refusing = ""
        """Why no more calls are taken, since it was told to close."""
        self._over = False

    @property
    def in_flight(self) -> int:
        """Calls without an answer yet, those that nobody waits for any more included."""
        return len(self._kept) + len(self._again or ()) + (len(self._wire.waiting) if self._wire else 0)

    @property
    def host(self) -> str:
        """Of the connection, if there is one."""
        return self._wire.endpoint.host if self._wire is not None else self.endpoint.host

    @property
    def connected(self) -> bool:
        return self._wire is not None

    def put(self, call: Call) -> None:
        """Hand a call over; it fails at once if there is no hope."""
        wire = self._through
        if wire is None:
            self._keep(call)
        elif len(wire.waiting) >= self._most:
            self._full(call)
        else:
            wire.send(call)
            if not self._expiry.armed:
                self._expiry.arm()

    def _keep(self, call: Call) -> None:
        if self._refusing:
            call.fail(f"redis: {self._refusing}", sent=False)
        elif self.breaker.state != "closed":
            call.fail(f"redis: {self.name} is left alone for now: {self.reason}", sent=False)
        elif self.in_flight >= self._most:
            self._full(call)
        else:
            self._kept.append(call)
            if not self._expiry.armed:
                self._expiry.arm()
            if self._wire is None:
                self._begin()

    def _full(self, call: Call) -> None:
        call.fail(
            f"redis: {self._most} calls to {self.name} have no answer yet, and there is no room for more; "
            "the server is too slow for them",
            sent=False,
        )

    # Connecting

    def _begin(self) -> None:
        """Make an attempt, now or when its time has come, unless one is under way."""
        if self._task is not None or self._later is not None or self._over or self.breaker.state == "half-open":
            return
        wait_s = self.breaker.wait_s
        if wait_s > 0:
            self._later = self._loop.call_later(wait_s, self._attempt)
        else:
            self._attempt()

    def _attempt(self) -> None:
        self._later = None
        if self._over:
            return
        if not self.breaker.probe():
            self._begin()  # the timer was early by less than the clock shows
        elif self._wire is None:
            self._task = self._loop.create_task(self._connect())
        else:
            self._ping(self._wire)

    async def _connect(self) -> None:
        try:
            endpoint = await self._find()
            wire = await open_wire(self._address, endpoint, self)
            await self._prepare(wire)
        except LinkError as error:
            self._task = None
            # To ask again soon would not help where the answer was a clear no.
            self._failed(str(error).removeprefix("redis: "), for_good=error.code in {"VERSION", "WRONGPASS", "NOAUTH"})
        except Exception as error:
            self._task = None
            logger.exception("redis: connecting to %s failed in a way that is not known", self.name)
            self._failed(f"connecting to {self.name} failed: {error!r}")
        else:
            self._task = None
            self._connected(wire)

    async def _prepare(self, wire: Wire) -> None:
        """See that the server is fit, and load the scripts, in one round trip."""
        commands = [("INFO", "server"), ("INFO", "replication"), *(("SCRIPT", "LOAD", text) for text in self._scripts)]
        try:
            server, replication, *loaded = await ask(wire, commands, self._address.connect_timeout_s)
            see_fit(wire.endpoint, server, replication, *loaded)
        except BaseException:
            wire.drop("it was not fit")
            raise

    def _connected(self, wire: Wire) -> None:
        if wire.lost:
            self._failed(f"the connection to {wire.endpoint} was lost at once")
            return
        self._wire = wire
        wire.suspect = True  # so its first answer will be told
        self._served = False
        if self.breaker.state != "closed" and self.breaker.succeeded():
            self._on_change(self, "")
        self._resume(wire)

    def _resume(self, wire: Wire) -> None:
        """Let calls through again, those first that were kept."""
        if not self._refusing:
            self._through = wire
        kept, self._kept = self._kept, deque()
        now = monotonic()
        for call in kept:
            if not call.future.done() or (call.wanted and call.at + call.timeout_s > now):
                self._send(wire, call)

    def put_asking(self, call: Call) -> None:
        """Hand a call over for a slot that this node is about to get."""
        call.asking = True
        if self._through is not None:
            self._ask(self._through)
        self.put(call)

    def _send(self, wire: Wire, call: Call) -> None:
        if call.asking:
            self._ask(wire)
        wire.send(call)

    def _ask(self, wire: Wire) -> None:
        wire.send(Internal(self._loop.create_future(), pack(("ASKING",)), monotonic(), self._timeout_s))

    def _failed(self, reason: str, *, for_good: bool = False) -> None:
        self.reason = reason
        if self.breaker.failed(at_once=for_good):
            self._through = None
            self._on_change(self, reason)
        if self.breaker.state != "closed":
            self._give_back(reason)
        if self._redirects is not None:
            self._redirects.troubled(self)
        if self._wire is None or self.breaker.state != "closed":
            self._begin()

    def _ping(self, wire: Wire) -> None:
        """Ask a connection that is there whether the server answers again."""
        self._fence(wire, partial(self._pinged, wire))

    def _pinged(self, wire: Wire, future: asyncio.Future[Any]) -> None:
        if wire is not self._wire or self._over:
            return
        if future.cancelled() or future.exception() is not None:
            self._cut(f"{wire.endpoint} has not answered for {self._timeout_s:g} s, nor then a PING")
            return
        wire.suspect = False
        if self.breaker.succeeded():
            self._on_change(self, "")
        if self._again is None and not self._leaving:
            self._resume(wire)

    def _fence(self, wire: Wire, done: Callable[[asyncio.Future[Any]], None]) -> None:
        """Call `done` when all that was sent so far has been answered, or will not be."""
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(done)
        wire.send(Internal(future, pack(("PING",)), monotonic(), self._timeout_s))
        if not self._expiry.armed:
            self._expiry.arm()

    def _cut(self, reason: str) -> None:
        """Drop the connection, and make another one when its time has come."""
        wire = self._wire
        if wire is not None:
            wire.drop(reason)

    # What the wire tells

    def refused(self, wire: Wire, call: Call, error: ServerError) -> None:
        code = error.code
        if call.internal or wire is not self._wire:
            fail(call.future, error)
        elif code == "NOSCRIPT" and call.tries < MAX_TRIES:
            self._load_again(wire, self._sent_back(wire, call))
        elif self._redirects is not None and code in {"MOVED", "ASK"} and call.tries < MAX_TRIES:
            if code == "ASK" and self._again is not None:
                # Calls before it are sent again from here, and it is not to overtake them.
                self._again.extend(self._sent_back(wire, call))
                return
            self._redirects.redirected(self, self._sent_back(wire, call), error)
        else:
            fail(call.future, translated(error, self.name, in_cluster=self._redirects is not None))
            if code in _LOOK_AGAIN:
                self._leave(f"{self.name} answered {error}")
            elif self._redirects is not None and code == "CLUSTERDOWN":
                self._redirects.troubled(self)

    def recovered(self, wire: Wire) -> None:
        if wire is self._wire:
            self._served = True
            if self.breaker.state == "closed":  # else the probe decides
                self.breaker.succeeded()

    def lost(self, wire: Wire, unwritten: Sequence[Call], *, pending: bool, reason: str) -> None:
        if wire is not self._wire:
            return  # it never was in use, and who set it up knows
        self._wire = self._through = None
        again, self._again = self._again or (), None
        self._leaving = False
        self._kept.extendleft(reversed([*(call for call in again if call.wanted), *unwritten]))
        if self._over:
            self._give_back("the link was closed")
            return
        # A server may close what is idle; that is no failure, unless it closes whatever is opened.
        useless = not self._served and monotonic() - wire.since < _SHORT_LIFE_S
        if pending or useless or self.breaker.state != "closed":
            self._failed(reason)
        else:
            self._begin()

    def expire(self, now: float) -> float | None:
        wire = self._wire
        late, due = overdue(wire.waiting, now, self._timeout_s) if wire is not None else ([], None)
        for call in late:
            call.fail(
                f"redis: {self.name} did not answer within {call.timeout_s:g} s; what became of the call is unknown",
                sent=True,
            )
        while self._kept and self._kept[0].at + self._kept[0].timeout_s <= now:
            self._unsent(self._kept.popleft())
        dues = [due]
        for calls in (self._kept, self._again or ()):
            unsent, due = overdue(calls, now, self._timeout_s)
            dues.append(due)
            for call in unsent:
                self._unsent(call)
        if late and wire is not None and wire is self._wire:
            wire.suspect = True
            if self.breaker.state == "closed":
                self._failed(f"{self.name} did not answer within {self._timeout_s:g} s")
        return min((at for at in dues if at is not None), default=None)

    def _unsent(self, call: Call) -> None:
        because = f": {self.reason}" if self.reason and self._wire is None else ""
        call.fail(f"redis: {self.name} could not be asked within {call.timeout_s:g} s{because}", sent=False)

    # Sent back

    def _sent_back(self, wire: Wire, call: Call) -> list[Call]:
        """What has to be sent again because `call` was not executed."""
        call.tries += 1
        return [each for each in (call, *wire.take_trailing()) if each.wanted]

    def _load_again(self, wire: Wire, calls: Sequence[Call]) -> None:
        """The scripts are gone (SCRIPT FLUSH, another master): load them, then send again what came back."""
        if self._again is not None:
            self._again.extend(calls)
            return
        self._again = list(calls)
        self._through = None
        now = monotonic()
        futures = [self._loop.create_future() for _ in self._scripts]
        for text, future in zip(self._scripts, futures, strict=True):
            wire.send(Internal(future, pack(("SCRIPT", "LOAD", text)), now, self._timeout_s))
        # All that was sent before is answered before the last of these is.
        futures[-1].add_done_callback(partial(self._loaded, wire))

    def _loaded(self, wire: Wire, future: asyncio.Future[Any]) -> None:
        if wire is not self._wire or self._again is None:
            return  # the connection was lost; what came back is kept for the next one
        again, self._again = self._again, None
        error = None if future.cancelled() else future.exception()
        for call in again:
            if error is not None:
                call.fail(f"redis: the scripts could not be loaded again: {error}", sent=False)
            elif call.wanted:
                self._send(wire, call)
        if self.breaker.state == "closed" and not self._leaving:
            self._resume(wire)

    def _leave(self, reason: str) -> None:
        """Take no more calls there, hear what was asked already, then look up the address again."""
        wire = self._wire
        if wire is None or self._leaving:
            return
        self._leaving = True
        self._through = None
        self._fence(wire, lambda _: self._left(wire, reason))

    def _left(self, wire: Wire, reason: str) -> None:
        if wire is self._wire and not self._over:
            wire.drop(reason)

    # For a cluster, whose slots go from node to node

    def slots_under_way(self) -> set[int]:
        """The slots of which calls are here, those apart that were sent here before the slot is."""
        waiting = self._wire.waiting if self._wire is not None else ()
        calls = (*waiting, *(self._again or ()), *self._kept)
        return {call.slot for call in calls if not (call.internal or call.asking)}

    def withdraw(self, slot: int) -> tuple[list[Call], list[Call]]:
        """Take back what was not sent, or came back, of a slot: first what came back, then what was not sent."""
        back, self._again = _parted(self._again, slot) if self._again is not None else ([], None)
        kept, others = _parted(self._kept, slot)
        self._kept = deque(others)
        return back, kept

    def when_answered(self, done: Callable[[], None]) -> None:
        """Call `done` when all that was sent so far is answered, or will not be."""
        if self._wire is None:
            done()
        else:
            self._fence(self._wire, lambda _: done())

    # Closing

    async def aclose(self, within_s: float) -> None:
        """Take no more calls, wait for those under way, within some seconds; then fail the rest, and close.

        Cancelled, it waits no longer, and closes all the same: nobody would call it again.
        """
        self.refuse("the link was closed")
        waiting = self._wire.waiting if self._wire is not None else ()
        futures = [call.future for call in (*waiting, *(self._again or ()), *self._kept) if not call.future.done()]
        try:
            if futures:
                await asyncio.wait(futures, timeout=within_s)
            task = self._connect_no_more()
            if task is not None:
                await asyncio.wait((task,))
            if self._wire is not None:
                await self._wire.aclose(within_s)
        finally:
            self.end()

    def end(self) -> None:
        """Close at once: fail what has no answer, and leave no connection. Idempotent."""
        self.refuse("the link was closed")
        self._connect_no_more()
        self._cut("the link was closed")
        self._give_back("the link was closed")

    def _connect_no_more(self) -> asyncio.Task[None] | None:
        """The attempt that was under way, which is about to end."""
        self._over = True
        if self._later is not None:
            self._later.cancel()
            self._later = None
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        return task

    def refuse(self, reason: str) -> None:
        """Take no more calls."""
        self._refusing = reason
        self._through = None

    def _give_back(self, reason: str) -> None:
        """Fail what was not sent."""
        kept, self._kept = self._kept, deque()
        again, self._again = self._again or (), None
        for call in (*again, *kept):
            call.fail(f"redis: {reason}", sent=False)
