"""Storage in Redis or Valkey: one truth for many workers on many hosts.

One script call admits a plan under all of its claims or under none; one settles and appends the usage
record. The scripts are in `lua/`; they keep the rules of `storage/base.py` as `storage/cells.py`
does, answer for answer. The server's clock decides.

All keys of a namespace have one hash tag, so that in a cluster each plan is one call to one node.

A call whose reply was lost is asked again under the same call id and finds what it has done. No
client library repeats a call by itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, cast

import msgspec

from asgi_llm_guard.claims import (
    Bundle,
    Claim,
    Durable,
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
)
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Completed, Pending
from asgi_llm_guard.storage.cells import Hold, Tombstone
from asgi_llm_guard.storage.entries import Bounds, check_space
from asgi_llm_guard.storage.export import Snapshot, parse_lines, write_lines
from asgi_llm_guard.storage.open_calls import newest, open_call
from asgi_llm_guard.storage.pending import tell
from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_codec import Codec, Shape, pack_text, read_record
from asgi_llm_guard.storage.redis_copy import Copy as _Copy
from asgi_llm_guard.storage.redis_entries import RedisEntries
from asgi_llm_guard.storage.redis_lane import Group
from asgi_llm_guard.storage.redis_link import Link, LinkError, ServerInfo
from asgi_llm_guard.storage.redis_loops import Connected, Home
from asgi_llm_guard.storage.redis_replies import amended, granted, record_of, refused, texts
from asgi_llm_guard.storage.redis_scripts import (
    ALL,
    AMEND,
    ENTRIES,
    EPOCH,
    HOLD,
    METERS,
    OWNERS,
    SHARED,
    STREAM,
    script,
)
from asgi_llm_guard.storage.redis_shared import RedisShared
from asgi_llm_guard.storage.redis_stream import RedisStream
from asgi_llm_guard.storage.shared import OpenCall
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import DISTINCT, SLOTS

__all__ = ["MAX_RECORDS", "OPTIONS", "RedisStorage"]

logger = logging.getLogger("asgi_llm_guard.storage")

SCHEMA: Final = 1
"""The version of the keys. Part of their prefix: another version does not see them."""

MAX_RECORDS: Final = 100_000
"""The ledger's stream keeps this many records, and drops the oldest beyond."""

OPTIONS: Final = ("max_records", "namespace", "shard_by", "shards", "timeout", "wait_replicas")
"""What the query of a URL may say besides how to connect."""

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_MOST_ASKED: Final = 5
_REMEMBERED: Final = 1024
_STILL_UNKNOWN: Final = (
    "redis: a second try does not fit, but what became of the first, whose connection broke, is unknown"
)
_PAGE: Final = 1000
_HOLDS: Final = 200  # read in one call, for all others wait meanwhile
_CLOCKS_DIFFER_MS: Final = 600_000
"""The clocks of hosts and of the server are taken to differ by less."""
_EXIT_S: Final = 1.0

_ENDED: Final = {b"settled": "settled", b"cancelled": "cancelled", b"expired": "expired", b"unknown": "unknown"}
_STATUS: Final = {1: "settled", 2: "late", 3: "lost", 4: "duplicate", 5: "cancelled"}
_STATE: Final = {b"S": "settled", b"C": "cancelled", b"E": "expired"}


_warned: set[tuple[str, str]] = set()  # each warning once per process and server


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
        self._make_link = make_link or _link
        self._namespace = namespace or options.get("namespace", "llm-guard")
        if not _NAMESPACE.fullmatch(self._namespace):
            raise ConfigurationError(f"namespace: expected 1 to 64 letters, digits, _ . or -, got {self._namespace!r}")
        self._timeout_s = _seconds(timeout_s, options.get("timeout"))
        self._max_records = _whole("max_records", max_records, options.get("max_records"), MAX_RECORDS)
        self.wait_replicas = _whole("wait_replicas", wait_replicas, options.get("wait_replicas"), 1)
        self._lapse_ms = _whole("lapse_ms", lapse_ms, None, LAPSE_MS)
        self._tombstone_ms = _whole("tombstone_ms", tombstone_ms, None, TOMBSTONE_MS)
        if remember_refusals_ms is None:
            remember_refusals_ms = 0 if clock is not None else 100
        self._remember_s = remember_refusals_ms / 1000
        self._clock = clock
        self._skew_ms = 0
        self._prefix = f"llmguard{SCHEMA}:{{{self._namespace}}}:"
        self._key = f"{self._prefix}e".encode()
        self._codec = Codec()
        self._sent_shapes: set[str] = set()
        self._unsent: dict[str, Shape] = {}
        self._epoch = b""
        self._seen_beat = 0
        self._beats: dict[str, int] = {}
        self._unsure: set[str] = set()
        self._checked = False
        self._lost: str | None = None
        self._closed = False
        self._forgotten = 0
        self._unknown: set[str] = set()
        self._refusals: dict[tuple[Claim, ...], tuple[float, Refused]] = {}
        self._lanes: dict[asyncio.AbstractEventLoop, Connected] = {}
        self._lanes_lock = threading.Lock()
        self._handing: dict[Group, asyncio.AbstractEventLoop] = {}
        self._home: Home | None = None
        self._spaces: dict[str, RedisEntries] = {}
        self._constant = (
            str(self._lapse_ms).encode(),
            str(self._tombstone_ms).encode(),
            str(self._max_records).encode(),
        )
        _storages.add(self)

    def __repr__(self) -> str:
        return f"<RedisStorage {self._address} namespace={self._namespace!r}>"

    def begin_anew(self) -> None:
        """In a forked child: the parent's sockets, loops and settlements are the parent's."""
        self._lanes = {}
        self._lanes_lock = threading.Lock()
        self._handing = {}
        self._home = None

    # ------------------------------------------------------------------------------ reserve

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        _check(plans)
        lane = self._lane()
        if self._lost is not None:
            raise DataLost(self._lost)
        if len(self._lanes) > 1 or self._handing:
            await self._settled_elsewhere(lane)
        claims: tuple[Claim, ...] = ()
        forgotten = 0
        if self._remember_s and len(plans) == 1:
            claims = plans[0][0].claims if len(plans[0]) == 1 else tuple([c for b in plans[0] for c in b.claims])
            remembered = self._refusals.get(claims) if self._refusals else None
            if remembered is not None and time.monotonic() < remembered[0] and plans[0][0].call_id not in self._unknown:
                return remembered[1]
            forgotten = self._forgotten
        if not self._epoch:
            await self._hello(lane)
        sent = False
        for asked in range(_MOST_ASKED):
            shapes: list[Shape] = []
            argument = self._codec.plans(owner, plans, self._now_ms(), shapes)
            self._will_send(shapes)
            try:
                before = tuple(lane.lane.unsettled)
                now_ms, epoch, reply = await lane.lane.reserve(argument, _durable(shapes))
            except LinkError as error:
                sent |= error.sent
                if asked or self._closed or not lane.link_up:
                    if sent:
                        self._is_unknown(plans[0])
                        if not error.sent:
                            raise _sent_before(error) from error
                    raise
                continue  # the connection broke: once more, under the same call ids
            self._heard(now_ms)
            if reply is None:
                self._data_lost(epoch)
                continue
            code = reply[0]
            if code == 1:
                return granted(plans[reply[1]], reply, now_ms)
            if code == 0:
                if before and asked < _MOST_ASKED - 1 and await self._overtook(lane, before):
                    continue
                if sent:
                    # The first try may arrive yet, and be granted: it has to be cancelled, and who is refused cancels nothing.
                    self._is_unknown(plans[0])
                    raise LinkError(_STILL_UNKNOWN, sent=True)
                answer = refused(plans, reply, now_ms)
                if claims and forgotten == self._forgotten:
                    self._remember(claims, answer)
                return answer
            if code == 2:
                return Ended(plans[0][reply[1] - 1].call_id, cast("Any", _ENDED[reply[2]]), now_ms)
            if code == 3:
                return await self._replayed(lane, reply, now_ms)
            if code == 7:
                raise ValueError(
                    "reserve: call ids are reserved together, but "
                    f"{plans[0][reply[1] - 1].call_id!r} is not open and others of its plan are"
                )
            await self._prepare(lane, code, owner)
        raise StorageError("redis: the store keeps asking for the reservation once more; nothing was taken")

    async def _prepare(self, lane: Connected, code: int, owner: str) -> None:
        """Do what has to be done before the same is asked again."""
        if code == 4:
            await self._owners(lane, b"sweep", owner)
        elif code == 6:  # else a calendar window was over: the answer's clock says which one is current
            self._will_send_all()

    async def _replayed(self, lane: Connected, reply: Any, now_ms: int) -> Granted:
        receipts: list[Receipt] = []
        for digest, _at, *rows in reply[3]:
            receipts += await self._receipts(lane, digest.decode(), rows)
        return Granted(tuple(receipts), now_ms, reply[1], True)

    async def _receipts(self, lane: Connected, digest: str, rows: Sequence[Any]) -> tuple[Receipt, ...]:
        if not self._codec.knows(digest):
            script, common = await lane.link.command("HMGET", f"{self._prefix}s", digest, f"m{digest}", key=self._key)
            if script is None or common is None:
                raise StorageError(
                    "redis: what a hold consists of is not known any more: the store was flushed meanwhile"
                )
            self._codec.learn(digest, script, common)
        return self._codec.receipts(digest, rows)

    def _remember(self, claims: tuple[Claim, ...], answer: Refused) -> None:
        """Keep a refusal that no settlement of others can lift for a moment, so that the store is not asked in a loop."""
        wait_ms = None
        for receipt in answer.states[0]:
            meter = receipt.claim.meter
            if receipt.fits or not meter.enforce or meter.limit is None:
                continue
            if receipt.used + receipt.claim.amount <= meter.limit:
                return  # a hold stands in the way
            left = self._remember_s * 1000 if receipt.resets_at_ms is None else receipt.resets_at_ms - answer.now_ms
            wait_ms = left if wait_ms is None else min(left, wait_ms)
        if wait_ms is not None and wait_ms > 0:
            if len(self._refusals) >= _REMEMBERED:
                self._refusals.clear()
            self._refusals[claims] = (time.monotonic() + min(wait_ms / 1000, self._remember_s), answer)

    def _forget_refusals(self) -> None:
        """Something was given back here: what is on its way is not remembered, either."""
        self._forgotten += 1
        if self._refusals:
            self._refusals.clear()

    def _is_unknown(self, plan: Plan) -> None:
        """The store may hold these call ids. Who asks for them again is to be told what became of them."""
        if len(self._unknown) >= _REMEMBERED:
            self._unknown.clear()
        self._unknown.update(bundle.call_id for bundle in plan)

    async def _settled_elsewhere(self, mine: Connected) -> None:
        """Wait for what other event loops and threads of this process have handed over: it is to be settled first."""
        self._adopt_abandoned(mine)
        groups = [
            group for lane in tuple(self._lanes.values()) if lane is not mine for group in tuple(lane.lane.unsettled)
        ]
        deadline_s = mine.lane.loop.time() + self._timeout_s
        for group in (*groups, *tuple(self._handing)):
            with contextlib.suppress(StorageError):
                try:
                    async with asyncio.timeout_at(deadline_s):
                        await group.handed
                except TimeoutError:  # that loop is busy with something else, and this one is not to wait for it
                    mine.lane.settle(group.twin())

    async def _overtook(self, lane: Connected, before: Sequence[Group]) -> bool:
        """Whether a refusal came before the answers to settlements handed over before what it refused; waits for them.

        So it does where they were sent once more, after a lost connection or because the server had lost their script.
        """
        late = [group for group in before if group in lane.lane.unsettled]
        for group in late:
            with contextlib.suppress(StorageError):
                await group.handed
        return bool(late)

    # -------------------------------------------------------------------------------- amend

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        _check(((bundle,),))
        lane = self._lane()
        if self._lost is not None:
            raise DataLost(self._lost)
        if len(self._lanes) > 1 or self._handing:
            await self._settled_elsewhere(lane)
        if not self._epoch:
            await self._hello(lane)
        sent = False
        for asked in range(_MOST_ASKED):
            shapes: list[Shape] = []
            argument = self._codec.bundle(bundle, self._now_ms(), shapes)
            self._will_send(shapes)
            arguments = [*self._head(), *self._epoch_arguments(), self._constant[0], self._new_shapes()]
            before = tuple(lane.lane.unsettled)
            lane.lane.flush()
            durable = _durable(shapes)
            try:
                changed = lane.submit(AMEND, [*arguments, owner.encode(), bundle.call_id.encode(), argument])
                confirmed = None if durable is None else lane.confirm(durable)
                reply = await changed
                if confirmed is not None:
                    await confirmed
            except LinkError as error:
                sent |= error.sent
                if asked or self._closed or not lane.link_up:
                    if sent and not error.sent:
                        raise _sent_before(error) from error
                    raise
                continue
            now_ms, epoch, answer = reply
            self._heard(now_ms)
            if answer == b"lost":
                self._data_lost(epoch)
                continue
            code = answer[0]
            if code == 0 and before and asked < _MOST_ASKED - 1 and await self._overtook(lane, before):
                continue
            if code == 0 and sent:
                raise LinkError(_STILL_UNKNOWN, sent=True)
            if code < 2:
                return amended(bundle, answer, now_ms)
            if code == 2:
                return Ended(bundle.call_id, cast("Any", _ENDED[answer[1]]), now_ms)
            await self._prepare(lane, code, owner)
        raise StorageError("redis: the store keeps asking for the change once more; nothing was changed")

    # ------------------------------------------------------------------------------- settle

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        if self._closed:
            raise StorageError("redis: this storage was closed; make a new one")
        if not settlements:
            return Completed(())
        self._forget_refusals()
        shapes: list[Shape] = []
        now_ms = self._now_ms()
        group = Group(settlements, [self._codec.settlement(one, now_ms, shapes) for one in settlements])
        self._will_send(shapes)
        try:
            lane = self._lane(asyncio.get_running_loop())
        except RuntimeError:
            self._hand_over(group)
            return group.handed
        if lane.ended:
            self._hand_over(group)
        else:
            lane.lane.settle(group)
        return group.handed

    def _hand_over(self, group: Group) -> None:
        """Have another thread's loop settle it, because there is none here, or one that is about to end."""
        while True:
            home = self._any_loop()
            self._handing[group] = home
            with contextlib.suppress(RuntimeError):  # that loop was closed meanwhile
                home.call_soon_threadsafe(self._settle_there, home, group)
                return

    def _any_loop(self) -> asyncio.AbstractEventLoop:
        """A loop to settle on for a thread without one: one that is in use, else one of our own."""
        for loop, lane in tuple(self._lanes.items()):
            if loop.is_running() and not lane.ended:
                return loop
        with self._lanes_lock:
            if self._home is None:
                self._home = Home()
            return self._home.loop

    def _settle_there(self, loop: asyncio.AbstractEventLoop, group: Group) -> None:
        if self._handing.get(group) is not loop:  # it was adopted meanwhile
            return
        try:
            lane = self._lane(loop)
        except StorageError as error:  # closed meanwhile
            del self._handing[group]
            group.handed.decide(None, error)
            tell([group.handed])
            return
        if lane.ended:
            self._hand_over(group)
        else:
            lane.lane.settle(group)
            del self._handing[group]

    def settled(self, group: Group, replies: Sequence[Any], now_ms: int) -> bool:
        """Take the answers to what is left of `group`; whether all is answered. Else its arguments are made anew."""
        self._heard(now_ms)
        left: list[tuple[int, bytes]] = []
        shapes: list[Shape] = []
        for (place, _), reply in zip(group.left, replies, strict=True):
            settlement = group.settlements[place]
            status = reply[0]
            if status <= 5:
                overages = tuple(reply[2:]) or (0,) * reply[1]
                if status == 4 and group.sent and settlement.record is not None:
                    # The try before this one was executed, and its answer lost: this is not somebody else's.
                    status, overages = 1, _overages(settlement)
                group.replies[place] = Settled(settlement.call_id, cast("Any", _STATUS[status]), overages)
                continue
            if status == 8:
                self._will_send_all()
            left.append((place, self._codec.settlement(settlement, self._now_ms(), shapes, with_receipts=True)))
        self._will_send(shapes)
        group.left = left
        return not left

    # ---------------------------------------------------------------------- lanes and sending

    def _lane(self, loop: asyncio.AbstractEventLoop | None = None) -> Connected:
        loop = loop or asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            lane = self._new_lane(loop)
        return lane

    def _new_lane(self, loop: asyncio.AbstractEventLoop) -> Connected:
        with self._lanes_lock:
            if self._closed:
                raise StorageError("redis: this storage was closed; make a new one")
            link = self._make_link(self._address, self._timeout_s)
            self._lanes[loop] = lane = Connected(self, loop, link, self._key)
        self._adopt_abandoned(lane)
        return lane

    def _adopt_abandoned(self, lane: Connected) -> None:
        """Settle here what was handed over to event loops that do not run any more, and may never do so again."""
        with self._lanes_lock:
            stopped = {
                loop: other for loop, other in self._lanes.items() if other is not lane and not loop.is_running()
            }
            for loop in stopped:
                if loop.is_closed():
                    del self._lanes[loop]
            waiting = [group for group, loop in tuple(self._handing.items()) if not loop.is_running()]
            for group in waiting:
                del self._handing[group]
            groups = [group for other in stopped.values() for group in other.lane.abandoned()]
        for group in (*groups, *waiting):
            lane.lane.settle(group)

    def _will_send(self, shapes: Iterable[Shape]) -> None:
        sent = self._sent_shapes
        for shape in shapes:
            if shape.digest not in sent:
                self._unsent[shape.digest] = shape

    def _will_send_all(self) -> None:
        """The store does not know a shape. It may be that of a hold, so those of this call would not be enough."""
        self._sent_shapes.clear()
        self._will_send(self._codec.all_shapes())

    def _new_shapes(self) -> bytes:
        if not self._unsent:
            return b""
        flat: list[Any] = []
        with contextlib.suppress(KeyError):  # another thread has taken the last one
            while self._unsent:
                digest, shape = self._unsent.popitem()
                flat += (digest, pack_text(shape.script), f"m{digest}", pack_text(shape.common))
                self._sent_shapes.add(digest)
        return msgspec.msgpack.encode(flat) if flat else b""

    def _head(self) -> tuple[bytes]:
        """The clock: the server's, or the injected one."""
        return (b"0" if self._clock is None else str(self._clock.now_ms()).encode(),)

    def _epoch_arguments(self) -> tuple[bytes, bytes]:
        # What a replica had not received yet when it took over is less than a lapse.
        return self._epoch, str(max(0, self._seen_beat - self._lapse_ms)).encode()

    def reserve_arguments(self, arguments: list[bytes]) -> list[bytes]:
        """All arguments of a call of the reserve script."""
        return [*self._head(), *self._epoch_arguments(), self._constant[0], self._new_shapes(), *arguments]

    def settle_arguments(self, arguments: list[bytes]) -> list[bytes]:
        """All arguments of a call of the settle script."""
        return [*self._head(), *self._constant[1:], self._new_shapes(), *arguments]

    def wait(self, link: Link, durable: Durable) -> asyncio.Future[Any]:
        """Ask how many replicas, or whose disk, have what was sent before."""
        patience_ms = max(1, int(self._timeout_s * 800))  # its answer has to come in time, too
        if durable == "disk":
            return link.submit_command("WAITAOF", 1, 0, patience_ms, key=self._key, trailing=True)
        return link.submit_command("WAIT", self.wait_replicas, patience_ms, key=self._key, trailing=True)

    def _now_ms(self) -> int:
        """The server's clock, as far as it is known: calendar windows are worked out here."""
        if self._clock is not None:
            return self._clock.now_ms()
        return time.time_ns() // 1_000_000 + self._skew_ms

    def _heard(self, now_ms: int) -> None:
        if self._clock is None:
            self._skew_ms = now_ms - time.time_ns() // 1_000_000

    # -------------------------------------------------------------------------------- epoch

    async def _hello(self, lane: Connected) -> None:
        """The first call: which epoch it is, what time, and whether the server can be relied on."""
        now_ms, epoch = await lane.submit(EPOCH, [*self._head(), b"hello", _new_epoch()])
        self._heard(now_ms)
        self._adopt(epoch)
        if not self._checked:
            self._checked = True
            for warning in _warnings(await lane.link.server_info(self._key)):
                if (str(self._address), warning) not in _warned:
                    _warned.add((str(self._address), warning))
                    logger.warning("%s: %s", self._address, warning)

    def _adopt(self, epoch: bytes) -> None:
        id_, beat, _before = epoch.split(b" ")
        self._epoch, self._seen_beat = id_ + b" ", int(beat)
        self._sent_shapes.clear()

    def _data_lost(self, epoch: bytes) -> None:
        """The store is in another epoch.

        Raises:
            DataLost: it is not one that another process has accepted.
        """
        if epoch:
            id_, beat, before = epoch.split(b" ")
            if before and before + b" " == self._epoch:
                self._adopt(epoch)
                return
            if id_ + b" " == self._epoch and int(beat) >= self._seen_beat - self._lapse_ms:
                return  # accepted meanwhile
        what = "was restored from an older copy" if epoch else "was flushed"
        self._lost = f"redis: the store {what}: what was used and held is not known any more"
        raise DataLost(self._lost)

    @property
    def epoch(self) -> str:
        """Names the data that this storage goes by: another one after each accepted loss."""
        return self._epoch.decode().strip()

    async def accept_loss(self) -> None:
        """Go by the data that there is, and let all other processes do so; see `LossAware`."""
        if self._lost is None:
            return
        lane = self._lane()
        now_ms, epoch = await lane.submit(EPOCH, [*self._head(), b"accept", _new_epoch(), self._epoch.strip()])
        self._heard(now_ms)
        self._adopt(epoch)
        self._lost = None

    def available(self) -> bool:
        """Whether asking is worth while: `False` once the server has failed to answer several times in a row."""
        try:
            lane = self._lanes.get(asyncio.get_running_loop())
        except RuntimeError:
            lane = None
        if lane is not None:
            return lane.link_up
        return all(other.link_up for other in tuple(self._lanes.values()))

    # ------------------------------------------------------------------------------- owners

    async def heartbeat(self, owner: str) -> Heartbeat:
        lane = self._lane()
        self._adopt_abandoned(lane)
        if not self._epoch:
            await self._hello(lane)
        # A beat whose answer was lost may have been the one that was told of a lapse.
        unsure = owner in self._unsure
        self._unsure.add(owner)
        reply = await self._owners(lane, b"beat", owner)
        self._unsure.discard(owner)
        missed = unsure and reply[0] - self._beats.get(owner, reply[0]) >= self._lapse_ms
        self._beats[owner] = reply[0]
        epoch = reply[1]
        if epoch.startswith(self._epoch):
            beat = int(epoch.split(b" ")[1])
            if beat < self._seen_beat - self._lapse_ms and self._lost is None:
                with contextlib.suppress(DataLost):
                    self._data_lost(epoch)
            self._seen_beat = max(self._seen_beat, beat)
        elif epoch and epoch.split(b" ")[2] + b" " == self._epoch:  # another process has accepted the loss
            self._adopt(epoch)
            self._lost = None
        return Heartbeat(reply[2] == 1 or missed, texts(reply[4:]), reply[0], reply[3])

    async def retire(self, owner: str) -> None:
        lane = self._lane()
        await self._all_settled()
        await self._owners(lane, b"retire", owner)
        self._beats.pop(owner, None)
        self._unsure.discard(owner)

    async def _owners(self, lane: Connected, action: bytes, owner: str) -> Any:
        lane.lane.flush()
        arguments = [action, owner.encode(), *self._constant, self._epoch.strip()]
        ask = lane.submit if action == b"beat" else partial(self._twice, lane)
        reply = await ask(OWNERS, [*self._head(), *arguments])
        if reply[2] == b"shapes":
            self._will_send_all()
            reply = await ask(OWNERS, [*self._head(), *arguments, self._new_shapes()])
        expired: list[bytes] = []
        while reply[2] == b"more":
            expired += reply[3:]
            reply = await ask(OWNERS, [*self._head(), *arguments])
        self._heard(reply[0])
        return [*reply, *expired] if expired else reply

    async def _twice(self, lane: Connected, parts: tuple[str, ...], arguments: Sequence[bytes]) -> Any:
        """Ask for what may be done twice: once more if the connection broke."""
        try:
            return await lane.submit(parts, arguments)
        except LinkError as error:
            if error.code or self._closed or not lane.link_up:
                raise
        return await lane.submit(parts, arguments)

    async def _all_settled(self) -> None:
        mine = self._lane()
        await self._settled_elsewhere(mine)
        for group in tuple(mine.lane.unsettled):
            with contextlib.suppress(StorageError):
                await group.handed

    # -------------------------------------------------------------------------- read, reset

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        if not meters:
            return ()
        lane = self._lane()
        await self._settled_elsewhere(lane)
        lane.lane.flush()
        reply = await self._twice(lane, METERS, [*self._head(), b"read", self._codec.meters(meters)])
        return tuple(
            [
                Reading(used, held, None if resets < 0 else resets)
                for used, held, resets in zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
            ]
        )

    async def reset(self, meters: Sequence[Meter]) -> None:
        if meters:
            lane = self._lane()
            await self._settled_elsewhere(lane)
            lane.lane.flush()
            await self._twice(lane, METERS, [*self._head(), b"reset", self._codec.meters(meters)])
            self._forget_refusals()

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        lane = self._lane()
        await self._all_settled()
        # By call id: one that is replaced while the pages are read (settled late) comes twice, and the last one counts.
        found: dict[str, UsageRecord] = {}
        # A record is written after its call was admitted; but that instant is told by another clock.
        start = str(max(0, since_ms - _CLOCKS_DIFFER_MS)) if self._clock is None else "-"
        while True:
            entries = await lane.link.command("XRANGE", f"{self._prefix}l", start, "+", "COUNT", _PAGE, key=self._key)
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
        lane = self._lane()
        await self._all_settled()
        owners = await lane.link.command("ZRANGE", f"{self._prefix}o", 0, -1, key=self._key)
        counts = [
            await lane.link.command("SCARD", f"{self._prefix}oh:".encode() + owner, key=self._key) for owner in owners
        ]
        return sum(counts)

    # ------------------------------------------------------------------------------ entries

    def entries(self, space: str, bounds: Bounds | None = None) -> RedisEntries:
        kept = self._spaces.get(check_space(space))
        if kept is None:
            kept = self._spaces[space] = RedisEntries(self._ask_entries, space, bounds or Bounds())
        elif bounds is not None:
            kept.bounds = bounds
        return kept

    async def _ask_entries(self, arguments: Sequence[bytes]) -> Any:
        return await self._twice(self._lane(), ENTRIES, [*self._head(), *arguments])

    # --------------------------------------------------------------------------- shared, open calls

    def shared(self) -> RedisShared:
        return RedisShared(self._ask_shared)

    async def _ask_shared(self, arguments: Sequence[bytes]) -> Any:
        return await self._twice(self._lane(), SHARED, [*self._head(), *arguments])

    async def open_calls(self, limit: int = 1_000) -> Sequence[OpenCall]:
        lane = self._lane()
        await self._all_settled()
        owners = await lane.link.command("ZRANGE", f"{self._prefix}o", 0, -1, key=self._key)
        found: list[OpenCall] = []
        for owner in owners:
            call_ids = await lane.link.command("SMEMBERS", f"{self._prefix}oh:".encode() + owner, key=self._key)
            for at in range(0, len(call_ids), _HOLDS):
                found += map(open_call, await self._open(lane, call_ids[at : at + _HOLDS]))
            found = newest(found, limit)
        return found

    async def _open(self, lane: Connected, call_ids: Sequence[bytes]) -> list[Hold]:
        """Those of the calls that are open."""
        arguments = [*self._head(), b"", *call_ids]
        replies = await self._twice(lane, HOLD, arguments)
        if replies == b"shape":
            self._will_send_all()
            replies = await self._twice(lane, HOLD, [*self._head(), self._new_shapes(), *call_ids])
        if replies == b"shape":
            raise StorageError(
                "redis: the store has lost what an open hold claims; it is known again once it is settled"
            )
        return [
            await self._hold(lane, call_id.decode(), reply[2])
            for call_id, reply in zip(call_ids, replies, strict=True)
            if reply is not None and reply[0] == b"O"
        ]

    # ------------------------------------------------------------------------------ streams

    def streams(self) -> tuple[RedisStream]:
        return (RedisStream(self._ask_stream, f"redis:{self._namespace}"),)

    async def _ask_stream(self, arguments: Sequence[bytes]) -> Any:
        lane = self._lane()
        await self._settled_elsewhere(lane)
        lane.lane.flush()
        return await self._twice(lane, STREAM, [*self._head(), *arguments])

    # ----------------------------------------------------------------------- export, import

    async def export(self) -> AsyncIterator[bytes]:
        """As `Storage.export`; what is changed meanwhile may be in it or not, so stop the writers first."""
        snapshot, now_ms = await self._snapshot()
        for line in write_lines(snapshot, now_ms):
            yield line

    async def _snapshot(self) -> tuple[Snapshot, int]:
        lane = self._lane()
        await self._all_settled()
        copied = _Copy(lane.link, self._key, self._prefix)
        now_ms, epoch = await lane.submit(EPOCH, [*self._head(), b"hello", _new_epoch()])
        if not self._epoch:
            self._adopt(epoch)
        snapshot = Snapshot(
            cells=[cell async for cell in copied.cells(now_ms)],
            members=[member async for member in copied.members(now_ms)],
            owners=await copied.owners(),
            records=await self.records(),
        )
        holds: list[Hold] = []
        tombstones: list[tuple[str, Tombstone]] = []
        async for call_ids in copied.call_ids():
            self._will_send_all()
            replies = await lane.submit(HOLD, [*self._head(), self._new_shapes(), *call_ids])
            if replies == b"shape":
                raise StorageError("redis: the store has lost what an open hold claims; settle it, then export again")
            for call_id, reply in zip(map(bytes.decode, call_ids), replies, strict=True):
                if reply is not None:
                    state, until_ms, *hold = reply
                    opened = await self._hold(lane, call_id, hold[0]) if hold else None
                    if state == b"O":
                        holds.append(cast("Hold", opened))
                    elif now_ms < until_ms:
                        tombstones.append((call_id, Tombstone(cast("Any", _STATE[state]), until_ms, opened)))
        snapshot.holds = sorted(holds, key=lambda hold: (hold.at_ms, hold.call_id))
        snapshot.tombstones = sorted(tombstones, key=lambda entry: (entry[1].until_ms, entry[0]))
        return snapshot, now_ms

    async def _hold(self, lane: Connected, call_id: str, fields: Any) -> Hold:
        digest, at_ms, owner, plan, draft, *rows = fields
        receipts = await self._receipts(lane, digest.decode(), rows)
        return Hold(call_id, owner.decode(), receipts, read_record(call_id, draft) if draft else None, at_ms, plan)

    async def load(self, lines: Iterable[bytes]) -> None:
        snapshot = parse_lines(lines)
        lane = self._lane()
        copied = _Copy(lane.link, self._key, self._prefix)
        if not await copied.is_empty():
            raise StorageError(f"import: the namespace {self._namespace!r} is not empty; load into a new one")
        now_ms, epoch = await lane.submit(EPOCH, [*self._head(), b"hello", _new_epoch()])
        self._heard(now_ms)
        if not self._epoch:
            self._adopt(epoch)
        try:
            await copied.write(snapshot, self._codec, now_ms)
        except BaseException:
            with contextlib.suppress(StorageError):
                await copied.clear()
            raise

    # ------------------------------------------------------------------------------ closing

    async def aclose(self) -> None:
        if self._closed:
            return
        await self._all_settled()
        self._closed = True
        with self._lanes_lock:
            lanes, self._lanes = self._lanes, {}
        here = asyncio.get_running_loop()
        for loop, lane in lanes.items():
            if loop is here:
                await lane.aclose()
            elif loop.is_running():
                with contextlib.suppress(RuntimeError, TimeoutError):  # it stopped meanwhile, or is busy
                    closed = asyncio.run_coroutine_threadsafe(lane.aclose(), loop)
                    await asyncio.wait_for(asyncio.wrap_future(closed), 4 * self._timeout_s)
        if self._home is not None:
            self._home.stop()

    def finish(self, timeout_s: float) -> None:
        """At the end of the process: send what event loops that have stopped still have, and wait a moment for all of it."""
        deadline_s = time.monotonic() + timeout_s
        groups = [*self._handing]
        for loop, lane in tuple(self._lanes.items()):
            groups += lane.lane.unsettled
            if not loop.is_running():
                for group in lane.lane.abandoned():
                    self._hand_over(group)
        for group in groups:
            with contextlib.suppress(StorageError):
                group.handed.result(max(0.0, deadline_s - time.monotonic()))


_storages: weakref.WeakSet[RedisStorage] = weakref.WeakSet()


def _after_fork() -> None:
    for storage in list(_storages):
        storage.begin_anew()


def _at_exit() -> None:
    deadline_s = time.monotonic() + _EXIT_S
    for storage in list(_storages):
        with contextlib.suppress(RuntimeError):  # it is too late for new threads
            storage.finish(max(0.0, deadline_s - time.monotonic()))


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def _sent_before(error: LinkError) -> LinkError:
    """What the last try failed with, where an earlier one may have been executed."""
    return LinkError(f"{error}; an earlier try may have been executed", sent=True, code=error.code)


def _overages(settlement: Settlement) -> tuple[int, ...]:
    """As the store would say them of a settlement whose receipts are to hand."""
    if not settlement.actuals:
        return (0,) * len(settlement.receipts)
    actuals = (*settlement.actuals, *(None,) * len(settlement.receipts))
    return tuple(
        max(0, actual - receipt.claim.amount)
        if actual is not None and receipt.taken and receipt.claim.meter.kind not in (SLOTS, DISTINCT)
        else 0
        for receipt, actual in zip(settlement.receipts, actuals, strict=False)
    )


def _warnings(server: ServerInfo) -> Iterator[str]:
    if server.maxmemory_policy not in (None, "noeviction") and server.maxmemory:
        yield (
            f"maxmemory-policy is {server.maxmemory_policy}: when memory is full the server forgets what was used, "
            "and budgets start anew without anybody noticing; set it to noeviction"
        )
    if server.aof is False and server.rdb is False:
        yield "neither AOF nor snapshots are on: a restart forgets all counters; set appendonly yes"
    elif server.aof is False:
        yield "AOF is off: a crash forgets what was counted since the last snapshot; set appendonly yes"


def _durable(shapes: Sequence[Shape]) -> Durable | None:
    """The most that any of them asks for."""
    found: Durable | None = None
    for shape in shapes:
        if shape.durable is not None:
            found = "disk" if "disk" in (shape.durable, found) else shape.durable
    return found


def _link(address: Address, timeout_s: float) -> Link:
    return Link(address, scripts=[script(parts) for parts in ALL], timeout_s=timeout_s)


def _new_epoch() -> bytes:
    return os.urandom(9).hex().encode()


# ------------------------------------------------------------------------------------- checks


def _check(plans: Sequence[Plan]) -> None:
    """Refuse what no storage takes, before anything is sent.

    Raises:
        ValueError: no plan, two claims on one meter or two bundles under one call id, or a `Distinct`
            claim without a member.
    """
    if not plans:
        raise ValueError("reserve: expected at least one plan, got none")
    if len(plans[0]) > 1 and len({bundle.call_id for bundle in plans[0]}) < len(plans[0]):
        raise ValueError("reserve: two bundles of one plan have the same call id")
    for plan in plans:
        keys = [claim.meter.key for bundle in plan for claim in bundle.claims]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"two claims of one plan are on the meter {twice!r}; merge them into one")
        for bundle in plan:
            for claim in bundle.claims:
                if claim.meter.kind == DISTINCT and claim.member is None:
                    raise ValueError(
                        f"{claim.meter.policy}: a claim on distinct ids names its id, got None (meter {claim.meter.key!r})"
                    )


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
