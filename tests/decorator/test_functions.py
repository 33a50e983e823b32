"""`@guarded` on functions of every kind, outside FastAPI and outside HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import anyio.to_thread
import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from starlette.requests import Request
from tests.decorator.values import ANSWER, BOUND, CONTEXT, HELD, MODEL, USED, chunk, iterations, ledger, new_guard
from tests.middleware.asgi import request

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    Guard,
    Iterations,
    LimitExceeded,
    RateLimit,
    Usage,
    current_admission,
    guarded,
)
from asgi_llm_guard.admission import ActiveCall, current_scope
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.policies.base import Policy

pytestmark = pytest.mark.anyio

BUDGET = Budget("$1/1d", per="caller")


def outside(*policies: Policy, **options: Any) -> tuple[Guard, dict[str, Any]]:
    """A guard, and the arguments that let `@guarded` work outside HTTP, for calls of which the bound is known."""
    guard = new_guard(*(policies or (Iterations(3), BUDGET)), **options)
    return guard, {"guard": guard, "context": CONTEXT, **BOUND}


# ------------------------------------------------------------------------------- functions


async def test_coroutine_function() -> None:
    """A coroutine function outside HTTP is admitted under its guard, settled, and refused at the limit."""
    guard, options = outside()

    @guarded(**options)
    async def ask(question: str) -> dict[str, Any]:
        assert current_admission().context == CONTEXT
        return {**ANSWER, "question": question}

    for _ in range(3):
        assert (await ask("why"))["question"] == "why"
    with pytest.raises(LimitExceeded) as caught:
        await ask("why")

    assert caught.value.denied.code == "session_iterations_exhausted"
    assert await ledger(guard) == [("measured", USED)] * 3


async def test_plain_function_in_a_thread() -> None:
    """A plain function stays plain: it is admitted, settled and refused in the worker thread that calls it."""
    guard, options = outside()

    @guarded(**options)
    def ask() -> dict[str, Any]:
        assert current_admission().context == CONTEXT
        return ANSWER

    assert not inspect.iscoroutinefunction(ask)
    for _ in range(3):
        await anyio.to_thread.run_sync(ask)
    with pytest.raises(LimitExceeded):
        await anyio.to_thread.run_sync(ask)
    assert await ledger(guard) == [("measured", USED)] * 3


def test_plain_function_without_any_event_loop() -> None:
    """A script without an event loop needs nothing but the decorator."""
    guard, options = outside()

    @guarded(**options)
    def ask() -> dict[str, Any]:
        return ANSWER

    for _ in range(3):
        ask()
    with pytest.raises(LimitExceeded):
        ask()
    assert asyncio.run(ledger(guard)) == [("measured", USED)] * 3


async def test_plain_function_on_the_event_loop() -> None:
    """A plain function that would block the event loop raises instead, and says what to do."""
    guard, options = outside()

    @guarded(**options)
    def ask() -> None: ...

    with pytest.raises(ContextError, match="worker thread"):
        ask()
    assert await ledger(guard) == []


async def test_no_admission_and_no_guard() -> None:
    """Without an admission and without `guard=` the error names the function and `guard=`."""

    async def ask() -> None: ...

    with pytest.raises(ContextError, match=r"ask: no admission is open.*guard="):
        await guarded()(ask)()
    with pytest.raises(ContextError, match=r"partial.*guard="):
        await guarded()(functools.partial(ask))()


async def test_context_from_the_arguments() -> None:
    """`context` may be a function of the arguments: each caller has its own limit."""
    guard = new_guard(Iterations(1, per="caller"))

    @guarded(guard=guard, context=lambda tenant: Context(caller=tenant))
    async def ask(tenant: str) -> str:
        return tenant

    assert [await ask("one"), await ask("two")] == ["one", "two"]
    with pytest.raises(LimitExceeded):
        await ask("one")


async def test_anonymous_without_a_context() -> None:
    """Without `context` all calls are those of the shared anonymous caller."""
    guard = new_guard(Iterations(1, per="caller"))

    @guarded(guard=guard)
    async def ask() -> Context:
        return current_admission().context

    assert await ask() == Context()
    with pytest.raises(LimitExceeded):
        await ask()


# ----------------------------------------------------------------- methods and other callables


class Client:
    """Everything in a class that can be called."""

    options: dict[str, Any]

    @guarded()
    async def method(self, text: str) -> tuple[str, str]:
        return type(self).__name__, text

    @staticmethod
    @guarded()
    async def outer_static(text: str) -> str:
        return text

    @guarded()
    @staticmethod
    async def inner_static(text: str) -> str:
        return text

    @classmethod
    @guarded()
    async def outer_class(cls, text: str) -> tuple[str, str]:
        return cls.__name__, text

    @guarded()
    @classmethod
    async def inner_class(cls, text: str) -> tuple[str, str]:
        return cls.__name__, text

    async def __call__(self, text: str) -> str:
        return text


async def test_methods() -> None:
    """Methods, static methods and class methods are guarded in either order of the decorators."""
    guard = new_guard(Iterations(10))
    client = Client()
    async with guard.open(CONTEXT):
        assert await client.method("a") == ("Client", "a")
        assert [await client.outer_static("b"), await Client.inner_static("c")] == ["b", "c"]
        assert await client.inner_static("c") == "c"
        assert await Client.outer_class("d") == ("Client", "d")
        assert await client.inner_class("e") == ("Client", "e")
    assert await iterations(guard) == 6


async def test_partials_and_callable_objects() -> None:
    """Partials of partials and objects with an asynchronous `__call__` are awaited inside the admission."""
    guard = new_guard(Iterations(10))

    async def ask(one: str, two: str, three: str) -> str:
        assert current_admission().seen
        return one + two + three

    asking = guarded()(functools.partial(functools.partial(ask, "a"), "b"))
    calling = guarded()(Client())
    async with guard.open(CONTEXT):
        assert await asking("c") == "abc"
        assert await calling("text") == "text"
        assert current_admission().seen
    assert await iterations(guard) == 2
    assert [outcome for outcome, _ in await ledger(guard)] == ["unmetered"] * 2


def test_wrapper_looks_like_the_function() -> None:
    """Name, documentation, signature and annotations are the function's own."""

    async def ask(question: str, /, times: int = 3, *, loud: bool = False) -> str:
        """Asks."""
        return question * times

    wrapper = guarded()(ask)
    assert (wrapper.__name__, wrapper.__doc__) == ("ask", "Asks.")
    assert inspect.signature(wrapper) == inspect.signature(ask, eval_str=True)
    assert inspect.iscoroutinefunction(wrapper)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ([lambda: None], {}, "needs parentheses"),
        (["5"], {}, "expected policies"),
        ([], {"max_output_tokens": 5}, "need a model"),
        ([], {"input": lambda: ""}, "need a model"),
        ([], {"context": CONTEXT}, "for use with guard="),
    ],
)
def test_wrong_arguments(arguments: list[Any], options: dict[str, Any], message: str) -> None:
    """What cannot be meant is a configuration error when the module is loaded."""
    with pytest.raises(ConfigurationError, match=message):
        guarded(*arguments, **options)


@pytest.mark.parametrize("value", [5, type("Empty", (), {})])
def test_wrong_targets(value: Any) -> None:
    """So is decorating what cannot be called, or a class without HTTP methods of its own."""
    with pytest.raises(ConfigurationError, match="@guarded"):
        guarded()(value)


# ------------------------------------------------------------------------------ generators


async def stream() -> AsyncIterator[dict[str, Any]]:
    yield chunk("hel")
    yield chunk("lo", last=True)


async def test_async_generator() -> None:
    """An async generator is claimed when it is first pulled, metered by its items, and settled at its end."""
    guard, options = outside()
    ask = guarded(**options)(stream)
    items = ask()
    assert await guard.storage.open_holds() == 0
    assert [item async for item in items] == [chunk("hel"), chunk("lo", last=True)]
    assert await ledger(guard) == [("measured", USED)]


async def test_generator_pulled_from_other_tasks() -> None:
    """A generator of which every item is pulled in a task of its own sees its admission at each step."""
    guard, options = outside()

    @guarded(**options)
    async def ask() -> AsyncIterator[object]:
        for number in range(3):
            yield number, current_admission().context
        yield chunk(None, last=True)

    items = ask()
    seen = [await asyncio.create_task(pull(items)) for _ in range(4)]
    with pytest.raises(StopAsyncIteration):
        await asyncio.create_task(pull(items))
    assert seen[:3] == [(number, CONTEXT) for number in range(3)]
    assert await ledger(guard) == [("measured", USED)]
    with pytest.raises(ContextError):
        current_admission()


async def pull(items: AsyncIterator[object]) -> object:
    return await anext(items)


def conversation() -> Generator[object, object, str]:
    """Takes what is sent, survives a ValueError, and gives a result."""
    given: object = yield "first"
    while given != "stop":
        try:
            given = yield ("got", given)
        except ValueError as error:
            given = yield ("caught", str(error))
    return "result"


async def conversation_async() -> AsyncGenerator[object, object]:
    given = yield "first"
    while given != "stop":
        try:
            given = yield ("got", given)
        except ValueError as error:
            given = yield ("caught", str(error))


async def test_what_is_sent_into_an_async_generator() -> None:
    """`asend`, `athrow` and `aclose` reach the function as if it were not decorated."""
    guard, options = outside()
    ask = guarded(**options)(conversation_async)
    items = ask()
    with pytest.raises(TypeError, match="just-started"):
        await items.asend("too early")
    items = ask()
    assert await anext(items) == "first"
    assert await items.asend(1) == ("got", 1)
    assert await items.athrow(ValueError("odd")) == ("caught", "odd")
    assert await items.asend(2) == ("got", 2)
    with pytest.raises(StopAsyncIteration):
        await items.asend("stop")

    items = ask()
    await anext(items)
    await items.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(items)

    items = ask()
    await anext(items)
    with pytest.raises(KeyError):
        await items.athrow(KeyError("not handled"))
    assert [cost for _, cost in await ledger(guard)] == [HELD] * 3


def test_what_is_sent_into_a_generator() -> None:
    """`send`, `throw`, `close` and the result reach the function, and its caller, as if it were not decorated."""
    guard, options = outside()
    ask = guarded(**options)(conversation)

    def whole() -> Generator[object, object, object]:
        return (yield from ask())

    items = whole()
    assert next(items) == "first"
    assert items.send(1) == ("got", 1)
    assert items.throw(ValueError("odd")) == ("caught", "odd")
    assert items.send(2) == ("got", 2)
    with pytest.raises(StopIteration, match="result"):
        items.send("stop")

    items = ask()
    next(items)
    items.close()
    assert list(items) == []
    assert [cost for _, cost in asyncio.run(ledger(guard))] == [HELD] * 2


def test_generator_is_metered() -> None:
    """A plain generator is metered by its items too."""
    guard, options = outside()

    @guarded(**options)
    def ask() -> Iterator[dict[str, Any]]:
        yield chunk("hel")
        yield chunk("lo", last=True)

    assert len(list(ask())) == 2
    assert asyncio.run(ledger(guard)) == [("measured", USED)]


async def test_abandoned_stream_is_charged_for_its_text() -> None:
    """A generator that is closed half-way costs its input and the text so far, and its cleanup has run."""
    guard, options = outside()
    cleaned = []

    @guarded(**options)
    async def ask() -> AsyncGenerator[dict[str, Any]]:
        try:
            yield chunk("four")
            yield chunk("more", last=True)
        finally:
            cleaned.append(current_admission().context)

    items = ask()
    await anext(items)
    await items.aclose()
    assert cleaned == [CONTEXT]
    assert await ledger(guard) == [("estimated", 100 * 1_000 + 4 * 2_000)]


# -------------------------------------------------------------------------- what is metered


class Odd(BaseModel):
    """A service's own value."""

    text: str = "an answer"


@pytest.mark.parametrize(
    "result, expected",
    [
        (ANSWER, ("measured", USED)),
        (ChatCompletion.model_validate({"id": "c", "created": 0, **ANSWER}), ("measured", USED)),
        ({**ANSWER, "usage": None}, ("unmetered", HELD)),
        ("a text", ("unmetered", HELD)),
        ({"answer": 42}, ("unmetered", HELD)),
        (Odd(), ("unmetered", HELD)),
        (None, ("unmetered", HELD)),
    ],
    ids=["dict", "sdk", "without usage", "text", "own dict", "own model", "nothing"],
)
async def test_return_values(result: object, expected: tuple[str, int]) -> None:
    """A provider's answer is metered; a service's own value says nothing, so the hold stays and shows as unmetered."""
    guard, options = outside()

    @guarded(**options)
    async def ask() -> object:
        return result

    assert await ask() is result
    assert await ledger(guard) == [expected]


async def test_sdk_chunks() -> None:
    """Chunk objects of an SDK are metered as dicts are."""
    guard, options = outside()

    @guarded(**options)
    async def ask() -> AsyncIterator[ChatCompletionChunk]:
        for item in (chunk("hel"), chunk("lo", last=True)):
            yield ChatCompletionChunk.model_validate({"id": "c", "created": 0, **item})

    assert len([item async for item in ask()]) == 2
    assert await ledger(guard) == [("measured", USED)]


async def test_call_inside_supersedes_the_return_value() -> None:
    """A call that is measured inside stands; what the function returns is not charged again."""
    guard, options = outside()

    @guarded(**options)
    async def ask() -> dict[str, Any]:
        async with guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as call:
            call.record(Usage(input_tokens=1, output_tokens=1))
        return ANSWER

    await ask()
    assert await ledger(guard) == [("measured", 3_000)]


class Status(Exception):  # noqa: N818 - as SDKs name them
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code
        self.body: object = None
        self.response: object = None


class ConnectError(Exception):
    pass


class APIConnectionError(Exception):
    """As a provider's client library raises it."""

    def __init__(self) -> None:
        self.__cause__ = ConnectError()


class HTTPStatusError(Exception):
    """As httpx raises it, for whatever service was called."""

    def __init__(self, status_code: int) -> None:
        self.response = Status(status_code)


@pytest.mark.parametrize(
    "error, expected",
    [
        (Status(500), [("provider_error", 0)]),
        (APIConnectionError(), []),
        (ConnectError(), [("unknown", HELD)]),
        (HTTPStatusError(500), [("unknown", HELD)]),
        (TimeoutError(), [("unknown", HELD)]),
        (KeyError("a bug"), [("unknown", HELD)]),
        (asyncio.CancelledError(), [("unknown", HELD)]),
    ],
    ids=["provider's error", "never sent", "another service", "another's error", "timeout", "bug", "cancelled"],
)
async def test_exceptions(error: BaseException, expected: list[tuple[str, int]]) -> None:
    """An exception passes unchanged, and is charged by what it says about the call: only a provider's client library
    says anything, as a function may call other services too."""
    guard, options = outside()

    @guarded(**options)
    async def ask() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await ask()
    assert caught.value is error
    assert await ledger(guard) == expected


# -------------------------------------------------------------------------------- describe


@dataclasses.dataclass
class Form:
    text: str


class Struct(msgspec.Struct):
    text: str


TEXT = "x" * 5_000


@pytest.mark.parametrize(
    "argument",
    [TEXT, [{"role": "user", "content": TEXT}], {"text": TEXT}, Odd(text=TEXT), Form(TEXT), Struct(TEXT)],
    ids=["text", "messages", "dict", "pydantic", "dataclass", "msgspec"],
)
async def test_arguments_are_counted(argument: object) -> None:
    """Without a bound of its own the input is what the arguments say, whatever carries it, plus what is assumed."""
    guard = new_guard(BUDGET, assumed_input_tokens=10)

    @guarded(model=MODEL, max_output_tokens=1, guard=guard)
    async def ask(argument: object) -> int:
        call = scope_call()
        return call.input_tokens

    tokens = await ask(argument)
    assert 5_010 <= tokens <= 5_200


async def test_request_is_not_counted_as_text() -> None:
    """A request among the arguments is no text: its headers are not the model's input."""
    guard = new_guard(BUDGET, assumed_input_tokens=10)

    @guarded(model=MODEL, max_output_tokens=1, guard=guard)
    async def ask(request: Request) -> int:
        return scope_call().input_tokens

    scope = request("/", headers=[(b"x-long", b"x" * 10_000)]).scope
    assert await ask(Request(scope)) == 10


async def test_input_function() -> None:
    """`input` says what will be sent; `input_tokens` says how much."""
    guard = new_guard(BUDGET)

    @guarded(model=MODEL, input=lambda topic: f"Write about {topic}" * 100, max_output_tokens=1, guard=guard)
    async def by_text(topic: str) -> int:
        return scope_call().input_tokens

    @guarded(model=MODEL, input_tokens=7, max_output_tokens=1, guard=guard)
    async def by_number(topic: str) -> int:
        return scope_call().input_tokens

    assert 1_700 <= await by_text("owls") <= 1_800
    assert await by_number("owls") == 7


def scope_call() -> Call:
    """The call that this code runs in, as it was described."""
    scope = current_scope()
    assert isinstance(scope, ActiveCall)
    assert scope.call is not None
    return scope.call


# ------------------------------------------------------------------------- several policies


async def test_two_decorators_on_one_function() -> None:
    """Two decorators are one call under the policies of both, and the lower limit of two on one meter holds."""
    guard = new_guard(Iterations(10))

    @guarded(Iterations(2), BUDGET)
    @guarded(Iterations(5), **BOUND)
    async def ask() -> dict[str, Any]:
        return ANSWER

    async with guard.open(Context(caller="acme", session="s")):
        await ask()
        await ask()
        with pytest.raises(LimitExceeded, match="limit 2"):
            await ask()
    assert await ledger(guard) == [("measured", USED)] * 2
    assert await iterations(guard, Context(caller="acme", session="s")) == 2


async def test_policies_add_to_the_guards() -> None:
    """The decorator's policies come on top of the guard's: either may refuse."""
    guard = new_guard(Iterations(2))
    strict, loose = guarded(Iterations(1, name="strict"))(stream), guarded(Iterations(9, name="loose"))(stream)
    async with guard.open(CONTEXT):
        assert len([item async for item in strict()]) == 2
        with pytest.raises(LimitExceeded, match="strict"):
            await anext(strict())
        assert len([item async for item in loose()]) == 2
        with pytest.raises(LimitExceeded, match="iterations"):
            await anext(loose())


async def test_rate_is_taken_once_per_call() -> None:
    """A rate in `@guarded` counts its calls; one that the enclosing request holds already is not counted again."""
    guard = new_guard(RateLimit("2/hour", per="caller"))

    @guarded(RateLimit("2/hour", per="caller"), RateLimit("3/hour", per="caller", name="own"))
    async def ask() -> str:
        return "answer"

    async with guard.open(CONTEXT):
        assert [await ask() for _ in range(3)] == ["answer"] * 3
        with pytest.raises(LimitExceeded, match="own"):
            await ask()
    async with guard.open(CONTEXT):
        pass
    with pytest.raises(LimitExceeded, match="caller_rate"):
        await guard.open(CONTEXT).__aenter__()


async def test_rate_of_nested_calls_is_taken_once() -> None:
    """Two decorators with a rate on one meter take one unit for one call."""
    guard = new_guard()
    rate = RateLimit("2/hour", per="caller")
    ask = guarded(rate)(guarded(rate)(stream))
    async with guard.open(CONTEXT):
        for _ in range(2):
            assert len([item async for item in ask()]) == 2
        with pytest.raises(LimitExceeded, match="caller_rate"):
            await anext(ask())


async def test_slot_lasts_as_long_as_the_call() -> None:
    """A slot in `@guarded` is taken when its call begins and free when it has ended."""
    guard = new_guard()
    ask = guarded(Concurrency(1, per="caller"))(stream)
    async with guard.open(CONTEXT):
        items = ask()
        await anext(items)
        with pytest.raises(LimitExceeded, match="concurrency"):
            await anext(ask())
        assert len([item async for item in items]) == 1
        assert len([item async for item in ask()]) == 2


async def test_concurrent_calls() -> None:
    """Of twenty concurrent calls under a limit of seven exactly seven run, each seeing its own call."""
    guard, options = outside(Iterations(7), BUDGET)
    running = 0

    @guarded(**options)
    async def ask(number: int) -> int:
        nonlocal running
        running += 1
        before = scope_call()
        await asyncio.sleep(0)
        assert scope_call() is before
        return number

    answers = await asyncio.gather(*(ask(number) for number in range(20)), return_exceptions=True)
    assert running == 7
    assert sum(isinstance(answer, LimitExceeded) for answer in answers) == 13
    assert len(await ledger(guard)) == 7


async def test_concurrent_threads() -> None:
    """The same holds for plain functions in threads."""
    guard, options = outside(Iterations(7), BUDGET)
    ask: Callable[[], Any] = guarded(**options)(lambda: ANSWER)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(8) as pool:
        calls = [loop.run_in_executor(pool, copy_context().run, ask) for _ in range(20)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, LimitExceeded) for answer in answers) == 13
    assert await ledger(guard) == [("measured", USED)] * 7


async def test_error_that_a_function_returns_is_its_own_word() -> None:
    """An error body as a return value does not prove that no call was billed before it: the hold is charged."""
    guard, options = outside(Iterations(5))

    @guarded(**options)
    async def answer() -> dict[str, object]:
        return {"error": {"message": "no", "type": "server_error", "param": None, "code": None}}

    await answer()
    (record,) = await guard.storage.records()
    assert (record.outcome, record.cost_nanousd) == ("unmetered", HELD)
