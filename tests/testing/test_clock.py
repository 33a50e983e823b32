"""The clock that stands still."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.testing import FrozenClock


def test_stands_still_until_moved() -> None:
    """Time passes by `advance` and by nothing else, to the millisecond."""
    clock = FrozenClock(1_000)

    clock.advance(seconds=1.5)
    clock.advance(ms=1)

    assert clock.now_ms() == 2_501
    assert clock.now_ms() == 2_501


def test_steps_back() -> None:
    """A negative step goes back, as a host's clock may."""
    clock = FrozenClock(1_000)

    clock.advance(seconds=-2)

    assert clock.now_ms() == -1_000


def test_takes_datetimes() -> None:
    """An aware datetime is an instant; without one the clock shows the beginning of 2026."""
    clock = FrozenClock()
    assert clock.now_ms() == 1_767_225_600_000

    clock.set(datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC))

    assert clock.now_ms() == 2_000


def test_refuses_naive_datetimes() -> None:
    """A datetime without a zone is not an instant."""
    with pytest.raises(ConfigurationError, match="expected an aware datetime"):
        FrozenClock(datetime(2026, 1, 1))  # noqa: DTZ001 - what is refused
