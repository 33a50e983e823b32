"""The script that compiles the snapshot, on made-up cost maps."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from scripts.compile_prices import COST_MAP, main

from asgi_llm_guard.pricing import PriceBook
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
