"""OpenAI's APIs, and those who speak like them, as OpenAI's SDK and Groq's read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import groq
import httpx
import httpx2
import openai
import pytest
from openai.types.audio.transcription import UsageDuration, UsageTokens
from tests.plain import PLAIN
from tests.testing.speech.requests import ECHO, HELLO

from asgi_llm_guard.testing import BaseURL, Behaviour, FakeProvider, Price

ASKED: Any = [{"role": "user", "content": HELLO}]
COUNTS = Behaviour.answer(
    "one two",
    input_tokens=100,
    cache_read_tokens=40,
    cache_write_tokens=20,
    cache_write_1h_tokens=5,
    reasoning_tokens=7,
)


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def base_url(provider: FakeProvider) -> Iterator[BaseURL]:
    with provider.serve() as url:
        yield url


@pytest.fixture
def client(base_url: BaseURL) -> Iterator[openai.OpenAI]:
    with at(base_url) as made:
        yield made


def at(base_url: str) -> openai.OpenAI:
    """The SDK, pointed at an address, without the environment's proxies."""
    http = httpx2.Client(**PLAIN)
    return openai.OpenAI(api_key="any", base_url=base_url, max_retries=0, http_client=http)


def test_responses(provider: FakeProvider, client: openai.OpenAI) -> None:
    """A plain answer has its text, and every count of the bill."""
    provider.script(COUNTS)
    answer = client.responses.create(model="m", input=HELLO, instructions="be brief")

    assert (answer.status, answer.output_text) == ("completed", "one two")
    assert answer.usage is not None
    written = answer.usage.input_tokens_details.cache_write_tokens_details
    assert written is not None
    assert (written.ttl_30m_tokens, written.ttl_12h_tokens) == (15, 5)
    assert answer.usage.input_tokens_details.cached_tokens == 40
    assert answer.usage.output_tokens_details.reasoning_tokens == 7
    assert answer.usage.total_tokens == provider.bill[0].usage.total_tokens == 109
    assert provider.requests[0].texts == ("be brief", HELLO)


def test_responses_stream(provider: FakeProvider, client: openai.OpenAI) -> None:
    """A stream is put together to the same, and told once."""
    with client.responses.stream(model="m", input=[{"role": "user", "content": HELLO}]) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()

    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 6
    assert answer.output_text == ECHO
    assert answer.usage is not None
    assert answer.usage.total_tokens == provider.bill[0].usage.total_tokens == 19


def test_responses_that_are_cut_short(provider: FakeProvider, client: openai.OpenAI) -> None:
    """A limit ends in `response.incomplete`, which is billed and told."""
    plain = client.responses.create(model="m", input=HELLO, max_output_tokens=2)
    events = list(client.responses.create(model="m", input=HELLO, max_output_tokens=2, stream=True))

    assert plain.status == "incomplete"
    assert plain.incomplete_details is not None
    assert plain.incomplete_details.reason == "max_output_tokens"
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.usage is not None
    assert [line.reported for line in provider.bill] == [True, True]


def test_responses_that_fail(provider: FakeProvider, client: openai.OpenAI) -> None:
    """A stream that fails ends in `response.failed`, without usage."""
    provider.script(Behaviour.stream_error(after_chunks=1))
    *_, last = client.responses.create(model="m", input=HELLO, stream=True)

    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert last.response.usage is None
    assert not provider.bill[0].reported


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_that_call_a_function(provider: FakeProvider, client: openai.OpenAI, *, streamed: bool) -> None:
    """The call comes with its arguments, in one piece or in many."""
    provider.script(Behaviour.call_tool("search", query="llamas and alpacas"))
    if streamed:
        with client.responses.stream(model="m", input=HELLO) as stream:
            answer: Any = stream.get_final_response()
    else:
        answer = client.responses.create(model="m", input=HELLO)

    (call,) = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "search",
        {"query": "llamas and alpacas"},
    )


def test_counting_is_free(provider: FakeProvider, client: openai.OpenAI) -> None:
    """A count of tokens is what would be billed, and no call."""
    counted = client.responses.input_tokens.count(model="m", input=HELLO)

    assert counted.input_tokens == 13
    assert (provider.calls, provider.bill) == (0, [])
    assert provider.others == ["POST /v1/responses/input_tokens"]


def test_completions(provider: FakeProvider, client: openai.OpenAI) -> None:
    """Every prompt has its answers, sixteen words at most unless more is asked for; all of `best_of` is billed."""
    provider.script(Behaviour.answer(output_tokens=3), Behaviour.answer(" ".join("x" * 40)))
    several = client.completions.create(model="m", prompt=["one", "two"], n=1, best_of=2)
    long = client.completions.create(model="m", prompt=[1, 2, 3])

    assert len(several.choices) == 2
    assert several.usage is not None
    assert several.usage.completion_tokens == 2 * 2 * 3
    assert (long.choices[0].finish_reason, len(long.choices[0].text.split())) == ("length", 16)
    assert long.usage is not None
    assert long.usage.prompt_tokens == provider.bill[1].input_tokens == 3


def test_completions_stream(provider: FakeProvider, client: openai.OpenAI) -> None:
    """A stream says what it used if it is asked to."""
    asked = client.completions.create(
        model="m", prompt=HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=50
    )
    chunks = list(asked)
    silent = list(client.completions.create(model="m", prompt=HELLO, stream=True))

    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ECHO
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == provider.bill[0].usage.total_tokens
    assert all(chunk.usage is None for chunk in silent)
    assert [line.reported for line in provider.bill] == [True, False]


def test_embeddings(provider: FakeProvider, client: openai.OpenAI) -> None:
    """Vectors come as the SDK asks for them, and cost their input."""
    answer = client.embeddings.create(model="m", input=["llamas and", "alpacas"])
    plain = client.embeddings.create(model="m", input="llamas and", encoding_format="float", dimensions=4)

    assert [len(entry.embedding) for entry in answer.data] == [8, 8]
    assert plain.data[0].embedding == answer.data[0].embedding[:4]
    assert answer.usage.prompt_tokens == provider.bill[0].input_tokens == 3 + 2
    assert provider.bill[0].output_tokens == 0


def test_images(provider: FakeProvider, client: openai.OpenAI) -> None:
    """Images are billed by the token and told, or by the piece and not told."""
    drawn = client.images.generate(model="gpt-image-1", prompt="a llama", n=2)
    priced = FakeProvider(prices={"dall-e-3": Price(input=0, output=0, image=40_000_000)})
    with priced.serve() as base_url, at(base_url) as other:
        untold = other.images.generate(model="dall-e-3", prompt="a llama", n=2)

    assert drawn.data is not None
    assert len(drawn.data) == 2
    assert drawn.usage is not None
    assert drawn.usage.output_tokens_details is not None
    assert drawn.usage.output_tokens_details.image_tokens == provider.bill[0].output_tokens == 544
    assert untold.usage is None
    assert priced.total_nanousd == 80_000_000
    assert not priced.bill[0].reported


def test_audio(provider: FakeProvider, client: openai.OpenAI) -> None:
    """Speech is billed by characters, transcriptions by their length or by tokens, as the model has it."""
    provider.script(Behaviour(), Behaviour(audio_ms=2_500, text="hello"), Behaviour(audio_ms=2_500, text="hello"))
    spoken = client.audio.speech.create(model="tts-1", voice="alloy", input="hello").read()
    by_length = client.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"\x00sound"))
    by_token = client.audio.transcriptions.create(
        model="gpt-4o-transcribe", file=("a.wav", b"\x00sound"), prompt="llamas"
    )

    assert spoken.startswith(b"\xff\xfb")
    assert (by_length.text, by_token.text) == ("hello", "hello")
    assert by_length.usage == UsageDuration(type="duration", seconds=2.5)
    assert isinstance(by_token.usage, UsageTokens)
    assert by_token.usage.total_tokens == provider.bill[2].usage.total_tokens
    assert by_token.usage.input_token_details is not None
    assert by_token.usage.input_token_details.audio_tokens == 25
    assert [line.usage.characters for line in provider.bill] == [5, None, None]
    assert [line.usage.audio_ms for line in provider.bill] == [None, 2_500, None]


def test_azure(provider: FakeProvider, base_url: BaseURL) -> None:
    """A deployment is answered by a model, which is billed; a stream begins without choices."""
    provider.script(Behaviour.answer(model="gpt-real"), Behaviour.answer(model="gpt-real"))
    http = httpx2.Client(**PLAIN)
    with openai.AzureOpenAI(
        api_key="any", azure_endpoint=base_url.root, api_version="2026-01-01", http_client=http
    ) as client:
        answer = client.chat.completions.create(model="deployment", messages=ASKED)
        chunks = list(
            client.chat.completions.create(
                model="deployment", messages=ASKED, stream=True, stream_options={"include_usage": True}
            )
        )

    assert (answer.model, answer.choices[0].message.content) == ("gpt-real", ECHO)
    assert (chunks[0].choices, chunks[0].model) == ([], "")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 19
    assert [(line.dialect, line.model) for line in provider.bill] == [("azure_chat", "gpt-real")] * 2
    assert [attempt.model for attempt in provider.attempts] == ["deployment"] * 2


def test_azure_without_deployments(provider: FakeProvider, base_url: BaseURL) -> None:
    """Azure's newer paths name the model in the body."""
    with at(f"{base_url.root}/openai/v1/") as client:
        answer = client.chat.completions.create(model="m", messages=ASKED)
        response = client.responses.create(model="m", input=HELLO)

    assert answer.choices[0].message.content == response.output_text == ECHO
    assert [line.dialect for line in provider.bill] == ["azure_chat", "openai_responses"]


def test_gemini_behind_the_paths_of_openai(provider: FakeProvider, base_url: BaseURL) -> None:
    """Reasoning is in the total alone, and every chunk has usage, asked or not."""
    provider.script(Behaviour.answer(reasoning_tokens=7), Behaviour.answer())
    with at(f"{base_url.root}/v1beta/openai/") as client:
        answer = client.chat.completions.create(model="m", messages=ASKED)
        chunks = list(client.chat.completions.create(model="m", messages=ASKED, stream=True))

    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (13, 6, 26)
    assert provider.bill[0].output_tokens == 13
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [1, 2, 3, 4, 5, 6, 6]


def test_openrouter(provider: FakeProvider, base_url: BaseURL) -> None:
    """Usage comes unasked with the last choice, and an error inside a stream is one of a chunk."""
    provider.script(Behaviour(), Behaviour.stream_error(after_chunks=1))
    with at(f"{base_url.root}/api/v1") as client:
        *_, last = client.chat.completions.create(model="m", messages=ASKED, stream=True)
        with pytest.raises(openai.APIError, match="fails inside"):
            list(client.chat.completions.create(model="m", messages=ASKED, stream=True))

    assert last.usage is not None
    assert (len(last.choices), last.usage.total_tokens) == (1, 19)


def test_vllm() -> None:
    """Every chunk says what was used so far, if that is asked for."""
    provider = FakeProvider(platform="vllm")
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    with provider.serve() as base_url, at(base_url) as client:
        chunks = list(client.chat.completions.create(model="m", messages=ASKED, stream=True, stream_options=options))

    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [1, 2, 3, 4, 5, 6, 6, 6]


def test_groq() -> None:
    """Groq's SDK reads an answer, and in a stream what the last chunk says beside its choices."""
    provider = FakeProvider(platform="groq")
    with (
        provider.serve() as base_url,
        groq.Groq(api_key="any", base_url=base_url.root, max_retries=0, http_client=httpx.Client(**PLAIN)) as client,
    ):
        answer = client.chat.completions.create(model="m", messages=ASKED)
        chunks = list(client.chat.completions.create(model="m", messages=ASKED, stream=True))

    assert answer.choices[0].message.content == ECHO
    told = chunks[-1].x_groq
    assert told is not None
    assert told.usage is not None
    assert told.usage.total_tokens == provider.bill[1].usage.total_tokens == 19


@pytest.mark.parametrize(
    ("behaviour", "error", "code"),
    [
        (Behaviour.refuse("rate_limit"), openai.RateLimitError, "rate_limit_exceeded"),
        (Behaviour.refuse("quota"), openai.RateLimitError, "insufficient_quota"),
        (Behaviour.refuse("overloaded"), openai.InternalServerError, "server_is_overloaded"),
        (Behaviour.refuse("context"), openai.BadRequestError, "context_length_exceeded"),
        (Behaviour.refuse("unknown_model"), openai.NotFoundError, "model_not_found"),
        (Behaviour.error(402, code="broke"), openai.APIStatusError, "broke"),
    ],
)
def test_errors(
    provider: FakeProvider,
    client: openai.OpenAI,
    behaviour: Behaviour,
    error: type[openai.APIStatusError],
    code: str,
) -> None:
    """Each kind of error is the SDK's own, with its code."""
    provider.script(behaviour)
    with pytest.raises(error) as caught:
        client.responses.create(model="m", input=HELLO)

    assert caught.value.code == code
    assert provider.bill == []
