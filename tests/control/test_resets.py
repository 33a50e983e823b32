"""Resets: what one subject has used is zero again, everywhere it is counted, and nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.control.kit import ANNA, SECRET
from tests.servers import RedisServer

from asgi_llm_guard import Budget, Context, Guard, LimitExceeded, Quota, QuotaBook, Usage
from asgi_llm_guard.control import Control
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

RESEARCH = Context(caller="svc", departments=("research",))
SALES = Context(caller="svc", departments=("sales",))


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def guard(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Guard]:
    """Departments that are limited by the day, by the month and by a budget of their own, one of them by operators."""
    storage: Storage
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        storage = RedisStorage(server.url, namespace=request.getfixturevalue("namespace"), clock=clock, timeout_s=10)
    else:
        storage = (
            MemoryStorage(clock=clock) if request.param == "memory" else SqliteStorage(tmp_path / "g.db", clock=clock)
        )
    control = Control("sqlite://:memory:", secret=SECRET, clock=clock)
    limits = {"daily_tokens": 2_000, "monthly_tokens": 50_000, "monthly_cost": "50"}
    await control.put("department", "research", limits, actor=ANNA)
    book = QuotaBook({"sales": {"daily_tokens": 2_000}})
    guard = Guard(
        [Quota(book), Budget("1000000 tokens/7d", per="department", name="budget")],
        storage=storage,
        clock=clock,
        control=control,
    )
    yield guard
    await guard.aclose()
    await control.aclose()


async def code(guard: Guard, context: Context) -> str | None:
    described: dict[str, Any] = {"model": "openai/gpt-4o", "input_tokens": 1_000, "max_output_tokens": 1_000}
    try:
        async with guard.open(context), guard.call(**described) as call:
            call.record(Usage(input_tokens=1_000, output_tokens=1_000))
    except LimitExceeded as error:
        return error.denied.code
    return None


async def used(guard: Guard, department: str) -> list[tuple[str, int]]:
    return [(meter.policy, reading.used) for meter, reading in await guard.meters_of("department", department)]


async def test_linked_meters_are_reset_together(guard: Guard, clock: FrozenClock) -> None:
    """Conformance 73: a reset of a department sets its day, its month and its other budgets to zero together, and none of
    another department; days and months still end when they would have; the next request is admitted."""
    for context in (RESEARCH, SALES):
        assert await code(guard, context) is None
        assert await code(guard, context) == "quota_exceeded"
    before = {meter.key: reading for meter, reading in await guard.meters_of("department", "research")}
    others = await used(guard, "sales")

    done = await guard.reset("department", "research")

    assert {(each.policy, each.used > 0) for each in done} == {("quota", True), ("budget", True)}
    assert len(done) == len(before) == 4
    assert {amount for _, amount in await used(guard, "research")} == {0}
    assert await used(guard, "sales") == others
    assert await code(guard, RESEARCH) is None
    assert await code(guard, SALES) == "quota_exceeded"
    for meter, reading in await guard.meters_of("department", "research"):
        if meter.policy == "quota":
            assert reading.resets_at_ms == before[meter.key].resets_at_ms
    clock.advance(seconds=86_400)
    assert await code(guard, RESEARCH) is None, "the day ended by its own schedule, once"
    assert (4_000, "tokens") in [
        (reading.used, meter.unit.value) for meter, reading in await guard.meters_of("department", "research")
    ], "the month goes on from the reset"


async def test_one_policy_alone_is_reset(guard: Guard) -> None:
    """Conformance 73: of the meters of a subject only those of the policies that are named are set to zero."""
    assert await code(guard, RESEARCH) is None
    before = await used(guard, "research")
    await guard.reset("department", "research", policies=["budget"])
    after = await used(guard, "research")
    assert [amount for policy, amount in after if policy == "budget"] == [0]
    assert [each for each in after if each[0] == "quota"] == [each for each in before if each[0] == "quota"]


async def test_nothing_to_reset_is_nothing(guard: Guard) -> None:
    """Conformance 73: an empty list does nothing, and a subject that has used nothing stays so."""
    assert await code(guard, RESEARCH) is None
    before = await used(guard, "research")
    await guard.storage.reset([])
    done = await guard.reset("department", "nobody")
    assert all(each.used == 0 for each in done)
    assert await used(guard, "research") == before


async def test_what_is_held_stays_held(guard: Guard) -> None:
    """Conformance 73: a call that is running while its department is reset is charged when it ends."""
    described: dict[str, Any] = {"model": "openai/gpt-4o", "input_tokens": 1_000, "max_output_tokens": 1_000}
    async with guard.open(RESEARCH), guard.call(**described) as call:
        done = await guard.reset("department", "research")
        assert {each.held > 0 for each in done} == {True}
        call.record(Usage(input_tokens=1_000, output_tokens=1_000))
    assert await code(guard, RESEARCH) == "quota_exceeded"


async def test_a_reset_is_noted(guard: Guard) -> None:
    """S6, S8: a reset is no change of an entry, and is written down all the same, with what was there before."""
    assert guard.control is not None
    assert await code(guard, RESEARCH) is None
    done = await guard.reset("department", "research", policies=["budget"])
    await guard.control.note(
        "reset",
        "department:research",
        actor=ANNA,
        reason="wrong bill",
        old=[[each.policy, each.used] for each in done],
        new=0,
    )
    (row, *_) = await guard.control.audit()
    assert (row.verb, row.actor, row.old, row.new) == ("reset", "anna", '[["budget",2000]]', "0")
