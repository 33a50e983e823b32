"""What random histories and mutations found, kept as short histories that every storage is run through."""

from __future__ import annotations

import pytest
from tests.storage.values import (
    DAY_MS,
    HOUR_MS,
    ME,
    OTHER,
    START_MS,
    Make,
    ask,
    claim,
    level,
    meter,
    refuse,
    settle,
    take,
)

from asgi_llm_guard.claims import Bundle, Ended, Granted, Reading
from asgi_llm_guard.storage.base import LAPSE_MS, Storage
from asgi_llm_guard.storage.cells import GRACE_MS
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Distinct, Rolling, Sliding, Slots

pytestmark = pytest.mark.anyio


async def test_a_limit_lowered_to_zero_blocks_known_ids_too(storage: Storage) -> None:
    """0 blocks everything: an id that was let in before is not let in again, and no time brings it back."""
    await take(storage, "a", claim(meter(Distinct(HOUR_MS), 2), 1, "x"))
    (state,) = await refuse(storage, "b", claim(meter(Distinct(HOUR_MS), 0), 1, "x"))
    assert (state.used, state.fits, state.resets_at_ms) == (0, False, None)


async def test_a_hold_that_a_lapsed_owner_took_over_expires_with_it(mortal: Storage, clock: FrozenClock) -> None:
    """An owner that had lapsed when it amended a hold of another is registered anew; should it die, the hold expires."""
    on = meter(Slots(), 1)
    await mortal.heartbeat(OTHER)
    clock.advance(ms=LAPSE_MS)
    await take(mortal, "a", claim(on))
    await mortal.heartbeat(ME)
    assert isinstance(await mortal.amend(OTHER, Bundle("a", (claim(on),))), Granted)
    clock.advance(ms=LAPSE_MS)
    assert isinstance(await ask(mortal, "b", claim(on)), Granted)
    assert isinstance(await ask(mortal, "a", claim(on)), Ended)


async def test_amend_by_a_lapsed_owner_does_not_revive_its_holds(mortal: Storage, clock: FrozenClock) -> None:
    """A process that lapsed learns by its next amend, as by its next reserve, that its older holds are gone."""
    on = meter(Slots(), 5)
    await take(mortal, "a", claim(on))
    clock.advance(ms=LAPSE_MS)
    assert await mortal.amend(ME, Bundle("a", (claim(on, 2),))) == Ended("a", "expired", clock.now_ms())
    assert await level(mortal, on) == (0, 0)


async def test_a_reading_names_when_the_last_use_leaves(storage: Storage, clock: FrozenClock) -> None:
    """A sub-bucket in which nothing is left puts off no reset."""
    on = meter(Sliding(10_000, 10), 10)
    await take(storage, "a", claim(on, 3))
    clock.advance(ms=5_000)
    await take(storage, "b", claim(on, 2))
    await settle(storage, "b", 0)
    assert await storage.read((on,)) == (Reading(0, 3, START_MS + 11_000),)


async def fill_with_others(storage: Storage, number: int = 20) -> None:
    """Use other meters, so that a storage which forgets what is over gets to it."""
    for n in range(number):
        await take(storage, f"other-{n}", claim(meter(Rolling(DAY_MS), subject=f"other-{n}")), owner=ME)


async def test_a_hold_of_nothing_is_charged_however_long_it_was_open(storage: Storage, clock: FrozenClock) -> None:
    """A bucket that is empty and holds nothing is still charged what a call really used that was let in with 0."""
    on = meter(Bucket(1_000, 10), 10)
    await take(storage, "a", claim(on, 0))
    clock.advance(ms=2 * GRACE_MS)
    await fill_with_others(storage)
    assert (await settle(storage, "a", 7)).overages == (7,)
    assert await level(storage, on) == (7, 0)


async def test_a_late_overage_is_charged_to_a_bucket_that_was_empty_for_long(make: Make, clock: FrozenClock) -> None:
    """What a late settlement debits reaches a bucket that has been empty since long before its hold expired."""
    storage = make(clock)
    on = meter(Bucket(1_000, 10), 10)
    await take(storage, "a", claim(on, 4), owner=OTHER)
    for _ in range(2 * GRACE_MS // LAPSE_MS + 1):
        clock.advance(ms=LAPSE_MS - 1)
        await storage.heartbeat(OTHER)
        await storage.heartbeat(ME)
    clock.advance(ms=LAPSE_MS)
    assert (await storage.heartbeat(ME)).expired == ("a",)
    await fill_with_others(storage)
    assert (await settle(storage, "a", 9)).overages == (5,)
    assert await level(storage, on) == (5, 0)
