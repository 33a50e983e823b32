"""Every promise that has a number is named by at least one test, so that none is lost when tests are rewritten."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

ROWS = {
    "A": {1, 2, 3, 4, 5, 6, 7, 8, 9},
    "B": {1, 2, 3, 4, 5, 6, 7, 8, 9},
    "C": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
    "D": {1, 2, 3, 4, 5, 6, 7, 8, 9},
    "M": {13, 14, 15, 16},
    "S": {3, 4, 5, 6, 7, 8, 10, 12, 17, 19, 20},
    "T": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25},
    "W": {1, 6, 7},
    "Conformance ": {
        *range(1, 20),
        *range(21, 37),
        *range(38, 46),
        *(47, 48),
        *range(50, 60),
        *range(60, 75),
        *range(75, 83),
    },
}
"""The promises that are kept."""

LATER = {
    37: "there is no scope above the department",
}
"""Numbers that nothing can be shown for, and why."""

VOID = {20, 46, 49}

_ROW = re.compile(r"\b([ABCDMSTW])(\d+)\b")
_CONFORMANCE = re.compile(r"\b[Cc]onformance (\d+(?:(?:, | and |, and |-)\d+)*)")


def docstrings() -> Iterator[str]:
    """The docstrings of all tests, and of checks that tests run."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(("test_", "check_")):
                yield ast.get_docstring(node) or ""


@functools.cache
def named() -> frozenset[str]:
    """The rows that docstrings name."""
    rows: set[str] = set()
    for text in docstrings():
        rows |= {f"{letter}{number}" for letter, number in _ROW.findall(text)}
        for numbers in _CONFORMANCE.findall(text):
            rows |= {f"Conformance {number}" for number in _numbers(numbers)}
    return frozenset(rows)


def _numbers(text: str) -> Iterator[int]:
    for part in re.split(r", and |, | and ", text):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


@pytest.mark.parametrize("kind", ROWS)
def test_every_row_is_named(kind: str) -> None:
    """Each promise is named in the docstring of a test."""
    seen = named()
    assert [f"{kind}{number}" for number in sorted(ROWS[kind]) if f"{kind}{number}" not in seen] == []


def test_numbers_are_complete() -> None:
    """Each conformance number is a kept promise, one for later with its reason, about identity, or void."""
    identity = {83, 84}
    kept = ROWS["Conformance "]
    assert kept | LATER.keys() | VOID | identity == set(range(1, 85))
    assert not kept & LATER.keys()
    assert all(LATER.values())
