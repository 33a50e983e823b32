"""Random histories of several processes over shards that come and go: no limit is passed, and nothing is charged twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.storage.sharded_kit import SHARDS, Shards, lies_in
from tests.storage.values import DAY_MS, HOUR_MS, draft, record

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Receipt, Refused, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import TOMBSTONE_MS
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.windows import Calendar, Slots

LAPSE_MS: Final = 15_000
LIMITS: Final = (9, 7, 5)
METERS: Final[list[Meter]] = [
    lies_in(shard, LIMITS[shard] + (window is not None), window=window, name=name)
    for shard in range(SHARDS)
    for name, window in (("m", None), ("day", Calendar("day")), ("slots", Slots()))
]
COUNTED: Final = [meter for meter in METERS if not isinstance(meter.window, Slots)]

T = TypeVar("T")


@dataclass
class Process:
    """One process: an owner and its view of the shards."""

    owner: str
    storage: ShardedStorage


@dataclass
class Call:
    """What a process knows of a call."""

    process: Process
    claims: tuple[Claim, ...]
    receipts: tuple[Receipt, ...] = ()
    state: str = "open"
    actuals: tuple[int, ...] = ()


class Sharded(RuleBasedStateMachine):
    """Processes over three shards. None uses more than it holds, so nothing may ever be above its limit."""

    reached: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.shards = Shards(lapse_ms=LAPSE_MS)
        self.calls: dict[str, Call] = {}
        self.numbers = iter(range(10**6))
        self.down: set[int] = set()

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        self.processes = [self.process() for _ in range(count)]

    def process(self) -> Process:
        return Process(f"owner{next(self.numbers)}", self.shards.process())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def note(self, what: str) -> None:
        self.reached[what] += 1
        event(what)

    def claims(self, data: st.DataObject, least: int = 1, most: int = 4) -> tuple[Claim, ...]:
        meters = data.draw(st.lists(st.sampled_from(METERS), min_size=least, max_size=5, unique_by=lambda m: m.key))
        return tuple(Claim(meter, data.draw(st.integers(0, most))) for meter in meters)

    def pick(self, data: st.DataObject, *states: str) -> str | None:
        ids = [call_id for call_id, call in self.calls.items() if call.state in states]
        return data.draw(st.sampled_from(ids)) if ids else None

    # ------------------------------------------------------------------------------------- steps

    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.processes))
        call_id = f"{process.owner}-{next(self.numbers)}"
        self.ask(call_id, Call(process, self.claims(data)))

    @rule(data=st.data())
    def reserve_again(self, data: st.DataObject) -> None:
        call_id = self.pick(data, "open", "unknown", "refused", "settled")
        if call_id is not None:
            self.ask(call_id, self.calls[call_id])

    @rule()
    def reserve_a_day_after_a_refusal(self) -> None:
        refused = [call_id for call_id, call in self.calls.items() if call.state == "refused"]
        if refused:
            self.wait(DAY_MS)
        for call_id in refused[-3:]:
            self.ask(call_id, self.calls[call_id])

    @rule(data=st.data(), shard=st.integers(0, SHARDS - 1), after=st.integers(0, 1))
    def lose_the_answer(self, data: st.DataObject, shard: int, after: int) -> None:
        """A call is asked for of which one shard does not tell what became of it, and then once more."""
        process = data.draw(st.sampled_from(self.processes))
        call_id = f"{process.owner}-{next(self.numbers)}"
        self.shards.shards[shard].down(after=after, unanswered=1)
        self.ask(call_id, Call(process, self.claims(data)))
        self.come_back()
        if self.calls[call_id].state == "unknown":
            self.ask(call_id, self.calls[call_id])

    def ask(self, call_id: str, call: Call) -> None:
        before = self.run(self.shards.held())
        again = call.state if call_id in self.calls else "new"
        self.calls[call_id] = call
        bundle = Bundle(call_id, call.claims, draft(call_id, cost=1))
        try:
            answer = self.run(call.process.storage.reserve(call.process.owner, ((bundle,),)))
        except StorageError as error:
            self.note("failed reserve")
            if again not in ("open", "settled", "unknown"):  # what was unknown stays so, whatever this one was
                call.state = "unknown" if error.sent else "refused"
            return
        if isinstance(answer, Granted):
            assert again != "settled"
            assert again != "open" or answer.replayed
            self.note(f"granted {again}")
            call.state, call.receipts = "open", answer.receipts
            assert [receipt.claim.meter.key for receipt in answer.receipts] == [c.meter.key for c in call.claims]
        elif isinstance(answer, Refused):
            self.note("refused")
            assert again != "open" or self.down
            if again != "settled":  # a group may refuse what home would have told the end of
                call.state = "refused"
            assert not all(receipt.fits for receipt in answer.states[0])
            if not self.down and not call.process.storage._shards._unreturned:
                assert self.run(self.shards.held()) <= before
        else:
            assert again in ("open", "settled", "unknown"), again
            self.note("ended")
            call.state = "over" if again != "settled" else "settled"

    @rule(data=st.data(), most=st.sampled_from((4, 40)))
    def amend(self, data: st.DataObject, most: int) -> None:
        call_id = self.pick(data, "open")
        if call_id is None:
            self.reserve(data)
        else:
            self.change(call_id, self.claims(data, most=most))

    @rule(data=st.data(), after=st.integers(0, 1))
    def lose_the_answer_to_an_amend(self, data: st.DataObject, after: int) -> None:
        """A call is changed, and shards do not tell what became of it."""
        call_id = self.pick(data, "open")
        if call_id is None:
            return
        for shard in self.shards.shards:
            shard.down(after=after, unanswered=1)
        self.change(call_id, self.claims(data))
        self.come_back()

    def change(self, call_id: str, claims: tuple[Claim, ...]) -> None:
        call = self.calls[call_id]
        try:
            answer = self.run(call.process.storage.amend(call.process.owner, Bundle(call_id, claims, draft(call_id))))
        except StorageError:
            self.note("failed amend")
            call.state = "unsure"
            return
        if isinstance(answer, Granted):
            self.note("amended")
            call.claims, call.receipts = claims, answer.receipts
            assert [receipt.claim for receipt in answer.receipts] == list(claims)
        elif isinstance(answer, Ended):
            call.state = "over"
        else:
            self.note("refused amend")

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        call_id = self.pick(data, "open", "over", "unsettled")
        if call_id is None:
            return
        call = self.calls[call_id]
        if call.state != "unsettled":
            call.actuals = tuple(data.draw(st.integers(0, claim.amount)) for claim in call.claims)
        self.tell(call_id, Settlement(call_id, call.actuals, record(call_id, 1)))

    @rule(data=st.data(), after=st.integers(0, 1))
    def lose_the_answer_to_a_settlement(self, data: st.DataObject, after: int) -> None:
        """A call is settled, and shards do not tell what became of that."""
        for shard in self.shards.shards:
            shard.down(after=after, unanswered=1)
        self.settle(data)
        self.come_back()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call_id = self.pick(data, "open", "over", "unknown", "unsure")
        if call_id is not None:
            self.tell(call_id, Settlement(call_id, ()))

    @rule(data=st.data())
    def settle_twice(self, data: st.DataObject) -> None:
        call_id = self.pick(data, "settled")
        if call_id is None or self.down:
            return
        levels = self.run(self.shards.levels(*METERS))
        call = self.calls[call_id]
        self.tell(call_id, Settlement(call_id, tuple(4 for _ in call.claims), record(call_id, 4)))
        assert self.run(self.shards.levels(*METERS)) == levels

    def tell(self, call_id: str, settlement: Settlement) -> None:
        call = self.calls[call_id]

        async def settled() -> None:
            await call.process.storage.settle((settlement,))

        try:
            self.run(settled())
        except StorageError:
            self.note("failed settlement")
            if call.state in ("open", "over"):
                call.state = "unsettled" if settlement.actuals else "unsure"
        else:
            self.note("settled")
            call.state = "settled"

    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.processes))
        try:
            beat = self.run(process.storage.heartbeat(process.owner))
        except StorageError:
            self.note("failed beat")
            return
        assert len(set(beat.expired)) == len(beat.expired)
        assert all("~" not in call_id for call_id in beat.expired)
        self.note("lapsed" if beat.lapsed else "beat")

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A process is gone with all that it knew; another takes its place."""
        number = data.draw(st.integers(0, len(self.processes) - 1))
        dead, self.processes[number] = self.processes[number], self.process()
        for call in self.calls.values():
            if call.process is dead:
                call.state = "dead"

    @rule(ms=st.sampled_from([100, 6_000, LAPSE_MS, HOUR_MS, DAY_MS]))
    def wait(self, ms: int) -> None:
        self.shards.clock.advance(ms=ms)
        if ms >= TOMBSTONE_MS:
            for call in self.calls.values():
                if call.state == "settled":
                    call.state = "forgotten"

    @rule(shard=st.integers(0, SHARDS - 1), after=st.integers(0, 2), unanswered=st.integers(0, 2))
    def go_away(self, shard: int, after: int, unanswered: int) -> None:
        self.down.add(shard)
        self.shards.shards[shard].down(after=after, unanswered=unanswered)

    @rule()
    def come_back(self) -> None:
        for shard in self.shards.shards:
            shard.up()
        self.down.clear()

    # -------------------------------------------------------------------------------- what holds

    @invariant()
    def no_limit_is_passed(self) -> None:
        """Rule 6: the bound holds in every meter at every moment."""
        for meter, (used, held) in zip(METERS, self.run(self.shards.levels(*METERS)), strict=True):
            assert used >= 0
            assert held >= 0
            assert used + held <= (meter.limit or 0), meter.key

    @invariant()
    def no_call_has_two_records(self) -> None:
        """The ledger of all shards has one record for each call id."""
        ids = [one.call_id for store in self.shards.stores for one in self.run(store.records())]
        assert len(set(ids)) == len(ids)

    def teardown(self) -> None:
        try:
            self.nothing_stays_held()
        finally:
            self.runner.close()

    def nothing_stays_held(self) -> None:
        """When every call has ended and every shard is back, no group is left behind."""
        self.come_back()
        for call_id, call in self.calls.items():
            if call.state in ("open", "over", "unknown", "unsure", "unsettled"):
                self.tell(call_id, Settlement(call_id, call.actuals if call.state == "unsettled" else ()))
        for process in getattr(self, "processes", []):
            self.run(process.storage.heartbeat(process.owner))
        dead = {call.process.owner for call in self.calls.values() if call.state == "dead"}
        if not dead:
            assert self.run(self.shards.held()) == 0
            assert all(held == 0 for _, held in self.run(self.shards.levels(*METERS)))
        self.shards.clock.advance(ms=LAPSE_MS)
        for process in getattr(self, "processes", []):
            self.run(process.storage.heartbeat(process.owner))
        assert self.run(self.shards.held()) == 0


def test_processes_over_shards() -> None:
    """Whatever happens to processes, calls and shards, in any order: the bound holds, and nothing is applied twice."""
    Sharded.reached.clear()
    run_state_machine_as_test(
        Sharded,
        settings=settings(
            max_examples=120, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow], deadline=None
        ),
    )
    wanted = {"granted new", "granted refused", "granted unknown", "granted open", "refused", "ended", "amended"}
    wanted |= {"refused amend", "failed reserve", "failed amend", "failed settlement", "settled", "lapsed"}
    assert wanted <= {what for what, times in Sharded.reached.items() if times >= 3}
