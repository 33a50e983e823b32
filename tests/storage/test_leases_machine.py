"""Random histories of several workers with leases: what they admit together never passes a limit."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import pytest
from hypothesis import HealthCheck, event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.storage.conftest import FACTORIES
from tests.storage.leases_kit import leased, turn
from tests.storage.values import DAY_MS, HOUR_MS, SECOND_MS, START, Make, meter, record

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Plan, Receipt, Refused, Settlement
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling, Sliding, Slots

LAPSE_MS: Final = 100_000
WORKERS: Final = 3

T = TypeVar("T")


LEASED: Final = [
    leased(120, 30, window=Rolling(60 * SECOND_MS), subject="rolling"),
    leased(200, 40, window=Calendar("hour"), subject="hour"),
    leased(150, 25, window=Lifetime(HOUR_MS), subject="lifetime"),
    leased(60, 20, window=Sliding(10 * SECOND_MS, 5), subject="sliding"),
    leased(100, 30, window=Rolling(60 * SECOND_MS), subject="refunded", refund=True),
    leased(None, 20, window=Calendar("hour"), subject="free"),
]
DIRECT: Final = [meter(Calendar("hour"), 60, subject="direct"), meter(Slots(), 6, subject="slots")]


@dataclass
class Worker:
    """One process."""

    owner: str
    storage: LeasingStorage
    alive: bool = True


@dataclass
class Call:
    """What was granted, and what has become of it."""

    worker: Worker
    claims: tuple[Claim, ...]
    receipts: tuple[Receipt, ...]
    at_ms: int
    actuals: tuple[int, ...] | None = None
    given_back: list[Receipt] = field(default_factory=list)


class Leases(RuleBasedStateMachine):
    """Workers that share meters through one storage. The provider bills what they admit."""

    kind: ClassVar[str] = "memory"
    reached: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FrozenClock(START)
        self.make: Make = FACTORIES[self.kind](Path(self.folder.name))
        self.numbers = iter(range(10**6))
        self.calls: dict[str, Call] = {}
        self.written: dict[str, int] = {}
        self.meters: list[Meter] = []
        self.mortal = False

    def worker(self) -> Worker:
        number = next(self.numbers)
        storage = LeasingStorage(self.inner, clock=self.clock, workers=WORKERS, skew_ms=0)
        return Worker(f"owner-{number}", storage)

    def teardown(self) -> None:
        try:
            self.all_leave()
        finally:
            self.run(self.workers[0].storage.aclose())
            self.runner.close()
            self.folder.cleanup()

    def all_leave(self) -> None:
        for call_id, call in self.calls.items():
            if call.worker.alive and call.actuals is None:
                self.end(call_id, tuple(claim.amount for claim in call.claims), recorded=False)
        for worker in self.workers:
            self.run(worker.storage.retire(worker.owner))
        if not self.mortal:
            self.all_is_charged()
        self.run(turn())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def note(self, what: str) -> None:
        self.reached[what] += 1
        event(what)

    @property
    def now(self) -> int:
        return self.clock.now_ms()

    # ------------------------------------------------------------------------------------- the bill

    def billed(self, on: Meter) -> dict[int, tuple[int, int]]:
        """For each instance of the window what the provider may bill, and by how much that is above what was held."""
        bill: dict[int, tuple[int, int]] = {}
        for call in self.calls.values():
            for number, receipt in enumerate(call.receipts):
                if receipt.claim.meter.key != on.key:
                    continue
                held = receipt.claim.amount
                actual = held if call.actuals is None else call.actuals[number]
                sum_, over = bill.get(receipt.pin, (0, 0))
                bill[receipt.pin] = (sum_ + actual, over + max(0, actual - held))
        return bill

    def sliding(self, on: Meter, bill: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
        """The sums over every stretch of sub-buckets that count together."""
        window = on.window
        assert isinstance(window, Sliding)
        stretches = {}
        for newest in bill:
            parts = [bill[pin] for pin in bill if newest - window.buckets <= pin <= newest]
            stretches[newest] = (sum(part[0] for part in parts), sum(part[1] for part in parts))
        return stretches

    def all_is_charged(self) -> None:
        """When everybody has gone in good order, the store has charged what was billed: no more, no less."""
        readings = self.run(self.inner.read(self.meters))
        for on, reading in zip(self.meters, readings, strict=True):
            if isinstance(on.window, Slots):
                assert reading.held == 0
                continue
            assert reading.held == 0, on.subject
            bill = self.billed(on)
            if isinstance(on.window, Sliding):
                newest = max([self.now // on.window.bucket_ms, *bill])
                expected = sum(b[0] for pin, b in bill.items() if pin >= newest - on.window.buckets)
            else:
                current = [
                    receipt.pin
                    for call in self.calls.values()
                    for receipt in call.receipts
                    if receipt.claim.meter.key == on.key and (receipt.resets_at_ms or 0) > self.now
                ]
                expected = bill[current[0]][0] if current else 0
            assert reading.used == expected, f"{on.subject}: charged {reading.used}, billed {expected}"

    @invariant()
    def never_above_a_limit(self) -> None:
        """What the provider may bill, crashes included, is within the limit, but for what was used above a hold."""
        for on in self.meters:
            if on.limit is None or isinstance(on.window, Slots):
                continue
            bill = self.billed(on)
            sums = self.sliding(on, bill) if isinstance(on.window, Sliding) else bill
            for pin, (total, over) in sums.items():
                assert total <= on.limit + over, (
                    f"{on.subject} at {pin}: {total} of {on.limit}, {over} of it above holds"
                )

    # ----------------------------------------------------------------------------------------- rules

    @initialize(first=st.integers(0, len(LEASED) - 1), second=st.integers(0, len(LEASED) - 1), mortal=st.booleans())
    def begin(self, first: int, second: int, mortal: bool) -> None:
        self.mortal = mortal
        self.inner = self.make(self.clock, lapse_ms=LAPSE_MS if mortal else 400 * DAY_MS)
        self.workers = [self.worker() for _ in range(WORKERS)]
        self.meters = [LEASED[first], *([LEASED[second]] if second != first else []), *DIRECT]

    def claims(self, wanted: Sequence[tuple[int, int]]) -> tuple[Claim, ...]:
        found: dict[str, Claim] = {}
        for which, amount in wanted:
            on = self.meters[which % len(self.meters)]
            found.setdefault(on.key, Claim(on, min(amount, 1) if isinstance(on.window, Slots) else amount))
        return tuple(found.values())

    def alive(self, which: int) -> Worker:
        return self.workers[which % len(self.workers)]

    wanted = st.lists(
        st.tuples(st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3]), st.sampled_from([0, 1, 1, 1, 1, 2, 3, 5, 20])),
        min_size=1,
        max_size=3,
    )

    @rule(
        which=st.integers(0, 5),
        plans=st.lists(wanted, min_size=1, max_size=2),
        count=st.integers(1, 12),
        come=st.booleans(),
    )
    def reserve(self, which: int, plans: list[list[tuple[int, int]]], count: int, come: bool) -> None:
        for _ in range(count):
            call_id = f"call-{next(self.numbers)}"
            self.ask(call_id, self.alive(which), [self.claims(plan) for plan in plans])
        if come:
            self.run(turn())

    def ask(self, call_id: str, worker: Worker, plans: Sequence[tuple[Claim, ...]]) -> None:
        before = self.run(self.inner.open_holds())
        answer: Granted | Refused | Ended | None = None
        if len(plans) == 1:
            answer = self.run(admit(worker, (Bundle(call_id, plans[0]),)))
        if answer is None:
            answer = self.run(worker.storage.reserve(worker.owner, [(Bundle(call_id, claims),) for claims in plans]))
        if isinstance(answer, Granted):
            claims = plans[answer.plan]
            assert [receipt.claim for receipt in answer.receipts] == list(claims)
            assert all(receipt.taken for receipt in answer.receipts)
            self.calls[call_id] = Call(worker, claims, answer.receipts, self.now)
            self.note("granted")
            if self.run(self.inner.open_holds()) == before and claims:
                self.note("granted without the store")
            again = self.run(worker.storage.reserve(worker.owner, [(Bundle(call_id, claims),) for claims in plans]))
            assert isinstance(again, Granted)
            assert again.replayed
            assert again.receipts == answer.receipts
        else:
            assert isinstance(answer, Refused)
            for claims, states in zip(plans, answer.states, strict=True):
                assert [state.claim for state in states] == list(claims)
                assert not all(state.fits for state in states)
            self.note("refused")

    def open_calls(self) -> list[str]:
        return [call_id for call_id, call in self.calls.items() if call.actuals is None and call.worker.alive]

    @precondition(lambda self: self.open_calls())
    @rule(
        which=st.integers(0, 50),
        count=st.integers(1, 8),
        used=st.lists(st.sampled_from([-1, -1, 0, 0, 1, 2]), min_size=3, max_size=3),
        recorded=st.booleans(),
        again=st.booleans(),
    )
    def settle(self, which: int, count: int, used: list[int], recorded: bool, again: bool) -> None:
        for _ in range(count):
            if not (calls := self.open_calls()):
                break
            call_id = calls[which % len(calls)]
            claims = self.calls[call_id].claims
            actuals = tuple(max(0, claim.amount + used[n % 3] * (n + 1)) for n, claim in enumerate(claims))
            self.end(call_id, actuals, recorded=recorded)
            if again:
                self.end(call_id, tuple(actual + 5 for actual in actuals), recorded=recorded, again=True)

    def end(self, call_id: str, actuals: tuple[int, ...], *, recorded: bool, again: bool = False) -> None:
        call = self.calls[call_id]
        written = record(call_id, sum(actuals), at_ms=self.now) if recorded else None
        settlement = Settlement(call_id, actuals, written, call.receipts)
        (settled,) = self.run(_await(call.worker.storage.settle((settlement,))))
        if again:
            assert settled.status == "duplicate"
            self.note("settled twice")
            return
        assert settled.status in {"settled", "late"} or not actuals
        assert [*settled.overages] == [
            max(0, actual - claim.amount) if not isinstance(claim.meter.window, Slots) else 0
            for claim, actual in zip(call.claims, actuals, strict=True)
        ]
        if any(settled.overages):
            self.note("used more than was held")
        call.actuals = actuals
        if recorded:
            self.written[call_id] = sum(actuals)

    @precondition(lambda self: self.open_calls())
    @rule(which=st.integers(0, 50), wanted=wanted)
    def amend(self, which: int, wanted: list[tuple[int, int]]) -> None:
        calls = self.open_calls()
        call_id = calls[which % len(calls)]
        call, claims = self.calls[call_id], self.claims(wanted)
        answer = self.run(call.worker.storage.amend(call.worker.owner, Bundle(call_id, claims)))
        if isinstance(answer, Granted):
            assert [receipt.claim.meter for receipt in answer.receipts] == [claim.meter for claim in claims]
            call.claims, call.receipts = claims, answer.receipts
            self.note("amended")
        elif isinstance(answer, Ended):
            assert answer.reason == "expired"
            call.actuals = tuple(claim.amount for claim in call.claims)
            self.note("amended too late")
        else:
            self.note("amendment refused")

    @rule(step_ms=st.sampled_from([1, 100, 500, 1_000, 2_000, 5_000, 10_000, 60_000, 110_000]))
    def tick(self, step_ms: int) -> None:
        self.clock.advance(ms=step_ms)

    @rule()
    def beat(self) -> None:
        for worker in self.workers:
            beat = self.run(worker.storage.heartbeat(worker.owner))
            assert not any(call_id.startswith("lease") for call_id in beat.expired)
            if beat.lapsed:
                self.note("lapsed")
        self.run(turn())

    @precondition(lambda self: self.mortal)
    @rule(which=st.integers(0, 5))
    def crash(self, which: int) -> None:
        """`kill -9`: the process is gone, its calls may have been billed; the store is told nothing."""
        self.run(turn())
        self.workers.remove(worker := self.alive(which))
        worker.alive = False
        self.workers.append(self.worker())
        self.note("crashed")

    @rule(which=st.integers(0, 5))
    def retire(self, which: int) -> None:
        """A process that goes in good order, and comes again."""
        worker = self.alive(which)
        for call_id in self.open_calls():
            call = self.calls[call_id]
            if call.worker is worker:
                self.end(call_id, tuple(claim.amount for claim in call.claims), recorded=True)
        self.run(worker.storage.retire(worker.owner))
        self.note("retired")

    @invariant()
    def records_are_written_once(self) -> None:
        """Every settled call that has a record is in the ledger, once."""
        found = Counter(found.call_id for found in self.run(self.inner.records()))
        assert found == Counter(self.written.keys())


async def admit(worker: Worker, plan: Plan) -> Granted | None:
    """In the loop, as guards do: a chunk may have to be fetched."""
    return worker.storage.admit(worker.owner, plan)


async def _await(pending: Awaitable[T]) -> T:
    return await pending


def _machine(kind: str) -> type[Leases]:
    return type(f"Leases over {kind}", (Leases,), {"kind": kind, "reached": Counter()})


MUST_REACH: Final = {
    "granted",
    "granted without the store",
    "refused",
    "settled twice",
    "used more than was held",
    "amended",
    "amendment refused",
    "lapsed",
    "crashed",
    "retired",
}


def _explore(kind: str, *, examples: int, steps: int) -> Counter[str]:
    machine = _machine(kind)
    seed(1)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )
    return machine.reached


@pytest.mark.parametrize("kind", ["memory", "redis", "sqlite"])
def test_workers_never_admit_more_than_a_limit(kind: str) -> None:
    """Whatever workers do, crash or come back as, what they admit together is within every limit; and when all went
    in good order, the store has charged exactly that."""
    reached = _explore(kind, examples=60 if kind == "memory" else 12, steps=30)
    if kind == "memory":
        assert set(reached) >= MUST_REACH


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FACTORIES))
def test_long_histories(kind: str) -> None:
    """The same over many more and longer histories."""
    _explore(kind, examples=400 if kind == "memory" else 60, steps=60)
