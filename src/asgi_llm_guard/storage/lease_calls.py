"""What a process knows of call ids that have leased claims: values, and how answers are put together."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Plan, Receipt, Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.storage.lease_book import Book, Lease, Slot

__all__ = [
    "Answering",
    "Asked",
    "Call",
    "Calls",
    "Change",
    "Fetch",
    "Gone",
    "Parts",
    "Reply",
    "cancels",
    "claims_of",
    "confirm",
    "forgotten",
    "refused_states",
    "replayed",
    "unheard",
]

_PURGE: Final = 2
"""So many ended calls are looked at for each one that ends."""

Parts = list[Lease | None]
"""For each claim of a plan the lease that it was taken from; `None`: the store was asked."""


class Call(msgspec.Struct, gc=False):
    """One open call some claims of which may be leased."""

    owner: str
    bundle: Bundle
    parts: Parts
    receipts: tuple[Receipt, ...]
    plan: int = 0
    """Which of the offered plans was granted."""
    inner: bool = False
    """The store may know of it, and has to be told of its end."""
    beats: int = 0
    """How many heartbeats have seen it open."""
    expired: bool = False
    """Its leased claims were charged as they were held: more can only be added to that."""
    until_ms: int = 0
    """When it may be forgotten, if it has expired."""

    def rest(self) -> tuple[Claim, ...]:
        """The claims that the store holds."""
        return tuple([claim for claim, lease in zip(self.bundle.claims, self.parts, strict=True) if lease is None])


class Asked:
    """Calls that the store is being asked about, or was, without an answer."""

    __slots__ = ("offers", "owner", "plans", "rest", "settled", "unknown")

    def __init__(self, owner: str, plans: Sequence[Plan], offers: list[Parts]) -> None:
        self.owner = owner
        self.plans = plans
        self.offers = offers
        """For each plan what was taken from leases."""
        self.rest = _rest(plans, offers)
        """What of each plan the store is asked for."""
        self.settled = False
        """It was answered, or one of its calls settled: nothing of the offers is taken in its name any more."""
        self.unknown = False
        """The store may have granted it, without an answer."""

    def ask_for(self, plans: Sequence[Plan]) -> None:
        """Ask again; where the claims are on the same meters, on the terms that are named now."""
        if [_keys(plan) for plan in plans] == [_keys(plan) for plan in self.plans]:
            self.plans = plans
            self.rest = _rest(plans, self.offers)


def _keys(plan: Plan) -> list[tuple[str, list[tuple[str, int]]]]:
    return [(bundle.call_id, [(claim.meter.key, claim.amount) for claim in bundle.claims]) for bundle in plan]


def _rest(plans: Sequence[Plan], offers: Sequence[Parts]) -> list[Plan]:
    """What leases do not have. Bundles with a draft are always among it, since the trip is made anyway."""
    claims: list[list[tuple[Claim, ...]]] = []
    needed = [bundle.draft is not None for bundle in plans[0]]
    for plan, parts in zip(plans, offers, strict=False):
        leases = iter(parts)
        rest = [tuple([claim for claim in bundle.claims if next(leases) is None]) for bundle in plan]
        claims.append(rest)
        needed = [need or bool(some) for need, some in zip(needed, rest, strict=True)]
    return [
        tuple(
            [
                Bundle(bundle.call_id, some, bundle.draft)
                for bundle, some, need in zip(plan, rest, needed, strict=True)
                if need
            ]
        )
        for plan, rest in zip(plans, claims, strict=False)
    ]


class Reply(msgspec.Struct, gc=False):
    """How to answer one settlement: as the store answers number `index` of what was handed over."""

    call_id: str
    index: int | None
    """`None`: what was handed over are only additions."""
    leased: tuple[bool, ...] = ()
    """For each claim whether it is leased; none: the store's answer stands."""
    overages: tuple[int, ...] = ()
    """For each claim, as far as it is leased."""

    def behind(self, others: int) -> Reply:
        """The same, where so many others are handed over before."""
        index = None if self.index is None else self.index + others
        return Reply(self.call_id, index, self.leased, self.overages)

    def of(self, settled: Sequence[Settled]) -> Settled:
        """The answer, from those of the store."""
        if self.index is None:
            return Settled(self.call_id, "settled", self.overages)
        answer = settled[self.index]
        if not self.leased or answer.status == "duplicate":
            return answer
        theirs = iter(answer.overages)
        overages = [
            mine if leased else next(theirs, 0) for leased, mine in zip(self.leased, self.overages, strict=True)
        ]
        # The store has never heard of a call whose claims are all leased: it has lost nothing.
        status = "settled" if answer.status == "lost" and all(self.leased) else answer.status
        return Settled(self.call_id, status, tuple(overages))


class Gone(msgspec.Struct, gc=False):
    """A call id that is spent."""

    reason: Literal["settled", "cancelled"]
    until_ms: int
    """It is known for so long."""
    foreign: bool = False
    """It was cancelled before anything was known of it here: the store says what that meant."""
    unsent: tuple[Settlement, ...] = ()
    """What the store has not confirmed; handed over again if the call is settled again."""
    reply: Reply | None = None
    """How to answer with what the store says of it."""
    overages: tuple[int, ...] = ()


class Calls:
    """The calls of one process by their ids. Whoever uses it holds the lock of the process's leases."""

    def __init__(self, book: Book, tombstone_ms: int) -> None:
        self.known: dict[str, Call | Asked | Gone] = {}
        self.tombstone_ms = tombstone_ms
        """How long an ended call id is known."""
        self._book = book
        self._line: deque[str] = deque()
        """Call ids that may be forgotten some time."""

    def are_new(self, plan: Plan, now_ms: int) -> bool:
        """Whether none of the call ids is known; forgets those that were known for long enough."""
        new = True
        for bundle in plan:
            known = self.known.get(bundle.call_id)
            if known is not None:
                if forgotten(known, now_ms):
                    del self.known[bundle.call_id]
                else:
                    new = False
        return new

    def open(self, owner: str, plan: Plan, parts: Parts, receipts: tuple[Receipt, ...], number: int) -> None:
        """Remember the calls of a plan."""
        if len(plan) == 1:
            self.known[plan[0].call_id] = Call(owner, plan[0], parts, receipts, number)
            return
        at = 0
        for bundle in plan:
            upto = at + len(bundle.claims)
            self.known[bundle.call_id] = Call(owner, bundle, parts[at:upto], receipts[at:upto], number)
            at = upto

    def of(self, owner: str | None = None) -> list[Call]:
        """The open calls of an owner, or of all."""
        return [
            call for call in self.known.values() if isinstance(call, Call) and (owner is None or call.owner == owner)
        ]

    def put_back(self, plans: Sequence[Plan], offers: Sequence[Parts], but: int | None = None) -> None:
        """Undo what was taken from leases for each plan, but for one of them."""
        for number, (plan, parts) in enumerate(zip(plans, offers, strict=False)):
            if number == but:
                continue
            for claim, lease in zip(claims_of(plan), parts, strict=False):
                if lease is not None:
                    lease.give_back(claim.amount)
                    self._book.freed(lease)

    def expire(self, call: Call, now_ms: int) -> None:
        """The store has ended the call: charge what it holds of leases as it was held."""
        if call.expired:
            return
        call.expired = True
        for claim, lease in zip(call.bundle.claims, call.parts, strict=True):
            if lease is not None:
                lease.settle(claim.amount, claim.amount)
                self._book.freed(lease)
        call.until_ms = now_ms + self.tombstone_ms
        self.end(call.bundle.call_id, call)

    def end(self, call_id: str, known: Gone | Call) -> None:
        """Remember that a call id is spent, and forget some that were long enough."""
        line, now_ms = self._line, known.until_ms - self.tombstone_ms
        for _ in range(_PURGE):
            if not line:
                break
            other = self.known.get(line[0])
            if other is not None and not forgotten(other, now_ms):
                if not (isinstance(other, Gone) and other.unsent):
                    break
                line.rotate(-1)  # it waits for the store, for as long as that takes
                continue
            self.known.pop(line.popleft(), None)
        self.known[call_id] = known
        line.append(call_id)

    def abandon(self) -> None:
        """The store has lost its data: nothing of what is open is known any more."""
        for call_id, known in tuple(self.known.items()):
            if isinstance(known, Asked):
                known.settled = True
            if not isinstance(known, Gone):
                del self.known[call_id]


class Fetch(NamedTuple):
    """A chunk that is to be asked for."""

    owner: str
    slot: Slot
    call_id: str
    meter: Meter
    size: int


class Change:
    """What `amend` does to leases: what it has taken for new claims, and what it gives back once that is granted."""

    __slots__ = ("backs", "kept", "parts", "takes")

    def __init__(self) -> None:
        self.parts: Parts = []
        self.kept: list[Receipt | None] = []
        """For each new claim its old receipt, if nothing changes for it."""
        self.takes: list[tuple[Lease, int]] = []
        self.backs: list[tuple[Lease, int]] = []

    def keep(self, lease: Lease, receipt: Receipt) -> None:
        self.parts.append(lease)
        self.kept.append(receipt)

    def adjust(self, lease: Lease, more: int) -> None:
        """Hold so much more of the same lease, or less."""
        self.parts.append(lease)
        self.kept.append(None)
        if more > 0:
            lease.give_back(-more)
            self.takes.append((lease, more))
        else:
            self.backs.append((lease, -more))

    def take(self, lease: Lease | None, amount: int) -> None:
        """`lease` was taken from; `None`: the store is asked."""
        self.parts.append(lease)
        self.kept.append(None)
        if lease is not None:
            self.takes.append((lease, amount))


class Answering:
    """The answers to settlements some of which were translated. A `Pending`."""

    __slots__ = ("_pending", "_replies")

    def __init__(self, pending: Pending[tuple[Settled, ...]], replies: Sequence[Settled | Reply]) -> None:
        self._pending = pending
        self._replies = replies

    def done(self) -> bool:
        return self._pending.done()

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        return self._of(self._pending.result(timeout))

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        self._pending.add_done_callback(lambda _: callback(self))

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        return self._of((yield from self._pending.__await__()))

    def _of(self, settled: Sequence[Settled]) -> tuple[Settled, ...]:
        return tuple([reply.of(settled) if isinstance(reply, Reply) else reply for reply in self._replies])


def claims_of(plan: Plan) -> Iterable[Claim]:
    if len(plan) == 1:
        return plan[0].claims
    return [claim for bundle in plan for claim in bundle.claims]


def replayed(calls: Sequence[Call], now_ms: int) -> Granted:
    return Granted(tuple([r for call in calls for r in call.receipts]), now_ms, calls[0].plan, True)


def refused_states(
    claims: Iterable[Claim], parts: Iterable[Lease | None], refused: Iterable[Receipt], now_ms: int
) -> tuple[Receipt, ...]:
    """The states of a plan that the store has refused: its own, and those of claims that leases had room for."""
    theirs = iter(refused)
    states = []
    for claim, lease in zip(claims, parts, strict=True):
        if lease is None:
            states.append(next(theirs))
        else:
            r = lease.granted(claim, now_ms)
            states.append(Receipt(claim, False, True, r.used, r.held, r.pin, r.resets_at_ms))
    return tuple(states)


def cancels(settlement: Settlement) -> bool:
    return not (settlement.actuals or settlement.receipts or settlement.debits) and settlement.record is None


def forgotten(known: Call | Asked | Gone, now_ms: int) -> bool:
    """Whether a call id has been spent for so long that it need not be known any more."""
    if isinstance(known, Gone):
        return now_ms >= known.until_ms and not known.unsent
    return isinstance(known, Call) and known.expired and now_ms >= known.until_ms


def unheard(call: Call) -> bool:
    """Whether the store does not know of an open call that would leave a record."""
    return not call.inner and not call.expired and call.bundle.draft is not None


def confirm(gone: Sequence[Gone], pending: Pending[tuple[Settled, ...]]) -> None:
    """The store has taken these settlements, or has failed to."""
    with contextlib.suppress(StorageError):
        pending.result()
        for known in gone:
            known.unsent = ()
