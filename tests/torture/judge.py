"""After a round: what the store says, held against what really happened."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.torture.load import DEPARTMENTS, LEASED_CALLS, MEAN_COST, MEAN_TOKENS, PROVIDERS, Load
from tests.torture.truth import CallRow, CallStage, JobRow, JobStage, Kind

from asgi_llm_guard.claims import Reading
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Process", "Stored", "Verdict", "judge"]

_SHOWN: Final = 20
_SLACK_NS: Final = 5_000_000
"""Between the clock of the store, which counts in milliseconds, and the one that the truth is timed by."""
_LOST_CHUNKS: Final = 8
"""Of one meter, at most, when a process is killed: the one that it spends, the next one, and about six that its open
calls were taken from."""
_LATE: Final = 2
_ODD: Final = 3
_TOLD_LATER: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What one worker process has left."""

    name: str
    calls: Sequence[CallRow]
    jobs: Sequence[JobRow]
    clean: bool
    """It ended by itself, with everything settled."""
    slow: bool = False
    """Its heartbeats came so late that it may have lapsed while it lived."""
    ended_ns: int
    """When it was killed, at the earliest; or when it had ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What the store says at the end, when every owner has ended or lapsed."""

    records: Sequence[UsageRecord]
    everything: Reading
    providers: Sequence[Reading]
    departments: Sequence[Reading]
    slots: Sequence[Reading]
    sessions: Mapping[int, Reading]
    open_holds: int


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    found: int = 0
    """All problems; only the first ones are kept in words."""
    jobs: int = 0
    calls: int = 0
    """Admitted ones."""
    keys: int = 0
    """Meters and windows that were checked against the truth."""
    over: int = 0
    """Those of them for which more was billed than their limit."""
    worst: float = 0.0
    """The highest share of a limit by which it was passed."""
    billed: int = 0
    charged: int = 0
    killed_calls: int = 0
    """That were open when their process was killed."""
    phantom: int = 0
    """Charged and not billed, in nano-USD."""
    late: int = 0

    def problem(self, text: str) -> None:
        self.found += 1
        if self.found <= _SHOWN:
            self.problems.append(text)

    def check(self, holds: bool, text: str) -> None:
        if not holds:
            self.problem(text)

    def limit(self, what: str, amount: int, limit: int, *, strict: bool) -> None:
        """`amount` was really used of `limit`."""
        self.keys += 1
        if amount > limit:
            self.over += 1
            self.worst = max(self.worst, amount / limit - 1)
            if strict:
                self.problem(f"{what}: {amount} was used of a limit of {limit}")


@dataclass(slots=True)
class _Sums:
    """One number for each key: of the whole, of each provider and window, department and day, and session."""

    everything: int = 0
    windowless: int = 0
    """Calls of which the provider's window is not known."""
    providers: Counter[tuple[str, int]] = field(default_factory=Counter)
    departments: Counter[tuple[str, int]] = field(default_factory=Counter)
    sessions: Counter[int] = field(default_factory=Counter)

    def add(self, row: CallRow, cost: int, tokens: int, iterations: int, *, provider: str | None = None) -> None:
        self.everything += cost
        named = PROVIDERS[row.provider]
        if provider in {named, None}:
            self.providers[named, row.provider_pin] += cost
        else:  # its worker was killed before it heard of the other provider's window
            self.windowless += 1
        for number, name in enumerate(DEPARTMENTS):
            if row.departments >> number & 1:
                self.departments[name, row.day_pin] += tokens
        self.sessions[row.session] += iterations


def judge(load: Load, processes: Sequence[Process], stored: Stored, *, naive: bool = False) -> Verdict:
    """Everything that is wrong; with `naive`, only by how much limits were passed."""
    verdict = Verdict()
    billed, charged = _Sums(), _Sums()
    records: dict[str, UsageRecord] = {}
    for record in stored.records:
        verdict.check(record.call_id not in records, f"{record.call_id}: two records")
        records[record.call_id] = record
    nameless: list[CallRow] = []
    for process in processes:
        verdict.jobs += len(process.jobs)
        for row in process.calls:
            _bill(row, billed)
            if not row.call_id:
                if not process.clean and row.stage in {CallStage.ASKED, CallStage.DROPPED}:
                    nameless.append(row)
                verdict.check(not process.clean or row.stage != CallStage.ASKED, f"{process.name}: a call never ended")
                continue
            verdict.calls += 1
            record_of_row = records.pop(row.call_id, None)
            if not naive:
                _charge(row, record_of_row, charged, verdict, process)
    lost_leases = _LOST_CHUNKS * sum(not process.clean for process in processes) if load.leased else 0
    if not naive:
        _charge_nameless(records.values(), nameless, charged, verdict)
        _compare(
            load, stored, charged, verdict, exact_windows=not (nameless or charged.windowless), lost_leases=lost_leases
        )
    verdict.billed, verdict.charged = billed.everything, charged.everything
    verdict.phantom = charged.everything - billed.everything
    _limits(load, billed, verdict, naive=naive)
    jobs = [(process, job) for process in processes for job in process.jobs]
    _rates(load, [job for _, job in jobs], verdict, naive=naive)
    if not naive and not any(process.slow for process in processes):  # whoever lapses loses its slots, and is told so
        _slots(load, jobs, verdict)
    return verdict


def _bill(row: CallRow, billed: _Sums) -> None:
    """What the provider did, whoever heard of it."""
    if row.stage == CallStage.DISPATCHED or (row.stage == CallStage.LEFT and row.kind != Kind.NOT_SENT):
        billed.add(row, row.bill, row.bill_tokens, 1)


def _charge(row: CallRow, record: UsageRecord | None, charged: _Sums, verdict: Verdict, process: Process) -> None:
    """Check the record of one call, and add what it says."""
    taken_over = row.second >= 0 and row.stage != CallStage.AMENDING
    held = (row.second, row.second_tokens) if taken_over else (row.bound, row.bound_tokens)
    clean = process.clean
    name = f"{row.call_id} ({CallStage(row.stage).name}, {Kind(row.kind).name}{'' if clean else ', killed'})"
    ended = row.stage == CallStage.LEFT
    verdict.check(ended or not clean, f"{name}: was not ended")
    verdict.check(row.settled != _ODD, f"{name}: the store did not know it when it was settled")
    verdict.killed_calls += not ended
    if record is None:
        # Only what was not sent leaves none; a killed process may have said so or not.
        verdict.check(ended and row.kind == Kind.NOT_SENT, f"{name}: no record; {row.bill} was billed")
        return
    cost, tokens = record.cost_nanousd or 0, record.tokens or 0
    if record.outcome == "expired":
        possible = {(row.bound, row.bound_tokens), (row.second, row.second_tokens)} - {(-1, 0)}
        verdict.check(not clean or process.slow, f"{name}: its process lived, and its record says it expired")
        verdict.check(row.settled == 0, f"{name}: it was settled, and its record says it expired")
        verdict.check((cost, tokens) in possible, f"{name}: expired at {cost} and {tokens} tokens, held {possible}")
    else:
        verdict.check(row.kind != Kind.NOT_SENT, f"{name}: it was not sent, and is charged {cost} ({record.outcome})")
        verdict.check(
            (cost, tokens) == (row.bill, row.bill_tokens),
            f"{name}: charged {cost} and {tokens} tokens, billed {row.bill} and {row.bill_tokens} ({record.outcome})",
        )
    if record.late:
        verdict.late += 1
        cost, tokens = max(cost, held[0]), max(tokens, held[1])
    if row.settled not in {0, _TOLD_LATER}:
        verdict.check(record.late == (row.settled == _LATE), f"{name}: late={record.late}")
    charged.add(row, cost, tokens, 1, provider=record.provider)


def _charge_nameless(
    records: Iterable[UsageRecord], nameless: Sequence[CallRow], charged: _Sums, verdict: Verdict
) -> None:
    """Records of calls whose worker was killed before it heard that they were granted."""
    possible = Counter((row.session, row.bound, row.bound_tokens) for row in nameless)
    days = [day for _, day in charged.departments]
    for record in records:
        session = int((record.session or "-1").rpartition("-")[2])
        cost, tokens = record.cost_nanousd or 0, record.tokens or 0
        known = possible[session, cost, tokens] > 0 and record.outcome == "expired"
        verdict.check(known, f"{record.call_id}: {cost} charged ({record.outcome}), and nobody made such a call")
        possible[session, cost, tokens] -= 1
        verdict.killed_calls += 1
        charged.everything += cost
        charged.sessions[session] += 1
        for name in record.departments:
            charged.departments[name, max(days, default=0)] += tokens


def _compare(
    load: Load, stored: Stored, charged: _Sums, verdict: Verdict, *, exact_windows: bool, lost_leases: int
) -> None:
    """The store's counters, against the sum of what each call was charged."""

    def same(what: str, reading: Reading, amount: int, *, chunk: int = 0) -> None:
        verdict.check(reading.held == 0, f"{what}: {reading.held} is held, and nobody is left")
        lost = chunk * lost_leases
        verdict.check(
            amount <= reading.used <= amount + lost,
            f"{what}: the store says {reading.used}, the calls make {amount}{f', and up to {lost} of leases' if lost else ''}",
        )

    verdict.check(stored.open_holds == 0, f"{stored.open_holds} holds are open, and nobody is left")
    same("everything", stored.everything, charged.everything, chunk=LEASED_CALLS * MEAN_COST)
    for session, reading in stored.sessions.items():
        same(f"session {session}", reading, charged.sessions[session])
    last_day = max((day for _, day in charged.departments), default=0)
    for name, reading in zip(DEPARTMENTS, stored.departments, strict=True):
        same(name, reading, charged.departments[name, last_day], chunk=LEASED_CALLS * MEAN_TOKENS)
    for user, reading in enumerate(stored.slots):
        same(f"slots of user {user}", reading, 0)
    for name, reading in zip(PROVIDERS, stored.providers, strict=True):
        if exact_windows and reading.resets_at_ms is not None:
            pin = reading.resets_at_ms - load.provider_period_ms
            same(f"{name} from {pin}", reading, charged.providers[name, pin], chunk=LEASED_CALLS * MEAN_COST)
        verdict.check(reading.held == 0, f"{name}: {reading.held} is held, and nobody is left")
    pins: dict[str, list[int]] = defaultdict(list)
    for name, pin in charged.providers:
        pins[name].append(pin)
    for name, begun in pins.items():
        begun.sort()
        for first, second in itertools.pairwise(begun):
            apart = second - first
            verdict.check(apart >= load.provider_period_ms, f"{name}: two windows begin {apart} ms apart")


def _limits(load: Load, billed: _Sums, verdict: Verdict, *, naive: bool) -> None:
    """What was billed, against every limit."""
    strict = not naive
    verdict.limit("everything", billed.everything, load.budget_nanousd, strict=strict)
    for (name, day), tokens in billed.departments.items():
        limit = load.department_tokens(DEPARTMENTS.index(name))
        verdict.limit(f"{name} on {day}", tokens, limit, strict=strict)
    for session, count in billed.sessions.items():
        verdict.limit(f"session {session}", count, load.iterations, strict=strict)
    if not naive:  # which pins no windows
        for (name, pin), cost in billed.providers.items():
            verdict.limit(f"{name} from {pin}", cost, load.provider_nanousd, strict=strict)


def _rates(load: Load, jobs: Iterable[JobRow], verdict: Verdict, *, naive: bool) -> None:
    """No stretch of a period in which more jobs were admitted than the rate. Each surely between two instants."""
    admitted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for job in jobs:
        if job.stage in {JobStage.OPEN, JobStage.CLOSING}:
            admitted[job.user].append((job.asked_ns, job.opened_ns))
    period_ns = load.rate_period_ms * 1_000_000 - _SLACK_NS
    for user, times in admitted.items():
        times.sort()
        ends = sorted(opened for _, opened in times)
        most = 0
        # Those that were asked for after `start`, and opened before the period was over.
        at_end = 0
        for number, (start, _) in enumerate(times):
            while at_end < len(ends) and ends[at_end] <= start + period_ns:
                at_end += 1
            # Whoever was asked for before `start` and opened before the end is counted in `at_end` and not meant.
            most = max(most, at_end - number)
        verdict.limit(f"rate of user {user}", most, load.rate, strict=not naive)


def _slots(load: Load, jobs: Iterable[tuple[Process, JobRow]], verdict: Verdict) -> None:
    """At no instant more jobs open than there are slots. Each surely open between two instants."""
    changes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for process, job in jobs:
        if job.stage in {JobStage.OPEN, JobStage.CLOSING}:
            changes[job.user].append((job.opened_ns, 1))
            changes[job.user].append((job.closing_ns if job.stage == JobStage.CLOSING else process.ended_ns, -1))
    for user, steps in changes.items():
        steps.sort()
        open_now = most = 0
        for _, step in steps:
            open_now += step
            most = max(most, open_now)
        verdict.limit(f"slots of user {user}", most, load.slots, strict=True)
