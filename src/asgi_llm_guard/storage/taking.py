"""Taking every claim of a plan, or none: the one loop that every reservation goes through.

In the hot path, and written for it. What each kind of window does is in `counting.py`; the usual cases are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from asgi_llm_guard.claims import Plan, Receipt
from asgi_llm_guard.storage.counting import (
    Cell,
    Members,
    drained,
    fill,
    forget_parts,
    instance,
    judge_bucket,
    judge_distinct,
    live,
    sliding_fits_at,
)
from asgi_llm_guard.storage.mistakes import claimed_twice, no_member
from asgi_llm_guard.storage.state import State
from asgi_llm_guard.windows import BUCKET, CALENDAR, LIFETIME, SLIDING, SLOTS

__all__ = ["not_taken", "take"]


def take(state: State, plan: Plan, now_ms: int) -> tuple[bool, tuple[Receipt, ...]]:
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
                raise claimed_twice(meter.key)
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
                        raise no_member(meter) if claim.member is None else claimed_twice(meter.key)
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
        raise claimed_twice(next(key for key in keys if keys.count(key) > 1))
    if refused:
        _give_back(cells, receipts, turn)
        return False, not_taken(receipts)
    for cell, receipt in later:
        _do_later(state.members, cell, receipt)
    for key, new in fresh:  # last, so that none of them looks unused to a store that forgets such cells
        cells[key] = new
    return True, tuple(receipts)


def _give_back(cells: dict[str, Cell], receipts: Iterable[Receipt], turn: int) -> None:
    """Undo what `take` has taken at once. New cells were not put among the others, so they are not found."""
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


def _do_later(members: Members, cell: Cell | None, receipt: Receipt) -> None:
    """Do what `take` has put off until every claim was judged."""
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


def not_taken(receipts: Iterable[Receipt]) -> tuple[Receipt, ...]:
    """The same states, of claims that are not held."""
    return tuple([Receipt(r.claim, False, r.fits, r.used, r.held, r.pin, r.resets_at_ms) for r in receipts])
