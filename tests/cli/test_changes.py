"""`reset`, `raise`, `kill`: what they change, what they say, and what the audit keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tests.cli.kit import call, document, fill, settings

from asgi_llm_guard import Budget, Context, Guard, Iterations, Usage
from asgi_llm_guard.control import Control

T = TypeVar("T")
BUDGET = '[[policies]]\nkind = "budget"\nlimits = ["$5/1d"]\nper = "user"\nname = "budget"\n'


def control_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'control.db'}"


def made_url(folder: Path) -> str:
    """Of administration data that a service has made."""
    in_control(folder, lambda control: control.state())
    return control_url(folder)


def in_control(folder: Path, work: Callable[[Control], Awaitable[T]]) -> T:
    async def run() -> T:
        control = Control(control_url(folder), secret="x" * 32)
        try:
            return await work(control)
        finally:
            await control.aclose()

    return asyncio.run(run())


def test_reset_sets_one_subject_back(tmp_path: Path) -> None:
    """S12: what one user has used is zero again, and nobody else's; --dry-run only shows it."""
    fill(tmp_path, [Budget("$5/1d", per="user", name="budget"), Iterations(50)], calls=40)
    file = settings(tmp_path, BUDGET + '[[policies]]\nkind = "iterations"\nlimit = 50\n')
    arguments = ("--config", file, "--reason", "a demo")
    would = document("reset", "user", "user-1", "--dry-run", *arguments)["meters"]
    assert [(meter["policy"], meter["subject"], meter["used"] > 0) for meter in would] == [("budget", "user-1", True)]
    assert document("reset", "user", "user-1", "--yes", *arguments)["meters"] == would
    ran = call("reset", "user", "user-1", "--yes", *arguments)
    assert (ran.exit_code, ran.stdout) == (1, "Nothing is used of their limits.\n")
    assert document("reset", "user", "user-2", "--dry-run", *arguments)["meters"][0]["used"] > 0
    shown = call("reset", "user", "user-2", "--dry-run", *arguments).stdout
    assert "$5.00" in shown


def test_reset_of_one_policy(tmp_path: Path) -> None:
    """S12: --policy leaves what other policies count."""
    fill(tmp_path, [Budget("$5/1d", per="user", name="budget"), Budget("$9/1d", per="user", name="other")], calls=8)
    file = settings(
        tmp_path,
        BUDGET
        + BUDGET.replace("$5", "$9").replace('"budget"\n', '"other"\n', 2).replace('kind = "other"', 'kind = "budget"'),
    )
    arguments = ("--config", file, "--reason", "a demo")
    assert len(document("reset", "user", "user-1", "--policy", "other", "--yes", *arguments)["meters"]) == 1
    left = document("reset", "user", "user-1", "--dry-run", *arguments)["meters"]
    assert [meter["policy"] for meter in left] == ["budget"]


def test_resets_are_audited(tmp_path: Path) -> None:
    """S6: with administration data, a reset leaves a row: who, why, and what was there before."""
    fill(tmp_path, [Budget("$5/1d", per="user", name="budget")], calls=8)
    file = settings(tmp_path, BUDGET)
    arguments = ("--config", file, "--control", made_url(tmp_path), "--reason", "wrong price", "--yes")
    document("reset", "user", "user-1", *arguments)
    entry = in_control(tmp_path, lambda control: control.audit())[0]
    assert (entry.verb, entry.target, entry.reason) == ("reset", "user:user-1", "wrong price")
    assert '"used"' in (entry.old or "")


def test_resets_that_cannot_be_audited_are_not_made(tmp_path: Path) -> None:
    """S6: while administration data cannot be reached, nothing is set back: exit 4."""
    fill(tmp_path, [Budget("$5/1d", per="user", name="budget")], calls=8)
    arguments = ("reset", "user", "user-1", "--reason", "x", "--config")
    away = settings(tmp_path, BUDGET + '[control]\nurl = "postgresql://nobody@127.0.0.1:1/none"\n')
    assert call(*arguments, away, "--yes").exit_code == 4
    here = settings(tmp_path, BUDGET)
    assert document(*arguments, here, "--dry-run")["meters"][0]["used"] > 0


def test_reset_knows_quotas_of_administration_data(tmp_path: Path) -> None:
    """S12: what only administration data limit is set back, too: the program goes by them as the service does."""
    quota = '[[policies]]\nkind = "quota"\n[control]\n'
    file = settings(tmp_path, quota)

    async def spent() -> None:
        from asgi_llm_guard.control.changes import Actor

        guard = Guard.from_file(file)
        assert guard.control is not None
        await guard.control.put("department", "research", {"daily_cost": 5}, actor=Actor(name="test"))
        await guard.chores.run("control")
        context = Context(caller="c", departments=("research",))
        async with guard.open(context), guard.call(model="openai/gpt-4o", input_tokens=9, max_output_tokens=9) as made:
            made.record(Usage(input_tokens=9, output_tokens=9))
        await guard.aclose()

    asyncio.run(spent())
    told = document("reset", "department", "research", "--reason", "x", "--yes", "--config", file)["meters"]
    assert [(meter["scope"], meter["used"] > 0) for meter in told] == [("department", True)]


@pytest.mark.parametrize("arguments", [("global", "x"), ("user",), ("galaxy", "x")])
def test_reset_of_nobody(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A scope without its subject, or with one too many, is a wrong command line."""
    ran = call("reset", *arguments, "--reason", "x", "--yes", "--config", settings(tmp_path, BUDGET))
    assert ran.exit_code == 2


def test_reset_of_a_policy_that_is_none(tmp_path: Path) -> None:
    """A policy that has no limit for the subject is a mistake, and not one of which nothing was used: exit 3."""
    fill(tmp_path, [Budget("$5/1d", per="user", name="budget")], calls=8)
    arguments = ("reset", "user", "user-1", "--policy", "budgets", "--reason", "x", "--yes")
    ran = call(*arguments, "--config", settings(tmp_path, BUDGET))
    assert (ran.exit_code, "those that have one: budget" in ran.stderr) == (3, True), ran.output


def test_raise_is_kept_with_its_end(tmp_path: Path) -> None:
    """S12: a raise is in administration data, with its amount, its end and why; the audit has who made it."""
    file = settings(tmp_path, BUDGET)
    arguments = ("--config", file, "--control", made_url(tmp_path), "--reason", "a demo")
    told = document("raise", "budget", "$20", "--until", "2h", "--subject", "mia", *arguments)
    state = in_control(tmp_path, lambda control: control.state())
    kept = state.raises[told["id"]].value
    assert (kept.policy, kept.unit, kept.amount, kept.subject, kept.until_ms) == (
        "budget",
        "usd",
        20,
        "mia",
        told["until_ms"],
    )
    entry = in_control(tmp_path, lambda control: control.audit())[0]
    assert (entry.target, entry.reason, entry.actor.startswith("os:")) == (f"raise:{told['id']}", "a demo", True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("budget", "20", "--until", "2h", "--subject", "mia"), 2, "--unit"),
        (("budget", "$20", "--unit", "tokens", "--until", "2h", "--subject", "mia"), 2, "is money"),
        (("budget", "$20", "--until", "2020-01-01", "--subject", "mia"), 2, "is over already"),
        (("budgets", "$20", "--until", "2h", "--subject", "mia"), 3, "known are budget"),
        (("budget", "$-20", "--until", "2h", "--subject", "mia"), 3, "amount"),
        (("budget", "$20", "--until", "2h"), 2, "add --yes"),
        (("budget", "20", "--unit", "tokens", "--until", "2h", "--subject", "mia"), 3, "it has no limit in tokens"),
        (("budget", "$20", "--scope", "department", "--until", "2h", "--subject", "mia"), 3, "it counts per user"),
    ],
)
def test_raises_that_cannot_be(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    """S5: amounts that are none, policies that there are not, ends in the past, and everybody at once without --yes."""
    more = ("--config", settings(tmp_path, BUDGET), "--control", made_url(tmp_path), "--reason", "x")
    ran = call("raise", *arguments, *more)
    assert (ran.exit_code, said in ran.stderr) == (code, True), ran.output
    assert not in_control(tmp_path, lambda control: control.state()).raises


def test_kill_list_and_lift(tmp_path: Path) -> None:
    """S8: a stop is kept with its end, listed while it holds, and lifted by its name; each step is audited."""
    arguments = ("--config", settings(tmp_path, BUDGET), "--control", made_url(tmp_path))
    told = document(
        "kill", "session", "s-1", "--caller", "team", "--until", "1h", "--reason", "a loop", "--yes", *arguments
    )
    assert told["id"] == "session:s-1@team"
    (listed,) = document("kill", "--list", *arguments)["stops"]
    assert (listed["scope"], listed["subject"], listed["caller"], listed["reason"]) == (
        "session",
        "s-1",
        "team",
        "a loop",
    )
    assert "a loop" in call("kill", "--list", *arguments).stdout
    assert document("kill", "--lift", told["id"], "--reason", "mended", *arguments) == {"lifted": told["id"]}
    assert call("kill", "--list", *arguments).stdout == "Nothing is stopped.\n"
    audit = in_control(tmp_path, lambda control: control.audit())
    assert [(entry.verb, entry.reason) for entry in audit] == [("remove", "mended"), ("put", "a loop")]
    ran = call("kill", "--lift", "nothing", "--reason", "x", *arguments)
    assert (ran.exit_code, "there is no stop 'nothing'" in ran.stderr) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("user", "mia"),
        ("all", "mia", "--reason", "x"),
        ("user", "--reason", "x"),
        ("--list", "--lift", "x"),
        ("user", "mia", "--caller", "c", "--reason", "x"),
        ("user", "mia", "--reason", "x\ny"),
        ("user", "mia", "--reason", "x" * 501),
    ],
    ids=[
        "nothing",
        "no reason",
        "all of somebody",
        "nobody",
        "two at once",
        "caller of a user",
        "two lines",
        "long reason",
    ],
)
def test_stops_that_cannot_be(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """S8: a stop names who, and why; what it cannot mean is refused and nothing is stopped."""
    more = ("--config", settings(tmp_path, BUDGET), "--control", made_url(tmp_path), "--yes")
    assert call("kill", *arguments, *more).exit_code in {2, 3}
    assert not in_control(tmp_path, lambda control: control.state()).stops


def test_administration_data_may_be_the_first_in_the_storages_file(tmp_path: Path) -> None:
    """S8: where administration data are in the storage's file, a change that comes before the service's first start makes
    a file that the service takes."""
    file = settings(tmp_path, BUDGET + "[control]\n")
    document("kill", "user", "mia", "--reason", "x", "--yes", "--config", file)
    assert fill(tmp_path, calls=2) > 0
    assert [stop["subject"] for stop in document("kill", "--list", "--config", file)["stops"]] == ["mia"]
    assert document("usage", "--config", file, "--since", "1d")["total"]["calls"] == 2


def test_changes_need_administration_data(tmp_path: Path) -> None:
    """Without administration data, raises and stops say how it is configured: exit 3."""
    file = settings(tmp_path, BUDGET)
    for arguments in (("raise", "budget", "$1", "--until", "1h", "--subject", "m"), ("kill", "all", "--yes")):
        ran = call(*arguments, "--reason", "x", "--config", file)
        assert ran.exit_code == 3
        assert "no administration data is configured" in ran.stderr


def test_reset_finds_no_storage(tmp_path: Path) -> None:
    """A SQLite file that is not there is a mistaken path: nothing is made, exit 3."""
    ran = call("reset", "user", "mia", "--reason", "x", "--yes", "--config", settings(tmp_path, BUDGET))
    assert ran.exit_code == 3
    assert "there is no file" in ran.stderr
    assert not (tmp_path / "guard.db").exists()
