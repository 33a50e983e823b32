"""Cohere's rankings of documents, which are billed by search units: one query with up to a hundred documents.

Source: https://docs.cohere.com/reference/rerank, and the types of cohere 7.3 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.cohere import usage_of
from asgi_llm_guard.wire.cohere_single import WithoutText
from asgi_llm_guard.wire.shape import items, pick, pick_path

__all__ = ["CohereRerank"]


class CohereRerank(WithoutText):
    """The dialect `cohere_rerank`: POST to `/v2/rerank` and `/v1/rerank`."""

    __slots__ = ()

    name: Final = "cohere_rerank"
    operation = "rerank"

    @staticmethod
    def _is_ours(value: object) -> bool:
        """Whether an object that may be anything has the shape of a response."""
        ranked = items(pick(value, "results"))
        first = next(iter(ranked), None)
        return pick(first, "relevance_score") is not None and pick_path(value, "meta", "billed_units") is not None

    @staticmethod
    def _usage(value: object) -> Usage | None:
        return usage_of(pick(value, "meta"))
