"""What every storage promises, rule by rule of `storage/base.py`."""

from __future__ import annotations

import asyncio
import itertools
import threading
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from tests.storage.values import (
    CENT,
    DAY_MS,
    DOLLAR,
    HOUR_MS,
    ME,
    MINUTE_MS,
    OTHER,
    SECOND_MS,
    START,
    START_MS,
    WINDOWS,
    Make,
    ask,
    claim,
    draft,
    level,
    meter,
    record,
    refuse,
    settle,
    sized,
    state_of,
    take,
)

from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Heartbeat, Reading, Refused, Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

pytestmark = pytest.mark.anyio

every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
INSTANCES = {name: WINDOWS[name] for name in ("lifetime", "renewed", "rolling", "calendar")}
instance_window = pytest.mark.parametrize("window", INSTANCES.values(), ids=INSTANCES.keys())
COUNTED = {name: window for name, window in WINDOWS.items() if name not in {"slots", "distinct"}}
counted_window = pytest.mark.parametrize("window", COUNTED.values(), ids=COUNTED.keys())


# --------------------------------------------------------------------- rule 1: all or nothing


@every_window
async def test_a_refused_plan_changes_nothing_whatever_it_claims(storage: Storage, window: Window) -> None:
    """9, 33, 50, 54: a refused call moves no counter, starts no window, takes no slot and leaves no id."""
    blocked = meter(Slots(), 0, subject="blocked")
    known = meter(window, subject="known")
    await take(storage, "before", claim(known, 2))
    before = await state_of(storage)
    await refuse(storage, "a", claim(meter(window)), claim(known, 3, "another"), claim(blocked))
    await refuse(storage, "b", claim(blocked), claim(meter(window)), claim(known, 3))
    assert await state_of(storage) == before


async def test_whichever_claim_refuses_no_counter_moves(storage: Storage, clock: FrozenClock) -> None:
    """50: a refusal by any of the claims, at any place, leaves every other counter as it was."""
    meters = [meter(window, subject="many") for window in WINDOWS.values()]
    await take(storage, "first", *(claim(m, 1, "known") for m in meters))
    clock.advance(seconds=90)
    before = await state_of(storage)
    for at, window in itertools.product(range(len(meters) + 1), WINDOWS.values()):
        claims = [claim(m, 1, "new") for m in meters]
        claims.insert(at, claim(meter(window, 0, subject="zero")))
        await refuse(storage, "refused", *claims)
    assert await state_of(storage) == before


async def test_the_order_of_claims_never_changes_the_answer(make: Make) -> None:
    """Every order of the same claims is admitted, or refused, alike."""
    meters = [meter(Rolling(DAY_MS), 5), meter(Sliding(HOUR_MS), 3), meter(Slots(), 2), meter(Bucket(DAY_MS, 4), 4)]
    for amounts, fits in (((5, 3, 2, 4), True), ((6, 3, 2, 4), False), ((5, 3, 2, 5), False), ((5, 4, 3, 4), False)):
        claims = [claim(m, amount) for m, amount in zip(meters, amounts, strict=True)]
        for order in itertools.permutations(claims):
            answer = await ask(make(FrozenClock(START)), "a", *order)
            assert isinstance(answer, Granted if fits else Refused)


async def test_receipts_come_in_claim_order_over_all_bundles(storage: Storage) -> None:
    """A plan of several bundles is granted whole, with one receipt for each claim in order."""
    a, b, c = (claim(meter(Rolling(DAY_MS), subject=name), amount) for amount, name in enumerate("abc", start=1))
    answer = await storage.reserve(ME, ((Bundle("x", (a,)), Bundle("y", (b, c))),))
    assert isinstance(answer, Granted)
    assert [receipt.claim for receipt in answer.receipts] == [a, b, c]
    assert (answer.plan, answer.replayed, answer.now_ms) == (0, False, START_MS)
    assert await storage.open_holds() == 2
    await settle(storage, "y", 0, 0)
    assert [await level(storage, c.meter) for c in (a, b, c)] == [(0, 1), (0, 0), (0, 0)]


async def test_the_first_plan_that_fits_is_taken(storage: Storage) -> None:
    """Of several plans the first that fits is granted, and the others take nothing."""
    small, middle, large = (meter(Rolling(DAY_MS), limit, subject=str(limit)) for limit in (1, 5, 9))
    plans = [(Bundle("a", (claim(m, 4),)),) for m in (small, middle, large)]
    answer = await storage.reserve(ME, plans)
    assert isinstance(answer, Granted)
    assert answer.plan == 1
    assert [await level(storage, m) for m in (small, middle, large)] == [(0, 0), (0, 4), (0, 0)]
    replay = await storage.reserve(ME, plans)
    assert isinstance(replay, Granted)
    assert (replay.plan, replay.replayed, replay.receipts) == (1, True, answer.receipts)


async def test_a_refusal_shows_the_state_of_every_claim_of_every_plan(storage: Storage) -> None:
    """A refusal tells used, held and reset of all claims, so one answer explains all of them."""
    full = meter(Rolling(DAY_MS), 3, subject="full")
    free = meter(Calendar("day"), 3, subject="free")
    await take(storage, "a", claim(full, 2))
    answer = await storage.reserve(
        ME, ((Bundle("b", (claim(free), claim(full, 2))),), (Bundle("b", (claim(full, 4),)),))
    )
    assert isinstance(answer, Refused)
    midnight = START_MS + 16 * HOUR_MS
    (free_state, full_state), (never,) = answer.states
    assert (free_state.taken, free_state.fits, free_state.used, free_state.held) == (False, True, 0, 0)
    assert (free_state.pin, free_state.resets_at_ms) == (midnight - DAY_MS, midnight)
    assert (full_state.taken, full_state.fits, full_state.used, full_state.held) == (False, False, 0, 2)
    assert (full_state.pin, full_state.resets_at_ms) == (START_MS, START_MS + DAY_MS)
    assert (never.fits, never.resets_at_ms) == (False, None)


async def test_two_claims_on_one_meter_are_an_error_of_the_caller(storage: Storage) -> None:
    """A plan that claims a meter twice is refused loudly, for the two would be judged apart; nothing is taken."""
    for window in WINDOWS.values():
        twice = claim(meter(window, 1))
        for plan in (
            (Bundle("a", (twice, twice)),),
            (Bundle("a", (twice,)), Bundle("b", (twice,))),
        ):
            with pytest.raises(ValueError, match="two claims"):
                await storage.reserve(ME, (plan,))
    for window in WINDOWS.values():
        known = claim(meter(window, 5))
        await take(storage, f"known-{window}", known)
        before = await level(storage, known.meter)
        with pytest.raises(ValueError, match="two claims"):
            await ask(storage, "a", claim(meter(Slots(), subject="other")), known, known)
        assert await level(storage, known.meter) == before
    assert await level(storage, meter(Slots(), subject="other")) == (0, 0)


async def test_misuse_of_plans_is_an_error_of_the_caller(storage: Storage) -> None:
    """No plan, one call id twice, half-open plans and ids without a name raise and change nothing."""
    with pytest.raises(ValueError, match="at least one plan"):
        await storage.reserve(ME, ())
    with pytest.raises(ValueError, match="same call id"):
        await storage.reserve(ME, ((Bundle("a", ()), Bundle("a", ())),))
    with pytest.raises(ValueError, match="names its id"):
        await ask(storage, "a", claim(meter(Slots())), Claim(meter(Distinct(HOUR_MS)), 1))
    await take(storage, "a", claim(meter(Rolling(DAY_MS))))
    with pytest.raises(ValueError, match="'b' is not open"):
        await storage.reserve(ME, ((Bundle("a", ()), Bundle("b", ())),))
    assert await storage.open_holds() == 1
    assert await level(storage, meter(Slots())) == (0, 0)


# -------------------------------------------------------------------------- rule 2: fitting


@every_window
async def test_exactly_the_limit_fits(storage: Storage, window: Window) -> None:
    """A1: call number limit + 1 is refused, the ones before it are not."""
    on = meter(sized(window, 3), 3)
    for number in range(3):
        await take(storage, str(number), claim(on, 1, str(number)))
    for number in range(2):
        states = await refuse(storage, f"more-{number}", claim(on, 1, f"more-{number}"))
        assert sum((states[0].used, states[0].held)) == 3


@counted_window
async def test_used_and_held_are_enforced_together(storage: Storage, window: Window) -> None:
    """What is settled and what is held count against the limit in sum, and are told apart."""
    on = meter(sized(window, 10), 10)
    await take(storage, "a", claim(on, 4))
    await settle(storage, "a", 4)
    (receipt,) = await take(storage, "b", claim(on, 3))
    assert (receipt.used, receipt.held) == (4, 0)
    assert await level(storage, on) == (4, 3)
    (state,) = await refuse(storage, "c", claim(on, 4))
    assert (state.used, state.held) == (4, 3)
    (receipt,) = await take(storage, "d", claim(on, 3))
    assert (receipt.used, receipt.held, receipt.taken, receipt.fits) == (4, 3, True, True)


@every_window
async def test_a_limit_of_zero_blocks_everything(storage: Storage, window: Window) -> None:
    """30: a limit of 0 admits nothing, and no time brings it back."""
    (state,) = await refuse(storage, "a", claim(meter(window, 0)))
    assert (state.fits, state.resets_at_ms) == (False, None)


@pytest.mark.parametrize("window", [w for w in WINDOWS.values() if not isinstance(w, Bucket)])
async def test_no_limit_counts_and_refuses_nothing(storage: Storage, window: Window) -> None:
    """25: a meter without a limit counts what it is told and never refuses."""
    on = meter(window, None)
    for number in range(5):
        await take(storage, str(number), claim(on, 1, str(number)))
    assert sum(await level(storage, on)) == 5


@pytest.mark.parametrize("window", [w for w in WINDOWS.values() if not isinstance(w, Bucket | Distinct)])
async def test_amounts_are_exact_up_to_the_largest(storage: Storage, window: Window) -> None:
    """2^53 - 1 is a limit like any other: the last unit fits and the next does not."""
    on = meter(window, MAX_AMOUNT)
    await take(storage, "a", claim(on, MAX_AMOUNT - 1))
    await refuse(storage, "b", claim(on, 2))
    await take(storage, "c", claim(on, 1))
    await refuse(storage, "d", claim(on, 1))
    await take(storage, "e", claim(on, 0))


@instance_window
async def test_an_overage_past_the_largest_amount_stays_there(storage: Storage, window: Window) -> None:
    """Debits that add up to more than any store can count exactly stop at 2^53 - 1, and block."""
    on = meter(window, MAX_AMOUNT)
    for call_id in "abc":
        await take(storage, call_id, claim(on, 0))
    for call_id in "abc":
        await settle(storage, call_id, MAX_AMOUNT)
    assert await level(storage, on) == (MAX_AMOUNT, 0)
    await refuse(storage, "d", claim(on, 1))


async def test_limits_of_both_sides_of_a_change_hold(storage: Storage) -> None:
    """A lowered limit is seen by the next reserve, and nothing is clawed back."""
    await take(storage, "a", claim(meter(Rolling(DAY_MS), 10), 8))
    await refuse(storage, "b", claim(meter(Rolling(DAY_MS), 5), 1))
    await take(storage, "b", claim(meter(Rolling(DAY_MS), 10), 2))
    assert await level(storage, meter(Rolling(DAY_MS), 5)) == (0, 10)


# ---------------------------------------------------------------- exactness under concurrency


async def test_concurrent_calls_admit_exactly_what_fits(storage: Storage) -> None:
    """8, 32, 39: of 100 concurrent calls of $0.10 on $5.00 exactly 50 are admitted."""
    budget = meter(Rolling(DAY_MS), 5 * DOLLAR)
    answers = await asyncio.gather(*(ask(storage, str(n), claim(budget, 10 * CENT)) for n in range(100)))
    assert sum(isinstance(answer, Granted) for answer in answers) == 50
    assert await level(storage, budget) == (0, 5 * DOLLAR)
    await asyncio.gather(*(storage.settle((Settlement(str(n), (7 * CENT,)),)) for n in range(100)))
    assert await level(storage, budget) == (50 * 7 * CENT, 0)


async def test_concurrent_calls_take_exactly_the_slots(storage: Storage) -> None:
    """Of 20 concurrent calls on 10 slots exactly 10 are admitted, and each ended one lets one in."""
    slots = meter(Slots(), 10)
    answers = await asyncio.gather(*(ask(storage, str(n), claim(slots)) for n in range(20)))
    admitted = [n for n, answer in enumerate(answers) if isinstance(answer, Granted)]
    assert len(admitted) == 10
    await settle(storage, str(admitted[0]), 1)
    assert await level(storage, slots) == (0, 9)
    await take(storage, "next", claim(slots))
    await refuse(storage, "one too many", claim(slots))


async def test_threads_admit_exactly_what_fits(storage: Storage) -> None:
    """Threads with event loops of their own share one storage and admit no more than one loop would."""
    budget = meter(Rolling(DAY_MS), 40)
    granted: list[str] = []

    def work(name: str) -> None:
        async def calls() -> None:
            for number in range(20):
                call_id = f"{name}-{number}"
                if isinstance(await ask(storage, call_id, claim(budget)), Granted):
                    granted.append(call_id)
                    await storage.settle((Settlement(call_id, (1,)),))

        asyncio.run(calls())

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert len(granted) == 40
    assert await level(storage, budget) == (40, 0)


async def test_batches_forced_to_check_first_do_not_overshoot(storage: Storage) -> None:
    """40: of 5 batches of 40 tokens on 100, all asked before any is settled, 2 pass."""
    tokens = meter(Calendar("day"), 100)
    answers = [await ask(storage, str(n), claim(tokens, 40)) for n in range(5)]
    assert [type(answer) for answer in answers] == [Granted, Granted, Refused, Refused, Refused]


async def test_work_without_tokens_takes_requests_only(storage: Storage) -> None:
    """41: a claim of 0 tokens is admitted on a spent quota; the fourth of three requests is not."""
    requests, tokens = meter(Sliding(MINUTE_MS), 3, subject="requests"), meter(Rolling(DAY_MS), 10, subject="tokens")
    await take(storage, "spend", claim(tokens, 10))
    for number in range(3):
        await take(storage, str(number), claim(requests), claim(tokens, 0))
    await refuse(storage, "4", claim(requests), claim(tokens, 0))


# ------------------------------------------------------------- rule 3: once reserved, once settled


@every_window
async def test_reserving_again_gives_the_same_receipts(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """A retried reserve finds its own hold: same receipts, nothing taken twice, whatever it claims now."""
    on = meter(window, 5)
    receipts = await take(storage, "a", claim(on, 1))
    before = await state_of(storage)
    clock.advance(seconds=5)
    for claims in ((claim(on, 1),), (claim(on, 99),), ()):
        again = await ask(storage, "a", *claims)
        assert isinstance(again, Granted)
        assert (again.replayed, again.receipts, again.now_ms) == (True, receipts, START_MS + 5 * SECOND_MS)
    assert await state_of(storage) == before


async def test_an_ended_call_id_is_not_reserved_again(storage: Storage, clock: FrozenClock) -> None:
    """A call id that was settled, cancelled or expired is spent; the answer says how it ended."""
    on = meter(Rolling(DAY_MS))
    for call_id in ("settled", "expired"):
        await take(storage, call_id, claim(on), owner=call_id)
    await settle(storage, "settled", 1)
    await settle(storage, "cancelled")
    await storage.retire("expired")
    for call_id in ("settled", "cancelled", "expired"):
        assert await ask(storage, call_id, claim(on)) == Ended(call_id, call_id, clock.now_ms())  # type: ignore[arg-type]
    assert await level(storage, on) == (2, 0)


async def test_one_ended_call_id_ends_the_plan(storage: Storage) -> None:
    """A plan one of whose bundles has ended is answered with that one, and takes nothing."""
    on = meter(Rolling(DAY_MS))
    await storage.reserve(ME, ((Bundle("a", (claim(on),)), Bundle("b", ())),))
    await settle(storage, "b")
    answer = await storage.reserve(ME, ((Bundle("a", (claim(on),)), Bundle("b", ())),))
    assert answer == Ended("b", "settled", START_MS)
    assert await level(storage, on) == (0, 1)


@every_window
async def test_the_second_settlement_changes_nothing(storage: Storage, window: Window) -> None:
    """60: settling twice frees no other request's slot and debits nothing, whatever it says."""
    on = meter(window)
    await take(storage, "a", claim(on, 1))
    await take(storage, "b", claim(on, 1))
    await settle(storage, "a", 1, record=record("a", 1))
    before = await state_of(storage)
    assert await settle(storage, "a", 50, record=record("a", 50)) == Settled("a", "duplicate")
    assert await state_of(storage) == before


async def test_the_ledger_remembers_beyond_the_tombstone(storage: Storage, clock: FrozenClock) -> None:
    """The ledger's unique call id refuses a second settlement or reserve after the tombstone is gone."""
    on = meter(Rolling(DAY_MS))
    receipts = await take(storage, "a", claim(on, 5))
    await settle(storage, "a", 5, record=record("a", 5))
    clock.advance(ms=TOMBSTONE_MS + 1)
    await storage.heartbeat(ME)
    assert (await settle(storage, "a", 7, record=record("a", 7), receipts=receipts)).status == "duplicate"
    assert isinstance(await ask(storage, "a", claim(on)), Ended)
    assert await level(storage, on) == (5, 0)
    assert [r.cost_nanousd for r in await storage.records()] == [5]


# ----------------------------------------------------------------- rule 4: settle is unconditional


@counted_window
async def test_settling_replaces_what_was_held(storage: Storage, window: Window) -> None:
    """34: 50 used of 100 held gives 50 back; the record lands in the same step."""
    on = meter(window)
    await take(storage, "a", claim(on, 100))
    assert await settle(storage, "a", 50, record=record("a", 50)) == Settled("a", "settled", (0,))
    assert await level(storage, on) == (50, 0)
    assert await storage.records() == [record("a", 50)]


@counted_window
async def test_failure_gives_everything_back(storage: Storage, window: Window) -> None:
    """35: a call that cost nothing leaves nothing, on all scopes that were charged and on no other."""
    charged = [meter(window, subject=name) for name in ("user", "organisation")]
    other = meter(window, subject="other")
    await take(storage, "other", claim(other, 10))
    await settle(storage, "other", 10)
    await take(storage, "a", *(claim(m, 60) for m in charged))
    await settle(storage, "a", 0, 0)
    assert [await level(storage, m) for m in (*charged, other)] == [(0, 0), (0, 0), (10, 0)]


@counted_window
async def test_an_overage_is_debited_in_full_and_reported(storage: Storage, window: Window) -> None:
    """What was really used is charged even past the limit, and the excess is reported claim by claim."""
    on = meter(window)
    await take(storage, "a", claim(on, 60), claim(meter(Slots()), 1))
    assert await settle(storage, "a", 130, 5) == Settled("a", "settled", (70, 0))
    assert await level(storage, on) == (130, 0)
    await refuse(storage, "b", claim(on, 1))


async def test_unknown_actuals_are_what_was_held(storage: Storage) -> None:
    """`None`, and an actual that is missing, charge the hold; one too many is ignored."""
    on = [meter(Rolling(DAY_MS), subject=name) for name in "abc"]
    await take(storage, "a", *(claim(m, 5) for m in on))
    await settle(storage, "a", None, 2)
    assert [await level(storage, m) for m in on] == [(5, 0), (2, 0), (5, 0)]
    await take(storage, "b", claim(on[0], 1))
    assert await settle(storage, "b", 1, 9, 9) == Settled("b", "settled", (0,))


@instance_window
async def test_settling_after_the_window_touches_no_other(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """51: a settlement that comes after its window ended never touches the next one, only the ledger."""
    on = meter(window)
    await take(storage, "a", claim(on, 60))
    clock.advance(ms=DAY_MS)
    (receipt,) = await take(storage, "b", claim(on, 10))
    assert (receipt.used, receipt.held) == (0, 0)
    await settle(storage, "a", 90, record=record("a", 90))
    assert await level(storage, on) == (0, 10)
    await settle(storage, "b", 5)
    assert await level(storage, on) == (5, 0)
    assert [r.cost_nanousd for r in await storage.records()] == [90]


async def test_several_call_ids_are_settled_in_one_step(storage: Storage) -> None:
    """A batch settles each call id once, in order, and answers in order."""
    on = meter(Rolling(DAY_MS))
    await take(storage, "a", claim(on, 5))
    settlements = (Settlement("a", (1,)), Settlement("b", ()), Settlement("a", (9,)))
    settled = await storage.settle(settlements)
    assert [one.status for one in settled] == ["settled", "cancelled", "duplicate"]
    assert await level(storage, on) == (1, 0)


async def test_settling_needs_no_event_loop(storage: Storage) -> None:
    """A settlement may be handed over from any thread, and asked for there."""
    on = meter(Rolling(DAY_MS))
    await take(storage, "a", claim(on, 5))

    def hand_over() -> tuple[Settled, ...]:
        pending = storage.settle((Settlement("a", (3,)),))
        settled = pending.result(30)
        assert pending.done()
        return settled

    assert await asyncio.to_thread(hand_over) == (Settled("a", "settled", (0,)),)
    assert await level(storage, on) == (3, 0)


async def test_a_settlement_handed_over_comes_before_a_later_reserve(storage: Storage) -> None:
    """Rule 8: a sequential agent is never refused on its own unsettled hold."""
    on = meter(Slots(), 1)
    for number in range(20):
        await take(storage, str(number), claim(on))
        storage.settle((Settlement(str(number), (1,)),))


# ----------------------------------------------------------------------- rule 5: lapsed owners


@counted_window
async def test_a_lapsed_owners_holds_stay_charged(mortal: Storage, clock: FrozenClock, window: Window) -> None:
    """29: what a dead process held becomes used, with one `expired` record that carries the held cost."""
    on = meter(window)
    await take(mortal, "a", claim(on, 40), owner=OTHER, draft=draft("a", cost=40))
    await take(mortal, "no draft", claim(on, 2), owner=OTHER)
    await mortal.heartbeat(ME)
    clock.advance(ms=LAPSE_MS - 1)
    assert await mortal.heartbeat(ME) == Heartbeat(False, (), clock.now_ms(), 2)
    clock.advance(ms=1)
    assert await mortal.heartbeat(ME) == Heartbeat(False, ("a", "no draft"), clock.now_ms())
    assert await mortal.heartbeat(ME) == Heartbeat(False, (), clock.now_ms())
    assert await level(mortal, on) == (42, 0)
    (kept,) = await mortal.records()
    assert (kept.call_id, kept.outcome, kept.cost_nanousd, kept.late) == ("a", "expired", 40, False)
    assert kept.ended_ms == clock.now_ms()
    assert await mortal.open_holds() == 0


@counted_window
async def test_expiry_may_charge_nothing(mortal: Storage, clock: FrozenClock, window: Window) -> None:
    """`expiry_charge="nothing"` gives back what a dead process held."""
    on = meter(window, refund=True)
    await take(mortal, "a", claim(on, 40), owner=OTHER)
    clock.advance(ms=LAPSE_MS)
    await mortal.heartbeat(ME)
    assert await level(mortal, on) == (0, 0)


async def test_a_crashed_holders_slot_expires(mortal: Storage, clock: FrozenClock) -> None:
    """60: a reserve that would be refused frees the slots of lapsed owners first; a live owner's stay."""
    slots = meter(Slots(), 2)
    await take(mortal, "dead", claim(slots), owner=OTHER)
    await mortal.heartbeat(ME)
    clock.advance(ms=LAPSE_MS - 1)
    await mortal.heartbeat(ME)
    await take(mortal, "a", claim(slots))
    await refuse(mortal, "b", claim(slots))
    clock.advance(ms=1)
    (receipt,) = await take(mortal, "b", claim(slots))
    assert receipt.held == 1
    await refuse(mortal, "c", claim(slots))
    assert isinstance(await ask(mortal, "dead", claim(slots), owner=OTHER), Ended)


async def test_a_reserve_that_fits_expires_nothing(mortal: Storage, clock: FrozenClock) -> None:
    """Holds of lapsed owners are expired by heartbeats and by refusals only: a settlement may still be on its way."""
    slots = meter(Slots(), 3)
    await take(mortal, "dead", claim(slots), owner=OTHER)
    clock.advance(ms=LAPSE_MS)
    await take(mortal, "a", claim(slots))
    assert await mortal.open_holds() == 2
    assert (await settle(mortal, "dead", 1)).status == "settled"


async def test_heartbeats_keep_holds(mortal: Storage, clock: FrozenClock) -> None:
    """A hold lives as long as its owner sends heartbeats, however long its stream takes."""
    on = meter(Slots(), 1)
    await take(mortal, "a", claim(on))
    for _ in range(50):
        clock.advance(ms=LAPSE_MS - 1)
        beat = await mortal.heartbeat(ME)
        assert (beat.lapsed, beat.expired) == (False, ())
        await refuse(mortal, "b", claim(on), owner=OTHER)
        await mortal.heartbeat(OTHER)
    assert await mortal.open_holds() == 1


async def test_an_owner_learns_that_it_lapsed(mortal: Storage, clock: FrozenClock) -> None:
    """A process that missed its heartbeats is told so once, whoever expired its holds, and starts anew."""
    on = meter(Slots(), 1)
    for swept_by in (ME, OTHER):
        await mortal.heartbeat(ME)
        await take(mortal, swept_by, claim(on))
        clock.advance(ms=LAPSE_MS)
        if swept_by == OTHER:
            assert (await mortal.heartbeat(OTHER)).expired == (swept_by,)
        told = await mortal.heartbeat(ME)
        assert (told.lapsed, told.expired) == (True, () if swept_by == OTHER else (swept_by,))
        assert (await mortal.heartbeat(ME)).lapsed is False


async def test_a_woken_owners_new_holds_survive_its_heartbeat(mortal: Storage, clock: FrozenClock) -> None:
    """What a lapsed process reserves before it is told of its lapse is kept; what it held before is not."""
    on = meter(Slots(), 5)
    await take(mortal, "old", claim(on))
    clock.advance(ms=LAPSE_MS)
    (receipt,) = await take(mortal, "new", claim(on))
    assert receipt.held == 0
    clock.advance(ms=LAPSE_MS - 1)
    assert await mortal.heartbeat(ME) == Heartbeat(True, (), clock.now_ms())
    assert (await settle(mortal, "old", 1)).status == "late"
    assert (await settle(mortal, "new", 1)).status == "settled"


async def test_a_woken_owner_lapses_again(mortal: Storage, clock: FrozenClock) -> None:
    """A process that lapsed, reserved and then died has what it reserved expired like any other."""
    on = meter(Slots(), 1)
    await take(mortal, "old", claim(on))
    clock.advance(ms=LAPSE_MS)
    await take(mortal, "new", claim(on))
    await refuse(mortal, "next", claim(on), owner=OTHER)
    clock.advance(ms=LAPSE_MS)
    await take(mortal, "next", claim(on), owner=OTHER)


async def test_retiring_expires_at_once(mortal: Storage) -> None:
    """An owner that ends in good order leaves no hold behind, and others' holds alone."""
    slots, money = meter(Slots(), 2, subject="slots"), meter(Rolling(DAY_MS), subject="money")
    await take(mortal, "mine", claim(slots), claim(money, 5), draft=draft("mine", cost=5))
    await take(mortal, "theirs", claim(slots), owner=OTHER)
    await mortal.retire(ME)
    await mortal.retire(ME)
    assert [await level(mortal, m) for m in (slots, money)] == [(0, 1), (5, 0)]
    assert [r.outcome for r in await mortal.records()] == ["expired"]
    assert (await mortal.heartbeat(ME)).lapsed is False


@counted_window
async def test_a_late_settlement_debits_the_difference(mortal: Storage, clock: FrozenClock, window: Window) -> None:
    """A settlement after expiry debits what is above the hold, and its record replaces the estimate, flagged late."""
    on = meter(window)
    for call_id in ("more", "less"):
        await take(mortal, call_id, claim(on, 20), owner=OTHER, draft=draft(call_id, cost=20))
    clock.advance(ms=LAPSE_MS)
    await mortal.heartbeat(ME)
    assert await settle(mortal, "more", 25, record=record("more", 25)) == Settled("more", "late", (5,))
    assert await settle(mortal, "less", 3, record=record("less", 3)) == Settled("less", "late", (0,))
    assert await level(mortal, on) == (45, 0)
    assert {(r.call_id, r.cost_nanousd, r.late) for r in await mortal.records()} == {
        ("more", 25, True),
        ("less", 3, True),
    }
    assert await settle(mortal, "more", 90, record=record("more", 90)) == Settled("more", "duplicate")
    assert await level(mortal, on) == (45, 0)


@counted_window
async def test_a_late_settlement_of_what_was_given_back_debits_all(
    mortal: Storage, clock: FrozenClock, window: Window
) -> None:
    """Where expiry charged nothing, a late settlement debits the whole; unknown actuals, what was held."""
    on = meter(window, refund=True)
    for call_id in ("known", "unknown"):
        await take(mortal, call_id, claim(on, 20), owner=OTHER)
    clock.advance(ms=LAPSE_MS)
    await mortal.heartbeat(ME)
    drained = 1 if isinstance(window, Bucket) else 0  # a bucket gives back all but what has drained since
    assert await settle(mortal, "known", 8) == Settled("known", "late", (0,))
    assert await level(mortal, on) == (8 + drained, 0)
    assert await settle(mortal, "unknown", None) == Settled("unknown", "late", (0,))
    assert await level(mortal, on) == (28 + drained, 0)


async def test_a_late_settlement_frees_no_second_slot_and_no_second_window(mortal: Storage, clock: FrozenClock) -> None:
    """A late settlement touches neither the slots that were freed already nor a newer window; a record comes anyway."""
    slots, hourly = meter(Slots(), 5), meter(Calendar("hour"), 100)
    await take(mortal, "a", claim(slots), claim(hourly, 10), owner=OTHER)
    clock.advance(ms=HOUR_MS)
    await mortal.heartbeat(ME)
    await take(mortal, "b", claim(slots), claim(hourly, 1))
    assert (await settle(mortal, "a", 1, 99, record=record("a", 99))).overages == (0, 89)
    assert [await level(mortal, m) for m in (slots, hourly)] == [(0, 1), (0, 1)]
    assert [(r.cost_nanousd, r.late) for r in await mortal.records()] == [(99, True)]


async def test_a_late_settlement_without_a_record_keeps_the_estimate(mortal: Storage) -> None:
    """A late cancellation has nothing to put in the place of the estimate."""
    await take(mortal, "a", claim(meter(Rolling(DAY_MS)), 5), draft=draft("a", cost=5))
    await mortal.retire(ME)
    assert (await settle(mortal, "a", 0)).status == "late"
    assert [r.outcome for r in await mortal.records()] == ["expired"]


# --------------------------------------------------------------- rule 6: tombstones and lost holds


async def test_a_cancellation_that_comes_first_refuses_its_reserve(storage: Storage, clock: FrozenClock) -> None:
    """A reserve that was overtaken by its own cancellation is refused for as long as the tombstone lives."""
    on = meter(Rolling(DAY_MS))
    assert await settle(storage, "a") == Settled("a", "cancelled")
    clock.advance(ms=TOMBSTONE_MS - 1)
    assert await ask(storage, "a", claim(on)) == Ended("a", "cancelled", clock.now_ms())
    clock.advance(ms=1)
    await take(storage, "a", claim(on))


@counted_window
async def test_a_lost_hold_is_charged_by_its_receipts(make: Make, clock: FrozenClock, window: Window) -> None:
    """With receipts, a hold that the store has lost is charged once, in the window that was pinned."""
    on = meter(window)
    receipts = await take(make(clock), "a", claim(on, 30))
    storage = make(clock)
    clock.advance(seconds=1)
    assert await settle(storage, "a", 40, record=record("a", 40), receipts=receipts) == Settled("a", "lost", (10,))
    assert await level(storage, on) == (40, 0)
    assert (await settle(storage, "a", 40, record=record("a", 40), receipts=receipts)).status == "duplicate"
    assert [r.cost_nanousd for r in await storage.records()] == [40]
    (receipt,) = await take(storage, "b", claim(on, 60))
    assert receipt.used == 40


@instance_window
async def test_a_lost_hold_of_a_window_that_is_over_charges_nothing(
    make: Make, clock: FrozenClock, window: Window
) -> None:
    """A lost hold whose window has ended touches no other window, but its record is kept."""
    on = meter(window)
    receipts = await take(make(clock), "a", claim(on, 30))
    storage = make(clock)
    clock.advance(ms=DAY_MS)
    await take(storage, "b", claim(on, 1))
    assert (await settle(storage, "a", 40, record=record("a", 40), receipts=receipts)).status == "lost"
    assert await level(storage, on) == (0, 1)
    assert [r.cost_nanousd for r in await storage.records()] == [40]


async def test_a_lost_hold_is_added_to_what_came_meanwhile(make: Make, clock: FrozenClock) -> None:
    """A store that lost its state and was used since is charged for the lost call in the instance it has."""
    counted = [meter(window) for window in COUNTED.values()]
    receipts = await take(make(clock), "a", *(claim(m, 30) for m in counted))
    storage = make(clock)
    clock.advance(seconds=2)
    await take(storage, "b", *(claim(m, 5) for m in counted))
    await settle(storage, "a", *(30 for _ in counted), receipts=receipts)
    assert [await level(storage, m) for m in counted] == [(30, 5) for _ in counted]


async def test_a_lost_slot_or_id_is_not_charged(make: Make, clock: FrozenClock) -> None:
    """Slots and ids of a lost hold are gone with it."""
    claims = (claim(meter(Slots())), claim(meter(Distinct(HOUR_MS))))
    receipts = await take(make(clock), "a", *claims)
    storage = make(clock)
    assert await settle(storage, "a", 1, 1, receipts=receipts) == Settled("a", "lost", (0, 0))
    assert [await level(storage, c.meter) for c in claims] == [(0, 0), (0, 0)]


async def test_a_record_is_never_dropped_for_want_of_a_hold(storage: Storage) -> None:
    """A settlement of an unknown call that brings a record has it written."""
    assert (await settle(storage, "a", record=record("a", 3))).status == "lost"
    assert [r.cost_nanousd for r in await storage.records()] == [3]
    assert (await settle(storage, "a", record=record("a", 3))).status == "duplicate"


# ------------------------------------------------------------------- rule 7: clocks and windows


async def test_a_rolling_window_starts_at_its_first_admitted_use(storage: Storage, clock: FrozenClock) -> None:
    """18, 22: the first admitted use sets the start, later ones keep it, refused ones never set it."""
    on = meter(Rolling(HOUR_MS), 10)
    assert await storage.read((on,)) == (Reading(0, 0, None),)
    await refuse(storage, "too much", claim(on, 11))
    clock.advance(seconds=60)
    (receipt,) = await take(storage, "a", claim(on, 1))
    started = START_MS + MINUTE_MS
    assert (receipt.pin, receipt.resets_at_ms) == (started, started + HOUR_MS)
    clock.advance(seconds=60)
    await settle(storage, "a", 0)
    (receipt,) = await take(storage, "b", claim(on, 1))
    assert (receipt.pin, receipt.resets_at_ms) == (started, started + HOUR_MS)
    assert await storage.read((on,)) == (Reading(0, 1, started + HOUR_MS),)


async def test_a_new_rolling_window_starts_with_its_own_use(storage: Storage, clock: FrozenClock) -> None:
    """19: at its end a window is over to the millisecond; the next use starts one with nothing else in it."""
    on = meter(Rolling(HOUR_MS), 10)
    await take(storage, "a", claim(on, 10))
    clock.advance(ms=HOUR_MS - 1)
    await refuse(storage, "b", claim(on, 1))
    clock.advance(ms=1)
    assert await storage.read((on,)) == (Reading(0, 0, None),)
    clock.advance(ms=500)
    (receipt,) = await take(storage, "c", claim(on, 10))
    assert (receipt.used, receipt.held, receipt.pin) == (0, 0, START_MS + HOUR_MS + 500)


async def test_two_replicas_rolling_one_window_lose_nothing(storage: Storage, clock: FrozenClock) -> None:
    """29: two processes whose calls start the same new window both count in it."""
    on = meter(Rolling(HOUR_MS), 100)
    await take(storage, "old", claim(on, 50))
    clock.advance(ms=HOUR_MS)
    await asyncio.gather(take(storage, "a", claim(on, 20)), take(storage, "b", claim(on, 30), owner=OTHER))
    await asyncio.gather(*(storage.settle((Settlement(name, (None,)),)) for name in ("a", "b")))
    assert await level(storage, on) == (50, 0)


async def test_one_store_two_guards(storage: Storage) -> None:
    """21: what one guard charges is seen by the next reserve of another on the same store."""
    on = meter(Rolling(DAY_MS), 10)
    await take(storage, "a", claim(on, 10), owner=ME)
    await settle(storage, "a", 8)
    (state,) = await refuse(storage, "b", claim(on, 3), owner=OTHER)
    assert (state.used, state.held) == (8, 0)


async def test_a_session_counter_ends_its_time_after_the_first_call(storage: Storage, clock: FrozenClock) -> None:
    """A5: a session's counter lives for its TTL from the first call, whatever comes in between."""
    on = meter(Lifetime(HOUR_MS), 2)
    await take(storage, "a", claim(on))
    clock.advance(ms=HOUR_MS - 1)
    (receipt,) = await take(storage, "b", claim(on))
    assert receipt.resets_at_ms == START_MS + HOUR_MS
    await refuse(storage, "c", claim(on))
    clock.advance(ms=1)
    await take(storage, "c", claim(on))


async def test_activity_extends_a_renewed_lifetime(storage: Storage, clock: FrozenClock) -> None:
    """11: with `renew` a loop longer than the TTL gets no fresh quota; only idleness ends it, and refusals are idle."""
    on = meter(Lifetime(HOUR_MS, renew=True), 3)
    for number in range(3):
        (receipt,) = await take(storage, str(number), claim(on))
        assert (receipt.pin, receipt.resets_at_ms) == (START_MS, clock.now_ms() + HOUR_MS)
        clock.advance(ms=HOUR_MS - 1)
    (state,) = await refuse(storage, "more", claim(on))
    assert state.resets_at_ms == clock.now_ms() + 1
    clock.advance(ms=1)
    await take(storage, "more", claim(on))


async def test_the_reported_reset_is_the_real_one(storage: Storage, clock: FrozenClock) -> None:
    """53: at the reset that a refusal names the claim fits, and a millisecond before it does not."""
    for name, window in COUNTED.items():
        on = meter(sized(window, 100), 100, subject=name)
        await take(storage, f"{name}-1", claim(on, 60))
        clock.advance(seconds=61)
        await take(storage, f"{name}-2", claim(on, 30))
        (state,) = await refuse(storage, f"{name}-3", claim(on, 50))
        assert state.resets_at_ms is not None
        clock.set(state.resets_at_ms - 1)
        await refuse(storage, f"{name}-3", claim(on, 50))
        clock.advance(ms=1)
        await take(storage, f"{name}-3", claim(on, 50))


@pytest.mark.parametrize(("day", "hours"), [((2027, 3, 28), 23), ((2027, 10, 31), 25), ((2027, 6, 1), 24)])
async def test_a_calendar_day_is_as_long_as_it_is(
    storage: Storage, clock: FrozenClock, day: tuple[int, int, int], hours: int
) -> None:
    """71: a local day of 23, 24 or 25 hours ends at the next local midnight, to the millisecond."""
    on = meter(Calendar("day", "Europe/Berlin"), 1)
    midnight = datetime(*day, tzinfo=ZoneInfo("Europe/Berlin"))
    clock.set(midnight.astimezone(UTC))
    (receipt,) = await take(storage, "a", claim(on))
    ends = receipt.pin + hours * HOUR_MS
    assert receipt.resets_at_ms == ends
    clock.set(ends - 1)
    await refuse(storage, "b", claim(on))
    clock.set(ends)
    (receipt,) = await take(storage, "b", claim(on))
    assert receipt.pin == ends


@every_window
async def test_a_clock_that_steps_back_reopens_nothing(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """A clock that steps back within a window leaves it as it is, and never makes room."""
    on = meter(sized(window, 10), 10)
    clock.advance(seconds=120)
    for number in range(10):
        await take(storage, str(number), claim(on, 1, str(number)))
    for back in (timedelta(minutes=1), timedelta(hours=1), timedelta(hours=9)):
        clock.set(START - back)
        (state,) = await refuse(storage, "more", claim(on, 1, "more"))
        assert state.used + state.held == 10


@instance_window
async def test_a_step_back_keeps_the_later_instance(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """After a new instance has begun, a clock that steps back into the old one finds the new one."""
    on = meter(window, 10)
    await take(storage, "a", claim(on, 10))
    clock.advance(ms=DAY_MS + 60_000)
    (later,) = await take(storage, "b", claim(on, 10))
    clock.advance(ms=-120_000)
    (state,) = await refuse(storage, "c", claim(on, 1))
    assert (state.pin, state.held) == (later.pin, 10)


async def test_a_bucket_is_not_refilled_by_a_step_back_and_forth(storage: Storage, clock: FrozenClock) -> None:
    """A clock that goes back and comes again drains a bucket once, not twice."""
    on = meter(Bucket(10_000, 10), 10)
    await take(storage, "a", claim(on, 10))
    clock.advance(seconds=5)
    assert await level(storage, on) == (0, 5)
    await take(storage, "b", claim(on, 5))
    for _ in range(5):
        clock.advance(seconds=-5)
        await refuse(storage, "c", claim(on, 1))
        clock.advance(seconds=5)
        await refuse(storage, "c", claim(on, 1))


async def test_a_sliding_window_never_admits_too_many(storage: Storage, clock: FrozenClock) -> None:
    """D9: in no stretch of one period more than the limit is admitted; a use counts at most a sub-bucket too long."""
    period, buckets, limit = 10_000, 10, 5
    on = meter(Sliding(period, buckets), limit)
    clock.set(START_MS + 999)
    admitted: list[int] = []
    for number in range(600):
        if isinstance(await ask(storage, str(number), claim(on)), Granted):
            admitted.append(clock.now_ms())
            await settle(storage, str(number), 1)
        clock.advance(ms=97)
    for first, last in itertools.pairwise(admitted[::limit]):
        assert period < last - first <= period + period // buckets + 97
    assert all(b - a >= period for a, b in zip(admitted, admitted[limit:], strict=False))


async def test_a_sliding_window_gives_back_into_the_sub_bucket_of_its_claim(
    storage: Storage, clock: FrozenClock
) -> None:
    """What a settlement changes leaves the window together with the claim that took it."""
    on = meter(Sliding(10_000, 10), 10)
    await take(storage, "a", claim(on, 8))
    clock.advance(seconds=5)
    await take(storage, "b", claim(on, 2))
    await settle(storage, "a", 4)
    assert await level(storage, on) == (4, 2)
    clock.advance(seconds=6)
    assert await level(storage, on) == (0, 2)
    await settle(storage, "b", 7)
    assert await level(storage, on) == (7, 0)
    clock.advance(seconds=5)
    await take(storage, "c", claim(on, 10))


async def test_a_sliding_window_forgets_settlements_that_come_too_late(storage: Storage, clock: FrozenClock) -> None:
    """A settlement whose sub-bucket has left the window changes nothing."""
    on = meter(Sliding(10_000, 10), 10)
    await take(storage, "a", claim(on, 8))
    clock.advance(seconds=11)
    await take(storage, "b", claim(on, 3))
    await settle(storage, "a", 9)
    assert await level(storage, on) == (0, 3)


async def test_a_bucket_drains_at_its_rate(storage: Storage, clock: FrozenClock) -> None:
    """A bucket takes its burst at once and then what has drained, exactly."""
    on = meter(Bucket(1_000, 5), 10)
    await take(storage, "a", claim(on, 5))
    (state,) = await refuse(storage, "b", claim(on, 1))
    assert state.resets_at_ms == START_MS + 100
    clock.advance(ms=99)
    await refuse(storage, "b", claim(on, 1))
    clock.advance(ms=1)
    await take(storage, "b", claim(on, 1))
    (state,) = await refuse(storage, "c", claim(on, 6))
    assert state.resets_at_ms is None
    clock.advance(ms=10)
    assert await storage.read((on,)) == (Reading(0, 5, START_MS + 600),)
    clock.advance(ms=5_000)
    assert await storage.read((on,)) == (Reading(0, 0, None),)


async def test_a_bucket_gives_back_only_what_has_not_drained(storage: Storage, clock: FrozenClock) -> None:
    """A refund is at most the hold less what has drained since, else holding and refunding would beat the rate."""
    on = meter(Bucket(1_000, 10), 10)
    await take(storage, "a", claim(on, 6))
    clock.advance(ms=300)
    await take(storage, "b", claim(on, 7))
    assert await level(storage, on) == (0, 10)
    await settle(storage, "a", 0)
    assert await level(storage, on) == (0, 7)
    clock.advance(ms=400)
    await settle(storage, "b", 5)
    assert await level(storage, on) == (1, 0)


async def test_a_stale_refund_leaves_other_backlogs_alone(storage: Storage, clock: FrozenClock) -> None:
    """A hold that has drained in full gives nothing back to those that came after it."""
    on = meter(Bucket(1_000, 10), 10)
    await take(storage, "a", claim(on, 5))
    clock.advance(ms=600)
    await take(storage, "b", claim(on, 8))
    await settle(storage, "b", 8)
    await settle(storage, "a", 0)
    assert await level(storage, on) == (8, 0)


async def test_a_bucket_of_enormous_overage_stays_exact(storage: Storage, clock: FrozenClock) -> None:
    """An overage that no store could count in unit-ms stops at 2^53 - 1 and drains from there."""
    on = meter(Bucket(DAY_MS, 100), 100)
    await take(storage, "a", claim(on, 1))
    await settle(storage, "a", MAX_AMOUNT)
    (state,) = await refuse(storage, "b", claim(on, 100))
    assert state.resets_at_ms == START_MS + -(-MAX_AMOUNT // 100)
    clock.set(state.resets_at_ms)
    await take(storage, "b", claim(on, 100))


async def test_known_ids_pass_and_new_ones_do_not_once_full(storage: Storage, clock: FrozenClock) -> None:
    """Past the bound only new ids are refused; a known one is let in and kept for its TTL again."""
    on = meter(Distinct(HOUR_MS), 2)
    (first,) = await take(storage, "a", claim(on, 1, "x"))
    assert (first.used, first.held, first.pin, first.resets_at_ms) == (0, 0, 0, START_MS + HOUR_MS)
    await take(storage, "b", claim(on, 1, "y"))
    (state,) = await refuse(storage, "c", claim(on, 1, "z"))
    assert (state.used, state.held, state.resets_at_ms) == (2, 0, START_MS + HOUR_MS)
    clock.advance(ms=HOUR_MS // 2)
    (again,) = await take(storage, "d", claim(on, 1, "x"))
    assert (again.used, again.resets_at_ms) == (1, clock.now_ms() + HOUR_MS)
    clock.advance(ms=HOUR_MS // 2)
    await take(storage, "e", claim(on, 1, "z"))
    assert await level(storage, on) == (2, 0)
    await refuse(storage, "f", claim(on, 1, "y"))


async def test_settling_keeps_ids(storage: Storage) -> None:
    """An id stays counted when its call ends; time ends it."""
    on = meter(Distinct(HOUR_MS), 1)
    await take(storage, "a", claim(on, 1, "x"))
    assert await settle(storage, "a", 0) == Settled("a", "settled", (0,))
    await refuse(storage, "b", claim(on, 1, "y"))


async def test_ids_expire_in_order_when_the_clock_steps_back(storage: Storage, clock: FrozenClock) -> None:
    """An id that is touched after the clock stepped back lives at least as long as those touched before."""
    on = meter(Distinct(HOUR_MS), 9)
    await take(storage, "a", claim(on, 1, "x"))
    clock.advance(seconds=-600)
    (receipt,) = await take(storage, "b", claim(on, 1, "y"))
    assert receipt.resets_at_ms == START_MS + HOUR_MS
    assert await storage.read((on,)) == (Reading(2, 0, START_MS + HOUR_MS),)
    clock.set(START_MS + HOUR_MS)
    assert await storage.read((on,)) == (Reading(0, 0, None),)


# ---------------------------------------------------------------------------- rule 9: shadow


@every_window
async def test_a_shadow_claim_refuses_nothing(storage: Storage, window: Window) -> None:
    """A shadow claim that does not fit is not taken, refuses nothing and is not settled."""
    shadow, real = meter(window, 0, enforce=False), meter(Rolling(DAY_MS), subject="real")
    misfit, taken = await take(storage, "a", claim(shadow), claim(real, 5))
    assert (misfit.taken, misfit.fits, taken.taken) == (False, False, True)
    assert await settle(storage, "a", 50, 7) == Settled("a", "settled", (0, 2))
    assert await level(storage, shadow) == (0, 0)


@every_window
async def test_a_shadow_claim_that_fits_is_taken_with_its_plan(storage: Storage, window: Window) -> None:
    """A shadow claim that fits is counted iff the real plan is granted."""
    shadow = meter(window, 5, enforce=False)
    await refuse(storage, "a", claim(shadow), claim(meter(Slots(), 0, subject="none")))
    assert await level(storage, shadow) == (0, 0)
    (receipt,) = await take(storage, "a", claim(shadow))
    assert (receipt.taken, receipt.fits) == (True, True)
    assert sum(await level(storage, shadow)) == 1


async def test_a_misfit_shadow_claim_is_neither_expired_nor_charged_late(storage: Storage) -> None:
    """What a shadow claim did not take is not charged when the owner dies, nor by a late or lost settlement."""
    shadow = meter(Rolling(DAY_MS), 0, enforce=False)
    receipts = await take(storage, "a", claim(shadow, 5))
    await storage.retire(ME)
    assert (await settle(storage, "a", 9)).overages == (0,)
    assert (await settle(storage, "b", 9, receipts=receipts)).overages == (0,)
    assert await storage.read((shadow,)) == (Reading(0, 0, None),)


# ------------------------------------------------------------------------------------ amend


async def amend(storage: Storage, call_id: str, *claims: Claim, owner: str = ME) -> Granted | Refused | Ended:
    return await storage.amend(owner, Bundle(call_id, claims))


@every_window
async def test_amend_to_the_same_claims_changes_nothing(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """A claim that stays as it is keeps its receipt and its window, later and with a full meter too."""
    on = meter(window, 2)
    receipts = await take(storage, "a", claim(on, 1))
    await take(storage, "b", claim(on, 1, "another"))
    before = await state_of(storage)
    clock.advance(seconds=2)
    assert await amend(storage, "a", claim(on, 1)) == Granted(receipts, clock.now_ms())
    assert await state_of(storage) == before


async def test_amend_moves_a_hold_to_another_provider(storage: Storage) -> None:
    """12, 36: the meter that is no longer claimed is given back, the new one is taken, the others stay."""
    openai, anthropic, user = (meter(Rolling(DAY_MS), 50, subject=name) for name in ("openai", "anthropic", "user"))
    before = await take(storage, "a", claim(openai, 40), claim(user, 40))
    answer = await amend(storage, "a", claim(anthropic, 30), claim(user, 40))
    assert isinstance(answer, Granted)
    assert answer.receipts[1] == before[1]
    assert [await level(storage, m) for m in (openai, anthropic, user)] == [(0, 0), (0, 30), (0, 40)]
    await settle(storage, "a", 20, 20)
    assert [await level(storage, m) for m in (openai, anthropic, user)] == [(0, 0), (20, 0), (20, 0)]


@every_window
async def test_a_refused_amend_leaves_the_hold_as_it_was(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """An amend that does not fit changes nothing, whatever it would have given back or taken first."""
    old, new, kept, none = (meter(sized(window, 10), 10, subject=name) for name in ("old", "new", "kept", "none"))
    receipts = await take(storage, "a", claim(old, 4), claim(kept, 3))
    clock.advance(seconds=61)
    before = await state_of(storage)
    for claims in (
        (claim(new, 2), claim(kept, 3), claim(meter(window, 0, subject="none"))),
        (claim(old, 5), claim(kept, 3), claim(none, 11)),
        (claim(meter(Slots(), 0)), claim(kept, 6)),
    ):
        answer = await amend(storage, "a", *claims)
        assert isinstance(answer, Refused)
        assert [state.claim for state in answer.states[0]] == list(claims)
        assert not any(state.taken for state in answer.states[0])
    assert await state_of(storage) == before
    replay = await ask(storage, "a")
    assert isinstance(replay, Granted)
    assert replay.receipts == receipts


@pytest.mark.parametrize("window", [w for w in WINDOWS.values() if not isinstance(w, Distinct)])
async def test_amend_changes_an_amount_as_if_the_old_hold_were_not_there(
    storage: Storage, clock: FrozenClock, window: Window
) -> None:
    """A hold may grow into all that is free besides itself, and shrink; one unit more is refused."""
    on = meter(sized(window, 10), 10)
    await take(storage, "a", claim(on, 3))
    await take(storage, "b", claim(on, 4))
    assert isinstance(await amend(storage, "a", claim(on, 7)), Refused)
    answer = await amend(storage, "a", claim(on, 6))
    assert isinstance(answer, Granted)
    assert (answer.receipts[0].used, answer.receipts[0].held) == (0, 4)
    assert await level(storage, on) == (0, 10)
    await amend(storage, "a", claim(on, 2))
    assert await level(storage, on) == (0, 6)
    await settle(storage, "a", 2)
    assert (await level(storage, on))[1] == 4


@instance_window
async def test_amend_after_the_window_takes_the_whole_from_the_new_one(
    storage: Storage, clock: FrozenClock, window: Window
) -> None:
    """A changed amount whose window has ended is taken whole from the current one; the same amount stays pinned."""
    on, same = meter(window, 10), meter(window, 10, subject="same")
    old = await take(storage, "a", claim(on, 8), claim(same, 8))
    clock.advance(ms=DAY_MS)
    await take(storage, "b", claim(on, 3), claim(same, 3))
    assert isinstance(await amend(storage, "a", claim(on, 9), claim(same, 8)), Refused)
    answer = await amend(storage, "a", claim(on, 7), claim(same, 8))
    assert isinstance(answer, Granted)
    assert (answer.receipts[0].pin > old[0].pin, answer.receipts[1]) == (True, old[1])
    assert [await level(storage, m) for m in (on, same)] == [(0, 10), (0, 3)]


async def test_amend_takes_back_what_a_sub_bucket_held(storage: Storage, clock: FrozenClock) -> None:
    """On a sliding window a changed claim leaves its old sub-bucket and counts in the current one."""
    on = meter(Sliding(10_000, 10), 10)
    await take(storage, "a", claim(on, 6))
    clock.advance(seconds=5)
    await amend(storage, "a", claim(on, 8))
    assert await level(storage, on) == (0, 8)
    clock.advance(seconds=6)
    assert await level(storage, on) == (0, 8)
    clock.advance(seconds=6)
    assert await level(storage, on) == (0, 0)


async def test_amend_of_a_call_that_is_not_open(storage: Storage) -> None:
    """Amending a call that was never reserved, or has ended, says so and takes nothing."""
    on = meter(Rolling(DAY_MS))
    assert await amend(storage, "a", claim(on)) == Ended("a", "unknown", START_MS)
    await take(storage, "b", claim(on))
    await settle(storage, "b", 1)
    assert await amend(storage, "b", claim(on, 2)) == Ended("b", "settled", START_MS)
    assert await level(storage, on) == (1, 0)


async def test_amend_replaces_the_draft(storage: Storage) -> None:
    """The record of a call whose owner dies is that of its last amend."""
    on = meter(Rolling(DAY_MS))
    await take(storage, "a", claim(on, 5), draft=draft("a", cost=5))
    await storage.amend(ME, Bundle("a", (claim(on, 7),), draft("a", cost=7)))
    await storage.retire(ME)
    assert [r.cost_nanousd for r in await storage.records()] == [7]


async def test_amend_frees_lapsed_holds_before_it_is_refused(mortal: Storage, clock: FrozenClock) -> None:
    """An amend that would be refused expires lapsed owners first; if it has lapsed itself, it is told so."""
    slots = meter(Slots(), 2)
    await take(mortal, "dead", claim(slots), owner=OTHER)
    clock.advance(ms=LAPSE_MS - 1)
    await take(mortal, "a", claim(slots))
    assert isinstance(await amend(mortal, "a", claim(slots, 2)), Refused)
    clock.advance(ms=1)
    assert isinstance(await amend(mortal, "a", claim(slots, 2)), Granted)
    clock.advance(ms=LAPSE_MS)
    assert isinstance(await amend(mortal, "a", claim(slots, 3)), Ended)


async def test_amend_with_two_claims_on_one_meter_is_an_error_of_the_caller(storage: Storage) -> None:
    """An amend that claims a meter twice, or an id without a name, raises and changes nothing."""
    on = meter(Rolling(DAY_MS))
    await take(storage, "a", claim(on, 5))
    before = await state_of(storage)
    with pytest.raises(ValueError, match="two claims"):
        await amend(storage, "a", claim(on, 5), claim(on, 6))
    with pytest.raises(ValueError, match="names its id"):
        await amend(storage, "a", Claim(meter(Distinct(HOUR_MS)), 1))
    assert await state_of(storage) == before


# ------------------------------------------------------------------------------ read and reset


@every_window
async def test_reading_changes_nothing(storage: Storage, window: Window) -> None:
    """Reading a meter that was never used gives 0 and 0, and makes none."""
    before = await state_of(storage)
    assert await storage.read((meter(window), meter(window, subject="t"))) == (Reading(0, 0, None),) * 2
    assert await state_of(storage) == before


@every_window
async def test_reset_starts_anew_and_keeps_holds(storage: Storage, clock: FrozenClock, window: Window) -> None:
    """74: after a reset used is 0 and the next call is admitted; open holds stay, and settle as ever."""
    on = meter(sized(window, 10), 10)
    await take(storage, "spent", claim(on, 5))
    await settle(storage, "spent", 5)
    await take(storage, "open", claim(on, 5, "another"))
    clock.advance(seconds=61)
    await storage.reset((on, meter(window, subject="never used")))
    held = 0 if isinstance(window, Distinct) else 5
    assert await level(storage, on) == (0, held)
    if isinstance(window, Rolling | Lifetime):
        (reading,) = await storage.read((on,))
        assert reading.resets_at_ms == clock.now_ms() + (HOUR_MS if isinstance(window, Lifetime) else DAY_MS)
    await settle(storage, "open", 3)
    used = 0 if isinstance(window, Distinct | Slots) else 3
    assert await level(storage, on) == (used, 0)
    await storage.reset((on,))
    assert await storage.read((on,)) == (Reading(0, 0, None),)
    clock.advance(seconds=1)
    (receipt,) = await take(storage, "next", claim(on, 10, "next"))
    if isinstance(window, Rolling | Lifetime):
        assert receipt.pin == clock.now_ms()


async def test_reset_of_a_window_that_is_over_does_not_revive_it(storage: Storage, clock: FrozenClock) -> None:
    """A reset after the end leaves the instance over; the next use starts a new one."""
    on = meter(Rolling(HOUR_MS))
    await take(storage, "a", claim(on, 5))
    clock.advance(ms=HOUR_MS)
    await storage.reset((on,))
    assert await storage.read((on,)) == (Reading(0, 0, None),)


# ----------------------------------------------------------------------------------- records


async def test_records_come_oldest_first_from_an_instant_on(storage: Storage) -> None:
    """Records are told by the instant of admission, from `since_ms` on, at most `limit`."""
    for name, at_ms in (("c", 30), ("a", 10), ("b", 20), ("a2", 10)):
        await settle(storage, name, record=record(name, 1, at_ms=at_ms))
    assert [r.call_id for r in await storage.records()] == ["a", "a2", "b", "c"]
    assert [r.call_id for r in await storage.records(since_ms=20)] == ["b", "c"]
    assert [r.call_id for r in await storage.records(since_ms=10, limit=2)] == ["a", "a2"]


# ---------------------------------------------------------------------------- export and load


async def populated(storage: Storage, clock: FrozenClock) -> None:
    """Use every kind of window, and leave every kind of entry behind."""
    meters = [meter(window, subject=name) for name, window in WINDOWS.items()]
    await take(storage, "settled", *(claim(m, 3, "x") for m in meters), draft=draft("settled", cost=3))
    await settle(storage, "settled", *(2 for _ in meters), record=record("settled", 2))
    clock.advance(seconds=61)
    await take(storage, "dead", *(claim(m, 1, "y") for m in meters), owner=OTHER, draft=draft("dead", cost=1))
    clock.advance(ms=LAPSE_MS)
    await storage.heartbeat(ME)
    await settle(storage, "cancelled")
    await take(storage, "open", *(claim(m, 4, "z") for m in meters), draft=draft("open", cost=4))


async def test_an_export_loads_into_an_equal_storage(make: Make, clock: FrozenClock) -> None:
    """State that is exported and loaded is the same, and goes on in the same way."""
    old, new = make(clock), make(clock)
    await populated(old, clock)
    await new.load([line async for line in old.export()])
    assert await state_of(new) == await state_of(old)
    on = meter(WINDOWS["rolling"], subject="rolling")
    for storage in (old, new):
        assert (await settle(storage, "dead", *(9,) * len(WINDOWS), record=record("dead", 9))).status == "late"
        assert isinstance(await ask(storage, "cancelled"), Ended)
        replay = await ask(storage, "open")
        assert isinstance(replay, Granted)
        assert replay.replayed
        await settle(storage, "open", *(4 for _ in WINDOWS))
        await refuse(storage, "next", claim(on, 86))
        await take(storage, "next", claim(on, 85))
    assert await state_of(new) == await state_of(old)


async def test_a_storage_that_is_not_empty_takes_nothing_over(mortal: Storage, clock: FrozenClock) -> None:
    """Loading into a storage that has been used is refused, and leaves it as it was."""
    await populated(mortal, clock)
    before = await state_of(mortal)
    lines = [line async for line in mortal.export()]
    with pytest.raises(StorageError, match="not empty"):
        await mortal.load(lines)
    assert await state_of(mortal) == before


async def test_a_storage_with_nothing_but_counters_is_not_empty(make: Make, clock: FrozenClock) -> None:
    """Counters whose calls are all forgotten are state too, and are not mixed with an import."""
    old, new = make(clock), make(clock)
    await take(new, "a", claim(meter(Rolling(DAY_MS)), 5))
    await settle(new, "a", 5)
    clock.advance(ms=TOMBSTONE_MS)
    await new.heartbeat(ME)
    with pytest.raises(StorageError, match="not empty"):
        await new.load([line async for line in old.export()])
    assert await level(new, meter(Rolling(DAY_MS))) == (5, 0)


async def test_a_damaged_export_is_not_taken_over(make: Make, clock: FrozenClock) -> None:
    """An export that was cut, changed, mixed or is of another schema is refused, and nothing is taken over."""
    old, new = make(clock), make(clock)
    await populated(old, clock)
    lines = [line async for line in old.export()]
    at = next(number for number, line in enumerate(lines) if line.startswith(b'{"cell"'))
    record_at = next(number for number, line in enumerate(lines) if line.startswith(b'{"record"'))
    damaged = {
        "cut short": lines[:-1],
        "expected an export of schema 1, got no header": lines[1:],
        "the last line says": lines[:at] + lines[at + 1 :],
        "the last line says sha256": [
            *lines[:record_at],
            lines[record_at].replace(b"team", b"tram"),
            *lines[record_at + 1 :],
        ],
        "not a line of an export": [*lines[:at], b'{"other":1}\n', *lines[at:]],
        "is not a line": [*lines[:at], b"nonsense\n", *lines[at:]],
        "cannot be read": [line.replace(b'"budget"', b'"gadget"') for line in lines],
        "after the last line": [*lines, lines[at]],
        "got schema 2": [lines[0].replace(b'"schema":1', b'"schema":2'), *lines[1:]],
        "0 is not a last line": [],
    }
    for message, broken in damaged.items():
        with pytest.raises(StorageError, match=message):
            await new.load(broken)
    assert await state_of(new) == []
    await new.load([b"\n", *(line.rstrip() for line in lines)])
    assert await state_of(new) == await state_of(old)


# ------------------------------------------------------------------------------------ closing


async def test_a_closed_storage_says_so(make: Make, clock: FrozenClock) -> None:
    """A storage that was closed fails loudly instead of counting where nobody reads."""
    storage = make(clock)
    on = meter(Rolling(DAY_MS))
    await take(storage, "a", claim(on))
    await storage.aclose()
    await storage.aclose()
    with pytest.raises(StorageError, match="closed"):
        await take(storage, "b", claim(on))
