"""Media in the bodies of every API: each is bounded, and its base64 is not taken for text."""

from __future__ import annotations

import base64
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asgi_llm_guard.estimate import (
    _TOOLS,
    FILE_TOKENS,
    FRAMING_TOKENS,
    HELD_TOKENS,
    IMAGE_TOKENS,
    PAGE_TOKENS,
    TOOLS_TOKENS,
    needs,
)

BLOB = base64.b64encode(bytes(range(256)) * 100).decode()  # 25 KB
URI = f"data:image/png;base64,{BLOB}"
LINK = "https://example.org/thing"

#: By API: a body around a text, and what the media in it cost at least.
IMAGES: dict[str, Any] = {
    "openai chat": lambda text: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": URI}}]}]
    },
    "openai responses": lambda text: {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": URI}]},
        ]
    },
    "openai responses, made before": lambda text: {
        "input": [{"role": "user", "content": text}, {"type": "image_generation_call", "id": "ig_1", "result": BLOB}]
    },
    "openai responses, made by code": lambda text: {
        "input": [{"type": "code_interpreter_call", "code": text, "outputs": [{"type": "image", "url": URI}]}]
    },
    "openai images, edited": lambda text: {"prompt": text, "images": [{"image_url": URI}]},
    "anthropic": lambda text: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BLOB}},
                    {"type": "text", "text": text},
                ],
            }
        ]
    },
    "anthropic, of a tool": lambda text: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "content": [
                            {"type": "text", "text": text},
                            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BLOB}},
                        ],
                    }
                ],
            }
        ]
    },
    "gemini": lambda text: {
        "contents": [{"parts": [{"text": text}, {"inlineData": {"mimeType": "image/png", "data": BLOB}}]}]
    },
    "gemini, in snake case": lambda text: {
        "system_instruction": {"parts": [{"inline_data": {"mime_type": "image/png", "data": BLOB}}]},
        "contents": [{"parts": [{"text": text}]}],
    },
    "gemini, of a tool": lambda text: {
        "contents": [
            {
                "parts": [
                    {
                        "function_response": {
                            "name": "f",
                            "response": {"text": text},
                            "parts": [{"inline_data": {"mime_type": "image/png", "data": BLOB}}],
                        }
                    }
                ]
            }
        ]
    },
    "gemini, embedded": lambda text: {
        "requests": [{"content": {"parts": [{"text": text}, {"inlineData": {"mimeType": "image/png", "data": BLOB}}]}}]
    },
    "gemini interactions": lambda text: {
        "input": [{"type": "text", "text": text}, {"type": "image", "mime_type": "image/png", "data": BLOB}]
    },
    "imagen": lambda text: {"instances": [{"prompt": text, "image": {"bytesBase64Encoded": BLOB, "mimeType": "image/png"}}]},
    "bedrock": lambda text: {
        "messages": [{"role": "user", "content": [{"text": text}, {"image": {"format": "png", "source": {"bytes": BLOB}}}]}]
    },
    "bedrock, of a tool": lambda text: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "toolResult": {
                            "content": [{"json": {"text": text}}, {"image": {"format": "png", "source": {"bytes": BLOB}}}]
                        }
                    }
                ],
            }
        ]
    },
    "cohere": lambda text: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": URI}}]}]
    },
    "cohere, embedded": lambda text: {"inputs": [{"content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": URI}}]}]},
    "cohere, embedded alone": lambda text: {"texts": [text], "images": [URI]},
    "mistral": lambda text: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": URI}]}]
    },
    "ollama": lambda text: {"messages": [{"role": "user", "content": text, "images": [BLOB]}]},
    "ollama, generate": lambda text: {"prompt": text, "images": [BLOB]},
}  # fmt: skip

texts = st.text(max_size=300)  # no surrogates, which have no bytes


@pytest.mark.parametrize("api", sorted(IMAGES))
@given(text=texts, ascii_only=st.booleans())
@example(text="functions", ascii_only=True)
def test_an_image_in_every_api(api: str, text: str, ascii_only: bool) -> None:
    """T4: whatever the API, the bound has every byte of the text, one image, and not the image's base64."""
    body = json.dumps({"model": "m", **IMAGES[api](text)}, ensure_ascii=ascii_only).encode()
    bound = needs(body).input_tokens
    around = len(body) - len(BLOB)
    grown = sum(max(0, len(unicodedata.normalize("NFKC", letter).encode()) - len(letter.encode())) for letter in text)
    assert bound >= FRAMING_TOKENS + len(text.encode()) + grown + IMAGE_TOKENS
    tools = TOOLS_TOKENS if f'{text}"'.encode() in _TOOLS else 0  # a text that is the name of a field
    assert bound <= FRAMING_TOKENS + around + grown + tools + IMAGE_TOKENS


LINKS: dict[str, tuple[dict[str, Any], int]] = {
    "gemini file": ({"contents": [{"parts": [{"fileData": {"mimeType": "application/pdf", "fileUri": LINK}}]}]}, FILE_TOKENS),
    "gemini file, in snake case": ({"contents": [{"parts": [{"file_data": {"file_uri": LINK}}]}]}, FILE_TOKENS),
    "gemini interactions": ({"input": [{"type": "video", "uri": LINK}]}, FILE_TOKENS),
    "gemini interactions, image": ({"input": [{"type": "image", "uri": LINK}]}, IMAGE_TOKENS),
    "anthropic document": ({"messages": [{"content": [{"type": "document", "source": {"type": "url", "url": LINK}}]}]}, FILE_TOKENS),
    "bedrock document": ({"messages": [{"content": [{"document": {"name": "d", "format": "pdf", "source": {"s3Location": {"uri": LINK}}}}]}]}, FILE_TOKENS),
    "bedrock video": ({"messages": [{"content": [{"video": {"format": "mp4", "source": {"s3Location": {"uri": LINK}}}}]}]}, FILE_TOKENS),
    "mistral document": ({"messages": [{"content": [{"type": "document_url", "document_url": LINK}]}]}, FILE_TOKENS),
    "code interpreter": ({"input": [{"type": "code_interpreter_call", "outputs": [{"type": "image", "url": LINK}]}]}, IMAGE_TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("api", sorted(LINKS))
def test_what_is_linked_in_every_api(api: str) -> None:
    """T4: a short link to something long is bounded by what it may lead to."""
    request, tokens = LINKS[api]
    body = json.dumps(request).encode()
    assert needs(body).input_tokens == FRAMING_TOKENS + len(body) + tokens


FILES: dict[str, dict[str, Any]] = {
    "openai chat": {"messages": [{"content": [{"type": "file", "file": {"file_data": f"data:application/pdf;base64,{BLOB}"}}]}]},
    "openai responses": {"input": [{"content": [{"type": "input_file", "file_data": f"data:application/pdf;base64,{BLOB}"}]}]},
    "anthropic": {"messages": [{"content": [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": BLOB}}]}]},
    "gemini": {"contents": [{"parts": [{"inlineData": {"mimeType": "application/pdf", "data": BLOB}}]}]},
    "bedrock": {"messages": [{"content": [{"document": {"name": "d", "format": "pdf", "source": {"bytes": BLOB}}}]}]},
}  # fmt: skip


@pytest.mark.parametrize("api", sorted(FILES))
def test_a_file_in_every_api(api: str) -> None:
    """T4: a file costs a page and a token for each character of its base64, in every API alike."""
    body = json.dumps(FILES[api]).encode()
    assert needs(body).input_tokens == FRAMING_TOKENS + len(body) + PAGE_TOKENS


@pytest.mark.parametrize(
    "part",
    [
        {"type": "document", "document": {"id": "1", "data": {"title": "t", "snippet": BLOB}}},  # Cohere's
        {"document": {"name": "d", "source": {"text": BLOB}}},  # Bedrock's
        {"functionResponse": {"name": "f", "response": {"image": BLOB}}},  # Gemini's
    ],
)
def test_documents_that_are_text(part: dict[str, Any]) -> None:
    """T4: what a model gets to read as text counts by its bytes, wherever it stands."""
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    assert needs(body).input_tokens == FRAMING_TOKENS + len(body)


# --------------------------------------------------------------------- what else a request may need


@pytest.mark.parametrize(
    "request_body, may",
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, False),
        (IMAGES["gemini"]("hi"), False),
        (IMAGES["bedrock"]("hi"), False),
        (FILES["gemini"], False),
        ({"contents": [{"parts": [{"inlineData": {"mimeType": "audio/ogg", "data": BLOB}}]}]}, True),
        ({"contents": [{"parts": [{"inlineData": {"mimeType": "video/mp4", "data": BLOB}}]}]}, True),
        ({"contents": [{"parts": [{"fileData": {"fileUri": LINK}}]}]}, True),  # it may lead to anything
        ({"contents": [{"parts": [{"fileData": {"fileUri": LINK, "mimeType": "audio/mp3"}}]}]}, True),
        ({"messages": [{"content": [{"type": "input_audio", "input_audio": {"format": "wav", "data": BLOB}}]}]}, True),
        ({"messages": [{"content": [{"video": {"format": "mp4", "source": {"bytes": BLOB}}}]}]}, True),
        ({"input": "go on", "previous_response_id": "resp_1"}, True),  # there may be some in it
        ({"contents": [], "cachedContent": "cachedContents/1"}, True),
    ],
)
def test_where_audio_may_be(request_body: dict[str, Any], may: bool) -> None:
    """Audio is held for where there may be some: in parts, in files of unknown kind, in what the provider holds."""
    assert needs(json.dumps(request_body).encode()).may_have_audio is may


@pytest.mark.parametrize("body", [b"{", b'{"messages": "\\u0061udio"}', b'{"file": NaN}'])
def test_what_cannot_be_read_may_be_anything(body: bytes) -> None:
    """T4: a body that is not read, or spells letters as escapes, is held for at the dearest."""
    found = needs(body, provider="anthropic")
    assert found.may_have_audio is (body != b"{")
    assert found.cache_writes == ("1h" if b"\\u0061" in body else "none")


@pytest.mark.parametrize(
    "provider, model, more, writes",
    [
        ("anthropic", "claude-sonnet-4-5", {}, "none"),
        ("aws", "anthropic.claude-sonnet-4-5-20250929-v1:0", {}, "none"),
        ("aws", "amazon.nova-pro-v1:0", {}, "none"),
        ("openrouter", "anthropic/claude-sonnet-4.5", {}, "none"),
        ("anthropic", "claude-sonnet-4-5", {"cache_control": {"type": "ephemeral"}}, "5m"),
        ("anthropic", "claude-sonnet-4-5", {"cache_control": {"type": "ephemeral", "ttl": "5m"}}, "5m"),
        ("anthropic", "claude-sonnet-4-5", {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, "1h"),
        ("aws", "amazon.nova-pro-v1:0", {"system": [{"cachePoint": {"type": "default"}}]}, "5m"),
        ("aws", "amazon.nova-pro-v1:0", {"system": [{"cachePoint": {"type": "default", "ttl": "1h"}}]}, "1h"),
        ("openai", "gpt-5.6-sol", {}, "5m"),  # it caches by itself
        ("openai", "gpt-5.6-sol", {"prompt_cache_key": "k"}, "5m"),
        ("openai", "gpt-5.6-sol", {"prompt_cache_options": {"ttl": "12h"}}, "1h"),
        ("openai", "gpt-5.6-sol", {"prompt_cache_retention": "24h"}, "1h"),
        (None, "my-deployment", {}, "5m"),
    ],
)
def test_what_may_be_cached(provider: str | None, model: str, more: dict[str, Any], writes: str) -> None:
    """Cache writes are held for where the request marks something for it, or the provider caches by itself."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **more}).encode()
    assert needs(body, provider=provider, model=model).cache_writes == writes


@pytest.mark.parametrize(
    "more, searches",
    [
        ({}, 0),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 0),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, 5),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 10),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": -1}]}, 10),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 10**15}]}, 10),
        ({"tools": [{"type": "web_search"}], "max_tool_calls": 3}, 3),
        ({"tools": [{"type": "web_search_preview"}, {"google_search": {}}]}, 20),
        ({"tools": [{"googleSearch": {}}]}, 10),
        ({"tools": [{"enterpriseWebSearch": {}}]}, 10),
        ({"web_search_options": {}}, 10),
        ({"plugins": [{"id": "web"}]}, 10),
        ({"search_parameters": {"mode": "on"}}, 10),
        ({"tools": [{"type": "web_search", "max_uses": 2}], "web_search_options": {"search_context_size": "low"}}, 12),
        ({"tools": [{"type": "web_search", "max_uses": 2}], "web_search_options": {}}, 12),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "as web_search"}}]}, 0),
    ],
)
def test_how_often_the_provider_may_search(more: dict[str, Any], searches: int) -> None:
    """T4: a hosted search tool is held for as often as the request lets it search, else ten times."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **more}).encode()
    assert needs(body).web_searches == searches


@pytest.mark.parametrize(
    "query, documents, units",
    [
        ("q", ["short"] * 100, 1),
        ("q", ["short"] * 101, 2),
        ("q", ["x" * 499] * 100, 1),
        ("q", ["x" * 500] * 100, 2),  # two pieces each
        ("q" * 499, ["x" * 300] * 100, 3),
        ("q", [{"text": "short"}], 1),
        ("q", [], 0),
        ("q", None, 0),
    ],
)
def test_units_of_a_ranking(query: str, documents: object, units: int) -> None:
    """Conformance 31, T4: a ranking is held for by hundreds of documents, and long ones count as several."""
    body = json.dumps({"model": "rerank-v3.5", "query": query, "documents": documents}).encode()
    assert needs(body).search_units == units


@pytest.mark.parametrize(
    "body", [b'["query", "documents"]', b'{"x": ["query"], "y": "documents"', b'"query" "documents"']
)
def test_what_only_looks_like_a_ranking(body: bytes) -> None:
    """A body that is no object ranks nothing, and nothing raises."""
    assert needs(body).search_units == 0


@pytest.mark.parametrize(
    "audio, least_ms, most_ms",
    [
        ({"format": "wav", "data": BLOB}, 25_600 * 8 // 64, 25_600 * 8 // 8),
        ({"format": "mp3", "data": BLOB}, 25_600 * 8 // 8, 25_600 * 8 // 2),
        ({"data": LINK}, 3_600_000, 3_600_000),
    ],
)
def test_how_long_audio_may_be(audio: dict[str, Any], least_ms: int, most_ms: int) -> None:
    """T4: audio that is billed by its length is held for at the least bits that speech can have."""
    body = json.dumps({"messages": [{"content": [{"type": "input_audio", "input_audio": audio}]}]}).encode()
    assert least_ms <= needs(body).audio_ms <= most_ms


def test_what_is_held_by_the_provider_still_counts() -> None:
    """A request with marks for a cache that goes on with a stored conversation counts that, too."""
    body = json.dumps({"input": "x", "previous_response_id": "r", "prompt_cache_retention": "24h"}).encode()
    assert needs(body).input_tokens == FRAMING_TOKENS + len(body) + HELD_TOKENS


names = st.sampled_from(
    [
        "type",
        "source",
        "data",
        "url",
        "uri",
        "text",
        "content",
        "parts",
        "output",
        "outputs",
        "result",
        "image",
        "image_url",
        "images",
        "input_audio",
        "audio",
        "file",
        "file_data",
        "fileData",
        "inlineData",
        "mimeType",
        "document",
        "video",
        "tools",
        "max_uses",
        "name",
        "id",
        "web_search",
        "query",
        "documents",
        "messages",
        "contents",
        "input",
        "instances",
        "requests",
        "bytes",
        "detail",
        "functionResponse",
        "toolResult",
    ]
)
leaves = st.none() | st.booleans() | st.integers(-9, 2**60) | st.floats(allow_nan=False) | st.text(max_size=9) | names
bodies = st.dictionaries(
    names, st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))
)


@given(request=bodies, model=st.sampled_from(["gpt-4o-mini", "claude", ""]))
def test_nothing_raises(request: dict[str, Any], model: str) -> None:
    """T23: whatever a body holds under the names of media and tools, it is bounded by at least its text, and nothing raises."""
    body = json.dumps(request).encode()
    found = needs(body, model=model)
    assert found.input_tokens >= FRAMING_TOKENS + len(body)  # nothing in it is long enough to be a picture
    assert min(found.audio_ms, found.web_searches, found.search_units) >= 0
