"""Which calls are open, on every storage."""

from __future__ import annotations

import pytest
from tests.shared.kit import Sharing
from tests.storage.leases_kit import leased, turn
from tests.storage.values import DAY_MS, OTHER, START_MS, WINDOWS, claim, draft, meter, record, settle, take

from asgi_llm_guard.claims import Bundle, Unit
from asgi_llm_guard.storage.leases import LeasingStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.shared import OpenCall, OpenHold
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

DAY = meter(WINDOWS["calendar"], 1_000, subject="ann")
SLOTS = meter(WINDOWS["slots"], 50, subject="bob", policy="slots")
SHADOW = meter(WINDOWS["rolling"], 1, subject="cy", policy="shadow", enforce=False)


async def test_an_open_call_is_shown_with_its_draft_and_what_it_holds(store: Sharing, clock: FrozenClock) -> None:
    """Owner, instant, draft and every amount that was taken; what did not fit in shadow was not."""
    written = draft("me-1", cost=70)
    await take(store, "me-1", claim(DAY, 70), claim(SLOTS), claim(SHADOW, 5), draft=written)
    (call,) = await store.open_calls()
    assert (call.call_id, call.owner, call.at_ms, call.draft) == ("me-1", "process-1", clock.now_ms(), written)
    assert len(call.held) == 2
    assert set(call.held) == {
        OpenHold("policy", "user", "ann", Unit.NANOUSD, 70),
        OpenHold("slots", "user", "bob", Unit.NANOUSD, 1),
    }


async def test_calls_of_all_processes_newest_first(store: Sharing, clock: FrozenClock) -> None:
    """Every process's calls are there, the newest first, and at most as many as asked for."""
    for n in range(12):
        await take(store, f"c-{n}", claim(DAY), owner=OTHER if n % 2 else "process-1", draft=draft(f"c-{n}"))
        clock.advance(ms=1)
    calls = await store.open_calls()
    assert [call.call_id for call in calls] == [f"c-{n}" for n in reversed(range(12))]
    assert {call.owner for call in calls} == {"process-1", OTHER}
    assert [call.call_id for call in await store.open_calls(3)] == ["c-11", "c-10", "c-9"]


async def test_what_was_settled_is_not_open(store: Sharing) -> None:
    """A call that was settled, cancelled or expired is not there any more; one that was changed is, as it is."""
    for call_id in ("settled", "cancelled", "changed"):
        await take(store, call_id, claim(DAY, 10), draft=draft(call_id))
    await settle(store, "settled", 5, record=record("settled", 5))
    await settle(store, "cancelled")
    await store.amend("process-1", Bundle("changed", (claim(DAY, 30),), draft("changed", cost=30)))
    (call,) = await store.open_calls()
    assert (call.call_id, [hold.amount for hold in call.held]) == ("changed", [30])
    assert call.draft == draft("changed", cost=30)
    await store.retire("process-1")
    assert await store.open_calls() == []


async def test_holds_without_a_draft_are_calls_too(store: Sharing) -> None:
    """What a request holds and no usage record belongs to is shown without a draft."""
    await take(store, "request", claim(SLOTS))
    (call,) = await store.open_calls()
    assert (call.draft, len(call.held)) == (None, 1)


async def test_calls_out_of_a_lease_and_no_leases(clock: FrozenClock) -> None:
    """A call that a process granted from its own lease is there, and the lease itself is not, however many there are."""
    store = MemoryStorage(clock=clock, lapse_ms=DAY_MS)
    storage = LeasingStorage(store, clock=clock, workers=1, skew_ms=0)
    hot = [leased(subject=str(n)) for n in range(6)]
    for n, on in enumerate(hot):
        await take(storage, f"first-{n}", claim(on, 1))
        await settle(storage, f"first-{n}", 1)
    await turn()
    clock.advance(ms=1)
    assert storage.admit("process-1", (Bundle("local", (claim(hot[0], 1),), draft("local", at_ms=clock.now_ms())),))
    of_store = await store.open_calls()
    assert len(of_store) >= 6
    assert all(call.call_id.startswith("lease:") for call in of_store)
    for limit in (1, 1_000):
        (call,) = await storage.open_calls(limit)
        assert call == OpenCall(
            call_id="local",
            owner="process-1",
            at_ms=START_MS + 1,
            draft=draft("local", at_ms=START_MS + 1),
            held=(),
        )
    await storage.heartbeat("process-1")
    await storage.heartbeat("process-1")
    assert [call.call_id for call in await storage.open_calls()] == ["local"]
    assert "local" in [call.call_id for call in await store.open_calls()]
    await storage.aclose()
