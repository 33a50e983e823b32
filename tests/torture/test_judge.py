"""The judge of the torture finds what it is there to find, each on books that are right but for one thing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from tests.torture.judge import Process, Stored, judge
from tests.torture.load import DEPARTMENTS, PROVIDERS, USERS, Load
from tests.torture.truth import CallRow, CallStage, JobRow, JobStage, Kind

from asgi_llm_guard.claims import Reading
from asgi_llm_guard.usage import UsageRecord

LOAD = Load(seed=1, calls=1_000)
SECOND_NS = 1_000_000_000
NOTHING = Reading(0, 0, None)


@dataclass
class Books:
    """Two calls of a process that ended well, one of a process that was killed; and what a right store says of them."""

    calls: list[CallRow] = field(default_factory=lambda: [_call("a-1", bill=700), _call("a-2", bill=300)])
    killed: list[CallRow] = field(default_factory=lambda: [_call("b-1", bill=400, stage=CallStage.DISPATCHED)])
    jobs: list[JobRow] = field(default_factory=list)
    records: list[UsageRecord] = field(
        default_factory=lambda: [_record("a-1", 700), _record("a-2", 300), _record("b-1", 1_000, outcome="expired")]
    )
    used: int = 2_000
    tokens: int = 20
    iterations: int = 3
    open_holds: int = 0
    held_slots: int = 0

    def problems(self, load: Load = LOAD) -> list[str]:
        departments = [Reading(self.tokens, 0, 9), *[NOTHING] * (len(DEPARTMENTS) - 1)]
        stored = Stored(
            records=self.records,
            everything=Reading(self.used, 0, None),
            providers=[NOTHING] * len(PROVIDERS),
            departments=departments,
            slots=[Reading(0, self.held_slots, None), *[NOTHING] * (USERS - 1)],
            sessions={1: Reading(self.iterations, 0, None)},
            open_holds=self.open_holds,
        )
        clean = Process(name="a", calls=self.calls, jobs=self.jobs, clean=True, ended_ns=0)
        killed = Process(name="b", calls=self.killed, jobs=[], clean=False, ended_ns=0)
        return judge(load, [clean, killed], stored).problems


def _call(call_id: str, *, bill: int, stage: CallStage = CallStage.LEFT, kind: Kind = Kind.MEASURED) -> CallRow:
    return CallRow(
        kind=kind,
        provider=0,
        departments=1,
        session=1,
        bound=1_000,
        bound_tokens=10,
        bill=bill,
        bill_tokens=bill // 100 if stage == CallStage.LEFT else 4,
        provider_pin=0,
        day_pin=0,
        call_id=call_id,
        stage=stage,
        settled=int(stage == CallStage.LEFT),
    )


def _record(call_id: str, cost: int, *, outcome: str = "measured", late: bool = False) -> UsageRecord:
    return UsageRecord(
        call_id=call_id,
        at_ms=0,
        provider=PROVIDERS[0],
        session="session-1",
        departments=(DEPARTMENTS[0],),
        cost_nanousd=cost,
        tokens=cost // 100,
        outcome=outcome,  # type: ignore[arg-type]
        late=late,
    )


def test_right_books_have_no_problem() -> None:
    """What a right store says, a killed call charged its hold included, is accepted."""
    assert Books().problems() == []


def test_a_settled_call_without_a_record_is_found() -> None:
    """No settled spend may be lost."""
    books = Books(used=1_300, tokens=13, iterations=2)
    del books.records[0]
    assert books.problems() == ["a-1 (LEFT, MEASURED): no record; 700 was billed"]


def test_a_killed_call_that_was_billed_and_given_back_is_found() -> None:
    """Refund on expiry: billed, and nothing charged."""
    books = Books(used=1_000, tokens=10, iterations=2)
    del books.records[2]
    assert books.problems() == ["b-1 (DISPATCHED, MEASURED, killed): no record; 400 was billed"]


@pytest.mark.parametrize("cost", [0, 300, 701, 1_400])
def test_a_call_that_is_charged_anything_but_its_bill_is_found(cost: int) -> None:
    """Stored is billed, exactly, where nobody was killed."""
    books = Books(used=1_300 + cost, tokens=13 + cost // 100)
    books.records[0] = _record("a-1", cost)
    (problem,) = books.problems()
    assert problem.startswith(f"a-1 (LEFT, MEASURED): charged {cost}")


def test_a_second_record_of_one_call_is_found() -> None:
    """Each call is charged at most once."""
    books = Books()
    books.records.append(_record("a-1", 700))
    assert books.problems() == ["a-1: two records"]


def test_a_counter_that_differs_from_the_ledger_is_found() -> None:
    """The counters are the sum of what each call was charged."""
    assert Books(used=2_001).problems() == ["everything: the store says 2001, the calls make 2000"]
    assert Books(tokens=21).problems() == ["department-0: the store says 21, the calls make 20"]
    assert Books(iterations=2).problems() == ["session 1: the store says 2, the calls make 3"]


def test_a_charge_for_a_call_that_nobody_made_is_found() -> None:
    """A call that was refused or dropped is charged nothing, as long as its process lived to say so."""
    books = Books(used=2_500, tokens=25, iterations=4)
    books.calls.append(_call("", bill=0, stage=CallStage.DROPPED))
    books.records.append(_record("a-3", 500, outcome="expired"))
    assert books.problems() == ["a-3: 500 charged (expired), and nobody made such a call"]


def test_a_killed_worker_may_have_been_granted_a_call_without_hearing_of_it() -> None:
    """Then what is charged is exactly what it has asked for, and once."""
    books = Books(used=3_000, tokens=30, iterations=4)
    books.killed.append(_call("", bill=0, stage=CallStage.ASKED))
    books.records.append(_record("b-2", 1_000, outcome="expired"))
    assert books.problems() == []

    books.records.append(_record("b-3", 1_000, outcome="expired"))
    assert books.problems()[0] == "b-3: 1000 charged (expired), and nobody made such a call"


def test_an_expiry_of_a_process_that_lived_is_found() -> None:
    """Unless its heartbeats were late, which the worker notes."""
    books = Books(used=2_300, tokens=23)
    books.calls[0] = books.calls[0]._replace(settled=0)
    books.records[0] = _record("a-1", 1_000, outcome="expired")
    assert books.problems() == ["a-1 (LEFT, MEASURED): its process lived, and its record says it expired"]


def test_a_late_settlement_is_charged_its_hold() -> None:
    """It leaves its own record, and the counter keeps what was held."""
    books = Books(used=2_300, tokens=23)
    books.records[0] = _record("a-1", 700, late=True)
    books.calls[0] = books.calls[0]._replace(settled=2)
    assert books.problems() == []


def test_what_is_held_when_nobody_is_left_is_found() -> None:
    """Owners that died have lapsed; nothing of them stays held."""
    assert Books(open_holds=1, held_slots=1).problems() == [
        "1 holds are open, and nobody is left",
        "slots of user 0: 1 is held, and nobody is left",
    ]


def test_more_billed_than_the_limit_is_found() -> None:
    """Overshoot is measured by what was billed, and not by what the store says."""
    problems = Books().problems(replace(LOAD, iterations=2))
    assert problems == ["session 1: 3 was used of a limit of 2"]


def test_more_jobs_in_a_period_than_the_rate_are_found() -> None:
    """Of jobs that were surely admitted within one period; a second period begins anew."""
    soon = [JobRow(1, n * 1_000, n * 1_000 + 500, n * 1_000 + 900, JobStage.CLOSING) for n in range(LOAD.rate)]
    later = [
        job._replace(asked_ns=job.asked_ns + 3 * SECOND_NS, opened_ns=job.opened_ns + 3 * SECOND_NS) for job in soon
    ]
    assert Books(jobs=[*soon, *[job._replace(closing_ns=job.opened_ns + 1) for job in later]]).problems() == []

    one_more = JobRow(1, SECOND_NS, SECOND_NS + 1, SECOND_NS + 2, JobStage.CLOSING)
    assert Books(jobs=[*soon, one_more]).problems() == [
        f"rate of user 1: {LOAD.rate + 1} was used of a limit of {LOAD.rate}"
    ]


def test_more_jobs_at_the_same_time_than_slots_are_found() -> None:
    """Each surely open from when it was admitted until it began to end."""
    jobs = [JobRow(1, n, 100 + n, 1_000, JobStage.CLOSING) for n in range(LOAD.slots + 1)]
    assert Books(jobs=jobs).problems() == [f"slots of user 1: {LOAD.slots + 1} was used of a limit of {LOAD.slots}"]
    jobs[0] = jobs[0]._replace(closing_ns=101)
    assert Books(jobs=jobs).problems() == []
