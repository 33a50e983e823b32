"""Storages: where counters live. START HERE; then `base.py`, the protocol and its rules.

    cells.py     the rules as pure functions over counters, with taking.py, releasing.py, counting.py and state.py
    memory.py    runs them in this process
    sqlite.py    runs them on rows of a file, with sqlite_*.py
    redis.py     runs them as scripts in a server, with redis_*.py and lua/
    sharded.py   is made of several storages, with shard_*.py
    leases.py    is around another one, and spends chunks of its meters here, with lease_*.py
    limits.py    counts rates by the `limits` package, with limits_*.py

What they keep besides counters has a protocol of its own: `entries.py`, `shared.py`, `streams.py`, `open_calls.py`, `export.py`.
"""

from __future__ import annotations

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.base import Leasing, Storage

__all__ = ["open_storage", "with_leases"]


def open_storage(url: str, *, clock: Clock) -> Storage:
    """The storage that a URL names: `memory://`, `sqlite:///file.db` (relative) or `sqlite:////var/lib/file.db`.

    `sqlite:///file.db?synchronous=FULL` also survives a loss of power without losing the last commits.
    `redis://`, `rediss://`, `unix://`, `redis+sentinel://host/master`, `redis+cluster://host`: Redis or Valkey;
    with `?shard_by=caller` spread over the nodes of a cluster.
    `limits+memcached://host:11211?strategy=fixed`: a store of the `limits` package, for rates of requests only.

    Raises:
        ConfigurationError: not a URL of a known storage, or an option that it does not have.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        # Never the URL itself: one of another kind of store may carry a password.
        raise ConfigurationError("storage: expected a URL such as memory:// or sqlite:///guard.db; this one has no ://")
    if scheme == "memory":
        if rest:
            raise ConfigurationError("storage: memory:// takes nothing after it")
        from asgi_llm_guard.storage.memory import MemoryStorage

        return MemoryStorage(clock=clock)
    if scheme == "sqlite":
        from asgi_llm_guard.storage.sqlite import SqliteStorage

        path, _, query = rest.partition("?")
        return SqliteStorage(_sqlite_path(path, url), clock=clock, synchronous=_synchronous(query, url))
    if scheme == "unix" or scheme.partition("+")[0] in {"redis", "rediss"}:
        from asgi_llm_guard.storage.redis_shards import open_redis

        # The server's clock decides, but for a test that brings its own.
        return open_redis(url, clock=None if isinstance(clock, SystemClock) else clock)
    if scheme.startswith("limits+"):
        from asgi_llm_guard.storage.limits import LimitsStorage

        return LimitsStorage.from_url(url.removeprefix("limits+"))
    raise ConfigurationError(f"storage: expected memory://, sqlite:///path or redis://host, got the scheme {scheme!r}")


def with_leases(storage: Storage, *, clock: Clock) -> Leasing:
    """`storage`, with chunks of hot meters leased to this process; see `docs/leases.md`."""
    from asgi_llm_guard.storage.leases import LeasingStorage

    # What passes between two answers is measured on a clock that nobody sets, but for a test that brings its own.
    return LeasingStorage(storage, clock=None if isinstance(clock, SystemClock) else clock)


def _sqlite_path(path: str, url: str) -> str:
    if not path.startswith("/") or len(path) < 2:
        raise ConfigurationError(
            f"storage: expected sqlite:///file.db (relative) or sqlite:////absolute/file.db, got {url!r}"
        )
    return path[1:]


def _synchronous(query: str, url: str) -> str:
    if not query:
        return "NORMAL"
    name, _, value = query.partition("=")
    if name != "synchronous" or value.upper() not in {"NORMAL", "FULL"}:
        raise ConfigurationError(f"storage: the one option is synchronous=NORMAL or synchronous=FULL, got {url!r}")
    return value.upper()
