from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.control.kit import CLOCK_MS, SECRET

from asgi_llm_guard.control import Control
from asgi_llm_guard.testing import FrozenClock


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(CLOCK_MS)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return f"sqlite:///{tmp_path}/control.db"


@pytest.fixture
def open_control(database_url: str, clock: FrozenClock) -> Iterator[Callable[[], Control]]:
    """Opens the same database again and again, as other processes do."""
    opened: list[Control] = []

    def open_() -> Control:
        opened.append(Control(database_url, secret=SECRET, clock=clock))
        return opened[-1]

    yield open_
    for control in opened:
        control.database.close()


@pytest.fixture
def control(open_control: Callable[[], Control]) -> Control:
    return open_control()
