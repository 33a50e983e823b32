"""What Hypothesis draws: the same examples in every process, whatever ran there before."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CONSTANTS = tuple(range(123_456_000, 123_456_100))


def drawn() -> list[int]:
    seen: list[int] = []

    @settings(derandomize=True, database=None, max_examples=300)
    @given(number=st.integers())
    def draw(number: int) -> None:
        seen.append(number)

    draw()
    return seen


def test_examples_do_not_depend_on_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A module that was loaded meanwhile changes no example, but in the long search for new ones."""
    searches = request.config.getoption("--hypothesis-profile") == "full"
    before = drawn()
    path = tmp_path_factory.mktemp("loaded") / "numbers_of_ours.py"
    path.write_text(f"NUMBERS = {CONSTANTS!r}\n", "utf-8")
    spec = spec_from_file_location("numbers_of_ours", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "numbers_of_ours", module)
    after = drawn()
    assert (after != before) is searches
    assert bool(set(CONSTANTS).intersection(after)) is searches
