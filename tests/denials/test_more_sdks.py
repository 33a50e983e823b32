"""What the SDKs of Google, Cohere, Mistral, Ollama and OpenAI's other APIs make of refusals, whole and in mid-stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cohere
import httpx
import httpx2
import ollama
import openai
import pytest
from botocore.eventstream import EventStreamBuffer
from cohere.core.api_error import ApiError
from google import genai
from google.genai import errors, types
from mistralai.client import Mistral
from mistralai.client.errors import ResponseValidationError, SDKError
from tests.denials.test_sdks import LOOP, SPENT

from asgi_llm_guard.wire.array import ArrayMeter
from asgi_llm_guard.wire.base import Head
from asgi_llm_guard.wire.gemini import Gemini
from asgi_llm_guard.wire.refusals import Container, container_of, render, stream_error

HELLO: Any = [{"role": "user", "content": "hi"}]
OPENAI: dict[str, Callable[[openai.OpenAI, bool], Any]] = {
    "openai": lambda sdk, stream: sdk.chat.completions.create(model="m", messages=HELLO, stream=stream),
    "openai_responses": lambda sdk, stream: sdk.responses.create(model="m", input="hi", stream=stream),
    "openai_completions": lambda sdk, stream: sdk.completions.create(model="m", prompt="hi", stream=stream),
    "openai_embeddings": lambda sdk, _: sdk.embeddings.create(model="m", input="hi"),
    "openai_images": lambda sdk, stream: sdk.images.generate(model="m", prompt="hi", stream=stream),
    "openai_audio": lambda sdk, stream: sdk.audio.transcriptions.create(model="m", file=b"hi", stream=stream),
}


def client(module: Any, dialect: str, container: Container | None = None, content_type: str | None = None) -> Any:
    """An HTTP client that gets a refusal; with a container a stream that is nothing but its last event."""
    if container is None:
        refused = render(SPENT, dialect=dialect, accept=b"application/json")
        status, headers, body = refused.status, refused.headers, refused.body
    else:
        status, headers, body = 200, [], stream_error(LOOP, dialect, container)
        headers = [(b"content-type", (content_type or "text/event-stream").encode())]
    return module.Client(
        transport=module.MockTransport(lambda _: module.Response(status, headers=headers, content=body))
    )


def google(dialect: str, container: Container | None = None) -> genai.Client:
    http = client(httpx2, dialect, container)
    return genai.Client(api_key="k", http_options=types.HttpOptions(httpx_client=http))


def test_google() -> None:
    """google-genai raises its own error with our message, for a refusal and for the end of a stream."""
    with pytest.raises(errors.ClientError) as raised:
        google("gemini").models.generate_content(model="m", contents="hi")
    assert (raised.value.code, raised.value.message, raised.value.status) == (402, SPENT.message, "RESOURCE_EXHAUSTED")
    assert raised.value.details["error"]["details"][0]["reason"] == "BUDGET_EXHAUSTED"
    with pytest.raises(errors.ClientError) as raised:
        list(google("gemini", "sse").models.generate_content_stream(model="m", contents="hi"))
    assert (raised.value.code, raised.value.message) == (429, LOOP.message)


def test_google_interactions() -> None:
    """Interactions have codes that are words; an error in mid-stream is an event of theirs."""
    with pytest.raises(Exception, match="Error code: 402") as raised:
        google("gemini_interactions").interactions.create(model="m", input="hi")
    body: Any = raised.value.body  # type: ignore[attr-defined]
    assert (body["error"]["code"], body["error"]["message"]) == ("budget_exhausted", SPENT.message)
    events = list(google("gemini_interactions", "sse").interactions.create(model="m", input="hi", stream=True))
    last: Any = events[-1]
    assert (last.event_type, last.error.code, last.error.message) == ("error", LOOP.code, LOOP.message)


@pytest.mark.parametrize(
    ("dialect", "ask"),
    [
        ("cohere", lambda sdk: sdk.chat(model="m", messages=HELLO)),
        ("cohere_embed", lambda sdk: sdk.embed(model="m", texts=["hi"], input_type="classification")),
        ("cohere_rerank", lambda sdk: sdk.rerank(model="m", query="hi", documents=["hi"])),
    ],
)
def test_cohere(dialect: str, ask: Callable[[cohere.ClientV2], Any]) -> None:
    """Cohere's error has our message and code in its body."""
    with pytest.raises(ApiError) as raised:
        ask(cohere.ClientV2(api_key="k", httpx_client=client(httpx, dialect)))
    assert raised.value.status_code == 402
    assert (raised.value.body["message"], raised.value.body["code"]) == (SPENT.message, SPENT.code)
    assert SPENT.message in str(raised.value).replace("\\", "")


def test_cohere_streams() -> None:
    """A stream of cohere's ends with its own last event, of either version, that says why."""
    sdk = cohere.ClientV2(api_key="k", httpx_client=client(httpx, "cohere", "sse"))
    last: Any = list(sdk.chat_stream(model="m", messages=HELLO))[-1]
    assert (last.type, last.delta.finish_reason, last.delta.error) == ("message-end", "ERROR", LOOP.message)
    lines = client(httpx, "cohere", "ndjson", "application/stream+json")
    older: Any = list(cohere.Client(api_key="k", httpx_client=lines).chat_stream(message="hi"))[-1]
    assert (older.event_type, older.finish_reason, older.error) == ("stream-end", "ERROR", LOOP.message)


def test_ollama() -> None:
    """Ollama's error is our message."""
    refused, cut = client(httpx, "ollama"), client(httpx, "ollama", "ndjson")
    for http, denied, status in ((refused, SPENT, 402), (cut, LOOP, -1)):
        sdk = ollama.Client(transport=http._transport)
        with pytest.raises(ollama.ResponseError) as raised:
            list(sdk.chat("m", stream=True))
        assert (raised.value.error, raised.value.status_code) == (denied.message, status)


def test_mistral() -> None:
    """Mistralai shows our body; of errors in mid-stream it knows none, and shows what it could not read."""
    with pytest.raises(SDKError) as raised:
        Mistral(api_key="k", client=client(httpx2, "mistral")).chat.complete(model="m", messages=HELLO)
    assert raised.value.status_code == 402
    assert json.loads(raised.value.body)["code"] == SPENT.code
    assert SPENT.message in str(raised.value)
    with pytest.raises(ResponseValidationError) as broken:
        list(Mistral(api_key="k", client=client(httpx2, "mistral", "sse")).chat.stream(model="m", messages=HELLO))
    assert json.loads(broken.value.body)["data"]["message"] == LOOP.message


@pytest.mark.parametrize("dialect", OPENAI)
def test_openai_apis(dialect: str) -> None:
    """Every API of openai's raises its status error with our code and message."""
    sdk = openai.OpenAI(api_key="k", http_client=client(httpx2, dialect), max_retries=0)
    with pytest.raises(openai.APIStatusError) as raised:
        OPENAI[dialect](sdk, False)
    assert (raised.value.status_code, raised.value.code) == (402, SPENT.code)
    assert str(raised.value) == f"Error code: 402 - {SPENT.message}"


@pytest.mark.parametrize("dialect", [name for name in OPENAI if name != "openai_embeddings"])
def test_openai_streams(dialect: str) -> None:
    """The streams of all of them end in an error that is raised."""
    sdk = openai.OpenAI(api_key="k", http_client=client(httpx2, dialect, "sse"), max_retries=0)
    with pytest.raises(openai.APIError) as raised:
        list(OPENAI[dialect](sdk, True))
    assert (raised.value.message, raised.value.code) == (LOOP.message, LOOP.code)


def test_mistral_by_openai() -> None:
    """The flat shape of Mistral's is read by openai's client as well, which many use for it."""
    sdk = openai.OpenAI(api_key="k", http_client=client(httpx2, "mistral"), max_retries=0)
    with pytest.raises(openai.APIStatusError) as raised:
        sdk.chat.completions.create(model="m", messages=HELLO)
    assert (raised.value.message, raised.value.code) == (f"Error code: 402 - {SPENT.message}", SPENT.code)


@pytest.mark.parametrize("dialect", ["bedrock", "bedrock_invoke"])
def test_bedrock_frames(dialect: str) -> None:
    """Botocore reads the last frame of a stream as an exception with our message."""
    buffer = EventStreamBuffer()
    buffer.add_data(stream_error(LOOP, dialect))
    response = next(iter(buffer)).to_response_dict()
    assert response["status_code"] == 400
    assert response["headers"][":exception-type"] == "serviceQuotaExceededException"
    assert json.loads(response["body"])["message"] == LOOP.message


@pytest.mark.parametrize("sent", [b"", b"[", b"[{}", b'[{},\n{"a":[', b"[{},"])
def test_array_stays_valid(sent: bytes) -> None:
    """A streamed array that is cut at any place is closed as valid JSON, and its last element is Gemini's error."""
    path = "/v1beta/models/m:streamGenerateContent"
    meter = Gemini().meter(Head(200, [(b"content-type", b"application/json")], path))
    assert isinstance(meter, ArrayMeter)
    told = meter.feed(sent) + meter.cut(stream_error(LOOP, "gemini", "array")) + meter.feed(b"]}]")
    assert json.loads(told)[-1]["error"]["message"] == LOOP.message


@pytest.mark.parametrize(
    ("content_type", "container"),
    [
        (b"text/event-stream; charset=utf-8", "sse"),
        (b"Application/JSON; charset=UTF-8", "array"),
        (b"", "array"),
        (b"application/x-ndjson", "ndjson"),
        (b"application/stream+json", "ndjson"),
        (b"application/vnd.amazon.eventstream", "eventstream"),
    ],
)
def test_container_of(content_type: bytes, container: str) -> None:
    """How a stream ends is told by its content type."""
    assert container_of(content_type) == container
