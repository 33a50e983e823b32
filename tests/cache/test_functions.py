"""`@guarded(cache=True)`: return values that are given again."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any

import msgspec
import pydantic
import pytest
from openai.types.chat import ChatCompletion
from starlette.responses import JSONResponse, StreamingResponse
from tests.cache.kit import ADA, BOB, MODEL, USAGE, cache_of, chat

from asgi_llm_guard import CacheScope, Context, Guard, Iterations, LimitExceeded, RateLimit, guarded
from asgi_llm_guard.admission import current_scope
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.errors import ConfigurationError

pytestmark = pytest.mark.anyio

made: list[Any] = []
"""What the functions below were called with, since the test began."""


@pytest.fixture(autouse=True)
def _nothing_made() -> None:
    made.clear()


def caching(*policies: Any) -> Guard:
    return Guard([*policies, CacheScope()], cache=Cache())


class Title(msgspec.Struct):
    title: str


@dataclass
class Point:
    x: int


class Model(pydantic.BaseModel):
    text: str


class Colour(Enum):
    RED = 1


@guarded(model=MODEL, input_tokens=10, max_output_tokens=10, cache=True)
async def answer(question: str, *, words: int = 10) -> str:
    made.append((question, words))
    current_scope().record(USAGE)  # type: ignore[union-attr]
    return f"{question} in {words}"


@guarded(model=MODEL, cache=True)
def answer_sync(question: str) -> str:
    made.append(question)
    return question.upper()


async def test_the_value_is_given_again() -> None:
    """C14: a call with the same arguments gets the same value, the function does not run, and nothing is charged."""
    guard = caching(Iterations(2, per="caller"))
    async with guard.open(ADA):
        for _ in range(3):
            assert await answer("Why") == "Why in 10"
        assert await answer(words=10, question="Why") == "Why in 10"
        assert await answer("Why", words=3) == "Why in 3"
    assert made == [("Why", 10), ("Why", 3)]
    outcomes = [(record.outcome, record.tokens) for record in await guard.storage.records()]
    assert outcomes == [("measured", 120), ("cached", 0), ("cached", 0), ("cached", 0), ("measured", 120)]
    async with guard.open(BOB):
        await answer("Why")
    assert len(made) == 3


async def test_outside_any_admission() -> None:
    """A function with a guard of its own has that guard's cache, each caller for itself."""
    guard = caching(RateLimit("3/hour", per="caller"))
    context = functools.partial(_who)

    @guarded(guard=guard, context=context, cache=lambda who: who)
    async def of(who: str) -> str:
        made.append(who)
        return who

    assert [await of("ada"), await of("ada"), await of("bob")] == ["ada", "ada", "bob"]
    assert made == ["ada", "bob"]
    await of("ada")
    with pytest.raises(LimitExceeded, match="rate"):  # a hit is a request, too
        await of("ada")


def _who(who: str) -> Context:
    return Context(caller=who)


def test_synchronous_functions() -> None:
    """C14: plain functions have the same cache."""
    guard = caching()
    with guard.open_sync(ADA):
        assert [answer_sync("a"), answer_sync("a"), answer_sync("b")] == ["A", "A", "B"]
    assert made == ["a", "b"]
    assert cache_of(guard).stats()["hits"] == 1


async def test_who_asks_the_same_waits() -> None:
    """T8: of calls with the same arguments at the same time one runs."""
    async with caching().open(ADA):
        assert set(await asyncio.gather(*(answer("Why") for _ in range(10)))) == {"Why in 10"}
    assert len(made) == 1


async def test_without_a_cache_the_function_runs() -> None:
    """A guard without a cache runs the function each time, asynchronous or not."""
    guard = Guard([CacheScope()])
    async with guard.open(ADA):
        await answer("Why")
        await answer("Why")
    assert len(made) == 2
    await asyncio.to_thread(_twice_sync, guard)
    assert len(made) == 4


def _twice_sync(guard: Guard) -> None:
    with guard.open_sync(ADA):
        answer_sync("a")
        answer_sync("a")


@guarded(cache=True)
async def titled(n: int) -> Title:
    made.append(n)
    return Title(f"t{n}")


@guarded(cache=True)
async def pointed(n: int) -> list[Point]:
    made.append(n)
    return [Point(n)]


@guarded(cache=True)
async def modelled(n: int) -> Model:
    made.append(n)
    return Model(text=f"t{n}")


@guarded(cache=True)
async def later(n: int) -> Later:
    made.append(n)
    return Later(n)


@guarded(cache=True)
async def plain(n: int):  # type: ignore[no-untyped-def]  # noqa: ANN201 - that is the point
    made.append(n)
    return {"n": [n]}


class Later(msgspec.Struct):
    n: int


@pytest.mark.parametrize(
    "function, value",
    [
        (titled, Title("t1")),
        (pointed, [Point(1)]),
        (modelled, Model(text="t1")),
        (later, Later(1)),
        (plain, {"n": [1]}),
    ],
    ids=["struct", "dataclasses", "pydantic", "defined later", "not annotated"],
)
async def test_values_come_back_as_what_they_were(function: Any, value: object) -> None:
    """A value is given again as the type that the function is annotated with."""
    async with caching().open(ADA):
        for _ in range(2):
            given = await function(1)
            assert given == value
            assert type(given) is type(value)
    assert made == [1]


@guarded(cache=True)
async def loose(value: int) -> Any:
    made.append(value)
    return VALUES[value]


@guarded(cache=True)
async def broader(value: int) -> Model:
    made.append(value)
    return Narrower(text="t", more="m")


class Narrower(Model):
    more: str


VALUES = [Title("t"), ("a",), {1: 2}, object(), JSONResponse({}), b"b", {"error": {"code": 1}, "choices": []}]


@pytest.mark.parametrize("value", range(len(VALUES)))
async def test_what_does_not_come_back_is_not_kept(value: int, caplog: pytest.LogCaptureFixture) -> None:
    """C13: a value that would come back as something else is given once, not kept, and the log says why."""
    guard = caching()
    async with guard.open(ADA):
        assert await loose(value) is await loose(value)
    assert made == [value] * 2
    assert cache_of(guard).stats()["unstored"] == 2


async def test_a_subclass_is_not_kept_as_its_base() -> None:
    """C13: a value with more than its annotation says is not kept."""
    guard = caching()
    async with guard.open(ADA):
        assert (await broader(1), await broader(1)) == (Narrower(text="t", more="m"),) * 2
    assert made == [1, 1]


async def test_streaming_responses_are_not_kept() -> None:
    """C13: a response whose body is still to come is not kept."""

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    @guarded(cache=lambda: "key")
    async def stream() -> Any:
        return StreamingResponse(body())

    guard = caching()
    async with guard.open(ADA):
        response = await stream()
        async for _ in response.body_iterator:
            pass
    assert cache_of(guard).stats()["reasons"] == {"it is still being streamed": 1}


@guarded(cache=True)
async def anything(value: Any) -> int:
    made.append(value)
    return len(made)


ARGUMENTS: list[Any] = [
    None, True, 1, 1.5, "1", [1], {"a": 1}, ["list", 1], Title("1"), Point(1), Model(text="1"), Colour.RED,
    date(2026, 1, 1), "2026-01-01", Decimal(1), b"1", {"title": "1"}, ["model", "x", {"title": "1"}], [[1]], {},
]  # fmt: skip


async def test_arguments_are_told_apart_by_value_and_type() -> None:
    """T8: no two arguments that differ share a value."""
    async with caching().open(ADA):
        first = [await anything(value) for value in ARGUMENTS]
        assert sorted(set(first)) == sorted(first) == list(range(1, len(ARGUMENTS) + 1))
        assert [await anything(value) for value in ARGUMENTS] == first


class Secret(pydantic.BaseModel):
    tenant: pydantic.SecretStr


class Half(pydantic.BaseModel):
    text: str = "1"
    tenant: str = pydantic.Field(exclude=True)
    _hidden: str = pydantic.PrivateAttr("")


class Open(pydantic.BaseModel, extra="allow"):
    text: str = "1"


class Wrapped(pydantic.BaseModel):
    inner: Model


class More(Model):
    tenant: str


class Labelled(Point):
    """Not a dataclass itself."""

    def __init__(self, x: int, tenant: str) -> None:
        super().__init__(x)
        self.tenant = tenant


def hidden(text: str) -> Half:
    value = Half(tenant="1")
    value._hidden = text
    return value


@pytest.mark.parametrize(
    "one, other",
    [
        (Secret(tenant=pydantic.SecretStr("a")), Secret(tenant=pydantic.SecretStr("b"))),
        (Half(tenant="a"), Half(tenant="b")),
        (hidden("a"), hidden("b")),
        (Open.model_validate({"tenant": "a"}), Open.model_validate({"tenant": "b"})),
        (Wrapped(inner=More(text="1", tenant="a")), Wrapped(inner=More(text="1", tenant="b"))),
        (Labelled(1, "a"), Labelled(1, "b")),
        ((1, 2), [1, 2]),
    ],
    ids=["secret", "excluded", "private", "extra", "of a subclass", "attribute", "tuple"],
)
async def test_models_are_told_apart_by_all_they_have(one: Any, other: Any) -> None:
    """T8: what a model does not show when it is written down counts as well."""
    async with caching().open(ADA):
        assert await anything(one) != await anything(other)


async def test_functions_are_told_apart_by_more_than_their_names() -> None:
    """T8: two functions of one name do not share values; one without a name cannot be kept."""

    @guarded(cache=True)
    async def say() -> str:
        return "first"

    one = say

    @guarded(cache=True)  # type: ignore[no-redef]
    async def say() -> str:
        return "second"

    async with caching().open(ADA):
        assert [await one(), await say()] == ["first", "second"]
    with pytest.raises(ConfigurationError, match="has no name"):
        guarded(cache=True)(lambda text: text)


@guarded(cache=True)
async def complete(ending: str) -> ChatCompletion:
    made.append(ending)
    return ChatCompletion.model_validate({"created": 1, **chat(choice={"finish_reason": ending})})


async def test_answers_of_sdks_are_judged_like_others() -> None:
    """C13: a function that returns the response of an SDK keeps it only if it is complete."""
    async with caching().open(ADA):
        for ending in ("stop", "length", "stop", "length"):
            assert (await complete(ending)).choices[0].finish_reason == ending
    assert made == ["stop", "length", "length"]


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), print, Title, {"a": {object()}}], ids=range(6))
async def test_arguments_that_cannot_be_told_pass(value: object) -> None:
    """C12: a call whose arguments are more than values runs each time, and is counted with the reason."""
    guard = caching()
    async with guard.open(ADA):
        assert [await anything(value), await anything(value)] == [1, 2]
    stats = cache_of(guard).stats()
    assert (stats["passed"], stats["hits"]) == (2, 0)


async def test_a_value_of_another_release_is_made_anew() -> None:
    """What was kept by a release whose function returned something else is forgotten, and the function runs."""
    guard = caching()

    def release(kind: Any) -> Any:
        async def f(n: int) -> Any:
            made.append(n)
            return kind(n)

        f.__annotations__["return"] = kind
        f.__qualname__ = "f"
        return guarded(cache=lambda n: n)(f)

    async with guard.open(ADA):
        assert await release(Point)(1) == Point(1)
        assert await release(Later)(1) == Later(1)
        await asyncio.sleep(0)
        assert await release(Later)(1) == Later(1)
        assert await release(Later)(1) == Later(1)
    assert made == [1, 1, 1]

    def sync_release(kind: Any) -> Any:
        def f(n: int) -> Any:
            made.append(n)
            return kind(n)

        f.__annotations__["return"] = kind
        f.__qualname__ = "g"
        return guarded(cache=lambda n: n)(f)

    def in_turn() -> None:
        with guard.open_sync(ADA):
            assert sync_release(Point)(2) == Point(2)
            assert sync_release(Later)(2) == Later(2)

    await asyncio.to_thread(in_turn)
    assert made == [1, 1, 1, 2, 2]


async def test_a_type_that_is_never_defined() -> None:
    """A function whose annotation means nothing may return what JSON says by itself."""

    async def lost(n: int) -> Nowhere:  # type: ignore[name-defined]  # noqa: F821 - that is the point
        made.append(n)
        return VALUES[0] if n else {"n": n}

    guard = caching()
    function = guarded(cache=lambda n: n)(lost)
    async with guard.open(ADA):
        for n in (0, 0, 1, 1):
            await function(n)
    assert made == [0, 1, 1]


async def test_what_fails_is_not_kept() -> None:
    """T8: an error is raised, and the next call runs."""

    @guarded(cache=lambda: "key")
    async def fail() -> str:
        made.append(1)
        raise ConnectionError

    async with caching().open(ADA):
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await fail()
    assert made == [1, 1]


def test_what_cannot_be_cached_is_told_at_once() -> None:
    """A function that streams, returns what cannot be kept, or depends on more than its arguments is a wrong setting."""

    async def stream() -> AsyncIterator[str]:
        yield "x"

    def stream_sync() -> Iterator[str]:
        yield "x"

    async def respond() -> JSONResponse:
        return JSONResponse({})

    async def either() -> Title | Later:
        return Title("t")

    outer = 1

    async def closed() -> int:
        return outer

    def speaking(language: str) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            @functools.wraps(function)
            async def speak(value: Any) -> str:
                return f"{language}: {await function(value)}"

            return speak

        return decorate

    async def plain(value: Any) -> int:
        return 1

    @functools.wraps(plain)
    async def early(value: Any) -> int:
        return await late(value) + outer

    with pytest.raises(ConfigurationError, match="decorator"):
        guarded(cache=True)(early)

    async def late(value: Any) -> int:
        return 1

    assert guarded(cache=lambda value: ["de", value])(speaking("de")(plain))

    class Called:
        async def __call__(self) -> int:
            return 1

    for function, message in (
        (stream, "streams"),
        (stream_sync, "streams"),
        (respond, "JSONResponse"),
        (closed, "depends on more"),
        (speaking("de")(plain), "values of a decorator"),
        (either, "Title | .*Later"),
        (functools.partial(anything, 1), "depends on more"),
        (Called(), "depends on more"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            guarded(cache=True)(function)
    with pytest.raises(ConfigurationError, match="cache="):
        guarded(cache="yes")  # type: ignore[arg-type]


async def test_methods_need_a_key() -> None:
    """C12: the object of a method is no value, so without a key its calls pass; with one they are kept."""

    class Service:
        @guarded(cache=True)
        async def plain(self, n: int) -> int:
            made.append(n)
            return n

        @guarded(cache=lambda self, n: n)
        async def keyed(self, n: int) -> int:
            made.append(n)
            return n

    async with caching().open(ADA):
        service = Service()
        for method in (service.plain, service.keyed):
            made.clear()
            await method(1)
            await method(1)
            assert len(made) == (2 if method == service.plain else 1)
