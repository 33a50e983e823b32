"""The storage protocol, and the rules that every storage keeps.

A storage keeps *meters* (counters under a limit), *holds* (what open calls have taken),
*owners* (whose heartbeats keep holds alive) and the *ledger* (usage records).

Rule 1: `reserve` is all-or-nothing over an ordered list of claims, in one atomic step. A
refused plan changes nothing: no counter, no window start, no distinct id.

Rule 2: a claim fits iff `used + held + amount <= limit`. Used (settled) and held are kept
apart; their sum is what is enforced.

Rule 3: a call id is reserved once and settled once. Reserving an open one again returns the
same receipts (`replayed`); reserving one that has ended returns `Ended`. The second settlement
changes nothing, whatever it says.

Rule 4: `settle` is unconditional. An actual amount above the held one is debited in full, even
past the limit, and reported as overage. It never fails for lateness. It charges the window
instance that was pinned by `reserve`; if that instance is over, no other one is touched. The
usage record is appended in the same atomic step, once per call id.

Rule 5: an owner that has sent no heartbeat for `lapse_ms` has lapsed. `heartbeat` (by any owner)
expires every hold of lapsed owners, and so does a `reserve` that would otherwise be refused:
held amounts become used ones (meters with `expiry_charge="nothing"`: are given back), slots are
freed, and one record with outcome `expired` and the held cost is appended for each hold that has
a draft. Expiring is idempotent. A settlement that comes after it debits `actual - held` where
positive, and puts its record, flagged `late`, in the place of the estimate. A `reserve` or
`amend` by an owner that has itself lapsed expires first, then registers the owner anew; its next
heartbeat still tells it so, for a day after the lapse.

Rule 6: settling a call id that was never reserved leaves a tombstone, so that a reserve that was
overtaken by its own cancellation is refused. With receipts, the actuals are charged (`lost`).
Tombstones live for `tombstone_ms`; the ledger's unique call id guards beyond that: a call id that
only the ledger knows has been settled.

Rule 7: the storage's own clock decides. A clock that steps back never reopens a window instance
and never refills a bucket. What has ended may be forgotten: windows that hold nothing ten minutes
after their end, tombstones and distinct ids at once. A clock that steps back across that much finds
either.

Rule 8: a hold handed over by `settle` is settled before any later `reserve` of the same process
is decided.

Rule 9: shadow claims (`enforce=False`) never refuse. They are taken iff they fit and the plan is
granted, and are settled and expired like any other; `Receipt.taken` says which.

Rule 10: the same operations at the same instants give the same replies, bit for bit, on every
storage.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, runtime_checkable

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.usage import UsageRecord

if TYPE_CHECKING:
    from asgi_llm_guard.policies.base import Policy

__all__ = [
    "LAPSE_MS",
    "TOMBSTONE_MS",
    "Bundle",
    "Completed",
    "Interruptible",
    "KeepsLedger",
    "Leasing",
    "LossAware",
    "Pending",
    "Plan",
    "Selective",
    "Storage",
    "Verbs",
]

LAPSE_MS: Final = 15_000
"""An owner lapses this long after its last heartbeat; heartbeats come every third of it."""

TOMBSTONE_MS: Final = 600_000
"""How long a call id is remembered after it has ended."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """The answer to something that was already handed over. May be awaited, asked for, or let go."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> T_co:
        """Block until it is there, at most `timeout` seconds. For synchronous code only.

        Raises:
            StorageError: the outcome is unknown.
        """
        ...

    def add_done_callback(self, callback: Callable[[Pending[T_co]], object], /) -> None:
        """Call `callback(self)` when it is done: at once if it is, else from the storage's thread or loop."""
        ...

    def __await__(self) -> Generator[object, None, T_co]: ...


class Completed:
    """A `Pending` that was done at once."""

    __slots__ = ("_value",)

    def __init__(self, value: tuple[Settled, ...]) -> None:
        self._value = value

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:  # noqa: ARG002
        return self._value

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        callback(self)

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        return self._value
        yield  # pragma: no cover - makes this a generator; never reached


class Verbs(Protocol):
    """What is asked of a storage for calls, or for those that hold something: see `Storage`."""

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended: ...

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended: ...

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]: ...

    async def heartbeat(self, owner: str) -> Heartbeat: ...


class Storage(Protocol):
    """The verbs. See the rules at the top of this file."""

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        """Take every claim of the first plan that fits, or none of any.

        All plans use the same call ids. The owner is registered (its lapse starts now) if it is new.

        Raises:
            StorageError: the outcome is unknown; the caller must not assume "refused". Ask again with
                the same call ids, or settle them without receipts.
        """
        ...

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        """Replace the claims (and the draft) of the open hold `bundle.call_id`, or change nothing.

        The hold is then `owner`'s. A claim that was taken on the same meter with the same amount, under
        no lower limit, keeps its receipt and its pinned window.
        A claim on the same meter with another amount or a lower limit is judged and changed in the
        pinned window if that is still the current one, else taken whole from the current one. Meters that are no longer
        claimed are given back. Fitting is judged as if the old hold were not there.

        Raises:
            StorageError: as `reserve`.
        """
        ...

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Settle several call ids in one atomic step. Handed over when this returns, not awaited.

        May be called from any thread and without a running event loop.
        """
        ...

    async def heartbeat(self, owner: str) -> Heartbeat:
        """Keep all holds of `owner` alive for `LAPSE_MS`; expire those of lapsed owners.

        An owner that lapsed is registered anew by its heartbeat.
        """
        ...

    async def retire(self, owner: str) -> None:
        """The owner ends in good order: what it still holds is expired at once, as if it had lapsed."""
        ...

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        """The state of each meter; 0 and 0 for one that was never used."""
        ...

    async def reset(self, meters: Sequence[Meter]) -> None:
        """Set the used amount of each meter to 0 and start its window anew. Open holds stay held.

        An instance (or sub-bucket) of which something is held keeps its pin, so what was pinned to it
        still settles into it; one of which nothing is held is over.
        """
        ...

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        """Usage records admitted at or after `since_ms`, oldest first, at most `limit`."""
        ...

    def export(self) -> AsyncIterator[bytes]:
        """All state as JSON lines: a header with the schema version, meters, holds, ids, tombstones, records,
        and a last line with their counts and sums."""
        ...

    async def load(self, lines: Iterable[bytes]) -> None:
        """Take over an export into an empty storage.

        Raises:
            StorageError: this storage is not empty, the schema is another one, or the sums do not agree;
                nothing was taken over.
        """
        ...

    async def open_holds(self) -> int:
        """How many holds are open, over all owners."""
        ...

    async def aclose(self) -> None:
        """Finish what was handed over, then let go of files and threads. The storage cannot be used again."""
        ...


@runtime_checkable
class Selective(Protocol):
    """A storage that keeps only some kinds of meters. A guard shows it every policy when it is bound."""

    def check(self, policies: Sequence[Policy], /) -> None:
        """Accept the policies.

        Raises:
            ConfigurationError: names the first policy that it cannot keep, and why.
        """
        ...


class Leasing(Storage, Protocol):
    """A storage that may grant by itself what was reserved beforehand, also while the store is away."""

    def admit(self, owner: str, plan: Plan, /) -> Granted | None:
        """Grant the whole plan without asking the store, or change nothing. In an event loop; never waits."""
        ...

    def abandon(self) -> None:
        """The store has lost its data: neither spend nor return what was reserved beforehand."""
        ...


@runtime_checkable
class Interruptible(Protocol):
    """A storage that knows by itself whether it is there: one behind a wire, which finds out in the background."""

    def available(self) -> bool:
        """Whether asking is worth while. Cheap, never waits; from any thread.

        `False`: no operation would reach the store now, so none is tried for a request.
        """
        ...


@runtime_checkable
class KeepsLedger(Protocol):
    """A storage whose ledger is where it is told itself, so that none has to be named."""

    @property
    def ledger_url(self) -> str:
        """The database of the ledger. One that it writes its records into itself, unless it `KeepsStreams`."""
        ...


@runtime_checkable
class LossAware(Protocol):
    """A storage that notices when its data was flushed or rolled back.

    From then on `reserve` and `amend` raise `DataLost` and take nothing, until `accept_loss`. `settle` goes on:
    what a call has used is charged to the data that there is.
    """

    @property
    def epoch(self) -> str:
        """Names the data that this storage goes by: another one after each accepted loss."""
        ...

    async def accept_loss(self) -> None:
        """Go by the data that there is. Where nothing was lost, nothing changes.

        Raises:
            StorageError: the store does not answer; nothing was accepted.
        """
        ...
