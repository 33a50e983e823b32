"""`guard.call(..., cache_key=...)`: a call whose answer may be kept, as a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from types import TracebackType
from typing import Any

import msgspec

from asgi_llm_guard import background
from asgi_llm_guard.admission import ActiveCall, Scope, enter, leave
from asgi_llm_guard.cache.answers import ProviderAnswer, unfit_value
from asgi_llm_guard.cache.lookup import Lookup
from asgi_llm_guard.cache.responses import ResponseCache

__all__ = ["CachedCall", "Key", "OpenCachedCall", "OpenCachedCallSync", "value_answer"]

Key = str | int | float | Sequence[Any] | Mapping[str, Any]
"""What an answer depends on, besides the call's description: texts, numbers, lists and mappings."""


class CachedCall:
    """A call that was looked up. Either it is a `hit`, and `value` is what was kept; or it is to be made."""

    __slots__ = ("_found", "_kept", "call", "value")

    def __init__(self, call: ActiveCall, found: Lookup) -> None:
        self.call = call
        """The call itself: to meter its stream, or to release it. On a hit it is over."""
        self.value: Any = None
        """On a hit, what was kept: texts, numbers, lists and mappings, as from JSON."""
        self._found = found
        self._kept: ProviderAnswer | None = None
        if found.answer is not None:
            self.value = msgspec.json.decode(found.answer.body)

    @property
    def hit(self) -> bool:
        """Whether `value` is to be used, and no call made."""
        return self._found.hit

    def record(self, response: object) -> None:
        """As `ActiveCall.record`."""
        self.call.record(response)

    def keep(self, value: object) -> None:
        """Have `value` kept when the block is left without an error.

        What JSON cannot say as it is, and an answer of a provider that is an error, was cut or calls a tool, is not
        kept: `guard.cache.stats()` counts why.
        """
        made = value_answer(value)
        if isinstance(made, str):
            self._found.refuse(made)
        else:
            self._kept = made

    async def claim(self) -> None:
        """Claim what is to be made.

        Raises:
            LimitExceeded: refused; who waits for the answer takes over.
        """
        if not self.hit:
            try:
                await self.call.claim()
            except BaseException:
                self._found.abandon()
                raise

    async def end(self, error: BaseException | None) -> None:
        """Settle the call, and keep its value."""
        self.call.end(error)
        if error is None and self._kept is not None:
            await self._found.store_judged(self._kept)
        self._found.abandon()


def value_answer(value: object) -> ProviderAnswer | str:
    """`value` as it is kept; or why it is not."""
    try:
        body = msgspec.json.encode(value)
        same = msgspec.json.decode(body) == value
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        same, body = False, b""
    if not same:
        return f"a {type(value).__name__} is not the same once it was JSON"
    return unfit_value(value) or ProviderAnswer(status=0, content_type="", body=body)


class OpenCachedCall:
    """What `guard.call(cache_key=...)` gives: enter it."""

    __slots__ = ("_cache", "_cached", "_key", "_make", "_token")

    def __init__(self, make: Callable[[], ActiveCall], cache: ResponseCache, key: Key) -> None:
        self._make = make
        self._cache = cache
        self._key = key
        self._cached: CachedCall | None = None
        self._token: Token[Scope | None] | None = None

    async def __aenter__(self) -> CachedCall:
        cached = self._cached = await _opened(self._make(), self._cache, self._key)
        if not cached.hit:
            self._token = enter(cached.call)
        return cached

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            leave(self._token)
        assert self._cached is not None  # noqa: S101 - it was entered
        await self._cached.end(error)


class OpenCachedCallSync:
    """What `guard.call_sync(cache_key=...)` gives: enter it."""

    __slots__ = ("_cache", "_cached", "_key", "_make", "_token")

    def __init__(self, make: Callable[[], ActiveCall], cache: ResponseCache, key: Key) -> None:
        self._make = make
        self._cache = cache
        self._key = key
        self._cached: CachedCall | None = None
        self._token: Token[Scope | None] | None = None

    def __enter__(self) -> CachedCall:
        call = self._make()
        cached = self._cached = background.run(_opened(call, self._cache, self._key), undo=call.discard)
        if not cached.hit:
            self._token = enter(cached.call)
        return cached

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            leave(self._token)
        assert self._cached is not None  # noqa: S101 - it was entered
        background.run(self._cached.end(error))


async def _opened(call: ActiveCall, cache: ResponseCache, key: Key) -> CachedCall:
    cached = CachedCall(call, await cache.look_up_value(call, "call", key))
    await cached.claim()
    return cached
