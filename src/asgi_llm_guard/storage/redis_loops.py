"""What a Redis storage keeps for each event loop that it is used by: a lane and a link, which end with the loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from asgi_llm_guard.claims import Durable
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis_lane import Group, Lane
from asgi_llm_guard.storage.redis_link import Link
from asgi_llm_guard.storage.redis_scripts import RESERVE, SETTLE, script

__all__ = ["Connected", "Home", "Owner"]


class Owner(Protocol):
    """The storage."""

    wait_replicas: int

    def reserve_arguments(self, arguments: list[bytes]) -> list[bytes]: ...

    def settle_arguments(self, arguments: list[bytes]) -> list[bytes]: ...

    def wait(self, link: Link, durable: Durable) -> asyncio.Future[Any]: ...

    def settled(self, group: Group, replies: Sequence[Any], now_ms: int) -> bool: ...


class Connected:
    """One event loop's lane and link. They end with the loop, having sent what is still here."""

    __slots__ = ("_end", "_key", "_storage", "ended", "lane", "link")

    def __init__(self, storage: Owner, loop: asyncio.AbstractEventLoop, link: Link, key: bytes) -> None:
        self.link = link
        self.ended = False
        """Nothing more can be sent from here; the event loop may still run for a moment."""
        self._storage = storage
        self._key = key
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
        return self.link.submit(script(RESERVE), self._key, self._storage.reserve_arguments(arguments))

    def confirm(self, durable: Durable) -> asyncio.Future[None]:
        confirmed = asyncio.ensure_future(self._confirm(self._storage.wait(self.link, durable), durable))
        confirmed.add_done_callback(_seen)
        return confirmed

    async def _confirm(self, asked: asyncio.Future[Any], durable: Durable) -> None:
        # At once and not in the task: it has to stand right behind what it is about.
        reply = await asked
        count, wanted = (reply[0], 1) if durable == "disk" else (reply, self._storage.wait_replicas)
        if count < wanted:
            where = "the server's disk" if durable == "disk" else f"{wanted} replicas"
            raise StorageError(
                f"redis: what was taken did not reach {where} in time ({count} of {wanted}); it is given back"
            )

    def send_settles(self, arguments: list[bytes]) -> asyncio.Future[Any]:
        return self.link.submit(script(SETTLE), self._key, self._storage.settle_arguments(arguments))

    def settled(self, group: Group, replies: Sequence[Any], now_ms: int) -> bool:
        return self._storage.settled(group, replies, now_ms)


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


def _seen(done: asyncio.Future[Any]) -> None:
    """Whoever waits for it may have failed before: then its own failure is no news."""
    if not done.cancelled():
        done.exception()
