"""`usage`, `top`, `sessions`, `ledger …`: what they print is what the ledger says."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import signal
import sqlite3
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from tests.cli.kit import call, clean_environment, document, fill, settings
from tests.servers import POLL_S, RedisServer

PRICES = '[prices.overrides."openai/gpt-4o"]\ninput = 5\noutput = 20\n'


def test_usage_by_department(tmp_path: Path) -> None:
    """C9: a call of two departments counts in full for each, and once in the total."""
    spent = fill(tmp_path, calls=30)
    told = document("usage", "--config", settings(tmp_path, ""), "--since", "2d")
    rows = {row["key"][0]: row["amounts"] for row in told["rows"]}
    assert {name: amounts["calls"] for name, amounts in rows.items()} == {"research": 20, "sales": 10, "support": 10}
    assert told["total"]["cost_nanousd"] == spent
    assert rows["sales"]["cost_nanousd"] == rows["support"]["cost_nanousd"]
    shown = call("usage", "--config", settings(tmp_path, ""), "--since", "2d").stdout.splitlines()
    assert shown[0].split() == ["DEPARTMENT", "CALLS", "COST", "INPUT", "OUTPUT", "CACHED", "ERRORS"]
    assert shown[-1].split()[:2] == ["total", "30"]


def test_usage_of_some(tmp_path: Path) -> None:
    """C9: --where keeps what matches, --by takes several dimensions, --limit says what it leaves out."""
    fill(tmp_path, calls=30)
    arguments = ("usage", "--config", settings(tmp_path, ""), "--since", "2d")
    told = document(*arguments, "--by", "model", "--by", "user", "--where", "department=sales", "--limit", "2")
    assert (told["by"], len(told["rows"]), told["total"]["calls"]) == (["model", "user"], 2, 10)
    assert told["left_out"] > 0
    assert "more rows (--limit)" in call(*arguments, "--by", "session", "--limit", "2").stdout
    assert document(*arguments, "--where", "tag=")["total"]["calls"] == 30
    for wrong in ("galaxy=x", "department", "hour=3"):
        assert call(*arguments, "--where", wrong).exit_code == 2


def test_usage_of_days_is_in_order(tmp_path: Path) -> None:
    """C9: times come in their order, in the zone that is asked for."""
    fill(tmp_path, calls=30)
    arguments = ("usage", "--config", settings(tmp_path, ""), "--since", "2d", "--by", "hour")
    hours = [row["key"][0] for row in document(*arguments, "--tz", "Asia/Kolkata")["rows"]]
    assert hours == sorted(hours)
    assert all(hour.endswith("+05:30") for hour in hours)
    assert call(*arguments, "--tz", "Mars/Base").exit_code == 2


def test_top_and_sessions(tmp_path: Path) -> None:
    """C9: who has used most comes first; sessions, the latest first, with whose they are."""
    fill(tmp_path, calls=30)
    file = settings(tmp_path, "")
    costs = [row["amounts"]["cost_nanousd"] for row in document("top", "user", "--config", file)["rows"]]
    assert costs == sorted(costs, reverse=True)
    assert len(document("top", "model", "-n", "2", "--config", file)["rows"]) == 2
    rows = document("sessions", "--config", file)["sessions"]
    assert {row["session"] for row in rows} == {f"session-{number}" for number in range(5)}
    assert sum(row["calls"] for row in rows) == 30
    assert [row["last_ms"] for row in rows] == sorted((row["last_ms"] for row in rows), reverse=True)
    assert "session-1" in call("sessions", "--config", file).stdout
    nothing = call("sessions", "--since", "1s", "--config", file)
    assert nothing.stdout == "No session has made a call since.\n"


def test_nothing_used_is_said(tmp_path: Path) -> None:
    """A period without usage is told in a sentence."""
    fill(tmp_path, calls=1)
    ran = call("usage", "--config", settings(tmp_path, ""), "--since", "2020-01", "--until", "2020-02")
    assert ran.stdout == "Nothing was used in this period.\n"


@pytest.mark.parametrize("storage", ["memory://", "redis://127.0.0.1:1"])
def test_no_ledger_says_how(tmp_path: Path, storage: str) -> None:
    """Where there is no ledger, the error says how there would be: exit 3."""
    ran = call("usage", "--config", settings(tmp_path, "", storage=storage))
    assert ran.exit_code == 3
    assert "--ledger URL" in ran.stderr


def test_export_is_the_ledger(tmp_path: Path) -> None:
    """S7: the rows of an export sum up to what the ledger says, on stdout and in a file, which is told with its digest."""
    spent = fill(tmp_path, calls=30)
    file, target = settings(tmp_path, ""), tmp_path / "usage.csv"
    arguments = ("ledger", "export", "--config", file, "--since", "2d")
    told = document(*arguments, "--output", target)
    assert (told["records"], told["cost_nanousd"]) == (30, spent)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == told["sha256"]
    rows = list(csv.DictReader(io.StringIO(call(*arguments).stdout)))
    assert sum(Decimal(row["cost_usd"]) for row in rows) * 10**9 == spent
    assert f"${Decimal(spent).scaleb(-9)}" in call(*arguments, "--output", target).stdout
    lines = call(*arguments, "--format", "jsonl", "--where", "department=sales").stdout.splitlines()
    assert len(lines) == 10
    assert json.loads(lines[0])["departments"] == ["sales", "support"]
    assert len(call(*arguments, "--each-department").stdout.splitlines()) == 1 + 20 + 2 * 10
    assert call(*arguments, "--json").exit_code == 2


def test_rollup_reconcile_and_retain(tmp_path: Path) -> None:
    """C9: sums are added up once, agree with the records, and what differs is an exit of 1 that names the day."""
    spent = fill(tmp_path, calls=30)
    file = settings(tmp_path, "")
    assert document("ledger", "rollup", "--config", file) == {"rolled_up": 30}
    assert document("ledger", "rollup", "--config", file) == {"rolled_up": 0}
    told = document("ledger", "reconcile", "--config", file, "--since", "2d")
    assert (told["equal"], told["total"]["cost_nanousd"]) == (True, spent)
    assert call("ledger", "reconcile", "--config", file, "--since", "2d").stdout.startswith("Equal: 30 records")
    with sqlite3.connect(tmp_path / "guard.db") as connection:
        connection.execute("UPDATE ledger_hours SET cost_nanousd = cost_nanousd + 1")
    connection.close()
    assert document("ledger", "reconcile", "--config", file, "--since", "2d", code=1)["equal"] is False
    assert "cost_nanousd" in call("ledger", "reconcile", "--config", file, "--since", "2d").stdout
    assert set(document("ledger", "retain", "--yes", "--config", file)["removed"].values()) == {0}


def test_reprice_keeps_both(tmp_path: Path) -> None:
    """S4: other prices of a past period are kept under a name, beside what was charged, which stays as it is."""
    spent = fill(tmp_path, calls=30)
    file = settings(tmp_path, PRICES)
    arguments = ("ledger", "reprice", "--config", file, "--since", "2d", "--name", "new prices")
    dry = document(*arguments, "--dry-run")
    assert dry["dry_run"] is True
    told = document(*arguments)
    assert told["total"] == dry["total"]
    assert told["total"]["charged_nanousd"] == spent < told["total"]["repriced_nanousd"]
    assert document("usage", "--config", file, "--since", "2d")["total"]["cost_nanousd"] == spent
    again = call(*arguments)
    assert (again.exit_code, "new prices" in again.stderr) == (3, True)
    shown = call(*arguments[:-1], "another").stdout
    assert "openai/gpt-4o " in shown
    assert "beside what was charged" in shown


def test_drain_from_redis(tmp_path: Path, redis_server: RedisServer, namespace: str) -> None:
    """B7, C9: records of a Redis storage are taken into the ledger once, however often it is run."""
    import asyncio

    from asgi_llm_guard import Context, Guard, Usage

    url = f"{redis_server.url}?namespace={namespace}&timeout=10"

    async def calls() -> None:
        guard = Guard(storage=url)
        for number in range(7):
            context = Context(caller="team", departments=("research",), request_id=f"r{number}")
            call = guard.call(model="openai/gpt-4o", input_tokens=10, max_output_tokens=10)
            async with guard.open(context), call as made:
                made.record(Usage(input_tokens=10, output_tokens=5))
        await guard.aclose()

    asyncio.run(calls())
    file = settings(tmp_path, "", storage=url)
    ledger = ("--config", file, "--ledger", f"sqlite:///{tmp_path / 'ledger.db'}")
    assert document("ledger", "drain", *ledger)["drained"]["records"] == 7
    assert document("ledger", "drain", *ledger)["drained"]["records"] == 0
    assert document("usage", *ledger)["total"]["calls"] == 7
    assert call("ledger", "drain", *ledger).stdout.startswith("0 records were taken over")


def test_drain_follows_until_it_is_told(tmp_path: Path) -> None:
    """S10: `ledger drain --follow` goes on, and ends in good order at SIGTERM: exit 0, and what it did."""
    fill(tmp_path, calls=5)
    settings(tmp_path, "")
    with subprocess.Popen(
        [sys.executable, "-c", "from asgi_llm_guard.cli import main; main()", "ledger", "drain", "--follow", "--json"],
        cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        until = time.monotonic() + 60
        while not _summed(tmp_path) and time.monotonic() < until and running.poll() is None:
            time.sleep(POLL_S)
        running.send_signal(signal.SIGTERM)
        out, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (0, "")
    assert json.loads(out)["rolled_up"] == 5


def _summed(folder: Path) -> bool:
    """Whether the sums of hours have anything, as another connection sees it."""
    connection = sqlite3.connect(folder / "guard.db")
    try:
        return bool(connection.execute("SELECT count(*) FROM ledger_hours").fetchone()[0])
    except sqlite3.OperationalError:  # there is no such table yet
        return False
    finally:
        connection.close()


def test_sessions_since(tmp_path: Path) -> None:
    """Sessions take the times that other reports take; what is none is a mistake of the command line, exit 2."""
    fill(tmp_path, calls=10)
    arguments = ("sessions", "--config", settings(tmp_path, ""), "--since")
    assert document(*arguments, "2020-01-01")["sessions"]
    ran = call(*arguments, "soon")
    assert (ran.exit_code, "--since: expected a time ago" in ran.stderr) == (2, True), ran.output


@pytest.mark.parametrize("command", [("usage",), ("sessions",), ("ledger", "export"), ("ledger", "reconcile")])
def test_a_ledger_that_is_not_there_is_not_made(tmp_path: Path, command: tuple[str, ...]) -> None:
    """`--ledger` with a mistaken path says so, exit 3, and leaves no empty ledger behind."""
    fill(tmp_path, calls=2)
    file = settings(tmp_path, "")
    ran = call(*command, "--ledger", f"sqlite:///{tmp_path}/typo.db", "--config", file)
    assert (ran.exit_code, "there is no file" in ran.stderr) == (3, True), ran.output
    assert not (tmp_path / "typo.db").exists()


def test_filters_that_are_there_twice(tmp_path: Path) -> None:
    """Two filters of one name are refused, and neither is passed over: exit 2."""
    ran = call("usage", "--where", "user=a", "--where", "user=b", "--config", settings(tmp_path, ""))
    assert (ran.exit_code, "user is given twice" in ran.stderr) == (2, True), ran.output


def test_a_session_is_one_row(tmp_path: Path) -> None:
    """A session whose calls are of several departments is one row, with all that it has cost."""
    cost = fill(tmp_path, calls=30)
    told = document("sessions", "--config", settings(tmp_path, ""))["sessions"]
    assert sorted(row["session"] for row in told) == [f"session-{number}" for number in range(5)]
    assert (sum(row["calls"] for row in told), sum(row["cost_nanousd"] for row in told)) == (30, cost)
