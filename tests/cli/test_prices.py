"""`prices`: what another list would change, and what of it is written as overrides."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.cli.kit import call, document

from asgi_llm_guard.pricing import PriceBook


def changed(folder: Path, change: Any) -> Path:
    """The shipped list with a change, as a file."""
    prices = json.loads((resources.files("asgi_llm_guard") / "data" / "prices.json").read_bytes())
    change(prices["providers"]["openai"]["models"])
    file = folder / "prices.json"
    file.write_text(json.dumps(prices | {"date": "2027-01-01"}), "utf-8")
    return file


def raised(models: dict[str, Any]) -> None:
    models["gpt-4o"]["input"] *= 2
    models["our-new-model"] = {"input": 1_250_000, "output": 5_000_000, "per_image": 40_000_000_000, "source": "genai"}


def test_nothing_is_different(tmp_path: Path) -> None:
    """The list itself is no different: exit 0."""
    told = document("prices", "diff", changed(tmp_path, lambda models: None))
    assert told["added"] == told["changed"] == []
    assert told["to"] == "2027-01-01"


def test_differences_are_shown(tmp_path: Path) -> None:
    """S4: what came and what changed is shown in $ for a million tokens, with the change in per cent: exit 1."""
    file = changed(tmp_path, raised)
    assert document("prices", "diff", file, code=1)["added"] == [
        "openai/our-new-model: input 1.25, output 5, per_image 0.04"
    ]
    shown = call("prices", "diff", file).stdout
    assert "input 2.5 -> 5 (+100%)" in shown


def test_overrides_are_what_the_new_list_says(tmp_path: Path) -> None:
    """S4: the file that `update` writes makes the old list price what differs as the new one does."""
    target = tmp_path / "overrides.toml"
    told = document("prices", "update", changed(tmp_path, raised), "--output", target)
    assert told["file"] == str(target)
    written = tomllib.loads(target.read_text("utf-8"))
    assert set(written) == {"openai/gpt-4o", "openai/our-new-model"}
    assert written["openai/our-new-model"] == {"input": 1.25, "output": 5, "per_image": 0.04}
    book = PriceBook.snapshot(overrides=target)
    card = book.resolve("openai", "our-new-model")
    assert card is not None
    assert book.resolve("openai", "gpt-4o") is not None
    ran = call("prices", "update", changed(tmp_path, raised), "--output", target)
    assert (ran.exit_code, "add --yes" in ran.stderr) == (2, True)


def test_suspicious_changes_are_not_written(tmp_path: Path) -> None:
    """S4: a rate that changes by more than ten times stops it, and is written once somebody has accepted it."""

    def mistaken(models: dict[str, Any]) -> None:
        models["gpt-4o"]["input"] *= 1000

    file, target = changed(tmp_path, mistaken), tmp_path / "overrides.toml"
    ran = call("prices", "update", file, "--output", target)
    assert ran.exit_code == 1
    assert "suspicious" in ran.stderr
    assert not target.exists()
    assert call("prices", "update", file, "--output", target, "--accept").exit_code == 0
    assert tomllib.loads(target.read_text("utf-8"))["openai/gpt-4o"]["input"] == 2_500


def test_rates_that_overrides_do_not_have_are_told(tmp_path: Path) -> None:
    """S4: what cannot be written as an override is named, and not dropped in silence."""

    def longer(models: dict[str, Any]) -> None:
        models["gpt-4o"]["above"] = [[200_000, {"input": 5_000_000}]]

    told = document("prices", "update", changed(tmp_path, longer), "--output", tmp_path / "o.toml")
    assert (told["file"], told["not_written"]) == (None, ["openai/gpt-4o"])
    assert not (tmp_path / "o.toml").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"providers": {}}', '{"providers": {}, "date": "x", "schema": 99}'])
def test_other_files_are_no_price_lists(tmp_path: Path, content: str) -> None:
    """What is no price list of this release is refused with its name: exit 3."""
    file = tmp_path / "other.json"
    file.write_text(content, "utf-8")
    ran = call("prices", "diff", file)
    assert ran.exit_code == 3
    assert str(file) in ran.stderr
    assert call("prices", "diff", tmp_path / "nothing.json").exit_code == 3
