"""Usage as the two APIs report it. What is not known is left out or `null`, never zero."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.usage import Usage

__all__ = ["NOTHING_KNOWN", "anthropic_counts", "anthropic_tier", "openai_counts", "openai_tier"]

NOTHING_KNOWN: Final[dict[str, object]] = {"input_tokens": None, "output_tokens": None}
"""Of a message that does not say what it used: SDKs take a message apart that has no usage at all."""

_TIERS: Final = {"standard": "default"}
_BACK: Final = {"default": "standard"}


def openai_counts(usage: Usage | None) -> dict[str, object] | None:
    """`usage` of a completion; `None` when nothing is known.

    How long what was written to the cache is kept is told as OpenAI's Responses tell it, by lifetimes.
    """
    if usage is None:
        return None
    entered, written = usage.input_tokens, usage.output_tokens
    of_input: dict[str, object] = {}
    if usage.cache_read_tokens is not None:
        of_input["cached_tokens"] = usage.cache_read_tokens
    if usage.cache_write_tokens is not None:
        of_input["cache_write_tokens"] = usage.cache_write_tokens
        if usage.cache_write_1h_tokens is not None:
            short = usage.cache_write_tokens - usage.cache_write_1h_tokens
            lifetimes = {"ttl_5m_tokens": short, "ttl_1h_tokens": usage.cache_write_1h_tokens}
            of_input["cache_write_tokens_details"] = lifetimes
    counts: dict[str, object] = {
        "prompt_tokens": entered,
        "completion_tokens": written,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": of_input,
        "completion_tokens_details": {},
    }
    if usage.reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts


def openai_tier(usage: Usage | None) -> dict[str, object]:
    """The member that names the tier; empty where it is not known."""
    tier = None if usage is None else usage.service_tier
    return {} if tier is None else {"service_tier": _TIERS.get(tier, tier)}


def anthropic_tier(tier: str) -> dict[str, object]:
    """The member of `usage` that names the tier of a completion; empty where it is not known."""
    if not tier:
        return {}
    return {"speed": "fast"} if tier == "fast" else {"service_tier": _BACK.get(tier, tier)}


def anthropic_counts(usage: Usage | None) -> dict[str, object]:
    """`usage` of a message: what was read from the cache and written to it stands beside the rest of the input."""
    if usage is None:
        return dict(NOTHING_KNOWN)
    read, stored = usage.cache_read_tokens, usage.cache_write_tokens
    fresh = None if usage.input_tokens is None else usage.input_tokens - (read or 0) - (stored or 0)
    counts: dict[str, object] = {
        "input_tokens": fresh,
        "cache_creation_input_tokens": stored,
        "cache_read_input_tokens": read,
        "output_tokens": usage.output_tokens,
    }
    kept = usage.cache_write_1h_tokens
    if stored is not None and kept is not None:
        counts["cache_creation"] = {"ephemeral_5m_input_tokens": stored - kept, "ephemeral_1h_input_tokens": kept}
    if usage.reasoning_tokens is not None:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return counts
