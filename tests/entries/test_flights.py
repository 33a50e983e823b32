"""Single-flight: who does not lead waits for who does."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.entries.kit import CLAIM_MS, TTL_MS, begin

from asgi_llm_guard.storage.entries import Entries, Flights, InFlight, Kept, Leading
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

WAIT_S = 30.0


async def join(
    flights: Flights, token: str, *, wait_s: float = WAIT_S, note: str = "", fresh: bool = False
) -> Kept | Leading | InFlight:
    return await flights.join("k", token, claim_ms=CLAIM_MS, wait_s=wait_s, note=note, fresh=fresh)


async def until_waiting(flights: Flights, count: int) -> None:
    while flights.waiting < count:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0)


async def test_followers_get_what_the_leader_stores(entries: Entries) -> None:
    """Of many that join one key one leads, and all others are given its value."""
    flights = Flights(entries)
    assert await join(flights, "leader") == Leading()
    followers = [asyncio.create_task(join(flights, str(n))) for n in range(20)]
    await until_waiting(flights, 20)
    assert await flights.store("k", "leader", b"v", ttl_ms=TTL_MS)
    assert await asyncio.gather(*followers) == [Kept(b"v", "", 0)] * 20
    assert flights.waiting == 0


async def test_what_was_damaged_is_made_anew(entries: Entries) -> None:
    """T8: a value that is not what its leader stored is as if it had never been, and is replaced."""
    flights = Flights(entries)
    for n, damaged in enumerate((b"", b"v", bytes(17))):
        await begin(entries, "k", f"of old {n}", fresh=True)
        await entries.store("k", f"of old {n}", damaged, ttl_ms=TTL_MS)
        assert await join(flights, f"{n}") == Leading()
        assert await flights.store("k", f"{n}", b"new", ttl_ms=TTL_MS)
        assert await join(flights, "follower") == Kept(b"new", "", 0)


async def test_one_follower_takes_over(entries: Entries) -> None:
    """A leader that gives up is followed by exactly one of those who waited."""
    flights = Flights(entries)
    await join(flights, "leader")
    followers = {asyncio.create_task(join(flights, str(n))) for n in range(5)}
    await until_waiting(flights, 5)
    await flights.abandon("k", "leader")
    (done,), waiting = await asyncio.wait(followers, return_when=asyncio.FIRST_COMPLETED)
    assert done.result() == Leading()
    assert len(waiting) == 4
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert flights.waiting == 0


async def test_leaders_of_other_processes_are_found(entries: Entries) -> None:
    """What another process stores is found by asking again."""
    here, there = Flights(entries), Flights(entries)
    await join(there, "leader")
    follower = asyncio.create_task(join(here, "follower"))
    await until_waiting(here, 1)
    await there.store("k", "leader", b"v", ttl_ms=TTL_MS)
    assert await follower == Kept(b"v", "", 0)


async def test_a_dead_leader_is_taken_over(entries: Entries, clock: FrozenClock) -> None:
    """Who waits for a leader that died leads once its claim has ended."""
    flights = Flights(entries)
    await begin(entries, "k", "dead")
    follower = asyncio.create_task(join(flights, "follower"))
    await until_waiting(flights, 1)
    clock.advance(ms=CLAIM_MS)
    assert await follower == Leading()


async def test_nobody_waits_for_longer_than_told(entries: Entries) -> None:
    """After its time a follower is told that the value is still being made."""
    flights = Flights(entries)
    await begin(entries, "k", "leader")
    assert await join(flights, "impatient", wait_s=0) == InFlight("", CLAIM_MS)
    assert await join(flights, "patient", wait_s=0.02) == InFlight("", CLAIM_MS)


async def test_nobody_waits_for_another_thing(entries: Entries) -> None:
    """A key that is being made under another note is not waited for."""
    flights = Flights(entries)
    await begin(entries, "k", "leader", note="mine")
    assert await join(flights, "other", note="yours") == InFlight("mine", CLAIM_MS)


async def test_who_wants_a_fresh_one_takes_what_is_made_meanwhile(entries: Entries) -> None:
    """A follower that wants nothing old is given what is stored while it waits."""
    flights = Flights(entries)
    await begin(entries, "k", "leader")
    follower = asyncio.create_task(join(flights, "follower", fresh=True))
    await until_waiting(flights, 1)
    await flights.store("k", "leader", b"v", ttl_ms=TTL_MS)
    assert await follower == Kept(b"v", "", 0)


async def test_a_leader_in_another_thread_wakes_its_followers(entries: Entries) -> None:
    """Event loops of other threads are woken as well."""
    flights = Flights(entries)
    await join(flights, "leader")
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(join(flights, "follower"))))
    thread.start()
    await until_waiting(flights, 1)
    await flights.store("k", "leader", b"v", ttl_ms=TTL_MS)
    await asyncio.to_thread(thread.join)
    assert found == [Kept(b"v", "", 0)]


@pytest.mark.parametrize("store", ["memory"], indirect=True)
async def test_leaders_wake_their_followers_at_once(entries: Entries) -> None:
    """A follower of this process does not wait for its next look at the store."""
    flights = Flights(entries)
    for end in (flights.store("k", "leader", b"v", ttl_ms=TTL_MS), flights.abandon("k", "leader")):
        await entries.forget("k")
        await join(flights, "leader")
        follower = asyncio.create_task(join(flights, "follower"))
        await until_waiting(flights, 1)
        await end
        for _ in range(10):
            await asyncio.sleep(0)
        assert follower.done()
