"""What becomes of calls whose answer does not come, or not to its end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from typing import Any

import pytest
from tests.exits.kit import CONTEXT, Stage
from tests.hooks.kit import Way, admitted, asked, hooked, in_thread, library_of, over, pieces
from tests.hooks.test_answers import ANSWER, COST, STREAM, STREAMED, outcomes, the_hold

from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("error", ["ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"])
async def test_never_sent(offline: Stage, way: Way, error: str) -> None:
    """What was not sent costs nothing, not even a call."""

    def provider(request: Any) -> Any:
        raise getattr(library_of(way), error)("no", request=request)

    async with over(offline, way, provider) as client:
        with pytest.raises(getattr(library_of(way), error)):
            await client.post(asked())

    assert await outcomes(offline) == []
    assert (await offline.counters())[0] == 0


@pytest.mark.parametrize("error", ["ReadTimeout", "ReadError", "WriteError", "RemoteProtocolError", "CloseError"])
async def test_sent_and_not_answered(offline: Stage, way: Way, error: str) -> None:
    """What was sent may have been billed: it is charged what it held."""

    def provider(request: Any) -> Any:
        raise getattr(library_of(way), error)("no", request=request)

    async with over(offline, way, provider) as client:
        with pytest.raises(getattr(library_of(way), error)):
            await client.post(asked())

    assert await outcomes(offline) == [("unknown", await the_hold(offline))]


async def test_error_of_the_transport_itself(offline: Stage, way: Way) -> None:
    """Whatever a transport below raises passes as it is, and the call is settled."""

    def provider(request: Any) -> Any:
        raise ZeroDivisionError

    async with over(offline, way, provider) as client:
        with pytest.raises(ZeroDivisionError):
            await client.post(asked())

    assert await outcomes(offline) == [("unknown", await the_hold(offline))]


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503, 529])
async def test_provider_errors(stage: Stage, way: Way, status: int) -> None:
    """An error of the provider reaches the client as it is, costs no money, and one call."""
    stage.provider.script(Behaviour.error(status, retry_after=7))
    async with admitted(stage, way) as client:
        response = await client.post(asked())

    assert (response.status_code, response.headers["retry-after"]) == (status, "7")
    assert "asgi_llm_guard" not in response.extensions
    (record,) = await stage.settled(calls=1)
    assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":'])
async def test_error_page_of_a_proxy(offline: Stage, way: Way, body: bytes) -> None:
    """An error that is not the provider's is one all the same: there was no answer."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(502, headers={"content-type": "text/html"}, content=pieces(way, [body]))

    async with over(offline, way, provider) as client:
        assert (await client.post(asked())).status_code == 502

    assert await outcomes(offline) == [("provider_error", 0)]


async def test_error_that_is_not_read(offline: Stage, way: Way) -> None:
    """An error whose body nobody reads is an error."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(503, content=pieces(way, [b"x"]))

    async with over(offline, way, provider) as client:
        await client.chunks(asked(), most=0)
        await client.chunks(asked(), most=1)

    assert await outcomes(offline) == [("provider_error", 0)] * 2


async def test_error_that_was_billed(offline: Stage, way: Way) -> None:
    """An error that tells what it used is charged that."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(500, json={"error": {"message": "late"}, "usage": ANSWER["usage"]})

    async with over(offline, way, provider) as client:
        await client.post(asked())

    ((outcome, cost),) = await outcomes(offline)
    assert (outcome, cost) == ("measured", COST)


@pytest.mark.parametrize("behaviour", [Behaviour.cut(after_chunks=3), Behaviour.stream_error(after_chunks=3)])
async def test_stream_that_breaks_off(stage: Stage, way: Way, behaviour: Behaviour) -> None:
    """A stream that breaks off is charged for what came through: no less than billed, no more than held."""
    stage.provider.script(behaviour)
    async with admitted(stage, way) as client:
        try:
            await client.chunks(asked(stream=True))
        except library_of(way).RemoteProtocolError:
            assert behaviour.cut_after is not None

    (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"
    assert record.cost_nanousd is not None
    assert record.estimate_nanousd is not None
    assert 0 < stage.provider.total_nanousd <= record.cost_nanousd < record.estimate_nanousd


@pytest.mark.parametrize("behaviour", [Behaviour.cut(), Behaviour.empty(), Behaviour.malformed()])
async def test_answer_that_cannot_be_read(stage: Stage, way: Way, behaviour: Behaviour) -> None:
    """An answer that is broken or empty may have been billed in full: the hold is charged."""
    stage.provider.script(behaviour)
    async with admitted(stage, way) as client:
        try:
            await client.post(asked())
        except library_of(way).RemoteProtocolError:
            assert behaviour.cut_after is not None

    (record,) = await stage.settled(calls=1, exact=False)
    assert record.cost_nanousd == record.estimate_nanousd


@pytest.mark.parametrize("stream", [False, True])
async def test_success_without_usage(stage: Stage, way: Way, stream: bool) -> None:
    """An answer that does not tell what it used is charged what it held, and marked."""
    stage.provider.script(Behaviour.no_usage())
    async with admitted(stage, way) as client:
        await client.chunks(asked(stream=stream))

    (record,) = await stage.settled(calls=1, exact=False)
    assert (record.outcome, record.cost_nanousd) == ("unmetered", record.estimate_nanousd)


async def test_client_that_leaves(stage: Stage, way: Way) -> None:
    """A client that closes a stream early closes the provider's too, and is charged for what was generated."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(3)
    async with admitted(stage, way) as client:
        await client.chunks(asked(stream=True), most=3)
        await stage.provider.until(lambda: stage.provider.disconnects == 1)

    (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"
    assert stage.provider.bill[0].output_tokens == 3


async def test_client_that_has_seen_all(offline: Stage, way: Way) -> None:
    """A client that closes a stream when it has seen its last event has had all of it."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(200, headers=STREAMED, content=pieces(way, [STREAM, b": more\n\n"]))

    async with over(offline, way, provider, include_usage=False) as client:
        await client.chunks(asked(stream=True), most=1)

    assert await outcomes(offline) == [("measured", COST)]


async def test_abandoned_stream(offline: Stage, way: Way) -> None:
    """A stream that is neither read nor closed is settled when it is collected."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(200, headers=STREAMED, content=pieces(way, [STREAM[:150], STREAM[150:]]))

    async with over(offline, way, provider) as client:
        made = client.client.build_request("POST", "/chat/completions", json=asked(stream=True))
        if way.endswith("async"):
            response = await client.client.send(made, stream=True)
        else:
            response = client.client.send(made, stream=True)
        assert await offline.storage.open_holds() == 1 + 1  # the call, and the slot of its admission
        del response
        gc.collect()
        await offline.settlements.until(1)

    assert [outcome for outcome, _ in await outcomes(offline)] == ["unknown"]


async def test_abandoned_in_the_middle(offline: Stage) -> None:
    """A stream that was read in part is charged for that part when it is collected."""

    def provider(request: Any) -> Any:
        return library_of("httpx2 async").Response(
            200, headers=STREAMED, content=pieces("httpx2 async", [STREAM[:150], STREAM[150:]])
        )

    async with over(offline, "httpx2 async", provider, include_usage=False) as client:
        made = client.client.build_request("POST", "/chat/completions", json=asked(stream=True))
        response = await client.client.send(made, stream=True)
        chunks = response.aiter_raw()
        await anext(chunks)
        del response, chunks
        gc.collect()
        await offline.settlements.until(1)

    assert [outcome for outcome, _ in await outcomes(offline)] == ["estimated"]


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
async def test_stream_that_outlasts_its_admission(stage: Stage, library: str) -> None:
    """A stream that is left open in a request that is over is charged for what had come by then."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    way: Any = f"{library} async"
    async with hooked(stage, way) as client:
        async with stage.guard.open(CONTEXT):
            made = client.client.build_request("POST", "/chat/completions", json=asked(stream=True))
            response = await client.client.send(made, stream=True)
            chunks = response.aiter_bytes()
            await anext(chunks)
        (record,) = await stage.storage.records()
        await response.aclose()

    assert record.outcome == "estimated"
    assert await stage.settled(calls=1, exact=False)


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
async def test_cancelled_while_it_waits(stage: Stage, library: str) -> None:
    """A call that is cancelled before its answer came is charged what it held."""
    stage.provider.script(Behaviour.hang())
    way: Any = f"{library} async"
    async with admitted(stage, way) as client:
        task = asyncio.create_task(client.post(asked()))
        await stage.provider.until(lambda: stage.provider.open == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    (record,) = await stage.settled(calls=1, exact=False)
    assert (record.outcome, record.cost_nanousd) == ("unknown", record.estimate_nanousd)


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
async def test_cancelled_in_the_stream(stage: Stage, library: str) -> None:
    """A call that is cancelled while its answer comes is charged for what came."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    way: Any = f"{library} async"
    seen = asyncio.Event()

    async def read(client: Any) -> None:
        async with client.client.stream("POST", "/chat/completions", json=asked(stream=True)) as response:
            number = 0
            async for _ in response.aiter_bytes():
                number += 1
                if number == 2:
                    seen.set()

    async with admitted(stage, way) as client:
        task = asyncio.create_task(read(client))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "estimated"


async def test_work_that_outlives_its_admission(stage: Stage, way: Way) -> None:
    """A call that goes on after its admission has ended is charged exactly, under the same context."""
    stage.provider.script(Behaviour.hang())
    async with hooked(stage, way) as client:
        async with stage.guard.open(CONTEXT):
            task = asyncio.create_task(client.post(asked()))
            await stage.provider.until(lambda: stage.provider.open == 1)
        stage.provider.release()
        await task

    (record,) = await stage.settled(calls=1)
    assert (record.outcome, record.session) == ("measured", CONTEXT.session)


async def test_streams_in_threads(stage: Stage) -> None:
    """Synchronous streams in many threads at a time are each charged exactly."""
    with stage.guard.httpx_client_sync(base_url=stage.base_url, trust_env=False) as client:

        def one() -> None:
            with client.stream("POST", "/chat/completions", json=asked(stream=True)) as response:
                for _ in response.iter_bytes():
                    pass

        def all_of_them() -> None:
            context = contextvars.copy_context()
            threads = [threading.Thread(target=context.copy().run, args=(one,)) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        async with stage.guard.open(CONTEXT):
            await in_thread(all_of_them)

    await stage.settled(calls=16)
