"""Alerts of a guard: what is told, when, and how often."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest
from tests.alerts.kit import PRICES, SECRET, Receiver, alerts_in, hook, receiving, spend
from tests.storage.values import DOLLAR, HOUR_MS, START, START_MS

from asgi_llm_guard import Budget, Context, Guard, Iterations, RateLimit, Usage
from asgi_llm_guard.alerts import Alerts, BurnRate, Threshold
from asgi_llm_guard.alerts.alerts import CHORE, LAST_CHORE, _generation_name
from asgi_llm_guard.alerts.deliveries import MOST
from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.errors import ConfigurationError, LimitExceeded, StorageError
from asgi_llm_guard.events import Admission, Alert, Event
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio


class Watched:
    """A guard, what it told, and its clock."""

    def __init__(
        self,
        *rules: Threshold | BurnRate,
        policies: tuple[Policy, ...] = (Budget("$10/daily"),),
        storage: Storage | None = None,
        clock: FrozenClock | None = None,
        receivers: tuple[Receiver, ...] = (),
        patience: str = "2m",
        **options: Any,
    ) -> None:
        self.clock = clock or FrozenClock(START)
        self.seen: list[Event] = []
        self.alerts = Alerts(
            rules or (Threshold(),), webhooks=[hook(receiver, **options) for receiver in receivers], patience=patience
        )
        self.guard = Guard(
            policies,
            storage=storage or MemoryStorage(clock=self.clock, lapse_ms=400 * 86_400_000),
            clock=self.clock,
            prices=PRICES,
            observers=[self.seen.append],
            alerts=self.alerts,
        )

    async def told(self) -> list[Alert]:
        """What is told from now on, after one more look and after all was sent."""
        before = len(alerts_in(self.seen))
        await self.guard.chores.run(CHORE)
        await self.guard.chores.run(LAST_CHORE)
        return alerts_in(self.seen)[before:]

    async def percents(self) -> list[float]:
        return [alert.threshold for alert in await self.told()]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.guard.aclose()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


# -------------------------------------------------------------------------------- thresholds


async def test_each_threshold_once(receiver: Receiver) -> None:
    """S3: as a budget is used up each threshold is told once, signed, with what is known of it."""
    async with Watched(receivers=(receiver,)) as watched:
        await spend(watched.guard, 4.99)
        assert await watched.told() == []
        await spend(watched.guard, 0.01)
        (alert,) = await watched.told()
        assert (alert.kind, alert.policy, alert.scope, alert.subject) == ("threshold", "user_budget", "user", "ann")
        assert (alert.threshold, alert.limit, alert.used, alert.held) == (50, 10 * DOLLAR, 5 * DOLLAR, 0)
        assert await watched.told() == []
        await spend(watched.guard, 4.6)
        assert await watched.percents() == [80, 95]
        await spend(watched.guard, 0.4)
        assert await watched.percents() == [100]
        with pytest.raises(LimitExceeded):
            await spend(watched.guard, 1)
        assert await watched.told() == []
    assert sorted(got.json["threshold"] for got in receiver.got) == [50, 80, 95, 100]
    assert len({got.headers["x-guard-id"] for got in receiver.got}) == 4
    for got in receiver.got:
        got.check(SECRET)
        assert got.json["id"] == got.headers["x-guard-id"]


async def test_subjects_are_apart() -> None:
    """Each subject has thresholds of its own."""
    async with Watched(Threshold(at=(50,))) as watched:
        for caller in ("ann", "bob", "cy"):
            await spend(watched.guard, 6 if caller != "cy" else 4, caller=caller)
        assert sorted(alert.subject for alert in await watched.told()) == ["ann", "bob"]


async def test_anew_in_the_next_window() -> None:
    """S3: what was told of one day is told of the next."""
    async with Watched(Threshold(at=(50,))) as watched:
        for _ in range(3):
            await spend(watched.guard, 6)
            assert await watched.percents() == [50]
            assert await watched.percents() == []
            watched.clock.advance(ms=24 * HOUR_MS)
            assert await watched.percents() == []


async def test_a_window_of_a_year(receiver: Receiver) -> None:
    """S3: in a window longer than 30 days, too, each threshold is told once."""
    async with Watched(Threshold(at=(50,)), policies=(Budget("$10/yearly"),), receivers=(receiver,)) as watched:
        await spend(watched.guard, 6)
        assert await watched.percents() == [50]
        for _ in range(3):
            watched.clock.advance(ms=100 * 24 * HOUR_MS)
            await spend(watched.guard, 0.1)
            assert await watched.percents() == []
        watched.clock.advance(ms=100 * 24 * HOUR_MS)
        await spend(watched.guard, 6)
        assert await watched.percents() == [50]
    assert len(receiver.got) == 2


async def test_anew_after_a_reset(tmp_path: Path) -> None:
    """S3: after a reset the thresholds of the same window are told once more, by one of all processes."""
    clock = FrozenClock(START)
    path = tmp_path / "guard.db"
    one, other = (
        Watched(Threshold(at=(50, 80)), storage=SqliteStorage(path, clock=clock, lapse_ms=86_400_000), clock=clock)
        for _ in range(2)
    )
    async with one, other:
        await spend(one.guard, 6)
        await spend(other.guard, 1)
        assert await one.percents() + await other.percents() == [50]
        for _ in range(3):
            await one.guard.storage.reset(_meters(one))
            await spend(one.guard, 1)
            await spend(other.guard, 1)
            assert await one.percents() + await other.percents() == []
            await spend(other.guard, 4)
            await spend(one.guard, 0.1)
            assert await other.percents() + await one.percents() == [50]
            assert await other.percents() + await one.percents() == []


async def test_resets_that_are_noted_at_once() -> None:
    """S3: a reset is noted also where another process has just noted one of another window under the same number."""
    async with Watched(Threshold(at=(50,))) as watched:
        await spend(watched.guard, 6)
        assert await watched.percents() == [50]
        (meter,) = _meters(watched)
        storage = watched.guard.storage
        assert isinstance(storage, MemoryStorage)
        await storage.shared().publish(_generation_name(meter), 1, b"another window")
        await storage.reset([meter])
        await spend(watched.guard, 1)
        assert await watched.percents() == []
        await spend(watched.guard, 5)
        assert await watched.percents() == [50]


def _meters(watched: Watched) -> list[Meter]:
    """All that were claimed on."""
    receipts = [receipt for event in watched.seen if isinstance(event, Admission) for receipt in event.granted.receipts]
    return list({receipt.claim.meter.key: receipt.claim.meter for receipt in receipts}.values())


async def test_held_counts_where_it_is_asked_for() -> None:
    """`of="held"` tells what open calls hold, too; `used` only what was charged."""
    async with Watched(Threshold(at=(50,), of="held"), Threshold(at=(60,))) as watched:
        async with (
            watched.guard.open(Context(caller="ann")),
            watched.guard.call(model="test/m", input_tokens=7_000, max_output_tokens=1),
        ):
            (alert,) = await watched.told()
            assert (alert.threshold, alert.used, alert.held) == (50, 0, 7 * DOLLAR)
        assert await watched.percents() == [60]


async def test_what_is_held_is_watched_until_it_is_settled() -> None:
    """S3: a threshold that is crossed long after the admission, by a call of another process, is told by who knows."""
    clock, storage = FrozenClock(START), MemoryStorage(clock=FrozenClock(START), lapse_ms=86_400_000)
    one, other = (Watched(Threshold(at=(50,)), storage=storage, clock=clock) for _ in range(2))
    async with one, other:
        async with (
            one.guard.open(Context(caller="ann")),
            one.guard.call(model="test/m", input_tokens=4_000, max_output_tokens=1),
        ):
            await spend(other.guard, 4)
            assert await one.percents() + await other.percents() == []
        assert await other.percents() == [50]
        assert await one.percents() == []


async def test_more_than_was_held() -> None:
    """S3: a call that uses more than it held, and so crosses a threshold, is told of."""
    async with Watched(Threshold(at=(50, 100))) as watched:
        await spend(watched.guard, 6, held=1)
        assert await watched.percents() == [50]
        await spend(watched.guard, 6, held=1)
        assert await watched.percents() == [100]


async def test_policies_that_were_replaced() -> None:
    """S3: after `guard.replace` what is told goes by the new limit, and nothing is told of a limit that is no more; what
    calls hold that were admitted before is of the new one, too."""
    async with Watched(policies=(Budget("$10/daily"), Budget("$20/daily", name="gone"))) as watched:
        await spend(watched.guard, 4.9)
        async with (
            watched.guard.open(Context(caller="ann")),
            watched.guard.call(model="test/m", input_tokens=4500, max_output_tokens=1) as call,
        ):
            assert await watched.told() == []
            watched.guard.replace(policies=[Budget("$100/daily")])
            call.record(Usage(input_tokens=5200, output_tokens=0))
        assert await watched.told() == []
        watched.guard.replace(policies=[Budget("$20/daily")])
        (alert,) = await watched.told()
        assert (alert.policy, alert.threshold, alert.limit, alert.used) == (
            "user_budget",
            50,
            20 * DOLLAR,
            10 * DOLLAR + DOLLAR // 10,
        )
        watched.guard.replace(policies=[])
        assert await watched.told() == []


async def test_shadow_and_other_policies_only_if_asked() -> None:
    """Policies in shadow, rates and iterations are not told of, unless a rule names them."""
    policies = (Budget("$10/daily").shadow(), Iterations(2), RateLimit("2/minute", name="rates"))
    async with Watched(policies=policies) as watched:
        await spend(watched.guard, 9)
        assert await watched.told() == []
    async with Watched(
        Threshold(at=(80,), shadow=True), Threshold(policy="rates", at=(50,)), policies=policies
    ) as watched:
        await spend(watched.guard, 9)
        assert sorted((alert.policy, alert.shadow) for alert in await watched.told()) == [
            ("rates", False),
            ("user_budget.shadow", True),
        ]


async def test_sliding_windows_once_per_length() -> None:
    """A limit without instances is told of once per length of its window, each time under an id of its own."""
    async with Watched(Threshold(policy="rates", at=(50,)), policies=(RateLimit("2/hour", name="rates"),)) as watched:
        ids = set()
        for _ in range(3):
            async with watched.guard.open(Context(caller="ann")):
                pass
            (alert,) = await watched.told()
            ids.add(alert.id)
            watched.clock.advance(ms=HOUR_MS // 2)
            async with watched.guard.open(Context(caller="ann")):
                pass
            assert await watched.told() == []
            watched.clock.advance(ms=2 * HOUR_MS)
        assert len(ids) == 3


# -------------------------------------------------------------------------------- burn rates


async def test_burning_too_fast(receiver: Receiver) -> None:
    """S15: what is spent within the window at so many times what would just last is told, once per window."""
    budget = Budget("$240/daily")  # $10 an hour just last
    async with Watched(BurnRate(window="1h", times=2), policies=(budget,), receivers=(receiver,)) as watched:
        await spend(watched.guard, 1)
        for minutes in range(1, 60):
            watched.clock.advance(ms=60_000)
            await spend(watched.guard, 0.3)
            assert await watched.told() == [], minutes
        alerts = []
        for _ in range(90):
            watched.clock.advance(ms=60_000)
            await spend(watched.guard, 0.5)
            alerts += await watched.told()
        first, second = alerts
        assert (first.kind, first.threshold, first.window_ms) == ("burn_rate", 2, HOUR_MS)
        assert 20 * DOLLAR <= (first.spent or 0) < 21 * DOLLAR
        assert second.at_ms - first.at_ms >= HOUR_MS
        assert second.id != first.id
    assert [got.json["type"] for got in receiver.got] == ["burn_rate"] * 2


async def test_no_burning_over_idle_hours() -> None:
    """S15: what was spent while this process did not look is not taken for spent at once."""
    clock, storage = FrozenClock(START), MemoryStorage(clock=FrozenClock(START), lapse_ms=86_400_000)
    one, other = (
        Watched(BurnRate(window="1h", times=2), policies=(Budget("$240/daily"),), storage=storage, clock=clock)
        for _ in range(2)
    )
    async with one, other:
        await spend(one.guard, 0.1)
        assert await one.told() == []
        for _ in range(4):
            clock.advance(ms=HOUR_MS)
            await spend(other.guard, 10)
            assert await other.told() == []
        await spend(one.guard, 0.1)
        assert await one.told() == []


async def test_two_burn_rates() -> None:
    """S15: a short window does not see what was spent before it, though a longer one does."""
    rules = (BurnRate(window="1h", times=3), BurnRate(window="12h", times=1.5))
    async with Watched(*rules, policies=(Budget("$240/daily"),)) as watched:
        told = []
        for _ in range(11 * 12):
            await spend(watched.guard, 1.5)
            for _ in range(5):
                watched.clock.advance(ms=60_000)
                told += await watched.told()
        assert [(alert.threshold, alert.window_ms) for alert in told] == [(1.5, 12 * HOUR_MS)]


async def test_what_is_remembered_of_a_burn_rate() -> None:
    """However often a counter is looked at, and however long, what is remembered of it is about a sample for each step."""
    async with Watched(BurnRate(window="1h", times=3), policies=(Budget("$240/yearly"),)) as watched:
        await spend(watched.guard, 0.001)
        assert await watched.told() == []
        watch, (meter,) = watched.alerts._watch, _meters(watched)
        for n in range(3 * 3600):
            watched.clock.advance(ms=1000)
            reading = Reading(1_000_000 + n, 0, START_MS + 300 * 24 * HOUR_MS)
            assert watch.look([meter], [reading], watched.clock.now_ms()) == []
        (entry,) = watch._entries.values()
        assert 60 <= len(entry.samples) <= 62


# ------------------------------------------------------------------------- delivery, outages


async def test_at_least_once(receiver: Receiver) -> None:
    """S3: what a receiver does not take is sent again under the same id, and once it was taken no more."""
    receiver.answers = [500, None, 302, 429, 204]
    async with Watched(Threshold(at=(50,)), receivers=(receiver,)) as watched:
        await spend(watched.guard, 6)
        assert await watched.percents() == [50]
        assert await watched.percents() == []
    assert len(receiver.got) == 5
    assert len({got.headers["x-guard-id"] for got in receiver.got}) == 1
    assert len({got.body for got in receiver.got}) == 1


async def test_a_process_that_dies_before_it_has_sent(receiver: Receiver, tmp_path: Path) -> None:
    """S3: an alert whose process died with it is sent by another that knows of it, once the turn is over."""
    clock, path = FrozenClock(START), tmp_path / "guard.db"
    store = SqliteStorage(path, clock=clock, lapse_ms=86_400_000)
    dead = Watched(Threshold(at=(50,)), storage=store, clock=clock)
    await spend(dead.guard, 6)
    (alert,) = await dead.told()
    webhook = hook(receiver)
    assert await store.shared().mark(f"alert:{alert.id}:{webhook.id}:turn", until_ms=clock.now_ms() + 120_000)
    async with Watched(
        Threshold(at=(50,)),
        storage=SqliteStorage(path, clock=clock, lapse_ms=86_400_000),
        clock=clock,
        receivers=(receiver,),
    ) as other:
        await spend(other.guard, 0.1)
        assert await other.told() == []
        assert receiver.got == []
        clock.advance(ms=120_000)
        await other.told()
        clock.advance(ms=60_000)
        await other.told()
        assert [got.headers["x-guard-id"] for got in receiver.got] == [alert.id]
        clock.advance(ms=3 * HOUR_MS)
        await other.told()
        assert len(receiver.got) == 1
    await dead.guard.aclose()


async def test_what_another_process_has_sent(receiver: Receiver) -> None:
    """S3: who knows of an alert that somebody else had the turn for, asks again, and does not send what was sent."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=86_400_000)
    one, other = (Watched(Threshold(at=(50,)), storage=storage, clock=clock, receivers=(receiver,)) for _ in range(2))
    async with one, other:
        await spend(one.guard, 6)
        assert await one.percents() == [50]
        await spend(other.guard, 0.1)
        assert await other.percents() == []
        for _ in range(3):
            clock.advance(ms=HOUR_MS)
            assert await other.percents() + await one.percents() == []
        assert len(receiver.got) == 1


async def test_a_receiver_that_is_away_for_long(receiver: Receiver) -> None:
    """S3: a receiver that does not answer for hours gets each alert when it is back, under the same id, and what is
    about a window that is over no more."""
    clock = FrozenClock(START)
    away = Receiver()
    away.port = receiver.port
    async with Watched(
        Threshold(at=(50, 80)), clock=clock, receivers=(away,), patience="10s", first_retry_s=20
    ) as watched:
        receiver.answers = [503]
        await spend(watched.guard, 6)
        assert await watched.percents() == [50]
        assert len(receiver.got) == 1
        for _ in range(4):
            receiver.answers = [503]
            clock.advance(ms=HOUR_MS)
            await watched.told()
        failed = len(receiver.got)
        assert failed >= 3
        receiver.answers = []
        clock.advance(ms=HOUR_MS)
        await watched.told()
        assert len(receiver.got) == failed + 1
        assert len({got.headers["x-guard-id"] for got in receiver.got}) == 1
        receiver.answers = [503]
        await spend(watched.guard, 2.5)
        assert await watched.percents() == [80]
        clock.advance(ms=48 * HOUR_MS)
        await watched.told()
        assert len(receiver.got) == failed + 2


async def test_a_backlog_of_alerts_waits(receiver: Receiver) -> None:
    """S3: with no room left for a webhook nothing is told yet, and nothing lost: it is told when there is."""
    async with Watched(Threshold(at=(50,)), receivers=(receiver,)) as watched:
        await watched.guard.chores.run(CHORE)
        waiting = watched.alerts._deliveries._waiting
        waiting[watched.alerts.webhooks[0].id] = MOST
        await spend(watched.guard, 6)
        assert await watched.percents() == []
        waiting.clear()
        assert await watched.percents() == [50]
        assert len(receiver.got) == 1
        assert sum(waiting.values()) == 0


async def test_episodes_over_processes(receiver: Receiver, tmp_path: Path) -> None:
    """S3: what has no instances is told once by two processes, too, under one id, and again in its next length."""
    clock, path = FrozenClock(START), tmp_path / "guard.db"
    one, other = (
        Watched(
            Threshold(policy="rates", at=(50,)),
            policies=(RateLimit("4/hour", name="rates"),),
            storage=SqliteStorage(path, clock=clock, lapse_ms=86_400_000),
            clock=clock,
            receivers=(receiver,),
        )
        for _ in range(2)
    )
    async with one, other:
        for n in range(1, 3):
            for watched in (one, other, one, other):
                async with watched.guard.open(Context(caller="ann")):
                    pass
            assert len(await one.told() + await other.told()) == 1
            assert await one.told() + await other.told() == []
            assert len(receiver.got) == n
            clock.advance(ms=3 * HOUR_MS)
        name = next(iter(await _documents(path)))
        store = one.guard.storage
        assert isinstance(store, SqliteStorage)
        assert name.startswith("alert:")
        await store.shared().mark(
            name, until_ms=clock.now_ms() + 3 * HOUR_MS
        )  # by another one that has not said when, yet
        for _ in range(4):
            async with one.guard.open(Context(caller="ann")):
                pass
        assert await one.told() == []
        clock.advance(ms=2 * HOUR_MS)
        async with one.guard.open(Context(caller="ann")):
            pass
        assert await one.told() == []
    assert len({got.headers["x-guard-id"] for got in receiver.got}) == len(receiver.got) == 2


async def _documents(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM shared_documents1")]


async def test_a_receiver_that_hangs_holds_up_nobody(receiver: Receiver) -> None:
    """S3: a receiver that does not answer holds up neither calls, nor other webhooks, nor the end beyond its bound; what
    was not sent is left to others."""
    hanging = Receiver()
    silent = socket.create_server(("127.0.0.1", 0))
    hanging.port = silent.getsockname()[1]
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=86_400_000)
    loop = asyncio.get_running_loop()
    async with Watched(
        Threshold(at=(50,)), storage=storage, clock=clock, receivers=(hanging, receiver), timeout_s=30
    ) as watched:
        await spend(watched.guard, 6)
        await watched.guard.chores.run(CHORE)
        begun_s = loop.time()
        await spend(watched.guard, 1)
        assert loop.time() - begun_s < 15
        await watched.guard.chores.run(LAST_CHORE)
        assert watched.alerts._deliveries._waiting[hook(hanging).id] == 1  # tried again, if this process goes on
    assert loop.time() - begun_s < 20
    assert len(receiver.got) == 1
    (alert,) = alerts_in(watched.seen)
    assert await MemoryMarks(storage).free(f"alert:{alert.id}:{hook(hanging).id}:turn")
    assert not await MemoryMarks(storage).free(f"alert:{alert.id}:{hook(receiver).id}:sent")
    silent.close()


class MemoryMarks:
    """Whether marks are free, also of a storage that was closed."""

    def __init__(self, storage: MemoryStorage) -> None:
        self._marks = storage.shared()._marks

    async def free(self, name: str) -> bool:
        return name not in self._marks


async def test_clocks_that_differ(receiver: Receiver) -> None:
    """S3: the storage's clock decides: with this process's an hour behind it, thresholds are told and sent all the same."""
    ahead = FrozenClock(START)
    ahead.advance(ms=HOUR_MS)
    storage = MemoryStorage(clock=ahead, lapse_ms=86_400_000)
    async with Watched(Threshold(at=(50,)), storage=storage, receivers=(receiver,)) as watched:
        await watched.guard.heartbeat()
        await spend(watched.guard, 6)
        assert await watched.percents() == [50]
        assert len(receiver.got) == 1


async def test_a_store_that_is_away() -> None:
    """While the store does not answer nothing is told and nothing forgotten; when it is back, all of it is told once."""
    clock = FrozenClock(START)
    storage = OutageStorage(MemoryStorage(clock=clock, lapse_ms=86_400_000))
    async with Watched(storage=storage, clock=clock) as watched:
        await spend(watched.guard, 8.5)
        storage.down()
        with pytest.raises(StorageError):
            await watched.guard.chores.run(CHORE)
        for after in range(6):
            storage.down(after=after)
            with contextlib.suppress(StorageError):
                await watched.guard.chores.run(CHORE)
            storage.up()
        told = alerts_in(watched.seen)
        told_later = await watched.told()
        assert sorted(alert.threshold for alert in {alert.id: alert for alert in (*told, *told_later)}.values()) == [
            50,
            80,
        ]
        assert len(told) + len(told_later) == 2


@pytest.mark.parametrize("fault", ["down", "silent"])
async def test_a_store_that_goes_away_between(receiver: Receiver, fault: str) -> None:
    """S3: wherever the store goes away, or loses an answer, between noticing an alert and noting that it was sent: it is
    sent at least once, under one id."""
    for after in range(1, 12):
        clock = FrozenClock(START)
        storage = OutageStorage(MemoryStorage(clock=clock, lapse_ms=86_400_000))
        receiver.got.clear()
        async with Watched(Threshold(at=(50,)), storage=storage, clock=clock, receivers=(receiver,)) as watched:
            await spend(watched.guard, 6)
            await watched.guard.heartbeat()
            storage.down(after=after) if fault == "down" else storage.lose_replies(after=after)
            for _ in range(2):
                with contextlib.suppress(StorageError):
                    await watched.guard.chores.run(CHORE)
                with contextlib.suppress(StorageError):
                    await watched.guard.chores.run(LAST_CHORE)
            storage.up()
            for _ in range(4):
                await watched.told()
                clock.advance(ms=240_000)
            await watched.told()
            assert len(alerts_in(watched.seen)) == 1 or fault == "silent"
        assert len({got.headers["x-guard-id"] for got in receiver.got}) == 1
        assert len(receiver.got) <= 2


async def test_a_full_queue_drops_nothing_that_crosses() -> None:
    """S3: more events than the queue takes, with nobody looking: every threshold is told all the same."""
    from asgi_llm_guard.alerts.watch import Watch

    async with Watched(Threshold(at=(50,))) as watched:
        watched.alerts._watch = Watch(watched.alerts.rules, most_events=2)
        for n in range(20):
            await spend(watched.guard, 6 if n % 2 else 1, caller=f"c{n}")
        assert watched.alerts._watch.waiting == 2
        assert sorted(alert.subject for alert in await watched.told()) == sorted(f"c{n}" for n in range(1, 20, 2))


def test_what_alerts_cannot_be_bound_to() -> None:
    """Alerts need a storage that knows what was told, and belong to one guard."""
    alerts = Alerts()
    Guard(alerts=alerts)
    with pytest.raises(ConfigurationError, match="another guard"):
        Guard(alerts=alerts)
    with pytest.raises(ConfigurationError, match="LimitsStorage"):
        Guard(storage=LimitsStorage.from_url("memory://"), alerts=Alerts())
    with pytest.raises(ConfigurationError, match="alerts"):
        Guard(alerts="yes")  # type: ignore[arg-type]


async def test_in_a_forked_child() -> None:
    """What a parent has seen is the parent's to tell; what a child sees is the child's."""
    async with Watched(Threshold(at=(50,))) as watched:
        await spend(watched.guard, 6, caller="of the parent")
        watched.alerts._pid = 0  # as a child finds it
        await spend(watched.guard, 6, caller="of the child")
        assert [alert.subject for alert in await watched.told()] == ["of the child"]


async def test_alerts_without_a_guard() -> None:
    """Alerts that belong to no guard say so."""
    with pytest.raises(ConfigurationError, match="guard"):
        await Alerts().turn()


def test_alerts_without_rules() -> None:
    """Alerts that could never tell anything are refused."""
    with pytest.raises(ConfigurationError, match="at least one rule"):
        Alerts([])


def test_two_webhooks_of_one_name() -> None:
    """Two webhooks that could not be told apart are refused."""
    receiver = Receiver()
    receiver.port = 1
    with pytest.raises(ConfigurationError, match="name of its own"):
        Alerts(webhooks=[hook(receiver), hook(receiver)])
    Alerts(webhooks=[hook(receiver), hook(receiver, name="second")])
