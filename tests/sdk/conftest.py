"""Every test of this folder runs on each storage, and the simple ones in every way of calling the SDK."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.sdk.service import WAYS, Way


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    assert request.param in WAYS
    chosen: Way = request.param
    return chosen
