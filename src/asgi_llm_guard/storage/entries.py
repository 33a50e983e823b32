"""Values that expire, kept beside the counters: what the response cache and idempotency keys are made of.

A storage that can keep them is a `KeepsEntries`. Each feature has a *space* of its own, so that none pushes out what
another one keeps. Inside a space a key has nothing, a *claim* (somebody is making the value), or a value.

Rule 1: of all who `begin` a key, over all workers, exactly one leads at a time: the first that finds neither a value
nor a live claim. All others are told the value, or that it is being made.

Rule 2: a claim ends with its leader's `store` or `abandon`, and by itself after `claim_ms`, unless the leader prolongs it.
A token names one attempt at one key, and is never used again. A leader that begins again has its claim for as long as from
the first time; if it had ended, it is a new one, in the epochs of then. So only `prolong` keeps what rule 6 promises.

Rule 3: `store` and `abandon` change something only while the token leads. A leader whose claim has ended stores nothing,
even if nobody took its place.

Rule 4: every operation may be repeated. A `store` that has stored says so again.

Rule 5: a value is given until its time is over, by the storage's own clock, and never after it.

Rule 6: an entry belongs to the epochs of its `names`, as they were when it was begun. `bump` ends the epoch of a name:
from its return on, what belongs to an ended epoch is not there, and what was begun in it is not stored. An epoch that
the store has lost is a new one. Values live at most `MAX_TTL_MS`, and epochs longer than that after their last use.

Rule 7: what is too large is not kept. Above `Bounds`, memory and SQLite forget the values that were stored first; a
claim is never pushed out. Redis and Valkey bound single values, and the rest by time.

Rule 8: entries are not exported. A copy of a storage begins without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol, runtime_checkable

import msgspec

from asgi_llm_guard.errors import ConfigurationError

__all__ = [
    "EPOCH_MS",
    "MAX_TTL_MS",
    "Bounds",
    "Entries",
    "Flights",
    "InFlight",
    "KeepsEntries",
    "Kept",
    "Leading",
    "check_entry",
    "check_space",
]

MAX_TTL_MS: Final = 30 * 86_400_000
"""No value is kept for longer."""

EPOCH_MS: Final = MAX_TTL_MS + 5 * 86_400_000
"""An epoch that nobody has asked for in this long is forgotten: nothing that belongs to it is left."""

_SEAL: Final = 16
_FIRST_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.25


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How much a space may keep."""

    max_value_bytes: int = 1024 * 1024
    """Longer values are not kept."""
    max_bytes: int = 64 * 1024 * 1024
    """All values together. Not kept by Redis and Valkey, which forget by time only."""
    max_entries: int = 100_000
    """All values together. Not kept by Redis and Valkey."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name}: expected a whole number from 1, got {value!r}")


class Kept(msgspec.Struct, frozen=True):
    """There is a value."""

    value: bytes
    note: str
    """What its leader said of it when it began."""
    age_ms: int
    """Since it was stored."""


class Leading(msgspec.Struct, frozen=True):
    """The caller is to make the value; then `store` it, or `abandon` the key."""


class InFlight(msgspec.Struct, frozen=True):
    """Somebody else is making the value."""

    note: str
    """What that leader said when it began."""
    left_ms: int
    """Its claim ends after this long, unless it prolongs it."""


class Entries(Protocol):
    """One space of a storage. See the rules at the top of this file. From any thread that runs an event loop.

    Every operation raises `StorageError` where the store does not answer; its outcome is then unknown.
    """

    @property
    def bounds(self) -> Bounds: ...

    async def find(self, key: str) -> Kept | None:
        """The value, if there is one. Changes nothing."""
        ...

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        """The value; or the claim to make it, for `claim_ms`; or the word that somebody else has that.

        `names` belong to the key: each time the same ones. `note` is told to those who come later. `fresh`: a value
        that is there is not good enough; it goes, and the caller leads.
        """
        ...

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        """Let the claim of `token` last for `claim_ms` from now; whether it does. One that has ended, by its time or
        with the epoch of a name, does not come back."""
        ...

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        """Keep the value for `ttl_ms`; whether it is kept. It is not if `token` does not lead, if the epoch of a
        name has ended meanwhile, or if it is longer than the bounds say. Either way the claim is over."""
        ...

    async def abandon(self, key: str, token: str) -> None:
        """There will be no value: the next one that begins leads."""
        ...

    async def forget(self, key: str) -> None:
        """Drop what there is under the key: its value, or its claim."""
        ...

    async def bump(self, name: str) -> None:
        """End the epoch of `name`."""
        ...


@runtime_checkable
class KeepsEntries(Protocol):
    """A storage that can keep entries."""

    def entries(self, space: str, bounds: Bounds | None = None, /) -> Entries:
        """The space of this name. Cheap; touches nothing that is kept. `bounds`: from now on; `None`: as they are.

        Raises:
            ConfigurationError: this storage cannot keep them after all, or the name is not made of a-z and `_`.
        """
        ...


def check_entry(*, ttl_ms: int) -> None:
    """Refuse what no storage takes.

    Raises:
        ValueError: the time is not from 1 ms to `MAX_TTL_MS`.
    """
    if not 0 < ttl_ms <= MAX_TTL_MS:
        raise ValueError(f"entries: a time must be from 1 to {MAX_TTL_MS} ms, got {ttl_ms}")


def check_space(space: str) -> str:
    """The name of a space.

    Raises:
        ConfigurationError: it is not made of a-z and `_`.
    """
    if not space or not set(space) <= set("abcdefghijklmnopqrstuvwxyz_"):
        raise ConfigurationError(f"entries: a space is named by letters a-z and _, got {space!r}")
    return space


class Flights:
    """Single-flight on `entries`: who does not lead can wait for who does.

    Leaders of this process wake their followers at once; those of others are found by asking again, after 5 ms and
    then ever more rarely, at most every 250 ms. Values are kept with a digest: one that was damaged where it is kept is as
    if it had never been.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self._sleepers: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]] = {}
        self._lock = threading.Lock()
        self.waiting = 0
        """How many wait for others just now."""

    async def join(
        self,
        key: str,
        token: str,
        *,
        claim_ms: int,
        wait_s: float,
        names: Sequence[str] = (),
        note: str = "",
        fresh: bool = False,
        waiting: Callable[[], object] | None = None,
    ) -> Kept | Leading | InFlight:
        """As `Entries.begin`; where somebody else leads, wait for the value up to `wait_s` seconds.

        Whoever waits takes over from a leader that gave up. `InFlight`: it was not made in time, or its leader's
        note is another one than `note`, so that it is of no use here. `waiting` is called each time when there is
        a wait.
        """
        loop = asyncio.get_running_loop()
        deadline_s, pause_s = loop.time() + wait_s, _FIRST_PAUSE_S
        while True:
            sleeper = self._sleep(key, loop)
            try:
                found = await self.entries.begin(key, token, claim_ms=claim_ms, names=names, note=note, fresh=fresh)
                if isinstance(found, Kept):
                    value = _opened(found.value)
                    if value is not None:
                        return Kept(value, found.note, found.age_ms)
                    fresh = True
                    continue
                left_s = deadline_s - loop.time()
                if not isinstance(found, InFlight) or found.note != note or left_s <= 0:
                    return found
                fresh = False  # what is stored from now on is
                if waiting is not None:
                    waiting()
                await self._wait(sleeper, min(left_s, pause_s * random.uniform(0.75, 1)))  # noqa: S311 - not a secret
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            finally:
                self._awake(key, loop, sleeper)

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        """As `Entries.store`."""
        try:
            return await self.entries.store(key, token, _sealed(value), ttl_ms=ttl_ms)
        finally:
            self._wake(key)

    async def abandon(self, key: str, token: str) -> None:
        """As `Entries.abandon`."""
        try:
            await self.entries.abandon(key, token)
        finally:
            self._wake(key)

    async def _wait(self, sleeper: asyncio.Future[None], timeout_s: float) -> None:
        with self._lock:
            self.waiting += 1
        try:
            await asyncio.wait((sleeper,), timeout=timeout_s)
        finally:
            with self._lock:
                self.waiting -= 1

    def _sleep(self, key: str, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        # Before the store is asked: a leader that ends in between wakes this one, too.
        sleeper: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._sleepers.setdefault(key, set()).add((loop, sleeper))
        return sleeper

    def _awake(self, key: str, loop: asyncio.AbstractEventLoop, sleeper: asyncio.Future[None]) -> None:
        sleeper.cancel()
        with self._lock:
            sleepers = self._sleepers[key]
            sleepers.discard((loop, sleeper))
            if not sleepers:
                del self._sleepers[key]

    def _wake(self, key: str) -> None:
        with self._lock:
            sleepers = tuple(self._sleepers.get(key, ()))
        for loop, sleeper in sleepers:
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile: nobody waits there
                loop.call_soon_threadsafe(_done, sleeper)


def _sealed(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_SEAL).digest() + value


def _opened(sealed: bytes) -> bytes | None:
    value = sealed[_SEAL:]
    return value if sealed == _sealed(value) else None


def _done(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
