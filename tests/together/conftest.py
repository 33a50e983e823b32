from __future__ import annotations

import pytest

from asgi_llm_guard.testing import FrozenClock


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()
