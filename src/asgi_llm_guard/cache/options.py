"""How a guard's answers are kept: `Cache`."""

from __future__ import annotations

from collections.abc import Sequence

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import MAX_TTL_MS, Bounds, KeepsEntries
from asgi_llm_guard.windows import duration_ms

__all__ = ["Cache", "keeper"]


class Cache:
    """How answers are kept: `Guard([..., CacheScope()], cache=Cache(ttl="1h"))`.

    Args:
        ttl: how long an answer is kept; a `CacheScope` may say less.
        streams: keep answers that were streamed, once they are complete, and give them again in one piece.
        wait: how long a call waits for another one that asks the same just now, before it is made, too.
        storage: where answers are kept; `None`: where the guard counts.
        ignore: fields of a request's body, and headers, that do not count, because they change no answer of yours:
            `metadata`, `x-run-id`.
        version: a part of every key. With another one, answers of before are not found.
        max_value_bytes: longer answers are not kept.
        max_bytes, max_entries: what is kept in memory or SQLite at most; the oldest answers go first. Redis and
            Valkey forget by time, and by their own `maxmemory`.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        *,
        ttl: str = "1h",
        streams: bool = False,
        wait: str = "30s",
        storage: Storage | None = None,
        ignore: Sequence[str] = (),
        version: str = "",
        max_value_bytes: int = 1024 * 1024,
        max_bytes: int = 64 * 1024 * 1024,
        max_entries: int = 100_000,
    ) -> None:
        self.ttl_ms = duration_ms(ttl, name="cache.ttl")
        if self.ttl_ms > MAX_TTL_MS:
            raise ConfigurationError(f"cache.ttl: at most 30 days, got {ttl!r}")
        if not isinstance(streams, bool):
            raise ConfigurationError(f"cache.streams: expected True or False, got {streams!r}")
        if isinstance(ignore, str) or not all(isinstance(field, str) for field in ignore):
            raise ConfigurationError(f"cache.ignore: expected a list of names such as ['metadata'], got {ignore!r}")
        if not isinstance(version, str):
            raise ConfigurationError(f"cache.version: expected a text, got {version!r}")
        if storage is not None:
            keeper("cache.storage", storage)
        self.streams = streams
        self.wait_s = 0.0 if wait in ("0", "0s") else duration_ms(wait, name="cache.wait") / 1000
        self.storage = storage
        self.ignore = frozenset(ignore) | {name.lower() for name in ignore}
        self.version = version
        self.bounds = Bounds(max_value_bytes=max_value_bytes, max_bytes=max_bytes, max_entries=max_entries)


def keeper(name: str, storage: Storage) -> KeepsEntries:
    """`storage`, which can keep answers.

    Raises:
        ConfigurationError: it cannot; names the setting.
    """
    if not isinstance(storage, KeepsEntries):
        raise ConfigurationError(
            f"{name}: a {type(storage).__name__} cannot keep answers; use memory, SQLite, Redis or Valkey, for the cache "
            "alone with cache=Cache(storage=...)"
        )
    return storage
