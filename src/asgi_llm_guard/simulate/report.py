"""What a simulation has found: misfits one by one, and in sums by policy, subject and hour."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, TypeVar

import msgspec

from asgi_llm_guard.usage import UsageRecord

__all__ = [
    "MOST_SUBJECTS",
    "Misfit",
    "PolicyRow",
    "Simulation",
    "SubjectRow",
    "Tally",
    "plain_name",
]

MOST_SUBJECTS: Final = 10_000
"""Subjects that are told apart; what is found of others is counted together."""
OTHERS: Final = "(others)"

_HOUR_MS: Final = 3_600_000
_SHADOW: Final = ".shadow"

_Key = TypeVar("_Key", bound=Hashable)


class Misfit(msgspec.Struct, frozen=True, kw_only=True):
    """One call that a policy would have refused."""

    at_ms: int
    call_id: str
    request_id: str | None = None
    policy: str
    """By its name, a shadow's too."""
    code: str
    """That of the refusal; `shadow` for one that only watches."""
    scope: str = ""
    subject: str = ""
    enforced: bool
    """The call would have been refused. `False`: a shadow would have said so."""
    route: str | None = None
    model: str | None = None
    cost_nanousd: int | None = None
    """What the call has cost; `None`: not known."""
    requested: int | None = None
    used: int | None = None
    held: int | None = None
    limit: int | None = None
    """As it stood at that moment, in the policy's unit; `None`: it refuses without counting."""


class PolicyRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy would have refused."""

    policy: str
    code: str
    enforced: bool
    calls: int
    cost_nanousd: int
    first_ms: int
    last_ms: int


class SubjectRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy would have refused of one subject."""

    policy: str
    scope: str
    subject: str
    enforced: bool
    calls: int
    cost_nanousd: int
    first_ms: int
    last_ms: int


class HourRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy would have refused in one hour (UTC)."""

    hour_ms: int
    policy: str
    enforced: bool
    calls: int
    misfits: int
    """As shadows report them: a call that fits into none of three windows is three."""
    cost_nanousd: int


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What a period would have been like."""

    first_ms: int | None
    """The first record of the period; `None`: there was none."""
    last_ms: int | None
    records: int
    """Of the period: calls, and further attempts of them."""
    calls: int
    cost_nanousd: int
    """What they have cost."""
    refused: int
    """Records that would have been refused."""
    refused_nanousd: int
    """What those have cost."""
    unknown: int
    """Of the refused ones: those whose cost is not known."""
    followed: int
    """Further attempts of refused calls, which fall with them; among the refused ones."""
    shorter: int
    """Refused ones that would have been admitted with a lower output limit."""
    clamped: int = 0
    """Admitted ones whose output limit would have been lowered to what was left, where a route asks for `clamp`."""
    cut: int = 0
    """Of these, whose answer was longer than that: it would have ended there, and is charged as if it had."""
    policies: tuple[PolicyRow, ...] = ()
    """Most calls first."""
    subjects: tuple[SubjectRow, ...] = ()
    """Most calls first."""
    hours: tuple[HourRow, ...] = ()
    """In order."""
    hourly: tuple[tuple[int, int], ...] = ()
    """The instant of each hour (UTC) in which there were calls, and how many, in order."""


class _Sum:
    """Calls and cost, from when to when."""

    __slots__ = ("calls", "cost_nanousd", "first_ms", "last_ms")

    def __init__(self, at_ms: int) -> None:
        self.calls = self.cost_nanousd = 0
        self.first_ms = self.last_ms = at_ms

    def add(self, at_ms: int, cost_nanousd: int | None) -> None:
        self.calls += 1
        self.cost_nanousd += cost_nanousd or 0
        self.last_ms = max(self.last_ms, at_ms)


class Tally:
    """Sums up, in bounded memory."""

    def __init__(self, since_ms: int) -> None:
        self._since_ms = since_ms
        self._first_ms: int | None = None
        self._last_ms: int | None = None
        self._records = self._calls = self._cost = 0
        self._refused = self._refused_cost = self._unknown = self._followed = self._shorter = 0
        self._clamped = self._cut = 0
        self._policies: dict[tuple[str, str, bool], _Sum] = {}
        self._subjects: dict[tuple[str, str, str, bool], _Sum] = {}
        self._hours: dict[tuple[int, str, bool], _Sum] = {}
        self._misfits: dict[tuple[int, str, bool], int] = {}
        self._hourly: dict[int, int] = {}
        self._last: tuple[str, set[tuple[str, bool]]] = ("", set())

    def saw(self, record: UsageRecord, *, first: bool) -> None:
        """A record is replayed."""
        if record.at_ms < self._since_ms:
            return
        if self._first_ms is None:
            self._first_ms = record.at_ms
        self._last_ms = record.at_ms
        self._records += 1
        self._calls += first
        hour_ms = record.at_ms - record.at_ms % _HOUR_MS
        self._hourly[hour_ms] = self._hourly.get(hour_ms, 0) + first
        self._cost += record.cost_nanousd or 0

    def refused(self, record: UsageRecord, *, shorter: bool) -> None:
        """It would have been refused."""
        if record.at_ms < self._since_ms:
            return
        self._refused += 1
        self._refused_cost += record.cost_nanousd or 0
        self._unknown += record.cost_nanousd is None
        self._shorter += shorter

    def clamped(self, record: UsageRecord, *, cut: bool) -> None:
        """It would have been admitted with a lower output limit; `cut`: which its answer was longer than."""
        if record.at_ms >= self._since_ms:
            self._clamped += 1
            self._cut += cut

    def follows(self, record: UsageRecord) -> None:
        """It is another attempt of a call that would have been refused."""
        self.refused(record, shorter=False)
        self._followed += record.at_ms >= self._since_ms

    def add(self, misfit: Misfit) -> bool:
        """Count a misfit. Whether it is in the period, and the first of its policy for this call."""
        if misfit.at_ms < self._since_ms:
            return False
        call_id, policies = self._last
        if call_id != misfit.call_id:
            policies = set()
            self._last = (misfit.call_id, policies)
        policy = (misfit.policy, misfit.enforced)
        is_first = policy not in policies
        policies.add(policy)
        subject = (misfit.policy, misfit.scope, misfit.subject, misfit.enforced)
        if subject not in self._subjects and len(self._subjects) >= MOST_SUBJECTS:
            subject = (misfit.policy, misfit.scope, OTHERS, misfit.enforced)
        _add(self._subjects, subject, misfit)
        hour = (misfit.at_ms - misfit.at_ms % _HOUR_MS, misfit.policy, misfit.enforced)
        self._misfits[hour] = self._misfits.get(hour, 0) + 1
        if is_first:
            _add(self._policies, (misfit.policy, misfit.code, misfit.enforced), misfit)
            _add(self._hours, hour, misfit)
        return is_first

    def result(self) -> Simulation:
        """Everything that was counted."""
        policies = [
            PolicyRow(
                policy=policy,
                code=code,
                enforced=enforced,
                calls=each.calls,
                cost_nanousd=each.cost_nanousd,
                first_ms=each.first_ms,
                last_ms=each.last_ms,
            )
            for (policy, code, enforced), each in self._policies.items()
        ]
        subjects = [
            SubjectRow(
                policy=policy,
                scope=scope,
                subject=subject,
                enforced=enforced,
                calls=each.calls,
                cost_nanousd=each.cost_nanousd,
                first_ms=each.first_ms,
                last_ms=each.last_ms,
            )
            for (policy, scope, subject, enforced), each in self._subjects.items()
        ]
        hours = [
            HourRow(
                hour_ms=hour_ms,
                policy=policy,
                enforced=enforced,
                calls=each.calls,
                misfits=self._misfits[hour_ms, policy, enforced],
                cost_nanousd=each.cost_nanousd,
            )
            for (hour_ms, policy, enforced), each in sorted(self._hours.items())
        ]
        return Simulation(
            first_ms=self._first_ms,
            last_ms=self._last_ms,
            records=self._records,
            calls=self._calls,
            cost_nanousd=self._cost,
            refused=self._refused,
            refused_nanousd=self._refused_cost,
            unknown=self._unknown,
            followed=self._followed,
            shorter=self._shorter,
            clamped=self._clamped,
            cut=self._cut,
            policies=tuple(sorted(policies, key=lambda row: (-row.calls, row.policy, row.code))),
            subjects=tuple(sorted(subjects, key=lambda row: (-row.calls, row.policy, row.subject))),
            hours=tuple(hours),
            hourly=tuple(sorted(self._hourly.items())),
        )


def _add(sums: dict[_Key, _Sum], key: _Key, misfit: Misfit) -> None:
    each = sums.get(key)
    if each is None:
        each = sums[key] = _Sum(misfit.at_ms)
    each.add(misfit.at_ms, misfit.cost_nanousd)


def plain_name(policy: str) -> str:
    """A policy's name, without the mark of its shadow."""
    return policy.removesuffix(_SHADOW)
