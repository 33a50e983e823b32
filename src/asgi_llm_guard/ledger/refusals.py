"""How often was refused: counted in memory, added to what all processes share, and from there to the ledger.

A refusal is a number in its hour and never a usage record, so that a flood of them costs no more than its counter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Event, Refused, ShadowMisfit
from asgi_llm_guard.ledger.book import Ledger
from asgi_llm_guard.ledger.values import RefusalCount
from asgi_llm_guard.storage.shared import OTHER, Shared, Tally

__all__ = ["REFUSALS", "SHADOW", "RefusalDrain", "RefusalTally"]

REFUSALS: Final = "refusals"
"""The name of the tally, and of the document that names its data."""
SHADOW: Final = "shadow"
"""The code under which is counted what a policy in shadow would have refused."""

_MOST: Final = 1_000
_HOUR_MS: Final = 3_600_000
_LATE_MS: Final = 6 * _HOUR_MS
_PARTED: Final = "\x1f"  # in no name of a policy, scope, code or route
_LONGEST: Final = (128, 96, 64, 200)  # together less than the name of a key may have

Key = tuple[str, str, str, str]


class RefusalTally:
    """An observer of `Refused` and `ShadowMisfit`: counts per hour, policy, scope, code and route. From any thread.

    At most 1,000 different ones in an hour are told apart, in each process and over all of them; the rest is `other`.
    What was not flushed is lost with the process: flush every few seconds, and at the end.
    """

    def __init__(self, shared: Shared, *, clock: Clock | None = None) -> None:
        self._shared = shared
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._hours: dict[int, dict[str, int]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Refused):
            denied = event.denied
            self._count((denied.policy, denied.scope, denied.code, event.context.route or ""))
        elif isinstance(event, ShadowMisfit):
            self._count((event.policy, "", SHADOW, event.context.route or ""))

    def _count(self, key: Key) -> None:
        now_ms = self._clock.now_ms()
        name = _PARTED.join(part[:most] for part, most in zip(key, _LONGEST, strict=True))
        with self._lock:
            self._add(now_ms - now_ms % _HOUR_MS, name, 1)

    def _add(self, hour_ms: int, name: str, count: int) -> None:
        counts = self._hours.setdefault(hour_ms, {})
        if name not in counts and len(counts) >= _MOST:
            name = OTHER
        counts[name] = counts.get(name, 0) + count

    async def flush(self) -> int:
        """Hand on what was counted since; how many refusals.

        Raises:
            StorageError: what surely did not arrive is kept for the next time. Where that is not known, it is let go, so
                that nothing is counted twice.
        """
        with self._lock:
            hours, self._hours = self._hours, {}
        told = 0
        while hours:
            hour_ms = min(hours)
            try:
                await self._shared.tally(REFUSALS, hour_ms, hours[hour_ms], most=_MOST)
            except BaseException as error:
                if isinstance(error, StorageError) and error.sent:
                    del hours[hour_ms]
                self._put_back(hours)
                raise
            told += sum(hours.pop(hour_ms).values())
        return told

    def _put_back(self, hours: dict[int, dict[str, int]]) -> None:
        with self._lock:
            for hour_ms, counts in hours.items():
                for name, count in counts.items():
                    self._add(hour_ms, name, count)


class RefusalDrain:
    """Adds to a ledger what is new in the tallies, once: in as many processes as there are, killed at any instant.

    The cursor of `source` in the ledger says what was taken of the latest hours, because these go on.
    """

    def __init__(self, shared: Shared, ledger: Ledger, *, source: str, clock: Clock | None = None) -> None:
        self._shared = shared
        self._ledger = ledger
        self._source = source
        self._clock = clock or SystemClock()

    async def step(self) -> int:
        """Take what is new; how many refusals.

        Raises:
            StorageError: the storage or the ledger does not answer.
        """
        source = f"{self._source}:{await self._data()}"
        cursor = await self._ledger.cursor(source)
        known = _Known() if cursor is None else _decode(cursor)
        tallies = await self._shared.tallies(REFUSALS, known.since_ms)
        before = {(hour_ms, key): count for hour_ms, key, count in known.counts}
        new = [
            msgspec.structs.replace(tally, count=tally.count - before.get((tally.hour_ms, tally.key), 0))
            for tally in tallies
        ]
        # Fewer than before: a replica took over that had not received the newest, or an older copy was restored.
        counts = _counts_of(tally for tally in new if tally.count > 0)
        if not any(tally.count for tally in new):
            return 0
        following = _encode(_following(tallies, known.since_ms, self._clock.now_ms())).decode()
        if not await self._ledger.add_refusals(counts, source=source, cursor=following, after=cursor):
            return 0  # somebody else was faster
        return sum(count.count for count in counts)

    async def _data(self) -> str:
        """Names what the counts belong to: a store that was flushed, or another one of the same name, begins at 0."""
        found = await self._shared.document(REFUSALS)
        if found is None:
            await self._shared.publish(REFUSALS, 1, os.urandom(9).hex().encode())
            found = await self._shared.document(REFUSALS)
        return "" if found is None else found.data.decode()


class _Known(msgspec.Struct, array_like=True):
    """What the ledger has of the latest hours."""

    since_ms: int = 0
    counts: list[tuple[int, str, int]] = []
    """Hour, key, count."""


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Known).decode


def _following(tallies: Sequence[Tally], since_ms: int, now_ms: int) -> _Known:
    """Of the latest hours: a process that could not reach the store for some time hands on what it counted then.

    An hour that has not come yet is told by a clock that is wrong, and ends no other.
    """
    latest_ms = max((tally.hour_ms for tally in tallies if tally.hour_ms <= now_ms), default=0)
    since_ms = max(since_ms, latest_ms - _LATE_MS)
    return _Known(since_ms, [(one.hour_ms, one.key, one.count) for one in tallies if one.hour_ms >= since_ms])


def _counts_of(tallies: Iterable[Tally]) -> list[RefusalCount]:
    """What was tallied, as the ledger keeps it."""
    counts = []
    for tally in tallies:
        policy, scope, code, route = _parts(tally.key)
        counts.append(
            RefusalCount(
                hour_ms=tally.hour_ms, policy=policy, scope=scope, code=code, route=route or None, count=tally.count
            )
        )
    return counts


def _parts(name: str) -> Key:
    parts = name.split(_PARTED)
    if len(parts) != len(_LONGEST):
        return name, "", "", ""
    policy, scope, code, route = parts
    return policy, scope, code, route
