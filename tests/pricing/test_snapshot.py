"""The snapshot that ships: what it has, and that it is sound. Names, and which entry they find."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import date
from importlib import resources
from typing import Any

import pytest

from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.snapshot import bundled, provider_id

NOW_MS = 1_795_219_200_000  # 2026-11-21
RATES = {
    "input", "output", "cache_read", "cache_write", "cache_write_1h", "audio_input", "audio_output",
    "audio_cache_read", "image_input", "image_output", "image_cache_read", "reasoning", "video_input", "video_output",
    "per_call", "per_image", "per_audio_ms", "per_character", "per_web_search", "per_search_unit",
}  # fmt: skip
UNITS = {"per_call", "per_image", "per_audio_ms", "per_character", "per_web_search", "per_search_unit"}


def file() -> dict[str, Any]:
    text = (resources.files("asgi_llm_guard") / "data" / "prices.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def prices_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Every set of rates in an entry."""
    found = [entry, *entry.get("dated", ()), *(price for tier in entry.get("tiers", {}).values() for price in tier)]
    found += [entry["alt"]] if "alt" in entry else []
    return found + [raised for price in found for _, raised in price.get("above", ())]


def test_there_are_prices_for_two_thousand_models() -> None:
    """The snapshot has at least 2,000 models of at least 40 providers, offline."""
    assert len(bundled()) >= 2_000
    assert len({provider for provider, _ in bundled()}) >= 40


def test_every_price_is_a_whole_number_that_is_not_negative() -> None:
    """No float and no negative rate is anywhere in the file, and every entry has a price of input or of another unit."""
    for provider in file()["providers"].values():
        for name, entry in provider["models"].items():
            assert "input" in entry or UNITS - {"per_call", "per_web_search"} & entry.keys(), name
            for price in prices_of(entry):
                for key in RATES & price.keys():
                    assert type(price[key]) is int, (name, key)
                    assert price[key] >= 0, (name, key)


def test_no_rate_is_mixed_up_by_a_factor_of_a_thousand() -> None:
    """No token costs more than a tenth of a cent, nor an image or a search $10, nor a minute of audio a dollar."""
    for provider in file()["providers"].values():
        for name, entry in provider["models"].items():
            for price in prices_of(entry):
                assert all(price[key] <= 10**9 for key in (RATES - UNITS) & price.keys()), name
            assert all(
                entry[key] <= 10**13 for key in ("per_image", "per_web_search", "per_search_unit") if key in entry
            )
            assert entry.get("per_audio_ms", 0) <= 10**12 // 60_000, name
            assert entry.get("per_character", 0) <= 10**9, name


def test_every_axis_has_prices() -> None:
    """S4: cache reads and writes of both kinds, reasoning, audio, images, sizes, tiers, dates and other units are priced."""
    found = {key for provider in file()["providers"].values() for entry in provider["models"].values() for key in entry}
    assert found >= RATES | {"above", "tiers", "dated", "alt", "context", "max_output"}


def test_every_entry_says_where_it_is_from() -> None:
    """The file is dated, and each entry names one of its sources, which have name, version and licence."""
    snapshot = file()
    date.fromisoformat(snapshot["date"])
    for source in snapshot["sources"].values():
        assert source.keys() == {"name", "version", "license"}
    for provider in snapshot["providers"].values():
        for entry in provider["models"].values():
            assert entry["source"] in snapshot["sources"]


def test_aliases_lead_somewhere_and_hide_nothing() -> None:
    """Every alias is lower case, names an entry of its provider, and is not itself an entry."""
    for provider in file()["providers"].values():
        for alias, target in provider["aliases"].items():
            assert alias == alias.lower()
            assert target in provider["models"]
            assert alias not in provider["models"]


def test_every_entry_makes_a_rate_card() -> None:
    """All entries can be decoded and worked out, under both rules for conflicts."""
    for book in (PriceBook.snapshot(), PriceBook.snapshot(on_conflict="max")):
        for provider, name in bundled():
            card = book.resolve(provider, name)
            assert card is not None
            assert card.rates(NOW_MS).input >= 0
            assert card.max_output_tokens is None or card.max_output_tokens > 0


def test_it_loads_lazily() -> None:
    """Importing the prices reads no snapshot; the first look-up does."""
    code = (
        "from asgi_llm_guard.pricing import PriceBook; from asgi_llm_guard.pricing.snapshot import bundled;"
        "book = PriceBook.snapshot(overrides={'a': {'input': 1, 'output': 1}});"
        "assert bundled.cache_info().currsize == 0;"
        "book.resolve('openai', 'gpt-4o'); assert bundled.cache_info().currsize == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_loads_fast() -> None:
    """The snapshot is there within 50 ms of CPU."""
    took_s = []
    for _ in range(5):
        bundled.cache_clear()
        started = time.process_time()
        bundled()
        took_s.append(time.process_time() - started)
    assert min(took_s) < 0.05


@pytest.mark.parametrize(
    "provider, model, found",
    [
        ("openai", "gpt-4o", "openai/gpt-4o"),
        ("OpenAI", " GPT-4o ", "openai/gpt-4o"),
        ("openai", "openai/gpt-4o", "openai/gpt-4o"),
        (None, "openai/gpt-4o", "openai/gpt-4o"),
        (None, "gpt-4o", "openai/gpt-4o"),
        ("openai", "gpt-4o-2024-05-13", "openai/gpt-4o-2024-05-13"),  # a price of its own
        ("openai", "gpt-4o-2031-01-02", "openai/gpt-4o"),
        ("openai", "gpt-4o-20310102", "openai/gpt-4o"),
        ("azure", "gpt-4o", "openai/gpt-4o"),
        ("AZURE_OPENAI", "gpt-4o", "openai/gpt-4o"),
        ("anthropic", "claude-sonnet-4-5-20250929", "anthropic/claude-sonnet-4-5"),
        ("vertex_ai", "claude-sonnet-4-5@20250929", "google/claude-sonnet-4-5"),
        ("gemini", "models/gemini-2.5-pro", "google/gemini-2.5-pro"),
        ("vertex_ai", "publishers/google/models/gemini-2.5-pro", "google/gemini-2.5-pro"),
        ("xai", "grok-3", "x-ai/grok-3"),
        ("openrouter", "openai/gpt-4o", "openrouter/openai/gpt-4o"),
        ("openrouter", "openai/gpt-4o:free", "openrouter/openai/gpt-4o"),  # not free: no such entry
        ("openrouter", "openrouter/openai/gpt-4o", "openrouter/openai/gpt-4o"),
        (None, "openrouter/openai/gpt-4o", "openrouter/openai/gpt-4o"),
        ("bedrock", "global.anthropic.claude-sonnet-4-5-20250929-v1:0", "aws/global.anthropic.claude-sonnet-4-5-20250929-v1:0"),
        ("bedrock", "us.anthropic.claude-sonnet-4-5-20250929-v1:0", "aws/regional.anthropic.claude-sonnet-4-5-20250929-v1:0"),
        ("bedrock", "sa.amazon.nova-pro-v1:0", "aws/amazon.nova-pro-v1:0"),
        ("bedrock", "arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-pro-v1:0", "aws/amazon.nova-pro-v1:0"),
    ],
)  # fmt: skip
def test_names_that_are_the_same_model(provider: str | None, model: str, found: str) -> None:
    """Case, prefixes, resource paths, full dates and regions lead to the entry of the model."""
    card = PriceBook.snapshot().resolve(provider, model)
    assert card is not None
    assert f"{card.provider}/{card.model}" == found


@pytest.mark.parametrize(
    "provider, model",
    [
        ("openai", "gpt-99"),
        ("openai", "gpt-4o-super"),
        ("openai", "gpt-4o-"),
        ("openai", "gpt-4o-0102"),
        ("openai", "gpt-4o:nitro"),
        ("openai", "claude-sonnet-4-5"),
        ("openai", "omni-moderation-latest"),
        ("ollama", "llama3.1"),
        ("my-proxy", "gpt-4o"),
        ("openai", ""),
        ("openai", "x" * 100_000),
        (None, "llama-3.3-70b-versatile-nowhere"),
        (None, ""),
        ("", "gpt-99"),
    ],
)
def test_names_that_are_no_known_model(provider: str | None, model: str) -> None:
    """M9: a model that only looks like a known one has no price, rather than a wrong one."""
    assert PriceBook.snapshot().resolve(provider, model) is None


def test_a_fine_tuned_model_has_its_own_price() -> None:
    """`ft:` models are never charged as the model they are made from."""
    book = PriceBook.snapshot()
    tuned, base = book.resolve("openai", "ft:gpt-4o-2024-08-06:acme::x1"), book.resolve("openai", "gpt-4o")
    assert tuned is not None
    assert base is not None
    assert tuned.rates(NOW_MS).input > base.rates(NOW_MS).input


def test_junk_names_are_not_remembered_for_ever() -> None:
    """T9: ten thousand invented models leave a bounded number of memories behind."""
    book = PriceBook.snapshot()
    for number in range(10_000):
        assert book.resolve("openai", f"junk-{number}") is None
    assert len(book._cards) <= 4_096


def test_provider_names() -> None:
    """Every spelling of a provider leads to one id; nobody stays nobody."""
    assert {provider_id(name) for name in ("AWS_BEDROCK", "bedrock", "amazon-bedrock")} == {"aws"}
    assert provider_id(None) is None
    assert provider_id("  ") is None
    assert provider_id("Mine") == "mine"
