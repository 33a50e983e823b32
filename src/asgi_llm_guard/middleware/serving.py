"""What a middleware serves by: its routes, worked out under one configuration of the guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from asgi_llm_guard.configuration import Configuration
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.idempotency import ttl_ms
from asgi_llm_guard.middleware.plan import Plan
from asgi_llm_guard.routes import Route, RouteTable

__all__ = ["Serving"]


class Serving:
    """Made anew when the guard's configuration is replaced; requests that run go on under the one they began with.

    Raises:
        ConfigurationError: a route is wrong.
    """

    __slots__ = ("_guard", "_plans", "configuration", "table")

    def __init__(
        self,
        guard: Guard,
        configuration: Configuration,
        routes: Sequence[Route] | None,
        *,
        exempt: Sequence[str],
        unlisted: Literal["deny", "pass"],
    ) -> None:
        self._guard = guard
        self.configuration = configuration
        self.table = RouteTable(routes, exempt=exempt, unlisted=unlisted)
        self._plans: dict[int, Plan] = {}
        for route in self.table.routes or ():
            self.plan(route)

    @property
    def replays(self) -> bool:
        """Whether a route keeps answers for their idempotency keys."""
        return any(route.idempotency for route in self.table.routes or ())

    def plan(self, route: Route) -> Plan:
        """What a route means for its requests."""
        plan = self._plans.get(id(route))  # the table keeps every route alive
        if plan is None:
            configuration = self.configuration
            streams = route.streams or configuration.streams
            plan = Plan(
                route,
                self._guard.engine.bind(route.extra),
                route.session is not None or configuration.session_declared,
                ttl_ms(route.idempotency, name=f"Route {route.path}"),
                streams,
                streams.watches,
                configuration,
            )
            self._plans[id(route)] = plan
            self._guard.know_route(route.path, plan.extra)
        return plan
