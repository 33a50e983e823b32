"""How one cell counts: what each kind of window does with it. Pure functions, as the verbs in `cells.py` that use them.

What a cell's fields mean depends on its window:

| window | used, held | start | end |
|---|---|---|---|
| `Lifetime`, `Rolling`, `Calendar` | of this instance | names the instance: what receipts pin | when it is over |
| `Sliding` | sums over `parts` | number of the newest sub-bucket | when the oldest sub-bucket leaves |
| `Bucket` | backlog in unit-ms (holds included), units held | instant of the backlog | when it has drained |
| `Slots` | 0, slots held | 0 | 0 |
| `Distinct` | has no cell: its ids are `Members` | | |

The usual cases of taking and giving back are not here but in the loops of `taking.py` and `releasing.py`, which are hot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

import msgspec

from asgi_llm_guard.claims import Claim, Meter, Reading, Receipt
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.windows import BUCKET, CALENDAR, DISTINCT, LIFETIME, SLIDING, SLOTS

__all__ = [
    "GRACE_MS",
    "Cell",
    "Members",
    "copy",
    "correct",
    "counts_until",
    "debit",
    "debit_current",
    "disposable",
    "drained",
    "fill",
    "forget_parts",
    "instance",
    "judge_bucket",
    "judge_distinct",
    "live",
    "reading",
    "renew",
    "sliding_fits_at",
]

GRACE_MS: Final = 600_000
"""A cell is kept this long after its end, so that a clock that steps back finds it."""


# ------------------------------------------------------------------------------------ state


@dataclass(slots=True)
class Cell:
    """The state of one meter. Mutable; only the functions of this module change one."""

    # Not a msgspec.Struct: those are slower to write to than to make, and cells are written to.

    kind: int
    used: int
    held: int
    start: int
    end: int
    parts: dict[int, list[int]] | None = None
    """`Sliding`: sub-bucket number to used and held, oldest first."""
    turn: int = field(default=0, compare=False, repr=False)
    """The last plan that took from this cell. Not state: never stored."""

    def dump(self) -> tuple[int, int, int, int, int, bytes | None]:
        """Kind, used, held, start, end and the sub-buckets: the columns of a row. All integers fit into 64 bits."""
        parts = None if self.parts is None else msgspec.json.encode([[i, *uh] for i, uh in self.parts.items()])
        return self.kind, self.used, self.held, self.start, self.end, parts

    @classmethod
    def load(cls, kind: int, used: int, held: int, start: int, end: int, parts: bytes | None) -> Cell:
        """The cell that `dump` gave these columns for."""
        rows = None if parts is None else msgspec.json.decode(parts, type=list[tuple[int, int, int]])
        return cls(kind, used, held, start, end, None if rows is None else {i: [u, h] for i, u, h in rows})


class Members(Protocol):
    """The live ids of `Distinct` meters. Ids of one meter expire in the order in which they were touched."""

    def look(self, key: str, member: str, now_ms: int) -> tuple[int, bool]:
        """How many ids are live, and whether `member` is one of them. Drops those that have expired."""
        ...

    def touch(self, key: str, member: str, until_ms: int) -> None:
        """Keep `member` until `until_ms`, which is never before the last of the meter's `ends`."""
        ...

    def ends(self, key: str) -> tuple[int, int] | None:
        """When the first and when the last of the ids expire; `None` if there are none."""
        ...

    def clear(self, key: str) -> None:
        """Forget all ids of the meter."""
        ...


def copy(cell: Cell) -> Cell:
    """The cell as it is, to be kept while the original changes."""
    parts = None if cell.parts is None else {index: list(part) for index, part in cell.parts.items()}
    return Cell(cell.kind, cell.used, cell.held, cell.start, cell.end, parts)


def counts_until(cell: Cell) -> int:
    """The instant from which on nothing in the cell counts; of a `Sliding` one this, or somewhat later."""
    if cell.kind != SLIDING or not cell.parts:
        return cell.end
    # At `end` the oldest sub-bucket leaves, and each one after it as much later as its number is higher. A cell does
    # not know how long they are: at most this, for `end` is (first + buckets + 1) times as much.
    first = next(iter(cell.parts))
    return cell.end - (-(cell.start - first) * cell.end // (first + 2))


def disposable(cell: Cell, now_ms: int) -> bool:
    """Whether forgetting the cell changes no answer: nothing is held, and it has been over for `GRACE_MS`."""
    return cell.held == 0 and (cell.kind == SLOTS or now_ms >= counts_until(cell) + GRACE_MS)


# ------------------------------------------------------------------------------------ judge


def instance(meter: Meter, now_ms: int) -> Cell:
    """A new instance of a `Lifetime`, `Rolling` or `Calendar` window."""
    kind = meter.kind
    window: Any = meter.window
    if kind == CALENDAR:
        start, end = window.bounds(now_ms)
        return Cell(kind, 0, 0, start, end)
    return Cell(kind, 0, 0, now_ms, now_ms + (window.ttl_ms if kind == LIFETIME else window.period_ms))


def live(cell: Cell, oldest: int) -> tuple[int, int]:
    """Used and held of the sub-buckets from number `oldest` on."""
    used, held = cell.used, cell.held
    parts: Any = cell.parts
    for index, part in parts.items():
        if index >= oldest:
            break
        used -= part[0]
        held -= part[1]
    return used, held


def forget_parts(cell: Cell, newest: int, window: Any) -> None:
    """Drop the sub-buckets that have left the window when `newest` is the current one."""
    parts: Any = cell.parts
    oldest = newest - window.buckets
    first = next(iter(parts))
    while first < oldest:
        used, held = parts.pop(first)
        cell.used -= used
        cell.held -= held
        first = next(iter(parts))
    cell.start = newest
    cell.end = (first + window.buckets + 1) * (window.period_ms // window.buckets)


def sliding_fits_at(cell: Cell, meter: Meter, amount: int, total: int, newest: int) -> int | None:
    """When enough sub-buckets have left the window for `amount` to fit."""
    limit = meter.limit
    window: Any = meter.window
    parts: Any = cell.parts
    if limit is None or amount > limit:
        return None
    missing = total + amount - limit
    for index, part in parts.items():
        if index >= newest - window.buckets:
            missing -= part[0] + part[1]
            if missing <= 0:
                return int((index + window.buckets + 1) * (window.period_ms // window.buckets))
    return None  # pragma: no cover - the parts add up to the total, so the loop has returned


def drained(cell: Cell, meter: Meter, now_ms: int) -> tuple[int, int]:
    """The instant, never before the cell's own, and the backlog in unit-ms that is left at it."""
    if now_ms <= cell.start:
        return cell.start, cell.used
    backlog = cell.used - (now_ms - cell.start) * (meter.limit or 0)
    return now_ms, max(0, backlog)


def in_units(cell: Cell, meter: Meter, backlog: int) -> tuple[int, int]:
    """Used and held in whole units, together the backlog rounded up: what is held may have drained in part."""
    window: Any = meter.window
    units = -(-backlog // window.period_ms)
    held = min(cell.held, units)
    return units - held, held


def judge_bucket(cell: Cell, claim: Claim, now_ms: int) -> Receipt:
    meter = claim.meter
    window: Any = meter.window
    limit = meter.limit or 0
    at_ms, backlog = drained(cell, meter, now_ms)
    used, held = in_units(cell, meter, backlog)
    room = window.burst * window.period_ms if limit else 0  # a limit of 0 blocks everything, whatever the burst
    excess = backlog + claim.amount * window.period_ms - room
    if excess <= 0:
        return Receipt(claim, True, True, used, held, at_ms, now_ms)
    fits_at = at_ms - (-excess // limit) if limit and claim.amount <= window.burst else None
    return Receipt(claim, False, False, used, held, at_ms, fits_at)


def fill(cell: Cell, meter: Meter, at_ms: int, backlog: int) -> None:
    """Set the backlog as of `at_ms`. Past 2^53 - 1 it stays there: no store could add to it exactly."""
    backlog = min(backlog, MAX_AMOUNT)
    cell.used = backlog
    cell.start = at_ms
    cell.end = at_ms - (-backlog // (meter.limit or 1))


def judge_distinct(members: Members, claim: Claim, member: str, now_ms: int) -> Receipt:
    meter = claim.meter
    limit = meter.limit
    window: Any = meter.window
    others, known = members.look(meter.key, member, now_ms)
    ends = members.ends(meter.key)
    if known:
        others -= 1
    if limit is None or (known and limit > 0) or others + claim.amount <= limit:
        until_ms = now_ms + window.ttl_ms
        if ends is not None and ends[1] > until_ms:
            until_ms = ends[1]
        return Receipt(claim, True, True, others, 0, 0, until_ms)
    return Receipt(claim, False, False, others, 0, 0, ends[0] if ends is not None and claim.amount <= limit else None)


# ---------------------------------------------------------------------- correct and charge


def correct(cell: Cell, meter: Meter, pin: int, held: int, actual: int, now_ms: int) -> None:
    """Change a bucket's arrival at instant `pin` from `held` units to `actual` ones.

    What has drained since cannot be given back, else a bucket could be drained twice as fast as
    its rate: the refund is at most `held` less what has drained. By Lindley's recursion the
    backlog then never falls below the one that `actual` alone would have left.
    """
    window: Any = meter.window
    at_ms, backlog = drained(cell, meter, now_ms)
    if actual > held:
        backlog += (actual - held) * window.period_ms
    else:
        left = held * window.period_ms - (at_ms - pin) * (meter.limit or 0)
        refund = min((held - actual) * window.period_ms, left)
        if refund > 0:
            backlog = backlog - refund if backlog > refund else 0
    fill(cell, meter, at_ms, backlog)


def debit(cells: dict[str, Cell], receipt: Receipt, amount: int, now_ms: int, *, make: bool) -> None:
    """Add `amount` to what is used in the pinned window; `make` the window if the store has lost it."""
    meter = receipt.claim.meter
    window: Any = meter.window
    pin = receipt.pin
    cell = cells.get(meter.key)
    if meter.kind == BUCKET:
        if cell is None:
            cell = cells[meter.key] = Cell(BUCKET, 0, 0, now_ms, now_ms)
        at_ms, backlog = drained(cell, meter, now_ms)
        fill(cell, meter, at_ms, backlog + amount * window.period_ms)
    elif meter.kind == SLIDING:
        parts: Any = {} if cell is None else cell.parts
        newest = 0 if cell is None else cell.start
        if pin not in parts:
            if not make or pin < max(newest, now_ms // (window.period_ms // window.buckets)) - window.buckets:
                return
            parts = dict(sorted([*parts.items(), (pin, [0, 0])]))
            if cell is None:
                cell = cells[meter.key] = Cell(SLIDING, 0, 0, 0, 0)
            cell.parts = parts
            forget_parts(cell, max(newest, pin), window)
        parts[pin][0] += amount
        cast("Cell", cell).used += amount
    else:
        over_ms = receipt.resets_at_ms
        running = over_ms is not None and now_ms < over_ms
        if make and running and (cell is None or now_ms >= cell.end):
            cell = cells[meter.key] = Cell(meter.kind, 0, 0, pin, over_ms or 0)
        if cell is not None and (cell.start == pin or (make and running)):
            cell.used = min(cell.used + amount, MAX_AMOUNT)


def debit_current(cells: dict[str, Cell], claim: Claim, now_ms: int) -> None:
    """Add the claim's amount to what is used in the current instance of its window, past the limit too."""
    meter = claim.meter
    window: Any = meter.window
    cell = cells.get(meter.key)
    if claim.amount <= 0 or meter.kind in (SLOTS, DISTINCT):
        return
    if meter.kind == BUCKET:
        debit(cells, Receipt(claim, True, True, 0, 0, now_ms, now_ms), claim.amount, now_ms, make=True)
    elif meter.kind == SLIDING:
        pin = max(now_ms // (window.period_ms // window.buckets), 0 if cell is None else cell.start)
        debit(cells, Receipt(claim, True, True, 0, 0, pin, now_ms), claim.amount, now_ms, make=True)
    else:
        if cell is None or now_ms >= cell.end:
            cell = cells[meter.key] = instance(meter, now_ms)
        cell.used = min(cell.used + claim.amount, MAX_AMOUNT)
        if meter.kind == LIFETIME and window.renew:
            cell.end = max(cell.end, now_ms + window.ttl_ms)


# ------------------------------------------------------------------------------ read, reset


def reading(cell: Cell, meter: Meter, now_ms: int) -> Reading:
    """What the cell says now; see `Storage.read`."""
    window: Any = meter.window
    if meter.kind == SLOTS:
        return Reading(0, cell.held, None)
    if meter.kind == BUCKET:
        _, backlog = drained(cell, meter, now_ms)
        used, held = in_units(cell, meter, backlog)
        return Reading(used, held, cell.end if backlog and meter.limit else None)
    if meter.kind == SLIDING:
        size = window.period_ms // window.buckets
        used, held = live(cell, max(cell.start, now_ms // size) - window.buckets)
        if not used and not held:
            return Reading(0, 0, None)
        parts: Any = cell.parts
        newest = next(index for index in reversed(parts) if any(parts[index]))
        return Reading(used, held, (newest + window.buckets + 1) * size)
    if now_ms >= cell.end:
        return Reading(0, 0, None)
    return Reading(cell.used, cell.held, cell.end)


def renew(cell: Cell, meter: Meter, now_ms: int) -> None:
    """Set what is used to 0 and start the window anew; what is held stays, pinned to the same instance."""
    window: Any = meter.window
    if meter.kind == SLOTS:
        return
    if meter.kind == BUCKET:
        at_ms, backlog = drained(cell, meter, now_ms)
        fill(cell, meter, at_ms, min(backlog, cell.held * window.period_ms))
    elif meter.kind == SLIDING:
        parts: Any = cell.parts
        cell.parts = {index: [0, part[1]] for index, part in parts.items() if part[1]}
        cell.used = 0
        first = next(iter(cell.parts), cell.start)
        cell.end = (first + window.buckets + 1) * (window.period_ms // window.buckets)
    else:
        cell.used = 0
        if not cell.held:
            cell.end = 0  # over: the next admitted use starts a new instance
        elif meter.kind != CALENDAR and now_ms < cell.end:
            # The instance keeps its name, `start`, so that the open holds still find it.
            cell.end = instance(meter, now_ms).end
