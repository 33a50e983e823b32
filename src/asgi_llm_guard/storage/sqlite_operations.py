"""What is handed over to the thread that writes: the verbs of `cells.py` with their arguments, gathered into groups.

A group is decided together, on rows that are read for all of it; what can be known of it is worked out beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar, cast

import msgspec

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.storage import cells
from asgi_llm_guard.storage.sqlite_tables import EntryOperation, TableOperation
from asgi_llm_guard.storage.state import Hold, Needs, State
from asgi_llm_guard.usage_rows import row_of_record

__all__ = ["Amend", "Beat", "Group", "Operation", "Read", "Reserve", "Reset", "Retire", "Settle", "grouped"]

T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """A verb of `cells.py` with its arguments."""

    def ask(self, needs: Needs) -> None:
        """Say which call ids and meters it names."""
        ...

    def decide(self, state: State, now_ms: int) -> T_co: ...


class Reserve(msgspec.Struct, frozen=True, gc=False):
    owner: str
    plans: Sequence[Plan]

    def ask(self, needs: Needs) -> None:
        needs.of_plans(self.plans)

    def decide(self, state: State, now_ms: int) -> Granted | Refused | Ended:
        return cells.reserve(state, self.owner, self.plans, now_ms)


class Amend(msgspec.Struct, frozen=True, gc=False):
    owner: str
    bundle: Bundle

    def ask(self, needs: Needs) -> None:
        needs.of_bundle(self.bundle)

    def decide(self, state: State, now_ms: int) -> Granted | Refused | Ended:
        return cells.amend(state, self.owner, self.bundle, now_ms)


class Settle(msgspec.Struct, frozen=True, gc=False):
    settlements: Sequence[Settlement]

    def ask(self, needs: Needs) -> None:
        needs.of_settlements(self.settlements)

    def decide(self, state: State, now_ms: int) -> tuple[Settled, ...]:
        return cells.settle(state, self.settlements, now_ms)


class Beat(msgspec.Struct, frozen=True):
    owner: str

    def ask(self, needs: Needs) -> None: ...

    def decide(self, state: State, now_ms: int) -> Heartbeat:
        return cells.heartbeat(state, self.owner, now_ms)


class Retire(msgspec.Struct, frozen=True):
    owner: str

    def ask(self, needs: Needs) -> None: ...

    def decide(self, state: State, now_ms: int) -> None:
        cells.retire(state, self.owner, now_ms)


class Read(msgspec.Struct, frozen=True):
    meters: Sequence[Meter]

    def ask(self, needs: Needs) -> None:
        needs.of_meters(self.meters)

    def decide(self, state: State, now_ms: int) -> tuple[Reading, ...]:
        return cells.read(state, self.meters, now_ms)


class Reset(msgspec.Struct, frozen=True):
    meters: Sequence[Meter]

    def ask(self, needs: Needs) -> None:
        needs.of_meters(self.meters)

    def decide(self, state: State, now_ms: int) -> None:
        cells.reset(state, self.meters, now_ms)


class _Needs(Needs):
    """The same needs, asked for faster: this is done for every operation while other processes wait."""

    __slots__ = ()

    # Meters with a `Distinct` window are not left out: that one looks for a cell that is not there
    # costs less than to ask each meter for its kind.

    def of_bundle(self, bundle: Bundle) -> None:
        self.calls.add(bundle.call_id)
        self.keys.update([claim.meter.key for claim in bundle.claims])

    def of_settlements(self, settlements: Iterable[Settlement]) -> None:
        for settlement in settlements:
            self.calls.add(settlement.call_id)
            if settlement.receipts:
                self.keys.update([receipt.claim.meter.key for receipt in settlement.receipts])
            if settlement.debits:
                self.keys.update([claim.meter.key for claim in settlement.debits])

    def of_hold(self, hold: Hold | None) -> None:
        if hold is not None:
            self.calls.add(hold.call_id)
            self.keys.update([receipt.claim.meter.key for receipt in hold.receipts])


class Group:
    """Operations that are decided together, and what can be known of them beforehand."""

    def __init__(self) -> None:
        self.operations: list[Operation[object]] = []
        self.needs = _Needs()
        self.amended: set[str] = set()
        self.retired: set[str] = set()
        # By the identity of the record, which its settlement keeps alive.
        self.rows: dict[int, tuple[object, ...]] = {}

    def add(self, operation: Operation[object]) -> None:
        self.operations.append(operation)
        operation.ask(self.needs)
        kind = type(operation)
        if kind is Settle:
            for settlement in cast("Settle", operation).settlements:
                if settlement.record is not None:
                    self.rows[id(settlement.record)] = row_of_record(settlement.record)
        elif kind is Amend:
            self.amended.add(cast("Amend", operation).bundle.call_id)
        elif kind is Retire:
            self.retired.add(cast("Retire", operation).owner)


def grouped(operations: Iterable[object]) -> list[Group | TableOperation[object] | EntryOperation[object]]:
    """The operations in their order, those that are decided on cells together."""
    groups: list[Group | TableOperation[object] | EntryOperation[object]] = []
    group: Group | None = None
    for operation in operations:
        if hasattr(operation, "run_at"):
            groups.append(cast("EntryOperation[object]", operation))
            group = None
            continue
        if hasattr(operation, "run"):
            groups.append(cast("TableOperation[object]", operation))
            group = None
            continue
        if group is None:
            group = Group()
            groups.append(group)
        group.add(cast("Operation[object]", operation))
    return groups
