"""Reserving over several shards: the rest of a plan is asked for as groups, then home, which decides.

Rules 1 to 4 of `sharded.py`.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, cast

from asgi_llm_guard.claims import Ended, Granted, Plan, Receipt, Refused
from asgi_llm_guard.storage.shard_asking import Shards
from asgi_llm_guard.storage.shard_calls import Calls, Group, Held
from asgi_llm_guard.storage.shard_parts import Part, call_of, cut, not_taken

__all__ = ["Reserving"]

Answer = Granted | Refused | Ended


class Reserving:
    """`ShardedStorage.reserve`."""

    def __init__(self, shards: Shards, calls: Calls) -> None:
        self._shards = shards
        self._calls = calls

    def reserve(self, owner: str, plans: Sequence[Plan]) -> Coroutine[Any, Any, Answer]:
        # One loop for the usual case, which is a plan of one bundle in one shard.
        place = self._shards.place
        home = -1
        for plan in plans:
            for bundle in plan:
                for claim in bundle.claims:
                    shard = place(claim.meter.key)
                    if shard != home:
                        if home >= 0:
                            return self._reserve(owner, plans)
                        home = shard
        if home < 0:
            if not plans or not plans[0]:
                return self._shards.storages[0].reserve(owner, plans)
            home = self._shards.home_of((), plans[0][0].draft, plans[0][0].call_id)
        for bundle in plans[0]:
            known = self._calls.known(bundle.call_id)
            if known is not None and known != home:
                return self._reserve(owner, plans)
        return self._reserve_one(home, owner, plans)

    async def _reserve_one(self, home: int, owner: str, plans: Sequence[Plan]) -> Answer:
        """Ask the only shard."""
        fresh = [bundle.call_id for bundle in plans[0] if bundle.call_id not in self._calls.open]
        for call_id in fresh:  # before it is asked: a settlement may overtake the answer
            self._calls.open[call_id] = home
        try:
            answer = await self._shards.storages[home].reserve(owner, plans)
        except BaseException as error:
            self._shards.note(home, error)
            self._calls.unsure(fresh, home, error)
            raise
        if not isinstance(answer, Granted):
            for call_id in fresh:
                self._calls.open.pop(call_id, None)
        elif self._calls.ended:
            for call_id in fresh:
                if self._calls.open.get(call_id) == home:  # else it was settled meanwhile
                    self._calls.ended.pop(call_id, None)
        return answer

    async def _reserve(self, owner: str, plans: Sequence[Plan]) -> Answer:
        """Ask several shards. One attempt at a time for each call id."""
        turn = await self._calls.turn(plans[0][0].call_id)
        try:
            home, number = self._home(plans)
            if number >= 0:  # it is open: the plan that was granted
                number = min(number, len(plans) - 1)
                return await self._attempt(owner, plans[number], number, home)
            states: list[tuple[Receipt, ...]] = []
            now_ms = 0
            for number, plan in enumerate(plans):
                answer = await self._attempt(owner, plan, number, home)
                if not isinstance(answer, Refused):
                    return answer
                states += answer.states
                now_ms = max(now_ms, answer.now_ms)
            return Refused(tuple(states), now_ms)
        finally:
            self._calls.turn_over(plans[0][0].call_id, turn)

    def _home(self, plans: Sequence[Plan]) -> tuple[int, int]:
        """The home of plans; and which of them was granted to this process already, or -1."""
        first = plans[0]
        for bundle in first:
            known = self._calls.open.get(bundle.call_id)
            if isinstance(known, Held):
                return known.home, known.plan
            if known is not None:
                return known, 0
        for bundle in first:
            known = self._calls.ended.get(bundle.call_id)
            if known is not None:
                return known if isinstance(known, int) else known.home, -1
        claims = [claim for bundle in first for claim in bundle.claims]
        return self._shards.home_of(claims, first[0].draft, first[0].call_id), -1

    async def _attempt(self, owner: str, plan: Plan, number: int, home: int) -> Answer:
        attempt = self._shards.next_attempt()
        known = {bundle.call_id: self._calls.open.get(bundle.call_id) for bundle in plan}
        again = any(entry is not None for entry in known.values())

        def name(call_id: str, shard: int) -> str:
            entry = known[call_id]
            group = entry.groups.get(shard) if isinstance(entry, Held) else None
            return f"{call_id}~{shard}{attempt}" if group is None else group.call_id

        parts = cut(plan, home, self._shards.place, name)
        calls = self._begin(owner, plan, parts, number, home) if not again else {}
        mine = parts.pop(home)
        new = [
            (shard, bundle.call_id)
            for shard, part in parts.items()
            for bundle in part.bundles
            if bundle.call_id.endswith(attempt)
        ]
        asked: list[Receipt | None] = [None] * sum(len(bundle.claims) for bundle in plan)
        at_home = False
        try:
            ended, refused, now_ms = await self._ask_groups(owner, parts, asked)
            overtaken = next(
                (call_id for call_id, call in calls.items() if self._calls.open.get(call_id) is not call), None
            )
            if ended is not None or overtaken is not None:
                self._shards.give_back(new)
                self._calls.drop(calls)
                if ended is not None:
                    return Ended(call_of(ended.call_id), ended.reason, ended.now_ms)
                return Ended(cast("str", overtaken), "settled", now_ms)
            if refused:
                self._shards.give_back(entry for entry in new if entry[0] not in refused)
                self._calls.drop(calls)
                return Refused((await self._shards.states(plan, asked, {}, now_ms),), now_ms)
            at_home = True
            for call in calls.values():
                call.asked = True
            answer = await self._shards.storages[home].reserve(owner, (mine.bundles,))
        except BaseException as error:
            self._shards.give_back(new)
            if at_home:
                self._shards.note(home, error)
                self._calls.unsure(calls, home, error)
            else:
                self._calls.drop(calls)
            raise
        now_ms = max(now_ms, answer.now_ms)
        if isinstance(answer, Granted):
            return self._granted(plan, answer, calls, asked, mine, new, number, now_ms)
        self._shards.give_back(new)
        self._calls.drop(calls)
        if isinstance(answer, Ended):
            return answer
        for at, receipt in zip(mine.at, answer.states[0], strict=True):
            asked[at] = receipt
        return Refused((tuple([not_taken(cast("Receipt", receipt)) for receipt in asked]),), now_ms)

    def _begin(self, owner: str, plan: Plan, parts: Mapping[int, Part], number: int, home: int) -> dict[str, Held]:
        """Remember calls before they are asked for: a settlement may overtake the answer."""
        calls = {
            bundle.call_id: Held(owner, home, bundle.claims, {}, number)
            for bundle in plan
            if bundle.call_id not in self._calls.open
        }
        for shard, part in parts.items():
            for bundle in part.bundles:
                call = calls.get(call_of(bundle.call_id)) if shard != home else None
                if call is not None:
                    call.groups[shard] = Group(bundle.call_id, bundle.claims)
        self._calls.open.update(calls)
        return calls

    async def _ask_groups(
        self, owner: str, parts: Mapping[int, Part], asked: list[Receipt | None]
    ) -> tuple[Ended | None, set[int], int]:
        """Reserve all groups; puts what was said of each claim into its place.

        Gives one that has ended, the shards that refuse, and the latest of the shards' clocks.
        """
        answers = await self._shards.gather(
            {shard: self._shards.storages[shard].reserve(owner, (part.bundles,)) for shard, part in parts.items()}
        )
        ended, refused, now_ms = None, set[int](), 0
        for shard, answer in answers.items():
            now_ms = max(now_ms, answer.now_ms)
            if isinstance(answer, Ended):
                ended = answer
                continue
            if isinstance(answer, Refused):
                refused.add(shard)
            receipts = answer.receipts if isinstance(answer, Granted) else answer.states[0]
            for at, receipt in zip(parts[shard].at, receipts, strict=False):
                asked[at] = receipt
        return ended, refused, now_ms

    def _granted(
        self,
        plan: Plan,
        answer: Granted,
        calls: Mapping[str, Held],
        asked: list[Receipt | None],
        mine: Part,
        new: Sequence[tuple[int, str]],
        number: int,
        now_ms: int,
    ) -> Granted:
        """Home has granted it: remember what is held, or tell again what was held before."""
        if not calls:
            return self._again(plan, answer, asked, mine, new, number, now_ms)
        for at, receipt in zip(mine.at, answer.receipts, strict=True):
            asked[at] = receipt
        if answer.replayed and not any(call_id in self._calls.ended for call_id in calls):
            # Another process has it open, and its groups under ids that are not known here.
            self._shards.give_back(new)
            theirs = set(mine.at)
            asked = [r if n in theirs or r is None else not_taken(r) for n, r in enumerate(asked)]
            for call in calls.values():
                for group in call.groups.values():
                    group.call_id = ""
        receipts = tuple(cast("list[Receipt]", asked))
        at = 0
        for bundle in plan:
            upto = at + len(bundle.claims)
            held = calls[bundle.call_id]
            held.receipts = receipts[at:upto]
            if self._calls.open.get(bundle.call_id) is held:  # else it was settled meanwhile
                self._calls.ended.pop(bundle.call_id, None)
                if not held.groups:
                    self._calls.open[bundle.call_id] = held.home
            at = upto
        return Granted(receipts, now_ms, number, answer.replayed)

    def _again(
        self,
        plan: Plan,
        answer: Granted,
        asked: list[Receipt | None],
        mine: Part,
        new: Sequence[tuple[int, str]],
        number: int,
        now_ms: int,
    ) -> Granted:
        """Calls of this process that were open before; where a shard had lost its part, it holds it again."""
        for at, receipt in zip(mine.at, answer.receipts, strict=False):
            asked[at] = receipt
        receipts: list[Receipt] = []
        at = 0
        for bundle in plan:
            upto = at + len(bundle.claims)
            call = self._calls.open.get(bundle.call_id)
            before = call.receipts if isinstance(call, Held) and answer.replayed else ()
            now = tuple([receipt for receipt in asked[at:upto] if receipt is not None])
            receipts += before or now
            if isinstance(call, Held) and not before:
                call.receipts = now
            at = upto
        if answer.replayed:
            self._shards.give_back(new)  # of other claims than those that were granted
            if not any(isinstance(self._calls.open.get(bundle.call_id), Held) for bundle in plan):
                receipts = list(answer.receipts)
        return Granted(tuple(receipts), now_ms, number, answer.replayed)
