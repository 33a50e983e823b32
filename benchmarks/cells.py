"""What one reserve and its settlement cost, beside six plain dictionary check-and-adds, interleaved in one run.

    python benchmarks/cells.py [blocks]

Prints nanoseconds per plan of six claims (median, and the 10th and 90th percentile over blocks) and the
ratio to the plain dictionary of the same round. Trust the ratios: clocks and neighbours differ.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Rule, Settlement, Unit, meter_key
from asgi_llm_guard.storage.cells import reserve, settle
from asgi_llm_guard.storage.counting import Cell
from asgi_llm_guard.storage.memory import MemoryLedger, MemoryMembers, MemoryStorage
from asgi_llm_guard.storage.state import State
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling, Sliding, Slots, Window

ROUNDS = 200  # plans per block: short, so that a busy neighbour hits whole blocks
NOW_MS = 1_800_000_000_000
BIG = 2**50


def _meter(policy: str, unit: Unit, rule: Rule, window: Window, subject: str) -> Meter:
    key = meter_key(policy, unit, window, subject)
    return Meter(key=key, policy=policy, scope="user", subject=subject, unit=unit, rule=rule, limit=BIG, window=window)


CLAIMS = (
    Claim(_meter("iterations", Unit.CALLS, Rule.ITERATIONS, Lifetime(3_600_000), "session-1"), 1),
    Claim(_meter("provider", Unit.NANOUSD, Rule.BUDGET, Rolling(86_400_000), "openai"), 30_000_000),
    Claim(_meter("budget", Unit.NANOUSD, Rule.BUDGET, Rolling(604_800_000), "team"), 30_000_000),
    Claim(_meter("monthly", Unit.NANOUSD, Rule.QUOTA, Calendar("month"), "research"), 30_000_000),
    Claim(_meter("rate", Unit.CALLS, Rule.RATE, Sliding(60_000), "user-1"), 1),
    Claim(_meter("slots", Unit.SLOTS, Rule.SLOTS, Slots(), "user-1"), 1),
)
ACTUALS = (1, 12_345_678, 12_345_678, 12_345_678, 1, 1)


def plain() -> Callable[[list[str]], None]:
    """Six check-and-adds on a dictionary: what no limiter can go below."""
    counters: dict[str, int] = {}
    amounts = [(claim.meter.key, claim.meter.limit or 0, claim.amount) for claim in CLAIMS]

    def run(call_ids: list[str]) -> None:
        get = counters.get
        for _ in call_ids:
            for key, limit, amount in amounts:
                used = get(key, 0)
                if used + amount <= limit:
                    counters[key] = used + amount

    return run


def plain_claims() -> Callable[[list[str]], None]:
    """The same, reading keys, limits and amounts from claims: what any limiter over values has to do."""
    counters: dict[str, int] = {}

    def run(call_ids: list[str]) -> None:
        get = counters.get
        for _ in call_ids:
            for claim in CLAIMS:
                meter = claim.meter
                used = get(meter.key, 0)
                amount = claim.amount
                if meter.limit is None or used + amount <= meter.limit:
                    counters[meter.key] = used + amount

    return run


def _state() -> State:
    return State(members=MemoryMembers(), ledger=MemoryLedger(1_000))


def both(*, record: bool) -> Callable[[list[str]], None]:
    """Reserve and settle through the pure functions, with full replies."""
    state = _state()
    draft = UsageRecord(call_id="x", at_ms=NOW_MS) if record else None

    def run(call_ids: list[str]) -> None:
        for call_id in call_ids:
            granted = reserve(state, "owner", ((Bundle(call_id, CLAIMS, draft),),), NOW_MS)
            assert type(granted) is Granted
            settle(state, (Settlement(call_id, ACTUALS, draft),), NOW_MS)
        state.ended.clear()

    return run


def only_reserve() -> Callable[[list[str]], None]:
    """Reserve alone; what it leaves is taken away outside the loop."""
    state = _state()

    def run(call_ids: list[str]) -> None:
        for call_id in call_ids:
            reserve(state, "owner", ((Bundle(call_id, CLAIMS),),), NOW_MS)
        state.holds.clear()

    return run


def refused() -> Callable[[list[str]], None]:
    """Six claims of which the last does not fit."""
    state = _state()
    blocked = Meter(
        key="none", policy="none", scope="global", subject="", unit=Unit.CALLS, rule=Rule.QUOTA, limit=0, window=Slots()
    )
    claims = (*CLAIMS[:5], Claim(blocked, 1))

    def run(call_ids: list[str]) -> None:
        for call_id in call_ids:
            reserve(state, "owner", ((Bundle(call_id, claims),),), NOW_MS)

    return run


def storage() -> Callable[[list[str]], None]:
    """Reserve and settle through `MemoryStorage`, driven without an event loop: lock, clock and purge included."""
    memory = MemoryStorage()

    def run(call_ids: list[str]) -> None:
        for call_id in call_ids:
            asked = memory.reserve("owner", ((Bundle(call_id, CLAIMS),),))
            try:
                asked.send(None)
            except StopIteration:
                memory.settle((Settlement(call_id, ACTUALS),))

    return run


def main() -> None:
    """Measure every contender in alternating blocks and print the table."""
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    runs = {
        "6 plain dict check-and-adds": plain(),
        "the same, from claims": plain_claims(),
        "reserve": only_reserve(),
        "reserve + settle": both(record=False),
        "reserve + settle + record": both(record=True),
        "refused": refused(),
        "MemoryStorage, both": storage(),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for block in range(blocks + 5):
        for name, run in runs.items():
            call_ids = [f"{name}-{block}-{number}" for number in range(ROUNDS)]
            begin = time.perf_counter_ns()
            run(call_ids)
            spent = time.perf_counter_ns() - begin
            if block >= 5:
                times[name].append(spent / ROUNDS)
    base = times["6 plain dict check-and-adds"]
    print(f"{'per plan of 6 claims':30} {'p10 ns':>9} {'median':>9} {'p90':>9} {'x plain':>9}")
    for name, spans in times.items():
        deciles = statistics.quantiles(spans, n=10)
        ratio = statistics.median(own / plain_ns for own, plain_ns in zip(spans, base, strict=True))
        print(f"{name:30} {deciles[0]:9.0f} {statistics.median(spans):9.0f} {deciles[8]:9.0f} {ratio:9.2f}")
    print(f"one cell is {sys.getsizeof(Cell(0, 0, 0, 0, 0))} bytes")


if __name__ == "__main__":
    main()
