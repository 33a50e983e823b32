"""What histograms and counters have in common: their buckets, and which tokens are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from asgi_llm_guard.usage import Usage

__all__ = ["SECONDS", "TOKENS", "Attributes", "billed", "by_modality"]

Attributes = dict[str, str | int | float | bool]

SECONDS: Final = tuple(round(0.01 * 2**power, 2) for power in range(14))
"""The buckets that the conventions ask for."""
TOKENS: Final = tuple(float(4**power) for power in range(14))
"""As `SECONDS`."""


def billed(usage: Usage) -> Iterator[tuple[str, int]]:
    """Input and output tokens as they are billed, where the provider says that this is another number; as counted, else."""
    for kind, counted, paid in (
        ("input", usage.input_tokens, usage.billed_input_tokens),
        ("output", usage.output_tokens, usage.billed_output_tokens),
    ):
        tokens = counted if paid is None else paid
        if tokens is not None:
            yield kind, tokens


def by_modality(tokens: int, audio: int | None, images: int | None) -> Iterator[tuple[str, int]]:
    """How many of so many tokens are audio, images, and text, which is the rest."""
    rest = tokens
    for modality, part in (("audio", audio), ("image", images)):
        if part:
            of_it = min(part, rest)
            rest -= of_it
            yield modality, of_it
    if rest or rest == tokens:
        yield "text", rest
