"""Cohere's rankings of documents, which are billed by search units: one query with up to a hundred documents.

Source: https://docs.cohere.com/reference/rerank, and the types of cohere 7.3 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, Head, ItemMeter, Meter
from asgi_llm_guard.wire.cohere import classify, usage_of
from asgi_llm_guard.wire.items import Items, Latest
from asgi_llm_guard.wire.meters import Whole
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import LONGEST_NAME, decode, items, path_parts, pick, pick_path
from asgi_llm_guard.wire.sse import Blocks

__all__ = ["CohereRerank"]


class CohereRerank:
    """The dialect `cohere_rerank`: POST to `/v2/rerank` and `/v1/rerank`."""

    __slots__ = ()

    name: Final = "cohere_rerank"
    provider: Final = "cohere"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - gateways speak it too
        """Whether `path` ends in a version and `rerank`."""
        return path_parts(path)[-2:] in (["v2", "rerank"], ["v1", "rerank"])

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
        """A meter for responses that a function streams."""
        return Items(lambda: Latest(_is_ours, _usage), Blocks())


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything has the shape of a response."""
    ranked = items(pick(value, "results"))
    first = next(iter(ranked), None)
    return pick(first, "relevance_score") is not None and pick_path(value, "meta", "billed_units") is not None


def _usage(value: object) -> Usage | None:
    return usage_of(pick(value, "meta"))
