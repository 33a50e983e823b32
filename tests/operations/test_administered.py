"""Raises and stops of code beside those that are administered: both hold."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from asgi_llm_guard import Context, Guard, Iterations, LimitExceeded
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

ANNA = Actor(name="anna", role="admin", address="10.1.2.3")
MIA = Context(caller="svc", user="mia", session="s")


@pytest.fixture
async def control(tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Control]:
    control = Control(f"sqlite:///{tmp_path}/control.db", secret="a-secret-of-tests-4711", clock=clock)
    yield control
    await control.aclose()


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


@pytest.fixture
async def guard(control: Control, clock: FrozenClock) -> AsyncIterator[Guard]:
    guard = Guard([Iterations(1)], control=control, clock=clock)
    await guard.chores.run("control")
    yield guard
    await guard.aclose()


async def refused(guard: Guard, context: Context) -> str | None:
    try:
        async with guard.open(context), guard.call(model="gpt-test", input_tokens=1, max_output_tokens=1):
            return None
    except LimitExceeded as error:
        return error.denied.code


async def limit(guard: Guard) -> int | None:
    ((meter, _),) = await guard.meters_of("session", "s", caller="svc")
    return meter.limit


async def test_raises_add_up(guard: Guard, control: Control, clock: FrozenClock) -> None:
    """A raise by code and one that is administered hold together, whichever was there first, and each ends by itself."""
    until_ms = clock.now_ms() + 60_000
    own = Raise(policy="iterations", unit="calls", amount=10, until_ms=until_ms)
    raised = {"policy": "iterations", "unit": "calls", "amount": 100, "until_ms": until_ms, "reason": "r"}
    guard.set_raises([own])
    await control.put("raise", "r1", raised, actor=ANNA)
    await guard.chores.run("control")
    assert await limit(guard) == 111
    guard.set_raises([])
    assert await limit(guard) == 101
    guard.set_raises([own])
    await control.remove("raise", "r1", actor=ANNA)
    await guard.chores.run("control")
    assert await limit(guard) == 11
    clock.set(until_ms)
    assert await limit(guard) == 1


async def test_stops_hold_together(guard: Guard, control: Control) -> None:
    """S8: what code has stopped stays stopped when administration data change, and code cannot take back what was
    stopped there; what runs ends either way."""
    ben, eve = Context(caller="svc", user="ben"), Context(caller="svc", user="eve")
    guard.set_stops([Stop(scope="user", subject="mia")])
    await control.put("stop", "s1", {"scope": "user", "subject": "ben", "reason": "r"}, actor=ANNA)
    await guard.chores.run("control")
    assert [await refused(guard, who) for who in (MIA, ben, eve)] == ["stopped", "stopped", None]
    guard.set_stops([])
    assert [await refused(guard, who) for who in (MIA, ben)] == [None, "stopped"]
    async with guard.open(eve) as admission:
        guard.set_stops([Stop(scope="user", subject="eve")])
        assert admission.halted is not None
    await control.remove("stop", "s1", actor=ANNA)
    await guard.chores.run("control")
    assert [await refused(guard, who) for who in (ben, eve)] == [None, "stopped"]
