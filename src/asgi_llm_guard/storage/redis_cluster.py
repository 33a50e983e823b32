"""The nodes of a cluster, and which of them has which slot.

Rule 1: the calls of one slot are executed in the order in which they were put, wherever the slot goes.
When a slot is found to have moved, its calls take a detour: those that came back, then those that were
put meanwhile, go to the new node when the old one has answered everything it was asked.

Rule 2: a call that came back with MOVED or ASK was not executed, and is sent where the answer says.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from time import monotonic
from typing import Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from asgi_llm_guard.storage.breaker import Breaker
from asgi_llm_guard.storage.redis_address import Address, Endpoint
from asgi_llm_guard.storage.redis_expiry import Expiry, overdue
from asgi_llm_guard.storage.redis_node import Node
from asgi_llm_guard.storage.redis_wire import Call, LinkError, ServerError, ask_once

__all__ = ["Cluster", "key_slot"]

logger = logging.getLogger("asgi_llm_guard.storage")

_REST_S: Final = 0.1
"""Between two look-ups of which the first one succeeded."""


class _Detour:
    """The calls of a slot that leaves a node."""

    __slots__ = ("back", "held", "node")

    def __init__(self, node: Node, back: list[Call], held: list[Call]) -> None:
        self.node = node
        self.back = back
        """Came back from it, in order."""
        self.held = held
        """Put since."""


class Cluster:
    """Puts calls to the node that has their slot. See the rules at the top of this file."""

    def __init__(
        self,
        address: Address,
        make_node: Callable[[Endpoint, Cluster], Node],
        *,
        timeout_s: float,
        most: int,
        expiry: Expiry,
        breaker: Breaker,
        on_change: Callable[[object, str], None],
    ) -> None:
        self._address = address
        self._make_node = make_node
        self._timeout_s = timeout_s
        self._most = most
        self._expiry = expiry
        self._breaker = breaker
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[Endpoint, Node] = {}
        self._slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._lobby: deque[Call] = deque()
        """Nobody is known to have their slot yet."""
        self._detours: dict[int, _Detour] = {}
        self._hint: Endpoint | None = None
        self._looked_at = float("-inf")
        self._reason = ""
        self._task: asyncio.Task[None] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._retiring: dict[asyncio.Task[None], Node] = {}
        """Nodes without a slot, while what they were asked is answered."""
        self._refusing = ""

    @property
    def in_flight(self) -> int:
        return sum(node.in_flight for node in self._nodes.values()) + sum(1 for _ in self._own())

    def node_of(self, slot: int) -> Node | None:
        """The node that has the slot, as far as it is known."""
        return self._slots[slot]

    def put(self, call: Call) -> None:
        detour = self._detours.get(call.slot)
        node = self._slots[call.slot]
        if detour is None and node is not None:
            node.put(call)
        elif self._refusing:
            call.fail(f"redis: {self._refusing}", sent=False)
        elif detour is None and self._breaker.state != "closed":
            call.fail(f"redis: {self._address} is left alone for now: {self._reason}", sent=False)
        elif sum(1 for _ in self._own()) >= self._most:
            call.fail(f"redis: {self._most} calls wait for a place in {self._address}; there is no room", sent=False)
        else:
            if not self._expiry.armed:
                self._expiry.arm()
            if detour is not None:
                detour.held.append(call)
            else:
                self._lobby.append(call)
                self._look()

    def _own(self) -> Iterator[Call]:
        """The calls that are at no node."""
        yield from self._lobby
        for detour in self._detours.values():
            yield from detour.back
            yield from detour.held

    # What the nodes tell

    def redirected(self, node: Node, calls: Sequence[Call], error: ServerError) -> None:
        code, slot, place = str(error).split(" ")[:3]
        host, _, port = place.rpartition(":")
        # Without a host it is another port of the same one.
        target = self._node_at(Endpoint(host or node.host, int(port)))
        if code == "ASK":
            for call in calls:
                target.put_asking(call)
            return
        for call in calls:
            call.asking = False
        self._hint = target.endpoint
        self._slots[int(slot)] = target
        self._detour(int(slot), node, calls)
        self._look()

    def troubled(self, node: Node) -> None:
        if self._nodes.get(node.endpoint) is node:
            self._look()

    def _detour(self, slot: int, node: Node, calls: Sequence[Call]) -> None:
        detour = self._detours.get(slot)
        if detour is not None:
            detour.back.extend(calls)
            return
        back, held = node.withdraw(slot)
        detour = self._detours[slot] = _Detour(node, [*back, *calls], held)
        node.when_answered(partial(self._rejoin, slot, detour))

    def _rejoin(self, slot: int, detour: _Detour) -> None:
        del self._detours[slot]
        # By when they were handed over, for more than one node may have sent some of them back.
        for call in sorted((*detour.back, *detour.held), key=attrgetter("at")):
            if call.wanted:
                self.put(call)

    # Who has which slot

    def _look(self) -> None:
        """Look up the slots, soon, unless that is under way."""
        if self._task is not None or self._later is not None or self._refusing:
            return
        wait_s = max(self._breaker.wait_s, self._looked_at + _REST_S - monotonic())
        if wait_s > 0:
            self._later = self._loop.call_later(wait_s, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._later = None
        if not self._refusing:
            self._breaker.probe()
            self._task = self._loop.create_task(self._look_up())

    async def _look_up(self) -> None:
        reasons: list[str] = []
        known = sorted(self._nodes.values(), key=lambda node: not node.connected)
        candidates = [self._hint, *(node.endpoint for node in known), *self._address.endpoints]
        for endpoint in dict.fromkeys(candidate for candidate in candidates if candidate is not None):
            try:
                reply = await ask_once(self._address, endpoint, "CLUSTER", "SLOTS")
                ranges = self._ranges(endpoint, reply)
            except LinkError as error:
                step = "; it is no cluster: write redis:// in the URL" * ("cluster support disabled" in str(error))
                reasons.append(str(error).removeprefix("redis: ") + step)
            except Exception as error:
                logger.exception("redis: the slots of %s cannot be read", endpoint)
                reasons.append(f"{endpoint} answered something that is not a list of slots: {error!r}")
            else:
                self._task = None
                self._looked_up(ranges)
                return
        self._task = None
        self._failed("; ".join(reasons))

    def _ranges(self, asked: Endpoint, reply: Any) -> list[tuple[int, int, Endpoint]]:
        """The first and the last slot of each range, and who has it."""
        ranges = []
        for first, last, (host, port, *_), *_ in reply:
            # A node that does not know its own name is to be found where it was asked.
            endpoint = Endpoint(host.decode() if host and host != b"?" else asked.host, int(port))
            ranges.append((first, last, endpoint))
        if not ranges:
            raise LinkError(f"redis: {asked} is a node without a cluster: it knows of no slots", sent=False)
        return ranges

    def _looked_up(self, ranges: Sequence[tuple[int, int, Endpoint]]) -> None:
        self._looked_at = monotonic()
        if self._breaker.succeeded():
            self._on_change(self, "")
        gone = self._nodes.keys() - {endpoint for _, _, endpoint in ranges}
        self._slots = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, endpoint in ranges:
            self._slots[first : last + 1] = [self._node_at(endpoint)] * (last - first + 1)
        for node in list(self._nodes.values()):
            for slot in node.slots_under_way():
                if self._slots[slot] is not node and slot not in self._detours:
                    self._detour(slot, node, ())
        for endpoint in gone:
            node = self._nodes.pop(endpoint)
            self._on_change(node, "")
            task = self._loop.create_task(node.aclose(2 * self._timeout_s))
            self._retiring[task] = node
            task.add_done_callback(self._retired)
        lobby, self._lobby = self._lobby, deque()
        for call in lobby:
            if self._slots[call.slot] is None:
                call.fail(f"redis: no node of {self._address} has slot {call.slot}; see CLUSTER INFO", sent=False)
            elif call.wanted:
                self.put(call)

    def _retired(self, task: asyncio.Task[None]) -> None:
        self._retiring.pop(task).end()  # a task that is cancelled before it begins has closed nothing

    def _failed(self, reason: str) -> None:
        self._reason = f"no node of {self._address} tells who has which slot: {reason}"
        if self._breaker.failed():
            self._on_change(self, self._reason)
        if self._breaker.state != "closed":
            lobby, self._lobby = self._lobby, deque()
            for call in lobby:
                call.fail(f"redis: {self._reason}", sent=False)
        self._look()

    def _node_at(self, endpoint: Endpoint) -> Node:
        node = self._nodes.get(endpoint)
        if node is None:
            node = self._nodes[endpoint] = self._make_node(endpoint, self)
        return node

    # Timeouts and the end

    def expire(self, now: float) -> float | None:
        dues = [node.expire(now) for node in list(self._nodes.values())]
        queues = [self._lobby, *(queue for detour in self._detours.values() for queue in (detour.back, detour.held))]
        for queue in queues:
            late, due = overdue(queue, now, self._timeout_s)
            dues.append(due)
            for call in late:
                because = f": {self._reason}" if self._reason and queue is self._lobby else ""
                call.fail(f"redis: {self._address} could not be asked within {call.timeout_s:g} s{because}", sent=False)
        while self._lobby and self._lobby[0].future.done():
            self._lobby.popleft()
        return min((due for due in dues if due is not None), default=None)

    def refuse(self, reason: str) -> None:
        """Take no more calls."""
        self._refusing = reason
        for node in self._nodes.values():
            node.refuse(reason)

    async def aclose(self, within_s: float) -> None:
        """Wait for what is under way, within some seconds; then fail the rest, and close. Cancelled, close at once."""
        self._refusing = "the link was closed"
        try:
            await self._wait_and_close(within_s)
        finally:
            if self._task is not None:
                self._task.cancel()
            for call in self._own():
                call.fail("redis: the link was closed", sent=False)
            # Those too that calls were sent on to while the others closed.
            for node in (*self._nodes.values(), *self._retiring.values()):
                node.end()

    async def _wait_and_close(self, within_s: float) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        futures = [call.future for call in self._own() if not call.future.done()]
        if futures:
            await asyncio.wait(futures, timeout=within_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        for call in self._own():
            call.fail("redis: the link was closed", sent=False)
        await asyncio.gather(*(node.aclose(within_s) for node in self._nodes.values()), *self._retiring)
