"""The contract, on every storage: what turns out after a call was admitted, and amending under a lower limit."""

from __future__ import annotations

import pytest

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Refused, Rule, Settlement, Unit
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Calendar, Lifetime, Rolling, Sliding, Slots, Window

pytestmark = pytest.mark.anyio


def meter(key: str = "m", *, limit: int | None = 10, window: Window | None = None) -> Meter:
    window = window or Rolling(60_000)
    return Meter(
        key=key,
        policy=key,
        scope="global",
        subject="",
        unit=Unit.TOKENS,
        rule=Rule.QUOTA,
        limit=limit,
        window=window,
    )


# A bucket is last: its rate is a part of its key, so another limit is another meter.
WINDOWS = [
    Lifetime(60_000),
    Lifetime(60_000, renew=True),
    Rolling(60_000),
    Calendar("day"),
    Sliding(60_000),
    Bucket(60_000, 10),
]


async def test_no_actuals_mean_that_nothing_was_used(storage: Storage) -> None:
    """A settlement without actuals gives everything back, whatever the hold's claims are."""
    claims = (Claim(meter("a"), 5), Claim(meter("b"), 3), Claim(meter("c", window=Slots()), 1))
    assert isinstance(await storage.reserve("me", ((Bundle("1", claims),),)), Granted)
    (settled,) = await storage.settle([Settlement("1", ())])
    assert (settled.status, settled.overages) == ("settled", (0, 0, 0))
    readings = await storage.read([claim.meter for claim in claims])
    assert [(reading.used, reading.held) for reading in readings] == [(0, 0)] * 3


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.code)
async def test_debits_are_charged_without_a_hold(storage: Storage, window: Window) -> None:
    """What was not claimed at admission is charged with the settlement, past the limit too, and refuses what comes then."""
    debited = meter("late", window=window)
    await storage.reserve("me", ((Bundle("1", (Claim(meter("a"), 5),)),),))
    (settled,) = await storage.settle(
        [Settlement("1", (2,), UsageRecord(call_id="1", at_ms=0), (), (Claim(debited, 12),))]
    )
    assert settled.status == "settled"
    (reading,) = await storage.read([debited])
    assert (reading.used, reading.held) == (12, 0)
    assert isinstance(await storage.reserve("me", ((Bundle("2", (Claim(debited, 1),)),),)), Refused)


async def test_debits_are_charged_once(storage: Storage) -> None:
    """A duplicate settlement charges its debits no second time."""
    debited = meter("late")
    await storage.reserve("me", ((Bundle("1", (Claim(meter("a"), 5),)),),))
    settlement = Settlement("1", (2,), UsageRecord(call_id="1", at_ms=0), (), (Claim(debited, 7),))
    await storage.settle([settlement])
    (again,) = await storage.settle([settlement])
    assert again.status == "duplicate"
    assert [(r.used, r.held) for r in await storage.read([debited, meter("a")])] == [(7, 0), (2, 0)]


async def test_debits_of_a_call_that_the_store_does_not_know_are_charged(storage: Storage) -> None:
    """A settlement with debits only charges them, and leaves a tombstone."""
    debited = meter("late")
    (settled,) = await storage.settle([Settlement("1", (), None, (), (Claim(debited, 7),))])
    assert settled.status == "lost"
    (again,) = await storage.settle([Settlement("1", (), None, (), (Claim(debited, 7),))])
    assert again.status == "duplicate"
    assert [(r.used, r.held) for r in await storage.read([debited])] == [(7, 0)]


async def test_debits_go_to_the_current_window(storage: Storage, clock: FrozenClock) -> None:
    """A debit is charged to the instance of the window in which it is settled."""
    debited = meter("late")
    await storage.settle([Settlement("1", (), None, (), (Claim(debited, 7),))])
    clock.advance(ms=60_000)
    await storage.settle([Settlement("2", (), None, (), (Claim(debited, 4),))])
    assert [(r.used, r.held) for r in await storage.read([debited])] == [(4, 0)]


@pytest.mark.parametrize("window", WINDOWS[:-1], ids=lambda window: window.code)
async def test_amend_judges_anew_under_a_lower_limit(storage: Storage, window: Window) -> None:
    """A claim of the same amount is judged again where the meter's limit is lower than the one it was held under."""
    wide, narrow = meter("m", limit=10, window=window), meter("m", limit=2, window=window)
    for number in range(2):
        await storage.reserve("me", ((Bundle(f"first-{number}", (Claim(wide, 1),)),),))
    assert isinstance(await storage.reserve("me", ((Bundle("third", (Claim(wide, 1),)),),)), Granted)
    refused = await storage.amend("me", Bundle("third", (Claim(narrow, 1),)))
    assert isinstance(refused, Refused)
    assert [(r.used, r.held) for r in await storage.read([wide])] == [(0, 3)]
    await storage.settle([Settlement("first-0", (0,))])
    assert isinstance(await storage.amend("me", Bundle("third", (Claim(narrow, 1),))), Granted)
    assert [(r.used, r.held) for r in await storage.read([wide])] == [(0, 2)]
