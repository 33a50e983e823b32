"""What a Redis storage keeps for each event loop that it is used by: a lane and a link, which end with the loop.

What is handed over in one thread or loop is settled before a reservation of another one: each waits for the others', and
takes over what loops that have ended have left.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

from asgi_llm_guard.claims import Durable
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.forks import begin_anew_after_fork
from asgi_llm_guard.storage.pending import tell
from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_lane import Group, Lane
from asgi_llm_guard.storage.redis_link import Link, LinkError
from asgi_llm_guard.storage.redis_namespace import Namespace
from asgi_llm_guard.storage.redis_scripts import RESERVE, SETTLE, script

__all__ = ["Connected", "Home", "Lanes"]

_EXIT_S: Final = 1.0


class Connected:
    """One event loop's lane and link. They end with the loop, having sent what is still here."""

    __slots__ = ("_end", "_key", "_lanes", "_namespace", "ended", "lane", "link")

    def __init__(self, lanes: Lanes, loop: asyncio.AbstractEventLoop, link: Link) -> None:
        self.link = link
        self.ended = False
        """Nothing more can be sent from here; the event loop may still run for a moment."""
        self._lanes = lanes  # so that they are there for as long as something is on its way; see `finish`
        self._namespace = lanes.namespace
        self._key = lanes.namespace.key
        self.lane = Lane(loop, self)
        self._end = self._until_the_end()
        # To its `yield`. Event loops close the generators that were begun in them before they end.
        with contextlib.suppress(StopIteration):
            self._end.asend(None).send(None)

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.ended = True
            try:
                self.lane.flush()
                for group in tuple(self.lane.unsettled):
                    with contextlib.suppress(StorageError):
                        await group.handed
            finally:  # it may be cancelled meanwhile, by somebody who does not wait so long
                self.lane.fail(StorageError("redis: this storage, or the event loop it was used by, was closed"))
                await self.link.aclose()

    async def aclose(self) -> None:
        await self._end.aclose()

    @property
    def link_up(self) -> bool:
        return self.link.is_up(self._key)

    def submit(self, parts: tuple[str, ...], arguments: Sequence[bytes]) -> asyncio.Future[Any]:
        return self.link.submit(script(parts), self._key, arguments)

    def send_reserves(self, arguments: list[bytes]) -> asyncio.Future[Any]:
        return self.link.submit(script(RESERVE), self._key, self._namespace.reserve_arguments(arguments))

    def confirm(self, durable: Durable) -> asyncio.Future[None]:
        confirmed = asyncio.ensure_future(self._confirm(self._lanes.wait(self.link, durable), durable))
        confirmed.add_done_callback(_seen)
        return confirmed

    async def _confirm(self, asked: asyncio.Future[Any], durable: Durable) -> None:
        # At once and not in the task: it has to stand right behind what it is about.
        reply = await asked
        count, wanted = (reply[0], 1) if durable == "disk" else (reply, self._lanes.wait_replicas)
        if count < wanted:
            where = "the server's disk" if durable == "disk" else f"{wanted} replicas"
            raise StorageError(
                f"redis: what was taken did not reach {where} in time ({count} of {wanted}); it is given back"
            )

    def send_settles(self, arguments: list[bytes]) -> asyncio.Future[Any]:
        return self.link.submit(script(SETTLE), self._key, self._namespace.settle_arguments(arguments))

    def settled(self, group: Group, replies: Sequence[Any], now_ms: int) -> bool:
        return self._namespace.settled(group, replies, now_ms)

    async def overtook(self, before: Sequence[Group]) -> bool:
        """Whether a refusal came before the answers to settlements handed over before what it refused; waits for them.

        So it does where they were sent once more, after a lost connection or because the server had lost their script.
        """
        late = [group for group in before if group in self.lane.unsettled]
        for group in late:
            with contextlib.suppress(StorageError):
                await group.handed
        return bool(late)


class Home:
    """An event loop on a thread of its own, for settlements from threads while no other loop runs."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="asgi-llm-guard-redis", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        # Its lane, if the storage could not wait for it to close.
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(1)


class Lanes:
    """The lanes of one storage, by event loop; threads without a loop settle on one of them, or on one of ours.

    `make_link` gives the link of the running event loop. `wait_replicas`: as of `RedisStorage`.
    """

    def __init__(
        self,
        namespace: Namespace,
        address: Address,
        *,
        timeout_s: float,
        wait_replicas: int,
        make_link: Callable[[Address, float], Link],
    ) -> None:
        self.namespace = namespace
        self.wait_replicas = wait_replicas
        self.closed = False
        self._address = address
        self._timeout_s = timeout_s
        self._make_link = make_link
        self.begin_anew()
        begin_anew_after_fork(self)
        _all.add(self)

    def begin_anew(self) -> None:
        """In a forked child: the parent's sockets, loops and settlements are the parent's."""
        self.connected: dict[asyncio.AbstractEventLoop, Connected] = {}
        self._lock = threading.Lock()
        self._handing: dict[Group, asyncio.AbstractEventLoop] = {}
        self._home: Home | None = None

    # --------------------------------------------------------------------------------- lanes

    def lane(self, loop: asyncio.AbstractEventLoop | None = None) -> Connected:
        """The lane of the running event loop, or of that one.

        Raises:
            StorageError: the storage was closed.
        """
        loop = loop or asyncio.get_running_loop()
        lane = self.connected.get(loop)
        if lane is None:
            lane = self._new_lane(loop)
        return lane

    def _new_lane(self, loop: asyncio.AbstractEventLoop) -> Connected:
        with self._lock:
            if self.closed:
                raise StorageError("redis: this storage was closed; make a new one")
            link = self._make_link(self._address, self._timeout_s)
            self.connected[loop] = lane = Connected(self, loop, link)
        self.adopt_abandoned(lane)
        return lane

    def adopt_abandoned(self, lane: Connected) -> None:
        """Settle here what was handed over to event loops that do not run any more, and may never do so again."""
        with self._lock:
            stopped = {
                loop: other for loop, other in self.connected.items() if other is not lane and not loop.is_running()
            }
            for loop in stopped:
                if loop.is_closed():
                    del self.connected[loop]
            waiting = [group for group, loop in tuple(self._handing.items()) if not loop.is_running()]
            for group in waiting:
                del self._handing[group]
            groups = [group for other in stopped.values() for group in other.lane.abandoned()]
        for group in (*groups, *waiting):
            lane.lane.settle(group)

    def link_up(self) -> bool:
        """Whether asking is worth while, from wherever this is asked."""
        try:
            lane = self.connected.get(asyncio.get_running_loop())
        except RuntimeError:
            lane = None
        if lane is not None:
            return lane.link_up
        return all(other.link_up for other in tuple(self.connected.values()))

    async def twice(self, lane: Connected, parts: tuple[str, ...], arguments: Sequence[bytes]) -> Any:
        """Ask for what may be done twice: once more if the connection broke."""
        try:
            return await lane.submit(parts, arguments)
        except LinkError as error:
            if error.code or self.closed or not lane.link_up:
                raise
        return await lane.submit(parts, arguments)

    def wait(self, link: Link, durable: Durable) -> asyncio.Future[Any]:
        """Ask how many replicas, or whose disk, have what was sent before."""
        patience_ms = max(1, int(self._timeout_s * 800))  # its answer has to come in time, too
        if durable == "disk":
            return link.submit_command("WAITAOF", 1, 0, patience_ms, key=self.namespace.key, trailing=True)
        return link.submit_command("WAIT", self.wait_replicas, patience_ms, key=self.namespace.key, trailing=True)

    # ------------------------------------------------------------------------------ settling

    def settle(self, group: Group) -> None:
        """Hand a group over to this thread's loop, or to another one's."""
        try:
            lane = self.lane(asyncio.get_running_loop())
        except RuntimeError:
            self._hand_over(group)
            return
        if lane.ended:
            self._hand_over(group)
        else:
            lane.lane.settle(group)

    def _hand_over(self, group: Group) -> None:
        """Have another thread's loop settle it, because there is none here, or one that is about to end."""
        while True:
            home = self._any_loop()
            self._handing[group] = home
            with contextlib.suppress(RuntimeError):  # that loop was closed meanwhile
                home.call_soon_threadsafe(self._settle_there, home, group)
                return

    def _any_loop(self) -> asyncio.AbstractEventLoop:
        """A loop to settle on for a thread without one: one that is in use, else one of our own."""
        for loop, lane in tuple(self.connected.items()):
            if loop.is_running() and not lane.ended:
                return loop
        with self._lock:
            if self._home is None:
                self._home = Home()
            return self._home.loop

    def _settle_there(self, loop: asyncio.AbstractEventLoop, group: Group) -> None:
        if self._handing.get(group) is not loop:  # it was adopted meanwhile
            return
        try:
            lane = self.lane(loop)
        except StorageError as error:  # closed meanwhile
            del self._handing[group]
            group.handed.decide(None, error)
            tell([group.handed])
            return
        if lane.ended:
            self._hand_over(group)
        else:
            lane.lane.settle(group)
            del self._handing[group]

    @property
    def several(self) -> bool:
        """Whether something may be under way elsewhere than in the running event loop."""
        return len(self.connected) > 1 or bool(self._handing)

    async def settled_elsewhere(self, mine: Connected) -> None:
        """Wait for what other event loops and threads of this process have handed over: it is to be settled first."""
        self.adopt_abandoned(mine)
        groups = [
            group for lane in tuple(self.connected.values()) if lane is not mine for group in tuple(lane.lane.unsettled)
        ]
        deadline_s = mine.lane.loop.time() + self._timeout_s
        for group in (*groups, *tuple(self._handing)):
            with contextlib.suppress(StorageError):
                try:
                    async with asyncio.timeout_at(deadline_s):
                        await group.handed
                except TimeoutError:  # that loop is busy with something else, and this one is not to wait for it
                    mine.lane.settle(group.twin())

    async def all_settled(self) -> None:
        """Wait for all that was handed over."""
        mine = self.lane()
        await self.settled_elsewhere(mine)
        for group in tuple(mine.lane.unsettled):
            with contextlib.suppress(StorageError):
                await group.handed

    # ------------------------------------------------------------------------------ the end

    async def aclose(self) -> None:
        """Wait for what was handed over, then close the lanes of all loops."""
        if self.closed:
            return
        await self.all_settled()
        self.closed = True
        with self._lock:
            lanes, self.connected = self.connected, {}
        here = asyncio.get_running_loop()
        for loop, lane in lanes.items():
            if loop is here:
                await lane.aclose()
            elif loop.is_running():
                with contextlib.suppress(RuntimeError, TimeoutError):  # it stopped meanwhile, or is busy
                    closed = asyncio.run_coroutine_threadsafe(lane.aclose(), loop)
                    await asyncio.wait_for(asyncio.wrap_future(closed), 4 * self._timeout_s)
        if self._home is not None:
            self._home.stop()

    def finish(self, timeout_s: float) -> None:
        """At the end of the process: send what event loops that have stopped still have, and wait a moment for all of it."""
        deadline_s = time.monotonic() + timeout_s
        groups = [*self._handing]
        for loop, lane in tuple(self.connected.items()):
            groups += lane.lane.unsettled
            if not loop.is_running():
                for group in lane.lane.abandoned():
                    self._hand_over(group)
        for group in groups:
            with contextlib.suppress(StorageError):
                group.handed.result(max(0.0, deadline_s - time.monotonic()))


def _seen(done: asyncio.Future[Any]) -> None:
    """Whoever waits for it may have failed before: then its own failure is no news."""
    if not done.cancelled():
        done.exception()


_all: weakref.WeakSet[Lanes] = weakref.WeakSet()


def _at_exit() -> None:
    deadline_s = time.monotonic() + _EXIT_S
    for lanes in list(_all):
        with contextlib.suppress(RuntimeError):  # it is too late for new threads
            lanes.finish(max(0.0, deadline_s - time.monotonic()))


atexit.register(_at_exit)
