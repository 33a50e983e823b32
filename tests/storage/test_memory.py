"""What the memory storage promises beside the contract: bounds on what it keeps."""

from __future__ import annotations

import tracemalloc

import pytest
from tests.storage.values import (
    DAY_MS,
    HOUR_MS,
    ME,
    MINUTE_MS,
    START,
    START_MS,
    WINDOWS,
    ask,
    claim,
    level,
    meter,
    record,
    refuse,
    settle,
    take,
)

from asgi_llm_guard.claims import Bundle, Ended, Granted
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.base import TOMBSTONE_MS
from asgi_llm_guard.storage.cells import OWNER_MEMORY_MS
from asgi_llm_guard.storage.counting import GRACE_MS
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Distinct, Lifetime, Sliding, Slots

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("option", ["lapse_ms", "tombstone_ms", "max_records"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_bounds_are_checked_at_construction(option: str, value: object) -> None:
    """A bound that is not a positive whole number is a configuration error that names it."""
    with pytest.raises(ConfigurationError, match=option):
        MemoryStorage(**{option: value})  # type: ignore[arg-type]


async def test_the_ledger_drops_its_oldest_records() -> None:
    """The ledger keeps `max_records`; a call id is known for ten minutes even if its record was dropped."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, max_records=3)
    for number in range(5):
        await settle(storage, str(number), record=record(str(number), 1, at_ms=START_MS + number))
    assert [r.call_id for r in await storage.records()] == ["2", "3", "4"]
    clock.advance(ms=TOMBSTONE_MS - 1)
    assert (await settle(storage, "0", record=record("0", 9))).status == "duplicate"


async def test_a_flood_of_sessions_stays_within_the_bound_on_ids() -> None:
    """T9: of endless random session ids no more than the bound are counted at a time, nor kept for long."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=DAY_MS)
    ids, bound = meter(Distinct(HOUR_MS), 50), 50
    for number in range(6_000):
        session = f"session-{number}"
        counter = meter(Lifetime(HOUR_MS), subject=session)
        await ask(storage, session, claim(counter), claim(ids, 1, session))
        await settle(storage, session, 1, 1)
        clock.advance(seconds=5)
        size = storage.size()
        assert size["members"] <= bound
        assert size["cells"] <= 3 * bound
        assert size["tombstones"] <= TOMBSTONE_MS // 5_000 + 1
    assert storage.size()["cells"] >= bound


async def test_callers_that_went_away_are_forgotten() -> None:
    """The list of live ids of a caller is dropped once all of them have expired and others come."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=400 * DAY_MS)
    for number in range(500):
        await take(storage, str(number), claim(meter(Distinct(MINUTE_MS), subject=str(number)), 1, "x"))
        clock.advance(seconds=10)
    assert storage.size()["members"] <= 20


async def test_cells_with_open_holds_are_never_forgotten() -> None:
    """A hold that is open for very long finds its meters, however many others have come and gone."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=400 * DAY_MS)
    held = [meter(window, subject="held") for window in WINDOWS.values()]
    await take(storage, "held", *(claim(m, 5) for m in held))
    clock.advance(ms=2 * DAY_MS)
    for number in range(100):
        call_id = f"other-{number}"
        await take(storage, call_id, *(claim(meter(window, subject=call_id)) for window in WINDOWS.values()))
        await settle(storage, call_id, *(1 for _ in WINDOWS))
        clock.advance(ms=HOUR_MS)
    assert await level(storage, meter(Slots(), subject="held")) == (0, 5)
    assert (await settle(storage, "held", *(5 for _ in held))).status == "settled"
    assert await level(storage, meter(Slots(), subject="held")) == (0, 0)


@pytest.mark.parametrize("window", [Sliding(MINUTE_MS), Bucket(MINUTE_MS, 100), Slots(), Lifetime(MINUTE_MS)])
async def test_cells_outlive_their_window_by_a_grace(window: Sliding | Bucket | Slots | Lifetime) -> None:
    """Cells are kept for ten minutes after their end, for a clock that steps back, and not for long after that."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=DAY_MS)
    for number in range(200):
        on = meter(window, subject=str(number))
        await take(storage, str(number), claim(on))
        await settle(storage, str(number), 1)
        clock.advance(seconds=30)
    kept = storage.size()["cells"]
    alive = 1 if isinstance(window, Slots) else (GRACE_MS + MINUTE_MS) // 30_000
    assert alive <= kept <= 3 * alive + 3


async def test_a_lapsed_owner_is_remembered_for_a_day() -> None:
    """Owners that never come back are forgotten in the end."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    for number in range(20):
        await storage.heartbeat(f"process-{number}")
        clock.advance(ms=OWNER_MEMORY_MS // 8)
    assert storage.size()["owners"] <= 10
    assert (await storage.heartbeat("process-19")).lapsed is True
    assert (await storage.heartbeat("process-0")).lapsed is False


async def test_tombstones_go_with_the_heartbeat() -> None:
    """Call ids that ended ten minutes ago are let go even when nothing else is asked."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    for number in range(30):
        await settle(storage, str(number))
    assert isinstance(await ask(storage, "0"), Ended)
    clock.advance(ms=TOMBSTONE_MS)
    await storage.heartbeat(ME)
    assert storage.size()["tombstones"] == 0
    assert isinstance(await ask(storage, "0"), Granted)


async def test_a_late_settlement_does_not_keep_older_tombstones() -> None:
    """A call id that ended twice (expired, then settled late) is let go after those that ended between."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    await take(storage, "late", claim(meter(Slots())))
    await storage.retire(ME)
    await settle(storage, "between")
    clock.advance(ms=TOMBSTONE_MS // 2)
    assert (await settle(storage, "late", 1)).status == "late"
    clock.advance(ms=TOMBSTONE_MS // 2)
    await storage.heartbeat(ME)
    assert storage.size()["tombstones"] == 1
    assert isinstance(await ask(storage, "late"), Ended)


async def test_tombstones_go_as_others_come() -> None:
    """Without a heartbeat too, settlements let go of call ids that ended ten minutes ago."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock)
    for number in range(100):
        await settle(storage, str(number))
        clock.advance(ms=TOMBSTONE_MS // 10)
    assert storage.size()["tombstones"] <= 11


class LockWatch:
    """A clock that notes whether the storage that asks it is locked."""

    storage: MemoryStorage

    def __init__(self) -> None:
        self.locked: list[bool] = []

    def now_ms(self) -> int:
        self.locked.append(self.storage._lock.locked())
        return START_MS


async def test_every_verb_is_one_step_for_other_threads() -> None:
    """From its instant on, each operation is alone with the state."""
    clock = LockWatch()
    storage = clock.storage = MemoryStorage(clock=clock)
    on = meter(Slots())
    await take(storage, "a", claim(on))
    await storage.amend(ME, Bundle("a", (claim(on, 2),)))
    await settle(storage, "a", 1)
    await storage.heartbeat(ME)
    await storage.read((on,))
    await storage.reset((on,))
    await storage.records()
    lines = [line async for line in storage.export()]
    with pytest.raises(StorageError):
        await storage.load(lines)
    await storage.retire(ME)
    await storage.open_holds()
    assert clock.locked == [True] * 11


async def test_a_session_counter_costs_little_memory() -> None:
    """A live session's counter, its id and their keys take at most 1.5 KB."""
    clock = FrozenClock(START)
    storage = MemoryStorage(clock=clock, lapse_ms=DAY_MS, max_records=1)
    ids = meter(Distinct(HOUR_MS), 1_000_000)

    async def sessions(first: int, last: int) -> None:
        for number in range(first, last):
            session = f"{number:036d}"
            counter = meter(Lifetime(HOUR_MS), subject=f"caller-{number % 7}:{session}", policy="session-iterations")
            await take(storage, session, claim(counter), claim(ids, 1, session))
            await settle(storage, session, 1, 1)

    await sessions(0, 100)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    await sessions(100, 5_100)
    clock.advance(ms=TOMBSTONE_MS)
    for _ in range(60):
        await storage.heartbeat(ME)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert storage.size()["tombstones"] == 0
    assert (after - before) / 5_000 <= 1_500


async def test_a_refused_flood_leaves_nothing_behind() -> None:
    """T9: refused calls with ever new ids leave no cell, no id, no tombstone and no hold."""
    storage = MemoryStorage(clock=FrozenClock(START))
    ids = meter(Distinct(HOUR_MS), 0)
    for number in range(200):
        await refuse(
            storage, str(number), claim(meter(Lifetime(HOUR_MS), subject=str(number))), claim(ids, 1, str(number))
        )
    assert set(storage.size().values()) == {0}
