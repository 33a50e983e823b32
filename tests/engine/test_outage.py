"""A storage that does not answer: what waits to be settled, and how much of it."""

from __future__ import annotations

import pytest
from tests.engine.conftest import PRICES

from asgi_llm_guard import Budget, Context, Guard, LimitExceeded, Usage
from asgi_llm_guard.engine import _MOST_UNSETTLED
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"


async def test_cancellations_are_kept_in_bounds(clock: FrozenClock) -> None:
    """While the storage is away, refused calls leave a bounded number of cancellations behind."""
    storage = MemoryStorage(clock=clock)
    guard = Guard([Budget("$1/1d")], storage=storage, clock=clock, prices=PRICES)
    await storage.aclose()
    admission = guard.new_admission(Context(caller="acme"))
    for _ in range(_MOST_UNSETTLED + 100):
        denied = await admission.open(None)
        assert denied is not None
        assert (denied.code, denied.status) == ("guard_unavailable", 503)
    assert guard.engine.unsettled == _MOST_UNSETTLED


async def test_what_calls_have_used_is_kept_beyond_the_bound(clock: FrozenClock) -> None:
    """What a call has used is kept to be settled, however many cancellations wait."""
    storage = MemoryStorage(clock=clock)
    guard = Guard([Budget("$1/1d")], storage=storage, clock=clock, prices=PRICES)
    with pytest.raises(LimitExceeded):
        async with (
            guard.open(Context(caller="acme")),
            guard.call(model=MODEL, input_tokens=1, max_output_tokens=1) as call,
        ):
            await storage.aclose()
            for _ in range(_MOST_UNSETTLED + 1):
                await guard.new_admission(Context()).open(None)
            call.record(Usage(input_tokens=1, output_tokens=1))
            await guard.call(model=MODEL, input_tokens=1, max_output_tokens=1).__aenter__()
    assert guard.engine.unsettled == _MOST_UNSETTLED + 1
