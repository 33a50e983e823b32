"""What a route means for its requests."""

from __future__ import annotations

import msgspec

from asgi_llm_guard.configuration import Configuration
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.routes import Route
from asgi_llm_guard.stream_rules import StreamRules

__all__ = ["Plan", "is_opaque"]


class Plan(msgspec.Struct, frozen=True):
    """What a route means for its requests, worked out once."""

    route: Route
    extra: tuple[Policy, ...]
    session_declared: bool
    replay_ms: int | None
    """How long answers are kept for their idempotency keys; `None`: not at all."""
    streams: StreamRules
    watches: bool
    """`StreamRules.watches`, looked up for every request."""
    configuration: Configuration


def is_opaque(guard: Guard, route: Route) -> bool:
    """Whether calls may be made on a route that nobody sees."""
    return not guard.hooked if route.calls == "auto" else route.calls == "opaque"
