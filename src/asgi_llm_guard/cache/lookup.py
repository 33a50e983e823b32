"""What a look-up has found, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Final, Literal, Protocol, Self

import msgspec

from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.cache.answers import ProviderAnswer, unfit
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.entries import Flights, InFlight, Kept, Leading
from asgi_llm_guard.usage import Usage

__all__ = ["CLAIM_MS", "Entry", "Lookup", "State", "Target", "decode"]

CLAIM_MS: Final = 15_000
"""A leader that died stands in the way for so long. One that lives prolongs its claim three times in it."""

State = Literal["hit", "lead", "pass"]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What is kept."""

    partition: str
    """For whom it was made."""
    request: bytes
    """Of what it is the answer."""
    status: int
    content_type: str
    body: bytes
    usage: Usage | None
    """What the call had used."""


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Entry).decode


class Target(msgspec.Struct, frozen=True):
    """Where an answer is looked for, and under what it is kept."""

    key: str
    partition: str
    request: bytes
    names: tuple[str, ...]
    ttl_ms: int
    stream: bool = False


_NOWHERE: Final = Target("", "", b"", (), 0)


class Keeper(Protocol):
    """The cache."""

    @property
    def flights(self) -> Flights: ...

    def stored(self, reason: str | None) -> bool:
        """Count an answer that was stored, or was not for a `reason`; whether it was."""
        ...

    def soon(self, work: Coroutine[None, None, None]) -> None:
        """Have it done; nobody waits for it."""
        ...


class Lookup:
    """What a look-up has found. As a block (`with lookup:`), a lead is let go of at the end, unless an answer was stored."""

    def __init__(self, cache: Keeper, call: ActiveCall, target: Target = _NOWHERE) -> None:
        self.state: State = "pass"
        self._leading = False
        self.answer: ProviderAnswer | None = None
        """What was kept, on a hit."""
        self.age_ms = 0
        """Since it was stored, on a hit."""
        self.waited = False
        """Another call was asking the same just then."""
        self._cache = cache
        self._call = call
        self._target = target
        self._token = call.admission.engine.new_id()
        self._stop: Callable[[], object]
        self._pieces: list[bytes] = []
        self._length = 0
        self._head = (0, "")

    @property
    def hit(self) -> bool:
        """Whether `answer` is to be given, and no call made. The call has ended."""
        return self.state == "hit"

    @property
    def leads(self) -> bool:
        """Whether the answer of the call that is made now may still be stored."""
        return self._leading

    async def store(self, answer: ProviderAnswer) -> bool:
        """Keep the answer, if it may be kept; whether it is. Only for one that arrived to its end, whose call has
        recorded its usage.

        Never raises for the cache's sake: what is not stored is counted, with the reason.
        """
        if not self.leads:
            return False
        reason = unfit(answer, stream=self._target.stream)
        if reason is not None:
            self.refuse(reason)
            return False
        return await self.store_judged(answer)

    async def store_judged(self, answer: ProviderAnswer) -> bool:
        """As `store`, of what is known to be complete."""
        target = self._target
        if not self.leads:
            return False
        self._end()
        entry = Entry(
            target.partition, target.request, answer.status, answer.content_type, answer.body, self._call.usage
        )
        reason = None
        try:
            if not await self._cache.flights.store(target.key, self._token, encode(entry), ttl_ms=target.ttl_ms):
                reason = "it is too large, came too late, or was revoked meanwhile"
        except StorageError:
            reason = "the storage does not answer"
        except BaseException:  # cancelled on the way
            self._let_go()
            raise
        return self._cache.stored(reason)

    def answered(self, status: int, content_type: str) -> None:
        """The head of the answer has come. Its body is to be told by `feed`, up to `finish`."""
        self._head = (status, content_type)

    def feed(self, piece: bytes) -> None:
        """A piece of the answer's body, decoded. Nothing is remembered of one that will not be kept."""
        if self.leads:
            self._length += len(piece)
            if self._length > self._cache.flights.entries.bounds.max_value_bytes:
                self._pieces.clear()
                self.refuse("it is too large")
            else:
                self._pieces.append(piece)

    def finish(self) -> None:
        """The body has come to its end, and the call has recorded its usage: keep the answer, if it may be kept.

        Handed over, not waited for.
        """
        if self.leads:
            status, content_type = self._head
            body = b"".join(self._pieces)
            self._pieces.clear()
            self._cache.soon(self._store(ProviderAnswer(status=status, content_type=content_type, body=body)))

    async def _store(self, answer: ProviderAnswer) -> None:
        await self.store(answer)

    def refuse(self, reason: str) -> None:
        """The answer is not kept, for this reason."""
        if self.leads:
            self.abandon()
            self._cache.stored(reason)

    def abandon(self) -> None:
        """There is no answer to be stored: whoever waits for it takes over. May be called more than once, from any
        thread, and after `store`."""
        if self.leads:
            self._end()
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    # ------------------------------------------------------------------------- for the cache

    async def join(self, *, wait_s: float, fresh: bool) -> Kept | Leading | InFlight:
        """Ask the storage, and wait for who leads.

        Raises:
            StorageError: it does not answer.
        """
        target = self._target
        try:
            return await self._cache.flights.join(
                *(target.key, self._token),
                claim_ms=CLAIM_MS, wait_s=wait_s, names=target.names, note=target.partition, fresh=fresh,
                waiting=self._waits,
            )  # fmt: skip
        except BaseException:
            self._let_go()  # it may have the lead, and nobody will use it
            raise

    def _waits(self) -> None:
        self.waited = True

    def lead(self) -> None:
        """The storage has given the lead: keep it until there is an answer."""
        self.state = "lead"
        self._leading = True
        loop = asyncio.get_running_loop()
        renewing = loop.create_task(_renew(weakref.ref(self)))
        self._stop = lambda: _cancel(loop, renewing)

    async def prolong(self) -> None:
        """Say that the leader lives."""
        if self.leads:
            with contextlib.suppress(StorageError):  # the next time may do
                entries = self._cache.flights.entries
                if not await entries.prolong(self._target.key, self._token, claim_ms=CLAIM_MS):
                    self._end()  # it came too late, or was revoked

    def forget(self) -> None:
        """What is kept here is of no use."""
        self._cache.soon(_forgotten(self._cache.flights, self._target.key))

    def give(self, entry: Entry, age_ms: int) -> None:
        """It is a hit."""
        self.state = "hit"
        self.age_ms = age_ms
        self.answer = ProviderAnswer(status=entry.status, content_type=entry.content_type, body=entry.body)

    def _end(self) -> None:
        self._leading = False
        self._pieces.clear()
        self._stop()

    def _let_go(self) -> None:
        self._cache.soon(_abandoned(self._cache.flights, self._target.key, self._token))


async def _abandoned(flights: Flights, key: str, token: str) -> None:
    with contextlib.suppress(StorageError):  # the claim ends by itself
        await flights.abandon(key, token)


async def _forgotten(flights: Flights, key: str) -> None:
    with contextlib.suppress(StorageError):  # it ends by itself
        await flights.entries.forget(key)


async def _renew(lookup: weakref.ref[Lookup], pause_s: float = CLAIM_MS / 3000) -> None:
    # By a weak reference: a look-up that nobody has any more is not kept alive, and its claim ends.
    while True:
        await asyncio.sleep(pause_s)
        leader = lookup()
        if leader is None or not leader.leads:
            return
        await leader.prolong()
        del leader


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    if asyncio._get_running_loop() is loop:  # noqa: SLF001 - the documented way to ask without an exception
        task.cancel()
    else:
        with contextlib.suppress(RuntimeError):  # that loop was closed, and the task with it
            loop.call_soon_threadsafe(task.cancel)
