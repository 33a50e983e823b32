"""What usages cost, by hand-checked prices; what is unknown stays unknown."""

from __future__ import annotations

from decimal import Decimal

import pytest

from asgi_llm_guard.context import Call
from asgi_llm_guard.money import MAX_AMOUNT, from_nano
from asgi_llm_guard.pricing import Cost, PriceBook
from asgi_llm_guard.usage import Usage

NOON_MS = 1_795_262_400_000  # 2026-11-21 12:00 UTC
EVENING_MS = NOON_MS + 6 * 3_600_000
BOOK = PriceBook.snapshot()


@pytest.mark.parametrize(
    "provider, model, usage, dollars",
    [
        # https://developers.openai.com/api/docs/pricing, 2026-11-21: 2.50 in, 1.25 cached, 10 out.
        pytest.param("openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=500), "0.0075", id="gpt-4o"),
        pytest.param(
            "openai",
            "gpt-4o",
            Usage(input_tokens=1_000, output_tokens=500, cache_read_tokens=800),
            "0.0065",  # 200 x 2.50 + 800 x 1.25 + 500 x 10, per million
            id="gpt-4o cached",
        ),
        # As above: 0.10 in, 0.025 cached, 0.40 out; one cached token is 25 nano-dollars, and nothing is lost.
        pytest.param(
            "openai", "gpt-4.1-nano", Usage(input_tokens=1, output_tokens=0, cache_read_tokens=1), "0.000000025", id="nano"
        ),
        # As above: 2 in, 0.50 cached, 8 out; reasoning is output.
        pytest.param(
            "openai", "o3", Usage(input_tokens=0, output_tokens=1_000, reasoning_tokens=900), "0.008", id="reasoning"
        ),
        # As above: priority 4.25 in, 17 out; batch half of the standard price.
        pytest.param(
            "openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=100, service_tier="priority"), "0.00595", id="priority"
        ),
        pytest.param(
            "openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=100, service_tier="batch"), "0.00175", id="batch"
        ),
        pytest.param(
            "openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=100, service_tier="default"), "0.0035", id="default"
        ),
        # As above: audio 40 in, 80 out beside text 2.50 and 10.
        pytest.param(
            "openai",
            "gpt-4o-audio-preview",
            Usage(input_tokens=1_000, output_tokens=1_000, input_audio_tokens=600, output_audio_tokens=500),
            "0.07",  # 400 x 2.50 + 600 x 40 + 500 x 10 + 500 x 80
            id="audio",
        ),
        # https://developers.openai.com/api/docs/pricing, 2026-11-21: gpt-realtime-mini, text 0.60, cached 0.06, audio 10,
        # cached audio 0.30. Of 900 audio tokens 500 fit beside the cached ones; the other 400 were cached audio.
        pytest.param(
            "openai",
            "gpt-realtime-mini",
            Usage(input_tokens=1_000, output_tokens=0, cache_read_tokens=500, input_audio_tokens=900),
            "0.005128",  # 500 x 10 + 400 x 0.30 + 100 x 0.08, the price of cached images
            id="cached audio",
        ),
        # https://platform.claude.com/docs/en/about-claude/pricing, 2026-11-21: 3 in, 15 out, cache 0.30 read,
        # 3.75 write for 5 minutes, 6 write for an hour.
        pytest.param(
            "anthropic",
            "claude-sonnet-4-5",
            Usage(
                input_tokens=10_000,
                output_tokens=1_000,
                cache_read_tokens=5_000,
                cache_write_tokens=3_000,
                cache_write_1h_tokens=1_000,
            ),
            "0.036",  # 2,000 x 3 + 5,000 x 0.30 + 2,000 x 3.75 + 1,000 x 6 + 1,000 x 15
            id="claude cache",
        ),
        # As above: 6 in and 22.50 out for every token once the input is above 200,000.
        pytest.param(
            "anthropic", "claude-sonnet-4-5", Usage(input_tokens=200_000, output_tokens=1_000), "0.615", id="at 200k"
        ),
        pytest.param(
            "anthropic", "claude-sonnet-4-5", Usage(input_tokens=200_001, output_tokens=1_000), "1.222506", id="above 200k"
        ),
        # As above: 1 in, 5 out.
        pytest.param("anthropic", "claude-haiku-4-5", Usage(input_tokens=7, output_tokens=3), "0.000022", id="haiku"),
        # https://ai.google.dev/gemini-api/docs/pricing, 2026-11-21: 1.25 in, 10 out; above 200,000 2.50 and 15.
        pytest.param(
            "gemini", "gemini-2.5-pro", Usage(input_tokens=1_000, output_tokens=1_000), "0.01125", id="gemini-2.5-pro"
        ),
        pytest.param(
            "gemini", "gemini-2.5-pro", Usage(input_tokens=300_000, output_tokens=1_000), "0.765", id="gemini long"
        ),
        # As above: text 0.30, audio 1.00 in.
        pytest.param(
            "gemini",
            "gemini-2.5-flash",
            Usage(input_tokens=1_000, output_tokens=0, input_audio_tokens=1_000),
            "0.001",
            id="gemini audio",
        ),
        # As above: images 30 out, text 2.50; 1,290 tokens for an image of 1,024 x 1,024.
        pytest.param(
            "gemini",
            "gemini-2.5-flash-image",
            Usage(input_tokens=0, output_tokens=1_390, output_image_tokens=1_290),
            "0.03895",
            id="image out",
        ),
        pytest.param(
            "gemini", "gemini-2.5-flash-image", Usage(input_tokens=0, output_tokens=1_290), "0.0387", id="image or text out"
        ),
        # https://developers.openai.com/api/docs/pricing, 2026-11-21: gpt-image-1.5, text 5 in, 10 out, images 8 in, 32 out.
        pytest.param(
            "openai",
            "gpt-image-1.5",
            Usage(input_tokens=350, output_tokens=4_160, input_image_tokens=300, output_image_tokens=4_160, images=1),
            "0.13577",  # 50 x 5 + 300 x 8 + 4,160 x 32
            id="gpt-image",
        ),
        # As above: whisper 0.006 a minute, tts-1 15 a million characters.
        pytest.param("openai", "whisper-1", Usage(audio_ms=90_000), "0.009", id="whisper"),
        pytest.param("openai", "tts-1", Usage(characters=4_096), "0.06144", id="speech"),
        # As above: 10 for a thousand web searches.
        pytest.param(
            "openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=500, web_searches=3), "0.0375", id="searches"
        ),
        # https://platform.claude.com/docs/en/about-claude/pricing, 2026-11-21: 10 for a thousand.
        pytest.param(
            "anthropic",
            "claude-sonnet-4-5",
            Usage(input_tokens=1_000, output_tokens=0, web_searches=2),
            "0.023",
            id="claude searches",
        ),
        # https://docs.mistral.ai/deployment/ai-studio/pricing, 2026-11-21: voxtral-small, 0.1 in, 0.4 out, 0.004 a minute.
        pytest.param(
            "mistral",
            "voxtral-small-24b-2507",
            Usage(input_tokens=1_000, output_tokens=1_000, audio_ms=60_000),
            "0.00450002",  # rounded up to whole pico-dollars for a millisecond
            id="tokens and minutes",
        ),
        # https://docs.perplexity.ai/getting-started/pricing, 2026-11-21: 3 in, 15 out, and 14 for a thousand calls.
        pytest.param(
            "perplexity", "sonar-pro", Usage(input_tokens=1_000, output_tokens=1_000), "0.032", id="price of a call"
        ),
    ],
)  # fmt: skip
def test_what_a_usage_costs(provider: str, model: str, usage: Usage, dollars: str) -> None:
    """C10: input, output, cache reads and writes, audio, tiers and flat fees cost what the provider says, exactly."""
    cost = BOOK.cost(provider, model, usage, NOON_MS)
    assert cost.nanousd is not None
    assert from_nano(cost.nanousd) == Decimal(dollars)
    assert cost.source is not None
    assert cost.source.startswith("genai-prices")
    assert cost.source.endswith("2026-11-21")


def test_rounding_is_up_and_once() -> None:
    """A fraction of a nano-dollar is charged as a whole one, for the call and not for each bucket."""
    book = PriceBook.snapshot(overrides={"m": {"input": 0.0001, "output": 0.0001}})  # 100 pico-dollars each
    assert book.cost(None, "m", Usage(input_tokens=1, output_tokens=1), NOON_MS).nanousd == 1
    assert book.cost(None, "m", Usage(input_tokens=5, output_tokens=5), NOON_MS).nanousd == 1
    assert book.cost(None, "m", Usage(input_tokens=6, output_tokens=5), NOON_MS).nanousd == 2
    assert book.cost(None, "m", Usage(input_tokens=0, output_tokens=0), NOON_MS).nanousd == 0


def test_time_of_day() -> None:
    """A price that holds for some hours is charged in those: DeepSeek's nights are cheaper.

    Source: https://api-docs.deepseek.com/quick_start/pricing (0.27 in, 1.10 out; 16:30 to 00:30 UTC half of it).
    """
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    assert BOOK.cost("deepseek", "deepseek-chat", usage, NOON_MS).nanousd == 1_370_000_000
    assert BOOK.cost("deepseek", "deepseek-chat", usage, EVENING_MS).nanousd == 685_000_000


def test_effective_dates() -> None:
    """A price that changes on a day is charged as it was before it, and as it is from midnight UTC on.

    Source: genai-prices 0.2.3, o3: 10 in and 40 out until 2025-06-09, 2 and 8 from 2025-06-10.
    """
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    midnight_ms = 1_749_513_600_000
    assert BOOK.cost("openai", "o3", usage, midnight_ms - 1).nanousd == 50_000_000_000
    assert BOOK.cost("openai", "o3", usage, midnight_ms).nanousd == 10_000_000_000


def test_where_the_sources_differ() -> None:
    """The first source is taken, or the dearer rate of both; the price's source says which.

    Source: mistral-medium is 0.4 and 2 in genai-prices 0.2.3, 1.5 and 7.5 in litellm 1.109.1.
    """
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    first = BOOK.cost("mistral", "mistral-medium", usage, NOON_MS)
    dearer = PriceBook.snapshot(on_conflict="max").cost("mistral", "mistral-medium", usage, NOON_MS)
    assert first.nanousd == 2_400_000_000
    assert dearer.nanousd == 9_000_000_000
    assert dearer.source == "dearer of genai-prices 0.2.3 and litellm cost map 1.109.1, 2026-11-21"
    assert BOOK.cost("openai", "gpt-4o", usage, NOON_MS) == PriceBook.snapshot(on_conflict="max").cost(
        "openai", "gpt-4o", usage, NOON_MS
    )


def test_the_model_that_answered_is_billed() -> None:
    """The price is that of the model which the answer names, when it has one, else of the one that was asked for."""
    call = Call(provider="openai", model="gpt-4o")
    mini = BOOK.cost(
        "openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=0, model="gpt-4o-mini"), NOON_MS, call=call
    )
    new = BOOK.cost("openai", "gpt-4o", Usage(input_tokens=1_000, output_tokens=0, model="gpt-99"), NOON_MS, call=call)
    asked = BOOK.cost("openai", "gpt-98", Usage(input_tokens=1_000, output_tokens=0), NOON_MS, call=call)
    assert (mini.nanousd, mini.billed_model) == (150_000, "gpt-4o-mini")
    assert (new.nanousd, new.billed_model) == (2_500_000, "gpt-4o")
    assert (asked.nanousd, asked.billed_model) == (2_500_000, "gpt-4o")


def test_a_model_without_a_price() -> None:
    """Conformance 67, M9: unpriced is unknown, or 0 and marked as unpriced, or what another model costs: never silently free."""
    usage = Usage(input_tokens=1_000, output_tokens=1_000)
    call = Call(provider="openai", model="gpt-99", input_tokens=1_000, output_tokens=1_000)
    allowing = PriceBook.snapshot(unknown="allow")
    charging = PriceBook.snapshot(unknown={"charge_as": "openai/gpt-4o"})

    assert BOOK.cost("openai", "gpt-99", usage, NOON_MS) == Cost(None, None, None)
    refused = BOOK.quote(call, NOON_MS)
    assert (refused.cost_nanousd, refused.price_source) == (None, None)

    assert allowing.cost("openai", "gpt-99", usage, NOON_MS) == Cost(0, "unpriced (allowed)", None)
    allowed = allowing.quote(call, NOON_MS)
    assert (allowed.cost_nanousd, allowed.price_source) == (0, "unpriced (allowed)")

    assert charging.cost("openai", "gpt-99", usage, NOON_MS, call=call) == Cost(
        12_500_000, "genai-prices 0.2.3, 2026-11-21", "gpt-4o"
    )
    charged = charging.quote(call, NOON_MS)
    assert (charged.cost_nanousd, charged.billed_model) == (12_500_000, "gpt-4o")
    assert charging.resolve("openai", "gpt-99") is None


def test_charge_as_follows_an_override() -> None:
    """The model to charge as has its own price, stated by the service or not, also after a change."""
    book = PriceBook.snapshot(unknown={"charge_as": "openai/gpt-4o"}).with_overrides(
        {"gpt-4o": {"input": 1, "output": 1}}
    )
    assert book.cost("openai", "gpt-99", Usage(input_tokens=1_000, output_tokens=0), NOON_MS).nanousd == 1_000_000


@pytest.mark.parametrize(
    "usage",
    [
        Usage(),
        Usage(input_tokens=5),
        Usage(output_tokens=5),
        Usage(input_tokens=-1, output_tokens=5),
        Usage(input_tokens=5, output_tokens=-1),
        Usage(input_tokens=5, output_tokens=5, cache_read_tokens=6),
        Usage(input_tokens=5, output_tokens=5, cache_read_tokens=3, cache_write_tokens=3),
        Usage(input_tokens=5, output_tokens=5, cache_read_tokens=-3),
        Usage(input_tokens=5, output_tokens=5, cache_write_1h_tokens=1),
        Usage(input_tokens=5, output_tokens=5, input_audio_tokens=6),
        Usage(input_tokens=5, output_tokens=5, reasoning_tokens=3, output_audio_tokens=3),
        Usage(input_tokens=10**30, output_tokens=0),
        Usage(input_tokens=MAX_AMOUNT, output_tokens=MAX_AMOUNT),
        Usage(input_tokens=5.0, output_tokens=5),  # type: ignore[arg-type]
        Usage(input_tokens=True, output_tokens=5),
        Usage(input_tokens="5", output_tokens=5),  # type: ignore[arg-type]
        Usage(input_tokens=float("nan"), output_tokens=5),  # type: ignore[arg-type]
        Usage(input_tokens=None, output_tokens="5"),  # type: ignore[arg-type]
        Usage(input_tokens=5, output_tokens=5, cache_read_tokens="x"),  # type: ignore[arg-type]
        Usage(input_tokens=5, output_tokens=5, cache_read_tokens=1.5),  # type: ignore[arg-type]
    ],
)
def test_unknown_and_absurd_usage_has_no_cost(usage: Usage) -> None:
    """T23: what is unknown, negative, contradictory or no number is charged as unknown, never as 0, and never raises."""
    cost = BOOK.cost("openai", "gpt-4o", usage, NOON_MS)
    assert cost.nanousd is None
    assert cost.source is not None


def test_absurd_names_and_tiers_do_not_raise() -> None:
    """T23: a model or a tier that is no text is passed over; one that nobody prices is the standard tier."""
    odd = Usage(input_tokens=1_000, output_tokens=0, model=["x"], service_tier=7)  # type: ignore[arg-type]
    assert BOOK.cost("openai", "gpt-4o", odd, NOON_MS).nanousd == 2_500_000
    assert BOOK.cost("openai", "x" * 10_000, odd, NOON_MS).nanousd is None
    assert BOOK.cost(None, None, Usage(input_tokens=1, output_tokens=1), NOON_MS) == Cost(None)
    tier = Usage(input_tokens=1_000, output_tokens=0, service_tier="scale")
    assert BOOK.cost("openai", "gpt-4o", tier, NOON_MS).nanousd == 2_500_000


def test_an_unknown_part_that_is_free_does_not_matter() -> None:
    """An embedding has no output to pay for, so its cost is known without one; an unknown input is never free."""
    assert BOOK.cost("openai", "text-embedding-3-small", Usage(input_tokens=1_000_000), NOON_MS).nanousd == 20_000_000
    assert BOOK.cost("openai", "text-embedding-3-small", Usage(output_tokens=0), NOON_MS).nanousd is None


def test_junk_names_in_answers_are_not_remembered_for_ever() -> None:
    """T9: models that answers invent leave a bounded number of memories behind."""
    book = PriceBook.snapshot()
    for number in range(5_000):
        book.cost("openai", "gpt-4o", Usage(input_tokens=1, output_tokens=1, model=f"junk-{number}"), NOON_MS)
    assert len(book._by_call) <= 4_096


def test_what_is_not_in_the_price_is_named() -> None:
    """M9: what a provider bills besides tokens is listed on the card, so that a partial price can be seen."""
    card = BOOK.resolve("openai", "gpt-4o")
    assert card is not None
    assert "storage_searches_kcount" in card.also
    assert "gpt-4o" in repr(card)


@pytest.mark.parametrize(
    "provider, model, usage, dollars",
    [
        # https://cohere.com/pricing, 2026-11: 2 for a thousand rankings.
        ("cohere", "rerank-v3.5", Usage(search_units=3), "0.006"),
        ("azure", "dall-e-3", Usage(images=2), "0.264"),
        ("xai", "grok-imagine-image", Usage(images=3), "0.06"),
    ],
)
def test_units_that_only_the_second_source_has(provider: str, model: str, usage: Usage, dollars: str) -> None:
    """Rankings and images that the first source does not list cost what the second one says."""
    cost = BOOK.cost(provider, model, usage, NOON_MS)
    assert cost.nanousd is not None
    assert abs(from_nano(cost.nanousd) - Decimal(dollars)) < Decimal("0.000001")
    assert cost.source == "litellm cost map 1.109.1, 2026-11-21"


def test_prices_that_only_the_second_source_has() -> None:
    """A rate that one source lacks comes from the other, and the source names both."""
    card = BOOK.resolve("openai", "gpt-4o-audio-preview")
    assert card is not None
    assert card.rates(NOON_MS).audio_input == 40_000_000
    assert card.source == "genai-prices 0.2.3 with litellm cost map 1.109.1, 2026-11-21"


def test_limits_of_models() -> None:
    """The card knows the model's window and its longest answer."""
    card = BOOK.resolve("anthropic", "claude-sonnet-4-5")
    assert card is not None
    assert (card.context_window, card.max_output_tokens) == (200_000, 64_000)


def test_sheets_are_not_remembered_for_ever() -> None:
    """A card keeps a bounded number of days and minutes in mind, and answers the same after it forgot."""
    usage = Usage(input_tokens=1_000_000, output_tokens=0)
    for day in range(600):
        BOOK.cost("deepseek", "deepseek-chat", usage, NOON_MS + day * 86_400_000)
        BOOK.quote(Call(provider="deepseek", model="deepseek-chat", input_tokens=1), NOON_MS + day * 86_400_000)
    card = BOOK.resolve("deepseek", "deepseek-chat")
    assert card is not None
    assert len(card._sheets) <= 256
    assert len(card._ceilings) <= 256
    assert BOOK.cost("deepseek", "deepseek-chat", usage, NOON_MS).nanousd == 270_000_000
