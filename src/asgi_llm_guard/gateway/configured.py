"""A gateway from a configuration: the table `[gateway]`, as the arguments of `Gateway`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.health import CooldownRules
from asgi_llm_guard.gateway.policy import Fallbacks, RetryRules
from asgi_llm_guard.gateway.router import TierDown
from asgi_llm_guard.gateway.strategies import strategy_named

__all__ = ["gateway_arguments"]

_DEPLOYMENTS: Final = ("deployments", "models", "model_list")
_FALLBACKS: Final = {
    "fallbacks": "models",
    "default_fallbacks": "default",
    "context_window_fallbacks": "context",
    "content_policy_fallbacks": "content",
    "max_fallbacks": "max_depth",
}
"""What they are called in a file, as in LiteLLM's."""
_RULES: Final[Mapping[str, type[msgspec.Struct]]] = {
    "retry": RetryRules,
    "cooldowns": CooldownRules,
    "tier_down": TierDown,
}
_KEYS: Final = (*_DEPLOYMENTS, "aliases", "strategy", *_FALLBACKS, *_RULES)


def gateway_arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `Gateway`, but for its guard.

    Raises:
        ConfigurationError: a key is not known, or a value is wrong; names it.
    """
    unknown = sorted(map(str, table.keys() - set(_KEYS)))
    if unknown:
        raise ConfigurationError(f"{unknown[0]}: unknown key; expected one of {', '.join(_KEYS)}")
    entries = next((table[name] for name in _DEPLOYMENTS if name in table), None)
    if not isinstance(entries, list):
        raise ConfigurationError("deployments: expected a list of tables, such as [[gateway.deployments]]")
    arguments: dict[str, Any] = {"deployments": entries}
    if "aliases" in table:
        arguments["aliases"] = _table(table["aliases"], "aliases")
    if "strategy" in table:
        strategy_named(table["strategy"])
        arguments["strategy"] = table["strategy"]
    chosen = {_FALLBACKS[name]: table[name] for name in _FALLBACKS if name in table}
    if chosen:
        arguments["fallbacks"] = Fallbacks(**chosen)
    for name, rules in _RULES.items():
        if name in table:
            arguments[name] = _rules(rules, _table(table[name], name), name)
    return arguments


def _rules(kind: type[msgspec.Struct], given: Mapping[str, Any], where: str) -> msgspec.Struct:
    known = tuple(name for name in kind.__struct_fields__ if name != "groups")
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ConfigurationError(f"{where}.{unknown[0]}: unknown key; expected one of {', '.join(known)}")
    try:
        return kind(**given)
    except (ConfigurationError, TypeError) as error:  # TypeError: one that must be given is missing
        raise ConfigurationError(f"{where}: {error}") from None


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where}: expected a table, got a {type(value).__name__}")
    return value
