"""When deployments are left alone, for how long, and that all instances know of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.storage.conftest import FACTORIES
from tests.storage.values import START

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.failures import ErrorClass
from asgi_llm_guard.gateway.health import FRESH_MS, Cooldown, CooldownRules, Cooldowns, cooldown_entries, masked
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import Bounds, Entries, InFlight, KeepsEntries, Kept, Leading
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

KINDS = ["memory", "sqlite", "redis"]
LATER_S = FRESH_MS / 1000


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(START)


@pytest.fixture(params=KINDS)
async def storage(request: pytest.FixtureRequest, tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Storage]:
    made = FACTORIES[request.param](tmp_path)(clock)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(made.aclose)
        yield made


class CountedEntries:
    """Entries that count what is asked of them."""

    def __init__(self, inner: Entries) -> None:
        self.inner = inner
        self.reads = 0
        self.writes = 0

    @property
    def bounds(self) -> Bounds:
        return self.inner.bounds

    async def find(self, key: str) -> Kept | None:
        self.reads += 1
        return await self.inner.find(key)

    async def begin(self, key: str, token: str, **options: Any) -> Kept | Leading | InFlight:
        self.writes += 1
        return await self.inner.begin(key, token, **options)

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        return await self.inner.store(key, token, value, ttl_ms=ttl_ms)

    async def abandon(self, key: str, token: str) -> None:
        await self.inner.abandon(key, token)

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        return await self.inner.prolong(key, token, claim_ms=claim_ms)

    async def forget(self, key: str) -> None:
        await self.inner.forget(key)

    async def bump(self, name: str) -> None:
        await self.inner.bump(name)


def alone_in_memory(clock: FrozenClock, rules: CooldownRules | None = None) -> Cooldowns:
    """One instance that shares nothing, with two deployments."""
    cooldowns = Cooldowns(rules, clock=clock)
    cooldowns.watch(["a", "b"])
    return cooldowns


def instance(storage: Storage, clock: FrozenClock, rules: CooldownRules | None = None) -> Cooldowns:
    """One of several instances on a storage."""
    cooldowns = Cooldowns(rules, entries=cooldown_entries(storage), clock=clock)
    cooldowns.watch(["a", "b"])
    return cooldowns


async def fail(
    cooldowns: Cooldowns, failure: ErrorClass = "overload", times: int = 1, *, alone: bool = False
) -> Cooldown | None:
    """So many failures of deployment `a`; what the last one led to."""
    cooled = None
    for _ in range(times):
        cooled = await cooldowns.failed("a", failure, alone=alone)
    return cooled


def left_s(cooldowns: Cooldowns, clock: FrozenClock, name: str = "a") -> float:
    cooldown = cooldowns.known().get(name)
    return 0 if cooldown is None else cooldown.left_s(clock.now_ms())


# ----------------------------------------------------------------------------- rule 1: at once


@pytest.mark.parametrize("failure", ["rate_limit", "auth", "quota", "not_found"])
async def test_some_failures_cool_at_once(clock: FrozenClock, failure: ErrorClass) -> None:
    """Conformance 75, D3: one 429 or 401 leaves a deployment alone for 60 seconds, and no other one."""
    cooldowns = alone_in_memory(clock)
    cooled = await fail(cooldowns, failure)
    assert cooled is not None
    assert (cooled.error, cooled.left_s(clock.now_ms())) == (failure, 60)
    assert list(await cooldowns.cooling()) == ["a"]
    clock.advance(seconds=59.9)
    assert list(await cooldowns.cooling()) == ["a"]
    clock.advance(seconds=0.1)
    assert await cooldowns.cooling() == {}


@pytest.mark.parametrize(("failure", "cools"), [("rate_limit", False), ("quota", False), ("auth", True)])
async def test_the_only_one_of_its_group(clock: FrozenClock, failure: ErrorClass, *, cools: bool) -> None:
    """Conformance 75: a deployment that is the only one of its group is not cooled by a 429, however often it comes."""
    cooldowns = alone_in_memory(clock)
    await fail(cooldowns, failure, 50, alone=True)
    assert (left_s(cooldowns, clock) > 0) == cools


@pytest.mark.parametrize("failure", ["invalid", "context_overflow", "content_policy"])
async def test_what_the_request_is_to_blame_for(clock: FrozenClock, failure: ErrorClass) -> None:
    """Errors of requests are not held against the deployment, nor are they calls that count."""
    cooldowns = alone_in_memory(clock)
    await fail(cooldowns, failure, 50)
    assert cooldowns.known() == {}
    await fail(cooldowns, "overload", 3)
    assert cooldowns.known() == {}


async def test_retry_after_is_honoured(clock: FrozenClock) -> None:
    """D3: a provider that says when to come back is left alone until then, at once, up to the bound."""
    cooldowns = alone_in_memory(clock, CooldownRules(max_cooldown_s=300))
    for failure, asked_s, expected_s in (("overload", 7, 7), ("rate_limit", 120, 120), ("rate_limit", 9_999, 300)):
        cooled = await cooldowns.failed("a", failure, alone=False, retry_after_s=asked_s)  # type: ignore[arg-type]
        assert cooled is not None
        assert cooled.left_s(clock.now_ms()) == expected_s
    assert await alone_in_memory(clock).failed("a", "overload", alone=True, retry_after_s=7) is None
    cooled = await alone_in_memory(clock).failed("a", "rate_limit", alone=False, retry_after_s=0)
    assert cooled is not None
    assert cooled.left_s(clock.now_ms()) == 60


# ------------------------------------------------------------------------------ rule 2: counts


@pytest.mark.parametrize("failure", ["overload", "timeout", "connection", "empty", "other"])
async def test_three_failures_are_tolerated(clock: FrozenClock, failure: ErrorClass) -> None:
    """D3, conformance 75: the fourth failure within a minute cools down, and no earlier one."""
    cooldowns = alone_in_memory(clock)
    assert [await fail(cooldowns, failure) is not None for _ in range(4)] == [False, False, False, True]
    assert left_s(cooldowns, clock) == 60


async def test_failures_of_before_a_cooldown_do_not_count(clock: FrozenClock) -> None:
    """A deployment that comes back is not sent away again for what it was sent away for."""
    cooldowns = alone_in_memory(clock, CooldownRules(cooldown_s=10))
    assert await fail(cooldowns, times=4) is not None
    clock.advance(seconds=10)
    assert await fail(cooldowns, times=3) is None
    assert await fail(cooldowns) is not None


@pytest.mark.parametrize("allowed", [0, 1, 7])
async def test_so_many_are_tolerated_as_allowed(clock: FrozenClock, allowed: int) -> None:
    """Conformance 75: `allowed_fails` of N tolerates N and then cools down; by class another number may hold."""
    cooldowns = alone_in_memory(clock, CooldownRules(allowed_fails=allowed, failure_rate=None))
    assert await fail(cooldowns, times=allowed) is None
    assert await fail(cooldowns) is not None
    classes: dict[ErrorClass, int] = {"auth": 2, "timeout": 0}
    cooldowns = alone_in_memory(clock, CooldownRules(allowed_fails=allowed, classes=classes, failure_rate=None))
    assert [await fail(cooldowns, "auth") is not None for _ in range(3)] == [False, False, True]
    clock.advance(seconds=61)
    assert await fail(cooldowns, "timeout") is not None


async def test_classes_count_apart(clock: FrozenClock) -> None:
    """Two failures of each of three classes are no more than three of any."""
    cooldowns = alone_in_memory(clock, CooldownRules(failure_rate=None))
    for failure in ("overload", "timeout", "other"):
        assert await fail(cooldowns, failure, 2) is None


async def test_failures_of_before_a_minute_do_not_count(clock: FrozenClock) -> None:
    """Three failures, and three more after a minute, cool nothing down."""
    cooldowns = alone_in_memory(clock)
    assert await fail(cooldowns, times=3) is None
    clock.advance(seconds=60)
    assert await fail(cooldowns, times=3) is None
    assert await fail(cooldowns) is not None


@pytest.mark.parametrize(
    ("failures", "calls", "cools"),
    [(1, 1, False), (4, 4, False), (5, 5, True), (5, 10, False), (6, 10, True), (3, 10, False), (30, 100, False)],
)
async def test_more_than_half_cools(clock: FrozenClock, failures: int, calls: int, *, cools: bool) -> None:
    """Conformance 75: by rate, one of one is not enough, five of five are; above 50 % cools down, 30 % does not."""
    cooldowns = alone_in_memory(clock, CooldownRules(allowed_fails=None))
    for _ in range(calls - failures):
        cooldowns.succeeded("a")
    await fail(cooldowns, times=failures)
    assert bool(cooldowns.known()) == cools


async def test_a_429_that_is_spared_is_no_failure_of_the_rate(clock: FrozenClock) -> None:
    """Conformance 75: what does not cool the only deployment of a group does not do so by its rate either."""
    cooldowns = alone_in_memory(clock, CooldownRules(allowed_fails=None, minimum=1, failure_rate=0.9))
    for _ in range(5):
        cooldowns.succeeded("a")
    await fail(cooldowns, "rate_limit", 50, alone=True)
    assert await fail(cooldowns, "overload", alone=True) is None


async def test_some_never_cool(clock: FrozenClock) -> None:
    """Conformance 75: what is listed, what is not watched, and everything where cooldowns are off, never cools down."""
    never = alone_in_memory(clock, CooldownRules(never=("a",)))
    off = alone_in_memory(clock, CooldownRules(cooldown_s=0))
    for cooldowns in (never, off):
        for failure in ("rate_limit", "auth", "overload"):
            await fail(cooldowns, failure, 10)
            await cooldowns.failed("a", "rate_limit", alone=False, retry_after_s=30)
        assert await cooldowns.cooling() == {}
    watched = alone_in_memory(clock)
    assert await watched.failed("unknown", "auth", alone=False) is None
    watched.succeeded("unknown")
    assert await watched.cooling() == {}


async def test_deployments_come_and_go(clock: FrozenClock) -> None:
    """Conformance 27: what is removed is forgotten with its cooldown, the others keep theirs."""
    cooldowns = alone_in_memory(clock)
    await fail(cooldowns, "auth")
    cooldowns.watch(["a", "c"])
    assert list(cooldowns.known()) == ["a"]
    cooldowns.watch(["c"])
    cooldowns.watch(["a", "c"])
    assert cooldowns.known() == {}


async def test_memory_is_bounded(clock: FrozenClock) -> None:
    """Of a deployment with very many calls a minute the latest are remembered, and the shares are theirs."""
    cooldowns = alone_in_memory(clock, CooldownRules(allowed_fails=None))
    for _ in range(4_000):
        await fail(cooldowns)
        for _ in range(2):
            cooldowns.succeeded("a")
    assert cooldowns.known() == {}
    for _ in range(10_000):
        cooldowns.succeeded("a")
    assert await fail(cooldowns, times=5_000) is None
    assert await fail(cooldowns) is not None


# ---------------------------------------------------------------------------- rule 3: extension


async def test_a_later_longer_one_extends(clock: FrozenClock) -> None:
    """Conformance 79: a cooldown that ends later takes the place of an active one, one that ends sooner does not."""
    cooldowns = alone_in_memory(clock)
    await cooldowns.failed("a", "rate_limit", alone=False, retry_after_s=60)
    assert await cooldowns.failed("a", "rate_limit", alone=False, retry_after_s=30) is None
    assert left_s(cooldowns, clock) == 60
    clock.advance(seconds=10)
    extended = await cooldowns.failed("a", "auth", alone=False, retry_after_s=300)
    assert extended is not None
    assert left_s(cooldowns, clock) == 300
    assert cooldowns.known()["a"].error == "auth"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 120), st.booleans()), min_size=1, max_size=12))
def test_no_order_of_failures_shortens(events: list[tuple[int, int, bool]]) -> None:
    """Conformance 79: whatever is told in whatever order, by two instances, a cooldown ends when the longest does that
    was told while it was active, and both come to know that."""

    async def run() -> None:
        clock = FrozenClock(START)
        storage = MemoryStorage(clock=clock)
        instances = [instance(storage, clock), instance(storage, clock)]
        ends_ms = 0
        for pause_s, asked_s, which in events:
            clock.advance(seconds=pause_s)
            ends_ms = max(ends_ms, clock.now_ms() + asked_s * 1000)
            await instances[which].failed("a", "rate_limit", alone=False, retry_after_s=asked_s)
        for _ in range(3):
            clock.advance(ms=FRESH_MS)
            for each in instances:
                await each.cooling()
        expected_s = max(0, ends_ms - clock.now_ms()) / 1000
        assert [left_s(each, clock) for each in instances] == [expected_s] * 2
        await storage.aclose()

    asyncio.run(run())


# ------------------------------------------------------------------------------ rule 4: sharing


async def test_instances_share_cooldowns(storage: Storage, clock: FrozenClock) -> None:
    """D3: what one instance leaves alone, another one does at its next look, a second later at most, as long."""
    one, other = instance(storage, clock), instance(storage, clock)
    assert await other.cooling() == {}
    cooled = await one.failed("a", "rate_limit", alone=False, status=429, message="slow down", retry_after_s=90)
    assert await other.cooling() == {}
    clock.advance(seconds=LATER_S)
    (seen,) = (await other.cooling()).values()
    assert cooled is not None
    assert abs(seen.until_ms - cooled.until_ms) < 100
    assert (seen.error, seen.status, seen.message) == ("rate_limit", 429, "")
    assert (await one.cooling())["a"].message == "slow down"


async def test_the_longer_one_of_two_instances_stays(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 79: whichever of two instances tells first, both end up with the longer cooldown, and so does a third."""
    for first_s, second_s in ((30, 300), (900, 400)):
        one, other = instance(storage, clock), instance(storage, clock)
        await one.failed("a", "rate_limit", alone=False, retry_after_s=first_s)
        await other.failed("a", "rate_limit", alone=False, retry_after_s=second_s)
        clock.advance(seconds=LATER_S)
        instances = [one, other, instance(storage, clock)]
        for each in instances:
            await each.cooling()
        longest_s = max(first_s, second_s) - LATER_S
        assert all(abs(left_s(each, clock) - longest_s) < 0.1 for each in instances)


async def test_a_longer_one_that_was_overwritten_comes_back(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 79: where a shorter cooldown has taken the place of a longer one in the store, whoever knows the longer
    one puts it back."""
    one = instance(storage, clock)
    await one.failed("a", "rate_limit", alone=False, retry_after_s=300)
    entries = cooldown_entries(storage)
    assert entries is not None
    await put(entries, "a", for_ms=1_000, ttl_ms=60_000)
    clock.advance(seconds=LATER_S)
    await one.cooling()
    other = instance(storage, clock)
    await other.cooling()
    assert abs(left_s(other, clock) - 299) < 0.1


async def test_200_failures_at_once_are_one_cooldown(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 79: of many failures that are told at once by two instances the longest cooldown is left."""
    one, other = instance(storage, clock), instance(storage, clock)
    await asyncio.gather(
        *(
            each.failed("a", "rate_limit", alone=False, retry_after_s=60 + n)
            for n in range(100)
            for each in (one, other)
        )
    )
    clock.advance(seconds=LATER_S)
    await one.cooling()
    third = instance(storage, clock)
    await third.cooling()
    assert abs(left_s(third, clock) - (159 - LATER_S)) < 0.1


async def put(entries: Entries, name: str, *, for_ms: int, ttl_ms: int, **fields: object) -> None:
    """Store a cooldown as another instance would."""
    token = f"{name}:{for_ms}:{ttl_ms}"
    assert await entries.begin(name, token, claim_ms=1000, fresh=True) == Leading()
    value = msgspec.json.encode({"for_ms": for_ms, "error": "rate_limit", **fields})
    assert await entries.store(name, token, value, ttl_ms=ttl_ms)


async def test_an_expired_payload_is_ignored(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 76: a cooldown that is over is none, though the store still has it; nor is what cannot be read."""
    entries = cooldown_entries(storage)
    assert entries is not None
    await put(entries, "a", for_ms=5_000, ttl_ms=60_000, of_a_later_release=True)
    await entries.begin("b", "t", claim_ms=1000)
    await entries.store("b", "t", b"{}", ttl_ms=60_000)
    late = instance(storage, clock)
    assert list(await late.cooling()) == ["a"]
    clock.advance(seconds=5)
    assert await late.cooling() == {}
    assert await instance(storage, clock).cooling() == {}


async def test_successes_write_nothing(storage: Storage, clock: FrozenClock) -> None:
    """Conformance 77: good answers, and failures that are tolerated, change nothing in the store and read nothing."""
    inner = cooldown_entries(storage)
    assert inner is not None
    entries = CountedEntries(inner)
    cooldowns = Cooldowns(entries=entries, clock=clock)
    cooldowns.watch(["a"])
    for _ in range(100):
        cooldowns.succeeded("a")
    await fail(cooldowns, times=3)
    assert (entries.reads, entries.writes) == (0, 0)
    await fail(cooldowns)
    assert entries.writes == 1


async def test_the_store_is_asked_once_a_second(storage: Storage, clock: FrozenClock) -> None:
    """Rule 4: a hundred calls at once ask for each deployment once, and again when a second is over."""
    inner = cooldown_entries(storage)
    assert inner is not None
    entries = CountedEntries(inner)
    cooldowns = Cooldowns(entries=entries, clock=clock)
    cooldowns.watch(["a", "b"])
    await asyncio.gather(*(cooldowns.cooling() for _ in range(100)))
    assert entries.reads == 2
    clock.advance(ms=FRESH_MS - 1)
    await cooldowns.cooling()
    assert entries.reads == 2
    clock.advance(ms=1)
    await cooldowns.cooling()
    assert entries.reads == 4
    clock.advance(seconds=-3600)
    await cooldowns.cooling()
    assert entries.reads == 6


async def test_who_is_cancelled_leaves_the_others_their_answer(clock: FrozenClock) -> None:
    """A call that is cancelled while the store is asked takes the answer from nobody else."""
    storage = MemoryStorage(clock=clock)
    await instance(storage, clock).failed("a", "auth", alone=False)
    cooldowns = instance(storage, clock)
    first, second = (asyncio.ensure_future(cooldowns.cooling()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert list(await second) == ["a"]
    assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError


class GatedEntries(CountedEntries):
    """Entries that answer when they are let."""

    def __init__(self, inner: Entries) -> None:
        super().__init__(inner)
        self.gate: asyncio.Event | None = None
        self.asked = asyncio.Event()

    async def find(self, key: str) -> Kept | None:
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        return await super().find(key)


async def test_nobody_goes_by_what_is_old_while_the_store_is_asked(clock: FrozenClock) -> None:
    """Rule 4: calls that come while the store is being asked wait for its answer, and do not ask again."""
    storage = MemoryStorage(clock=clock)
    await instance(storage, clock).failed("a", "auth", alone=False)
    entries = GatedEntries(storage.entries("cooldowns"))
    cooldowns = Cooldowns(entries=entries, clock=clock)
    cooldowns.watch(["a"])
    entries.gate = asyncio.Event()
    first = asyncio.ensure_future(cooldowns.cooling())
    await entries.asked.wait()
    second = asyncio.ensure_future(cooldowns.cooling())
    await asyncio.sleep(0)
    cooldowns.watch(["a", "b"])
    entries.gate.set()
    assert [list(each) for each in await asyncio.gather(first, second)] == [["a"]] * 2
    assert entries.reads == 1
    await cooldowns.cooling()
    assert entries.reads == 3


def test_another_loop_asks_by_itself() -> None:
    """A loop that stands still in the middle of asking keeps no other one waiting."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    entries = GatedEntries(storage.entries("cooldowns"))
    cooldowns = Cooldowns(entries=entries, clock=clock)
    cooldowns.watch(["a"])
    standing = asyncio.new_event_loop()
    entries.gate = asyncio.Event()
    first = standing.create_task(cooldowns.cooling())
    while not entries.asked.is_set():
        standing.run_until_complete(asyncio.sleep(0))
    gate, entries.gate = entries.gate, None
    assert asyncio.run(cooldowns.cooling()) == {}
    assert entries.reads == 1
    gate.set()
    assert standing.run_until_complete(first) == {}
    assert entries.reads == 2
    standing.close()


async def test_clocks_of_hosts_may_differ(clock: FrozenClock) -> None:
    """A cooldown is shared as a length, so that an instance whose clock is wrong by an hour waits as long."""
    storage = MemoryStorage(clock=clock)
    await instance(storage, clock).failed("a", "rate_limit", alone=False, retry_after_s=60)
    clock.advance(seconds=20)
    ahead = FrozenClock(clock.now_ms() + 3_600_000)
    other = instance(storage, ahead)
    assert (await other.cooling())["a"].left_s(ahead.now_ms()) == 40


# ----------------------------------------------------------------------------- rule 5: outages


async def test_without_the_store_each_goes_by_what_it_knows(
    clock: FrozenClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Rule 5: while the store is away nothing raises, cooldowns hold locally, one line is logged; then all is shared."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    one, other = instance(storage, clock), instance(storage, clock)
    storage.down()
    for _ in range(3):
        await one.failed("a", "auth", alone=False, retry_after_s=60)
        assert list(await one.cooling()) == ["a"]
        assert await other.cooling() == {}
        clock.advance(seconds=LATER_S)
    assert len([record for record in caplog.records if "not shared" in record.message]) == 2
    storage.up()
    for _ in range(2):
        for each in (one, other):
            await asyncio.gather(each.cooling(), asyncio.sleep(0))
        clock.advance(seconds=LATER_S)
    assert list(await other.cooling()) == ["a"]
    assert len([record for record in caplog.records if "shared again" in record.message]) == 2


async def test_nobody_waits_for_a_store_that_is_away(clock: FrozenClock) -> None:
    """Rule 5: once the store has not answered, it is asked in the background, and calls go by what is known."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    entries = GatedEntries(storage.entries("cooldowns"))
    cooldowns = Cooldowns(entries=entries, clock=clock)
    cooldowns.watch(["a"])
    storage.down()
    await cooldowns.cooling()
    storage.up()
    entries.gate = asyncio.Event()
    clock.advance(seconds=LATER_S)
    async with asyncio.timeout(60):
        assert await cooldowns.cooling() == {}
    await instance(storage, clock).failed("a", "auth", alone=False)
    entries.gate.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert list(await cooldowns.cooling()) == ["a"]


async def test_a_storage_without_entries_shares_nothing(clock: FrozenClock) -> None:
    """A storage that keeps no entries leaves each instance to itself."""
    assert cooldown_entries(LimitsStorage("memory://")) is None
    assert cooldown_entries(OutageStorage(LimitsStorage("memory://"))) is None
    assert isinstance(OutageStorage(MemoryStorage()), KeepsEntries)
    assert list(await alone_in_memory(clock).cooling()) == []


# -------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("slow down", "slow down"),
        ("x y " * 20, "x y " * 12 + "x ***"),
        ("Incorrect API key provided: sk-abc. Find yours", "Incorrect API key provided: *** Find yours"),
        ("key AIzaSyD-0123456789abcdef is wrong", "key *** is wrong"),
        ("two\nlines\tand tabs", "two lines and tabs"),
        ("", ""),
    ],
)
def test_stored_error_text_is_masked(message: str, expected: str) -> None:
    """Conformance 76: of an error's text the first 50 characters are kept, and nothing that looks like a key."""
    assert masked(message) == expected
    assert len(masked(message)) <= 53


async def test_the_store_never_sees_any_of_it(clock: FrozenClock) -> None:
    """Conformance 76, T15: an error's text is kept masked where it was said, and is in no storage: it may repeat what
    was asked."""
    storage = MemoryStorage(clock=clock)
    one = instance(storage, clock)
    await one.failed("a", "auth", alone=False, message="wrong key sk-secret " + "and more " * 99)
    kept = (await one.cooling())["a"].message
    assert "secret" not in kept
    assert len(kept) == 53
    assert (await instance(storage, clock).cooling())["a"].message == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"cooldown_s": -1},
        {"cooldown_s": True},
        {"max_cooldown_s": 86_401},
        {"failure_rate": 1},
        {"failure_rate": "half"},
        {"minimum": 0},
        {"allowed_fails": -1},
        {"classes": {"auth": -1}},
        {"classes": {"tired": 1}},
        {"never": "a"},
    ],
    ids=str,
)
def test_malformed_rules_are_refused_when_they_are_made(wrong: dict[str, Any]) -> None:
    """What is no rule is an error that names it."""
    with pytest.raises(ConfigurationError, match=str(next(iter(wrong))).split("_", maxsplit=1)[0]):
        CooldownRules(**wrong)
