"""The dialect `ollama`: requests, answers, lines, errors and SDK objects."""

from __future__ import annotations

import json

import httpx
import msgspec
import ollama
import pytest
from tests.wire.harness import fixture, read

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind
from asgi_llm_guard.wire.ollama import Ollama
from asgi_llm_guard.wire.peek import BodyError, read_body

OLLAMA = Ollama()
MODEL = "llama-nova:8b"
TEXT_BYTES = len("FerriesUm 7:40 ⛴.".encode())
TOOL_BYTES = len('timetable{"from":"Havneby"}')


def success(entered: int | None, written: int | None, text_bytes: int, model: str = MODEL) -> Answer:
    usage = Usage(input_tokens=entered, output_tokens=written, model=model)
    return Answer(kind="success", usage=usage, model=model, text_bytes=text_bytes, finished=True)


ANSWERS: dict[str, Answer] = {
    "response.json": success(36, 14, TEXT_BYTES),
    "response_generate.json": success(12, 11, len("Um 7:40 ⛴.".encode())),
    "response_tools.json": success(90, 19, TOOL_BYTES),
    "response_embed.json": success(7, 0, 0, model="embed-nova"),
    "stream.ndjson": success(36, 14, TEXT_BYTES),
    "generate.ndjson": success(12, 5, len("Um 7:40")),
    "tools.ndjson": success(36, 14, TOOL_BYTES),
    "cached_prompt.ndjson": success(None, 14, len("Um 7:40")),
    "no_counts.ndjson": Answer(kind="success", model=MODEL, text_bytes=len("Um 7:40"), finished=True),
    "error.ndjson": Answer(kind="error", model=MODEL, error="other", text_bytes=3),
    "truncated.ndjson": Answer(kind="success", model=MODEL, text_bytes=len("Um 7:40"), unread=1),
}


def answer_to(name: str) -> Answer:
    case = fixture("ollama", name)
    return read(case.meter(), [case.data])[1]


def ask(body: dict[str, object], path: str = "/api/chat") -> Ask:
    return OLLAMA.read_request(read_body(msgspec.json.encode(body)), path)


def client(name: str, status: int = 200) -> ollama.Client:
    """The SDK, with a server that always answers this fixture."""
    content = fixture("ollama", name).data

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content)

    return ollama.Client(transport=httpx.MockTransport(answer))


def test_request_is_read() -> None:
    """It streams unless it says otherwise; the limit stands among the options."""
    assert OLLAMA.read_request(read_body(fixture("ollama", "request.json").data)) == Ask(
        model=MODEL, max_output_tokens=180, stream=True, wants_usage=True
    )
    assert not ask({"model": "m", "stream": False}).stream
    assert ask({"model": "m", "stream": None}).stream
    assert ask({"model": "m"}, "/api/embed") == Ask(model="m", max_output_tokens=0, limits_output=False)


@pytest.mark.parametrize("limit", [-1, -2, 0, None])
def test_unlimited_is_no_limit(limit: int | None) -> None:
    """Conformance 52: -1, -2 and 0 ask for all that there is room for, so the model's maximum is held."""
    assert ask({"model": "m", "options": {"num_predict": limit}}).max_output_tokens is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "m", "options": {"num_predict": -3}},
        {"model": "m", "options": {"num_predict": "5"}},
        {"model": "m", "options": [5]},
        {"model": "m", "stream": "no"},
    ],
)
def test_malformed_requests_are_refused(body: dict[str, object]) -> None:
    """What cannot be bounded is a 400."""
    with pytest.raises(BodyError):
        ask(body)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"num_predict": 50}),
        ({"num_ctx": 9}, {"num_ctx": 9, "num_predict": 50}),
        ({"num_predict": -1}, {"num_predict": 50}),
        ({"num_predict": 90}, {"num_predict": 50}),
        ({"num_predict": 20}, {"num_predict": 20}),
    ],
)
def test_rewrite_lowers_the_limit(options: object, expected: object) -> None:
    """A limit is lowered or set among the other options, never raised; an unlimited request gets one."""
    view = read_body(msgspec.json.encode({"model": "m", "messages": [], "options": options}))
    assert json.loads(OLLAMA.rewrite(view, include_usage=True, max_output_tokens=50))["options"] == expected
    assert OLLAMA.rewrite(view, include_usage=True, max_output_tokens=None) is view.body
    embedding = read_body(b'{"model":"m","input":"x"}')
    assert OLLAMA.rewrite(embedding, include_usage=True, max_output_tokens=50) is embedding.body


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/ollama/api/chat/"])
def test_paths(path: str) -> None:
    """What runs a model is recognised, behind a prefix as well."""
    assert isinstance(dialect_for(path), Ollama)


@pytest.mark.parametrize("path", ["/api/pull", "/api/tags", "/api/show", "/chat", "/api", "/v1/chat"])
def test_other_paths_are_not(path: str) -> None:
    """What runs none is not a call."""
    assert not isinstance(dialect_for(path), Ollama)


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_is_read(name: str) -> None:
    """Counts come with the last line; those that are left out are unknown, not zero, beside text."""
    assert answer_to(name) == ANSWERS[name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("error_404.json", "invalid"), ("error_400_context.json", "context_overflow"), ("error_503.json", "overload")],
)
def test_error_is_classified(name: str, kind: ErrorKind) -> None:
    """An error is told by its status and its text, from bytes and from the SDK's exception."""
    assert answer_to(name) == Answer(kind="error", error=kind)
    with pytest.raises(ollama.ResponseError) as raised:
        client(name, fixture("ollama", name).head.status).chat(MODEL)
    assert meter_object(raised.value) == Answer(kind="error", error=kind)


def test_sdk_responses() -> None:
    """What the SDK makes of an answer, its dict and the HTTP response say the same."""
    assert meter_object(client("response.json").chat(MODEL)) == ANSWERS["response.json"]
    assert meter_object(client("response_tools.json").chat(MODEL)) == ANSWERS["response_tools.json"]
    assert meter_object(client("response_generate.json").generate(MODEL)) == ANSWERS["response_generate.json"]
    assert meter_object(client("response_embed.json").embed("embed-nova")) == ANSWERS["response_embed.json"]
    for name in ("response.json", "response_generate.json", "response_embed.json"):
        data = fixture("ollama", name).data
        assert meter_object(json.loads(data)) == ANSWERS[name]
        assert meter_object(httpx.Response(200, content=data)) == ANSWERS[name]


@pytest.mark.parametrize("name", ["stream.ndjson", "tools.ndjson", "no_counts.ndjson", "cached_prompt.ndjson"])
def test_sdk_streams(name: str) -> None:
    """Parts as the SDK yields them, pieces of the raw lines, and all lines in one body are summed alike."""
    objects, raw = item_meter(), item_meter()
    for part in client(name).chat(MODEL, stream=True):
        objects.add(part)
    data = fixture("ollama", name).data
    for at in range(0, len(data), 7):
        raw.add(data[at : at + 7].decode("latin-1").encode("latin-1"))
    assert objects.answer() == raw.answer() == OLLAMA.read_response(200, data) == ANSWERS[name]


def test_error_in_a_stream_of_the_sdk() -> None:
    """An error in mid-stream has no status, and is an error all the same."""
    with pytest.raises(ollama.ResponseError) as raised:
        list(client("error.ndjson").chat(MODEL, stream=True))
    assert meter_object(raised.value) == Answer(kind="error", error="other")
