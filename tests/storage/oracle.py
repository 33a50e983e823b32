"""An oracle for storages: it keeps all that ever happened, and works every answer out from that again.

Written from the numbered rules of `storage/base.py` and the docstrings of `claims.py` and
`windows.py`, not from any storage. Slow and plain on purpose: no answer is kept, no number is
carried on; each question walks through the whole history of the meters that it is about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

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
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots

__all__ = ["MEMORY_MS", "End", "Hold", "Oracle"]

MEMORY_MS = 86_400_000
"""How long it is remembered of an owner that it has lapsed."""

Reason = Literal["settled", "cancelled", "expired", "unknown"]

# What can happen to a meter. `take`: held by a call. `give`: no longer, and not charged. `close`: no
# longer, and `amount` of it charged. `more`: charged to the instance of an earlier claim. `lost`: the
# same for a claim that the history does not know. `debit`: charged without having been held.
What = Literal["take", "give", "close", "more", "lost", "debit", "reset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that happened to one meter."""

    what: What
    at: int
    meter: Meter
    call: str = ""
    amount: int = 0
    member: str | None = None
    pin: int = 0
    ends: int | None = None
    """For `lost`: when the instance ends, as its receipt said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a meter looks like to a claim."""

    used: int
    held: int
    fits: bool
    pin: int
    resets: int | None


# ------------------------------------------------------------- lifetime, rolling and calendar windows


@dataclass(slots=True)
class Instance:
    start: int
    end: int
    used: int = 0
    open: dict[str, int] = field(default_factory=dict)


def _begin(meter: Meter, at: int) -> Instance:
    window = meter.window
    if isinstance(window, Calendar):
        return Instance(*window.bounds(at))
    if isinstance(window, Rolling):
        return Instance(at, at + window.period_ms)
    assert isinstance(window, Lifetime)
    return Instance(at, at + window.ttl_ms)


def _renewed(meter: Meter, end: int, at: int) -> int:
    window = meter.window
    if isinstance(window, Lifetime) and window.renew:
        return max(end, at + window.ttl_ms)
    return end


def _instance(facts: Iterable[Fact], now: int) -> Instance | None:
    """The instance that is current at `now`, if one has begun."""
    current: Instance | None = None
    for fact in facts:
        over = current is None or fact.at >= current.end
        if fact.what in {"take", "debit"}:
            if current is None or over:
                current = _begin(fact.meter, fact.at)
            current.end = _renewed(fact.meter, current.end, fact.at)
            if fact.what == "take":
                current.open[fact.call] = fact.amount
            else:
                current.used = min(current.used + fact.amount, MAX_AMOUNT)
        elif fact.what == "lost":
            assert fact.ends is not None
            runs = fact.at < fact.ends
            if runs and (current is None or over):
                current = Instance(fact.pin, fact.ends)
            if current is not None and (runs or fact.pin == current.start):
                current.used = min(current.used + fact.amount, MAX_AMOUNT)
        elif current is None:
            continue
        elif fact.what == "reset":
            current.used = 0
            if not sum(current.open.values()):
                current = None
            elif not over and not isinstance(fact.meter.window, Calendar):
                current.end = _begin(fact.meter, fact.at).end
        elif fact.pin == current.start:
            if fact.what in {"give", "close"}:
                current.open.pop(fact.call, None)
            if fact.what in {"close", "more"}:
                current.used = min(current.used + fact.amount, MAX_AMOUNT)
    return current if current is not None and now < current.end else None


def _look_instance(facts: Sequence[Fact], claim: Claim, now: int) -> State:
    meter, current = claim.meter, _instance(facts, now)
    if current is None:
        current = _begin(meter, now)
    used, held = current.used, sum(current.open.values())
    fits = meter.limit is None or used + held + claim.amount <= meter.limit
    resets: int | None = _renewed(meter, current.end, now) if fits else current.end
    if meter.limit is not None and claim.amount > meter.limit:
        resets = None
    return State(used=used, held=held, fits=fits, pin=current.start, resets=resets)


def _read_instance(facts: Sequence[Fact], _meter: Meter, now: int) -> Reading:
    current = _instance(facts, now)
    if current is None:
        return Reading(0, 0, None)
    return Reading(current.used, sum(current.open.values()), current.end)


# ------------------------------------------------------------------------------------ sliding windows


@dataclass(slots=True)
class Shelf:
    """One sub-bucket."""

    used: int = 0
    open: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.used + sum(self.open.values())


def _shelves(facts: Iterable[Fact], window: Sliding, now: int) -> tuple[dict[int, Shelf], int]:
    """The sub-buckets that touch the window at `now`, and the number of the one that a claim would go to."""
    shelves: dict[int, Shelf] = {}
    latest: int | None = None

    def newest(at: int) -> int:
        number = at // window.bucket_ms
        return number if latest is None else max(number, latest)

    for fact in facts:
        last = newest(fact.at)
        if fact.what in {"take", "debit"}:
            latest = last
            shelf = shelves.setdefault(last, Shelf())
            if fact.what == "take":
                shelf.open[fact.call] = fact.amount
            else:
                shelf.used += fact.amount
        elif fact.what == "reset":
            for number, shelf in list(shelves.items()):
                shelf.used = 0
                if not sum(shelf.open.values()):
                    del shelves[number]
        elif fact.pin in shelves:
            shelf = shelves[fact.pin]
            if fact.what in {"give", "close"}:
                shelf.open.pop(fact.call, None)
            if fact.what in {"close", "more", "lost"}:
                shelf.used += fact.amount
        elif fact.what == "lost" and fact.pin >= last - window.buckets:
            latest = fact.pin if latest is None else max(latest, fact.pin)
            shelves[fact.pin] = Shelf(used=fact.amount)
    last = newest(now)
    return {number: shelf for number, shelf in sorted(shelves.items()) if number >= last - window.buckets}, last


def _leaves(window: Sliding, number: int) -> int:
    """When a sub-bucket has left the window as a whole."""
    return (number + 1 + window.buckets) * window.bucket_ms


def _look_sliding(facts: Sequence[Fact], claim: Claim, now: int) -> State:
    meter, window = claim.meter, claim.meter.window
    assert isinstance(window, Sliding)
    shelves, last = _shelves(facts, window, now)
    used = sum(shelf.used for shelf in shelves.values())
    held = sum(sum(shelf.open.values()) for shelf in shelves.values())
    if meter.limit is None or used + held + claim.amount <= meter.limit:
        return State(used=used, held=held, fits=True, pin=last, resets=now)
    resets: int | None = None
    if claim.amount <= meter.limit:
        left = used + held
        for number, shelf in shelves.items():
            left -= shelf.total
            if left + claim.amount <= meter.limit:
                resets = _leaves(window, number)
                break
    return State(used=used, held=held, fits=False, pin=last, resets=resets)


def _read_sliding(facts: Sequence[Fact], meter: Meter, now: int) -> Reading:
    assert isinstance(meter.window, Sliding)
    shelves, _ = _shelves(facts, meter.window, now)
    counted = {number: shelf for number, shelf in shelves.items() if shelf.total}
    return Reading(
        sum(shelf.used for shelf in counted.values()),
        sum(sum(shelf.open.values()) for shelf in counted.values()),
        _leaves(meter.window, max(counted)) if counted else None,
    )


# ------------------------------------------------------------------------------------------- buckets


@dataclass(slots=True)
class Level:
    backlog: int = 0
    """In unit-ms."""
    at: int | None = None
    open: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By call: amount, instant of the claim."""

    def drain(self, meter: Meter, now: int) -> int:
        """Let drain what has drained by `now`; gives the instant, which never lies before an earlier one."""
        assert meter.limit is not None
        if self.at is not None:
            now = max(now, self.at)
            self.backlog = max(0, self.backlog - (now - self.at) * meter.limit)
        self.at = now
        return now

    def counts(self, period_ms: int) -> tuple[int, int]:
        """Used and held."""
        total = -(-self.backlog // period_ms)
        held = min(total, sum(amount for amount, _ in self.open.values()))
        return total - held, held


def _level(facts: Iterable[Fact], meter: Meter, now: int) -> Level:
    """The backlog at `now`."""
    level = Level()
    window = meter.window
    assert isinstance(window, Bucket)
    assert meter.limit is not None
    for fact in facts:
        if fact.what in {"give", "close"}:
            actual = fact.amount if fact.what == "close" else 0
            if level.open[fact.call][0] == actual:
                del level.open[fact.call]  # as was held: the backlog goes on draining as it did
                continue
        if fact.what == "reset" and level.at is None:
            continue
        at = level.drain(meter, fact.at)
        if fact.what == "take":
            level.backlog += fact.amount * window.period_ms
            level.open[fact.call] = (fact.amount, at)
        elif fact.what in {"debit", "more", "lost"}:
            level.backlog += fact.amount * window.period_ms
        elif fact.what == "reset":
            held = sum(amount for amount, _ in level.open.values())
            level.backlog = min(level.backlog, held * window.period_ms)
        else:
            held, since = level.open.pop(fact.call)
            actual = fact.amount if fact.what == "close" else 0
            if actual > held:
                level.backlog += (actual - held) * window.period_ms
            else:
                unused = (held - actual) * window.period_ms
                undrained = held * window.period_ms - (at - since) * meter.limit
                level.backlog = max(0, level.backlog - max(0, min(unused, undrained)))
    level.drain(meter, now)
    return level


def _look_bucket(facts: Sequence[Fact], claim: Claim, now: int) -> State:
    meter, window = claim.meter, claim.meter.window
    assert isinstance(window, Bucket)
    assert meter.limit is not None
    level = _level(facts, meter, now)
    assert level.at is not None
    used, held = level.counts(window.period_ms)
    above = level.backlog + (claim.amount - window.burst) * window.period_ms
    fits = above <= 0 and (meter.limit > 0 or claim.amount == 0)
    resets: int | None = now
    if not fits:
        never = claim.amount > window.burst or meter.limit == 0
        resets = None if never else level.at + -(-above // meter.limit)
    return State(used=used, held=held, fits=fits, pin=level.at, resets=resets)


def _read_bucket(facts: Sequence[Fact], meter: Meter, now: int) -> Reading:
    assert isinstance(meter.window, Bucket)
    level = _level(facts, meter, now)
    assert level.at is not None
    assert meter.limit is not None
    used, held = level.counts(meter.window.period_ms)
    empty = level.at + -(-level.backlog // meter.limit) if level.backlog else None
    return Reading(used, held, empty)


# ------------------------------------------------------------------------------------ slots and ids


def _slots(facts: Iterable[Fact]) -> int:
    taken: dict[str, int] = {}
    for fact in facts:
        if fact.what == "take":
            taken[fact.call] = fact.amount
        elif fact.what in {"give", "close"}:
            taken.pop(fact.call, None)
    return sum(taken.values())


def _look_slots(facts: Sequence[Fact], claim: Claim, _now: int) -> State:
    held, limit = _slots(facts), claim.meter.limit
    return State(used=0, held=held, fits=limit is None or held + claim.amount <= limit, pin=0, resets=None)


def _read_slots(facts: Sequence[Fact], _meter: Meter, _now: int) -> Reading:
    return Reading(0, _slots(facts), None)


def _ids(facts: Iterable[Fact], window: Distinct, now: int) -> dict[str, int]:
    """The live ids, and until when each lives."""
    until: dict[str, int] = {}
    for fact in facts:
        if fact.what in {"take", "debit"}:
            assert fact.member is not None
            until[fact.member] = max([fact.at + window.ttl_ms, *until.values()])
        elif fact.what == "reset":
            until.clear()
    return {member: end for member, end in until.items() if now < end}


def _look_ids(facts: Sequence[Fact], claim: Claim, now: int) -> State:
    meter, window = claim.meter, claim.meter.window
    assert isinstance(window, Distinct)
    live = _ids(facts, window, now)
    known = claim.member in live
    used = len(live) - known
    fits = meter.limit is None or (meter.limit > 0 and known) or used + claim.amount <= meter.limit
    if fits:
        resets: int | None = max([now + window.ttl_ms, *live.values()])
    else:
        resets = min(live.values()) if live and meter.limit else None
    return State(used=used, held=0, fits=fits, pin=0, resets=resets)


def _read_ids(facts: Sequence[Fact], meter: Meter, now: int) -> Reading:
    assert isinstance(meter.window, Distinct)
    live = _ids(facts, meter.window, now)
    return Reading(len(live), 0, max(live.values(), default=None))


_Look = Callable[[Sequence[Fact], Claim, int], State]
_Read = Callable[[Sequence[Fact], Meter, int], Reading]
_KINDS: dict[type, tuple[_Look, _Read]] = {
    Lifetime: (_look_instance, _read_instance),
    Rolling: (_look_instance, _read_instance),
    Calendar: (_look_instance, _read_instance),
    Sliding: (_look_sliding, _read_sliding),
    Bucket: (_look_bucket, _read_bucket),
    Slots: (_look_slots, _read_slots),
    Distinct: (_look_ids, _read_ids),
}


# --------------------------------------------------------------------------------------------- calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What an open call has taken."""

    call: str
    at: int
    owner: str
    plan: int
    receipts: tuple[Receipt, ...]
    draft: UsageRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a call ended, and when; with what it held if it expired."""

    reason: Literal["settled", "cancelled", "expired"]
    at: int
    hold: Hold | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Something that shows whether an owner lives."""

    at: int
    what: Literal["beat", "use", "lapse"]
    """A heartbeat, whose answer tells of a lapse; the first use by one that was not alive; or that it has
    lapsed, seen when holds were expired, so that no clock that steps back can undo it."""


class Oracle:
    """Answers as a storage must. The instant is an argument; nothing is ever forgotten."""

    def __init__(self, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS) -> None:
        self.lapse_ms = lapse_ms
        self.tombstone_ms = tombstone_ms
        self.facts: dict[str, list[Fact]] = {}
        self.calls: dict[str, list[Hold | End]] = {}
        self.owners: dict[str, list[Sign]] = {}
        self.ledger: dict[str, UsageRecord] = {}

    # ------------------------------------------------------------------------------ what is known

    def hold_of(self, call: str) -> Hold | None:
        """What the call holds, if it is open."""
        story = self.calls.get(call)
        return story[-1] if story and isinstance(story[-1], Hold) else None

    def end_of(self, call: str, now: int) -> End | None:
        """How the call ended, for as long as that is known."""
        story = self.calls.get(call)
        if story and isinstance(last := story[-1], End) and now < last.at + self.tombstone_ms:
            return last
        if call in self.ledger and self.hold_of(call) is None:
            return End(reason="settled", at=now)
        return None

    def holds(self, owners: Iterable[str] | None = None) -> list[Hold]:
        """All open holds, or those of `owners`, in the order of their admission."""
        found = [hold for call in self.calls if (hold := self.hold_of(call)) is not None]
        found.sort(key=lambda hold: (hold.at, hold.call))
        if owners is None:
            return found
        names = set(owners)
        return [hold for hold in found if hold.owner in names]

    def has_lapsed(self, owner: str, now: int) -> bool:
        """Whether the owner was alive once and its last sign of life is too old."""
        signs = self.owners.get(owner, [])
        return bool(signs) and (signs[-1].what == "lapse" or now >= signs[-1].at + self.lapse_ms)

    def look(self, claim: Claim, now: int, *, without: str | None = None) -> State:
        """What the claim's meter looks like to it; `without`: as if that call held nothing of it."""
        facts = list(self.facts.get(claim.meter.key, ()))
        if without is not None and (old := self._held(without, claim.meter.key)) is not None:
            facts.append(self._fact("give", now, old.claim, call=without, pin=old.pin))
        return _KINDS[type(claim.meter.window)][0](facts, claim, now)

    def _held(self, call: str, key: str) -> Receipt | None:
        hold = self.hold_of(call)
        if hold is None:
            return None
        return next((r for r in hold.receipts if r.taken and r.claim.meter.key == key), None)

    # --------------------------------------------------------------------------- what then happens

    @staticmethod
    def _fact(what: What, at: int, claim: Claim, *, call: str = "", pin: int = 0, amount: int | None = None) -> Fact:
        return Fact(
            what=what,
            at=at,
            meter=claim.meter,
            call=call,
            amount=claim.amount if amount is None else amount,
            member=claim.member,
            pin=pin,
        )

    def _note(self, fact: Fact) -> None:
        self.facts.setdefault(fact.meter.key, []).append(fact)

    def _take(self, call: str, claim: Claim, now: int) -> Receipt:
        state = self.look(claim, now)
        if state.fits:  # always so for enforced claims, or the plan would have been refused
            self._note(self._fact("take", now, claim, call=call))
        return _receipt(claim, state, taken=state.fits)

    def _expire(self, holds: Iterable[Hold], now: int) -> tuple[str, ...]:
        """Rule 5: held amounts become used ones or are given back, and the draft becomes a record."""
        expired = []
        for hold in holds:
            for receipt in hold.receipts:
                if receipt.taken:
                    what: What = "give" if receipt.claim.meter.expiry_charge == "nothing" else "close"
                    self._note(self._fact(what, now, receipt.claim, call=hold.call, pin=receipt.pin))
            self.calls[hold.call].append(End(reason="expired", at=now, hold=hold))
            if hold.draft is not None:
                self._append(
                    hold.call,
                    replace(hold.draft, outcome="expired", ended_ms=now, cost_nanousd=hold.draft.estimate_nanousd),
                )
            expired.append(hold.call)
        return tuple(expired)

    def _append(self, call: str, record: UsageRecord | None) -> None:
        if record is not None:
            self.ledger.setdefault(call, record)

    def _expire_lapsed(self, now: int) -> tuple[str, ...]:
        lapsed = [owner for owner in self.owners if self.has_lapsed(owner, now)]
        for owner in lapsed:
            last = self.owners[owner][-1]
            if last.what != "lapse":
                self.owners[owner].append(Sign(at=last.at + self.lapse_ms, what="lapse"))
        return self._expire(self.holds(lapsed), now)

    # ------------------------------------------------------------------------------------ the verbs

    def reserve(self, owner: str, plans: Sequence[Plan], now: int) -> Granted | Refused | Ended:
        calls = [bundle.call_id for bundle in plans[0]]
        for call in calls:
            if (end := self.end_of(call, now)) is not None:
                return Ended(call, end.reason, now)
        held = [hold for call in calls if (hold := self.hold_of(call)) is not None]
        if held:
            if len(held) < len(calls):
                raise ValueError("half-open plans are an error of the caller")
            return Granted(tuple(r for hold in held for r in hold.receipts), now, held[0].plan, replayed=True)
        if self.has_lapsed(owner, now):
            self._expire_lapsed(now)
        chosen = self._first_fit(plans, now)
        if chosen is None and self._expire_lapsed(now):
            chosen = self._first_fit(plans, now)
        if chosen is None:
            return Refused(
                tuple(tuple(_state(c, self.look(c, now)) for b in plan for c in b.claims) for plan in plans), now
            )
        receipts: list[Receipt] = []
        for bundle in plans[chosen]:
            own = tuple(self._take(bundle.call_id, claim, now) for claim in bundle.claims)
            hold = Hold(call=bundle.call_id, at=now, owner=owner, plan=chosen, receipts=own, draft=bundle.draft)
            self.calls.setdefault(bundle.call_id, []).append(hold)
            receipts += own
        self._register(owner, now)
        return Granted(tuple(receipts), now, chosen)

    def _register(self, owner: str, now: int) -> None:
        """The owner's lapse starts now if it is new, or had lapsed."""
        if owner not in self.owners or self.has_lapsed(owner, now):
            self.owners.setdefault(owner, []).append(Sign(at=now, what="use"))

    def _first_fit(self, plans: Sequence[Plan], now: int) -> int | None:
        for number, plan in enumerate(plans):
            claims = [claim for bundle in plan for claim in bundle.claims]
            if all(self.look(claim, now).fits for claim in claims if claim.meter.enforce):
                return number
        return None

    def amend(self, owner: str, bundle: Bundle, now: int) -> Granted | Refused | Ended:
        call = bundle.call_id
        if self.has_lapsed(owner, now):
            self._expire_lapsed(now)
        if self.hold_of(call) is not None and not self._amend_fits(bundle, now):
            self._expire_lapsed(now)
        hold = self.hold_of(call)
        if hold is None:
            end = self.end_of(call, now)
            return Ended(call, "unknown" if end is None else end.reason, now)
        if not self._amend_fits(bundle, now):
            states = tuple(
                replace(kept, taken=False)
                if (kept := self._kept(call, c))
                else _state(c, self.look(c, now, without=call))
                for c in bundle.claims
            )
            return Refused((states,), now)
        kept_receipts = {c.meter.key: kept for c in bundle.claims if (kept := self._kept(call, c)) is not None}
        for old in hold.receipts:
            if old.taken and old.claim.meter.key not in kept_receipts:
                self._note(self._fact("give", now, old.claim, call=call, pin=old.pin))
        receipts = tuple(kept_receipts.get(c.meter.key) or self._take(call, c, now) for c in bundle.claims)
        self.calls[call].append(
            Hold(call=call, at=hold.at, owner=owner, plan=hold.plan, receipts=receipts, draft=bundle.draft)
        )
        self._register(owner, now)
        return Granted(receipts, now)

    def _kept(self, call: str, claim: Claim) -> Receipt | None:
        """The receipt that an amended claim keeps: same meter and amount, under no lower limit."""
        old = self._held(call, claim.meter.key)
        if old is None or old.claim.amount != claim.amount or old.claim.member != claim.member:
            return None
        was, limit = old.claim.meter.limit, claim.meter.limit
        lowered = limit is not None and (was is None or limit < was)
        return None if lowered else old

    def _amend_fits(self, bundle: Bundle, now: int) -> bool:
        return all(
            self.look(claim, now, without=bundle.call_id).fits
            for claim in bundle.claims
            if claim.meter.enforce and self._kept(bundle.call_id, claim) is None
        )

    def settle(self, settlements: Sequence[Settlement], now: int) -> tuple[Settled, ...]:
        return tuple(self._settle(settlement, now) for settlement in settlements)

    def _settle(self, settlement: Settlement, now: int) -> Settled:
        call = settlement.call_id
        hold, end = self.hold_of(call), self.end_of(call, now)
        known = hold or (end.hold if end is not None and end.reason == "expired" else None)
        if end is not None and known is None:
            return Settled(call, "duplicate")
        if known is None and not (settlement.receipts or settlement.debits or settlement.record):
            self.calls.setdefault(call, []).append(End(reason="cancelled", at=now))
            return Settled(call, "cancelled")
        receipts = known.receipts if known is not None else settlement.receipts
        overages = []
        for number, receipt in enumerate(receipts):
            claim = receipt.claim
            counted = receipt.taken and not isinstance(claim.meter.window, Slots | Distinct)
            actual = _actual(settlement, number, claim.amount)
            overages.append(max(0, actual - claim.amount) if counted else 0)
            if not receipt.taken:
                continue
            if hold is not None:
                self._note(self._fact("close", now, claim, call=call, pin=receipt.pin, amount=actual))
            elif known is not None:
                charged = 0 if claim.meter.expiry_charge == "nothing" else claim.amount
                if counted and actual > charged:
                    self._note(self._fact("more", now, claim, pin=receipt.pin, amount=actual - charged))
            elif counted and actual:
                lost = self._fact("lost", now, claim, pin=receipt.pin, amount=actual)
                self._note(_with_end(lost, receipt))
        for claim in settlement.debits:
            if claim.amount and not isinstance(claim.meter.window, Slots | Distinct):
                self._note(self._fact("debit", now, claim))
        late = hold is None and known is not None
        if late and settlement.record is not None:
            self.ledger[call] = replace(settlement.record, late=True)
        else:
            self._append(call, settlement.record)
        self.calls.setdefault(call, []).append(End(reason="settled", at=now))
        return Settled(call, "settled" if hold else "late" if late else "lost", tuple(overages))

    def heartbeat(self, owner: str, now: int) -> Heartbeat:
        expired = self._expire_lapsed(now)
        signs = self.owners.setdefault(owner, [])
        before = [n for n, sign in enumerate(signs) if sign.what == "beat"]
        missed = any(sign.what == "lapse" for sign in signs[before[-1] if before else 0 :])
        signs.append(Sign(at=now, what="beat"))
        for other in list(self.owners):
            last = self.owners[other][-1]
            if last.what == "lapse" and last.at + MEMORY_MS <= now:
                del self.owners[other]
        alive = [known for known in self.owners.values() if known[-1].what != "lapse"]
        return Heartbeat(missed, expired, now, len(alive))

    def retire(self, owner: str, now: int) -> None:
        self._expire(self.holds([owner]), now)
        self.owners.pop(owner, None)

    def read(self, meters: Sequence[Meter], now: int) -> tuple[Reading, ...]:
        return tuple(_KINDS[type(m.window)][1](self.facts.get(m.key, ()), m, now) for m in meters)

    def reset(self, meters: Sequence[Meter], now: int) -> None:
        for meter in meters:
            self._note(Fact(what="reset", at=now, meter=meter))

    def records(self) -> list[UsageRecord]:
        return sorted(self.ledger.values(), key=lambda record: (record.at_ms, record.call_id))


def _actual(settlement: Settlement, number: int, held: int) -> int:
    if not settlement.actuals:
        return 0
    actual = settlement.actuals[number] if number < len(settlement.actuals) else None
    return held if actual is None else actual


def _with_end(fact: Fact, receipt: Receipt) -> Fact:
    """The fact, with the end of the instance that the receipt names."""
    meter = receipt.claim.meter
    if not isinstance(meter.window, Lifetime | Rolling | Calendar):
        return fact
    return dataclasses.replace(fact, ends=receipt.resets_at_ms)


def _receipt(claim: Claim, state: State, *, taken: bool) -> Receipt:
    return Receipt(
        claim=claim,
        taken=taken,
        fits=state.fits,
        used=state.used,
        held=state.held,
        pin=state.pin,
        resets_at_ms=state.resets,
    )


def _state(claim: Claim, state: State) -> Receipt:
    return _receipt(claim, state, taken=False)
