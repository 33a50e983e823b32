"""What the pure functions promise beside the contract: what they touch, and bounds over random histories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import msgspec
import pytest
from tests.storage.values import HOUR_MS, SECOND_MS, START_MS, WINDOWS, claim, draft, meter, record, sized

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Receipt, Refused, Settlement
from asgi_llm_guard.storage import cells
from asgi_llm_guard.storage.counting import Cell, Members, counts_until
from asgi_llm_guard.storage.memory import MemoryLedger, MemoryMembers
from asgi_llm_guard.storage.state import Needs, State
from asgi_llm_guard.windows import BUCKET, CALENDAR, LIFETIME, ROLLING, SLIDING, Bucket, Distinct, Sliding, Window

OWNERS = ("p1", "p2", "p3")


def new_state() -> State:
    return State(members=MemoryMembers(), ledger=MemoryLedger())


def granted(state: State, call_id: str, now_ms: int, *claims: Claim, owner: str = "p1") -> bool:
    answer = cells.reserve(state, owner, ((Bundle(call_id, claims),),), now_ms)
    return isinstance(answer, Granted)


# ------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("window", [w for w in WINDOWS.values() if not isinstance(w, Distinct)])
def test_a_cell_survives_its_row(window: Window) -> None:
    """A cell that is dumped and loaded is the same, sub-buckets in the same order."""
    state = new_state()
    on = meter(window, 50)
    for number in range(5):
        assert granted(state, str(number), START_MS + number * 61_000, claim(on, 7))
    cells.settle(state, (Settlement("2", (3,)),), START_MS + 300_000)
    cell = state.cells[on.key]
    row = cell.dump()
    again = Cell.load(*row)
    assert again == cell
    assert list(again.parts or ()) == list(cell.parts or ())
    assert all(isinstance(column, int) for column in row[:5])


def test_a_sliding_cell_counts_until_its_newest_sub_bucket_leaves() -> None:
    """It is never said to be over earlier, whatever its numbers are; and hardly later, as they are in our time."""
    for size in (1, 7, 1_000):
        for buckets in (1, 2, 60):
            for first in (0, 1, 5, START_MS // 1_000):
                for newest in (first, first + 1, first + buckets):
                    parts = {index: [1, 0] for index in sorted({first, newest})}
                    cell = Cell(SLIDING, len(parts), 0, newest, (first + buckets + 1) * size, parts)
                    leaves_ms = (newest + buckets + 1) * size
                    assert counts_until(cell) >= leaves_ms
                    assert first < 10 or counts_until(cell) <= leaves_ms + 1


def test_other_cells_count_until_they_end() -> None:
    """An instance, and a bucket, are over at their end; so is a sliding window in which nothing is counted."""
    for kind in (LIFETIME, ROLLING, CALENDAR, BUCKET):
        assert counts_until(Cell(kind, 1, 0, 5, 9_000)) == 9_000
    assert counts_until(Cell(SLIDING, 0, 0, 20, 9_000, {})) == 9_000


# ------------------------------------------------------------------------- random histories


class History:
    """A random walk over the verbs, replayable from its seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now_ms = START_MS
        limit = 12
        kinds = list(WINDOWS.values())
        self.meters = [
            meter(sized(window, limit), limit, subject=f"{name}-{copy}", refund=copy == 2, enforce=copy != 3)
            for name, window in zip(WINDOWS, kinds, strict=True)
            for copy in range(4)
        ]
        self.calls: list[str] = []

    def claims(self) -> tuple[Claim, ...]:
        chosen = self.random.sample(self.meters, self.random.randint(0, 6))
        return tuple(claim(on, self.random.randint(0, 4), str(self.random.randint(0, 15))) for on in chosen)

    def call_id(self) -> str:
        if self.calls and self.random.random() < 0.6:
            return self.random.choice(self.calls[-12:])
        self.calls.append(f"call-{len(self.calls)}")
        return self.calls[-1]

    def receipts(self) -> tuple[Receipt, ...]:
        """Receipts of a hold that the store may have lost."""
        lost = []
        for asked in self.claims():
            window = asked.meter.window
            pin = self.now_ms // window.bucket_ms if isinstance(window, Sliding) else self.now_ms
            lost.append(Receipt(asked, True, True, 0, 0, pin, self.now_ms + HOUR_MS))
        return tuple(lost)

    def step(self) -> Callable[[State], object]:
        """The next operation, as a function of the state."""
        random = self.random
        steps_ms = (0, 1, 250, SECOND_MS, 6 * SECOND_MS, 61 * SECOND_MS, HOUR_MS, -5 * SECOND_MS)
        self.now_ms += random.choices(steps_ms, (60, 10, 10, 10, 8, 2, 1, 3))[0]
        now_ms, owner, call_id = self.now_ms, random.choice(OWNERS), self.call_id()
        verb = random.choices(
            ("reserve", "settle", "amend", "heartbeat", "retire", "read", "reset"), (50, 40, 15, 15, 2, 3, 1)
        )[0]
        if verb == "reserve":
            plans = [(Bundle(call_id, self.claims(), draft(call_id, cost=1)),) for _ in range(random.randint(1, 2))]
            return Reserve(owner, plans, now_ms)
        if verb == "settle":
            actuals = tuple(random.choice((None, None, 0, 1, 2, 6)) for _ in range(6))
            written = record(call_id, 1) if random.random() < 0.7 else None
            receipts = self.receipts() if random.random() < 0.3 else ()
            return Settle((Settlement(call_id, actuals, written, receipts),), now_ms)
        if verb == "amend":
            return Amend(owner, Bundle(call_id, self.claims(), draft(call_id, cost=2)), now_ms)
        if verb == "heartbeat":
            return lambda state: cells.heartbeat(state, owner, now_ms)
        if verb == "retire":
            return lambda state: cells.retire(state, owner, now_ms)
        chosen = tuple(random.sample(self.meters, 3))
        if verb == "read":
            return lambda state: cells.read(state, chosen, now_ms)
        return lambda state: cells.reset(state, chosen, now_ms)


class Reserve:
    def __init__(self, owner: str, plans: Sequence[Sequence[Bundle]], now_ms: int) -> None:
        self.owner, self.plans, self.now_ms = owner, plans, now_ms

    def __call__(self, state: State) -> object:
        return cells.reserve(state, self.owner, self.plans, self.now_ms)

    def needs(self, needs: Needs) -> None:
        needs.of_plans(self.plans)


class Amend:
    def __init__(self, owner: str, bundle: Bundle, now_ms: int) -> None:
        self.owner, self.bundle, self.now_ms = owner, bundle, now_ms

    def __call__(self, state: State) -> object:
        return cells.amend(state, self.owner, self.bundle, self.now_ms)

    def needs(self, needs: Needs) -> None:
        needs.of_bundle(self.bundle)


class Settle:
    def __init__(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        self.settlements, self.now_ms = settlements, now_ms

    def __call__(self, state: State) -> object:
        return cells.settle(state, self.settlements, self.now_ms)

    def needs(self, needs: Needs) -> None:
        needs.of_settlements(self.settlements)


def copied(members: Members) -> MemoryMembers:
    assert isinstance(members, MemoryMembers)
    copy = MemoryMembers()
    for key, member, until_ms in members.items():
        copy.touch(key, member, until_ms)
    return copy


def rows(state: State) -> dict[str, tuple[object, ...]]:
    return {key: cell.dump() for key, cell in state.cells.items()}


@pytest.mark.parametrize("seed", range(12))
def test_needs_name_all_that_a_verb_touches(seed: int) -> None:
    """A state with nothing but what `Needs` asks for answers, and ends up, like one that knows everything."""
    history, whole = History(seed), new_state()
    answers: set[str] = set()
    for _ in range(400):
        operation = history.step()
        if not isinstance(operation, Reserve | Amend | Settle):
            operation(whole)
            continue
        needs = Needs()
        operation.needs(needs)
        for call_id in list(needs.calls):
            needs.of_hold(whole.holds.get(call_id))
            needs.of_hold(whole.ended[call_id].hold if call_id in whole.ended else None)
        lapsed = {name for name, owner in whole.owners.items() if 0 < owner.lapse_at_ms <= operation.now_ms}
        for hold in whole.holds.values():
            if hold.owner in lapsed:
                needs.of_hold(hold)
        part = State(
            members=copied(whole.members),
            ledger=MemoryLedger(),
            cells={key: Cell.load(*whole.cells[key].dump()) for key in needs.keys if key in whole.cells},
            holds={c: msgspec.structs.replace(whole.holds[c]) for c in needs.calls if c in whole.holds},
            ended={c: whole.ended[c] for c in needs.calls if c in whole.ended},
            owners={name: msgspec.structs.replace(owner) for name, owner in whole.owners.items()},
        )
        for call_id in needs.calls:
            if call_id in whole.ledger:
                part.ledger.append(record(call_id, 0))
        before = rows(whole)
        answer = operation(part)
        assert operation(whole) == answer
        answers.add(type(answer).__name__)
        changed = {key: row for key, row in rows(whole).items() if before.get(key) != row}
        assert set(changed) <= needs.keys
        assert {key: row for key, row in rows(whole).items() if key in needs.keys} == rows(part)
        assert {c: h for c, h in whole.holds.items() if c in needs.calls} == part.holds
    assert answers >= {"Granted", "Refused", "Ended", "tuple"}


@pytest.mark.parametrize("seed", range(12))
def test_refusals_and_repetitions_leave_no_trace(seed: int) -> None:
    """Over a random history, whatever is refused, repeated or ended leaves every cell and hold as it was."""
    history, state = History(1_000 + seed), new_state()
    seen: set[type] = set()
    for _ in range(400):
        operation = history.step()
        cells.sweep(state, history.now_ms)
        cells.read(state, history.meters, history.now_ms)  # lets expired ids go, which any verb may
        before = rows(state), set(state.holds), copied(state.members).items()
        answer = operation(state)
        if isinstance(answer, Refused | Ended) or (isinstance(answer, Granted) and answer.replayed):
            seen.add(type(answer))
            assert (rows(state), set(state.holds), copied(state.members).items()) == before
    assert seen == {Refused, Ended, Granted}


@pytest.mark.parametrize("seed", range(12))
def test_held_is_the_sum_of_open_holds(seed: int) -> None:
    """Over a random history no counter is negative, and what a cell holds is what open calls have pinned to it."""
    history, state = History(2_000 + seed), new_state()
    for _ in range(400):
        history.step()(state)
        expected: dict[str, int] = {}
        for hold in state.holds.values():
            for receipt in hold.receipts:
                on = receipt.claim.meter
                cell = state.cells.get(on.key)
                if not receipt.taken or cell is None or isinstance(on.window, Distinct):
                    continue
                if isinstance(on.window, Sliding):
                    current = receipt.pin in (cell.parts or ())
                else:
                    current = receipt.pin in (cell.start, 0) or isinstance(on.window, Bucket)
                if current:
                    expected[on.key] = expected.get(on.key, 0) + receipt.claim.amount
        for key, cell in state.cells.items():
            assert cell.used >= 0
            assert cell.held == expected.get(key, 0)
            if cell.parts is not None:
                assert cell.used == sum(used for used, _ in cell.parts.values())
                assert cell.held == sum(held for _, held in cell.parts.values())
                assert list(cell.parts) == sorted(cell.parts)


@pytest.mark.parametrize("window", [w for w in WINDOWS.values() if not isinstance(w, Distinct | Bucket)])
@pytest.mark.parametrize("seed", range(4))
def test_the_limit_is_a_bound_whenever_estimates_are(window: Window, seed: int) -> None:
    """`used + held <= limit` at every instant as long as no call uses more than it held, crashes included."""
    random, state, now_ms = Random(seed), new_state(), START_MS
    on = meter(window, 20)
    open_calls: list[str] = []
    peak = 0
    for number in range(500):
        now_ms += random.choice((0, 10, SECOND_MS, 5 * SECOND_MS))
        call_id = str(number)
        if granted(state, call_id, now_ms, claim(on, random.randint(1, 6)), owner=random.choice(OWNERS)):
            open_calls.append(call_id)
        if open_calls and random.random() < 0.6:
            done = open_calls.pop(random.randrange(len(open_calls)))
            cells.settle(state, (Settlement(done, (0,)),), now_ms)
        if random.random() < 0.3:
            cells.heartbeat(state, random.choice(OWNERS), now_ms)
        (reading,) = cells.read(state, (on,), now_ms)
        peak = max(peak, reading.used + reading.held)
        assert reading.used + reading.held <= 20
    assert peak >= 18


@pytest.mark.parametrize("seed", range(20))
def test_a_buckets_refunds_never_beat_its_rate(seed: int) -> None:
    """With holds that are given back late, the stored backlog never falls below that of what was really used."""
    random, state, now_ms = Random(seed), new_state(), START_MS
    period, burst, rate = 1_000, 10, 10
    on = meter(Bucket(period, burst), rate)
    arrivals: list[tuple[int, int]] = []
    open_calls: list[tuple[str, int, int]] = []
    for number in range(300):
        now_ms += random.choice((0, 7, 50, 120, 400))
        amount = random.randint(1, 6)
        if granted(state, str(number), now_ms, claim(on, amount)):
            open_calls.append((str(number), now_ms, amount))
        if open_calls and random.random() < 0.7:
            call_id, at_ms, held = open_calls.pop(random.randrange(len(open_calls)))
            actual = random.randint(0, held)
            arrivals.append((at_ms, actual))
            cells.settle(state, (Settlement(call_id, (actual,)),), now_ms)
        true = Fraction(0)
        last = START_MS
        for at_ms, amount in sorted(arrivals + [(at, held) for _, at, held in open_calls]):
            true = max(Fraction(0), true - Fraction((at_ms - last) * rate, period)) + amount
            last = at_ms
        true = max(Fraction(0), true - Fraction((now_ms - last) * rate, period))
        cell = state.cells[on.key]
        stored = max(Fraction(0), Fraction(cell.used - (now_ms - cell.start) * rate, period))
        assert stored >= true
        assert true <= burst


def test_a_bucket_gives_back_all_that_it_soundly_can() -> None:
    """A call that is given back at once leaves the bucket as if it had never been."""
    state = new_state()
    on = meter(Bucket(1_000, 10), 10)
    assert granted(state, "a", START_MS, claim(on, 4))
    assert granted(state, "b", START_MS, claim(on, 6))
    cells.settle(state, (Settlement("b", (0,)),), START_MS)
    assert granted(state, "c", START_MS, claim(on, 6))


@pytest.mark.parametrize("seed", range(8))
def test_a_sliding_window_agrees_with_its_history(seed: int) -> None:
    """What a sliding window counts is the sum of all uses whose sub-bucket touches the window."""
    random, state, now_ms = Random(seed), new_state(), START_MS
    window = Sliding(10_000, 10)
    on = meter(window, 25)
    uses: list[tuple[int, int]] = []
    for number in range(400):
        now_ms += random.choice((0, 100, 900, 1_000, 2_500, 12_000 if number % 40 == 0 else 1))
        index = now_ms // window.bucket_ms
        counted = sum(amount for at, amount in uses if at >= index - window.buckets)
        amount = random.randint(0, 8)
        assert granted(state, str(number), now_ms, claim(on, amount)) == (counted + amount <= 25)
        if str(number) in state.holds:
            actual = random.randint(0, amount)
            uses.append((index, actual))
            cells.settle(state, (Settlement(str(number), (actual,)),), now_ms)


def test_an_expired_part_is_dropped_only_by_an_admitted_use() -> None:
    """A refusal does not make a sliding window forget, so a clock that steps back afterwards finds it as it was."""
    state = new_state()
    on = meter(Sliding(10_000, 10), 10)
    assert granted(state, "a", START_MS, claim(on, 10))
    before = rows(state)
    assert not granted(state, "b", START_MS + 12_000, claim(on, 11))
    assert rows(state) == before
    assert not granted(state, "b", START_MS + 5_000, claim(on, 1))


# -------------------------------------------------------------------------------- lost holds


def test_a_lost_claim_goes_into_its_own_sub_bucket() -> None:
    """A lost hold on a sliding window is charged where it was taken, in order, or not at all once that is over."""
    on = meter(Sliding(10_000, 10), 100)
    first, state = new_state(), new_state()
    answer = cells.reserve(first, "p1", ((Bundle("a", (claim(on, 5),)),),), START_MS)
    assert isinstance(answer, Granted)
    assert granted(state, "b", START_MS + 5_000, claim(on, 1))
    cells.settle(state, (Settlement("a", (5,), None, answer.receipts),), START_MS + 6_000)
    assert list(state.cells[on.key].parts or ()) == [START_MS // 1_000, START_MS // 1_000 + 5]
    assert [(r.used, r.held) for r in cells.read(state, (on,), START_MS + 10_999)] == [(5, 1)]
    assert [(r.used, r.held) for r in cells.read(state, (on,), START_MS + 11_000)] == [(0, 1)]
    late = new_state()
    cells.settle(late, (Settlement("a", (5,), None, answer.receipts),), START_MS + 11_000)
    assert late.cells == {}


@pytest.mark.parametrize("name", ["lifetime", "rolling", "calendar"])
def test_a_lost_claim_makes_no_window_that_is_over(name: str) -> None:
    """A lost hold whose window has ended leaves no cell behind."""
    on = meter(WINDOWS[name])
    answer = cells.reserve(new_state(), "p1", ((Bundle("a", (claim(on, 5),)),),), START_MS)
    assert isinstance(answer, Granted)
    state = new_state()
    cells.settle(state, (Settlement("a", (5,), None, answer.receipts),), answer.receipts[0].resets_at_ms or 0)
    assert state.cells == {}


def test_a_late_settlement_finds_no_cell() -> None:
    """A late settlement whose cells were forgotten charges none of them, for they were over; a bucket goes on."""
    state = new_state()
    meters: list[Meter] = [meter(window, subject="gone") for window in WINDOWS.values()]
    assert granted(state, "a", START_MS, *(claim(on, 1) for on in meters))
    cells.retire(state, "p1", START_MS)
    state.cells.clear()
    settled = cells.settle(state, (Settlement("a", (9,) * len(meters)),), START_MS + HOUR_MS // 60)
    assert settled[0].status == "late"
    assert list(state.cells) == [on.key for on in meters if isinstance(on.window, Bucket)]


def test_a_hold_without_its_cells_settles() -> None:
    """A settlement never fails, even if a store has lost the cells of an open hold."""
    state = new_state()
    assert granted(state, "a", START_MS, *(claim(meter(window), 1) for window in WINDOWS.values()))
    state.cells.clear()
    assert cells.settle(state, (Settlement("a", (1,) * len(WINDOWS)),), START_MS)[0].status == "settled"
