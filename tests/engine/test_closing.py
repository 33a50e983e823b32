"""A guard that was closed keeps quiet."""

from __future__ import annotations

import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Context, Iterations, background
from asgi_llm_guard.events import Event, StorageFailed

pytestmark = pytest.mark.anyio


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)


async def test_closed_guard_sends_no_heartbeats(new_guard: NewGuard) -> None:
    """After `aclose` no heartbeat is sent, and one that was on its way is not taken for a failing store."""
    seen = Seen()
    guard = new_guard(Iterations(1), observers=[seen])
    async with guard.open(Context(session="s")), guard.call(model="openai/test-model"):
        assert guard.engine.heart in background._background._hearts

    await guard.aclose()
    await guard.heartbeat()

    assert guard.engine.heart not in background._background._hearts
    assert [event for event in seen.events if isinstance(event, StorageFailed)] == []
