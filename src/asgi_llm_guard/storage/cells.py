"""The verbs of a storage as pure functions over plain dictionaries: no I/O, no clock, no lock.

The memory storage runs them on one `State` that it keeps for good; the SQLite storage on the rows that a batch
needs, and writes back those that differ. The rules are those of `storage/base.py`. A plan is taken in `taking.py`
and given back or charged in `releasing.py`, which are the hot loops; what a cell's fields mean, and what each kind
of window does with them, is in `counting.py`.

No function raises or refuses with half of its work done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

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
from asgi_llm_guard.storage.counting import copy, debit_current, reading, renew
from asgi_llm_guard.storage.mistakes import called_twice, claimed_twice, no_plan, not_open
from asgi_llm_guard.storage.releasing import charge, release
from asgi_llm_guard.storage.state import Hold, Owner, State, Tombstone
from asgi_llm_guard.storage.taking import not_taken, take
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import DISTINCT

__all__ = [
    "OWNER_MEMORY_MS",
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


# --------------------------------------------------------------------------------- reserve


def reserve(state: State, owner: str, plans: Sequence[Plan], now_ms: int) -> Granted | Refused | Ended:
    """Take every claim of the first plan that fits, or none of any; see `Storage.reserve`.

    Raises:
        ValueError: no plan, two claims on one meter or two bundles under one call id, a `Distinct`
            claim without a member, or some call ids open and others not.
    """
    if not plans:
        raise no_plan()
    holds, ended, ledger = state.holds, state.ended, state.ledger
    first = plans[0]
    if len(first) > 1 and len({bundle.call_id for bundle in first}) < len(first):
        raise called_twice()
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
            granted, receipts = take(state, plan, now_ms)
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
        raise not_open(missing)
    held = [state.holds[bundle.call_id] for bundle in plan]
    return Granted(tuple(r for hold in held for r in hold.receipts), now_ms, held[0].plan, True)


def _ended(state: State, call_id: str, now_ms: int) -> Ended | None:
    tombstone = state.ended.get(call_id)
    if tombstone is not None and now_ms < tombstone.until_ms:
        return Ended(call_id, tombstone.reason, now_ms)
    if call_id in state.ledger:
        return Ended(call_id, "settled", now_ms)
    return None


def _hold_each(state: State, owner: str, plan: Plan, receipts: tuple[Receipt, ...], now_ms: int, number: int) -> None:
    """One hold for each bundle of a plan that has several."""
    at = 0
    for bundle in plan:
        upto = at + len(bundle.claims)
        state.holds[bundle.call_id] = Hold(bundle.call_id, owner, receipts[at:upto], bundle.draft, now_ms, number)
        at = upto


# ---------------------------------------------------------------------------------- settle


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
        overages = release(state.cells, hold.receipts, settlement.actuals, now_ms)
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
        overages = charge(state.cells, hold.receipts, settlement.actuals, now_ms, late=True)
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
    overages = charge(state.cells, settlement.receipts, settlement.actuals, now_ms, late=False)
    _debit_each(state, settlement, now_ms)
    if record is not None:
        state.ledger.append(record)
    state.ended[call_id] = Tombstone("settled", until_ms)
    return Settled(call_id, "lost", overages)


def _debit_each(state: State, settlement: Settlement, now_ms: int) -> None:
    """Charge what no hold stood for."""
    for claim in settlement.debits:
        debit_current(state.cells, claim, now_ms)


# ----------------------------------------------------------------------------------- amend


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
        raise claimed_twice(next(key for key in keys if keys.count(key) > 1))
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
    release(state.cells, given_back, (0,) * len(given_back), now_ms)
    granted = False
    try:
        granted, receipts = take(state, (asked,), now_ms)
    finally:
        if not granted:
            state.cells.update(saved)
    if not granted:
        kept = {key: not_taken((receipt,))[0] for key, receipt in kept.items()}
    judged = iter(receipts)
    states = tuple([kept.get(claim.meter.key) or next(judged) for claim in bundle.claims])
    return Granted(states, now_ms) if granted else Refused((states,), now_ms)


def _lower(limit: int | None, other: int | None) -> bool:
    return limit is not None and (other is None or limit < other)


# ------------------------------------------------------ owners, and what they leave behind


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
        release(
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


# ----------------------------------------------------------------------------- read, reset


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
