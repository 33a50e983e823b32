"""Rates as the windows of the `limits` package count them: read side by side, taken one by one, the scarcest first.

Rules 1 and 2 of `limits.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast

import msgspec
from limits.aio.storage import MovingWindowSupport
from limits.aio.storage import Storage as Store

from asgi_llm_guard.claims import Claim, Meter, Reading, Receipt, Rule, Unit
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.windows import Sliding

__all__ = ["PLAIN", "Rates", "Strategy", "now_ms", "unfit"]

Strategy = Literal["moving", "fixed"]

PLAIN: Final = re.compile(r"[!-~]+", re.ASCII)
"""What every store takes in a key."""

T = TypeVar("T")

_SECOND_MS: Final = 1_000
_LONGEST_KEY: Final = 200  # memcached takes 250 bytes, and the package appends to them


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


class Rates:
    """The rates that are counted under one prefix. Every trip to a store is given up after `timeout_s`."""

    def __init__(self, strategy: Strategy, *, prefix: str, timeout_s: float) -> None:
        self._strategy: Strategy = strategy
        self._prefix = prefix
        self._timeout_s = timeout_s

    async def read(self, store: Store, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        """As `Storage.read`."""
        counts = await self._counts(store, [(_fit(meter), cast("int", meter.limit)) for meter in meters])
        return tuple(Reading(count.used, 0, count.resets_at_ms) for count in counts)

    async def reset(self, store: Store, meters: Sequence[Meter]) -> None:
        """As `Storage.reset`."""
        for meter in meters:
            await self._trip(store.clear(self._key(_fit(meter))))

    async def take(
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
            resets_at_ms = now_ms()
        elif claim.amount > limit:
            resets_at_ms = None
        elif resets_at_ms is None:
            resets_at_ms = now_ms() + window.period_ms
        if not fits and asked.room >= 0:
            used = limit  # somebody else was faster
        return Receipt(claim, taken, fits, used, 0, now_ms() // window.bucket_ms, resets_at_ms)

    async def _counts(self, store: Store, asked: Sequence[tuple[Meter, int]]) -> list[_Count]:
        """What is counted, side by side; with its end where the amount beside the meter does not fit."""
        if not asked:
            return []
        read = self._read_moving if self._strategy == "moving" else self._read_fixed
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
        if self._strategy == "moving":
            return await self._trip(
                cast("MovingWindowSupport", store).acquire_entry(key, limit, period_s, amount=amount)
            )
        return await self._trip(store.incr(key, period_s, amount=amount)) <= limit

    def _key(self, meter: Meter) -> str:
        """The key in the store: with the strategy, whose values are of different types."""
        key = meter.key
        if len(key) > _LONGEST_KEY - len(self._prefix) or not PLAIN.fullmatch(key):
            key = f"sha256~{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
        return f"{self._prefix}:{self._strategy}:{key}"

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


async def _together(reads: Sequence[Coroutine[Any, Any, _Count]]) -> list[_Count]:
    return await asyncio.gather(*reads) if len(reads) > 1 else [await reads[0]]


def unfit(meter: Meter) -> str | None:
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
    if (problem := unfit(meter)) is not None:
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


def now_ms() -> int:
    """The host's clock."""
    return time.time_ns() // 1_000_000  # what the package's windows are measured by
