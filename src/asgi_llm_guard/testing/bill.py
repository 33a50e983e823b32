"""What a call costs, and the lines of a bill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from asgi_llm_guard.usage import Usage

__all__ = ["DEFAULT_PRICE", "Bill", "Price"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one token costs, in nano-USD. $1 per million tokens is 1000 nano-USD per token."""

    input: int
    output: int
    cache_read: int = 0
    """For the part of the input that was read from the provider's cache."""

    def cost_nanousd(self, usage: Usage) -> int:
        cached = usage.cache_read_tokens or 0
        fresh = (usage.input_tokens or 0) - cached
        return fresh * self.input + cached * self.cache_read + (usage.output_tokens or 0) * self.output


DEFAULT_PRICE: Final = Price(input=150, output=600, cache_read=75)
"""$0.15 and $0.60 per million tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """One line of the provider's bill: what a call really cost, whether or not its client was told."""

    id: str
    model: str
    input_tokens: int
    """All input, cache reads included."""
    output_tokens: int
    """All output, reasoning included: what was produced, even if nobody was there to read it."""
    cache_read_tokens: int
    reasoning_tokens: int
    cost_nanousd: int
    reported: bool
    """Whether the usage was sent to the client."""
