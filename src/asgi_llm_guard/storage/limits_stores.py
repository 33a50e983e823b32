"""The stores of the `limits` package: opened from a URI, one for each event loop, and closed, for which it has no way."""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final, cast

from limits.aio.storage import MemcachedStorage, MongoDBStorage, RedisClusterStorage, RedisSentinelStorage, RedisStorage
from limits.aio.storage import Storage as Store
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.storage import storage_from_string

from asgi_llm_guard.errors import ConfigurationError, StorageError

__all__ = ["Stores"]

_MOST_CONNECTIONS: Final = 32
_CLIENTS: Final = {
    "memcached": ("memcachio", "limits[async-memcached]"),
    "mongodb": ("motor", "limits[async-mongodb]"),
    "valkey": ("valkey", "limits[async-valkey]"),
    "valkeys": ("valkey", "limits[async-valkey]"),
}
"""By the first part of a scheme: the client library that the package needs for it, and what brings it."""


class Stores:
    """One store for each event loop, whose connections belong to it. An object, and `memory://`, have one loop only.

    Raises:
        ConfigurationError: what is given is neither a URI of the package nor one of its asynchronous storages, or its
            client library is not installed.
    """

    def __init__(self, store: str | Store, timeout_s: float) -> None:
        self._uri = store if isinstance(store, str) else None
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Store] = weakref.WeakKeyDictionary()
        first = _opened(store, timeout_s) if isinstance(store, str) else store
        if not isinstance(first, Store):
            raise ConfigurationError(
                f"store: expected a URI, or a storage of limits.aio.storage, got {type(store).__name__}; "
                "the synchronous ones of limits.storage would block the event loop"
            )
        self.kind: type[Store] = type(first)
        """Of which class all of them are."""
        self._first: Store | None = first
        self._single = self._uri is None or self._uri.startswith("memory:")
        self._closed = False

    def of_this_loop(self) -> Store:
        """The store of the running event loop, whose connections belong to it."""
        loop = asyncio.get_running_loop()
        store = self._by_loop.get(loop)
        return store if store is not None else self._store_for(loop)

    def _store_for(self, loop: asyncio.AbstractEventLoop) -> Store:
        with self._lock:
            if self._closed:
                raise StorageError("limits storage: this storage is closed; make a new one")
            if self._single:
                others = [other for other in self._by_loop if not other.is_closed()]
                if others:
                    raise StorageError(
                        "limits storage: this one belongs to another event loop; give a URI instead of an object, "
                        "so that each loop gets connections of its own"
                    )
                store = cast("Store", self._first)
            elif self._first is not None:
                store, self._first = self._first, None
            else:
                store = _opened(cast("str", self._uri), self._timeout_s)
            self._by_loop[loop] = store
            return store

    async def aclose(self) -> None:
        """Close the connections that were made from a URI; an object that was passed is its owner's to close."""
        with self._lock:
            self._closed = True
            stores = dict(self._by_loop)
            self._by_loop.clear()
        if self._single:
            return
        for loop, store in stores.items():
            if loop is asyncio.get_running_loop():
                await _close(store)
            elif not loop.is_closed():
                # A loop that stops meanwhile has nobody left who could close it.
                with suppress(RuntimeError, TimeoutError):
                    async with asyncio.timeout(self._timeout_s):
                        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_close(store), loop))


def _opened(uri: str, timeout_s: float) -> Store:
    """The package's storage for a URI. Connects when it is first used.

    Raises:
        ConfigurationError: never shows the URI, which may carry a password.
    """
    scheme = uri.partition("://")[0]
    library, install = _CLIENTS.get(scheme.partition("+")[0], ("limits", ""))
    if find_spec(library) is None:
        raise ConfigurationError(f"storage: limits+{scheme}:// needs a client library: pip install '{install}'")
    try:
        store = storage_from_string(f"async+{uri}", **_options(uri, scheme, timeout_s))
    except (LimitsConfigurationError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"storage: limits+{scheme}:// cannot be opened ({type(error).__name__}): expected limits+ and an address of "
            "the limits package, such as limits+memcached://localhost:11211 or limits+mongodb://localhost:27017"
        ) from None
    return cast("Store", store)


def _options(uri: str, scheme: str, timeout_s: float) -> dict[str, Any]:
    if not scheme.startswith("redis"):
        return {}
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    # A command of which the answer is missing may have been executed: tried again, it counts twice.
    options: dict[str, Any] = {"implementation": "redispy", "retry": Retry(NoBackoff(), 0)}
    if scheme == "redis+sentinel":
        return options | {"use_replicas": False, "sentinel_kwargs": {"retry": options["retry"]}}
    if scheme == "redis+cluster":
        return options
    pool = BlockingConnectionPool.from_url(
        uri.replace("redis+unix", "unix", 1),
        max_connections=_MOST_CONNECTIONS,
        timeout=timeout_s,
        retry=options.pop("retry"),
    )
    return options | {"connection_pool": pool}


async def _close(store: Store) -> None:
    """Close what `_opened` opened: the package itself has no way to."""
    if isinstance(store, RedisStorage):
        bridge = cast("Any", store.bridge)
        clients = [bridge.storage]
        if isinstance(store, RedisSentinelStorage):
            clients += [bridge.storage_replica, *bridge.sentinel.sentinels]
        for client in clients:
            pool = {} if isinstance(store, RedisClusterStorage) else {"close_connection_pool": True}
            await client.aclose(**pool)
    elif isinstance(store, MongoDBStorage):
        store.storage.close()
    elif isinstance(store, MemcachedStorage):
        client = await cast("Any", store.bridge).get_storage()
        client.connection_pool.close()
