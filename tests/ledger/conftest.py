from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.testing import FrozenClock


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of every kind that ledgers are kept in."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def ledger(url: str, clock: FrozenClock) -> Iterator[Ledger]:
    ledger = Ledger.open(url, clock=clock)
    yield ledger
    ledger.database.close()
