"""The matrix: every client of `clients.py` in every mode, in every case of `cases.py`."""

from __future__ import annotations

import pytest
from tests.matrix.cases import Cases
from tests.matrix.clients import WAYS

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("kind", "mode"), WAYS)
class TestMatrix(Cases):
    """Each SDK in `.venv`."""
