"""What is left of limits whose subjects the configuration names, as gauges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Final, NamedTuple, Protocol, runtime_checkable

from opentelemetry.metrics import Observation

from asgi_llm_guard.claims import Meter, Reading, Unit
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.policies.base import Configured, Policy
from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.instruments import Instruments
from asgi_llm_guard.telemetry.readings import Latest

__all__ = ["ProviderLimits", "RemainingBudgets"]

_NANO: Final = 1_000_000_000
_MOST: Final = 100

Raised = Callable[[Sequence[Meter]], "tuple[Meter, ...]"]
"""Gives meters under the limits that hold now."""

Read = Callable[[Sequence[Meter]], "Future[tuple[Reading, ...]]"]
"""Begins to read meters, from any thread."""

_UNITS: Final = {Unit.NANOUSD: ("budget", "{USD}", _NANO), Unit.TOKENS: ("quota", "{token}", 1)}
_SAID: Final = {
    "remaining": "What is left of a limit in its current window: the limit, less what is used and held.",
    "held": "What open calls hold of a limit.",
    "limit": "The limit itself.",
}


@runtime_checkable
class ProviderLimits(Protocol):
    """A policy with a budget for each of some providers."""

    @property
    def name(self) -> str: ...

    @property
    def providers(self) -> Sequence[str]:
        """Those that it was configured with."""
        ...

    def meters(self, providers: Sequence[str], /) -> Mapping[str, Meter]: ...


class _Read(NamedTuple):
    """One meter, and what the storage says of it."""

    meter: Meter
    limit: int
    of_provider: bool
    reading: Reading

    def value(self, kind: str) -> int:
        if kind == "limit":
            return self.limit
        return self.reading.held if kind == "held" else self.limit - self.reading.used - self.reading.held


class RemainingBudgets:
    """Observable gauges of limits in dollars and in tokens: of providers, departments, agents, and of all together.

    Below 0: more was used than the limit. What has no limit has no point; neither have shadows. At most 100 limits have
    one, in the order of the policies.

    The storage is read when somebody collects, and at most every 5 seconds, in one batch. Whoever collects waits for it,
    for up to a second; on the thread of an event loop nobody waits, and what the collection before has begun to read is
    given. A storage that does not answer leaves no points.

    Args:
        policies: gives those that are in force: they may be replaced while the service runs.
    """

    def __init__(
        self,
        policies: Callable[[], Iterable[Policy]],
        raised: Raised,
        read: Read,
        clock: Clock,
        instruments: Instruments,
    ) -> None:
        self._policies = policies
        self._raised = raised
        self._begin = read
        self._latest: Latest[tuple[_Read, ...]] = Latest(self._ask, clock)
        self._first = True
        self._gauges: list[Callable[[], None]] = []
        for name, kind, said in (
            (names.REMAINING, "remaining", "What is left of a provider's budget in its current window."),
            (names.PROVIDER_LIMIT, "limit", "A provider's budget."),
        ):
            self._gauge(instruments, name, kind, "{USD}", said, _of_providers(kind))
        for unit, (name, suffix, scale) in _UNITS.items():
            for kind, said in _SAID.items():
                self._gauge(instruments, f"llm_guard.{name}.{kind}", kind, suffix, said, _of_others(unit, kind, scale))

    def close(self) -> None:
        """Give no more points."""
        self._latest.close()
        for remove in self._gauges:
            remove()

    def _gauge(
        self,
        instruments: Instruments,
        name: str,
        kind: str,
        unit: str,
        description: str,
        points: Callable[[Sequence[_Read]], list[Observation]],
    ) -> None:
        waits, self._first = self._first, False

        def read() -> list[Observation]:
            return points(self._latest.answer(waits=waits) or ())

        # Guards that share a storage say the same. Else the one that is nearer to its limit is the one to hear of.
        merge = max if kind == "held" else min
        self._gauges.append(instruments.gauge(name, read, merge=merge, unit=unit, description=description))

    def _ask(self) -> Future[tuple[_Read, ...]]:
        """Read what is limited now: quotas, and policies, may have been changed."""
        policies = tuple(self._policies())
        meters = [(meter, True) for policy in policies if isinstance(policy, ProviderLimits) for meter in _of(policy)]
        meters += [
            (meter, False)
            for policy in policies
            if isinstance(policy, Configured) and not isinstance(policy, ProviderLimits)
            for meter in policy.configured()
        ]
        limited = [each for each in meters if each[0].enforce and each[0].limit is not None][:_MOST]
        asked = self._raised([meter for meter, _ in limited])
        told: Future[tuple[_Read, ...]] = Future()

        def done(reading: Future[tuple[Reading, ...]]) -> None:
            if reading.cancelled():
                told.cancel()
                return
            error = reading.exception()
            if error is not None:
                told.set_exception(error)
                return
            read = zip(asked, limited, reading.result(), strict=True)
            told.set_result(
                tuple([_Read(meter, meter.limit or 0, of_provider, state) for meter, (_, of_provider), state in read])
            )

        if asked:
            self._begin(asked).add_done_callback(done)
        else:
            told.set_result(())
        return told


def _of_providers(kind: str) -> Callable[[Sequence[_Read]], list[Observation]]:
    def points(read: Sequence[_Read]) -> list[Observation]:
        return [
            Observation(each.value(kind) / _NANO, {names.PROVIDER: each.meter.subject, names.POLICY: each.meter.policy})
            for each in read
            if each.of_provider and each.meter.unit is Unit.NANOUSD
        ]

    return points


def _of_others(unit: Unit, kind: str, scale: int) -> Callable[[Sequence[_Read]], list[Observation]]:
    def points(read: Sequence[_Read]) -> list[Observation]:
        return [
            Observation(
                each.value(kind) / scale if scale > 1 else each.value(kind),
                {
                    names.POLICY: each.meter.policy,
                    names.SCOPE: each.meter.scope,
                    names.SUBJECT: each.meter.subject,
                    names.WINDOW: each.meter.window.code,
                },
            )
            for each in read
            if not each.of_provider and each.meter.unit is unit
        ]

    return points


def _of(policy: ProviderLimits) -> Iterable[Meter]:
    return policy.meters(policy.providers).values()
