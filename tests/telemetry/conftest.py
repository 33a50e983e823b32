from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.telemetry.kit import Telemetry, telemetry

from asgi_llm_guard.testing import FrozenClock


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def told() -> Iterator[Telemetry]:
    """What the guard of the test tells."""
    with telemetry() as made:
        yield made
