"""Rates in a store of the `limits` package: memory, a real Redis and a real memcached."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal

import httpx2
import limits.aio.storage
import limits.storage
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route as StarletteRoute
from tests.fault_proxy import FaultProxy
from tests.ports import free_port
from tests.servers import OwnRedis, shared_redis, unique_namespace, wait_until
from tests.storage.values import ME, OTHER, START_MS, ask, draft, record, refuse, settle, take

from asgi_llm_guard import (
    Budget,
    CacheScope,
    Concurrency,
    Context,
    Guard,
    GuardMiddleware,
    Iterations,
    LimitExceeded,
    ModelAllow,
    RateLimit,
    Route,
    guarded,
)
from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Refused, Rule, Unit, meter_key
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.policies.base import Policy, Verdict
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.limits import LimitsStorage, Strategy
from asgi_llm_guard.windows import Bucket, Rolling, Sliding, Window

pytestmark = pytest.mark.anyio

MINUTE = Sliding(60_000)
PERIOD_MS = 60_000

Make = Callable[[], LimitsStorage]


def rate(limit: int | None = 3, subject: str = "ada", *, window: Window = MINUTE, **changes: Any) -> Meter:
    key = meter_key("rate", Unit.CALLS, window, subject)
    given = {"unit": Unit.CALLS, "rule": Rule.RATE, "limit": limit, "window": window, "owned": True} | changes
    return Meter(key=key, policy="rate", scope="caller", subject=subject, **given)


def one(limit: int | None = 3, subject: str = "ada", **changes: Any) -> Claim:
    return Claim(rate(limit, subject, **changes), 1)


async def used(storage: LimitsStorage, *meters: Meter) -> list[int]:
    return [reading.used for reading in await storage.read(meters)]


@pytest.fixture(scope="module")
def memcached() -> Iterator[str]:
    """The address of a memcached."""
    program = shutil.which("memcached")
    assert program, "memcached is not in PATH, and these tests start a real one; run scripts/install-servers"
    port = free_port()
    with subprocess.Popen([program, "-l", "127.0.0.1", "-p", str(port), "-u", "nobody"]) as process:

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        try:
            wait_until(answers, "memcached answers")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


SORTS = ("memory moving", "memory fixed", "redis moving", "redis fixed", "valkey moving", "memcached fixed")


@pytest.fixture(params=SORTS)
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Makes storages on one store that nobody else uses, as the processes of one service would."""
    kind, strategy = request.param.split()
    prefix = unique_namespace()
    memory = limits.aio.storage.MemoryStorage()
    async with contextlib.AsyncExitStack() as made:

        def build() -> LimitsStorage:
            store: Any = memory
            if kind in {"redis", "valkey"}:
                store = request.getfixturevalue(f"{kind}_server").url
            elif kind == "memcached":
                store = f"memcached://{request.getfixturevalue('memcached')}"
            storage = LimitsStorage(store, strategy=strategy, prefix=prefix, timeout_s=10)
            made.push_async_callback(storage.aclose)
            return storage

        yield build


@pytest.fixture
async def storage(make: Make) -> LimitsStorage:
    return make()


@pytest.fixture
async def memory() -> AsyncIterator[LimitsStorage]:
    """For what does not depend on the store."""
    storage = LimitsStorage("memory://")
    yield storage
    await storage.aclose()


# ----------------------------------------------------------------------------------- admission


async def test_exactly_the_limit_is_admitted(make: Make) -> None:
    """Of 40 calls at once over two processes' storages, exactly as many are admitted as the limit says."""
    storages = (make(), make())
    answers = await asyncio.gather(*[ask(storages[n % 2], f"call-{n}", one(7)) for n in range(40)])
    assert sum(isinstance(answer, Granted) for answer in answers) == 7
    assert await used(make(), rate(7)) == [7]


async def test_no_limit_of_several_is_exceeded_under_contention(make: Make) -> None:
    """Calls at once that each claim three limits never get more than any of them, whichever limit they lose."""
    storages = (make(), make())
    each = [(one(9, "all"), one(4, f"team-{n % 3}"), one(2, f"user-{n % 6}")) for n in range(48)]
    answers = await asyncio.gather(*[ask(storages[n % 2], f"call-{n}", *claims) for n, claims in enumerate(each)])
    granted = [claims for answer, claims in zip(answers, each, strict=True) if isinstance(answer, Granted)]
    assert granted
    for meter in {claim.meter for claims in each for claim in claims}:
        assert meter.limit is not None
        assert sum(claim.meter == meter for claims in granted for claim in claims) <= meter.limit


async def test_a_refused_call_takes_none_of_its_limits(storage: LimitsStorage) -> None:
    """Whichever limit refuses, and wherever it stands in the order, the others keep their room. Conformance 9, 50."""
    await take(storage, "first", one(1, "full"))
    for claims in ([one(1, "full"), one(5)], [one(5), one(1, "full")], [one(5), one(0, "blocked")]):
        await refuse(storage, "refused", *claims)
    assert await used(storage, rate(5), rate(1, "full"), rate(0, "blocked")) == [0, 1, 0]


async def test_a_refusal_shows_every_claim(storage: LimitsStorage) -> None:
    """Used, and when it fits again, are told for the refusing claim; those that fit are told as fitting."""
    await take(storage, "first", one(1, "full"))
    before_ms = time.time_ns() // 1_000_000
    free, full = await refuse(storage, "second", one(5), one(1, "full"))
    assert (free.fits, free.taken, free.used, free.held) == (True, False, 0, 0)
    assert (full.fits, full.taken, full.used, full.held) == (False, False, 1, 0)
    assert full.resets_at_ms is not None
    assert before_ms + PERIOD_MS - 10_000 < full.resets_at_ms <= before_ms + PERIOD_MS + 10_000


async def test_what_can_never_fit_has_no_reset(storage: LimitsStorage) -> None:
    """A limit of 0, or an amount above the limit, is refused without an instant to wait for."""
    blocked, larger = await refuse(storage, "never", one(0), Claim(rate(3, "bob"), 4))
    assert [(each.fits, each.resets_at_ms) for each in (blocked, larger)] == [(False, None), (False, None)]
    assert await used(storage, rate(0), rate(3, "bob")) == [0, 0]


async def test_amounts_above_one_are_counted(storage: LimitsStorage) -> None:
    """A claim of several units takes all of them, or none."""
    await take(storage, "first", Claim(rate(5), 3))
    (state,) = await refuse(storage, "second", Claim(rate(5), 3))
    assert (state.used, state.fits) == (3, False)
    await take(storage, "third", Claim(rate(5), 2))
    assert await used(storage, rate(5)) == [5]


async def test_the_first_plan_that_fits_is_taken(storage: LimitsStorage) -> None:
    """Of several plans the first that fits is granted; the one before it takes nothing."""
    await take(storage, "first", one(1, "full"))
    plans = [(Bundle("call", (one(5), one(1, "full"))),), (Bundle("call", (one(5, "bob"),)),)]
    answer = await storage.reserve(ME, plans)
    assert isinstance(answer, Granted)
    assert answer.plan == 1
    assert await used(storage, rate(5), rate(5, "bob")) == [0, 1]
    none = await storage.reserve(ME, [(Bundle("other", (one(1, "full"),)),), (Bundle("other", (one(0),)),)])
    assert isinstance(none, Refused)
    assert [[each.fits for each in states] for states in none.states] == [[False], [False]]


async def test_another_limit_on_the_same_meter_keeps_its_count(storage: LimitsStorage) -> None:
    """Raising or lowering a limit goes on from what was counted."""
    for number in range(3):
        await take(storage, f"call-{number}", one(3))
    await take(storage, "raised", one(4))
    (state,) = await refuse(storage, "lowered", one(2))
    assert state.used >= 2


async def test_shadow_claims_refuse_nothing_and_count_what_was_granted(storage: LimitsStorage) -> None:
    """A claim that only watches is taken iff it fits and the call is granted; its misfit is told."""
    shadow = one(1, "shadow", enforce=False)
    (_, first) = await take(storage, "first", one(3), shadow)
    (_, second) = await take(storage, "second", one(3), shadow)
    assert [(each.fits, each.taken) for each in (first, second)] == [(True, True), (False, False)]
    other = one(5, "other", enforce=False)
    states = await refuse(storage, "refused", one(0, "blocked"), other)
    assert [each.taken for each in states] == [False, False]
    assert await used(storage, shadow.meter, other.meter, rate(3)) == [1, 0, 2]


class Outrun(limits.aio.storage.MemoryStorage):
    """A store that others change between every look and every take: it always shows itself empty."""

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        return time.time(), 0


async def test_a_limit_that_others_use_up_in_between_refuses() -> None:
    """Then the refusal names that limit as full, and nothing as taken; what was taken before it stays taken."""
    store = Outrun()
    storage = LimitsStorage(store)
    await take(storage, "first", one(2, "full"))
    await take(storage, "second", one(2, "full"))
    before_ms = time.time_ns() // 1_000_000
    scarce, full = await refuse(storage, "third", one(1, "scarce"), one(2, "full"))
    assert (scarce.fits, scarce.taken) == (True, False)
    assert (full.fits, full.taken, full.used) == (False, False, 2)
    assert full.resets_at_ms is not None
    assert before_ms + PERIOD_MS <= full.resets_at_ms <= before_ms + PERIOD_MS + 10_000
    assert sorted(map(len, store.events.values())) == [1, 2]
    await storage.aclose()


async def test_what_left_the_window_no_longer_counts() -> None:
    """`moving`: a request counts for one period, to the request."""
    server, prefix = shared_redis(), unique_namespace()
    storage = LimitsStorage(server.url, prefix=prefix, timeout_s=10)
    await take(storage, "old", one(2))
    await take(storage, "new", one(2))
    key = f"LIMITS:{prefix}:moving:{rate().key}"
    server.call("LSET", key, -1, repr(time.time() - 61))
    assert await used(storage, rate(2)) == [1]
    await take(storage, "another", one(2))
    await refuse(storage, "last", one(2))
    await storage.aclose()


async def test_a_fixed_window_begins_anew() -> None:
    """`fixed`: after its end the whole limit fits again."""
    server, prefix = shared_redis(), unique_namespace()
    storage = LimitsStorage(server.url, strategy="fixed", prefix=prefix, timeout_s=10)
    await take(storage, "first", one(1))
    server.call("DEL", f"LIMITS:{prefix}:fixed:{rate().key}")  # as its expiry does
    await take(storage, "second", one(1))
    await refuse(storage, "third", one(1))
    await storage.aclose()


# --------------------------------------------------------------------------------------- calls


async def test_reserving_again_takes_nothing(storage: LimitsStorage) -> None:
    """A repeated reserve finds its own call, with the same receipts."""
    bundles = (Bundle("call", (one(3),), draft("call")), Bundle("request", (one(3, "bob"),)))
    first = await storage.reserve(ME, (bundles,))
    again = await storage.reserve(ME, (bundles,))
    assert isinstance(first, Granted)
    assert isinstance(again, Granted)
    assert (again.receipts, again.plan, again.replayed) == (first.receipts, 0, True)
    assert await used(storage, rate(3), rate(3, "bob")) == [1, 1]


async def test_a_plan_of_which_a_part_has_ended_is_not_begun_again(memory: LimitsStorage) -> None:
    """Reserving an ended call together with an open one takes nothing."""
    bundles = (Bundle("call", (one(3),), draft("call")), Bundle("request", (one(3, "bob"),)))
    await memory.reserve(ME, (bundles,))
    await settle(memory, "call")
    assert isinstance(await memory.reserve(ME, (bundles,)), Ended)
    assert await used(memory, rate(3), rate(3, "bob")) == [1, 1]


async def test_calls_without_claims_need_no_store() -> None:
    """A call that no rate counts is opened and settled while the store cannot be reached."""
    storage = LimitsStorage(f"redis://127.0.0.1:{free_port()}")
    await take(storage, "call", draft=draft("call"))
    assert (await settle(storage, "call", record=record("call", 5))).status == "settled"
    await storage.aclose()


async def test_a_call_ends_once(memory: LimitsStorage) -> None:
    """The first settlement closes the call and writes its record; later ones, and reserves, find it ended."""
    await take(memory, "call", one(3), draft=draft("call"))
    assert await memory.open_holds() == 1
    settled = await settle(memory, "call", None, record=record("call", 5))
    assert (settled.status, settled.overages) == ("settled", (0,))
    assert (await settle(memory, "call", None, record=record("call", 9))).status == "duplicate"
    assert isinstance(await ask(memory, "call", one(3)), Ended)
    assert [each.cost_nanousd for each in await memory.records()] == [5]
    assert await memory.open_holds() == 0


async def test_settling_gives_nothing_back(storage: LimitsStorage) -> None:
    """A call that turns out not to have been sent keeps the unit that it took."""
    receipts = await take(storage, "call", one(3))
    await settle(storage, "call", 0, receipts=receipts)
    assert await used(storage, rate(3)) == [1]


async def test_a_reserve_after_its_cancellation_is_refused(memory: LimitsStorage) -> None:
    """A cancellation that arrives first is remembered."""
    assert (await settle(memory, "call")).status == "cancelled"
    answer = await ask(memory, "call", one(3))
    assert isinstance(answer, Ended)
    assert answer.reason == "cancelled"
    assert await memory.open_holds() == 0


async def test_retiring_closes_what_an_owner_left(memory: LimitsStorage) -> None:
    """The calls of an owner that goes are closed with an estimate in the ledger; those of others stay open."""
    await take(memory, "mine", one(9), draft=draft("mine", cost=7))
    await take(memory, "other", one(9), draft=draft("other"), owner=OTHER)
    await memory.retire(ME)
    assert [(each.call_id, each.outcome) for each in await memory.records()] == [("mine", "expired")]
    assert await memory.open_holds() == 1
    late = await settle(memory, "mine", None, record=record("mine", 3))
    assert late.status == "late"
    assert [(each.cost_nanousd, each.late) for each in await memory.records()] == [(3, True)]


async def test_the_heartbeat_of_another_owner_closes_what_a_dead_one_left() -> None:
    """Calls of an owner without heartbeats are closed, each with an estimate in the ledger."""
    storage = LimitsStorage("memory://", lapse_ms=1)
    await take(storage, "call", one(9), draft=draft("call", cost=7))
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() > begun + 0.005, "the owner lapses")
    assert (await storage.heartbeat(OTHER)).expired == ("call",)
    assert isinstance(await ask(storage, "call", one(9)), Ended)
    assert [each.outcome for each in await storage.records()] == ["expired"]
    assert await used(storage, rate(9)) == [2], "asked again after its end: taken, and not given back"
    await storage.aclose()


async def test_heartbeats_need_no_store() -> None:
    """An owner is alive without a trip to a store that cannot be reached."""
    storage = LimitsStorage(f"redis://127.0.0.1:{free_port()}")
    beat = await storage.heartbeat(ME)
    assert (beat.lapsed, beat.expired) == (False, ())
    await storage.aclose()


async def test_records_are_found_by_instant(memory: LimitsStorage) -> None:
    """`records` gives what this process settled, from an instant on and at most so many."""
    for number in range(4):
        await take(memory, f"call-{number}", one(9))
        await settle(memory, f"call-{number}", record=record(f"call-{number}", number, at_ms=START_MS + number))
    found = await memory.records(since_ms=START_MS + 1, limit=2)
    assert [each.call_id for each in found] == ["call-1", "call-2"]


async def test_amending_takes_what_is_new(storage: LimitsStorage) -> None:
    """A call that is described later takes its further limits, and keeps what it has."""
    (first,) = await take(storage, "call", one(3))
    answer = await storage.amend(ME, Bundle("call", (one(3), one(3, "model")), draft("call")))
    assert isinstance(answer, Granted)
    assert answer.receipts[0] == first
    assert await used(storage, rate(3), rate(3, "model")) == [1, 1]
    more = await storage.amend(ME, Bundle("call", (Claim(rate(3), 3), one(3, "model"))))
    assert isinstance(more, Granted)
    assert await used(storage, rate(3), rate(3, "model")) == [3, 1]


async def test_an_amendment_that_does_not_fit_changes_nothing(storage: LimitsStorage) -> None:
    """A refused amendment leaves the call open with what it had; a lower limit is judged without the call's own part."""
    await take(storage, "call", one(3))
    refused = await storage.amend(ME, Bundle("call", (one(3), one(0, "blocked"), one(3, "model"))))
    assert isinstance(refused, Refused)
    assert [each.fits for each in refused.states[0]] == [True, False, True]
    assert await used(storage, rate(3), rate(3, "model")) == [1, 0]
    assert isinstance(await storage.amend(ME, Bundle("call", (one(1),))), Granted)
    assert isinstance(await storage.amend(ME, Bundle("call", (one(0),))), Refused)
    assert await used(storage, rate(3)) == [1]


async def test_an_ended_call_cannot_be_amended(memory: LimitsStorage) -> None:
    """Amending a call that has ended takes nothing."""
    await take(memory, "call", one(3))
    await settle(memory, "call")
    assert isinstance(await memory.amend(ME, Bundle("call", (one(3), one(3, "bob")))), Ended)
    assert await used(memory, rate(3, "bob")) == [0]


async def test_an_unknown_call_cannot_be_amended(memory: LimitsStorage) -> None:
    """Amending a call that is not open takes nothing."""
    answer = await memory.amend(ME, Bundle("call", (one(3),)))
    assert isinstance(answer, Ended)
    assert await used(memory, rate(3)) == [0]


async def test_a_reading_tells_when_room_comes_back(storage: LimitsStorage) -> None:
    """Of a meter that is partly used, used and the next instant at which there is more room; of an unused one neither."""
    before_ms = time.time_ns() // 1_000_000
    await take(storage, "call", one(3))
    reading, unused = await storage.read([rate(3), rate(3, "nobody")])
    assert (reading.used, reading.held) == (1, 0)
    assert reading.resets_at_ms is not None
    assert before_ms + PERIOD_MS - 2_000 < reading.resets_at_ms <= before_ms + PERIOD_MS + 10_000
    assert (unused.used, unused.held, unused.resets_at_ms) == (0, 0, None)


async def test_a_reset_empties_a_counter(storage: LimitsStorage) -> None:
    """After a reset the whole limit fits again."""
    await take(storage, "call", Claim(rate(3), 3))
    await storage.reset([rate(3)])
    assert await used(storage, rate(3)) == [0]
    await take(storage, "next", Claim(rate(3), 3))


async def test_there_is_no_export_and_no_load(memory: LimitsStorage) -> None:
    """What the store cannot give or take is an error that says what to do, never half of it."""
    with pytest.raises(StorageError, match="start the new storage empty"):
        _ = [line async for line in memory.export()]
    with pytest.raises(StorageError, match="load into memory://"):
        await memory.load([b""])


# ---------------------------------------------------------------------------------------- keys


async def test_strategies_have_counters_of_their_own() -> None:
    """The same meter under both strategies in one Redis is two keys, whose values are of different types."""
    server, prefix = shared_redis(), unique_namespace()
    strategies: Sequence[Strategy] = ("moving", "fixed")
    for strategy in strategies:
        storage = LimitsStorage(server.url, strategy=strategy, prefix=prefix, timeout_s=10)
        await take(storage, "call", one(1))
        await storage.aclose()
    assert sorted(server.call("KEYS", f"*{prefix}*")) == [
        f"LIMITS:{prefix}:{strategy}:{rate().key}".encode() for strategy in ("fixed", "moving")
    ]


async def test_every_subject_has_a_counter_of_its_own(storage: LimitsStorage) -> None:
    """Names with spaces, line feeds, other scripts, or of any length are counters of their own in every store."""
    names = ["a b", "a  b", "a\nb", "a/b", "a\x00b", "ä", "日本", "x" * 300, "x" * 301, "a:b", "a", "\ud800"]
    for name in names:
        await take(storage, f"call {name!r}", one(1, name))
        await refuse(storage, f"again {name!r}", one(1, name))


# ------------------------------------------------------------------------------------- policies

NOT_KEPT: dict[str, tuple[Callable[[], Policy], str]] = {
    "iterations": (lambda: Iterations(5), "iterations: .* Iterations is none"),
    "budget": (lambda: Budget("$5/daily"), "user_budget: .* Budget is none"),
    "slots": (lambda: Concurrency(5), "Concurrency is none"),
    "tokens": (lambda: RateLimit("100 tokens/minute"), "user_rate: it counts tokens"),
    "bucket": (lambda: RateLimit("5/minute", algorithm="bucket"), "user_rate: its algorithm is a bucket"),
    "burst": (lambda: RateLimit("5/minute", algorithm="bucket", burst=9, name="mine"), "mine: its algorithm"),
    "session": (lambda: RateLimit("5/minute", per="session"), "session_rate: it counts by session"),
    "refund": (lambda: RateLimit("5/minute", expiry_charge="nothing"), "expiry_charge='nothing'"),
    "lease": (lambda: RateLimit("500/minute", per="global", lease=50), "global_rate: its lease"),
    "durable": (lambda: RateLimit("5/minute", durable="replica"), "user_rate: durable='replica'"),
    "shadow": (lambda: RateLimit("5 tokens/minute").shadow(), "user_rate.shadow: it counts tokens"),
}


@pytest.mark.parametrize("kind", NOT_KEPT)
async def test_policies_that_it_cannot_keep_are_refused_when_a_guard_is_built(kind: str) -> None:
    """A guard with anything but rates of requests is a configuration error that names the policy."""
    build, message = NOT_KEPT[kind]
    with pytest.raises(ConfigurationError, match=message):
        Guard([RateLimit("5/minute"), build()], storage="limits+memory://")


async def test_policies_of_routes_functions_and_calls_are_looked_at_as_well() -> None:
    """Policies that are added later are refused where they are bound, before any call."""
    guard = Guard([RateLimit("5/minute")], storage="limits+memory://")
    with pytest.raises(ConfigurationError, match="iterations"):
        GuardMiddleware(Starlette(), guard, routes=[Route("/chat", extra=[Iterations(5)])])
    with pytest.raises(ConfigurationError, match="iterations"):
        guard.open(extra=[Iterations(5)])

    @guarded(Iterations(5), guard=guard)
    async def function() -> None:
        """Is never called."""

    with pytest.raises(ConfigurationError, match="iterations"):
        await function()


async def test_policies_without_claims_go_with_any_storage() -> None:
    """Allow-lists and the scope of a cache claim nothing, so they work here too."""
    async with Guard(
        [RateLimit("5/minute", counts="calls"), ModelAllow(["openai/gpt-5-mini"]), CacheScope()],
        storage="limits+memory://",
    ) as guard:
        async with guard.open(Context(caller="ada")):
            async with guard.call(model="openai/gpt-5-mini", max_output_tokens=5):
                pass
            with pytest.raises(LimitExceeded, match="not allowed"):
                async with guard.call(model="openai/gpt-5", max_output_tokens=5):
                    pass
        assert len(await guard.storage.records()) == 1


class Lying:
    """Says that it claims rates of requests, and claims something else."""

    name = "lying"
    counts: Literal["calls", "requests"] = "requests"

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def samples(self) -> tuple[Meter, ...]:
        return (rate(),)

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:
        return Verdict((self.claim,))


@pytest.mark.parametrize(
    "claim",
    [
        one(None),
        one(3, window=Rolling(60_000)),
        one(3, window=Bucket(60_000, 3)),
        one(3, window=Sliding(1_500, 15)),
        one(3, unit=Unit.TOKENS),
        one(3, rule=Rule.QUOTA),
        Claim(rate(3), -1),
    ],
)
async def test_what_a_policy_did_not_announce_is_not_admitted(claim: Claim) -> None:
    """A claim that cannot be kept, or that is negative, is never granted and never reaches the store."""
    async with Guard([Lying(claim)], storage="limits+memory://") as guard:
        with pytest.raises(LimitExceeded) as raised:
            await guard.open(Context(caller="ada")).__aenter__()
        assert raised.value.denied.code == "guard_unavailable"
        assert await guard.storage.read([rate(3)]) == await guard.storage.read([rate(3, "nobody")])


# ---------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "sliding"}, "strategy: expected 'moving' or 'fixed'"),
        ({"timeout_s": 0}, "timeout_s: expected seconds"),
        ({"timeout_s": True}, "timeout_s: expected seconds"),
        ({"prefix": "a b"}, "prefix: expected"),
        ({"prefix": "x" * 51}, "prefix: expected"),
        ({"max_records": 0}, "max_records"),
    ],
)
async def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    """A wrong argument is a configuration error that names it."""
    with pytest.raises(ConfigurationError, match=message):
        LimitsStorage("memory://", **arguments)


async def test_synchronous_storages_are_refused() -> None:
    """A storage that would block the event loop is a configuration error."""
    with pytest.raises(ConfigurationError, match="block the event loop"):
        LimitsStorage(limits.storage.MemoryStorage())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("limits+nothing://secret@host", r"limits\+nothing:// cannot be opened"),
        ("limits+redis://:secret@host:port", r"limits\+redis:// cannot be opened"),
        ("limits+memcached://user:secret@host?strategy=fixed", r"limits\+memcached:// cannot be opened"),
        ("limits+memcached://secret:11211", "no moving window; use strategy='fixed'"),
        ("limits+memory://?timeout_s=secre", "timeout_s: expected seconds, got"),
        ("limits+memory://?strategy=bucket", "strategy: expected 'moving' or 'fixed'"),
        ("limits+redis+sentinel://:secret@host:1", r"limits\+redis\+sentinel:// cannot be opened"),
    ],
)
async def test_a_wrong_url_is_an_error_that_shows_no_password(url: str, message: str) -> None:
    """What cannot be opened says why, and never shows the URL."""
    with pytest.raises(ConfigurationError, match=message) as raised:
        Guard([RateLimit("5/minute")], storage=url)
    assert "secret" not in str(raised.value)


def test_a_missing_client_library_is_named() -> None:
    """Without the library that the package needs for a store, the error says what to install."""
    script = """
import sys
sys.modules["memcachio"] = None
from asgi_llm_guard import Guard
from asgi_llm_guard.errors import ConfigurationError
try:
    Guard(storage="limits+memcached://user:secret@host:11211?strategy=fixed")
except ConfigurationError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "pip install 'limits[async-memcached]'" in output
    assert "secret" not in output


async def test_options_in_the_url_are_ours_and_the_rest_is_the_stores() -> None:
    """`strategy`, `timeout_s` and `prefix` are taken out of the query; what is left goes on to the package."""
    prefix = unique_namespace()
    url = f"limits+{shared_redis().url}?strategy=fixed&timeout_s=10&prefix={prefix}&client_name=guard-test"
    storage = open_storage(url, clock=SystemClock())
    assert isinstance(storage, LimitsStorage)
    await take(storage, "call", one(3))
    assert b"name=guard-test" in shared_redis().call("CLIENT", "LIST")
    assert shared_redis().call("GET", f"LIMITS:{prefix}:fixed:{rate().key}") == b"1"
    await storage.aclose()


async def test_storages_that_others_have_registered_are_opened() -> None:
    """A scheme that was added to the package is opened like its own."""

    class OwnStore(limits.aio.storage.MemoryStorage):
        STORAGE_SCHEME = ["async+own"]  # noqa: RUF012 - as the package declares it

    storage = open_storage("limits+own://", clock=SystemClock())
    assert isinstance(storage, LimitsStorage)
    await take(storage, "call", one(1))
    await refuse(storage, "another", one(1))
    await storage.aclose()


@pytest.mark.parametrize(
    "address",
    [
        "redis+sentinel://127.0.0.1:1/main",
        "redis+cluster://127.0.0.1:1",
        "redis+unix:///tmp/none",
        "mongodb://user:password@127.0.0.1:1",
    ],
)
async def test_other_stores_are_opened(address: str) -> None:
    """Sentinel, Cluster, unix sockets and MongoDB connect when first used; what is not there is a storage error."""
    storage = LimitsStorage(address, timeout_s=0.2)
    with pytest.raises(StorageError):
        await ask(storage, "call", one(3))
    await storage.aclose()


# ------------------------------------------------------------------------------- loops and outages


async def test_a_store_that_hangs_is_an_error_within_the_timeout(own_redis: OwnRedis) -> None:
    """A call whose store does not answer is refused as unavailable, nothing is asked twice, and it goes on afterwards."""
    server = own_redis()
    url = f"limits+{server.url}?timeout_s=1&prefix=p"
    async with Guard([RateLimit("3/minute", per="caller", on_outage="deny")], storage=url) as guard:
        async with guard.open(Context(caller="ada")):
            pass
        server.pause()
        begun = time.monotonic()
        with pytest.raises(LimitExceeded) as raised:
            await guard.open(Context(caller="ada")).__aenter__()
        assert time.monotonic() - begun < 20
        assert raised.value.denied.code == "guard_unavailable"
        server.resume()
        storage = LimitsStorage(server.url, prefix="p", timeout_s=10)
        (meter,) = guard.policies[0].plan(Context(caller="ada"), None, 0).claims
        assert await used(storage, meter.meter) == [1]
        await take(storage, "next", meter)
        await storage.aclose()


async def test_a_request_of_which_the_answer_is_lost_is_not_sent_again(own_redis: OwnRedis) -> None:
    """A request that may have been counted is an error, and is counted once: the client library must not repeat it."""
    server = own_redis()
    async with FaultProxy(server.url) as proxy:
        storage = LimitsStorage(proxy.url, strategy="fixed", timeout_s=5)
        await take(storage, "first", one(9))
        proxy.cut_at_reply(of="EVALSHA")
        with pytest.raises(StorageError):
            await ask(storage, "second", one(9))
        assert await used(storage, rate(9)) == [2]
        await storage.aclose()


async def test_what_is_let_through_in_an_outage_is_not_counted_later(own_redis: OwnRedis) -> None:
    """With `on_outage="allow"` requests pass while the store is away, and their settlements add nothing to its counters."""
    server = own_redis()
    policies = [RateLimit("1/minute", per="caller", on_outage="allow")]
    async with Guard(policies, storage=f"limits+{server.url}?prefix=p&timeout_s=5") as guard:
        server.kill()
        for _ in range(3):
            async with guard.open(Context(caller="ada")):
                pass
        server.start()
        await guard.heartbeat()
        async with guard.open(Context(caller="ada")):
            pass
        with pytest.raises(LimitExceeded):
            await guard.open(Context(caller="ada")).__aenter__()


async def test_a_store_that_is_gone_is_an_error(own_redis: OwnRedis) -> None:
    """Every verb that needs the store raises `StorageError` while it is away, and works when it is back."""
    server = own_redis()
    storage = LimitsStorage(server.url, timeout_s=5)
    await take(storage, "call", one(3))
    server.kill()
    for verb in (
        lambda: ask(storage, "other", one(3)),
        lambda: storage.amend(ME, Bundle("call", (one(3), one(3, "bob")))),
        lambda: storage.read([rate()]),
        lambda: storage.reset([rate()]),
    ):
        with pytest.raises(StorageError, match="limits storage: "):
            await verb()
    server.start()
    await take(storage, "later", one(3))
    await storage.aclose()


async def test_every_event_loop_has_connections_of_its_own(own_redis: OwnRedis) -> None:
    """From a URL, asynchronous and synchronous code count together, and closing closes the connections of both."""
    server = own_redis()
    async with Guard([RateLimit("3/minute", per="caller")], storage=f"limits+{server.url}?timeout_s=10") as guard:

        def synchronous() -> None:
            with guard.open_sync(Context(caller="ada")):
                pass

        async with guard.open(Context(caller="ada")):
            await asyncio.to_thread(synchronous)
        await asyncio.to_thread(synchronous)
        with pytest.raises(LimitExceeded):
            await guard.open(Context(caller="ada")).__aenter__()
    wait_until(lambda: server.call("CLIENT", "LIST").count(b"\n") == 1, "only the asking connection is left")


def test_an_object_belongs_to_one_event_loop() -> None:
    """An object of the package is not used from two loops, whose calls it could not keep apart; after the first, the next may."""
    storage = LimitsStorage(limits.aio.storage.MemoryStorage())

    async def from_another() -> None:
        await take(storage, "first", one(9))
        with pytest.raises(StorageError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, take(storage, "second", one(9)))

    asyncio.run(from_another())
    asyncio.run(take(storage, "third", one(9)))


async def test_closing_ends_its_connections(own_redis: OwnRedis) -> None:
    """After `aclose` no connection is left, and the storage says that it is closed."""
    server = own_redis()
    storage = LimitsStorage(server.url, timeout_s=10)
    await asyncio.gather(*[take(storage, f"call-{n}", one(99), one(99, "bob")) for n in range(20)])
    await storage.aclose()
    wait_until(lambda: server.call("CLIENT", "LIST").count(b"\n") == 1, "only the asking connection is left")
    with pytest.raises(StorageError, match="closed"):
        await ask(storage, "call", one(3))
    with pytest.raises(StorageError, match="closed"):
        storage.settle(())


def test_a_forked_process_begins_with_no_calls() -> None:
    """The child of a fork holds none of its parent's calls, and connects anew."""
    script = f"""
import asyncio, os
from asgi_llm_guard.storage.limits import LimitsStorage
from tests.storage.test_limits import one, rate, take, used
storage = LimitsStorage({shared_redis().url!r}, prefix={unique_namespace()!r}, timeout_s=10)
asyncio.run(take(storage, "call", one(9)))
child = os.fork()
async def look(name):
    await take(storage, name, one(9))
    print(await storage.open_holds(), await used(storage, rate(9)), flush=True)
    await storage.aclose()
if child:
    os.waitpid(child, 0)
asyncio.run(look("child" if not child else "parent"))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.splitlines() == ["1 [2]", "2 [3]"]


# --------------------------------------------------------------------------------- the whole guard


async def test_a_service_refuses_over_its_rate(redis_server: Any) -> None:
    """Through the middleware: two requests pass, the third gets a 429 that says when to come again."""
    url = f"limits+{redis_server.url}?timeout_s=10&prefix={unique_namespace()}"
    guard = Guard([RateLimit("2/minute; 100/hour", per="global")], storage=url, disclose="all")

    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("done")

    app = GuardMiddleware(Starlette(routes=[StarletteRoute("/chat", answer, methods=["POST"])]), guard)
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
        answers = [await client.post("/chat") for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert "r=0" in answers[1].headers["ratelimit"]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 66
    await guard.aclose()
