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

import os
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final, NamedTuple, get_args
from urllib.parse import parse_qsl, urlencode

import msgspec
from limits.aio.storage import MovingWindowSupport
from limits.aio.storage import Storage as Store

from asgi_llm_guard.claims import (
    Bundle,
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
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.policies.base import Policy, Sampled
from asgi_llm_guard.storage.base import LAPSE_MS, Completed, Pending
from asgi_llm_guard.storage.limits_rates import PLAIN, Rates, Strategy, now_ms, unfit
from asgi_llm_guard.storage.limits_stores import Stores
from asgi_llm_guard.storage.memory import MAX_RECORDS, MemoryStorage
from asgi_llm_guard.storage.memory_stream import MemoryStream
from asgi_llm_guard.usage import UsageRecord

__all__ = ["LimitsStorage", "Strategy"]

_OURS: Final = ("strategy", "timeout_s", "prefix")


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
        if not isinstance(prefix, str) or not PLAIN.fullmatch(prefix) or len(prefix) > 50:
            raise ConfigurationError(
                f"prefix: expected up to 50 printable ASCII characters without spaces, got {prefix!r}"
            )
        self._stores = Stores(store, timeout_s)
        if strategy == "moving" and not issubclass(self._stores.kind, MovingWindowSupport):
            raise ConfigurationError(
                f"strategy: {self._stores.kind.__name__} of the limits package has no moving window; use strategy='fixed'"
            )
        self.strategy: Strategy = strategy
        self._rates = Rates(strategy, prefix=prefix, timeout_s=timeout_s)
        self._lapse_ms, self._max_records = lapse_ms, max_records
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
                if (problem := unfit(meter)) is not None:
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
                return Granted(receipts, now_ms(), known[0].plan, replayed=True)
            return answer
        states: list[tuple[Receipt, ...]] = []
        for number, plan in enumerate(plans):
            fits, receipts = await self._rates.take(store, [claim for bundle in plan for claim in bundle.claims])
            if fits:
                return await self._hold(owner, plan, number, receipts)
            states.append(receipts)
        return Refused(tuple(states), now_ms())

    async def _hold(self, owner: str, plan: Plan, number: int, receipts: tuple[Receipt, ...]) -> Granted | Ended:
        answer = await self._calls.reserve(owner, (_without_claims(plan),))
        if isinstance(answer, Ended):  # cancelled before it arrived; what it took stays taken
            return answer
        first = 0
        for bundle in plan:
            last = first + len(bundle.claims)
            self._taken[bundle.call_id] = _Open(owner, number, receipts[first:last])
            first = last
        return Granted(receipts, now_ms(), number)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        """As every storage, but that what is no longer claimed stays taken."""
        store = self._store()
        known = self._taken.get(bundle.call_id)
        if known is not None:
            before = {receipt.claim.meter.key: receipt for receipt in known.receipts if receipt.taken}
            fits, receipts = await self._rates.take(store, bundle.claims, before)
            if not fits:
                return Refused((receipts,), now_ms())
        else:
            receipts = ()
        answer = await self._calls.amend(owner, Bundle(bundle.call_id, (), bundle.draft))
        if known is None or not isinstance(answer, Granted):
            return answer
        self._taken[bundle.call_id] = _Open(owner, known.plan, receipts)
        return Granted(receipts, now_ms())

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
        return await self._rates.read(self._store(), meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        await self._rates.reset(self._store(), meters)

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
        await self._stores.aclose()

    def _here(self) -> MemoryStorage:
        """The calls of this process; a forked child begins with none."""
        if self._pid != os.getpid():
            self._begin_anew()
        return self._calls

    def _store(self) -> Store:
        """The store of the running event loop."""
        self._here()
        return self._stores.of_this_loop()


def _without_claims(plan: Plan) -> tuple[Bundle, ...]:
    return tuple(Bundle(bundle.call_id, (), bundle.draft) for bundle in plan)
