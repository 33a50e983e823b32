"""Which counters are looked at: what is kept of them, and what never gets lost."""

from __future__ import annotations

from tests.storage.values import HOUR_MS, START_MS, WINDOWS, claim, meter, record

from asgi_llm_guard.alerts import BurnRate, Threshold
from asgi_llm_guard.alerts.watch import Watch
from asgi_llm_guard.claims import Granted, Meter, Reading, Receipt, Settled
from asgi_llm_guard.context import Context
from asgi_llm_guard.events import Admission, Expired, SettledCall

DAY = WINDOWS["calendar"]
END_MS = START_MS + 16 * HOUR_MS


def on(subject: str) -> Meter:
    return meter(DAY, 100, subject=subject)


def admitted(
    subject: str, used: int, *, held: int = 0, amount: int = 1, call_id: str | None = None, taken: bool = True,
    degraded: bool = False,
) -> Admission:  # fmt: skip
    receipt = Receipt(claim(on(subject), amount), taken, taken, used, held, 0, END_MS)
    return Admission(Context(), None, Granted((receipt,), START_MS), degraded, call_id)


def settled(call_id: str, overage: int = 0) -> SettledCall:
    return SettledCall(record(call_id, 1), Settled(call_id, "settled", (overage,)))


def due(watch: Watch) -> list[str]:
    return [meter.subject for meter in watch.due(START_MS)]


def read(watch: Watch, subject: str, used: int, held: int = 0) -> list[float]:
    """Look at a reading, and tell what it has crossed; gives the percents."""
    crossings = watch.look([on(subject)], [Reading(used, held, END_MS)], START_MS)
    for crossing in crossings:
        watch.handled(crossing)
    return [crossing.at for crossing in crossings]


def test_far_from_thresholds_nothing_is_kept() -> None:
    """A counter below its first threshold, with all that is held, is neither read nor remembered."""
    watch = Watch([Threshold(at=(50,))])
    watch(admitted("far", 10, held=20, amount=19))
    assert due(watch) == []
    assert not watch._entries
    watch(admitted("near", 10, held=20, amount=20))
    assert due(watch) == ["near"]
    assert due(watch) == ["near"]
    assert read(watch, "near", 10, 40) == []
    assert due(watch) == ["near"]
    assert read(watch, "near", 30) == []
    assert due(watch) == []


def test_what_was_not_taken_or_not_decided_by_the_store_is_nothing() -> None:
    """Shadow claims that did not fit, and what this process granted by itself during an outage, are not looked at."""
    watch = Watch([Threshold(at=(50,))])
    watch(admitted("a", 90, taken=False))
    watch(admitted("b", 90, degraded=True))
    assert due(watch) == []


def test_what_is_told_until_it_was_handled() -> None:
    """A crossing that could not be told is there again with the next reading, and once it was handled no more."""
    watch = Watch([Threshold(at=(50,)), Threshold(policy="policy", at=(50, 80))])
    watch(admitted("a", 60))
    for _ in range(2):
        assert due(watch) == ["a"]
        assert [crossing.at for crossing in watch.look([on("a")], [Reading(60, 0, END_MS)], START_MS)] == [50]
    assert read(watch, "a", 60) == [50]
    assert read(watch, "a", 60) == []
    assert due(watch) == []
    assert read(watch, "a", 80) == [80]


def test_overages_are_looked_at_also_of_forgotten_calls() -> None:
    """A call that used more than it held has its counters read; where the call is not known any more, all that are."""
    watch = Watch([Threshold(at=(50,))], most_calls=2)
    for n in range(3):
        watch(admitted(f"s{n}", 0, call_id=f"c{n}"))
    watch(settled("c2"))
    watch(settled("c1", 70))
    assert due(watch) == ["s1"]
    assert read(watch, "s1", 71) + read(watch, "s1", 71) == [50]
    assert due(watch) == []
    watch(settled("c0", 70))
    assert due(watch) == ["s1"]


def test_expired_holds_have_all_read() -> None:
    """Holds of dead processes that were charged have every counter read that is known."""
    watch = Watch([Threshold(at=(50,))])
    watch(admitted("a", 49, amount=1))
    assert due(watch) == ["a"]
    assert read(watch, "a", 49) == []
    assert due(watch) == []
    watch(Expired(("c",)))
    assert due(watch) == ["a"]


def test_a_full_queue_keeps_what_may_cross() -> None:
    """S3: beyond the queue only counters are kept that may cross, each once; and overages have all read that is known."""
    watch = Watch([Threshold(at=(50,))], most_events=1)
    for _ in range(3):
        watch(admitted("far", 10))
        watch(admitted("near", 60))
        watch(admitted("next", 70))
    watch(settled("c"))
    assert watch.waiting == 1
    assert sorted(watch._crowded) == sorted([on("near").key, on("next").key])
    assert due(watch) == ["near", "next"]
    assert read(watch, "near", 60) + read(watch, "next", 70) == [50, 50]
    watch(admitted("far", 10))
    watch(settled("c", 5))
    assert due(watch) == ["near", "next"]


def test_room_is_not_made_by_what_may_cross() -> None:
    """S3: of more counters than are remembered those go that are settled, and never one that may still cross."""
    watch = Watch([Threshold(at=(50,)), BurnRate(window="1h", times=1000)], most_meters=2)
    watch(admitted("told", 60))
    assert due(watch) == ["told"]
    assert read(watch, "told", 60) + read(watch, "told", 60) == [50]
    for n in range(3):
        watch(admitted(f"open{n}", 40, amount=20))
    assert due(watch) == ["open0", "open1", "open2"]
    assert on("told").key not in watch._entries


def test_a_raised_limit_moves_thresholds() -> None:
    """Thresholds go by the limit of the last admission."""
    watch = Watch([Threshold(at=(50,))])
    watch(admitted("a", 60))
    higher = Receipt(claim(meter(DAY, 1_000, subject="a"), 1), True, True, 60, 0, 0, END_MS)
    watch(Admission(Context(), None, Granted((higher,), START_MS)))
    assert [meter.limit for meter in watch.due(START_MS)] == [1_000]
    assert watch.look([on("a")], [Reading(60, 0, END_MS)], START_MS) == []


def test_a_window_that_ended_is_no_reset() -> None:
    """Less used in another instance, or in none after the end, is the window's end; less in the same one is a reset."""
    watch = Watch([Threshold(at=(50,))])
    watch(admitted("a", 60))
    assert due(watch) == ["a"]
    assert read(watch, "a", 60) == [50]
    watch.look([on("a")], [Reading(0, 0, None)], END_MS)
    assert watch.lowered == {}
    watch.look([on("a")], [Reading(70, 0, END_MS + 24 * HOUR_MS)], END_MS)
    watch.look([on("a")], [Reading(10, 0, END_MS + 24 * HOUR_MS)], END_MS)
    assert [name for _, name in watch.lowered.values()] == [str(END_MS + 24 * HOUR_MS)]
    watch.lowered.clear()
    watch.look([on("a")], [Reading(0, 0, None)], END_MS)
    assert [name for _, name in watch.lowered.values()] == [str(END_MS + 24 * HOUR_MS)]
