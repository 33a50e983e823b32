"""Which counters are to be looked at, and what has been crossed. Nothing here waits or asks a store.

Rule 1: the hot path only puts an event into a queue. All else is done when the queue is taken.

Rule 2: a counter is watched from the admission after which it may cross a threshold, by all that is held, until a
reading says that it has, or cannot. Whatever process settles the last of it, each that admitted some of it watches.
So is one that refuses: its limit may have been lowered below what was used before.

Rule 3: nothing that may cross is dropped. Where the queue is full, the counters of an admission that may cross are
kept by themselves, each once, and read.

Rule 4: what was crossed is told again until it was handled (`handled`), once per instance of the window, and once per
length of the window where it has no instances. Under another limit it is something else.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import msgspec

from asgi_llm_guard.alerts.rules import (
    AlertRule,
    BurnRate,
    Threshold,
    crossed,
    instance_of,
    is_fixed,
    level_of,
    period_ms,
)
from asgi_llm_guard.claims import Meter, Reading, Receipt
from asgi_llm_guard.events import Admission, Event, Expired, Refused, SettledCall

__all__ = ["Crossing", "Watch"]

MOST_EVENTS: Final = 10_000
MOST_METERS: Final = 50_000
MOST_CALLS: Final = 50_000

_MOST_KINDS: Final = 1_024
"""There are as many kinds of meters as policies, scopes and windows."""
_SAMPLES: Final = 60
"""A burn rate's window is looked at in so many steps."""
_GRACE_MS: Final = 600_000
"""Clocks differ: what was told of a window is known for longer than that."""


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold that was crossed."""

    meter: Meter
    rule: AlertRule
    at: float
    """Percent, or how many times as fast."""
    reading: Reading
    instance: str
    """Names the instance of the window; empty where it has none."""
    until_ms: int
    """It is not told again before then."""
    spent: int | None = None
    """Of a burn rate."""

    @property
    def what(self) -> tuple[str, float, int]:
        """What was crossed, of the same meter: equal for rules that say the same of the same limit."""
        if isinstance(self.rule, BurnRate):
            return "burn_rate", self.at, self.rule.window_ms
        return self.rule.of, self.at, level_of(self.at, self.meter.limit or 0)


class _Rules(msgspec.Struct, frozen=True):
    """Those that are about one kind of meter."""

    thresholds: tuple[Threshold, ...]
    burns: tuple[BurnRate, ...]
    lowest: float | None
    """The first percent that is worth an alert; `None`: none is."""

    @classmethod
    def of(cls, rules: Sequence[AlertRule]) -> Self:
        thresholds = tuple(rule for rule in rules if isinstance(rule, Threshold))
        burns = tuple(rule for rule in rules if isinstance(rule, BurnRate))
        return cls(thresholds, burns, min((rule.lowest for rule in thresholds), default=None))

    def may_matter(self, level: int, meter: Meter) -> bool:
        """Whether a counter with so much used and held has to be looked at."""
        return bool(self.burns) or (self.lowest is not None and crossed(level, self.lowest, meter.limit or 0))


_UNASKED: Final = _Rules((), (), None)


class _Entry:
    """What is known of one counter."""

    __slots__ = ("instance", "last", "meter", "rules", "sampled_ms", "samples", "spent", "told")

    def __init__(self, meter: Meter, rules: _Rules) -> None:
        self.meter = meter
        self.rules = rules
        self.instance: str | None = None
        """Of the last reading; `None`: there was none."""
        self.last = 0
        """What was used then."""
        self.told: dict[tuple[str, float, int], int] = {}
        """What was handled, and until when it is not told again."""
        self.spent = 0
        """Since the first reading, over all instances."""
        self.samples: deque[tuple[int, int]] = deque()
        """Instants and what was spent by then."""
        self.sampled_ms = -1

    @property
    def step_ms(self) -> int:
        return min((rule.window_ms for rule in self.rules.burns), default=0) // _SAMPLES

    def may_cross(self, used: int, held: int, now_ms: int) -> bool:
        """Whether there is a threshold at or below all that is used or held, that was not told."""
        limit, level = self.meter.limit or 0, used + held
        return any(
            crossed(level, at, limit) and self.told.get((rule.of, at, level_of(at, limit)), 0) <= now_ms
            for rule in self.rules.thresholds
            for at in rule.at
        )

    def was_lowered(self, used: int, now_ms: int) -> bool:
        """Whether less is used than something that was told of this instance stands for."""
        return any(
            until_ms > now_ms and what in ("used", "held") and used < level
            for (what, _, level), until_ms in self.told.items()
        )


class Watch:
    """An observer. `due` and `look` are for one thread at a time, the observer is for any.

    `lowered`: meters of which less is used than before in the same instance of the window, which is named beside: they
    were reset. Whoever takes them out says so to the other processes.
    """

    def __init__(
        self,
        rules: Sequence[AlertRule],
        *,
        most_events: int = MOST_EVENTS,
        most_meters: int = MOST_METERS,
        most_calls: int = MOST_CALLS,
    ) -> None:
        self._rules = tuple(rules)
        self._by_kind: dict[tuple[Any, ...], _Rules | None] = {}
        self._most_events = most_events
        self._most_meters = most_meters
        self._most_calls = most_calls
        self._events: deque[Admission | SettledCall | Refused] = deque()
        self._crowded: dict[str, Meter] = {}
        self._crowding = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._calls: OrderedDict[str, tuple[Meter, ...]] = OrderedDict()
        self._watched: set[str] = set()
        self._sampling: set[str] = set()
        self._all = False
        self.lowered: dict[str, tuple[Meter, str]] = {}

    # ------------------------------------------------------------------------------ hot path

    def __call__(self, event: Event, /) -> None:
        kind = type(event)
        if kind is Expired:
            self._all = True
        elif (kind is Admission and not event.degraded) or kind is SettledCall or kind is Refused:  # type: ignore[union-attr]
            if len(self._events) < self._most_events:
                self._events.append(event)  # type: ignore[arg-type]
            else:
                self._crowd(event)  # type: ignore[arg-type]

    def _crowd(self, event: Admission | SettledCall | Refused) -> None:
        if isinstance(event, SettledCall):
            # Its admission has put on watch what it may cross, unless it used more than it held.
            self._all = self._all or any(event.settled.overages)
            return
        refused = isinstance(event, Refused)
        for receipt in event.denied.receipts if isinstance(event, Refused) else event.granted.receipts:
            meter, level = receipt.claim.meter, receipt.used + receipt.held + (0 if refused else receipt.claim.amount)
            rules = self._rules_of(meter)
            if rules is not None and rules.may_matter(level, meter):
                with self._crowding:
                    self._crowded[meter.key] = meter

    # --------------------------------------------------------------------------- off the hot path

    @property
    def waiting(self) -> int:
        """How many events are in the queue."""
        return len(self._events)

    def due(self, now_ms: int, in_force: Callable[[Meter], Meter | None] | None = None) -> list[Meter]:
        """Take the queue, and give the meters that are to be read.

        `in_force`: other policies have come into force; says what has become of a meter of before: nothing, if it is
        limited no more.
        """
        for _ in range(len(self._events)):
            event = self._events.popleft()
            if isinstance(event, Admission):
                self._admitted(event, now_ms)
            elif isinstance(event, Refused):
                self._refused(event, now_ms)
            else:
                self._settled(event)
        with self._crowding:
            crowded, self._crowded = self._crowded, {}
        for meter in crowded.values():
            self._entry(meter)
            self._watched.add(meter.key)
        if in_force is not None:
            self._revise(in_force)
        keys = set(self._watched)
        for key in self._sampling:
            entry = self._entries[key]
            if now_ms >= entry.sampled_ms + entry.step_ms or now_ms < entry.sampled_ms:
                keys.add(key)
        if self._all:
            self._all = False
            keys.update(self._entries)
        return [self._entries[key].meter for key in sorted(keys)]

    def _revise(self, in_force: Callable[[Meter], Meter | None]) -> None:
        """Go by other limits, and forget what is not limited any more."""
        revised = {key: in_force(entry.meter) for key, entry in self._entries.items()}
        for key, meter in revised.items():
            rules = None if meter is None else self._rules_of(meter)
            if meter is None or rules is None:
                del self._entries[key]
                self._watched.discard(key)
                self._sampling.discard(key)
                self.lowered.pop(key, None)
                continue
            entry = self._entries[key]
            entry.meter, entry.rules = meter, rules
            self._watched.add(key)  # until it is seen where that stands under its new limit
            if not rules.burns:
                self._sampling.discard(key)
        for call_id, meters in self._calls.items():
            now = [revised.get(meter.key, meter) for meter in meters]
            self._calls[call_id] = tuple([meter for meter in now if meter is not None])

    def _admitted(self, event: Admission, now_ms: int) -> None:
        meters = []
        for receipt in event.granted.receipts:
            meter = receipt.claim.meter
            if receipt.taken and (rules := self._rules_of(meter)) is not None:
                meters.append(meter)
                self._took(meter, rules, receipt, now_ms)
        if event.call_id is not None and meters:
            self._calls[event.call_id] = tuple(meters)
            if len(self._calls) > self._most_calls:
                self._calls.popitem(last=False)

    def _refused(self, event: Refused, now_ms: int) -> None:
        for receipt in event.denied.receipts:
            meter = receipt.claim.meter
            rules = self._rules_of(meter)
            if rules is None or not rules.may_matter(receipt.used + receipt.held, meter):
                continue
            if self._entry(meter).may_cross(receipt.used, receipt.held, now_ms):
                self._watched.add(meter.key)

    def _took(self, meter: Meter, rules: _Rules, receipt: Receipt, now_ms: int) -> None:
        used, held = receipt.used, receipt.held + receipt.claim.amount
        if meter.key not in self._entries and not rules.may_matter(used + held, meter):
            return  # as most counters are: nothing is kept of them
        entry = self._entry(meter)
        if entry.rules.burns:
            self._sampling.add(meter.key)
        if entry.may_cross(used, held, now_ms) or entry.was_lowered(used, now_ms):
            self._watched.add(meter.key)

    def _settled(self, event: SettledCall) -> None:
        meters = self._calls.pop(event.settled.call_id, None)
        over = any(event.settled.overages)
        if meters is None:
            self._all = self._all or over
            return
        for meter in meters:
            if over:
                self._entry(meter)
                self._watched.add(meter.key)
            entry = self._entries.get(meter.key)
            if entry is not None and entry.rules.burns:
                self._sampling.add(meter.key)

    def _rules_of(self, meter: Meter) -> _Rules | None:
        """The rules that are about a meter; `None`: there are none."""
        kind = (meter.policy, meter.scope, meter.rule, meter.enforce, bool(meter.limit), meter.window)
        found = self._by_kind.get(kind, _UNASKED)
        if found is _UNASKED:
            if len(self._by_kind) >= _MOST_KINDS:
                self._by_kind.clear()
            matching = [rule for rule in self._rules if rule.matches(meter)]
            found = self._by_kind[kind] = _Rules.of(matching) if matching else None
        return found

    def _entry(self, meter: Meter) -> _Entry:
        """What is known of a meter that there are rules for."""
        entry = self._entries.get(meter.key)
        if entry is None:
            self._forget_one()
            entry = self._entries[meter.key] = _Entry(meter, self._rules_of(meter) or _Rules.of(()))
        else:
            self._entries.move_to_end(meter.key)
            entry.meter = meter  # its limit may be another one
        return entry

    def _forget_one(self) -> None:
        """Make room, but not by what may cross a threshold yet."""
        for _ in range(2 if len(self._entries) >= self._most_meters else 0):
            oldest = next(iter(self._entries))
            if oldest not in self._watched:
                del self._entries[oldest]
                self._sampling.discard(oldest)
                return
            self._entries.move_to_end(oldest)

    def look(self, meters: Sequence[Meter], readings: Sequence[Reading], now_ms: int) -> list[Crossing]:
        """What the readings have crossed and was not handled yet. Readings come in the order in which they were made."""
        found: list[Crossing] = []
        for meter, reading in zip(meters, readings, strict=True):
            entry = self._entries[meter.key]
            instance = instance_of(meter.window, reading.resets_at_ms)
            grown = self._compare(entry, instance, reading, now_ms)
            crossings = self._thresholds(entry, reading, instance, now_ms)
            if entry.rules.burns:
                crossings += self._burns(entry, grown, reading, instance, now_ms)
            found += crossings
            if crossings or entry.may_cross(reading.used, reading.held, now_ms):
                self._watched.add(meter.key)
            else:
                self._watched.discard(meter.key)
        return found

    def _compare(self, entry: _Entry, instance: str, reading: Reading, now_ms: int) -> int:
        """How much was used since the reading before, as far as that can be told."""
        before, known = entry.last, entry.instance
        entry.instance, entry.last = instance, reading.used
        if known is None or not is_fixed(entry.meter.window):
            return 0
        if known == instance and reading.used >= before:
            return reading.used - before
        if known == instance or (known and not instance and now_ms < int(known)):
            self.lowered[entry.meter.key] = (entry.meter, known)
        entry.told = {what: until_ms for what, until_ms in entry.told.items() if what[0] == "burn_rate"}
        return reading.used

    def _thresholds(self, entry: _Entry, reading: Reading, instance: str, now_ms: int) -> list[Crossing]:
        meter = entry.meter
        if is_fixed(meter.window):
            until_ms = (reading.resets_at_ms or now_ms) + _GRACE_MS
        else:
            until_ms = now_ms + max(period_ms(meter.window, now_ms), 60_000)
        found: dict[tuple[str, float, int], Crossing] = {}
        for rule in entry.rules.thresholds:
            level = reading.used + (reading.held if rule.of == "held" else 0)
            for at in rule.at:
                if not crossed(level, at, meter.limit or 0):
                    continue
                crossing = Crossing(
                    meter=meter, rule=rule, at=at, reading=reading, instance=instance, until_ms=until_ms
                )
                if entry.told.get(crossing.what, 0) <= now_ms:
                    found.setdefault(crossing.what, crossing)
        return list(found.values())

    def _burns(self, entry: _Entry, grown: int, reading: Reading, instance: str, now_ms: int) -> list[Crossing]:
        entry.spent += grown
        entry.sampled_ms = now_ms
        samples, longest_ms = entry.samples, max(rule.window_ms for rule in entry.rules.burns)
        if not samples or not 0 <= now_ms - samples[-1][0] < entry.step_ms:
            samples.append((now_ms, entry.spent))
        while samples[0][0] < now_ms - longest_ms or samples[0][0] > now_ms:
            samples.popleft()
        found = []
        for rule in entry.rules.burns:
            # From the first sample inside the window: what this process did not see may have been before it.
            spent = entry.spent - next(then for at_ms, then in samples if at_ms >= now_ms - rule.window_ms)
            crossing = Crossing(
                meter=entry.meter, rule=rule, at=rule.times, reading=reading, instance=instance,
                until_ms=now_ms + rule.window_ms, spent=spent,
            )  # fmt: skip
            if spent >= max(1, rule.worth(entry.meter, now_ms)) and entry.told.get(crossing.what, 0) <= now_ms:
                found.append(crossing)
        if not grown:
            self._sampling.discard(entry.meter.key)  # until something is admitted or settled again
        return found

    def handled(self, crossing: Crossing) -> None:
        """It was told: not again before it is over."""
        entry = self._entries[crossing.meter.key]
        if entry.instance == crossing.instance:
            entry.told[crossing.what] = crossing.until_ms
