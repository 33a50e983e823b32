"""Another configuration while requests run: all of it or nothing, counters kept, the running ones as they began."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route as Path_

from asgi_llm_guard import Budget, Context, Guard, GuardMiddleware, Iterations, LimitExceeded, RateLimit, Route, guarded
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import Identity, IdentityError, Resolver, header
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.streams import StreamRules

pytestmark = pytest.mark.anyio

MIA = Context(caller="k", user="mia", session="s", agent="scout")


async def count(guard: Guard, context: Context = MIA, most: int = 50) -> int:
    """How many calls are admitted, one after the other."""
    for granted in range(most):
        try:
            async with guard.open(context), guard.call(model="gpt-test", input_tokens=1, max_output_tokens=1):
                pass
        except LimitExceeded:
            return granted
    return most


async def test_counters_are_kept() -> None:
    """A policy of the same name and window counts on under its new limit."""
    guard = Guard([Iterations(3)])
    assert await count(guard) == 3
    guard.replace(policies=[Iterations(5)])
    assert await count(guard) == 2
    guard.replace(policies=[])
    assert await count(guard, most=5) == 5


async def test_what_is_open_goes_on_as_it_began() -> None:
    """A job that is open keeps its policies to its end, also for calls that it makes later."""
    guard = Guard([Iterations(1, name="old")])
    async with guard.open(MIA):
        guard.replace(policies=[Iterations(7, name="new")])
        async with guard.call(model="gpt-test", input_tokens=1, max_output_tokens=1):
            pass
        with pytest.raises(LimitExceeded, match="old"):
            async with guard.call(model="gpt-test", input_tokens=1, max_output_tokens=1):
                pass
    assert await count(guard) == 7


async def test_agents_hold_from_the_next_call_on() -> None:
    """`set_agents` reaches policies that are in use, those of functions too, from their next call on."""
    guard = Guard([Iterations(1, name="all")])

    @guarded(Iterations(50, name="inner"), guard=guard, context=MIA)
    async def work() -> str:
        return "done"

    assert await work() == "done"
    with pytest.raises(LimitExceeded):
        await work()
    guard.set_agents({"scout": {"max_iterations": 3}})
    assert [await work(), await work()] == ["done", "done"]
    with pytest.raises(LimitExceeded):
        await work()
    guard.set_agents({})
    guard.replace(agents={"scout": {"max_iterations": 4}})
    assert await work() == "done"


def known_as(name: str) -> Resolver:
    """Whoever shows the right key is of this name."""

    def identity(scope: Any) -> Identity:
        if dict(scope["headers"]).get(b"authorization") != b"Bearer right":
            raise IdentityError("the key is wrong", status=403)
        return Identity(caller=name)

    return identity


WRONG: list[dict[str, Any]] = [
    {"policies": [Iterations(5), "no policy"]},
    {"policies": [RateLimit("9/minute", lease=3)]},
    {"agents": {"scout": {"max_iterations": "many"}}},
    {"agents": {"scout": {"colour": 1}}},
    {"identity": "nobody"},
    {"session": "x-session-id"},
    {"streams": {"cut": True}},
    {"statuses": {"budget_exhausted": 401}},
    {"prices": {}},
    {"routes": [Route("/a"), Route("/a")]},
    {"routes": [Route("/a", clamp=True)]},
    {"routes": [Route("/a", extra=["no policy"])]},  # type: ignore[list-item]
    {"storage": "memory://"},
    {"hold_wait_s": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{number}-{next(iter(wrong))}" for number, wrong in enumerate(WRONG)])
async def test_a_mistake_changes_nothing(wrong: dict[str, Any]) -> None:
    """One wrong part, or one that cannot change, and nothing of the new configuration is in force."""
    guard = Guard([Iterations(1)], agents={"other": {"max_iterations": 9}})
    before, prices = guard.configuration, guard.prices
    given = {"policies": [Iterations(9)], "agents": {"scout": {"max_iterations": 9}}, "statuses": {}, **wrong}
    with pytest.raises(ConfigurationError):
        guard.replace(**given)
    assert guard.configuration is before
    assert guard.prices is prices
    assert await count(guard) == 1
    assert await count(guard, Context(session="t", agent="other")) == 9


async def test_a_mistake_makes_nothing_known() -> None:
    """What a configuration with a mistake in it counts is counted, shown and reset nowhere."""
    guard = Guard([Iterations(1)])
    fine = RateLimit("1/hour", per="user", name="fine")
    for wrong in ({"policies": [fine, "no policy"]}, {"routes": [Route("/a", extra=[fine]), Route("/a")]}):
        with pytest.raises(ConfigurationError):
            guard.replace(**wrong)
        with pytest.raises(ConfigurationError, match="no policy counts per 'user'"):
            await guard.meters_of("user", "mia")
    with pytest.raises(ConfigurationError):
        guard.replace(routes=[Route("/a", extra=[fine]), Route("/b", extra=["no policy"])])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="no policy counts per 'user'"):
        await guard.meters_of("user", "mia")


async def test_what_was_replaced_is_known_no_more() -> None:
    """Policies that are not in force any more are none of the meters of a subject; those of functions stay."""
    guard = Guard([Iterations(3, name="old"), Iterations(5, name="kept")])

    @guarded(Iterations(9, name="inner"), guard=guard, context=MIA)
    async def work() -> None:
        pass

    await work()
    guard.replace(policies=[Iterations(7, name="kept"), Iterations(8, name="new")])
    meters = await guard.meters_of("session", "s", caller="k")
    assert sorted((meter.policy, meter.limit) for meter, _ in meters) == [("inner", 9), ("kept", 7), ("new", 8)]
    guard.replace(policies=[])
    meters = await guard.meters_of("session", "s", caller="k")
    assert [meter.policy for meter, _ in meters] == ["inner"]


def application(guard: Guard, seen: asyncio.Event, gate: asyncio.Event) -> Starlette:
    async def answer(request: Request) -> Response:
        seen.set()
        await gate.wait()
        return PlainTextResponse(request.url.path)

    routes = [Path_("/a", answer, methods=["POST"]), Path_("/b", answer, methods=["POST"])]
    kept = [Route("/a", extra=[RateLimit("1/hour", per="global", name="a")])]
    return Starlette(routes=routes, middleware=[Middleware(GuardMiddleware, guard=guard, routes=kept)])


async def test_a_middleware_follows() -> None:
    """Requests that begin after the change see the new routes, identity and policies; one that is open ends as it began,
    and each sees one configuration only."""
    guard, seen, gate = Guard(), asyncio.Event(), asyncio.Event()
    transport = httpx2.ASGITransport(app=application(guard, seen, gate))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        open_one = asyncio.create_task(client.post("/a"))
        await seen.wait()
        guard.replace(
            policies=[RateLimit("2/hour", per="caller", name="new")],
            identity=known_as("mia"),
            routes=[Route("/b", streams=StreamRules(cut=True))],
            session=header("x-other"),
        )
        gate.set()
        assert (await open_one).status_code == 200
        assert [(await client.post("/a")).status_code for _ in range(3)] == [200] * 3  # it is no route any more
        mine = {"authorization": "Bearer right"}
        answers = [await client.post("/b", headers=mine) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert json.loads(answers[-1].content)["policy"] == "new"
        assert (await client.post("/b", headers={"authorization": "Bearer wrong"})).status_code == 403
        guard.replace(identity=None)
        assert (await client.post("/b", headers={"authorization": "Bearer wrong"})).status_code == 200


async def test_swaps_under_load_are_whole() -> None:
    """While a configuration is replaced again and again, each request sees policies and identity of the same one."""
    guard = Guard(storage=MemoryStorage())
    mixed: list[tuple[str, str]] = []

    async def answer(request: Request) -> Response:
        admission = request.scope["asgi_llm_guard"]
        mixed.append((admission.context.caller or "", admission.policies[0].name))
        return PlainTextResponse("")

    app = Starlette(
        routes=[Path_("/a", answer, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=guard, routes=[Route("/a", dialect="openai")])],
    )

    def put(name: str) -> None:
        guard.replace(policies=[Iterations(name=name)], identity=known_as(name))

    put("one")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:

        async def ask(number: int) -> None:
            for _ in range(number):  # each begins at another instant
                await asyncio.sleep(0)

            async def body() -> Any:
                for part in (b'{"model":"gpt-test",', b'"messages":[],', b'"max_tokens":1}'):
                    await asyncio.sleep(0)
                    yield part

            head = {"authorization": "Bearer right", "content-type": "application/json"}
            assert (await client.post("/a", content=body(), headers=head)).status_code == 200

        async def swap() -> None:
            for name in itertools.cycle(("two", "one")):
                put(name)
                await asyncio.sleep(0)
                if len(mixed) == 40:
                    return

        await asyncio.gather(swap(), *(ask(number) for number in range(40)))
    assert {caller for caller, _ in mixed} == {"one", "two"}
    assert all(caller == policy for caller, policy in mixed)


async def test_prices_and_statuses_hold_from_the_next_call_on() -> None:
    """Other prices and statuses are those of the next call."""
    guard = Guard([Budget("$1/1d", per="global")])
    with pytest.raises(LimitExceeded, match="no price"):
        async with guard.open(MIA), guard.call(model="gpt-test", input_tokens=1, max_output_tokens=1):
            pass
    guard.replace(
        prices=PriceBook.snapshot(overrides={"openai/gpt-test": {"input": 1_000_000, "output": 1_000_000}}),
        statuses={"request_exceeds_budget": 429},
    )
    with pytest.raises(LimitExceeded) as refused:
        async with (
            guard.open(MIA),
            guard.call(provider="openai", model="gpt-test", input_tokens=1, max_output_tokens=1),
        ):
            pass
    assert refused.value.denied.status == 429
