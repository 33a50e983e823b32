"""Session ids beyond a caller's bound, where they share one counter."""

from __future__ import annotations

import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Context, Iterations, LimitExceeded, Usage
from asgi_llm_guard.admission import enter, leave

pytestmark = pytest.mark.anyio


async def test_calls_of_sessions_beyond_the_bound_share_a_counter(new_guard: NewGuard) -> None:
    """T3, T10: what new sessions share they share in every call of a request: no fresh id brings fresh iterations."""
    guard = new_guard(Iterations(4), session_limit=1, session_overflow="share")
    admitted = 0
    for number in range(20):
        admission = guard.new_admission(Context(caller="acme", session=f"s{number}"))
        if await admission.open(None) is not None:
            continue
        token = enter(admission.scope)
        try:
            for _ in range(3):
                async with guard.call(model="openai/test-model", input_tokens=1, max_output_tokens=1) as call:
                    call.record(Usage(input_tokens=1, output_tokens=1))
                    admitted += 1
        except LimitExceeded:
            pass
        finally:
            leave(token)
            await admission.end()
    assert admitted == 3 + 4  # the first session's own, and what all others share
    assert {record.session for record in await guard.storage.records()} == {"s0", "s1", "s2"}
