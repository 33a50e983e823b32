"""The dialects `cohere`, `cohere_embed` and `cohere_rerank`: requests, answers, streams, errors and SDK objects."""

from __future__ import annotations

import json
from typing import Any

import cohere
import httpx
import msgspec
import pytest
from cohere.core.api_error import ApiError
from tests.wire.harness import fixture, read

from asgi_llm_guard.pricing.book import PriceBook
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind
from asgi_llm_guard.wire.cohere import Cohere, usage_of
from asgi_llm_guard.wire.cohere_embed import CohereEmbed
from asgi_llm_guard.wire.cohere_rerank import CohereRerank
from asgi_llm_guard.wire.peek import BodyError, read_body

HELLO: Any = [{"role": "user", "content": "?"}]
CHAT, EMBED, RERANK = Cohere(), CohereEmbed(), CohereRerank()
USAGE = Usage(input_tokens=340, output_tokens=45, cache_read_tokens=320, billed_input_tokens=9, billed_output_tokens=41)
TEXT_BYTES = len("FerriesUm 7:40 ⛴.".encode())
TOOL_BYTES = len('I will look it uptimetable{"from":"Havneby"}')


def success(usage: Usage | None, text_bytes: int = 0) -> Answer:
    return Answer(kind="success", usage=usage, text_bytes=text_bytes, finished=True)


OLDER = success(
    Usage(input_tokens=70, output_tokens=9, billed_input_tokens=7, billed_output_tokens=8), len("Um 7:40 ⛴.".encode())
)
CHATS: dict[str, Answer] = {
    "response.json": success(USAGE, TEXT_BYTES),
    "response_tools.json": success(USAGE, TOOL_BYTES),
    "response_v1.json": OLDER,
    "response_billed_only.json": success(Usage(input_tokens=5, output_tokens=1), 3),
    "stream.sse": success(USAGE, TEXT_BYTES),
    "tools.sse": success(USAGE, TOOL_BYTES),
    "v1.ndjson": OLDER,
    "error.sse": Answer(kind="error", error="other", text_bytes=3),
}


def answer_to(dialect: str, name: str) -> Answer:
    case = fixture(dialect, name)
    return read(case.meter(), [case.data])[1]


def transport(content: bytes, status: int = 200, content_type: str = "application/json") -> httpx.Client:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content, headers={"content-type": content_type})

    return httpx.Client(transport=httpx.MockTransport(answer))


def client(dialect: str, name: str, status: int = 200) -> cohere.ClientV2:
    """The SDK, with a provider that always answers this fixture."""
    content_type = "text/event-stream" if name.endswith(".sse") else "application/json"
    http = transport(fixture(dialect, name).data, status, content_type)
    return cohere.ClientV2(api_key="none", httpx_client=http)


def hello(sdk: cohere.ClientV2) -> Any:
    return sdk.chat(model="command-nova", messages=HELLO)


def test_request_is_read() -> None:
    """Model, limit and streaming are as the client wrote them; usage always comes."""
    assert CHAT.read_request(read_body(fixture("cohere", "request.json").data)) == Ask(
        model="command-nova", max_output_tokens=250, stream=True, wants_usage=True
    )
    assert CHAT.read_request(read_body(fixture("cohere", "request_v1.json").data)) == Ask(
        model="command-nova", wants_usage=True
    )
    embedding = Ask(model="m", max_output_tokens=0, limits_output=False)
    assert EMBED.read_request(read_body(b'{"model":"m"}')) == embedding
    assert RERANK.read_request(read_body(b'{"model":"m"}')) == embedding


@pytest.mark.parametrize("dialect", [CHAT, EMBED, RERANK], ids=lambda dialect: dialect.name)
def test_model_is_required(dialect: Cohere | CohereEmbed | CohereRerank) -> None:
    """A request that leaves the model to the provider cannot be bounded."""
    with pytest.raises(BodyError, match="model: required"):
        dialect.read_request(read_body(b'{"messages":[]}'))


@pytest.mark.parametrize(("limit", "expected"), [(None, 50), (0, 50), (90, 50), (20, 20)])
def test_rewrite_lowers_the_limit(limit: int | None, expected: int) -> None:
    """A limit is lowered or set, never raised; 0 and absent are none."""
    view = read_body(msgspec.json.encode({"model": "m", "max_tokens": limit}))
    assert json.loads(CHAT.rewrite(view, include_usage=True, max_output_tokens=50))["max_tokens"] == expected
    assert CHAT.rewrite(view, include_usage=True, max_output_tokens=None) is view.body
    assert EMBED.rewrite(view, include_usage=True, max_output_tokens=50) is view.body
    assert RERANK.rewrite(view, include_usage=True, max_output_tokens=50) is view.body


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v2/chat", Cohere),
        ("/v1/chat", Cohere),
        ("/v2/embed", CohereEmbed),
        ("/v1/embed", CohereEmbed),
        ("/v2/rerank", CohereRerank),
        ("/v1/rerank", CohereRerank),
        ("/v2/chat/1", None),
        ("/v2/tokenize", None),
        ("/v1/embed-jobs", None),
        ("/chat", None),
    ],
)
def test_paths(path: str, kind: type | None) -> None:
    """Each billed path is recognised, and others are not."""
    assert type(dialect_for(path)) is (kind or type(None))


@pytest.mark.parametrize("name", CHATS)
def test_chat_is_read(name: str) -> None:
    """Counts with a fraction, both versions of the API, and ends with an error are read."""
    assert answer_to("cohere", name) == CHATS[name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("error_429.json", "rate_limit"),
        ("error_429_month.json", "quota"),
        ("error_402.json", "quota"),
        ("error_400_context.json", "context_overflow"),
    ],
)
def test_error_is_classified(name: str, kind: ErrorKind) -> None:
    """An error is told by its status, and where that is not enough by its message."""
    assert answer_to("cohere", name) == Answer(kind="error", error=kind)


@pytest.mark.parametrize("name", ["response.json", "response_tools.json", "response_billed_only.json"])
def test_sdk_responses(name: str) -> None:
    """What the SDK makes of an answer, its dict and the HTTP response say the same."""
    data = fixture("cohere", name).data
    assert meter_object(hello(client("cohere", name))) == CHATS[name]
    assert meter_object(json.loads(data)) == CHATS[name]
    assert meter_object(httpx.Response(200, content=data)) == CHATS[name]


@pytest.mark.parametrize("name", ["stream.sse", "tools.sse", "error.sse"])
def test_sdk_streams(name: str) -> None:
    """Events as the SDK yields them, and pieces of the raw stream, are summed like the stream itself."""
    objects, raw = item_meter(), item_meter()
    for event in client("cohere", name).chat_stream(model="m", messages=HELLO):
        objects.add(event)
    data = fixture("cohere", name).data
    for at in range(0, len(data), 7):
        raw.add(data[at : at + 7])
    assert objects.answer() == raw.answer() == CHATS[name]


def test_older_sdk() -> None:
    """The client of the older API, plain and streamed, says the same as the bytes."""
    whole = cohere.Client(api_key="none", httpx_client=transport(fixture("cohere", "response_v1.json").data))
    assert meter_object(whole.chat(message="?")) == OLDER
    lines = transport(fixture("cohere", "v1.ndjson").data, content_type="application/stream+json")
    meter = item_meter()
    for event in cohere.Client(api_key="none", httpx_client=lines).chat_stream(message="?"):
        meter.add(event)
    assert meter.answer() == OLDER


def test_sdk_error() -> None:
    """An exception of the SDK says what kind of error it is."""
    with pytest.raises(ApiError) as raised:
        hello(client("cohere", "error_402.json", 402))
    assert meter_object(raised.value) == Answer(kind="error", error="quota")


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("response.json", Usage(input_tokens=6, output_tokens=0)),
        ("response_images.json", Usage(input_tokens=793, output_tokens=0, input_image_tokens=790)),
        ("response_v1.json", Usage(input_tokens=2, output_tokens=0)),
    ],
)
def test_embeddings(name: str, usage: Usage) -> None:
    """Embeddings bill what they read: texts and images; so says the SDK's object, too."""
    assert answer_to("cohere_embed", name) == success(usage)
    assert meter_object(json.loads(fixture("cohere_embed", name).data)) == success(usage)
    if "v1" not in name:
        made = client("cohere_embed", name).embed(model="m", texts=["?"], input_type="classification")
        assert meter_object(made) == success(usage)
        meter = item_meter()
        meter.add(made)
        assert meter.answer() == success(usage)


def test_ranking() -> None:
    """A ranking is billed by its search units."""
    ranked = success(Usage(search_units=2))
    assert answer_to("cohere_rerank", "response.json") == ranked
    made = client("cohere_rerank", "response.json").rerank(model="m", query="?", documents=["a", "b"])
    assert meter_object(made) == ranked
    meter = item_meter()
    meter.add(made)
    assert meter.answer() == ranked
    assert answer_to("cohere_rerank", "error_400.json") == Answer(kind="error", error="invalid")


@pytest.mark.parametrize("count", [-1.0, 1.5, float("inf"), 1e300, "12", True, None, []])
def test_odd_counts_are_unknown(count: object) -> None:
    """A count that is no whole number of a believable size is unknown, never zero."""
    report = {"tokens": {"input_tokens": count, "output_tokens": 3.0}}
    body = {"message": {"role": "assistant"}, "finish_reason": "COMPLETE", "id": "x", "usage": report}
    answer = CHAT.read_response(200, json.dumps(body).encode())
    assert answer.usage == Usage(output_tokens=3)


def test_price_is_of_what_is_billed() -> None:
    """Tokens are counted as the model saw them, and money as Cohere bills it; the same numbers are told once."""
    book = PriceBook.snapshot(overrides={"command-nova": {"input": 1, "output": 10}})  # dollars for a million
    assert book.cost("cohere", "command-nova", USAGE, 0).nanousd == 9 * 1_000 + 41 * 10_000
    one = Usage(input_tokens=340, output_tokens=45, billed_output_tokens=41)
    assert book.cost("cohere", "command-nova", one, 0).nanousd == 340 * 1_000 + 41 * 10_000
    same = {
        "billed_units": {"input_tokens": 5.0, "output_tokens": 1.0},
        "tokens": {"input_tokens": 5, "output_tokens": 1},
    }
    assert usage_of(same) == Usage(input_tokens=5, output_tokens=1)
