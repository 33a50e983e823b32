"""Short ways to say what the tests of shared things are about."""

from __future__ import annotations

from typing import Protocol

from tests.storage.values import HOUR_MS, START_MS

from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.shared import KeepsShared, ListsCalls

HOUR = START_MS - START_MS % HOUR_MS
"""When the hour began in which the tests' clock stands."""


class Sharing(Storage, KeepsShared, ListsCalls, Protocol):
    """A storage that keeps what processes share, and lists open calls."""
