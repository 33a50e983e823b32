"""What a call costs, the lines of a bill, and the attempts that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from asgi_llm_guard.usage import Usage

__all__ = ["DEFAULT_PRICE", "Attempt", "Bill", "Price"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one token costs, in nano-USD. $1 per million tokens is 1000 nano-USD per token."""

    input: int
    output: int
    cache_read: int = 0
    """For the part of the input that was read from the provider's cache."""
    cache_write: int | None = None
    """For the part that was written into it; `None`: as other input."""
    cache_write_1h: int | None = None
    """For what is kept longer there; `None`: as other writes."""
    reasoning: int | None = None
    """For the part of the output that is reasoning; `None`: as other output."""
    per_call: int = 0
    image: int = 0
    """For each image that has no tokens."""
    audio_ms: int = 0
    """For each millisecond of audio that is billed by its length."""
    character: int = 0
    """For each character that is spoken."""
    search_unit: int = 0

    def cost_nanousd(self, usage: Usage) -> int:
        read, written = usage.cache_read_tokens or 0, usage.cache_write_tokens or 0
        kept, reasoning = usage.cache_write_1h_tokens or 0, usage.reasoning_tokens or 0
        write_rate = self.input if self.cache_write is None else self.cache_write
        kept_rate = write_rate if self.cache_write_1h is None else self.cache_write_1h
        reasoning_rate = self.output if self.reasoning is None else self.reasoning
        return (
            ((usage.input_tokens or 0) - read - written) * self.input
            + read * self.cache_read
            + (written - kept) * write_rate
            + kept * kept_rate
            + ((usage.output_tokens or 0) - reasoning) * self.output
            + reasoning * reasoning_rate
            + (usage.images or 0) * self.image
            + (usage.audio_ms or 0) * self.audio_ms
            + (usage.characters or 0) * self.character
            + (usage.search_units or 0) * self.search_unit
            + self.per_call
        )


DEFAULT_PRICE: Final = Price(input=150, output=600, cache_read=75)
"""$0.15 and $0.60 per million tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """One line of the provider's bill: what a call really cost, whether or not its client was told."""

    id: str
    dialect: str
    path: str
    model: str
    """The one that answered."""
    usage: Usage
    """What was used, and not what the client was told: what was produced, even if nobody was there to read it."""
    cost_nanousd: int
    reported: bool
    """Whether the client was told, in an answer that came to its end."""

    @property
    def input_tokens(self) -> int:
        """All input, cache reads and writes included."""
        return self.usage.input_tokens or 0

    @property
    def output_tokens(self) -> int:
        """All output, reasoning included."""
        return self.usage.output_tokens or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request that reached the provider, retries included, and what became of it."""

    number: int
    """In order of arrival, from 1."""
    id: str
    dialect: str
    path: str
    model: str
    """The one that was asked for."""
    stream: bool
    status: int
    retry: int | None
    """What the client says how many attempts of its call went before, in the way of the SDKs that say it."""
    left: bool
    """The client was gone before the answer was complete."""
    words: Sequence[str]
    """What was produced."""
    bill: Bill | None
    """`None`: not billed."""

    @property
    def billed(self) -> bool:
        return self.bill is not None

    @property
    def reported(self) -> bool:
        return self.bill is not None and self.bill.reported
