"""`guard.call(cache_key=...)`, and what a request says to its cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as StarletteRoute
from starlette.testclient import TestClient
from tests.cache.kit import ADA, BOB, MODEL, USAGE, cache_of, chat

from asgi_llm_guard import CacheScope, Guard, GuardMiddleware, Iterations, LimitExceeded, Route
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.identity import ScopeUser

pytestmark = pytest.mark.anyio


def caching(*policies: Any) -> Guard:
    return Guard([*policies, CacheScope()], cache=Cache())


class Answering:
    """Makes calls with a key, and counts how often the provider was needed."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.made = 0

    async def ask(self, key: Any, answer: Callable[[int], Any] = lambda made: f"answer {made}") -> Any:
        async with self.guard.call(model=MODEL, input_tokens=100, max_output_tokens=10, cache_key=key) as call:
            if call.hit:
                return call.value
            self.made += 1
            call.record(USAGE)
            value = answer(self.made)
            call.keep(value)
            return value


async def test_what_is_kept_is_given_again() -> None:
    """C14: with the same key the same value is given, for nothing."""
    answering = Answering(caching(Iterations(1, per="caller")))
    async with answering.guard.open(ADA):
        assert [await answering.ask({"q": "Hi"}) for _ in range(3)] == ["answer 1"] * 3
        with pytest.raises(LimitExceeded):
            await answering.ask({"q": "Ho"})
    outcomes = [(record.outcome, record.tokens) for record in await answering.guard.storage.records()]
    assert outcomes == [("measured", 120), ("cached", 0), ("cached", 0)]
    async with answering.guard.open(BOB):
        assert await answering.ask({"q": "Hi"}) == "answer 2"


@pytest.mark.parametrize("value", ["text", 1, 1.5, True, ["a"], {"a": {"b": [1, None]}}, chat()], ids=repr)
async def test_every_json_value_is_kept(value: Any) -> None:
    """A value that is the same once it was JSON is given as it was kept."""
    answering = Answering(caching())
    async with answering.guard.open(ADA):
        for _ in range(2):
            assert await answering.ask("k", lambda _: value) == value
    assert answering.made == 1


class Title(msgspec.Struct):
    title: str


@pytest.mark.parametrize(
    "value",
    [
        Title("a"), {1: "a"}, ("a",), b"bytes", object(), float("nan"), {"a"},
        chat(choice={"finish_reason": "tool_calls"}), {"candidates": [], "error": {"code": 500}},
    ],
    ids=range(9),
)  # fmt: skip
async def test_what_is_not_the_same_is_not_kept(value: Any) -> None:
    """C13, T8: a value that JSON would change, or an answer of a provider that may not be kept, is not kept, and counted."""
    answering = Answering(caching())
    async with answering.guard.open(ADA):
        for _ in range(2):
            await answering.ask("k", lambda _: value)
    assert answering.made == 2
    stats = cache_of(answering.guard).stats()
    assert (stats["unstored"], stats["hits"]) == (2, 0)
    assert stats["reasons"]


async def test_what_fails_is_not_kept() -> None:
    """T8: a block that is left with an error keeps nothing, and the next call is made."""
    answering = Answering(caching())
    async with answering.guard.open(ADA):
        with pytest.raises(ConnectionError):
            async with answering.guard.call(model=MODEL, cache_key="k") as call:
                call.keep("half of it")
                raise ConnectionError
        async with answering.guard.call(model=MODEL, cache_key="k") as call:
            assert not call.hit
        assert await answering.ask("k") == "answer 1"


async def test_who_asks_the_same_waits() -> None:
    """T8: of calls with one key at the same time one is made."""
    answering = Answering(caching(Iterations(1, per="caller")))
    async with answering.guard.open(ADA):
        assert set(await asyncio.gather(*(answering.ask("k") for _ in range(10)))) == {"answer 1"}


async def test_a_refused_call_stands_in_nobodys_way() -> None:
    """A call that was refused when it had the lead lets go of it."""
    answering = Answering(caching(Iterations(1, per="session")))
    async with answering.guard.open(ADA.__class__(caller="ada", session="s")):
        await answering.ask("other")
        with pytest.raises(LimitExceeded):
            await answering.ask("k")
    async with answering.guard.open(ADA.__class__(caller="ada", session="t")):
        assert await answering.ask("k") == "answer 2"


async def test_the_description_counts() -> None:
    """C11: two calls with one key that are described differently are two answers."""
    guard = caching()
    async with guard.open(ADA):
        for described in ({"model": MODEL}, {"model": "openai/gpt-4o"}, {"model": MODEL, "max_output_tokens": 5}):
            async with guard.call(**described, cache_key="k") as call:
                assert not call.hit
                call.keep("v")


async def test_keys_that_are_no_values_pass() -> None:
    """C12: a call whose key cannot be told is made, and not kept."""
    answering = Answering(caching())
    async with answering.guard.open(ADA):
        assert [await answering.ask({"q": object()}) for _ in range(2)] == ["answer 1", "answer 2"]


async def test_wrong_uses_are_told() -> None:
    """A key without a cache, and a call outside any admission, are errors."""
    with pytest.raises(ConfigurationError, match="cache="):
        Guard([]).call(model=MODEL, cache_key="k")
    with pytest.raises(ConfigurationError, match="cache="):
        Guard([]).call_sync(model=MODEL, cache_key="k")
    with pytest.raises(ContextError):
        async with caching().call(model=MODEL, cache_key="k"):
            pass
    with pytest.raises(ContextError), caching().call_sync(model=MODEL, cache_key="k"):
        pass


def test_synchronous_code() -> None:
    """C14: synchronous code has the same cache."""
    guard = caching(Iterations(1, per="caller"))

    def ask() -> Any:
        with guard.call_sync(model=MODEL, cache_key={"q": "Hi"}) as call:
            if not call.hit:
                call.record(USAGE)
                call.value = "answer"
                call.keep(call.value)
            return call.value

    with guard.open_sync(ADA):
        with pytest.raises(ConnectionError), guard.call_sync(model=MODEL, cache_key="other") as call:
            call.call.release()
            raise ConnectionError
        assert [ask() for _ in range(3)] == ["answer"] * 3
    assert cache_of(guard).stats()["hits"] == 2


def test_requests_say_what_their_cache_may() -> None:
    """T8: `Cache-Control` of a request holds for the calls that are made for it, on a guarded route or not."""
    guard = Guard([CacheScope()], cache=Cache(), identity=ScopeUser())
    answering = Answering(guard)

    async def ask(request: Request) -> JSONResponse:
        return JSONResponse(await answering.ask("k"))

    app = Starlette(routes=[StarletteRoute("/ask", ask, methods=["POST"]), StarletteRoute("/page", ask)])
    app.add_middleware(GuardMiddleware, guard=guard, routes=[Route("/ask", dialect=None)])

    async def as_ada(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "user": _Ada()}, receive, send)

    client = TestClient(as_ada)
    ask_for = [{}, {}, {"cache-control": "no-cache"}, {"cache-control": "max-age=60, no-store"}, {}]
    assert [client.post("/ask", headers=headers).json() for headers in ask_for] == [
        "answer 1", "answer 1", "answer 2", "answer 3", "answer 2"
    ]  # fmt: skip
    assert [client.get("/page", headers=headers).json() for headers in ask_for] == [
        "answer 2", "answer 2", "answer 4", "answer 5", "answer 4"
    ]  # fmt: skip


class _Ada:
    is_authenticated = True
    identity = display_name = "ada"
