"""The shards of one storage: where a meter lies, how several are asked at once, what they are given back, which lost data.

Rules 2, 3 and 10 of `sharded.py` rest on it. It knows meters and shards, and of calls only their ids.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar, cast

from asgi_llm_guard.claims import Claim, Meter, Plan, Reading, Receipt, Settled, Settlement, escape
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.storage.base import LossAware, Pending, Storage
from asgi_llm_guard.storage.shard_parts import Place, first_of, not_taken, state_of
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Shards", "weight"]

T = TypeVar("T")


class Shards:
    """All shards, by their numbers. May be used from several event loops and threads."""

    def __init__(self, storages: Sequence[Storage], place: Place) -> None:
        self.storages = tuple(storages)
        count = len(self.storages)
        self.place: Place = lru_cache(maxsize=8192)(lambda key: place(key) % count)
        """From the key of a meter to its shard."""
        self._aware = [shard if isinstance(shard, LossAware) else None for shard in self.storages]
        self.begin_anew()

    def begin_anew(self) -> None:
        """In a process that was forked: what is to be given back is its parent's, and so are the ids of groups."""
        self._name = os.urandom(6).hex()
        self._numbers = itertools.count(1)
        self._unreturned: list[tuple[int, Settlement]] = []
        self._generation = 0
        self._epochs = [""] * len(self.storages)
        self._lost: dict[int, int] = {}

    # -------------------------------------------------------------------------------- places

    def home_of(self, claims: Sequence[Claim], record: UsageRecord | None, call_id: str) -> int:
        """The home of a call that nothing is remembered of."""
        meter = first_of(claims)
        if meter is not None:
            return self.place(meter.key)
        kind, name = ("call", call_id) if record is None or record.caller is None else ("caller", record.caller)
        return self.place(f":::{kind}:{escape(name)}")

    def next_attempt(self) -> str:
        """What ends the ids of an attempt's groups: no other attempt of any process has it."""
        return f".{self._name}.{next(self._numbers):x}"

    # ----------------------------------------------------------------------------- asking many

    async def gather(self, work: Mapping[int, Awaitable[T]]) -> dict[int, T]:
        """All answers, by shard.

        Raises:
            Exception: one has failed, and all have come back; a loss of data before anything else.
        """
        if len(work) == 1:
            ((shard, one),) = work.items()
            try:
                return {shard: await one}
            except DataLost as error:
                self.note(shard, error)
                raise
        answers = await asyncio.gather(*work.values(), return_exceptions=True)
        failures = []
        for shard, answer in zip(work, answers, strict=True):
            if isinstance(answer, BaseException):
                self.note(shard, answer)
                failures.append(answer)
        if failures:
            # What is the caller's mistake is no outage; and what may have been executed is to be told.
            raise min(failures, key=weight)
        return dict(zip(work, cast("list[T]", answers), strict=True))

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        """As `Storage.read`."""
        parts = self._by_shard(meters)
        answers = await self.gather(
            {shard: self.storages[shard].read([meters[at] for at in places]) for shard, places in parts.items()}
        )
        readings: list[Any] = [None] * len(meters)
        for shard, places in parts.items():
            for at, reading in zip(places, answers[shard], strict=True):
                readings[at] = reading
        return tuple(readings)

    async def reset(self, meters: Sequence[Meter]) -> None:
        """As `Storage.reset`."""
        parts = self._by_shard(meters)
        await self.gather(
            {shard: self.storages[shard].reset([meters[at] for at in places]) for shard, places in parts.items()}
        )

    def _by_shard(self, meters: Sequence[Meter]) -> dict[int, list[int]]:
        parts: dict[int, list[int]] = {}
        for at, meter in enumerate(meters):
            parts.setdefault(self.place(meter.key), []).append(at)
        return parts

    async def states(
        self, plan: Plan, asked: Sequence[Receipt | None], mine: Mapping[str, int], now_ms: int
    ) -> tuple[Receipt, ...]:
        """The states of a refused plan. Those of claims that were not judged are read; `mine`: what the call itself
        holds of a meter, by key."""
        claims = [claim for bundle in plan for claim in bundle.claims]
        left = [claim.meter for claim, receipt in zip(claims, asked, strict=True) if receipt is None]
        readings: Sequence[Reading] = ()
        if left:
            with suppress(StorageError):  # it is refused all the same
                readings = await self.read(left)
        seen = iter(readings or [Reading(0, 0, None)] * len(left))
        return tuple(
            [
                not_taken(receipt)
                if receipt is not None
                else state_of(claim, next(seen), mine.get(claim.meter.key, 0), now_ms)
                for claim, receipt in zip(claims, asked, strict=True)
            ]
        )

    # ---------------------------------------------------------------------------- giving back

    def give_back(self, groups: Iterable[tuple[int, str]]) -> None:
        """Nothing was used of these. Not waited for; what a shard does not take is tried again with a heartbeat."""
        by_shard: dict[int, list[Settlement]] = {}
        for shard, call_id in groups:
            by_shard.setdefault(shard, []).append(Settlement(call_id, ()))
        for shard, settlements in by_shard.items():
            self._return(shard, settlements)

    def give_back_again(self) -> None:
        """Try once more what shards did not take."""
        unreturned, self._unreturned = self._unreturned, []
        for shard, group in itertools.groupby(sorted(unreturned, key=lambda entry: entry[0]), lambda entry: entry[0]):
            self._return(shard, [settlement for _, settlement in group])

    def _return(self, shard: int, settlements: Sequence[Settlement]) -> None:
        def returned(pending: Pending[tuple[Settled, ...]]) -> None:
            try:
                pending.result()
            except StorageError:
                self._unreturned.extend((shard, settlement) for settlement in settlements)

        try:
            self.storages[shard].settle(settlements).add_done_callback(returned)
        except StorageError:
            self._unreturned.extend((shard, settlement) for settlement in settlements)

    # --------------------------------------------------------------------------------- losses

    def note(self, shard: int, error: BaseException) -> None:
        """That shard has lost its data, if this says so."""
        if isinstance(error, DataLost):
            self._lost[shard] = self._generation

    def has_lost(self, shard: int, generation: int) -> bool:
        """Whether that shard has lost its data in this generation of all data, or in a later one."""
        return self._lost.get(shard, -1) >= generation

    @property
    def epoch(self) -> str:
        """Names the data of all shards: another name after each loss that is accepted. Of this process only."""
        changed = False
        for n, shard in enumerate(self._aware):
            if shard is None:
                continue
            now, before = shard.epoch, self._epochs[n]
            if now and now != before:
                self._epochs[n] = now
                if before:
                    self._lost[n] = self._generation
                    changed = True
        self._generation += changed
        return f"{self._name}.{self._generation}" if any(self._epochs) else ""

    async def accept_loss(self) -> None:
        """As `LossAware.accept_loss`, in every shard that knows of losses."""
        await self.gather({n: shard.accept_loss() for n, shard in enumerate(self._aware) if shard is not None})


def weight(error: BaseException) -> int:
    """What is told first, of several failures."""
    if isinstance(error, DataLost):
        return 0
    if not isinstance(error, StorageError):
        return 1
    return 2 if error.sent else 3
