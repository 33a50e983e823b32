"""The verbs of a storage as pure functions over plain dictionaries: no I/O, no clock, no lock.

The memory storage keeps one `State` for good. The SQLite storage fills one with the rows that a
batch needs (`Needs` says which), runs the same functions and writes back the rows that differ.
The rules are those of `storage/base.py`. What a cell's fields mean, and what each kind of window does with
them, is in `counting.py`.

No function raises or refuses with half of its work done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, Protocol, cast

import msgspec

from asgi_llm_guard.claims import (
    Bundle,
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
from asgi_llm_guard.storage.counting import (
    Cell,
    Members,
    copy,
    correct,
    debit,
    debit_current,
    drained,
    fill,
    forget_parts,
    instance,
    judge_bucket,
    judge_distinct,
    live,
    reading,
    renew,
    sliding_fits_at,
)
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import BUCKET, CALENDAR, DISTINCT, LIFETIME, SLIDING, SLOTS

__all__ = [
    "OWNER_MEMORY_MS",
    "Hold",
    "Ledger",
    "Needs",
    "Owner",
    "State",
    "Tombstone",
    "amend",
    "any_lapsed",
    "heartbeat",
    "read",
    "reserve",
    "reset",
    "retire",
    "settle",
    "sweep",
]

OWNER_MEMORY_MS: Final = 86_400_000
"""How long a lapsed owner is remembered, so that it learns of its lapse should it wake up."""


# ------------------------------------------------------------------------------------ state


class Hold(msgspec.Struct, gc=False):
    """What one open call id has taken."""

    call_id: str
    owner: str
    receipts: tuple[Receipt, ...]
    draft: UsageRecord | None
    at_ms: int
    plan: int = 0
    """Which of the offered plans was granted."""


class Tombstone(msgspec.Struct, frozen=True, gc=False):
    """A call id that has ended, remembered until `until_ms`."""

    reason: Literal["settled", "cancelled", "expired"]
    until_ms: int
    hold: Hold | None = None
    """What had been held, for a settlement that comes after the hold expired; else `None`."""


class Owner(msgspec.Struct, gc=False):
    """One process incarnation. `lapse_at_ms` is 0 when it has lapsed and nothing of it is open."""

    lapse_at_ms: int
    lapsed_ms: int = 0
    """When it lapsed, until its next heartbeat has told it so; else 0."""


class Ledger(Protocol):
    """Where usage records go."""

    def __contains__(self, call_id: object) -> bool: ...

    def append(self, record: UsageRecord) -> None: ...

    def replace(self, call_id: str, record: UsageRecord) -> None:
        """Put `record` in the place of the one with this call id; append it if there is none."""
        ...


class State:
    """Everything a storage knows, or the part of it that a batch needs."""

    __slots__ = ("cells", "ended", "holds", "lapse_ms", "ledger", "members", "owners", "tombstone_ms", "turn")

    def __init__(
        self,
        *,
        members: Members,
        ledger: Ledger,
        cells: dict[str, Cell] | None = None,
        holds: dict[str, Hold] | None = None,
        ended: dict[str, Tombstone] | None = None,
        owners: dict[str, Owner] | None = None,
        lapse_ms: int = LAPSE_MS,
        tombstone_ms: int = TOMBSTONE_MS,
    ) -> None:
        self.cells: dict[str, Cell] = {} if cells is None else cells
        self.holds: dict[str, Hold] = {} if holds is None else holds
        self.ended: dict[str, Tombstone] = {} if ended is None else ended
        self.owners: dict[str, Owner] = {} if owners is None else owners
        self.members = members
        self.ledger = ledger
        self.lapse_ms = lapse_ms
        self.tombstone_ms = tombstone_ms
        self.turn = 0


class Needs:
    """What has to be in a `State` before a verb runs on it.

    Ask in two steps: first what the verbs name (`calls` for holds, tombstones and the ledger; all
    owners), then, with `of_hold` for every hold and tombstone that was found, the meters behind them.
    A verb that may sweep (`reserve`, `amend`, `heartbeat`, `retire`) also needs the holds of owners
    that have lapsed by then (`retire`: of its owner).
    """

    __slots__ = ("calls", "keys")

    def __init__(self) -> None:
        self.calls: set[str] = set()
        """Call ids."""
        self.keys: set[str] = set()
        """Keys of meters that have cells."""

    def of_plans(self, plans: Iterable[Plan]) -> None:
        """What `reserve` reads and writes."""
        for plan in plans:
            for bundle in plan:
                self.of_bundle(bundle)

    def of_bundle(self, bundle: Bundle) -> None:
        """What `amend` reads and writes, besides its hold."""
        self.calls.add(bundle.call_id)
        self.of_meters(claim.meter for claim in bundle.claims)

    def of_settlements(self, settlements: Iterable[Settlement]) -> None:
        """What `settle` reads and writes, besides its holds and tombstones."""
        for settlement in settlements:
            self.calls.add(settlement.call_id)
            self.of_meters(receipt.claim.meter for receipt in settlement.receipts)
            self.of_meters(claim.meter for claim in settlement.debits)

    def of_hold(self, hold: Hold | None) -> None:
        """The meters behind a hold, or behind the one that a tombstone carries."""
        if hold is not None:
            self.calls.add(hold.call_id)
            self.of_meters(receipt.claim.meter for receipt in hold.receipts)

    def of_meters(self, meters: Iterable[Meter]) -> None:
        """What `read` and `reset` touch."""
        self.keys.update(meter.key for meter in meters if meter.kind != DISTINCT)


# ---------------------------------------------------------------------------------- reserve


def reserve(state: State, owner: str, plans: Sequence[Plan], now_ms: int) -> Granted | Refused | Ended:
    """Take every claim of the first plan that fits, or none of any; see `Storage.reserve`.

    Raises:
        ValueError: no plan, two claims on one meter or two bundles under one call id, a `Distinct`
            claim without a member, or some call ids open and others not.
    """
    if not plans:
        raise ValueError("reserve: expected at least one plan, got none")
    holds, ended, ledger = state.holds, state.ended, state.ledger
    first = plans[0]
    if len(first) > 1 and len({bundle.call_id for bundle in first}) < len(first):
        raise ValueError("reserve: two bundles of one plan have the same call id")
    for bundle in first:
        call_id = bundle.call_id
        if call_id in holds or call_id in ended or call_id in ledger:
            seen = _seen(state, first, now_ms)
            if seen is not None:
                return seen
            break
    mine = state.owners.get(owner)
    if mine is not None and mine.lapse_at_ms <= now_ms:
        # Its older holds are past saving; what it takes now must not be expired together with them.
        sweep(state, now_ms)
    while True:
        states: list[tuple[Receipt, ...]] = []
        for number, plan in enumerate(plans):
            granted, receipts = _take(state, plan, now_ms)
            if not granted:
                states.append(receipts)
                continue
            if len(plan) == 1:
                bundle = plan[0]
                holds[bundle.call_id] = Hold(bundle.call_id, owner, receipts, bundle.draft, now_ms, number)
            else:
                _hold_each(state, owner, plan, receipts, now_ms, number)
            if mine is None:
                state.owners[owner] = Owner(now_ms + state.lapse_ms)
            elif mine.lapse_at_ms <= now_ms:
                mine.lapse_at_ms = now_ms + state.lapse_ms
            return Granted(receipts, now_ms, number)
        if not any_lapsed(state, now_ms):
            return Refused(tuple(states), now_ms)
        sweep(state, now_ms)


def _seen(state: State, plan: Plan, now_ms: int) -> Granted | Ended | None:
    """The answer for call ids of which at least one may be known; `None`: none of them is."""
    open_ids = 0
    for bundle in plan:
        call_id = bundle.call_id
        if call_id in state.holds:
            open_ids += 1
            continue
        ended = _ended(state, call_id, now_ms)
        if ended is not None:
            return ended
    if not open_ids:
        return None
    if open_ids < len(plan):
        missing = next(bundle.call_id for bundle in plan if bundle.call_id not in state.holds)
        raise ValueError(
            f"reserve: call ids are reserved together, but {missing!r} is not open and others of its plan are"
        )
    held = [state.holds[bundle.call_id] for bundle in plan]
    return Granted(tuple(r for hold in held for r in hold.receipts), now_ms, held[0].plan, True)


def _ended(state: State, call_id: str, now_ms: int) -> Ended | None:
    tombstone = state.ended.get(call_id)
    if tombstone is not None and now_ms < tombstone.until_ms:
        return Ended(call_id, tombstone.reason, now_ms)
    if call_id in state.ledger:
        return Ended(call_id, "settled", now_ms)
    return None


def _take(state: State, plan: Plan, now_ms: int) -> tuple[bool, tuple[Receipt, ...]]:
    """Take every claim of the plan and give (True, receipts), or change nothing and give (False, states).

    In the hot path, hence one loop without helpers for the usual cases. What is easily undone is taken
    as soon as it fits, and given back if another claim refuses; the rest waits in `fresh` and `later`.
    """
    cells = state.cells
    get = cells.get
    turn = state.turn = state.turn + 1
    receipts: list[Receipt] = []
    add = receipts.append
    fresh: list[tuple[str, Cell]] = []
    later: list[tuple[Cell | None, Receipt]] = []
    refused = False
    window: Any
    for bundle in plan:
        for claim in bundle.claims:
            meter = claim.meter
            amount = claim.amount
            limit = meter.limit
            kind = meter.kind
            cell = get(meter.key)
            if cell is not None and cell.turn == turn:
                _give_back(cells, receipts, turn)
                raise _claimed_twice(meter.key)
            if kind <= CALENDAR:
                if cell is None or now_ms >= cell.end:
                    cell = instance(meter, now_ms)
                    fresh.append((meter.key, cell))
                used = cell.used
                held = cell.held
                end = cell.end
                if limit is None or used + held + amount <= limit:
                    cell.held = held + amount
                    cell.turn = turn
                    if kind == LIFETIME:
                        window = meter.window
                        if window.renew and end < now_ms + window.ttl_ms:
                            end = now_ms + window.ttl_ms
                            later.append((cell, Receipt(claim, True, True, used, held, cell.start, end)))
                    add(Receipt(claim, True, True, used, held, cell.start, end))
                    continue
                add(Receipt(claim, False, False, used, held, cell.start, end if amount <= limit else None))
            elif kind == SLIDING:
                if cell is None:
                    cell = Cell(SLIDING, 0, 0, 0, 0, {})
                    fresh.append((meter.key, cell))
                window = meter.window
                pin = now_ms // (window.period_ms // window.buckets)
                if pin < cell.start:  # noqa: PLR1730 - a call of `max` costs four times as much
                    pin = cell.start
                if now_ms < cell.end:
                    used = cell.used
                    held = cell.held
                else:
                    used, held = live(cell, pin - window.buckets)
                if limit is None or used + held + amount <= limit:
                    cell.turn = turn
                    receipt = Receipt(claim, True, True, used, held, pin, now_ms)
                    add(receipt)
                    part = cell.parts.get(pin)  # type: ignore[union-attr]
                    if part is None:
                        later.append((cell, receipt))
                    else:
                        part[1] += amount
                        cell.held += amount
                    continue
                fits_at = sliding_fits_at(cell, meter, amount, used + held, pin)
                add(Receipt(claim, False, False, used, held, pin, fits_at))
            elif kind == SLOTS:
                if cell is None:
                    cell = Cell(SLOTS, 0, 0, 0, 0)
                    fresh.append((meter.key, cell))
                held = cell.held
                if limit is None or held + amount <= limit:
                    cell.held = held + amount
                    cell.turn = turn
                    add(Receipt(claim, True, True, 0, held, 0, None))
                    continue
                add(Receipt(claim, False, False, 0, held, 0, None))
            else:
                if kind == BUCKET:
                    if cell is None:
                        cell = Cell(BUCKET, 0, 0, now_ms, now_ms)
                        fresh.append((meter.key, cell))
                    receipt = judge_bucket(cell, claim, now_ms)
                else:
                    if claim.member is None or any(other.claim.meter.key == meter.key for other in receipts):
                        _give_back(cells, receipts, turn)
                        raise _no_member(meter) if claim.member is None else _claimed_twice(meter.key)
                    receipt = judge_distinct(state.members, claim, claim.member, now_ms)
                add(receipt)
                if receipt.taken:
                    if cell is not None:
                        cell.turn = turn
                    later.append((cell, receipt))
                    continue
            if fresh and fresh[-1][1] is cell:
                fresh.pop()
            if meter.enforce:
                refused = True
    if len(fresh) > 1 and len({key for key, _ in fresh}) < len(fresh):
        _give_back(cells, receipts, turn)
        keys = [key for key, _ in fresh]
        raise _claimed_twice(next(key for key in keys if keys.count(key) > 1))
    if refused:
        _give_back(cells, receipts, turn)
        return False, _not_taken(receipts)
    for cell, receipt in later:
        _take_later(state.members, cell, receipt)
    for key, new in fresh:  # last, so that none of them looks unused to a store that forgets such cells
        cells[key] = new
    return True, tuple(receipts)


def _give_back(cells: dict[str, Cell], receipts: Iterable[Receipt], turn: int) -> None:
    """Undo what `_take` has taken at once. New cells were not put among the others, so they are not found."""
    for receipt in receipts:
        meter = receipt.claim.meter
        if receipt.taken and meter.kind <= SLOTS and meter.kind != BUCKET:
            cell = cells.get(meter.key)
            if cell is None or cell.turn != turn:
                continue
            if cell.parts is not None:
                part = cell.parts.get(receipt.pin)
                if part is None:
                    continue
                part[1] -= receipt.claim.amount
            cell.held -= receipt.claim.amount


def _take_later(members: Members, cell: Cell | None, receipt: Receipt) -> None:
    """Do what `_take` has put off until every claim was judged."""
    claim = receipt.claim
    window: Any = claim.meter.window
    if cell is None:
        members.touch(claim.meter.key, cast("str", claim.member), cast("int", receipt.resets_at_ms))
    elif cell.kind == SLIDING:
        cell.held += claim.amount
        parts: Any = cell.parts
        parts[receipt.pin] = [0, claim.amount]
        forget_parts(cell, receipt.pin, window)
    elif cell.kind == BUCKET:
        cell.held += claim.amount
        _, backlog = drained(cell, claim.meter, receipt.pin)
        fill(cell, claim.meter, receipt.pin, backlog + claim.amount * window.period_ms)
    else:  # a Lifetime that its use renews
        cell.end = cast("int", receipt.resets_at_ms)


def _not_taken(receipts: Iterable[Receipt]) -> tuple[Receipt, ...]:
    return tuple([Receipt(r.claim, False, r.fits, r.used, r.held, r.pin, r.resets_at_ms) for r in receipts])


def _hold_each(state: State, owner: str, plan: Plan, receipts: tuple[Receipt, ...], now_ms: int, number: int) -> None:
    """One hold for each bundle of a plan that has several."""
    at = 0
    for bundle in plan:
        upto = at + len(bundle.claims)
        state.holds[bundle.call_id] = Hold(bundle.call_id, owner, receipts[at:upto], bundle.draft, now_ms, number)
        at = upto


def _claimed_twice(key: str) -> ValueError:
    return ValueError(f"two claims of one plan are on the meter {key!r}; merge them into one")


def _no_member(meter: Meter) -> ValueError:
    return ValueError(f"{meter.policy}: a claim on distinct ids names its id, got None (meter {meter.key!r})")


# ------------------------------------------------------------------------- settle and expire


def settle(state: State, settlements: Sequence[Settlement], now_ms: int) -> tuple[Settled, ...]:
    """Settle each call id once, in order; see `Storage.settle`.

    No actuals at all mean that nothing was used. Else missing ones count as `None` (what is held), and
    surplus ones are ignored: settling never fails.
    """
    holds = state.holds
    settled: list[Settled] = []
    for settlement in settlements:
        call_id = settlement.call_id
        hold = holds.pop(call_id, None)
        if hold is None:
            settled.append(_settle_unheld(state, settlement, now_ms))
            continue
        overages = _release(state.cells, hold.receipts, settlement.actuals, now_ms)
        state.ended[call_id] = Tombstone("settled", now_ms + state.tombstone_ms)
        if settlement.record is not None:
            state.ledger.append(settlement.record)
        if settlement.debits:
            _debit_each(state, settlement, now_ms)
        settled.append(Settled(call_id, "settled", overages))
    return tuple(settled)


def _settle_unheld(state: State, settlement: Settlement, now_ms: int) -> Settled:
    call_id = settlement.call_id
    record = settlement.record
    until_ms = now_ms + state.tombstone_ms
    tombstone = state.ended.get(call_id)
    if tombstone is not None and now_ms < tombstone.until_ms:
        hold = tombstone.hold
        if hold is None:
            return Settled(call_id, "duplicate")
        overages = _charge(state.cells, hold.receipts, settlement.actuals, now_ms, late=True)
        if record is not None:
            state.ledger.replace(call_id, msgspec.structs.replace(record, late=True))
        _debit_each(state, settlement, now_ms)
        del state.ended[call_id]  # so that the ids stay in the order in which they may be forgotten
        state.ended[call_id] = Tombstone("settled", until_ms)
        return Settled(call_id, "late", overages)
    if call_id in state.ledger:
        return Settled(call_id, "duplicate")
    state.ended.pop(call_id, None)
    if record is None and not settlement.receipts and not settlement.debits:
        state.ended[call_id] = Tombstone("cancelled", until_ms)
        return Settled(call_id, "cancelled")
    overages = _charge(state.cells, settlement.receipts, settlement.actuals, now_ms, late=False)
    _debit_each(state, settlement, now_ms)
    if record is not None:
        state.ledger.append(record)
    state.ended[call_id] = Tombstone("settled", until_ms)
    return Settled(call_id, "lost", overages)


def _paired(receipts: Sequence[Receipt], actuals: Sequence[int | None]) -> tuple[int | None, ...]:
    """As many actuals as there are receipts."""
    if not actuals:
        return (0,) * len(receipts)
    return (*actuals, *(None,) * (len(receipts) - len(actuals)))[: len(receipts)]


def _release(
    cells: dict[str, Cell], receipts: Sequence[Receipt], actuals: Sequence[int | None], now_ms: int
) -> tuple[int, ...]:
    """Put actual amounts in the place of the held ones, each in its pinned window; gives the overages."""
    if len(actuals) != len(receipts):
        actuals = _paired(receipts, actuals)
    get = cells.get
    over = False
    for receipt, given in zip(receipts, actuals):  # noqa: B905 - made equal above, and `strict` costs time
        if not receipt.taken:
            continue
        claim = receipt.claim
        held = claim.amount
        actual = held if given is None else given
        meter = claim.meter
        kind = meter.kind
        if kind == DISTINCT:
            continue
        cell = get(meter.key)
        if kind <= CALENDAR:
            if cell is not None and cell.start == receipt.pin:
                cell.held -= held
                used = cell.used + actual
                cell.used = used if used <= MAX_AMOUNT else MAX_AMOUNT  # noqa: FURB136 - as in `_take`
        elif cell is None:
            if kind == BUCKET and actual > held:  # empty, with a hold of 0: forgotten, but no less to be charged
                debit(cells, receipt, actual - held, now_ms, make=True)
        elif kind == SLIDING:
            parts: Any = cell.parts
            part = parts.get(receipt.pin)
            if part is not None:
                part[1] -= held
                cell.held -= held
                part[0] += actual
                cell.used += actual
        else:
            cell.held -= held
            if kind == SLOTS:
                continue
            if actual != held:
                correct(cell, meter, receipt.pin, held, actual, now_ms)
        if actual > held:
            over = True
    return _overages(receipts, actuals) if over else (0,) * len(receipts)


def _overages(receipts: Sequence[Receipt], actuals: Sequence[int | None]) -> tuple[int, ...]:
    """For each claim by how much the actual amount is above the held one."""
    return tuple(
        [
            max(0, actual - receipt.claim.amount)
            if actual is not None and receipt.taken and receipt.claim.meter.kind not in (SLOTS, DISTINCT)
            else 0
            for receipt, actual in zip(receipts, actuals, strict=True)
        ]
    )


def _charge(
    cells: dict[str, Cell], receipts: Sequence[Receipt], actuals: Sequence[int | None], now_ms: int, *, late: bool
) -> tuple[int, ...]:
    """Debit what no hold stands for any more; gives the overages.

    `late`: what is above the amount that expiry has charged, in the pinned window if it is still
    there. Else (the store lost the hold): the whole, also in a window that has to be made again.
    """
    paired = _paired(receipts, actuals)
    overages = _overages(receipts, paired)
    for receipt, actual, overage in zip(receipts, paired, overages, strict=True):
        meter = receipt.claim.meter
        if not receipt.taken or meter.kind in (SLOTS, DISTINCT):
            continue
        if late and meter.expiry_charge == "hold":
            amount = overage
        else:
            amount = receipt.claim.amount if actual is None else actual
        if amount > 0:
            debit(cells, receipt, amount, now_ms, make=not late)
    return overages


def _debit_each(state: State, settlement: Settlement, now_ms: int) -> None:
    """Charge what no hold stood for."""
    for claim in settlement.debits:
        debit_current(state.cells, claim, now_ms)


def any_lapsed(state: State, now_ms: int) -> bool:
    """Whether some owner has lapsed and its holds have not been expired yet."""
    for owner in state.owners.values():  # noqa: SIM110 - asked by every refusal: a generator costs three times as much
        if 0 < owner.lapse_at_ms <= now_ms:
            return True
    return False


def sweep(state: State, now_ms: int) -> tuple[str, ...]:
    """Expire all holds of lapsed owners; gives their call ids, in the order of admission."""
    lapsed = {name for name, owner in state.owners.items() if 0 < owner.lapse_at_ms <= now_ms}
    for name in lapsed:
        owner = state.owners[name]
        owner.lapsed_ms = owner.lapse_at_ms
        owner.lapse_at_ms = 0
    return _expire(state, lapsed, now_ms) if lapsed else ()


def _expire(state: State, owners: Iterable[str], now_ms: int) -> tuple[str, ...]:
    due = [hold for hold in state.holds.values() if hold.owner in owners]
    due.sort(key=lambda hold: (hold.at_ms, hold.call_id))
    for hold in due:
        del state.holds[hold.call_id]
        _release(
            state.cells,
            hold.receipts,
            [None if r.claim.meter.expiry_charge == "hold" else 0 for r in hold.receipts],
            now_ms,
        )
        state.ended.pop(hold.call_id, None)
        state.ended[hold.call_id] = Tombstone("expired", now_ms + state.tombstone_ms, hold)
        if hold.draft is not None:
            state.ledger.append(_estimate(hold.draft, now_ms))
    return tuple([hold.call_id for hold in due])


def _estimate(draft: UsageRecord, now_ms: int) -> UsageRecord:
    """The record of a call whose owner died: charged what was held, since it may have been billed."""
    cost = draft.cost_nanousd if draft.estimate_nanousd is None else draft.estimate_nanousd
    return msgspec.structs.replace(draft, outcome="expired", cost_nanousd=cost, usage=None, ended_ms=now_ms)


# ------------------------------------------------------------------------------------- amend


def amend(state: State, owner: str, bundle: Bundle, now_ms: int) -> Granted | Refused | Ended:
    """Replace the claims of an open hold, or change nothing; see `Storage.amend`.

    Raises:
        ValueError: two claims on one meter, or a `Distinct` claim without a member.
    """
    mine = state.owners.get(owner)
    if mine is not None and mine.lapse_at_ms <= now_ms:
        sweep(state, now_ms)  # as in `reserve`
    while True:
        hold = state.holds.get(bundle.call_id)
        if hold is None:
            return _ended(state, bundle.call_id, now_ms) or Ended(bundle.call_id, "unknown", now_ms)
        answer = _amend(state, hold, bundle, now_ms)
        if isinstance(answer, Granted):
            hold.receipts = answer.receipts
            hold.draft = bundle.draft
            hold.owner = owner
            if mine is None:
                state.owners[owner] = Owner(now_ms + state.lapse_ms)
            elif mine.lapse_at_ms <= now_ms:
                mine.lapse_at_ms = now_ms + state.lapse_ms
            return answer
        if not any_lapsed(state, now_ms):
            return answer
        sweep(state, now_ms)


def _amend(state: State, hold: Hold, bundle: Bundle, now_ms: int) -> Granted | Refused:
    before = {receipt.claim.meter.key: receipt for receipt in hold.receipts if receipt.taken}
    keys = [claim.meter.key for claim in bundle.claims]
    if len(set(keys)) < len(keys):
        raise _claimed_twice(next(key for key in keys if keys.count(key) > 1))
    kept: dict[str, Receipt] = {}
    for claim in bundle.claims:
        old = before.get(claim.meter.key)
        if (
            old is not None
            and old.claim.amount == claim.amount
            and old.claim.member == claim.member
            and not _lower(claim.meter.limit, old.claim.meter.limit)
        ):
            kept[claim.meter.key] = old
    given_back = [receipt for key, receipt in before.items() if key not in kept]
    asked = Bundle(bundle.call_id, tuple(claim for claim in bundle.claims if claim.meter.key not in kept))
    saved = {key: copy(cell) for key in before if (cell := state.cells.get(key)) is not None}
    _release(state.cells, given_back, (0,) * len(given_back), now_ms)
    granted = False
    try:
        granted, receipts = _take(state, (asked,), now_ms)
    finally:
        if not granted:
            state.cells.update(saved)
    if not granted:
        kept = {key: _not_taken((receipt,))[0] for key, receipt in kept.items()}
    judged = iter(receipts)
    states = tuple([kept.get(claim.meter.key) or next(judged) for claim in bundle.claims])
    return Granted(states, now_ms) if granted else Refused((states,), now_ms)


def _lower(limit: int | None, other: int | None) -> bool:
    return limit is not None and (other is None or limit < other)


# ------------------------------------------------------------------------------------ owners


def heartbeat(state: State, owner: str, now_ms: int) -> Heartbeat:
    """Expire the holds of lapsed owners, then keep those of `owner`; see `Storage.heartbeat`."""
    expired = sweep(state, now_ms)
    mine = state.owners.get(owner)
    lapsed = mine is not None and mine.lapsed_ms > 0
    state.owners[owner] = Owner(now_ms + state.lapse_ms)
    for name, other in list(state.owners.items()):
        if other.lapse_at_ms == 0 and other.lapsed_ms + OWNER_MEMORY_MS <= now_ms:
            del state.owners[name]
    alive = [other for other in state.owners.values() if other.lapse_at_ms > 0]
    return Heartbeat(lapsed, expired, now_ms, len(alive))


def retire(state: State, owner: str, now_ms: int) -> tuple[str, ...]:
    """Expire what `owner` still holds and forget it; gives the call ids."""
    state.owners.pop(owner, None)
    return _expire(state, (owner,), now_ms)


# ------------------------------------------------------------------------------ read, reset


def read(state: State, meters: Iterable[Meter], now_ms: int) -> tuple[Reading, ...]:
    """The state of each meter.

    `resets_at_ms` is when the instance ends; for `Sliding`, `Bucket` and `Distinct`, when nothing is
    left if nothing else comes; `None` for `Slots` and where nothing is counted.
    """
    readings = []
    for meter in meters:
        if meter.kind == DISTINCT:
            count, _ = state.members.look(meter.key, "", now_ms)
            ends = state.members.ends(meter.key)
            readings.append(Reading(count, 0, None if ends is None else ends[1]))
        else:
            cell = state.cells.get(meter.key)
            readings.append(Reading(0, 0, None) if cell is None else reading(cell, meter, now_ms))
    return tuple(readings)


def reset(state: State, meters: Iterable[Meter], now_ms: int) -> None:
    """Set what is used to 0 and start the window anew; what is held stays, pinned to the same instance."""
    for meter in meters:
        if meter.kind == DISTINCT:
            state.members.clear(meter.key)
            continue
        cell = state.cells.get(meter.key)
        if cell is not None:
            renew(cell, meter, now_ms)
