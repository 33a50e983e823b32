"""Raises: higher limits for a while, in every place that knows of limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    DepartmentQuota,
    Guard,
    Iterations,
    LimitExceeded,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
)
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raise, Raises
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

START_MS = 1_800_000_000_000
PRICES = PriceBook.snapshot(overrides={"openai/gpt-test": {"input": 1, "output": 2}})
MIA = Context(caller="key-1", user="mia", session="s", departments=("sales",))
MILLION: dict[str, Any] = {"model": "openai/gpt-test", "input_tokens": 1_000_000, "max_output_tokens": 1}
"""A call of a dollar and two millionths."""


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START_MS)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def storage(request: pytest.FixtureRequest, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage
    if request.param == "memory":
        made = MemoryStorage(clock=clock)
    elif request.param == "sqlite":
        made = SqliteStorage(tmp_path / "guard.db", clock=clock)
    else:
        made = RedisStorage(shared_redis().url, namespace=unique_namespace(), clock=clock, timeout_s=10)
    yield made
    await made.aclose()


def guard_of(storage: Storage, clock: FrozenClock, *policies: Policy, **options: Any) -> Guard:
    return Guard(policies, storage=storage, clock=clock, prices=PRICES, hold_wait_s=0, **options)


async def spend(guard: Guard, context: Context = MIA) -> None:
    """One call that uses what it holds."""
    async with guard.open(context), guard.call(**MILLION):
        pass


def raise_of(policy: str, unit: Any, amount: Any, *, until_ms: int = START_MS + 60_000, **more: Any) -> Raise:
    return Raise(policy=policy, unit=unit, amount=amount, until_ms=until_ms, **more)


CASES: list[tuple[Policy, Raise]] = [
    (Budget("$1.50/1d", per="user"), raise_of("user_budget", "usd", "1.50", scope="user", subject="mia")),
    (Budget("1500000 tokens/1d", per="caller", name="b"), raise_of("b", "tokens", 1_500_000, subject="key-1")),
    (Iterations(1), raise_of("iterations", "calls", 1, scope="session", subject="s", caller="key-1")),
    (RateLimit("1/hour", per="user"), raise_of("user_rate", "calls", 1)),
    (Quota(QuotaBook({"sales": DepartmentQuota(daily_cost=1.5)})), raise_of("quota", "usd", 1.5, subject="sales")),
    (ProviderBudget({"openai": "$1.50/1d"}), raise_of("provider_budget", "usd", "1.5", subject="openai")),
]


@pytest.mark.parametrize("policy, more", CASES, ids=lambda each: getattr(each, "name", ""))
async def test_conformance_64_counts_before_its_end_not_after(
    storage: Storage, clock: FrozenClock, policy: Policy, more: Raise
) -> None:
    """Conformance 64: a temporary increase lets calls pass until it ends, and none after it; what was used stays."""
    guard = guard_of(storage, clock, policy)
    await spend(guard)
    with pytest.raises(LimitExceeded):
        await spend(guard)
    guard.set_raises([more])
    clock.advance(seconds=59)
    await spend(guard)
    with pytest.raises(LimitExceeded):
        await spend(guard)
    clock.advance(seconds=1)
    row = (await guard.standing(MIA, guard.describe(**MILLION))).rows[0]
    assert (row.remaining, row.raised_until_ms) == (0, None)
    assert row.limit is not None
    assert row.used > row.limit
    with pytest.raises(LimitExceeded) as refused:
        await spend(guard)
    denied = refused.value.denied
    assert [each.claim.meter.limit for each in denied.receipts if not each.fits] == [row.limit]


async def test_refusals_and_standing_show_the_raised_limit(storage: Storage, clock: FrozenClock) -> None:
    """A refusal under a raised limit names that limit, and so does the standing, with the end of the raise."""
    guard = guard_of(storage, clock, Budget("$0.50/1d", per="user"))
    guard.set_raises([raise_of("user_budget", "usd", 1), raise_of("user_budget", "usd", "0.25", subject="mia")])
    await spend(guard)
    with pytest.raises(LimitExceeded) as refused:
        await spend(guard)
    assert refused.value.denied.limit == 1_750_000_000
    assert "$1.75" in refused.value.denied.message
    (row,) = (await guard.standing(MIA, guard.describe(**MILLION))).rows
    assert (row.limit, row.used, row.remaining) == (1_750_000_000, 1_000_002_000, 749_998_000)
    assert row.raised_until_ms == START_MS + 60_000
    ((meter, reading),) = [each for each in await guard.meters_of("user", "mia") if each[1].used]
    assert (meter.limit, reading.used) == (1_750_000_000, 1_000_002_000)


async def test_filter_knows_raised_budgets(storage: Storage, clock: FrozenClock) -> None:
    """`Guard.filter` keeps a provider whose budget is raised, and drops it when the raise has ended."""
    guard = guard_of(storage, clock, ProviderBudget({"openai": "$1.000002/1d"}))
    await spend(guard)
    with pytest.raises(LimitExceeded):
        await guard.filter(["openai/gpt-test"])
    guard.set_raises([raise_of("provider_budget", "usd", 1)])
    assert await guard.filter(["openai/gpt-test"]) == ["openai/gpt-test"]
    clock.advance(seconds=60)
    with pytest.raises(LimitExceeded):
        await guard.filter(["openai/gpt-test"])


async def test_a_leased_limit_is_raised(storage: Storage, clock: FrozenClock) -> None:
    """Where workers take chunks of a limit, a raise lets them take more, exactly as much as it says."""
    guard = guard_of(storage, clock, Iterations(4, per="caller", name="leased", lease=2))

    async def admitted() -> int:
        granted = 0
        for _ in range(20):
            try:
                await spend(guard)
            except LimitExceeded:
                continue
            granted += 1
        return granted

    assert await admitted() == 4
    guard.set_raises([raise_of("leased", "calls", 3)])
    assert await admitted() == 3
    await guard.aclose()


async def test_others_are_not_raised(storage: Storage, clock: FrozenClock) -> None:
    """A raise for one subject changes nobody else's limit; one for a session, no other caller's of that id."""
    guard = guard_of(storage, clock, Iterations(1))
    guard.set_raises([raise_of("iterations", "calls", 5, subject="s", caller="key-1")])
    other = Context(caller="key-2", session="s")
    await spend(guard, other)
    with pytest.raises(LimitExceeded):
        await spend(guard, other)
    for _ in range(6):
        await spend(guard)
    with pytest.raises(LimitExceeded):
        await spend(guard)


async def test_blocked_is_raised(storage: Storage, clock: FrozenClock) -> None:
    """A limit of 0, which blocks what costs nothing too, is as high as its raise; the end blocks again."""
    guard = guard_of(storage, clock, Budget("$0/1d", per="user"))
    free = {**MILLION, "model": "openai/gpt-test", "input_tokens": 0, "max_output_tokens": 0}
    with pytest.raises(LimitExceeded):
        async with guard.open(MIA), guard.call(**{**free, "max_output_tokens": 1}):
            pass
    guard.set_raises([raise_of("user_budget", "usd", 2)])
    await spend(guard)
    guard.set_raises([])
    assert guard.engine.overrides.raises is None
    with pytest.raises(LimitExceeded):
        await spend(guard)


async def test_slots_are_raised(clock: FrozenClock) -> None:
    """Slots may be raised: more at a time, and when the raise ends, no new one until enough are free."""
    guard = guard_of(MemoryStorage(clock=clock), clock, Concurrency(1, per="user"))
    async with guard.open(MIA):
        with pytest.raises(LimitExceeded):
            await guard.open(MIA).__aenter__()
        guard.set_raises([raise_of("user_concurrency", "slots", 1, until_ms=START_MS + 1_000)])
        async with guard.open(MIA):
            clock.advance(seconds=1)
            with pytest.raises(LimitExceeded):
                await guard.open(MIA).__aenter__()
    async with guard.open(MIA):
        pass


def test_what_cannot_be_raised(clock: FrozenClock) -> None:
    """A bucket, a unit that its policy does not count and ids are refused when they are set; nothing is changed."""
    guard = guard_of(
        MemoryStorage(clock=clock), clock, RateLimit("5/minute", algorithm="bucket", name="bucket"), Budget("$1/1d")
    )
    guard.set_raises([raise_of("user_budget", "usd", 1)])
    before = guard.engine.overrides.raises
    with pytest.raises(ConfigurationError, match="bucket"):
        guard.set_raises([raise_of("bucket", "calls", 5)])
    with pytest.raises(ConfigurationError, match="no limit in tokens"):
        guard.set_raises([raise_of("user_budget", "tokens", 5)])
    with pytest.raises(ConfigurationError, match="ids"):
        raise_of("sessions", "ids", 5)
    with pytest.raises(ConfigurationError, match="per user"):
        guard.set_raises([raise_of("user_budget", "usd", 5, scope="caller")])
    assert guard.engine.overrides.raises is before
    guard.set_raises([raise_of("of another process", "calls", 5)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount": 0},
        {"amount": -1},
        {"amount": "ten"},
        {"amount": 1.5, "unit": "tokens"},
        {"amount": True},
        {"until_ms": "soon"},
        {"until_ms": True},
        {"policy": ""},
        {"subject": ""},
        {"scope": 3},
        {"caller": " "},
    ],
)
def test_malformed_raises(wrong: dict[str, Any]) -> None:
    """Every field of a raise is checked when it is made, and the error names the raise."""
    fields: dict[str, Any] = {"policy": "b", "unit": "usd", "amount": 1, "until_ms": START_MS, **wrong}
    with pytest.raises(ConfigurationError, match="raise"):
        Raise(**fields)


def test_nothing_costs_nothing(clock: FrozenClock) -> None:
    """Without raises, and for policies that none names, claims and meters are the very same objects."""
    policy = Budget("$1/1d", per="user")
    guard = guard_of(MemoryStorage(clock=clock), clock, policy)
    meters = [claim.meter for claim in policy.plan(MIA, guard.describe(**MILLION), START_MS).claims]
    assert [a is b for a, b in zip(guard.raised(meters), meters, strict=True)] == [True]
    laid = Raises([raise_of("another", "usd", 1)])
    assert laid.meter(meters[0], START_MS) is meters[0]


async def test_threads_at_different_instants(clock: FrozenClock) -> None:
    """A thread that looks at a limit a moment before the end of a raise, and is overtaken by one that is past it, does
    not make the raise last."""
    guard = guard_of(MemoryStorage(clock=clock), clock, Budget("$1/1d", per="user"))
    raises = Raises(
        [raise_of("user_budget", "usd", 1, until_ms=1000), raise_of("user_budget", "usd", 2, until_ms=9000)]
    )
    meters = [meter for meter, _ in await guard.meters_of("user", "mia")]
    for meter in meters:
        assert meter.limit == 1_000_000_000
        for now_ms, more in ((999, 3), (1000, 2), (999, 3), (1000, 2), (8999, 2), (9000, 0), (8999, 2), (9001, 0)):
            assert raises.meter(meter, now_ms).limit == (1 + more) * 1_000_000_000, now_ms
