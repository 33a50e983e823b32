"""The gateway as an application sees it: whole and streamed answers, streams that break, the cache, the middleware."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route as Path
from tests.gateway.kit import CONTEXT, MESSAGES, fleet
from tests.gateway.test_router import in_order

from asgi_llm_guard import (
    Budget,
    CacheScope,
    Context,
    Guard,
    GuardMiddleware,
    Iterations,
    LimitExceeded,
    ModelAllow,
    ProviderBudget,
    RateLimit,
    Route,
)
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.gateway import (
    Deployment,
    FieldNotAllowed,
    Gateway,
    ModelRequest,
    NotInitialised,
    ProviderFailed,
    RetryRules,
)
from asgi_llm_guard.streams import StreamRules
from asgi_llm_guard.testing import Behaviour, FrozenClock, asgi_client
from asgi_llm_guard.wire.peek import BodyError

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


# ---------------------------------------------------------------------------------------- answers


async def test_chat_and_stream_say_the_same(clock: FrozenClock) -> None:
    """C1: whole or streamed, from a provider of either API, an answer has text, usage, model, deployment and timings."""
    async with fleet(clock, "a", "d", policies=[Budget("$1/1d")]) as made:
        for name in ("a", "d"):
            whole = await made.chat(name)
            chunks = await made.stream(name)
            assert whole.text == "".join(chunk.text for chunk in chunks) == "Echo: say it again please"
            last = next(chunk for chunk in chunks if chunk.usage is not None)
            assert whole.usage is not None
            assert last.usage is not None
            assert whole.usage.total_tokens == last.usage.total_tokens == 16
            assert whole.deployment == last.deployment == name
            assert whole.finish_reason == "stop"
            for timings in (whole.timings, last.timings):
                assert timings is not None
                assert timings.connected_ms is not None
                assert timings.first_ms is not None
                assert timings.first_ms >= timings.connected_ms
        await made.settled()


async def test_tool_calls_are_an_answer(clock: FrozenClock) -> None:
    """C3: a tool call without a word is no empty answer, whole or streamed, not even one without arguments."""
    async with in_order(clock, "a", "d") as made:
        for name in ("a", "d"):
            made[name].script(*[Behaviour.call_tool("look_up")] * 2)
            tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
            whole = await made.chat(name, tools=tools)
            chunks = await made.stream(name, tools=tools)
            assert [call.name for call in whole.tool_calls] == ["look_up"]
            assert [call.name for chunk in chunks for call in chunk.tool_calls if call.name] == ["look_up"]
        assert made.asked == ["a", "a", "d", "d"]
        await made.settled()


async def test_embeddings_and_responses(clock: FrozenClock) -> None:
    """B9: other surfaces go the same way, and cost what they cost."""
    async with fleet(clock, "a", policies=[Budget("$1/1d")]) as made, made.guard.open(CONTEXT):
        embedded = await made.gateway.embed("a", ["one", "two"])
        answered = await made.gateway.respond("a", "say it", max_output_tokens=20)

    assert len(embedded.raw["data"]) == 2
    assert answered.usage is not None
    assert answered.deployment == "a"


async def test_asked_as_anthropic(clock: FrozenClock) -> None:
    """C1: a client of Anthropic's API is answered in it, whoever serves the model."""
    body = {"model": "auto", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
    async with in_order(clock, "a", "d", policies=[Budget("$1/1d")]) as made, made.guard.open(CONTEXT):
        made["a"].script(Behaviour.answer(), Behaviour.error(500))
        for expected in ("a", "d"):
            async with await made.gateway.ask("anthropic", body) as reply:
                answer = await reply.read()
            assert reply.deployment == expected
            assert b'"type":"message"' in answer.replace(b" ", b"")
        await made.settled()


@pytest.mark.parametrize("asked_for", [False, True])
async def test_usage_of_a_stream_is_for_those_who_ask(clock: FrozenClock, asked_for: bool) -> None:
    """The gateway asks streams what they used; a client that did not ask does not see it."""
    body = {"model": "auto", "messages": MESSAGES, "stream": True}
    if asked_for:
        body["stream_options"] = {"include_usage": True}
    async with fleet(clock, "a") as made, made.guard.open(CONTEXT):
        async with await made.gateway.ask("openai", body) as reply:
            told = await reply.read()

        assert (b'"prompt_tokens"' in told) is asked_for
        await made.settled()


async def test_timings_are_told(clock: FrozenClock) -> None:
    """D8: each attempt is told with its times, its class of failure, and what it is charged as."""
    async with in_order(clock, "a", "b") as made:
        made["a"].script(Behaviour.refuse("overloaded"))
        await made.stream()

        failed, good = made.ended
        assert (failed.failure, failed.status, failed.outcome, failed.number) == ("overload", 503, "provider_error", 1)
        assert (good.failure, good.status, good.outcome, good.number) == (None, 200, "measured", 2)
        assert good.model == "openai/model-b"
        assert None not in (good.connected_ms, good.first_ms, good.total_ms, failed.connected_ms, failed.total_ms)


# ---------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("name", ["a", "d"])
@pytest.mark.parametrize(
    "behaviour", [Behaviour.stream_error(after_chunks=2), Behaviour.cut(after_chunks=2)], ids=["error", "cut"]
)
async def test_nothing_switches_after_the_first_words(clock: FrozenClock, name: str, behaviour: Behaviour) -> None:
    """C4: a stream that breaks after its first words ends with an error, and no other deployment is asked."""
    async with in_order(clock, name, "b", policies=[Budget("$1/1d")]) as made:
        made[name].script(behaviour)
        chunks = await made.stream()

        assert chunks[-1].error is not None
        assert "".join(chunk.text for chunk in chunks).startswith("Echo: say")
        assert made["b"].calls == 0
        (record,) = await made.records()
        assert record.outcome == "estimated"
        assert (record.cost_nanousd or 0) >= made[name].total_nanousd
        assert await made.guard.storage.open_holds() == 0


@pytest.mark.parametrize("behaviour", [Behaviour.stream_error(), Behaviour.cut()], ids=["error", "cut"])
async def test_before_the_first_words_another_one_is_asked(clock: FrozenClock, behaviour: Behaviour) -> None:
    """C4: a stream that breaks before its first words has shown the client nothing: another deployment answers."""
    async with in_order(clock, "a", "b") as made:
        made["a"].script(behaviour)
        chunks = await made.stream()

        assert [chunk.error for chunk in chunks if chunk.error] == []
        assert {chunk.deployment for chunk in chunks} == {"b"}
        assert made.asked == ["a", "b"]


async def test_stream_without_anything_is_an_error(clock: FrozenClock) -> None:
    """C4: a stream with neither text nor a tool call is a failure of everybody who gave one."""
    async with in_order(clock, "a", "b", retry=RetryRules(retries=1, jitter=0)) as made:
        made["a"].script(Behaviour.answer(""))
        made["b"].script(Behaviour.answer(""))
        with pytest.raises(ProviderFailed, match="a: empty, status 200; b: empty, status 200"):
            await made.stream()
        await made.settled()  # empty, and billed


async def test_leaving_a_stream_closes_the_connection(clock: FrozenClock) -> None:
    """A client that leaves takes the connection to the provider with it, and pays for what had come."""
    async with fleet(clock, "a", policies=[Budget("$1/1d")]) as made:
        made["a"].script(Behaviour.slow())
        made["a"].release(3)
        async with made.guard.open(CONTEXT):
            stream = made.gateway.stream("a", MESSAGES, max_tokens=20)
            async for chunk in stream:
                if chunk.text:
                    break
            await stream.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
            await made["a"].until(lambda: made["a"].disconnects == 1)
        (record,) = await made.records()
        assert record.outcome == "estimated"
        assert (record.cost_nanousd or 0) >= made["a"].total_nanousd
        assert await made.guard.storage.open_holds() == 0


async def test_cancelled_call_is_charged_and_closed(clock: FrozenClock) -> None:
    """A call that is cancelled before its answer is charged what was held; the provider sees its client leave."""
    async with fleet(clock, "a", policies=[Budget("$1/1d")]) as made:
        made["a"].script(Behaviour.hang())
        task = asyncio.create_task(made.chat("a"))
        await made["a"].until(lambda: made["a"].open == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await made["a"].until(lambda: made["a"].disconnects == 1)

        (record,) = await made.records()
        assert record.outcome == "unknown"
        assert await made.guard.storage.open_holds() == 0


async def test_stream_is_cut_when_its_budget_is_used_up(clock: FrozenClock) -> None:
    """C4: a stream that has used up what it holds, and can have no more, is ended with an error event."""
    policies = [Budget("$0.0004/1d", per="global")]
    guard = {"streams": StreamRules(cut=True), "assumed_output_tokens": 40}
    async with fleet(clock, "a", policies=policies, guard=guard) as made:
        made["a"].script(Behaviour.answer(output_tokens=3_000))
        async with made.guard.open(CONTEXT):
            chunks = [chunk async for chunk in made.gateway.stream("a", MESSAGES)]

        assert chunks[-1].error is not None
        assert chunks[-1].error["code"] == "request_exceeds_budget"
        assert len(chunks) < 1_000


# -------------------------------------------------------------------------------------- providers


class Misbuilt:
    """Somebody's own provider, whose stream is a coroutine."""

    def dialect(self, deployment: Deployment, asked: str) -> str | None:
        return asked

    async def send(self, deployment: Deployment, request: ModelRequest) -> Any:
        return self

    status = 200
    headers = ((b"content-type", b"text/event-stream"),)
    dialect_ = "openai"
    path = "/chat/completions"

    async def __aiter__(self) -> Any:
        return None

    async def aclose(self) -> None:
        pass


class _Answer(Misbuilt):
    dialect = "openai"  # type: ignore[assignment]  # an answer's, not a provider's


class Coroutine(Misbuilt):
    async def send(self, deployment: Deployment, request: ModelRequest) -> Any:
        return _Answer()


class Raising(Misbuilt):
    async def send(self, deployment: Deployment, request: ModelRequest) -> Any:
        raise TimeoutError("of its own")


def own(clock: FrozenClock, provider: Any, **options: Any) -> tuple[Guard, Gateway]:
    guard = Guard(clock=clock)
    deployment = Deployment(provider="mine", model="model", via="mine", api_base="http://127.0.0.1:9")
    return guard, Gateway(guard, [deployment], providers={"mine": provider}, retry=RetryRules(retries=0), **options)


async def test_provider_whose_stream_is_a_coroutine_is_named(clock: FrozenClock) -> None:
    """C4: a stream method that gives a coroutine is reported with the provider's name, and not awaited for ever."""
    guard, gateway = own(clock, Coroutine(), context=CONTEXT)
    with pytest.raises(ProviderFailed) as failed:
        [chunk async for chunk in gateway.stream("mine/model", MESSAGES)]

    assert "Coroutine" in failed.value.failures[0].message
    assert "async generator" in failed.value.failures[0].message
    await guard.aclose()


async def test_own_provider_may_raise_anything(clock: FrozenClock) -> None:
    """An error of somebody's own provider is a failure like another, and told by its class only."""
    guard, gateway = own(clock, Raising(), context=CONTEXT)
    with pytest.raises(ProviderFailed) as failed:
        await gateway.chat("mine/model", MESSAGES)

    assert failed.value.failures[0].kind == "timeout"
    assert "of its own" not in failed.value.failures[0].message
    assert await guard.storage.open_holds() == 0
    await guard.aclose()


# ---------------------------------------------------------------------------------- initialisation


async def test_initialised_once(clock: FrozenClock) -> None:
    """D6: before there are deployments the count is 0 and use is an error that says so; afterwards nothing changes."""
    guard = Guard(clock=clock)
    gateway = Gateway(guard, context=CONTEXT)
    assert len(gateway) == 0
    assert gateway.names == ()
    with pytest.raises(NotInitialised):
        await gateway.chat("auto", MESSAGES)
    one = Deployment(provider="openai", model="gpt-5", api_key="k" * 8)
    assert gateway.initialise([one]) == 1
    assert gateway.initialise([one, Deployment(provider="openai", model="gpt-4o", api_key="k" * 8)]) == 1
    assert [each.model for each in gateway.deployments] == ["gpt-5"]
    assert "auto" in gateway.names
    assert gateway.window("auto") is not None
    await guard.aclose()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "best"}, "strategy"),
        ({"context": 5}, "context"),
        ({"fallbacks": {"a": "b"}}, "models"),
        ({"deployments": []}, "deployments"),
    ],
)
def test_wrong_settings(clock: FrozenClock, options: Mapping[str, Any], said: str) -> None:
    """What is wrong is told when the gateway is made."""
    with pytest.raises(ConfigurationError, match=said):
        Gateway(Guard(clock=clock), **options)


async def test_outside_any_admission(clock: FrozenClock) -> None:
    """Without an admission and without a context nobody is asked; with a context each call has an admission of its own."""
    async with fleet(clock, "a", policies=[RateLimit("2/minute")]) as made:
        with pytest.raises(ContextError, match="no admission"):
            await made.gateway.chat("a", MESSAGES)
        gateway = Gateway(made.guard, made.deployments.values(), context=lambda: Context(caller="job"))
        await gateway.chat("a", MESSAGES)
        [chunk async for chunk in gateway.stream("a", MESSAGES)]
        with pytest.raises(LimitExceeded):
            await gateway.chat("a", MESSAGES)
        assert [record.caller for record in await made.records()] == ["job", "job"]
        await gateway.aclose()
        await made.settled()


async def test_requests_do_not_say_where_they_go(clock: FrozenClock) -> None:
    """T14: a request with an address or a key in it is refused, and nothing is opened."""
    async with fleet(clock, "a") as made, made.guard.open(CONTEXT):
        for field in ({"api_base": "http://127.0.0.1:9"}, {"metadata": {"api_key": "stolen"}}):
            with pytest.raises(FieldNotAllowed):
                await made.gateway.chat("a", MESSAGES, **field)
        with pytest.raises(BodyError):
            await made.gateway.chat("a", MESSAGES, max_tokens="many")
        assert made["a"].calls == 0


# ------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("streamed", [False, True])
async def test_kept_answers_are_given_again(clock: FrozenClock, streamed: bool) -> None:
    """C11, C14: the second of two equal questions of one user asks nobody, and costs nothing."""
    guard = {"cache": Cache(ttl="1h", streams=True)}
    async with fleet(clock, "a", policies=[Budget("$1/1d"), CacheScope()], guard=guard) as made:
        texts = []
        for user in ("ann", "ann", "bob"):
            async with made.guard.open(Context(caller="acme", user=user)):
                if streamed:
                    texts.append(
                        "".join([chunk.text async for chunk in made.gateway.stream("auto", MESSAGES, max_tokens=20)])
                    )
                    while made.guard.cache is not None and made.guard.cache._tasks:  # noqa: ASYNC110 - it is stored in the background
                        await asyncio.sleep(0)
                else:
                    texts.append((await made.gateway.chat("auto", MESSAGES, max_tokens=20)).text)

        assert set(texts) == {"Echo: say it again please"}
        assert made["a"].calls == 2
        assert sorted(record.outcome for record in await made.records()) == ["cached", "measured", "measured"]
        await made.settled()


# ------------------------------------------------------------------------------------- middleware


def application(made: Any, *, streamed: bool = False) -> Any:
    async def answer(request: Request) -> Any:
        body = await request.json()
        model, messages = body["model"], body["messages"]
        if not streamed:
            completion = await made.gateway.chat(model, messages, max_tokens=20)
            return JSONResponse(completion.raw)

        async def pieces() -> AsyncIterator[bytes]:
            async with await made.gateway.ask("openai", {**body, "stream": True, "max_tokens": 20}) as reply:
                async for piece in reply:
                    yield piece

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app = Starlette(routes=[Path("/v1/chat/completions", answer, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=made.guard, routes=[Route("/v1/chat/completions")])
    return app


@pytest.mark.parametrize("streamed", [False, True])
async def test_request_and_gateway_are_one_call(clock: FrozenClock, streamed: bool) -> None:
    """C1: a guarded route that asks the gateway for a group is one iteration and one record, at the price of who answers."""
    policies = [Iterations(9), Budget("$1/1d"), ModelAllow(["mistral/*"])]
    async with fleet(clock, "a", "e", policies=policies) as made:
        async with asgi_client(application(made, streamed=streamed)) as client:
            response = await client.post(
                "/v1/chat/completions",
                json={"model": "auto", "messages": MESSAGES, "max_tokens": 20},
                headers={"x-session-id": "s"},
            )
            assert response.status_code == 200, response.text
            assert "Echo" in response.text
        (record,) = await made.records()
        assert (record.deployment, record.model, record.session) == ("e", "model-e", "s")
        await made.settled()


async def test_group_is_admitted_if_one_of_its_models_is(clock: FrozenClock) -> None:
    """B2: the middleware admits a group while one of its providers has budget, and refuses it when none has."""
    policies = [ProviderBudget({"openai": "$0.00001/1d", "mistral": "$0.0012/1d"})]
    async with fleet(clock, "a", "e", policies=policies) as made:
        async with asgi_client(application(made)) as client:
            body = {"model": "auto", "messages": MESSAGES, "max_tokens": 20}
            statuses = [(await client.post("/v1/chat/completions", json=body)).status_code for _ in range(4)]
        assert statuses[0] == 200
        assert statuses[-1] == 402
        assert made["a"].calls == 0
        await made.settled()


async def test_group_that_nobody_asks_for_is_held_for_as_the_dearest(clock: FrozenClock) -> None:
    """A request for a group, in which no call is seen, is charged as a call to the dearest of its models."""

    async def answer(_request: Request) -> Any:
        return JSONResponse({})

    async with fleet(clock, "a", "c", "b", policies=[Budget("$1/1d")]) as made:
        app = Starlette(routes=[Path("/v1/chat/completions", answer, methods=["POST"])])
        app.add_middleware(GuardMiddleware, guard=made.guard, routes=[Route("/v1/chat/completions")])
        async with asgi_client(app) as client:
            await client.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES, "max_tokens": 20})
        (record,) = await made.records()
        assert (record.model, record.outcome, record.deployment) == ("model-c", "unmetered", None)


async def test_name_of_nobody_is_refused_by_the_middleware(clock: FrozenClock) -> None:
    """A name that no gateway serves is a model without a price, as ever."""
    async with fleet(clock, "a", policies=[Budget("$1/1d")]) as made:
        assert made.guard.known_models("auto")
        assert made.guard.known_models("nobody") == ()
        async with asgi_client(application(made)) as client:
            response = await client.post("/v1/chat/completions", json={"model": "nobody", "messages": MESSAGES})
        assert response.status_code == 403


async def test_refusal_inside_is_what_the_client_gets(clock: FrozenClock) -> None:
    """B3: a gateway that our limits let ask nobody gives the client the refusal, and no server error."""
    async with fleet(clock, "a", limits={"a": {"rpm": 1}}) as made:
        async with asgi_client(application(made)) as client:
            body = {"model": "auto", "messages": MESSAGES, "max_tokens": 20}
            statuses = [(await client.post("/v1/chat/completions", json=body)).status_code for _ in range(2)]
        assert statuses == [200, 429]
        await made.settled()


# ------------------------------------------------------------------------------------ many at once


async def test_many_at_once_over_three_deployments(clock: FrozenClock) -> None:
    """D9: of 200 calls at once no deployment gets one more than it takes, and all of them get as many; the bill agrees."""
    limits = {"a": {"rpm": 20}, "b": {"rpm": 30}, "c": {"rpm": 40}}
    async with fleet(
        clock, "a", "b", "c", limits=limits, policies=[Budget("$10/1d")], retry=RetryRules(retries=0)
    ) as made:
        async with made.guard.open(CONTEXT):
            calls = [made.gateway.chat("auto", MESSAGES, max_tokens=20) for _ in range(200)]
            answers = await asyncio.gather(*calls, return_exceptions=True)

        assert sum(isinstance(answer, LimitExceeded) for answer in answers) == 110
        assert {name: made[name].calls for name in "abc"} == {"a": 20, "b": 30, "c": 40}
        await made.settled()


async def test_stream_that_is_left_may_be_read_to_its_end(clock: FrozenClock) -> None:
    """Where it is told to, the gateway reads a stream on that its client has left, and charges what it reports."""
    guard = {"streams": StreamRules(drain="read", total_s=60)}
    async with fleet(clock, "a", policies=[Budget("$1/1d")], guard=guard) as made:
        made["a"].script(Behaviour.slow())
        made["a"].release(2)
        async with made.guard.open(CONTEXT):
            stream = made.gateway.stream("a", MESSAGES, max_tokens=20)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
        made["a"].release()
        await made["a"].idle()
        async with asyncio.timeout(60):
            while not await made.records():  # noqa: ASYNC110 - nobody waits for it
                await asyncio.sleep(0)
        (record,) = await made.records()
        assert record.outcome == "measured"
        assert made["a"].disconnects == 0
        await made.settled()


async def test_stream_that_outlives_its_admission_is_closed(clock: FrozenClock) -> None:
    """A stream that nobody closed ends with its admission: charged by what had come, its connection closed."""
    async with fleet(clock, "a", policies=[Budget("$1/1d")]) as made:
        made["a"].script(Behaviour.slow())
        made["a"].release(2)
        async with made.guard.open(CONTEXT):
            body = {"model": "a", "messages": MESSAGES, "stream": True}
            reply = await made.gateway.ask("openai", body)
        await made["a"].until(lambda: made["a"].disconnects == 1)
        (record,) = await made.records()
        assert record.outcome == "estimated"
        assert made.gateway.stats.in_flight("a") == 0
        await reply.aclose()


async def test_one_deployment_may_serve_the_fallback_too(clock: FrozenClock) -> None:
    """C2: a deployment that serves every model of its provider is asked for the model that takes over as well."""
    limits = {"a": {"model": "*", "name": "all"}}
    listed = {"openai/model-a": ["openai/model-b"]}
    async with fleet(clock, "a", limits=limits, fallbacks=listed, retry=RetryRules(retries=0)) as made:
        made["a"].script(Behaviour.error(404))
        with pytest.raises(ProviderFailed):
            await made.chat("openai/model-a", fallbacks=False)
        clock.advance(seconds=120)
        made["a"].script(Behaviour.error(500))
        answer = await made.chat("openai/model-a")
        assert answer.model == "model-b"
        assert [request.model for request in made["a"].requests] == ["model-a", "model-a", "model-b"]
        await made.settled()
