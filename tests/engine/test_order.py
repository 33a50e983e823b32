"""Which policy a refusal names."""

from __future__ import annotations

import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Context, Iterations, RateLimit
from asgi_llm_guard.policies.base import Policy

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "policies",
    [(RateLimit("0/minute"), Iterations(0)), (Iterations(0), RateLimit("0/minute"))],
    ids=["rate first", "iterations first"],
)
async def test_first_refusing_policy_is_named(new_guard: NewGuard, policies: tuple[Policy, ...]) -> None:
    """Where several policies refuse, the first in their order is named, whatever it counts; the rest are listed."""
    guard = new_guard(*policies)
    denied = await guard.new_admission(Context(caller="acme", session="s")).open(None)
    assert denied is not None
    assert denied.policy == policies[0].name
    assert denied.violated == tuple(policy.name for policy in policies)
