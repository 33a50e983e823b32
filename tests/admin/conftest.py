from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.admin.kit import Desk, desk


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Desk]:
    """A service with its administration page, and administration data."""
    made = desk(tmp_path)
    await made.guard.chores.run("control")
    yield made
    await made.aclose()
