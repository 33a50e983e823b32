"""A storage that goes away."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.storage.base import Pending, Storage
from asgi_llm_guard.storage.entries import Bounds, Entries, InFlight, KeepsEntries, Kept, Leading
from asgi_llm_guard.storage.shared import Document, KeepsShared, ListsCalls, OpenCall, Shared, Tally
from asgi_llm_guard.storage.streams import KeepsStreams, Read, RecordStream
from asgi_llm_guard.usage import UsageRecord

__all__ = ["OutageStorage"]


class OutageStorage:
    """A storage that goes away, loses its answers or its data, and comes back, when the test says so.

    Around any `Storage`, which does all the work. With `breaker` it says by itself that it is away, as storages
    behind a wire do after a few failures, so that guards do not even try.
    """

    def __init__(self, inner: Storage, *, breaker: bool = False) -> None:
        self.inner = inner
        self.attempts = 0
        """How many operations were tried while it was away."""
        self._breaker = breaker
        self._mode: Literal["up", "down", "silent"] = "up"
        self._still_up = 0
        self._unanswered = 0
        self._epoch = 0
        self._accepted = 0

    def down(self, *, after: int = 0, unanswered: int = 0) -> None:
        """Nothing reaches the store any more. Before that, `after` operations still work, and then so many reach it
        of which nobody learns what became of them.
        """
        self._mode, self._still_up, self._unanswered = "down", after, unanswered

    def lose_replies(self, *, after: int = 0) -> None:
        """Everything reaches the store, and after so many operations nobody learns what became of them."""
        self._mode, self._still_up = "silent", after

    def up(self) -> None:
        """It answers again."""
        self._mode = "up"

    def lose_data(self, fresh: Storage) -> None:
        """`fresh` takes the place of the store, as after a flush or a restart without a disk."""
        self.inner = fresh
        self._epoch += 1

    @property
    def lost(self) -> bool:
        """Whether its data was lost, and nobody has accepted that."""
        return self._epoch != self._accepted

    def available(self) -> bool:
        return self._mode != "down" or not self._breaker

    @property
    def epoch(self) -> str:
        return str(self._accepted)

    async def accept_loss(self) -> None:
        async with self._reached():
            self._accepted = self._epoch

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        async with self._reached(decides=True):
            return await self.inner.reserve(owner, plans)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        async with self._reached(decides=True):
            return await self.inner.amend(owner, bundle)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        mode = self._next()
        if mode == "down":
            return _Failed(_nobody_there())
        pending = self.inner.settle(settlements)
        return _Failed(_no_answer()) if mode == "silent" else pending

    async def heartbeat(self, owner: str) -> Heartbeat:
        async with self._reached():
            return await self.inner.heartbeat(owner)

    async def retire(self, owner: str) -> None:
        async with self._reached():
            await self.inner.retire(owner)

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        async with self._reached():
            return await self.inner.read(meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        async with self._reached():
            await self.inner.reset(meters)

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        async with self._reached():
            return await self.inner.records(since_ms=since_ms, limit=limit)

    async def export(self) -> AsyncIterator[bytes]:
        async with self._reached():
            async for line in self.inner.export():
                yield line

    async def load(self, lines: Iterable[bytes]) -> None:
        async with self._reached():
            await self.inner.load(lines)

    async def open_holds(self) -> int:
        async with self._reached():
            return await self.inner.open_holds()

    def entries(self, space: str, bounds: Bounds | None = None) -> _Entries:
        """As `KeepsEntries`, if the store is one."""
        if not isinstance(self.inner, KeepsEntries):
            raise ConfigurationError(f"entries: a {type(self.inner).__name__} cannot keep {space!r}")
        return _Entries(self.inner.entries(space, bounds), self._reached)

    def shared(self) -> _Shared:
        """As `KeepsShared`, if the store is one."""
        if not isinstance(self.inner, KeepsShared):
            raise ConfigurationError(f"shared: a {type(self.inner).__name__} cannot keep what processes share")
        return _Shared(self.inner.shared(), self._reached)

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        """As `ListsCalls`, if the store is one; else there are none."""
        async with self._reached():
            return await self.inner.open_calls(limit) if isinstance(self.inner, ListsCalls) else ()

    def streams(self) -> Sequence[RecordStream]:
        """As `KeepsStreams`, if the store is one."""
        if not isinstance(self.inner, KeepsStreams):
            raise ConfigurationError(f"streams: a {type(self.inner).__name__} keeps no stream of its records")
        return [_Stream(stream, self._reached) for stream in self.inner.streams()]

    async def aclose(self) -> None:
        await self.inner.aclose()

    @asynccontextmanager
    async def _reached(self, *, decides: bool = False) -> AsyncGenerator[None]:
        mode = self._next()
        if mode == "down":
            raise _nobody_there()
        if decides and self.lost:
            raise DataLost("the store is not the one that it was")
        yield
        if mode == "silent":
            raise _no_answer()

    def _next(self) -> Literal["up", "down", "silent"]:
        if self._mode == "up":
            return "up"
        if self._still_up:
            self._still_up -= 1
            return "up"
        self.attempts += 1
        if self._mode == "down" and self._unanswered:
            self._unanswered -= 1
            return "silent"
        return self._mode


class _Entries:
    """A space of a store that may be away."""

    def __init__(self, inner: Entries, reached: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._inner = inner
        self._reached = reached

    @property
    def bounds(self) -> Bounds:
        return self._inner.bounds

    async def find(self, key: str) -> Kept | None:
        async with self._reached():
            return await self._inner.find(key)

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        async with self._reached():
            return await self._inner.begin(key, token, claim_ms=claim_ms, names=names, note=note, fresh=fresh)

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        async with self._reached():
            return await self._inner.prolong(key, token, claim_ms=claim_ms)

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        async with self._reached():
            return await self._inner.store(key, token, value, ttl_ms=ttl_ms)

    async def abandon(self, key: str, token: str) -> None:
        async with self._reached():
            await self._inner.abandon(key, token)

    async def forget(self, key: str) -> None:
        async with self._reached():
            await self._inner.forget(key)

    async def bump(self, name: str) -> None:
        async with self._reached():
            await self._inner.bump(name)


class _Stream:
    """A stream of records behind the same wire."""

    def __init__(self, stream: RecordStream, reached: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self.name = stream.name
        self._stream = stream
        self._reached = reached

    async def read(self, position: str | None, limit: int) -> Read:
        async with self._reached():
            return await self._stream.read(position, limit)

    async def trim(self, position: str, *, keep_ms: int, limit: int) -> int:
        async with self._reached():
            return await self._stream.trim(position, keep_ms=keep_ms, limit=limit)


class _Shared:
    """What a store that may be away keeps for all processes."""

    def __init__(self, inner: Shared, reached: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._inner = inner
        self._reached = reached

    async def publish(self, name: str, version: int, data: bytes) -> bool:
        async with self._reached():
            return await self._inner.publish(name, version, data)

    async def document(self, name: str, *, known: int = 0) -> Document | None:
        async with self._reached():
            return await self._inner.document(name, known=known)

    async def tally(self, name: str, hour_ms: int, counts: Mapping[str, int], *, most: int = 1000) -> None:
        async with self._reached():
            await self._inner.tally(name, hour_ms, counts, most=most)

    async def tallies(self, name: str, since_ms: int) -> Sequence[Tally]:
        async with self._reached():
            return await self._inner.tallies(name, since_ms)

    async def mark(self, name: str, *, until_ms: int) -> bool:
        async with self._reached():
            return await self._inner.mark(name, until_ms=until_ms)

    async def unmark(self, name: str) -> None:
        async with self._reached():
            await self._inner.unmark(name)


def _nobody_there() -> StorageError:
    error = StorageError("nobody is there")
    error.sent = False
    return error


def _no_answer() -> StorageError:
    return StorageError("no answer came back")


class _Failed:
    """A settlement whose outcome is not known."""

    def __init__(self, error: StorageError) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:  # noqa: ARG002 - see Pending
        raise self._error

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        callback(self)

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        raise self._error
        yield  # pragma: no cover - makes this a generator; never reached
