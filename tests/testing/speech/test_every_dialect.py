"""What a fake provider promises in every dialect: what it meets, and what is written on the bill."""

from __future__ import annotations

import asyncio
import gzip
import json

import httpx2
import pytest
from tests.plain import PLAIN
from tests.testing.speech.requests import HELLO, WAYS, Way

from asgi_llm_guard.testing import Attempt, Behaviour, ConnectionCut, FakeProvider, Gate, Price, Trouble, asgi_client
from asgi_llm_guard.testing.sale import Filler
from asgi_llm_guard.usage import Usage

pytestmark = pytest.mark.anyio

every_dialect = pytest.mark.parametrize("dialect", WAYS)
plain_and_streamed = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
TROUBLES: tuple[Trouble, ...] = ("rate_limit", "quota", "overloaded", "context", "unknown_model")


async def ask(
    dialect: str, behaviour: Behaviour, *, streamed: bool = False, gzipped: bool = False
) -> tuple[httpx2.Response, Attempt]:
    """The answer to one request in this process, and what the provider wrote down."""
    provider = FakeProvider(default=behaviour, platform=WAYS[dialect].platform)
    async with asgi_client(provider) as client:
        answer = await post(client, WAYS[dialect], streamed=streamed, gzipped=gzipped)
    return answer, provider.attempts[0]


async def post(
    client: httpx2.AsyncClient, way: Way, *, streamed: bool = False, gzipped: bool = False
) -> httpx2.Response:
    body = way.body | (way.asks if streamed else {})
    headers = {"accept-encoding": "gzip" if gzipped else "identity"}
    return await client.post(way.streamed if streamed else way.plain, json=body, headers=headers)


def model_of(dialect: str) -> str:
    return {"bedrock_anthropic": "anthropic.m", "bedrock_llama": "llama"}.get(dialect, "m")


@every_dialect
@plain_and_streamed
async def test_good_answer_is_billed_and_reported(dialect: str, *, streamed: bool) -> None:
    """Each dialect is recognised by its path, its answer is whole, and the bill has its words."""
    answer, attempt = await ask(dialect, Behaviour.answer("one two three"), streamed=streamed)

    assert answer.status_code == 200
    assert (attempt.dialect, attempt.model) == (dialect.split(",", maxsplit=1)[0], model_of(dialect))
    assert (attempt.stream, attempt.status, attempt.left) == (streamed, 200, False)
    assert list(attempt.words) == ["one", "two", "three"]
    assert attempt.bill is not None
    assert attempt.bill.output_tokens == 3
    assert attempt.bill.input_tokens == (7 if dialect == "openai_completions" else 13)
    assert attempt.bill.reported


@every_dialect
@plain_and_streamed
async def test_no_usage_is_billed_unreported(dialect: str, *, streamed: bool) -> None:
    """An answer that does not say what it used has no count in it, and is billed all the same."""
    _, told = await ask(dialect, Behaviour.answer(input_tokens=77_777), streamed=streamed)
    answer, attempt = await ask(dialect, Behaviour(input_tokens=77_777, usage=False), streamed=streamed)

    assert told.reported
    assert b"77777" not in answer.content
    assert attempt.billed
    assert not attempt.reported


@every_dialect
@plain_and_streamed
async def test_empty_answer_is_billed_for_its_input(dialect: str, *, streamed: bool) -> None:
    """Status 200 and no byte costs what was read."""
    answer, attempt = await ask(dialect, Behaviour.empty(), streamed=streamed)

    assert (answer.status_code, answer.content) == (200, b"")
    assert attempt.bill is not None
    assert attempt.bill.output_tokens == 0
    assert attempt.bill.input_tokens > 0


@every_dialect
@plain_and_streamed
async def test_malformed_answer_is_billed_unreported(dialect: str, *, streamed: bool) -> None:
    """A broken answer costs all of it, and tells nothing."""
    _, attempt = await ask(dialect, Behaviour.malformed(), streamed=streamed)

    assert attempt.bill is not None
    assert attempt.bill.output_tokens == 6
    assert not attempt.reported


@every_dialect
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_trouble_is_an_error_and_not_billed(dialect: str, trouble: Trouble) -> None:
    """Every kind of error has a status and words of the dialect, and costs nothing."""
    answer, attempt = await ask(dialect, Behaviour.refuse(trouble), streamed=True)

    assert answer.status_code >= 400
    assert "answers" not in answer.text  # the dialect has words of its own
    assert isinstance(answer.json(), dict | list)
    assert (attempt.status, attempt.bill, attempt.words) == (answer.status_code, None, [])


@every_dialect
async def test_error_of_any_status(dialect: str) -> None:
    """A scripted status comes back as it is, with its message and its header."""
    answer, attempt = await ask(dialect, Behaviour.error(418, message="no tea", retry_after=2))

    assert answer.status_code == attempt.status == 418
    assert answer.headers["retry-after"] == "2"
    assert "no tea" in answer.text
    assert not attempt.billed


@every_dialect
async def test_cut_stream_is_billed_for_what_was_produced(dialect: str) -> None:
    """A connection that drops after two chunks costs two words, unreported."""
    provider = FakeProvider(default=Behaviour.cut(after_chunks=2), platform=WAYS[dialect].platform)
    async with asgi_client(provider) as client:
        with pytest.raises(ConnectionCut):
            await post(client, WAYS[dialect], streamed=True)

    (attempt,) = provider.attempts
    assert list(attempt.words) == ["Echo:", "say"]
    assert attempt.bill is not None
    assert attempt.bill.output_tokens == 2
    assert not attempt.reported


@every_dialect
@pytest.mark.parametrize("after", [0, 1, 99])
async def test_error_inside_a_stream(dialect: str, after: int) -> None:
    """Status 200, some words, an error in the dialect's own form, no usage, no end."""
    answer, attempt = await ask(dialect, Behaviour.stream_error(after_chunks=after), streamed=True)

    assert answer.status_code == 200
    assert b"fails inside the stream" in answer.content
    assert b"[DONE]" not in answer.content
    assert attempt.bill is not None
    assert attempt.bill.output_tokens == min(after, 6)
    assert not attempt.reported


@every_dialect
async def test_error_inside_a_stream_of_a_plain_request(dialect: str) -> None:
    """What does not stream gets a 500 for it, not billed."""
    answer, attempt = await ask(dialect, Behaviour.stream_error())

    assert (answer.status_code, attempt.billed) == (500, False)


@every_dialect
@plain_and_streamed
async def test_tool_call_is_billed_by_its_arguments(dialect: str, *, streamed: bool) -> None:
    """A call of a function is in the answer, and costs the words of its arguments."""
    answer, attempt = await ask(dialect, Behaviour.call_tool("search", limit=2, kind="x"), streamed=streamed)

    assert attempt.bill is not None
    assert attempt.bill.output_tokens == 4
    if dialect not in {"openai_completions", "ollama_generate", "bedrock_llama", "bedrock_anthropic"}:
        assert b"search" in answer.content


@every_dialect
@plain_and_streamed
async def test_encoded_answers_are_the_same(dialect: str, *, streamed: bool) -> None:
    """A body in gzip is what it is without, for clients that take it, and plain for others."""
    plain, _ = await ask(dialect, Behaviour.answer("one two").zipped(), streamed=streamed)
    zipped, attempt = await ask(dialect, Behaviour.answer("one two").zipped(), streamed=streamed, gzipped=True)

    assert "content-encoding" not in plain.headers
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.content == plain.content
    assert attempt.reported


@every_dialect
async def test_answer_of_no_word(dialect: str) -> None:
    """A stream without a word is opened, closed, and told as it is."""
    _, attempt = await ask(dialect, Behaviour.answer("", reasoning_tokens=3), streamed=True)

    assert attempt.bill is not None
    assert attempt.bill.output_tokens == 3
    assert attempt.reported


@every_dialect
@plain_and_streamed
async def test_lies_are_told_and_not_billed(dialect: str, *, streamed: bool) -> None:
    """A provider that reports what was not used bills what was."""
    lie = Usage(input_tokens=-77, output_tokens=10**15, reasoning_tokens=0)
    answer, attempt = await ask(dialect, Behaviour.lie(lie), streamed=streamed)

    assert b"1000000000000000" in answer.content or dialect.startswith("bedrock") or dialect == "cohere_chat"
    assert attempt.bill is not None
    assert (attempt.bill.input_tokens > 0, attempt.bill.output_tokens) == (True, 6)


@every_dialect
async def test_reported_object_is_sent_as_it_is(dialect: str) -> None:
    """Whatever object a test wants to see in place of usage is sent."""
    answer, _ = await ask(dialect, Behaviour.lie({"strange_count": 123_456}), streamed=False)

    assert b'"strange_count":123456' in answer.content


@every_dialect
async def test_another_model_answers_and_is_billed(dialect: str) -> None:
    """The model that answers is named where the dialect names one, and its price is taken."""
    way = WAYS[dialect]
    prices = {model_of(dialect): Price(input=1, output=1), "other": Price(input=0, output=1_000)}
    provider = FakeProvider(prices=prices, default=Behaviour.answer("one two", model="other"), platform=way.platform)
    async with asgi_client(provider) as client:
        answer = await post(client, way)

    assert (b'"other"' in answer.content) == (dialect not in {"bedrock_converse", "cohere_chat", "bedrock_llama"})
    assert [(line.model, line.cost_nanousd) for line in provider.bill] == [("other", 2_000)]
    assert provider.attempts[0].model == model_of(dialect)


@every_dialect
@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"{}", b'{"model": 5}'])
async def test_unreadable_request(dialect: str, body: bytes) -> None:
    """What no provider takes is a 400 in the dialect's shape, and no attempt."""
    provider = FakeProvider(platform=WAYS[dialect].platform)
    async with asgi_client(provider) as client:
        answer = await client.post(WAYS[dialect].plain, content=body)

    assert answer.status_code == 400
    assert answer.json()
    assert (provider.calls, provider.attempts, len(provider.others)) == (0, [], 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": []}),
        ("/v1/embeddings", {"model": "m"}),
        ("/v1/images/generations", {"model": "m"}),
        ("/v1/audio/speech", {"model": "m"}),
        ("/v1/audio/transcriptions", {"model": "m"}),
        ("/v1/models/m:batchEmbedContents", {"requests": 5}),
        ("/v1/models/m:embedContent", {}),
        ("/v2/embed", {"model": "m", "texts": []}),
        ("/v2/rerank", {"model": "m", "query": "q"}),
    ],
)
async def test_unreadable_request_without_words(path: str, body: dict[str, object]) -> None:
    """The same for what answers with something else than words."""
    provider = FakeProvider()
    async with asgi_client(provider) as client:
        answer = await client.post(path, json=body)

    assert (answer.status_code, provider.attempts) == (400, [])


async def test_forms_without_a_file() -> None:
    """A transcription of nothing is refused; one of a file with a name in it is made."""
    provider = FakeProvider()
    async with asgi_client(provider) as client:
        refused = await client.post("/v1/audio/transcriptions", files={"model": (None, "m")})
        heard = await client.post("/v1/audio/transcriptions", files={"model": (None, "m"), "file": ("a.wav", b"\x00")})

    assert (refused.status_code, heard.status_code) == (400, 200)
    assert provider.requests[0].body == {"model": "m", "file": "a.wav"}


async def test_interactions_take_steps_and_contents() -> None:
    """Input may be a text, one step, a list of steps, or a list of contents."""
    provider = FakeProvider()
    content = {"type": "text", "text": HELLO}
    step = {"type": "user_input", "content": [content]}
    async with asgi_client(provider) as client:
        for asked in (HELLO, step, [step], [content]):
            await client.post("/v1beta/interactions", json={"model": "m", "input": asked})
            assert provider.requests[-1].texts == (HELLO,)

    assert [line.input_tokens for line in provider.bill] == [13] * 4


async def test_groq_says_it_twice_if_asked() -> None:
    """Who asks for usage gets it as others give it as well."""
    provider = FakeProvider(platform="groq")
    way = WAYS["groq_chat"]
    async with asgi_client(provider) as client:
        asking = {"stream_options": {"include_usage": True}}
        answer = await post(client, way._replace(asks=way.asks | asking), streamed=True)

    assert answer.text.count('"total_tokens":19') == 2


def test_words_that_are_made_when_asked_for() -> None:
    """A filler is a sequence like others, but for the memory."""
    words = Filler(5, word_bytes=6)

    assert list(words) == ["word1x", "word2x", "word3x", "word4x", "word5x"]
    assert list(words[1:3]) == ["word2x", "word3x"]
    assert list(words[::2]) == ["word1x", "word3x", "word5x"]
    assert (words[-1], len(words[9:])) == ("word5x", 0)
    with pytest.raises(IndexError):
        words[5]


@every_dialect
async def test_request_limit_ends_an_answer(dialect: str) -> None:
    """The request's own limit is kept, wherever the dialect has it."""
    limits: dict[str, dict[str, object]] = {
        "openai_responses": {"max_output_tokens": 2},
        "gemini_content": {"generationConfig": {"maxOutputTokens": 2}},
        "gemini_interactions": {"generation_config": {"max_output_tokens": 2}},
        "bedrock_converse": {"inferenceConfig": {"maxTokens": 2}},
        "bedrock_llama": {"max_gen_len": 2},
        "ollama_chat": {"options": {"num_predict": 2}},
        "ollama_generate": {"options": {"num_predict": 2}},
    }
    way = WAYS[dialect]
    provider = FakeProvider(platform=way.platform)
    async with asgi_client(provider) as client:
        limited = way._replace(body=way.body | limits.get(dialect.split(",", maxsplit=1)[0], {"max_tokens": 2}))
        answer = await post(client, limited)

    assert list(provider.attempts[0].words) == ["Echo:", "say"]
    assert any(word in answer.text for word in ("length", "MAX_TOKENS", "max_tokens", "incomplete"))


@every_dialect
async def test_client_that_leaves_is_billed_for_what_was_produced(dialect: str) -> None:
    """A stream whose client goes costs what had been produced, and the attempt says that it went."""
    gate = Gate()
    provider = FakeProvider(default=Behaviour.slow(gate=gate), platform=WAYS[dialect].platform)
    way = WAYS[dialect]
    async with provider.serve() as base_url, httpx2.AsyncClient(**PLAIN) as client:
        request = client.build_request("POST", base_url.root + way.streamed, json=way.body | way.asks)
        answer = await client.send(request, stream=True)
        gate.release(2)
        await provider.until(lambda: provider.open == 1)
        await anext(answer.aiter_raw())
        await answer.aclose()
        await provider.idle()

    (attempt,) = provider.attempts
    assert attempt.left
    assert attempt.bill is not None
    assert attempt.bill.output_tokens <= 2
    assert not attempt.reported


async def test_big_answer_is_made_while_it_is_sent() -> None:
    """A long answer has about the size that was asked for, without being held in memory."""
    provider = FakeProvider(default=Behaviour.big(1_000_000))
    async with asgi_client(provider) as client:
        answer = await post(client, WAYS["openai_chat"], streamed=True)

    assert 1_000_000 < len(answer.content) < 1_400_000
    assert provider.bill[0].output_tokens == 999
    assert len(provider.attempts[0].words) == 999
    assert provider.attempts[0].words[998].startswith("word999x")


async def test_stream_is_encoded_chunk_by_chunk() -> None:
    """Every chunk of an encoded stream can be read before the next is made."""
    provider, gate = FakeProvider(), Gate()
    provider.script(Behaviour(paced=True, gate=gate, encoding="gzip"))
    way = WAYS["ollama_chat"]
    async with provider.serve() as base_url, httpx2.AsyncClient(**PLAIN) as client:
        request = client.build_request("POST", base_url.root + way.streamed, json=way.body | way.asks)
        answer = await client.send(request, stream=True)
        lines = answer.aiter_lines()
        gate.release(1)
        first = json.loads(await anext(lines))
        gate.release()
        rest = [json.loads(line) async for line in lines]

    assert answer.headers["content-encoding"] == "gzip"
    assert first["message"]["content"] == "Echo: "
    assert rest[-1]["done"] is True


async def test_cut_of_an_encoded_body() -> None:
    """The half of an encoded body that arrives does not decode, and the call is billed."""
    provider = FakeProvider(default=Behaviour(cut_after=0, encoding="gzip"))
    sent: list[bytes] = []
    asked = [json.dumps(WAYS["openai_chat"].body).encode()]

    async def receive() -> dict[str, object]:
        if not asked:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": asked.pop()}

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        sent.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"accept-encoding", b"gzip")],
    }
    with pytest.raises(ConnectionCut):
        await provider(scope, receive, send)

    with pytest.raises((EOFError, gzip.BadGzipFile)):
        gzip.decompress(b"".join(sent))
    assert provider.bill[0].output_tokens == 6


@pytest.mark.parametrize(
    ("host", "dialect"),
    [
        ("api.openai.com", "openai_chat"),
        ("eu.api.openai.com", "openai_chat"),
        ("api.mistral.ai", "mistral_chat"),
        ("api.groq.com", "groq_chat"),
        ("openrouter.ai", "openrouter_chat"),
        ("localhost", "vllm_chat"),
    ],
)
async def test_host_tells_the_dialect_of_a_shared_path(host: str, dialect: str) -> None:
    """On OpenAI's path it is the host that says who speaks, and else what the provider was made as."""
    provider = FakeProvider(platform="vllm")
    async with asgi_client(provider, base_url=f"https://{host}") as client:
        await client.post("/v1/chat/completions", json=WAYS["openai_chat"].body)

    assert provider.attempts[0].dialect == dialect


@pytest.mark.parametrize(
    ("headers", "retry"),
    [
        ({}, None),
        ({"x-stainless-retry-count": "2"}, 2),
        ({"x-stainless-retry-count": "many"}, None),
        ({"amz-sdk-request": "attempt=3; max=5"}, 2),
        ({"amz-sdk-request": "ttl=20"}, None),
    ],
)
async def test_retries_that_clients_count(headers: dict[str, str], retry: int | None) -> None:
    """What a client says of its own retries is written down."""
    provider = FakeProvider()
    async with asgi_client(provider) as client:
        await client.post("/v1/chat/completions", json=WAYS["openai_chat"].body, headers=headers)

    assert provider.attempts[0].retry == retry


def test_price_of_every_part() -> None:
    """Each bucket has its rate once, and those without one cost what they are a part of."""
    usage = Usage(
        input_tokens=1_000,
        output_tokens=100,
        cache_read_tokens=300,
        cache_write_tokens=200,
        cache_write_1h_tokens=50,
        reasoning_tokens=40,
        images=2,
        audio_ms=10,
        characters=7,
        search_units=3,
    )
    by_part = Price(
        input=3, output=15, cache_read=1, cache_write=4, cache_write_1h=6, reasoning=20,
        per_call=5, image=100, audio_ms=2, character=9, search_unit=11,
    )  # fmt: skip

    assert by_part.cost_nanousd(usage) == sum(
        [500 * 3, 300 * 1, 150 * 4, 50 * 6, 60 * 15, 40 * 20, 2 * 100, 10 * 2, 7 * 9, 3 * 11, 5]
    )
    assert Price(input=3, output=15).cost_nanousd(usage) == 700 * 3 + 100 * 15
    assert Price(input=3, output=15, cache_write=4).cost_nanousd(usage) == 500 * 3 + 200 * 4 + 100 * 15
