"""What a provider answers reaches the client as it is, and is charged as it is billed."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
import zlib
from typing import Any

import pytest
import zstandard
from tests.exits.kit import Stage
from tests.hooks.kit import Way, admitted, asked, hooked, in_thread, library_of, over, pieces, text_of

from asgi_llm_guard import Context
from asgi_llm_guard.testing import Behaviour

pytestmark = pytest.mark.anyio

ANSWER = {
    "id": "c-1",
    "object": "chat.completion",
    "model": "gpt-test",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
}
COST = 10 * 1_000 + 5 * 2_000
STREAM = (
    b'data: {"id":"c","object":"chat.completion.chunk","model":"gpt-test",'
    b'"choices":[{"index":0,"delta":{"content":"yes"}}]}\n\n'
    b'data: {"id":"c","object":"chat.completion.chunk","model":"gpt-test","choices":[],'
    b'"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}\n\n'
    b"data: [DONE]\n\n"
)


STREAMED = {"content-type": "text/event-stream"}


async def outcomes(stage: Stage) -> list[tuple[str, int | None]]:
    """How each call ended, and what it was charged; nothing is held any more."""
    assert await stage.storage.open_holds() == 0
    return [(record.outcome, record.cost_nanousd) for record in await stage.storage.records()]


async def the_hold(stage: Stage) -> int:
    (record,) = await stage.storage.records()
    assert record.estimate_nanousd
    return record.estimate_nanousd


async def test_plain(stage: Stage, way: Way) -> None:
    """An answer is of the client's library, the same as without a guard, and charged to the nano-dollar."""
    async with admitted(stage, way) as client:
        response = await client.post(asked())

    assert type(response) is library_of(way).Response
    assert response.json()["choices"][0]["message"]["content"] == "Echo: one two three"
    assert response.extensions["http_version"] == b"HTTP/1.1"
    assert response.elapsed.total_seconds() > 0
    (record,) = await stage.settled(calls=1)
    assert (record.outcome, record.model) == ("measured", "gpt-test")


async def test_stream(stage: Stage, way: Way) -> None:
    """A stream is asked for its usage; a client that did not ask for it does not see the chunk that tells it."""
    async with admitted(stage, way) as client:
        seen = await client.chunks(asked(stream=True))

    assert text_of(seen) == "Echo: one two three"
    assert b'"prompt_tokens"' not in b"".join(seen)
    assert stage.provider.requests[0].body["stream_options"] == {"include_usage": True}
    (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"


async def test_stream_with_usage(stage: Stage, way: Way) -> None:
    """A client that asks for the usage sees it, and its request is sent as it is."""
    async with admitted(stage, way) as client:
        seen = await client.chunks(asked(stream=True, stream_options={"include_usage": True}))

    assert b'"prompt_tokens"' in b"".join(seen)
    await stage.settled(calls=1)


async def test_stream_not_asked_for_usage(stage: Stage, way: Way) -> None:
    """With `include_usage=False` the request is sent as it is, and what does not tell is charged what it held."""
    async with admitted(stage, way, include_usage=False) as client:
        await client.chunks(asked(stream=True))

    assert "stream_options" not in stage.provider.requests[0].body
    (record,) = await stage.settled(calls=1, exact=False)
    assert record.outcome == "unmetered"


async def test_tool_call(stage: Stage, way: Way) -> None:
    """Tool calls are answers like others."""
    stage.provider.script(Behaviour.call_tool("look", at="it"), Behaviour.call_tool("look", at="it"))
    async with admitted(stage, way) as client:
        response = await client.post(asked())
        await client.chunks(asked(stream=True))

    assert response.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
    await stage.settled(calls=2)


async def test_stream_is_not_compressed(stage: Stage, way: Way) -> None:
    """A stream from which something has to be taken out is asked for without compression."""
    stage.provider.script(Behaviour.answer().zipped())
    async with admitted(stage, way) as client:
        seen = await client.chunks(asked(stream=True))

    assert stage.provider.requests[0].headers["accept-encoding"] == "identity"
    assert text_of(seen) == "Echo: one two three"
    assert b'"prompt_tokens"' not in b"".join(seen)
    await stage.settled(calls=1)


@pytest.mark.parametrize("stream", [False, True])
async def test_encoded(stage: Stage, way: Way, stream: bool) -> None:
    """What the provider compresses reaches the client compressed, and is metered."""
    stage.provider.script(Behaviour.answer().zipped())
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    async with admitted(stage, way) as client:
        seen = await client.chunks(asked(**more))

    assert b"Echo" in b"".join(seen)
    await stage.settled(calls=1)


def encoded(name: str, body: bytes) -> bytes:
    match name:
        case "gzip":
            return gzip.compress(body[:20]) + gzip.compress(body[20:])  # of two members
        case "deflate":
            return zlib.compress(body)
        case "bare deflate":
            return zlib.compress(body, wbits=-15)
        case "zstd":
            return zstandard.ZstdCompressor().compress(body)
        case _:
            return body


@pytest.mark.parametrize("name", ["gzip", "deflate", "bare deflate", "zstd", "identity"])
@pytest.mark.parametrize("size", [1, 7, 1_000])
async def test_every_encoding(offline: Stage, way: Way, name: str, size: int) -> None:
    """Whatever the encoding and however it is cut into chunks: the original bytes pass, and a copy is metered."""
    body = encoded(name, json.dumps(ANSWER).encode())
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    headers = {"content-type": "application/json", "content-encoding": name.rsplit(maxsplit=1)[-1]}

    def provider(request: Any) -> Any:
        return library_of(way).Response(200, headers=headers, content=pieces(way, parts))

    async with over(offline, way, provider) as client:
        seen = await raw(client.client, way)

    assert seen == body
    assert await outcomes(offline) == [("measured", COST)]


async def raw(client: Any, way: Way) -> bytes:
    """The bytes of an answer as they came."""
    if way.endswith("async"):
        async with client.stream("POST", "/chat/completions", json=asked()) as response:
            return b"".join([chunk async for chunk in response.aiter_raw()])
    with client.stream("POST", "/chat/completions", json=asked()) as response:
        return b"".join(response.iter_raw())


@pytest.mark.parametrize("name", ["zip", "gzip, zip", "gzip", "gzip, gzip, gzip, gzip, gzip"])
async def test_unreadable_encoding(offline: Stage, way: Way, name: str) -> None:
    """What cannot be decoded passes as it is, and is charged what was held."""
    body = b"not of any encoding"

    def provider(request: Any) -> Any:
        headers = {"content-type": "application/json", "content-encoding": name}
        return library_of(way).Response(200, headers=headers, content=pieces(way, [body]))

    async with over(offline, way, provider) as client:
        seen = await raw(client.client, way)

    assert seen == body
    assert await outcomes(offline) == [("unmetered", await the_hold(offline))]


async def test_large_body_of_few_bytes(offline: Stage, way: Way) -> None:
    """A body that decodes to far more than it has is decoded in pieces, and passes unread."""
    body = gzip.compress(b" " * 50_000_000)

    def provider(request: Any) -> Any:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        return library_of(way).Response(200, headers=headers, content=pieces(way, [body]))

    async with over(offline, way, provider) as client:
        tracemalloc.start()
        try:
            assert len(await raw(client.client, way)) == len(body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert peak < 25_000_000
    assert await outcomes(offline) == [("unmetered", await the_hold(offline))]


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_that_was_read_below(offline: Stage, way: Way, stream: bool) -> None:
    """A transport below may have read the answer already, as those of caches and mocks do."""

    def provider(request: Any) -> Any:
        if stream:
            return library_of(way).Response(200, headers=STREAMED, content=STREAM)
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        return library_of(way).Response(200, headers=headers, content=gzip.compress(json.dumps(ANSWER).encode()))

    async with over(offline, way, provider) as client:
        response = await client.post(asked(stream=stream))

    if stream:
        assert b"yes" in response.content
        assert b"prompt_tokens" not in response.content
    else:
        assert response.json() == ANSWER
    assert await outcomes(offline) == [("measured", COST)]


async def test_no_event_waits_for_another_one(stage: Stage, way: Way) -> None:
    """Each event is there before the provider has begun the next one, the first one too."""
    stage.provider.script(Behaviour.slow())
    async with admitted(stage, way, timeout=10) as client:
        words = await one_by_one(client.client, way, stage)

    assert words == ["Echo: ", "one ", "two ", "three"]
    await stage.settled(calls=1)


async def one_by_one(client: Any, way: Way, stage: Stage) -> list[str]:
    """The words of a streamed answer, each of which is generated when the one before has arrived."""
    words: list[str] = []
    options: Any = {"json": asked(stream=True)}

    def take(chunk: bytes) -> None:
        words.extend(filter(None, [text_of([chunk])]))
        stage.provider.release(1)

    stage.provider.release(1)
    if way.endswith("async"):
        async with client.stream("POST", "/chat/completions", **options) as response:
            async for chunk in response.aiter_bytes():
                take(chunk)
        return words

    def ask() -> None:
        with client.stream("POST", "/chat/completions", **options) as response:
            for chunk in response.iter_bytes():
                take(chunk)

    await in_thread(ask)
    return words


@pytest.mark.parametrize("path", ["/models", "/files"])
async def test_what_is_not_billed_passes(stage: Stage, way: Way, path: str) -> None:
    """Requests that no dialect knows as billed pass untouched, in and outside of admissions, and claim nothing."""
    async with admitted(stage, way) as client:
        response = await client.post({}, path=path)

    assert response.status_code in (404, 405)
    assert stage.provider.calls == 0
    assert await outcomes(stage) == []


async def test_redirect(offline: Stage, way: Way) -> None:
    """A request that is sent on to another place is one call: where it was answered."""

    def provider(request: Any) -> Any:
        if request.url.path.startswith("/v1/chat"):
            return library_of(way).Response(307, headers={"location": "/v2/chat/completions"})
        return library_of(way).Response(200, json=ANSWER)

    async with over(offline, way, provider) as client:
        client.client.follow_redirects = True
        assert (await client.post(asked())).json() == ANSWER

    assert await outcomes(offline) == [("measured", COST)]
    assert (await offline.counters())[0] == 1


async def test_signed_body_is_sent_as_it_is(offline: Stage, way: Way) -> None:
    """A body that was signed is not changed: the provider would refuse it."""
    sent: list[bytes] = []

    def provider(request: Any) -> Any:
        sent.append(request.content)
        return library_of(way).Response(200, json=ANSWER)

    async with over(offline, way, provider) as client:
        await client.post(asked(stream=True), headers={"authorization": "AWS4-HMAC-SHA256 Credential=…".encode()})

    assert json.loads(sent[0]) == asked(stream=True)


async def test_memory_is_flat(offline: Stage, way: Way) -> None:
    """A stream of 100 MB passes without being kept."""
    event = (
        b'data: {"id":"c","model":"gpt-test","choices":[{"index":0,"delta":{"content":"' + b"x" * 60_000 + b'"}}]}\n\n'
    )
    number = 100_000_000 // len(event) + 1

    def provider(request: Any) -> Any:
        return library_of(way).Response(200, headers=STREAMED, content=pieces(way, itertools.repeat(event, number)))

    async with over(offline, way, provider, include_usage=False) as client:
        tracemalloc.start()
        try:
            length = await drained(client.client, way)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert length == number * len(event)
    assert peak < 3_000_000
    await outcomes(offline)


async def drained(client: Any, way: Way) -> int:
    length = 0
    if way.endswith("async"):
        async with client.stream("POST", "/chat/completions", json=asked(stream=True)) as response:
            async for chunk in response.aiter_raw():
                length += len(chunk)
        return length
    with client.stream("POST", "/chat/completions", json=asked(stream=True)) as response:
        for chunk in response.iter_raw():
            length += len(chunk)
    return length


async def test_host_sends_the_bill(offline: Stage, way: Way) -> None:
    """A call is charged to the provider whose host is called, whatever the model is called there."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(200, json={**ANSWER, "model": "openai/gpt-4o"})

    async with over(offline, way, provider) as client:
        await client.post(asked() | {"model": "openai/gpt-4o"}, path="https://openrouter.ai/api/v1/chat/completions")
        await client.post(asked() | {"model": "openai/gpt-4o"}, path="https://api.openai.com/v1/chat/completions")

    records = await offline.storage.records()
    assert [(record.provider, record.model) for record in records] == [
        ("openrouter", "openai/gpt-4o"),
        ("openai", "gpt-4o"),
    ]


async def test_answer_that_is_too_long_to_be_read(stage: Stage, way: Way) -> None:
    """A body beyond what is read passes whole, and is charged what was held; a stream of any length is read."""
    stage.provider.script(Behaviour.big(9_000_000), Behaviour.big(9_000_000))
    async with admitted(stage, way) as client:
        whole = await client.post(asked())
        streamed = await client.chunks(asked(stream=True))

    assert len(whole.content) > 9_000_000
    assert len(b"".join(streamed)) > 9_000_000
    records = await stage.storage.records()
    assert [record.outcome for record in records] == ["unmetered", "measured"]
    assert await stage.storage.open_holds() == 0


async def test_what_failed_is_in_the_ledger(stage: Stage, way: Way) -> None:
    """Conformance 70: a call that failed is recorded at 0 with who asked, what a stream gave before it broke off is
    charged, and nothing that a client says of itself in its request is taken for true."""
    said: Any = {"user": "mallory", "metadata": {"caller": "mallory", "cost_nanousd": "0", "outcome": "not_dispatched"}}
    async with hooked(stage, way) as client, stage.guard.open(Context(caller="alice", session="s")):
        stage.provider.script(Behaviour.error(500), Behaviour.cut(after_chunks=2))
        assert (await client.post(asked(**said))).status_code == 500
        with pytest.raises(library_of(way).RemoteProtocolError):
            await client.chunks(asked(stream=True, **said))

    await stage.provider.idle()
    failed, cut = await stage.storage.records()
    assert (failed.caller, failed.outcome, failed.cost_nanousd) == ("alice", "provider_error", 0)
    assert (cut.caller, cut.outcome) == ("alice", "estimated")
    assert 0 < (cut.cost_nanousd or 0) <= (cut.estimate_nanousd or 0)
    assert await stage.storage.open_holds() == 0
