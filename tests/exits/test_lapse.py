"""Holds that lapsed while their request lived, because its process sent no heartbeat in time."""

from __future__ import annotations

import pytest
from tests.exits.kit import CONTEXT, MAX_TOKENS, MODEL, PRICES

from asgi_llm_guard import Budget, Concurrency, Guard, Iterations, LimitExceeded, guarded
from asgi_llm_guard.admission import enter, leave
from asgi_llm_guard.storage.base import LAPSE_MS, Storage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("fits", [True, False])
async def test_function_inside_a_request_that_lapsed(storage: Storage, clock: FrozenClock, *, fits: bool) -> None:
    """A `@guarded` function that finds its request's hold expired claims its own, and its slot once: all is free after."""
    guard = Guard(
        (Iterations(2 if fits else 1), Budget("$1/1d", per="global")), storage=storage, clock=clock, prices=PRICES
    )
    ran = []

    @guarded(Concurrency(1, per="global", name="one"), model=MODEL, max_output_tokens=MAX_TOKENS)
    async def function() -> None:
        ran.append(await storage.open_holds())

    admission = guard.new_admission(CONTEXT)
    await admission.open(guard.describe(MODEL, input_tokens=10, max_output_tokens=5))
    token = enter(admission.scope)
    clock.advance(ms=LAPSE_MS + 1)
    await storage.heartbeat("another")
    try:
        if fits:
            await function()
        else:
            with pytest.raises(LimitExceeded):
                await function()
    finally:
        leave(token)
    await admission.close()
    assert ran == ([2] if fits else [])  # its call and its slot
    assert await storage.open_holds() == 0
    assert [record.outcome for record in await storage.records()] == ["expired", "unmetered"][: 1 + fits]
