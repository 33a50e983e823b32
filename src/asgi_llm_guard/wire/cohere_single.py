"""What Cohere's APIs without generated text have in common: one JSON answer, and only input that is billed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, Head, ItemMeter, Meter
from asgi_llm_guard.wire.cohere import classify
from asgi_llm_guard.wire.items import Items, Latest
from asgi_llm_guard.wire.meters import Whole
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import LONGEST_NAME, decode, path_parts, pick
from asgi_llm_guard.wire.sse import Blocks

__all__ = ["WithoutText"]


class WithoutText(ABC):
    """A dialect of `/v2/{operation}` and `/v1/{operation}`."""

    __slots__ = ()

    operation: ClassVar[str]
    provider: Final = "cohere"

    @staticmethod
    @abstractmethod
    def _is_ours(value: object) -> bool:
        """Whether an object that may be anything has the shape of a response."""

    @staticmethod
    @abstractmethod
    def _usage(value: object) -> Usage | None:
        """What a response says that is billed."""

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - gateways speak it too
        """Whether `path` ends in a version and the operation."""
        return path_parts(path)[-2:] in (["v2", self.operation], ["v1", self.operation])

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
        return Answer(kind="success", usage=self._usage(value), finished=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - usage is never asked for
        """A meter for the body: one JSON value."""
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response as a model or dict, or an HTTP response. Errors are read by `cohere`."""
        status = pick(obj, "status_code")
        if type(status) is int:
            content = pick(obj, "content")
            if isinstance(obj, BaseException) or not isinstance(content, bytes) or not self._is_ours(decode(content)):
                return None
            return self.read_response(status, content)
        return Answer(kind="success", usage=self._usage(obj), finished=True) if self._is_ours(obj) else None

    def item_meter(self) -> ItemMeter:
        """A meter for the responses to batches, or that a function streams."""
        return Items(lambda: Latest(self._is_ours, self._usage), Blocks())
