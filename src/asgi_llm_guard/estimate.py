r"""Upper bounds of a call's tokens, before it is made.

Text: no tokenizer in use emits more tokens than the text has UTF-8 bytes. Byte-level BPE starts from
bytes and only merges them; SentencePiece with byte fallback spends at most one token on each byte. So
the length of the request's JSON bounds all the text in it: every byte of text takes at least one byte
of JSON, quotes and keys around it are bytes too, and an escape is never shorter than what it stands for
(`\u00e9` is 6 bytes for 2, `\ud83d\ude00` is 12 for 4, `\n` is 2 for 1).

Images, audio and files are not text: what they cost has nothing to do with their size as base64, and a
link to one is short. They count by the constants below, where the provider takes them for media: as
parts of a message's content. The same bytes anywhere else are text to a model and count as text.

What a bound cannot cover, because it is not in the request: what hosted tools fetch (web search, file
search, code interpreter, MCP), and what linked files contain beyond `FILE_TOKENS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol, cast

import msgspec

from asgi_llm_guard.errors import NotInstalledError
from asgi_llm_guard.money import MAX_AMOUNT

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "DEFAULT_OUTPUT_TOKENS",
    "FILE_TOKENS",
    "FRAMING_TOKENS",
    "HELD_TOKENS",
    "IMAGE_MINI_TOKENS",
    "IMAGE_ORIGINAL_TOKENS",
    "IMAGE_TOKENS",
    "PAGE_TOKENS",
    "TOOLS_TOKENS",
    "Body",
    "Counter",
    "TiktokenCounter",
    "input_tokens",
    "message_tokens",
    "output_tokens",
    "text_tokens",
]

FRAMING_TOKENS: Final = 128
"""What a provider adds around the messages: role markers are covered by the JSON around each message; this
is for the start of the answer and a built-in system text.
Source: gpt-oss's harmony format, about 70 tokens; Llama 3.1's template, 25; OpenAI Chat, 3 (2026-11)."""

TOOLS_TOKENS: Final = 2_048
"""The instructions that a provider adds once a request has tools, hosted ones included.
Source: https://platform.claude.com/docs/en/agents-and-tools/tool-use/overview (up to 804 tokens, and 735 for
computer use, 700 for the text editor, 2026-11)."""

IMAGE_TOKENS: Final = 4_784
"""One image at the usual detail: the most over Claude (2576 px: 4,784), OpenAI's tiles (85 + 8 x 170 = 1,445) and
patches (2,500 x 1.2 = 3,000; 1,536 x 2.46 = 3,779, which `detail: low` does not lower), Gemini (2,240).
Source: https://platform.claude.com/docs/en/build-with-claude/vision,
https://developers.openai.com/api/docs/guides/images-vision, https://ai.google.dev/gemini-api/docs/media-resolution
(2026-11)."""

IMAGE_ORIGINAL_TOKENS: Final = 12_000
"""One image with `detail: original`: 10,000 patches x 1.2. Source: OpenAI, as above."""

IMAGE_MINI_TOKENS: Final = 48_169
"""One image for gpt-4o-mini, whose image tokens are many and cheap: 2,833 + 8 x 5,667. Source: OpenAI, as above."""

AUDIO_BYTES_PER_TOKEN: Final = 12
"""Compressed audio and video: Gemini counts 32 tokens for a second of audio and 300 for one of video, OpenAI
10 for audio. Bounds audio from 3 kbit/s, video from 29 kbit/s.
Source: https://ai.google.dev/gemini-api/docs/tokens (2026-11)."""

WAV_BYTES_PER_TOKEN: Final = 96
"""Uncompressed audio: 32 tokens for a second, from 25 kbit/s (4-bit ADPCM at 8 kHz has 32)."""

FILE_TOKENS: Final = 200_000
"""A file, recording or video that is linked and not sent along: an assumption, a whole context window of the
usual size. What it contains is known to the provider only."""

INLINE_FILE_TOKENS: Final = 1_000_000
"""The most that a file sent along counts. Below it, each base64 character counts as a token: a dense page of PDF
has about 5 KB compressed and costs up to 3,000 tokens as text and 4,784 as an image.
Source: https://platform.claude.com/docs/en/build-with-claude/pdf-support (2026-11)."""

PAGE_TOKENS: Final = 8_192
"""The first page of a file, so that small ones are bounded too."""

HELD_TOKENS: Final = 128_000
"""What the provider holds of the conversation (`previous_response_id`, `conversation`, `cachedContent`, a stored
prompt), where the model's context window is not given: an assumption."""

DEFAULT_OUTPUT_TOKENS: Final = 16_384
"""The output of one choice where neither the request, the policy nor the price book knows a limit: an assumption."""

#: Names that say what a request has besides text, as each API writes them. They are looked for before
#: anything is decoded: one pass, and most bodies need no more.
_MARKS: Final = re.compile(
    rb'"(image|audio|input_audio|video|file|inline|document'
    rb'|previous_|conversation"|cached|prompt"'
    rb'|tools"|functions"|toolConfig"|web_search_options")'
)
_TOOL_MARKS: Final = frozenset({b'tools"', b'functions"', b'toolConfig"', b'web_search_options"'})
_HELD_KEYS: Final = (
    "previous_response_id",
    "previous_interaction_id",
    "conversation",
    "cachedContent",
    "cached_content",
)
#: An escape of a letter that needs none, which could hide a name.
_HIDING: Final = re.compile(rb"\\u00[2-7]")

#: Where a request keeps its messages, and these their content and its parts. Not the arguments of tool
#: calls: whatever they hold is text to the model.
_REQUEST: Final = ("contents", "document", "input", "instances", "messages", "prompt", "system", "systemInstruction")
_CONTENT: Final = ("content", "parts", "output", "toolResult", "functionResponse")
_LINK: Final = 4_096
"""Longer texts in a media part are the thing itself, not a link to it."""


class Body(Protocol):
    """A request's body, such as `wire.peek.BodyView`."""

    @property
    def body(self) -> bytes: ...


class Counter(Protocol):
    """Counts the tokens of text. For callers who want fewer refusals than the byte bound gives, and pay with CPU."""

    def count(self, text: bytes, /) -> int:
        """The tokens of a text in UTF-8. Called on the request path: be quick, and never below the truth."""
        ...


class TiktokenCounter:
    """Counts with one of OpenAI's encodings. Exact for OpenAI's models; no bound for anybody else's.

    `encoding`: a name, or a `tiktoken.Encoding`. A name needs its vocabulary, which tiktoken downloads or
    finds in `TIKTOKEN_CACHE_DIR`. A text of 100 KB takes 5 to 40 ms.

    Raises:
        NotInstalledError: tiktoken is not installed.
    """

    __slots__ = ("_encoding",)

    def __init__(self, encoding: str | tiktoken.Encoding = "o200k_base") -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise NotInstalledError("TiktokenCounter", "tiktoken") from error
        self._encoding = tiktoken.get_encoding(encoding) if isinstance(encoding, str) else encoding

    def count(self, text: bytes, /) -> int:
        """The tokens of a text; control tokens written out in it are plain text."""
        return len(self._encoding.encode_ordinary(text.decode("utf-8", "replace")))


def text_tokens(text: str | bytes | int) -> int:
    """The most tokens that a text can have: its UTF-8 bytes, or the number of them if that is given."""
    if isinstance(text, int):
        return text
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def input_tokens(
    request: Body | bytes, *, model: str | None = None, window: int | None = None, counter: Counter | None = None
) -> int:
    """The most input tokens that a request's JSON body can have.

    `model`: tells images apart, which cost more with some. `window`: the model's context window, for requests
    that go on with what the provider holds. `counter`: counts the text in place of its bytes.

    A body that is not JSON counts by its bytes.
    """
    body = request if isinstance(request, bytes) else request.body
    tokens = FRAMING_TOKENS
    found = _MARKS.findall(body)
    if not found and not _HIDING.search(body):
        return tokens + (len(body) if counter is None else counter.count(body))
    marks = set(found)
    if not marks.isdisjoint(_TOOL_MARKS):
        tokens += TOOLS_TOKENS
    if marks <= _TOOL_MARKS and not _HIDING.search(body):
        return tokens + (len(body) if counter is None else counter.count(body))
    root = _decode(body)
    if _goes_on(root):
        tokens += HELD_TOKENS if window is None else window
    media = list(_media(root, (model or "").lower()))
    tokens += sum(part.tokens for part in media)
    if counter is None:
        return tokens + len(body) - sum(part.inline_bytes for part in media)
    for part in media:
        for text in part.inline:
            body = body.replace(text.encode("utf-8", "surrogatepass"), b"", 1)
    return tokens + counter.count(body)


def message_tokens(
    messages: object, *, model: str | None = None, window: int | None = None, counter: Counter | None = None
) -> int:
    """The most input tokens of a text, of messages as Python values (lists, dicts, dataclasses, pydantic models), or
    of the keyword arguments of a call."""
    if isinstance(messages, str):
        text = messages.encode("utf-8", "surrogatepass")
        return FRAMING_TOKENS + (len(text) if counter is None else counter.count(text))
    request = (
        messages if isinstance(messages, dict) and not messages.keys().isdisjoint(_REQUEST) else {"messages": messages}
    )
    try:
        body = msgspec.json.encode(request, enc_hook=_plain)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError, UnicodeEncodeError):
        body = repr(messages).encode("utf-8", "surrogatepass")
    return input_tokens(body, model=model, window=window, counter=counter)


def output_tokens(max_output_tokens: int | None, assumed: int | None, model_max: int | None, choices: int = 1) -> int:
    """The most output tokens over all choices: the request's own limit, else the policy's assumption, else the
    model's maximum, else `DEFAULT_OUTPUT_TOKENS`; times the choices. From 0 to 2^53 - 1."""
    each = max_output_tokens
    if each is None:
        each = assumed if assumed is not None else model_max
    if each is None:
        each = DEFAULT_OUTPUT_TOKENS
    if 0 <= each <= MAX_AMOUNT and choices == 1:
        return each
    return min(max(each, 0) * max(choices, 1), MAX_AMOUNT)


# ----------------------------------------------------------------------------------- media


class _Part(msgspec.Struct, frozen=True):
    """One image, recording or file in a request."""

    tokens: int
    inline: tuple[str, ...] = ()
    """The texts that are it, and are no text to the model."""

    @property
    def inline_bytes(self) -> int:
        return sum(map(text_tokens, self.inline))


def _decode(body: bytes) -> object:
    try:
        return cast("object", msgspec.json.decode(body))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _plain(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else repr(value)


def _goes_on(root: object) -> bool:
    """Whether a request goes on with what the provider holds."""
    if not isinstance(root, dict):
        return False
    prompt = root.get("prompt")
    return any(root.get(key) for key in _HELD_KEYS) or (isinstance(prompt, dict) and "id" in prompt)


def _media(root: object, model: str) -> Iterator[_Part]:
    """Every media part in the content of a request's messages."""
    if not isinstance(root, dict):
        return
    yield from _pictures(root, model)
    stack = [root.get(key) for key in _REQUEST]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            yield from _pictures(value, model)
            source = value.get("source")
            if isinstance(source, dict) and source.get("type") == "content":
                stack.append(source.get("content"))
            else:
                part = _part(value, model)
                if part is not None:
                    yield part
            stack.extend(value[key] for key in _CONTENT if key in value)


def _pictures(value: dict[str, object], model: str) -> Iterator[_Part]:
    """Ollama's images, which stand beside the text."""
    images = value.get("images")
    for image in images if isinstance(images, list) else ():
        yield _counted("image", image, value, model)


#: By a part's key, what it holds. The key's value is the thing, a link to it, or an object with either.
_BY_KEY: Final = {
    "image_url": "image",
    "image": "image",
    "image_file": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
    "video_url": "video",
    "video": "video",
    "file": "file",
    "file_data": "file",
    "fileData": "file",
    "file_url": "file",
    "file_id": "file",
    "document": "file",
    "document_url": "file",
    "inline_data": "file",
    "inlineData": "file",
}
#: By a part's type, what its `source` or its id is.
_BY_TYPE: Final = {
    "audio": "audio",
    "audio_url": "audio",
    "computer_screenshot": "image",
    "container_upload": "file",
    "document": "file",
    "document_url": "file",
    "file": "file",
    "image": "image",
    "image_file": "image",
    "image_url": "image",
    "input_audio": "audio",
    "input_file": "file",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}


def _part(value: dict[str, object], model: str) -> _Part | None:
    """A content part that is media; `None`: it is text, a message, or nothing that is known."""
    stated = value.get("type")
    kind = _BY_TYPE.get(stated) if isinstance(stated, str) else None
    source = value.get("source")
    if kind is not None and isinstance(source, dict):
        return None if source.get("type") == "text" else _counted(kind, source, value, model)
    for key in _BY_KEY:
        held = value.get(key)
        if held is None or (isinstance(held, dict) and _is_text(held.get("source"))):
            continue
        found = kind if kind is not None and _BY_KEY[key] == "file" else _BY_KEY[key]
        part = _counted(found, held, value, model)
        # Of a type that is not known, it is counted both ways: as media, and as text.
        return part if kind is not None or stated is None else _Part(part.tokens)
    return None


def _is_text(source: object) -> bool:
    return isinstance(source, dict) and bool({"text", "content"} & source.keys())


def _counted(kind: str, held: object, part: dict[str, object], model: str) -> _Part:
    inline = tuple(text for text in _texts(held) if len(text) > _LINK or text.startswith("data:"))
    mime = _mime(held, inline)
    if kind == "file" and mime.partition("/")[0] in ("image", "audio", "video"):
        kind = mime.partition("/")[0]
    if kind == "image":
        details = {str(where.get("detail")) for where in (part, held) if isinstance(where, dict)}
        if "gpt-4o-mini" in model:
            return _Part(IMAGE_MINI_TOKENS, inline)
        return _Part(IMAGE_ORIGINAL_TOKENS if "original" in details else IMAGE_TOKENS, inline)
    if not inline:
        return _Part(FILE_TOKENS)
    size = sum(map(len, inline))
    if kind == "file":
        # What is text in it may be text to the model, so nothing bounds it but its size.
        is_text = mime.startswith("text/") or not mime
        return _Part(PAGE_TOKENS + (size if is_text else min(size, INLINE_FILE_TOKENS)), inline)
    per_token = WAV_BYTES_PER_TOKEN if "wav" in mime or "pcm" in mime or "l16" in mime else AUDIO_BYTES_PER_TOKEN
    return _Part(FRAMING_TOKENS + size * 3 // 4 // per_token, inline)


#: Where a media part has its bytes or its link. What else it has (names, titles) is text to the model.
_PAYLOAD: Final = ("bytes", "data", "file_data", "file_uri", "fileUri", "file_url", "source", "uri", "url")


def _texts(held: object) -> Iterator[str]:
    while isinstance(held, dict):  # at most a source in an object, in practice
        held = next((held[key] for key in _PAYLOAD if key in held), None)
    if isinstance(held, str):
        yield held


def _mime(held: object, inline: tuple[str, ...]) -> str:
    """The media type that a part states, lower case; the format (`wav`, `pdf`) where there is no type."""
    if isinstance(held, dict):
        for key in ("mime_type", "mimeType", "media_type", "mime", "format"):
            if isinstance(held.get(key), str):
                return str(held[key]).lower()
    for text in inline:
        if text.startswith("data:"):
            return text[5:100].partition(";")[0].lower()
    return ""
