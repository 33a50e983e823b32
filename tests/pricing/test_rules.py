"""The rules of rate cards, on made-up snapshots: dates, hours, tiers, sizes, conflicts and sellers."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
import pytest

from asgi_llm_guard.context import CacheWrites, Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.bill import picousd
from asgi_llm_guard.pricing.snapshot import Snapshot
from asgi_llm_guard.usage import Usage

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


def test_video_that_usage_does_not_tell_apart() -> None:
    """Where video is dearer than text, every token is charged at its rate."""
    card = book({"m": {"input": 2, "video_input": 7, "video_output": 3}}).resolve("p", "m")
    assert card is not None
    rates = card.rates(START_MS)
    assert (rates.input, rates.output, rates.audio_input) == (7, 3, 7)


@pytest.mark.parametrize(
    "told, pico",
    [
        (Usage(input_tokens=100, output_tokens=10), 100 * 7 + 10 * 9),  # all of it may be images
        (Usage(input_tokens=100, output_tokens=10, input_image_tokens=0, output_image_tokens=0), 100 * 2 + 10 * 3),
        (Usage(input_tokens=100, output_tokens=10, input_image_tokens=40, output_image_tokens=4), 60 * 2 + 40 * 7 + 6 * 3 + 4 * 9),
        # Of 40 tokens of images, 30 fit beside the cached 70; the other 10 were cached.
        (Usage(input_tokens=100, output_tokens=0, input_image_tokens=40, cache_read_tokens=70), 30 * 7 + 10 * 5 + 60 * 1),
        # Audio first, then images, then text.
        (Usage(input_tokens=100, output_tokens=0, input_image_tokens=40, input_audio_tokens=20, cache_read_tokens=50), 20 * 8 + 30 * 7 + 10 * 5 + 40 * 1),
        (Usage(input_tokens=100, output_tokens=0, input_image_tokens=90, input_audio_tokens=20), None),
        (Usage(input_tokens=0, output_tokens=10, output_image_tokens=9, reasoning_tokens=2), None),
        (Usage(input_tokens=0, output_tokens=10, output_image_tokens=-1), None),
    ],
)  # fmt: skip
def test_tokens_of_images(told: Usage, pico: int | None) -> None:
    """Tokens of images cost their own rate where usage tells them, and the dearer of both where it does not."""
    rates = {"input": 2, "output": 3, "cache_read": 1, "audio_input": 8, "image_input": 7, "image_output": 9}
    card = book({"m": rates | {"image_cache_read": 5}}).resolve("p", "m")
    assert card is not None
    assert picousd(card, told, START_MS) == pico


@pytest.mark.parametrize(
    "rates, told, pico",
    [
        # Not told, one of the two is dearer: it is taken for as much as it can be.
        ({"image_input": 7}, Usage(input_tokens=100, output_tokens=10), 100 * 7 + 10 * 3),
        ({"image_input": 7}, Usage(input_tokens=0, output_tokens=10), 10 * 3),
        ({"image_output": 9}, Usage(input_tokens=100, output_tokens=10), 100 * 2 + 10 * 9),
        (
            {"image_output": 9, "audio_output": 5, "reasoning": 4},
            Usage(input_tokens=0, output_tokens=10, output_audio_tokens=2, reasoning_tokens=3),
            2 * 5 + 3 * 4 + 5 * 9,
        ),
        # Not told, and cheaper than text, or dearer only where it was cached: it is text.
        ({"image_input": 1}, Usage(input_tokens=100, output_tokens=0), 100 * 2),
        ({"image_input": 1}, Usage(input_tokens=0, output_tokens=0), 0),
        ({"image_output": 1}, Usage(input_tokens=0, output_tokens=10), 10 * 3),
        ({"image_output": 1}, Usage(input_tokens=0, output_tokens=0), 0),
        ({"cache_read": 1, "image_cache_read": 5}, Usage(input_tokens=100, output_tokens=0, cache_read_tokens=70), 30 * 2 + 70),
        # Of 40 audio and 60 images, 50 were read from the cache and 50 written to it: 40 and 10 of those that were read.
        (
            {"cache_read": 1, "cache_write": 4, "audio_cache_read": 8, "image_cache_read": 5},
            Usage(
                input_tokens=100,
                output_tokens=0,
                cache_read_tokens=50,
                cache_write_tokens=50,
                input_audio_tokens=40,
                input_image_tokens=60,
            ),
            40 * 8 + 10 * 5 + 50 * 4,
        ),
        # The largest amount that is kept is an amount; a pico-dollar more is none.
        ({"input": 1_000}, Usage(input_tokens=MAX_AMOUNT, output_tokens=0), MAX_AMOUNT * 1_000),
        ({"input": 1_000, "per_call": 1}, Usage(input_tokens=MAX_AMOUNT, output_tokens=0), None),
        ({"per_image": 1}, Usage(input_tokens=0, output_tokens=0, images=MAX_AMOUNT), MAX_AMOUNT),
        # An unknown part is free only if it is at every size.
        ({"input": 0, "output": 0}, Usage(), 0),
        ({"input": 0, "above": [[10, {"input": 1}]]}, Usage(output_tokens=5), None),
        ({"output": 0, "above": [[10, {"output": 1}]]}, Usage(input_tokens=5), None),
    ],
)  # fmt: skip
def test_what_is_not_told(rates: dict[str, Any], told: Usage, pico: int | None) -> None:
    """M9: what a usage leaves open is taken for the dearest that it can be, and for unknown where nothing bounds it."""
    card = book({"m": {"input": 2, "output": 3} | rates}).resolve("p", "m")
    assert card is not None
    assert picousd(card, told, START_MS) == pico


@pytest.mark.parametrize(
    "told, pico",
    [
        (Usage(input_tokens=100, output_tokens=10, billed_input_tokens=9, billed_output_tokens=4), 9 * 2 + 4 * 3),
        (Usage(input_tokens=100, output_tokens=10, billed_input_tokens=9), 9 * 2 + 10 * 3),
        (Usage(input_tokens=100, output_tokens=10, billed_output_tokens=4), 100 * 2 + 4 * 3),
        (Usage(input_tokens=100, output_tokens=10, billed_input_tokens=0, billed_output_tokens=0), 0),
        # What was cached is not among those that are billed, nor are the parts of another output.
        (Usage(input_tokens=100, output_tokens=10, cache_read_tokens=90, billed_input_tokens=9), 9 * 2 + 10 * 3),
        (Usage(input_tokens=100, output_tokens=10, reasoning_tokens=9, billed_output_tokens=4), 100 * 2 + 4 * 3),
        (Usage(input_tokens=100, output_tokens=10, cache_read_tokens=90, billed_output_tokens=4), 10 * 2 + 90 * 1 + 4 * 3),
    ],
)  # fmt: skip
def test_tokens_that_are_billed(told: Usage, pico: int) -> None:
    """Where a provider bills other numbers of tokens than were counted, those are what costs."""
    card = book({"m": {"input": 2, "output": 3, "cache_read": 1, "reasoning": 5}}).resolve("p", "m")
    assert card is not None
    assert picousd(card, told, START_MS) == pico


@pytest.mark.parametrize(("tokens", "pico"), [((1, 1), 5), ((1, 0), 2), ((0, 1), 3), ((0, 0), None)])
def test_units_without_a_price_are_part_of_the_tokens(tokens: tuple[int, int], pico: int | None) -> None:
    """Characters that have no price are paid for with the tokens beside them, whichever those are, or are unknown."""
    card = book({"m": {"input": 2, "output": 3}}).resolve("p", "m")
    assert card is not None
    told = Usage(input_tokens=tokens[0], output_tokens=tokens[1], characters=5)
    assert picousd(card, told, START_MS) == pico


@pytest.mark.parametrize(
    "cache_writes, audio, rate",
    [("none", False, 2), ("none", True, 6), ("5m", False, 4), ("5m", True, 6), ("1h", False, 9), ("1h", True, 9)],
)
def test_what_a_call_cannot_have_is_not_held_for(cache_writes: CacheWrites, audio: bool, rate: int) -> None:
    """T4: input is quoted at the dearest rate among those that the call may have: cache writes and audio only if it may."""
    prices = book({"m": {"input": 2, "output": 0, "cache_write": 4, "cache_write_1h": 9, "audio_input": 6}})
    call = Call(provider="p", model="m", input_tokens=1_000, cache_writes=cache_writes, may_have_audio=audio)
    assert prices.quote(call, START_MS).cost_nanousd == rate


def test_what_is_not_known_of_a_call_is_held_for() -> None:
    """A call that nobody looked into is quoted at the dearest rate of all."""
    prices = book({"m": {"input": 2, "output": 0, "cache_write": 4, "cache_write_1h": 9, "audio_input": 6}})
    assert prices.quote(Call(provider="p", model="m", input_tokens=1_000), START_MS).cost_nanousd == 9


def test_a_tier_that_comes_back_as_another() -> None:
    """T4: `fast` may be answered as `priority`, and is quoted at the dearer of the two."""
    tiers = {"fast": [{"input": 3}], "priority": [{"input": 5}], "ultrafast": [{"input": 9}]}
    prices = book({"m": {"input": 1, "output": 0, "tiers": tiers}})
    call = Call(provider="p", model="m", input_tokens=1_000)
    quoted = [prices.quote(call, START_MS, service_tier=tier).cost_nanousd for tier in (None, "fast", "ultrafast")]
    assert quoted == [1, 5, 9]


UNITS = {
    "per_image": 11 * 10**6,
    "per_audio_ms": 13 * 10**6,
    "per_character": 17 * 10**6,
    "per_web_search": 19 * 10**6,
    "per_search_unit": 23 * 10**6,
}


@pytest.mark.parametrize(
    "entry, usage, nanousd",
    [
        # By the unit alone: tokens cost nothing.
        (UNITS, Usage(images=2), 22_000),
        (UNITS, Usage(audio_ms=3, input_tokens=900, output_tokens=900), 39_000),
        (UNITS, Usage(characters=2, web_searches=1), 53_000),
        (UNITS, Usage(search_units=1), 23_000),
        (UNITS, Usage(images=0), 0),
        # What it is billed by is not told, so the cost is unknown, and not 0.
        (UNITS, Usage(), None),
        (UNITS, Usage(input_tokens=900, output_tokens=900), None),
        (UNITS, Usage(web_searches=1), None),
        ({"per_image": 11}, Usage(audio_ms=3), None),
        ({"per_image": 11_000}, Usage(images=1, search_units=3), None),
        # Beside tokens.
        ({"input": 1_000, "output": 1_000} | UNITS, Usage(input_tokens=5, output_tokens=0, audio_ms=1, characters=1), 30_005),
        ({"input": 1_000, "output": 1_000} | UNITS, Usage(input_tokens=5, output_tokens=0, images=1), 11_005),
        # Images that were made of tokens are billed by those.
        ({"input": 1_000, "output": 1_000} | UNITS, Usage(input_tokens=5, output_tokens=7, images=1), 12),
        # Without a price of its own it is part of the tokens, if there are any.
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=5, output_tokens=7, images=1, audio_ms=1, characters=3), 12),
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=0, output_tokens=0, images=1), None),
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=0, output_tokens=0, audio_ms=1), None),
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=0, output_tokens=0, search_units=1), None),
        # A search without a price costs the dearest that there is: 0.035 $.
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=5, output_tokens=0, web_searches=2), 70_000_005),
        # No counts at all.
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=5, output_tokens=0, web_searches=-1), None),
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=5, output_tokens=0, images=1.5), None),  # type: ignore[arg-type]
        ({"input": 1_000, "output": 1_000}, Usage(input_tokens=5, output_tokens=0, audio_ms=10**40), None),
        (UNITS, Usage(images=10**15), None),
    ],
)  # fmt: skip
def test_what_is_billed_in_other_units(entry: dict[str, Any], usage: Usage, nanousd: int | None) -> None:
    """M9: images, audio, characters, searches and rankings cost their unit's price; used without a price, never 0."""
    assert book({"m": entry}).cost("p", "m", usage, START_MS).nanousd == nanousd


def test_bounds_of_other_units() -> None:
    """T4: what a request asks for in other units is held, and a model that is billed by what it does not tell is refused."""
    prices = book({"unit": UNITS, "both": {"input": 1_000, "output": 1_000} | UNITS})
    call = Call(provider="p", model="unit", images=1, audio_ms=2, characters=3, web_searches=4, search_units=5)
    each = 11_000 + 2 * 13_000 + 3 * 17_000 + 4 * 19_000 + 5 * 23_000
    assert prices.quote(call, START_MS).cost_nanousd == each
    both = msgspec.structs.replace(call, model="both", input_tokens=7, output_tokens=9)
    quoted = prices.quote(both, START_MS)
    assert (quoted.cost_nanousd, quoted.input_nanousd, quoted.output_picousd) == (each + 16, each + 7, 1_000)
    assert (
        prices.quote(Call(provider="p", model="unit", input_tokens=7, output_tokens=9), START_MS).cost_nanousd is None
    )
    assert prices.quote(Call(provider="p", model="unit", web_searches=1), START_MS).cost_nanousd is None
    plain = book({"m": {"input": 1_000, "output": 1_000}})
    search = Call(provider="p", model="m", input_tokens=1, web_searches=1)
    assert plain.quote(search, START_MS).cost_nanousd == 35_000_001


def test_what_is_billed_beside_an_answer() -> None:
    """S4: what other models did for an answer costs what they cost, and all of it is rounded up once."""
    prices = book(
        {"m": {"input": 100, "output": 100}, "other": {"input": 700, "output": 700, "above": [[5, {"input": 900}]]}}
    )
    beside = (
        Usage(input_tokens=1, output_tokens=1, model="other"),
        Usage(input_tokens=6, output_tokens=0, model="other"),
        Usage(input_tokens=1, output_tokens=1),
    )
    usage = Usage(input_tokens=1, output_tokens=1, model="m", extra=beside)
    assert prices.cost("p", "m", usage, START_MS).nanousd == 8  # 200 + 1,400 + 5,400 + 200 pico-dollars
    unknown = msgspec.structs.replace(usage, extra=(Usage(input_tokens=1, output_tokens=1, model="nobody"),))
    assert prices.cost("p", "m", unknown, START_MS).nanousd is None
    untold = msgspec.structs.replace(usage, extra=(Usage(model="other"),))
    assert prices.cost("p", "m", untold, START_MS).nanousd is None


def test_what_is_billed_beside_an_answer_without_a_price() -> None:
    """M9: what `unknown` says of models without a price holds for those beside an answer, too."""
    content = {"m": {"input": 100, "output": 100}}
    usage = Usage(input_tokens=10, output_tokens=0, extra=(Usage(input_tokens=10, output_tokens=0, model="nobody"),))
    assert book(content, unknown="allow").cost("p", "m", usage, START_MS).nanousd == 1
    assert book(content, unknown={"charge_as": "p/m"}).cost("p", "m", usage, START_MS).nanousd == 2


@pytest.mark.parametrize(
    "trust, model, reported, nanousd, source",
    [
        ("missing", "m", 77, 1, "genai 1, 2026-11-21"),
        ("missing", "nobody", 77, 77, "reported by provider"),
        ("missing", "nobody", 0, 0, "reported by provider"),
        ("missing", "nobody", None, None, None),
        ("missing", "nobody", -1, None, None),
        ("missing", "nobody", 1.5, None, None),
        ("missing", "nobody", 2**53, None, None),
        ("missing", "unit", 77, 77, "reported by provider"),
        ("always", "m", 77, 77, "reported by provider"),
        ("always", "nobody", 77, 77, "reported by provider"),
        ("always", "m", None, 1, "genai 1, 2026-11-21"),
        ("never", "m", 77, 1, "genai 1, 2026-11-21"),
        ("never", "nobody", 77, None, None),
        ("never", "unit", 77, None, "genai 1, 2026-11-21"),
    ],
)
def test_costs_that_the_provider_reports(
    trust: Literal["missing", "always", "never"], model: str, reported: Any, nanousd: int | None, source: str | None
) -> None:
    """M9: a cost that the provider reports is charged where the prices have no answer, or always, or never, as was said."""
    prices = book({"m": {"input": 100, "output": 100}, "unit": UNITS}, trust_reported=trust)
    cost = prices.cost("p", model, Usage(input_tokens=10, output_tokens=0, reported_nanousd=reported), START_MS)
    assert (cost.nanousd, cost.source) == (nanousd, source)


def test_a_reported_cost_goes_before_another_models_price() -> None:
    """M9: what a provider reports for a model without a price is nearer to the truth than `charge_as` and `allow`."""
    usage = Usage(input_tokens=10, output_tokens=0, reported_nanousd=77)
    for unknown in ("allow", {"charge_as": "p/m"}):
        prices = book({"m": {"input": 100, "output": 100}}, unknown=unknown)
        assert prices.cost("p", "nobody", usage, START_MS).nanousd == 77


def test_whom_to_trust_is_checked() -> None:
    """A word that is none of the three is refused."""
    with pytest.raises(
        ConfigurationError, match=r"trust_reported: expected 'missing', 'always' or 'never', got 'sure'"
    ):
        PriceBook.snapshot(trust_reported="sure")  # type: ignore[arg-type]
