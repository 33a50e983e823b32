"""Answers that are given again: to whom, for how long, and what they cost."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.cache.kit import ADA, BOB, MODEL, USAGE, Client, answer_of, ask_for, cache_of, chat, text_of

from asgi_llm_guard import (
    Budget,
    CacheScope,
    Concurrency,
    Context,
    Guard,
    Iterations,
    LimitExceeded,
    ModelAllow,
    RateLimit,
    Usage,
    events,
)
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.claims import Meter
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.storage.entries import _sealed
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio


def caching(*policies: object, clock: FrozenClock | None = None, **options: object) -> Client:
    """A client of a guard that keeps answers."""
    return Client(Guard([*policies, CacheScope()], cache=Cache(**options), clock=clock))  # type: ignore[arg-type, list-item]


async def test_an_answer_is_given_again() -> None:
    """C11, C14: the same request of the same caller gets the same answer, and no provider is asked."""
    client = caching()
    first, second = await client.send(ADA), await client.send(ADA)
    assert (first.state, second.state, client.made) == ("lead", "hit", 1)
    assert first.answer == second.answer
    assert cache_of(client.guard).stats() == {
        "hits": 1, "waited": 0, "misses": 1, "passed": 0, "stored": 1, "unstored": 0, "reasons": {}
    }  # fmt: skip


async def test_nobody_else_is_given_it() -> None:
    """T5, M15: another caller, user or anonymous one with the same request gets an answer of their own, or none that is kept."""
    client = caching()
    await client.send(ADA)
    for context in (BOB, Context(caller="ada", user="bob"), Context(user="ada"), Context(caller="ada:user")):
        assert (await client.send(context)).state == "lead"
    assert (await client.send(Context())).state == "pass"
    assert client.made == 6
    assert (await client.send(ADA)).state == "hit"


async def test_another_request_is_another_answer() -> None:
    """C11: a request that differs in anything that matters is not given the answer."""
    client = caching()
    await client.send(ADA, ask_for("one"))
    assert (await client.send(ADA, ask_for("two"))).state == "lead"
    assert (await client.send(ADA, ask_for("one", temperature=0))).state == "lead"
    assert text_of(await client.send(ADA, ask_for("one"))) == "answer 1"


# ------------------------------------------------------------------------------- what a hit costs


async def test_a_hit_costs_nothing_and_is_in_the_ledger() -> None:
    """C14: a hit is charged no money, no tokens and no iteration; its record says `cached`, and what the kept one had used."""
    client = caching(
        Iterations(1, per="caller"), Budget("$1/daily", per="caller"), RateLimit("5000 tokens/day", per="caller")
    )
    await client.send(ADA)
    for _ in range(3):
        assert (await client.send(ADA)).hit
    with pytest.raises(LimitExceeded, match="iteration"):
        await client.send(ADA, ask_for("another"))
    first, *hits = await client.guard.storage.records()
    assert (first.outcome, first.tokens, first.cost_nanousd) == ("measured", 120, 27_000)
    assert [(hit.outcome, hit.tokens, hit.cost_nanousd, hit.estimate_nanousd) for hit in hits] == [
        ("cached", 0, 0, 0)
    ] * 3
    assert [(hit.usage, hit.caller, hit.model) for hit in hits] == [(USAGE, "ada", "gpt-4o-mini")] * 3
    assert await used(client.guard, "tokens") == 120
    assert await used(client.guard, "nanousd") == 27_000


async def used(guard: Guard, unit: str) -> int:
    """What the caller ada has used and holds, over all meters of the unit."""
    call = guard.describe(MODEL, input_tokens=1)
    meters: list[Meter] = []
    for policy in guard.policies:
        meters += [claim.meter for claim in policy.plan(ADA, call, 0).claims if claim.meter.unit == unit]
    readings = await guard.storage.read(meters)
    assert readings
    return sum(reading.used + reading.held for reading in readings)


async def test_a_spent_budget_still_serves_hits() -> None:
    """C14: who has nothing left is given what is kept, and refused what is not."""
    client = caching(Budget("$0.0003/daily", per="caller"))
    await client.send(ADA)
    await spend(client.guard)
    assert (await client.send(ADA)).hit
    with pytest.raises(LimitExceeded):
        await client.send(ADA, ask_for("another"))


async def spend(guard: Guard) -> None:
    async with guard.open(ADA), guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=100) as call:
        call.record(Usage(input_tokens=2_000, output_tokens=0))


async def test_rates_are_taken() -> None:
    """C14: a hit counts as a request and as a call of its caller, and is refused where those are used up."""
    client = caching(RateLimit("3/hour", per="caller", counts="calls", on_outage="deny"))
    await client.send(ADA)
    assert (await client.send(ADA)).hit
    assert (await client.send(ADA)).hit
    with pytest.raises(LimitExceeded, match="rate"):
        await client.send(ADA)
    assert cache_of(client.guard).stats()["hits"] == 2
    assert len(await client.guard.storage.records()) == 3


async def test_rates_of_tokens_and_slots_are_not() -> None:
    """C14: a hit takes no tokens of a rate and needs no slot."""
    client = caching(RateLimit("1150 tokens/hour", per="caller"), Concurrency(1, per="caller", counts="calls"))
    await client.send(ADA)
    async with client.guard.open(ADA), client.guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=10):
        assert (await client.send_inside(ask_for())).hit
    for _ in range(20):
        assert (await client.send(ADA)).hit


async def test_a_hit_gives_the_hold_around_it_back() -> None:
    """C14: what a request holds for the call that was not needed is free at once, and it is not charged as unseen."""
    client = caching(Budget("$1/daily", per="caller"), Iterations(2, per="caller"))
    await client.send(ADA)
    async with client.guard.open(ADA):
        async with client.guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=100):
            assert await used(client.guard, "nanousd") == 27_000 + 210_000
            assert (await client.send_inside(ask_for())).hit
            assert await used(client.guard, "nanousd") == 27_000
        assert await used(client.guard, "calls") == 1
    assert [record.outcome for record in await client.guard.storage.records()] == ["measured", "cached"]


async def test_a_hit_frees_the_slot_around_it() -> None:
    """Conformance 60: the slot that was taken for a call is free once the call turns out to be a hit."""
    client = caching(Concurrency(1, per="caller", counts="calls"))
    described: dict[str, Any] = {"model": MODEL, "input_tokens": 1_000, "max_output_tokens": 100}
    await client.send(ADA)
    async with client.guard.open(ADA), client.guard.call(**described):
        assert (await client.send_inside(ask_for())).hit
        async with client.guard.open(ADA), client.guard.call(**described) as another:
            another.record(USAGE)


async def test_a_hit_that_is_refused_leaves_the_hold_around_it() -> None:
    """C14: a rate that refuses a hit takes nothing, and the hold around it is as it was, for the next call."""
    client = caching(Budget("$1/daily", per="caller"))
    engine, cache = client.guard.engine, cache_of(client.guard)
    rate = engine.bind([RateLimit("1/hour", per="caller", counts="calls")])
    await client.send(ADA)
    async with client.guard.open(ADA):
        assert (await cache.look_up(new_call(engine, client.guard.describe(MODEL), rate), ask_for())).hit
        async with client.guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=100):
            held = await used(client.guard, "nanousd")
            with pytest.raises(LimitExceeded, match="rate"):
                await cache.look_up(new_call(engine, client.guard.describe(MODEL), rate), ask_for())
            assert await used(client.guard, "nanousd") == held
            async with client.guard.call(model=MODEL, input_tokens=1_000, max_output_tokens=100) as inner:
                assert await used(client.guard, "nanousd") == held
                inner.record(USAGE)
    outcomes = [record.outcome for record in await client.guard.storage.records()]
    assert outcomes == ["measured", "cached", "measured"]


async def test_a_model_that_is_not_allowed_is_refused() -> None:
    """C14: what a policy refuses by itself is refused before anything is looked up."""
    client = caching()
    await client.send(ADA)
    async with client.guard.open(ADA):
        forbidding = client.guard.engine.bind([ModelAllow(["gpt-5*"])])
        call = new_call(client.guard.engine, client.guard.describe(MODEL), forbidding)
        with pytest.raises(LimitExceeded, match="gpt-4o-mini"):
            await cache_of(client.guard).look_up(call, ask_for())
    assert cache_of(client.guard).stats()["hits"] == 0


# ------------------------------------------------------------------------------------ how long


async def test_an_answer_ends_on_time() -> None:
    """C11: an answer is given until its time is over."""
    clock = FrozenClock()
    client = caching(clock=clock, ttl="10s")
    await client.send(ADA)
    clock.advance(ms=9_999)
    assert (found := await client.send(ADA)).hit
    assert found.age_ms == 9_999
    clock.advance(ms=1)
    assert (await client.send(ADA)).state == "lead"


async def test_a_clock_that_is_set_back_lengthens_nothing() -> None:
    """C11: an answer from a time that is still to come is not given, since nobody knows how old it is."""
    clock = FrozenClock()
    client = caching(clock=clock, ttl="10s")
    clock.advance(seconds=3_600)
    await client.send(ADA)
    clock.set(clock.now_ms() - 3_600_000)
    assert [(await client.send(ADA)).state for _ in range(2)] == ["lead", "hit"]


async def test_the_scope_may_keep_for_less() -> None:
    """C12: the shorter time decides, and it holds for what is kept already."""
    clock = FrozenClock()
    storage = MemoryStorage(clock=clock)
    for scope, age_s in ((CacheScope(ttl="10s"), 10), (CacheScope(ttl="2h"), 3_600)):
        client = Client(Guard([scope], storage=storage, cache=Cache(ttl="1h"), clock=clock))
        await client.send(ADA, ask_for(f"{age_s}"))
        clock.advance(seconds=age_s - 1)
        assert (await client.send(ADA, ask_for(f"{age_s}"))).hit
        clock.advance(seconds=1)
        assert (await client.send(ADA, ask_for(f"{age_s}"))).state == "lead"
    stricter = Client(Guard([CacheScope(ttl="10s")], storage=storage, cache=Cache(ttl="1h"), clock=clock))
    clock.advance(seconds=10)
    assert (await stricter.send(ADA, ask_for("3600"))).state == "lead"


async def test_no_store_means_neither_to_give_nor_to_keep() -> None:
    """T8: a request that says no-store is given nothing that is kept, and leaves nothing."""
    client = caching()
    assert (await client.send(ADA, ask_for(headers=[("Cache-Control", "no-store")]))).state == "pass"
    await client.send(ADA)
    assert (await client.send(ADA, ask_for(headers=[("cache-control", "max-age=60, NO-STORE")]))).state == "pass"
    assert (await client.send(ADA)).hit


async def test_no_cache_means_a_fresh_answer() -> None:
    """T8: a request that says no-cache is answered anew, and that answer is kept for those after it."""
    client = caching()
    await client.send(ADA)
    assert text_of(await client.send(ADA, ask_for(headers=[("cache-control", "no-cache")]))) == "answer 2"
    assert text_of(await client.send(ADA)) == "answer 2"


async def test_max_age_bounds_what_is_given() -> None:
    """T8: a request may want a younger answer than there is; one that wants an older one gets no older one."""
    clock = FrozenClock()
    client = caching(clock=clock, ttl="10s")
    await client.send(ADA)
    clock.advance(seconds=5)
    assert (await client.send(ADA, ask_for(headers=[("cache-control", "max-age=6")]))).hit
    assert (await client.send(ADA, ask_for(headers=[("cache-control", "max-age=5")]))).state == "lead"
    clock.advance(seconds=10)
    wide = [("cache-control", "max-age=3600, max-stale=3600, only-if-cached")]
    assert (await client.send(ADA, ask_for(headers=wide))).state == "lead"


async def test_a_request_gets_no_older_answer_than_the_settings_allow() -> None:
    """T8: answers of a time when they were kept for longer are given for as long as they are kept now, whatever a
    request says."""
    clock = FrozenClock()
    storage = MemoryStorage(clock=clock)
    before, now = (
        Client(Guard([CacheScope()], storage=storage, cache=Cache(ttl=ttl), clock=clock)) for ttl in ("1h", "10s")
    )
    await before.send(ADA)
    clock.advance(seconds=10)
    assert (await before.send(ADA)).hit
    assert (await now.send(ADA, ask_for(headers=[("cache-control", "max-age=3600")]))).state == "lead"


async def test_the_inbound_request_may_tighten_too() -> None:
    """T8: what the request that is being handled says holds for the calls inside it."""
    client = caching()
    await client.send(ADA)
    async with client.guard.open(ADA) as admission:
        admission.cache_control = "no-store"
        assert (await client.send_inside(ask_for())).state == "pass"
        admission.cache_control = ""
        assert (await client.send_inside(ask_for())).state == "hit"


# ---------------------------------------------------------------------------------- revocation


@pytest.mark.parametrize("named", ["caller", "user", "knowledge_base", None])
async def test_what_is_revoked_is_not_given(named: str | None) -> None:
    """T6: after a revocation the very next request finds nothing; others still do."""
    scope = CacheScope(knowledge_base=lambda context: "wiki", settings={"wiki": {"cache": True, "acl": "d"}})
    client = Client(Guard([scope], cache=Cache()))
    whom = Context(caller="ada", user="u1")
    await client.send(whom)
    await client.send(BOB)
    assert (await client.send(whom)).hit
    cache = cache_of(client.guard)
    if named is None:
        await cache.clear()
    elif named == "knowledge_base":
        await cache.revoke(knowledge_base="other")
        assert (await client.send(whom)).hit
        await cache.revoke(knowledge_base="wiki")
    elif named == "user":
        await cache.revoke(caller="u1", user="ada")
        assert (await client.send(whom)).hit
        await cache.revoke(user="u1")
    else:
        await cache.revoke(caller="ada")
    assert (await client.send(whom)).state == "lead"
    assert (await client.send(BOB)).hit == (named in ("caller", "user"))


async def test_revoking_nothing_is_an_error() -> None:
    """A revocation names whom it is about."""
    with pytest.raises(ValueError, match="caller="):
        await cache_of(caching().guard).revoke()


async def test_an_answer_that_is_revoked_while_it_is_made_is_not_kept() -> None:
    """T6: what was asked before a revocation is not given after it."""
    client = caching()
    async with client.guard.open(ADA):
        call = new_call(client.guard.engine, client.guard.describe(MODEL), ())
        found = await cache_of(client.guard).look_up(call, ask_for())
        assert found.leads
        await cache_of(client.guard).revoke(caller="ada")
        assert not await found.store(answer_of(chat("of before")))
    assert text_of(await client.send(ADA)) == "answer 1"
    assert cache_of(client.guard).stats()["unstored"] == 1


async def test_a_changed_access_list_or_corpus_finds_nothing() -> None:
    """T6, C12: the digest of the access list and the version of the documents are parts of the partition, read for
    each request; settings that are withdrawn mean: not cached."""
    settings: dict[str, dict[str, object]] = {"wiki": {"cache": True, "acl": "d1", "version": 1}}
    scope = CacheScope(knowledge_base=lambda context: "wiki", settings=settings)
    client = Client(Guard([scope], cache=Cache()))
    for change, state in (
        ({}, "lead"),
        ({}, "hit"),
        ({"acl": "d2"}, "lead"),
        ({"version": 2}, "lead"),
        ({"acl": "d1"}, "lead"),
        ({"version": 1}, "hit"),
        ({"version": None}, "pass"),
        ({"version": 1, "cache": False}, "pass"),
        ({"cache": True}, "hit"),
    ):
        settings["wiki"].update(change)
        assert (await client.send(ADA)).state == state


# -------------------------------------------------------------------------------- single-flight


async def test_of_those_who_ask_the_same_one_makes_the_call() -> None:
    """T8: of many that ask the same at the same time exactly one calls the provider, and all have its answer."""
    client = caching(Iterations(1, per="caller"))
    found = await asyncio.gather(*(client.send(ADA) for _ in range(20)))
    assert client.made == 1
    assert {text_of(one) for one in found} == {"answer 1"}
    stats = cache_of(client.guard).stats()
    assert (stats["hits"], stats["misses"], stats["stored"]) == (19, 1, 1)


async def test_a_leader_that_fails_is_followed_by_another() -> None:
    """T8: an aborted call leaves no entry, and who waited for it makes the call instead."""
    client = caching()
    seen: list[events.Event] = []
    client.guard.engine.telling.observers = (seen.append,)
    cache = cache_of(client.guard)

    async def failing() -> None:
        async with client.guard.open(ADA):
            call = new_call(client.guard.engine, client.guard.describe(MODEL), ())
            with await cache.look_up(call, ask_for()) as found:
                assert found.leads
                while not cache.flights.waiting:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0)
                raise ConnectionError

    results = await asyncio.gather(failing(), client.send(ADA), client.send(ADA), return_exceptions=True)
    assert isinstance(results[0], ConnectionError)
    assert client.made == 1
    hits = [event for event in seen if isinstance(event, events.CacheHit)]
    assert [hit.waited for hit in hits] == [True]
    assert cache.stats()["waited"] == 1


async def test_nobody_waits_without_end() -> None:
    """A call that has waited for its time is made as well, and keeps nothing."""
    client = caching(wait="0s")
    async with client.guard.open(ADA):
        call = new_call(client.guard.engine, client.guard.describe(MODEL), ())
        with await cache_of(client.guard).look_up(call, ask_for()) as found:
            assert found.leads
            assert (await client.send_inside(ask_for())).state == "pass"
            assert (await client.send_inside(ask_for(headers=[("cache-control", "no-cache")]))).state == "pass"
    assert client.made == 2


async def test_who_is_cancelled_lets_go() -> None:
    """T8: a leader that is cancelled stands in nobody's way."""
    client = caching()
    cache = cache_of(client.guard)

    async def lead() -> None:
        async with client.guard.open(ADA):
            call = new_call(client.guard.engine, client.guard.describe(MODEL), ())
            with await cache.look_up(call, ask_for()):
                await asyncio.Event().wait()

    task = asyncio.create_task(lead())
    while not cache.stats()["misses"]:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert (await client.send(ADA)).state == "lead"


# ------------------------------------------------------------------------------- what is not kept


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(chat(), status=500),
        answer_of({"error": {"message": "no"}}),
        answer_of(chat(choice={"finish_reason": "tool_calls"}, message={"tool_calls": [{"id": "1"}]})),
        answer_of(chat(choice={"finish_reason": "length"})),
        answer_of(chat("")),
    ],
    ids=["status", "error", "tool call", "cut", "empty"],
)
async def test_errors_and_tool_calls_are_not_kept(answer: object) -> None:
    """T8, C13: an answer that is an error, calls a tool, was cut or is empty is given once, and leaves no entry."""
    client = caching()
    assert (await client.send(ADA, answer=answer)).state == "lead"  # type: ignore[arg-type]
    assert (await client.send(ADA)).state == "lead"
    assert client.made == 2
    assert cache_of(client.guard).stats()["unstored"] == 1


async def test_streams_are_kept_on_request_only() -> None:
    """C13: an answer that is asked for as a stream is neither looked up nor kept, unless streams are."""
    client = caching()
    assert (await client.send(ADA, ask_for(stream=True))).state == "pass"
    assert cache_of(client.guard).stats()["reasons"] == {"streams are not kept": 1}
    keeping = caching(streams=True)
    assert (await keeping.send(ADA, ask_for(stream=True))).state == "lead"
    assert (await keeping.send(ADA, ask_for(stream=True))).state == "hit"
    assert (await keeping.send(ADA, ask_for())).state == "lead"


async def test_too_large_an_answer_is_not_kept() -> None:
    """An answer above the bound is given once, whole."""
    client = caching(max_value_bytes=1_000)
    found = await client.send(ADA, answer=answer_of(chat("x" * 1_000)))
    assert text_of(found) == "x" * 1_000
    assert (await client.send(ADA)).state == "lead"


async def test_a_body_that_cannot_be_read_passes() -> None:
    """C12: what cannot be judged is not cached, and says why."""
    client = caching()
    request = ask_for()
    for body in (b"", b"\xff", b"[]", b'{"a":1,"a":2}', b"{" * 100_000, b'{"a":NaN}', b'{"a":' + b"1" * 5_000 + b"}"):
        changed = type(request)(host=request.host, path=request.path, body=body)
        assert (await client.send(ADA, changed)).state == "pass"
    assert (await client.send(ADA, ask_for(previous_response_id="r1"))).state == "pass"


# ------------------------------------------------------------------------------------- the store


async def test_what_is_not_what_was_looked_for_is_not_given() -> None:
    """T5: an entry is compared with what was looked for after it was found; one of others is not given."""
    client = caching()
    storage = client.guard.storage
    assert isinstance(storage, MemoryStorage)
    space = storage.entries("cache")
    await client.send(BOB, ask_for("secret of bob"))
    (of_bob,) = space._entries.values()
    await client.send(ADA)
    (of_ada,) = [entry for entry in space._entries.values() if entry is not of_bob]
    assert of_bob.value is not None
    of_ada.value = of_bob.value  # as if the two had one key
    found = await client.send(ADA)
    assert (found.state, text_of(found)) == ("lead", "answer 3")
    found = await client.send(ADA)
    assert (found.state, text_of(found)) == ("hit", "answer 3")


async def test_what_another_version_kept_is_replaced() -> None:
    """An entry that this release cannot read is not given, and stands in nobody's way."""
    client = caching()
    storage = client.guard.storage
    assert isinstance(storage, MemoryStorage)
    await client.send(ADA)
    (kept,) = storage.entries("cache")._entries.values()
    kept.value = _sealed(b"not an entry")
    assert [(await client.send(ADA)).state for _ in range(2)] == ["lead", "hit"]


@pytest.mark.parametrize("column", ["value", "epochs"])
async def test_what_was_damaged_is_not_given(tmp_path: Path, column: str) -> None:
    """T8: an entry any bit of which has changed where it is kept is not given, and is made anew."""
    path = tmp_path / "guard.db"
    client = Client(Guard([CacheScope()], storage=f"sqlite:///{path}", cache=Cache()))
    chance = random.Random(1)
    async with client.guard:
        for n in range(60):
            await client.send(ADA, ask_for(f"{n}"))
            with closing(sqlite3.connect(path)) as connection, connection:
                row, kept = connection.execute(f"SELECT row, {column} FROM entries1 ORDER BY row DESC").fetchone()
                bits = bytearray(kept if isinstance(kept, bytes) else kept.encode())
                bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(7)
                damaged = bytes(bits) if column == "value" else bits.decode()
                connection.execute(f"UPDATE entries1 SET {column} = ? WHERE row = ?", (damaged, row))
            found = await client.send(ADA, ask_for(f"{n}"))
            assert (found.state, text_of(found)) == ("lead", f"answer {client.made}")
            assert (await client.send(ADA, ask_for(f"{n}"))).hit


async def test_without_its_storage_calls_are_made() -> None:
    """C12: while the storage is away nothing is given and nothing kept, and calls are decided as ever."""
    outage = OutageStorage(MemoryStorage())
    client = Client(Guard([CacheScope()], cache=Cache(storage=outage)))
    await client.send(ADA)
    outage.down()
    assert (await client.send(ADA)).state == "pass"
    outage.up()
    assert (await client.send(ADA)).hit
    outage.down(after=1)
    assert (await client.send(ADA, ask_for("another"))).state == "lead"
    outage.up()
    assert cache_of(client.guard).stats()["reasons"] == {"the storage does not answer": 2}


async def test_a_storage_that_is_known_to_be_away_is_not_asked() -> None:
    """What a storage says of itself saves the time of asking."""
    outage = OutageStorage(MemoryStorage(), breaker=True)
    client = Client(Guard([CacheScope()], cache=Cache(storage=outage)))
    outage.down()
    assert (await client.send(ADA)).state == "pass"
    assert outage.attempts == 0


async def test_a_storage_that_was_rolled_back_gives_nothing() -> None:
    """T6: what a storage has kept from before its data was lost is not given once the loss is accepted: what was revoked
    lately may be among it. Answers that are kept elsewhere are."""
    for own in (None, MemoryStorage()):
        outage = OutageStorage(MemoryStorage())
        client = Client(Guard([CacheScope()], storage=outage, cache=Cache(storage=own)))
        await client.send(ADA)
        outage.lose_data(MemoryStorage())
        with pytest.raises(LimitExceeded):
            await client.send(ADA)
        await client.guard.accept_data_loss()
        assert (await client.send(ADA)).hit == (own is not None)


async def test_kept_answers_survive_an_outage_of_the_counters() -> None:
    """C14: answers that are kept elsewhere are given while the counters are away, whose policies then decide on rates."""
    outage = OutageStorage(MemoryStorage())
    guard = Guard(
        [Budget("$1/daily", per="caller"), RateLimit("100/hour", per="caller", counts="calls"), CacheScope()],
        storage=outage,
        cache=Cache(storage=MemoryStorage()),
    )
    client = Client(guard)
    await client.send(ADA)
    outage.down()
    assert (await client.send(ADA)).hit
    with pytest.raises(LimitExceeded):
        await client.send(ADA, ask_for("another"))


# -------------------------------------------------------------------------------------- in pieces


async def test_a_body_that_passes_in_pieces() -> None:
    """C13: what is fed piece by piece is kept at its true end, and nothing of one that breaks off."""
    client = caching(streams=True, max_value_bytes=2_000)
    cache, body = cache_of(client.guard), answer_of(chat("in pieces")).body

    async def send(*pieces: bytes, ends: bool) -> str:
        async with client.guard.open(ADA):
            call = new_call(client.guard.engine, client.guard.describe(MODEL), ())
            found = await cache.look_up(call, ask_for())
            found.answered(200, "application/json; charset=utf-8")
            for piece in pieces:
                found.feed(piece)
            if ends:
                found.finish()
                found.finish()
            found.abandon() if not ends else None
            for _ in range(10):
                await asyncio.sleep(0)
            return found.state

    assert await send(body[:10], ends=False) == "lead"
    assert await send(b"x" * 2_001, b"y", ends=True) == "lead"
    assert await send(body[:10], body[10:], ends=True) == "lead"
    found = await client.send(ADA)
    assert (found.hit, text_of(found)) == (True, "in pieces")
    assert found.answer is not None
    assert found.answer.headers == [
        ("content-type", "application/json; charset=utf-8"),
        ("content-length", str(len(body))),
    ]
    assert await send(b"nothing to keep", ends=True) == "hit"


# ---------------------------------------------------------------------------- events and settings


async def test_observers_are_told() -> None:
    """C14: each look-up is an event: a hit with its age, a miss with the reason if it will not be kept."""
    clock, seen = FrozenClock(), list[events.Event]()
    client = Client(Guard([CacheScope()], cache=Cache(), clock=clock, observers=[seen.append]))
    await client.send(ADA)
    clock.advance(ms=1_500)
    await client.send(ADA)
    await client.send(Context())
    told = [event for event in seen if isinstance(event, (events.CacheHit, events.CacheMiss))]
    call = client.guard.describe(MODEL, input_tokens=1_000, max_output_tokens=100)
    assert told == [
        events.CacheMiss(ADA, call),
        events.CacheHit(ADA, call, 1_500, waited=False),
        events.CacheMiss(Context(), call, "there is no verified caller or user"),
    ]


async def test_without_a_scope_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """C12: a cache without a `CacheScope` among the policies keeps nothing, and says so."""
    client = Client(Guard([], cache=Cache()))
    with caplog.at_level(logging.WARNING):
        await client.send(ADA)
        assert (await client.send(ADA)).state == "pass"
    assert caplog.text.count("add CacheScope() to the policies") == 1
    assert cache_of(client.guard).stats()["reasons"] == {"no CacheScope is among the policies": 2}


async def test_two_scopes_allow_what_both_do() -> None:
    """C12: where two scopes meet, an answer is kept if both allow it, for the shorter time, inside both partitions."""
    settings: dict[str, dict[str, object]] = {"wiki": {"cache": True, "acl": "d"}}
    of_base = CacheScope(name="base", ttl="10s", knowledge_base=lambda context: "wiki", settings=settings)
    clock = FrozenClock()
    client = Client(Guard([CacheScope(ttl="20s"), of_base], cache=Cache(), clock=clock))
    assert [(await client.send(ADA)).state for _ in range(2)] == ["lead", "hit"]
    clock.advance(seconds=10)
    assert (await client.send(ADA)).state == "lead"
    settings["wiki"]["acl"] = "e"
    assert (await client.send(ADA)).state == "lead"
    settings["wiki"]["cache"] = False
    assert (await client.send(ADA)).state == "pass"
    await cache_of(client.guard).revoke(knowledge_base="wiki")
    settings["wiki"]["cache"] = True
    assert (await client.send(ADA)).state == "lead"


async def test_another_version_finds_nothing() -> None:
    """A cache with another version sees nothing of before; with the same one it does."""
    storage = MemoryStorage()
    states = []
    for version in ("1", "2", "1"):
        client = Client(Guard([CacheScope()], storage=storage, cache=Cache(version=version)))
        states.append((await client.send(ADA)).state)
    assert states == ["lead", "lead", "hit"]


def test_a_storage_that_cannot_keep_answers() -> None:
    """A cache on a storage of the `limits` package is a wrong setting, unless it has a storage of its own."""
    limits = LimitsStorage.from_url("memory://")
    with pytest.raises(ConfigurationError, match="cache: a LimitsStorage cannot keep answers"):
        Guard([CacheScope()], storage=limits, cache=Cache())
    with pytest.raises(ConfigurationError, match=r"cache\.storage: a LimitsStorage"):
        Cache(storage=limits)
    assert Guard([CacheScope()], storage=limits, cache=Cache(storage=MemoryStorage())).cache is not None


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": "31d"},
        {"ttl": "soon"},
        {"wait": "soon"},
        {"streams": "yes"},
        {"ignore": "metadata"},
        {"ignore": [1]},
        {"version": 2},
        {"max_value_bytes": 0},
        {"max_bytes": "1GB"},
        {"max_entries": 0},
    ],
    ids=repr,
)
def test_malformed_settings(options: dict[str, object]) -> None:
    """Every setting is checked when the cache is built, and named."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Cache(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cache: expected a Cache"):
        Guard(cache=options)  # type: ignore[arg-type]
