"""While the store does not answer: what this process decides by itself, and how it is made good afterwards.

Rule 1: the harshest posture decides. One claim whose meter says `deny` refuses its plan, and nothing of
the plan is counted anywhere.

Rule 2: a call id is cancelled, or admitted under; never both. When a reserve fails, the store may have
granted it, may grant it yet, or never will. If the plan is refused, its ids are cancelled: what was granted
is given back, what comes late finds a tombstone. If it is admitted here, it is admitted under the *same*
ids, which are not cancelled, for what is settled under a cancelled id charges nothing. The settlement
carries receipts that name the windows, and so charges once in each of the three cases: it takes the place
of the hold; or there is none, and it is charged by its receipts; and a reserve that comes later is refused.

Rule 3: a hold that has to be changed here gets a new id, and the old one is given back whole. A settlement
names its amounts in the order of the hold's claims, and whether the store has the old or the new ones
nobody knows.

Rule 4: of several plans that were offered together, nobody knows which one the store may have granted. So the id is
given back whole, and one of them is admitted here under a new one, as in rule 3.

Rule 5: what is counted here is one process's share, and is forgotten when the store answers: there it is
settled. Calls that are open then become holds of the store, whatever its limits say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from msgspec.structs import replace

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Receipt, Refused, Settlement
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.denials.receipts import capacity
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.windows import BUCKET, CALENDAR, DISTINCT, LIFETIME, SLIDING, SLOTS, Bucket

__all__ = ["Fallback", "LastSeen", "left", "lifted", "lifted_bundle", "over", "share"]

_SEEN: Final = 8192
_SHORT_MS: Final = 1000
_MOST_BACKLOG: Final = 2**52


# ------------------------------------------------------------------------------------ meters


def over(receipt: Receipt, now_ms: int) -> bool:
    """Whether the window that a receipt pins has ended, or all of it has drained."""
    meter = receipt.claim.meter
    window: Any = meter.window
    if meter.kind <= CALENDAR:
        return receipt.resets_at_ms is not None and now_ms >= receipt.resets_at_ms
    if meter.kind == SLIDING:
        return bool(now_ms >= (receipt.pin + window.buckets + 1) * window.bucket_ms)
    if meter.kind == BUCKET:
        return bool((now_ms - receipt.pin) * (meter.limit or 0) >= _taken(receipt) * window.period_ms)
    return False


def _taken(receipt: Receipt) -> int:
    return receipt.used + receipt.held + (receipt.claim.amount if receipt.taken else 0)


def left(meter: Meter, last: Receipt | None, now_ms: int) -> int:
    """How much was left of a limited meter by the last receipt that was seen of it; all if it was never seen."""
    room = capacity(meter)
    if last is None or over(last, now_ms):
        return room
    taken = _taken(last)
    if isinstance(meter.window, Bucket):
        taken -= max(0, now_ms - last.pin) * (meter.limit or 0) // meter.window.period_ms
    return max(0, room - max(0, taken))


def share(meter: Meter, last: Receipt | None, now_ms: int, processes: int) -> int:
    """How much of a limited meter one of so many processes may grant by itself: at least 1, unless the limit is 0.

    Of ids, a part of the limit itself: those that are known in the store are counted here as if they were new.
    """
    if not meter.limit:
        return 0
    rest = meter.limit if meter.kind == DISTINCT else left(meter, last, now_ms)
    return max(1, rest // processes)


def lifted(meter: Meter) -> Meter:
    """The same counter without a limit: for what was admitted already."""
    if isinstance(meter.window, Bucket):
        # It drains by its limit, so that stays; its burst becomes the largest that can be counted.
        period_ms = meter.window.period_ms
        return replace(meter, window=Bucket(period_ms, _MOST_BACKLOG // period_ms), lease=0)
    return replace(meter, limit=None, lease=0)


def lifted_bundle(bundle: Bundle) -> Bundle:
    """The same bundle without limits."""
    claims = tuple([Claim(lifted(claim.meter), claim.amount, claim.member) for claim in bundle.claims])
    return Bundle(bundle.call_id, claims, bundle.draft)


def _limited(meter: Meter, amount: int, processes: int) -> Meter:
    if isinstance(meter.window, Bucket):
        rate = max(1, (meter.limit or 0) // processes)
        return replace(meter, limit=rate, window=Bucket(meter.window.period_ms, amount), lease=0)
    return replace(meter, limit=amount, lease=0)


# --------------------------------------------------------------------------------- last seen


class LastSeen:
    """The last receipt of each meter: of the 8,192 that were seen last, and of up to as many before them."""

    __slots__ = ("_new", "_old")

    def __init__(self) -> None:
        self._new: dict[str, Receipt] = {}
        self._old: dict[str, Receipt] = {}

    def keep(self, receipts: Iterable[Receipt]) -> None:
        """Remember these, but for meters on which nothing is ever decided here."""
        new = self._new
        for receipt in receipts:
            meter = receipt.claim.meter
            if meter.on_outage != "deny":
                new[meter.key] = receipt
        if len(new) >= _SEEN:
            self._old, self._new = new, {}

    def get(self, key: str) -> Receipt | None:
        return self._new.get(key) or self._old.get(key)

    def all(self) -> tuple[Receipt, ...]:
        """All of them, older ones first."""
        return (*self._old.values(), *self._new.values())

    def __len__(self) -> int:
        return len(self._new) + len(self._old)


# ---------------------------------------------------------------------------------- fallback


class _Here:
    """A bundle that was admitted here, and its name in the storage of this process."""

    __slots__ = ("bundle", "local_id")

    def __init__(self, bundle: Bundle, local_id: str) -> None:
        self.bundle = bundle
        self.local_id = local_id


class Fallback:
    """Decides for one process while the store does not answer, and remembers what it has admitted.

    `new_storage` makes a storage in memory, in which no owner lapses.
    """

    def __init__(self, new_storage: Callable[[], Storage], clock: Clock) -> None:
        self.processes = 1
        """How many processes shared the store when it last answered a heartbeat."""
        self.seen = LastSeen()
        self._new_storage = new_storage
        self._clock = clock
        self._storage: Storage | None = None
        self._began_ms = 0
        self._granted = LastSeen()
        self.open: dict[str, _Here] = {}
        """What was admitted here and has not ended, by call id, as long as the store does not know it as a hold."""

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """What is open, in the order of admission."""
        return tuple([here.bundle for here in tuple(self.open.values())])

    def may_decide(self, claims: Iterable[Claim]) -> bool:
        """Whether none of these claims has to be refused while the store is away."""
        return not any(claim.meter.on_outage == "deny" and claim.meter.enforce for claim in claims)

    async def reserve(self, owner: str, bundles: Sequence[Bundle]) -> Granted | Refused:
        """Take every claim from the share of this process, or none. Never waits."""
        now_ms = self._clock.now_ms()
        storage = self._begin()
        local = tuple([Bundle(bundle.call_id, self._local(bundle.claims, now_ms)) for bundle in bundles])
        answer = await storage.reserve(owner, (local,))
        if isinstance(answer, Granted):
            for bundle in bundles:
                self.open[bundle.call_id] = _Here(bundle, bundle.call_id)
        claims = tuple([claim for bundle in bundles for claim in bundle.claims])
        return self._answer(answer, claims, now_ms)

    async def amend(self, owner: str, call_id: str, bundle: Bundle) -> Granted | Refused:
        """As `reserve`, for a bundle that takes the place of the hold `call_id` if that was admitted here."""
        here = self.open.get(call_id)
        now_ms = self._clock.now_ms()
        if here is not None:
            storage = self._begin()
            answer = await storage.amend(owner, Bundle(here.local_id, self._local(bundle.claims, now_ms)))
            if isinstance(answer, (Granted, Refused)):
                if isinstance(answer, Granted):
                    self.open.pop(call_id, None)
                    self.open[bundle.call_id] = _Here(bundle, here.local_id)
                return self._answer(answer, bundle.claims, now_ms)
        return await self.reserve(owner, (bundle,))  # of before the outage, or of another one

    def settle(self, settlements: Iterable[Settlement]) -> None:
        """Put the real amounts in the place of those that were taken here."""
        ended = [
            Settlement(here.local_id, settlement.actuals, None, (), settlement.debits)
            for settlement in settlements
            if (here := self.open.pop(settlement.call_id, None)) is not None
        ]
        if ended and self._storage is not None:
            self._storage.settle(ended)

    def forget(self, call_id: str) -> bool:
        """The store knows the hold. Gives whether it was still open."""
        return self.open.pop(call_id, None) is not None

    def end(self) -> None:
        """The store answers: what was taken here is no longer left of what was seen of it."""
        if self._storage is not None:
            self._storage = None
            self.seen.keep(self._granted.all())
            self._granted = LastSeen()

    def _begin(self) -> Storage:
        storage = self._storage
        if storage is None:
            storage = self._storage = self._new_storage()
            self._began_ms = self._clock.now_ms()
        return storage

    def _local(self, claims: Sequence[Claim], now_ms: int) -> tuple[Claim, ...]:
        return tuple([Claim(self._meter(claim.meter, now_ms), claim.amount, claim.member) for claim in claims])

    def _meter(self, meter: Meter, now_ms: int) -> Meter:
        if meter.limit is None or meter.on_outage == "allow":
            return lifted(meter)
        return _limited(meter, self._most(meter, self.seen.get(meter.key), now_ms), self.processes)

    # What is granted here is told, and later settled, in terms of the store's meters.

    def _answer(self, answer: Granted | Refused | Ended, claims: Sequence[Claim], now_ms: int) -> Granted | Refused:
        if isinstance(answer, Granted):
            receipts = self._receipts(claims, answer.receipts, now_ms)
            self._granted.keep(receipts)
            return Granted(receipts, now_ms)
        assert isinstance(answer, Refused), answer  # noqa: S101 - the ids are new here
        return Refused((self._receipts(claims, answer.states[0], now_ms),), now_ms)

    def _receipts(self, claims: Sequence[Claim], states: Sequence[Receipt], now_ms: int) -> tuple[Receipt, ...]:
        return tuple([self._receipt(claim, state, now_ms) for claim, state in zip(claims, states, strict=True)])

    def _receipt(self, claim: Claim, state: Receipt, now_ms: int) -> Receipt:
        meter = claim.meter
        used, held, pin, resets_at_ms = state.used, state.held, state.pin, state.resets_at_ms
        last = self.seen.get(meter.key)
        if meter.limit:
            # What is not this process's to grant shows as taken, so that what remains is what it has.
            elsewhere = capacity(meter) - self._most(meter, last, now_ms)
            if meter.kind == SLOTS:
                held += elsewhere
            else:
                used += elsewhere
        if last is not None and meter.kind < CALENDAR and not over(last, now_ms) and last.resets_at_ms is not None:
            pin = last.pin  # the store's own instance, which began before the outage
            renewed = meter.kind == LIFETIME and meter.window.renew  # type: ignore[union-attr]  # by its kind
            resets_at_ms = max(last.resets_at_ms, resets_at_ms or 0) if renewed else last.resets_at_ms
        if not state.fits and meter.kind != SLOTS and resets_at_ms is None and claim.amount <= capacity(meter):
            resets_at_ms = now_ms + _SHORT_MS  # more than this process may grant; the store may be back by then
        return Receipt(claim, state.taken, state.fits, used, held, pin, resets_at_ms)

    def _most(self, meter: Meter, last: Receipt | None, now_ms: int) -> int:
        """What is this process's, of what it has granted meanwhile too."""
        if meter.kind == BUCKET:
            now_ms = self._began_ms  # what drains since then drains here, and must not do so twice
        if meter.on_outage == "allow":
            return left(meter, last, now_ms)
        return share(meter, last, now_ms, self.processes)
