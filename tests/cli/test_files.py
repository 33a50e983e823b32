"""SQLite files that are not there, or are others: what a mistyped path comes to."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.cli.kit import call, document, fill, process, settings

from asgi_llm_guard.control import Control
from asgi_llm_guard.ledger import Ledger

POLICY = '[[policies]]\nkind = "budget"\nlimits = ["$5/1d"]\nper = "user"\nname = "budget"\n'
CHANGES = {
    "raise": ("raise", "budget", "$1", "--until", "2h", "--subject", "mia", "--reason", "x"),
    "kill": ("kill", "user", "mia", "--reason", "x", "--yes"),
    "kill --list": ("kill", "--list"),
    "kill --lift": ("kill", "--lift", "user:mia", "--reason", "x"),
    "keys new": ("keys", "new", "--caller", "team"),
    "keys list": ("keys", "list"),
    "keys rotate": ("keys", "rotate", "k1", "--reason", "x"),
    "keys revoke": ("keys", "revoke", "k1", "--reason", "x", "--yes"),
    "reset": ("reset", "user", "user-1", "--reason", "x", "--yes"),
}
FIRST = ("raise", "kill", "keys new")
"""Changes that may come before the service's first start."""
SECRET = {"LLM_GUARD_CONTROL__SECRET": "0123456789abcdef0123456789abcdef"}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", CHANGES)
def test_mistyped_control_is_told_and_not_made(tmp_path: Path, name: str) -> None:
    """`--control` with a path where nothing is: exit 3 with the path that was looked at and the next step, and no file."""
    fill(tmp_path, calls=2)
    file = settings(tmp_path, POLICY)
    there = files(tmp_path)
    ran = process(*CHANGES[name], "--control", "sqlite:///typo.db", "--config", file, cwd=tmp_path, env=SECRET)
    assert ran.returncode == 3, ran.stderr
    said = f"Error: --control: there is no file typo.db (looked at {tmp_path / 'typo.db'}); correct the path; "
    assert ran.stderr.startswith(said)
    assert "the service makes it" in ran.stderr
    assert files(tmp_path) == there


@pytest.mark.parametrize("name", CHANGES)
def test_control_of_the_settings_that_is_not_there(tmp_path: Path, name: str) -> None:
    """Only what may be the first change makes the file that the settings name, and says that it did; else it is told."""
    fill(tmp_path, calls=2)
    url = f"sqlite:///{tmp_path / 'control.db'}"
    file = settings(tmp_path, f'{POLICY}[control]\nurl = "{url}"\n')
    ran = call(*CHANGES[name], "--config", file, env=SECRET)
    made = (tmp_path / "control.db").exists()
    if name in FIRST:
        assert (ran.exit_code, made) == (0, True), ran.output
        assert ran.stderr == f"{tmp_path / 'control.db'}: was not there, and is made\n"
    else:
        assert (ran.exit_code, made) == (3, False), ran.output
        assert f"{file}: control.url: there is no file {tmp_path / 'control.db'}" in ran.stderr


def test_raise_that_is_refused_makes_no_file(tmp_path: Path) -> None:
    """A change that is refused before it is made leaves no database behind."""
    file = settings(tmp_path, f'{POLICY}[control]\nurl = "sqlite:///{tmp_path / "control.db"}"\n')
    ran = call("raise", "budgets", "$1", "--until", "2h", "--subject", "mia", "--reason", "x", "--config", file)
    assert (ran.exit_code, "known are budget" in ran.stderr) == (3, True), ran.output
    assert files(tmp_path) == {"guard.toml"}


@pytest.mark.parametrize(
    "command", [("usage",), ("top",), ("sessions",), ("ledger", "export"), ("ledger", "rollup"), ("simulate",)]
)
def test_reports_make_no_file(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Reports make neither the ledger nor the administration data that the settings name, and need none of the latter."""
    fill(tmp_path, calls=2)
    file = settings(tmp_path, f'{POLICY}[control]\nurl = "sqlite:///{tmp_path / "control.db"}"\n')
    assert call(*command, "--config", file, "--json" if command[-1] != "export" else "--gzip").exit_code == 0
    assert not (tmp_path / "control.db").exists()
    file = settings(tmp_path, f'[ledger]\nurl = "sqlite:///{tmp_path / "typo.db"}"\n')
    ran = call(*command, "--config", file)
    assert (ran.exit_code, f"{file}: ledger.url: there is no file {tmp_path / 'typo.db'}" in ran.stderr) == (3, True)
    assert not (tmp_path / "typo.db").exists()


@pytest.mark.parametrize("offline", [(), ("--offline",)], ids=["asked", "offline"])
@pytest.mark.parametrize("filled", [True, False], ids=["storage", "no storage"])
def test_check_makes_no_file(tmp_path: Path, offline: tuple[str, ...], *, filled: bool) -> None:
    """S20: `check` names every database of the settings that is not there, and makes none of them."""
    if filled:
        fill(tmp_path, calls=2)
    text = f'{POLICY}[identity]\nkind = "control"\n[control]\nurl = "sqlite:///{tmp_path / "control.db"}"\n'
    file = settings(tmp_path, text)
    there = files(tmp_path)
    found = document("check", *offline, "--config", file, env=SECRET)["findings"]
    seen = [finding["seen"] for finding in found if finding["code"] == "no_file_yet"]
    assert len(seen) == (1 if filled else 2)
    assert str(tmp_path / "control.db") in seen[-1]
    assert files(tmp_path) >= there
    assert not {"control.db"} & files(tmp_path)
    assert (tmp_path / "guard.db").exists() is filled


def test_check_of_administration_data_in_a_storage_that_is_not_there(tmp_path: Path) -> None:
    """S20: administration data in the storage's file are part of it: one finding, and no file."""
    file = settings(tmp_path, f"{POLICY}[control]\n")
    codes = [finding["code"] for finding in document("check", "--config", file, code=1)["findings"]]
    assert codes.count("no_file_yet") == 1
    assert files(tmp_path) == {"guard.toml"}


def test_check_of_a_mistyped_ledger(tmp_path: Path) -> None:
    """`check --ledger` with a path where nothing is: exit 3, as of all commands."""
    fill(tmp_path, calls=1)
    ran = call("check", "--ledger", f"sqlite:///{tmp_path / 'typo.db'}", "--config", settings(tmp_path, POLICY))
    assert (ran.exit_code, "--ledger: there is no file" in ran.stderr) == (3, True), ran.output


@pytest.mark.parametrize("kind", ["text", "folder", "foreign", "empty", "ledger"])
def test_control_that_is_another_file(tmp_path: Path, kind: str) -> None:
    """A file that is there and has no administration data in it is told with what it is, and stays as it is."""
    path = tmp_path / "other.db"
    if kind == "text":
        path.write_text("storage = 'memory://'\n" * 20, "utf-8")
    elif kind == "folder":
        path.mkdir()
    elif kind == "foreign":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE customers (name TEXT)")
    elif kind == "empty":
        path.touch()
    else:
        asyncio.run(_ledger(path))
    said = {
        "text": "is no SQLite file",
        "folder": "is no file",
        "foreign": "is the database of another program",
        "empty": "has no administration data in it",
        "ledger": "has no administration data in it",
    }[kind]
    before = path.read_bytes() if kind != "folder" else b""
    for command in (CHANGES["kill"], CHANGES["keys list"]):
        ran = call(*command, "--control", f"sqlite:///{path}", "--config", settings(tmp_path, POLICY), env=SECRET)
        assert (ran.exit_code, said in ran.stderr, str(path) in ran.stderr) == (3, True, True), ran.output
    assert (path.read_bytes() if kind != "folder" else b"") == before


async def _ledger(path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{path}")
    await ledger.roll_up()
    await ledger.aclose()


@pytest.mark.parametrize("kind", ["text", "control"])
def test_ledger_that_is_another_file(tmp_path: Path, kind: str) -> None:
    """`--ledger` with a file that has no ledger in it is told; reading makes none there."""
    path = tmp_path / "other.db"
    if kind == "text":
        path.write_text("no database " * 20, "utf-8")
    else:
        control = Control(f"sqlite:///{path}")
        asyncio.run(control.state())
        control.database.close()
    fill(tmp_path, calls=1)
    said = "is no SQLite file" if kind == "text" else "has no ledger in it"
    for command in (("usage",), ("ledger", "reconcile"), ("check",)):
        ran = call(*command, "--ledger", f"sqlite:///{path}", "--config", settings(tmp_path, POLICY))
        assert (ran.exit_code, f"--ledger: {path} {said}" in ran.stderr) == (3, True), ran.output


def test_storage_that_is_another_file(tmp_path: Path) -> None:
    """A storage's URL that names a file of ours without counters in it is told, and no counters are made there."""
    control = Control(f"sqlite:///{tmp_path / 'guard.db'}")
    asyncio.run(control.state())
    control.database.close()
    ran = call("usage", "--config", settings(tmp_path, POLICY))
    assert (ran.exit_code, "has no storage in it" in ran.stderr) == (3, True), ran.output
    with closing(sqlite3.connect(tmp_path / "guard.db")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'cells'").fetchone() == (0,)


@pytest.mark.parametrize("arguments", [("usage",), ("check",), ("usage", "--ledger")], ids=" ".join)
def test_file_that_cannot_be_looked_at(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A path that the operating system refuses is a mistake of the settings, exit 3 with what to do, and no finding, exit 1."""
    refused = tmp_path / ("long" * 100)  # what its rights would refuse, they allow to a test that runs as root
    named = arguments[-1] == "--ledger"
    if named:
        fill(tmp_path, calls=1)
        arguments = (*arguments, f"sqlite:///{refused}")
    file = settings(tmp_path, POLICY, storage=None if named else f"sqlite:///{refused}")
    ran = call(*arguments, "--config", file)
    assert ran.exit_code == 3, ran.output
    assert f"{refused}: File name too long; let this user read and write the file, or correct the path" in ran.stderr


def test_drain_says_that_it_makes_a_ledger(tmp_path: Path) -> None:
    """`ledger drain` makes the ledger that it is to fill, and says so: a path may still be mistyped."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    file = settings(tmp_path, "", storage=f"sqlite:///{tmp_path / 'guard.db'}")
    fill(tmp_path, calls=1)
    ran = call("ledger", "drain", "--ledger", url, "--config", file)
    assert f"{tmp_path / 'ledger.db'}: was not there, and is made" in ran.stderr
