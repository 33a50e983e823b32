"""What a process does for its guard's ledger: take records over, sum them up, forget what is too old, count refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Event, Observer, emit
from asgi_llm_guard.ledger.book import Ledger
from asgi_llm_guard.ledger.drain import Drain
from asgi_llm_guard.ledger.refusals import RefusalDrain, RefusalTally
from asgi_llm_guard.ledger.values import Retention
from asgi_llm_guard.storage.base import KeepsLedger, Storage
from asgi_llm_guard.storage.shared import KeepsShared, Shared
from asgi_llm_guard.storage.streams import KeepsStreams

__all__ = ["Bookkeeping", "Keeping", "attach", "open_ledger"]

FLUSH_S: Final = 2.0
DRAIN_S: Final = 2.0
ROLL_UP_S: Final = 10.0
RETAIN_S: Final = 3_600.0
_STEPS: Final = 25
"""So many steps of a drain follow each other while there is more to take."""
_PATIENCE: Final = 60
"""So many times in a row it may be another process's turn."""


class Chores(Protocol):
    """What does things from time to time."""

    def add(self, name: str, every_s: float, work: Callable[[], Awaitable[object]], *, last: bool = False) -> None: ...


class Watched(Protocol):
    """Who is told events."""

    @property
    def observers(self) -> Sequence[Observer]: ...


class Keeping(Protocol):
    """Whose ledger it is: a `Guard`."""

    @property
    def engine(self) -> Watched: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def beat_ms(self) -> int | None: ...

    @property
    def skew_ms(self) -> int: ...

    @property
    def chores(self) -> Chores: ...

    def observe(self, observer: Observer, /) -> Callable[[], None]: ...


class Bookkeeping:
    """What is done for a ledger. Every process may do all of it; where they share a storage, one does at a time.

    Args:
        own: the storage writes its records into the ledger's own tables, so that there is nothing to take over.
        store_ms: the instant by the storage's clock; `None`: not known yet.

    Raises:
        ConfigurationError: the storage has no streams, though it is not the ledger's own.
    """

    def __init__(
        self,
        ledger: Ledger,
        storage: Storage,
        *,
        own: bool,
        clock: Clock,
        store_ms: Callable[[], int | None],
        observers: Sequence[Observer] = (),
    ) -> None:
        self.ledger = ledger
        self.behind = 0
        """How many records were left to take over when this process looked last."""
        self._store_ms = store_ms
        self._passed: Counter[str] = Counter()
        self._mine: dict[str, int] = {}
        self._shared: Shared | None = storage.shared() if isinstance(storage, KeepsShared) else None
        self._drain = None if own else Drain(storage, ledger, observers=observers)
        self.tally = None if self._shared is None else RefusalTally(self._shared, clock=clock)
        self._refusals = (
            RefusalDrain(self._shared, ledger, source="refusals:own", clock=clock) if own and self._shared else None
        )

    async def flush(self) -> None:
        """Hand on the refusals that this process has counted."""
        if self.tally is not None:
            await self.tally.flush()

    async def drain(self) -> None:
        """Take over what the storage has of new records."""
        if self._drain is None or not await self._turn("drain", DRAIN_S):
            return
        for _ in range(_STEPS):
            self.behind = (await self._drain.step()).behind
            if not self.behind:
                return

    async def roll_up(self) -> None:
        """Add to the sums what is not in them yet."""
        if not await self._turn("roll-up", ROLL_UP_S):
            return
        if self._refusals is not None:
            await self._refusals.step()
        while await self.ledger.roll_up():
            pass

    async def retain(self) -> None:
        """Forget what is too old."""
        if await self._turn("retention", RETAIN_S):
            await self.ledger.retain()

    async def catch_up(self) -> None:
        """Do all of it now, whoever else does: for tests, and before a report that must not lag."""
        await self.flush()
        if self._drain is not None:
            await self._drain.run()
            await self._drain.refusals()
        if self._refusals is not None:
            await self._refusals.step()
        while await self.ledger.roll_up():
            pass

    async def _turn(self, what: str, every_s: float) -> bool:
        """Whether it is this process's turn: one of them is enough, and in doubt two do no harm."""
        now_ms = self._store_ms()
        if self._shared is None or now_ms is None:
            return True
        until_ms = now_ms + round(every_s * 900)  # a little less than the pause
        if now_ms < self._mine.get(what, 0) <= until_ms:  # once more at the end: nobody else would do it before that
            return True
        if not await self._shared.mark(f"ledger {what}", until_ms=until_ms):
            self._passed[what] += 1
            # A clock that was set may have made the mark, or what is known of it.
            if self._passed[what] <= _PATIENCE:
                return False
        else:
            self._mine[what] = until_ms
        del self._passed[what]
        return True


def open_ledger(given: Ledger | Retention | str | None, storage: Storage, *, clock: Clock) -> Ledger | None:
    """The ledger of a guard with this storage; `None`: it was told of none, and the storage has none of its own.
    A `Retention` is that of the storage's own.

    Raises:
        ConfigurationError: it is neither a ledger nor the URL of one, or another one than the storage's own.
    """
    own = storage.ledger_url if isinstance(storage, KeepsLedger) else None
    if given is None or isinstance(given, Retention):
        return None if own is None else Ledger.open(own, clock=clock, retention=given)
    if not isinstance(given, Ledger | str):
        raise ConfigurationError(f"ledger: expected a URL such as 'postgresql://…' or a Ledger, got {given!r}")
    ledger = Ledger.open(given, clock=clock) if isinstance(given, str) else given
    if own is not None and not isinstance(storage, KeepsStreams) and ledger.database.place != own:
        raise ConfigurationError(
            f"ledger: this storage writes its records into its own file, which is the ledger ({own}); "
            f"leave ledger out, or give one of that file; got {ledger.database.place}"
        )
    return ledger


def attach(guard: Keeping, ledger: Ledger, storage: Storage) -> Bookkeeping:
    """Have the guard's process do what is to be done for the ledger, from time to time.

    Raises:
        ConfigurationError: the storage has no records that could be taken over.
    """
    own = isinstance(storage, KeepsLedger) and not isinstance(storage, KeepsStreams)

    def tell(event: Event) -> None:
        emit(guard.engine.observers, event)

    def store_ms() -> int | None:
        return None if guard.beat_ms is None else guard.clock.now_ms() + guard.skew_ms

    books = Bookkeeping(ledger, storage, own=own, clock=guard.clock, store_ms=store_ms, observers=(tell,))
    if books.tally is not None:
        guard.observe(books.tally)
        guard.chores.add("refusals", FLUSH_S, books.flush, last=True)
    if not own:
        guard.chores.add("drain", DRAIN_S, books.drain, last=True)
    guard.chores.add("roll-up", ROLL_UP_S, books.roll_up)
    guard.chores.add("retention", RETAIN_S, books.retain)
    return books
