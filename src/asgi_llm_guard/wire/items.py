"""The meter of the items that a function streams, for dialects whose events say by their shape what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer
from asgi_llm_guard.wire.meters import Splitter, Streamed, Tally
from asgi_llm_guard.wire.sse import Block

__all__ = ["ItemTally", "Items", "Latest"]


class ItemTally(Tally, Protocol):
    """A tally that knows what its dialect says."""

    seen: bool
    """Something had the dialect's shape."""

    def add(self, value: object) -> None:
        """Count a decoded event, or a library's object for it. Other shapes are passed over."""
        ...


class Items:
    """Counts objects, dicts, and pieces of a raw stream, each in a tally of their own."""

    __slots__ = ("_raw", "_raw_tally", "_tally")

    def __init__(self, tally: Callable[[], ItemTally], splitter: Splitter) -> None:
        self._tally = tally()
        self._raw_tally = tally()
        self._raw = Streamed(splitter, self._raw_tally)

    def add(self, item: object) -> None:
        if isinstance(item, str):
            item = item.encode("utf-8", "surrogatepass")
        if isinstance(item, bytes):
            self._raw.feed(item)
        else:
            self._tally.add(item)

    def answer(self) -> Answer | None:
        if self._tally.seen:
            return self._tally.answer()
        return self._raw.answer() if self._raw_tally.seen else None


class Latest:
    """The tally of a dialect without streams: what the last of several responses used."""

    __slots__ = ("_is_ours", "_usage", "_usage_of", "seen")

    text_bytes: Final = 0

    def __init__(self, is_ours: Callable[[object], bool], usage_of: Callable[[object], Usage | None]) -> None:
        self._is_ours = is_ours
        self._usage_of = usage_of
        self._usage: Usage | None = None
        self.seen = False

    def event(self, block: Block) -> bool:  # noqa: ARG002 - a response is no event
        return False

    def add(self, value: object) -> None:
        if self._is_ours(value):
            self.seen = True
            self._usage = self._usage_of(value) or self._usage

    def answer(self, *, unread: int = 0) -> Answer:
        return Answer(kind="success", usage=self._usage, finished=True, unread=unread)
