"""Bounds of a call's tokens."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.estimate import (
    DEFAULT_OUTPUT_TOKENS,
    FILE_TOKENS,
    FRAMING_TOKENS,
    HELD_TOKENS,
    IMAGE_MINI_TOKENS,
    IMAGE_ORIGINAL_TOKENS,
    IMAGE_TOKENS,
    PAGE_TOKENS,
    TOOLS_TOKENS,
    TiktokenCounter,
    input_tokens,
    message_tokens,
    output_tokens,
    text_tokens,
)
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.wire.peek import read_body

BLOB = base64.b64encode(bytes(range(256)) * 400).decode()  # 100 KB of picture
PER_MESSAGE = 4  # https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken: 3, and 1 for a name

texts = st.text(alphabet=st.characters(exclude_categories=()), max_size=200)


def chat(*parts: object, **more: object) -> bytes:
    """A body with one message of these parts."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": list(parts)}], **more}).encode()


def beside(body: bytes, *inline: str) -> int:
    """What the text around media makes up: the body's bytes without the given texts, and the framing."""
    return FRAMING_TOKENS + len(body) - sum(map(len, inline))


# ---------------------------------------------------------------------------------------- text


@given(contents=st.lists(texts, max_size=5), ascii_only=st.booleans())
def test_no_text_has_more_bytes_than_the_bound(contents: list[str], ascii_only: bool) -> None:
    """A request's bound is at least the UTF-8 bytes of all its texts and the framing of every message, escaped or not."""
    messages = [{"role": "user", "content": text} for text in contents]
    surrogates = any("\ud800" <= letter <= "\udfff" for text in contents for letter in text)
    body = json.dumps({"messages": messages}, ensure_ascii=ascii_only or surrogates).encode()
    needed = sum(len(text.encode("utf-8", "surrogatepass")) + PER_MESSAGE for text in contents) + 3
    assert input_tokens(body) >= needed
    assert message_tokens(messages) >= needed


def test_letters_that_normalizing_makes_longer() -> None:
    """T4: every letter that NFKC makes longer counts by what it becomes, written out, as an escape, or as a plain text."""
    for code in range(0x80, 0x110000):
        letter = chr(code)
        if 0xD800 <= code < 0xE000 or len(unicodedata.normalize("NFKC", letter).encode()) <= len(letter.encode()):
            continue
        long = len(unicodedata.normalize("NFKC", letter).encode())
        assert message_tokens(letter) == FRAMING_TOKENS + long, hex(code)
        for ascii_only in (False, True):
            body = json.dumps(letter, ensure_ascii=ascii_only).encode()
            assert input_tokens(body) == FRAMING_TOKENS + 2 + max(long, len(body) - 2), hex(code)


@pytest.mark.parametrize("text", [b"\xff\xed\xa0\x80", b"\\uZZZZ\\ufdf", b"\xed\xa0\x80"])
def test_text_that_is_none_grows_by_nothing(text: bytes) -> None:
    """Bytes that are no UTF-8, and what only looks like an escape, count as they are, and nothing raises."""
    assert input_tokens(text) == FRAMING_TOKENS + len(text)


def test_a_tokenizer_without_merges_reaches_the_bound() -> None:
    """The worst tokenizer there is, one token for each byte, stays within the bound: it is tight, and it holds."""
    bytes_only = tiktoken.Encoding(
        "bytes", pat_str=r"(?s:.+)", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={}
    )
    text = 'naïve 漢字 🦉 \n\t"quoted" <|endoftext|>'
    assert len(bytes_only.encode_ordinary(text)) == text_tokens(text)
    assert message_tokens(text) == text_tokens(text) + FRAMING_TOKENS


@pytest.mark.parametrize(
    "text, tokens", [("abc", 3), ("é", 2), ("🦉", 4), ("\ud83d", 3), (b"\xff\xfe", 2), ("", 0), (17, 17)]
)
def test_text(text: str | bytes | int, tokens: int) -> None:
    """A text counts its UTF-8 bytes; a number is taken for the number of them."""
    assert text_tokens(text) == tokens


def test_a_peeked_body_counts_like_its_bytes() -> None:
    """A body that was looked into gives the same bound as the bytes that it came as."""
    body = chat({"type": "text", "text": "hello"})
    assert input_tokens(read_body(body)) == input_tokens(body) == beside(body)


def test_tools_count() -> None:
    """Tool definitions count by their bytes, and so does what the provider adds for them."""
    body = chat(
        {"type": "text", "text": "x"}, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
    )
    assert input_tokens(body) == beside(body) + TOOLS_TOKENS


@pytest.mark.parametrize(
    "body", [b"", b"{", b'"image"', b'[{"image": 1}]', b'{"image": NaN}', b"\xff\x00", b'{"image": ' + b"[" * 50_000]
)
def test_a_body_that_is_no_request_counts_by_its_bytes(body: bytes) -> None:
    """What cannot be read is bounded all the same, and nothing raises."""
    assert input_tokens(body) == FRAMING_TOKENS + len(body)


# --------------------------------------------------------------------------------------- media

DATA_URI = f"data:image/png;base64,{BLOB}"
LINK = "https://example.org/picture.png"


@pytest.mark.parametrize(
    "part, inline",
    [
        pytest.param({"type": "image_url", "image_url": {"url": DATA_URI}}, [DATA_URI], id="openai"),
        pytest.param({"type": "image_url", "image_url": {"url": LINK, "detail": "high"}}, [], id="openai link"),
        pytest.param({"type": "image_url", "image_url": {"url": LINK, "detail": "low"}}, [], id="openai low"),
        pytest.param({"type": "image_url", "image_url": LINK}, [], id="mistral"),
        pytest.param({"type": "input_image", "image_url": DATA_URI}, [DATA_URI], id="responses"),
        pytest.param({"type": "input_image", "file_id": "file-1"}, [], id="responses file"),
        pytest.param({"type": "image_file", "image_file": {"file_id": "file-1"}}, [], id="assistants"),
        pytest.param(
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BLOB}},
            [BLOB],
            id="anthropic",
        ),
        pytest.param({"type": "image", "source": {"type": "url", "url": LINK}}, [], id="anthropic link"),
        pytest.param({"inlineData": {"mimeType": "image/png", "data": BLOB}}, [BLOB], id="gemini"),
        pytest.param({"inline_data": {"mime_type": "image/png", "data": BLOB}}, [BLOB], id="gemini snake"),
        pytest.param({"fileData": {"mimeType": "image/png", "fileUri": "gs://b/o"}}, [], id="gemini link"),
        pytest.param({"image": {"format": "png", "source": {"bytes": BLOB}}}, [BLOB], id="bedrock"),
        pytest.param({"image": {"format": "png", "source": {"s3Location": {"uri": "s3://b/o"}}}}, [], id="bedrock s3"),
        pytest.param({"type": "computer_screenshot", "image_url": DATA_URI}, [DATA_URI], id="screenshot"),
    ],
)
def test_images_count_by_constant(part: object, inline: list[str]) -> None:
    """Inline, linked or stored, in every API: an image costs a constant, and its base64 nothing."""
    body = chat({"type": "text", "text": "what is this?"}, part)
    assert input_tokens(body) == beside(body, *inline) + IMAGE_TOKENS


def test_details_and_models_of_images() -> None:
    """`detail: original` and gpt-4o-mini have constants of their own."""
    original = chat({"type": "image_url", "image_url": {"url": LINK, "detail": "original"}})
    responses = chat({"type": "input_image", "image_url": LINK, "detail": "original"})
    usual = chat({"type": "image_url", "image_url": {"url": LINK}})
    assert input_tokens(original) == beside(original) + IMAGE_ORIGINAL_TOKENS
    assert input_tokens(responses) == beside(responses) + IMAGE_ORIGINAL_TOKENS
    assert input_tokens(usual, model="openai/GPT-4o-mini") == beside(usual) + IMAGE_MINI_TOKENS


def test_images_beside_the_text() -> None:
    """Ollama's list of images counts each of them, in messages and in plain generation."""
    body = json.dumps({"messages": [{"role": "user", "content": "x", "images": [BLOB, BLOB]}]}).encode()
    assert input_tokens(body) == beside(body, BLOB, BLOB) + 2 * IMAGE_TOKENS
    plain = json.dumps({"prompt": "x", "images": [BLOB]}).encode()
    assert input_tokens(plain) == beside(plain, BLOB) + IMAGE_TOKENS


@pytest.mark.parametrize(
    "request_body",
    [
        {"contents": [{"role": "user", "parts": [{"fileData": {"mimeType": "image/png", "fileUri": "gs://b/o"}}]}]},
        {"systemInstruction": {"parts": [{"fileData": {"mimeType": "image/png", "fileUri": "gs://b/o"}}]}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": LINK}]}]},
        {"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": LINK}}]},
        {"messages": [{"content": [{"type": "tool_result", "content": [{"type": "image", "source": {"url": LINK}}]}]}]},
        {"messages": [{"content": [{"toolResult": {"content": [{"image": {"source": {"s3Location": {}}}}]}}]}]},
        {"contents": [{"parts": [{"functionResponse": {"parts": [{"fileData": {"mimeType": "image/png"}}]}}]}]},
        {"messages": [{"content": [{"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {}}]}}]}]},
    ],
)  # fmt: skip
def test_where_media_may_be(request_body: dict[str, Any]) -> None:
    """Media is found in messages, system texts and the results of tools, at any depth of content."""
    body = json.dumps(request_body).encode()
    assert input_tokens(body) == beside(body) + IMAGE_TOKENS


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": f"please read {DATA_URI}"},
        {"type": "tool_use", "name": "draw", "input": {"image_url": DATA_URI, "image": BLOB}},
        {"type": "function_call", "arguments": json.dumps({"image_url": DATA_URI})},
        {"type": "document", "source": {"type": "text", "data": "long " * 2_000}},
        {"document": {"name": "d", "source": {"text": "long " * 2_000}}},
        {"toolUse": {"input": {"image": {"source": {"bytes": BLOB}}}}},
        {"functionCall": {"args": {"image": BLOB}}},
    ],
)
def test_what_only_looks_like_media_is_text(part: object) -> None:
    """Base64 that a model gets to read as text counts as text: a data URI in a message, the arguments of a tool call."""
    body = chat(part)
    assert input_tokens(body) == beside(body)


def test_a_part_of_unknown_type_counts_as_both() -> None:
    """Where it cannot be told whether the provider takes a part for an image, it is counted as image and as text."""
    body = chat({"type": "hologram", "image_url": DATA_URI})
    assert input_tokens(body) == beside(body) + IMAGE_TOKENS


def test_a_name_in_an_escape_hides_nothing() -> None:
    """T4: a key spelled with an escape is the same key."""
    body = chat({"type": "image_url", "image_url": {"url": LINK}}).replace(b'"image_url"', b'"\\u0069mage_url"')
    assert b'"image' not in body
    assert input_tokens(body) == beside(body) + IMAGE_TOKENS


def test_long_names_of_files_are_text() -> None:
    """What a model reads of a file part (its name, its title) is not taken off with the file."""
    name = "n" * 10_000
    body = chat({"type": "file", "file": {"filename": name, "file_id": "file-1"}})
    assert input_tokens(body) == beside(body) + FILE_TOKENS


def test_nested_content_beside_media_counts_too() -> None:
    """T4: a part that claims to be an image and holds more images is counted for all of them."""
    body = chat(
        {
            "type": "image_url",
            "image_url": {"url": LINK},
            "content": [{"type": "image_url", "image_url": {"url": LINK}}],
        }
    )
    assert input_tokens(body) == beside(body) + 2 * IMAGE_TOKENS


@pytest.mark.parametrize(
    "part, bytes_per_second, inline",
    [
        pytest.param({"type": "input_audio", "input_audio": {"format": "wav", "data": BLOB}}, 8_000, BLOB, id="wav"),
        pytest.param({"type": "input_audio", "input_audio": {"format": "mp3", "data": BLOB}}, 1_000, BLOB, id="mp3"),
        pytest.param({"type": "input_audio", "input_audio": BLOB}, 1_000, BLOB, id="mistral"),
        pytest.param({"inlineData": {"mimeType": "audio/ogg", "data": BLOB}}, 750, BLOB, id="gemini"),
        pytest.param({"inlineData": {"mimeType": "audio/L16", "data": BLOB}}, 16_000, BLOB, id="pcm"),
        pytest.param(
            {"type": "audio_url", "audio_url": {"url": f"data:audio/mp3;base64,{BLOB}"}}, 1_000, f"data:audio/mp3;base64,{BLOB}", id="vllm"
        ),
    ],
)  # fmt: skip
def test_audio_counts_by_its_length(part: object, bytes_per_second: int, inline: str) -> None:
    """Audio costs at least 32 tokens for each second that its bytes can be, and less than its base64."""
    body = chat(part)
    counted = input_tokens(body) - beside(body, inline)
    assert 32 * (len(BLOB) * 3 // 4 // bytes_per_second) <= counted < len(BLOB)


def test_video_counts_by_its_length() -> None:
    """Video costs at least 300 tokens for each second, from 100 kbit/s on."""
    body = chat({"video": {"format": "mp4", "source": {"bytes": BLOB}}})
    counted = input_tokens(body) - beside(body, BLOB)
    assert 300 * (len(BLOB) * 3 // 4 // 12_500) <= counted < len(BLOB)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "input_file", "file_url": "https://example.org/x.pdf"},
        {"type": "document", "source": {"type": "file", "file_id": "file-1"}},
        {"type": "container_upload", "file_id": "file-1"},
        {"type": "document_url", "document_url": "https://example.org/x.pdf"},
        {"type": "video_url", "video_url": {"url": "https://example.org/x.mp4"}},
        {"fileData": {"mimeType": "audio/mp3", "fileUri": "gs://b/o"}},
    ],
)
def test_what_is_only_linked_counts_by_constant(part: object) -> None:
    """A file, recording or video of unknown size costs a constant, however short the link to it is."""
    body = chat(part)
    assert input_tokens(body) == beside(body) + FILE_TOKENS


def test_files_that_are_sent_along() -> None:
    """A PDF counts a token for each base64 character and a page, up to a million; text in a file has no such cap."""
    pdf = f"data:application/pdf;base64,{BLOB}"
    small = chat({"type": "file", "file": {"filename": "a.pdf", "file_data": pdf}})
    assert input_tokens(small) == beside(small, pdf) + PAGE_TOKENS + len(pdf)
    long = "A" * 3_000_000
    large = chat({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": long}})
    assert input_tokens(large) == beside(large, long) + PAGE_TOKENS + 1_000_000
    text = chat({"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": long}})
    assert input_tokens(text) == beside(text, long) + PAGE_TOKENS + len(long)


@pytest.mark.parametrize(
    "more",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": {"id": "conv_1"}},
        {"cachedContent": "cachedContents/1"},
        {"prompt": {"id": "pmpt_1"}},
    ],
)
def test_what_the_provider_holds_counts(more: dict[str, object]) -> None:
    """A request that goes on with a stored conversation counts a constant for it, or the model's whole window."""
    body = chat({"type": "text", "text": "go on"}, **more)
    assert input_tokens(body) == beside(body) + HELD_TOKENS
    assert input_tokens(body, window=400_000) == beside(body) + 400_000


def test_what_only_looks_held() -> None:
    """A plain prompt and an empty id refer to nothing."""
    body = json.dumps({"prompt": "hello", "previous_response_id": None}).encode()
    assert input_tokens(body) == beside(body)


# ------------------------------------------------------------------------------------- messages


@dataclass
class Message:
    role: str
    content: str


class Model:
    """Shaped like a pydantic model."""

    def model_dump(self) -> dict[str, object]:
        return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": LINK}}]}


def test_messages_as_python_values() -> None:
    """Dicts, dataclasses and models count like the JSON that they become; anything else by its text."""
    plain = [{"role": "user", "content": "hé"}]
    assert message_tokens(plain) >= FRAMING_TOKENS + 3 + len('{"role":"user","content":""}')
    assert message_tokens([Message("user", "hé")]) == message_tokens(plain)
    assert message_tokens([Model()]) > IMAGE_TOKENS
    assert message_tokens(b"abc") >= FRAMING_TOKENS + 3
    assert message_tokens([object()]) >= FRAMING_TOKENS + len("<object object>")
    assert message_tokens("hé") == FRAMING_TOKENS + 3
    assert message_tokens(["\ud83d"]) >= FRAMING_TOKENS + 3


def test_arguments_of_a_call() -> None:
    """The keyword arguments of a call count with their tools, and media in them is found."""
    arguments = {"messages": [Model().model_dump()], "tools": [{"name": "f"}]}
    assert message_tokens(arguments) >= FRAMING_TOKENS + TOOLS_TOKENS + IMAGE_TOKENS


def test_values_that_go_in_circles() -> None:
    """A list that contains itself is bounded by its text, and nothing raises."""
    circle: list[object] = ["x"]
    circle.append(circle)
    assert message_tokens(circle) >= FRAMING_TOKENS


# -------------------------------------------------------------------------------------- counters


class Words:
    """Counts words."""

    def count(self, text: bytes, /) -> int:
        return len(text.split())


def test_a_counter_replaces_the_bytes_of_text_only() -> None:
    """A given counter counts the text; framing, tools and media are added as ever, and base64 is not shown to it."""
    body = chat({"type": "text", "text": "a b c"}, {"type": "image_url", "image_url": {"url": DATA_URI}}, tools=[])
    text = len(body.replace(DATA_URI.encode(), b"").split())
    assert input_tokens(body, counter=Words()) == FRAMING_TOKENS + TOOLS_TOKENS + IMAGE_TOKENS + text
    assert input_tokens(chat({"type": "text", "text": "a b c"}), counter=Words()) < FRAMING_TOKENS + 20
    assert message_tokens("a b c", counter=Words()) == FRAMING_TOKENS + 3


def test_the_tiktoken_counter_counts_control_tokens_as_text() -> None:
    """A given encoding is used, broken UTF-8 is no error, and `<|endoftext|>` in a message is its letters."""
    ranks = {bytes([n]): n for n in range(256)} | {b"aa": 256}
    encoding = tiktoken.Encoding("pairs", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={"<|end|>": 300})
    counter = TiktokenCounter(encoding)
    assert counter.count(b"aaaa") == 2
    assert counter.count(b"<|end|>") == 7
    assert counter.count(b"\xff") == 3  # the replacement character


def test_without_tiktoken() -> None:
    """Where tiktoken is missing, the counter says which extra brings it, and everything else works."""
    code = (
        "import sys; sys.modules['tiktoken'] = None\n"
        "from asgi_llm_guard.estimate import TiktokenCounter, message_tokens\n"
        "from asgi_llm_guard.errors import NotInstalledError\n"
        "assert message_tokens('x')\n"
        "try: TiktokenCounter()\n"
        "except NotInstalledError as error: assert 'asgi-llm-guard[tiktoken]' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    "limit, assumed, model_max, choices, expected",
    [
        (100, 200, 300, 1, 100),
        (None, 200, 300, 1, 200),
        (None, None, 300, 1, 300),
        (None, None, None, 1, DEFAULT_OUTPUT_TOKENS),
        (100, 200, 300, 4, 400),
        (0, 200, 300, 1, 0),
        (10**30, None, None, 3, MAX_AMOUNT),
        (-1, None, None, 1, 0),
        (100, None, None, 0, 100),
    ],
)
def test_output(limit: int | None, assumed: int | None, model_max: int | None, choices: int, expected: int) -> None:
    """The request's own limit, else what the policy assumes, else the model's, else the default; for every choice."""
    assert output_tokens(limit, assumed, model_max, choices) == expected
