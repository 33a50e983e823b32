"""What a guard goes by at one instant. Replaced as a whole, so that nobody sees half of it.

Rule 1: a request, a job or a call outside of one goes by the configuration of the instant at which it begins, to its end.

Rule 2: what is replaced is checked as a whole before any of it is in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import Resolver
from asgi_llm_guard.identity.extract import Extractor
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.routes import Route, RouteTable, normalise
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.wire import dialect_for, dialect_named

__all__ = ["UNSET", "Configuration", "Unset", "check_routes"]


class Unset(Enum):
    """Beside `None`, which says that there is none."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


class Configuration(msgspec.Struct, frozen=True, eq=False):
    """What new requests, jobs and calls go by."""

    policies: tuple[Policy, ...]
    """Bound."""
    identity: Resolver | None
    session: Extractor
    session_declared: bool
    streams: StreamRules
    routes: tuple[Route, ...] | None = None
    """Those that were put in the place of a middleware's own; `None`: none were."""


def check_routes(routes: Sequence[Route] | None) -> None:
    """See whether a middleware can be given these routes.

    Raises:
        ConfigurationError: it cannot.
    """
    for route in RouteTable(routes).routes or ():
        if route.dialect not in {None, "auto"}:
            dialect_named(str(route.dialect))
        elif (route.clamp or route.inject_usage) and dialect_for(normalise(route.path)) is None:
            raise ConfigurationError(
                f"Route {route.path}: clamp and inject_usage change the body, and no dialect is known by this path; "
                "name it: dialect='openai'"
            )
