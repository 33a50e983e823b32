"""What one process holds of leased meters, and what its calls have taken of it: no I/O, no lock, no clock.

A lease is a hold of the store on a chunk of one meter, in one instance of its window. At any moment

    amount = left + open + used

`left` may be spent, `open` is held by calls that are not settled, `used` is what settled calls have
used. The store counts `amount` whole until the lease is returned, which settles it with `used`; if the
process dies first, `amount` stays charged. So nothing that happens here can move the store's bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

from asgi_llm_guard.claims import Claim, Meter, Receipt, Settlement
from asgi_llm_guard.storage.mistakes import claimed_twice
from asgi_llm_guard.windows import CALENDAR

__all__ = ["WORTH", "Book", "Lease", "Slot", "lower"]

WORTH: Final = 4
"""A chunk is asked for only if it holds this many claims of the size that was last asked for."""


def lower(limit: int | None, other: int | None) -> bool:
    """Whether `limit` is the stricter one."""
    return limit is not None and (other is None or limit < other)


class Lease:
    """One chunk, as this process knows it."""

    __slots__ = (
        "amount",
        "base_held",
        "base_used",
        "call_id",
        "closed",
        "lapsed",
        "left",
        "low",
        "meter",
        "open",
        "overruns",
        "owner",
        "pin",
        "receipt",
        "returned",
        "slot",
        "until_ms",
        "used",
    )

    def __init__(self, slot: Slot, owner: str, call_id: str, receipt: Receipt, skew_ms: int) -> None:
        claim = receipt.claim
        self.slot = slot
        self.owner = owner
        self.call_id = call_id
        self.receipt = receipt
        self.meter = claim.meter
        self.amount = self.left = claim.amount
        self.open = self.used = 0
        self.low = claim.amount // 2
        """With less than this left, another chunk is fetched."""
        self.pin = receipt.pin
        self.base_used = receipt.used
        self.base_held = receipt.held
        self.until_ms = _end_ms(receipt) - skew_ms
        """Nothing is taken from it at or after this instant of the store's clock."""
        self.closed = False
        """Nothing more is taken from it; it is returned when its last call ends."""
        self.returned = False
        self.lapsed = False
        """The store has charged it, as far as it is known to have been held at all."""
        self.overruns = 0

    def give_back(self, amount: int) -> None:
        """Undo a take."""
        self.open -= amount
        self.left += amount

    def settle(self, held: int, actual: int) -> int:
        """Put `actual` in the place of `held`; gives what the chunk cannot cover, for the store to be charged."""
        self.open -= held
        self.used += actual
        self.left += held - actual
        if self.left >= 0:
            return 0
        short = -self.left
        self.left = 0
        self.used -= short
        self.base_used += short
        return short

    def forget(self, used: int) -> bool:
        """Of what was used, so much is no longer to be charged. Whether a closed lease may hold less now."""
        self.used -= used
        self.amount = self.open + self.used
        self.left = 0
        return self.meter.kind <= CALENDAR

    def overrun(self, amount: int) -> Settlement:
        """Charges the store what the chunk could not cover, in the window that the chunk is pinned to."""
        self.overruns += 1
        receipt = Receipt(Claim(self.meter, 0), True, True, 0, 0, self.pin, self.receipt.resets_at_ms)
        return Settlement(f"{self.call_id}+{self.overruns}", (amount,), None, (receipt,))

    def settlement(self) -> Settlement:
        """Returns the chunk: charges what was used of it."""
        # What has lapsed is charged by the store. Should it no longer know of it, receipts would charge it twice.
        return Settlement(self.call_id, (self.used,), None, () if self.lapsed else (self.receipt,))

    def granted(self, claim: Claim, now_ms: int) -> Receipt:
        """The receipt of a claim that was just taken from this chunk."""
        resets_at_ms = self.receipt.resets_at_ms if self.meter.kind <= CALENDAR else now_ms
        others = self.base_held + self.open - claim.amount
        return Receipt(claim, True, True, self.base_used + self.used, others, self.pin, resets_at_ms)


def _end_ms(receipt: Receipt) -> int:
    meter = receipt.claim.meter
    if meter.kind <= CALENDAR:
        return cast("int", receipt.resets_at_ms)
    window: Any = meter.window
    return cast("int", (receipt.pin + 1) * window.bucket_ms)


class Slot:
    """One meter as one owner leases it."""

    __slots__ = ("current", "fetching", "leases", "room", "turn", "used")

    def __init__(self) -> None:
        self.current: Lease | None = None
        """The chunk that is spent: the one with the most left, as far as is worth finding out."""
        self.leases: list[Lease] = []
        """All that are not returned yet."""
        self.fetching: str | None = None
        """The call id of the chunk that has been asked for."""
        self.room = 0
        """What the meter had left when the store last spoke of it."""
        self.turn = 0
        """The last plan that claimed on it."""
        self.used = True
        """Claimed on since the last look."""

    def unspent(self) -> int:
        """What would come back if this process let go of the meter now, but for what is on its way back already."""
        return sum(lease.left for lease in self.leases if not lease.closed and _returnable(lease))


class Book:
    """All leases of one process, by owner and meter."""

    def __init__(self, *, workers: int, skew_ms: int) -> None:
        self.workers = workers
        """How many processes are thought to share the meters."""
        self._skew_ms = skew_ms
        self._turn = 0
        self.owners: dict[str, dict[str, Slot]] = {}
        self.due: list[Lease] = []
        """To be returned: no call holds of them any more."""

    @property
    def leases(self) -> int:
        """How many are not returned yet."""
        return sum(len(slot.leases) for slots in tuple(self.owners.values()) for slot in tuple(slots.values()))

    # ------------------------------------------------------------------------------- take, give

    def slots(self, owner: str) -> dict[str, Slot]:
        """The slots of one owner, by meter key."""
        slots = self.owners.get(owner)
        if slots is None:
            slots = self.owners[owner] = {}
        return slots

    def next_turn(self) -> int:
        """A number for the next plan; see `slot`."""
        self._turn += 1
        return self._turn

    def slot(self, slots: dict[str, Slot], meter: Meter, turn: int) -> Slot:
        """The slot of a meter, claimed on in plan number `turn`.

        Raises:
            ValueError: the plan has claimed on it before.
        """
        slot = slots.get(meter.key)
        if slot is None:
            slot = slots[meter.key] = Slot()
        if slot.turn == turn:
            raise claimed_twice(meter.key)
        slot.turn = turn
        slot.used = True
        return slot

    def take(self, slot: Slot, claim: Claim, now_ms: int) -> Lease | None:
        """The lease that `claim` was taken from, or `None`: the store has to be asked."""
        lease = slot.current
        amount = claim.amount
        if (
            lease is None
            or amount > lease.left
            or now_ms >= lease.until_ms
            or (lease.meter is not claim.meter and lower(claim.meter.limit, lease.meter.limit))
        ):
            lease = self._other(slot, claim, now_ms) if slot.leases else None
            if lease is None:
                return None
        lease.left -= amount
        lease.open += amount
        return lease

    def _other(self, slot: Slot, claim: Claim, now_ms: int) -> Lease | None:
        """Another lease that the claim fits into. Closes those whose time is over."""
        found = None
        for lease in tuple(slot.leases):
            if now_ms >= lease.until_ms:
                self.close(lease)
            elif not lease.closed and lease.left >= claim.amount and not lower(claim.meter.limit, lease.meter.limit):
                found = lease
        if found is not None:
            self._prefer(slot, found)
        return found

    def freed(self, lease: Lease) -> None:
        """Something was given back to `lease`, or settled: it may be worth spending, or have to be returned."""
        slot = lease.slot
        current = slot.current
        if lease.closed:
            if lease.open == 0 and not lease.returned:
                self._return(lease)
        elif lease is not current:
            if current is None or lease.left > current.left:
                self._prefer(slot, lease)
            elif lease.open == 0:
                self._return(lease)

    def _prefer(self, slot: Slot, lease: Lease) -> None:
        current, slot.current = slot.current, lease
        if current is not None and current is not lease and current.open == 0:
            self._return(current)

    # ---------------------------------------------------------------------------------- chunks

    def wanted(self, slot: Slot, meter: Meter, amount: int) -> int:
        """How much to ask for beside a claim of `amount`; 0 if no chunk is worth while.

        What is left is divided by the workers, and by 4, so that chunks shrink as the limit comes near and
        little is held by those who do not need it.
        """
        if slot.fetching is not None:
            return 0
        size = meter.lease
        if meter.limit is not None:
            room = slot.room
            if slot.current is not None:  # the others have taken about as much since as this process
                room -= (self.workers - 1) * slot.current.amount
            size = min(size, room // (4 * self.workers))
        return size if size >= max(1, WORTH * amount) else 0

    def saw(self, slot: Slot, receipt: Receipt, taken: int) -> None:
        """Note what a reply of the store says of the meter; `taken`: by the claim itself."""
        limit = receipt.claim.meter.limit
        if limit is not None:
            slot.room = limit - receipt.used - receipt.held - taken

    def add(self, slot: Slot, owner: str, call_id: str, receipt: Receipt) -> None:
        """A chunk has come."""
        lease = Lease(slot, owner, call_id, receipt, self._skew_ms)
        slot.leases.append(lease)
        self.saw(slot, receipt, lease.amount)
        if slot.current is None or slot.current.left < lease.left:
            self._prefer(slot, lease)

    def close(self, lease: Lease) -> None:
        """Take nothing more from it; return it as soon as no call holds of it."""
        lease.closed = True
        if lease.slot.current is lease:
            lease.slot.current = None
        if lease.open == 0 and not lease.returned:
            self._return(lease)

    def _return(self, lease: Lease) -> None:
        lease.closed = lease.returned = True
        lease.left = 0
        lease.slot.leases.remove(lease)
        self.due.append(lease)

    def collect(self) -> list[Settlement]:
        """The settlements that return what is due."""
        due, self.due = self.due, []
        return [lease.settlement() for lease in due]

    # ----------------------------------------------------------------------------- letting go

    def let_go(self, slots: Iterable[Slot], now_ms: int) -> list[Lease]:
        """Stop spending these meters' chunks. Gives those that calls hold of, less what was left of them.

        The store still holds them in full, until it is told so (`amend`) or they are returned.
        """
        shrunk = []
        for slot in slots:
            for lease in tuple(slot.leases):
                if lease.closed or not _returnable(lease):
                    continue
                self.close(lease)
                if lease.open and lease.left and now_ms < lease.until_ms:
                    lease.amount -= lease.left
                    lease.left = 0
                    shrunk.append(lease)
        return shrunk

    def tidy(self, owner: str, now_ms: int) -> list[Lease]:
        """Let go of what has not been used since the last call of this, and of what is over; as `let_go`."""
        slots = self.owners.get(owner)
        if not slots:
            return []
        idle = []
        for key, slot in tuple(slots.items()):
            for lease in tuple(slot.leases):
                if now_ms >= lease.until_ms and not lease.closed:
                    self.close(lease)
            if not slot.used:
                idle.append(slot)
                if not slot.leases and slot.fetching is None:
                    del slots[key]
            slot.used = False
        return self.let_go(idle, now_ms)

    def leave(self, owner: str) -> list[str]:
        """Return all that `owner` leases; gives the call ids of the chunks that are on their way."""
        on_their_way = []
        for slot in self.owners.pop(owner, {}).values():
            for lease in tuple(slot.leases):
                self.close(lease)
            if slot.fetching is not None:
                on_their_way.append(slot.fetching)
                slot.fetching = None
        return on_their_way

    def abandon(self) -> None:
        """The store knows nothing of these leases any more: neither spend them nor return them."""
        for slots in self.owners.values():
            for slot in slots.values():
                slot.current = slot.fetching = None
                for lease in slot.leases:
                    lease.closed = lease.returned = True
                slot.leases = []
        self.owners.clear()
        self.due = []

    def lapse(self, owner: str) -> int:
        """The store has expired what `owner` held: stop spending it. How many leases that were."""
        count = 0
        for slot in self.owners.get(owner, {}).values():
            for lease in tuple(slot.leases):
                lease.lapsed = True
                self.close(lease)
                count += 1
        return count


def _returnable(lease: Lease) -> bool:
    """Whether what is left can go back while calls hold of the rest.

    Not that of a sliding window: it is pinned to a sub-bucket, and a smaller hold would be pinned to another.
    """
    return lease.open == 0 or lease.meter.kind <= CALENDAR
