"""Storage in Redis or Valkey: one truth for many workers on many hosts.

One script call admits a plan under all of its claims or under none; one settles and appends the usage
record. The scripts are in `lua/`; they keep the rules of `storage/base.py` as `storage/cells.py`
does, answer for answer. The server's clock decides.

All keys of a namespace have one hash tag, so that in a cluster each plan is one call to one node.

A call whose reply was lost is asked again under the same call id and finds what it has done. No
client library repeats a call by itself.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Final, cast

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Completed, Pending
from asgi_llm_guard.storage.entries import Bounds, check_space
from asgi_llm_guard.storage.export import Snapshot, parse_lines, write_lines
from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_copy import Copy
from asgi_llm_guard.storage.redis_entries import RedisEntries
from asgi_llm_guard.storage.redis_hello import Greeting
from asgi_llm_guard.storage.redis_holds import Holds
from asgi_llm_guard.storage.redis_link import Link
from asgi_llm_guard.storage.redis_loops import Lanes
from asgi_llm_guard.storage.redis_namespace import Namespace
from asgi_llm_guard.storage.redis_owners import Owners
from asgi_llm_guard.storage.redis_refusals import Refusals
from asgi_llm_guard.storage.redis_replies import record_of
from asgi_llm_guard.storage.redis_reserve import Reserving
from asgi_llm_guard.storage.redis_scripts import ALL, ENTRIES, METERS, SHARED, STREAM, script
from asgi_llm_guard.storage.redis_shared import RedisShared
from asgi_llm_guard.storage.redis_stream import RedisStream
from asgi_llm_guard.storage.shared import OpenCall
from asgi_llm_guard.usage import UsageRecord

__all__ = ["MAX_RECORDS", "OPTIONS", "RedisStorage"]

MAX_RECORDS: Final = 100_000
"""The ledger's stream keeps this many records, and drops the oldest beyond."""

OPTIONS: Final = ("max_records", "namespace", "shard_by", "shards", "timeout", "wait_replicas")
"""What the query of a URL may say besides how to connect."""

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_PAGE: Final = 1000
_CLOCKS_DIFFER_MS: Final = 600_000
"""The clocks of hosts and of the server are taken to differ by less."""


class RedisStorage:
    """A `Storage` in Redis (7.0 or newer) or Valkey (8 or newer): one server, Sentinel, or a cluster.

    Args:
        url: `redis://`, `rediss://` (TLS), `unix://`, `redis+sentinel://…/master`, `redis+cluster://`; see
            `docs/storage.md`. Its query may set the options below.
        namespace: those with the same one share their counters: letters, digits, `_`, `.` and `-`.
        clock: for tests; without it the server's clock decides.
        timeout_s: how long one call may take.
        max_records: how many usage records are kept until somebody takes them away.
        wait_replicas: how many replicas must have what policies with `durable="replica"` take.
        remember_refusals_ms: for so long the same plan is refused again without a call. `None`: 100,
            and with an injected clock not at all.
        make_link: gives the link of the running event loop, from the address and the timeout; for storages that share theirs.

    Raises:
        ConfigurationError: the URL or an option is wrong. No error shows the URL.
        NotInstalledError: `hiredis` is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        clock: Clock | None = None,
        lapse_ms: int = LAPSE_MS,
        tombstone_ms: int = TOMBSTONE_MS,
        timeout_s: float | None = None,
        max_records: int | None = None,
        wait_replicas: int | None = None,
        remember_refusals_ms: int | None = None,
        make_link: Callable[[Address, float], Link] | None = None,
    ) -> None:
        self._address, options = Address.parse(url, storage_options=OPTIONS)
        if "shard_by" in options or "shards" in options:
            raise ConfigurationError(
                "shard_by: several storages are made of such a URL; open it with open_storage(url)"
            )
        name = namespace or options.get("namespace", "llm-guard")
        if not _NAMESPACE.fullmatch(name):
            raise ConfigurationError(f"namespace: expected 1 to 64 letters, digits, _ . or -, got {name!r}")
        timeout_s = _seconds(timeout_s, options.get("timeout"))
        max_records = _whole("max_records", max_records, options.get("max_records"), MAX_RECORDS)
        wait_replicas = _whole("wait_replicas", wait_replicas, options.get("wait_replicas"), 1)
        if remember_refusals_ms is None:
            remember_refusals_ms = 0 if clock is not None else 100
        self._namespace = Namespace(
            name,
            clock=clock,
            lapse_ms=_whole("lapse_ms", lapse_ms, None, LAPSE_MS),
            tombstone_ms=_whole("tombstone_ms", tombstone_ms, None, TOMBSTONE_MS),
            max_records=max_records,
        )
        self._lanes = Lanes(
            self._namespace,
            self._address,
            timeout_s=timeout_s,
            wait_replicas=wait_replicas,
            make_link=make_link or _link,
        )
        self._greeting = Greeting(self._namespace, self._address)
        self._owners = Owners(self._namespace, self._lanes, self._greeting)
        self._holds = Holds(self._namespace, self._lanes)
        self._refusals = Refusals(remember_refusals_ms / 1000)
        self._reserving = Reserving(
            self._namespace, self._lanes, self._greeting, self._owners, self._holds, self._refusals
        )
        self._spaces: dict[str, RedisEntries] = {}

    def __repr__(self) -> str:
        return f"<RedisStorage {self._address} namespace={self._namespace.name!r}>"

    # ------------------------------------------------------------------------ what calls do

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        return await self._reserving.reserve(owner, plans)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        return await self._reserving.amend(owner, bundle)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        if self._lanes.closed:
            raise StorageError("redis: this storage was closed; make a new one")
        if not settlements:
            return Completed(())
        self._refusals.forget()
        group = self._namespace.group(settlements)
        self._lanes.settle(group)
        return group.handed

    # ------------------------------------------------------------------------------- owners

    async def heartbeat(self, owner: str) -> Heartbeat:
        return await self._owners.heartbeat(owner)

    async def retire(self, owner: str) -> None:
        await self._owners.retire(owner)

    # --------------------------------------------------------------------- outages and losses

    def available(self) -> bool:
        """Whether asking is worth while: `False` once the server has failed to answer several times in a row."""
        return self._lanes.link_up()

    @property
    def epoch(self) -> str:
        """Names the data that this storage goes by: another one after each accepted loss."""
        return self._namespace.epoch.decode().strip()

    async def accept_loss(self) -> None:
        """Go by the data that there is, and let all other processes do so; see `LossAware`."""
        if self._namespace.lost is not None:
            await self._greeting.accept(self._lanes.lane())

    # -------------------------------------------------------------------------- read, reset

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        if not meters:
            return ()
        lane = self._lanes.lane()
        await self._lanes.settled_elsewhere(lane)
        lane.lane.flush()
        reply = await self._lanes.twice(
            lane, METERS, [*self._namespace.head(), b"read", self._namespace.codec.meters(meters)]
        )
        return tuple(
            [
                Reading(used, held, None if resets < 0 else resets)
                for used, held, resets in zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
            ]
        )

    async def reset(self, meters: Sequence[Meter]) -> None:
        if meters:
            lane = self._lanes.lane()
            await self._lanes.settled_elsewhere(lane)
            lane.lane.flush()
            await self._lanes.twice(
                lane, METERS, [*self._namespace.head(), b"reset", self._namespace.codec.meters(meters)]
            )
            self._refusals.forget()

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        lane = self._lanes.lane()
        await self._lanes.all_settled()
        # By call id: one that is replaced while the pages are read (settled late) comes twice, and the last one counts.
        found: dict[str, UsageRecord] = {}
        # A record is written after its call was admitted; but that instant is told by another clock.
        start = str(max(0, since_ms - _CLOCKS_DIFFER_MS)) if self._namespace.clock is None else "-"
        while True:
            entries = await lane.link.command(
                "XRANGE", f"{self._namespace.prefix}l", start, "+", "COUNT", _PAGE, key=self._namespace.key
            )
            for _, fields in entries:
                record = record_of(fields)
                if record.at_ms >= since_ms:
                    found[record.call_id] = record
            if len(entries) < _PAGE:
                break
            start = "(" + entries[-1][0].decode()
        ordered = sorted(found.values(), key=lambda record: (record.at_ms, record.call_id))
        return ordered if limit is None else ordered[:limit]

    async def open_holds(self) -> int:
        return await self._holds.count()

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        return await self._holds.newest(limit)

    # ------------------------------------------------------------- what else a namespace keeps

    def entries(self, space: str, bounds: Bounds | None = None) -> RedisEntries:
        kept = self._spaces.get(check_space(space))
        if kept is None:
            kept = self._spaces[space] = RedisEntries(self._ask_entries, space, bounds or Bounds())
        elif bounds is not None:
            kept.bounds = bounds
        return kept

    async def _ask_entries(self, arguments: Sequence[bytes]) -> Any:
        return await self._lanes.twice(self._lanes.lane(), ENTRIES, [*self._namespace.head(), *arguments])

    def shared(self) -> RedisShared:
        return RedisShared(self._ask_shared)

    async def _ask_shared(self, arguments: Sequence[bytes]) -> Any:
        return await self._lanes.twice(self._lanes.lane(), SHARED, [*self._namespace.head(), *arguments])

    def streams(self) -> tuple[RedisStream]:
        return (RedisStream(self._ask_stream, f"redis:{self._namespace.name}"),)

    async def _ask_stream(self, arguments: Sequence[bytes]) -> Any:
        lane = self._lanes.lane()
        await self._lanes.settled_elsewhere(lane)
        lane.lane.flush()
        return await self._lanes.twice(lane, STREAM, [*self._namespace.head(), *arguments])

    # ----------------------------------------------------------------------- export, import

    async def export(self) -> AsyncIterator[bytes]:
        """As `Storage.export`; what is changed meanwhile may be in it or not, so stop the writers first."""
        snapshot, now_ms = await self._snapshot()
        for line in write_lines(snapshot, now_ms):
            yield line

    async def _snapshot(self) -> tuple[Snapshot, int]:
        lane = self._lanes.lane()
        await self._lanes.all_settled()
        copied = Copy(lane.link, self._namespace.key, self._namespace.prefix)
        now_ms, epoch = await self._greeting.epoch(lane)
        if not self._namespace.epoch:
            self._namespace.adopt(epoch)
        snapshot = Snapshot(
            cells=[cell async for cell in copied.cells(now_ms)],
            members=[member async for member in copied.members(now_ms)],
            owners=await copied.owners(),
            records=await self.records(),
        )
        snapshot.holds, snapshot.tombstones = await self._holds.copy(lane, copied.call_ids(), now_ms)
        return snapshot, now_ms

    async def load(self, lines: Iterable[bytes]) -> None:
        snapshot = parse_lines(lines)
        lane = self._lanes.lane()
        copied = Copy(lane.link, self._namespace.key, self._namespace.prefix)
        if not await copied.is_empty():
            raise StorageError(f"import: the namespace {self._namespace.name!r} is not empty; load into a new one")
        now_ms, epoch = await self._greeting.epoch(lane)
        self._namespace.heard(now_ms)
        if not self._namespace.epoch:
            self._namespace.adopt(epoch)
        try:
            await copied.write(snapshot, self._namespace.codec, now_ms)
        except BaseException:
            with contextlib.suppress(StorageError):
                await copied.clear()
            raise

    # ------------------------------------------------------------------------------ closing

    async def aclose(self) -> None:
        await self._lanes.aclose()


def _link(address: Address, timeout_s: float) -> Link:
    return Link(address, scripts=[script(parts) for parts in ALL], timeout_s=timeout_s)


def _whole(name: str, value: int | None, text: str | None, default: int) -> int:
    if value is None and text is not None:
        value = int(text) if text.isascii() and text.isdigit() else 0
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}: expected a whole number from 1, got {value!r}")
    return value


def _seconds(value: float | None, text: str | None) -> float:
    seen: object = value if value is not None else text
    if seen is None:
        return 0.25
    try:
        seconds = float(cast("Any", seen))
    except ValueError:
        seconds = 0.0
    if isinstance(seen, bool) or not 0.001 <= seconds <= 60:
        raise ConfigurationError(f"timeout: expected seconds from 0.001 to 60, got {seen!r}")
    return seconds
