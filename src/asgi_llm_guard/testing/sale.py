"""A request as it arrived, and its answer while it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from asgi_llm_guard.testing.behaviour import Behaviour

__all__ = ["FakeRequest", "Filler", "Sale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRequest:
    """A request for what a model generates, as it arrived."""

    headers: Mapping[str, str]
    """Names in lower case."""
    body: Mapping[str, Any]
    """Of a form: its fields, and the names of its files."""
    raw: bytes
    """The body as it was sent."""
    dialect: str
    path: str
    model: str
    """Wherever the dialect names it: in the body or in the path."""
    stream: bool
    texts: tuple[str, ...]
    """Of the messages and instructions, in order."""
    counted_tokens: int
    """What is billed as input, unless the behaviour says otherwise."""
    choices: int = 1
    allowed_tokens: int | None = None
    """How long an answer may be; `None`: any length."""

    @property
    def messages(self) -> Sequence[Mapping[str, object]]:
        return list(self.body.get("messages", ()))


class Filler(Sequence[str]):
    """So many words, each made when it is asked for."""

    def __init__(self, count: int, *, word_bytes: int = 0, start: int = 1) -> None:
        self._count = max(0, count)
        self._bytes = word_bytes
        self._start = start

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            chosen = range(self._count)[index]
            if chosen.step == 1:
                return Filler(len(chosen), word_bytes=self._bytes, start=self._start + chosen.start)
            return [self[position] for position in chosen]
        return f"word{self._start + range(self._count)[index]}".ljust(self._bytes, "x")


@dataclass(slots=True)
class Sale:
    """A call that is being answered: what has been produced so far."""

    id: str
    number: int
    request: FakeRequest
    behaviour: Behaviour
    words: Sequence[str]
    finish: str
    """Why the answer ends: `stop`, `length` or `tool`."""
    status: int
    produced: int = 0
    started: bool = False
    reported: bool = False
    complete: bool = False
    """The last message of the answer is being sent."""
    written: bool = False
    """It is on the books."""
    events: int = 0
    """How many events were sent, in dialects that number them."""

    def chunks(self) -> Iterator[tuple[int, int, str]]:
        """Choice, position and text of every chunk, in order."""
        for choice in range(self.request.choices):
            for position, word in enumerate(self.words):
                yield choice, position, word if position == len(self.words) - 1 else f"{word} "

    @property
    def model(self) -> str:
        return self.behaviour.model or self.request.model

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def tells(self) -> bool:
        """Whether the answer may say what it used."""
        return self.behaviour.usage and self.behaviour.valid

    @property
    def input_tokens(self) -> int:
        behaviour = self.behaviour
        if behaviour.input_tokens is not None:
            return behaviour.input_tokens
        return max(self.request.counted_tokens, behaviour.cache_read_tokens + behaviour.cache_write_tokens)

    @property
    def reasoning_tokens(self) -> int:
        return self.behaviour.reasoning_tokens if self.started else 0

    def produce_all(self) -> None:
        self.started = True
        self.produced = len(self.words) * self.request.choices
