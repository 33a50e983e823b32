"""Which of several deployments may be asked, by what their providers have spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_llm_guard.admission import ActiveCall, current_scope
from asgi_llm_guard.context import Context
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.errors import LimitExceeded, StorageError
from asgi_llm_guard.policies.base import DeploymentFilter, Policy

__all__ = ["under_budget"]


async def under_budget(engine: Engine, policies: Sequence[Policy], deployments: object) -> list[Any]:
    """Those of `deployments` (a list, or a single one) that none of the policies rules out.

    Raises:
        LimitExceeded: none is left.
        StorageError: the storage does not answer, and a budget says `on_outage="deny"`.
    """
    kept = deployments
    for policy in policies:
        if not isinstance(policy, DeploymentFilter):
            continue
        candidates = policy.resolve(kept)
        meters = policy.meters(candidates.providers)
        try:
            readings = await engine.storage.read(list(meters.values()))
        except StorageError:
            if any(meter.on_outage == "deny" for meter in meters.values()):
                raise
            continue  # what is left is not known; each call is decided on when it is made
        limits = dict(zip(meters, engine.overrides.raised(list(meters.values())), strict=True))
        outcome = policy.eligible(candidates, dict(zip(meters, readings, strict=True)), limits)
        denied = outcome.denied(engine.clock.now_ms())
        if denied is not None:
            raise LimitExceeded(engine.telling.denied(_asking(), None, denied))
        kept = outcome.deployments
    return list(kept) if isinstance(kept, (list, tuple)) else [kept]


def _asking() -> Context:
    """Who asks where this code runs; nobody, outside of any request and job."""
    scope = current_scope()
    if scope is None:
        return Context()
    return (scope.admission if isinstance(scope, ActiveCall) else scope).context
