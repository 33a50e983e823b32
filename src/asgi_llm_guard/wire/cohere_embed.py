"""Cohere's embeddings. Only input is billed: tokens, and those of images.

Source: https://docs.cohere.com/reference/embed, and the types of cohere 7.3 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.cohere import usage_of, whole_number
from asgi_llm_guard.wire.cohere_single import WithoutText
from asgi_llm_guard.wire.shape import count_of, pick, pick_path

__all__ = ["CohereEmbed"]

_TYPES: Final = ("embeddings_floats", "embeddings_by_type")


class CohereEmbed(WithoutText):
    """The dialect `cohere_embed`: POST to `/v2/embed` and `/v1/embed`."""

    __slots__ = ()

    name: Final = "cohere_embed"
    operation = "embed"

    @staticmethod
    def _is_ours(value: object) -> bool:
        """Whether an object that may be anything has the shape of a response."""
        if pick(value, "embeddings") is None:
            return False
        return pick(value, "response_type") in _TYPES or pick_path(value, "meta", "billed_units") is not None

    @staticmethod
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
