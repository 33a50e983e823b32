"""A request as it arrived, and its answer while it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asgi_llm_guard.testing.behaviour import Behaviour
from asgi_llm_guard.usage import Usage

__all__ = ["FakeRequest", "Sale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRequest:
    """A request for a chat completion, as it arrived."""

    headers: Mapping[str, str]
    """Names in lower case."""
    body: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def messages(self) -> Sequence[Mapping[str, object]]:
        return list(self.body["messages"])


@dataclass(slots=True)
class Sale:
    """A call that is being answered: what has been produced so far."""

    id: str
    request: FakeRequest
    behaviour: Behaviour
    words: Sequence[str]
    finish: str
    input_tokens: int
    produced: int = 0
    started: bool = False
    reported: bool = False
    complete: bool = False
    """The last message of the answer is being sent."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return (*self.behaviour.headers, ("x-request-id", self.id))

    @property
    def status(self) -> int:
        failing = self.behaviour.fail_after is not None and not self.stream
        return 500 if failing else self.behaviour.status

    def chunks(self) -> Iterator[tuple[int, int, str]]:
        """Choice, position and text of every chunk, in order."""
        for choice in range(self.choices):
            for position, word in enumerate(self.words):
                yield choice, position, word if position == len(self.words) - 1 else f"{word} "

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def choices(self) -> int:
        choices = self.request.body.get("n")
        return choices if isinstance(choices, int) and choices > 0 else 1

    @property
    def stream(self) -> bool:
        return self.request.body.get("stream") is True

    @property
    def usage_wanted(self) -> bool:
        options = self.request.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def produce_all(self) -> None:
        self.started = True
        self.produced = len(self.words) * self.choices

    def usage(self) -> Usage:
        reasoning = self.behaviour.reasoning_tokens if self.started else 0
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.produced + reasoning,
            cache_read_tokens=self.behaviour.cache_read_tokens,
            reasoning_tokens=reasoning,
            model=self.model,
        )
