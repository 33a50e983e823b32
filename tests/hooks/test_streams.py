"""How long streams through a guarded client may last, and what becomes of those that are ended."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from tests.exits.kit import CONTEXT, Stage
from tests.hooks.kit import LIBRARIES, Client, Way, admitted, asked, hooked, in_thread, library_of, text_of
from tests.hooks.test_answers import outcomes

from asgi_llm_guard import Budget
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

LONG = Behaviour.answer(output_tokens=4_000)


def unlimited(**more: Any) -> dict[str, Any]:
    """A request that sets no limit of its own, of which a short answer is expected."""
    body = asked(stream=True, **more)
    del body["max_tokens"]
    return body


async def test_cut(stage: Stage, way: Way) -> None:
    """A stream that has used up what can be held for it ends with OpenAI's own error event, and is charged."""
    stage.provider.script(LONG)
    room = Budget("$0.001/1d", name="room")  # 500 tokens
    options: Any = {"assumed_output_tokens": 100, "streams": StreamRules(cut=True)}
    async with hooked(stage, way, **options) as client, stage.guard.open(CONTEXT, extra=[room]):
        seen = await client.chunks(unlimited())

    last = b"".join(seen).rstrip().rsplit(b"\n\n", 1)[-1]
    assert b'"code":"budget_exhausted"' in last or b'"code":"request_exceeds_budget"' in last
    assert 0 < len(text_of(seen[:-1]).split()) < 4_000
    await stage.provider.idle()
    ((outcome, cost),) = await outcomes(stage)
    assert outcome == "estimated"
    assert cost


async def test_not_cut(stage: Stage, way: Way) -> None:
    """Unless told to, a stream goes on, and what it used is charged past the limit."""
    stage.provider.script(LONG)
    room = Budget("$0.001/1d", name="room")
    async with (
        hooked(stage, way, assumed_output_tokens=100) as client,
        stage.guard.open(CONTEXT, extra=[room]),
    ):
        seen = await client.chunks(unlimited())

    assert len(text_of(seen).split()) == 4_000
    await stage.provider.idle()
    assert await outcomes(stage) == [("measured", stage.provider.total_nanousd)]


async def test_grown(stage: Stage, way: Way) -> None:
    """A stream that lasts longer than expected holds more while it lasts, and is charged what it used."""
    stage.provider.script(LONG)
    async with admitted(stage, way, assumed_output_tokens=100, streams=StreamRules(cut=True)) as client:
        seen = await client.chunks(unlimited())

    assert len(text_of(seen).split()) == 4_000
    await stage.settled(calls=1)


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
@pytest.mark.parametrize("rules", [StreamRules(idle_s=0.05), StreamRules(total_s=0.05)], ids=["idle", "total"])
async def test_deadline(stage: Stage, library: str, rules: StreamRules) -> None:
    """A stream from which nothing more comes is ended with the dialect's own error event, and closed."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    way: Any = f"{library} async"
    async with admitted(stage, way, streams=rules) as client:
        seen = await client.chunks(asked(stream=True))
        await stage.provider.until(lambda: stage.provider.disconnects == 1)

    assert b'"code":"stream_timeout"' in seen[-1]
    ((outcome, _),) = await outcomes(stage)
    assert outcome == "estimated"


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
async def test_deadline_of_a_synchronous_client(stage: Stage, library: str) -> None:
    """A synchronous client learns of a deadline with the next part that comes."""
    way: Any = f"{library} sync"
    async with admitted(stage, way, streams=StreamRules(total_s=1e-6)) as client:
        seen = await client.chunks(asked(stream=True))

    assert b'"code":"stream_timeout"' in seen[-1]
    assert text_of(seen) == ""
    assert stage.provider.calls == len(await outcomes(stage)) == 1


async def test_left_and_read_to_its_end(stage: Stage, way: Way) -> None:
    """With `drain="read"` a stream that its client leaves is read to its end, and charged what it reports."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    async with admitted(stage, way, streams=StreamRules(drain="read", total_s=30)) as client:
        seen = await client.chunks(asked(stream=True), most=2)
        assert seen
        stage.provider.release()
        await stage.settlements.until(1)

    (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"
    assert stage.provider.disconnects == 0


async def test_read_on_when_its_admission_has_ended(stage: Stage, way: Way) -> None:
    """What is read to its end goes on when the request that asked for it is over, as it is when its client leaves."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    async with hooked(stage, way, streams=StreamRules(drain="read", total_s=30)) as client:
        async with stage.guard.open(CONTEXT):
            await client.chunks(asked(stream=True), most=2)
        stage.provider.release()
        await stage.settlements.until(1)

    (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
async def test_left_and_not_read_for_ever(stage: Stage, library: str) -> None:
    """What is read to its end has an end, whatever the provider does."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    way: Any = f"{library} async"
    async with admitted(stage, way, streams=StreamRules(drain="read", total_s=0.2)) as client:
        await client.chunks(asked(stream=True), most=2)
        await stage.settlements.until(1)

    ((outcome, _),) = await outcomes(stage)
    assert outcome == "estimated"


async def opened(client: Client) -> Any:
    """A stream of which nothing was read yet."""
    http = client.client
    request = http.build_request("POST", "/chat/completions", json=asked(stream=True))
    return await http.send(request, stream=True)


@pytest.mark.parametrize("library", LIBRARIES)
async def test_forgotten(stage: Stage, library: str) -> None:
    """T18: a stream that is neither read to its end nor closed ends with its admission: it is charged what came of it,
    the provider sees its reader go, and whoever reads on is told."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    way: Any = f"{library} async"
    async with hooked(stage, way) as client:
        async with stage.guard.open(CONTEXT):
            response = await opened(client)
            parts = response.aiter_raw()
            assert await anext(parts)
        await stage.provider.idle()
        with pytest.raises(LIBRARIES[library].ReadError, match="has ended"):
            await anext(parts)

    assert stage.provider.disconnects == 1
    ((outcome, cost),) = await outcomes(stage)
    assert outcome == "estimated"
    assert cost


@pytest.mark.parametrize("library", LIBRARIES)
async def test_forgotten_and_read_to_its_end(stage: Stage, library: str) -> None:
    """With `drain="read"` a stream that is forgotten is read to its end, and charged what it reports."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    way: Any = f"{library} async"
    async with hooked(stage, way, streams=StreamRules(drain="read", total_s=30)) as client:
        async with stage.guard.open(CONTEXT):
            response = await opened(client)
            assert await anext(response.aiter_raw())
        stage.provider.release()
        await stage.settlements.until(1)

    assert stage.provider.disconnects == 0
    assert await outcomes(stage) == [("measured", stage.provider.total_nanousd)]


@pytest.mark.parametrize("library", LIBRARIES)
async def test_handed_to_a_task(stage: Stage, library: str) -> None:
    """A stream that a task reads which goes on is settled at its end, as billed, though its admission ended before."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    begun = asyncio.Event()

    async def read(response: Any) -> bytes:
        parts = []
        async for part in response.aiter_raw():
            parts.append(part)
            begun.set()
        return b"".join(parts)

    way: Any = f"{library} async"
    async with hooked(stage, way) as client:
        async with stage.guard.open(CONTEXT):
            reading = asyncio.create_task(read(await opened(client)))
            await begun.wait()
        stage.provider.release()
        assert text_of([await reading]) == "Echo: one two three"

    assert await outcomes(stage) == [("measured", stage.provider.total_nanousd)]
    assert stage.provider.disconnects == 0


async def test_read_while_the_guard_drains(stage: Stage, way: Way) -> None:
    """T18: a stream that is still read when the guard ends is charged what came of it, and goes no further."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)

    def begin(http: Any) -> Any:
        response = http.send(http.build_request("POST", "/chat/completions", json=asked(stream=True)), stream=True)
        parts = response.iter_raw()
        assert next(parts)
        return parts

    async with hooked(stage, way) as client, stage.guard.open(CONTEXT):
        if way.endswith(" async"):
            parts = (await opened(client)).aiter_raw()
            assert await anext(parts)
        else:
            parts = await in_thread(lambda: begin(client.client))
        await stage.guard.drain(0)
        (record,) = await stage.storage.records()
        with pytest.raises(library_of(way).ReadError, match="has ended"):
            await (anext(parts) if way.endswith(" async") else in_thread(lambda: next(parts)))
        await stage.provider.idle()
        stage.guard.resume()

    assert record.outcome == "estimated"
    assert stage.provider.disconnects == 1


async def test_dropped(stage: Stage, way: Way) -> None:
    """T18: a response that is dropped without being closed is settled, and the provider sees its reader go."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(2)
    async with admitted(stage, way) as client:
        if way.endswith(" async"):
            await opened(client)
        else:
            http = client.client
            request = http.build_request("POST", "/chat/completions", json=asked(stream=True))
            await in_thread(lambda: http.send(request, stream=True) and None)
        gc.collect()
        await stage.provider.idle()
        await stage.settlements.until(1)

    assert stage.provider.disconnects == 1
    assert len(await outcomes(stage)) == 1
