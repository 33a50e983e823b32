"""No usage within a call's bounds costs more than the quote; and costs agree with genai-prices' own sums."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from decimal import Decimal

import genai_prices.types as genai
import msgspec
import pytest
from genai_prices.data import providers as genai_providers
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.context import Call
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.snapshot import bundled
from asgi_llm_guard.usage import Usage

NOW_MS = 1_795_262_400_000  # 2026-11-21 12:00 UTC
DAY_MS = 86_400_000
MODELS = sorted(bundled())
BOOKS = {
    "genai": PriceBook.snapshot(),
    "max": PriceBook.snapshot(on_conflict="max"),
    "overrides": PriceBook.snapshot(
        overrides={
            "gpt-4o": {"input": 7},
            "claude-sonnet-4-5": {"output": 0.1},
            "deepseek/*": {"input": 0.3, "output": 9},
        }
    ),
}
TIERS = [None, "flex", "batch", "standard", "auto", "unheard-of"]

sizes = st.one_of(
    st.integers(0, 20),
    st.integers(0, 2_000_000),
    st.sampled_from([127_999, 128_001, 199_999, 200_000, 200_001, 272_000, 272_001, 512_001]),
)


@st.composite
def usages(draw: st.DrawFn, tiers: list[str | None]) -> Usage:
    """Any usage that does not contradict itself."""
    input_tokens, output_tokens = draw(sizes), draw(sizes)
    read = draw(st.integers(0, input_tokens))
    write = draw(st.integers(0, input_tokens - read))
    reasoning = draw(st.integers(0, output_tokens))
    audio = draw(st.integers(0, input_tokens))
    spoken = draw(st.integers(0, output_tokens - reasoning))
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=read,
        cache_write_tokens=write,
        cache_write_1h_tokens=draw(st.integers(0, write)),
        input_audio_tokens=audio,
        input_image_tokens=draw(st.none() | st.integers(0, input_tokens - audio)),
        reasoning_tokens=reasoning,
        output_audio_tokens=spoken,
        output_image_tokens=draw(st.none() | st.integers(0, output_tokens - reasoning - spoken)),
        images=draw(counts),
        audio_ms=draw(counts),
        characters=draw(counts),
        web_searches=draw(counts),
        search_units=draw(counts),
        service_tier=draw(st.sampled_from(tiers)),
    )


counts = st.none() | st.integers(0, 5_000)


def bounding(model: tuple[str, str], usage: Usage, spare: tuple[int, int] = (0, 0)) -> Call:
    """The tightest call that a usage is within, but for `spare` tokens."""
    return Call(
        provider=model[0],
        model=model[1],
        input_tokens=(usage.input_tokens or 0) + spare[0],
        output_tokens=(usage.output_tokens or 0) + spare[1],
        cache_writes="1h" if usage.cache_write_1h_tokens else "5m" if usage.cache_write_tokens else "none",
        may_have_audio=bool(usage.input_audio_tokens),
        images=usage.images or 0,
        audio_ms=usage.audio_ms or 0,
        characters=usage.characters or 0,
        web_searches=usage.web_searches or 0,
        search_units=usage.search_units or 0,
    )


@given(
    model=st.sampled_from(MODELS),
    book=st.sampled_from(sorted(BOOKS)),
    usage=usages(TIERS),
    spare=st.tuples(sizes, sizes),
    at_ms=st.integers(NOW_MS - 700 * DAY_MS, NOW_MS + 400 * DAY_MS),
    later_ms=st.integers(0, DAY_MS - 1),
)
def test_no_cost_is_above_its_quote(
    model: tuple[str, str], book: str, usage: Usage, spare: tuple[int, int], at_ms: int, later_ms: int
) -> None:
    """T4, S4: whatever the model, its prices, the buckets and units, the tier (priority apart) and the hour: cost <= quote."""
    prices = BOOKS[book]
    call = bounding(model, usage, spare)
    quoted = prices.quote(call, at_ms).cost_nanousd
    cost = prices.cost(model[0], model[1], usage, at_ms + later_ms, call=call).nanousd
    card = prices.resolve(*model)
    assert card is not None
    if card.by_unit and quoted is None:
        assert not cost  # nothing that it is billed by was bounded, and nothing was used
        return
    assert quoted is not None
    if cost is None:  # something was used that has no price, and of tokens there are none
        assert card.by_unit or not usage.total_tokens
        return
    assert 0 <= cost <= quoted


@given(
    model=st.sampled_from([m for m in MODELS if m[0] in ("openai", "anthropic", "google", "aws", "x-ai")]),
    asked=st.sampled_from(["priority", "fast", "ultrafast"]),
    usage=usages([None]),
    at_ms=st.integers(NOW_MS - 60 * DAY_MS, NOW_MS + 60 * DAY_MS),
)
def test_no_cost_is_above_its_quote_on_the_tier_that_was_asked_for(
    model: tuple[str, str], asked: str, usage: Usage, at_ms: int
) -> None:
    """A request for a dearer tier is quoted at it, at the one that it comes back as, and at the standard one."""
    prices = BOOKS["genai"]
    call = bounding(model, usage)
    quoted = prices.quote(call, at_ms, service_tier=asked).cost_nanousd
    served = {"fast": ("fast", "priority"), "priority": ("fast", "priority")}.get(asked, (asked,))
    for tier in (*served, "default"):
        on_tier = msgspec.structs.replace(usage, service_tier=tier)
        cost = prices.cost(model[0], model[1], on_tier, at_ms, call=call).nanousd
        assert cost is None or quoted is not None or cost == 0
        assert (cost or 0) <= (quoted or 0)


def test_a_dearer_tier_is_quoted_dearer() -> None:
    """`priority` for gpt-4o is 4.25 and 17 where the standard tier is 2.50 and 10."""
    call = Call(provider="openai", model="gpt-4o", input_tokens=1_000, output_tokens=1_000)
    assert BOOKS["genai"].quote(call, NOW_MS).cost_nanousd == 12_500_000
    assert BOOKS["genai"].quote(call, NOW_MS, service_tier="priority").cost_nanousd == 21_250_000
    assert BOOKS["genai"].quote(call, NOW_MS, service_tier="flex").cost_nanousd == 12_500_000


@given(
    model=st.sampled_from(MODELS),
    left=st.integers(0, 10**12),
    input_tokens=st.integers(0, 100_000),
    choices=st.integers(1, 5),
)
def test_what_would_fit_fits(model: tuple[str, str], left: int, input_tokens: int, choices: int) -> None:
    """The parts of a quote tell how many output tokens fit what is left: so many do."""
    prices = BOOKS["genai"]
    call = Call(provider=model[0], model=model[1], input_tokens=input_tokens, output_tokens=choices, choices=choices)
    quoted = prices.quote(call, NOW_MS)
    if quoted.cost_nanousd is None or quoted.output_picousd == 0 or quoted.input_nanousd > left:
        return
    each = (left - quoted.input_nanousd) * 1000 // quoted.output_picousd
    fitting = Call(
        provider=model[0], model=model[1], input_tokens=input_tokens, output_tokens=each * choices, choices=choices
    )
    assert (prices.quote(fitting, NOW_MS).cost_nanousd or 0) <= left


def test_a_bound_without_bound_is_still_an_amount() -> None:
    """Absurd bounds are quoted at the largest amount that storages keep, not above it."""
    call = Call(provider="openai", model="o1-pro", input_tokens=MAX_AMOUNT, output_tokens=MAX_AMOUNT)
    quoted = BOOKS["genai"].quote(call, NOW_MS)
    assert quoted.cost_nanousd == MAX_AMOUNT
    assert quoted.input_nanousd == MAX_AMOUNT


def test_a_quote_replaces_an_older_one() -> None:
    """A call that changed to a model without a price keeps nothing of its old price."""
    quoted = BOOKS["genai"].quote(Call(provider="openai", model="gpt-4o", input_tokens=10, output_tokens=10), NOW_MS)
    moved = BOOKS["genai"].quote(
        Call(provider="openai", model="gpt-99", input_tokens=10, cost_nanousd=quoted.cost_nanousd), NOW_MS
    )
    assert moved.cost_nanousd is None
    assert (moved.input_nanousd, moved.output_picousd, moved.price_source) == (0, 0, None)


# ----------------------------------------------------------------- beside genai-prices' own sums

MEDIA = {"input_image_mtok", "input_video_mtok", "output_image_mtok", "output_video_mtok", "cache_image_read_mtok"}


def comparable() -> list[tuple[str, genai.ModelInfo, genai.Provider]]:
    """Models whose standard price is by the token, and has none for images: those we charge higher on purpose."""
    found = []
    for provider in genai_providers:
        for model in provider.models:
            sets = [model.prices] if isinstance(model.prices, genai.ModelPrice) else [p.prices for p in model.prices]
            keys = {key for prices in sets for key, value in vars(prices).items() if value is not None}
            if keys & {"input_mtok"} and not keys & MEDIA:
                found.append((provider.id, model, provider))
    return found


COMPARABLE = comparable()


@pytest.fixture(scope="module")
def fresh() -> PriceBook:
    """A book of what is installed, without the second source: compiled here and now."""
    from scripts.compile_prices import compile_snapshot, dump

    from asgi_llm_guard.pricing.snapshot import Snapshot

    sources = {"genai": {"name": "genai-prices", "version": "installed", "license": "MIT"}}
    content, _ = compile_snapshot({}, sources, "2026-11-21")
    return PriceBook(Snapshot(dump(content).encode()))


@given(
    picked=st.sampled_from(COMPARABLE),
    usage=usages([None]),
    at_ms=st.integers(NOW_MS - 700 * DAY_MS, NOW_MS + 30 * DAY_MS),
    tier=st.sampled_from([None, "priority", "flex", "batch"]),
)
def test_costs_agree_with_genai_prices(
    fresh: PriceBook, picked: tuple[str, genai.ModelInfo, genai.Provider], usage: Usage, at_ms: int, tier: str | None
) -> None:
    """Every model's tokens cost what genai-prices itself works out, at every size, instant and tier, to the nano-dollar."""
    provider_id, model, provider = picked
    theirs = genai.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        cache_write_5m_tokens=(usage.cache_write_tokens or 0) - (usage.cache_write_1h_tokens or 0),
        output_reasoning_tokens=usage.reasoning_tokens,
    )
    context = None if tier is None else {"processing": "batch"} if tier == "batch" else {"service_tier": tier}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # units that are not tokens
        expected = model.calc_price(
            theirs,
            provider,
            genai_request_timestamp=datetime.fromtimestamp(at_ms / 1000, UTC),
            price_context=context,
        ).total_price
    silent = Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        service_tier=tier,
    )
    ours = fresh.cost(provider_id, model.id, silent, at_ms).nanousd
    assert ours is not None
    # A few prices are no whole number of pico-dollars: those are rounded up.
    slack = Decimal((usage.input_tokens or 0) + (usage.output_tokens or 0)) / 1000 + 1
    assert expected * 10**9 <= ours + Decimal("0.001")
    assert ours <= expected * 10**9 + slack


@pytest.mark.parametrize(
    "provider, model, input_tokens, output_tokens, nanousd",
    [
        # Prices as in test_costs. Cache writes for an hour are the dearest input of Claude: 6, above 200,000 12.
        ("anthropic", "claude-sonnet-4-5", 200_000, 0, 1_200_000_000),
        ("anthropic", "claude-sonnet-4-5", 200_001, 0, 2_400_012_000),
        ("anthropic", "claude-sonnet-4-5", 0, 100, 1_500_000),
        ("openai", "gpt-4o", 1_000, 1_000, 12_500_000),
        ("openai", "gpt-4o-audio-preview", 1, 1, 120_000),  # audio: 40 and 80
        ("deepseek", "deepseek-chat", 1_000_000, 1_000_000, 1_370_000_000),  # by day, whatever the hour
        ("perplexity", "sonar-pro", 0, 0, 14_000_000),
        ("openai", "text-embedding-3-small", 1, 0, 20),
    ],
)
def test_what_a_call_may_cost(provider: str, model: str, input_tokens: int, output_tokens: int, nanousd: int) -> None:
    """A quote takes the dearest rate of every bucket, at the size that the bound reaches, and the price of the call."""
    call = Call(provider=provider, model=model, input_tokens=input_tokens, output_tokens=output_tokens, choices=3)
    quoted = BOOKS["genai"].quote(call, NOW_MS + 8 * 3_600_000)
    assert quoted.cost_nanousd == nanousd
    assert quoted.output_picousd % 3 == 0


def test_a_quote_is_rounded_up_once() -> None:
    """A fraction of a nano-dollar is held as a whole one, for the call and not for each bucket."""
    book = PriceBook.snapshot(overrides={"m": {"input": 0.0001, "output": 0.0001}})  # 100 pico-dollars each
    one = book.quote(Call(model="m", input_tokens=1, output_tokens=1), NOW_MS)
    six = book.quote(Call(model="m", input_tokens=6, output_tokens=5), NOW_MS)
    assert (one.cost_nanousd, one.input_nanousd, one.output_picousd) == (1, 1, 100)
    assert six.cost_nanousd == 2
