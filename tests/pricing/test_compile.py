"""The script that compiles the snapshot, on made-up cost maps."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from scripts.compile_prices import COST_MAP, main, read_cost_map

from asgi_llm_guard.pricing import Fees, PriceBook
from asgi_llm_guard.pricing.snapshot import Snapshot
from asgi_llm_guard.usage import Usage

NOW_MS = 1_795_262_400_000
MILLION = Usage(input_tokens=1_000_000, output_tokens=1_000_000)


def entry(provider: str, dollars_in: float, dollars_out: float, **more: Any) -> dict[str, Any]:
    """A line of a cost map, with prices per million."""
    return {
        "litellm_provider": provider,
        "mode": "chat",
        "input_cost_per_token": dollars_in / 1e6,
        "output_cost_per_token": dollars_out / 1e6,
        **more,
    }


def compiled(tmp_path: Path, cost_map: dict[str, Any]) -> tuple[Snapshot, str]:
    """The snapshot and the report for a cost map in a wheel."""
    wheel = tmp_path / "litellm-1.99.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(COST_MAP, json.dumps(cost_map))
    output, report = tmp_path / "out" / "prices.json", tmp_path / "report.txt"
    main(["--litellm", str(wheel), "--date", "2026-11-21", "--output", str(output), "--report", str(report)])
    return Snapshot(output.read_bytes()), report.read_text(encoding="utf-8")


def test_models_that_only_the_cost_map_has(tmp_path: Path) -> None:
    """They are taken over with sizes, tiers and limits, and reported where the provider is a known one."""
    cost_map = {
        "newcomer-1": entry(
            "openai",
            1,
            2,
            cache_read_input_token_cost=1e-7,
            input_cost_per_token_above_200k_tokens=3e-6,
            input_cost_per_token_priority=5e-6,
            output_cost_per_token_priority=6e-6,
            max_input_tokens=1_000,
            max_output_tokens=99,
        ),
        "sambanova/some-model": entry("sambanova", 4, 5),
    }
    snapshot, report = compiled(tmp_path, cost_map)
    card = PriceBook(snapshot).resolve("openai", "newcomer-1")
    assert card is not None
    assert card.source == "litellm cost map 1.99.0, 2026-11-21"
    assert (card.context_window, card.max_output_tokens) == (1_000, 99)
    assert (card.rates(NOW_MS).input, card.rates(NOW_MS).cache_read) == (1_000_000, 100_000)
    assert card.rates(NOW_MS, input_tokens=200_001).input == 3_000_000
    assert card.rates(NOW_MS, service_tier="priority").output == 6_000_000
    assert PriceBook(snapshot).cost("sambanova", "some-model", MILLION, NOW_MS).nanousd == 9_000_000_000
    assert "only litellm  openai/newcomer-1" in report
    assert "sambanova" not in report


def test_prices_that_differ(tmp_path: Path) -> None:
    """Both are kept, under the name that they differ for, and the report shows them side by side."""
    cost_map = {"gpt-4o": entry("openai", 2.5, 11), "gpt-4o-2024-08-06": entry("openai", 2.5, 10, max_output_tokens=7)}
    snapshot, report = compiled(tmp_path, cost_map)
    assert "differ        openai/gpt-4o: output 10 / 11" in report
    assert PriceBook(snapshot).cost("openai", "gpt-4o", MILLION, NOW_MS).nanousd == 12_500_000_000
    assert PriceBook(snapshot, on_conflict="max").cost("openai", "gpt-4o", MILLION, NOW_MS).nanousd == 13_500_000_000
    assert report.startswith("1 agree, 1 differ, 0 only litellm")


def test_a_name_that_differs_alone_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    """Where only a dated name differs, it gets an entry of its own, and a reseller's does not change the maker's."""
    cost_map = {"gpt-4o-2024-08-06": entry("openai", 3, 10), "azure/gpt-4o": entry("azure", 4, 10)}
    snapshot, _ = compiled(tmp_path, cost_map)
    dearer = PriceBook(snapshot, on_conflict="max")
    assert dearer.cost("openai", "gpt-4o", MILLION, NOW_MS).nanousd == 12_500_000_000
    assert dearer.cost("openai", "gpt-4o-2024-08-06", MILLION, NOW_MS).nanousd == 13_000_000_000
    assert dearer.cost("azure", "gpt-4o", MILLION, NOW_MS).nanousd == 14_000_000_000


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(entry("openai", 0, 0), id="free by placeholder"),
        pytest.param(entry("openai", 1, 0), id="output without a price"),
        pytest.param(entry("openai", 3_200, 9_710), id="by the thousand"),
        pytest.param(entry("openai", 1, 1, mode="image_generation"), id="another mode"),
        pytest.param(entry("nobody", 1, 1), id="another provider"),
        pytest.param({"litellm_provider": "openai", "mode": "chat"}, id="no price"),
        pytest.param(entry("openai", -1, -1), id="negative"),
    ],
)
def test_lines_that_are_no_price(tmp_path: Path, line: dict[str, Any]) -> None:
    """67: what says nothing about the price of a token leaves the model unpriced, not free."""
    snapshot, _ = compiled(tmp_path, {"newcomer-2": line})
    assert PriceBook(snapshot).resolve("openai", "newcomer-2") is None


def test_a_new_snapshot_is_a_readable_diff(tmp_path: Path) -> None:
    """One more model is one more line, and compiling twice gives the same bytes."""
    first, _ = compiled(tmp_path, {})
    lines = (tmp_path / "out" / "prices.json").read_text(encoding="utf-8").splitlines()
    compiled(tmp_path, {"newcomer-3": entry("openai", 1, 2)})
    more = (tmp_path / "out" / "prices.json").read_text(encoding="utf-8").splitlines()
    assert [line for line in more if line not in lines] == [
        '  "newcomer-3":{"input":1000000,"output":2000000,"source":"litellm"},'
    ]
    assert len(more) == len(lines) + 1
    assert len(first) > 2_000


@pytest.mark.parametrize("number", ["1.82.7", "1.82.8", "1.83.9"])
def test_releases_that_are_refused(tmp_path: Path, number: str) -> None:
    """Wheels with known holes, two of them malicious, are not even read."""
    with pytest.raises(SystemExit, match=rf"1\.84 or later, got {number}"):
        main(["--litellm", str(tmp_path / f"litellm-{number}-py3-none-any.whl"), "--output", str(tmp_path / "x")])


def test_without_a_second_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script works with genai-prices alone, and prints its report."""
    main(["--output", str(tmp_path / "prices.json"), "--date", "2026-11-21"])
    assert capsys.readouterr().out == "0 agree, 0 differ, 0 only litellm\n"
    assert len(Snapshot((tmp_path / "prices.json").read_bytes())) > 2_000


def test_prices_of_other_units(tmp_path: Path) -> None:
    """S4: what is billed by the image, second, character, search or ranking is taken over by what the model does."""
    cost_map = {
        "sambanova/images": {
            "litellm_provider": "sambanova",
            "mode": "image_generation",
            "output_cost_per_image": 0.04,
        },
        "sambanova/ears": {
            "litellm_provider": "sambanova",
            "mode": "audio_transcription",
            "input_cost_per_second": 0.0001,
            "output_cost_per_second": 0.0,
        },
        "sambanova/voice": {
            "litellm_provider": "sambanova",
            "mode": "audio_speech",
            "input_cost_per_character": 15e-6,
        },
        "sambanova/ranking": {
            "litellm_provider": "sambanova",
            "mode": "rerank",
            "input_cost_per_query": 0.002,
            "input_cost_per_token": 0.0,
            "output_cost_per_token": 0.0,
        },
        "sambanova/searching": entry(
            "sambanova",
            1,
            2,
            search_context_cost_per_query={"search_context_size_low": 0.01, "search_context_size_high": 0.03},
        ),
        "sambanova/talking": entry("sambanova", 1, 2, input_cost_per_second=0.5) | {"mode": "realtime"},
        "sambanova/by-the-step": entry("sambanova", 1, 2) | {"mode": "image_generation"},
        "sambanova/absurd": {"litellm_provider": "sambanova", "mode": "rerank", "input_cost_per_query": 5_000},
        "sambanova/nothing": {"litellm_provider": "sambanova", "mode": "audio_speech"},
    }
    snapshot, _ = compiled(tmp_path, cost_map)
    fees = {name: PriceBook(snapshot).resolve("sambanova", name) for name in map(str.lower, _bare(cost_map))}
    assert {name: card.fees for name, card in fees.items() if card is not None} == {
        "images": Fees(image=40_000_000_000),
        "ears": Fees(audio_ms=100_000),
        "voice": Fees(character=15_000_000),
        "ranking": Fees(search_unit=2_000_000_000),
        "searching": Fees(web_search=30_000_000_000),
        "talking": Fees(),
    }
    assert {name for name, card in fees.items() if card is not None and card.by_unit} == {
        "images", "ears", "voice", "ranking",
    }  # fmt: skip


def _bare(cost_map: dict[str, Any]) -> list[str]:
    return [name.partition("/")[2] for name in cost_map]


def test_sizes_of_images(tmp_path: Path) -> None:
    """Of a model whose images are priced by size and quality, the dearest is taken: usage tells neither."""
    images = {"litellm_provider": "azure", "mode": "image_generation"}
    cost_map = {
        "azure/standard/1024-x-1024/pictures-1": images | {"output_cost_per_image": 0.04},
        "azure/hd/1024-x-1792/pictures-1": images | {"input_cost_per_pixel": 1e-7},
        "azure/pictures-1": images | {"output_cost_per_image": 0.01},
        "azure/low/1024-x-1024/pictures-2": images | {"input_cost_per_image": 0.5},
        "azure/pictures-2": entry("azure", 5, 10, output_cost_per_image_token=30e-6) | {"mode": "image_generation"},
    }
    book = PriceBook(compiled(tmp_path, cost_map)[0])
    sized, by_token = book.resolve("azure", "pictures-1"), book.resolve("azure", "pictures-2")
    assert sized is not None
    assert by_token is not None
    assert sized.fees.image == 183_500_800_000  # 1,024 x 1,792 pixels
    assert by_token.fees.image is None
    assert by_token.rates(NOW_MS).image_output == 30_000_000
    assert book.resolve("azure", "standard/1024-x-1024/pictures-1") is None


def test_ranges_of_input(tmp_path: Path) -> None:
    """Prices that are listed by ranges of input are taken over as sizes."""
    ranges = [
        {"input_cost_per_token": 3e-6, "output_cost_per_token": 9e-6, "range": [128000.0, 1000000.0]},
        {"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6, "range": [0, 128000.0]},
    ]
    cost_map = {"sambanova/m": {"litellm_provider": "sambanova", "mode": "chat", "tiered_pricing": ranges}}
    card = PriceBook(compiled(tmp_path, cost_map)[0]).resolve("sambanova", "m")
    assert card is not None
    assert (card.rates(NOW_MS).input, card.rates(NOW_MS, input_tokens=128_000).output) == (1_000_000, 4_000_000)
    assert (card.rates(NOW_MS, input_tokens=128_001).input, card.rates(NOW_MS, input_tokens=128_001).output) == (
        3_000_000,
        9_000_000,
    )


def test_rates_that_are_not_raised_with_the_rest(tmp_path: Path) -> None:
    """A rate of images that equals that of text does not become a discount where text is dearer; a write is never free."""
    cost_map = {
        "sambanova/m": entry(
            "sambanova",
            1,
            2,
            input_cost_per_image_token=1e-6,
            cache_creation_input_token_cost=0.0,
            cache_creation_input_token_cost_above_12hr=2e-6,
            input_cost_per_token_above_200k_tokens=4e-6,
        )
    }
    card = PriceBook(compiled(tmp_path, cost_map)[0]).resolve("sambanova", "m")
    assert card is not None
    rates = card.rates(NOW_MS, input_tokens=200_001)
    assert (rates.input, rates.image_input, rates.cache_write) == (4_000_000, 4_000_000, 4_000_000)
    assert (card.rates(NOW_MS).cache_write, card.rates(NOW_MS).cache_write_1h) == (1_000_000, 2_000_000)


def test_units_that_only_the_second_source_has(tmp_path: Path) -> None:
    """A unit that the first source has no price for comes from the second, also where the two differ, and both are named."""
    searches = {"search_context_cost_per_query": {"search_context_size_high": 0.03}}
    cost_map = {"o1": entry("openai", 99, 60, **searches), "gpt-4-turbo": entry("openai", 10, 30, **searches)}
    book = PriceBook(compiled(tmp_path, cost_map)[0])
    for name in cost_map:
        card = book.resolve("openai", name)
        assert card is not None
        assert card.fees.web_search == 30_000_000_000
        assert card.source == "genai-prices 0.2.3 with litellm cost map 1.99.0, 2026-11-21"


def test_a_folder_with_the_cost_map(tmp_path: Path) -> None:
    """The cost map is also found where litellm is installed; a folder without it is refused."""
    (tmp_path / "litellm-1.99.0.dist-info").mkdir()
    (tmp_path / COST_MAP).parent.mkdir()
    (tmp_path / COST_MAP).write_text(json.dumps({"m": entry("sambanova", 1, 2)}), encoding="utf-8")
    assert read_cost_map(tmp_path)[1] == "1.99.0"
    with pytest.raises(SystemExit, match="expected a litellm wheel, or a folder that litellm is installed in"):
        read_cost_map(tmp_path / "litellm")
