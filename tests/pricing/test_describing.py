"""What a guard holds for by the request's own words: no more than it can cause, and no less."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_llm_guard import Guard
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.wire.base import Ask
from asgi_llm_guard.wire.peek import read_body

NOW_MS = 1_795_262_400_000  # 2026-11-21 12:00 UTC
DAY_MS = 86_400_000


def described(model: str, provider: str, body: dict[str, Any], **asked: Any) -> Call:
    """A body as a guard describes it, with a limit of one token."""
    guard = Guard(clock=FrozenClock(NOW_MS))
    ask = Ask(model=model, max_output_tokens=1, **asked)
    view = read_body(json.dumps(body).encode())
    return guard.engine.describer.describe_body(ask, view, provider=provider, dialect="any", assumed_output_tokens=None)


MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("more", "nanousd_per_token"),
    [
        ({}, 3_000),
        ({"cache_control": {"type": "ephemeral"}}, 3_750),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, 6_000),
    ],
)
def test_a_body_for_claude_is_held_at_what_it_can_cost(more: dict[str, Any], nanousd_per_token: int) -> None:
    """T4: without a mark for the cache at the price of input, with one at the price of the write that it asks for.

    Source: as in test_costs: 3 in, 3.75 and 6 for cache writes, 15 out.
    """
    call = described("claude-sonnet-4-5", "anthropic", {"messages": MESSAGES, **more})
    assert call.cost_nanousd == call.input_tokens * nanousd_per_token + 15_000


@pytest.mark.parametrize(
    ("part", "nanousd_per_token"),
    [({"text": "hello"}, 300), ({"inlineData": {"mimeType": "audio/mp3", "data": "AAAA"}}, 1_000)],
)
def test_a_body_for_gemini_is_held_at_what_it_can_cost(part: dict[str, Any], nanousd_per_token: int) -> None:
    """T4: at the price of audio only where there may be some. Source: as in test_costs: 0.30 in, audio 1, 2.50 out."""
    call = described("gemini-2.5-flash", "google", {"contents": [{"parts": [part]}]})
    assert call.cost_nanousd == call.input_tokens * nanousd_per_token + 2_500


def test_what_a_request_asks_for_besides_tokens_is_held() -> None:
    """Conformance 31, T4: images, characters, audio and searches that the request tells of are in its bound."""
    searching = described(
        "claude-sonnet-4-5",
        "anthropic",
        {"messages": MESSAGES, "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 4}]},
    )
    assert searching.web_searches == 4
    assert searching.cost_nanousd == searching.input_tokens * 3_000 + 15_000 + 4 * 10_000_000
    assert described("tts-1", "openai", {"input": "x"}, characters=100).cost_nanousd == 100 * 15_000
    assert described("whisper-1", "openai", {"file": "x"}, audio_ms=60_000).cost_nanousd == 6_000_000
    assert described("grok-imagine-image", "xai", {"prompt": "x"}, images=2).cost_nanousd == 40_000_000
    ranking = {"query": "q", "documents": ["d"] * 101}
    assert described("rerank-v3.5", "cohere", ranking).cost_nanousd == 2 * 2_000_000


def test_a_call_that_is_described_in_words() -> None:
    """T4: what is told of a call is held for; of what is not told, the dearest."""
    guard = Guard(clock=FrozenClock(NOW_MS))

    def claude(**told: Any) -> Call:
        return guard.describe("anthropic/claude-sonnet-4-5", max_output_tokens=0, **told)

    assert claude(input_tokens=1_000).cost_nanousd == 6_000_000
    assert claude(input_tokens=1_000, cache_writes="none").cost_nanousd == 3_000_000
    for given, nanousd_per_token in (("hello", 6_000), (MESSAGES, 6_000), ({"messages": MESSAGES}, 3_000)):
        call = claude(input=given)
        assert call.cost_nanousd == call.input_tokens * nanousd_per_token
    searching = guard.describe("openai/gpt-4o", input_tokens=0, max_output_tokens=0, web_searches=2)
    assert searching.cost_nanousd == 20_000_000
    assert guard.describe("openai/whisper-1", audio_ms=60_000).cost_nanousd == 6_000_000
    assert guard.describe("openai/tts-1", characters=10).cost_nanousd == 150_000
    assert guard.describe("azure/dall-e-3", images=1).cost_nanousd == 132_000_016
    assert guard.describe("cohere/rerank-v3.5", search_units=1).cost_nanousd == 2_000_000
    assert guard.describe("openai/whisper-1").cost_nanousd is None


@pytest.mark.parametrize("name", ["images", "audio_ms", "characters", "web_searches", "search_units"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_counts_are_checked(name: str, value: object) -> None:
    """A count that is no whole number is refused before anything is claimed."""
    with pytest.raises(ConfigurationError, match=f"{name}: expected a whole number from 0, got"):
        Guard().describe("openai/gpt-4o", **{name: value})


def test_what_may_be_cached_is_checked() -> None:
    """A lifetime that is none of the three is refused."""
    with pytest.raises(ConfigurationError, match="cache_writes: expected 'none', '5m' or '1h', got '2h'"):
        Guard().describe("openai/gpt-4o", cache_writes="2h")


def test_an_old_list_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """S4: a price list that is older than sixty days is told of with the first call, for each list once."""
    clock = FrozenClock(NOW_MS + 59 * DAY_MS)
    guard = Guard(clock=clock)
    guard.describe("openai/gpt-4o")
    assert caplog.records == []
    clock.advance(ms=2 * DAY_MS)
    guard.prices = PriceBook.snapshot()
    guard.describe("openai/gpt-4o")
    guard.describe("openai/gpt-4o")
    (told,) = caplog.records
    assert told.getMessage().startswith("the price list is 61 days old (2026-11-21): take a newer release")
