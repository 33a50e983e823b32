"""What is left of limits whose subjects the configuration names, as gauges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Final, NamedTuple, Protocol, runtime_checkable

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.metrics import Meter as Instruments

from asgi_llm_guard.claims import Meter, Reading, Unit
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.policies.base import Configured, Policy
from asgi_llm_guard.telemetry import names
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
    """

    def __init__(
        self, policies: Iterable[Policy], raised: Raised, read: Read, clock: Clock, instruments: Instruments
    ) -> None:
        policies = tuple(policies)
        self._providers = tuple(policy for policy in policies if isinstance(policy, ProviderLimits))
        self._configured = tuple(
            policy for policy in policies if isinstance(policy, Configured) and not isinstance(policy, ProviderLimits)
        )
        self._raised = raised
        self._begin = read
        self._latest: Latest[tuple[_Read, ...]] = Latest(self._ask, clock)
        self._first = True
        if any(_counts(meter, Unit.NANOUSD) for policy in self._providers for meter in _of(policy)):
            for name, kind, said in (
                (names.REMAINING, "remaining", "What is left of a provider's budget in its current window."),
                (names.PROVIDER_LIMIT, "limit", "A provider's budget."),
            ):
                self._gauge(instruments, name, "{USD}", said, self._of_providers(kind))
        if self._configured:  # what they limit may change while the service runs
            for unit, (name, suffix, scale) in _UNITS.items():
                for kind, said in _SAID.items():
                    self._gauge(
                        instruments, f"llm_guard.{name}.{kind}", suffix, said, self._of_others(unit, kind, scale)
                    )

    def close(self) -> None:
        """Give no more points: a gauge cannot be taken back from its meter."""
        self._latest.close()

    def _gauge(
        self,
        instruments: Instruments,
        name: str,
        unit: str,
        description: str,
        points: Callable[[Sequence[_Read]], list[Observation]],
    ) -> None:
        waits, self._first = self._first, False

        def observe(_options: CallbackOptions) -> list[Observation]:
            return points(self._latest.answer(waits=waits) or ())

        instruments.create_observable_gauge(name, [observe], unit=unit, description=description)

    def _ask(self) -> Future[tuple[_Read, ...]]:
        """Read what is limited now: quotas may have been changed."""
        meters = [meter for policy in self._providers for meter in _of(policy)]
        meters += [meter for policy in self._configured for meter in policy.configured()]
        asked = self._raised([meter for meter in meters if meter.enforce and meter.limit is not None][:_MOST])
        told: Future[tuple[_Read, ...]] = Future()

        def done(reading: Future[tuple[Reading, ...]]) -> None:
            if reading.cancelled():
                told.cancel()
                return
            error = reading.exception()
            if error is not None:
                told.set_exception(error)
                return
            read = zip(asked, reading.result(), strict=True)
            told.set_result(tuple([_Read(meter, meter.limit or 0, state) for meter, state in read]))

        self._begin(asked).add_done_callback(done)
        return told

    def _of_providers(self, kind: str) -> Callable[[Sequence[_Read]], list[Observation]]:
        policies = {policy.name for policy in self._providers}

        def points(read: Sequence[_Read]) -> list[Observation]:
            return [
                Observation(
                    each.value(kind) / _NANO, {names.PROVIDER: each.meter.subject, names.POLICY: each.meter.policy}
                )
                for each in read
                if each.meter.policy in policies and each.meter.unit is Unit.NANOUSD
            ]

        return points

    def _of_others(self, unit: Unit, kind: str, scale: int) -> Callable[[Sequence[_Read]], list[Observation]]:
        policies = {policy.name for policy in self._configured}

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
                if each.meter.policy in policies and each.meter.unit is unit
            ]

        return points


def _of(policy: ProviderLimits) -> Iterable[Meter]:
    return policy.meters(policy.providers).values()


def _counts(meter: Meter, unit: Unit) -> bool:
    return meter.unit is unit and meter.limit is not None
