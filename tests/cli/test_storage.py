"""`migrate` and `bench`: of one storage into another, and what one takes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from tests.cli.kit import call, document, fill, process, settings
from tests.servers import RedisServer

from asgi_llm_guard import Budget

BUDGET = '[[policies]]\nkind = "budget"\nlimits = ["$5/1d"]\nper = "user"\nname = "budget"\n'


def test_migrate_to_redis_and_back(tmp_path: Path, redis_server: RedisServer, namespace: str) -> None:
    """S19: counters and records go from SQLite to Redis and on to another file; totals and digest are the same."""
    spent = fill(tmp_path, [Budget("$5/1d", per="user", name="budget")], calls=20)
    file = settings(tmp_path, BUDGET)
    redis = f"{redis_server.url}?namespace={namespace}&timeout=10"
    there = document("migrate", "--to", redis, "--config", file)["copied"]
    assert (there["records"], there["cost_nanousd"], there["cells"]) == (20, spent, 4)
    back = document("migrate", "--from", redis, "--to", f"sqlite:///{tmp_path / 'other.db'}", "--config", file)[
        "copied"
    ]
    assert back == there
    used = document("reset", "user", "user-1", "--dry-run", "--reason", "x", "--config", file)["meters"]
    other = settings(tmp_path, BUDGET, storage=f"sqlite:///{tmp_path / 'other.db'}")
    assert document("reset", "user", "user-1", "--dry-run", "--reason", "x", "--config", other)["meters"] == used


def test_migrate_refuses_what_would_be_lost(tmp_path: Path) -> None:
    """S19: a target that is not empty, a source that does not exist and memory are refused; nothing is changed."""
    fill(tmp_path, calls=2)
    file = settings(tmp_path, "")
    url = f"sqlite:///{tmp_path / 'other.db'}"
    assert call("migrate", "--to", url, "--config", file).exit_code == 0
    again = call("migrate", "--to", url, "--config", file)
    assert (again.exit_code, "not empty" in again.stderr) == (4, True)
    assert call("migrate", "--from", f"sqlite:///{tmp_path / 'none.db'}", "--to", url, "--config", file).exit_code == 3
    assert call("migrate", "--to", "memory://", "--config", file).exit_code == 3


def test_migrate_shows_the_digest(tmp_path: Path) -> None:
    """S19: people see counts, sums and the digest that both sides have; the target may come from the environment."""
    fill(tmp_path, calls=2)
    settings(tmp_path, "")
    ran = process("migrate", cwd=tmp_path, env={"ASGI_LLM_GUARD_TARGET": f"sqlite:///{tmp_path / 'other.db'}"})
    assert ran.returncode == 0, ran.stderr
    assert "Both sides are alike: sha256 " in ran.stdout
    assert ran.stderr == ""


def test_bench_measures_and_leaves_nothing(tmp_path: Path) -> None:
    """The bench says how long admission and settlement took, and leaves no usage record and nothing used or held."""
    file = settings(tmp_path, BUDGET)
    told = document("bench", "--calls", "60", "--parallel", "4", "--yes", "--config", file)
    assert (told["calls"], told["parallel"], told["storage"]) == (60, 4, "sqlite")
    assert 0 < told["admit_us"]["p50"] <= told["admit_us"]["p99"]
    assert 0 < told["settle_us"]["p50"] <= told["settle_us"]["p99"]
    with sqlite3.connect(tmp_path / "guard.db") as connection:
        assert connection.execute("SELECT count(*) FROM ledger").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM holds").fetchone() == (0,)
        assert connection.execute("SELECT sum(used), sum(held) FROM cells").fetchone() in {(None, None), (0, 0)}
    connection.close()
    assert "a second" in call("bench", "--calls", "20", "--yes", "--config", file).stdout
    assert call("bench", "--calls", "20", "--config", settings(tmp_path, BUDGET, storage="memory://")).exit_code == 0
