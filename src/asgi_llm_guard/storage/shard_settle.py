"""Settling over several shards: home's part with the record, the groups' with their amounts, one answer made of all.

Rules 5, 8 and 10 of `sharded.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from asgi_llm_guard.claims import Claim, Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Completed, Pending
from asgi_llm_guard.storage.shard_asking import Shards
from asgi_llm_guard.storage.shard_calls import Calls, Group, Held
from asgi_llm_guard.storage.shard_parts import settled_of, split
from asgi_llm_guard.storage.shard_pending import Chained, Together

__all__ = ["Settling"]

_REBUILT: Final = re.compile(r"rebuild-.*-[0-9a-f]+\.(\d+)-[0-9a-f]+")


class Settling:
    """`ShardedStorage.settle`."""

    def __init__(self, shards: Shards, calls: Calls) -> None:
        self._shards = shards
        self._calls = calls

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        home = -1
        for settlement in settlements:
            known = self._calls.known(settlement.call_id)
            if not isinstance(known, int) or settlement.debits or home not in (-1, known):
                return self._settle(settlements)
            home = known
        if home < 0:
            return Completed(())
        pending = self._shards.storages[home].settle(settlements)
        for settlement in settlements:
            self._calls.open.pop(settlement.call_id, None)
            self._calls.end(settlement.call_id, home)
        pending.add_done_callback(partial(self._confirm, settlements))
        return pending

    def _settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Settle what lies in several shards, or is not known."""
        batches = Batches()
        later: list[Pending[tuple[Settled, ...]]] = []
        try:
            recipes = [self._settle_each(settlement, batches, later) for settlement in settlements]
            pendings = [self._shards.storages[shard].settle(batches.of[shard]) for shard in batches.order]
        except StorageError:
            self._calls.unconfirmed(settlements)
            raise
        pendings += later

        def make(answers: Sequence[tuple[Settled, ...]]) -> tuple[Settled, ...]:
            return tuple([recipe(answers) for recipe in recipes])

        together = Together(pendings, make)
        together.add_done_callback(partial(self._confirm, settlements))
        return together

    def _confirm(self, settlements: Sequence[Settlement], pending: Pending[tuple[Settled, ...]]) -> None:
        try:
            pending.result()
        except StorageError:
            self._calls.unconfirmed(settlements)

    def _settle_each(
        self, settlement: Settlement, batches: Batches, later: list[Pending[tuple[Settled, ...]]]
    ) -> Callable[[Sequence[tuple[Settled, ...]]], Settled]:
        """Put a settlement's parts into the batches of their shards; gives how to make its answer."""
        call_id = settlement.call_id
        told = _REBUILT.fullmatch(call_id) if call_id.startswith("rebuild-") else None
        known = self._calls.known(call_id)
        if known is None and not (settlement.receipts or settlement.debits or settlement.record):
            # Nobody here knows of it, so it may come to be asked for anywhere, and is to be refused there.
            places = [batches.add(shard, settlement) for shard in range(len(self._shards.storages))]
            return lambda answers: _best([answers[n][at] for n, at in places])
        claims = [receipt.claim for receipt in settlement.receipts]
        if known is None:
            known = self._shards.home_of(claims or settlement.debits, settlement.record, call_id)
            if told is not None and not self._shards.has_lost(known, int(told[1])):
                return lambda _: Settled(call_id, "duplicate")
            call = self._by_receipts(settlement, known)
            if call is not None:
                return self._settle_unknown(call, settlement, later, batches)
        home = known if isinstance(known, int) else known.home
        self._calls.open.pop(call_id, None)
        self._calls.end(call_id, known)
        if settlement.debits:
            settlement = self._debit_away(settlement, home, batches)
        if isinstance(known, int):
            n, at = batches.add(home, settlement)
            return lambda answers: answers[n][at]
        held = known
        mine, rest = split(held, settlement)
        n, at = batches.add(home, msgspec.structs.replace(mine, debits=settlement.debits))
        others = [(shard, batches.add(shard, one)) for shard, one in rest]
        return lambda answers: settled_of(
            held, answers[n][at], [(shard, answers[place][which]) for shard, (place, which) in others]
        )

    def _debit_away(self, settlement: Settlement, home: int, batches: Batches) -> Settlement:
        """Hand what is debited in other shards than home over to them, under ids that are the same each time."""
        here: list[Claim] = []
        away: dict[int, list[Claim]] = {}
        for claim in settlement.debits:
            shard = self._shards.place(claim.meter.key)
            (here if shard == home else away.setdefault(shard, [])).append(claim)
        for shard, claims in away.items():
            batches.add(shard, Settlement(f"{settlement.call_id}~{shard}.d", (), None, (), tuple(claims)))
        return msgspec.structs.replace(settlement, debits=tuple(here)) if away else settlement

    def _by_receipts(self, settlement: Settlement, home: int) -> Held | None:
        """A call that only its receipts are known of, if they are of several shards."""
        groups: dict[int, list[Claim]] = {}
        for receipt in settlement.receipts:
            shard = self._shards.place(receipt.claim.meter.key)
            if shard != home:
                groups.setdefault(shard, []).append(receipt.claim)
        if not groups:
            return None
        named = {shard: Group(f"{settlement.call_id}~{shard}", tuple(claims)) for shard, claims in groups.items()}
        call = Held("", home, tuple([receipt.claim for receipt in settlement.receipts]), named, 0)
        call.asked = True
        return call

    def _settle_unknown(
        self, call: Held, settlement: Settlement, later: list[Pending[tuple[Settled, ...]]], batches: Batches
    ) -> Callable[[Sequence[tuple[Settled, ...]]], Settled]:
        """Ask home first: only if it does not know the call either, nothing stands for it in the other shards."""
        settlement = self._debit_away(settlement, call.home, batches)
        mine, rest = split(call, settlement)
        self._calls.end(settlement.call_id, call)  # should it be settled again, for want of an answer, all shards are

        def then(answers: tuple[Settled, ...]) -> Pending[tuple[Settled, ...]]:
            if answers[0].status != "lost":
                self._calls.end(settlement.call_id, call.home)
                return Completed(answers)
            pendings: list[Pending[tuple[Settled, ...]]] = [
                self._shards.storages[shard].settle((one,)) for shard, one in rest
            ]
            shards = [shard for shard, _ in rest]
            return Together(
                pendings,
                lambda others: (
                    settled_of(call, answers[0], [(s, other[0]) for s, other in zip(shards, others, strict=True)]),
                ),
            )

        first = self._shards.storages[call.home].settle((msgspec.structs.replace(mine, debits=settlement.debits),))
        number = len(later)
        later.append(Chained(first, then))
        return lambda answers: answers[number - len(later)][0]  # these are the last ones


class Batches:
    """Settlements by shard, in the order in which shards were first named."""

    __slots__ = ("of", "order")

    def __init__(self) -> None:
        self.order: list[int] = []
        self.of: dict[int, list[Settlement]] = {}

    def add(self, shard: int, settlement: Settlement) -> tuple[int, int]:
        """Which of the answers is that of the shard, and which place in it."""
        batch = self.of.get(shard)
        if batch is None:
            batch = self.of[shard] = []
            self.order.append(shard)
        batch.append(settlement)
        return self.order.index(shard), len(batch) - 1


def _best(answers: Sequence[Settled]) -> Settled:
    """Of several shards' answers for a call that nobody knows of: that of the one that does, if any."""
    return next((answer for answer in answers if answer.status != "cancelled"), answers[0])
