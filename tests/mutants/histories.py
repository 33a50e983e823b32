"""The random histories as `make mutants` runs them: on the memory storage only, which is quick."""

from __future__ import annotations

from tests.storage.test_machine import run


def test_random_histories_on_the_memory_storage() -> None:
    """The memory storage answers as the oracle works out."""
    run(24, 40, range(5), kinds=("memory",), shrink=False)
