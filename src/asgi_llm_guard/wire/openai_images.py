"""OpenAI's images: generations, edits and variations, from JSON or from a form.

Models that count tokens report them; of others the images are counted.

Source: https://platform.openai.com/docs/api-reference/images, and the types of openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from asgi_llm_guard.estimate import FRAMING_TOKENS, IMAGE_ORIGINAL_TOKENS
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask
from asgi_llm_guard.wire.forms import FormView
from asgi_llm_guard.wire.openai_family import Family, FamilyTally, model_of, operation, text_in
from asgi_llm_guard.wire.openai_usage import tokens_used
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.shape import MOST_CHOICES, items, name_of, pick

__all__ = ["OpenAIImages"]

_OPERATIONS: Final = frozenset({"generations", "edits", "variations"})
_EVENTS: Final = ("image_generation.", "image_edit.")

_STANDARD_PIXELS: Final = 1_536 * 1_024
_STANDARD_TOKENS: Final = 6_240
"""The most that an image of a standard size takes at high quality: 1024 x 1536.
Source: https://platform.openai.com/docs/guides/image-generation (2026-11)."""
_UNSTATED: Final = 2
"""An image whose size the model may choose, in standard ones: an assumption."""
_FINEST: Final = 4
"""What the qualities above high take, as a multiple of it: an assumption, no table is published."""
_PARTIAL_TOKENS: Final = 100
"""One partial image. Source: as above."""
_FRAMES: Final = 9
"""The frames of a GIF that states none. Source: the reference of `frame_count`."""
_SIZE: Final = re.compile(r"(\d{1,5})x(\d{1,5})")


class OpenAIImages(Family):
    """The dialect `openai_images`."""

    __slots__ = ()

    name: Final = "openai_images"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        what = operation(path)
        return len(what) == 2 and what[0] == "images" and what[1] in _OPERATIONS

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. Who writes an SVG is a model beside the one that draws.

        Raises:
            BodyError: `model` is missing, or a value is malformed.
        """
        count = view.whole("n", least=1, most=MOST_CHOICES) or 1
        author = name_of(view.get("svg.model"))
        entered = None
        if isinstance(view, FormView):
            entered = FRAMING_TOKENS + view.text_bytes + IMAGE_ORIGINAL_TOKENS * len(view.files)
        return Ask(
            model=model_of(view, path),
            alternatives=() if author is None else (author,),
            max_output_tokens=_tokens(view),
            limits_output=False,
            choices=count,
            stream=view.flag("stream"),
            wants_usage=view.flag("stream"),
            input_tokens=entered,
            images=count,
        )

    def tally(self) -> FamilyTally:
        return _Tally()

    def is_ours(self, value: object) -> bool:
        """Whether it is a list of images, or an event of their stream. Errors look as in a chat, and are told there."""
        kind = pick(value, "type")
        if isinstance(kind, str):
            return kind.startswith(_EVENTS)
        data = pick(value, "data")
        if not isinstance(data, (list, tuple)) or not data or pick(value, "object") is not None:
            return False
        return isinstance(pick(value, "created"), int) and (
            pick(data[0], "b64_json") is not None or pick(data[0], "url") is not None
        )

    def read_plain(self, body: bytes) -> Answer | None:
        try:
            plain = _PLAIN.decode(body)  # passes over the images
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        tally = _Tally()
        tally.add(plain)
        return tally.answer(whole=True)


class _Image(msgspec.Struct):
    """Nothing is read of an image."""


class _Plain(msgspec.Struct):
    created: int
    data: list[_Image]
    usage: dict[str, Any] | None = None
    svg_usage: dict[str, Any] | None = None
    error: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)


class _Tally(FamilyTally):
    __slots__ = ("_images",)

    def __init__(self) -> None:
        super().__init__()
        self._images = 0

    def add(self, value: object) -> bool:
        if self.take_error(value):
            self.take_usage(tokens_used(pick(value, "usage")))
            return True
        kind, data = pick(value, "type"), pick(value, "data")
        if isinstance(kind, str) and kind.startswith(_EVENTS):
            if not kind.endswith(".completed"):
                return True
            self._images += 1
            self.done = True
        elif isinstance(data, (list, tuple)):
            self._images = sum(1 for _ in items(data))
        else:
            return False
        author = tokens_used(pick(value, "svg_usage"))
        if author is not None:
            author = msgspec.structs.replace(author, model=name_of(pick(pick(value, "svg_usage"), "model")))
        self.take_usage(
            msgspec.structs.replace(
                tokens_used(pick(value, "usage")) or self.usage or Usage(),
                images=self._images,
                extra=() if author is None else (author,),
            )
        )
        return True

    def take_usage(self, usage: Usage | None) -> None:
        """The latest counts: one that tells less tells of fewer images, or of none."""
        if usage is not None:
            self.keep_usage(usage)


def _tokens(view: BodyView) -> int:
    """The most output tokens of one image, where its model counts them."""
    size, quality = text_in(view, "size"), text_in(view, "quality")
    stated = _SIZE.fullmatch(size or "")
    standard = -(-int(stated[1]) * int(stated[2]) // _STANDARD_PIXELS) if stated else _UNSTATED
    tokens = max(standard, 1) * _STANDARD_TOKENS * (_FINEST if quality in ("xhigh", "max") else 1)
    partial = view.whole("partial_images", least=0, most=1_000) or 0
    frames = view.whole("frame_count", least=1, most=1_000)
    if frames is None:
        frames = _FRAMES if text_in(view, "output_format") == "gif" else 1
    return (tokens + partial * _PARTIAL_TOKENS) * frames
