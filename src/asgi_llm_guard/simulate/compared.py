"""How far what was simulated is what shadows reported."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final, TypeVar

import msgspec

from asgi_llm_guard.simulate.report import Simulation

__all__ = ["Agreement", "Comparison", "agreement", "agreement_of_counts", "compare"]

_HOUR_MS: Final = 3_600_000
_SOUND: Final = 0.99

_Key = TypeVar("_Key", bound=Hashable)


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How far what was simulated is what was reported."""

    decisions: int
    """Calls, each asked of each policy."""
    both: int
    only_simulated: int
    only_reported: int

    @property
    def share(self) -> float:
        """The part of the decisions that are the same, from 0 to 1."""
        return 1 - (self.only_simulated + self.only_reported) / self.decisions if self.decisions else 1.0

    @property
    def overlap(self) -> float:
        """The part of the misfits of either that both have, from 0 to 1: the stricter measure where few are refused."""
        either = self.both + self.only_simulated + self.only_reported
        return self.both / either if either else 1.0


def agreement(simulated: AbstractSet[Hashable], reported: AbstractSet[Hashable], *, decisions: int) -> Agreement:
    """Compare misfit by misfit: sets of the same keys, such as call and policy."""
    return Agreement(
        decisions=decisions,
        both=len(simulated & reported),
        only_simulated=len(simulated - reported),
        only_reported=len(reported - simulated),
    )


def agreement_of_counts(simulated: Mapping[_Key, int], reported: Mapping[_Key, int], *, decisions: int) -> Agreement:
    """Compare numbers of misfits, such as those of an hour and a policy: where single ones were not kept."""
    keys = simulated.keys() | reported.keys()
    pairs = [(simulated.get(key, 0), reported.get(key, 0)) for key in keys]
    return Agreement(
        decisions=decisions,
        both=sum(min(pair) for pair in pairs),
        only_simulated=sum(max(0, one - other) for one, other in pairs),
        only_reported=sum(max(0, other - one) for one, other in pairs),
    )


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What was simulated, beside what shadows reported: only of hours that lie in the period as a whole, and only of
    policies that any report in them is from. A shadow that ran and refused nothing leaves as little as one that did not."""

    since_ms: int
    until_ms: int
    """From the first whole hour up to the end of the last one; the same instant where there is none."""
    calls: int
    """Those of these hours."""
    policies: tuple[str, ...]
    """Whose reports were compared."""
    missing: Mapping[str, int]
    """Those of which there is no report, and how often each would have refused here."""
    agreement: Agreement | None
    """`None`: there was nothing to compare."""

    @property
    def holds(self) -> bool:
        """Whether something was compared, 99 % of it are the same, and nothing was found here that nobody reported."""
        return self.agreement is not None and self.agreement.share >= _SOUND and not any(self.missing.values())


def compare(
    found: Simulation, reports: Iterable[tuple[int, str, int]], policies: Iterable[str], *, since_ms: int, until_ms: int
) -> Comparison:
    """Compare a simulation, in which each policy was asked by itself, with the reports of shadows.

    `reports`: the instant of an hour, a policy by its plain name, and how often it would have refused within that hour.
    `since_ms`, `until_ms`: the period; what is counted of an hour that it cuts is not compared.
    """
    first, last = -(-since_ms // _HOUR_MS) * _HOUR_MS, until_ms - until_ms % _HOUR_MS
    last = max(first, last)
    reported: dict[tuple[int, str], int] = {}
    for hour_ms, policy, count in reports:
        if first <= hour_ms < last and count:
            reported[hour_ms, policy] = reported.get((hour_ms, policy), 0) + count
    told = {policy for _, policy in reported}
    simulated = {
        (row.hour_ms, row.policy): row.misfits
        for row in found.hours
        if first <= row.hour_ms < last and not row.enforced
    }
    wanted = dict.fromkeys(policies)
    compared = tuple(policy for policy in wanted if policy in told)
    calls = sum(number for hour_ms, number in found.hourly if first <= hour_ms < last)
    agreed = None
    if compared and calls:
        agreed = agreement_of_counts(
            {key: number for key, number in simulated.items() if key[1] in compared},
            {key: number for key, number in reported.items() if key[1] in compared},
            decisions=calls * len(compared),
        )
    missing = {
        policy: sum(number for (_, name), number in simulated.items() if name == policy)
        for policy in wanted
        if policy not in told
    }
    return Comparison(since_ms=first, until_ms=last, calls=calls, policies=compared, missing=missing, agreement=agreed)
