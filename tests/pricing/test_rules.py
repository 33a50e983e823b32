"""The rules of rate cards, on made-up snapshots: dates, hours, tiers, sizes, conflicts and sellers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_llm_guard.context import Call
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.snapshot import Snapshot

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
START_MS = 20_000 * DAY_MS


def book(models: dict[str, dict[str, Any]], *, provider: str = "p", **settings: Any) -> PriceBook:
    """A book of made-up entries."""
    return books({provider: models}, **settings)


def books(providers: dict[str, dict[str, dict[str, Any]]], **settings: Any) -> PriceBook:
    content = {
        "schema": 1,
        "date": "2026-11-21",
        "sources": {name: {"name": name, "version": "1", "license": "MIT"} for name in ("genai", "litellm")},
        "providers": {
            provider: {
                "fallback": [],
                "aliases": {},
                "models": {name: {"source": "genai", "output": 0, **entry} for name, entry in models.items()},
            }
            for provider, models in providers.items()
        },
    }
    return PriceBook(Snapshot(json.dumps(content).encode()), **settings)


def input_rate(prices: PriceBook, at_ms: int = START_MS, **more: Any) -> int:
    card = prices.resolve("p", "m")
    assert card is not None
    return card.rates(at_ms, **more).input


def quoted(prices: PriceBook, at_ms: int, tokens: int = 1_000) -> int | None:
    return prices.quote(Call(provider="p", model="m", input_tokens=tokens), at_ms).cost_nanousd


@pytest.mark.parametrize(
    "hours, cheap, dear",
    [([60, 240], (59, 240, 1_439), (60, 239)), ([1_410, 30], (30, 1_409), (1_410, 1_439, 0, 29))],
    ids=["by day", "over midnight"],
)
def test_hours(hours: list[int], cheap: tuple[int, ...], dear: tuple[int, ...]) -> None:
    """Hours hold from their first minute up to their last, over midnight too."""
    prices = book({"m": {"input": 1, "dated": [{"input": 2, "hours": hours}]}})
    assert {input_rate(prices, START_MS + minute * 60_000) for minute in cheap} == {1}
    assert {input_rate(prices, START_MS + minute * 60_000) for minute in dear} == {2}
    assert quoted(prices, START_MS + cheap[0] * 60_000) == 2


def test_a_call_that_is_served_after_midnight() -> None:
    """A call on the eve of a dearer price is quoted at the dearer one; two days before, it is not."""
    prices = book({"m": {"input": 1, "dated": [{"input": 5, "since": START_MS}]}})
    assert input_rate(prices, START_MS - 1) == 1
    assert input_rate(prices, START_MS) == 5
    assert quoted(prices, START_MS - 1) == 5
    assert quoted(prices, START_MS - 2 * DAY_MS) == 1


def test_later_prices_win() -> None:
    """Of several prices that hold, the last one is taken; the entry's own if none does."""
    dated = [{"input": 2, "since": START_MS}, {"input": 3, "since": START_MS + DAY_MS}]
    prices = book({"m": {"input": 1, "dated": dated}})
    assert [input_rate(prices, START_MS + day * DAY_MS) for day in (-1, 0, 1, 2)] == [1, 2, 3, 3]


def test_of_a_tier_the_first_price_wins() -> None:
    """A tier changes only what it names; where several prices of it hold, the first is taken."""
    tiers = {"priority": [{"input": 9}, {"input": 7, "cache_read": 4}, {"output": 99, "since": START_MS + DAY_MS}]}
    card = book({"m": {"input": 1, "output": 2, "cache_read": 1, "tiers": tiers}}).resolve("p", "m")
    assert card is not None
    rates = card.rates(START_MS, service_tier="PRIORITY")
    assert (rates.input, rates.cache_read, rates.output) == (9, 4, 2)
    assert card.rates(START_MS + DAY_MS, service_tier="priority").output == 99


def test_sizes_of_a_tier() -> None:
    """A tier without sizes of its own holds at every size of the standard price for what it names."""
    entry = {"input": 1, "output": 1, "above": [[100, {"input": 2, "output": 3}]], "tiers": {"flex": [{"input": 5}]}}
    card = book({"m": entry}).resolve("p", "m")
    assert card is not None
    rates = card.rates(START_MS, input_tokens=101, service_tier="flex")
    assert (rates.input, rates.output) == (5, 3)
    assert card.rates(START_MS, input_tokens=100).output == 1


def test_the_dearer_of_two_sources() -> None:
    """`max` takes the higher of each rate, not the higher of two prices, at every size that either has."""
    entry = {"input": 5, "output": 1, "cache_read": 1, "alt": {"input": 2, "output": 7, "above": [[10, {"input": 20}]]}}
    card = book({"m": entry}, on_conflict="max").resolve("p", "m")
    first = book({"m": entry}).resolve("p", "m")
    assert card is not None
    assert first is not None
    rates = card.rates(START_MS)
    assert (rates.input, rates.output, rates.cache_read) == (5, 7, 2)
    assert card.rates(START_MS, input_tokens=11).input == 20
    assert (first.rates(START_MS).input, first.rates(START_MS, input_tokens=11).output) == (5, 1)


def test_a_size_that_is_cheaper_never_lowers_a_quote() -> None:
    """A bound that reaches a cheaper size is quoted at the dearer one: the call may stay below it."""
    prices = book({"m": {"input": 9, "above": [[1_000, {"input": 1}]]}})
    assert quoted(prices, START_MS, tokens=2_000) == 18


def test_proportions_are_rounded_up() -> None:
    """What follows an override in proportion is never rounded down to free."""
    prices = book({"m": {"input": 3, "output": 1, "cache_read": 1}}, overrides={"p/m": {"input": "0.000001"}})
    card = prices.resolve("p", "m")
    assert card is not None
    assert (card.rates(START_MS).input, card.rates(START_MS).cache_read) == (1, 1)


def test_who_sells_a_bare_name() -> None:
    """Without a provider, a name that several resellers have is nobody's; one that a single one has is theirs."""
    prices = books({"a": {"shared": {"input": 1}, "single": {"input": 1}}, "b": {"shared": {"input": 9}}})
    assert prices.resolve(None, "shared") is None
    single = prices.resolve(None, "single")
    assert single is not None
    assert single.provider == "a"
    both = books({"openai": {"shared": {"input": 1}}, "b": {"shared": {"input": 9}}}).resolve(None, "shared")
    assert both is not None
    assert both.provider == "openai"


def test_media_that_usage_does_not_tell_apart() -> None:
    """Where images or video are dearer than text, every token is charged at their rate."""
    card = book({"m": {"input": 2, "media_input": 7, "media_output": 3}}).resolve("p", "m")
    assert card is not None
    rates = card.rates(START_MS)
    assert (rates.input, rates.output, rates.audio_input) == (7, 3, 7)
