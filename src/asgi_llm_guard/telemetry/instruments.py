"""Instruments that are read when somebody collects: to count costs a call next to nothing, and nothing without an SDK.

An SDK takes several microseconds for each number that it is handed, however often the number has the same labels. So
counters are added up here, and handed over as they stand when it asks. Histograms cannot be, and are its own.

An SDK keeps the first instrument of a name, and drops the callbacks of all that come later. So what is read is shared
by all guards whose metrics go to one provider.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final
from weakref import WeakKeyDictionary

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

__all__ = ["Counter", "Instruments", "instruments_of"]

_SCOPE: Final = "asgi_llm_guard"

Merge = Callable[[Iterable[float]], float]
"""What one point says for several guards that have one with the same labels: `sum`, `min` or `max`."""

_Labels = tuple[str | None, ...]


class Counter:
    """A counter of the conventions' kind, with labels of fixed names. Safe to use from any thread.

    Args:
        labels: their names. A point leaves those out whose value is `None`.
        scale: how many of what is added are one of the counter's unit; they are added up as whole numbers.
    """

    __slots__ = ("_labels", "_lock", "_owner", "_scale", "_sums")

    def __init__(self, owner: Instruments, labels: Sequence[str], scale: int) -> None:
        self._owner = owner
        self._labels = tuple(labels)
        self._scale = scale
        self._lock = threading.Lock()
        self._sums: dict[_Labels, int] = {}

    def add(self, number: int, *labels: str | None) -> None:
        """Add to the point with these labels, in the order of their names. Without an SDK nothing is counted."""
        if not self._owner.live:
            return
        with self._lock:
            self._sums[labels] = self._sums.get(labels, 0) + number

    def begin(self, *labels: str | None) -> None:
        """Have a point from the start: then its first change is one."""
        with self._lock:
            self._sums.setdefault(labels, 0)

    def points(self) -> list[Observation]:
        """What it stands at."""
        with self._lock:
            sums = list(self._sums.items())
        scale = self._scale
        return [
            Observation(
                number / scale if scale > 1 else number,
                {name: label for name, label in zip(self._labels, labels, strict=True) if label is not None},
            )
            for labels, number in sums
        ]


class _Gauge:
    """A gauge that several guards give points of."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self._reads: tuple[Callable[[], Sequence[Observation]], ...] = ()

    def add(self, read: Callable[[], Sequence[Observation]]) -> Callable[[], None]:
        self._reads = (*self._reads, read)

        def remove() -> None:
            self._reads = tuple([each for each in self._reads if each is not read])

        return remove

    def __call__(self, _options: CallbackOptions) -> Sequence[Observation]:
        points = [point for read in self._reads for point in read()]
        if len(self._reads) < 2:
            return points
        alike: dict[tuple[tuple[str, object], ...], list[Observation]] = {}
        for point in points:
            alike.setdefault(tuple((point.attributes or {}).items()), []).append(point)
        return [
            Observation(self._merge([point.value for point in same]), same[0].attributes) for same in alike.values()
        ]


class Instruments:
    """Those of one provider, each made once. Histograms are made by its `meter`."""

    def __init__(self, meter: Meter) -> None:
        self.meter: Final = meter
        self.live = False
        """An SDK takes what is measured."""
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, _Gauge] = {}

    def when_live(self, begin: Callable[[], None]) -> Callable[[], None]:
        """Call `begin` as soon as an SDK takes what is measured: at once, later, or never. Gives what ends the waiting."""
        with self._lock:
            waits = not self.live
            if waits:
                self._waiting.append(begin)
        if not waits:
            begin()

        def forget() -> None:
            with self._lock:
                self._waiting = [each for each in self._waiting if each is not begin]

        return forget

    def counter(self, name: str, labels: Sequence[str] = (), *, unit: str, description: str, scale: int = 1) -> Counter:
        """The counter of a name; see `Counter`."""
        with self._lock:
            found = self._counters.get(name)
            if found is not None:
                return found
            made = self._counters[name] = Counter(self, labels, scale)
        self.meter.create_observable_counter(name, [self._read(made)], unit=unit, description=description)
        return made

    def gauge(
        self,
        name: str,
        read: Callable[[], Sequence[Observation]],
        *,
        merge: Merge,
        unit: str,
        description: str,
    ) -> Callable[[], None]:
        """Read points of the gauge of a name, until what is given is called."""
        with self._lock:
            found = self._gauges.get(name)
            gauge = self._gauges[name] = found or _Gauge(merge)
        remove = gauge.add(read)
        if found is None:
            self.meter.create_observable_gauge(name, [gauge], unit=unit, description=description)
        return remove

    def _read(self, counter: Counter) -> Generator[Iterable[Observation], CallbackOptions, None]:
        # A generator is started by whoever takes it as a callback, which nothing of the API alone does. One that is
        # made before there is an SDK is handed on to it, and started, when it is installed.
        self._begin()
        yield ()
        while True:
            yield counter.points()

    def _begin(self) -> None:
        with self._lock:
            self.live = True
            waiting, self._waiting = self._waiting, []
        for begin in waiting:
            begin()


_made: Final[WeakKeyDictionary[MeterProvider, Instruments]] = WeakKeyDictionary()
_made_lock: Final = threading.Lock()
_globally: Final[list[Instruments]] = []


def instruments_of(provider: MeterProvider | None) -> Instruments:
    """The instruments of a provider; `None`: of the global one, also if it is installed later."""
    current = metrics.get_meter_provider()
    provider = current if provider is None else provider
    with _made_lock:
        found = _made.get(provider)
        if found is None and provider is current and _globally:
            found = _globally[0]  # what was made before there was an SDK is the SDK's by now
        if found is None:
            found = Instruments(metrics.get_meter(_SCOPE, meter_provider=provider))
        if provider is current and not _globally:
            _globally.append(found)
        _made[provider] = found
    return found
