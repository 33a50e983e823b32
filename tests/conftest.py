from __future__ import annotations

import hypothesis
import pytest

# The same examples on every run: a red test is the change's doing. `make check-full` searches for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, derandomize=False, max_examples=2_000)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Servers and SDKs of the tests are built on asyncio; one loop kind for all of them."""
    return "asyncio"
