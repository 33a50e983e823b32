"""The program as a whole: its help, its exit codes, its errors, and what it loads."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.kit import at_terminal, call, clean_environment, document, fill, process, settings

from asgi_llm_guard import Budget
from asgi_llm_guard.cli.root import program
from asgi_llm_guard.control import Control

BUDGET = '[[policies]]\nkind = "budget"\nlimits = ["$5/daily"]\nper = "user"\n'
HEAVY = {
    "genai_prices", "httpx", "httpx2", "jinja2", "limits", "opentelemetry", "pydantic", "pydantic_settings", "redis",
    "sqlite3", "starlette.applications", "uvicorn",
}  # fmt: skip


def test_help_is_light() -> None:
    """The list of commands, and a command's help, are shown without loading what only its work needs."""
    for arguments in (
        ["--help"],
        ["simulate", "--help"],
        ["keys", "new", "--help"],
        ["check", "--help"],
        ["usage", "--help"],
    ):
        source = (
            f"import sys; sys.argv = ['x', *{arguments!r}]\n"
            "from asgi_llm_guard.cli import main\n"
            "try: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
        )
        ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
        assert "Usage:" in ran.stdout
        assert HEAVY.intersection(ran.stderr.split()) == set()


def test_every_command_is_listed_with_its_help() -> None:
    """Each name in a group's list is a command that is there, with the same name and a help of its own."""
    shown = call("--help").stdout
    with program.make_context("asgi-llm-guard", ["--help"], resilient_parsing=True) as context:
        for name in program.list_commands(context):
            command = program.get_command(context, name)
            assert command is not None
            assert command.name == name
            assert name in shown
            assert call(name, "--help").exit_code == 0
            for inner in getattr(command, "listing", ()):
                assert call(name, inner, "--help").exit_code == 0, inner


def test_installed_program_says_its_version(tmp_path: Path) -> None:
    """The entry point starts, and tells its version."""
    ran = process("--version", cwd=tmp_path)
    assert (ran.returncode, ran.stdout.split()[0]) == (0, "asgi-llm-guard")


def test_usage_errors_exit_with_two(tmp_path: Path) -> None:
    """A wrong command line exits with 2 and says what was expected."""
    ran = process("usage", "--since", "soon", cwd=tmp_path)
    assert ran.returncode == 2
    assert "--since: expected a time ago" in ran.stderr
    assert process("nonsense", cwd=tmp_path).returncode == 2


def test_configuration_errors_exit_with_three(tmp_path: Path) -> None:
    """A wrong setting exits with 3 and a line for each problem, each with the file, the line and the key; no traceback."""
    settings(tmp_path, '[[policies]]\nkind = "budget"\nlimits = ["$5/never"]\nper = "user"\n[streams]\nidle_s = -1\n')
    ran = process("check", cwd=tmp_path)
    assert ran.returncode == 3
    lines = ran.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Error: guard.toml") for line in lines)
    assert "Traceback" not in ran.stderr


def test_missing_settings_name_the_next_step(tmp_path: Path) -> None:
    """Without a settings file the error names it, and how another one is named."""
    ran = process("check", cwd=tmp_path)
    assert ran.returncode == 3
    assert ran.stderr == (
        "Error: guard.toml: there is no such file; name the settings with --config FILE or LLM_GUARD_CONFIG\n"
    )


def test_settings_are_named_by_the_environment(tmp_path: Path) -> None:
    """LLM_GUARD_CONFIG names the settings file, and is no setting itself."""
    file = settings(tmp_path, BUDGET, storage="memory://")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = process("check", "--offline", "--json", cwd=elsewhere, env={"LLM_GUARD_CONFIG": str(file)})
    assert ran.stderr == ""
    assert [route["policies"] for route in json.loads(ran.stdout)["routes"]] == [["user_budget"]]


def test_a_store_that_is_away_exits_with_four(tmp_path: Path) -> None:
    """A command that needs a storage which is not there exits with 4 and says so in a line."""
    file = settings(tmp_path, BUDGET, storage="redis://127.0.0.1:1")
    ran = process("bench", "--yes", "--config", file, cwd=tmp_path)
    assert ran.returncode == 4
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("Error: ")


def test_no_secret_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """T15: the password in a storage's URL is in no output and no error."""
    file = settings(tmp_path, BUDGET, storage="redis://:canary-5150@127.0.0.1:1")
    for arguments in (
        ["check"],
        ["check", "--json"],
        ["bench", "--yes"],
        ["usage"],
        ["reset", "user", "x", "--reason", "y"],
    ):
        here = call(*arguments, "--config", file)
        assert "canary-5150" not in f"{here.output}{here.exception!r}", arguments
    ran = process("usage", "--config", file, cwd=tmp_path)
    assert ran.stdout + ran.stderr
    assert "canary-5150" not in ran.stdout + ran.stderr + caplog.text


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """`asgi-llm-guard … | head -1` ends without a traceback."""
    settings(tmp_path, BUDGET, storage="memory://")
    command = f'{sys.executable} -c "from asgi_llm_guard.cli import main; main()" check --offline --json | true'
    ran = subprocess.run(
        command, shell=True, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench",),
        ("kill", "all", "--reason", "x", "--control", "sqlite:///c.db"),
        ("ledger", "retain"),
        ("keys", "revoke", "k1", "--reason", "x", "--control", "sqlite:///c.db"),
    ],
)
def test_nobody_there_to_confirm(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """What cannot be taken back is not done where nobody can be asked, unless --yes was given: exit 2."""
    settings(tmp_path, BUDGET)
    fill(tmp_path, calls=1)
    control = Control(f"sqlite:///{tmp_path / 'c.db'}")
    asyncio.run(control.state())
    control.database.close()
    ran = process(*arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert "add --yes" in ran.stderr


def test_a_reason_is_asked_for(tmp_path: Path) -> None:
    """S6: changes need a reason of one printable line."""
    file = settings(tmp_path, BUDGET)
    for given in ([], ["--reason", "  "], ["--reason", "a\nb"]):
        ran = call("reset", "user", "mia", "--yes", "--config", file, *given)
        assert ran.exit_code == 2
        assert "--reason" in ran.stderr


@pytest.mark.parametrize("answer", [b"n\n", b"\x03", b"\x04"], ids=["no", "Ctrl-C", "Ctrl-D"])
def test_a_question_that_is_not_answered_with_yes(tmp_path: Path, answer: bytes) -> None:
    """At a terminal, no, Ctrl-C and Ctrl-D each end the command at once, with nothing done: exit 2."""
    fill(tmp_path, [Budget("$5/daily", per="user")], calls=8)
    file = settings(tmp_path, BUDGET)
    said, code = at_terminal(
        "reset", "user", "user-1", "--reason", "x", "--config", file, until=b"[y/N]: ", answer=answer
    )
    assert (code, b"Nothing was done" in said) == (2, True), said
    assert document("reset", "user", "user-1", "--reason", "x", "--dry-run", "--config", file)["meters"][0]["used"] > 0


def test_ctrl_c_in_long_work(tmp_path: Path) -> None:
    """Ctrl-C ends long work in good order, without a traceback: exit 130."""
    arguments = ("bench", "--calls", "100000", "--yes", "--config", settings(tmp_path, BUDGET))
    said, code = at_terminal(*arguments, until=b"1%", answer=b"\x03", asks=False)
    assert (code, b"Traceback" in said) == (130, False), said


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    """Under a supervisor that gives a process no standard output the command runs all the same."""
    fill(tmp_path, calls=2)
    settings(tmp_path, BUDGET)
    command = f'{sys.executable} -c "from asgi_llm_guard.cli import main; main()" usage <&- >&-'
    ran = subprocess.run(
        command, shell=True, cwd=tmp_path, env=clean_environment(), stderr=subprocess.PIPE, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
