"""Decisions, the storage, limits and the state of a process as metrics: what is told, how rarely it asks, how few series."""

from __future__ import annotations

from concurrent.futures import Future
from decimal import Decimal
from typing import Any

import anyio.to_thread
import pytest
from tests.decorator.values import ANSWER, BOUND, HELD, MODEL, PRICES, USED
from tests.middleware.asgi import request
from tests.middleware.values import Provider, ask, guarded
from tests.telemetry.kit import Telemetry, telemetry

from asgi_llm_guard import (
    Budget,
    CacheScope,
    Concurrency,
    Context,
    DepartmentQuota,
    Guard,
    Iterations,
    LimitExceeded,
    Quota,
    QuotaBook,
    RateLimit,
    Route,
    Usage,
)
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.claims import Bundle, Settlement, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Alert, BacklogFull, DataLost, Expired, RecordsLost, SlotOverrun, emit
from asgi_llm_guard.identity import TrustedHeaders
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.pending import Handed
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.storing import MeasuredStorage, measuring
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

ADA = Context(caller="ada", departments=("research",), session="s")
BOOK = {
    "research": DepartmentQuota(daily_cost="$5", daily_tokens=1_000, models=["openai/nothing-else"]),
    "sales": DepartmentQuota(monthly_cost="$7"),
}


def values(told: Telemetry, name: str, *labels: str) -> dict[Any, Any]:
    """The points of a metric, by some of its labels."""
    points = told.collect().get(name, [])
    return {
        key[0] if len(key) == 1 else key: getattr(point, "value", None)
        for point in points
        if (key := tuple(point.attributes.get(label) for label in labels)) is not None
    }


def new(clock: FrozenClock, *policies: Any, **options: Any) -> Guard:
    return Guard(policies, clock=clock, **{"prices": PRICES, "hold_wait_s": 0, **options})


async def test_decisions(clock: FrozenClock, told: Telemetry) -> None:
    """S17: admissions and refusals are counted, refusals by policy and code, those of shadows apart, and a hold that
    is taken over once."""
    guard = new(clock, Iterations(2, per="caller"), Budget("$0.0001", per="caller").shadow())
    told.instrument(guard)
    async with guard.open(ADA):
        async with guard.call(**BOUND) as outer, guard.call(**{**BOUND, "max_output_tokens": 40}) as inner:
            inner.record(ANSWER)
            assert outer.call is not None
        async with guard.call(**BOUND) as call:
            call.record(ANSWER)
        with pytest.raises(LimitExceeded):
            await guard.call(**BOUND).__aenter__()
    await guard.aclose()

    found = values(
        told, "llm_guard.decisions", "llm_guard.decision", "llm_guard.kind", "llm_guard.policy", "llm_guard.code"
    )
    shadowed = found.pop(("shadow_refused", None, "caller_budget.shadow", None), 0)
    assert found == {
        ("admitted", "request", None, None): 1,
        ("admitted", "call", None, None): 2,
        ("refused", None, "iterations", "session_iterations_exhausted"): 1,
    }
    assert shadowed >= 2


async def test_degraded(clock: FrozenClock, told: Telemetry) -> None:
    """S17: what a process admits by itself while the storage is away is told apart, with the state of the storage."""
    storage = OutageStorage(MemoryStorage(clock=clock))
    guard = new(clock, Iterations(100, per="caller", on_outage="local"), storage=storage)
    told.instrument(guard)
    async with guard.open(ADA):
        assert values(told, "llm_guard.storage.available") == {(): 1}
        storage.down()
        async with guard.call(**BOUND):
            metrics = await anyio.to_thread.run_sync(told.collect)
            assert [point.value for point in metrics["llm_guard.calls.degraded"]] == [1]
            assert [point.value for point in metrics["llm_guard.storage.available"]] == [0]
            assert [point.value for point in metrics["llm_guard.ready"]] == [0]
        storage.up()
    decided = values(told, "llm_guard.decisions", "llm_guard.decision")
    assert decided["degraded"] == 1
    assert [point.value for point in told.collect()["llm_guard.storage.failures"]] == [1]
    failed = {
        point.attributes["error.type"]
        for point in told.collect()["llm_guard.storage.duration"]
        if "error.type" in point.attributes
    }
    assert failed == {"StorageError"}
    assert values(told, "llm_guard.settlements.waiting")[()] >= 1
    await guard.heartbeat()
    assert values(told, "llm_guard.settlements.waiting") == {(): 0}
    assert values(told, "llm_guard.storage.available") == {(): 1}
    await guard.aclose()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_verbs_of_the_storage(clock: FrozenClock, told: Telemetry, tmp_path: Any, kind: str) -> None:
    """S17: each verb of the storage that calls ask for is measured; unmeasured it is asked directly."""
    guard = new(
        clock, Iterations(9, per="caller"), storage="memory://" if kind == "memory" else f"sqlite:///{tmp_path}/g.db"
    )
    assert guard.engine.store.verbs is guard.engine.storage
    instrumentation = told.instrument(guard)
    async with guard.open(ADA), guard.call(**BOUND) as call:
        await call.amend(guard.describe(MODEL, input_tokens=200, max_output_tokens=50))
        async with guard.call(**BOUND) as other:
            other.record(ANSWER)
        call.record(ANSWER)
    await guard.heartbeat()
    points = told.collect()["llm_guard.storage.duration"]
    counted = {point.attributes["llm_guard.storage.verb"]: point.count for point in points}
    assert counted["reserve"] >= 1
    assert counted["settle"] >= 1
    assert counted["heartbeat"] >= 1  # and those that are sent every 5 seconds

    assert guard.storage is guard.engine.storage
    instrumentation.uninstrument()
    assert guard.engine.store.verbs is guard.engine.storage
    await guard.aclose()


async def test_leases_that_come_later_are_measured(clock: FrozenClock, told: Telemetry) -> None:
    """S17: a storage that is wrapped for the leases of a route's policy is measured, too."""
    guard = new(clock)
    told.instrument(guard)
    app = guarded(
        Provider(), guard, routes=[Route("/v1/chat/completions", extra=[Budget("$9/1d", per="global", lease="$1")])]
    )
    assert guard.engine.store.verbs is not guard.engine.storage
    assert (await ask(app)).status == 200
    measured = guard.engine.store.verbs
    assert isinstance(measured, MeasuredStorage)
    assert measured._storage is guard.engine.storage
    await guard.aclose()


async def test_settlements(clock: FrozenClock, told: Telemetry) -> None:
    """S17: the lag of settlements, what calls cost beyond their hold, and reports that cannot be are told."""
    guard = new(clock, Budget("$1/1d", per="caller"), max_overage=3)
    told.instrument(guard)
    async with guard.open(ADA):
        async with guard.call(**BOUND) as call:
            call.record(Usage(input_tokens=200, output_tokens=50))
        async with guard.call(**BOUND) as call:
            call.record(Usage(input_tokens=10**9, output_tokens=50))
    await guard.aclose()

    metrics = told.collect()
    (lag,) = metrics["llm_guard.settlement.lag"]
    assert (lag.count, lag.sum) == (2, 0.0)
    (over,) = metrics["llm_guard.overage"]
    assert over.value == pytest.approx((300_000 - HELD + 2 * HELD) / 1e9)
    assert [point.value for point in metrics["llm_guard.usage.anomalies"]] == [1]
    assert [(p.attributes["llm_guard.settlement.status"], p.value) for p in metrics["llm_guard.settlements"]] == [
        ("settled", 2)
    ]


async def test_what_is_out_of_the_ordinary(clock: FrozenClock, told: Telemetry) -> None:
    """S17: expired holds, lost slots, lost data and a full backlog are counted."""
    guard = new(clock)
    told.instrument(guard)
    alert = Alert(
        id="1", kind="threshold", policy="all", scope="user", subject="ada", unit=Unit.NANOUSD, threshold=80, at_ms=0,
        limit=1, used=1, held=0, resets_at_ms=None,
    )  # fmt: skip
    for event in (
        alert,
        Expired(("a", "b", "c")),
        SlotOverrun("a", ("slots",)),
        DataLost("gone", "deny"),
        BacklogFull(7),
        RecordsLost("ledger", 5),
    ):
        emit(guard.engine.observers, event)

    metrics = told.collect()
    counted = {
        name: metrics[f"llm_guard.{name}"][0].value
        for name in ("holds.expired", "slots.overrun", "storage.losses", "settlements.dropped", "ledger.lost")
    }
    (alerts,) = metrics["llm_guard.alerts"]
    assert (alerts.value, dict(alerts.attributes)) == (1, {"llm_guard.kind": "threshold", "llm_guard.policy": "all"})
    assert counted == {
        "holds.expired": 3,
        "slots.overrun": 1,
        "storage.losses": 1,
        "settlements.dropped": 1,
        "ledger.lost": 5,
    }


async def test_state_of_a_process(clock: FrozenClock, told: Telemetry) -> None:
    """S17: what is open, who shares the storage, how its clock differs and how old prices are is told."""
    guard = new(clock, Concurrency(5))
    told.instrument(guard)
    async with guard.open(ADA), guard.call(**BOUND):
        await guard.heartbeat()
        metrics = await anyio.to_thread.run_sync(told.collect)
        found = {
            name: points[0].value
            for name, points in metrics.items()
            if name.startswith("llm_guard.") and len(points) == 1 and hasattr(points[0], "value")
        }
    assert found["llm_guard.holds.open"] >= 1
    assert found["llm_guard.requests.open"] == 1
    assert found["llm_guard.processes"] == 1
    assert found["llm_guard.calls.waiting"] == 0
    assert found["llm_guard.storage.clock_skew"] == 0
    assert found["llm_guard.ready"] == 1
    assert found["llm_guard.prices.age"] % 86_400 == 0
    await guard.aclose()


async def test_administration_and_ledger(clock: FrozenClock, told: Telemetry) -> None:
    """S17: which version of the administration data is in force, whether they are followed, and what the ledger lacks."""
    plain = new(clock)
    told.instrument(plain)
    found = await anyio.to_thread.run_sync(told.collect)
    assert "llm_guard.control.version" not in found
    assert [point.value for point in found["llm_guard.ledger.behind"]] == [0]
    await plain.aclose()

    with telemetry() as other:
        guard = new(clock, control="sqlite://:memory:")
        other.instrument(guard)
        for _ in range(2):  # asking begins the first load
            found = await anyio.to_thread.run_sync(other.collect)
            assert guard.follower is not None
            await guard.follower.closed()
        assert [point.value for point in found["llm_guard.control.following"]] == [1]
        assert [point.value for point in found["llm_guard.control.version"]] == [guard.control_version]
        await guard.aclose()


async def test_raised_limits(clock: FrozenClock, told: Telemetry) -> None:
    """B7: a limit that is raised for a while is told as it holds now."""
    guard = new(clock, Budget("$1/1d", per="global", name="all"))
    told.instrument(guard)
    guard.engine.overrides.set_raises(
        [Raise(policy="all", unit="usd", amount=Decimal(4), until_ms=clock.now_ms() + 60_000)]
    )

    def left() -> dict[Any, Any]:
        return values(told, "llm_guard.budget.remaining", "llm_guard.policy")

    assert await anyio.to_thread.run_sync(left) == {"all": 5.0}
    clock.advance(seconds=60)
    assert await anyio.to_thread.run_sync(left) == {"all": 1.0}
    await guard.aclose()


async def test_limits_of_the_configuration(clock: FrozenClock, told: Telemetry) -> None:
    """B7, S17: limits of the departments in the book, of named subjects and of all together have what is left, what is
    held and the limit itself, in dollars or tokens, though the book is changed meanwhile; callers and shadows have none."""
    book = QuotaBook(BOOK)
    policies = [
        Quota(book, unknown="allow"),
        Budget("$100/1d", per="global", name="all"),
        Budget({"writer": "$3/1d", "*": "$1/1d"}, per="agent"),
        Budget({"ada": "$3/1d"}, per="caller"),
        Budget("$50/1d", per="global", name="watched").shadow(),
    ]
    guard = new(clock, *policies)
    told.instrument(guard)

    def left(kind: str = "budget.remaining") -> dict[Any, Any]:
        return values(told, f"llm_guard.{kind}", "llm_guard.policy", "llm_guard.scope", "llm_guard.subject")

    first = await anyio.to_thread.run_sync(left)
    assert first == {
        ("quota", "department", "research"): 5.0,
        ("quota", "department", "sales"): 7.0,
        ("all", "global", ""): 100.0,
        ("agent_budget", "agent", "writer"): 3.0,
    }
    book.set("sales", {"monthly_cost": "$9"})
    book.remove("research")
    async with guard.open(Context(departments=("sales",))), guard.call(**BOUND) as call:
        clock.advance(seconds=5)
        assert (await anyio.to_thread.run_sync(left))["quota", "department", "sales"] == pytest.approx(9 - HELD / 1e9)
        assert left("budget.held")["quota", "department", "sales"] == HELD / 1e9
        assert left("budget.limit")["quota", "department", "sales"] == 9.0
        call.record(ANSWER)
    clock.advance(seconds=5)
    last = await anyio.to_thread.run_sync(left)
    assert last["quota", "department", "sales"] == pytest.approx(9 - USED / 1e9)
    assert ("quota", "department", "research") not in last
    await guard.aclose()


async def test_limits_in_tokens(clock: FrozenClock, told: Telemetry) -> None:
    """S17: limits in tokens are metrics of their own, with the window as a label."""
    guard = new(clock, Quota(QuotaBook(BOOK)))
    told.instrument(guard)

    def left() -> dict[Any, Any]:
        return values(told, "llm_guard.quota.remaining", "llm_guard.subject", "llm_guard.window")

    assert await anyio.to_thread.run_sync(left) == {("research", "day@UTC"): 1_000}
    await guard.aclose()


async def test_limits_are_bounded(clock: FrozenClock, told: Telemetry) -> None:
    """T11: of a book with 1,000 departments the first 100 limits have points."""
    book = QuotaBook({f"department-{number}": {"daily_cost": 1} for number in range(1_000)})
    guard = new(clock, Quota(book))
    told.instrument(guard)
    metrics = await anyio.to_thread.run_sync(told.collect)
    assert len(metrics["llm_guard.budget.remaining"]) == 100
    await guard.aclose()


async def test_one_trip_for_all_gauges(clock: FrozenClock, told: Telemetry) -> None:
    """B7: all limits are read in one batch, however many gauges are collected; holds are counted once."""
    trips: list[str] = []

    class Counted(MemoryStorage):
        async def read(self, meters: Any) -> Any:
            trips.append("read")
            return await super().read(meters)

        async def open_holds(self) -> int:
            trips.append("holds")
            raise StorageError("cannot count")

    guard = new(clock, Quota(QuotaBook(BOOK)), Budget("$1/1d", per="global"), storage=Counted(clock=clock))
    told.instrument(guard)
    metrics = await anyio.to_thread.run_sync(told.collect)
    assert sorted(trips) == ["holds", "read"]
    assert "llm_guard.holds.open" not in metrics
    assert len(metrics["llm_guard.budget.limit"]) == 3
    await guard.aclose()


async def test_junk_makes_no_series(clock: FrozenClock, told: Telemetry) -> None:
    """T11, S17: 10,000 invented models, paths, users, sessions and agents leave the number of series as it is."""
    identity = TrustedHeaders(trust_headers=True, caller="x-user", agent="x-agent", tags="x-tags")
    guard = new(
        clock, Iterations(3), RateLimit("1000000/minute", per="user"), CacheScope(),
        Budget("$1000/1d", per="global"), identity=identity, cache=Cache(), session_limit=20_000,
        prices=PriceBook.snapshot(overrides={MODEL: {"input": 1, "output": 2}}, unknown="allow"),
    )  # fmt: skip
    told.instrument(guard)
    app = guarded(Provider(), guard)
    routes = guarded(
        Provider(), guard, routes=[Route("/v1/chat/completions"), Route("/agents/{name}")], unlisted="deny"
    )

    async def junk(name: str) -> None:
        headers = [
            (b"x-user", name.encode()),
            (b"x-agent", name.encode()),
            (b"x-tags", name.encode()),
            (b"x-session-id", name.encode()),
        ]
        model = f"{name}/{name}" if len(name) % 2 else f"openai/{name}"
        body = {"model": model, "max_tokens": 5, "user": name, "messages": [{"role": "user", "content": name}]}
        await ask(app, body, headers=headers, session=False)
        await request(f"/{name}", headers=headers).run(routes)
        await request(f"/agents/{name}", headers=headers).run(routes)
        described = guard.call(model=f"{name}/{name}", input_tokens=1, max_output_tokens=1)
        async with guard.open(Context(caller=name, agent=name, session=name, tags=(name,))), described as call:
            call.record(Usage(input_tokens=1, output_tokens=1))

    def series() -> int:
        return sum(len(points) for points in told.collect().values())

    for number in range(50):
        await junk(f"warm-{number:05}" + "x" * (number % 2))
    await ask(app)
    await guard.heartbeat()  # else one may come meanwhile
    before = await anyio.to_thread.run_sync(series)
    for number in range(2_500):
        await junk(f"junk-{number:05}" + "x" * (number % 2))
    assert await anyio.to_thread.run_sync(series) == before
    text = repr(await anyio.to_thread.run_sync(told.collect))
    assert "junk-" not in text
    assert "warm-" not in text
    await guard.aclose()


def test_invented_providers() -> None:
    """T11: a provider that nobody knows is `other`, unless it is a deployment's or its model has a price; so is what
    comes after a hundred names of a kind."""
    labels = Labels()
    assert labels.model(Call(provider="junk", model="junk")) == ("other", "other")
    assert labels.model(Call(provider="junk", model="junk", deployment="a")) == ("junk", "other")
    assert labels.model(Call(provider="own", model="m", price_source="override")) == ("own", "m")
    assert labels.model(None) == ("other", "other")
    named = {labels.name("policy", f"policy-{number}") for number in range(200)}
    assert len(named) == 101
    assert labels.name("policy", "policy-0") == "policy-0"


class Late(OutageStorage):
    """Takes settlements, and fails later."""

    def settle(self, settlements: Any) -> Any:
        late: Handed[Any] = Handed()
        late.decide(None, StorageError("too late"))
        return late


@pytest.mark.parametrize("kind", [OutageStorage, Late])
async def test_verbs_that_fail(clock: FrozenClock, told: Telemetry, kind: type[OutageStorage]) -> None:
    """S17: a verb that fails, at once or later, is measured with the class of its error, and fails as before."""
    storage = kind(MemoryStorage(clock=clock))
    measured = measuring(told.meters.get_meter("test"))(storage)
    bundle = Bundle("call", ())
    await measured.heartbeat("owner")
    await measured.reserve("owner", ((bundle,),))
    await measured.amend("owner", bundle)
    storage.down()
    for asking in (
        measured.reserve("owner", ((bundle,),)),
        measured.amend("owner", bundle),
        measured.heartbeat("owner"),
    ):
        with pytest.raises(StorageError):
            await asking
    with pytest.raises(StorageError):
        measured.settle([Settlement("call", ())]).result()

    points = told.collect()["llm_guard.storage.duration"]
    counted = [(p.attributes["llm_guard.storage.verb"], p.attributes.get("error.type"), p.count) for p in points]
    went_well = {(verb, None, 1) for verb in ("reserve", "amend", "heartbeat")}
    assert set(counted) == went_well | {
        (verb, "StorageError", 1) for verb in ("reserve", "amend", "heartbeat", "settle")
    }


async def test_reading_that_is_cancelled(clock: FrozenClock, told: Telemetry) -> None:
    """B7: a reading that was cancelled, as when its loop ends, leaves no points and is made anew."""

    class Cancelling(Guard):
        def begin_reading(self, meters: Any, /) -> Any:
            if cancelled:
                return super().begin_reading(meters)
            reading: Future[Any] = Future()
            reading.cancel()
            cancelled.append(reading)
            return reading

    cancelled: list[Any] = []
    guard = Cancelling([Budget("$1/1d", per="global")], clock=clock)
    told.instrument(guard)

    def left() -> dict[Any, Any]:
        return values(told, "llm_guard.budget.remaining", "llm_guard.policy")

    assert await anyio.to_thread.run_sync(left) == {}
    clock.advance(seconds=5)
    assert await anyio.to_thread.run_sync(left) == {"global_budget": 1.0}
    await guard.aclose()
