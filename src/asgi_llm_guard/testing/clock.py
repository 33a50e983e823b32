"""A clock that stands still."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["NEW_YEAR", "FrozenClock"]

NEW_YEAR: Final = datetime(2026, 1, 1, tzinfo=UTC)


class FrozenClock:
    """A clock that stands still until it is moved, forwards or backwards."""

    def __init__(self, at: int | datetime = NEW_YEAR) -> None:
        """`at`: milliseconds since the epoch, or an aware `datetime`."""
        self._now_ms = _instant_ms(at)

    def now_ms(self) -> int:
        return self._now_ms

    def advance(self, *, seconds: float = 0, ms: int = 0) -> None:
        """Move by so much; negative steps back, as a host's clock may."""
        self._now_ms += round(seconds * 1000) + ms

    def set(self, at: int | datetime) -> None:
        self._now_ms = _instant_ms(at)


def _instant_ms(at: int | datetime) -> int:
    if isinstance(at, int):
        return at
    if at.tzinfo is None:
        raise ConfigurationError(f"at: expected an aware datetime, got {at!r}; give it a tzinfo such as datetime.UTC")
    return round(at.timestamp() * 1000)
