"""What a guard is told, looked at before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.stream_rules import StreamRules

__all__ = [
    "check_agents",
    "check_extractor",
    "check_one_of",
    "check_resolver",
    "check_seconds",
    "check_stream_rules",
    "check_whole",
]


def check_one_of(name: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def check_resolver(identity: object) -> None:
    if identity is not None and not callable(identity):
        raise ConfigurationError(f"identity: expected a resolver such as ApiKeys(...) or ScopeUser(), got {identity!r}")


def check_stream_rules(streams: object) -> None:
    if streams is not None and not isinstance(streams, StreamRules):
        raise ConfigurationError(f"streams: expected StreamRules such as StreamRules(cut=True), got {streams!r}")


def check_extractor(name: str, value: object) -> None:
    if not callable(getattr(value, "extract", None)):
        raise ConfigurationError(f"{name}: expected an extractor such as header('x-session-id'), got {value!r}")


def check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_AMOUNT:
        raise ConfigurationError(f"{name}: expected a whole number from 1, got {value!r}")


def check_seconds(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ConfigurationError(f"{name}: expected seconds from 0 to {most}, got {value!r}")


def check_agents(agents: Mapping[str, Mapping[str, object]] | None) -> Mapping[str, Mapping[str, object]]:
    for agent, limits in (agents or {}).items():
        if not isinstance(limits, Mapping):
            raise ConfigurationError(
                f"agents.{agent}: expected limits such as {{'max_iterations': 25}}, got {limits!r}"
            )
        for name in limits:
            if name != "max_iterations" and not str(name).startswith("x_"):
                raise ConfigurationError(
                    f"agents.{agent}: {name!r} is no limit; known is max_iterations, and names of your own begin with x_"
                )
    return dict(agents or {})
