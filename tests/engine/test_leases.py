"""A guard whose policies lease: what it saves, what it charges, and how it gets through an outage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import PRICES
from tests.storage.leases_kit import turn

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, Usage
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.events import Event, StorageFailed, StorageRecovered
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

CONTEXT = Context(caller="acme")
CALL: dict[str, Any] = {"model": "openai/test-model", "input_tokens": 100, "max_output_tokens": 0}  # $0.0001
USED = Usage(input_tokens=40, output_tokens=0)
LEASED = Budget("$0.02/daily", lease="$0.002")


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[OutageStorage]:
    made = (
        MemoryStorage(clock=clock) if request.param == "memory" else SqliteStorage(tmp_path / "guard.db", clock=clock)
    )
    yield OutageStorage(made, breaker=True)
    await made.aclose()


@pytest.fixture
def new_guard(storage: OutageStorage, clock: FrozenClock) -> Callable[..., Guard]:
    def make(*policies: Any, **options: Any) -> Guard:
        return Guard(policies, storage=storage, clock=clock, prices=PRICES, **options)

    return make


async def call(guard: Guard) -> None:
    """One call that uses less than it held."""
    async with guard.call(**CALL) as made:
        made.record(USED)


async def test_nothing_is_leased_unless_a_policy_says_so(
    new_guard: Callable[..., Guard], storage: OutageStorage
) -> None:
    """A guard without `lease=` uses the storage that it was given; one policy with it, bound at any time, changes that."""
    guard = new_guard(Iterations(25, per="caller"), LEASED.shadow())
    assert guard.storage is storage
    guard.open(CONTEXT, extra=[LEASED])
    assert guard.storage is not storage
    leasing = guard.storage
    guard.open(CONTEXT, extra=[Iterations(25, per="caller", lease=5)])
    assert guard.storage is leasing


async def test_leased_calls_go_on_while_the_store_is_away(
    new_guard: Callable[..., Guard], storage: OutageStorage
) -> None:
    """What was leased is admitted during an outage, strictly, and charged when it is over; its end is told once."""
    events: list[Event] = []
    guard = new_guard(LEASED, observers=[events.append])
    async with guard.open(CONTEXT):
        await call(guard)
        await turn()
        storage.down()
        for _ in range(5):
            await call(guard)
        with pytest.raises(LimitExceeded) as refused:
            async with guard.call(**{**CALL, "input_tokens": 100_000}):
                pass
        assert refused.value.denied.status == 503
        for _ in range(5):
            await call(guard)
        storage.up()
        await guard.heartbeat()
    assert [type(event) for event in events if isinstance(event, (StorageFailed, StorageRecovered))] == [
        StorageFailed,
        StorageRecovered,
    ]
    await guard.drain(0)
    assert [record.cost_nanousd for record in await guard.storage.records()] == [40_000] * 11
    (reading,) = await guard.storage.read([claim.meter for claim in _claims(guard)])
    assert (reading.used, reading.held) == (11 * 40_000, 0)


async def test_a_leased_budget_is_spent_to_the_last_call(new_guard: Callable[..., Guard]) -> None:
    """With a lease as without one, exactly as many calls are admitted as fit, and the next is refused with the truth."""
    guard = new_guard(LEASED)
    admitted = 0
    async with guard.open(CONTEXT):
        with pytest.raises(LimitExceeded) as refused:
            for _ in range(300):
                async with guard.call(**CALL) as made:
                    made.record(Usage(input_tokens=100, output_tokens=0))
                admitted += 1
                await turn()
    assert admitted == 200
    assert refused.value.denied.status == 402
    await guard.drain(0)
    assert await guard.storage.open_holds() == 0


def _claims(guard: Guard) -> tuple[Any, ...]:
    verdict = guard.policies[0].plan(CONTEXT, guard.describe(**CALL), 0)
    return verdict.claims


async def test_no_chunk_is_spent_of_data_that_is_lost(clock: FrozenClock) -> None:
    """A loss that shows in a call without leases ends those of the guard, too: every call is refused until it is accepted."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = Guard([Iterations(25, per="caller"), LEASED], storage=storage, clock=clock, prices=PRICES)
    only_leased = Guard([LEASED], storage=storage, clock=clock, prices=PRICES).policies
    call_ = guard.describe(**CALL)
    assert not isinstance(await guard.engine.reserve(only_leased, CONTEXT, call_), Denied)
    await turn()
    storage.down()
    assert not isinstance(await guard.engine.reserve(only_leased, CONTEXT, call_), Denied)
    storage.up()
    storage.lose_data(MemoryStorage(clock=clock))
    for policies in (guard.policies[:1], only_leased):
        denied = await guard.engine.reserve(policies, CONTEXT, call_)
        assert isinstance(denied, Denied)
        assert denied.code == "guard_unavailable"
    await guard.accept_data_loss()
    assert not isinstance(await guard.engine.reserve(only_leased, CONTEXT, call_), Denied)
