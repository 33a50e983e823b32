"""Prices that a service states itself."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.usage import Usage

NOW_MS = 1_795_219_200_000
ONE_EACH = Usage(input_tokens=1_000_000, output_tokens=1_000_000)


def cost(book: PriceBook, provider: str | None, model: str, usage: Usage = ONE_EACH) -> int | None:
    return book.cost(provider, model, usage, NOW_MS).nanousd


def test_existing_config_keys() -> None:
    """C10: `cost_per_1k_input` and `cost_per_1k_output` are dollars for a thousand tokens."""
    book = PriceBook.snapshot(
        overrides={"openai/in-house": {"cost_per_1k_input": 0.003, "cost_per_1k_output": "0.015"}}
    )
    assert cost(book, "openai", "in-house") == 18_000_000_000


@pytest.mark.parametrize("price", [2.5, "2.5", "$2.50", Decimal("2.5")], ids=repr)
def test_a_price_may_be_written_as_any_number(price: object) -> None:
    """Numbers, decimals and text mean the same, and floats are read by their shortest decimal form."""
    book = PriceBook.snapshot(overrides={"m": {"input": price, "output": 0.1}})
    assert cost(book, "openai", "m") == 2_600_000_000


def test_an_override_wins_over_the_snapshot() -> None:
    """C10: the price that the service states is the one that is charged, and the source says so."""
    book = PriceBook.snapshot(overrides={"openai/gpt-4o": {"input": 1, "output": 2}})
    charged = book.cost("openai", "gpt-4o", ONE_EACH, NOW_MS)
    assert charged.nanousd == 3_000_000_000
    assert charged.source == "override of openai/gpt-4o"


@pytest.mark.parametrize("key", ["gpt-4o", "GPT-4o", "openai/gpt-4o", "OpenAI/gpt-4o", "openai/*"])
def test_keys_that_name_a_model(key: str) -> None:
    """A model is named bare, with its provider in any spelling, or by its provider alone."""
    book = PriceBook.snapshot(overrides={key: {"input": 1, "output": 2}})
    assert cost(book, "openai", "gpt-4o") == 3_000_000_000
    assert cost(book, "openai", "gpt-4o-2031-01-02") == 3_000_000_000


def test_the_most_exact_key_wins() -> None:
    """`provider/model` is taken before the bare model, and both before `provider/*`."""
    book = PriceBook.snapshot(
        overrides={
            "openai/*": {"input": 1, "output": 0},
            "gpt-4o": {"input": 2, "output": 0},
            "openai/gpt-4o": {"input": 3, "output": 0},
        }
    )
    assert cost(book, "openai", "gpt-4o") == 3_000_000_000
    assert cost(book, "azure", "gpt-4o") == 2_000_000_000
    assert cost(book, "openai", "other") == 1_000_000_000


def test_an_explicit_zero_is_free() -> None:
    """Conformance 67: a model priced at 0 costs nothing in every bucket, known usage or not; a model without a price does not."""
    book = PriceBook.snapshot(overrides={"claude-sonnet-4-5": {"input": 0, "output": 0}})
    everything = Usage(
        input_tokens=900, output_tokens=80, cache_read_tokens=100, cache_write_tokens=200, reasoning_tokens=7
    )
    assert cost(book, "anthropic", "claude-sonnet-4-5", everything) == 0
    assert cost(book, "anthropic", "claude-sonnet-4-5", Usage()) == 0
    call = book.quote(Call(provider="anthropic", model="claude-sonnet-4-5", input_tokens=9, output_tokens=9), NOW_MS)
    assert call.cost_nanousd == 0
    assert cost(book, "anthropic", "no-such-model", everything) is None


def test_a_whole_price_leaves_no_fee_behind() -> None:
    """Conformance 67: a model that the list charges a fee for each call is free when the service says so."""
    free = PriceBook.snapshot(overrides={"perplexity/sonar-pro": {"input": 0, "output": 0}})
    dear = PriceBook.snapshot(overrides={"perplexity/sonar-pro": {"input": 6}})
    assert cost(free, "perplexity", "sonar-pro") == 0
    assert cost(dear, "perplexity", "sonar-pro") == 6_000_000_000 + 15_000_000_000 + 14_000_000


def test_fractions_are_rounded_up() -> None:
    """A price that is no whole number of pico-dollars becomes the next one."""
    book = PriceBook.snapshot(overrides={"m": {"input": "0.0000015", "cost_per_1k_output": "0.0000000015"}})
    card = book.resolve(None, "m")
    assert card is not None
    assert (card.rates(NOW_MS).input, card.rates(NOW_MS).output) == (2, 2)


def test_a_price_edit_takes_effect_at_once() -> None:
    """Conformance 67: free, then paid: the next quote costs money, and the old book still answers as before."""
    free = PriceBook.snapshot(overrides={"gpt-4o": {"input": 0, "output": 0}})
    paid = free.with_overrides({"gpt-4o": {"input": 1, "output": 1}})
    call = Call(provider="openai", model="gpt-4o", input_tokens=1_000, output_tokens=1_000)
    assert free.quote(call, NOW_MS).cost_nanousd == 0
    assert paid.quote(call, NOW_MS).cost_nanousd == 2_000_000
    assert free.quote(call, NOW_MS).cost_nanousd == 0


def test_a_thousandfold_price_is_a_thousandfold_estimate() -> None:
    """Conformance 63: a changed price changes the estimate at once, in every bucket alike."""
    book = PriceBook.snapshot()
    dear = book.with_overrides({"claude-sonnet-4-5": {"input": 3_000, "output": 15_000}})
    call = Call(provider="anthropic", model="claude-sonnet-4-5", input_tokens=1_000, output_tokens=100)
    usage = Usage(input_tokens=1_000, output_tokens=100, cache_read_tokens=300, cache_write_tokens=200)
    before, after = book.quote(call, NOW_MS).cost_nanousd, dear.quote(call, NOW_MS).cost_nanousd
    assert before is not None
    assert after == before * 1_000
    assert cost(dear, "anthropic", "claude-sonnet-4-5", usage) == 1_000 * (
        cost(book, "anthropic", "claude-sonnet-4-5", usage) or 0
    )


def test_what_is_not_given_follows_what_is() -> None:
    """Half the input price halves cached input and long contexts too; an explicit rate is taken as it is."""
    book = PriceBook.snapshot(overrides={"claude-sonnet-4-5": {"input": 1.5}, "gpt-4o": {"input": 5, "cache_read": 1}})
    card = book.resolve("anthropic", "claude-sonnet-4-5")
    assert card is not None
    rates, long = card.rates(NOW_MS), card.rates(NOW_MS, input_tokens=200_001)
    assert (rates.input, rates.cache_read, rates.cache_write, rates.cache_write_1h) == (
        1_500_000, 150_000, 1_875_000, 3_000_000,
    )  # fmt: skip
    assert rates.output == 15_000_000
    assert long.input == 3_000_000
    other = book.resolve("openai", "gpt-4o")
    assert other is not None
    assert (other.rates(NOW_MS).input, other.rates(NOW_MS).cache_read) == (5_000_000, 1_000_000)


def test_an_unknown_model_costs_what_it_is_a_part_of() -> None:
    """For a model that no list has, cached and spoken tokens cost what plain ones do."""
    book = PriceBook.snapshot(
        overrides={"mine/llama": {"input": 1, "output": 2, "per_call": 0.01, "max_output_tokens": 512}}
    )
    card = book.resolve("mine", "llama")
    assert card is not None
    rates = card.rates(NOW_MS)
    assert (rates.cache_read, rates.cache_write_1h, rates.audio_input, rates.reasoning) == (
        10**6,
        10**6,
        10**6,
        2 * 10**6,
    )
    assert card.max_output_tokens == 512
    assert cost(book, "mine", "llama") == 3_010_000_000


def test_a_bare_override_that_is_not_whole_never_makes_output_free() -> None:
    """M9: `input` alone for `gpt-4o` leaves the list's output price standing, whoever serves it."""
    book = PriceBook.snapshot(overrides={"gpt-4o": {"input": 1}})
    assert cost(book, "my-proxy", "gpt-4o") == 11_000_000_000
    assert cost(book, "my-proxy", "gpt-4o-mini") is None


def test_an_override_that_is_not_whole_prices_nothing_that_no_list_has() -> None:
    """M9: `input` alone for a model of one provider makes the same name at another, unlisted, no cheaper than unknown."""
    book = PriceBook.snapshot(overrides={"anthropic/claude-3-5-haiku-latest": {"input": 1}})
    assert cost(book, "anthropic", "claude-3-5-haiku-latest") == 5_000_000_000
    assert cost(book, "my-proxy", "anthropic/claude-3-5-haiku-latest") is None


def test_an_override_of_what_was_asked_for_holds_for_the_dated_answer() -> None:
    """Conformance 63: a request for `gpt-4o` is charged at its override though the answer names a dated snapshot of it."""
    book = PriceBook.snapshot(overrides={"gpt-4o": {"input": 1, "output": 1}})
    usage = Usage(input_tokens=1_000, output_tokens=0, model="gpt-4o-2024-08-06")
    assert cost(book, "openai", "gpt-4o", usage) == 1_000_000


def test_an_override_of_a_deployment_holds_for_whatever_answers() -> None:
    """A deployment's own price is charged though the answer names the model behind it."""
    book = PriceBook.snapshot(overrides={"azure/prod-chat": {"input": 1, "output": 1}})
    usage = Usage(input_tokens=1_000, output_tokens=0, model="gpt-4o-2024-08-06")
    assert cost(book, "azure", "prod-chat", usage) == 1_000_000


def test_an_override_does_not_hold_for_another_model_that_answers() -> None:
    """A fallback to another model is charged at that model's price, overrides of the first one or not."""
    book = PriceBook.snapshot(overrides={"openrouter/openai/gpt-4o-mini": {"input": 1, "output": 1}})
    usage = Usage(input_tokens=1_000, output_tokens=0, model="openai/gpt-4o")
    charged = book.cost("openrouter", "openai/gpt-4o-mini", usage, NOW_MS)
    assert (charged.nanousd, charged.billed_model) == (2_500_000, "openai/gpt-4o")


def test_a_file_of_prices(tmp_path: Path) -> None:
    """A TOML file has one table for each model, and the source of a price names the file."""
    path = tmp_path / "prices.toml"
    path.write_text('["openai/gpt-4o"]\ninput = 0.1\noutput = 0.2\n', encoding="utf-8")
    charged = PriceBook.snapshot(overrides=path).cost("openai", "gpt-4o", ONE_EACH, NOW_MS)
    assert (charged.nanousd, charged.source) == (300_000_000, "override (prices.toml) of openai/gpt-4o")
    assert PriceBook.snapshot(overrides=str(path)).overrides == {
        "openai/gpt-4o": {"input": Decimal("0.1"), "output": Decimal("0.2")}
    }


@pytest.mark.parametrize("content", [None, b"not toml", b"\xff"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    """A missing or broken file is a configuration error that names it."""
    path = tmp_path / "prices.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"prices\.toml"):
        PriceBook.snapshot(overrides=path)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"gpt-4o": {"inptu": 1}}, ("'gpt-4o'", "inptu", "value 1", "cache_write_1h", "cost_per_1k_input")),
        ({"gpt-4o": {"input": -1}}, ("'gpt-4o'", "input", "-1", "allowed are")),
        ({"gpt-4o": {"input": "two"}}, ("'gpt-4o'", "input", "'two'")),
        ({"gpt-4o": {"input": True}}, ("'gpt-4o'", "input", "True")),
        ({"gpt-4o": {"input": None}}, ("'gpt-4o'", "input", "None")),
        ({"gpt-4o": {"input": float("nan")}}, ("'gpt-4o'", "input", "nan")),
        ({"gpt-4o": {"input": float("inf")}}, ("'gpt-4o'", "input", "inf")),
        ({"gpt-4o": {"input": 2_500_000}}, ("'gpt-4o'", "more than $1 for one token", "2500000", "per million")),
        ({"gpt-4o": {"input": "1e999999999"}}, ("'gpt-4o'", "more than $1 for one token")),
        ({"gpt-4o": {"cost_per_1k_output": 1_001}}, ("cost_per_1k_output", "more than $1", "per thousand")),
        ({"gpt-4o": {"input": 1e-13}}, ("'gpt-4o'", "below one pico-dollar", "1e-13")),
        ({"gpt-4o": {"input": 1, "cost_per_1k_input": 1}}, ("'gpt-4o'", "cost_per_1k_input", "given twice")),
        ({"gpt-4o": {"context_window": 0}}, ("'gpt-4o'", "context_window", "whole number of tokens", "0")),
        ({"gpt-4o": {"max_output_tokens": True}}, ("max_output_tokens", "True")),
        ({"gpt-4o": {"max_output_tokens": 1.5}}, ("max_output_tokens", "1.5")),
        ({"gpt-4o": {}}, ("'gpt-4o'", "no price given")),
        ({"gpt-4o": 3}, ("'gpt-4o'", "expected a table", "got 3")),
        ({"": {"input": 1}}, ("expected a model", "''")),
        ({"*": {"input": 1}}, ("expected a model", "'*'")),
        ({7: {"input": 1}}, ("expected a model", "7")),
        ({"gpt-4o": {"input": 1}, "GPT-4o": {"input": 1}}, ("'GPT-4o'", "given twice")),
        ({"gpt-99": {"input": 1}}, ("'gpt-99'", "output missing", "0 is free")),
        ({"mine/x": {"cache_read": 1}}, ("'mine/x'", "input and output missing")),
        ({"ollama/*": {"input": 0}}, ("'ollama/*'", "input and output are needed")),
    ],
)
def test_errors_in_overrides(overrides: dict[str, object], words: tuple[str, ...]) -> None:
    """Every mistake is found when the book is made, and named: model, key, value, and what is allowed."""
    with pytest.raises(ConfigurationError) as raised:
        PriceBook.snapshot(overrides=overrides)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "unknown, words",
    [
        ("maybe", ("'deny', 'allow'", "'maybe'")),
        ({"charge_as": "openai/gpt-99"}, ("no price is known", "'openai/gpt-99'")),
        ({"charge": "openai/gpt-4o"}, ("charge_as", "'charge'")),
        ({"charge_as": 3}, ("charge_as", "3")),
        (None, ("'deny'", "None")),
    ],
)
def test_errors_in_the_rule_for_unknown_models(unknown: object, words: tuple[str, ...]) -> None:
    """What is to happen to unknown models is checked when the book is made."""
    with pytest.raises(ConfigurationError) as raised:
        PriceBook.snapshot(unknown=unknown)  # type: ignore[arg-type]
    for word in words:
        assert word in str(raised.value)


def test_error_in_the_rule_for_conflicts() -> None:
    """An unknown rule for conflicts is refused."""
    with pytest.raises(ConfigurationError, match="on_conflict: expected 'genai' or 'max', got 'min'"):
        PriceBook.snapshot(on_conflict="min")  # type: ignore[arg-type]


def test_prices_of_other_units() -> None:
    """S4: images, minutes of audio, characters, searches and rankings are stated in dollars for so many of them."""
    book = PriceBook.snapshot(
        overrides={
            "openai/our-images": {"per_image": 0.04},
            "openai/our-ears": {"per_audio_minute": 0.006},
            "openai/our-voice": {"per_million_characters": 15},
            "cohere/our-ranking": {"per_search_unit": "0.002"},
            "gpt-4o": {"per_web_search": 0.02},
        }
    )
    assert cost(book, "openai", "our-images", Usage(images=3)) == 120_000_000
    assert cost(book, "openai", "our-ears", Usage(audio_ms=90_000)) == 9_000_000
    assert cost(book, "openai", "our-voice", Usage(characters=1_000)) == 15_000_000
    assert cost(book, "cohere", "our-ranking", Usage(search_units=2)) == 4_000_000
    assert cost(book, "openai", "gpt-4o", Usage(input_tokens=0, output_tokens=0, web_searches=2)) == 40_000_000
    assert cost(book, "openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=0)) == 2_500_000
    assert cost(book, "openai", "our-images", Usage(input_tokens=5, output_tokens=5)) is None


def test_what_is_free_is_free_in_every_unit() -> None:
    """Conformance 67: a model priced at 0 costs nothing for searches, images or audio either, unless those have a stated price."""
    everything = Usage(
        input_tokens=9, output_tokens=9, images=1, audio_ms=1, characters=1, web_searches=1, search_units=1
    )
    free = PriceBook.snapshot(overrides={"gpt-4o": {"input": 0, "output": 0}, "ollama/*": {"input": 0, "output": 0}})
    assert cost(free, "openai", "gpt-4o", everything) == 0
    assert cost(free, "ollama", "llama", everything) == 0
    stated = PriceBook.snapshot(overrides={"gpt-4o": {"input": 0, "output": 0, "per_web_search": 1}})
    assert cost(stated, "openai", "gpt-4o", everything) == 1_000_000_000


def test_tokens_of_images_are_stated() -> None:
    """S4: rates of images' tokens are stated like any other, and follow the whole where they are not."""
    told = Usage(input_tokens=1_000, output_tokens=0, input_image_tokens=1_000)
    book = PriceBook.snapshot(
        overrides={"m": {"input": 1, "output": 1, "image_input": 3}, "gpt-realtime": {"input": 8}}
    )
    assert cost(book, None, "m", told) == 3_000_000
    assert cost(book, "openai", "gpt-realtime", told) == 10_000_000  # 5 for 4, so 10 for 8


def test_a_unit_has_a_largest_price() -> None:
    """A price of more than $1,000 for one image is a mistake, and is told apart from one for a token."""
    with pytest.raises(ConfigurationError, match=r"prices of 'm': per_image: more than \$1,000, got 5000"):
        PriceBook.snapshot(overrides={"m": {"per_image": 5000}})
