from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asgi_llm_guard.sql import Database, open_database


@pytest.fixture(params=["sqlite", "memory", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of every kind."""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    else:
        url = "sqlite://:memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/test.db"
    database = open_database(url)
    yield database
    database.close()
