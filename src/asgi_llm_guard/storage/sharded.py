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
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any, Final

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.base import Interruptible, Pending, Storage
from asgi_llm_guard.storage.entries import Bounds, KeepsEntries
from asgi_llm_guard.storage.export import parse_lines, read_line, write_lines
from asgi_llm_guard.storage.forks import begin_anew_after_fork
from asgi_llm_guard.storage.open_calls import whole_calls
from asgi_llm_guard.storage.shard_amend import Amending
from asgi_llm_guard.storage.shard_asking import Shards, weight
from asgi_llm_guard.storage.shard_calls import Calls
from asgi_llm_guard.storage.shard_copy import cut_up, merge
from asgi_llm_guard.storage.shard_parts import Place, call_of, place_by_subject
from asgi_llm_guard.storage.shard_reserve import Reserving
from asgi_llm_guard.storage.shard_settle import Settling
from asgi_llm_guard.storage.sharded_entries import ShardedEntries
from asgi_llm_guard.storage.sharded_shared import ShardedShared
from asgi_llm_guard.storage.shared import KeepsShared, ListsCalls, OpenCall
from asgi_llm_guard.storage.streams import KeepsStreams, RecordStream
from asgi_llm_guard.usage import UsageRecord

__all__ = ["SHARDS", "ShardedStorage"]

SHARDS: Final = 16
"""How many there are unless something else is said. Fixed for good: another number finds other meters in each."""

_BEFORE: Final = 256
"""So many more are listed of each shard: what a call holds elsewhere was reserved a moment before its home."""


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
        self._shards = Shards(shards, place)
        self.shards = self._shards.storages
        self._begin()
        begin_anew_after_fork(self)

    def __repr__(self) -> str:
        return f"<ShardedStorage of {len(self.shards)}: {self.shards[0]!r}, ...>"

    def _begin(self) -> None:
        """Begin with no call."""
        self._calls = Calls()
        self._reserving = Reserving(self._shards, self._calls)
        self._amending = Amending(self._shards, self._calls)
        self._settling = Settling(self._shards, self._calls)
        self._news: dict[str, tuple[bool, list[str]]] = {}
        """Of owners whose heartbeat some shards did not answer: what the others have told."""

    def begin_anew(self) -> None:
        """Begin with no call, as in a process that was forked: they are its parent's."""
        self._shards.begin_anew()
        self._begin()

    # ------------------------------------------------------------------------------ what calls do

    def reserve(self, owner: str, plans: Sequence[Plan]) -> Coroutine[Any, Any, Granted | Refused | Ended]:
        return self._reserving.reserve(owner, plans)

    def amend(self, owner: str, bundle: Bundle) -> Coroutine[Any, Any, Granted | Refused | Ended]:
        return self._amending.amend(owner, bundle)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        return self._settling.settle(settlements)

    # ---------------------------------------------------------------------------------- owners

    async def heartbeat(self, owner: str) -> Heartbeat:
        self._shards.give_back_again()
        beats = await asyncio.gather(*[shard.heartbeat(owner) for shard in self.shards], return_exceptions=True)
        lapsed, expired = self._news.pop(owner, (False, []))
        failures: list[BaseException] = []
        now_ms, owners = 0, 1
        for shard, beat in enumerate(beats):
            if isinstance(beat, BaseException):
                self._shards.note(shard, beat)
                failures.append(beat)
                continue
            lapsed |= beat.lapsed
            expired += beat.expired
            now_ms = max(now_ms, beat.now_ms)
            owners = max(owners, beat.owners)
        if failures:
            self._news[owner] = lapsed, expired  # what one shard has told it does not tell again
            raise min(failures, key=weight)
        return Heartbeat(lapsed, tuple(dict.fromkeys(map(call_of, expired))), now_ms, owners)

    async def retire(self, owner: str) -> None:
        self._shards.give_back_again()
        self._news.pop(owner, None)
        await self._shards.gather({n: shard.retire(owner) for n, shard in enumerate(self.shards)})

    # ------------------------------------------------------------------------------ read, reset

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        return await self._shards.read(meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        await self._shards.reset(meters)

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        found = await self._shards.gather(
            {n: shard.records(since_ms=since_ms, limit=limit) for n, shard in enumerate(self.shards)}
        )
        records = [record for some in found.values() for record in some]
        records.sort(key=lambda record: (record.at_ms, record.call_id))
        return records if limit is None else records[:limit]

    async def open_holds(self) -> int:
        """How many calls are open, whatever the number of their groups. Reads everything where any is."""
        counts = await self._shards.gather({n: shard.open_holds() for n, shard in enumerate(self.shards)})
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
        snapshots, found = cut_up(parse_lines(data), self._shards)
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
            self._calls.end(call_id, known)

    async def _refuse_unless_empty(self) -> None:
        for n, shard in enumerate(self.shards):
            async for data in shard.export():
                line = read_line(data)
                if line.export is None and line.owner is None and line.end is None:
                    raise StorageError(f"import: shard {n} is not empty; load into a new storage")

    # ------------------------------------------------------------------------- outages and losses

    def available(self) -> bool:
        """Whether any shard is there: then it is worth while to ask. Those that are not fail at once."""
        told = [shard.available() for shard in self.shards if isinstance(shard, Interruptible)]
        return len(told) < len(self.shards) or any(told)

    @property
    def epoch(self) -> str:
        """Names the data of all shards: another name after each loss that is accepted. Of this process only."""
        return self._shards.epoch

    async def accept_loss(self) -> None:
        await self._shards.accept_loss()

    # ------------------------------------------------------------------- what else shards may keep

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
        asked = {
            n: shard.open_calls(limit + _BEFORE) for n, shard in enumerate(self.shards) if isinstance(shard, ListsCalls)
        }
        found = await self._shards.gather(asked)
        return whole_calls([call for calls in found.values() for call in calls], limit)

    def streams(self) -> Sequence[RecordStream]:
        """As `KeepsStreams`, if every shard is one. A record is in the stream of its call's home."""
        streams = [stream for shard in self.shards if isinstance(shard, KeepsStreams) for stream in shard.streams()]
        if len(streams) < len(self.shards):
            raise ConfigurationError("streams: not every shard keeps its records as a stream; use Redis or Valkey")
        return streams

    async def aclose(self) -> None:
        self._shards.give_back_again()
        answers = await asyncio.gather(*[shard.aclose() for shard in self.shards], return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
