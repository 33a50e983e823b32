"""OpenAI's audio: speech from text, and text from recordings.

What speech answers is sound and says nothing, so what is known comes from the request. Transcriptions report
tokens or a duration, by model; as plain text or subtitles they report nothing.

Source: https://platform.openai.com/docs/api-reference/audio, and the types of openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

import struct
from typing import Final

from asgi_llm_guard.estimate import FRAMING_TOKENS, text_tokens
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, Head, Meter
from asgi_llm_guard.wire.forms import FormFile, FormView
from asgi_llm_guard.wire.meters import Opaque
from asgi_llm_guard.wire.openai_errors import classify
from asgi_llm_guard.wire.openai_family import Family, FamilyTally, model_of, operation
from asgi_llm_guard.wire.openai_usage import milliseconds, tokens_used
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import MOST_TOKENS, pick, text_length

__all__ = ["OpenAIAudio"]

_OPERATIONS: Final = frozenset({"speech", "transcriptions", "translations"})
_LONGEST_TEXT: Final = 10_000_000
_TOKENS_PER_CHARACTER: Final = 6
"""Of spoken audio: 20 tokens a second, and 4 characters a second at a quarter of the usual speed; an assumption."""
_LEAST_SPOKEN: Final = 1_000
_TOKENS_PER_SECOND: Final = 32
"""Of a recording: OpenAI counts 10, the most that anybody counts is Gemini's."""
_SLOWEST: Final = 2
"""Milliseconds that one byte of a compressed recording can hold, at 4 kbit/s: the lowest rates of Opus and AMR are
just above it."""
_LINKED_MS: Final = 4 * 3_600_000
"""A recording that is linked and not sent along: an assumption."""
_PCM: Final = (1, 3)
_TOLD: Final = (b"application/json", b"text/event-stream")


class OpenAIAudio(Family):
    """The dialect `openai_audio`."""

    __slots__ = ()

    name: Final = "openai_audio"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        what = operation(path)
        return len(what) == 2 and what[0] == "audio" and what[1] in _OPERATIONS

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for: characters to speak, or at most so much of a recording, by its size.

        Raises:
            BodyError: `model` is missing, or a value is malformed.
        """
        if operation(path)[-1:] == ("speech",):
            return self._speech(view, path)
        audio_ms, sent = _LINKED_MS, len(view.body)
        if isinstance(view, FormView):
            sent = view.text_bytes
            if view.files:
                audio_ms = sum(map(_length_ms, view.files))
        audio_ms = min(audio_ms, MOST_TOKENS)
        return Ask(
            model=model_of(view, path),
            limits_output=False,
            stream=view.flag("stream"),
            wants_usage=view.flag("stream"),
            input_tokens=FRAMING_TOKENS + sent + -(-audio_ms * _TOKENS_PER_SECOND // 1000),
            audio_ms=audio_ms,
        )

    def _speech(self, view: BodyView, path: str) -> Ask:
        text = view.get("input")
        if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
            raise BodyError("invalid_request", 400, "input: expected the text to be spoken", "input")
        return Ask(
            model=model_of(view, path),
            max_output_tokens=_LEAST_SPOKEN + text_tokens(text) * _TOKENS_PER_CHARACTER,
            limits_output=False,
            stream=view.get("stream_format") == "sse",
            wants_usage=True,
            characters=len(text),
        )

    def tally(self) -> FamilyTally:
        return _Tally()

    def is_ours(self, value: object) -> bool:
        """Whether it is a transcription with its usage, or an event of a stream of text or speech."""
        kind = pick(value, "type")
        if isinstance(kind, str):
            return kind.startswith(("transcript.text.", "speech.audio."))
        if not isinstance(pick(value, "text"), str):
            return False
        return pick(pick(value, "usage"), "type") in ("tokens", "duration") or pick(value, "task") in (
            "transcribe",
            "translate",
        )

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:
        """As every dialect; of sound, what the request said."""
        if head.header(b"content-type").lower().startswith(_TOLD):
            return super().meter(head, strip_usage=strip_usage)
        if not 200 <= head.status < 300:
            return Opaque(Answer(kind="error", error=classify(head.status, None)))
        spoken = head.ask.characters if head.ask is not None else 0
        return Opaque(Answer(kind="success", usage=Usage(characters=spoken) if spoken else None, finished=True))


class _Tally(FamilyTally):
    __slots__ = ()

    def add(self, value: object) -> bool:
        if self.take_error(value):
            return True
        kind = pick(value, "type")
        if isinstance(kind, str) and kind.startswith(("transcript.text.", "speech.audio.")):
            if kind == "transcript.text.delta":
                self.text_bytes += text_length(pick(value, "delta"))
            elif kind.endswith(".done"):
                self.text_bytes = max(self.text_bytes, text_length(pick(value, "text")))
                self.done = True
        elif isinstance(pick(value, "text"), str):
            self.text_bytes = text_length(pick(value, "text"))
        else:
            return False
        self.take_usage(_usage(value))
        return True

    def take_usage(self, usage: Usage | None) -> None:
        """The last report, of tokens or of a length."""
        if usage is not None:
            self.keep_usage(usage)


def _usage(value: object) -> Usage | None:
    report = pick(value, "usage")
    tokens = tokens_used(report)
    if tokens is not None:
        return tokens
    audio_ms = milliseconds(pick(report, "seconds"))
    if audio_ms is None:  # with all details the length stands beside the text
        audio_ms = milliseconds(pick(value, "duration"))
    return None if audio_ms is None else Usage(audio_ms=audio_ms)


def _length_ms(recording: FormFile) -> int:
    """The longest that a recording can be."""
    size = len(recording.content)
    head = bytes(recording.content[:44])
    # A plain WAV says how many bytes a second has, and decoders go by it.
    if len(head) == 44 and head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt ":
        kind, _, rate, _, frame = struct.unpack("<HHIIH", head[20:34])
        a_second = int(rate * frame)
        if kind in _PCM and a_second >= 1000:
            return -(-size * 1000 // a_second)
    return size * _SLOWEST
