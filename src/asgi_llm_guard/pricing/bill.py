"""What one usage comes to at one card's prices: exact sums in pico-USD (10^-12). Pure.

Unknown is not zero. A bucket of tokens without a price of its own costs what the tokens around it cost.
What is counted in other units costs what the card says for the unit; where it says nothing, it is part
of the tokens, if the usage has any and they have a price, and a web search costs `WEB_SEARCH`; anything
else has no known cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.pricing.cards import WEB_SEARCH, RateCard, Rates, Sheet, tier_name
from asgi_llm_guard.usage import Usage

__all__ = ["picousd"]


def picousd(card: RateCard, usage: Usage, at_ms: int) -> int | None:
    """Pico-USD for a usage at `at_ms`; `None`: it is unknown, or contradicts itself. What is in `extra` is left out."""
    if card.by_unit:
        return _of_units(card, usage, 0)
    if usage.billed_input_tokens is not None or usage.billed_output_tokens is not None:
        usage = _as_billed(usage)
    sheet = card.steady
    if sheet is None or usage.service_tier is not None:
        sheet = card.sheet(at_ms, tier_name(usage.service_tier))
    tokens = _of_tokens(sheet, usage)
    if tokens is None:
        return None
    if usage.images or usage.audio_ms or usage.characters or usage.web_searches or usage.search_units:
        units = _of_units(card, usage, (usage.input_tokens or 0) + (usage.output_tokens or 0))
        return None if units is None else tokens + units
    return tokens


def _as_billed(usage: Usage) -> Usage:
    """The usage with the tokens that are billed. They have been relieved of what was cached."""
    if usage.billed_input_tokens is not None:
        usage = msgspec.structs.replace(
            usage, input_tokens=usage.billed_input_tokens, cache_read_tokens=None, cache_write_tokens=None
        )
    if usage.billed_output_tokens is not None:
        usage = msgspec.structs.replace(usage, output_tokens=usage.billed_output_tokens, reasoning_tokens=None)
    return usage


def _of_units(card: RateCard, usage: Usage, tokens: int) -> int | None:
    """Pico-USD for what is not counted in tokens. `tokens`: how many were counted, that have a price."""
    fees = card.fees
    counts = {
        "image": usage.images,
        "audio_ms": usage.audio_ms,
        "character": usage.characters,
        "web_search": usage.web_searches,
        "search_unit": usage.search_units,
    }
    if usage.output_tokens and not card.by_unit:
        counts["image"] = None  # the tokens of the images are what is billed, and they are counted
    told = not card.by_unit
    total = 0
    for name, count in counts.items():
        if count is None:
            continue
        if type(count) is not int or not 0 <= count <= MAX_AMOUNT:
            return None
        fee: int | None = getattr(fees, name)
        if name == "web_search":
            fee = WEB_SEARCH if fee is None else fee
        elif fee is not None:
            told = True
        elif count and not tokens:
            return None
        total += count * (fee or 0)
    return total if told else None


def _of_tokens(sheet: Sheet, usage: Usage) -> int | None:
    total_input = usage.input_tokens
    total_output = usage.output_tokens
    if type(total_input) is not int or type(total_output) is not int:
        return _of_some_tokens(sheet, usage)
    rates = sheet[0][1]
    if len(sheet) > 1:
        for above, raised in sheet:
            if total_input > above:
                rates = raised
    pico = rates.per_call + total_input * rates.input + total_output * rates.output
    if (
        usage.cache_read_tokens
        or usage.cache_write_tokens
        or usage.cache_write_1h_tokens
        or usage.input_audio_tokens
        or usage.output_audio_tokens
        or usage.reasoning_tokens
        or rates.image_input != rates.input
        or rates.image_output != rates.output
    ):
        apart = _apart(rates, usage, total_input, total_output)
        if apart is None:
            return None
        pico += apart
    return pico if total_input >= 0 and total_output >= 0 and pico <= MAX_AMOUNT * 1000 else None


def _apart(rates: Rates, usage: Usage, total_input: int, total_output: int) -> int | None:
    """What the buckets with a price of their own cost more (or less) than plain text.

    Of tokens that were cached in part, and audio or images in part, nobody says which are both. The dearer
    ones are taken not to have been cached, as far as they can.
    """
    read = usage.cache_read_tokens or 0
    write = usage.cache_write_tokens or 0
    write_1h = usage.cache_write_1h_tokens or 0
    audio_input = usage.input_audio_tokens or 0
    audio_output = usage.output_audio_tokens or 0
    reasoning = usage.reasoning_tokens or 0
    image_input = usage.input_image_tokens
    image_output = usage.output_image_tokens
    parts = (read, write, write_1h, audio_input, audio_output, reasoning, image_input or 0, image_output or 0)
    if not all(type(part) is int and part >= 0 for part in parts):
        return None
    # Not told: all of it may be images, where those are dearer.
    if image_input is None:
        image_input = max(0, total_input - audio_input) if rates.image_input > rates.input else 0
    if image_output is None:
        rest = max(0, total_output - audio_output - reasoning)
        image_output = rest if rates.image_output > rates.output else 0
    plain = total_input - read - write
    if plain < 0 or write_1h > write or audio_input + image_input > total_input:
        return None
    if audio_output + image_output + reasoning > total_output:
        return None
    fresh_audio = min(audio_input, plain)
    fresh_image = min(image_input, plain - fresh_audio)
    read_audio = min(audio_input - fresh_audio, read)
    read_image = min(image_input - fresh_image, read - read_audio)
    return (
        read * (rates.cache_read - rates.input)
        + (write - write_1h) * (rates.cache_write - rates.input)
        + write_1h * (rates.cache_write_1h - rates.input)
        + fresh_audio * (rates.audio_input - rates.input)
        + fresh_image * (rates.image_input - rates.input)
        + read_audio * (rates.audio_cache_read - rates.cache_read)
        + read_image * (rates.image_cache_read - rates.cache_read)
        + audio_output * (rates.audio_output - rates.output)
        + image_output * (rates.image_output - rates.output)
        + reasoning * (rates.reasoning - rates.output)
    )


def _of_some_tokens(sheet: Sheet, usage: Usage) -> int | None:
    """A usage of which a part is unknown has a known cost only if that part is free at every size."""
    known_input, known_output = usage.input_tokens, usage.output_tokens
    everything = [rates for _, rates in sheet]
    if known_input is None:
        if any(_rates(rates, _INPUT) != {0} for rates in everything):
            return None
        known_input = 0
    if known_output is None:
        if any(_rates(rates, _OUTPUT) != {0} for rates in everything):
            return None
        known_output = 0
    if type(known_input) is not int or type(known_output) is not int:
        return None
    return _of_tokens(sheet, msgspec.structs.replace(usage, input_tokens=known_input, output_tokens=known_output))


_OUTPUT = ("output", "audio_output", "image_output", "reasoning")
_INPUT = tuple(name for name in Rates.__struct_fields__ if name not in (*_OUTPUT, "per_call"))


def _rates(rates: Rates, names: Sequence[str]) -> set[int]:
    return {getattr(rates, name) for name in names}
