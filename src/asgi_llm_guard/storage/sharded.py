"""A storage over several others, each with a part of the meters: load spread over the nodes of a cluster.

A meter's shard is a pure function of its key, so nobody chooses it: that of the kind and the name of its subject.
A caller's limits, those of its sessions, and their ids are together; so are all limits of one user, of one
department, and the global ones. The rules of `base.py` hold in every shard; for calls as a whole they are these:

Rule 1: a plan all of whose claims lie in one shard is one trip there, as without shards.

Rule 2: any other plan has a home: the shard of its first claim on a session, a user or a caller, else of its first
claim. The draft and the usage record are there, under the call's own id. The claims of every other shard are
a group, held under an id of its own that no other attempt has: `<call id>~<shard>.<attempt>`.

Rule 3: all groups are asked for at once; when they are granted, home is, under the call id. So home's answer
decides, and a refused attempt leaves no trace under the call id, which may be asked for again. If anything but
a grant comes back, what was granted is given back at once, without waiting. The answer shows every claim: those
that nobody judged from a reading of their meters, which a call that fits later may find changed.

Rule 4: several plans are tried one after the other. All have the home of the first.

Rule 5: a settlement goes to home with the record, and to the groups with their amounts, in the same instant. Every
shard applies its own once, whatever is repeated.

Rule 6: at all times `used + held <= limit` in every meter, with the exceptions of the base rules: a hold is taken
before it is needed and given back late, never the reverse. So a call may be refused that would have fitted a
moment later. What a refused attempt has taken and given back may have begun a rolling window, renewed a session's
life, let an id in, or left in a bucket what has drained meanwhile.

Rule 7: an amend takes what is new or more in the groups first, then changes home, which decides, then gives back
what is less or gone. If it is refused, what was taken is given back. Where giving back does not succeed, more stays
held until the call is settled. A claim that gets smaller under a lower limit is judged with its old amount.

Rule 8: groups are known to the process that made them. Another process that reserves the same call id is told that
it is open, and of home's claims only; if it settles it, home is charged as it says, and the groups what they hold when
their owner lapses. So they are if the process dies between home's settlement and theirs: as much as was held, not less.

Rule 9: an owner may lapse in some shards only, if its heartbeats did not reach them. What it held there is expired
as ever, and it is told that it lapsed; what it holds in the others goes on, and is settled as usual.

Rule 10: where one shard has lost its data, only that one is told again what this process has settled.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Final, TypeVar, cast

import msgspec

from asgi_llm_guard.claims import (
    Bundle,
    Claim,
    Ended,
    Granted,
    Heartbeat,
    Meter,
    Plan,
    Reading,
    Receipt,
    Refused,
    Settled,
    Settlement,
    escape,
)
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.storage.base import Completed, Interruptible, LossAware, Pending, Storage
from asgi_llm_guard.storage.cells import Hold, Tombstone
from asgi_llm_guard.storage.entries import Bounds, KeepsEntries
from asgi_llm_guard.storage.export import Snapshot, parse_lines, read_line, write_lines
from asgi_llm_guard.storage.lease_book import claimed_twice
from asgi_llm_guard.storage.open_calls import whole_calls
from asgi_llm_guard.storage.pending import Handed, tell
from asgi_llm_guard.storage.shard_parts import (
    Chained,
    Group,
    Held,
    Part,
    Place,
    Together,
    call_of,
    cut,
    exact,
    first_of,
    holds_of_call,
    merge,
    not_taken,
    place_by_subject,
    settled_of,
    split,
    state_of,
    union,
)
from asgi_llm_guard.storage.sharded_entries import ShardedEntries
from asgi_llm_guard.storage.sharded_shared import ShardedShared
from asgi_llm_guard.storage.shared import KeepsShared, ListsCalls, OpenCall
from asgi_llm_guard.storage.streams import KeepsStreams, RecordStream
from asgi_llm_guard.usage import UsageRecord

__all__ = ["SHARDS", "ShardedStorage"]

_log = logging.getLogger("asgi_llm_guard.storage")

SHARDS: Final = 16
"""How many there are unless something else is said. Fixed for good: another number finds other meters in each."""

_BEFORE: Final = 256

_REMEMBERED: Final = 16_384
"""So many calls that have ended are known to this process, for what is settled twice."""

_REBUILT: Final = re.compile(r"rebuild-.*-[0-9a-f]+\.(\d+)-[0-9a-f]+")

Answer = Granted | Refused | Ended
T = TypeVar("T")


class ShardedStorage:
    """A `Storage` over `shards`, whose number and order are the same in every process, for good.

    May be used from several event loops and threads. `place`: a number for each meter's key; modulo the number of
    shards, it says which one.

    Raises:
        ConfigurationError: there are no shards.
    """

    def __init__(self, shards: Sequence[Storage], *, place: Place = place_by_subject) -> None:
        if not shards:
            raise ConfigurationError("shards: expected at least one storage, got none")
        self.shards = tuple(shards)
        count = len(self.shards)
        self._place: Place = lru_cache(maxsize=8192)(lambda key: place(key) % count)
        self._aware = [shard if isinstance(shard, LossAware) else None for shard in self.shards]
        self.begin_anew()
        _storages.add(self)

    def __repr__(self) -> str:
        return f"<ShardedStorage of {len(self.shards)}: {self.shards[0]!r}, ...>"

    def begin_anew(self) -> None:
        """Begin with no call, as in a process that was forked: they are its parent's."""
        self._open: dict[str, int | Held] = {}
        """Open calls of this process, or such whose end is not confirmed: their one shard, or what they hold where."""
        self._ended: dict[str, int | Held] = {}
        """The same of the latest that have ended, or of which it is not known what has become of them."""
        self._busy: dict[str, Handed[None]] = {}
        self._unreturned: list[tuple[int, Settlement]] = []
        self._news: dict[str, tuple[bool, list[str]]] = {}
        self._name = os.urandom(6).hex()
        self._numbers = itertools.count(1)
        self._generation = 0
        self._epochs = [""] * len(self.shards)
        self._lost: dict[int, int] = {}

    # --------------------------------------------------------------------------------- reserve

    def reserve(self, owner: str, plans: Sequence[Plan]) -> Coroutine[Any, Any, Answer]:
        # One loop for the usual case, which is a plan of one bundle in one shard.
        place = self._place
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
                return self.shards[0].reserve(owner, plans)
            home = self._home_of((), plans[0][0].draft, plans[0][0].call_id)
        for bundle in plans[0]:
            known = self._known(bundle.call_id)
            if known is not None and known != home:
                return self._reserve(owner, plans)
        return self._reserve_one(home, owner, plans)

    async def _reserve_one(self, home: int, owner: str, plans: Sequence[Plan]) -> Answer:
        """Ask the only shard."""
        fresh = [bundle.call_id for bundle in plans[0] if bundle.call_id not in self._open]
        for call_id in fresh:  # before it is asked: a settlement may overtake the answer
            self._open[call_id] = home
        try:
            answer = await self.shards[home].reserve(owner, plans)
        except BaseException as error:
            self._note(home, error)
            self._unsure(fresh, home, error)
            raise
        if not isinstance(answer, Granted):
            for call_id in fresh:
                self._open.pop(call_id, None)
        elif self._ended:
            for call_id in fresh:
                if self._open.get(call_id) == home:  # else it was settled meanwhile
                    self._ended.pop(call_id, None)
        return answer

    async def _reserve(self, owner: str, plans: Sequence[Plan]) -> Answer:
        """Ask several shards. One attempt at a time for each call id."""
        turn = await self._turn(plans[0][0].call_id)
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
            self._turn_over(plans[0][0].call_id, turn)

    def _home(self, plans: Sequence[Plan]) -> tuple[int, int]:
        """The home of plans; and which of them was granted to this process already, or -1."""
        first = plans[0]
        for bundle in first:
            known = self._open.get(bundle.call_id)
            if isinstance(known, Held):
                return known.home, known.plan
            if known is not None:
                return known, 0
        for bundle in first:
            known = self._ended.get(bundle.call_id)
            if known is not None:
                return known if isinstance(known, int) else known.home, -1
        claims = [claim for bundle in first for claim in bundle.claims]
        return self._home_of(claims, first[0].draft, first[0].call_id), -1

    def _home_of(self, claims: Sequence[Claim], record: UsageRecord | None, call_id: str) -> int:
        """The home of a call that nothing is remembered of."""
        meter = first_of(claims)
        if meter is not None:
            return self._place(meter.key)
        kind, name = ("call", call_id) if record is None or record.caller is None else ("caller", record.caller)
        return self._place(f":::{kind}:{escape(name)}")

    async def _attempt(self, owner: str, plan: Plan, number: int, home: int) -> Answer:
        attempt = f".{self._name}.{next(self._numbers):x}"
        known = {bundle.call_id: self._open.get(bundle.call_id) for bundle in plan}
        again = any(entry is not None for entry in known.values())

        def name(call_id: str, shard: int) -> str:
            entry = known[call_id]
            group = entry.groups.get(shard) if isinstance(entry, Held) else None
            return f"{call_id}~{shard}{attempt}" if group is None else group.call_id

        parts = cut(plan, home, self._place, name)
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
            overtaken = next((call_id for call_id, call in calls.items() if self._open.get(call_id) is not call), None)
            if ended is not None or overtaken is not None:
                self._give_back(new)
                self._drop(calls)
                if ended is not None:
                    return Ended(call_of(ended.call_id), ended.reason, ended.now_ms)
                return Ended(cast("str", overtaken), "settled", now_ms)
            if refused:
                self._give_back(entry for entry in new if entry[0] not in refused)
                self._drop(calls)
                return Refused((await self._states(plan, asked, {}, now_ms),), now_ms)
            at_home = True
            for call in calls.values():
                call.asked = True
            answer = await self.shards[home].reserve(owner, (mine.bundles,))
        except BaseException as error:
            self._give_back(new)
            if at_home:
                self._note(home, error)
                self._unsure(calls, home, error)
            else:
                self._drop(calls)
            raise
        now_ms = max(now_ms, answer.now_ms)
        if isinstance(answer, Granted):
            return self._granted(plan, answer, calls, asked, mine, new, number, now_ms)
        self._give_back(new)
        self._drop(calls)
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
            if bundle.call_id not in self._open
        }
        for shard, part in parts.items():
            for bundle in part.bundles:
                call = calls.get(call_of(bundle.call_id)) if shard != home else None
                if call is not None:
                    call.groups[shard] = Group(bundle.call_id, bundle.claims)
        self._open.update(calls)
        return calls

    async def _ask_groups(
        self, owner: str, parts: Mapping[int, Part], asked: list[Receipt | None]
    ) -> tuple[Ended | None, set[int], int]:
        """Reserve all groups; puts what was said of each claim into its place.

        Gives one that has ended, the shards that refuse, and the latest of the shards' clocks.
        """
        answers = await self._all(
            {shard: self.shards[shard].reserve(owner, (part.bundles,)) for shard, part in parts.items()}
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
        if answer.replayed and not any(call_id in self._ended for call_id in calls):
            # Another process has it open, and its groups under ids that are not known here.
            self._give_back(new)
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
            if self._open.get(bundle.call_id) is held:  # else it was settled meanwhile
                self._ended.pop(bundle.call_id, None)
                if not held.groups:
                    self._open[bundle.call_id] = held.home
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
            call = self._open.get(bundle.call_id)
            before = call.receipts if isinstance(call, Held) and answer.replayed else ()
            now = tuple([receipt for receipt in asked[at:upto] if receipt is not None])
            receipts += before or now
            if isinstance(call, Held) and not before:
                call.receipts = now
            at = upto
        if answer.replayed:
            self._give_back(new)  # of other claims than those that were granted
            if not any(isinstance(self._open.get(bundle.call_id), Held) for bundle in plan):
                receipts = list(answer.receipts)
        return Granted(tuple(receipts), now_ms, number, answer.replayed)

    async def _states(
        self, plan: Plan, asked: Sequence[Receipt | None], mine: Mapping[str, int], now_ms: int
    ) -> tuple[Receipt, ...]:
        """The states of a refused plan. Those of claims that were not judged are read."""
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

    # ----------------------------------------------------------------------- what is remembered

    def _known(self, call_id: str) -> int | Held | None:
        known = self._open.get(call_id)
        return self._ended.get(call_id) if known is None else known

    def _drop(self, calls: Iterable[str]) -> None:
        for call_id in calls:
            self._open.pop(call_id, None)

    def _unsure(self, calls: Iterable[str], home: int, error: BaseException) -> None:
        """What home knows of these is not known, unless it was not asked."""
        for call_id in calls:
            known = self._open.pop(call_id, None)
            if known is None or (isinstance(error, StorageError) and not error.sent and call_id not in self._ended):
                continue
            if isinstance(known, Held) and known.groups:
                # Its groups are given back. Should it be settled all the same, its receipts charge the other shards.
                for shard, group in known.groups.items():
                    group.call_id = f"{call_id}~{shard}"
                self._end(call_id, known)
            else:
                self._end(call_id, home)

    def _end(self, call_id: str, known: int | Held) -> None:
        """Remember where a call was that has ended, for a while."""
        ended = self._ended
        ended.pop(call_id, None)
        ended[call_id] = known
        if len(ended) > _REMEMBERED:
            with suppress(KeyError, RuntimeError):  # another thread has
                del ended[next(iter(ended))]

    async def _turn(self, call_id: str) -> Handed[None]:
        """Wait until nobody else of this process changes the call."""
        mine: Handed[None] = Handed()
        while (busy := self._busy.setdefault(call_id, mine)) is not mine:
            await busy
        return mine

    def _turn_over(self, call_id: str, turn: Handed[None]) -> None:
        del self._busy[call_id]
        turn.decide(None, None)
        tell((turn,))

    # ------------------------------------------------------------------------------ asking many

    async def _all(self, work: Mapping[int, Awaitable[T]]) -> dict[int, T]:
        """All answers, by shard.

        Raises:
            Exception: one has failed, and all have come back; a loss of data before anything else.
        """
        if len(work) == 1:
            ((shard, one),) = work.items()
            try:
                return {shard: await one}
            except DataLost as error:
                self._note(shard, error)
                raise
        answers = await asyncio.gather(*work.values(), return_exceptions=True)
        failures = []
        for shard, answer in zip(work, answers, strict=True):
            if isinstance(answer, BaseException):
                self._note(shard, answer)
                failures.append(answer)
        if failures:
            # What is the caller's mistake is no outage; and what may have been executed is to be told.
            raise min(failures, key=_weight)
        return dict(zip(work, cast("list[T]", answers), strict=True))

    def _give_back(self, groups: Iterable[tuple[int, str]]) -> None:
        """Nothing was used of these. Not waited for; what a shard does not take is tried again with a heartbeat."""
        by_shard: dict[int, list[Settlement]] = {}
        for shard, call_id in groups:
            by_shard.setdefault(shard, []).append(Settlement(call_id, ()))
        for shard, settlements in by_shard.items():
            self._return(shard, settlements)

    def _return(self, shard: int, settlements: Sequence[Settlement]) -> None:
        def returned(pending: Pending[tuple[Settled, ...]]) -> None:
            try:
                pending.result()
            except StorageError:
                self._unreturned.extend((shard, settlement) for settlement in settlements)

        try:
            self.shards[shard].settle(settlements).add_done_callback(returned)
        except StorageError:
            self._unreturned.extend((shard, settlement) for settlement in settlements)

    def _return_again(self) -> None:
        unreturned, self._unreturned = self._unreturned, []
        for shard, group in itertools.groupby(sorted(unreturned, key=lambda entry: entry[0]), lambda entry: entry[0]):
            self._return(shard, [settlement for _, settlement in group])

    # ----------------------------------------------------------------------------------- amend

    def amend(self, owner: str, bundle: Bundle) -> Coroutine[Any, Any, Answer]:
        known = self._open.get(bundle.call_id)
        shards = {self._place(claim.meter.key) for claim in bundle.claims}
        if known is None:
            known = self._known(bundle.call_id)
            if known is None:
                known = self._home_of(bundle.claims, bundle.draft, bundle.call_id)
        if isinstance(known, int) and shards <= {known}:
            return self._amend_one(known, owner, bundle)
        return self._amend(owner, bundle)

    async def _amend_one(self, home: int, owner: str, bundle: Bundle) -> Answer:
        try:
            return await self.shards[home].amend(owner, bundle)
        except DataLost as error:
            self._note(home, error)
            raise

    async def _amend(self, owner: str, bundle: Bundle) -> Answer:
        turn = await self._turn(bundle.call_id)
        try:
            return await self._change(owner, bundle)
        finally:
            self._turn_over(bundle.call_id, turn)

    async def _change(self, owner: str, bundle: Bundle) -> Answer:
        call_id = bundle.call_id
        was_open = self._open.get(call_id)
        known = self._known(call_id)
        home = known if isinstance(known, int) else None if known is None else known.home
        if home is None:
            home = self._home_of(bundle.claims, bundle.draft, call_id)
        call = known if isinstance(known, Held) else None
        groups = call.groups if call is not None else {}
        attempt = f".{self._name}.{next(self._numbers):x}"
        parts = cut((bundle,), home, self._place, lambda _, shard: f"{call_id}~{shard}{attempt}")
        mine = parts.pop(home)
        before = {r.claim.meter.key: r for r in call.receipts if r.taken} if call is not None else {}
        asked: list[Receipt | None] = [None] * len(bundle.claims)
        change = _Change(owner, groups, parts)
        unchanged = [] if call is None or call.owner != owner else [s for s in parts if change.is_unchanged(s, before)]
        for shard in unchanged:
            for at, claim in zip(parts[shard].at, change.wanted[shard].values(), strict=True):
                asked[at] = before[claim.meter.key]
        at_home = False
        try:
            answers = await self._all(
                {shard: change.ask(shard, self.shards[shard]) for shard in parts if shard not in unchanged}
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
                return Refused((await self._states((bundle,), asked, held, now_ms),), now_ms)
            at_home = True
            answer = await self.shards[home].amend(owner, mine.bundles[0])
        except BaseException as error:
            if at_home:
                self._note(home, error)
            if isinstance(error, Exception) and not (at_home and isinstance(error, StorageError) and error.sent):
                await self._revert(change)
            else:  # cancelled, or home may have changed it: groups that are claimed either way keep the more
                self._give_back(change.new())
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
        if self._open.get(call_id) != was_open:
            self._give_back(change.new())
            return Ended(call_id, "settled", now_ms)
        await self._shrink(change, asked)
        changed = Held(owner, home, bundle.claims, change.kept(), 0 if call is None else call.plan)
        changed.asked = True
        changed.receipts = tuple(cast("list[Receipt]", asked))
        self._give_back(change.gone())
        if self._open.get(call_id) != was_open:
            self._give_back(change.new())  # it was settled while what was too much was given back
        else:
            self._ended.pop(call_id, None)
            self._open[call_id] = changed if changed.groups else home
        return Granted(changed.receipts, now_ms)

    async def _shrink(self, change: _Change, asked: list[Receipt | None]) -> None:
        """Give back what is less, in groups that stay. Where that fails, it stays held until the call is settled."""
        shrunk = change.too_much()
        for shard, claims in shrunk.items():
            group = change.groups[shard]
            try:
                answer = await self.shards[shard].amend(change.owner, Bundle(group.call_id, claims))
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

    async def _revert(self, change: _Change) -> None:
        """Give back what was taken for a change that is refused."""
        self._give_back(change.new())
        for shard, claims in change.reverts().items():
            group = change.groups[shard]
            with suppress(StorageError):
                answer = await self.shards[shard].amend(change.owner, Bundle(group.call_id, claims))
                if isinstance(answer, Granted):
                    group.claims = claims

    # ---------------------------------------------------------------------------------- settle

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        home = -1
        for settlement in settlements:
            known = self._known(settlement.call_id)
            if not isinstance(known, int) or settlement.debits or home not in (-1, known):
                return self._settle(settlements)
            home = known
        if home < 0:
            return Completed(())
        pending = self.shards[home].settle(settlements)
        for settlement in settlements:
            self._open.pop(settlement.call_id, None)
            self._end(settlement.call_id, home)
        pending.add_done_callback(partial(self._confirm, settlements))
        return pending

    def _settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Settle what lies in several shards, or is not known."""
        batches = _Batches()
        later: list[Pending[tuple[Settled, ...]]] = []
        try:
            recipes = [self._settle_each(settlement, batches, later) for settlement in settlements]
            pendings = [self.shards[shard].settle(batches.of[shard]) for shard in batches.order]
        except StorageError:
            self._unconfirmed(settlements)
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
            self._unconfirmed(settlements)

    def _unconfirmed(self, settlements: Sequence[Settlement]) -> None:
        """They will be handed over again: what is held where must not be forgotten until then."""
        for settlement in settlements:
            known = self._ended.pop(settlement.call_id, None)
            if known is not None:
                self._open.setdefault(settlement.call_id, known)

    def _settle_each(
        self, settlement: Settlement, batches: _Batches, later: list[Pending[tuple[Settled, ...]]]
    ) -> Callable[[Sequence[tuple[Settled, ...]]], Settled]:
        """Put a settlement's parts into the batches of their shards; gives how to make its answer."""
        call_id = settlement.call_id
        told = _REBUILT.fullmatch(call_id) if call_id.startswith("rebuild-") else None
        known = self._known(call_id)
        if known is None and not (settlement.receipts or settlement.debits or settlement.record):
            # Nobody here knows of it, so it may come to be asked for anywhere, and is to be refused there.
            places = [batches.add(shard, settlement) for shard in range(len(self.shards))]
            return lambda answers: _best([answers[n][at] for n, at in places])
        claims = [receipt.claim for receipt in settlement.receipts]
        if known is None:
            known = self._home_of(claims or settlement.debits, settlement.record, call_id)
            if told is not None and self._lost.get(known, -1) < int(told[1]):
                return lambda _: Settled(call_id, "duplicate")
            call = self._by_receipts(settlement, known)
            if call is not None:
                return self._settle_unknown(call, settlement, later, batches)
        home = known if isinstance(known, int) else known.home
        self._open.pop(call_id, None)
        self._end(call_id, known)
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

    def _debit_away(self, settlement: Settlement, home: int, batches: _Batches) -> Settlement:
        """Hand what is debited in other shards than home over to them, under ids that are the same each time."""
        here: list[Claim] = []
        away: dict[int, list[Claim]] = {}
        for claim in settlement.debits:
            shard = self._place(claim.meter.key)
            (here if shard == home else away.setdefault(shard, [])).append(claim)
        for shard, claims in away.items():
            batches.add(shard, Settlement(f"{settlement.call_id}~{shard}.d", (), None, (), tuple(claims)))
        return msgspec.structs.replace(settlement, debits=tuple(here)) if away else settlement

    def _by_receipts(self, settlement: Settlement, home: int) -> Held | None:
        """A call that only its receipts are known of, if they are of several shards."""
        groups: dict[int, list[Claim]] = {}
        for receipt in settlement.receipts:
            shard = self._place(receipt.claim.meter.key)
            if shard != home:
                groups.setdefault(shard, []).append(receipt.claim)
        if not groups:
            return None
        named = {shard: Group(f"{settlement.call_id}~{shard}", tuple(claims)) for shard, claims in groups.items()}
        call = Held("", home, tuple([receipt.claim for receipt in settlement.receipts]), named, 0)
        call.asked = True
        return call

    def _settle_unknown(
        self, call: Held, settlement: Settlement, later: list[Pending[tuple[Settled, ...]]], batches: _Batches
    ) -> Callable[[Sequence[tuple[Settled, ...]]], Settled]:
        """Ask home first: only if it does not know the call either, nothing stands for it in the other shards."""
        settlement = self._debit_away(settlement, call.home, batches)
        mine, rest = split(call, settlement)
        self._end(settlement.call_id, call)  # should it be settled again, for want of an answer, all shards are

        def then(answers: tuple[Settled, ...]) -> Pending[tuple[Settled, ...]]:
            if answers[0].status != "lost":
                self._end(settlement.call_id, call.home)
                return Completed(answers)
            pendings: list[Pending[tuple[Settled, ...]]] = [self.shards[shard].settle((one,)) for shard, one in rest]
            shards = [shard for shard, _ in rest]
            return Together(
                pendings,
                lambda others: (
                    settled_of(call, answers[0], [(s, other[0]) for s, other in zip(shards, others, strict=True)]),
                ),
            )

        first = self.shards[call.home].settle((msgspec.structs.replace(mine, debits=settlement.debits),))
        number = len(later)
        later.append(Chained(first, then))
        return lambda answers: answers[number - len(later)][0]  # these are the last ones

    # ---------------------------------------------------------------------------------- owners

    async def heartbeat(self, owner: str) -> Heartbeat:
        self._return_again()
        beats = await asyncio.gather(*[shard.heartbeat(owner) for shard in self.shards], return_exceptions=True)
        lapsed, expired = self._news.pop(owner, (False, []))
        failures: list[BaseException] = []
        now_ms, owners = 0, 1
        for shard, beat in enumerate(beats):
            if isinstance(beat, BaseException):
                self._note(shard, beat)
                failures.append(beat)
                continue
            lapsed |= beat.lapsed
            expired += beat.expired
            now_ms = max(now_ms, beat.now_ms)
            owners = max(owners, beat.owners)
        if failures:
            self._news[owner] = lapsed, expired  # what one shard has told it does not tell again
            raise min(failures, key=_weight)
        return Heartbeat(lapsed, tuple(dict.fromkeys(map(call_of, expired))), now_ms, owners)

    async def retire(self, owner: str) -> None:
        self._return_again()
        self._news.pop(owner, None)
        await self._all({n: shard.retire(owner) for n, shard in enumerate(self.shards)})

    # ------------------------------------------------------------------------------ read, reset

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        parts = self._by_shard(meters)
        answers = await self._all(
            {shard: self.shards[shard].read([meters[at] for at in places]) for shard, places in parts.items()}
        )
        readings: list[Any] = [None] * len(meters)
        for shard, places in parts.items():
            for at, reading in zip(places, answers[shard], strict=True):
                readings[at] = reading
        return tuple(readings)

    async def reset(self, meters: Sequence[Meter]) -> None:
        parts = self._by_shard(meters)
        await self._all(
            {shard: self.shards[shard].reset([meters[at] for at in places]) for shard, places in parts.items()}
        )

    def _by_shard(self, meters: Sequence[Meter]) -> dict[int, list[int]]:
        parts: dict[int, list[int]] = {}
        for at, meter in enumerate(meters):
            parts.setdefault(self._place(meter.key), []).append(at)
        return parts

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        found = await self._all(
            {n: shard.records(since_ms=since_ms, limit=limit) for n, shard in enumerate(self.shards)}
        )
        records = [record for some in found.values() for record in some]
        records.sort(key=lambda record: (record.at_ms, record.call_id))
        return records if limit is None else records[:limit]

    async def open_holds(self) -> int:
        """How many calls are open, whatever the number of their groups. Reads everything where any is."""
        counts = await self._all({n: shard.open_holds() for n, shard in enumerate(self.shards)})
        if not any(counts.values()):
            return 0
        calls = set()
        for n, count in counts.items():
            if count:
                async for data in self.shards[n].export():
                    line = read_line(data) if data.startswith(b'{"hold"') else None
                    if line is not None and line.hold is not None:
                        calls.add(call_of(line.hold[0]))
        return len(calls)

    # ----------------------------------------------------------------------- export, import

    async def export(self) -> AsyncIterator[bytes]:
        """As `Storage.export`, as if all were one storage; the groups of calls that are open are calls of their own."""
        exported_ms = 0
        snapshots = []
        for shard in self.shards:
            lines = [line async for line in shard.export()]
            header = read_line(lines[0]).export
            exported_ms = max(exported_ms, header.exported_ms if header is not None else 0)
            snapshots.append(parse_lines(lines))
        for line in write_lines(merge(snapshots), exported_ms):
            yield line

    async def load(self, lines: Iterable[bytes]) -> None:
        """As `Storage.load`, into empty shards.

        Raises:
            StorageError: as `Storage.load`. If a shard fails after others have taken their part, the message says so.
        """
        data = list(lines)
        snapshots, found = self._cut_up(parse_lines(data))
        header = next(line for line in (read_line(one) for one in data if one.strip()))
        exported_ms = header.export.exported_ms if header.export is not None else 0
        await self._refuse_unless_empty()
        for n, (shard, snapshot) in enumerate(zip(self.shards, snapshots, strict=True)):
            try:
                await shard.load(write_lines(snapshot, exported_ms))
            except StorageError as error:
                if not n:
                    raise
                raise StorageError(
                    f"import: shard {n} of {len(self.shards)} did not take its part, and those before it did: "
                    f"remove them, or load into a new namespace: {error}"
                ) from error
        for call_id, known in found.items():
            self._end(call_id, known)

    async def _refuse_unless_empty(self) -> None:
        for n, shard in enumerate(self.shards):
            async for data in shard.export():
                line = read_line(data)
                if line.export is None and line.owner is None and line.end is None:
                    raise StorageError(f"import: shard {n} is not empty; load into a new storage")

    def _cut_up(self, whole: Snapshot) -> tuple[list[Snapshot], dict[str, int | Held]]:
        """A state by shards, and where calls are."""
        count = len(self.shards)
        cells: list[list[Any]] = [[] for _ in range(count)]
        members: list[list[Any]] = [[] for _ in range(count)]
        holds: list[list[Any]] = [[] for _ in range(count)]
        tombstones: list[list[tuple[str, Tombstone]]] = [[] for _ in range(count)]
        records: list[list[UsageRecord]] = [[] for _ in range(count)]
        found: dict[str, int | Held] = {}
        owners = list(whole.owners)
        for cell in whole.cells:
            cells[self._place(cell[0])].append(cell)
        for member in whole.members:
            members[self._place(member[0])].append(member)
        for hold in whole.holds:
            home = self._home_of([receipt.claim for receipt in hold.receipts], hold.draft, hold.call_id)
            parts = holds_of_call(hold, home, self._place)
            for shard, part in parts.items():
                holds[shard].append(part)
            found[hold.call_id] = _held(hold, home, parts)
        for call_id, tombstone in whole.tombstones:
            hold_of = tombstone.hold
            if hold_of is None:  # where it was is not known: it is refused, or settled already, everywhere
                for some in tombstones:
                    some.append((call_id, tombstone))
                continue
            home = self._home_of([receipt.claim for receipt in hold_of.receipts], hold_of.draft, call_id)
            parts = holds_of_call(hold_of, home, self._place)
            found[call_id] = _held(hold_of, home, parts)
            for shard, part in parts.items():
                tombstones[shard].append((part.call_id, msgspec.structs.replace(tombstone, hold=part)))
        for record in whole.records:
            records[self._home_of((), record, record.call_id)].append(record)
        parts_of = [
            Snapshot(cells=c, members=m, owners=owners, holds=h, tombstones=t, records=r)
            for c, m, h, t, r in zip(cells, members, holds, tombstones, records, strict=True)
        ]
        return parts_of, found

    # ------------------------------------------------------------------------- outages and losses

    def available(self) -> bool:
        """Whether any shard is there: then it is worth while to ask. Those that are not fail at once."""
        told = [shard.available() for shard in self.shards if isinstance(shard, Interruptible)]
        return len(told) < len(self.shards) or any(told)

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
        await self._all({n: shard.accept_loss() for n, shard in enumerate(self._aware) if shard is not None})

    def _note(self, shard: int, error: BaseException) -> None:
        """That shard has lost its data, if this says so."""
        if isinstance(error, DataLost):
            self._lost[shard] = self._generation

    def entries(self, space: str, bounds: Bounds | None = None) -> ShardedEntries:
        """As `KeepsEntries`, if every shard is one. Each shard has the bounds for itself."""
        shards = [shard.entries(space, bounds) for shard in self.shards if isinstance(shard, KeepsEntries)]
        if len(shards) < len(self.shards):
            raise ConfigurationError(f"entries: not every shard can keep {space!r}; use Redis or Valkey")
        return ShardedEntries(shards)

    def shared(self) -> ShardedShared:
        """As `KeepsShared`, if every shard is one."""
        shards = [shard.shared() for shard in self.shards if isinstance(shard, KeepsShared)]
        if len(shards) < len(self.shards):
            raise ConfigurationError("shared: not every shard can keep what processes share; use Redis or Valkey")
        return ShardedShared(shards)

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        """As `ListsCalls`, of the shards that are one."""
        # What a call holds elsewhere was reserved a moment before its home.
        asked = {
            n: shard.open_calls(limit + _BEFORE) for n, shard in enumerate(self.shards) if isinstance(shard, ListsCalls)
        }
        found = await self._all(asked)
        return whole_calls([call for calls in found.values() for call in calls], limit)

    def streams(self) -> Sequence[RecordStream]:
        """As `KeepsStreams`, if every shard is one. A record is in the stream of its call's home."""
        streams = [stream for shard in self.shards if isinstance(shard, KeepsStreams) for stream in shard.streams()]
        if len(streams) < len(self.shards):
            raise ConfigurationError("streams: not every shard keeps its records as a stream; use Redis or Valkey")
        return streams

    async def aclose(self) -> None:
        self._return_again()
        answers = await asyncio.gather(*[shard.aclose() for shard in self.shards], return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer


class _Batches:
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


class _Change:
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


def _weight(error: BaseException) -> int:
    """What is told first, of several failures."""
    if isinstance(error, DataLost):
        return 0
    if not isinstance(error, StorageError):
        return 1
    return 2 if error.sent else 3


def _held(hold: Hold, home: int, parts: Mapping[int, Hold]) -> int | Held:
    if len(parts) == 1:
        return home
    groups = {
        shard: Group(part.call_id, tuple([receipt.claim for receipt in part.receipts]))
        for shard, part in parts.items()
        if shard != home
    }
    call = Held(hold.owner, home, tuple([receipt.claim for receipt in hold.receipts]), groups, hold.plan)
    call.receipts, call.asked = hold.receipts, True
    return call


def _best(answers: Sequence[Settled]) -> Settled:
    return next((answer for answer in answers if answer.status != "cancelled"), answers[0])


# --------------------------------------------------------------------------- process events

_storages: weakref.WeakSet[ShardedStorage] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for storage in list(_storages):
        storage.begin_anew()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
