"""The first call to a server: which data it has, what time it is there, and whether its configuration can be relied on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_link import ServerInfo
from asgi_llm_guard.storage.redis_loops import Connected
from asgi_llm_guard.storage.redis_namespace import Namespace
from asgi_llm_guard.storage.redis_scripts import EPOCH

__all__ = ["Greeting"]

logger = logging.getLogger("asgi_llm_guard.storage")

_warned: set[tuple[str, str]] = set()  # each warning once per process and server


class Greeting:
    """Says hello for one namespace, and accepts that its data was lost."""

    def __init__(self, namespace: Namespace, address: Address) -> None:
        self._namespace = namespace
        self._address = address
        self._checked = False

    async def hello(self, lane: Connected) -> None:
        """Learn the epoch and the time; the first time, look at the server's configuration."""
        now_ms, epoch = await self.epoch(lane)
        self._namespace.heard(now_ms)
        self._namespace.adopt(epoch)
        if not self._checked:
            self._checked = True
            for warning in _warnings(await lane.link.server_info(self._namespace.key)):
                if (str(self._address), warning) not in _warned:
                    _warned.add((str(self._address), warning))
                    logger.warning("%s: %s", self._address, warning)

    async def epoch(self, lane: Connected) -> tuple[int, bytes]:
        """The server's clock and the epoch of its data, which begins here if the namespace is new."""
        now_ms, epoch = await lane.submit(EPOCH, [*self._namespace.head(), b"hello", _new_epoch()])
        return now_ms, epoch

    async def accept(self, lane: Connected) -> None:
        """Begin another epoch with the data that there is, for all processes."""
        namespace = self._namespace
        arguments = [*namespace.head(), b"accept", _new_epoch(), namespace.epoch.strip()]
        now_ms, epoch = await lane.submit(EPOCH, arguments)
        namespace.heard(now_ms)
        namespace.adopt(epoch)
        namespace.lost = None


def _warnings(server: ServerInfo) -> Iterator[str]:
    if server.maxmemory_policy not in (None, "noeviction") and server.maxmemory:
        yield (
            f"maxmemory-policy is {server.maxmemory_policy}: when memory is full the server forgets what was used, "
            "and budgets start anew without anybody noticing; set it to noeviction"
        )
    if server.aof is False and server.rdb is False:
        yield "neither AOF nor snapshots are on: a restart forgets all counters; set appendonly yes"
    elif server.aof is False:
        yield "AOF is off: a crash forgets what was counted since the last snapshot; set appendonly yes"


def _new_epoch() -> bytes:
    return os.urandom(9).hex().encode()
