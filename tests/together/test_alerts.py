"""Alerts go by the limits that hold: raised for a while, administered, or from a file that was changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from asgi_llm_guard import Budget, Context, Guard, LimitExceeded, Quota, QuotaBook, Usage
from asgi_llm_guard.alerts import Alerts
from asgi_llm_guard.alerts.alerts import CHORE
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.events import Alert, Event
from asgi_llm_guard.following import CHORE as FOLLOW
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

PRICES = PriceBook.snapshot(overrides={"test/m": {"input": 1000, "output": 1000}})  # $1 for 1,000 tokens
ANNA = Actor(name="anna", role="admin")
DOLLAR = 1_000_000_000


class Spent:
    """A guard of which $9.90 was spent under a limit of $100."""

    def __init__(self, clock: FrozenClock) -> None:
        self.clock = clock
        self.events: list[Event] = []
        self.control = Control("sqlite://:memory:", clock=clock)
        self.guard = Guard(
            [Budget("$100/daily", per="user"), Quota(QuotaBook())],
            storage=MemoryStorage(clock=clock, lapse_ms=400 * 86_400_000),
            clock=clock,
            prices=PRICES,
            control=self.control,
            observers=[self.events.append],
            alerts=Alerts(),
        )

    async def spend(self, tokens: int) -> bool:
        context = Context(caller="ann", user="ann", departments=("research",))
        try:
            async with self.guard.open(context), self.guard.call(
                model="test/m", input_tokens=tokens, max_output_tokens=0
            ) as call:  # fmt: skip
                call.record(Usage(input_tokens=tokens, output_tokens=0))
        except LimitExceeded:
            return False
        return True

    async def told(self) -> list[tuple[str, float, int, int]]:
        """What was told so far, after one more look: policy, percent, limit and use."""
        await self.guard.chores.run(CHORE)
        alerts = [event for event in self.events if isinstance(event, Alert)]
        return [(each.policy, each.threshold, each.limit, each.used) for each in alerts]


@pytest.fixture
async def spent(clock: FrozenClock) -> AsyncIterator[Spent]:
    made = Spent(clock)
    await made.control.put("department", "research", {"daily_cost": 100}, actor=ANNA)
    assert await made.spend(9_900)
    assert await made.told() == []
    yield made
    await made.guard.aclose()


async def the_file_is_changed(spent: Spent) -> None:
    spent.guard.replace(policies=[Budget("$10/daily", per="user")])


async def a_quota_is_lowered(spent: Spent) -> None:
    await spent.control.put("department", "research", {"daily_cost": 10}, actor=ANNA)
    await spent.guard.chores.run(FOLLOW)


async def a_raise_ends(spent: Spent) -> None:
    until_ms = spent.clock.now_ms() + 60_000
    spent.guard.replace(policies=[Budget("$10/daily", per="user")])
    spent.guard.set_raises([Raise(policy="user_budget", unit="usd", amount=90, until_ms=until_ms)])
    assert await spent.spend(1)
    assert await spent.told() == []
    spent.clock.advance(seconds=61)


@pytest.mark.parametrize("lower", [the_file_is_changed, a_quota_is_lowered, a_raise_ends])
async def test_a_limit_that_was_lowered_below_what_was_used(spent: Spent, lower: Callable[[Spent], Any]) -> None:
    """S3: a limit that comes to be nearly used up by being lowered is told of with the first call that it refuses, once."""
    await lower(spent)
    policy = "quota" if lower is a_quota_is_lowered else "user_budget"
    used = 9_900 * DOLLAR // 1_000 + (DOLLAR // 1_000 if lower is a_raise_ends else 0)
    assert not await spent.spend(500)
    expected = [(policy, at, 10 * DOLLAR, used) for at in (50, 80, 95)]
    assert await spent.told() == expected
    assert not await spent.spend(500)
    assert await spent.told() == expected


async def a_file_raises_it(spent: Spent) -> None:
    spent.guard.replace(policies=[Budget("$20/daily", per="user")])


async def a_quota_is_raised(spent: Spent) -> None:
    await spent.control.put("department", "research", {"daily_cost": 20}, actor=ANNA)
    await spent.guard.chores.run(FOLLOW)


async def a_raise_begins(spent: Spent) -> None:
    until_ms = spent.clock.now_ms() + 3_600_000
    spent.guard.set_raises([Raise(policy="user_budget", unit="usd", amount=10, until_ms=until_ms)])


@pytest.mark.parametrize("lift", [a_file_raises_it, a_quota_is_raised, a_raise_begins])
async def test_a_limit_that_was_raised_is_told_of_anew(spent: Spent, lift: Callable[[Spent], Any]) -> None:
    """S3: whoever raises a limit that is nearly used up hears of it again when that of the new limit is, once; and nothing
    twice of the old one when that holds again."""
    policy = "quota" if lift is a_quota_is_raised else "user_budget"
    await (a_quota_is_lowered if lift is a_quota_is_raised else the_file_is_changed)(spent)
    assert not await spent.spend(500)
    before = await spent.told()
    assert [alert[1] for alert in before] == [50, 80, 95]

    await lift(spent)
    assert await spent.spend(9_500)
    new = (await spent.told())[len(before) :]
    assert new == [(policy, at, 20 * DOLLAR, 19_400 * DOLLAR // 1_000) for at in (50, 80, 95)]
    assert await spent.spend(100)
    assert len(await spent.told()) == len(before) + len(new)

    if lift is a_raise_begins:
        spent.clock.advance(seconds=3_601)
        assert not await spent.spend(1)
        assert [alert[1:3] for alert in (await spent.told())[len(before) + len(new) :]] == [(100, 10 * DOLLAR)]
