"""The script that refreshes the snapshot: what it shows, what it writes, and how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts.compile_prices import COST_MAP
from scripts.refresh_prices import main

from asgi_llm_guard.pricing.diff import Diff, compare


def snapshot(**models: dict[str, Any]) -> dict[str, Any]:
    """A snapshot with these models of one provider."""
    return {"date": "2026-11-21", "sources": {}, "providers": {"p": {"models": models}}}


def test_nothing_changed() -> None:
    """The date alone is no change."""
    old, new = snapshot(m={"input": 1, "source": "genai"}), snapshot(m={"input": 1, "source": "genai"})
    diff = compare(old, new | {"date": "2027-01-01"})
    assert not diff
    assert str(diff) == "0 added, 0 removed, 0 changed, 0 of them suspicious"


def test_models_that_come_and_go() -> None:
    """Added and removed models are shown with their rates, in dollars for a million tokens or for one of a unit."""
    old = snapshot(gone={"input": 2_500_000, "output": 10_000_000, "source": "genai"})
    new = snapshot(new={"per_image": 40_000_000_000, "source": "litellm", "context": 9})
    diff = compare(old, new)
    assert diff
    assert str(diff).splitlines() == [
        "added       p/new: per_image 0.04",
        "removed     p/gone: input 2.5, output 10",
        "1 added, 1 removed, 0 changed, 0 of them suspicious",
    ]


def test_rates_that_change() -> None:
    """A changed rate is shown with its old and new value and the difference in percent, wherever it stands."""
    old = snapshot(
        m={
            "input": 2_000_000,
            "output": 8_000_000,
            "cache_read": 500_000,
            "above": [[1000, {"input": 4_000_000}]],
            "dated": [{"since": 77, "input": 3_000_000}, {"hours": [60, 120], "input": 1_000_000}],
            "tiers": {"flex": [{"input": 1_000_000}, {"input": 5_000_000}]},
            "alt": {"input": 2_000_000},
            "per_call": 10**10,
            "max_output": 100,
            "source": "genai",
        }
    )
    new = json.loads(json.dumps(old))
    entry = new["providers"]["p"]["models"]["m"]
    entry["input"] = 1_500_000
    del entry["cache_read"]
    entry["reasoning"] = 9_000_000
    entry["above"][0][1]["input"] = 5_000_000
    entry["dated"][0]["input"] = 6_000_000
    entry["dated"][1]["input"] = 1_100_000
    entry["tiers"]["flex"][1]["input"] = 4_000_000
    entry["alt"]["input"] = 1_000_000
    entry["per_call"] = 2 * 10**10
    entry["max_output"] = 200
    (line,) = compare(old, new).changed
    assert line.removeprefix("p/m: ").split("; ") == [
        "above 1000 input 4 -> 5 (+25%)",
        "alt input 2 -> 1 (-50%)",
        "cache_read 0.5 -> -",
        "flex 2 input 5 -> 4 (-20%)",
        "from 77 input 3 -> 6 (+100%)",
        "from [60, 120] input 1 -> 1.1 (+10%)",
        "input 2 -> 1.5 (-25%)",
        "max_output 100 -> 200",
        "per_call 0.01 -> 0.02 (+100%)",
        "reasoning - -> 9",
    ]


@pytest.mark.parametrize(
    ("key", "was", "now", "suspicious"),
    [
        ("input", 10, 100, False),
        ("input", 10, 101, True),
        ("input", 101, 10, True),
        ("input", 10, 0, True),
        ("input", 0, 10, True),
        ("per_image", 10, 101, True),
        ("context", 10, 1_000, False),
        ("max_output", 10, 1_000, False),
    ],
)
def test_what_is_suspicious(key: str, was: int, now: int, suspicious: bool) -> None:
    """A rate that changes by more than ten times, or becomes free or stops being free, is set apart; a limit never is."""
    diff = compare(snapshot(m={key: was}), snapshot(m={key: now}))
    assert bool(diff.suspicious) is suspicious
    assert len(diff.changed) == 1
    assert ("SUSPICIOUS  p/m" in str(diff)) is suspicious


def test_a_rate_that_is_new_is_not_suspicious() -> None:
    """A rate that was not there before, or is no longer, is shown and nothing else."""
    assert compare(snapshot(m={"input": 1}), snapshot(m={"input": 1, "reasoning": 99})).suspicious == ()
    assert isinstance(compare({"providers": {}}, snapshot(m={"input": 1})), Diff)


# ----------------------------------------------------------------------------------- the script


def packages(folder: Path, **dollars: float) -> Path:
    """A folder with a cost map in which models of one reseller have these prices for a million tokens."""
    (folder / "litellm-1.99.0.dist-info").mkdir(parents=True, exist_ok=True)
    (folder / COST_MAP).parent.mkdir(exist_ok=True)
    cost_map = {
        f"sambanova/{name}": {
            "litellm_provider": "sambanova",
            "mode": "chat",
            "input_cost_per_token": price / 1e6,
            "output_cost_per_token": price / 1e6,
        }
        for name, price in dollars.items()
    }
    (folder / COST_MAP).write_text(json.dumps(cost_map), encoding="utf-8")
    return folder


def run(tmp_path: Path, folder: Path, *more: str) -> int:
    return main(["--packages", str(folder), "--output", str(tmp_path / "prices.json"), "--date", "2026-11-21", *more])


def test_a_refresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes what changed and shows it; `--check` writes nothing and says by its exit code whether something did."""
    target = tmp_path / "prices.json"
    folder = packages(tmp_path / "packages", first=1.0, second=1.0)
    assert run(tmp_path, folder, "--check") == 1
    assert not target.exists()
    assert run(tmp_path, folder, "--report", str(tmp_path / "report.txt")) == 0
    assert "only litellm" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    written = target.read_text(encoding="utf-8")
    assert run(tmp_path, folder, "--check", "--date", "2027-01-01") == 0
    capsys.readouterr()

    packages(folder, first=2.0, third=1.0)
    assert run(tmp_path, folder, "--check") == 1
    assert target.read_text(encoding="utf-8") == written
    told = capsys.readouterr().out
    assert "litellm cost map 1.99.0 -> 1.99.0" in told
    assert "added       sambanova/third: input 1, output 1" in told
    assert "removed     sambanova/second: input 1, output 1" in told
    assert "changed     sambanova/first: input 1 -> 2 (+100%); output 1 -> 2 (+100%)" in told
    assert run(tmp_path, folder) == 0
    assert run(tmp_path, folder, "--check") == 0

    packages(folder, first=100.0, third=1.0)
    before = target.read_text(encoding="utf-8")
    assert run(tmp_path, folder) == 2
    assert target.read_text(encoding="utf-8") == before
    assert "SUSPICIOUS  sambanova/first: input 2 -> 100 (+4900%)" in capsys.readouterr().out
    assert run(tmp_path, folder, "--accept") == 0
    assert run(tmp_path, folder, "--check") == 0


def test_sources_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the sources nothing is written, and the exit code says why."""
    assert run(tmp_path, tmp_path / "nothing") == 3
    assert "the sources could not be read" in capsys.readouterr().err
    assert not (tmp_path / "prices.json").exists()


def test_it_runs_by_its_path(tmp_path: Path) -> None:
    """The script can be run as a file, from anywhere."""
    import subprocess

    script = Path(__file__).resolve().parents[2] / "scripts" / "refresh_prices.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "Exit codes" in done.stdout
