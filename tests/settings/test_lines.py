"""Where a key stands in a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.settings import load_settings
from asgi_llm_guard.settings.lines import line_in

TEXT = '''storage = "memory://"
exempt = [
    "/health",  # = [ not a table
]

[[policies]]
kind = "iterations"
limit = 5

[[policies]] # the second one
"kind" = "budget"
limits = { "*" = "$5/daily" }

[departments.research]
daily_cost = 5
[departments.'a.b']
models = ["x"]

[identity]
kind = "jwt"
key = """
[policies]
limit = 1
"""
issuer.name = "=["
audience = "a"

[[gateway.deployments]]
name = "one"
[gateway.deployments.extra]
rpm = 1
[[gateway.deployments]]
name = "two"
'''


@pytest.mark.parametrize(
    "path, line",
    [
        (("storage",), 1),
        (("exempt",), 2),
        (("exempt", 0), 2),
        (("policies", 0), 6),
        (("policies", 0, "limit"), 8),
        (("policies", 1, "kind"), 11),
        (("policies", 1, "limits", "*"), 12),
        (("policies", 1, "limit"), 10),
        (("departments", "research", "daily_cost"), 15),
        (("departments", "a.b", "models"), 17),
        (("identity", "key"), 21),
        (("identity", "issuer", "name"), 25),
        (("identity", "audience"), 26),
        (("gateway", "deployments", 0, "name"), 29),
        (("gateway", "deployments", 0, "extra", "rpm"), 31),
        (("gateway", "deployments", 1, "name"), 33),
        (("policies", 2, "kind"), None),
        (("nothing",), None),
        (("gateway",), 28),
        ((), None),
    ],
)
def test_line(path: tuple[str | int, ...], line: int | None) -> None:
    """A key is found on its line; one that is missing, at what is nearest around it."""
    assert line_in(TEXT, path) == line


@pytest.mark.parametrize(
    "text, path, line",
    [
        ("# said \u2028 and \x85\n[a]\nb = 1\n", ("a", "b"), 3),
        ("a = 1  # '''\nb = 2\n", ("b",), 2),
        ('# it says """\nb = 2\n', ("b",), 2),
        ("a = \"x ''' y\"\nb = 2\n", ("b",), 2),
        ('a = """x\\"""\nb = 1\n"""\nb = 2\n', ("b",), 4),
        ('a = [ """\n[x]\n""", 1 ]\nb = 2\n', ("b",), 4),
        ('"a=b" = 1\n["c]d"]\ne = 2\n', ("a=b",), 1),
        ('"a=b" = 1\n["c]d"]\ne = 2\n', ("c]d", "e"), 3),
        ('[agents."caf\\u00e9"]\nx = 1\n', ("agents", "café", "x"), 2),
    ],
)
def test_line_in_odd_files(text: str, path: tuple[str | int, ...], line: int) -> None:
    """Lines are counted as TOML does, whatever stands in comments, strings and quoted keys."""
    tomllib.loads(text)
    assert line_in(text, path) == line


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


@pytest.mark.parametrize("file", sorted(Path("examples").rglob("*.toml")), ids=str)
def test_examples(file: Path) -> None:
    """Every key of the examples' files is found on a line that has its name."""
    text = file.read_text(encoding="utf-8")
    for path, _ in _leaves(tomllib.loads(text)):
        line = line_in(text, path)
        assert line is not None, path
        assert str(path[-1]) in text.splitlines()[line - 1]


def test_problem_names_its_line(tmp_path: Path) -> None:
    """What is wrong is told with the line on which it stands."""
    file = tmp_path / "guard.toml"
    file.write_text('storage = "memory://"\n\n[[policies]]\nkind = "iterations"\nlimit = "many"\n', encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"guard\.toml, line 5: policies\[0\]: iterations\.limit: "):
        load_settings(file)
