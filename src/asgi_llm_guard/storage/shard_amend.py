"""Amending over several shards: what is more is taken in the groups, then home decides, then what is less is given back.

Rule 7 of `sharded.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, cast

import msgspec

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Receipt, Refused
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.mistakes import claimed_twice
from asgi_llm_guard.storage.shard_asking import Shards
from asgi_llm_guard.storage.shard_calls import Calls, Group, Held
from asgi_llm_guard.storage.shard_parts import Part, cut, exact, not_taken, union

__all__ = ["Amending"]

_log = logging.getLogger("asgi_llm_guard.storage")

Answer = Granted | Refused | Ended


class Amending:
    """`ShardedStorage.amend`."""

    def __init__(self, shards: Shards, calls: Calls) -> None:
        self._shards = shards
        self._calls = calls

    def amend(self, owner: str, bundle: Bundle) -> Coroutine[Any, Any, Answer]:
        known = self._calls.open.get(bundle.call_id)
        shards = {self._shards.place(claim.meter.key) for claim in bundle.claims}
        if known is None:
            known = self._calls.known(bundle.call_id)
            if known is None:
                known = self._shards.home_of(bundle.claims, bundle.draft, bundle.call_id)
        if isinstance(known, int) and shards <= {known}:
            return self._amend_one(known, owner, bundle)
        return self._amend(owner, bundle)

    async def _amend_one(self, home: int, owner: str, bundle: Bundle) -> Answer:
        try:
            return await self._shards.storages[home].amend(owner, bundle)
        except DataLost as error:
            self._shards.note(home, error)
            raise

    async def _amend(self, owner: str, bundle: Bundle) -> Answer:
        turn = await self._calls.turn(bundle.call_id)
        try:
            return await self._change(owner, bundle)
        finally:
            self._calls.turn_over(bundle.call_id, turn)

    async def _change(self, owner: str, bundle: Bundle) -> Answer:
        call_id = bundle.call_id
        was_open = self._calls.open.get(call_id)
        known = self._calls.known(call_id)
        home = known if isinstance(known, int) else None if known is None else known.home
        if home is None:
            home = self._shards.home_of(bundle.claims, bundle.draft, call_id)
        call = known if isinstance(known, Held) else None
        groups = call.groups if call is not None else {}
        attempt = self._shards.next_attempt()
        parts = cut((bundle,), home, self._shards.place, lambda _, shard: f"{call_id}~{shard}{attempt}")
        mine = parts.pop(home)
        before = {r.claim.meter.key: r for r in call.receipts if r.taken} if call is not None else {}
        asked: list[Receipt | None] = [None] * len(bundle.claims)
        change = Change(owner, groups, parts)
        unchanged = [] if call is None or call.owner != owner else [s for s in parts if change.is_unchanged(s, before)]
        for shard in unchanged:
            for at, claim in zip(parts[shard].at, change.wanted[shard].values(), strict=True):
                asked[at] = before[claim.meter.key]
        at_home = False
        try:
            answers = await self._shards.gather(
                {shard: change.ask(shard, self._shards.storages[shard]) for shard in parts if shard not in unchanged}
            )
            now_ms = max((answer.now_ms for answer in answers.values()), default=0)
            for shard, answer in answers.items():
                if not isinstance(answer, Ended):
                    change.take(shard, answer, asked)
            ended = next((answer for answer in answers.values() if isinstance(answer, Ended)), None)
            if ended is not None or any(isinstance(answer, Refused) for answer in answers.values()):
                await self._revert(change)
                if ended is not None:
                    return Ended(call_id, ended.reason, ended.now_ms)
                held = {key: receipt.claim.amount for key, receipt in before.items()}
                return Refused((await self._shards.states((bundle,), asked, held, now_ms),), now_ms)
            at_home = True
            answer = await self._shards.storages[home].amend(owner, mine.bundles[0])
        except BaseException as error:
            if at_home:
                self._shards.note(home, error)
            if isinstance(error, Exception) and not (at_home and isinstance(error, StorageError) and error.sent):
                await self._revert(change)
            else:  # cancelled, or home may have changed it: groups that are claimed either way keep the more
                self._shards.give_back(change.new())
            raise
        now_ms = max(now_ms, answer.now_ms)
        if not isinstance(answer, Granted):
            await self._revert(change)
            if isinstance(answer, Ended):
                return answer
        for at, receipt in zip(
            mine.at, answer.receipts if isinstance(answer, Granted) else answer.states[0], strict=True
        ):
            asked[at] = receipt
        if isinstance(answer, Refused):
            return Refused((tuple([not_taken(cast("Receipt", receipt)) for receipt in asked]),), now_ms)
        if self._calls.open.get(call_id) != was_open:
            self._shards.give_back(change.new())
            return Ended(call_id, "settled", now_ms)
        await self._shrink(change, asked)
        changed = Held(owner, home, bundle.claims, change.kept(), 0 if call is None else call.plan)
        changed.asked = True
        changed.receipts = tuple(cast("list[Receipt]", asked))
        self._shards.give_back(change.gone())
        if self._calls.open.get(call_id) != was_open:
            self._shards.give_back(change.new())  # it was settled while what was too much was given back
        else:
            self._calls.ended.pop(call_id, None)
            self._calls.open[call_id] = changed if changed.groups else home
        return Granted(changed.receipts, now_ms)

    async def _shrink(self, change: Change, asked: list[Receipt | None]) -> None:
        """Give back what is less, in groups that stay. Where that fails, it stays held until the call is settled."""
        shrunk = change.too_much()
        for shard, claims in shrunk.items():
            group = change.groups[shard]
            try:
                answer = await self._shards.storages[shard].amend(change.owner, Bundle(group.call_id, claims))
            except StorageError as error:
                _log.debug("what %s holds more than it claims stays held: %s", group.call_id, error)
                continue
            if isinstance(answer, Granted):
                group.claims = claims
                change.take(shard, answer, asked)
        for shard, part in change.parts.items():
            for at, claim in zip(part.at, change.wanted[shard].values(), strict=True):
                receipt = cast("Receipt", asked[at])
                if receipt.claim.amount != claim.amount:
                    asked[at] = msgspec.structs.replace(receipt, claim=claim)

    async def _revert(self, change: Change) -> None:
        """Give back what was taken for a change that is refused."""
        self._shards.give_back(change.new())
        for shard, claims in change.reverts().items():
            group = change.groups[shard]
            with suppress(StorageError):
                answer = await self._shards.storages[shard].amend(change.owner, Bundle(group.call_id, claims))
                if isinstance(answer, Granted):
                    group.claims = claims


class Change:
    """What an amend does to the groups of a call."""

    def __init__(self, owner: str, groups: dict[int, Group], parts: Mapping[int, Part]) -> None:
        self.owner = owner
        self.groups = groups
        self.parts = parts
        self.wanted = {shard: {claim.meter.key: claim for claim in part.claims} for shard, part in parts.items()}
        for shard, part in parts.items():
            if len(self.wanted[shard]) < len(part.at):
                keys = [claim.meter.key for claim in part.claims]
                raise claimed_twice(next(key for key in keys if keys.count(key) > 1))
        self._before = {shard: group.claims for shard, group in groups.items()}
        self._new = {shard: Group(part.bundles[0].call_id, ()) for shard, part in parts.items() if shard not in groups}
        self._asked: set[int] = set()

    def is_unchanged(self, shard: int, before: Mapping[str, Receipt]) -> bool:
        """Whether a group holds just what is wanted, under no lower limits."""
        group = self.groups.get(shard)
        wanted = self.wanted[shard]
        if group is None or len(group.claims) != len(wanted):
            return False
        for old in group.claims:
            new = wanted.get(old.meter.key)
            if new is None or new.amount != old.amount or new.member != old.member or old.meter.key not in before:
                return False
            if new.meter.limit != old.meter.limit:
                return False
        return True

    def ask(self, shard: int, storage: Storage) -> Coroutine[Any, Any, Answer]:
        """Take what is new or more."""
        group = self.groups.get(shard)
        if group is None:
            return storage.reserve(self.owner, (self.parts[shard].bundles,))
        group.claims = union(group, self.wanted[shard])  # before it is known: it may be held from now on
        self._asked.add(shard)
        return storage.amend(self.owner, Bundle(group.call_id, group.claims))

    def take(self, shard: int, answer: Granted | Refused, asked: list[Receipt | None]) -> None:
        """Note an answer, and put what it says of each claim into its place."""
        if isinstance(answer, Refused):
            self._new.pop(shard, None)
            if shard in self.groups:
                self.groups[shard].claims = self._before[shard]
                self._asked.discard(shard)
        receipts = answer.receipts if isinstance(answer, Granted) else answer.states[0]
        by_key = {receipt.claim.meter.key: receipt for receipt in receipts}
        for at, key in zip(self.parts[shard].at, self.wanted[shard], strict=True):
            asked[at] = by_key[key]

    def new(self) -> list[tuple[int, str]]:
        """Groups that there were not before."""
        return [(shard, group.call_id) for shard, group in self._new.items()]

    def gone(self) -> list[tuple[int, str]]:
        """Groups of which nothing is claimed any more."""
        return [(shard, group.call_id) for shard, group in self.groups.items() if shard not in self.parts]

    def kept(self) -> dict[int, Group]:
        """The groups of the changed call."""
        for shard, group in self._new.items():
            group.claims = tuple(self.parts[shard].claims)
        return {shard: self.groups.get(shard) or self._new[shard] for shard in self.parts}

    def too_much(self) -> dict[int, tuple[Claim, ...]]:
        """What groups are to hold that hold more than is wanted."""
        wanted = {
            shard: exact(group.claims, self.wanted[shard])
            for shard, group in self.groups.items()
            if shard in self.wanted
        }
        return {shard: claims for shard, claims in wanted.items() if claims != self.groups[shard].claims}

    def reverts(self) -> dict[int, tuple[Claim, ...]]:
        """What groups held before that hold more now. What was new has its place, and nothing."""
        reverts = {}
        for shard, group in self.groups.items():
            if shard in self._asked:
                reverts[shard] = exact(group.claims, {claim.meter.key: claim for claim in self._before[shard]})
        return reverts
