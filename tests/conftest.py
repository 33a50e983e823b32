from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Servers and SDKs of the tests are built on asyncio; one loop kind for all of them."""
    return "asyncio"
