"""OpenAI's dialects besides chat, and Mistral's: what their fixtures say, from bytes and from the SDKs' objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import pytest
from mistralai.client.models import ChatCompletionResponse, CompletionEvent, FIMCompletionResponse
from msgspec.structs import replace
from openai._models import construct_type
from openai.types import Completion, CreateEmbeddingResponse, ImageEditStreamEvent, ImageGenStreamEvent, ImagesResponse
from openai.types.audio import Transcription, TranscriptionStreamEvent, TranscriptionVerbose, TranslationVerbose
from openai.types.responses import CompactedResponse, Response, ResponseStreamEvent
from tests.wire.harness import Fixture, every_fixture, fixture, fixtures, read

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_for, dialect_named, item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, Ask, Head
from asgi_llm_guard.wire.forms import read_any
from asgi_llm_guard.wire.peek import BodyError, read_body

NOVA = "gpt-nova-2026-05-02"
INSTRUCT = "gpt-3.5-turbo-instruct"
BRISE = "mistral-brise-latest"
FERRY = len("Look it up.Die Fähre legt um 9:15 ab.".encode())
CALL = len('departures{"pier":"Dagebüll"}'.encode())
TIDE = len("Höchststand".encode())
MOIN = len("Moin Moin, schöner Tag.".encode())
FLOOD = len("Die Flut kommt.")

RESPONSE = Usage(
    input_tokens=3100,
    output_tokens=410,
    cache_read_tokens=2048,
    cache_write_tokens=700,
    cache_write_1h_tokens=200,
    reasoning_tokens=320,
    web_searches=3,
    model=NOVA,
    service_tier="priority",
)
CALLS = Usage(
    input_tokens=80,
    output_tokens=30,
    cache_read_tokens=0,
    cache_write_tokens=0,
    reasoning_tokens=0,
    model=NOVA,
    service_tier="priority",
)
DRAWN = Usage(
    input_tokens=40, output_tokens=1056, input_image_tokens=10, output_image_tokens=1056, images=1, model="gpt-image-2"
)
TEXT = Usage(input_tokens=9, output_tokens=6, model=INSTRUCT)
CHAT = Usage(input_tokens=620, output_tokens=31, cache_read_tokens=512, model=BRISE)
IMAGES = Usage(input_tokens=58, output_tokens=12480, input_image_tokens=0, output_image_tokens=12480, images=2)
SPEECH = Usage(input_tokens=310, output_tokens=9, input_audio_tokens=300)


def done(usage: Usage | None, text_bytes: int = 0) -> Answer:
    model = usage.model if usage is not None else None
    return Answer(kind="success", usage=usage, model=model, text_bytes=text_bytes, finished=True)


ANSWERS: dict[str, Answer] = {
    "openai_responses/response.json": done(RESPONSE, FERRY),
    "openai_responses/response_tools.json": done(replace(CALLS, web_searches=1, extra=(DRAWN,)), CALL + len("logasked")),
    "openai_responses/response_background.json": Answer(kind="success", model=NOVA, finished=True),
    "openai_responses/response_compact.json": done(
        Usage(input_tokens=3100, output_tokens=410, cache_read_tokens=0, cache_write_tokens=0, reasoning_tokens=320)
    ),
    "openai_responses/error_429.json": Answer(kind="error", error="rate_limit"),
    "openai_responses/error_400_context.json": Answer(kind="error", error="context_overflow"),
    "openai_responses/stream.sse": done(RESPONSE, FERRY),
    "openai_responses/incomplete.sse": done(
        replace(RESPONSE, output_tokens=900, reasoning_tokens=900, web_searches=None)
    ),
    "openai_responses/failed.sse": Answer(
        kind="error", error="overload", model=NOVA, text_bytes=len("Look it up.Die Fähre legt ".encode())
    ),
    "openai_responses/failed_with_usage.sse": Answer(
        kind="error",
        error="rate_limit",
        model=NOVA,
        usage=replace(RESPONSE, output_tokens=0, reasoning_tokens=0, web_searches=None),
    ),
    "openai_responses/context_error.sse": Answer(kind="error", error="context_overflow", model=NOVA),
    "openai_responses/truncated.sse": Answer(
        kind="success", model=NOVA, text_bytes=len("Look it up.Die Fähre legt ".encode()), unread=1
    ),
    "openai_responses/tools.sse": done(CALLS, CALL),
    "openai_completions/response.json": done(TEXT, len("Höchststand 3,1 m".encode())),
    "openai_completions/usage.sse": done(TEXT, TIDE),
    "openai_completions/no_usage.sse": Answer(kind="success", model=INSTRUCT, text_bytes=TIDE, finished=True),
    "openai_completions/truncated.sse": Answer(kind="success", model=INSTRUCT, text_bytes=len("Höchst".encode()), unread=1),
    "openai_completions/error.sse": Answer(
        kind="error", error="other", model=INSTRUCT, text_bytes=len("Höchst".encode())
    ),
    "openai_completions/error_400_context.json": Answer(kind="error", error="context_overflow"),
    "openai_embeddings/response.json": done(Usage(input_tokens=5, output_tokens=0, model="text-embedding-3-small")),
    "openai_embeddings/response_base64.json": done(
        Usage(input_tokens=2, output_tokens=0, cache_read_tokens=0, model="text-embedding-3-small")
    ),
    "openai_embeddings/error_400_context.json": Answer(kind="error", error="context_overflow"),
    "openai_images/response.json": done(IMAGES),
    "openai_images/response_urls.json": done(Usage(images=1)),
    "openai_images/response_svg.json": done(
        replace(
            IMAGES,
            output_tokens=4160,
            output_image_tokens=4160,
            images=1,
            extra=(Usage(input_tokens=300, output_tokens=900, reasoning_tokens=120, model=NOVA),),
        )
    ),
    "openai_images/generation.sse": done(
        Usage(input_tokens=58, output_tokens=4260, input_image_tokens=0, images=1)
    ),
    "openai_images/edit.sse": done(Usage(input_tokens=1358, output_tokens=4260, input_image_tokens=1300, images=1)),
    "openai_images/truncated.sse": Answer(kind="success"),
    "openai_images/error_400.json": Answer(kind="error", error="invalid"),
    "openai_audio/response_tokens.json": done(SPEECH, FLOOD),
    "openai_audio/response_duration.json": done(Usage(audio_ms=29_300), FLOOD),
    "openai_audio/response_verbose.json": done(Usage(audio_ms=29_300), FLOOD),
    "openai_audio/response_translation.json": done(Usage(audio_ms=29_300), len("The tide is coming.")),
    "openai_audio/response_subtitles.txt": done(None),
    "openai_audio/transcript.sse": done(SPEECH, FLOOD),
    "openai_audio/speech.sse": done(Usage(input_tokens=14, output_tokens=101)),
    "openai_audio/truncated.sse": Answer(kind="success", text_bytes=len("Die Flut ")),
    "openai_audio/error_400.json": Answer(kind="error", error="invalid"),
    "mistral/response.json": done(CHAT, MOIN),
    "mistral/response_audio.json": done(
        Usage(input_tokens=410, output_tokens=12, audio_ms=31_000, model="voxtral-brise"), len("gullsGulls cry.")
    ),
    "mistral/response_fim.json": done(
        Usage(input_tokens=14, output_tokens=5, cache_read_tokens=0, model="codestral-brise"), len("hour):")
    ),
    "mistral/stream.sse": done(CHAT, MOIN),
    "mistral/tools.sse": done(CHAT, len('tide{"pier":1}')),
    "mistral/truncated.sse": Answer(kind="success", model=BRISE, text_bytes=len("Moin ")),
    "mistral/error_429.json": Answer(kind="error", error="rate_limit"),
    "mistral/error_400_context.json": Answer(kind="error", error="context_overflow"),
    "mistral/error_422.json": Answer(kind="error", error="invalid"),
}  # fmt: skip
OURS = {name.split("/")[0] for name in ANSWERS}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_read(name: str) -> None:
    """C10: usage by bucket, what is billed besides tokens, models, errors and text, of every way to answer."""
    case = fixture(*name.split("/"))
    assert read(case.meter(), [case.data]) == (case.data, ANSWERS[name])


def test_every_fixture_has_its_answer() -> None:
    """No fixture of these dialects goes untested."""
    assert {str(case) for case in every_fixture() if case.dialect in OURS and case.kind != "request"} == set(ANSWERS)


# --------------------------------------------------------------------------------- objects

MODELS: dict[str, Any] = {
    "openai_responses/response.json": Response,
    "openai_responses/response_tools.json": Response,
    "openai_responses/response_background.json": Response,
    "openai_responses/response_compact.json": CompactedResponse,
    "openai_completions/response.json": Completion,
    "openai_embeddings/response.json": CreateEmbeddingResponse,
    "openai_embeddings/response_base64.json": None,  # the SDK decodes the vectors, and has lists of numbers then
    "openai_images/response.json": ImagesResponse,
    "openai_images/response_urls.json": ImagesResponse,
    "openai_images/response_svg.json": ImagesResponse,
    "openai_audio/response_tokens.json": Transcription,
    "openai_audio/response_duration.json": Transcription,
    "openai_audio/response_verbose.json": TranscriptionVerbose,
    "openai_audio/response_translation.json": None,  # as below: the SDK's type has no `task`
    "mistral/response.json": ChatCompletionResponse,
    "mistral/response_audio.json": ChatCompletionResponse,
    "mistral/response_fim.json": FIMCompletionResponse,
}
EVENTS: dict[str, Any] = {
    "openai_responses/stream.sse": ResponseStreamEvent,
    "openai_responses/incomplete.sse": ResponseStreamEvent,
    "openai_responses/failed.sse": ResponseStreamEvent,
    "openai_responses/failed_with_usage.sse": ResponseStreamEvent,
    "openai_responses/context_error.sse": ResponseStreamEvent,
    "openai_responses/tools.sse": ResponseStreamEvent,
    "openai_completions/usage.sse": Completion,
    "openai_completions/no_usage.sse": Completion,
    "openai_images/generation.sse": ImageGenStreamEvent,
    "openai_images/edit.sse": ImageEditStreamEvent,
    "openai_audio/transcript.sse": TranscriptionStreamEvent,
    "openai_audio/speech.sse": None,  # the SDK gives the bytes
}


@pytest.mark.parametrize("name", MODELS)
def test_sdk_objects(name: str) -> None:
    """The SDK's own object, the dict and the HTTP response give the same answer as the bytes."""
    case = fixture(*name.split("/"))
    raw = json.loads(case.data)
    assert meter_object(raw) == ANSWERS[name]
    assert meter_object(httpx.Response(200, content=case.data)) == ANSWERS[name]
    if MODELS[name] is not None:
        assert meter_object(MODELS[name].model_validate(raw)) == ANSWERS[name]


def test_sdk_translation_of_a_shape_of_its_own() -> None:
    """A translation whose SDK object has lost its task is not taken for one: any object has a text."""
    raw = json.loads(fixture("openai_audio", "response_translation.json").data)
    del raw["task"]
    assert meter_object(TranslationVerbose.model_validate(raw)) is None


@pytest.mark.parametrize("name", EVENTS)
def test_sdk_events(name: str) -> None:
    """The SDK's own events, dicts, events in a wrapper, and pieces of the raw stream add up to what its bytes do."""
    case = fixture(*name.split("/"))
    raws = [item for item in case.items if isinstance(item, dict)]
    shapes: list[Sequence[object]] = [raws, [{"kind": "raw", "data": raw} for raw in raws], [case.data.decode()]]
    if EVENTS[name] is not None:
        shapes.append([construct_type(value=raw, type_=EVENTS[name]) for raw in raws])
    for items in shapes:
        meter = item_meter()
        for item in items:
            meter.add(item)
        answer = meter.answer()
        assert answer is not None
        assert replace(answer, finished=ANSWERS[name].finished) == ANSWERS[name]  # a list has no `[DONE]`


@pytest.mark.parametrize("name", ["stream.sse", "tools.sse"])
def test_mistral_events(name: str) -> None:
    """Mistralai's events wrap the chunk."""
    case = fixture("mistral", name)
    meter = item_meter()
    for raw in case.items:
        if isinstance(raw, dict):
            meter.add(CompletionEvent.model_validate({"data": raw}))
    assert meter.answer() == ANSWERS[str(case)]


@pytest.mark.parametrize("case", [case for case in fixtures("error") if case.dialect == "mistral"], ids=str)
def test_mistral_errors_as_objects(case: Fixture) -> None:
    """A flat error is one by its shape; a `detail` may be anybody's and says nothing by itself."""
    raw = json.loads(case.data)
    expected = Answer(kind="error", error="context_overflow" if "context" in case.name else "other")
    if case.name == "error_429.json":
        expected = Answer(kind="error", error="rate_limit")
    assert meter_object(raw) == (None if "detail" in raw else expected)


# -------------------------------------------------------------------------------- requests

ASKS: dict[str, Ask] = {
    "openai_responses/request.json": Ask(
        model="gpt-nova", max_output_tokens=900, stream=True, wants_usage=True, service_tier="fast"
    ),
    "openai_responses/request_compact.json": Ask(model="gpt-nova", limits_output=False),
    "openai_completions/request.json": Ask(model=INSTRUCT, max_output_tokens=40, choices=6),
    "openai_embeddings/request.json": Ask(model="text-embedding-3-small", max_output_tokens=0, limits_output=False),
    "openai_images/request.json": Ask(
        model="gpt-image-2", max_output_tokens=6240, limits_output=False, choices=2, images=2
    ),
    "openai_images/request_svg.json": Ask(
        model="gpt-image-2", alternatives=("gpt-nova",), max_output_tokens=12_480, limits_output=False, images=1
    ),
    "openai_audio/request.json": Ask(
        model="gpt-4o-mini-tts",
        max_output_tokens=1000 + 6 * len("Die Fähre legt ab.".encode()),
        limits_output=False,
        wants_usage=True,
        characters=18,
    ),
    "mistral/request.json": Ask(model=BRISE, max_output_tokens=90, stream=True, wants_usage=True),
    "mistral/request_fim.json": Ask(model="codestral-brise", max_output_tokens=60),
}


@pytest.mark.parametrize("case", [case for case in fixtures("request") if case.dialect in OURS], ids=str)
def test_requests_are_read(case: Fixture) -> None:
    """Model, limits, multiplicity and what is billed besides tokens are as the client wrote them."""
    assert case.spoken.read_request(read_body(case.data), case.head.path) == ASKS[str(case)]


def ask(dialect: str, path: str = "", /, **body: object) -> Ask:
    return dialect_named(dialect).read_request(read_body(msgspec.json.encode({"model": "m", **body})), path)


def rewrite(dialect: str, body: bytes, most: int | None = None, *, include_usage: bool = False) -> bytes:
    return dialect_named(dialect).rewrite(read_body(body), include_usage=include_usage, max_output_tokens=most)


@pytest.mark.parametrize(
    ("body", "limit", "choices"),
    [
        ({}, 16, 1),
        ({"max_tokens": 0}, None, 1),
        ({"prompt": "a", "n": 3}, 16, 3),
        ({"prompt": ["a", "b"], "n": 3, "best_of": 5}, 16, 10),
        ({"prompt": ["a"], "best_of": 2, "n": 3}, 16, 3),
        ({"prompt": [1, 2, 3]}, 16, 1),
        ({"prompt": [[1, 2], [3], [4]]}, 16, 3),
        ({"prompt": []}, 16, 1),
        ({"prompt": None}, 16, 1),
    ],
)
def test_multiplicity_of_completions(body: dict[str, Any], limit: int | None, choices: int) -> None:
    """T4: each prompt is completed as often as the larger of `n` and `best_of` says, 16 tokens where no limit is set."""
    asked = ask("openai_completions", **body)
    assert (asked.max_output_tokens, asked.choices) == (limit, choices)


def test_too_many_completions_are_refused() -> None:
    """Prompts times choices have a bound, as choices alone have."""
    with pytest.raises(BodyError, match="prompt: expected at most 65536 completions in all, got 131072"):
        ask("openai_completions", prompt=["a", "b"], n=65_536)


def test_limits_are_lowered_under_their_own_names() -> None:
    """Every dialect lowers the limit that it has, sets it where there is none, and never raises it."""
    assert rewrite("openai_responses", b'{"model":"m"}', 50) == b'{"model":"m","max_output_tokens":50}'
    assert rewrite("openai_responses", b'{"max_output_tokens":60}', 50) == b'{"max_output_tokens":50}'
    assert rewrite("openai_responses", b'{"max_output_tokens":40}', 50) == b'{"max_output_tokens":40}'
    assert rewrite("openai_completions", b'{"max_tokens":60}', 50) == b'{"max_tokens":50}'
    assert rewrite("openai_completions", b'{"max_tokens":0}', 50) == b'{"max_tokens":50}'
    assert rewrite("openai_completions", b'{"model":"m"}', 50) == b'{"model":"m"}'
    assert rewrite("openai_completions", b'{"model":"m"}', 5) == b'{"model":"m","max_tokens":5}'
    assert rewrite("mistral", b'{"model":"m"}', 50) == b'{"model":"m","max_tokens":50}'
    assert rewrite("mistral", b'{"max_tokens":40}', 50) == b'{"max_tokens":40}'


def test_usage_is_asked_for_where_it_must_be() -> None:
    """Legacy completions report as chats do; Responses and Mistral report unasked, and would refuse to be asked."""
    body = b'{"model":"m","stream":true}'
    asked = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'
    assert rewrite("openai_completions", body, include_usage=True) == asked
    for dialect in ("openai_responses", "mistral", "openai_images", "openai_audio", "openai_embeddings"):
        assert rewrite(dialect, body, include_usage=True) == body


@pytest.mark.parametrize(
    ("body", "tokens", "count"),
    [
        ({}, 2 * 6240, 1),
        ({"size": "auto", "n": 10}, 2 * 6240, 10),
        ({"size": "256x256"}, 6240, 1),
        ({"size": "3840x2160"}, 6 * 6240, 1),
        ({"size": "1024x1024", "quality": "max"}, 4 * 6240, 1),
        ({"size": "1024x1024", "partial_images": 3}, 6240 + 300, 1),
        ({"size": "1024x1024", "output_format": "gif"}, 9 * 6240, 1),
        ({"size": "1024x1024", "output_format": "gif", "frame_count": 16}, 16 * 6240, 1),
    ],
)
def test_bounds_of_images(body: dict[str, Any], tokens: int, count: int) -> None:
    """T4: images are bounded by their number, size, quality, frames and partial images."""
    asked = ask("openai_images", **body)
    assert (asked.max_output_tokens, asked.images, asked.choices) == (tokens, count, count)


def test_speech_needs_a_text() -> None:
    """What is spoken is billed by its length, so a request without it is refused."""
    with pytest.raises(BodyError, match="input: expected the text to be spoken"):
        ask("openai_audio", "/v1/audio/speech", input=7)
    assert ask("openai_audio", "/v1/audio/speech", input="a", stream_format="sse").stream


def test_speech_is_metered_by_the_request() -> None:
    """Sound passes as it is; the characters of the request are what is known of it, and an error has none."""
    asked = ask("openai_audio", "/v1/audio/speech", input="äbc")
    audio = dialect_named("openai_audio")
    sound = Head(200, [(b"content-type", b"audio/mpeg")], "/v1/audio/speech", asked)
    assert read(audio.meter(sound), [b"\xff\xfb", b"\x90"]) == (b"\xff\xfb\x90", done(Usage(characters=3)))
    assert read(audio.meter(replace(sound, ask=None)), [b"\xff"])[1] == done(None)
    failed = replace(sound, status=503)
    assert read(audio.meter(failed), [b"x"])[1] == Answer(kind="error", error="overload")


# ----------------------------------------------------------------------------------- forms


def form(url: str, data: dict[str, str], content: bytes, field: str = "file") -> tuple[str, Ask]:
    request = httpx.Request("POST", f"https://api.openai.com{url}", data=data, files={field: ("x", content)})
    request.read()
    dialect = dialect_for(url, "api.openai.com")
    assert dialect is not None
    headers = [(name.encode(), value.encode()) for name, value in request.headers.items()]
    return dialect.name, dialect.read_request(read_any(request.content, headers), url)


def wav(seconds: int, *, rate: int = 16_000) -> bytes:
    size = seconds * rate * 2
    head = b"RIFF" + (36 + size).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    fmt = b"\1\0\1\0" + rate.to_bytes(4, "little") + (rate * 2).to_bytes(4, "little") + b"\2\0\x10\0"
    return head + fmt + b"data" + size.to_bytes(4, "little") + bytes(size)


def test_recordings_are_bounded_by_their_size() -> None:
    """A WAV by what its head says, anything else by the lowest rate there is; tokens by the length."""
    name, asked = form("/v1/audio/transcriptions", {"model": "whisper-1", "response_format": "json"}, wav(60))
    assert (name, asked.model, asked.stream) == ("openai_audio", "whisper-1", False)
    assert 60_000 <= asked.audio_ms < 60_010
    assert asked.input_tokens is not None
    assert 60 * 32 < asked.input_tokens < 60 * 32 + 300
    _, asked = form("/v1/audio/translations", {"model": "m", "stream": "true"}, b"OggS" + bytes(50_000))
    assert (asked.audio_ms, asked.stream) == (2 * 50_004, True)
    _, asked = form("/v1/audio/transcriptions", {"model": "m"}, wav(1, rate=100))
    assert asked.audio_ms == 2 * len(wav(1, rate=100)), "a rate that nobody uses is not believed"


def test_linked_recordings_are_assumed_to_be_long() -> None:
    """A request without the recording, which some servers take, is held for hours of it."""
    assert ask("openai_audio", "/v1/audio/transcriptions", file_url="https://x.example/a.mp3").audio_ms == 14_400_000
    body = b'--e\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--e--'
    view = read_any(body, [(b"content-type", b"multipart/form-data; boundary=e")])
    assert dialect_named("openai_audio").read_request(view, "/v1/audio/transcriptions").audio_ms == 14_400_000


def test_edits_are_read_from_forms() -> None:
    """Model, number and size come from the fields of a form; each picture that is sent is bounded by itself."""
    data = {"model": "gpt-image-2", "n": "3", "size": "1024x1024", "prompt": "x" * 500, "svg[model]": "gpt-nova"}
    name, asked = form("/v1/images/edits", data, b"\x89PNG" + bytes(300_000), "image[]")
    assert (name, asked.images, asked.choices, asked.max_output_tokens) == ("openai_images", 3, 3, 6240)
    assert asked.alternatives == ("gpt-nova",)
    assert asked.input_tokens is not None
    assert 12_500 < asked.input_tokens < 13_500


# ----------------------------------------------------------------------------------- paths

PATHS: dict[str, str | None] = {
    "/v1/responses": "openai_responses",
    "/v1/responses/": "openai_responses",
    "/responses": "openai_responses",
    "/backend-api/codex/responses": "openai_responses",
    "/openai/responses": "openai_responses",
    "/openai/v1/responses": "openai_responses",
    "/v1/responses/compact": "openai_responses",
    "/v1/responses/input_tokens": None,
    "/v1/responses/resp_1": None,
    "/v1/responses/resp_1/cancel": None,
    "/surveys/responses": None,
    "/v1/completions": "openai_completions",
    "/beta/completions": "openai_completions",
    "/openai/deployments/ours/completions": "openai_completions",
    "/v1/chat/completions": "openai",
    "/v1/fim/completions": "mistral",
    "/v1/agents/completions": None,
    "/v1/embeddings": "openai_embeddings",
    "/openai/deployments/ours/embeddings": "openai_embeddings",
    "/v1beta/openai/embeddings": "openai_embeddings",
    "/words/embeddings": None,
    "/v1/images/generations": "openai_images",
    "/v1/images/edits": "openai_images",
    "/v1/images/variations": "openai_images",
    "/openai/deployments/ours/images/generations": "openai_images",
    "/v1/images/1": None,
    "/v1/audio/speech": "openai_audio",
    "/v1/audio/transcriptions": "openai_audio",
    "/v1/audio/translations": "openai_audio",
    "/v1/audio/voices": None,
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str) -> None:
    """An operation is known under every base that servers put it, and no other path is taken for one."""
    dialect = dialect_for(path)
    assert (dialect.name if dialect is not None else None) == PATHS[path]


def test_mistral_is_known_by_its_host() -> None:
    """Chats at Mistral's host are Mistral's; at one that only sounds like it they are not."""
    names = [
        dialect.name if (dialect := dialect_for("/v1/chat/completions", host)) is not None else None
        for host in ("api.mistral.ai", "mistral.ai", "notmistral.ai", "api.mistral.ai.example", "")
    ]
    assert names == ["mistral", "mistral", "openai", "openai", "openai"]


def test_azure_deployment_is_the_model() -> None:
    """In a deployment's path the deployment is billed, whatever the body says, for every operation."""
    for dialect, what in (
        ("openai_completions", "completions"),
        ("openai_embeddings", "embeddings"),
        ("openai_images", "images/generations"),
    ):
        assert ask(dialect, f"/openai/deployments/ours/{what}").model == "ours"
    with pytest.raises(BodyError, match="model: required, got none"):
        dialect_named("openai_responses").read_request(read_body(b"{}"), "/openai/v1/responses")


# -------------------------------------------------------------------------- what is billed


def responses_usage(**members: object) -> Usage | None:
    body = {"object": "response", "output": [], "usage": {"input_tokens": 5, "output_tokens": 2}, **members}
    plain = dialect_named("openai_responses").read_response(200, msgspec.json.encode(body)).usage
    assert plain == dialect_named("openai_responses").read_response(201, msgspec.json.encode(body)).usage
    return plain


def test_searches_are_counted_where_no_count_is_told() -> None:
    """Servers that report no tool usage have their search calls counted; opening a page is none."""
    search, opening = (
        {"type": "web_search_call", "action": {"type": "search"}},
        {
            "type": "web_search_call",
            "action": {"type": "open_page"},
        },
    )
    usage = responses_usage(output=[search, {"type": "web_search_call"}, opening])
    assert usage is not None
    assert usage.web_searches == 2
    told = responses_usage(output=[search], tool_usage={"web_search": {"num_requests": 0}})
    assert told is not None
    assert told.web_searches == 0


def test_images_of_a_tool_without_a_model() -> None:
    """Where the tool names no model, the default one has drawn."""
    usage = responses_usage(output=[{"type": "image_generation_call"}])
    assert usage is not None
    assert usage.extra == (Usage(images=1, model="gpt-image-1"),)


def test_cost_that_openrouter_reports() -> None:
    """The reported cost is taken in nano-dollars, with what the caller's own key was charged; no other value is."""
    chat = dialect_named("openai")

    def cost(**report: object) -> int | None:
        usage = {"prompt_tokens": 1, "completion_tokens": 1, **report}
        answer = chat.read_response(200, json.dumps({"choices": [], "usage": usage}).encode())
        assert answer.usage is not None
        return answer.usage.reported_nanousd

    assert cost(cost=0.00014) == 140_000
    assert cost(cost=0) == 0
    assert cost(cost=0.0001, is_byok=True, cost_details={"upstream_inference_cost": 0.002}) == 2_100_000
    assert cost(cost=0.0001, is_byok=True, cost_details={}) is None
    unbelievable: tuple[object, ...] = (-1, True, "1", float("nan"), float("inf"), 1e12, None, {})
    for bad in unbelievable:
        assert cost(cost=bad) is None


def test_fallbacks_of_openrouter() -> None:
    """All models of the list may answer; the first is asked for where none is named; nonsense is refused."""
    chat = dialect_named("openai")

    def asked(body: dict[str, object]) -> tuple[str, tuple[str, ...]]:
        read = chat.read_request(read_body(msgspec.json.encode(body)))
        return read.model, read.alternatives

    assert asked({"model": "a/b", "models": ["a/b", "c/d"]}) == ("a/b", ("c/d",))
    assert asked({"models": ["a/b", "c/d"], "route": "fallback"}) == ("a/b", ("c/d",))
    assert asked({"model": "m", "models": None}) == ("m", ())
    malformed: tuple[object, ...] = ("a", ["a", 1], [""], ["x"] * 65, {"a": 1})
    for bad in malformed:
        with pytest.raises(BodyError, match="models: expected a list of up to 64 names of models"):
            asked({"model": "m", "models": bad})
    with pytest.raises(BodyError, match="model: required"):
        asked({"models": []})


def test_predictions_are_billed_beside_the_limit() -> None:
    """T4: tokens of a prediction that were rejected are billed as output, so the limit alone is no bound."""
    prediction = {"type": "content", "content": "x" * 500}
    asked = ask("openai", max_tokens=100, prediction=prediction)
    assert asked.max_output_tokens is not None
    assert 600 <= asked.max_output_tokens < 700
    assert not asked.limits_output
    assert ask("openai", prediction=prediction).max_output_tokens is None
    assert ask("openai", max_tokens=100, prediction=None) == ask("openai", max_tokens=100)


def test_embeddings_write_nothing() -> None:
    """Whatever a report says of output, nothing is generated; where only the total is told, it is the input."""
    body = {"object": "list", "data": [], "usage": {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}}
    embeddings = dialect_named("openai_embeddings")
    for report, entered in (({"completion_tokens_details": {"reasoning_tokens": 5}}, 3), ({"prompt_tokens": None}, 11)):
        usage = {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11, **report}
        answer = embeddings.read_response(200, msgspec.json.encode({**body, "usage": usage}))
        assert answer.usage == Usage(input_tokens=entered, output_tokens=0)
