r"""Images, audio and files in a request: what each costs at most in tokens, whatever its base64 is long.

They count where the provider takes them for media: as parts of a message's content. The same bytes
anywhere else are text to a model and count as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import msgspec

__all__ = [
    "CONTENT",
    "FILE_TOKENS",
    "IMAGE_MINI_TOKENS",
    "IMAGE_ORIGINAL_TOKENS",
    "IMAGE_TOKENS",
    "PAGE_TOKENS",
    "REQUEST",
    "Part",
    "media_parts",
]

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

AUDIO_KBITS: Final = 3
"""The fewest bits that a second of compressed speech is taken to have, in thousands."""

WAV_KBITS: Final = 25
"""Likewise for uncompressed speech."""

LINKED_AUDIO_MS: Final = 3_600_000
"""A recording that is linked and not sent along, where audio is billed by its length: an assumption, an hour."""

OVERHEAD_TOKENS: Final = 128
"""What frames a recording or a video: its start, its end, and what a fraction of a second is rounded up to."""

#: Where a request keeps its messages, and these their content and its parts. Not the arguments of tool
#: calls: whatever they hold is text to the model.
REQUEST: Final = (
    "content",
    "contents",
    "document",
    "input",
    "inputs",
    "instances",
    "messages",
    "prompt",
    "requests",
    "system",
    "systemInstruction",
    "system_instruction",
)
CONTENT: Final = (
    "content",
    "functionResponse",
    "function_response",
    "output",
    "outputs",
    "parts",
    "toolResult",
)
_LINK: Final = 4_096
"""Longer texts in a media part are the thing itself, not a link to it."""

Kind = Literal["image", "audio", "video", "file"]


class Part(msgspec.Struct, frozen=True):
    """One image, recording or file in a request."""

    kind: Kind
    tokens: int
    inline: tuple[str, ...] = ()
    """The texts that are it, and are no text to the model."""
    audio_ms: int = 0
    """The longest that a recording can be, in milliseconds."""
    told: bool = True
    """It says what it is; else it may be anything."""


def media_parts(root: object, model: str) -> Iterator[Part]:
    """Every media part in the content of a request's messages. `model`: in lower case."""
    if not isinstance(root, dict):
        return
    yield from _pictures(root, model)
    stack = [root.get(key) for key in REQUEST]
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
            stack.extend(value[key] for key in CONTENT if key in value)


def _pictures(value: dict[str, object], model: str) -> Iterator[Part]:
    """Images that stand beside the text: Ollama's, those to embed or to edit."""
    images = value.get("images")
    for image in images if isinstance(images, list) else ():
        yield _counted("image", image, value, model)


#: By a part's key, what it holds. The key's value is the thing, a link to it, or an object with either.
_BY_KEY: Final[dict[str, Kind]] = {
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
_BY_TYPE: Final[dict[str, Kind]] = {
    "audio": "audio",
    "audio_url": "audio",
    "computer_screenshot": "image",
    "container_upload": "file",
    "document": "file",
    "document_url": "file",
    "file": "file",
    "image": "image",
    "image_file": "image",
    "image_generation_call": "image",
    "image_url": "image",
    "input_audio": "audio",
    "input_file": "file",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}


def _part(value: dict[str, object], model: str) -> Part | None:
    """A content part that is media; `None`: it is text, a message, or nothing that is known."""
    stated = value.get("type")
    kind = _BY_TYPE.get(stated) if isinstance(stated, str) else None
    source = value.get("source")
    if kind is not None and isinstance(source, dict):
        return None if source.get("type") == "text" else _counted(kind, source, value, model)
    for key in _BY_KEY:
        held = value.get(key)
        if held is None or (isinstance(held, dict) and _is_text(held)):
            continue
        found = kind if kind is not None and _BY_KEY[key] == "file" else _BY_KEY[key]
        part = _counted(found, held, value, model)
        # Of a type that is not known, it is counted both ways: as media, and as text.
        return part if kind is not None or stated is None else msgspec.structs.replace(part, inline=())
    if kind is not None and any(key in value for key in _PLAIN):
        return _counted(kind, value, value, model)
    return None


def _is_text(held: dict[str, object]) -> bool:
    """Whether what looks like a file is text or fields for the model to read."""
    source = held.get("source")
    return isinstance(held.get("data"), dict) or (
        isinstance(source, dict) and bool({"text", "content"} & source.keys())
    )


def _counted(kind: Kind, held: object, part: dict[str, object], model: str) -> Part:
    inline = tuple(text for text in _texts(held) if len(text) > _LINK or text.startswith("data:"))
    mime = _mime(held, inline)
    told = kind != "file" or bool(mime)
    if kind == "file":
        kind = _BY_MIME.get(mime.partition("/")[0], "file")
    if kind == "image":
        details = {str(where.get("detail")) for where in (part, held) if isinstance(where, dict)}
        if "gpt-4o-mini" in model:
            return Part(kind, IMAGE_MINI_TOKENS, inline)
        return Part(kind, IMAGE_ORIGINAL_TOKENS if "original" in details else IMAGE_TOKENS, inline)
    if not inline:
        return Part(kind, FILE_TOKENS, audio_ms=LINKED_AUDIO_MS if kind == "audio" else 0, told=told)
    size = sum(map(len, inline))
    if kind == "file":
        # What is text in it may be text to the model, so nothing bounds it but its size.
        is_text = mime.startswith("text/") or not mime
        return Part(kind, PAGE_TOKENS + (size if is_text else min(size, INLINE_FILE_TOKENS)), inline, told=told)
    size = size * 3 // 4
    plain = "wav" in mime or "pcm" in mime or "l16" in mime
    tokens = OVERHEAD_TOKENS + size // (WAV_BYTES_PER_TOKEN if plain else AUDIO_BYTES_PER_TOKEN)
    longest_ms = size * 8 // (WAV_KBITS if plain else AUDIO_KBITS)
    return Part(kind, tokens, inline, longest_ms if kind == "audio" else 0)


_BY_MIME: Final[dict[str, Kind]] = {"image": "image", "audio": "audio", "video": "video"}
#: Where a part that says what it is holds it itself.
_PLAIN: Final = ("data", "result", "uri", "url")

#: Where a media part has its bytes or its link. What else it has (names, titles) is text to the model.
_PAYLOAD: Final = (
    "bytes",
    "bytesBase64Encoded",
    "data",
    "file_data",
    "file_uri",
    "fileUri",
    "file_url",
    "image_url",
    "result",
    "source",
    "uri",
    "url",
)


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
