"""What operators change is in force after the next turn; and what is, when the places that say so are away."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections import ChainMap
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.cache.kit import ADA, Client
from tests.control.kit import ANNA, BEN, CLOCK_MS, SECRET, Hanging
from tests.middleware.asgi import request
from tests.servers import OwnRedis

from asgi_llm_guard import (
    CacheScope,
    Context,
    Guard,
    GuardMiddleware,
    Iterations,
    LimitExceeded,
    Quota,
    QuotaBook,
    Route,
    Usage,
)
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.control import Actor, Control, Raise, Stop
from asgi_llm_guard.control.state import ControlState, encode
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.snapshot import Snapshot
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage

pytestmark = pytest.mark.anyio

MODEL = "openai/gpt-4o"
MIA = Context(caller="svc", user="mia", departments=("research",), agent="writer", session="s1")
HOUR_MS = 3_600_000
BLOCKED = "request_exceeds_budget"
"""The code of a limit of 0: no call ever fits."""


class Away(Control):
    """A control whose database is away when the test says so."""

    away = False
    asked = 0

    async def version(self) -> int:
        self._see()
        return await super().version()

    async def state(self) -> ControlState:
        self._see()
        return await super().state()

    def _see(self) -> None:
        self.asked += 1
        if self.away:
            raise StorageError("the database is away")


class Alone(MemoryStorage):
    """A storage that keeps counters, and nothing else that processes share."""

    def shared(self) -> Any:
        raise ConfigurationError("not kept")


class Small(MemoryStorage):
    """A storage whose documents may not be longer than a few bytes."""

    def shared(self) -> Any:
        return _Refusing()


class _Refusing:
    async def document(self, _name: str, *, known: int = 0) -> None:
        """There is none."""

    async def publish(self, _name: str, _version: int, data: bytes) -> bool:
        raise ValueError(f"{len(data)} bytes")


@pytest.fixture
async def control(tmp_path: Path, clock: FrozenClock) -> AsyncIterator[Away]:
    control = Away(f"sqlite:///{tmp_path}/control.db", secret=SECRET, clock=clock)
    yield control
    await control.aclose()


@pytest.fixture
async def make(control: Away, clock: FrozenClock, tmp_path: Path) -> AsyncIterator[Callable[..., Guard]]:
    """Makes guards over one SQLite file, each as in a process of its own."""
    made: list[Guard] = []

    def guard(*policies: Any, **options: Any) -> Guard:
        storage = options.pop("storage", None) or SqliteStorage(tmp_path / "guard.db", clock=clock)
        made.append(Guard(policies, storage=storage, clock=clock, **{"control": control, **options}))
        return made[-1]

    yield guard
    for each in made:
        await each.aclose()


async def turn(guard: Guard) -> None:
    await guard.chores.run("control")


async def turn_until(guard: Guard, state: str) -> None:
    """Turns until it follows again: the storage notices by itself, and not at once, that it is back."""
    async with asyncio.timeout(60):
        while following(guard) != state:
            await turn(guard)


async def turn_until_told(guard: Guard) -> None:
    """Turns until nothing is wrong any more."""
    assert guard.follower is not None
    async with asyncio.timeout(60):
        while guard.follower.why:
            await turn(guard)


def following(guard: Guard) -> str:
    """What health says of it."""
    assert guard.follower is not None
    return guard.follower.following


async def code(guard: Guard, context: Context = MIA, **call: Any) -> str | None:
    """What becomes of a call: the code of its refusal, or nothing."""
    described = {"model": MODEL, "input_tokens": 1_000, "max_output_tokens": 1_000, **call}
    try:
        async with guard.open(context), guard.call(**described) as made:
            made.record(Usage(input_tokens=1_000, output_tokens=1_000))
    except LimitExceeded as error:
        return error.denied.code
    return None


# ----------------------------------------------------------------------------------- what changes


async def test_a_quota_is_in_force_after_the_next_turn(control: Away, make: Callable[..., Guard]) -> None:
    """C16: a quota that is set, changed and removed while requests are served holds from the next turn on; what code
    says of a department holds again when there is nothing else."""
    book = QuotaBook({"research": {"daily_tokens": 1_000_000}, "sales": {"daily_tokens": 0}})
    guard = make(Quota(book))
    assert await code(guard) is None
    await control.put("department", "research", {"daily_tokens": 100}, actor=ANNA)
    await turn(guard)
    assert await code(guard) == BLOCKED
    assert await code(guard, Context(caller="c", departments=("sales",))) == BLOCKED
    await control.put("department", "research", {"daily_tokens": 10_000, "models": ["anthropic/*"]}, actor=ANNA)
    await turn(guard)
    assert await code(guard) == "model_not_allowed"
    await control.put("department", "sales", {"models": "unlimited"}, actor=ANNA)
    await control.remove("department", "research", actor=ANNA)
    await turn(guard)
    assert await code(guard) is None
    assert await code(guard, Context(caller="c", departments=("sales",))) is None
    book.set("research", {"daily_tokens": 0})
    assert await code(guard) == BLOCKED, "what code says is still its own"


async def test_books_of_later_policies_follow(control: Away, make: Callable[..., Guard]) -> None:
    """C16: the quotas of a policy that is added to a route or a job hold as well, whenever it was added."""
    guard = make()
    await control.put("department", "research", {"daily_tokens": 1}, actor=ANNA)
    await turn(guard)
    extra = Quota(QuotaBook({"research": {"daily_tokens": 1_000_000}}))
    with pytest.raises(LimitExceeded):
        async with guard.open(MIA, extra=[extra]), guard.call(model=MODEL, input_tokens=10, max_output_tokens=10):
            pass
    await control.put("department", "research", {"daily_tokens": 100}, actor=ANNA)
    await turn(guard)
    async with guard.open(MIA, extra=[extra]), guard.call(model=MODEL, input_tokens=10, max_output_tokens=10):
        pass


async def test_agents_are_live(control: Away, make: Callable[..., Guard]) -> None:
    """The limit of an agent changes while its session runs: what it has used counts, and code's own limit comes back."""
    guard = make(Iterations(50), agents={"writer": {"max_iterations": 2}})
    assert [await code(guard) for _ in range(3)] == [None, None, "session_iterations_exhausted"]
    await control.put("agent", "writer", {"max_iterations": 3}, actor=ANNA)
    await turn(guard)
    assert [await code(guard) for _ in range(2)] == [None, "session_iterations_exhausted"]
    await control.put("agent", "writer", {"max_iterations": "unlimited"}, actor=ANNA)
    await turn(guard)
    assert await code(guard) is None
    await control.remove("agent", "writer", actor=ANNA)
    await turn(guard)
    assert await code(guard) == "session_iterations_exhausted"


async def test_agents_may_be_unknown_to_code(control: Away, make: Callable[..., Guard]) -> None:
    """An agent that no code names gets its limit, and one given to the policy itself still wins."""
    guard = make(Iterations(50), Iterations(50, name="own", agents={"writer": {"max_iterations": 1}}))
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await control.put("agent", "reader", {"max_iterations": 1}, actor=ANNA)
    await turn(guard)
    assert await code(guard) == BLOCKED
    reader = Context(caller="svc", agent="reader", session="s2")
    assert [await code(guard, reader) for _ in range(2)] == [None, "session_iterations_exhausted"]


async def test_a_price_says_where_it_comes_from(control: Away, make: Callable[..., Guard], clock: FrozenClock) -> None:
    """S4: an administered price wins over that of code, from and until its instants, and every cost names it."""
    listed = PriceBook.snapshot(
        overrides={"OpenAI/gpt-4o": {"input": 1, "output": 1}, "acme/x": {"input": 7, "output": 7}}
    )
    guard = make(prices=listed)
    call = {"model": MODEL, "input_tokens": 1_000_000, "max_output_tokens": 0}
    state = await control.put(
        "price",
        MODEL,
        {"entry": {"input": 5, "output": 5}, "from_ms": CLOCK_MS + 10, "until_ms": CLOCK_MS + 20},
        actor=ANNA,
    )
    await turn(guard)
    seen = []
    for at in (0, 10, 19, 20):
        clock.set(CLOCK_MS + at)
        await turn(guard)
        described = guard.describe(**call)  # type: ignore[arg-type]  # arguments of it
        seen.append((described.cost_nanousd, described.price_source))
    one, five = 1_000_000_000, 5_000_000_000
    assert [cost for cost, _ in seen] == [one, five, five, one]
    assert seen[1][1] == f"administered price (version {state.version}) of openai/gpt-4o"
    assert str(seen[0][1]).startswith("override of openai/gpt-4o")

    await control.put("price", MODEL, {"entry": {"input": 6, "output": 6}}, actor=ANNA)
    await turn(guard)
    guard.prices = PriceBook.snapshot(overrides={MODEL: {"input": 2, "output": 2}})
    assert guard.describe(**call).cost_nanousd == 6 * one, "what code changes stays under it"  # type: ignore[arg-type]  # as above
    await control.remove("price", MODEL, actor=ANNA)
    await turn(guard)
    assert guard.describe(**call).cost_nanousd == 2 * one  # type: ignore[arg-type]  # as above


async def test_a_knowledge_base_that_was_changed_finds_nothing(control: Away, make: Callable[..., Guard]) -> None:
    """C16, T6: whatever is changed about a knowledge base, answers of before are not found, in no guard; not even when
    it is changed back, or when what code says of it holds again."""
    base = {"wiki": {"cache": True, "acl": "d1"}}
    scope = CacheScope(knowledge_base=lambda context: "wiki", settings=ChainMap(control.knowledge_bases, base))  # type: ignore[arg-type]  # never written to
    client, other = (Client(make(scope, cache=Cache())) for _ in range(2))

    async def states() -> list[str]:
        await turn(client.guard)
        await turn(other.guard)
        return [(await each.send(ADA)).state for each in (client, other)]

    assert await states() == ["lead", "hit"]
    await control.put("knowledge_base", "wiki", {"cache": True, "acl": "d1"}, actor=ANNA)
    assert await states() == ["lead", "hit"]
    await control.put("knowledge_base", "wiki", {"acl": "d2"}, actor=ANNA)
    assert await states() == ["lead", "hit"]
    await control.put("knowledge_base", "wiki", {"acl": "d1"}, actor=ANNA)
    assert await states() == ["lead", "hit"]
    await control.put("knowledge_base", "wiki", {"cache": False}, actor=ANNA)
    assert await states() == ["pass", "pass"]
    await control.remove("knowledge_base", "wiki", actor=ANNA)
    assert await states() == ["lead", "hit"]
    await control.put("agent", "writer", {"max_iterations": 1}, actor=ANNA)
    assert await states() == ["hit", "hit"], "nothing else revokes answers"


async def test_what_was_changed_while_nobody_followed_finds_nothing(control: Away, make: Callable[..., Guard]) -> None:
    """C16, T6: nor is it found by a process that begins after a knowledge base was changed and changed back."""
    scope = CacheScope(knowledge_base=lambda context: "wiki", settings=control.knowledge_bases)
    await control.put("knowledge_base", "wiki", {"cache": True, "acl": "d1"}, actor=ANNA)
    before = Client(make(scope, cache=Cache()))
    assert [(await before.send(ADA)).state for _ in range(2)] == ["lead", "hit"]
    await before.guard.drain(0)  # closing it would close the administration data
    await control.put("knowledge_base", "wiki", {"acl": "d2"}, actor=ANNA)
    await control.put("knowledge_base", "wiki", {"acl": "d1"}, actor=ANNA)
    after = Client(make(scope, cache=Cache()))
    assert [(await after.send(ADA)).state for _ in range(2)] == ["lead", "hit"]


async def test_a_raise_counts_until_it_ends(control: Away, make: Callable[..., Guard], clock: FrozenClock) -> None:
    """Conformance 64, S12: a limit that is raised for a while admits more before the raise ends, and not after."""
    guard = make(Quota(QuotaBook({"research": {"daily_tokens": 2_000}})))
    assert [await code(guard) for _ in range(2)] == [None, "quota_exceeded"]
    value = {
        "policy": "quota",
        "unit": "tokens",
        "amount": 4_000,
        "until_ms": CLOCK_MS + HOUR_MS,
        "subject": "research",
    }
    await control.put("raise", "r1", value, actor=ANNA, reason="release week")
    await turn(guard)
    assert await code(guard) is None
    clock.set(CLOCK_MS + HOUR_MS - 1)
    assert await code(guard) is None
    clock.set(CLOCK_MS + HOUR_MS)
    assert await code(guard, input_tokens=1, max_output_tokens=1) == "quota_exceeded"
    with pytest.raises(ConfigurationError, match="has passed"):
        await control.put("raise", "r2", {**value, "until_ms": clock.now_ms()}, actor=ANNA)


async def test_a_stop_holds_until_it_ends(control: Away, make: Callable[..., Guard], clock: FrozenClock) -> None:
    """S8: who was stopped is refused, others are not, and a stop ends by itself or when it is removed."""
    guard = make(Iterations(50))
    await control.put("stop", "s1", {"scope": "user", "subject": "mia", "until_ms": CLOCK_MS + HOUR_MS}, actor=ANNA)
    await control.put("stop", "s2", {"scope": "agent", "subject": "reader"}, actor=ANNA)
    await turn(guard)
    reader = Context(caller="svc", user="ben", agent="reader")
    assert [await code(guard), await code(guard, reader), await code(guard, Context(caller="x"))] == [
        "stopped",
        "stopped",
        None,
    ]
    clock.set(CLOCK_MS + HOUR_MS)
    await control.remove("stop", "s2", actor=ANNA)
    await turn(guard)
    assert [await code(guard), await code(guard, reader)] == [None, None]


async def test_keys_are_live(control: Away, make: Callable[..., Guard]) -> None:
    """A key that is made is its caller from the next turn on, and refused from the one after it was revoked."""
    keys = control.keys(then=ApiKeys([], secret="secret-of-the-file"))
    guard = make(Iterations(1, per="caller"), identity=keys)
    called: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["asgi_llm_guard"].context.caller)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    guarded = GuardMiddleware(app, guard=guard, routes=[Route("/chat")])
    shown, key = await control.new_key("svc", actor=ANNA)

    async def status() -> int:
        asked = request("/chat", headers=[(b"x-api-key", shown.encode())])
        return (await asked.run(guarded)).status

    assert await status() == 200, "the first request waits until keys are loaded"
    assert called == ["svc"]
    await control.revoke_key(key.id, actor=BEN)
    await turn(guard)
    assert await status() == 403


# --------------------------------------------------------------------------------- where it is from


async def test_processes_that_do_not_reach_the_database_follow(
    control: Away, make: Callable[..., Guard], clock: FrozenClock, tmp_path: Path
) -> None:
    """One process that reaches the database publishes for all that do not, whoever has written it."""
    far = Away(f"sqlite:///{tmp_path}/far.db", secret=SECRET, clock=clock)
    far.away = True
    near, distant = make(Iterations(50)), make(Iterations(50), control=far)
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(near)
    await turn(distant)
    assert await code(distant) == BLOCKED
    assert distant.control_version == near.control_version == await control.version()
    await far.aclose()


async def test_a_database_that_hangs_holds_up_nobody(control: Away, make: Callable[..., Guard]) -> None:
    """A database that takes the question and never answers: the storage is followed meanwhile, from the first turn on, and
    the database again when it answers."""
    hanging = Hanging(control)
    near, distant = make(Iterations(50)), make(Iterations(50), control=hanging)
    for limit in (0, 50):
        await control.put("agent", "writer", {"max_iterations": limit}, actor=ANNA)
        await turn(near)
        async with asyncio.timeout(60):
            await turn(distant)
        assert await code(distant) == (BLOCKED if limit == 0 else None)
    assert distant.follower is not None
    assert "does not answer in time" in distant.follower.why
    hanging.answers.set()
    await turn_until_told(distant)
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(distant)
    assert await code(distant) == BLOCKED


async def test_the_first_state_may_take_a_moment(control: Away, make: Callable[..., Guard]) -> None:
    """The first request waits for a database that answers late; nothing is refused that need not be."""
    hanging = Hanging(control)
    guard = make(Iterations(50), control=hanging)
    asked = asyncio.create_task(code(guard))
    await asyncio.wait((asked,), timeout=0.4)
    assert not asked.done()
    hanging.answers.set()
    assert await asked is None


async def test_a_forked_child_follows(tmp_path: Path) -> None:
    """A process that is forked off one that follows keeps what is in force, and follows by itself."""
    url = f"sqlite:///{tmp_path}/control.db"
    writer = Control(url, secret=SECRET)
    guard = Guard([Iterations(50)], control=url)
    assert await code(guard) is None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = asyncio.run(_until_refused(guard))
        finally:
            os._exit(status)
    await writer.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    await guard.aclose()
    await writer.aclose()


async def _until_refused(guard: Guard) -> int:
    async with asyncio.timeout(60):
        while True:
            if await code(guard) == BLOCKED:
                return 0
            await asyncio.sleep(0.02)


async def test_postgresql_is_followed(make: Callable[..., Guard], clock: FrozenClock, postgres_url: str) -> None:
    """C16: administration data in PostgreSQL are followed like those in SQLite."""
    control = Control(postgres_url, secret=SECRET, clock=clock)
    guard = make(Iterations(50), Quota(QuotaBook({"research": {}})), control=control)
    assert await code(guard) is None
    await control.put("department", "research", {"monthly_cost": 0}, actor=ANNA)
    await turn(guard)
    assert await code(guard) == BLOCKED
    await control.aclose()


async def test_a_change_whose_writer_died_is_published(control: Away, make: Callable[..., Guard]) -> None:
    """A version that was written and never published is published by whoever sees it first."""
    guard = make(Iterations(50))
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)  # and nobody told the storage
    await turn(guard)
    storage = guard.storage
    assert isinstance(storage, SqliteStorage)
    document = await storage.shared().document("control")
    assert document is not None
    assert (document.version, document.data) == (await control.version(), encode(await control.state()))


async def test_a_storage_that_was_emptied_has_the_document_again(
    control: Away, make: Callable[..., Guard], clock: FrozenClock, own_redis: OwnRedis
) -> None:
    """What was published and lost is published again, without a change."""
    server = own_redis()
    storage = RedisStorage(server.url, timeout_s=10)
    guard = make(storage=storage)
    await turn(guard)
    server.flush()
    await turn(guard)
    assert await storage.shared().document("control") is None
    clock.advance(seconds=31)
    await turn(guard)
    assert await storage.shared().document("control") is not None


async def test_the_last_good_state_stays(
    control: Away, make: Callable[..., Guard], caplog: pytest.LogCaptureFixture
) -> None:
    """While neither the database nor the storage's document can be read, the last state holds, and health says so, once
    in the log."""
    storage = OutageStorage(MemoryStorage())
    guard = make(Iterations(50), storage=storage)
    await control.put("agent", "writer", {"max_iterations": 1}, actor=ANNA)
    await turn(guard)
    assert guard.health()["control"] == {"state": "ok", "version": await control.version(), "since_ms": CLOCK_MS}

    control.away = True
    storage.down()
    with caplog.at_level(logging.WARNING):
        await turn(guard)
        await turn(guard)
    assert following(guard) == "stale"
    assert len([each for each in caplog.records if "stays in force" in each.message]) == 1
    assert [await code(guard) for _ in range(2)] == [None, "session_iterations_exhausted"]

    control.away = False
    storage.up()
    await control.put("agent", "writer", {"max_iterations": 2}, actor=ANNA)
    await turn(guard)
    assert following(guard) == "ok"
    assert await code(guard) is None


async def test_the_last_good_state_stays_while_redis_is_down(
    control: Away, make: Callable[..., Guard], own_redis: OwnRedis
) -> None:
    """With the database away and Redis killed, what is counted locally is still counted under administered limits; both
    may come back in any order."""
    server = own_redis()
    guard = make(Iterations(50), storage=RedisStorage(server.url, timeout_s=2))
    await control.put("agent", "writer", {"max_iterations": 2}, actor=ANNA)
    assert await code(guard) is None
    control.away = True
    server.kill()
    await turn(guard)
    assert following(guard) == "stale"
    assert "session_iterations_exhausted" in [await code(guard) for _ in range(3)]
    server.start()
    await turn_until(guard, "ok")
    assert guard.control_version == await Control.version(control)


async def test_who_never_had_a_state_is_closed(control: Away, make: Callable[..., Guard]) -> None:
    """A process that could never read what operators have set refuses everything with 503, is not ready, and opens as
    soon as it can; without a control nothing of this holds."""
    control.away = True
    guard = make(Iterations(50))
    app = GuardMiddleware(_answers, guard=guard, routes=[Route("/chat")])

    assert await code(guard) == "guard_unavailable"
    refused = await request("/chat").run(app)
    assert (refused.status, "retry-after" in refused.headers) == (503, True)
    assert (await request("/free", method="GET").run(app)).status == 200, "what costs nothing goes on"
    assert not guard.ready
    assert guard.control_version is None
    with pytest.raises(LimitExceeded, match="could not be read yet"):
        async with guard.open(MIA):
            pass

    control.away = False
    await turn(guard)
    assert guard.ready
    assert guard.engine.gate is None, "nothing asks any more"
    assert await code(guard) is None
    assert await code(make(Iterations(50), control=None)) is None


async def test_a_storage_without_documents_is_no_hindrance(control: Away, make: Callable[..., Guard]) -> None:
    """Where the storage keeps nothing beside counters, the database alone is followed."""
    guard = make(Iterations(50), storage=Alone())
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    assert await code(guard) == BLOCKED
    assert following(guard) == "ok"


async def test_who_is_closed_does_not_ask_at_every_request(control: Away, make: Callable[..., Guard]) -> None:
    """While nothing can be loaded, requests that come right after a failed try are refused without another one."""
    control.away = True
    guard = make(Iterations(50))
    assert [await code(guard) for _ in range(20)] == ["guard_unavailable"] * 20
    assert control.asked < 20


async def test_a_document_that_is_too_large_is_said(
    control: Away, make: Callable[..., Guard], caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be published is in force where the database is reached, and the log says why nowhere else."""
    guard = make(Iterations(50), storage=Small())
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    with caplog.at_level(logging.ERROR):
        await turn(guard)
        await turn(guard)
    assert await code(guard) == BLOCKED
    assert [each.message.partition(":")[0] for each in caplog.records] == ["control"]


async def test_answers_are_revoked_when_the_cache_is_back(
    control: Away, make: Callable[..., Guard], clock: FrozenClock
) -> None:
    """A change of a knowledge base while the cache's storage is away is made good at a later turn."""
    kept = OutageStorage(MemoryStorage(clock=clock))
    base = {"wiki": {"cache": True, "acl": "d1"}}
    scope = CacheScope(knowledge_base=lambda context: "wiki", settings=ChainMap(control.knowledge_bases, base))  # type: ignore[arg-type]  # never written to
    client = Client(make(scope, cache=Cache(storage=kept)))
    assert [(await client.send(ADA)).state for _ in range(2)] == ["lead", "hit"]
    kept.down()
    await control.put("knowledge_base", "wiki", {"cache": False}, actor=ANNA)
    await turn(client.guard)
    await control.remove("knowledge_base", "wiki", actor=ANNA)
    await turn(client.guard)
    kept.up()
    await turn(client.guard)
    assert (await client.send(ADA)).state == "lead"


async def test_a_state_of_a_newer_release_is_left_alone(
    control: Away, make: Callable[..., Guard], caplog: pytest.LogCaptureFixture
) -> None:
    """A published state with a kind that is not known changes nothing, and is told: the last good one stays in force."""
    guard = make(Iterations(50))
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(guard)
    version = guard.control_version
    storage = guard.storage
    assert isinstance(storage, SqliteStorage)
    await storage.shared().publish(
        "control", 2**51, b'{"format":1,"version":2251799813685248,"entries":{"moon":{"x":[1,{}]}}}'
    )
    with caplog.at_level(logging.WARNING):
        await turn(guard)

    assert guard.control_version == version
    assert await code(guard) == BLOCKED
    assert following(guard) == "refused"
    assert "a kind that this release does not know: 'moon'" in caplog.text


async def test_a_newer_state_while_the_database_is_away(control: Away, make: Callable[..., Guard]) -> None:
    """That what was published cannot be put in force is told also where the database does not answer."""
    guard = make(Iterations(50))
    await turn(guard)
    assert isinstance(guard.storage, SqliteStorage)
    await guard.storage.shared().publish("control", 2**51, b'{"format":2}')
    control.away = True
    await turn(guard)
    assert following(guard) == "refused"
    assert guard.follower is not None
    assert "format 2" in guard.follower.why


async def test_a_database_with_a_row_that_is_no_entry(
    control: Away, make: Callable[..., Guard], tmp_path: Path
) -> None:
    """A process that finds nonsense in the database keeps what is in force, says so, and follows the storage."""
    guard, other = make(Iterations(50)), make(Iterations(50))
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(guard)
    with closing(sqlite3.connect(tmp_path / "control.db")) as database, database:
        database.execute("UPDATE control_entries SET value = '{nope'")
        database.execute("UPDATE control_meta SET version = version + 1")
    await turn(guard)
    assert await code(guard) == BLOCKED
    assert following(guard) == "refused"
    await turn(other)
    assert await code(other) == BLOCKED, "as it was published"


async def test_all_of_a_state_or_nothing(control: Away, make: Callable[..., Guard]) -> None:
    """A state of which one entry cannot be put in force here changes nothing at all."""
    guard = make(Iterations(50), Quota(QuotaBook({"research": {}})))
    await turn(guard)
    version = guard.control_version
    storage = guard.storage
    assert isinstance(storage, SqliteStorage)
    bad = (
        b'{"format":1,"version":2251799813685248,"entries":{"agent":{"writer":[1,{"max_iterations":0}]},'
        b'"stop":{"s":[1,{"scope":"all"}]},"department":{"research":[1,{"daily_tokens":0}]},'
        b'"price":{"nobody/knows":[1,{"entry":{"input":1}}]}}}'
    )
    await storage.shared().publish("control", 2**51, bad)
    await turn(guard)

    assert guard.control_version == version
    assert await code(guard) is None
    assert guard.follower is not None
    assert following(guard) == "refused"
    assert "output missing" in guard.follower.why


async def test_a_database_from_a_backup_is_ahead_with_its_next_change(
    control: Away, make: Callable[..., Guard], clock: FrozenClock, tmp_path: Path
) -> None:
    """A database that was restored from a backup is behind what was published, which stays in force, until its first
    change."""
    guard = make(Iterations(50))
    await control.put("agent", "writer", {"max_iterations": 7}, actor=ANNA)
    with closing(sqlite3.connect(tmp_path / "control.db")) as database:
        database.execute("VACUUM INTO ?", (str(tmp_path / "backup.db"),))
    for limit in range(5):
        await control.put("agent", "writer", {"max_iterations": limit}, actor=ANNA)
    await turn(guard)
    clock.advance(seconds=60)
    restored = Control(f"sqlite:///{tmp_path}/backup.db", secret=SECRET, clock=clock)
    other = make(Iterations(50), control=restored)
    await turn(other)
    assert other.control_version == guard.control_version
    await restored.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(other)
    assert other.control_version == clock.now_ms()
    assert await code(other) == BLOCKED
    await restored.aclose()


async def test_a_database_that_is_replaced_while_it_is_used(
    control: Away, make: Callable[..., Guard], clock: FrozenClock, tmp_path: Path
) -> None:
    """C16: where the file is replaced under a process that runs, what was in force stays, operators are told, and no
    change goes to a file that nobody else sees."""
    guard = make(Iterations(50))
    await control.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(guard)
    other = Control(f"sqlite:///{tmp_path}/other.db", secret=SECRET, clock=clock)
    await other.state()
    await other.aclose()
    (tmp_path / "other.db").rename(tmp_path / "control.db")
    await turn(guard)
    assert await code(guard) == BLOCKED
    assert guard.follower is not None
    assert "was removed or replaced while in use" in guard.follower.why
    with pytest.raises(StorageError, match="removed or replaced"):
        await control.put("agent", "writer", {"max_iterations": 9}, actor=ANNA)


async def test_a_new_database_is_ahead(
    control: Away, make: Callable[..., Guard], clock: FrozenClock, tmp_path: Path
) -> None:
    """A new database in place of another is in force, though less was changed in it."""
    guard = make(Iterations(50))
    for limit in range(5):
        await control.put("agent", "writer", {"max_iterations": limit}, actor=ANNA)
    await turn(guard)
    clock.advance(seconds=60)
    replaced = Control(f"sqlite:///{tmp_path}/new.db", secret=SECRET, clock=clock)
    other = make(Iterations(50), control=replaced)
    await turn(other)
    assert await code(other) is None
    await replaced.put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    await turn(other)
    assert await code(other) == BLOCKED
    await replaced.aclose()


async def test_prices_that_administered_ones_do_not_go_with(control: Away, make: Callable[..., Guard]) -> None:
    """Prices of code over which an administered one cannot be laid are refused, with all that was to change beside them."""
    guard = make(Iterations(50))
    await control.put("price", MODEL, {"entry": {"input": 1}}, actor=ANNA)  # the output as the list says
    await turn(guard)
    before, prices = guard.configuration, guard.prices
    empty = PriceBook(Snapshot(b'{"schema": 1, "date": "2027-01-01", "sources": {}, "providers": {}}'))
    with pytest.raises(ConfigurationError, match="output missing"):
        guard.replace(policies=[Iterations(9)], prices=empty)
    assert guard.configuration is before
    assert guard.prices is prices


async def test_a_url_is_enough(clock: FrozenClock, tmp_path: Path) -> None:
    """A guard that is given the URL of the database opens it, follows it, and lets go of it."""
    guard = Guard([Iterations(50)], control=f"sqlite:///{tmp_path}/control.db", clock=clock)
    assert guard.control is not None
    await guard.control.put("agent", "writer", {"max_iterations": 0}, actor=Actor(name="anna"))
    assert await code(guard) == BLOCKED
    await guard.aclose()
    with pytest.raises(StorageError):
        await guard.control.state()
    with pytest.raises(ConfigurationError, match="control: expected"):
        Guard(control=5)  # type: ignore[arg-type]  # the point


async def test_values_are_what_the_engine_takes(control: Away, make: Callable[..., Guard]) -> None:
    """Raises and stops that are made in code go through administration as they are, with the id that they go by."""
    guard = make()
    raised = Raise(policy="quota", unit="usd", amount=Decimal("2.5"), until_ms=CLOCK_MS + HOUR_MS)
    state = await control.put("raise", "r1", raised, actor=ANNA)
    assert state.raises["r1"].value.id == "r1"
    await control.put("stop", "s1", Stop(scope="all", id="s1"), actor=ANNA)
    await turn(guard)
    assert await code(guard) == "stopped"


async def _answers(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
