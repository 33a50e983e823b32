"""The fake provider against the real OpenAI SDK, over loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tests.plain import PLAIN

from asgi_llm_guard.testing import Behaviour, Bill, ConnectionCut, FakeProvider, Gate, Price, asgi_client
from asgi_llm_guard.usage import Usage

pytestmark = pytest.mark.anyio

HELLO = "say hello to everybody here"  # 27 bytes: 7 tokens, and 3 + 3 for the message and the opening
BODY = {"model": "m", "messages": [{"role": "user", "content": HELLO}]}


@asynccontextmanager
async def sdk(provider: FakeProvider, *, retries: int = 0) -> AsyncGenerator[openai.AsyncOpenAI]:
    """An SDK client of the provider, without the environment's proxies."""
    async with (
        provider.serve() as base_url,
        httpx2.AsyncClient(**PLAIN) as http,
        openai.AsyncOpenAI(api_key="any", base_url=base_url, http_client=http, max_retries=retries) as client,
    ):
        yield client


async def stream(
    client: openai.AsyncOpenAI, *, usage: bool = True, n: int = 1
) -> openai.AsyncStream[ChatCompletionChunk]:
    return await client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": HELLO}],
        stream=True,
        stream_options={"include_usage": usage},
        n=n,
    )


def text(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_json_answer_reports_what_is_billed() -> None:
    """The SDK reads answer and usage, and the bill says the same."""
    provider = FakeProvider(prices={"m": Price(input=2, output=10)})
    async with sdk(provider) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}])

    assert answer.choices[0].message.content == f"Echo: {HELLO}"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (13, 6, 19)
    assert provider.bill == [
        Bill(
            id="chatcmpl-1",
            dialect="openai_chat",
            path="/v1/chat/completions",
            model="m",
            usage=Usage(
                input_tokens=13,
                output_tokens=6,
                cache_read_tokens=0,
                cache_write_tokens=0,
                cache_write_1h_tokens=0,
                reasoning_tokens=0,
                model="m",
            ),
            cost_nanousd=2 * 13 + 10 * 6,
            reported=True,
        )
    ]
    assert provider.total_nanousd == 86
    assert provider.calls == 1


async def test_stream_reports_usage_when_asked() -> None:
    """With `include_usage` the last chunk has usage and no choices, and the others have none."""
    provider = FakeProvider()
    async with sdk(provider) as client:
        chunks = [chunk async for chunk in await stream(client)]

    assert text(chunks) == f"Echo: {HELLO}"
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 19
    assert [line.reported for line in provider.bill] == [True]


async def test_stream_keeps_usage_to_itself_when_not_asked() -> None:
    """Without `include_usage` nothing is reported, and everything is billed."""
    provider = FakeProvider()
    async with sdk(provider) as client:
        chunks = [chunk async for chunk in await stream(client, usage=False)]

    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(6, False)]


async def test_output_limit_and_choices() -> None:
    """The request's limit ends each of `n` choices with `length`; all of them are billed."""
    provider = FakeProvider()
    async with sdk(provider) as client:
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": HELLO}], n=2, max_completion_tokens=3
        )

    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "Echo: say hello", "length"),
        (1, "Echo: say hello", "length"),
    ]
    assert provider.bill[0].output_tokens == 6


async def test_stream_of_several_choices() -> None:
    """Every choice is streamed and ended on its own, and all of them are billed."""
    provider = FakeProvider(default=Behaviour.answer("two words"))
    async with sdk(provider) as client:
        chunks = [chunk async for chunk in await stream(client, n=2)]

    pieces = [(c.choices[0].index, c.choices[0].delta.content, c.choices[0].finish_reason) for c in chunks[:-1]]
    assert pieces == [
        (0, "two ", None),
        (0, "words", None),
        (1, "two ", None),
        (1, "words", None),
        (0, None, "stop"),
        (1, None, "stop"),
    ]
    assert provider.bill[0].output_tokens == 4


async def test_counts_as_scripted() -> None:
    """Input, output, cache and reasoning are what the behaviour says, also past the request's limit."""
    provider = FakeProvider(prices={"m": Price(input=100, output=1000, cache_read=10)})
    provider.script(
        Behaviour.answer(input_tokens=50, output_tokens=20, cache_read_tokens=40, reasoning_tokens=5),
    )
    async with sdk(provider) as client:
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": HELLO}], max_tokens=1
        )

    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.prompt_tokens == 50
    assert answer.usage.prompt_tokens_details.cached_tokens == 40
    assert answer.usage.completion_tokens == 25
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5
    assert provider.total_nanousd == 10 * 100 + 40 * 10 + 25 * 1000


async def test_price_function() -> None:
    """A function of model and usage may price instead of a table."""

    def price(model: str, usage: Usage) -> int:
        assert model == "m"
        return 7 * (usage.total_tokens or 0)

    provider = FakeProvider(prices=price)
    async with asgi_client(provider) as client:
        await client.post("/v1/chat/completions", json=BODY)

    assert provider.total_nanousd == 7 * 19


async def test_error_with_retry_after() -> None:
    """The script's error comes with its header and code, and is not billed."""
    provider = FakeProvider()
    provider.script(Behaviour.error(429, retry_after=2, code="slow_down"))
    async with sdk(provider) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}])

    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "slow_down"
    assert provider.bill == []
    assert provider.calls == 1


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (503, "server_error")])
async def test_error_without_retry_after(status: int, kind: str) -> None:
    """An error has no `Retry-After` unless given one."""
    provider = FakeProvider(default=Behaviour.error(status))
    async with asgi_client(provider) as client:
        answer = await client.post("/v1/chat/completions", json=BODY)

    assert answer.status_code == status
    assert "retry-after" not in answer.headers
    assert answer.json()["error"]["type"] == kind


async def test_script_meets_retries_one_by_one() -> None:
    """Each physical request takes the next behaviour of the script, then the default."""
    provider = FakeProvider()
    provider.script(Behaviour.error(500, retry_after=0.01), Behaviour.error(429, retry_after=0.01))
    async with sdk(provider, retries=2) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}])

    assert answer.id == "chatcmpl-3"
    assert provider.calls == 3
    assert [line.id for line in provider.bill] == ["chatcmpl-3"]
    assert [request.headers["x-stainless-retry-count"] for request in provider.requests] == ["0", "1", "2"]


async def test_rules_by_model_and_by_header() -> None:
    """A rule looks at the request; the first that holds counts; the script goes before the rules."""
    provider = FakeProvider()
    provider.when(lambda request: request.model == "broken", Behaviour.error(500))
    provider.when(lambda request: request.headers.get("x-tenant") == "poor", Behaviour.error(402))
    provider.script(Behaviour.error(418))
    async with asgi_client(provider) as client:
        statuses = [
            (await client.post("/v1/chat/completions", json={**BODY, "model": model}, headers=headers)).status_code
            for model, headers in [("broken", {}), ("broken", {}), ("m", {"x-tenant": "poor"}), ("m", {})]
        ]

    assert statuses == [418, 500, 402, 200]


async def test_cut_mid_stream_is_billed_for_what_was_produced(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK sees a broken connection after two chunks; the bill has two tokens, unreported; the log is quiet."""
    provider = FakeProvider()
    provider.script(Behaviour.cut(after_chunks=2))
    chunks = []
    async with sdk(provider) as client:
        with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
            async for chunk in await stream(client):
                chunks.append(chunk)

    assert text(chunks) == "Echo: say "
    assert [(line.input_tokens, line.output_tokens, line.reported) for line in provider.bill] == [(13, 2, False)]
    assert [record for record in caplog.records if record.name == "uvicorn.error"] == []


async def test_cut_at_the_end_of_a_stream() -> None:
    """A cut after more chunks than there are comes after all of them, before finish, usage and end."""
    provider = FakeProvider(default=Behaviour.cut(after_chunks=99))
    chunks = []
    async with sdk(provider) as client:
        with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
            async for chunk in await stream(client):
                chunks.append(chunk)

    assert text(chunks) == f"Echo: {HELLO}"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(6, False)]


async def test_cut_of_a_json_answer_is_billed_in_full() -> None:
    """A JSON answer that is cut in the middle was produced, so it is billed, unreported."""
    provider = FakeProvider(default=Behaviour.cut())
    async with sdk(provider) as client:
        with pytest.raises(openai.APIConnectionError):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}])

    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(6, False)]


async def test_cut_in_process_is_an_exception() -> None:
    """Without a server there is no connection to drop; the cut surfaces as `ConnectionCut`."""
    provider = FakeProvider(default=Behaviour.cut())
    async with asgi_client(provider) as client:
        with pytest.raises(ConnectionCut):
            await client.post("/v1/chat/completions", json=BODY)

    assert provider.open == 0


async def test_error_inside_a_stream() -> None:
    """The stream begins with status 200 and ends with an error event; billed for the chunks, unreported."""
    provider = FakeProvider()
    provider.script(Behaviour.stream_error(after_chunks=2))
    chunks = []
    async with sdk(provider) as client:
        with pytest.raises(openai.APIError, match="fails inside the stream"):
            async for chunk in await stream(client):
                chunks.append(chunk)

    assert text(chunks) == "Echo: say "
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(2, False)]


async def test_stream_error_of_a_json_request() -> None:
    """A request without a stream gets a plain 500 for it, not billed."""
    provider = FakeProvider(default=Behaviour.stream_error())
    async with asgi_client(provider) as client:
        answer = await client.post("/v1/chat/completions", json=BODY)

    assert answer.status_code == 500
    assert provider.bill == []


async def test_no_usage() -> None:
    """A success without usage, as JSON and as a stream that asks for it; both are billed, unreported."""
    provider = FakeProvider(default=Behaviour.no_usage())
    async with sdk(provider) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}])
        chunks = [chunk async for chunk in await stream(client)]

    assert answer.usage is None
    assert all(chunk.usage is None for chunk in chunks)
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(6, False), (6, False)]


async def test_empty() -> None:
    """Status 200 and no byte, as JSON and as a stream; billed for the input."""
    provider = FakeProvider(default=Behaviour.empty())
    async with asgi_client(provider) as client:
        answers = [
            await client.post("/v1/chat/completions", json={**BODY, "stream": streamed}) for streamed in (False, True)
        ]

    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b""), (200, b"")]
    assert [(line.input_tokens, line.output_tokens) for line in provider.bill] == [(13, 0), (13, 0)]


async def test_malformed() -> None:
    """Status 200 and broken JSON, as JSON and inside a stream; billed in full, unreported."""
    provider = FakeProvider(default=Behaviour.malformed())
    async with asgi_client(provider) as client:
        answer = await client.post("/v1/chat/completions", json=BODY)
        asking = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
        streamed = await client.post("/v1/chat/completions", json=asking)

    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        answer.json()
    assert streamed.text.startswith('data: {"id":\n\n')
    assert "prompt_tokens" not in streamed.text
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(6, False), (6, False)]


async def test_slow_stream_goes_one_step_at_a_time() -> None:
    """A chunk leaves for each released step, and the ending for one more."""
    provider = FakeProvider(default=Behaviour.slow())
    async with sdk(provider) as client:
        chunks = aiter(await stream(client))
        for word in f"Echo: {HELLO}".split():
            waiting = asyncio.ensure_future(anext(chunks))
            assert provider.bill == []
            provider.release(1)
            assert text([await waiting]).strip() == word
        assert provider.open == 1
        provider.release(1)
        rest = [chunk async for chunk in chunks]

    assert rest[-1].usage is not None
    assert [line.reported for line in provider.bill] == [True]


async def test_leaving_a_slow_stream_is_noticed_and_billed() -> None:
    """A client that leaves after three chunks is a disconnect, billed for three tokens."""
    provider = FakeProvider(default=Behaviour.slow())
    async with sdk(provider) as client:
        chunks = await stream(client)
        provider.release(3)
        seen: list[ChatCompletionChunk] = [await anext(aiter(chunks)) for _ in range(3)]
        await chunks.close()
        await provider.until(lambda: provider.disconnects == 1)

    assert text(seen) == "Echo: say hello "
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(3, False)]


async def test_own_gates_hold_one_call_each() -> None:
    """A behaviour with a gate of its own waits for that one only, as JSON too."""
    provider, first, second = FakeProvider(), Gate(), Gate()
    provider.script(
        replace(Behaviour.hang(gate=first), text="first"), replace(Behaviour.slow(gate=second), text="second")
    )
    async with sdk(provider) as client:

        async def ask() -> str | None:
            answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}])
            return answer.choices[0].message.content

        early = asyncio.ensure_future(ask())
        await provider.until(lambda: provider.open == 1)
        late = asyncio.ensure_future(ask())
        await provider.until(lambda: provider.open == 2)
        second.release()
        assert await late == "second"
        assert not early.done()
        first.release(1)
        assert await early == "first"


@pytest.mark.parametrize(("streamed", "billed"), [(False, 6), (True, 0)])
async def test_leaving_a_hanging_call(*, streamed: bool, billed: int) -> None:
    """A client that gives up on a silent provider is billed: a JSON answer in full, a stream for its input."""
    provider = FakeProvider(default=Behaviour.hang())
    async with sdk(provider) as client:
        call = asyncio.ensure_future(
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": HELLO}], stream=streamed)
        )
        await provider.until(lambda: provider.open == 1)
        call.cancel()
        await provider.idle()

    assert provider.disconnects == 1
    assert [(line.input_tokens, line.output_tokens, line.reported) for line in provider.bill] == [(13, billed, False)]


async def test_stopping_cuts_open_answers() -> None:
    """Leaving `serve` ends what is still being answered; nobody hangs."""
    provider = FakeProvider(default=Behaviour.slow())
    async with httpx2.AsyncClient(**PLAIN) as http:
        async with provider.serve() as base_url:
            request = http.build_request("POST", f"{base_url}/chat/completions", json={**BODY, "stream": True})
            answer = await http.send(request, stream=True)
        with pytest.raises(httpx2.RemoteProtocolError):
            await answer.aread()

    assert provider.open == 0
    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(0, False)]


async def test_models() -> None:
    """The models are those with a price, and others do not exist; without a table all of them do."""
    provider = FakeProvider(prices={"m": Price(input=1, output=1)})
    async with sdk(provider) as client:
        assert [model.id async for model in client.models.list()] == ["m"]
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="x", messages=[{"role": "user", "content": HELLO}])
    async with asgi_client(FakeProvider()) as http:
        listed = await http.get("/v1/models")
        unknown = await http.get("/v1/nowhere")

    assert caught.value.code == "model_not_found"
    assert listed.json() == {"object": "list", "data": []}
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[]", b'{"messages": [{}]}', b'{"model": "m"}', b'{"model": "m", "messages": []}'],
)
async def test_malformed_request(body: bytes) -> None:
    """What no provider takes is a 400, and no call."""
    provider = FakeProvider()
    async with asgi_client(provider) as client:
        answer = await client.post("/v1/chat/completions", content=body)

    assert answer.status_code == 400
    assert provider.calls == 0


async def test_text_parts_are_counted() -> None:
    """The text parts of a message count as input; parts without text do not."""
    provider = FakeProvider()
    parts = [{"type": "text", "text": "12345678"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    async with asgi_client(provider) as client:
        messages = [{"role": "system"}, {"role": "user", "content": parts}]
        await client.post("/v1/chat/completions", json={"model": "m", "messages": messages})

    assert provider.bill[0].input_tokens == 2 + 3 + 3 + 3


async def test_until_says_what_it_saw() -> None:
    """A condition that never holds ends in an error that shows the state."""
    with pytest.raises(TimeoutError, match="0 calls, 0 open, 0 disconnects, 0 billed"):
        await FakeProvider().until(lambda: False, timeout_s=0)


async def test_body_that_never_arrives() -> None:
    """A client that leaves while it sends its request is not answered, and not billed."""
    provider = FakeProvider()
    messages: AsyncIterator[dict[str, object]] = _messages(
        {"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}
    )
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await provider(scope, messages.__anext__, send)

    assert (sent, provider.calls) == ([], 0)


async def test_the_end_of_an_answer_is_no_disconnect() -> None:
    """Servers say `http.disconnect` after a complete answer, too, even before its last `send` returns."""
    provider = FakeProvider()
    ended = asyncio.Event()
    body = json.dumps(BODY).encode()

    async def messages() -> AsyncGenerator[dict[str, object]]:
        yield {"type": "http.request", "body": body}
        await ended.wait()
        yield {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, object]) -> None:
        if message["type"] == "http.response.body":
            ended.set()
            for _ in range(5):
                await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await provider(scope, messages().__anext__, send)

    assert provider.disconnects == 0
    assert [line.reported for line in provider.bill] == [True]


async def _messages(*messages: dict[str, object]) -> AsyncGenerator[dict[str, object]]:
    for message in messages:
        yield message
