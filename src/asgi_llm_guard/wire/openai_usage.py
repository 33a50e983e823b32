"""The reports of usage in OpenAI's API, under its older names and its newer ones.

Counts that cannot be are unknown, and so are parts that are larger than what they are part of.
"""

from __future__ import annotations

import math
from typing import Final

from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.shape import MOST_TOKENS, count_of, first_count, pick, pick_path, within

__all__ = ["completion_usage", "milliseconds", "tokens_used", "usage_of"]

_NANO: Final = 1_000_000_000


def completion_usage(report: object) -> Usage | None:
    """What `prompt_tokens` and `completion_tokens` say; `None` when neither is told.

    OpenRouter adds the `cost` in credits, which are US dollars; where the caller's own key was used upstream, the
    fee and what the key is charged. Mistral adds `num_cached_tokens` and `prompt_audio_seconds`.
    """
    if report is None:
        return None
    entered, written = count_of(pick(report, "prompt_tokens")), count_of(pick(report, "completion_tokens"))
    if entered is None and written is None:
        return None
    of_input, of_output = pick(report, "prompt_tokens_details"), pick(report, "completion_tokens_details")
    return usage_of(
        entered,
        written,
        total=count_of(pick(report, "total_tokens")),
        cached=first_count(pick(of_input, "cached_tokens"), pick(report, "num_cached_tokens")),
        stored=count_of(pick(of_input, "cache_write_tokens")),
        stored_long=_stored_long(pick(of_input, "cache_write_tokens_details")),
        reasoning=count_of(pick(of_output, "reasoning_tokens")),
        audio=(count_of(pick(of_input, "audio_tokens")), count_of(pick(of_output, "audio_tokens"))),
        images=(count_of(pick(of_input, "image_tokens")), count_of(pick(of_output, "image_tokens"))),
        audio_ms=milliseconds(pick(report, "prompt_audio_seconds")),
        cost_nanousd=_cost(report),
    )


def tokens_used(report: object) -> Usage | None:
    """What `input_tokens` and `output_tokens` say; `None` when neither is told."""
    if report is None:
        return None
    entered, written = count_of(pick(report, "input_tokens")), count_of(pick(report, "output_tokens"))
    if entered is None and written is None:
        return None
    # Transcriptions write the name in the singular.
    of_input = pick(report, "input_tokens_details") or pick(report, "input_token_details")
    of_output = pick(report, "output_tokens_details")
    return usage_of(
        entered,
        written,
        total=count_of(pick(report, "total_tokens")),
        cached=first_count(pick(of_input, "cached_tokens"), pick(report, "cached_tokens")),
        stored=count_of(pick(of_input, "cache_write_tokens")),
        stored_long=_stored_long(pick(of_input, "cache_write_tokens_details")),
        reasoning=first_count(pick(of_output, "reasoning_tokens"), pick(report, "reasoning_tokens")),
        audio=(count_of(pick(of_input, "audio_tokens")), count_of(pick(of_output, "audio_tokens"))),
        images=(count_of(pick(of_input, "image_tokens")), count_of(pick(of_output, "image_tokens"))),
        cost_nanousd=_cost(report),
    )


def usage_of(
    entered: int | None,
    written: int | None,
    *,
    total: int | None = None,
    cached: int | None = None,
    stored: int | None = None,
    stored_long: int | None = None,
    reasoning: int | None = None,
    audio: tuple[int | None, int | None] = (None, None),
    images: tuple[int | None, int | None] = (None, None),
    audio_ms: int | None = None,
    cost_nanousd: int | None = None,
    model: str | None = None,
    tier: str | None = None,
) -> Usage:
    """The usage of a report with these counts; `audio` and `images`: of input and of output."""
    if total is not None and entered is not None and written is not None and total > entered + written:
        # Gemini's compatible endpoint bills thinking that it counts in the total only.
        reasoning = reasoning or total - entered - written
        written = total - entered
    if entered is None or (cached or 0) + (stored or 0) > entered:
        cached = stored = None
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=cached,
        cache_write_tokens=stored,
        cache_write_1h_tokens=within(stored_long, stored),
        reasoning_tokens=within(reasoning, written),
        input_audio_tokens=within(audio[0], entered),
        output_audio_tokens=within(audio[1], written),
        input_image_tokens=within(images[0], entered),
        output_image_tokens=within(images[1], written),
        audio_ms=audio_ms,
        reported_nanousd=cost_nanousd,
        model=model,
        service_tier=tier,
    )


def milliseconds(seconds: object) -> int | None:
    """A length in whole milliseconds, rounded up; `None` for what is not believable as one."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return None
    return math.ceil(seconds * 1000) if 0 <= seconds <= MOST_TOKENS // 1000 else None


def _stored_long(details: object) -> int | None:
    """Tokens that are kept for longer than the shortest lifetime there is; an hour is Anthropic's, behind a gateway."""
    return first_count(pick(details, "ttl_12h_tokens"), pick(details, "ttl_1h_tokens"))


def _cost(report: object) -> int | None:
    cost = _nanousd(pick(report, "cost"))
    if cost is not None and pick(report, "is_byok") is True:
        upstream = _nanousd(pick_path(report, "cost_details", "upstream_inference_cost"))
        return None if upstream is None else cost + upstream
    return cost


def _nanousd(dollars: object) -> int | None:
    if isinstance(dollars, bool) or not isinstance(dollars, (int, float)):
        return None
    return math.ceil(dollars * _NANO - 1e-6) if 0 <= dollars <= MAX_AMOUNT / _NANO / 2 else None
