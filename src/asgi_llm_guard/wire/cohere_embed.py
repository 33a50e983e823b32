"""Cohere's embeddings. Only input is billed: tokens, and those of images.

Source: https://docs.cohere.com/reference/embed, and the types of cohere 7.3 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, Head, ItemMeter, Meter
from asgi_llm_guard.wire.cohere import classify, usage_of, whole_number
from asgi_llm_guard.wire.items import Items, Latest
from asgi_llm_guard.wire.meters import Whole
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import LONGEST_NAME, count_of, decode, path_parts, pick, pick_path
from asgi_llm_guard.wire.sse import Blocks

__all__ = ["CohereEmbed"]

_TYPES: Final = ("embeddings_floats", "embeddings_by_type")


class CohereEmbed:
    """The dialect `cohere_embed`: POST to `/v2/embed` and `/v1/embed`."""

    __slots__ = ()

    name: Final = "cohere_embed"
    provider: Final = "cohere"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - gateways speak it too
        """Whether `path` ends in a version and `embed`."""
        return path_parts(path)[-2:] in (["v2", "embed"], ["v1", "embed"])

    def read_request(self, view: BodyView, path: str = "") -> Ask:  # noqa: ARG002 - the body names the model
        """What the request asks for: no output.

        Raises:
            BodyError: `model` is missing or malformed.
        """
        model = view.text("model", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "model: required, got none", "model")
        return Ask(model=model, max_output_tokens=0, limits_output=False)

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body itself: there is nothing to ask for, and no output to limit."""
        return view.body

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a response says."""
        value = decode(body)
        if not 200 <= status < 300:
            return Answer(kind="error", error=classify(status, value))
        return Answer(kind="success", usage=_usage(value), finished=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - usage is never asked for
        """A meter for the body: one JSON value."""
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response as a model or dict, or an HTTP response. Errors are read by `cohere`."""
        status = pick(obj, "status_code")
        if type(status) is int:
            content = pick(obj, "content")
            if isinstance(obj, BaseException) or not isinstance(content, bytes) or not _is_ours(decode(content)):
                return None
            return self.read_response(status, content)
        return Answer(kind="success", usage=_usage(obj), finished=True) if _is_ours(obj) else None

    def item_meter(self) -> ItemMeter:
        """A meter for the responses to batches of texts."""
        return Items(lambda: Latest(_is_ours, _usage), Blocks())


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything has the shape of a response."""
    if pick(value, "embeddings") is None:
        return False
    return pick(value, "response_type") in _TYPES or pick_path(value, "meta", "billed_units") is not None


def _usage(value: object) -> Usage | None:
    """The tokens that are billed, of texts and of images."""
    meta = pick(value, "meta")
    units = pick(meta, "billed_units")
    usage = usage_of(meta)
    pictures = whole_number(pick(units, "image_tokens"))
    if usage is None and pictures is None:
        return None
    texts = usage.input_tokens if usage is not None else None
    entered = count_of((texts or 0) + (pictures or 0))
    whole = Usage(input_tokens=entered, output_tokens=0)
    return whole if pictures is None else msgspec.structs.replace(whole, input_image_tokens=pictures)
