"""Stops: what was running ends, with a last event, charged for what was seen; what comes new is refused."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from tests.exits.kit import CONTEXT, MODEL, Stage, body_of
from tests.operations.kit import CHAT, reading, served

from asgi_llm_guard import GuardMiddleware, LimitExceeded, RateLimit
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

ALL = Stop(scope="all", reason="fire")
STREAMS = ["/own", "/function", "/hook" + CHAT, "/opaque" + CHAT, "/llm" + CHAT]
SESSION = Stop(scope="session", subject="s", caller="anonymous")


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stop", [ALL, SESSION], ids=["all", "session"])
async def test_a_stream_that_runs_is_ended(stage: Stage, path: str, stop: Stop) -> None:
    """S8: a stop ends streams in the middle: whole events, the last one says why, the provider's connection is closed,
    and the call is charged once, no less than its bill and no more than its hold."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(3)
    async with served(stage) as server, reading(server, path) as answer:
        await answer.until(b"two")
        stage.guard.set_stops([stop])
        await answer.rest()
        assert answer.response.status_code == 200
        assert "stopped" in str(answer.events[-1]), answer.text
        await stage.provider.until(lambda: stage.provider.open == 0)
        records = await stage.settled(calls=1, exact=False)
        assert [record.cost_nanousd or 0 for record in records] > [0]


@pytest.mark.parametrize("path", ["/wait" + CHAT, "/llm" + CHAT, "/hook" + CHAT])
async def test_who_waits_for_a_provider_is_refused(stage: Stage, path: str) -> None:
    """S8: a request that waits for its answer gets the refusal at once, and the call is charged what it holds."""
    stage.provider.script(Behaviour.hang())
    async with served(stage) as server:
        asking = asyncio.create_task(server.request(path, content=body_of(stream=path.startswith("/hook"))))
        await stage.provider.until(lambda: stage.provider.open == 1)
        stage.guard.set_stops([ALL])
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "stopped")
        records = await stage.settled(calls=1, exact=False)
        assert [record.outcome for record in records] == ["unknown"]


async def test_what_nobody_sees_ends_by_itself(stage: Stage) -> None:
    """S8: a handler that calls a provider by a client of its own is left to end, and charged exactly."""
    stage.provider.script(Behaviour.hang())
    async with served(stage) as server:
        asking = asyncio.create_task(server.request("/wait-opaque" + CHAT, content=body_of()))
        await stage.provider.until(lambda: stage.provider.open == 1)
        stage.guard.set_stops([ALL])
        stage.provider.release()
        assert (await asking).status_code == 200
        await stage.settled(calls=1)


async def test_what_is_new_is_refused_and_takes_nothing(stage: Stage) -> None:
    """S8: requests and calls that are stopped get 403 and move no counter; M16: health is answered; the end of the
    stop lets them pass."""
    async with served(stage) as server:
        stage.guard.set_stops([ALL])
        for path in (*STREAMS, "/wait" + CHAT):
            answer = await server.request(path, content=body_of(stream=True))
            assert (answer.status_code, answer.headers["x-should-retry"]) == (403, "false"), path
            assert b"stopped" in answer.content
        assert (await server.request("/health")).status_code == 200
        assert (await server.request("/health", method="GET")).status_code == 200
        stage.guard.set_stops([])
        assert stage.guard.engine.overrides.stops is None
        assert (await server.request("/wait" + CHAT, content=body_of())).status_code == 200
        await stage.settled(calls=1, requests=9)


@pytest.mark.parametrize("subject", ["gpt-test", "openai/*", "OpenAI/GPT-Test"])
async def test_a_model_is_stopped_for_calls(stage: Stage, subject: str) -> None:
    """S8: a model stop refuses calls to the model wherever they are dispatched, and no others."""
    stage.guard.set_stops([Stop(scope="model", subject=subject)])
    async with stage.guard.open(CONTEXT):
        with pytest.raises(LimitExceeded, match="stopped") as refused:
            async with stage.guard.call(model=MODEL, input_tokens=1, max_output_tokens=1):
                pytest.fail("it was granted")
        assert (refused.value.denied.code, refused.value.denied.status) == ("stopped", 403)
        async with stage.guard.call(
            provider="anthropic", model="claude-sonnet-4-5", input_tokens=1, max_output_tokens=1
        ) as call:
            call.release()
    assert (await stage.counters())[:2] == (0, 0)


async def test_a_model_stop_ends_only_its_streams(stage: Stage) -> None:
    """S8: of two streams in one job, the one of the stopped model ends."""
    stage.provider.script(Behaviour.slow(), Behaviour.slow())
    async with stage.guard.open(CONTEXT):
        described = stage.describe("one two three")
        async with stage.guard.call(**described) as one:
            stream = one.stream(stage.chunks("one two three"))
            stage.provider.release(2)
            await anext(stream)
            assert stage.guard.stop(Stop(scope="model", subject="another")) == 0
            assert stage.guard.stop(Stop(scope="model", subject=MODEL)) == 1
            with pytest.raises(LimitExceeded):
                while True:
                    await anext(stream)
        async with stage.guard.call(**described) as again:  # it was ended once, and nothing is refused afterwards
            again.release()
    assert await stage.storage.open_holds() == 0


async def test_a_halted_admission_claims_no_more(stage: Stage) -> None:
    """S8: after a job was ended once, nothing is claimed in it any more; other jobs go on."""
    async with stage.guard.open(CONTEXT):
        assert stage.guard.stop(SESSION) == 1
        assert stage.guard.stop(SESSION) == 0
        with pytest.raises(LimitExceeded, match="stopped"):
            await stage.complete()
    async with stage.guard.open(CONTEXT):
        await stage.complete()
    await stage.settled(calls=1)


async def test_a_growing_stream_holds_no_more(stage: Stage) -> None:
    """S8: what a running call wants to hold in addition is refused like any new call."""
    async with stage.guard.open(CONTEXT), stage.guard.call(**stage.describe("one")) as call:
        stage.guard.engine.overrides.stops = None
        assert call.call is not None
        stage.guard.set_stops([ALL])
        denied = await call.grow(stage.guard.describe(MODEL, input_tokens=1, max_output_tokens=50))
        assert denied is not None
        assert denied.code == "stopped"
        call.release()
    assert await stage.storage.open_holds() == 0


async def test_a_stop_that_comes_while_a_call_is_admitted(stage: Stage) -> None:
    """S8: a stop that is set while the storage is asked holds for that call: it is not sent, and given back."""
    reserve = stage.storage.reserve

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(stage.storage, name)

        async def reserve(self, *arguments: object) -> object:
            answer = await reserve(*arguments)  # type: ignore[arg-type]
            stage.guard.set_stops([Stop(scope="model", subject=MODEL)])
            return answer

    async with stage.guard.open(CONTEXT):
        stage.guard.measure(lambda _: Slow())  # type: ignore[arg-type,return-value]
        with pytest.raises(LimitExceeded, match="stopped"):
            async with stage.guard.call(model=MODEL, input_tokens=1, max_output_tokens=1):
                pytest.fail("it was granted")
        stage.guard.measure(None)
    assert await stage.storage.open_holds() == 0
    assert (await stage.counters())[1:] == (0, 0)


@pytest.mark.parametrize("stopped, status", [(["gpt-other"], 200), (["gpt-other", "gpt-test"], 403)])
async def test_a_gateway_asks_who_is_not_stopped(stage: Stage, stopped: list[str], status: int) -> None:
    """S8: at every dispatch of a gateway a stopped model is passed over; where all are stopped, the call is refused."""
    served_by = [
        {"model_name": "auto", "litellm_params": {"model": model, "api_base": stage.base_url, "api_key": "sk"}}
        for model in ("openai/gpt-other", MODEL)
    ]
    stage.guard.prices = PriceBook.snapshot(
        overrides={MODEL: {"input": 1, "output": 2}, "openai/gpt-other": {"input": 1, "output": 2}}
    )
    async with Gateway(stage.guard, served_by, context=CONTEXT) as gateway:
        stage.guard.set_stops([Stop(scope="model", subject=model) for model in stopped])
        for _ in range(4):
            if status == 200:
                answer = await gateway.chat("auto", [{"role": "user", "content": "one"}])
                assert "gpt-test" in str(answer.deployment)
            else:
                with pytest.raises(LimitExceeded) as refused:
                    await gateway.chat("auto", [{"role": "user", "content": "one"}])
                assert refused.value.denied.code == "stopped"
    assert {bill.model for bill in stage.provider.bill} <= {"gpt-test"}
    assert len(stage.provider.bill) == (4 if status == 200 else 0)


async def test_m16_probes_are_answered_whatever_is_stopped(stage: Stage) -> None:
    """M16: health answers while everything is stopped and every budget is spent, also where every path is guarded."""
    stage.guard.set_stops([ALL])
    stage.guard.policies = (*stage.guard.policies, *stage.guard.engine.bind([RateLimit("0/minute", per="global")]))
    app = Starlette(
        routes=[Mount("/ops", stage.guard.health_app(at="/ops"))],
        middleware=[Middleware(GuardMiddleware, guard=stage.guard)],
    )
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/ops/healthz")).status_code == 200
        assert (await client.get("/ops/readyz")).status_code == 200
        assert (await client.post("/ops/healthz")).status_code == 405
        assert (await client.post("/ops/other")).status_code == 403
