"""What a storage knows, as plain values: the holds of open calls, call ids that have ended, owners; and `State`, all of it.

The memory storage keeps one `State` for good. The SQLite storage fills one with the rows that a batch needs, which `Needs`
says. The verbs over it are in `cells.py`, cells and what they count in `counting.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import msgspec

from asgi_llm_guard.claims import Bundle, Meter, Plan, Receipt, Settlement
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS
from asgi_llm_guard.storage.counting import Cell, Members
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import DISTINCT

__all__ = ["Hold", "Ledger", "Needs", "Owner", "State", "Tombstone"]


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
