"""Does a cache give the answers of one to another? A check for the guard that you configured."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.cache import CacheRequest, Lookup, ProviderAnswer, ResponseCache
from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.storage.entries import Bounds, Entries, InFlight, Kept, Leading

__all__ = ["assert_no_foreign_hits", "random_context"]

_AT_ONCE: Final = 50
_IDS: Final = ("a", "b", "a:b", "b:a", "user", "user:a", "caller", "public", "anonymous", "kb", "a%3Ab", "ä", "a ", "A")


def random_context(chance: random.Random) -> Context:
    """Somebody with a verified caller or user, whose ids are made to be mistaken for those of others."""
    caller, user = (chance.choice((None, *_IDS, f"{chance.randrange(10**6)}")) for _ in range(2))
    if caller is None and user is None:
        caller = chance.choice(_IDS)
    return Context(caller=caller, user=user, session=chance.choice((None, *_IDS)))


def is_foreign(one: Context, other: Context) -> bool:
    """Whether the two are not the same caller and user."""
    return (one.caller, one.user) != (other.caller, other.user)


async def assert_no_foreign_hits(
    guard: Guard,
    *,
    pairs: int = 1_000,
    contexts: Callable[[random.Random], Context] = random_context,
    foreign: Callable[[Context, Context], bool] = is_foreign,
    seed: int = 0,
) -> int:
    """Keep an answer for one, look it up as another, for so many random pairs; how many of them were foreign.

    Checked for each pair: whoever is foreign to the one for whom an answer was kept is not given it, the one is; and
    the foreign look-up asks the storage for exactly what a look-up asks for of which there is nothing.
    Nothing is called, and nothing claimed but rates of hits: give it the policies and settings of your service, on a
    storage of its own, without limits that would refuse.

    Args:
        guard: has a cache.
        pairs: how many are tried.
        contexts: who asks; random callers and users by default.
        foreign: whether two of them must not share; different callers or users by default.
        seed: of the chance; another one tries other pairs.

    Raises:
        AssertionError: names the two, and what happened.
        ConfigurationError: the guard has no cache.
    """
    if guard.cache is None:
        raise ConfigurationError("assert_no_foreign_hits: this guard has no cache; give it Guard(cache=Cache(...))")
    chance = random.Random(seed)  # noqa: S311 - the same pairs each time
    found = 0
    numbers = iter(range(pairs))
    with _watching(guard.cache) as watch:
        while batch := [
            (n, contexts(chance), contexts(chance)) for n, _ in zip(numbers, range(_AT_ONCE), strict=False)
        ]:
            checks = [
                _check(guard, guard.cache, watch, f"{seed}.{n}", *two, foreign=foreign(*two)) for n, *two in batch
            ]
            found += sum(await asyncio.gather(*checks))
    return found


async def _check(
    guard: Guard, cache: ResponseCache, watch: _Watch, number: str, one: Context, other: Context, *, foreign: bool
) -> bool:
    prompt, nothing = f"{number} is asked", f"{number} is new"
    kept = await _look_up(guard, cache, one, prompt)
    _expect(kept.state != "hit", f"{one} was given something before anything was kept: {kept.answer}")
    stored = await kept.store(_answer(prompt))
    if not foreign:
        return False
    theirs, asked = await _watched(guard, cache, watch, other, prompt)
    _expect(theirs.state != "hit", f"{other} was given what was kept for {one}")
    new, asked_new = await _watched(guard, cache, watch, other, nothing)
    seen, seen_new = [theirs.state, *asked], [new.state, *asked_new]
    _expect(seen == seen_new, f"{other} could tell what was kept for {one}: {seen} is not {seen_new}")
    again = await _look_up(guard, cache, one, prompt)
    _expect((again.state == "hit") == stored, f"{one} was not given what was kept for {one}")
    return True


def _expect(true: bool, message: str) -> None:
    # Not `assert`, which an optimising interpreter leaves out.
    if not true:
        raise AssertionError(message)


async def _watched(
    guard: Guard, cache: ResponseCache, watch: _Watch, context: Context, prompt: str
) -> tuple[Lookup, list[object]]:
    """A look-up, and what it asked the storage for."""
    asked: list[object] = []
    watch.asked[asyncio.current_task()] = asked
    try:
        return await _look_up(guard, cache, context, prompt), asked
    finally:
        del watch.asked[asyncio.current_task()]


async def _look_up(guard: Guard, cache: ResponseCache, context: Context, prompt: str) -> Lookup:
    admission = guard.new_admission(context)
    call = ActiveCall(admission, None, admission.policies, None)
    body = json.dumps({"messages": [{"role": "user", "content": prompt}]}).encode()
    return await cache.look_up(call, CacheRequest(host="example.com", path="/v1/chat/completions", body=body))


def _answer(text: str) -> ProviderAnswer:
    body = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
    return ProviderAnswer(status=200, content_type="application/json", body=body)


@contextmanager
def _watching(cache: ResponseCache) -> Iterator[_Watch]:
    entries = cache.flights.entries
    watch = cache.flights.entries = _Watch(entries)
    try:
        yield watch
    finally:
        cache.flights.entries = entries


class _Watch:
    """A space of a storage that notes what each task asks for: the verb, and how much of it the storage can see."""

    def __init__(self, inner: Entries) -> None:
        self._inner = inner
        self.asked: dict[asyncio.Task[object] | None, list[object]] = {}

    def _note(self, *what: object) -> None:
        asked = self.asked.get(asyncio.current_task())
        if asked is not None:
            asked.append(what)

    @property
    def bounds(self) -> Bounds:
        return self._inner.bounds

    async def find(self, key: str) -> Kept | None:
        self._note("find", len(key))
        return await self._inner.find(key)

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        self._note("begin", len(key), claim_ms, len(names), len(note), fresh)
        return await self._inner.begin(key, token, claim_ms=claim_ms, names=names, note=note, fresh=fresh)

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        self._note("prolong", len(key), claim_ms)
        return await self._inner.prolong(key, token, claim_ms=claim_ms)

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        self._note("store", len(key), len(value), ttl_ms)
        return await self._inner.store(key, token, value, ttl_ms=ttl_ms)

    async def abandon(self, key: str, token: str) -> None:
        self._note("abandon", len(key))
        await self._inner.abandon(key, token)

    async def forget(self, key: str) -> None:
        self._note("forget", len(key))
        await self._inner.forget(key)

    async def bump(self, name: str) -> None:
        self._note("bump", len(name))
        await self._inner.bump(name)
