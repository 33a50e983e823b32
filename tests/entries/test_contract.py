"""What every storage promises of its entries, rule by rule of `storage/entries.py`."""

from __future__ import annotations

import asyncio

import pytest
from tests.entries.kit import CLAIM_MS, TTL_MS, MakeEntries, Store, begin, keep, value_of

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.entries import EPOCH_MS, MAX_TTL_MS, Bounds, Entries, InFlight, Kept, Leading
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

BINARY = bytes(range(256))


# ------------------------------------------------------------------------------ rule 1: one leads


async def test_the_first_leads_and_the_others_hear_of_it(entries: Entries) -> None:
    """Exactly the first that begins leads; others are told its note and how long its claim lasts."""
    assert await begin(entries, "k", "a", note="of a") == Leading()
    assert await begin(entries, "k", "b", note="of b") == InFlight("of a", CLAIM_MS)
    assert await begin(entries, "other", "b") == Leading()


async def test_exactly_one_of_many_leads(entries: Entries) -> None:
    """Of many that begin at the same time one leads."""
    answers = await asyncio.gather(*(begin(entries, "k", str(n)) for n in range(40)))
    assert answers.count(Leading()) == 1
    assert sum(isinstance(answer, InFlight) for answer in answers) == 39


async def test_spaces_do_not_see_each_other(make_entries: MakeEntries) -> None:
    """A key of one space is nothing in another."""
    one, other = make_entries("cache"), make_entries("idempotency")
    await keep(one, "k", b"one")
    assert await value_of(other, "k") is None
    assert await keep(other, "k", b"other")
    assert await value_of(one, "k") == b"one"
    await other.forget("k")
    assert await value_of(one, "k") == b"one"
    assert await value_of(other, "k") is None


async def test_a_bump_in_one_space_ends_nothing_in_another(make_entries: MakeEntries) -> None:
    """Epochs belong to their space."""
    one, other = make_entries("cache"), make_entries("idempotency")
    await keep(one, "k", b"one", "n")
    await other.bump("n")
    assert await value_of(one, "k") == b"one"


@pytest.mark.parametrize("space", ["", "Cache", "a:b", "a b", "ä"])
async def test_spaces_have_plain_names(store: Store, space: str) -> None:
    """A name that could be mistaken for a part of a key is refused at once."""
    with pytest.raises(ConfigurationError, match="space"):
        store.storage.entries(space)


# ------------------------------------------------------------------------ rule 2: claims and their end


async def test_a_claim_ends_by_itself(entries: Entries, clock: FrozenClock) -> None:
    """A leader that died stands in nobody's way for longer than its claim, and cannot store any more."""
    await begin(entries, "k", "dead")
    clock.advance(ms=CLAIM_MS - 1)
    assert await begin(entries, "k", "b") == InFlight("", 1)
    clock.advance(ms=1)
    assert await begin(entries, "k", "b", note="of b") == Leading()
    assert not await entries.store("k", "dead", b"late", ttl_ms=TTL_MS)
    assert await begin(entries, "k", "c") == InFlight("of b", CLAIM_MS)


async def test_a_leader_prolongs_its_claim(entries: Entries, clock: FrozenClock) -> None:
    """Beginning again with the same token keeps the lead for as long again."""
    await begin(entries, "k", "a")
    clock.advance(ms=CLAIM_MS - 1)
    assert await begin(entries, "k", "a") == Leading()
    clock.advance(ms=CLAIM_MS - 1)
    assert await begin(entries, "k", "b") == InFlight("", 1)
    assert await entries.store("k", "a", b"v", ttl_ms=TTL_MS)


async def test_prolonging_keeps_the_lead(entries: Entries, clock: FrozenClock) -> None:
    """A leader that says that it lives keeps the lead for as long again; nobody else can say so for it."""
    await begin(entries, "k", "a", note="of a")
    clock.advance(ms=CLAIM_MS - 1)
    assert not await entries.prolong("k", "b", claim_ms=CLAIM_MS)
    assert await entries.prolong("k", "a", claim_ms=CLAIM_MS)
    clock.advance(ms=CLAIM_MS - 1)
    assert await begin(entries, "k", "b") == InFlight("of a", 1)
    assert await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    assert not await entries.prolong("k", "a", claim_ms=1)
    assert await value_of(entries, "k") == b"v"


@pytest.mark.parametrize("end", ["time", "long ago", "epoch", "abandoned", "never"])
async def test_a_claim_that_has_ended_is_not_prolonged(entries: Entries, clock: FrozenClock, end: str) -> None:
    """T6: a leader that comes back after its claim has ended, or was revoked, does not get it again."""
    if end != "never":
        await begin(entries, "k", "a", "n")
    if end == "epoch":
        await entries.bump("n")
    elif end == "abandoned":
        await entries.abandon("k", "a")
    else:
        clock.advance(ms=CLAIM_MS * (1 if end == "time" else 10))
    assert not await entries.prolong("k", "a", claim_ms=CLAIM_MS)
    assert not await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    assert await begin(entries, "k", "b", "n") == Leading()


async def test_an_abandoned_key_is_free(entries: Entries) -> None:
    """After its leader gave up, the next one leads."""
    await begin(entries, "k", "a")
    await entries.abandon("k", "a")
    await entries.abandon("k", "a")
    assert await begin(entries, "k", "b") == Leading()


# ------------------------------------------------------------------- rules 3 and 4: who may store, and repeats


async def test_only_the_leader_stores(entries: Entries) -> None:
    """Without the lead nothing is stored, and nothing is taken from who has it."""
    assert not await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    await begin(entries, "k", "a")
    assert not await entries.store("k", "b", b"v", ttl_ms=TTL_MS)
    await entries.abandon("k", "b")
    assert await begin(entries, "k", "c") == InFlight("", CLAIM_MS)
    assert await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    assert await value_of(entries, "k") == b"v"


async def test_a_claim_that_has_ended_stores_nothing(entries: Entries, clock: FrozenClock) -> None:
    """A leader that took too long stores nothing, even where nobody took its place."""
    await begin(entries, "k", "a")
    clock.advance(ms=CLAIM_MS)
    assert not await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    assert await value_of(entries, "k") is None
    assert await begin(entries, "k", "b") == Leading()


async def test_storing_again_says_so_and_changes_nothing(entries: Entries, clock: FrozenClock) -> None:
    """A store whose answer was lost may be repeated: it says that the value is kept, and it is not kept longer."""
    await begin(entries, "k", "a")
    assert await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    clock.advance(ms=TTL_MS - 1)
    assert await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    await entries.abandon("k", "a")
    assert await value_of(entries, "k") == b"v"
    clock.advance(ms=1)
    assert await value_of(entries, "k") is None


async def test_every_byte_comes_back(entries: Entries) -> None:
    """A value is given as it was stored, whatever its bytes; so is the note, and the empty value is a value."""
    await keep(entries, "k", BINARY, note="käse 🧀 \x00")
    assert await entries.find("k") == Kept(BINARY, "käse 🧀 \x00", 0)
    assert await keep(entries, "empty", b"")
    assert await begin(entries, "empty", "x") == Kept(b"", "", 0)


# --------------------------------------------------------------------------------- rule 5: time


async def test_a_value_ends_on_time(entries: Entries, clock: FrozenClock) -> None:
    """A value is given with its age until its time is over; then the next one leads."""
    await keep(entries, "k", b"v", note="n")
    clock.advance(ms=TTL_MS - 1)
    assert await begin(entries, "k", "b") == Kept(b"v", "n", TTL_MS - 1)
    clock.advance(ms=1)
    assert await entries.find("k") is None
    assert await begin(entries, "k", "b") == Leading()


async def test_no_time_is_too_long(entries: Entries) -> None:
    """A time of nothing, or beyond the longest, is an error of the caller."""
    for ttl_ms in (0, -1, MAX_TTL_MS + 1):
        with pytest.raises(ValueError, match="time"):
            await entries.begin("k", "a", claim_ms=ttl_ms)
        with pytest.raises(ValueError, match="a time must be"):
            await entries.prolong("k", "a", claim_ms=ttl_ms)
        with pytest.raises(ValueError, match="time"):
            await entries.store("k", "a", b"v", ttl_ms=ttl_ms)


async def test_a_fresh_one_replaces_the_old(entries: Entries) -> None:
    """Who wants no value that is there leads in its place; a claim of somebody else stays."""
    await keep(entries, "k", b"old")
    assert await begin(entries, "k", "b", fresh=True) == Leading()
    assert await value_of(entries, "k") is None
    assert await begin(entries, "k", "c", fresh=True) == InFlight("", CLAIM_MS)
    assert await entries.store("k", "b", b"new", ttl_ms=TTL_MS)
    assert await begin(entries, "k", "b", fresh=True) == Kept(b"new", "", 0)


# --------------------------------------------------------------------------------- rule 6: epochs


async def test_a_bump_ends_what_belongs_to_the_name(entries: Entries) -> None:
    """T6: from the return of a bump on, values of that name are not there; others are."""
    await keep(entries, "a", b"a", "one", "two")
    await keep(entries, "b", b"b", "two")
    await keep(entries, "c", b"c")
    await entries.bump("one")
    assert await value_of(entries, "a") is None
    assert await value_of(entries, "b") == b"b"
    assert await value_of(entries, "c") == b"c"
    assert await begin(entries, "a", "next", "one", "two") == Leading()
    await entries.bump("two")
    assert await value_of(entries, "b") is None


async def test_a_bump_ends_what_is_under_way(entries: Entries) -> None:
    """T6: an answer that was begun before a revocation is not stored after it, and nobody waits for it."""
    await begin(entries, "k", "before", "n")
    await entries.bump("n")
    assert await begin(entries, "k", "after", "n") == Leading()
    assert not await entries.store("k", "before", b"old", ttl_ms=TTL_MS)
    assert await entries.store("k", "after", b"new", ttl_ms=TTL_MS)
    assert await value_of(entries, "k") == b"new"


async def test_a_bump_alone_keeps_the_leader_from_storing(entries: Entries) -> None:
    """T6: a claim of an epoch that has ended stores nothing, though nobody took its place."""
    await begin(entries, "k", "before", "n")
    await entries.bump("n")
    assert not await entries.store("k", "before", b"old", ttl_ms=TTL_MS)
    assert await value_of(entries, "k") is None


async def test_epochs_outlive_what_belongs_to_them(entries: Entries, clock: FrozenClock) -> None:
    """A name's epoch is known for as long as a value of it can be."""
    await begin(entries, "k", "a", "n")
    assert await entries.store("k", "a", b"v", ttl_ms=MAX_TTL_MS)
    clock.advance(ms=MAX_TTL_MS - 1)
    assert await value_of(entries, "k") == b"v"
    clock.advance(ms=EPOCH_MS)
    assert await begin(entries, "k", "b", "n") == Leading()


async def test_bumps_may_be_repeated(entries: Entries) -> None:
    """Each bump of a name ends what was stored since the last one, known or not."""
    for n in range(3):
        await entries.bump("n")
        await keep(entries, "k", b"%d" % n, "n")
        assert await value_of(entries, "k") == b"%d" % n
    await entries.bump("n")
    assert await value_of(entries, "k") is None


# --------------------------------------------------------------------------------- rule 7: bounds


async def test_what_is_too_long_is_not_kept(make_entries: MakeEntries) -> None:
    """A value above the bound is not stored, and its key is free for the next one."""
    entries = make_entries("cache", Bounds(max_value_bytes=10))
    assert await keep(entries, "k", b"0123456789")
    await begin(entries, "big", "a")
    assert not await entries.store("big", "a", b"0123456789+", ttl_ms=TTL_MS)
    assert await begin(entries, "big", "b") == Leading()


# ------------------------------------------------------------------------------ forgetting, closing


async def test_forgetting_a_key(entries: Entries) -> None:
    """What is forgotten is gone, value or claim; a leader whose claim was forgotten stores nothing."""
    await keep(entries, "k", b"v")
    await entries.forget("k")
    assert await value_of(entries, "k") is None
    await begin(entries, "k", "a")
    await entries.forget("k")
    assert not await entries.store("k", "a", b"v", ttl_ms=TTL_MS)
    await entries.forget("never")


async def test_a_closed_storage_keeps_nothing(store: Store, entries: Entries) -> None:
    """After the storage was closed every operation says so."""
    await store.storage.aclose()
    with pytest.raises(StorageError):
        await begin(entries, "k", "a")
    with pytest.raises(StorageError):
        await entries.find("k")
    with pytest.raises(StorageError):
        await entries.bump("n")


async def test_a_space_can_be_asked_for_again(make_entries: MakeEntries) -> None:
    """Asking for a space again gives what is in it, under new bounds if there are some."""
    await keep(make_entries("cache"), "k", b"v")
    again = make_entries("cache", Bounds(max_value_bytes=1))
    assert await value_of(again, "k") == b"v"
    assert not await keep(again, "other", b"vv")
    assert make_entries("cache").bounds == Bounds(max_value_bytes=1)
