"""Leases for hot meters: a storage around a storage, which admits from chunks that this process holds.

Claims on meters with `lease` above 0 are taken from a chunk that was reserved beforehand (`lease_book.py`),
without asking the store; what else a plan claims is asked for in one trip, and if nothing is left to ask
for, there is none. The rules of `base.py` hold, with these additions:

Rule 1: a lease is an ordinary hold of the inner store on a chunk, under the owner that spends it, with a
call id of its own. The store counts the chunk whole, so `used + held <= limit` holds there as ever, and
what all processes together have admitted is never above it.

Rule 2: a plan is all or nothing. What fits into chunks is taken first, at once; if the store refuses the
rest, it is put back, and the refusal tells the store's numbers.

Rule 3: a claim that no chunk can serve is the store's to decide, with its own amount. Before a refusal that
what this process has left of its chunks would turn, that is given back, and the store asked once more. What
it has left besides does not count as held in a refusal.

Rule 4: the first claim on a meter goes to the store, and so do those that come before its chunk does; the
chunk is fetched beside it, and later ones before the last is spent. No admission ever waits for one.

Rule 5: a chunk belongs to one instance of its window (a sliding window: to one sub-bucket) and is spent before
that ends, by an upper bound of the store's clock. What comes back of it goes back into it.

Rule 6: a settled call is charged to the chunks that it was taken from. What is above its hold comes out of the
chunk too; what the chunk cannot cover is debited at once, in the window of the chunk. The usage record
is handed to the store with the settlement.

Rule 7: chunks that nobody has used between two heartbeats are returned, or shrunk to what open calls hold.
So are all of them by `retire` and `aclose`. Those of a process that dies stay charged, whatever
`expiry_charge` says: part of a chunk is what was settled already. A process that is told by its heartbeat
that it had lapsed stops spending what it held.

Rule 8: the store learns of an open call that has nothing but leased claims when it is older than a heartbeat.
If the process dies before, there is no record of the call; what it held is part of the chunk.

Rule 9: in receipts of leased claims, `used` and `held` are what the store said when it gave the chunk,
and what has come of the chunk since. `read` says what the store says: chunks count as held.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Final, cast

import msgspec

from asgi_llm_guard.claims import (
    Bundle,
    Claim,
    Ended,
    Granted,
    Heartbeat,
    Meter,
    Plan,
    Reading,
    Receipt,
    Refused,
    Settled,
    Settlement,
)
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.storage.base import TOMBSTONE_MS, Completed, LossAware, Pending, Storage
from asgi_llm_guard.storage.entries import Bounds, Entries, KeepsEntries
from asgi_llm_guard.storage.lease_book import Book, Lease, Slot, claimed_twice, lower
from asgi_llm_guard.storage.lease_calls import (
    Answering,
    Asked,
    Call,
    Change,
    Fetch,
    Gone,
    Parts,
    Reply,
    cancels,
    claims_of,
    confirm,
    forgotten,
    refused_states,
    replayed,
    unheard,
)
from asgi_llm_guard.storage.open_calls import newest, open_holds_of
from asgi_llm_guard.storage.shared import KeepsShared, ListsCalls, OpenCall, Shared
from asgi_llm_guard.storage.streams import KeepsStreams, RecordStream
from asgi_llm_guard.usage import UsageRecord

__all__ = ["LeasingStorage"]

_log = logging.getLogger("asgi_llm_guard.storage")

_PREFIX: Final = "lease:"
"""What the call ids of leases begin with."""

_PURGE: Final = 2  # ended calls looked at for each one that ends

Answer = Granted | Refused | Ended


class _Monotonic:
    """Time that no administrator sets."""

    __slots__ = ()

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


# ------------------------------------------------------------------------------------ storage


class LeasingStorage:
    """A `Storage` around `inner` that serves leased claims from chunks. May be used from several loops and threads.

    Plans without leased claims pass through. What leases cost: `docs/leases.md`.

    `workers`: about how many processes share the meters, until a heartbeat says how many are alive; chunks shrink
    to a fourth of each one's share of what is left. Too low a number strands more near a limit, and admits no more. `skew_ms`: how long before its
    window's end a chunk is not spent any more. `tombstone_ms`: how long an ended call id is known. `clock`: what
    passes between two answers of the store; a monotonic one unless a test gives its own.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        clock: Clock | None = None,
        workers: int = 8,
        skew_ms: int = 20,
        tombstone_ms: int = TOMBSTONE_MS,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("skew_ms", skew_ms, 0), ("tombstone_ms", tombstone_ms, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name}: expected a whole number from {least}, got {value!r}")
        self.inner = inner
        self._clock = clock or _Monotonic()
        self._workers = workers
        self._skew_ms = skew_ms
        self._tombstone_ms = tombstone_ms
        self._aware = inner if isinstance(inner, LossAware) else None
        self.begin_anew()
        _storages.add(self)

    def begin_anew(self) -> None:
        """Begin with no lease and no call, as in a process that was forked: they are its parent's."""
        self._lock = threading.Lock()
        self._book = Book(workers=self._workers, skew_ms=self._skew_ms)
        self._known: dict[str, Call | Asked | Gone] = {}
        self._line: deque[str] = deque()  # of call ids that may be forgotten some time
        self._unreturned: deque[Settlement] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._name = os.urandom(9).hex()
        self._numbers = itertools.count(1)
        self._synced = (0, 0)
        self._epoch = ""

    # ------------------------------------------------------------------------------------ time

    def _now(self) -> int:
        """The store's clock, or a little later.

        It was asked at `asked_ms` and answered no earlier, so it cannot have gone further than this. 1/1024 of what
        has passed is added, in case one of the two clocks is being slewed.
        """
        asked_ms, said_ms = self._synced
        passed_ms = self._clock.now_ms() - asked_ms
        return said_ms + passed_ms + (passed_ms >> 10)

    def _heard(self, asked_ms: int, answer: Answer) -> None:
        if not isinstance(answer, Refused):  # that may be remembered: said earlier than it was asked for
            self._synced = (asked_ms, answer.now_ms)
        self._see_epoch()

    def _see_epoch(self) -> None:
        """Where another process has accepted a loss, nobody is told: the store goes by data that has no chunk of this one."""
        if self._aware is not None:
            epoch = self._aware.epoch
            if self._epoch and epoch != self._epoch and self._book.leases:
                self.abandon()
            self._epoch = epoch

    # --------------------------------------------------------------------------------- reserve

    def reserve(self, owner: str, plans: Sequence[Plan]) -> Coroutine[Any, Any, Answer]:
        # Not `async`: what passes through shall not pay for a coroutine of ours.
        known = self._known
        for plan in plans:
            for bundle in plan:
                if bundle.call_id in known:
                    return self._reserve(owner, plans)
                for claim in bundle.claims:
                    if claim.meter.lease:
                        return self._reserve(owner, plans)
        return self.inner.reserve(owner, plans)

    def admit(self, owner: str, plan: Plan) -> Granted | None:
        """Grant a plan from leases, if they have all of it; else change nothing. Never asks the store."""
        empty = True
        for bundle in plan:
            for claim in bundle.claims:
                empty = False
                if not claim.meter.lease:
                    return None
        if empty:
            return None
        fetches: list[Fetch] = []
        granted = None
        with self._lock:
            now_ms = self._now()
            if self._new(plan, now_ms):
                offers = self._offer(owner, (plan,), now_ms)
                if None in offers[0]:
                    self._put_back((plan,), offers)
                else:
                    granted = self._grant(owner, plan, offers[0], now_ms, fetches)
        if fetches:
            self._fetch_soon(fetches)
        if self._book.due:
            self._return_due()
        return granted

    async def _reserve(self, owner: str, plans: Sequence[Plan]) -> Answer:
        fetches: list[Fetch] = []
        with self._lock:
            seen = self._begin(owner, plans, fetches)
        if fetches:
            self._fetch_soon(fetches)
        if self._book.due:
            self._return_due()
        if isinstance(seen, Granted):
            return seen
        if isinstance(seen, Asked):
            return await self._ask(seen)
        if isinstance(seen, list):
            return await self._ask_again(seen)
        if seen is None:
            return await self.inner.reserve(owner, plans)
        return seen

    def _begin(
        self, owner: str, plans: Sequence[Plan], fetches: list[Fetch]
    ) -> Granted | Ended | Asked | list[Call] | None:
        """Take from leases what they have: all of it, or what the store is to be asked for.

        Calls: they are open here, and the store is to be asked whether there as well. `None`: the store knows better.
        """
        first = plans[0]
        known = self._known
        now_ms = self._now()
        for bundle in first:
            if bundle.call_id in known:
                if not self._new(first, now_ms):
                    return self._seen(plans, now_ms)
                break
        offers = self._offer(owner, plans, now_ms)
        if None in offers[0]:
            return self._asked(owner, plans, offers)
        return self._grant(owner, first, offers[0], now_ms, fetches)

    def _grant(self, owner: str, plan: Plan, parts: Parts, now_ms: int, fetches: list[Fetch]) -> Granted:
        """Grant a plan all of which was taken from leases."""
        receipts = []
        for claim, lease in zip(claims_of(plan), parts, strict=True):
            assert lease is not None  # noqa: S101 - none of them is
            receipts.append(lease.granted(claim, now_ms))
            if lease.left < lease.low and lease.slot.fetching is None:
                self._want(fetches, lease.slot, owner, claim)
        granted = Granted(tuple(receipts), now_ms)
        self._open(owner, plan, parts, granted.receipts, 0)
        return granted

    def _new(self, plan: Plan, now_ms: int) -> bool:
        """Whether none of the call ids is known; forgets those that were known for long enough."""
        new = True
        for bundle in plan:
            known = self._known.get(bundle.call_id)
            if known is not None:
                if forgotten(known, now_ms):
                    del self._known[bundle.call_id]
                else:
                    new = False
        return new

    def _seen(self, plans: Sequence[Plan], now_ms: int) -> Granted | Ended | Asked | list[Call] | None:
        """What to say of call ids at least one of which is known."""
        plan = plans[0]
        calls: list[Call] = []
        for bundle in plan:
            known = self._known.get(bundle.call_id)
            if isinstance(known, Asked):
                known.ask_for(plans)
                return known
            if isinstance(known, Gone):
                return None if known.foreign else Ended(bundle.call_id, known.reason, now_ms)
            if known is not None:
                if known.expired:
                    return Ended(bundle.call_id, "expired", now_ms)
                calls.append(known)
        if len(calls) < len(plan):
            missing = next(bundle.call_id for bundle in plan if bundle.call_id not in self._known)
            raise ValueError(
                f"reserve: call ids are reserved together, but {missing!r} is not open and others of its plan are"
            )
        return calls if any(call.inner for call in calls) else replayed(calls, now_ms)

    def _offer(self, owner: str, plans: Sequence[Plan], now_ms: int) -> list[Parts]:
        """Take from leases what they have, for each plan up to the first that needs nothing else."""
        first = plans[0]
        if len(first) > 1 and len({bundle.call_id for bundle in first}) < len(first):
            raise ValueError("reserve: two bundles of one plan have the same call id")
        book = self._book
        slots = book.slots(owner)
        offers: list[Parts] = []
        try:
            for plan in plans:
                turn = book.next_turn()
                parts: Parts = []
                offers.append(parts)
                for bundle in plan:
                    for claim in bundle.claims:
                        lease = None
                        if claim.meter.lease:
                            slot = book.slot(slots, claim.meter, turn)
                            if slot.current is not None:
                                lease = book.take(slot, claim, now_ms)
                        parts.append(lease)
                if None not in parts:
                    break
        except ValueError:
            self._put_back(plans, offers)
            raise
        return offers

    def _put_back(self, plans: Sequence[Plan], offers: Sequence[Parts], but: int | None = None) -> None:
        """Undo what was taken from leases for each plan, but for one of them."""
        for number, (plan, parts) in enumerate(zip(plans, offers, strict=False)):
            if number == but:
                continue
            for claim, lease in zip(claims_of(plan), parts, strict=False):
                if lease is not None:
                    lease.give_back(claim.amount)
                    self._book.freed(lease)

    def _open(self, owner: str, plan: Plan, parts: Parts, receipts: tuple[Receipt, ...], number: int) -> None:
        """Remember the calls of a plan."""
        if len(plan) == 1:
            self._known[plan[0].call_id] = Call(owner, plan[0], parts, receipts, number)
            return
        at = 0
        for bundle in plan:
            upto = at + len(bundle.claims)
            self._known[bundle.call_id] = Call(owner, bundle, parts[at:upto], receipts[at:upto], number)
            at = upto

    # ------------------------------------------------------------------------- asking the store

    def _asked(self, owner: str, plans: Sequence[Plan], offers: list[Parts]) -> Asked:
        asked = Asked(owner, plans, offers)
        for bundle in plans[0]:
            self._known[bundle.call_id] = asked
        return asked

    async def _ask(self, asked: Asked) -> Answer:
        """The store's answer to the rest, together with what was taken from leases.

        If that is not known (`StorageError`, cancellation), what was taken stays taken: the caller asks again, or
        settles.
        """
        try:
            answer = await self._insist(asked.owner, lambda: self.inner.reserve(asked.owner, asked.rest))
        except BaseException as error:
            if isinstance(error, StorageError) and not error.sent and not asked.unknown:
                with self._lock:
                    self._never_asked(asked)
            else:
                asked.unknown = True
            if isinstance(error, DataLost):
                self.abandon()
            raise
        fetches: list[Fetch] = []
        with self._lock:
            orphans: list[Settlement] = []
            if asked.settled:
                answer, orphans = self._overtaken(asked, answer)
            else:
                self._answered(asked)
                answer = self._together(asked, answer, fetches)
        self._fetch_soon(fetches)
        self._hand_over(orphans)
        self._return_due()
        return answer

    def _together(self, asked: Asked, answer: Answer, fetches: list[Fetch]) -> Answer:
        """The answer to the whole plan, from the one to its rest."""
        if isinstance(answer, Granted):
            answer = self._granted(asked, answer)
            self._look_at(fetches, asked.owner, answer.receipts, asked.offers[answer.plan])
            return answer
        if isinstance(answer, Refused):
            states = [
                refused_states(claims_of(plan), parts, refused, answer.now_ms)
                for plan, parts, refused in zip(asked.plans, asked.offers, answer.states, strict=True)
            ]
            answer = Refused(tuple(states), answer.now_ms)
        self._put_back(asked.plans, asked.offers)
        return answer

    def _never_asked(self, asked: Asked) -> None:
        """The question did not reach the store: nobody has to take anything back."""
        if not asked.settled:
            self._answered(asked)
            self._put_back(asked.plans, asked.offers)

    def _answered(self, asked: Asked) -> None:
        asked.settled = True
        for bundle in asked.plans[0]:
            self._known.pop(bundle.call_id, None)

    def abandon(self) -> None:
        """The store has lost its data, leases included: begin anew. Calls that are open are settled by their receipts."""
        with self._lock:
            self._epoch = ""
            self._book.abandon()
            for call_id, known in tuple(self._known.items()):
                if isinstance(known, Asked):
                    known.settled = True
                if not isinstance(known, Gone):
                    del self._known[call_id]

    def _overtaken(self, asked: Asked, answer: Answer) -> tuple[Answer, list[Settlement]]:
        """The answer for calls that were settled meanwhile, or granted to somebody who asked for the same; and what
        is to be given back of it."""
        calls: list[Call] = []
        for bundle in asked.plans[0]:
            known = self._known.get(bundle.call_id)
            if isinstance(known, Gone):
                return Ended(bundle.call_id, known.reason, answer.now_ms), []
            if not isinstance(known, Call):  # the store has lost its data, and what leases had of this call with it
                rest = asked.rest[0] if isinstance(answer, Granted) else ()
                ended = Ended(bundle.call_id, "unknown", answer.now_ms)
                return ended, [Settlement(orphan.call_id, ()) for orphan in rest]
            calls.append(known)
        return replayed(calls, answer.now_ms), []

    def _granted(self, asked: Asked, answer: Granted) -> Granted:
        number = answer.plan
        plan, parts = asked.plans[number], asked.offers[number]
        self._put_back(asked.plans, asked.offers, but=number)
        theirs = iter(answer.receipts)
        receipts = tuple(
            [
                next(theirs) if lease is None else lease.granted(claim, answer.now_ms)
                for claim, lease in zip(claims_of(plan), parts, strict=True)
            ]
        )
        self._open(asked.owner, plan, parts, receipts, number)
        for bundle in asked.rest[number]:
            cast("Call", self._known[bundle.call_id]).inner = True
        return Granted(receipts, answer.now_ms, number, answer.replayed)

    async def _insist(self, owner: str, ask: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """The store's answer; where what is left of leases of this process would turn a refusal, after giving it back."""
        asked_ms = self._clock.now_ms()
        answer = await ask()
        if isinstance(answer, Refused):
            with self._lock:
                slots = self._unspent(owner, answer)
            if slots:
                await self._let_go(slots)
                asked_ms = self._clock.now_ms()
                answer = await ask()
        self._heard(asked_ms, answer)
        return self._without_own(owner, answer) if isinstance(answer, Refused) else answer

    def _unspent(self, owner: str, answer: Refused) -> list[Slot]:
        """Leased meters that refuse, and would not if this process had no lease on them."""
        slots = self._book.slots(owner)
        found: list[Slot] = []
        for states in answer.states:
            for receipt in states:
                meter = receipt.claim.meter
                slot = slots.get(meter.key)
                if slot is None or receipt.fits or meter.limit is None:
                    continue
                self._book.saw(slot, receipt, 0)
                unspent = slot.unspent()
                if unspent and receipt.used + receipt.held - unspent + receipt.claim.amount <= meter.limit:
                    found.append(slot)
        return found

    def _without_own(self, owner: str, answer: Refused) -> Refused:
        """The refusal without what this process has left: that is held by no call, and a smaller claim would have it."""
        with self._lock:
            slots = self._book.slots(owner)
            unspent = {key: left for key, slot in slots.items() if (left := slot.unspent())}
        if not unspent:
            return answer
        states = tuple(
            [
                tuple(
                    [msgspec.structs.replace(r, held=max(0, r.held - unspent.get(r.claim.meter.key, 0))) for r in state]
                )
                for state in answer.states
            ]
        )
        return Refused(states, answer.now_ms)

    async def _ask_again(self, calls: list[Call]) -> Answer:
        """Calls that are open here: are they in the store, too?"""
        rest = tuple([Bundle(call.bundle.call_id, call.rest(), call.bundle.draft) for call in calls if call.inner])
        asked_ms = self._clock.now_ms()
        answer = await self.inner.reserve(calls[0].owner, (rest,))
        self._heard(asked_ms, answer)
        if isinstance(answer, Granted):
            return replayed(calls, answer.now_ms)
        with self._lock:
            for call in calls:
                self._expire(call)
        self._return_due()
        return answer

    # ---------------------------------------------------------------------------------- chunks

    def _look_at(
        self, fetches: list[Fetch], owner: str, receipts: Sequence[Receipt], parts: Sequence[Lease | None]
    ) -> None:
        """Note what the store said of leased meters, and which of them need a chunk."""
        slots = self._book.slots(owner)
        for receipt, lease in zip(receipts, parts, strict=True):
            claim = receipt.claim
            slot = slots.get(claim.meter.key)
            if slot is None or not claim.meter.lease:
                continue
            if lease is None:
                self._book.saw(slot, receipt, claim.amount)
            if slot.current is None or slot.current.left < slot.current.low:
                self._want(fetches, slot, owner, claim)

    def _want(self, fetches: list[Fetch], slot: Slot, owner: str, claim: Claim) -> None:
        size = self._book.wanted(slot, claim.meter, claim.amount)
        if size:
            slot.fetching = f"{_PREFIX}{self._name}-{next(self._numbers):x}"
            fetches.append(Fetch(owner, slot, slot.fetching, claim.meter, size))

    def _fetch_soon(self, fetches: list[Fetch]) -> None:
        for fetch in fetches:
            task = asyncio.get_running_loop().create_task(self._fetch(fetch))
            self._tasks.add(task)
            task.add_done_callback(partial(self._fetched, fetch))

    def _fetched(self, fetch: Fetch, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if fetch.slot.fetching == fetch.call_id:  # cancelled before it began
            fetch.slot.fetching = None

    async def _fetch(self, fetch: Fetch) -> None:
        """Reserve a chunk. Without an answer, it is cancelled: nobody would return it."""
        slot, call_id, meter = fetch.slot, fetch.call_id, fetch.meter
        if meter.expiry_charge != "hold":
            # A part of the chunk may be what calls have used and settled: it must not be given back with the rest.
            meter = msgspec.structs.replace(meter, expiry_charge="hold")
        asked_ms = self._clock.now_ms()
        try:
            answer = await self.inner.reserve(fetch.owner, ((Bundle(call_id, (Claim(meter, fetch.size),)),),))
        except BaseException as error:
            if not isinstance(error, StorageError) or error.sent:
                self._hand_over([Settlement(call_id, ())])
            if not isinstance(error, StorageError):
                raise
            if isinstance(error, DataLost):
                self.abandon()
            _log.debug("no chunk of %s was leased: %s", meter.key, error)
            return
        self._heard(asked_ms, answer)
        with self._lock:
            wanted = slot.fetching == call_id
            slot.fetching = None
            unwanted = False
            if isinstance(answer, Granted):
                (receipt,) = answer.receipts
                if wanted and receipt.taken:
                    self._book.add(slot, fetch.owner, call_id, receipt)
                else:
                    unwanted = True
            elif isinstance(answer, Refused):
                self._book.saw(slot, answer.states[0][0], 0)
        if unwanted:
            self._hand_over([Settlement(call_id, ())])
        self._return_due()

    def _return_due(self) -> None:
        """Return the chunks that no call holds of any more."""
        if self._book.due:
            with self._lock:
                settlements = self._book.collect()
            self._hand_over(settlements)

    def _hand_over(self, settlements: list[Settlement]) -> None:
        """Settle leases. What the store does not take is tried again with the next heartbeat, or by `retire`."""
        if not settlements:
            return
        try:
            pending = self.inner.settle(settlements)
        except StorageError:
            self._unreturned.extend(settlements)
            return
        pending.add_done_callback(partial(self._handed_over, settlements))

    def _handed_over(self, settlements: list[Settlement], pending: Pending[tuple[Settled, ...]]) -> None:
        try:
            pending.result()
        except StorageError:
            self._unreturned.extend(settlements)

    def _try_again(self) -> None:
        self._hand_over([self._unreturned.popleft() for _ in range(len(self._unreturned))])

    async def _let_go(self, slots: Iterable[Slot]) -> None:
        """Give back what is left of these meters' chunks."""
        with self._lock:
            shrunk = self._book.let_go(slots, self._now())
        self._return_due()
        for lease in shrunk:
            await self._shrink(lease)

    async def _shrink(self, lease: Lease) -> None:
        """Tell the store that a lease holds less."""
        asked_ms = self._clock.now_ms()
        claim = Claim(lease.receipt.claim.meter, lease.amount)
        try:
            answer = await self.inner.amend(lease.owner, Bundle(lease.call_id, (claim,)))
        except StorageError:
            return  # it is returned when its calls have ended
        self._heard(asked_ms, answer)
        if isinstance(answer, Granted) and answer.receipts[0].pin != lease.pin:
            # The window has ended in between, and the hold was moved to the next one, of which nothing was spent.
            self._hand_over([Settlement(lease.call_id, ())])

    # ----------------------------------------------------------------------------------- amend

    def amend(self, owner: str, bundle: Bundle) -> Coroutine[Any, Any, Answer]:
        known = self._known.get(bundle.call_id)
        if known is None:
            for claim in bundle.claims:
                if claim.meter.lease:
                    return self._amend(owner, bundle)
            return self.inner.amend(owner, bundle)
        if isinstance(known, Gone) and known.foreign:
            return self.inner.amend(owner, bundle)
        return self._amend(owner, bundle)

    async def _amend(self, owner: str, bundle: Bundle) -> Answer:
        keys = [claim.meter.key for claim in bundle.claims]
        if len(set(keys)) < len(keys):
            raise claimed_twice(next(key for key in keys if keys.count(key) > 1))
        fetches: list[Fetch] = []
        with self._lock:
            now_ms = self._now()
            call = self._known.get(bundle.call_id)
            if call is not None and not isinstance(call, Call):
                return Ended(bundle.call_id, call.reason if isinstance(call, Gone) else "unknown", now_ms)
            if call is not None and call.expired:
                return Ended(bundle.call_id, "expired", now_ms)
            change = self._change(owner, call, bundle, now_ms)
            local = None
            if call is not None and not call.inner and None not in change.parts:
                local = self._changed(owner, call, bundle, change, (), now_ms)
                self._look_at(fetches, owner, local.receipts, change.parts)
        if local is None:
            return await self._amend_rest(owner, call, bundle, change)
        self._fetch_soon(fetches)
        self._return_due()
        return local

    async def _amend_rest(self, owner: str, call: Call | None, bundle: Bundle, change: Change) -> Answer:
        """Change what the store holds of the call, and then what leases do."""
        claims = tuple([claim for claim, lease in zip(bundle.claims, change.parts, strict=True) if lease is None])
        rest = Bundle(bundle.call_id, claims, bundle.draft)

        async def ask() -> Answer:
            if call is None or call.inner:
                answer = await self.inner.amend(owner, rest)
                unheard = isinstance(answer, Ended) and answer.reason == "unknown"
                if call is None or call.rest() or not unheard:
                    return answer
            call.inner = True  # before there is an answer: from here on the store has to be told of its end
            answer = await self.inner.reserve(owner, ((rest,),))
            call.inner = not isinstance(answer, Refused)
            return answer

        try:
            answer = await self._insist(owner, ask)
        except BaseException as error:
            with self._lock:
                self._undo(change)
            if isinstance(error, DataLost):
                self.abandon()
            raise
        fetches: list[Fetch] = []
        with self._lock:
            settled = self._known.get(bundle.call_id) is not call
            if isinstance(answer, Granted) and not settled:
                answer = self._changed(owner, call, bundle, change, answer.receipts, answer.now_ms)
                self._look_at(fetches, owner, answer.receipts, change.parts)
            else:
                if isinstance(answer, Refused):
                    states = refused_states(bundle.claims, change.parts, answer.states[0], answer.now_ms)
                    answer = Refused((states,), answer.now_ms)
                elif settled:
                    answer = Ended(bundle.call_id, "settled", answer.now_ms)
                elif call is not None:
                    self._expire(call)
                self._undo(change)
        self._fetch_soon(fetches)
        self._return_due()
        return answer

    def _change(self, owner: str, call: Call | None, bundle: Bundle, now_ms: int) -> Change:
        """Take from leases what the new claims need, and note what is given back once they are granted."""
        book = self._book
        slots = book.slots(owner)
        turn = book.next_turn()
        change = Change()
        held: dict[str, tuple[Receipt, Lease | None]] = {}
        if call is not None:
            pairs = zip(call.receipts, call.parts, strict=True)
            held = {receipt.claim.meter.key: (receipt, lease) for receipt, lease in pairs}
        for claim in bundle.claims:
            meter = claim.meter
            old, lease = held.get(meter.key, (None, None))
            if old is not None and lease is not None:
                more = claim.amount - old.claim.amount
                if not more and not lower(meter.limit, old.claim.meter.limit):
                    change.keep(lease, old)
                    del held[meter.key]
                    continue
                room = more <= 0 or (more <= lease.left and not lease.closed)
                if room and now_ms < lease.until_ms and not lower(meter.limit, lease.meter.limit):
                    change.adjust(lease, more)
                    del held[meter.key]
                    continue
            taken = None
            # What the store holds of a meter stays there, where it keeps its window.
            if meter.lease and (old is None or lease is not None):
                slot = book.slot(slots, meter, turn)
                taken = None if slot.current is None else book.take(slot, claim, now_ms)
            change.take(taken, claim.amount)
        change.backs.extend((lease, old.claim.amount) for old, lease in held.values() if lease is not None)
        return change

    def _changed(
        self,
        owner: str,
        call: Call | None,
        bundle: Bundle,
        change: Change,
        theirs: Iterable[Receipt],
        now_ms: int,
    ) -> Granted:
        """The change is granted: give back what is no longer claimed, and remember what is."""
        for lease, amount in change.backs:
            lease.give_back(amount)
            self._book.freed(lease)
        granted = iter(theirs)
        receipts = tuple(
            [
                next(granted) if lease is None else kept or lease.granted(claim, now_ms)
                for claim, lease, kept in zip(bundle.claims, change.parts, change.kept, strict=True)
            ]
        )
        changed = Call(owner, bundle, change.parts, receipts, 0 if call is None else call.plan)
        changed.inner = call is None or call.inner or None in change.parts
        changed.beats = 0 if call is None else call.beats
        self._known[bundle.call_id] = changed
        return Granted(receipts, now_ms)

    def _undo(self, change: Change) -> None:
        for lease, amount in change.takes:
            lease.give_back(amount)
            self._book.freed(lease)

    # ---------------------------------------------------------------------------------- settle

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        known = self._known
        for settlement in settlements:
            if settlement.call_id in known or cancels(settlement):
                return self._settle(settlements)
        return self.inner.settle(settlements)

    def _settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        outgoing: list[Settlement] = []
        replies: list[Settled | Reply] = []
        unconfirmed: list[Gone] = []
        with self._lock:
            now_ms = self._now()
            for settlement in settlements:
                call_id = settlement.call_id
                known = self._known.get(call_id)
                if isinstance(known, Asked):
                    known = self._presume(known, call_id)
                if isinstance(known, Call):
                    known = self._settle_call(known, settlement, now_ms)
                    self._end(call_id, known)
                    if known.reply is None:
                        replies.append(Settled(call_id, "settled", known.overages))
                        continue
                elif known is None or known.foreign or forgotten(known, now_ms):
                    replies.append(Reply(call_id, len(outgoing)))
                    outgoing.append(settlement)
                    if cancels(settlement):
                        self._end(call_id, Gone("cancelled", now_ms + self._tombstone_ms, foreign=True))
                    continue
                elif not known.unsent:
                    replies.append(Settled(call_id, "duplicate"))
                    continue
                replies.append(cast("Reply", known.reply).behind(len(outgoing)))
                outgoing.extend(known.unsent)
                unconfirmed.append(known)
        try:
            if not outgoing:
                return Completed(cast("tuple[Settled, ...]", tuple(replies)))
            pending = self.inner.settle(outgoing)
        finally:
            if self._book.due:
                self._return_due()
        pending.add_done_callback(partial(confirm, unconfirmed))
        return Answering(pending, replies)

    def _settle_call(self, call: Call, settlement: Settlement, now_ms: int) -> Gone:
        """Settle what the call has of leases, and translate the rest for the store."""
        parts = call.parts
        claims = call.bundle.claims
        actuals = settlement.actuals
        if len(actuals) != len(claims):
            actuals = (*actuals, *(None,) * len(claims))[: len(claims)] if actuals else (0,) * len(claims)
        overages: list[int] = []
        outgoing: list[Settlement] = []
        for claim, lease, given in zip(claims, parts, actuals):  # noqa: B905 - made equal above, and `strict` costs time
            over = 0
            if lease is not None:
                held = claim.amount
                actual = held if given is None else given
                if actual > held:
                    over = actual - held
                if call.expired:
                    short = lease.settle(0, over)
                else:
                    short = lease.settle(held, actual)
                    if lease is not lease.slot.current:
                        self._book.freed(lease)
                if short:
                    outgoing.append(lease.overrun(short))
            overages.append(over)
        gone = Gone("settled", now_ms + self._tombstone_ms, overages=tuple(overages))
        if call.inner or settlement.record is not None or settlement.debits:
            call_id = settlement.call_id
            gone.reply = Reply(call_id, len(outgoing), tuple([lease is not None for lease in parts]), gone.overages)
            rest = tuple([given for given, lease in zip(actuals, parts, strict=True) if lease is None])
            theirs = tuple([r for r, lease in zip(settlement.receipts, parts, strict=False) if lease is None])
            outgoing.append(
                Settlement(call_id, rest if settlement.actuals else (), settlement.record, theirs, settlement.debits)
            )
        elif outgoing:
            gone.reply = Reply(settlement.call_id, None, (), gone.overages)
        gone.unsent = tuple(outgoing)
        return gone

    def _presume(self, asked: Asked, call_id: str) -> Call:
        """Calls that are settled before the store has said whether it grants them: as if it had granted the first plan."""
        asked.settled = True
        self._put_back(asked.plans, asked.offers, but=0)
        self._open(asked.owner, asked.plans[0], asked.offers[0], (), 0)
        for bundle in asked.rest[0]:
            cast("Call", self._known[bundle.call_id]).inner = True
        return cast("Call", self._known[call_id])

    def _expire(self, call: Call) -> None:
        """The store has ended the call: charge what it holds of leases as it was held."""
        if call.expired:
            return
        call.expired = True
        for claim, lease in zip(call.bundle.claims, call.parts, strict=True):
            if lease is not None:
                lease.settle(claim.amount, claim.amount)
                self._book.freed(lease)
        call.until_ms = self._now() + self._tombstone_ms
        self._end(call.bundle.call_id, call)

    def _end(self, call_id: str, known: Gone | Call) -> None:
        """Remember that a call id is spent, and forget some that were long enough."""
        line, now_ms = self._line, known.until_ms - self._tombstone_ms
        for _ in range(_PURGE):
            if not line:
                break
            other = self._known.get(line[0])
            if other is not None and not forgotten(other, now_ms):
                if not (isinstance(other, Gone) and other.unsent):
                    break
                line.rotate(-1)  # it waits for the store, for as long as that takes
                continue
            self._known.pop(line.popleft(), None)
        self._known[call_id] = known
        line.append(call_id)

    # ---------------------------------------------------------------------------------- owners

    async def heartbeat(self, owner: str) -> Heartbeat:
        asked_ms = self._clock.now_ms()
        try:
            beat = await self.inner.heartbeat(owner)
        except DataLost:
            self.abandon()
            raise
        self._synced = (asked_ms, beat.now_ms)
        self._see_epoch()
        with self._lock:
            self._book.workers = max(1, beat.owners)
            lost = self._book.lapse(owner) if beat.lapsed else 0
            shrunk = self._book.tidy(owner, self._now())
            calls = [call for call in self._known.values() if isinstance(call, Call) and call.owner == owner]
            old = [call for call in calls if call.beats and unheard(call)]
            for call in calls:
                call.beats += 1
        if lost:
            _log.warning("this process sent no heartbeat in time: %d leases were charged in full", lost)
        self._try_again()
        self._return_due()
        await asyncio.gather(*map(self._shrink, shrunk), *map(self._introduce, old))
        # A lease is no call: its end is nobody's news.
        expired = tuple([call_id for call_id in beat.expired if not call_id.startswith(_PREFIX)])
        return msgspec.structs.replace(beat, expired=expired)

    async def _introduce(self, call: Call) -> None:
        """Tell the store of a call that has only leased claims, so that a record of it is left whatever comes."""
        call.inner = True
        # If there is no answer, the settlement still names the call; only its record, should this process die, is lost.
        with contextlib.suppress(StorageError):
            await self.inner.reserve(call.owner, ((Bundle(call.bundle.call_id, (), call.bundle.draft),),))

    async def retire(self, owner: str) -> None:
        with self._lock:
            calls = [call for call in self._known.values() if isinstance(call, Call) and call.owner == owner]
            unknown = [call for call in calls if unheard(call)]
            for call in calls:
                self._expire(call)
            cancelled = self._forget(owner)
        self._return_due()
        self._hand_over(cancelled)
        self._try_again()  # what is not returned before it, the inner `retire` charges
        await asyncio.gather(*map(self._introduce, unknown))
        await self.inner.retire(owner)

    def _forget(self, owner: str) -> list[Settlement]:
        """Return all leases of an owner; gives the cancellations of those that are on their way."""
        cancelled = []
        for slot in self._book.owners.pop(owner, {}).values():
            for lease in tuple(slot.leases):
                self._book.close(lease)
            if slot.fetching is not None:
                cancelled.append(Settlement(slot.fetching, ()))
                slot.fetching = None
        return cancelled

    # ------------------------------------------------------------------------------ read, reset

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        return await self.inner.read(meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        with self._lock:
            open_: list[tuple[Lease, int]] = []
            for slots in self._book.owners.values():
                for meter in meters:
                    slot = slots.get(meter.key)
                    for lease in tuple(slot.leases) if slot is not None else ():
                        self._book.close(lease)
                        if not lease.returned:
                            open_.append((lease, lease.used))
        self._return_due()
        await self.inner.reset(meters)
        shrunk = []
        with self._lock:
            now_ms = self._now()
            for lease, used in open_:
                if not lease.returned and lease.forget(used) and now_ms < lease.until_ms:
                    shrunk.append(lease)
        for lease in shrunk:
            await self._shrink(lease)

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        return await self.inner.records(since_ms=since_ms, limit=limit)

    def export(self) -> AsyncIterator[bytes]:
        return self.inner.export()

    async def load(self, lines: Iterable[bytes]) -> None:
        await self.inner.load(lines)

    async def open_holds(self) -> int:
        return await self.inner.open_holds()

    def entries(self, space: str, bounds: Bounds | None = None) -> Entries:
        """As `KeepsEntries`, if the storage behind it is one."""
        if not isinstance(self.inner, KeepsEntries):
            raise ConfigurationError(f"entries: a {type(self.inner).__name__} cannot keep {space!r}")
        return self.inner.entries(space, bounds)

    def shared(self) -> Shared:
        """As `KeepsShared`, if the storage behind it is one."""
        if not isinstance(self.inner, KeepsShared):
            raise ConfigurationError(f"shared: a {type(self.inner).__name__} cannot keep what processes share")
        return self.inner.shared()

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        """As `ListsCalls`, if the storage behind it is one, else nothing of other processes. Calls that were granted
        from leases alone are there at once in their own process, and in others after a heartbeat or two."""
        found: list[OpenCall] = []
        sought = limit
        while isinstance(self.inner, ListsCalls):
            of_store = await self.inner.open_calls(sought)
            found = [call for call in of_store if not call.call_id.startswith(_PREFIX)]
            if len(found) >= limit or len(of_store) < sought:
                break
            sought *= 2  # leases are held like calls, and have filled the page
        known = {call.call_id for call in found}
        with self._lock:
            mine = [call for call in self._known.values() if isinstance(call, Call) and unheard(call)]
        found += [
            OpenCall(
                call_id=call.bundle.call_id,
                owner=call.owner,
                at_ms=call.bundle.draft.at_ms,
                draft=call.bundle.draft,
                held=open_holds_of(call.rest()),
            )
            for call in mine
            if call.bundle.draft is not None and call.bundle.call_id not in known
        ]
        return newest(found, limit)

    def streams(self) -> Sequence[RecordStream]:
        """As `KeepsStreams`, if the storage behind it is one."""
        if not isinstance(self.inner, KeepsStreams):
            raise ConfigurationError(f"streams: a {type(self.inner).__name__} keeps no stream of its records")
        return self.inner.streams()

    async def aclose(self) -> None:
        with self._lock:
            for call in [call for call in self._known.values() if isinstance(call, Call)]:
                self._expire(call)
            cancelled = [settlement for owner in tuple(self._book.owners) for settlement in self._forget(owner)]
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._return_due()
        self._hand_over(cancelled)
        await self.inner.aclose()


# --------------------------------------------------------------------------- process events

_storages: weakref.WeakSet[LeasingStorage] = weakref.WeakSet()


def _after_fork_in_child() -> None:  # pragma: no cover - in another process
    for storage in list(_storages):
        storage.begin_anew()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
