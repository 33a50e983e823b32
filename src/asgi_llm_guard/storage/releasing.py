"""Putting what a call has used in the place of what it held: the one loop that every settlement goes through.

`release` is in the hot path; `charge` is for what no hold stands for any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_llm_guard.claims import Receipt
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.storage.counting import Cell, correct, debit
from asgi_llm_guard.windows import BUCKET, CALENDAR, DISTINCT, SLIDING, SLOTS

__all__ = ["charge", "overages_of", "paired", "release"]


def release(
    cells: dict[str, Cell], receipts: Sequence[Receipt], actuals: Sequence[int | None], now_ms: int
) -> tuple[int, ...]:
    """Put actual amounts in the place of the held ones, each in its pinned window; gives the overages."""
    if len(actuals) != len(receipts):
        actuals = paired(receipts, actuals)
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
                cell.used = used if used <= MAX_AMOUNT else MAX_AMOUNT  # noqa: FURB136 - as in `take`
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
    return overages_of(receipts, actuals) if over else (0,) * len(receipts)


def charge(
    cells: dict[str, Cell], receipts: Sequence[Receipt], actuals: Sequence[int | None], now_ms: int, *, late: bool
) -> tuple[int, ...]:
    """Debit what no hold stands for any more; gives the overages.

    `late`: what is above the amount that expiry has charged, in the pinned window if it is still
    there. Else (the store lost the hold): the whole, also in a window that has to be made again.
    """
    all_actuals = paired(receipts, actuals)
    overages = overages_of(receipts, all_actuals)
    for receipt, actual, overage in zip(receipts, all_actuals, overages, strict=True):
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


def overages_of(receipts: Sequence[Receipt], actuals: Sequence[int | None]) -> tuple[int, ...]:
    """For each claim by how much the actual amount is above the held one."""
    return tuple(
        [
            max(0, actual - receipt.claim.amount)
            if actual is not None and receipt.taken and receipt.claim.meter.kind not in (SLOTS, DISTINCT)
            else 0
            for receipt, actual in zip(receipts, actuals, strict=True)
        ]
    )


def paired(receipts: Sequence[Receipt], actuals: Sequence[int | None]) -> tuple[int | None, ...]:
    """As many actuals as there are receipts."""
    if not actuals:
        return (0,) * len(receipts)
    return (*actuals, *(None,) * (len(receipts) - len(actuals)))[: len(receipts)]
