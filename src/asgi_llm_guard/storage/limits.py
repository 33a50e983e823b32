"""Storage in whatever the `limits` package speaks: memcached, MongoDB, Redis, Valkey, memory. For request rates only.

For teams that already run such a store. The rates of a guard are counted there, by the package's own
asynchronous storages; all the rest that a storage keeps (open calls, their owner, the latest usage
records) is kept in this process, by a `MemoryStorage`, because the package has no place for it. What
follows from that:

Rule 1: only rates of requests and calls in whole seconds, by any scope but the session. Every other
policy is a `ConfigurationError` as soon as it is bound to a guard.

Rule 2: a limit is never exceeded, but several limits are not taken in one step. All are looked at first,
in one trip side by side, and nothing is taken unless all fit. Then they are taken one by one, the scarcest
first. One that another process has used up in between refuses the call, and what was taken before it
stays taken: neither of the package's windows can give back soundly (`fixed`: the next window may have
begun, and would start below zero).

Rule 3: what is taken stays taken, and what was not taken is not taken later. There are no holds: a settlement
changes no counter, and neither does the death of a process. What a guard lets through while the store is
away (`on_outage`) is not counted afterwards.

| strategy | window | stores |
|---|---|---|
| `moving` | the last period, to the request; one entry in the store for each request in it | not memcached |
| `fixed` | begins with the first request, lasts one period: up to twice the limit where two meet | all |

The clock is the host's: the package reads it itself, so an injected one is not used.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast, get_args
from urllib.parse import parse_qsl, urlencode

import msgspec
from limits.aio.storage import (
    MemcachedStorage,
    MongoDBStorage,
    MovingWindowSupport,
    RedisClusterStorage,
    RedisSentinelStorage,
    RedisStorage,
)
from limits.aio.storage import Storage as Store
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.storage import storage_from_string

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
    Rule,
    Settled,
    Settlement,
    Unit,
)
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.policies.base import Policy, Sampled
from asgi_llm_guard.storage.base import LAPSE_MS, Completed, Pending
from asgi_llm_guard.storage.memory import MAX_RECORDS, MemoryStorage
from asgi_llm_guard.storage.memory_stream import MemoryStream
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Sliding

__all__ = ["LimitsStorage", "Strategy"]

Strategy = Literal["moving", "fixed"]

T = TypeVar("T")

_SECOND_MS: Final = 1_000
_MOST_CONNECTIONS: Final = 32
_LONGEST_KEY: Final = 200  # memcached takes 250 bytes, and the package appends to them
_PLAIN: Final = re.compile(r"[!-~]+", re.ASCII)
_OURS: Final = ("strategy", "timeout_s", "prefix")
_CLIENTS: Final = {
    "memcached": ("memcachio", "limits[async-memcached]"),
    "mongodb": ("motor", "limits[async-mongodb]"),
    "valkey": ("valkey", "limits[async-valkey]"),
    "valkeys": ("valkey", "limits[async-valkey]"),
}
"""By the first part of a scheme: the client library that the package needs for it, and what brings it."""


class _Count(NamedTuple):
    """One counter as the store tells it."""

    used: int
    resets_at_ms: int | None
    """`moving`: when the oldest request leaves the window; `fixed`: when the window ends. `None`: not known, or
    nothing is counted."""


class _Asked(NamedTuple):
    """One claim, and how it stands."""

    claim: Claim
    used: int
    """Without this claim."""
    more: int
    """What the call has not taken of it yet."""
    resets_at_ms: int | None

    @property
    def room(self) -> int:
        """What would be left; below 0 it does not fit."""
        return cast("int", self.claim.meter.limit) - self.used - self.claim.amount


class _Open(NamedTuple):
    """What a call has taken."""

    owner: str
    plan: int
    receipts: tuple[Receipt, ...]


class LimitsStorage:
    """A `Storage` for guards of which all policies are rates of requests, in a store of the `limits` package.

    `store` is a URI of that package (`memcached://localhost:11211`, `mongodb://…`, `redis://…`), or one of its
    asynchronous storages. From a URI each event loop gets connections of its own; an object, and
    `memory://`, belong to the first loop that uses them.

    Args:
        strategy: see the table at the top of this file.
        timeout_s: how long one trip to the store may take, in seconds.
        prefix: what keys in the store begin with; guards that share it share their counters.
        lapse_ms: when an owner counts as dead that sends no heartbeat, as everywhere.
        max_records: how many usage records are kept, in this process.

    Raises:
        ConfigurationError: the URI or an argument is wrong, the store cannot do the strategy, or its
            client library is not installed.
    """

    def __init__(
        self,
        store: str | Store,
        *,
        strategy: Strategy = "moving",
        timeout_s: float = 0.25,
        prefix: str = "llm-guard",
        lapse_ms: int = LAPSE_MS,
        max_records: int = MAX_RECORDS,
    ) -> None:
        if strategy not in get_args(Strategy):
            raise ConfigurationError(f"strategy: expected 'moving' or 'fixed', got {strategy!r}")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= 60:
            raise ConfigurationError(f"timeout_s: expected seconds above 0 and up to 60, got {timeout_s!r}")
        if not isinstance(prefix, str) or not _PLAIN.fullmatch(prefix) or len(prefix) > 50:
            raise ConfigurationError(
                f"prefix: expected up to 50 printable ASCII characters without spaces, got {prefix!r}"
            )
        self.strategy: Strategy = strategy
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._uri = store if isinstance(store, str) else None
        self._lapse_ms, self._max_records = lapse_ms, max_records
        self._lock = threading.Lock()
        self._stores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Store] = weakref.WeakKeyDictionary()
        first = _opened(store, timeout_s) if isinstance(store, str) else store
        if not isinstance(first, Store):
            raise ConfigurationError(
                f"store: expected a URI, or a storage of limits.aio.storage, got {type(store).__name__}; "
                "the synchronous ones of limits.storage would block the event loop"
            )
        if strategy == "moving" and not isinstance(first, MovingWindowSupport):
            raise ConfigurationError(
                f"strategy: {type(first).__name__} of the limits package has no moving window; use strategy='fixed'"
            )
        self._first: Store | None = first
        self._single = self._uri is None or self._uri.startswith("memory:")
        self._closed = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._calls = MemoryStorage(lapse_ms=self._lapse_ms, max_records=self._max_records)
        self._taken: dict[str, _Open] = {}

    @classmethod
    def from_url(cls, url: str) -> LimitsStorage:
        """As `limits+…` URLs of a guard name it: the URI, and our options (`?strategy=fixed&timeout_s=1`) in its query."""
        uri, _, query = url.partition("?")
        pairs = parse_qsl(query, keep_blank_values=True)
        options = {name: value for name, value in pairs if name in _OURS}
        rest = urlencode([(name, value) for name, value in pairs if name not in _OURS])
        arguments: dict[str, Any] = dict(options)
        if "timeout_s" in options:
            try:
                arguments["timeout_s"] = float(options["timeout_s"])
            except ValueError:
                raise ConfigurationError(
                    f"storage: timeout_s: expected seconds, got {options['timeout_s']!r}"
                ) from None
        return cls(f"{uri}?{rest}" if rest else uri, **arguments)

    # --------------------------------------------------------------------------------- policies

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse policies that claim anything but rates of requests.

        Raises:
            ConfigurationError: names the policy, and what the storage cannot keep of it.
        """
        for policy in policies:
            if not isinstance(policy, Sampled):
                raise ConfigurationError(
                    f"{policy.name}: a limits storage keeps rates of requests only, and {type(policy).__name__} is none; "
                    "use memory://, sqlite:// or redis:// for it"
                )
            for meter in policy.samples():
                if (problem := _unfit(meter)) is not None:
                    raise ConfigurationError(
                        f"{policy.name}: {problem}, which a limits storage cannot keep; "
                        "use memory://, sqlite:// or redis:// for it"
                    )

    # ------------------------------------------------------------------------------------ verbs

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        """As every storage, but for rule 2 at the top of this file."""
        store = self._store()
        known = [self._taken[bundle.call_id] for bundle in plans[0] if bundle.call_id in self._taken]
        if known:
            answer = await self._calls.reserve(owner, (_without_claims(plans[0]),))
            if isinstance(answer, Granted):
                receipts = tuple(receipt for each in known for receipt in each.receipts)
                return Granted(receipts, _now_ms(), known[0].plan, replayed=True)
            return answer
        states: list[tuple[Receipt, ...]] = []
        for number, plan in enumerate(plans):
            fits, receipts = await self._take(store, [claim for bundle in plan for claim in bundle.claims])
            if fits:
                return await self._hold(owner, plan, number, receipts)
            states.append(receipts)
        return Refused(tuple(states), _now_ms())

    async def _hold(self, owner: str, plan: Plan, number: int, receipts: tuple[Receipt, ...]) -> Granted | Ended:
        answer = await self._calls.reserve(owner, (_without_claims(plan),))
        if isinstance(answer, Ended):  # cancelled before it arrived; what it took stays taken
            return answer
        first = 0
        for bundle in plan:
            last = first + len(bundle.claims)
            self._taken[bundle.call_id] = _Open(owner, number, receipts[first:last])
            first = last
        return Granted(receipts, _now_ms(), number)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        """As every storage, but that what is no longer claimed stays taken."""
        store = self._store()
        known = self._taken.get(bundle.call_id)
        if known is not None:
            before = {receipt.claim.meter.key: receipt for receipt in known.receipts if receipt.taken}
            fits, receipts = await self._take(store, bundle.claims, before)
            if not fits:
                return Refused((receipts,), _now_ms())
        else:
            receipts = ()
        answer = await self._calls.amend(owner, Bundle(bundle.call_id, (), bundle.draft))
        if known is None or not isinstance(answer, Granted):
            return answer
        self._taken[bundle.call_id] = _Open(owner, known.plan, receipts)
        return Granted(receipts, _now_ms())

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Close the calls and append their records. No counter changes: a rate stays as it was taken."""
        calls = self._here()
        own = [Settlement(each.call_id, (), each.record) for each in settlements]
        settled = calls.settle(own).result()
        answers = []
        for answer in settled:
            call = self._taken.pop(answer.call_id, None)
            overages = () if call is None else (0,) * len(call.receipts)
            answers.append(msgspec.structs.replace(answer, overages=overages))
        return Completed(tuple(answers))

    async def heartbeat(self, owner: str) -> Heartbeat:
        """Calls are this process's own, so its heartbeats need no trip."""
        beat = await self._here().heartbeat(owner)
        for call_id in beat.expired:
            self._taken.pop(call_id, None)
        return beat

    async def retire(self, owner: str) -> None:
        await self._here().retire(owner)
        for call_id in [call_id for call_id, call in self._taken.items() if call.owner == owner]:
            del self._taken[call_id]

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        store = self._store()
        counts = await self._counts(store, [(_fit(meter), cast("int", meter.limit)) for meter in meters])
        return tuple(Reading(count.used, 0, count.resets_at_ms) for count in counts)

    async def reset(self, meters: Sequence[Meter]) -> None:
        store = self._store()
        for meter in meters:
            await self._trip(store.clear(self._key(_fit(meter))))

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        """The latest records of this process; those of others, and of before it started, are not known."""
        return await self._here().records(since_ms=since_ms, limit=limit)

    def streams(self) -> tuple[MemoryStream]:
        """As `records`: those of this process."""
        return self._here().streams()

    async def export(self) -> AsyncIterator[bytes]:
        """Not possible.

        Raises:
            StorageError: always; the store cannot list its counters.
        """
        raise StorageError(
            "export: a limits storage cannot list its counters; rates fill up again within their period, "
            "so start the new storage empty"
        )
        yield b""  # pragma: no cover - makes this an asynchronous generator; never reached

    async def load(self, lines: Iterable[bytes]) -> None:  # noqa: ARG002 - see Storage.load
        """Not possible.

        Raises:
            StorageError: always; the store has no place for holds, ids and records.
        """
        raise StorageError(
            "import: a limits storage keeps rates of requests only; load into memory://, sqlite:// or redis://"
        )

    async def open_holds(self) -> int:
        """How many calls of this process are open."""
        return await self._here().open_holds()

    async def aclose(self) -> None:
        """Close the connections that were made from a URI; an object that was passed is its owner's to close."""
        await self._calls.aclose()
        with self._lock:
            self._closed = True
            stores = dict(self._stores)
            self._stores.clear()
        if self._single:
            return
        for loop, store in stores.items():
            if loop is asyncio.get_running_loop():
                await _close(store)
            elif not loop.is_closed():
                # A loop that stops meanwhile has nobody left who could close it.
                with suppress(RuntimeError, TimeoutError):
                    async with asyncio.timeout(self._timeout_s):
                        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_close(store), loop))

    # ------------------------------------------------------------------------------------ taking

    async def _take(
        self, store: Store, claims: Sequence[Claim], before: Mapping[str, Receipt] | None = None
    ) -> tuple[bool, tuple[Receipt, ...]]:
        """Whether all enforced claims were taken, and their receipts. `before`: what the call has taken already."""
        before = before or {}
        for claim in claims:
            _fit(claim.meter)
            if claim.amount < 0:  # the package would take it for a refund without a bound
                raise StorageError(f"{claim.meter.policy}: an amount of {claim.amount} cannot be claimed")
        asked = await self._look(store, [claim for claim in claims if not _keeps(claim, before)], before)
        taken: set[str] = set()
        lost: str | None = None
        # The scarcest first, so that nothing is taken unless all fit; last what only watches, which then counts
        # only what was granted.
        for each in sorted(asked, key=lambda each: (not each.claim.meter.enforce, each.room)):
            meter = each.claim.meter
            if each.room >= 0 and (each.more <= 0 or await self._hit(store, meter, each.more)):
                taken.add(meter.key)
            elif meter.enforce:
                lost = meter.key
                break
        granted = all(each.claim.meter.key in taken for each in asked if each.claim.meter.enforce)
        states = {
            each.claim.meter.key: self._receipt(
                each, fits=each.room >= 0 and each.claim.meter.key != lost, taken=each.claim.meter.key in taken
            )
            for each in asked
        }
        receipts = [states.get(claim.meter.key) or before[claim.meter.key] for claim in claims]
        if not granted:
            receipts = [msgspec.structs.replace(receipt, taken=False) for receipt in receipts]
        return granted, tuple(receipts)

    async def _look(self, store: Store, claims: Sequence[Claim], before: Mapping[str, Receipt]) -> list[_Asked]:
        counts = await self._counts(store, [(claim.meter, claim.amount) for claim in claims])
        asked = []
        for claim, count in zip(claims, counts, strict=True):
            earlier = before.get(claim.meter.key)
            had = 0 if earlier is None else earlier.claim.amount
            asked.append(_Asked(claim, max(0, count.used - had), claim.amount - had, count.resets_at_ms))
        return asked

    def _receipt(self, asked: _Asked, *, fits: bool, taken: bool) -> Receipt:
        claim, used, resets_at_ms = asked.claim, asked.used, asked.resets_at_ms
        limit, window = cast("int", claim.meter.limit), cast("Sliding", claim.meter.window)
        if fits:
            resets_at_ms = _now_ms()
        elif claim.amount > limit:
            resets_at_ms = None
        elif resets_at_ms is None:
            resets_at_ms = _now_ms() + window.period_ms
        if not fits and asked.room >= 0:
            used = limit  # somebody else was faster
        return Receipt(claim, taken, fits, used, 0, _now_ms() // window.bucket_ms, resets_at_ms)

    async def _counts(self, store: Store, asked: Sequence[tuple[Meter, int]]) -> list[_Count]:
        """What is counted, side by side; with its end where the amount beside the meter does not fit."""
        if not asked:
            return []
        read = self._read_moving if self.strategy == "moving" else self._read_fixed
        return await self._trip(_together([read(store, meter, amount) for meter, amount in asked]))

    async def _read_moving(self, store: Store, meter: Meter, amount: int) -> _Count:  # noqa: ARG002 - as `_read_fixed`
        limit, period_s = _limit(meter)
        if not limit:
            return _Count(0, None)
        start, used = await cast("Any", store).get_moving_window(self._key(meter), limit, period_s)
        # MongoDB gives no start where all entries have left the window.
        return _Count(used, int((start + period_s) * _SECOND_MS) + 1) if used else _Count(0, None)

    async def _read_fixed(self, store: Store, meter: Meter, amount: int) -> _Count:
        key, limit = self._key(meter), cast("int", meter.limit)
        used = min(await store.get(key), limit)  # calls that lost a race were counted beyond it
        if not used or used + amount <= limit:
            return _Count(used, None)  # nobody waits for its end, which takes one more trip
        return _Count(used, int(await store.get_expiry(key) * _SECOND_MS) + 1)

    async def _hit(self, store: Store, meter: Meter, amount: int) -> bool:
        limit, period_s = _limit(meter)
        key = self._key(meter)
        if self.strategy == "moving":
            return await self._trip(
                cast("MovingWindowSupport", store).acquire_entry(key, limit, period_s, amount=amount)
            )
        return await self._trip(store.incr(key, period_s, amount=amount)) <= limit

    def _key(self, meter: Meter) -> str:
        """The key in the store: with the strategy, whose values are of different types."""
        key = meter.key
        if len(key) > _LONGEST_KEY - len(self._prefix) or not _PLAIN.fullmatch(key):
            key = f"sha256~{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
        return f"{self._prefix}:{self.strategy}:{key}"

    # ------------------------------------------------------------------------------------- trips

    async def _trip(self, trip: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await trip
        except TimeoutError as error:
            raise StorageError(
                f"limits storage: no answer within {self._timeout_s:g} s; what was asked may have been counted"
            ) from error
        except Exception as error:  # whichever client library it is: its errors are outcomes that are not known
            raise StorageError(f"limits storage: {type(error).__name__}: {error}") from error

    def _here(self) -> MemoryStorage:
        """The calls of this process; a forked child begins with none."""
        if self._pid != os.getpid():
            self._begin_anew()
        return self._calls

    def _store(self) -> Store:
        """The store of the running event loop, whose connections belong to it."""
        self._here()
        loop = asyncio.get_running_loop()
        store = self._stores.get(loop)
        return store if store is not None else self._store_for(loop)

    def _store_for(self, loop: asyncio.AbstractEventLoop) -> Store:
        with self._lock:
            if self._closed:
                raise StorageError("limits storage: this storage is closed; make a new one")
            if self._single:
                others = [other for other in self._stores if not other.is_closed()]
                if others:
                    raise StorageError(
                        "limits storage: this one belongs to another event loop; give a URI instead of an object, "
                        "so that each loop gets connections of its own"
                    )
                store = cast("Store", self._first)
            elif self._first is not None:
                store, self._first = self._first, None
            else:
                store = _opened(cast("str", self._uri), self._timeout_s)
            self._stores[loop] = store
            return store


# ------------------------------------------------------------------------------------- meters


def _unfit(meter: Meter) -> str | None:
    """What of a meter the package's windows cannot keep."""
    if meter.rule is not Rule.RATE or meter.unit is not Unit.CALLS:
        return f"it counts {meter.unit.value} under a limit of sort {meter.rule.value!r}"
    if not isinstance(meter.window, Sliding):
        return "its algorithm is a bucket"
    if meter.window.period_ms % _SECOND_MS:
        return f"its period of {meter.window.period_ms} ms is not in whole seconds"
    if meter.limit is None:
        return "it has no limit"
    if meter.scope == "session":
        return "it counts by session, and with it the live session ids of each caller"
    if meter.expiry_charge != "hold":
        return f"expiry_charge={meter.expiry_charge!r} gives back what a dead process took"
    if meter.lease:
        return "its lease is a chunk that is held"
    if meter.durable is not None:
        return f"durable={meter.durable!r} waits for what only a Redis storage can tell"
    return None


def _fit(meter: Meter) -> Meter:
    if (problem := _unfit(meter)) is not None:
        raise StorageError(f"{meter.policy}: {problem}, which a limits storage cannot keep; use another storage for it")
    return meter


def _limit(meter: Meter) -> tuple[int, int]:
    """The limit, and the period in seconds."""
    return cast("int", meter.limit), cast("Sliding", meter.window).period_ms // _SECOND_MS


def _keeps(claim: Claim, before: Mapping[str, Receipt]) -> bool:
    """Whether a call has taken this claim already, under no lower limit."""
    earlier = before.get(claim.meter.key)
    return (
        earlier is not None
        and earlier.claim.amount == claim.amount
        and cast("int", earlier.claim.meter.limit) <= cast("int", claim.meter.limit)
    )


def _without_claims(plan: Plan) -> tuple[Bundle, ...]:
    return tuple(Bundle(bundle.call_id, (), bundle.draft) for bundle in plan)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000  # what the package's windows are measured by


# -------------------------------------------------------------------------------------- stores


async def _together(reads: Sequence[Coroutine[Any, Any, _Count]]) -> list[_Count]:
    return await asyncio.gather(*reads) if len(reads) > 1 else [await reads[0]]


def _opened(uri: str, timeout_s: float) -> Store:
    """The package's storage for a URI. Connects when it is first used.

    Raises:
        ConfigurationError: never shows the URI, which may carry a password.
    """
    scheme = uri.partition("://")[0]
    library, install = _CLIENTS.get(scheme.partition("+")[0], ("limits", ""))
    if find_spec(library) is None:
        raise ConfigurationError(f"storage: limits+{scheme}:// needs a client library: pip install '{install}'")
    try:
        store = storage_from_string(f"async+{uri}", **_options(uri, scheme, timeout_s))
    except (LimitsConfigurationError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"storage: limits+{scheme}:// cannot be opened ({type(error).__name__}): expected limits+ and an address of "
            "the limits package, such as limits+memcached://localhost:11211 or limits+mongodb://localhost:27017"
        ) from None
    return cast("Store", store)


def _options(uri: str, scheme: str, timeout_s: float) -> dict[str, Any]:
    if not scheme.startswith("redis"):
        return {}
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    # A command of which the answer is missing may have been executed: tried again, it counts twice.
    options: dict[str, Any] = {"implementation": "redispy", "retry": Retry(NoBackoff(), 0)}
    if scheme == "redis+sentinel":
        return options | {"use_replicas": False, "sentinel_kwargs": {"retry": options["retry"]}}
    if scheme == "redis+cluster":
        return options
    pool = BlockingConnectionPool.from_url(
        uri.replace("redis+unix", "unix", 1),
        max_connections=_MOST_CONNECTIONS,
        timeout=timeout_s,
        retry=options.pop("retry"),
    )
    return options | {"connection_pool": pool}


async def _close(store: Store) -> None:
    """Close what `_opened` opened: the package itself has no way to."""
    if isinstance(store, RedisStorage):
        bridge = cast("Any", store.bridge)
        clients = [bridge.storage]
        if isinstance(store, RedisSentinelStorage):
            clients += [bridge.storage_replica, *bridge.sentinel.sentinels]
        for client in clients:
            pool = {} if isinstance(store, RedisClusterStorage) else {"close_connection_pool": True}
            await client.aclose(**pool)
    elif isinstance(store, MongoDBStorage):
        store.storage.close()
    elif isinstance(store, MemcachedStorage):
        client = await cast("Any", store.bridge).get_storage()
        client.connection_pool.close()
