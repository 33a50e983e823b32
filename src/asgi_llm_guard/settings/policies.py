"""Policies, routes, streams and departments, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, cast

from pydantic import Field, model_validator

from asgi_llm_guard.policies import (
    Budget,
    CacheScope,
    Concurrency,
    DepartmentQuota,
    Iterations,
    ModelAllow,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
)
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.routes import Route
from asgi_llm_guard.settings.parts import Arguments, Sources, construct, extractor_of
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.wire import dialect_named

__all__ = ["DepartmentSettings", "PolicySettings", "RouteSettings", "StreamSettings"]

_POLICIES: Final[Mapping[str, Callable[..., Any]]] = {
    "budget": Budget,
    "cache_scope": CacheScope,
    "concurrency": Concurrency,
    "iterations": Iterations,
    "model_allow": ModelAllow,
    "provider_budget": ProviderBudget,
    "quota": Quota,
    "rate_limit": RateLimit,
}


class PolicySettings(Arguments):
    """One `[[policies]]` table: a kind, and the arguments of that policy."""

    kind: Literal[
        "budget", "cache_scope", "concurrency", "iterations", "model_allow", "provider_budget", "quota", "rate_limit"
    ]
    shadow: bool = False
    """Only watch: report what would have been refused, and refuse nothing."""

    @model_validator(mode="after")
    def _check(self) -> PolicySettings:
        self.build(QuotaBook())
        return self

    def build(self, book: QuotaBook) -> Policy:
        """The policy. `book` holds the quotas of departments, for the kind `quota`."""
        ours = {"book": book} if self.kind == "quota" else {}
        policy = construct(_POLICIES[self.kind], self.arguments(), also=("kind", "shadow"), **ours)
        return cast("Policy", policy.shadow() if self.shadow else policy)


class StreamSettings(Arguments):
    """`[streams]`, or `streams` of a route: the arguments of `StreamRules`."""

    @model_validator(mode="after")
    def _check(self) -> StreamSettings:
        self.build()
        return self

    def build(self) -> StreamRules:
        """The rules."""
        return cast("StreamRules", construct(StreamRules, self.arguments()))


class RouteSettings(Arguments):
    """One `[[routes]]` table: the arguments of `Route`."""

    dialect: str = "auto"
    """As `Route`; `none` for routes whose bodies are not read."""
    extra: list[PolicySettings] = Field(default_factory=list)
    session: Sources | None = None
    streams: StreamSettings | None = None

    @model_validator(mode="after")
    def _check(self) -> RouteSettings:
        self.build(QuotaBook())
        if self.dialect not in {"auto", "none"}:
            dialect_named(self.dialect)
        return self

    def build(self, book: QuotaBook) -> Route:
        """The route."""
        return cast(
            "Route",
            construct(
                Route,
                self.arguments(),
                also=("dialect", "extra", "session", "streams"),
                dialect=None if self.dialect == "none" else self.dialect,
                extra=[policy.build(book) for policy in self.extra],
                session=None if self.session is None else extractor_of(self.session),
                streams=None if self.streams is None else self.streams.build(),
            ),
        )


class DepartmentSettings(Arguments):
    """One `[departments.…]` table: the arguments of `DepartmentQuota`."""

    models: list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> DepartmentSettings:
        self.build()
        return self

    def build(self) -> DepartmentQuota:
        """The quota."""
        return cast(
            "DepartmentQuota", construct(DepartmentQuota, self.arguments(), also=("models",), models=self.models)
        )
