from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asgi_llm_guard.sql import Database, open_database


@pytest.fixture(params=["sqlite", "memory", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of every kind."""
    yield from _opened(request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def kept_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of each kind that others can open too."""
    yield from _opened(request, tmp_path)


def _opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    else:
        url = "sqlite://:memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/test.db"
    database = open_database(url)
    yield database
    database.close()
