"""`assert_no_foreign_hits`: on every storage, and that it finds what it looks for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.storage.conftest import FACTORIES
from tests.storage.values import START

from asgi_llm_guard import CacheScope, Context, Guard, RateLimit
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.base import CacheDirective, Verdict
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import Entries, Flights, InFlight, Kept, Leading
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.testing import FrozenClock, assert_no_foreign_hits

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[*sorted(FACTORIES), "sharded"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    clock = FrozenClock(START)
    made: Storage
    if request.param == "sharded":
        made = ShardedStorage([MemoryStorage(clock=clock) for _ in range(3)])
    else:
        made = FACTORIES[request.param](tmp_path)(clock)
    async with contextlib.aclosing(made):
        yield made


async def test_nobody_is_given_what_is_anothers(storage: Storage) -> None:
    """T5, T7, C11: over random pairs of callers and users, none is given what was kept for another, and none can tell
    by what the storage was asked for that there is something."""
    guard = Guard([CacheScope()], storage=storage, cache=Cache())
    assert await assert_no_foreign_hits(guard, pairs=500) > 450


@pytest.mark.slow
async def test_nobody_is_given_what_is_anothers_in_many_pairs(storage: Storage) -> None:
    """T5, T7, C11: the same over 100,000 pairs."""
    guard = Guard([CacheScope()], storage=storage, cache=Cache())
    assert await assert_no_foreign_hits(guard, pairs=100_000, seed=1) > 90_000


async def test_knowledge_bases_too() -> None:
    """T6, C12: the access list decides as well: who sees another one is foreign."""
    acls = {"a": "d1", "b": "d2"}

    def base_of(context: Context) -> str | None:
        return context.session

    settings = {base: {"cache": True, "acl": acl} for base, acl in acls.items()}
    guard = Guard([CacheScope(knowledge_base=base_of, settings=settings)], cache=Cache())
    foreign = await assert_no_foreign_hits(
        guard,
        contexts=lambda chance: Context(caller=chance.choice("xy"), session=chance.choice("ab")),
        foreign=lambda one, other: (one.caller, one.session) != (other.caller, other.session),
    )
    assert 600 < foreign < 900


class Everybody:
    """A scope that lets all callers share: what the check is there to find."""

    name = "everybody"
    counts = "calls"

    def __init__(self, partition: Any = lambda context: "one") -> None:
        self.partition = partition

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:
        return Verdict(cache=CacheDirective(allowed=True, partition=self.partition(context)))


async def test_a_shared_partition_is_found() -> None:
    """T5: a scope that shares answers between callers fails the check."""
    guard = Guard([Everybody()], cache=Cache())  # type: ignore[list-item]
    with pytest.raises(AssertionError, match="was given what was kept for"):
        await assert_no_foreign_hits(guard, pairs=10)


async def test_ids_that_run_together_are_found() -> None:
    """T5: so does one that joins ids without keeping them apart."""

    def joined(context: Context) -> str:
        return f"{context.caller or ''}:{context.user or ''}"

    guard = Guard([Everybody(joined)], cache=Cache())  # type: ignore[list-item]
    with pytest.raises(AssertionError, match="was given what was kept for"):
        await assert_no_foreign_hits(guard, pairs=5_000)


class Telling(Flights):
    """Looks once more where there is something for anybody."""

    def __init__(self, entries: Entries) -> None:
        super().__init__(entries)
        self.prompts = 0

    async def join(self, key: str, token: str, **options: Any) -> Kept | Leading | InFlight:
        self.prompts += 1
        if self.prompts % 2:
            await self.entries.find(key)
        return await super().join(key, token, **options)


async def test_a_look_up_that_can_be_told_is_found() -> None:
    """T7: a look-up that sometimes asks the storage for more fails the check."""
    guard = Guard([CacheScope()], cache=Cache())
    assert guard.cache is not None
    guard.cache.flights = Telling(guard.cache.flights.entries)
    with pytest.raises(AssertionError, match="could tell"):
        await assert_no_foreign_hits(guard, pairs=10)


async def test_a_guard_that_refuses_or_keeps_nothing() -> None:
    """A guard without a cache cannot be checked; one that keeps nothing has nothing to give, and passes."""
    with pytest.raises(ConfigurationError, match="no cache"):
        await assert_no_foreign_hits(Guard([CacheScope()]))
    assert await assert_no_foreign_hits(Guard([CacheScope(enabled=False)], cache=Cache()), pairs=10) > 5
    assert await assert_no_foreign_hits(Guard([CacheScope(), RateLimit("9/second")], cache=Cache()), pairs=0) == 0
