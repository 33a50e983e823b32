"""What a Redis URL names: one namespace, or with `shard_by=caller` several, which share their connections.

The namespaces are `<namespace>.0`, `<namespace>.1` and so on: each has a hash tag of its own, so that a cluster has
them, and their streams, on all of its nodes. How many there are is fixed, and what each of them has is a function of
a meter's key; see `sharded.py`.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final
from urllib.parse import unquote_plus

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.redis import OPTIONS, RedisStorage
from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_link import Link
from asgi_llm_guard.storage.redis_scripts import ALL, script
from asgi_llm_guard.storage.sharded import SHARDS, ShardedStorage

__all__ = ["MOST_SHARDS", "Links", "open_redis"]

MOST_SHARDS: Final = 256


def open_redis(url: str, *, clock: Clock | None = None) -> Storage:
    """The storage that a Redis URL names.

    Raises:
        ConfigurationError: as `RedisStorage`; or `shard_by` or `shards` is not what it may be.
    """
    _, options = Address.parse(url, storage_options=OPTIONS)
    by, number = options.get("shard_by"), options.get("shards", str(SHARDS))
    if by is None and "shards" in options:
        raise ConfigurationError("shards: how many there are is said beside shard_by=caller")
    if by is None:
        return RedisStorage(url, clock=clock)
    if by != "caller":
        raise ConfigurationError(f"shard_by: expected caller, got {by!r}")
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= MOST_SHARDS):
        raise ConfigurationError(f"shards: expected a whole number from 1 to {MOST_SHARDS}, got {number!r}")
    base, links = _without(url), Links()
    namespace = options.get("namespace", "llm-guard")
    return ShardedStorage(
        [
            RedisStorage(base, namespace=f"{namespace}.{n}", clock=clock, make_link=links.of_this_loop)
            for n in range(int(number))
        ]
    )


def _without(url: str) -> str:
    """The URL of a shard: without what says that there are some."""
    base, _, query = url.partition("?")
    kept = [part for part in query.split("&") if unquote_plus(part.partition("=")[0]) not in {"shard_by", "shards"}]
    return f"{base}?{'&'.join(kept)}" if kept else base


class Links:
    """One link for each event loop, for all storages that ask for one. Each of them closes it; the last one does."""

    def __init__(self) -> None:
        self._links: dict[asyncio.AbstractEventLoop, _Shared] = {}
        self._pid = os.getpid()

    def of_this_loop(self, address: Address, timeout_s: float) -> Link:
        """A link of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():  # a fork: they are the parent's
            self._links, self._pid = {}, os.getpid()
        link = self._links.get(loop)
        if link is None or not link.users:
            for closed in [other for other in tuple(self._links) if other.is_closed()]:
                self._links.pop(closed, None)
            link = self._links[loop] = _Shared(address, scripts=[script(parts) for parts in ALL], timeout_s=timeout_s)
        link.users += 1
        return link


class _Shared(Link):
    """A link that is closed when the last of its users does so."""

    users = 0

    async def aclose(self) -> None:
        self.users -= 1
        if not self.users:
            await super().aclose()
