"""Leaders that take long, die, or are forgotten."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest
from tests.cache.kit import ADA, MODEL, Client, answer_of, ask_for, cache_of, chat

from asgi_llm_guard import CacheScope, Guard
from asgi_llm_guard.cache import Cache, Lookup
from asgi_llm_guard.cache.lookup import CLAIM_MS, _renew
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio


class Stage:
    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.outage = OutageStorage(MemoryStorage(clock=self.clock))
        cache = Cache(storage=self.outage, wait="0s")
        self.guard = Guard([CacheScope()], storage=MemoryStorage(clock=self.clock), cache=cache, clock=self.clock)
        self.client = Client(self.guard)

    async def lead(self, prompt: str = "Hi") -> Lookup:
        async with self.guard.open(ADA):
            call = new_call(self.guard.engine, self.guard.describe(MODEL), ())
            found = await cache_of(self.guard).look_up(call, ask_for(prompt))
        assert found.leads
        return found


@pytest.fixture
def stage() -> Stage:
    return Stage()


async def test_a_leader_that_lives_keeps_the_lead(stage: Stage) -> None:
    """However long an answer takes, its leader keeps others from making it as well, and stores it."""
    found = await stage.lead()
    for _ in range(5):
        stage.clock.advance(ms=CLAIM_MS - 1)
        await found.prolong()
    assert (await stage.client.send(ADA)).state == "pass"
    assert await found.store(answer_of(chat()))
    await found.prolong()
    assert (await stage.client.send(ADA)).hit


@pytest.mark.parametrize("pause_ms", [CLAIM_MS // 3, CLAIM_MS + 1])
async def test_a_leader_whose_answer_was_revoked_does_not_take_the_lead_again(stage: Stage, pause_ms: int) -> None:
    """T6: however often a leader says that it lives, and however long it did not, what was asked before a revocation is
    not given after it."""
    found = await stage.lead()
    await cache_of(stage.guard).revoke(caller="ada")
    stage.clock.advance(ms=pause_ms)
    await found.prolong()
    assert not found.leads
    assert not await found.store(answer_of(chat("of before")))
    assert (await stage.client.send(ADA)).state == "lead"


async def test_it_does_so_by_itself(stage: Stage) -> None:
    """Leaders prolong their claims in the background, as long as somebody has them."""
    found = await stage.lead()
    stage.clock.advance(ms=CLAIM_MS - 1)
    renewing = asyncio.create_task(_renew(weakref.ref(found), 0))
    for _ in range(5):
        await asyncio.sleep(0)
    stage.clock.advance(ms=CLAIM_MS - 1)
    assert (await stage.client.send(ADA)).state == "pass"
    found.abandon()
    await renewing


async def test_a_leader_that_nobody_has_is_over(stage: Stage) -> None:
    """A look-up that was thrown away does not prolong its claim."""
    found = await stage.lead()
    reference = weakref.ref(found)
    del found
    gc.collect()
    assert reference() is None
    await _renew(reference, 0)
    stage.clock.advance(ms=CLAIM_MS)
    assert (await stage.client.send(ADA)).state == "lead"


async def test_a_leader_that_came_too_late_stores_nothing(stage: Stage) -> None:
    """T8: who lost the lead while it was away notices, and what has taken its place stays."""
    found = await stage.lead()
    stage.clock.advance(ms=CLAIM_MS)
    await stage.client.send(ADA, answer=answer_of(chat("of the second")))
    await found.prolong()
    assert not found.leads
    assert not await found.store(answer_of(chat("of the first")))
    late = await stage.lead("another")
    stage.clock.advance(ms=CLAIM_MS)
    assert not await late.store(answer_of(chat("late")))
    assert cache_of(stage.guard).stats()["unstored"] == 1


async def test_an_outage_in_between_does_no_harm(stage: Stage) -> None:
    """A claim that could not be prolonged is tried again; what cannot be stored or abandoned is counted, and over."""
    found = await stage.lead()
    stage.outage.down()
    await found.prolong()
    assert found.leads
    assert not await found.store(answer_of(chat()))
    found.abandon()
    stage.outage.up()
    stage.clock.advance(ms=CLAIM_MS)
    second = await stage.lead()
    stage.outage.down()
    second.abandon()
    second.forget()
    for _ in range(3):
        await asyncio.sleep(0)
    assert cache_of(stage.guard).stats()["reasons"] == {"the storage does not answer": 1}


async def test_leaders_may_be_let_go_in_any_thread(stage: Stage) -> None:
    """A look-up may be ended where there is no event loop, or another one."""
    found = await stage.lead()
    thread = threading.Thread(target=found.abandon)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert (await stage.client.send(ADA)).state == "lead"
    await cache_of(stage.guard).clear()

    held: list[Lookup] = []
    await asyncio.to_thread(lambda: held.append(asyncio.run(stage.lead())))
    held[0].abandon()  # its loop is closed
    await asyncio.sleep(0)
    assert (await stage.client.send(ADA)).state == "lead"


async def test_storing_that_is_cancelled_lets_go(tmp_path: Path) -> None:
    """A leader that is cancelled while it stores stands in nobody's way: what was handed over is stored."""
    storage = SqliteStorage(tmp_path / "guard.db")
    guard = Guard([CacheScope()], storage=storage, cache=Cache(wait="0s"))
    client = Client(guard)
    async with guard.open(ADA):
        found = await cache_of(guard).look_up(new_call(guard.engine, guard.describe(MODEL), ()), ask_for())
    storing = asyncio.create_task(found.store(answer_of(chat())))
    await asyncio.sleep(0)
    storing.cancel()
    await asyncio.wait([storing])
    assert storing.cancelled()
    found.abandon()
    assert (await client.send(ADA)).hit
    await guard.aclose()
