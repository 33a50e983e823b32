"""The dialects `gemini` and `gemini_interactions`: paths, requests, answers, streams, errors and SDK objects."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import msgspec
import pytest
from google import genai
from google.genai import errors, types
from tests.wire.harness import fixture, read

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head
from asgi_llm_guard.wire.gemini import Gemini
from asgi_llm_guard.wire.gemini_interactions import GeminiInteractions
from asgi_llm_guard.wire.peek import BodyError, read_body

GEMINI = Gemini()
INTERACTIONS = GeminiInteractions()
MODEL = "gemini-nova-002"
PATH = "/v1beta/models/gemini-nova:generateContent"
STREAM_PATH = "/v1beta/models/gemini-nova:streamGenerateContent"
USAGE = Usage(
    input_tokens=885,
    output_tokens=274,
    cache_read_tokens=300,
    reasoning_tokens=210,
    input_audio_tokens=210,
    output_audio_tokens=50,
    input_image_tokens=120,
    output_image_tokens=0,
    service_tier="priority",
    model=MODEL,
)
TEXT_BYTES = len("Die Fähre fährt um 7:40 ⛴.".encode())
TOOL_BYTES = len('Looking it uptimetable{"from":"Havneby"}print(7)7')


def plain(read_in: int, written: int, **more: Any) -> Usage:
    return Usage(input_tokens=read_in, output_tokens=written, model=MODEL, **more)


def success(usage: Usage | None, text_bytes: int, **more: Any) -> Answer:
    return Answer(kind="success", usage=usage, model=MODEL, text_bytes=text_bytes, **{"finished": True, **more})


def ask(body: object, path: str = PATH) -> Ask:
    return GEMINI.read_request(read_body(msgspec.json.encode(body)), path)


def answer_to(dialect: str, name: str) -> Answer:
    case = fixture(dialect, name)
    return read(case.meter(), [case.data])[1]


def client(content: bytes, status: int = 200, content_type: str = "application/json") -> genai.Client:
    """The SDK, with a provider that always answers this."""

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=content, headers={"content-type": content_type})

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    once = types.HttpRetryOptions(attempts=1)
    return genai.Client(api_key="none", http_options=types.HttpOptions(httpx_client=http, retry_options=once))


# ------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "path",
    [
        PATH,
        STREAM_PATH,
        PATH.lower(),
        "/v1/models/gemini-nova:generateContent",
        "/v1alpha//models/gemini-nova:generateContent/",
        "/v1beta/tunedModels/ours-7:generateContent",
        "/v1/projects/p/locations/l/publishers/google/models/gemini-nova:streamGenerateContent",
        "/v1/projects/p/locations/l/endpoints/77:generateContent",
        "/v1beta/models/vec-nova:embedContent",
        "/v1beta/models/vec-nova:batchEmbedContents",
        "/v1beta/models/imagen-nova:predict",
    ],
)
def test_billed_paths_are_recognised(path: str) -> None:
    """Everything that is billed is metered, on the Gemini API and on Vertex AI, in any letter case."""
    assert isinstance(dialect_for(path), Gemini)


@pytest.mark.parametrize(
    "path",
    [
        "/v1beta/models/gemini-nova:countTokens",
        "/v1beta/models/gemini-nova",
        "/v1beta/models",
        "/v1beta/files/gemini-nova:generateContent",
        "/v1/projects/p/locations/l/publishers/anthropic/models/claude-nova:generateContent",
        "/v1/projects/p/locations/l/endpoints/77:predict",
        "/v1beta/interactions/int-1",
        "/v1beta/interactions/int-1/cancel",
        "/interactions",
        "/",
        "",
    ],
)
def test_other_paths_are_not(path: str) -> None:
    """What is free, or speaks something else, is not taken for a call."""
    assert dialect_for(path) is None or not isinstance(dialect_for(path), (Gemini, GeminiInteractions))


# --------------------------------------------------------------------------------- requests


def test_request_is_read() -> None:
    """The path names the model, `generationConfig` the limits; on Vertex AI the provider is told by the model."""
    view = read_body(fixture("gemini", "request.json").data)
    assert GEMINI.read_request(view, PATH) == Ask(
        model="gemini-nova", max_output_tokens=640, choices=2, wants_usage=True, service_tier="flex"
    )
    assert ask({"contents": []}, STREAM_PATH) == Ask(model="gemini-nova", stream=True, wants_usage=True)
    vertex = fixture("gemini", "request_snake.json")
    assert GEMINI.read_request(read_body(vertex.data), vertex.head.path) == Ask(
        model="vertex_ai/gemini-nova", max_output_tokens=77, wants_usage=True, service_tier="priority"
    )


@pytest.mark.parametrize(
    "config",
    [None, {}, {"maxOutputTokens": None}, {"maxOutputTokens": 0}, {"max_output_tokens": 0}],
)
def test_absent_limit_is_none(config: object) -> None:
    """Conformance 52: without a limit, or with 0, the model's maximum is held, never nothing."""
    assert ask({"generationConfig": config}).max_output_tokens is None


@pytest.mark.parametrize(
    "body",
    [
        {"generationConfig": {"maxOutputTokens": -1}},
        {"generationConfig": {"maxOutputTokens": "5"}},
        {"generationConfig": {"maxOutputTokens": True}},
        {"generationConfig": {"candidateCount": 1.5}},
        {"generationConfig": 7},
        {"generationConfig": {"maxOutputTokens": 5, "max_output_tokens": 500}},
        {"generationConfig": {"maxOutputTokens": 5}, "generation_config": {"maxOutputTokens": 500}},
        {"serviceTier": "flex", "service_tier": "priority"},
    ],
)
def test_malformed_requests_are_refused(body: object) -> None:
    """A limit that cannot be read, or is there in both spellings so that the provider may read the other, is a 400."""
    with pytest.raises(BodyError):
        ask(body)


def test_two_of_a_key_are_refused() -> None:
    """A key that occurs twice inside the configuration is refused, too."""
    with pytest.raises(BodyError, match="twice"):
        GEMINI.read_request(read_body(b'{"generationConfig":{"maxOutputTokens":5,"maxOutputTokens":500}}'), PATH)


def test_path_without_a_model_is_refused() -> None:
    """Where the route was declared by hand, the path must still name a model."""
    with pytest.raises(BodyError, match="model"):
        ask({"contents": []}, "/v1beta/generate")


def test_embeddings_and_images_have_no_output_limit() -> None:
    """Embeddings write nothing; images are counted, four where the request does not say how many."""
    assert ask({"content": {}}, "/v1/models/vec-nova:embedContent") == Ask(
        model="vec-nova", max_output_tokens=0, limits_output=False
    )
    imagen = "/v1beta/models/imagen-nova:predict"
    assert ask({"instances": [], "parameters": {"sampleCount": 3}}, imagen).images == 3
    assert ask({"instances": []}, imagen).images == 4
    assert ask({"instances": []}, "/v1beta/models/vec-nova:predict").images == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"contents": []}, {"contents": [], "generationConfig": {"maxOutputTokens": 50}}),
        (
            {"contents": [], "generationConfig": {"topK": 3, "maxOutputTokens": 90}},
            {"contents": [], "generationConfig": {"topK": 3, "maxOutputTokens": 50}},
        ),
        (
            {"contents": [], "generation_config": {"max_output_tokens": 90}},
            {"contents": [], "generation_config": {"max_output_tokens": 50}},
        ),
        (
            {"contents": [], "generationConfig": {"maxOutputTokens": 0}},
            {"contents": [], "generationConfig": {"maxOutputTokens": 50}},
        ),
        (
            {"contents": [], "generationConfig": {"maxOutputTokens": 20}},
            {"contents": [], "generationConfig": {"maxOutputTokens": 20}},
        ),
        ({"content": {}}, {"content": {}}),
    ],
)
def test_rewrite_lowers_the_limit(body: object, expected: object) -> None:
    """A limit is lowered or set in the request's own spelling, never raised; embeddings are left alone."""
    view = read_body(msgspec.json.encode(body))
    assert json.loads(GEMINI.rewrite(view, include_usage=True, max_output_tokens=50)) == expected
    assert GEMINI.rewrite(view, include_usage=True, max_output_tokens=None) is view.body


# ---------------------------------------------------------------------------------- answers

BEGUN = plain(830, 210, reasoning_tokens=210)
ANSWERS: dict[str, Answer] = {
    "response.json": success(USAGE, TEXT_BYTES),
    "response_blocked.json": success(plain(19, 0), 0),
    "response_tools.json": success(plain(40, 22), TOOL_BYTES),
    "response_list.json": success(plain(830, 2), len("Die Fähre".encode())),
    "response_embed.json": Answer(kind="success", usage=Usage(input_tokens=4, output_tokens=0), finished=True),
    "response_vertex_embed.json": Answer(kind="success", usage=Usage(input_tokens=15, output_tokens=0), finished=True),
    "response_predict.json": Answer(kind="success", usage=Usage(images=2), finished=True),
    "stream.sse": success(USAGE, TEXT_BYTES),
    "stream.array": success(USAGE, TEXT_BYTES),
    "pretty.array": success(USAGE, len('a "quoted" \\ ] } text[{\u2028'.encode())),
    "grounded.sse": success(msgspec.structs.replace(USAGE, web_searches=2), len("Um 7:40.")),
    "tools.sse": success(plain(40, 22), TOOL_BYTES),
    "tools.array": success(plain(40, 22), TOOL_BYTES),
    "blocked.sse": success(plain(19, 0), 0),
    "error.sse": Answer(kind="error", usage=BEGUN, model=MODEL, error="overload", text_bytes=4),
    "error.array": Answer(kind="error", usage=BEGUN, model=MODEL, error="overload", text_bytes=4),
    "truncated.sse": success(plain(830, 240, reasoning_tokens=210), 21, finished=False, unread=1),
    "truncated.array": success(plain(830, 240, reasoning_tokens=210), 21, finished=False, unread=1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_is_read(name: str) -> None:
    """Usage, model, text and the end of every kind of answer are what the provider said; the last report wins."""
    assert answer_to("gemini", name) == ANSWERS[name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("error_429.json", "rate_limit"),
        ("error_429_list.json", "rate_limit"),
        ("error_429_day.json", "quota"),
        ("error_429_none.json", "quota"),
        ("error_400_context.json", "context_overflow"),
        ("error_400_key.json", "auth"),
        ("error_503.json", "overload"),
    ],
)
def test_error_is_classified(name: str, kind: ErrorKind) -> None:
    """Limits of a minute pass by waiting, those of a day or of nothing do not; overflows are no rate limits."""
    assert answer_to("gemini", name) == Answer(kind="error", error=kind)


def test_the_same_by_shape() -> None:
    """Chunks are read by their types or by their shape, with the same result."""
    for name in ("response.json", "response_blocked.json", "response_tools.json"):
        data = fixture("gemini", name).data
        typed = GEMINI.meter(Head(200, [(b"content-type", b"text/event-stream")]))
        typed.feed(b"data: " + json.dumps(json.loads(data)).encode() + b"\n\n")
        assert typed.answer() == GEMINI.read_response(200, data)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"promptTokenCount": 5}, (5, None)),
        ({"promptTokenCount": 5, "candidatesTokenCount": 3, "thoughtsTokenCount": 4}, (5, 7)),
        ({"promptTokenCount": 5, "thoughtsTokenCount": 4}, (5, 4)),
        ({"promptTokenCount": 5, "totalTokenCount": 5}, (5, 0)),
        ({"promptTokenCount": 5, "candidatesTokenCount": 3, "totalTokenCount": 20}, (5, 15)),
        ({"promptTokenCount": 5, "candidatesTokenCount": 3, "totalTokenCount": 2}, (5, 3)),
        ({"promptTokenCount": -5, "candidatesTokenCount": 3}, (None, 3)),
        ({"promptTokenCount": 5, "candidatesTokenCount": 2**40}, (5, None)),
        ({"promptTokenCount": 5.5, "candidatesTokenCount": True}, None),
    ],
)
def test_odd_reports(report: dict[str, object], expected: tuple[int | None, int | None] | None) -> None:
    """What is in the total and nowhere else is billed as output; what cannot be believed is unknown."""
    body = msgspec.json.encode({"candidates": [], "usageMetadata": report})
    usage = GEMINI.read_response(200, body).usage
    assert (None if usage is None else (usage.input_tokens, usage.output_tokens)) == expected


def test_parts_beyond_the_whole_are_unknown() -> None:
    """More cached tokens than prompt, or more audio than output, are not believed."""
    report = {
        "promptTokenCount": 10,
        "candidatesTokenCount": 10,
        "cachedContentTokenCount": 11,
        "candidatesTokensDetails": [{"modality": "AUDIO", "tokenCount": 11}],
    }
    usage = GEMINI.read_response(200, msgspec.json.encode({"candidates": [], "usageMetadata": report})).usage
    assert usage == Usage(input_tokens=10, output_tokens=10)


@pytest.mark.parametrize(
    ("word", "tier"),
    [
        ("ON_DEMAND", "standard"),
        ("ON_DEMAND_FLEX", "flex"),
        ("PROVISIONED_THROUGHPUT", "provisioned_throughput"),
        ("TRAFFIC_TYPE_UNSPECIFIED", None),
        ("", None),
    ],
)
def test_traffic_type_is_a_tier(word: str, tier: str | None) -> None:
    """Vertex AI names the tier that served by its traffic; prices know it as `flex` or `priority`."""
    body = {"candidates": [], "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 2, "trafficType": word}}
    usage = GEMINI.read_response(200, msgspec.json.encode(body)).usage
    assert usage is not None
    assert usage.service_tier == tier


def test_tier_in_the_header() -> None:
    """The Gemini API names the tier in a header."""
    body = b'{"candidates":[],"usageMetadata":{"promptTokenCount":1,"totalTokenCount":2}}'
    meter = GEMINI.meter(Head(200, [(b"X-Gemini-Service-Tier", b"flex")]))
    meter.feed(body)
    usage = meter.answer().usage
    assert usage is not None
    assert usage.service_tier == "flex"


# ---------------------------------------------------------------------------------- objects


def test_sdk_objects() -> None:
    """What google-genai makes of an answer says the same as its bytes."""
    for name in ("response.json", "response_blocked.json", "response_tools.json"):
        data = fixture("gemini", name).data
        made = client(data).models.generate_content(model="gemini-nova", contents="?")
        assert meter_object(made) == GEMINI.read_response(200, data)
        assert meter_object(json.loads(data)) == GEMINI.read_response(200, data)
        assert meter_object(httpx2.Response(200, content=data)) == GEMINI.read_response(200, data)


def test_array_that_was_read_as_a_whole() -> None:
    """An HTTP response that holds a whole array says the same as the stream."""
    data = fixture("gemini", "stream.array").data
    assert meter_object(httpx2.Response(200, content=data)) == ANSWERS["stream.array"]


def test_sdk_streams() -> None:
    """Chunks as google-genai yields them, and pieces of the raw stream, are summed like the stream itself."""
    for name in ("stream.sse", "grounded.sse", "tools.sse", "blocked.sse"):
        data = fixture("gemini", name).data
        objects, raw = item_meter(), item_meter()
        for chunk in client(data, content_type="text/event-stream").models.generate_content_stream(
            model="gemini-nova", contents="?"
        ):
            objects.add(chunk)
        for at in range(0, len(data), 7):
            raw.add(data[at : at + 7])
        assert objects.answer() == raw.answer() == ANSWERS[name]


def test_sdk_embeddings() -> None:
    """Embeddings of a batch are read from the SDK's object."""
    content = b'{"embeddings":[{"values":[0.5]}],"usageMetadata":{"promptTokenCount":4}}'
    made = client(content).models.embed_content(model="vec-nova", contents="?")
    assert meter_object(made) == Answer(kind="success", usage=Usage(input_tokens=4, output_tokens=0), finished=True)


@pytest.mark.parametrize(("name", "kind"), [("error_429.json", "rate_limit"), ("error_429_day.json", "quota")])
def test_sdk_errors(name: str, kind: ErrorKind) -> None:
    """An exception of the SDK says what kind of error it is."""
    with pytest.raises(errors.ClientError) as raised:
        client(fixture("gemini", name).data, 429).models.generate_content(model="gemini-nova", contents="?")
    assert meter_object(raised.value) == Answer(kind="error", error=kind)


@pytest.mark.parametrize("thing", [None, 7, "text", {}, {"candidates": 7}, {"embeddings": [[0.1]]}, ValueError("no")])
def test_other_objects_say_nothing(thing: object) -> None:
    """What is no answer of Gemini's is not taken for one."""
    assert GEMINI.read_object(thing) is None
    assert INTERACTIONS.read_object(thing) is None
    meter = GEMINI.item_meter()
    meter.add(thing)
    assert meter.answer() is None


# ----------------------------------------------------------------------------- interactions

INTERACTION = Answer(
    kind="success",
    usage=Usage(
        input_tokens=435,
        output_tokens=123,
        cache_read_tokens=128,
        reasoning_tokens=90,
        input_audio_tokens=0,
        output_audio_tokens=0,
        input_image_tokens=10,
        output_image_tokens=0,
        web_searches=2,
        service_tier="flex",
        model="gemini-nova",
    ),
    model="gemini-nova",
    text_bytes=len("FerriesUm 7:40 ⛴.".encode()),
    finished=True,
)


def test_interaction_request() -> None:
    """The body names model or agent, limit, tier and streaming; the limit is lowered in the body's spelling."""
    view = read_body(fixture("gemini_interactions", "request.json").data)
    assert INTERACTIONS.read_request(view) == Ask(
        model="gemini-nova", max_output_tokens=400, stream=True, wants_usage=True, service_tier="flex"
    )
    lowered = json.loads(INTERACTIONS.rewrite(view, include_usage=True, max_output_tokens=50))
    assert lowered["generation_config"] == {"max_output_tokens": 50, "thinking_level": "low"}
    agent = read_body(fixture("gemini_interactions", "request_agent.json").data)
    assert INTERACTIONS.read_request(agent).model == "deep-research-nova"
    assert INTERACTIONS.rewrite(agent, include_usage=True, max_output_tokens=50) is agent.body
    with pytest.raises(BodyError, match="model: required"):
        INTERACTIONS.read_request(read_body(b'{"input":"?"}'))
    assert isinstance(dialect_for("/v1beta/interactions"), GeminiInteractions)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("response.json", INTERACTION),
        ("stream.sse", INTERACTION),
        ("response_background.json", Answer(kind="success", finished=True)),
        (
            "response_failed.json",
            Answer(
                kind="error",
                usage=Usage(input_tokens=12, output_tokens=0, model="gemini-nova"),
                model="gemini-nova",
                error="other",
            ),
        ),
        (
            "tools.sse",
            Answer(
                kind="success",
                usage=Usage(input_tokens=50, output_tokens=9, model="gemini-nova"),
                model="gemini-nova",
                text_bytes=len('timetable{"from":"Havneby"}'),
                finished=True,
            ),
        ),
        (
            "error.sse",
            Answer(kind="error", model="gemini-nova", error="overload", text_bytes=len("FerriesUm 7:40")),
        ),
        ("error_429.json", Answer(kind="error", error="rate_limit")),
        ("error_429_quota.json", Answer(kind="error", error="quota")),
        ("error_400_context.json", Answer(kind="error", error="context_overflow")),
    ],
)
def test_interaction_is_read(name: str, expected: Answer) -> None:
    """Interactions have names of their own for usage, ends and errors, and all are read."""
    assert answer_to("gemini_interactions", name) == expected


def test_interactions_of_the_sdk() -> None:
    """What the SDK makes of interactions, their events and their errors says the same as the bytes."""
    whole = client(fixture("gemini_interactions", "response.json").data)
    assert meter_object(whole.interactions.create(model="gemini-nova", input="?")) == INTERACTION
    stream = client(fixture("gemini_interactions", "stream.sse").data, content_type="text/event-stream")
    meter = item_meter()
    for event in stream.interactions.create(model="gemini-nova", input="?", stream=True):
        meter.add(event)
    assert meter.answer() == INTERACTION
    failing = client(fixture("gemini_interactions", "error_429_quota.json").data, 429)
    with pytest.raises(Exception, match="quota") as raised:
        failing.interactions.create(model="gemini-nova", input="?")
    assert meter_object(raised.value) == Answer(kind="error", error="quota")
